"""The score head and the heatmap head (arXiv 2312.10240, sections 4.1 and 9). Both read the fused feature map."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from rahf.models.t5 import RMSNorm
from rahf.models.vit import LayerNorm

Array = jax.Array
KERNEL_AXES = ("conv_height", "conv_width", "conv_in", "conv_out")
partitioned = nn.with_logical_partitioning
STYLES = ("paper", "pytorch")


def _check_style(name: str, style: str) -> None:
    if style not in STYLES:
        raise ValueError(f"{name}.style: got {style!r}, expected one of {STYLES}")


@dataclasses.dataclass(frozen=True)
class ScoreHeadConfig:
    """Filters and kernel from reimplementations that agree; the dense sizes are the paper's.

    style "pytorch" is the first author's release (github.com/youweiliang/RichHF): RMS norms instead of layer norms.
    """

    filters: tuple[int, ...] = (768, 384, 128, 64)
    kernel_size: int = 2
    padding: str = "VALID"  # "SAME" where the grid is too small for VALID
    dense: tuple[int, ...] = (2048, 1024)
    style: str = "paper"

    def __post_init__(self):
        _check_style("score_head", self.style)
        if self.padding not in ("VALID", "SAME"):
            raise ValueError(f"score_head.padding: got {self.padding!r}, expected 'VALID' or 'SAME'")


@dataclasses.dataclass(frozen=True)
class HeatmapHeadConfig:
    """The paper's filters; each deconvolution doubles the resolution. `output_hidden` is not in the paper.

    style "pytorch" is the first author's release: RMS norms instead of layer norms, in the first convolutions after the
    ReLU and none before the output; a residual around each pair of read-outs; deconvolutions that lie one pixel aside.
    """

    filters: tuple[int, ...] = (768, 384)
    deconv_filters: tuple[int, ...] = (768, 384, 384, 192)
    output_hidden: int = 192
    style: str = "paper"
    remat: bool = False  # recompute each stage in the backward pass

    def __post_init__(self):
        _check_style("heatmap_head", self.style)


CONV_DIMENSIONS = ("NHWC", "HWIO", "NHWC")


def deconv2x(x: Array, kernel: Array, style: str = "paper") -> Array:
    """Deconvolution of stride 2 with a 3x3 kernel, in the form that the platform is quick at.

    "paper" is `jax.lax.conv_transpose(x, kernel, (2, 2), "SAME")`. "pytorch" is `ConvTranspose2d` with padding 1 and output
    padding 1, its kernel turned by 180 degrees; the inputs lie one output pixel earlier there.

    XLA's TPU compiler skips the zeros between the spread-out inputs; its estimates for the paper's sizes favour the
    plain form. The CPU backend does not skip them in the gradients: there `deconv2x_by_parity` trains 10 to 30 times
    faster (forward and backward, 14x14x384 to 28x28x768 inputs, float32). Same parameter, same result. GPUs, not
    measured, get the plain form.

    Args:
      x: dtype[B, h, w, C]. kernel: dtype[3, 3, C, F].

    Returns:
      dtype[B, 2h, 2w, F].
    """

    def dilated(x, kernel):
        return jax.lax.conv_transpose(x, kernel, (2, 2), "SAME" if style == "paper" else ((1, 2), (1, 2)))

    by_parity = functools.partial(deconv2x_by_parity, style=style)
    return jax.lax.platform_dependent(x, kernel, cpu=by_parity, default=dilated)


def deconv2x_by_parity(x: Array, kernel: Array, style: str = "paper") -> Array:
    """`deconv2x` as four small convolutions of stride 1, one for each parity of the output's row and column.

    In one dimension, output 2i is `kernel[0] * x[i - 1] + kernel[2] * x[i]` and output 2i + 1 is `kernel[1] * x[i]`; in the
    style "pytorch" output 2i is `kernel[1] * x[i]` and output 2i + 1 is `kernel[0] * x[i] + kernel[2] * x[i + 1]`. Of the 36
    multiplications per input pixel of a convolution over spread-out inputs, 9 are not with a zero.
    """
    batch, h, w, _ = x.shape
    before = int(style == "paper")
    padding = before, 1 - before
    x = jnp.pad(x, ((0, 0), padding, padding, (0, 0)))  # [B, 1 + h, 1 + w, C]

    def taps_and_inputs(parity, size):  # two taps over all inputs, or the middle one over those that are no padding
        return (slice(0, None, 2), slice(None)) if parity != before else (slice(1, 2), slice(before, before + size))

    def of_parity(row, column):  # [B, h, w, F]
        (row_taps, rows), (column_taps, columns) = taps_and_inputs(row, h), taps_and_inputs(column, w)
        part = kernel[row_taps, column_taps]
        return jax.lax.conv_general_dilated(x[:, rows, columns], part, (1, 1), "VALID", dimension_numbers=CONV_DIMENSIONS)

    x = jnp.stack([jnp.stack([of_parity(row, column) for column in (0, 1)], axis=3) for row in (0, 1)], axis=2)
    return x.reshape(batch, 2 * h, 2 * w, kernel.shape[-1])  # from [B, h, 2, w, 2, F]


class Conv(nn.Module):
    """Stride 1, or the stride-2 deconvolution `deconv2x`; the same parameters."""

    features: int
    kernel_size: int
    padding: str = "SAME"
    deconv: bool = False
    style: str = "paper"
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape = (self.kernel_size, self.kernel_size, x.shape[-1], self.features)
        init = nn.initializers.he_normal()
        if self.deconv:  # an output pixel meets 2.25 of the 9 taps on average
            init = nn.initializers.variance_scaling(2.0 * 4.0, "fan_in", "truncated_normal")
        kernel = self.param("kernel", partitioned(init, KERNEL_AXES), shape, jnp.float32).astype(self.dtype)
        bias = self.param("bias", partitioned(nn.initializers.zeros, ("conv_out",)), shape[-1:], jnp.float32)
        x = x.astype(self.dtype)
        if self.deconv:
            x = deconv2x(x, kernel, self.style)
        else:
            x = jax.lax.conv_general_dilated(x, kernel, (1, 1), self.padding, dimension_numbers=CONV_DIMENSIONS)
        return x + bias.astype(self.dtype).reshape(1, 1, 1, -1)


class ConvNorm(nn.Module):
    """Convolution, then the style's norm over channels (statistics in float32)."""

    features: int
    kernel_size: int = 3
    padding: str = "SAME"
    deconv: bool = False
    relu_first: bool = False  # between the two
    style: str = "paper"
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = Conv(self.features, self.kernel_size, self.padding, self.deconv, self.style, self.dtype, name="conv")(x)
        if self.relu_first:
            x = nn.relu(x)
        if self.style == "paper":
            x = LayerNorm(self.dtype, axis="conv_out", name="norm")(x)
        else:
            x = RMSNorm(self.dtype, axis="conv_out", epsilon=1e-8, name="norm")(x)
        return nn.with_logical_constraint(x, ("batch", "height", "width", "conv_out"))


