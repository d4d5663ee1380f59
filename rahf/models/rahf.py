"""RAHF: the paper's figure in code (arXiv 2312.10240, section 4.1).

    image --ViT--> image tokens [B, P, D] --+
                                            +--concatenate, T5 encoder--> fused [B, R, N, D] --T5 decoder--> keywords
    texts --embedding--> [B, R, L, D] ------+                               |
                                              its image tokens as a map [B, R, h, w, D] --heads--> scores, heatmaps

Three variants, which differ in their texts and heads:

  multi_head                R = 1: the prompt. One head for each score and each heatmap.
  augmented_prompt          R = 7: the prompt with the name of each task of `schema.TASKS` before it. One score head and
                            one heatmap head, which read the texts of their tasks.
  augmented_prompt_pytorch  The same with the names of `schema.PYTORCH_TASKS`, as in the first author's PyTorch release.

The ViT reads an image once. Its R texts are R rows of the encoder's batch. The decoder reads the last text.

Logical axis names, which `rahf/partitioning.py` maps to the mesh:
  parameters   vocab, embed, joined_kv (T5: heads * kv in one axis), heads, kv, mlp, relpos_buckets, position,
               image_embed, conv_height, conv_width, conv_in, conv_out, score_in, score_out
  activations  batch, length, embed, heads, kv, mlp, vocab, height, width, conv_out
"""

import dataclasses
import typing
from collections.abc import Mapping
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from rahf.models import t5
from rahf.models.heads import HeatmapHead, HeatmapHeadConfig, ScoreHead, ScoreHeadConfig
from rahf.models.layers import Projection, normalize_image, partitioned
from rahf.models.t5 import T5, T5Config
from rahf.models.vit import ViT, ViTConfig
from richhf_data import checked, schema
from richhf_data.checked import Pixels
from richhf_data.errors import UserError

Array = jax.Array
MAX_PATCHES = 2**14  # T5's attention relates all pairs
# Where in `schema.TASKS` the scores and the heatmaps are. The keywords are last.
SCORE_TASKS = range(len(schema.SCORES))
HEATMAP_TASKS = range(len(schema.SCORES), len(schema.SCORES) + len(schema.HEATMAPS))


@dataclasses.dataclass(frozen=True)
class RAHFConfig:
    """The model; the defaults are the paper's sizes (ViT-B/16, T5 base) at 224 pixels."""

    architecture: Literal["rahf"] = "rahf"
    variant: Literal[schema.VARIANTS] = "multi_head"
    image_size: Pixels = 224  # both sides
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of the computation; parameters and outputs are float32
    # "text": only the prompt's positions, as in the first author's PyTorch release
    decoder_attends: Literal["fused", "text"] = "fused"
    mask_padding: bool = True  # False: encoder and decoder attend to the prompt's padding, as in that release
    image_projection: bool = False  # True: project image tokens even where ViT and T5 are equally wide, as in that release
    word_head: bool = False  # True: a head for training alone says of each word whether it is misaligned; not in the paper
    vit: ViTConfig = dataclasses.field(default_factory=ViTConfig)
    t5: T5Config = dataclasses.field(default_factory=T5Config)
    score_head: ScoreHeadConfig = dataclasses.field(default_factory=ScoreHeadConfig)
    heatmap_head: HeatmapHeadConfig = dataclasses.field(default_factory=HeatmapHeadConfig)

    def __post_init__(self):
        checked.fields(self, "model")
        if self.image_size % self.vit.patch_size:
            raise UserError(
                f"image_size: got {self.image_size}, expected a multiple of vit.patch_size = {self.vit.patch_size}"
            )
        if self.grid**2 > MAX_PATCHES:
            raise UserError(
                f"image_size: got {self.image_size}, which gives {self.grid**2:,} patches of vit.patch_size = "
                f"{self.vit.patch_size}, expected at most {MAX_PATCHES:,}"
            )

    parts = schema.PARTS  # that it predicts

    @property
    def deviations(self) -> bool:
        """Whether it predicts the deviations of its scores."""
        return self.score_head.deviation

    @property
    def num_texts(self) -> int:
        """R, the texts that the model reads for an image."""
        return schema.num_texts(self.variant)

    @property
    def vocab_size(self) -> int:
        """The ids that it embeds."""
        return self.t5.vocab_size

    @property
    def grid(self) -> int:
        """h = w, the side of the feature map."""
        return self.image_size // self.vit.patch_size

    @property
    def projects_image(self) -> bool:
        """Whether a projection takes the image tokens to the width of T5."""
        return self.image_projection or self.vit.width != self.t5.emb_dim

    @property
    def heatmap_size(self) -> int:
        """Pixels on each side of the predicted heatmaps, and so of their targets."""
        return self.grid * 2 ** len(self.heatmap_head.deconv_filters)

    @classmethod
    def from_dict(cls, values: Mapping) -> "RAHFConfig":
        """From nested plain dictionaries, `{"image_size": 64, "vit": {"width": 96}}`. Absent options have their defaults.

        Raises:
          UserError: an unknown name (the message has the nearest known one) or a value of the wrong type.
        """
        return checked.conform(cls, values, "model")


