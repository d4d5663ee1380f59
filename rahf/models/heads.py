"""The score head and the heatmap head (arXiv 2312.10240, sections 4.1 and 9). Both read the fused feature map."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.typing import DTypeLike

from rahf.models.t5 import RMSNorm
from rahf.models.vit import LayerNorm, Projection
from rahf.partitioning import compute_copy

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

    A convolution over spread-out inputs multiplies mostly by zeros, which neither the CPU backend (in the gradients) nor
    the TPU's instruction scheduler skips: `deconv2x_by_rows` is quicker there (benchmarks/README.md). Same parameter, same
    result. GPUs, not measured, get the plain form.

    Args:
      x: dtype[B, h, w, C]. kernel: dtype[3, 3, C, F].

    Returns:
      dtype[B, 2h, 2w, F].
    """

    def dilated(x, kernel):
        return jax.lax.conv_transpose(x, kernel, (2, 2), "SAME" if style == "paper" else ((1, 2), (1, 2)))

    by_rows = functools.partial(deconv2x_by_rows, style=style)
    return jax.lax.platform_dependent(x, kernel, cpu=by_rows, tpu=by_rows, default=dilated)


def deconv2x_by_rows(x: Array, kernel: Array, style: str = "paper") -> Array:
    """`deconv2x` as two convolutions of stride 1, for the even and the odd output rows, that give columns by pairs.

    In one dimension, output 2i is `kernel[0] * x[i - 1] + kernel[2] * x[i]` and output 2i + 1 is `kernel[1] * x[i]`; in the
    style "pytorch" output 2i is `kernel[1] * x[i]` and output 2i + 1 is `kernel[0] * x[i] + kernel[2] * x[i + 1]`. Of the 36
    multiplications per input pixel of a convolution over spread-out inputs 9 are not with a zero; here it is 12.
    """
    (batch, h, w, _), features = x.shape, kernel.shape[-1]
    paper = style == "paper"
    x = jnp.pad(x, ((0, 0), *[(1, 0) if paper else (0, 1)] * 2, (0, 0)))  # [B, 1 + h, 1 + w, C]
    one, two = kernel[:, 1], (kernel[:, 0], kernel[:, 2])  # the column that has one tap, and the one that has two
    zero = jnp.zeros_like(one)
    pairs = ((two[0], zero), (two[1], one)) if paper else ((one, two[0]), (zero, two[1]))
    pairs = jnp.stack([jnp.concatenate(pair, axis=-1) for pair in pairs], axis=1)  # [3, 2, C, 2F]

    def convolve(x, kernel):  # [B, h, w, 2F]
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=CONV_DIMENSIONS)

    rows = [convolve(x, pairs[0::2]), convolve(x[:, 1:] if paper else x[:, :h], pairs[1:2])]
    rows = row_major(jnp.stack(rows if paper else rows[::-1], axis=2))  # [B, h, 2, w, 2F]
    return rows.reshape(batch, 2 * h, 2 * w, features)


def row_major(x: Array) -> Array:
    """The same array, on a TPU laid out in memory in the order of its axes.

    Between convolutions of few images XLA would lay the batch beside the channels, and fill it up to a tile of 4 or 128.
    An exported function whose batch is a symbol goes without: layouts cannot be exported so.
    """
    if not all(isinstance(size, int) for size in x.shape):
        return x

    def constrained(x):
        return with_layout_constraint(x, Layout(major_to_minor=tuple(range(x.ndim))))

    return jax.lax.platform_dependent(x, tpu=constrained, default=lambda x: x)


class Conv(nn.Module):
    """Stride 1, or the stride-2 deconvolution `deconv2x`; the same parameters.

    `centred` takes the mean over the output channels from kernel and bias, and so from the result: the first half of a
    layer norm, at the cost of the parameters instead of the image.
    """

    features: int
    kernel_size: int
    padding: str = "SAME"
    deconv: bool = False
    centred: bool = False
    style: str = "paper"
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape = (self.kernel_size, self.kernel_size, x.shape[-1], self.features)
        init = nn.initializers.he_normal()
        if self.deconv:  # an output pixel meets 2.25 of the 9 taps on average
            init = nn.initializers.variance_scaling(2.0 * 4.0, "fan_in", "truncated_normal")
        kernel = self.param("kernel", partitioned(init, KERNEL_AXES), shape, jnp.float32)
        bias = self.param("bias", partitioned(nn.initializers.zeros, ("conv_out",)), shape[-1:], jnp.float32)
        if self.centred:
            kernel, bias = (x - jnp.mean(x, axis=-1, keepdims=True) for x in (kernel, bias))
        x, kernel = x.astype(self.dtype), compute_copy(kernel, KERNEL_AXES, self.dtype)
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
        paper = self.style == "paper"
        conv = Conv(self.features, self.kernel_size, self.padding, self.deconv, paper, self.style, self.dtype, name="conv")
        x = conv(x)
        if self.relu_first:
            x = nn.relu(x)
        if paper:
            x = LayerNorm(self.dtype, axis="conv_out", centred=True, name="norm")(x)
        else:
            x = RMSNorm(self.dtype, axis="conv_out", epsilon=1e-8, name="norm")(x)
        x = row_major(x)
        return nn.with_logical_constraint(x, ("batch", "height", "width", "conv_out"))


class ConvToOne(nn.Module):
    """A 3x3 convolution with one output channel: a product for each tap, and the sum of the shifted products.

    As a convolution it would fill one of a TPU's 128 lanes.
    """

    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """dtype[B, H, W, C] -> float32[B, H, W]."""
        axes = (*KERNEL_AXES[:3], None)
        kernel = self.param("kernel", partitioned(nn.initializers.he_normal(), axes), (3, 3, x.shape[-1], 1), jnp.float32)
        bias = self.param("bias", partitioned(nn.initializers.zeros, (None,)), (1,), jnp.float32)
        kernel = compute_copy(kernel, axes, self.dtype)[..., 0]
        h, w = x.shape[1:3]
        taps = jnp.einsum("bhwc,ijc->ijbhw", x.astype(self.dtype), kernel, preferred_element_type=jnp.float32)
        taps = jnp.pad(taps, ((0, 0), (0, 0), (0, 0), (1, 1), (1, 1)))
        return bias.reshape(1, 1, 1) + sum(taps[i, j, :, i : i + h, j : j + w] for i in range(3) for j in range(3))


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

        def dense(features, axis, dtype, name):
            init = nn.initializers.he_normal()
            return Projection((features,), ("score_in", axis), dtype=dtype, kernel_init=init, name=name)

        for i, features in enumerate(config.dense):
            x = nn.relu(dense(features, "score_out", self.dtype, f"dense_{i}")(x))
        x = dense(1, None, jnp.float32, "output")(x)  # [B, 1]
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
        return nn.sigmoid(ConvToOne(self.dtype, name="output_1")(x))
