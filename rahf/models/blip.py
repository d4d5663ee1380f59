"""ImageReward: how well people like a picture for its prompt, by BLIP's networks.

The model of "ImageReward: Learning and Evaluating Human Preferences for Text-to-Image Generation" (arXiv 2304.05977,
https://github.com/THUDM/ImageReward). The text tower is BERT, whose blocks also read the image (arXiv 2201.12086, section
3.1):

    image --ViT--> [B, 1 + P, D] --------------------------------+
    ids --embedding--> [B, L, D] --(self-attention, cross-attention, MLP)--> first token --head--> float32[B]
"""

import dataclasses
from typing import Annotated

import flax.linen as nn
import jax
import jax.numpy as jnp

from rahf.models.attention import attention
from rahf.models.clip import standardized
from rahf.models.layers import LayerNorm, LinearLayers, partitioned
from rahf.models.vit import ViT, ViTConfig
from richhf_data import checked
from richhf_data.checked import Epsilon, Layers, Pixels, Size
from richhf_data.errors import UserError
from richhf_data.ranges import Range

Array = jax.Array
# The published model's score is (head - MEAN) / DEVIATION.
MEAN, DEVIATION = 0.16717362830052426, 1.0333394966054072


@dataclasses.dataclass(frozen=True)
class BLIPTextConfig:
    """Sizes of the text tower; the defaults are those of BERT base with BLIP's two more tokens."""

    vocab_size: Size = 30524
    width: Size = 768
    depth: Layers = 12
    num_heads: Size = 12
    mlp_dim: Size = 3072
    positions: Size = 512
    length: Annotated[int, Range(2, 2**20)] = 35  # ids of a text with its start and end, as ImageReward cuts it
    epsilon: Epsilon = 1e-12  # of the layer norms

    def __post_init__(self):
        checked.fields(self, "image_reward.text")
        if self.width % self.num_heads:
            raise UserError(
                f"image_reward.text.width: got {self.width}, expected a multiple of num_heads = {self.num_heads}"
            )
        if self.length > self.positions:
            raise UserError(f"image_reward.text.length: got {self.length}, expected at most positions = {self.positions}")


VIT_L16 = ViTConfig(width=1024, depth=24, num_heads=16, mlp_dim=4096, class_token=True, gelu="erf")


@dataclasses.dataclass(frozen=True)
class ImageRewardConfig:
    """The defaults are the published model's."""

    vision: ViTConfig = VIT_L16
    text: BLIPTextConfig = dataclasses.field(default_factory=BLIPTextConfig)
    image_size: Pixels = 224  # both sides
    hidden: tuple[Size, ...] = (1024, 128, 64, 16)  # widths of the head's layers before the last

    def __post_init__(self):
        checked.fields(self, "image_reward")
        if self.image_size % self.vision.patch_size:
            patch = self.vision.patch_size
            raise UserError(f"image_reward.image_size: got {self.image_size}, expected a multiple of patch_size = {patch}")


class BLIPTextBlock(nn.Module):
    """Self-attention, cross-attention to the image's tokens and MLP, each with a residual and a norm after it."""

    config: BLIPTextConfig

    @nn.compact
    def __call__(self, x: Array, mask: Array, image: Array) -> Array:
        """float32[B, L, D], bool[B, L], float32[B, N, I] -> float32[B, L, D]."""
        config = self.config
        head_dim = config.width // config.num_heads

        def dense(features, axes, name):
            return nn.Dense(
                features,
                kernel_init=partitioned(nn.initializers.normal(0.02), axes),
                bias_init=partitioned(nn.initializers.zeros, axes[1:]),
                name=name,
            )

        def attend(x, keys, mask, name):
            def project(tokens, part):
                heads = dense(config.width, ("embed", "joined_kv"), f"{name}_{part}")(tokens)
                return heads.reshape(*tokens.shape[:-1], -1, head_dim)  # [B, N, A, K]

            query = project(x, "query") * head_dim**-0.5
            y = attention(query, project(keys, "key"), project(keys, "value"), mask=mask)
            return norm(x + dense(config.width, ("joined_kv", "embed"), f"{name}_out")(y.reshape(x.shape)), name)

        def norm(x, name):
            return LayerNorm(jnp.float32, epsilon=config.epsilon, name=f"{name}_norm")(x)

        x = attend(x, x, mask, "self")
        x = attend(x, image, None, "cross")
        y = nn.gelu(dense(config.mlp_dim, ("embed", "mlp"), "wi")(x), approximate=False)  # [B, L, M]
        return norm(x + dense(config.width, ("mlp", "embed"), "wo")(y), "mlp")


class BLIPText(nn.Module):
    """Embeddings with a norm, then the blocks."""

    config: BLIPTextConfig

    @nn.compact
    def __call__(self, ids: Array, mask: Array, image: Array) -> Array:
        """int32[B, L], bool[B, L], float32[B, N, I] -> float32[B, L, D]. An id outside the vocabulary gives NaN."""
        config, init = self.config, nn.initializers.normal(0.02)
        shape = config.vocab_size, config.width
        tokens = self.param("token_embedding", partitioned(init, ("vocab", "embed")), shape, jnp.float32)
        shape = 1, config.positions, config.width
        positions = self.param("pos_embedding", partitioned(init, (None, "position", "embed")), shape, jnp.float32)
        x = jnp.take(tokens, ids.astype(jnp.uint32), axis=0, mode="fill") + positions[:, : ids.shape[1]]
        x = LayerNorm(jnp.float32, epsilon=config.epsilon, name="norm")(x)
        for i in range(config.depth):
            x = BLIPTextBlock(config, name=f"block_{i}")(x, mask, image)
        return x


class ImageReward(nn.Module):
    """The model. Parameters: vision, text, head."""

    config: ImageRewardConfig

    @nn.compact
    def __call__(self, image: Array, ids: Array, mask: Array) -> Array:
        """The scores of pictures for their texts.

        Args:
          image: float32[B, H, W, 3] in [-1, 1], or uint8, of `config.image_size`.
          ids: int32[B, L], the first one the start id. mask: bool[B, L], True = keep; False for padding.

        Returns:
          float32[B], normalised as the published model is.

        Raises:
          UserError: an image of another size.
        """
        config, size = self.config, self.config.image_size
        if image.ndim != 4 or image.shape[1:] != (size, size, 3):
            raise UserError(f"image: got shape {image.shape}, expected [B, {size}, {size}, 3] (image_reward.image_size)")
        tokens = ViT(config.vision, name="vision")(standardized(image))  # [B, 1 + P, I]
        tokens = BLIPText(config.text, name="text")(ids, mask, tokens)  # [B, L, D]
        return (LinearLayers((*config.hidden, 1), name="head")(tokens[:, 0])[:, 0] - MEAN) / DEVIATION
