"""RAHF: the paper's figure in code (arXiv 2312.10240, section 4.1).

    image --ViT--> image tokens [B, P, D] --+
                                            +--concatenate, T5 encoder--> fused [B, N, D] --T5 decoder--> keywords
    prompt --embedding--> [B, L, D] --------+                               |
                                                 its image tokens as a map [B, h, w, D] --heads--> scores, heatmaps

Two variants. `multi_head`: one head per score and per heatmap, one pass gives the seven predictions.
`augmented_prompt`: one head of each kind, and the text names the task. The image goes through the ViT once, its seven
texts are one batch for the encoder, and a head or the decoder runs on the rows alone whose task needs it.

Logical axis names, which `rahf/partitioning.py` maps to the mesh:
  parameters   vocab, embed, joined_kv (T5: heads * kv in one axis), heads, kv, mlp, relpos_buckets, position,
               image_embed, conv_height, conv_width, conv_in, conv_out, score_in, score_out
  activations  batch, length, embed, heads, kv, mlp, vocab, height, width, conv_out
"""

import dataclasses
import difflib
import typing
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from rahf.models import t5
from rahf.models.heads import HeatmapHead, HeatmapHeadConfig, ScoreHead, ScoreHeadConfig
from rahf.models.t5 import T5, T5Config
from rahf.models.vit import Projection, ViT, ViTConfig
from richhf_data import schema
from richhf_data.errors import UserError

Array = jax.Array
NUM_SCORES, NUM_HEATMAPS, NUM_TASKS = len(schema.SCORES), len(schema.HEATMAPS), len(schema.TASKS)
SCORE_TASKS = range(NUM_SCORES)
HEATMAP_TASKS = range(NUM_SCORES, NUM_SCORES + NUM_HEATMAPS)
KEYWORD_TASK = NUM_TASKS - 1


@dataclasses.dataclass(frozen=True)
class RAHFConfig:
    """The model; the defaults are the paper's sizes (ViT-B/16, T5 base) at 224 pixels."""

    variant: str = "multi_head"
    image_size: int = 224  # pixels, both sides
    dtype: str = "float32"  # of the computation; parameters, scores, heatmaps and logits are float32
    decoder_attends: str = "fused"  # or "text": the prompt's positions alone, as in the first author's PyTorch release
    mask_padding: bool = True  # False, as in that release: the encoder and the decoder attend to the prompt's padding
    vit: ViTConfig = dataclasses.field(default_factory=ViTConfig)
    t5: T5Config = dataclasses.field(default_factory=T5Config)
    score_head: ScoreHeadConfig = dataclasses.field(default_factory=ScoreHeadConfig)
    heatmap_head: HeatmapHeadConfig = dataclasses.field(default_factory=HeatmapHeadConfig)

    def __post_init__(self):
        for name, allowed in (
            ("variant", schema.VARIANTS),
            ("dtype", ("float32", "bfloat16", "float16")),
            ("decoder_attends", ("fused", "text")),
        ):
            if getattr(self, name) not in allowed:
                raise UserError(f"{name}: got {getattr(self, name)!r}, expected one of {allowed}")
        if self.image_size % self.vit.patch_size:
            raise UserError(
                f"image_size: got {self.image_size}, expected a multiple of vit.patch_size = {self.vit.patch_size}"
            )

    @property
    def grid(self) -> int:
        """h = w, the side of the feature map."""
        return self.image_size // self.vit.patch_size

    @property
    def heatmap_size(self) -> int:
        """Side of the predicted heatmaps, which the targets must have too."""
        return self.grid * 2 ** len(self.heatmap_head.deconv_filters)

    @classmethod
    def from_dict(cls, values: Mapping) -> "RAHFConfig":
        """From nested plain dictionaries, `{"image_size": 64, "vit": {"width": 96}}`; what is absent has its default.

        Raises:
          UserError: an unknown name (the message has the nearest known one) or a value of another type.
        """
        return _from_dict(cls, values, "")


def _from_dict(cls, values: Mapping, prefix: str):
    types = typing.get_type_hints(cls)
    if not isinstance(values, Mapping):
        raise UserError(f"{prefix[:-1]}: got {values!r}, expected a dictionary with keys of {sorted(types)}")
    out = {}
    for name, value in values.items():
        if name not in types:
            near = difflib.get_close_matches(name, types, n=1)
            hint = f"did you mean {prefix + near[0]!r}?" if near else f"expected one of {sorted(types)}"
            raise UserError(f"unknown model option {prefix + name!r}; {hint}")
        expected = types[name]
        if dataclasses.is_dataclass(expected):
            value = _from_dict(expected, value, f"{prefix}{name}.")
        elif typing.get_origin(expected) is tuple and isinstance(value, list | tuple):
            value = tuple(value)
            expected = tuple
        elif expected is float and type(value) is int:
            value = float(value)
        if type(value) is not (typing.get_origin(expected) or expected):
            raise UserError(f"model option {prefix + name!r}: got {value!r}, expected {types[name]}")
        out[name] = value
    return cls(**out)


