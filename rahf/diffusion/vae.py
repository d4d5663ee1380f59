"""The autoencoder of latent diffusion: diffusers' `AutoencoderKL`, with its parameter names.

    image [B, H, W, 3] --encode--> mean and log variance [B, h, w, Z] --sample--> latents --decode--> image

h = H / `config.factor`. "High-Resolution Image Synthesis with Latent Diffusion Models" (arXiv 2112.10752). A UNet reads
scaled latents. Only `encode_latents` and `decode_latents` apply `scaling_factor`; every other method has unscaled latents.
"""

import dataclasses
import functools
import typing
from typing import Annotated, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from rahf.diffusion.blocks import Channels, Dtype, ResnetBlock, attend, check_blocks
from rahf.models.layers import Conv, GroupNorm, normalize_image, upsample
from richhf_data import checked
from richhf_data.checked import Size
from richhf_data.errors import UserError
from richhf_data.ranges import Range

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class VAEConfig:
    """Sizes, under diffusers' names. The defaults are those of Stable Diffusion 1.4 and 1.5."""

    in_channels: Literal[3] = 3
    out_channels: Literal[3] = 3
    latent_channels: Size = 4  # Z
    block_out_channels: Channels = (128, 256, 512, 512)  # each block but the last halves the resolution
    layers_per_block: Annotated[int, Range(1, 64)] = 2
    norm_num_groups: Size = 32
    scaling_factor: Annotated[float, Range(1e-6, 1e6)] = 0.18215  # gives the latents a standard deviation of about 1
    dtype: Dtype = "float32"  # of the computation; parameters and outputs are float32
    remat: bool = False  # recompute each residual block in the backward pass

    def __post_init__(self):
        checked.fields(self, "vae")
        check_blocks("vae", self.block_out_channels, self.norm_num_groups)

    @property
    def factor(self) -> int:
        """Pixels per latent, on each side."""
        return 2 ** (len(self.block_out_channels) - 1)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """(h, w) of the latents of an image of height x width pixels.

        Raises:
          UserError: a size that is not a multiple of `factor`.
        """
        if min(height, width) <= 0 or height % self.factor or width % self.factor:
            fitting = " by ".join(str(max(1, round(n / self.factor)) * self.factor) for n in (height, width))
            raise UserError(
                f"image: got {height} by {width} pixels (height by width), expected multiples of {self.factor}, what a "
                f"latent covers; resize it, to {fitting} for instance"
            )
        return height // self.factor, width // self.factor


class Posterior(typing.NamedTuple):
    """A normal distribution over unscaled latents."""

    mean: Array  # float32[B, h, w, Z]
    logvar: Array  # float32[B, h, w, Z] in [-30, 20]

    def sample(self, noise: Array) -> Array:
        """noise: float32[B, h, w, Z], standard normal -> latents of the same shape."""
        return self.mean + jnp.exp(0.5 * self.logvar) * noise

    def kl(self) -> Array:
        """KL divergence from the standard normal distribution, summed over an image's latents: float32[B], in nats."""
        return 0.5 * (self.mean**2 + jnp.exp(self.logvar) - 1 - self.logvar).sum((1, 2, 3))


class VAEBlock(nn.Module):
    """Residual blocks, then a convolution that halves or doubles the resolution, or none."""

    config: VAEConfig
    features: int
    layers: int
    sampler: str = ""  # "downsampler", "upsampler" or none
    rows: int | None = None  # of x, to compute at a time

    @nn.compact
    def __call__(self, x: Array) -> Array:
        dtype, resnet = jnp.dtype(self.config.dtype), resnet_of(self.config, rows=self.rows)
        for i in range(self.layers):
            x = resnet(self.features, name=f"resnets_{i}")(x)
        if self.sampler == "downsampler":  # padded only at the end
            x = Conv(self.features, stride=2, padding=(0, 1), dtype=dtype, name=self.sampler)(x)
        elif self.sampler == "upsampler":
            x = Conv(self.features, dtype=dtype, name=self.sampler)(x, upsample, self.rows)
        return x


class AttentionBlock(nn.Module):
    """Self-attention with one head over the pixels, with a norm before it and a residual."""

    config: VAEConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        batch, width, dtype = x.shape[0], x.shape[-1], jnp.dtype(self.config.dtype)
        y = GroupNorm(self.config.norm_num_groups, 1e-6, dtype, name="group_norm")(x)
        y = y.reshape(batch, -1, width)  # [B, h * w, C]
        return x + attend(y, y, 1, dtype, bias=True).reshape(x.shape)


class VAEMidBlock(nn.Module):
    """Residual block, attention, residual block."""

    config: VAEConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        resnet = resnet_of(self.config)
        x = resnet(x.shape[-1], name="resnets_0")(x)
        x = AttentionBlock(self.config, name="attentions_0")(x)
        return resnet(x.shape[-1], name="resnets_1")(x)


