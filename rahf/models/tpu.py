"""The heads' convolutions, written out for the TPU compiler.

Each function gives the result and the gradients of a plain convolution (tests/test_heads.py). XLA's TPU backend compiles
plain ones into slower programs in four cases (figures in benchmarks/README.md):

  few images           they fill a convolution badly. Images cut into vertical strips are a larger batch
                       (`to_strips`, `convolve`)
  deconvolution        spreads its input out with zeros and multiplies them (`deconv2x`)
  stacked outputs      are laid out in memory with the stacked axis first, then copied (`_laid_out`)
  one output channel   fills one of 128 lanes (`convolve_to_one`)

N is B images times the number of strips. An image's strips are neighbours on the batch axis, from left to right. A
convolution needs a halo: the columns of the neighbouring strips that its kernel reaches.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from rahf.models import cpu
from rahf.models.layers import CONV_DIMENSIONS

Array = jax.Array


# ---- Strips ---------------------------------------------------------------------------------------------------------


def to_strips(x: Array, strips: int) -> Array:
    """[B, h, strips * w, C] -> [B * strips, h, w, C]."""
    batch, h, width, features = x.shape
    x = x.reshape(batch, h, strips, width // strips, features)
    return jnp.swapaxes(x, 1, 2).reshape(batch * strips, h, width // strips, features)


def from_strips(x: Array, strips: int) -> Array:
    """[..., B * strips, h, w] -> [..., B, h, strips * w]."""
    *rest, n, h, w = x.shape
    x = jnp.swapaxes(x.reshape(*rest, n // strips, strips, h, w), -3, -2)
    return x.reshape(*rest, n // strips, h, strips * w)


def _with_halo(x: Array, strips: int, columns: tuple[int, int]) -> Array:
    """[N, h, w, C] -> [N, h, before + w + after, C]. The halo is zero at the image's own border."""
    (n, h, w, _), (before, after) = x.shape, columns

    def shifted(edge, by):  # each strip's edge at the place of the strip `by` further right in the same image
        edge = edge.reshape(n // strips, strips, h, -1, edge.shape[-1])
        edge = jnp.pad(edge, ((0, 0), (max(by, 0), max(-by, 0)), *[(0, 0)] * 3))
        return edge[:, max(-by, 0) : strips + max(-by, 0)].reshape(n, h, -1, edge.shape[-1])

    left = [shifted(x[:, :, w - before :], 1)] if before else []
    right = [shifted(x[:, :, :after], -1)] if after else []
    return jnp.concatenate([*left, x, *right], axis=2)


# ---- Convolution ----------------------------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def convolve(x: Array, kernel: Array, strips: int, rows: tuple[int, int], columns: tuple[int, int]) -> Array:
    """A convolution of stride 1 over images in strips.

    Args:
      x: dtype[N, h, w, C]. kernel: dtype[kh, kw, C, F].
      rows, columns: padding (before, after) of the image. Where two strips meet, the halo takes the place of the padding;
        w must be at least `before` and `after`.

    Returns:
      dtype[N, h', w', F].
    """
    return _convolve(x, kernel, strips, rows, columns)


def _convolve(x, kernel, strips, rows, columns, stride=1):
    if strips > 1:
        x, columns = _with_halo(x, strips, columns), (0, 0)
    strides, padding = (stride, stride), (rows, columns)
    return jax.lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=CONV_DIMENSIONS)


def _convolve_forward(x, kernel, *settings):
    return convolve(x, kernel, *settings), (x, kernel)


def _convolve_backward(strips, rows, columns, saved, cotangent):
    """The gradient of x is a convolution with a halo too. JAX's own would add the halo's gradient to the neighbours."""
    x, kernel = saved
    of_kernel = cpu.kernel_gradient(x, cotangent, kernel.shape[:2], (rows, columns)) if strips == 1 else None
    if of_kernel is None:
        transpose = jax.linear_transpose(lambda kernel: _convolve(x, kernel, strips, rows, columns), kernel)
        (of_kernel,) = transpose(cotangent)
    rows, columns = (
        tuple(taps - 1 - pad for pad in padding) for taps, padding in zip(kernel.shape, (rows, columns), strict=False)
    )
    return _convolve(cotangent, _transposed(kernel), strips, rows, columns), of_kernel


def _transposed(kernel: Array) -> Array:
    """The kernel of the transposed convolution: turned by 180 degrees, inputs and outputs exchanged."""
    return jnp.swapaxes(jnp.flip(kernel, (0, 1)), 2, 3)


convolve.defvjp(_convolve_forward, _convolve_backward)