class Outputs(typing.NamedTuple):
    """What a forward pass gives, in both variants."""

    scores: Array  # float32[B, 4] in [0, 1]
    heatmaps: Array  # float32[B, h, w, 2] in [0, 1]
    keyword_logits: Array  # float32[B, T, V]


def normalize_image(image: Array) -> Array:
    """uint8[B, H, W, 3] in [0, 255] -> float32 in [-1, 1], on the device; a float image passes as it is."""
    if image.dtype == jnp.uint8:
        return image.astype(jnp.float32) / 127.5 - 1.0
    if not jnp.issubdtype(image.dtype, jnp.floating):
        raise UserError(f"image: got {image.dtype}, expected uint8 in [0, 255] or a float type in [-1, 1]")
    return image


def dummy_inputs(config: RAHFConfig, length: int = 2) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The smallest (image, text_ids, keyword_ids) to initialise with; L = T = `length` shapes no parameter."""
    texts = () if config.variant == "multi_head" else (NUM_TASKS,)
    image = np.zeros((1, config.image_size, config.image_size, 3), np.uint8)
    return image, np.zeros((1, *texts, length), np.int32), np.zeros((1, length), np.int32)


class RAHF(nn.Module):
    """The model. Parameters: vit, t5, image_projection (if the widths differ), score_head*, heatmap_head*."""

    config: RAHFConfig

    def setup(self):
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        self.vit = ViT(config.vit, dtype)
        self.t5 = T5(config.t5, dtype)
        if config.vit.width != config.t5.emb_dim:
            axes, init = ("image_embed", "embed"), nn.initializers.lecun_normal()
            self.image_projection = Projection((config.t5.emb_dim,), axes, dtype=dtype, kernel_init=init)

        def score_head(suffix=""):
            return ScoreHead(config.score_head, dtype, name=f"score_head{suffix}")

        def heatmap_head(suffix=""):
            return HeatmapHead(config.heatmap_head, dtype, name=f"heatmap_head{suffix}")

        if config.variant == "multi_head":
            self.score_heads = [score_head(f"_{name}") for name in schema.SCORES]
            self.heatmap_heads = [heatmap_head(f"_{name}") for name in schema.HEATMAPS]
        else:
            self.score_head, self.heatmap_head = score_head(), heatmap_head()

    def encode_image(self, image: Array, train: bool = False) -> Array:
        """uint8[B, H, W, 3], or float in [-1, 1] -> dtype[B, P, D] (P + 1 with a class token), D the width of T5.

        Raises:
          UserError: the image is not of `config.image_size`, or neither uint8 nor float.
        """
        size = self.config.image_size
        if image.ndim != 4 or image.shape[1:] != (size, size, 3):
            raise UserError(f"image: got shape {image.shape}, expected [B, {size}, {size}, 3] (config image_size)")
        tokens = self.vit(normalize_image(image), train)  # [B, P, width of the ViT]
        if self.config.vit.width != self.config.t5.emb_dim:
            tokens = self.image_projection(tokens)  # [B, P, D]
        return tokens

    def encode(self, image_tokens: Array, text_ids: Array, train: bool = False) -> tuple[Array, Array]:
        """Image tokens, then prompt tokens, through the T5 encoder with full self-attention.

        Args:
          image_tokens: dtype[B, P, D]. text_ids: int32[B, L], 0 = padding.

        Returns:
          fused dtype[B, N, D] and its mask bool[B, N] (True = keep), N = P + L.
        """
        fused = jnp.concatenate([image_tokens, self.t5.embed(text_ids)], axis=1)  # [B, N, D]
        keep = text_ids != schema.PAD_ID if self.config.mask_padding else jnp.ones(text_ids.shape, bool)
        mask = jnp.concatenate([jnp.ones(image_tokens.shape[:2], bool), keep], axis=1)
        fused = nn.with_logical_constraint(fused, ("batch", "length", "embed"))
        return self.t5.encode(fused, mask, train), mask

    def __call__(self, image: Array, text_ids: Array, keyword_ids: Array, train: bool = False) -> Outputs:
        """The forward pass of a training step.

        Args:
          image: uint8[B, H, W, 3], or float in [-1, 1].
          text_ids: int32[B, L]; int32[B, 7, L] in order schema.TASKS in the augmented-prompt variant.
          keyword_ids: int32[B, T], the targets themselves; they are shifted right here, so position t is predicted
            from the ids before t.
          train: whether dropout is on (needs the "dropout" random stream).

        Returns:
          `Outputs`.

        Raises:
          UserError: shapes that do not fit the config.
        """
        scores, heatmaps, fused, mask = self.perceive(image, text_ids, train)
        logits = self.t5.decode(*self._for_decoder(fused, mask), t5.shift_right(keyword_ids), train)
        return Outputs(scores, heatmaps, logits)

    def perceive(self, image: Array, text_ids: Array, train: bool = False) -> tuple[Array, Array, Array, Array]:
        """Scores and heatmaps without the decoder; differentiable in a float `image`, for guidance.

        Returns:
          scores float32[B, 4], heatmaps float32[B, h, w, 2], and for the decoder fused dtype[B, N, D], mask bool[B, N].
        """
        self._check_text(text_ids)
        tokens = self.encode_image(image, train)
        if self.config.variant == "multi_head":
            fused, mask = self.encode(tokens, text_ids, train)
            grid = self._feature_map(fused)
            return self._all_scores(grid), self._all_heatmaps(grid), fused, mask
        # The ViT has read the image once; the seven texts are one batch of 7 * B for the encoder.
        batch = tokens.shape[0]
        tokens = jnp.broadcast_to(tokens[:, None], (batch, NUM_TASKS, *tokens.shape[1:]))
        tokens = tokens.reshape(-1, *tokens.shape[2:])  # [7 * B, P, D]
        fused, mask = self.encode(tokens, text_ids.reshape(-1, text_ids.shape[-1]), train)  # [7 * B, N, D]
        fused, mask = (x.reshape(batch, NUM_TASKS, *x.shape[1:]) for x in (fused, mask))  # [B, 7, N, D]
        grid = self._feature_map(fused)  # [B, 7, h, w, D]
        scores = self._on_rows(self.score_head, grid[:, SCORE_TASKS.start : SCORE_TASKS.stop])  # [B, 4]
        heatmaps = self._on_rows(self.heatmap_head, grid[:, HEATMAP_TASKS.start : HEATMAP_TASKS.stop])
        return scores, jnp.moveaxis(heatmaps, 1, -1), fused[:, KEYWORD_TASK], mask[:, KEYWORD_TASK]

    def predict(self, image: Array, text_ids: Array, max_length: int) -> tuple[Array, Array, Array]:
        """All seven predictions, the keywords decoded greedily.

        Args:
          image, text_ids: as for a forward pass, any B. max_length: T, the longest keyword sequence.

        Returns:
          scores float32[B, 4], heatmaps float32[B, h, w, 2], keyword_ids int32[B, T] (1 = end, then zeros).
        """
        scores, heatmaps, fused, mask = self.perceive(image, text_ids)
        return scores, heatmaps, self.t5.greedy_decode(*self._for_decoder(fused, mask), max_length)

    def _check_text(self, text_ids: Array):
        expected = "[B, L]" if self.config.variant == "multi_head" else f"[B, {NUM_TASKS}, L]"
        if text_ids.ndim != expected.count(",") + 1 or (text_ids.ndim == 3 and text_ids.shape[1] != NUM_TASKS):
            variant = self.config.variant
            raise UserError(f"text_ids: got shape {text_ids.shape}, expected {expected} in the {variant} variant")

    def _feature_map(self, fused: Array) -> Array:
        """[..., N, D] -> [..., h, w, D]: the fused image tokens, without the class token."""
        grid, first = self.config.grid, int(self.config.vit.class_token)
        x = fused[..., first : first + grid * grid, :]
        return x.reshape(*x.shape[:-2], grid, grid, x.shape[-1])

    def _for_decoder(self, fused: Array, mask: Array) -> tuple[Array, Array]:
        if self.config.decoder_attends == "fused":
            return fused, mask
        first = self.config.grid**2 + int(self.config.vit.class_token)
        return fused[:, first:], mask[:, first:]  # [B, L, D]

    def _all_scores(self, grid: Array) -> Array:
        return jnp.stack([head(grid) for head in self.score_heads], axis=-1)  # [B, 4]

    def _all_heatmaps(self, grid: Array) -> Array:
        return jnp.stack([head(grid) for head in self.heatmap_heads], axis=-1)  # [B, h, w, 2]

    def _on_rows(self, head, grid: Array) -> Array:
        """A head over [R, r, h, w, D] as one batch -> [R, r, ...]."""
        y = head(grid.reshape(-1, *grid.shape[2:]))
        return y.reshape(*grid.shape[:2], *y.shape[1:])
