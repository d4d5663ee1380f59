"""Stable Diffusion's UNet: diffusers' `UNet2DConditionModel` for SD 1.x and 2.x, with its parameter names.

    latents --conv_in--> down blocks --> mid block --> up blocks (they read the down blocks' outputs too) --conv_out--> noise
    timestep --sinusoids, MLP--> every residual block
    text --> the cross-attention of every transformer

"High-Resolution Image Synthesis with Latent Diffusion Models" (arXiv 2112.10752). Layout NHWC. A parameter's path joined by
"/" is diffusers' name, except for what `rahf.diffusion.folder` lists. With new weights every residual branch gives zero and
the model predicts zero, as in ADM (arXiv 2105.05233).

Logical axes are those of `rahf.models.rahf`: conv_height, conv_width, conv_in, conv_out of convolutions and group norms;
embed, joined_kv, mlp of the transformers and the time embedding.
"""

import dataclasses
import math
from typing import Annotated, Literal

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import jaxprs_in_params
from jax.typing import DTypeLike

from rahf.diffusion.blocks import Channels, Dtype, ResnetBlock, attend, check_blocks, dense, repeated
from rahf.models.layers import Conv, Dense, GroupNorm, LayerNorm, partitioned, upsample
from rahf.partitioning import compute_copy
from richhf_data import checked
from richhf_data.checked import Size
from richhf_data.errors import UserError
from richhf_data.ranges import Range

Array = jax.Array
Text = Array | dict[str, tuple[Array, Array]]  # the encoder's hidden states, or `UNet.keys_values` of them
DOWN_BLOCKS = ("DownBlock2D", "CrossAttnDownBlock2D")  # the second has attention
UP_BLOCKS = ("UpBlock2D", "CrossAttnUpBlock2D")


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """Sizes, under diffusers' names. The defaults are those of Stable Diffusion 1.4 and 1.5."""

    sample_size: Annotated[int, Range(1, 256)] = 64  # h = w of the latents in training; the model takes other sizes too
    in_channels: Size = 4  # 9 in the inpainting models: latents, mask, latents of the masked image
    out_channels: Size = 4
    block_out_channels: Channels = (320, 640, 1280, 1280)  # each block but the last halves the resolution
    down_block_types: tuple[Literal[DOWN_BLOCKS], ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    up_block_types: tuple[Literal[UP_BLOCKS], ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    layers_per_block: Annotated[int, Range(1, 64)] = 2
    attention_head_dim: tuple[Size, ...] = (8, 8, 8, 8)  # the number of heads (sic) of each down block
    cross_attention_dim: Size = 768  # width of the text encoder
    norm_num_groups: Size = 32
    use_linear_projection: bool = False  # SD 2.x: dense layers around the transformers, not 1x1 convolutions
    dtype: Dtype = "float32"  # of the computation; parameters and the output are float32
    remat: bool = False  # recompute each residual block and each transformer in the backward pass

    def __post_init__(self):
        checked.fields(self, "unet")
        check_blocks("unet", self.block_out_channels, self.norm_num_groups)
        depth = len(self.block_out_channels)
        for name in ("down_block_types", "up_block_types"):
            if len(types := getattr(self, name)) != depth:
                raise UserError(f"unet.{name}: got {types}, expected one for each of block_out_channels")
        heads = self.attention_head_dim
        if len(heads) != depth or any(width % h for width, h in zip(self.block_out_channels, heads, strict=True)):
            raise UserError(
                f"unet.attention_head_dim: got {heads}, expected {depth} numbers of heads that divide block_out_channels = "
                f"{self.block_out_channels}"
            )


class CrossAttention(nn.Module):
    """`attend` as a module."""

    heads: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array, context: Array | tuple[Array, Array]) -> Array:
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
    """Self-attention, cross-attention to the text and a gated MLP, each with a norm before it and a residual."""

    heads: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array, context: Array | tuple[Array, Array]) -> Array:
        """dtype[B, N, D], R rows of context as for `attend` -> dtype[R, N, D]."""
        y = LayerNorm(self.dtype, epsilon=1e-5, name="norm1")(x)
        x = x + CrossAttention(self.heads, self.dtype, name="attn1")(y, y)
        y = LayerNorm(self.dtype, epsilon=1e-5, name="norm2")(x)
        y = CrossAttention(self.heads, self.dtype, name="attn2")(y, context)
        x = repeated(x, len(y)) + y
        y = LayerNorm(self.dtype, epsilon=1e-5, name="norm3")(x)
        y = GatedDense(4 * x.shape[-1], self.dtype, name="ff_in")(y)
        x = x + dense(x.shape[-1], ("mlp", "embed"), self.dtype, "ff_out")(y)
        return nn.with_logical_constraint(x, ("batch", "length", "embed"))