def convolve_to_one(x: Array, kernel: Array, strips: int) -> Array:
    """A 3x3 convolution with one output channel: one product per tap, then the sum of the shifted products.

    Args:
      x: dtype[N, h, w, C]. kernel: dtype[3, 3, C, 1].

    Returns:
      float32[B, h, strips * w].
    """
    if _is_exported(x):  # ONNX has no convolution of this layout
        products = jnp.einsum("tc,nhwc->tnhw", kernel.reshape(9, -1), x, preferred_element_type=jnp.float32)
    else:
        products = jax.lax.conv_general_dilated(
            x, kernel.reshape(1, 1, 9, -1), (1, 1), "VALID",
            dimension_numbers=("NHWC", "HWOI", "CNHW"), preferred_element_type=jnp.float32,
        )  # fmt: skip
    taps = from_strips(products, strips)  # [9, B, H, W]
    h, w = taps.shape[-2:]
    taps = jnp.pad(taps, ((0, 0), (0, 0), (1, 1), (1, 1))).reshape(3, 3, taps.shape[1], h + 2, w + 2)
    return sum(taps[i, j, :, i : i + h, j : j + w] for i in range(3) for j in range(3))


# ---- Deconvolution --------------------------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def deconv2x(x: Array, kernel: Array, style: str = "paper", strips: int = 1) -> Array:
    """Deconvolution of stride 2 with a 3x3 kernel, as four convolutions of stride 1.

    "paper" equals `jax.lax.conv_transpose(x, kernel, (2, 2), "SAME")`. "pytorch" equals `ConvTranspose2d` with padding 1
    and output padding 1 and the kernel turned by 180 degrees: its inputs lie one output pixel earlier.

    In one dimension, the even outputs 2i are `kernel[0] * x[i - 1] + kernel[2] * x[i]` and the odd outputs 2i + 1 are
    `kernel[1] * x[i]`. In the style "pytorch" they are `kernel[1] * x[i]` and `kernel[0] * x[i] + kernel[2] * x[i + 1]`.
    Even and odd rows and columns therefore have one small convolution each, and no zeros are multiplied. The CPU backend
    (in the gradients) and the TPU's scheduler do not skip these zeros (benchmarks/README.md). Not measured on GPUs.

    Args:
      x: dtype[N, h, w, C]. kernel: dtype[3, 3, C, F].

    Returns:
      dtype[N, 2h, 2w, F].
    """
    (n, h, w, _), features = x.shape, kernel.shape[-1]
    rows = [_laid_out(jnp.stack(row, axis=3), (1, 2, 3, 0, 4)) for row in _parts(x, kernel, style, strips)]
    pixels = _laid_out(jnp.stack(rows, axis=2), (1, 2, 3, 4, 0, 5))  # [N, h, 2, w, 2, F]
    return pixels.reshape(n, 2 * h, 2 * w, features)


def _parts(x: Array, kernel: Array, style: str, strips: int) -> list[list[Array]]:
    """[[even columns, odd columns] of the even rows, the same of the odd rows]: dtype[N, h, w, F] each."""
    one, two = (slice(1, 2), (0, 0)), (slice(0, 3, 2), (1, 0) if style == "paper" else (0, 1))  # taps, padding
    order = (two, one) if style == "paper" else (one, two)
    return [[_convolve(x, kernel[i, j], strips, rows, columns) for j, columns in order] for i, rows in order]


def _deconv2x_forward(x, kernel, *settings):
    return deconv2x(x, kernel, *settings), (x, kernel)


def _deconv2x_backward(style, strips, saved, cotangent):
    x, kernel = saved
    padding = (0, 1) if style == "paper" else (1, 0)
    dx = _convolve(cotangent, _transposed(kernel), strips, padding, padding, stride=2)
    of_kernel = jax.linear_transpose(lambda kernel: _parts(x, kernel, style, strips), kernel)
    return dx, *of_kernel([[cotangent[:, i::2, j::2] for j in (0, 1)] for i in (0, 1)])


deconv2x.defvjp(_deconv2x_forward, _deconv2x_backward)


def _laid_out(x: Array, order: tuple[int, ...]) -> Array:
    """The same array. On a TPU its axes lie in memory in this order, the last one contiguous.

    An exported function goes without, because such layouts cannot be exported.
    """
    if _is_exported(x):
        return x

    def constrained(x):
        return with_layout_constraint(x, Layout(major_to_minor=order))

    return jax.lax.platform_dependent(x, tpu=constrained, default=lambda x: x)


def _is_exported(x: Array) -> bool:
    """Whether the function is traced for `rahf/export.py`: for a symbolic number of images."""
    return not all(isinstance(size, int) for size in x.shape)
