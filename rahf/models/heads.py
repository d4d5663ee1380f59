"""The score head and the heatmap head (arXiv 2312.10240, sections 4.1 and 9). Both read the fused feature map."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.typing import DTypeLike

from rahf.models.t5 import RMSNorm
from rahf.models.vit import LayerNorm
from rahf.partitioning import compute_copy, product
from richhf_data.errors import UserError

Array = jax.Array
KERNEL_AXES = ("conv_height", "conv_width", "conv_in", "conv_out")
partitioned = nn.with_logical_partitioning
STYLES = ("paper", "pytorch")


def _check_style(name: str, style: str) -> None:
    if style not in STYLES:
        raise UserError(f"{name}.style: got {style!r}, expected one of {STYLES}")


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
            raise UserError(f"score_head.padding: got {self.padding!r}, expected 'VALID' or 'SAME'")


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
    # Into how many strips an image is cut, from the first deconvolution on whose input's width divides by it, if any. The
    # result is the same; a TPU convolves few images slowly, and strips are more.
    strips: int = 1

    def __post_init__(self):
        _check_style("heatmap_head", self.style)
        if self.strips < 1:
            raise UserError(f"heatmap_head.strips: got {self.strips}, expected 1 or more")


CONV_DIMENSIONS = ("NHWC", "HWIO", "NHWC")


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def convolve(x: Array, kernel: Array, strips: int, rows: tuple[int, int], columns: tuple[int, int]) -> Array:
    """A convolution of stride 1 over images in `strips`, with so many rows and columns of padding before and after.

    Where an image is cut, the padding is its neighbour's columns, of which it has enough.
    """
    return _convolve(x, kernel, strips, rows, columns)


def _convolve(x, kernel, strips, rows, columns, stride=1):
    if strips > 1:
        x, columns = _with_neighbours(x, strips, columns), (0, 0)
    strides, padding = (stride, stride), (rows, columns)
    return jax.lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=CONV_DIMENSIONS)


def _convolve_forward(x, kernel, *settings):
    return convolve(x, kernel, *settings), (x, kernel)


def _convolve_backward(strips, rows, columns, saved, cotangent):
    """The gradient of x fetches its neighbours' columns too, where JAX's own would send them its share."""
    x, kernel = saved
    whole = jax.linear_transpose(lambda kernel: _convolve(x, kernel, strips, rows, columns), kernel)
    rows, columns = (
        tuple(taps - 1 - pad for pad in padding) for taps, padding in zip(kernel.shape, (rows, columns), strict=False)
    )
    return _convolve(cotangent, _turned(kernel), strips, rows, columns), *whole(cotangent)


def _turned(kernel: Array) -> Array:
    """By 180 degrees, inputs and outputs exchanged."""
    return jnp.swapaxes(jnp.flip(kernel, (0, 1)), 2, 3)


convolve.defvjp(_convolve_forward, _convolve_backward)


def _with_neighbours(x: Array, strips: int, columns: tuple[int, int]) -> Array:
    """[N, h, w, C] -> [N, h, before + w + after, C]: each strip between the columns that it was cut from, or zeros."""
    (n, h, w, _), (before, after) = x.shape, columns

    def moved(edge, by):  # to the strip that many places on, within the image
        edge = edge.reshape(n // strips, strips, h, -1, edge.shape[-1])
        edge = jnp.pad(edge, ((0, 0), (max(by, 0), max(-by, 0)), *[(0, 0)] * 3))
        return edge[:, max(-by, 0) : strips + max(-by, 0)].reshape(n, h, -1, edge.shape[-1])

    left = [moved(x[:, :, w - before :], 1)] if before else []
    right = [moved(x[:, :, :after], -1)] if after else []
    return jnp.concatenate([*left, x, *right], axis=2)


def to_strips(x: Array, strips: int) -> Array:
    """[B, h, strips * w, C] -> [B * strips, h, w, C]: each image cut from left to right."""
    batch, h, width, features = x.shape
    x = x.reshape(batch, h, strips, width // strips, features)
    return jnp.swapaxes(x, 1, 2).reshape(batch * strips, h, width // strips, features)


def from_strips(x: Array, strips: int) -> Array:
    """[..., B * strips, h, w] -> [..., B, h, strips * w]."""
    *rest, n, h, w = x.shape
    x = jnp.swapaxes(x.reshape(*rest, n // strips, strips, h, w), -3, -2)
    return x.reshape(*rest, n // strips, h, strips * w)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def deconv2x(x: Array, kernel: Array, style: str = "paper", strips: int = 1) -> Array:
    """Deconvolution of stride 2 with a 3x3 kernel, as four convolutions of stride 1.

    "paper" is `jax.lax.conv_transpose(x, kernel, (2, 2), "SAME")`. "pytorch" is `ConvTranspose2d` with padding 1 and output
    padding 1, its kernel turned by 180 degrees; the inputs lie one output pixel earlier there.

    In one dimension, output 2i is `kernel[0] * x[i - 1] + kernel[2] * x[i]` and output 2i + 1 is `kernel[1] * x[i]`; in the
    style "pytorch" output 2i is `kernel[1] * x[i]` and output 2i + 1 is `kernel[0] * x[i] + kernel[2] * x[i + 1]`. So even
    and odd rows and columns have a convolution each, and nothing is multiplied by the zeros of a spread-out input, which
    neither the CPU backend (in the gradients) nor the TPU's instruction scheduler skips (benchmarks/README.md). Not measured
    on GPUs.

    Args:
      x: dtype[N, h, w, C], images in `strips`. kernel: dtype[3, 3, C, F].

    Returns:
      dtype[N, 2h, 2w, F].
    """
    (n, h, w, _), features = x.shape, kernel.shape[-1]
    rows = [_laid_out(jnp.stack(row, axis=3), (1, 2, 3, 0, 4)) for row in _parts(x, kernel, style, strips)]
    pixels = _laid_out(jnp.stack(rows, axis=2), (1, 2, 3, 4, 0, 5))  # [N, h, 2, w, 2, F]
    return pixels.reshape(n, 2 * h, 2 * w, features)


def _parts(x: Array, kernel: Array, style: str, strips: int) -> list[list[Array]]:
    """dtype[N, h, w, F] each: the even and the odd rows, of each the even and the odd columns."""
    one, two = (slice(1, 2), (0, 0)), (slice(0, 3, 2), (1, 0) if style == "paper" else (0, 1))  # taps, padding
    order = (two, one) if style == "paper" else (one, two)
    return [[_convolve(x, kernel[i, j], strips, rows, columns) for j, columns in order] for i, rows in order]


def _deconv2x_forward(x, kernel, *settings):
    return deconv2x(x, kernel, *settings), (x, kernel)


def _deconv2x_backward(style, strips, saved, cotangent):
    x, kernel = saved
    padding = (0, 1) if style == "paper" else (1, 0)
    dx = _convolve(cotangent, _turned(kernel), strips, padding, padding, stride=2)
    whole = jax.linear_transpose(lambda kernel: _parts(x, kernel, style, strips), kernel)
    return dx, *whole([[cotangent[:, i::2, j::2] for j in (0, 1)] for i in (0, 1)])


deconv2x.defvjp(_deconv2x_forward, _deconv2x_backward)


def _laid_out(x: Array, order: tuple[int, ...]) -> Array:
    """The same array, on a TPU with its axes in this order in memory, the last one contiguous.

    XLA would put the axis that is stacked first, and copy the whole afterwards. An exported function whose batch is a symbol
    goes without: layouts cannot be exported so.
    """
    if not all(isinstance(size, int) for size in x.shape):
        return x

    def constrained(x):
        return with_layout_constraint(x, Layout(major_to_minor=order))

    return jax.lax.platform_dependent(x, tpu=constrained, default=lambda x: x)


class Conv(nn.Module):
    """Stride 1, or the stride-2 deconvolution `deconv2x`, of images in `strips`; the same parameters.

    `centred` takes the mean over the output channels from kernel and bias, and so from the result: the first half of a
    layer norm, at the cost of the parameters instead of the image.
    """

    features: int
    kernel_size: int
    padding: str = "SAME"
    deconv: bool = False
    centred: bool = False
    style: str = "paper"
    strips: int = 1
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
            x = deconv2x(x, kernel, self.style, self.strips)
        else:
            total = self.kernel_size - 1 if self.padding == "SAME" else 0
            padding = total // 2, total - total // 2
            x = convolve(x, kernel, self.strips, padding, padding)
        return x + bias.astype(self.dtype).reshape(1, 1, 1, -1)


class ConvNorm(nn.Module):
    """Convolution, then the style's norm over channels (statistics in float32)."""

    features: int
    kernel_size: int = 3
    padding: str = "SAME"
    deconv: bool = False
    relu_first: bool = False  # between the two
    style: str = "paper"
    strips: int = 1
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        paper = self.style == "paper"
        sizes = self.features, self.kernel_size, self.padding
        x = Conv(*sizes, self.deconv, paper, self.style, self.strips, self.dtype, name="conv")(x)
        if self.relu_first:
            x = nn.relu(x)
        if paper:
            x = LayerNorm(self.dtype, axis="conv_out", centred=True, name="norm")(x)
        else:
            x = RMSNorm(self.dtype, axis="conv_out", epsilon=1e-8, name="norm")(x)
        return nn.with_logical_constraint(x, ("batch", "height", "width", "conv_out"))


