"""Stable Diffusion's UNet, as diffusers' `UNet2DConditionModel` computes it for SD 1.x and 2.x, with its parameters' names.

    latents --conv_in--> down blocks --> mid block -> up blocks (they read the down blocks' outputs too) --conv_out--> noise
    timestep --sinusoids, MLP--> every residual block;  text --> the cross attention of every transformer

"High-Resolution Image Synthesis with Latent Diffusion Models" (arXiv 2112.10752). Layout NHWC. A module's path joined by
"/" is diffusers' name up to what `rahf.diffusion.folder` lists. New weights make the identity of every residual and
predict zero, as those of ADM (arXiv 2105.05233) do.

Logical axes are those of `rahf.models.rahf`: conv_height, conv_width, conv_in, conv_out of convolutions and group norms;
embed, joined_kv, mlp of the transformers and the time embedding.
"""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from rahf.models.heads import CONV_DIMENSIONS, KERNEL_AXES
from rahf.models.t5 import Dense
from rahf.models.vit import LayerNorm, Projection
from rahf.partitioning import compute_copy
from richhf_data.errors import UserError

Array = jax.Array
partitioned = nn.with_logical_partitioning
DOWN_BLOCKS = ("DownBlock2D", "CrossAttnDownBlock2D")  # the second has attention
UP_BLOCKS = ("UpBlock2D", "CrossAttnUpBlock2D")
DTYPES = ("float32", "bfloat16", "float16")


def check_blocks(name: str, channels: tuple[int, ...], groups: int, dtype: str) -> None:
    """Refuses what neither the UNet's configuration nor the VAE's may be."""
    if not channels or any(width % groups for width in channels):
        raise UserError(f"{name}.block_out_channels: got {channels}, expected multiples of norm_num_groups = {groups}")
    if dtype not in DTYPES:
        raise UserError(f"{name}.dtype: got {dtype!r}, expected one of {DTYPES}")


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """Sizes, in diffusers' words; the defaults are those of Stable Diffusion 1.4 and 1.5."""

    sample_size: int = 64  # h = w of the latents it was trained on; it takes others
    in_channels: int = 4  # 9 in the inpainting models: latents, mask, latents of the masked image
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)  # each block but the last halves the resolution
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    layers_per_block: int = 2
    attention_head_dim: tuple[int, ...] = (8, 8, 8, 8)  # heads (sic) of each down block; a head's width is what results
    cross_attention_dim: int = 768  # width of the text encoder
    norm_num_groups: int = 32
    use_linear_projection: bool = False  # as in SD 2.x: around the transformers, dense layers instead of 1x1 convolutions
    dtype: str = "float32"  # of the computation; parameters and the output are float32
    remat: bool = False  # recompute each residual block and each transformer in the backward pass

    def __post_init__(self):
        check_blocks("unet", self.block_out_channels, self.norm_num_groups, self.dtype)
        depth = len(self.block_out_channels)
        for name, allowed in (("down_block_types", DOWN_BLOCKS), ("up_block_types", UP_BLOCKS)):
            types = getattr(self, name)
            if len(types) != depth or not set(types) <= set(allowed):
                raise UserError(f"unet.{name}: got {types}, expected one for each of block_out_channels, of {allowed}")
        heads = self.attention_head_dim
        if len(heads) != depth or any(width % h for width, h in zip(self.block_out_channels, heads, strict=True)):
            raise UserError(
                f"unet.attention_head_dim: got {heads}, expected {depth} numbers of heads that divide block_out_channels = "
                f"{self.block_out_channels}"
            )


class Conv(nn.Module):
    """Convolution with bias; of stride 1 it keeps the resolution."""

    features: int
    kernel_size: int = 3
    stride: int = 1
    padding: tuple[int, int] = (1, 1)  # before and after; without a meaning for a kernel of 1
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()
    dtype: DTypeLike = jnp.float32
    out_axis: str | None = "conv_out"  # None for the few channels of latents and images, which no mesh splits

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape = (self.kernel_size, self.kernel_size, x.shape[-1], self.features)
        init = partitioned(self.kernel_init, (*KERNEL_AXES[:3], self.out_axis))
        kernel = compute_copy(self.param("kernel", init, shape, jnp.float32), (*KERNEL_AXES[:3], self.out_axis), self.dtype)
        bias = self.param("bias", partitioned(nn.initializers.zeros, (self.out_axis,)), shape[-1:], jnp.float32)
        x = x.astype(self.dtype)
        if self.kernel_size == 1:
            x = jnp.matmul(x, kernel[0, 0])
        else:
            strides, padding = (self.stride,) * 2, (self.padding,) * 2
            x = jax.lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=CONV_DIMENSIONS)
        x = x + bias.astype(self.dtype).reshape(1, 1, 1, -1)
        return nn.with_logical_constraint(x, ("batch", "height", "width", self.out_axis))


