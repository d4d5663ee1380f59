"""ViT image encoder, with big_vision's parameter names.

The pre-norm model of "An Image is Worth 16x16 Words" (arXiv 2010.11929). The parameter tree is that of big_vision's
`models/vit.py` (https://github.com/google-research/big_vision), so its files load without renaming. A class token has a
position embedding of its own, as in the AugReg files (https://github.com/google-research/vision_transformer).

A stem (`stem_patch`) helps small ViTs that are trained from scratch, as early convolutions do (arXiv 2106.14881). It embeds
small patches, and the ViT's patches are embedded from these features instead of from pixels. `stem_blocks` convolutions over
the small patches see what lies across their borders: the hybrid of arXiv 2010.11929, in small.
"""

import dataclasses
from typing import Annotated, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from rahf.models.attention import attention
from rahf.models.layers import Conv, LayerNorm, Projection, partitioned, scan_layers, to_patches
from rahf.partitioning import compute_copy
from richhf_data import checked
from richhf_data.checked import Epsilon, Layers, Pixels, Share, Size
from richhf_data.errors import UserError
from richhf_data.ranges import Range

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """Sizes of a ViT; the defaults are ViT-B/16."""

    patch_size: Pixels = 16
    width: Size = 768
    depth: Layers = 12
    num_heads: Size = 12
    mlp_dim: Size = 3072
    dropout: Share = 0.0
    class_token: bool = False
    stem_patch: Annotated[int, Range(0, 8192)] = 0  # pixels; 0 = no stem
    stem_width: Size = 64
    stem_blocks: Annotated[int, Range(0, 64)] = 0  # residual 3x3 convolutions after the stem
    gelu: Literal["tanh", "erf"] = "tanh"  # big_vision's approximation; "erf" is Hugging Face's exact GELU
    epsilon: Epsilon = 1e-6  # of the layer norms; Hugging Face's is 1e-12
    remat: bool = False  # recompute each block in the backward pass
    scan: bool = False  # compile one block and loop over all (`layers.scan_layers`)

    def __post_init__(self):
        checked.fields(self, "vit")
        if self.width % self.num_heads:
            raise UserError(f"vit.width: got {self.width}, expected a multiple of vit.num_heads = {self.num_heads}")
        if self.stem_patch and self.patch_size % self.stem_patch:
            raise UserError(f"vit.stem_patch: got {self.stem_patch}, expected a divisor of patch_size = {self.patch_size}")
        if self.stem_blocks and not self.stem_patch:
            raise UserError(f"vit.stem_blocks: got {self.stem_blocks}, expected 0 without a stem; or set vit.stem_patch")


class ViTAttention(nn.Module):
    """Multi-head self-attention, [B, N, D] -> [B, N, D]. Softmax in float32."""

    num_heads: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        width = x.shape[-1]
        head_dim = width // self.num_heads

        def project(name):
            heads = self.num_heads, head_dim
            x_heads = Projection(heads, ("embed", "heads", "kv"), dtype=self.dtype, name=name)(x)  # [B, N, A, K]
            return nn.with_logical_constraint(x_heads, ("batch", "length", "heads", "kv"))

        query, key, value = project("query") * head_dim**-0.5, project("key"), project("value")
        x = attention(query, key, value)  # [B, N, A, K]
        return Projection((width,), ("heads", "kv", "embed"), contract=2, dtype=self.dtype, name="out")(x)  # [B, N, D]


class MlpBlock(nn.Module):
    """Dense, GELU, dense: [B, N, D] -> [B, N, D]."""

    mlp_dim: int
    dropout: float
    approximate: bool  # GELU through tanh
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        def dense(features, axes, name):
            return Projection((features,), axes, dtype=self.dtype, bias_init=nn.initializers.normal(1e-6), name=name)

        width = x.shape[-1]
        x = nn.gelu(dense(self.mlp_dim, ("embed", "mlp"), "Dense_0")(x), self.approximate)  # [B, N, M]
        x = nn.with_logical_constraint(x, ("batch", "length", "mlp"))
        x = nn.Dropout(self.dropout)(x, deterministic=not train)
        return dense(width, ("mlp", "embed"), "Dense_1")(x)  # [B, N, D]