class ConvToOne(nn.Module):
    """A 3x3 convolution with one output channel: a product for each tap, and the sum of the shifted products.

    As a convolution it would fill one of a TPU's 128 lanes.
    """

    strips: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """dtype[N, H, W / strips, C], N = B * strips -> float32[B, H, W]."""
        axes = (*KERNEL_AXES[:3], None)
        kernel = self.param("kernel", partitioned(nn.initializers.he_normal(), axes), (3, 3, x.shape[-1], 1), jnp.float32)
        bias = self.param("bias", partitioned(nn.initializers.zeros, (None,)), (1,), jnp.float32)
        kernel = compute_copy(kernel, axes, self.dtype).reshape(1, 1, 9, -1)
        products = jax.lax.conv_general_dilated(
            x.astype(self.dtype), kernel, (1, 1), "VALID",
            dimension_numbers=("NHWC", "HWOI", "CNHW"), preferred_element_type=jnp.float32,
        )  # fmt: skip
        taps = from_strips(products, self.strips)  # [9, B, H, W]
        h, w = taps.shape[-2:]
        taps = jnp.pad(taps, ((0, 0), (0, 0), (1, 1), (1, 1))).reshape(3, 3, taps.shape[1], h + 2, w + 2)
        return bias.reshape(1, 1, 1) + sum(taps[i, j, :, i : i + h, j : j + w] for i in range(3) for j in range(3))