class SpatialTransformer(nn.Module):
    """A transformer block over the pixels, between two projections, with a residual around all three."""

    config: UNetConfig
    heads: int

    @nn.compact
    def __call__(self, x: Array, context: Text) -> Array:
        """dtype[B, h, w, D], R rows of text -> dtype[R, h, w, D]."""
        batch, width, dtype = x.shape[0], x.shape[-1], jnp.dtype(self.config.dtype)

        def project(name, init):
            if self.config.use_linear_projection:
                return dense(width, ("conv_in", "conv_out"), dtype, name, init=init)
            return Conv(width, 1, kernel_init=init, dtype=dtype, name=name)

        if isinstance(context, dict):
            context = context["/".join(self.path)]
        y = GroupNorm(self.config.norm_num_groups, 1e-6, dtype, name="norm")(x)
        y = project("proj_in", nn.initializers.lecun_normal())(y)
        y = y.reshape(batch, -1, width)  # [B, h * w, D]
        y = TransformerBlock(self.heads, dtype, name="transformer_blocks_0")(y, context)
        y = project("proj_out", nn.initializers.zeros)(y.reshape(-1, *x.shape[1:]))
        return repeated(x, len(y)) + y


def saved(primitive, *_, **params) -> bool:
    """Remat's policy: the backward pass keeps the outputs of convolutions and of attention kernels, small and slow ones."""
    if primitive.name == "custom_vjp_call":
        return _has_kernel(params["call_jaxpr"].jaxpr)
    return primitive.name == "conv_general_dilated"


def _has_kernel(jaxpr) -> bool:
    return any(
        equation.primitive.name == "pallas_call" or any(map(_has_kernel, jaxprs_in_params(equation.params)))
        for equation in jaxpr.eqns
    )


def parts(config: UNetConfig, heads: int):
    """Two functions that make the parts of a block: resnet(features, name) and transformer(name)."""
    block, transformer = ResnetBlock, SpatialTransformer
    if config.remat:
        block, transformer = (nn.remat(part, policy=saved) for part in (block, transformer))

    def resnet(features, name):
        return block(features, config.norm_num_groups, 1e-5, jnp.dtype(config.dtype), name=name)

    return resnet, lambda name: transformer(config, heads, name=name)


class DownBlock(nn.Module):
    """Residual blocks, each followed by a transformer if there is attention, then a convolution that halves h and w."""

    config: UNetConfig
    index: int

    @nn.compact
    def __call__(self, x: Array, time: Array, context: Text) -> tuple[Array, list[Array]]:
        """The output, and the outputs of all its parts for the up blocks."""
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


class UNetMidBlock(nn.Module):
    """Residual block, transformer, residual block."""

    config: UNetConfig

    @nn.compact
    def __call__(self, x: Array, time: Array, context: Text) -> Array:
        resnet, transformer = parts(self.config, self.config.attention_head_dim[-1])
        x = resnet(x.shape[-1], "resnets_0")(x, time)
        x = transformer("attentions_0")(x, context)
        return resnet(x.shape[-1], "resnets_1")(x, time)


class UpBlock(nn.Module):
    """Like a down block, with one more residual block. Each reads an output of a down block too. Doubles h and w."""

    config: UNetConfig
    index: int

    @nn.compact
    def __call__(self, x: Array, skips: list[Array], time: Array, context: Text, shape: tuple[int, int] | None) -> Array:
        """skips: outputs of the down blocks, read from last to first. shape: (h, w) of the output, None: those of x."""
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        features = config.block_out_channels[::-1][self.index]
        resnet, transformer = parts(config, config.attention_head_dim[::-1][self.index])
        for i, skip in enumerate(reversed(skips)):
            x = resnet(features, f"resnets_{i}")(jnp.concatenate([x, repeated(skip, len(x))], axis=-1), time)
            if config.up_block_types[self.index] == UP_BLOCKS[1]:
                x = transformer(f"attentions_{i}")(x, context)
        if shape is not None:
            even = shape == (2 * x.shape[1], 2 * x.shape[2])
            conv = Conv(features, dtype=dtype, name="upsampler")
            x = conv(x, upsample) if even else conv(upsample(x)[:, : shape[0], : shape[1]])
        return x