class Outputs(typing.NamedTuple):
    """The result of a forward pass, in all variants; None for what a baseline does not predict."""

    scores: Array | None  # float32[B, 4] in [0, 1]
    heatmaps: Array | None  # float32[B, h, w, 2] in [0, 1]
    keyword_logits: Array | None  # float32[B, T, V]
    deviations: Array | None = None  # float32[B, 4], of the labels around the scores, above 0
    word_logits: Array | None = None  # float32[B, L], that the word of an id of the last text is misaligned


class RAHF(nn.Module):
    """The model. Parameters: vit, t5, image_projection and word_head (if it has them), score_head*, heatmap_head*.

    With `config.deviations` also deviation_factors float32[4]: by them a dev split calibrates the deviations
    (`evaluate.calibrated`). They are 1 before, and no training changes them.
    """

    config: RAHFConfig

    def setup(self):
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        self.vit = ViT(config.vit, dtype)
        self.t5 = T5(config.t5, dtype)
        if config.projects_image:
            axes, init = ("image_embed", "embed"), nn.initializers.lecun_normal()
            self.image_projection = Projection((config.t5.emb_dim,), axes, dtype=dtype, kernel_init=init)

        scores, heatmaps = [f"_{name}" for name in schema.SCORES], [f"_{name}" for name in schema.HEATMAPS]
        if config.variant != "multi_head":
            scores = heatmaps = [""]
        self.score_heads = [ScoreHead(config.score_head, dtype, name=f"score_head{suffix}") for suffix in scores]
        self.heatmap_heads = [HeatmapHead(config.heatmap_head, dtype, name=f"heatmap_head{suffix}") for suffix in heatmaps]
        if config.word_head:
            self.word_head = Projection((1,), ("embed", None), dtype=jnp.float32)
        if config.deviations:
            ones = partitioned(nn.initializers.ones, (None,))
            self.deviation_factors = self.param("deviation_factors", ones, (len(schema.SCORES),), jnp.float32)

    def encode_image(self, image: Array, train: bool = False) -> Array:
        """uint8[B, H, W, 3], or float in [-1, 1] -> dtype[B, P, D], D the width of T5. A class token adds one position.

        Raises:
          UserError: the image is not of `config.image_size`, or neither uint8 nor float.
        """
        size = self.config.image_size
        if image.ndim != 4 or image.shape[1:] != (size, size, 3):
            raise UserError(f"image: got shape {image.shape}, expected [B, {size}, {size}, 3] (config image_size)")
        tokens = self.vit(normalize_image(image), train)  # [B, P, width of the ViT]
        if self.config.projects_image:
            tokens = self.image_projection(tokens)  # [B, P, D]
        return tokens

    def encode(self, image_tokens: Array, text_ids: Array, train: bool = False) -> tuple[Array, Array]:
        """Image tokens, then the tokens of each text, through the T5 encoder with full self-attention.

        Args:
          image_tokens: dtype[B, P, D]. text_ids: int32[B, R, L], 0 = padding.

        Returns:
          fused dtype[B, R, N, D] and its mask bool[B, R, N] (True = keep), N = P + L.
        """
        rows = text_ids.shape[:2]  # B, R
        tokens = jnp.broadcast_to(image_tokens[:, None], (*rows, *image_tokens.shape[1:]))
        tokens, text_ids = (x.reshape(-1, *x.shape[2:]) for x in (tokens, text_ids))  # [B * R, P, D], [B * R, L]
        fused = jnp.concatenate([tokens, self.t5.embed(text_ids)], axis=1)  # [B * R, N, D]
        keep = text_ids != schema.PAD_ID if self.config.mask_padding else jnp.ones(text_ids.shape, bool)
        mask = jnp.concatenate([jnp.ones(tokens.shape[:2], bool), keep], axis=1)
        fused = nn.with_logical_constraint(fused, ("batch", "length", "embed"))
        fused = self.t5.encode(fused, mask, train)
        return fused.reshape(*rows, *fused.shape[1:]), mask.reshape(*rows, -1)

    def __call__(self, image: Array, text_ids: Array, keyword_ids: Array, train: bool = False) -> Outputs:
        """The forward pass of a training step.

        Args:
          image: uint8[B, H, W, 3], or float in [-1, 1].
          text_ids: int32[B, R, L], R = `config.num_texts`; the texts of the augmented-prompt variants in the order
            of `schema.TASKS`.
          keyword_ids: int32[B, T], the targets. They are shifted right here: position t is predicted from the ids before t.
          train: whether dropout is on (needs the "dropout" random stream).

        Returns:
          `Outputs`.

        Raises:
          UserError: a shape that does not fit the config.
        """
        outputs, fused, mask = self._perceive(image, text_ids, train)
        logits = self.t5.decode(*self._for_decoder(fused, mask), t5.shift_right(keyword_ids), train)
        words = self.word_head(self._text(fused[:, None])[:, 0])[..., 0] if self.config.word_head else None
        return outputs._replace(keyword_logits=logits, word_logits=words)

    def perceive(self, image: Array, text_ids: Array, train: bool = False) -> tuple[Array, Array, Array, Array]:
        """Scores and heatmaps without the decoder. Differentiable in a float `image`, for guidance.

        Returns:
          scores float32[B, 4], heatmaps float32[B, h, w, 2], and for the decoder fused dtype[B, N, D], mask bool[B, N].
        """
        outputs, fused, mask = self._perceive(image, text_ids, train)
        return outputs.scores, outputs.heatmaps, fused, mask

    def _perceive(self, image: Array, text_ids: Array, train: bool = False) -> tuple[Outputs, Array, Array]:
        texts, variant = self.config.num_texts, self.config.variant
        if text_ids.ndim != 3 or text_ids.shape[1] != texts:
            raise UserError(f"text_ids: got shape {text_ids.shape}, expected [B, {texts}, L] in the {variant} variant")
        tokens = self.encode_image(image, train)
        fused, mask = self.encode(tokens, text_ids, train)  # [B, R, N, D], [B, R, N]
        grid = self._feature_map(fused)  # [B, R, h, w, D]
        text, keep = self._text(fused), self._text(mask)  # [B, R, L, D], [B, R, L]
        scores, deviations = self._predict_tasks(self.score_heads, SCORE_TASKS, grid, text, keep), None  # [B, 4]
        if self.config.deviations:  # [B, 2, 4]
            scores, deviations = scores[:, 0], scores[:, 1] * jax.lax.stop_gradient(self.deviation_factors)[None]
        heatmaps = self._predict_tasks(self.heatmap_heads, HEATMAP_TASKS, grid)  # [B, h, w, 2]
        return Outputs(scores, heatmaps, None, deviations), fused[:, -1], mask[:, -1]

    def predict(
        self, image: Array, text_ids: Array, max_length: int, copy: Array | None = None
    ) -> tuple[Array, ...]:
        """All seven predictions, the keywords decoded greedily.

        Args:
          image, text_ids: as for a forward pass. max_length: T, the longest keyword sequence.
          copy: as for `T5.greedy_decode`.

        Returns:
          scores float32[B, 4], heatmaps float32[B, h, w, 2], keyword_ids int32[B, T]: ids, the end id 1, zeros; and with
          `config.deviations` these, float32[B, 4].
        """
        outputs, fused, mask = self._perceive(image, text_ids)
        ids = self.t5.greedy_decode(*self._for_decoder(fused, mask), max_length, copy)
        found = outputs.scores, outputs.heatmaps, ids
        return found if outputs.deviations is None else (*found, outputs.deviations)

    def _feature_map(self, fused: Array) -> Array:
        """[B, R, N, D] -> [B, R, h, w, D]: the fused image tokens without the class token."""
        grid, first = self.config.grid, int(self.config.vit.class_token)
        x = fused[:, :, first : first + grid * grid]
        return x.reshape(*x.shape[:2], grid, grid, x.shape[-1])

    def _text(self, x: Array) -> Array:
        """[B, R, N, ...] -> [B, R, L, ...]: the positions of the texts."""
        return x[:, :, self.config.grid**2 + int(self.config.vit.class_token) :]

    def _for_decoder(self, fused: Array, mask: Array) -> tuple[Array, Array]:
        """fused [B, N, D] and mask [B, N], or only the text's positions, as the config says."""
        if self.config.decoder_attends == "fused":
            return fused, mask
        return self._text(fused[:, None])[:, 0], self._text(mask[:, None])[:, 0]  # [B, L, D]

    def _predict_tasks(self, heads: list[ScoreHead] | list[HeatmapHead], tasks: range, *inputs: Array) -> Array:
        """The heads' inputs, [B, R, ...] -> their outputs, stacked on the last axis in the order of `tasks`.

        multi_head: each task has a head, which reads the image's one text. Otherwise one head reads the texts of these
        tasks as one batch.
        """
        if self.config.variant == "multi_head":
            return jnp.stack([head(*(x[:, 0] for x in inputs)) for head in heads], axis=-1)
        inputs, (head,) = [x[:, tasks.start : tasks.stop] for x in inputs], heads
        y = head(*(x.reshape(-1, *x.shape[2:]) for x in inputs))  # [B * tasks, ...]
        return jnp.moveaxis(y.reshape(-1, len(tasks), *y.shape[1:]), 1, -1)