def resnet_of(config: VAEConfig, **options):
    """`ResnetBlock` with every option set but width and name. With `config.remat` the backward pass recomputes it."""
    block = nn.remat(ResnetBlock) if config.remat else ResnetBlock
    return functools.partial(block, groups=config.norm_num_groups, epsilon=1e-6, dtype=jnp.dtype(config.dtype), **options)


class VAEEncoder(nn.Module):
    """Image -> means and log variances before the last 1x1 convolution. `tile`: as for `VAE.decode`."""

    config: VAEConfig

    @nn.compact
    def __call__(self, x: Array, tile: int | None = None) -> Array:
        config, dtype, channels = self.config, jnp.dtype(self.config.dtype), self.config.block_out_channels
        x = Conv(channels[0], dtype=dtype, name="conv_in")(x)
        for i, features in enumerate(channels):
            sampler = "downsampler" if i < len(channels) - 1 else ""
            rows = tile and max(1, tile // 2**i)
            x = VAEBlock(config, features, config.layers_per_block, sampler, rows, name=f"down_blocks_{i}")(x)
        x = VAEMidBlock(config, name="mid_block")(x)
        x = nn.silu(GroupNorm(config.norm_num_groups, 1e-6, dtype, name="conv_norm_out")(x))
        return Conv(2 * config.latent_channels, dtype=dtype, out_axis=None, name="conv_out")(x)


class VAEDecoder(nn.Module):
    """Latents after the first 1x1 convolution -> image. `tile`: as for `VAE.decode`."""

    config: VAEConfig

    @nn.compact
    def __call__(self, x: Array, tile: int | None = None) -> Array:
        config, dtype, channels = self.config, jnp.dtype(self.config.dtype), self.config.block_out_channels
        x = Conv(channels[-1], dtype=dtype, name="conv_in")(x)
        x = VAEMidBlock(config, name="mid_block")(x)
        for i, features in enumerate(reversed(channels)):
            sampler = "upsampler" if i < len(channels) - 1 else ""
            rows = tile and max(1, tile * 2**i // config.factor)
            x = VAEBlock(config, features, config.layers_per_block + 1, sampler, rows, name=f"up_blocks_{i}")(x)
        norm = GroupNorm(config.norm_num_groups, 1e-6, dtype, name="conv_norm_out").of(x)
        conv = Conv(config.out_channels, dtype=dtype, out_axis=None, name="conv_out")
        return conv(x, lambda x: nn.silu(norm(x)), tile)


class VAE(nn.Module):
    """The model. Parameters: encoder, decoder, quant_conv, post_quant_conv."""

    config: VAEConfig

    def setup(self):
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        self.encoder, self.decoder = VAEEncoder(config), VAEDecoder(config)
        self.quant_conv = Conv(2 * config.latent_channels, 1, dtype=dtype, out_axis=None)
        self.post_quant_conv = Conv(config.latent_channels, 1, dtype=dtype, out_axis=None)

    def encode(self, image: Array, tile: int | None = None) -> Posterior:
        """float[B, H, W, 3] in [-1, 1], or uint8 -> the distribution of the unscaled latents. `tile`: as for `decode`.

        Raises:
          UserError: a wrong shape; H or W not a multiple of `config.factor`; neither uint8 nor float.
        """
        if image.ndim != 4 or image.shape[-1] != self.config.in_channels:
            raise UserError(f"image: got shape {image.shape}, expected [B, H, W, {self.config.in_channels}]")
        self.config.grid(*image.shape[1:3])
        moments = self.quant_conv(self.encoder(normalize_image(image), tile)).astype(jnp.float32)
        mean, logvar = jnp.split(moments, 2, axis=-1)
        return Posterior(mean, jnp.clip(logvar, -30.0, 20.0))

    def decode(self, latents: Array, tile: int | None = None) -> Array:
        """Unscaled latents float[B, h, w, Z] -> float32[B, H, W, 3], about in [-1, 1].

        tile: rows of pixels that a layer computes at a time, None for all. Less memory, and the same image up to rounding:
        the norms take their statistics of the whole picture, and every strip reads the rows beside it.
        """
        return self.decoder(self.post_quant_conv(latents), tile).astype(jnp.float32)

    def encode_latents(self, image: Array, noise: Array | None = None, tile: int | None = None) -> Array:
        """An image as for `encode` -> scaled latents float32[B, h, w, Z]: a sample with this noise, or the mean."""
        posterior = self.encode(image, tile)
        return self.config.scaling_factor * (posterior.mean if noise is None else posterior.sample(noise))

    def decode_latents(self, latents: Array, tile: int | None = None) -> Array:
        """Scaled latents float[B, h, w, Z] -> float32[B, H, W, 3], about in [-1, 1]. `tile`: as for `decode`."""
        return self.decode(latents / self.config.scaling_factor, tile)

    def __call__(self, image: Array, noise: Array | None = None) -> tuple[Array, Posterior]:
        """For training: the image decoded from its latents (a sample with this noise, or the mean), and the posterior."""
        posterior = self.encode(image)
        return self.decode(posterior.mean if noise is None else posterior.sample(noise)), posterior
