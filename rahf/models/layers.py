"""Layers that several models share.

Parameters are float32. A layer computes in its `dtype` and takes statistics in float32. Every parameter names its logical
axes, and `rahf/partitioning.py` maps these to the mesh.
"""

import functools
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from rahf.models import cpu
from rahf.partitioning import compute_copy
from richhf_data.errors import UserError

Array = jax.Array
partitioned = nn.with_logical_partitioning
KERNEL_AXES = ("conv_height", "conv_width", "conv_in", "conv_out")  # logical, of a convolution's kernel
CONV_DIMENSIONS = ("NHWC", "HWIO", "NHWC")  # input, kernel, output of lax.conv_general_dilated


# ---- Images ---------------------------------------------------------------------------------------------------------


def normalize_image(image: Array) -> Array:
    """uint8[B, H, W, 3] in [0, 255] -> float32 in [-1, 1], on the device. A float image is returned unchanged.

    Raises:
      UserError: the image is neither uint8 nor float.
    """
    if image.dtype == jnp.uint8:
        return image.astype(jnp.float32) / 127.5 - 1.0
    if not jnp.issubdtype(image.dtype, jnp.floating):
        raise UserError(f"image: got {image.dtype}, expected uint8 in [0, 255] or a float type in [-1, 1]")
    return image


def to_patches(image: Array, size: int) -> Array:
    """[B, H, W, C] -> [B, H / size, W / size, size * size * C]: the flattened pixels of each patch, row by row."""
    batch, height, width, channels = image.shape
    h, w = height // size, width // size
    x = image.reshape(batch, h, size, w, size, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, h, w, size * size * channels)


def upsample(x: Array) -> Array:
    """[B, h, w, C] -> [B, 2h, 2w, C], nearest neighbour."""
    batch, h, w, channels = x.shape
    x = jnp.broadcast_to(x[:, :, None, :, None], (batch, h, 2, w, 2, channels))
    return x.reshape(batch, 2 * h, 2 * w, channels)


# ---- Products --------------------------------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def matmul(x: Array, kernel: Array, output_dtype: DTypeLike) -> Array:
    """x @ kernel, accumulated and returned in `output_dtype`. Gradients are computed and sent in the inputs' dtype."""
    return jnp.matmul(x, kernel, preferred_element_type=output_dtype)


def _matmul_forward(x, kernel, output_dtype):
    return matmul(x, kernel, output_dtype), (x, kernel)


def _matmul_backward(output_dtype, factors, cotangent):
    del output_dtype
    _, pull_back = jax.vjp(jnp.matmul, *factors)
    return pull_back(cotangent.astype(factors[0].dtype))


matmul.defvjp(_matmul_forward, _matmul_backward)


# ---- Dense layers ---------------------------------------------------------------------------------------------------


class Dense(nn.Module):
    """x @ kernel, no bias."""

    features: int
    axes: tuple[str, str]  # logical, of the kernel
    dtype: DTypeLike
    scale: float = 1.0  # multiplies the standard deviation of the initialisation

    @nn.compact
    def __call__(self, x: Array, output_dtype: DTypeLike | None = None) -> Array:
        """[..., I] -> [..., features] in `output_dtype`, by default `dtype`."""
        init = nn.initializers.variance_scaling(self.scale**2, "fan_in", "truncated_normal")
        shape = x.shape[-1], self.features
        kernel = self.param("kernel", partitioned(init, self.axes), shape, jnp.float32)
        kernel = compute_copy(kernel, self.axes, self.dtype)
        return matmul(x.astype(self.dtype), kernel, output_dtype or self.dtype)