class ViTBlock(nn.Module):
    """Self-attention and MLP, each with a norm before it and a residual: [B, N, D] -> [B, N, D]."""

    config: ViTConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        config = self.config
        drop = nn.Dropout(config.dropout, deterministic=not train)
        y = LayerNorm(self.dtype, epsilon=config.epsilon, name="LayerNorm_0")(x)
        x = x + drop(ViTAttention(config.num_heads, self.dtype, name="MultiHeadDotProductAttention_0")(y))
        y = LayerNorm(self.dtype, epsilon=config.epsilon, name="LayerNorm_1")(x)
        mlp = MlpBlock(config.mlp_dim, config.dropout, config.gelu == "tanh", self.dtype, name="MlpBlock_0")
        x = x + drop(mlp(y, train))
        return nn.with_logical_constraint(x, ("batch", "length", "embed"))


class Transformer(nn.Module):
    """The blocks and the final norm."""

    config: ViTConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        block = nn.remat(ViTBlock, static_argnums=(2,)) if self.config.remat else ViTBlock
        blocks = [block(self.config, self.dtype, name=f"encoderblock_{i}") for i in range(self.config.depth)]
        if self.config.scan and not self.is_initializing():
            x = scan_layers(self, blocks, lambda layer, x, _: layer(x, train), x)
        else:
            for layer in blocks:
                x = layer(x, train)
        return LayerNorm(self.dtype, epsilon=self.config.epsilon, name="encoder_norm")(x)


class PatchEmbedding(nn.Module):
    """A matrix product of the flattened patches, which equals a convolution with stride = kernel size = `patch`."""

    features: int
    patch: int
    axes: tuple[str, str]  # logical, of the kernel's inputs and outputs
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """dtype[B, H, W, C] -> dtype[B, H / patch, W / patch, features]."""
        axes, shape = ("conv_height", "conv_width", *self.axes), (self.patch, self.patch, x.shape[-1], self.features)
        kernel = self.param("kernel", partitioned(nn.initializers.lecun_normal(), axes), shape, jnp.float32)
        bias = self.param("bias", partitioned(nn.initializers.zeros, self.axes[1:]), shape[-1:], jnp.float32)
        kernel = compute_copy(kernel, axes, self.dtype)
        return to_patches(x, self.patch) @ kernel.reshape(-1, self.features) + bias.astype(self.dtype).reshape(1, 1, 1, -1)


class ViT(nn.Module):
    """Image -> tokens after the final norm. No pooling and no classifier."""

    config: ViTConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, image: Array, train: bool = False) -> Array:
        """
        Args:
          image: float[B, H, W, 3] in [-1, 1]. H and W are multiples of the patch size and the same as at initialisation,
            which sets the number of position embeddings.
          train: whether dropout is on (needs the "dropout" random stream).

        Returns:
          dtype[B, P, D], row by row over the grid. With a class token [B, P + 1, D], the class token first.

        Raises:
          UserError: H or W is not a multiple of the patch size.
        """
        config, patch = self.config, self.config.patch_size
        batch, height, width, _ = image.shape
        if height % patch or width % patch:
            raise UserError(f"image: got {height}x{width} pixels, expected multiples of vit.patch_size = {patch}")
        x = image.astype(self.dtype)
        if config.stem_patch:
            x = PatchEmbedding(config.stem_width, config.stem_patch, ("conv_in", "conv_out"), self.dtype, name="stem")(x)
            x = nn.gelu(LayerNorm(self.dtype, axis="conv_out", name="stem_norm")(x))  # [B, H / s, W / s, F]
            for i in range(config.stem_blocks):
                y = Conv(config.stem_width, dtype=self.dtype, name=f"stem_conv_{i}")(x)
                x = x + nn.gelu(LayerNorm(self.dtype, axis="conv_out", name=f"stem_conv_norm_{i}")(y))
            patch //= config.stem_patch
        x = PatchEmbedding(config.width, patch, ("conv_in", "embed"), self.dtype, name="embedding")(x)  # [B, h, w, D]
        x = x.reshape(batch, -1, config.width)  # [B, P, D]

        if config.class_token:
            init = partitioned(nn.initializers.zeros, (None, None, "embed"))
            token = self.param("cls", init, (1, 1, config.width), jnp.float32).astype(self.dtype)
            x = jnp.concatenate([jnp.broadcast_to(token, (batch, 1, config.width)), x], axis=1)  # [B, P + 1, D]
        init = partitioned(nn.initializers.normal(config.width**-0.5), (None, "position", "embed"))
        positions = self.param("pos_embedding", init, (1, x.shape[1], config.width), jnp.float32)
        x = x + positions.astype(self.dtype)
        x = nn.Dropout(config.dropout)(x, deterministic=not train)
        x = nn.with_logical_constraint(x, ("batch", "length", "embed"))
        return Transformer(config, self.dtype, name="Transformer")(x, train)