class GroupNorm(nn.Module):
    """Statistics, scale and bias in float32."""

    groups: int
    epsilon: float
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", partitioned(nn.initializers.ones, ("conv_in",)), x.shape[-1:], jnp.float32)
        bias = self.param("bias", partitioned(nn.initializers.zeros, ("conv_in",)), x.shape[-1:], jnp.float32)
        y = x.astype(jnp.float32).reshape(x.shape[0], -1, self.groups, x.shape[-1] // self.groups)
        y = y - y.mean((1, 3), keepdims=True)
        y = y * jax.lax.rsqrt((y * y).mean((1, 3), keepdims=True) + self.epsilon)
        y = y.reshape(x.shape) * scale.reshape(1, 1, 1, -1) + bias.reshape(1, 1, 1, -1)
        return y.astype(self.dtype)


class ResnetBlock(nn.Module):
    """Two convolutions, each after a norm and SiLU, and a residual; the time embedding is added between them."""

    features: int
    groups: int
    epsilon: float
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array, time: Array | None = None) -> Array:
        """dtype[B, h, w, C], dtype[B, E] -> dtype[B, h, w, features]."""
        y = nn.silu(GroupNorm(self.groups, self.epsilon, self.dtype, name="norm1")(x))
        y = Conv(self.features, dtype=self.dtype, name="conv1")(y)
        if time is not None:
            time = dense(self.features, ("embed", "conv_out"), self.dtype, "time_emb_proj")(nn.silu(time))
            y = y + time[:, None, None]
        y = nn.silu(GroupNorm(self.groups, self.epsilon, self.dtype, name="norm2")(y))
        y = Conv(self.features, kernel_init=nn.initializers.zeros, dtype=self.dtype, name="conv2")(y)
        if x.shape[-1] != self.features:
            x = Conv(self.features, 1, dtype=self.dtype, name="conv_shortcut")(x)
        return x + y


def dense(features: int, axes: tuple[str, str], dtype, name: str, bias: bool = True, init=None):
    """A dense layer whose kernel has the logical `axes` and whose bias has the second; LeCun's initialisation by default."""
    init = init or nn.initializers.lecun_normal()
    if not bias:
        return Dense(features, axes, dtype, name=name)
    return Projection((features,), axes, dtype=dtype, kernel_init=init, name=name)


def attend(x: Array, context: Array, heads: int, dtype, bias: bool = False) -> Array:
    """Attention of x to `context`, softmax in float32: dtype[B, N, D], [B, L, C] -> dtype[B, N, D].

    bias: of queries, keys and values. The layers are those of the module that calls it: to_q, to_k, to_v, to_out.
    """

    def project(y, name):
        y = dense(x.shape[-1], ("embed", "joined_kv"), dtype, name, bias)(y)
        y = y.reshape(*y.shape[:-1], heads, -1)  # [B, N, A, K]
        return nn.with_logical_constraint(y, ("batch", "length", "heads", "kv"))

    query, key, value = project(x, "to_q"), project(context, "to_k"), project(context, "to_v")
    query = query * query.shape[-1] ** -0.5
    logits = jnp.einsum("bqak,bnak->baqn", query, key, preferred_element_type=jnp.float32)  # [B, A, N, L]
    y = jnp.einsum("baqn,bnak->bqak", jax.nn.softmax(logits).astype(dtype), value)  # [B, N, A, K]
    return dense(x.shape[-1], ("joined_kv", "embed"), dtype, "to_out")(y.reshape(x.shape))


class Attention(nn.Module):
    """`attend` as a module."""

    heads: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array, context: Array) -> Array:
        return attend(x, context, self.heads, self.dtype)