class Projection(nn.Module):
    """Contracts the last `contract` axes to `features`, with bias, like flax's `DenseGeneral`."""

    features: tuple[int, ...]
    axes: tuple[str, ...]  # logical, of the kernel [*contracted, *features]
    contract: int = 1
    dtype: DTypeLike = jnp.float32
    kernel_init: nn.initializers.Initializer | None = None  # by default Xavier's uniform one
    bias_init: nn.initializers.Initializer = nn.initializers.zeros

    @nn.compact
    def __call__(self, x: Array) -> Array:
        inputs = x.shape[-self.contract :]
        shape = (*inputs, *self.features)
        # Fan-in and fan-out of the flattened matrix, like flax.
        init = self.kernel_init or nn.initializers.variance_scaling(
            1.0, "fan_avg", "uniform", range(len(inputs)), range(len(inputs), len(shape))
        )
        kernel = self.param("kernel", partitioned(init, self.axes), shape, jnp.float32)
        bias_axes = self.axes[self.contract :]
        bias = self.param("bias", partitioned(self.bias_init, bias_axes), self.features, jnp.float32)
        contracted = tuple(range(x.ndim - self.contract, x.ndim)), tuple(range(self.contract))
        # One axis for all features: heads of 64 would leave half of a TPU's 128 lanes empty.
        kernel = compute_copy(kernel.reshape(*inputs, -1), self.axes[: self.contract + 1], self.dtype)
        x = jax.lax.dot_general(x.astype(self.dtype), kernel, (contracted, ((), ())))
        x = x + bias.astype(self.dtype).reshape((1,) * (x.ndim - 1) + (-1,))
        return x.reshape(*x.shape[:-1], *self.features)


class LinearLayers(nn.Module):
    """Dense layers with biases and nothing between them: the heads of some published scores."""

    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """float32[B, D] -> float32[B, widths[-1]]."""
        for i, width in enumerate(self.widths):
            x = nn.Dense(width, name=f"layer_{i}")(x)
        return x


# ---- Norms ----------------------------------------------------------------------------------------------------------


class LayerNorm(nn.Module):
    """Layer norm over the last axis. Flax's own refuses bfloat16 under strict promotion."""

    dtype: DTypeLike
    axis: str = "embed"  # logical
    epsilon: float = 1e-6
    centred: bool = False  # the input's mean is 0 already

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape = x.shape[-1:]
        scale = self.param("scale", partitioned(nn.initializers.ones, (self.axis,)), shape, jnp.float32)
        bias = self.param("bias", partitioned(nn.initializers.zeros, (self.axis,)), shape, jnp.float32)
        x = x.astype(jnp.float32)
        if not self.centred:
            x = x - jnp.mean(x, axis=-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.epsilon)
        broadcast = (1,) * (x.ndim - 1) + shape
        return cpu.computed_once((x * scale.reshape(broadcast) + bias.reshape(broadcast)).astype(self.dtype))


class RMSNorm(nn.Module):
    """T5's layer norm over the last axis: no mean, no bias."""

    dtype: DTypeLike
    axis: str = "embed"  # logical
    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", partitioned(nn.initializers.ones, (self.axis,)), x.shape[-1:], jnp.float32)
        x = x.astype(jnp.float32)
        x = (x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.epsilon)).astype(self.dtype)
        return cpu.computed_once(x * scale.astype(self.dtype).reshape((1,) * (x.ndim - 1) + (-1,)))


class GroupNorm(nn.Module):
    """Group norm over pixels and the channels of a group: [B, h, w, C] -> dtype[B, h, w, C]."""

    groups: int
    epsilon: float
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def of(self, x: Array) -> Callable[[Array], Array]:
        """The norm with the statistics of x, as a function of x or of some of its pixels."""
        scale = self.param("scale", partitioned(nn.initializers.ones, ("conv_in",)), x.shape[-1:], jnp.float32)
        bias = self.param("bias", partitioned(nn.initializers.zeros, ("conv_in",)), x.shape[-1:], jnp.float32)
        width = x.shape[-1] // self.groups
        y = x.astype(jnp.float32).reshape(x.shape[0], -1, self.groups, width)
        mean = y.mean((1, 3), keepdims=True)
        variance = jnp.square(y - mean).mean((1, 3), keepdims=True)
        mean, variance = (jnp.repeat(value, width, axis=3).reshape(-1, 1, 1, x.shape[-1]) for value in (mean, variance))
        factor = jax.lax.rsqrt(variance + self.epsilon) * scale.reshape(1, 1, 1, -1)  # [B, 1, 1, C]
        return lambda x: ((x.astype(jnp.float32) - mean) * factor + bias.reshape(1, 1, 1, -1)).astype(self.dtype)

    def __call__(self, x: Array) -> Array:
        return self.of(x)(x)