class ScoreHead(nn.Module):
    """Feature map -> one score: convolutions, dense layers, sigmoid."""

    config: ScoreHeadConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """dtype[B, h, w, D] -> float32[B] in [0, 1]. ValueError when the grid is too small for the convolutions."""
        config = self.config
        shrink = len(config.filters) * (config.kernel_size - 1) if config.padding == "VALID" else 0
        if min(x.shape[1:3]) <= shrink:
            raise ValueError(
                f"score_head: got a grid of {x.shape[1]}x{x.shape[2]}, expected more than {shrink} on each side for "
                f"{len(config.filters)} VALID convolutions; set score_head.padding to 'SAME' or use fewer filters"
            )
        for i, features in enumerate(config.filters):
            conv = ConvNorm(
                features, config.kernel_size, config.padding, style=config.style, dtype=self.dtype, name=f"conv_{i}"
            )
            x = nn.relu(conv(x))
        x = x.reshape(x.shape[0], -1)  # [B, h' * w' * F]

        def dense(features, name, dtype):
            return nn.Dense(
                features,
                dtype=dtype,
                kernel_init=partitioned(nn.initializers.he_normal(), ("score_in", "score_out")),
                bias_init=partitioned(nn.initializers.zeros, ("score_out",)),
                name=name,
            )

        for i, features in enumerate(config.dense):
            x = nn.relu(dense(features, f"dense_{i}", self.dtype)(x))
        x = dense(1, "output", jnp.float32)(x)  # [B, 1]
        return nn.sigmoid(x[:, 0])


class UpStage(nn.Module):
    """One deconvolution and its two read-out convolutions: [B, h, w, C] -> [B, 2h, 2w, F]."""

    features: int
    style: str
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        conv = functools.partial(ConvNorm, self.features, style=self.style, dtype=self.dtype)
        x = nn.relu(conv(deconv=True, name="deconv")(x))  # [B, 2h, 2w, F]
        y = nn.relu(conv(name="readout_0")(x))
        y = conv(name="readout_1")(y)
        return nn.relu(y if self.style == "paper" else x + y)


class HeatmapHead(nn.Module):
    """Feature map -> one heatmap: convolutions, deconvolutions with read-out convolutions, sigmoid."""

    config: HeatmapHeadConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """dtype[B, h, w, D] -> float32[B, h * 2**n, w * 2**n] in [0, 1], n the number of deconvolutions."""
        config, paper = self.config, self.config.style == "paper"
        for i, features in enumerate(config.filters):
            conv = ConvNorm(features, relu_first=not paper, style=config.style, dtype=self.dtype, name=f"conv_{i}")
            x = nn.relu(conv(x)) if paper else conv(x)
        stage = nn.remat(UpStage) if config.remat else UpStage
        for i, features in enumerate(config.deconv_filters):
            x = stage(features, config.style, self.dtype, name=f"up_{i}")(x)
        output = ConvNorm if paper else Conv
        x = nn.relu(output(config.output_hidden, 3, dtype=self.dtype, name="output_0")(x))
        x = Conv(1, 3, dtype=self.dtype, name="output_1")(x)  # [B, H, W, 1]
        return nn.sigmoid(x[..., 0].astype(jnp.float32))