class GatedDense(nn.Module):
    """Half of a dense layer's outputs times the GELU of the other half."""

    features: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array) -> Array:
        init = nn.initializers.lecun_normal(in_axis=0, out_axis=(1, 2))
        shape = x.shape[-1], 2, self.features
        axes = "embed", None, "mlp"
        kernel = compute_copy(self.param("kernel", partitioned(init, axes), shape, jnp.float32), axes, self.dtype)
        bias = self.param("bias", partitioned(nn.initializers.zeros, (None, "mlp")), shape[1:], jnp.float32)
        y = jnp.einsum("bnd,dgm->bngm", x, kernel) + bias.astype(self.dtype)[None, None]  # [B, N, 2, M]
        y = y[:, :, 0] * nn.gelu(y[:, :, 1], approximate=False)
        return nn.with_logical_constraint(y, ("batch", "length", "mlp"))


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the text, and a gated MLP, each after a norm and with a residual."""

    heads: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array, context: Array) -> Array:
        """dtype[B, N, D], dtype[B, L, C] -> dtype[B, N, D]."""
        y = LayerNorm(self.dtype, epsilon=1e-5, name="norm1")(x)
        x = x + Attention(self.heads, self.dtype, name="attn1")(y, y)
        y = LayerNorm(self.dtype, epsilon=1e-5, name="norm2")(x)
        x = x + Attention(self.heads, self.dtype, name="attn2")(y, context)
        y = LayerNorm(self.dtype, epsilon=1e-5, name="norm3")(x)
        y = GatedDense(4 * x.shape[-1], self.dtype, name="ff_in")(y)
        x = x + dense(x.shape[-1], ("mlp", "embed"), self.dtype, "ff_out")(y)
        return nn.with_logical_constraint(x, ("batch", "length", "embed"))


class Transformer(nn.Module):
    """A transformer block over the pixels, between two projections, with a residual around them."""

    config: UNetConfig
    heads: int

    @nn.compact
    def __call__(self, x: Array, context: Array) -> Array:
        """dtype[B, h, w, D], dtype[B, L, C] -> dtype[B, h, w, D]."""
        batch, width, dtype = x.shape[0], x.shape[-1], jnp.dtype(self.config.dtype)

        def project(name, init):
            if self.config.use_linear_projection:
                return dense(width, ("conv_in", "conv_out"), dtype, name, init=init)
            return Conv(width, 1, kernel_init=init, dtype=dtype, name=name)

        y = GroupNorm(self.config.norm_num_groups, 1e-6, dtype, name="norm")(x)
        y = project("proj_in", nn.initializers.lecun_normal())(y)
        y = y.reshape(batch, -1, width)  # [B, h * w, D]
        y = TransformerBlock(self.heads, dtype, name="transformer_blocks_0")(y, context)
        return x + project("proj_out", nn.initializers.zeros)(y.reshape(x.shape))


def parts(config: UNetConfig, heads: int):
    """(resnet, transformer): what makes the named parts of a block."""
    block, transformer = (nn.remat(part) if config.remat else part for part in (ResnetBlock, Transformer))

    def resnet(features, name):
        return block(features, config.norm_num_groups, 1e-5, jnp.dtype(config.dtype), name=name)

    return resnet, lambda name: transformer(config, heads, name=name)


class DownBlock(nn.Module):
    """Residual blocks, each with a transformer behind it if there is attention, then a convolution that halves h and w."""

    config: UNetConfig
    index: int

    @nn.compact
    def __call__(self, x: Array, time: Array, context: Array) -> tuple[Array, list[Array]]:
        """Gives the output, and those of every part of it, for the up blocks."""
        config, outputs = self.config, []
        features = config.block_out_channels[self.index]
        resnet, transformer = parts(config, config.attention_head_dim[self.index])
        for i in range(config.layers_per_block):
            x = resnet(features, f"resnets_{i}")(x, time)
            if config.down_block_types[self.index] == DOWN_BLOCKS[1]:
                x = transformer(f"attentions_{i}")(x, context)
            outputs.append(x)
        if self.index < len(config.block_out_channels) - 1:
            x = Conv(features, stride=2, dtype=jnp.dtype(config.dtype), name="downsampler")(x)
            outputs.append(x)
        return x, outputs


class MidBlock(nn.Module):
    """Residual block, transformer, residual block."""

    config: UNetConfig

    @nn.compact
    def __call__(self, x: Array, time: Array, context: Array) -> Array:
        resnet, transformer = parts(self.config, self.config.attention_head_dim[-1])
        x = resnet(x.shape[-1], "resnets_0")(x, time)
        x = transformer("attentions_0")(x, context)
        return resnet(x.shape[-1], "resnets_1")(x, time)


class UpBlock(nn.Module):
    """As a down block, with one residual block more, each reading an output of the way down; doubles h and w."""

    config: UNetConfig
    index: int

    @nn.compact
    def __call__(self, x: Array, skips: list[Array], time: Array, context: Array, shape: tuple[int, int] | None) -> Array:
        """skips: of the way down, the last is read first; shape: h and w of the output, about twice x's, if it grows."""
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        features = config.block_out_channels[::-1][self.index]
        resnet, transformer = parts(config, config.attention_head_dim[::-1][self.index])
        for i, skip in enumerate(reversed(skips)):
            x = resnet(features, f"resnets_{i}")(jnp.concatenate([x, skip], axis=-1), time)
            if config.up_block_types[self.index] == UP_BLOCKS[1]:
                x = transformer(f"attentions_{i}")(x, context)
        if shape is not None:
            x = Conv(features, dtype=dtype, name="upsampler")(upsample(x)[:, : shape[0], : shape[1]])
        return x