# ---- Convolution ----------------------------------------------------------------------------------------------------


def convolution(x: Array, kernel: Array, stride: int, padding) -> Array:
    """[B, h, w, I], [3, 3, I, O] -> [B, h / stride, w / stride, O]. padding: (before, after) of h and of w."""
    convolve = _convolve if cpu.is_in_loop() else _convolve.fun
    return convolve(x, kernel, stride, tuple(map(tuple, padding)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _convolve(x, kernel, stride, padding):
    return jax.lax.conv_general_dilated(x, kernel, (stride, stride), padding, dimension_numbers=CONV_DIMENSIONS)


def _convolve_forward(x, kernel, stride, padding):
    return _convolve(x, kernel, stride, padding), (x, kernel)


def _convolve_backward(stride, padding, saved, cotangent):
    x, kernel = saved
    (of_x,) = jax.linear_transpose(lambda x: _convolve.fun(x, kernel, stride, padding), x)(cotangent)
    of_kernel = cpu.kernel_gradient(x, cotangent, kernel.shape[:2], padding, stride)
    if of_kernel is None:
        (of_kernel,) = jax.linear_transpose(lambda kernel: _convolve.fun(x, kernel, stride, padding), kernel)(cotangent)
    return of_x, of_kernel


_convolve.defvjp(_convolve_forward, _convolve_backward)


def upsampled_convolution(x: Array, kernel: Array) -> Array:
    """`upsample`, then a 3x3 convolution: [B, h, w, I], [3, 3, I, O] -> [B, 2h, 2w, O].

    Two of three rows of a kernel read the same row of x, and likewise columns. So each of four parities of the pixels is a
    2x2 convolution of x, whose kernel sums weights.
    """
    batch, h, w, _ = x.shape

    def parities(kernel, axis):
        first, middle, last = jnp.split(kernel, 3, axis)
        return jnp.concatenate([first, middle + last], axis), jnp.concatenate([first + middle, last], axis)

    rows = []
    for i, of_row in enumerate(parities(kernel, 0)):
        pixels = [convolution(x, k, 1, ((1 - i, i), (1 - j, j))) for j, k in enumerate(parities(of_row, 1))]
        rows.append(jnp.stack(pixels, axis=3))
    return jnp.stack(rows, axis=2).reshape(batch, 2 * h, 2 * w, -1)  # from [B, h, 2, w, 2, O]


class Conv(nn.Module):
    """Convolution. With stride 1 it keeps the resolution."""

    features: int
    kernel_size: int = 3
    stride: int = 1
    padding: tuple[int, int] = (1, 1)  # before and after, in both directions; a kernel of 1 ignores it
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()
    dtype: DTypeLike = jnp.float32
    out_axis: str | None = "conv_out"  # logical; None keeps the few channels of latents and images whole
    bias: bool = True

    @nn.compact
    def __call__(self, x: Array, before: Callable[[Array], Array] = lambda x: x, rows: int | None = None) -> Array:
        """[B, h, w, C] -> dtype[B, h / stride, w / stride, features].

        Args:
          before: is done to x first. A function of x or of some of its rows, whose number it may double.
          rows: how many rows of x to compute at a time, None for all: only x and the output are held whole then. For a
            kernel of 3, stride 1, padding (1, 1).
        """
        axes, shape = (*KERNEL_AXES[:3], self.out_axis), (self.kernel_size, self.kernel_size, x.shape[-1], self.features)
        kernel = self.param("kernel", partitioned(self.kernel_init, axes), shape, jnp.float32)
        kernel = compute_copy(kernel, axes, self.dtype)
        bias = jnp.zeros((), self.dtype)
        if self.bias:
            bias = self.param("bias", partitioned(nn.initializers.zeros, (self.out_axis,)), shape[-1:], jnp.float32)
            bias = bias.astype(self.dtype)
        bias = bias.reshape(1, 1, 1, -1)

        def convolve(x):
            if self.kernel_size == 1:
                return jnp.matmul(x[:, :: self.stride, :: self.stride], kernel[0, 0])
            if self.stride == 1 and self.padding == (1, 1) and (quick := cpu.convolution_of(x, kernel)):
                return quick(x, kernel)
            return convolution(x, kernel, self.stride, (self.padding,) * 2)

        def convolve_strip(x):
            return convolution(x.astype(self.dtype), kernel, 1, ((0, 0), (1, 1))) + bias

        if rows is not None and rows < x.shape[1]:
            x = in_strips(before, convolve_strip, x, rows)
        elif before is upsample:
            x = upsampled_convolution(x.astype(self.dtype), kernel) + bias
        else:
            x = convolve(before(x).astype(self.dtype)) + bias
        return nn.with_logical_constraint(x, ("batch", "height", "width", self.out_axis))


def in_strips(before: Callable, convolve: Callable, x: Array, rows: int) -> Array:
    """`convolve(before(x))`, of `rows` rows of x at a time.

    Args:
      x: [B, h, w, C], h >= rows.
      before: rows of x -> as many rows, or twice as many, of a picture that is zero around its borders.
      convolve: [B, n + 2, W, C] -> [B, n, W, features], of these rows and the row on either side of them.
    """
    height = x.shape[1]

    def strip(start):
        pieces = (jnp.maximum(start - 1, 0), 1), (start, rows), (jnp.minimum(start + rows, height - 1), 1)
        y = before(jnp.concatenate([jax.lax.dynamic_slice_in_dim(x, *piece, axis=1) for piece in pieces], axis=1))
        scale = y.shape[1] // (rows + 2)
        y = y[:, scale - 1 : y.shape[1] - scale + 1]
        place = scale * start - 1 + jnp.arange(y.shape[1]).reshape(1, -1, 1, 1)
        inside = (place >= 0) & (place < scale * height)
        return convolve(jnp.where(inside, y, jnp.zeros((), y.dtype)))

    one = jax.eval_shape(strip, 0)
    scale = one.shape[1] // rows

    def body(number, output):
        start = jnp.minimum(number * rows, height - rows)  # the last strip may overlap the one before
        return jax.lax.dynamic_update_slice_in_dim(output, strip(start), scale * start, axis=1)

    output = jnp.zeros((one.shape[0], scale * height, *one.shape[2:]), one.dtype)
    return jax.lax.fori_loop(0, -(-height // rows), body, output)


# ---- Stacks of layers -----------------------------------------------------------------------------------------------


def scan_layers(parent: nn.Module, layers: Sequence[nn.Module], call: Callable, x: Array, inputs=None) -> Array:
    """Applies equal layers of `parent` one after the other in a loop, so that only one of them is compiled.

    Each layer keeps its own parameters in the tree, so checkpoints do not depend on it. The parameters are stacked for the
    loop on the devices that hold them. Dropout keys differ from those of the layers called in turn.

    Args:
      layers: modules of one class and configuration. Each reads the output of the one before.
      call: (layer, x, the layer's inputs) -> x.
      inputs: a tree of arrays whose first axis is the layer, or None.
    """
    params = [parent.variables["params"][layer.name] for layer in layers]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params)
    keys = jax.random.split(parent.make_rng("dropout"), len(layers)) if parent.has_rng("dropout") else None
    layer = layers[0].clone(parent=None, name=None)

    def body(x, one):
        params, key, inputs = one
        rngs = None if key is None else {"dropout": key}
        return layer.apply({"params": params}, x, inputs, rngs=rngs, method=call), None

    return jax.lax.scan(body, x, (stacked, keys, inputs))[0]
