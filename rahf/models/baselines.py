"""The trained baselines of paper A (arXiv 2312.10240, section 4.2): a ResNet-50 and a fine-tuned CLIP.

    resnet   image --ResNet--> feature map --mean, dense layers--> scores
                                           --deconvolutions------> heatmaps
    clip     image, prompt --CLIP--> two embeddings and their product --dense layers--> scores

The ResNet reads no prompt. Neither writes keywords. The paper gives no sizes of the heads. Modules and configurations have
what `rahf/models/critics.py` says, so the baselines share everything with RAHF but the network.
"""

import dataclasses
from typing import Annotated, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from rahf.models.clip import CLIP, CLIPConfig, unit
from rahf.models.heads import HeatmapHead, HeatmapHeadConfig, ScoreDense
from rahf.models.rahf import Outputs
from rahf.models.resnet import ResNet, ResNetConfig
from richhf_data import checked, schema
from richhf_data.checked import Pixels, Size
from richhf_data.errors import UserError
from richhf_data.ranges import Range

Array = jax.Array
DTypes = Literal["float32", "bfloat16", "float16"]
Dense = Annotated[tuple[Size, ...], Range(0, 64)]


class DenseScores(nn.Module):
    """Features -> the four scores."""

    dense: tuple[int, ...]  # widths of the hidden layers
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """dtype[B, D] -> float32[B, 4] in [0, 1]."""
        for i, features in enumerate(self.dense):
            x = nn.relu(ScoreDense(features, "score_out", self.dtype, name=f"dense_{i}")(x))
        return nn.sigmoid(ScoreDense(len(schema.SCORES), None, jnp.float32, name="output")(x))


def _check_size(image: Array, size: int) -> None:
    if image.ndim != 4 or image.shape[1:] != (size, size, 3):
        raise UserError(f"image: got shape {image.shape}, expected [B, {size}, {size}, 3] (config image_size)")


# ---- ResNet ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ResNetCriticConfig:
    """The defaults are a ResNet-50 at 224 pixels with both heads. The paper trains two models, one for each kind of head."""

    architecture: Literal["resnet"] = "resnet"
    image_size: Pixels = 224  # both sides
    predicts: Literal["both", "scores", "heatmaps"] = "both"
    dtype: DTypes = "float32"  # of the computation; parameters, outputs and statistics are float32
    resnet: ResNetConfig = dataclasses.field(default_factory=ResNetConfig)
    dense: Dense = (2048, 1024)  # of the scores
    heatmap_head: HeatmapHeadConfig = dataclasses.field(
        default_factory=lambda: HeatmapHeadConfig(filters=(), deconv_filters=(256, 256, 256, 128, 64), output_hidden=64)
    )

    variant = "multi_head"
    vocab_size = None  # reads no text
    deviations = False

    @property
    def parts(self) -> tuple[str, ...]:
        """Of `schema.PARTS`, what it predicts."""
        return ("scores", "heatmaps") if self.predicts == "both" else (self.predicts,)

    def __post_init__(self):
        checked.fields(self, "model")
        if self.image_size % self.resnet.stride:
            raise UserError(f"image_size: got {self.image_size}, expected a multiple of the ResNet's {self.resnet.stride}")

    @property
    def heatmap_size(self) -> int:
        """Pixels on each side of the predicted heatmaps, and so of their targets."""
        return self.image_size // self.resnet.stride * 2 ** len(self.heatmap_head.deconv_filters)


class ResNetCritic(nn.Module):
    """Parameters: resnet, score_head, heatmap_head_*; without the heads that it has not."""

    config: ResNetCriticConfig

    def setup(self):
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        self.resnet = ResNet(config.resnet, dtype)
        if "scores" in config.parts:
            self.score_head = DenseScores(config.dense, dtype)
        if "heatmaps" in config.parts:
            self.heatmap_heads = [
                HeatmapHead(config.heatmap_head, dtype, name=f"heatmap_head_{name}") for name in schema.HEATMAPS
            ]

    def perceive(self, image: Array, text_ids: Array, train: bool = False) -> tuple[Array | None, Array | None]:
        """image: uint8[B, H, W, 3], or float in [-1, 1] -> scores float32[B, 4], heatmaps float32[B, h, w, 2], or None."""
        del text_ids
        _check_size(image, self.config.image_size)
        grid, scores, heatmaps = self.resnet(image, train), None, None  # [B, h, w, C]
        if "scores" in self.config.parts:
            scores = self.score_head(grid.astype(jnp.float32).mean((1, 2)))
        if "heatmaps" in self.config.parts:
            heatmaps = jnp.stack([head(grid) for head in self.heatmap_heads], axis=-1)
        return scores, heatmaps

    def __call__(self, image: Array, text_ids: Array, keyword_ids: Array, train: bool = False) -> Outputs:
        """The forward pass of a training step, as `RAHF`."""
        del keyword_ids
        return Outputs(*self.perceive(image, text_ids, train), None)

    def predict(
        self, image: Array, text_ids: Array, max_length: int, copy: None = None
    ) -> tuple[Array | None, Array | None, None]:
        """Scores and heatmaps, as `RAHF`, and no keywords."""
        del max_length, copy
        return *self.perceive(image, text_ids), None


# ---- CLIP -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class CLIPCriticConfig:
    """The defaults are CLIP ViT-B/32."""

    architecture: Literal["clip"] = "clip"
    dtype: DTypes = "float32"  # of the computation; parameters and outputs are float32
    clip: CLIPConfig = dataclasses.field(default_factory=CLIPConfig)
    dense: Dense = (1024, 512)

    variant = "multi_head"
    parts = ("scores",)
    deviations = False
    heatmap_size = 16  # pixels of the targets, which no head reads

    def __post_init__(self):
        checked.fields(self, "model")

    @property
    def image_size(self) -> int:
        """Pixels on each side of the image."""
        return self.clip.vision.image_size

    @property
    def vocab_size(self) -> int:
        """The ids that it embeds."""
        return self.clip.text.vocab_size


class CLIPCritic(nn.Module):
    """Parameters: clip, score_head."""

    config: CLIPCriticConfig

    def setup(self):
        dtype = jnp.dtype(self.config.dtype)
        self.clip = CLIP(self.config.clip, dtype)
        self.score_head = DenseScores(self.config.dense, dtype)

    def perceive(self, image: Array, text_ids: Array, train: bool = False) -> tuple[Array, None]:
        """image: uint8[B, H, W, 3], or float in [-1, 1]; text_ids: int32[B, 1, L] -> scores float32[B, 4], and None.

        Ids after CLIP's length are not read.
        """
        del train
        _check_size(image, self.config.image_size)
        ids = text_ids[:, 0, : self.config.clip.text.length]
        embeddings = self.clip.encode_image(image), self.clip.encode_text(ids)  # [B, E] twice
        image, text = map(unit, embeddings)
        features = jnp.concatenate([image, text, image * text], axis=-1) * self.config.clip.projection_dim**0.5
        return self.score_head(features), None

    def __call__(self, image: Array, text_ids: Array, keyword_ids: Array, train: bool = False) -> Outputs:
        """The forward pass of a training step, as `RAHF`."""
        del keyword_ids
        return Outputs(*self.perceive(image, text_ids, train), None)

    def predict(self, image: Array, text_ids: Array, max_length: int, copy: None = None) -> tuple[Array, None, None]:
        """Scores, as `RAHF`, no heatmaps and no keywords."""
        del max_length, copy
        return *self.perceive(image, text_ids), None