def upsample(x: Array) -> Array:
    """[B, h, w, C] -> [B, 2h, 2w, C], each pixel four times."""
    batch, h, w, channels = x.shape
    x = jnp.broadcast_to(x[:, :, None, :, None], (batch, h, 2, w, 2, channels))
    return x.reshape(batch, 2 * h, 2 * w, channels)


def sinusoids(timesteps: Array, width: int) -> Array:
    """int32[B] -> float32[B, width]: cosines, then sines, of falling frequencies."""
    frequencies = np.exp(-math.log(10_000) * np.arange(width // 2) / (width // 2)).astype(np.float32)
    angles = timesteps.astype(jnp.float32)[:, None] * frequencies[None]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class TimeEmbedding(nn.Module):
    """Sinusoids through an MLP of one hidden layer."""

    features: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = nn.silu(dense(self.features, ("embed", "mlp"), self.dtype, "linear_1")(x))
        return dense(self.features, ("mlp", "embed"), self.dtype, "linear_2")(x)


class UNet(nn.Module):
    """The model. Parameters: conv_in, time_embedding, down_blocks_*, mid_block, up_blocks_*, conv_norm_out, conv_out."""

    config: UNetConfig

    @nn.compact
    def __call__(self, latents: Array, timesteps: Array, context: Array) -> Array:
        """Noise or velocity, as the schedule's `prediction_type` says.

        Args:
          latents: float[B, h, w, in_channels], scaled; any h and w.
          timesteps: int32[B], or int32[] for all.
          context: float[B, L, cross_attention_dim], the text encoder's last hidden states.

        Returns:
          float32[B, h, w, out_channels].

        Raises:
          UserError: shapes that do not fit the config.
        """
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        if latents.ndim != 4 or latents.shape[-1] != config.in_channels:
            expected = f"[B, h, w, {config.in_channels}] (unet.in_channels)"
            raise UserError(f"latents: got shape {latents.shape}, expected {expected}")
        if context.ndim != 3 or context.shape[::2] != (latents.shape[0], config.cross_attention_dim):
            expected = f"[{latents.shape[0]}, L, {config.cross_attention_dim}] (unet.cross_attention_dim)"
            raise UserError(f"context: got shape {context.shape}, expected {expected}")
        channels, context = config.block_out_channels, context.astype(dtype)
        time = sinusoids(jnp.broadcast_to(timesteps, latents.shape[:1]), channels[0])
        time = TimeEmbedding(4 * channels[0], dtype, name="time_embedding")(time)  # [B, E]
        x = Conv(channels[0], dtype=dtype, name="conv_in")(latents)
        skips = [x]
        for i in range(len(channels)):
            x, outputs = DownBlock(config, i, name=f"down_blocks_{i}")(x, time, context)
            skips += outputs
        x = MidBlock(config, name="mid_block")(x, time, context)
        for i in range(len(channels)):
            skips, read = skips[: -config.layers_per_block - 1], skips[-config.layers_per_block - 1 :]
            shape = skips[-1].shape[1:3] if skips else None
            x = UpBlock(config, i, name=f"up_blocks_{i}")(x, read, time, context, shape)
        x = nn.silu(GroupNorm(config.norm_num_groups, 1e-5, dtype, name="conv_norm_out")(x))
        last = Conv(config.out_channels, kernel_init=nn.initializers.zeros, dtype=dtype, out_axis=None, name="conv_out")
        x = last(x)
        return x.astype(jnp.float32)