def sinusoids(timesteps: Array, width: int) -> Array:
    """int32[B] -> float32[B, width]: cosines, then sines, with falling frequencies."""
    frequencies = np.exp(-math.log(10_000) * np.arange(width // 2) / (width // 2)).astype(np.float32)
    angles = timesteps.astype(jnp.float32)[:, None] * frequencies[None]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class TimeEmbedding(nn.Module):
    """An MLP over the sinusoids: float32[B, C] -> dtype[B, features]."""

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
    def __call__(self, latents: Array, timesteps: Array, context: Text) -> Array:
        """The predicted noise or velocity, depending on the schedule's `prediction_type`.

        Args:
          latents: float[B, h, w, in_channels], scaled; any h and w.
          timesteps: int32[B], or int32[] for all.
          context: float[R, L, cross_attention_dim], the text encoder's last hidden states, or `keys_values` of them. R is a
            multiple of B: R / B texts in succession for each row. What comes before the first text is computed once.

        Returns:
          float32[R, h, w, out_channels].

        Raises:
          UserError: shapes that do not fit the config.
        """
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        if latents.ndim != 4 or latents.shape[-1] != config.in_channels:
            expected = f"[B, h, w, {config.in_channels}] (unet.in_channels)"
            raise UserError(f"latents: got shape {latents.shape}, expected {expected}")
        if not isinstance(context, dict):
            if context.ndim != 3 or len(context) % len(latents) or context.shape[2] != config.cross_attention_dim:
                expected = f"[{latents.shape[0]}, L, {config.cross_attention_dim}] (unet.cross_attention_dim)"
                raise UserError(f"context: got shape {context.shape}, expected {expected}")
            context = context.astype(dtype)
        channels, time = config.block_out_channels, sinusoids(jnp.reshape(timesteps, -1), config.block_out_channels[0])
        time = TimeEmbedding(4 * channels[0], dtype, name="time_embedding")(time)  # [B or 1, E]
        x = Conv(channels[0], dtype=dtype, name="conv_in")(latents)
        skips = [x]
        for i in range(len(channels)):
            x, outputs = DownBlock(config, i, name=f"down_blocks_{i}")(x, time, context)
            skips += outputs
        x = UNetMidBlock(config, name="mid_block")(x, time, context)
        for i in range(len(channels)):
            skips, read = skips[: -config.layers_per_block - 1], skips[-config.layers_per_block - 1 :]
            shape = skips[-1].shape[1:3] if skips else None
            x = UpBlock(config, i, name=f"up_blocks_{i}")(x, read, time, context, shape)
        x = nn.silu(GroupNorm(config.norm_num_groups, 1e-5, dtype, name="conv_norm_out")(x))
        last = Conv(config.out_channels, kernel_init=nn.initializers.zeros, dtype=dtype, out_axis=None, name="conv_out")
        x = last(x)
        return x.astype(jnp.float32)

    def keys_values(self, context: Array) -> Text:
        """What every cross-attention reads of a text, for many calls with one text: {transformer: (keys, values)}.

        context: float[R, L, cross_attention_dim]. Keys and values: dtype[R, L, D], D the transformer's width.
        """
        params = flax.traverse_util.flatten_dict(self.variables["params"], sep="/")

        def project(name):
            kernel = params[name]
            layer = Dense(kernel.shape[1], ("embed", "joined_kv"), jnp.dtype(self.config.dtype), parent=None)
            return layer.apply({"params": {"kernel": kernel}}, context)

        end = "/transformer_blocks_0/attn2/to_{}/kernel"
        names = [name.removesuffix(end.format("k")) for name in params if name.endswith(end.format("k"))]
        return {name: (project(name + end.format("k")), project(name + end.format("v"))) for name in names}