class Dense(nn.Module):
    """x @ kernel + bias, [B, I] -> [B, O]; the kernel may be much larger than the rows (`partitioning.product`)."""

    features: int
    axis: str | None
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array) -> Array:
        axes, shape = ("score_in", self.axis), (x.shape[-1], self.features)
        kernel = self.param("kernel", partitioned(nn.initializers.he_normal(), axes), shape, jnp.float32)
        bias = self.param("bias", partitioned(nn.initializers.zeros, axes[1:]), shape[1:], jnp.float32)
        return product(x.astype(self.dtype), kernel, axes) + bias.astype(self.dtype).reshape(1, -1)


class ScoreHead(nn.Module):
    """Feature map -> one score: convolutions, dense layers, sigmoid."""

    config: ScoreHeadConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """dtype[B, h, w, D] -> float32[B] in [0, 1]. UserError when the grid is too small for the convolutions."""
        config = self.config
        shrink = len(config.filters) * (config.kernel_size - 1) if config.padding == "VALID" else 0
        if min(x.shape[1:3]) <= shrink:
            raise UserError(
                f"score_head: got a grid of {x.shape[1]}x{x.shape[2]}, expected more than {shrink} on each side for "
                f"{len(config.filters)} VALID convolutions; set score_head.padding to 'SAME' or use fewer filters"
            )
        for i, features in enumerate(config.filters):
            conv = ConvNorm(
                features, config.kernel_size, config.padding, style=config.style, dtype=self.dtype, name=f"conv_{i}"
            )
            x = nn.relu(conv(x))
        x = x.reshape(x.shape[0], -1)  # [B, h' * w' * F]
        for i, features in enumerate(config.dense):
            x = nn.relu(Dense(features, "score_out", self.dtype, name=f"dense_{i}")(x))
        x = Dense(1, None, jnp.float32, name="output")(x)  # [B, 1]
        return nn.sigmoid(x[:, 0])


class UpStage(nn.Module):
    """One deconvolution and its two read-out convolutions: [N, h, w, C] -> [N, 2h, 2w, F], images in `strips`."""

    features: int
    style: str
    strips: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        conv = functools.partial(ConvNorm, self.features, style=self.style, strips=self.strips, dtype=self.dtype)
        x = nn.relu(conv(deconv=True, name="deconv")(x))  # [N, 2h, 2w, F]
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
        stage, strips = nn.remat(UpStage) if config.remat else UpStage, 1
        for i, features in enumerate(config.deconv_filters):
            if strips == 1 and x.shape[2] % config.strips == 0:
                x, strips = to_strips(x, config.strips), config.strips
            x = stage(features, config.style, strips, self.dtype, name=f"up_{i}")(x)
        output = ConvNorm if paper else Conv
        x = nn.relu(output(config.output_hidden, 3, strips=strips, dtype=self.dtype, name="output_0")(x))
        return nn.sigmoid(ConvToOne(strips, self.dtype, name="output_1")(x))
