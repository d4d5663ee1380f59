"""What XLA computes slowly on CPUs, written otherwise: the same results, up to rounding (figures in benchmarks/README.md).

XLA's 3x3 convolution of few pixels takes twice as long as a product of matrices. Here it becomes products: of patches for
few pixels, of Winograd's tiles for many. XLA's gradient of a kernel over many pixels takes seven times as long as products
do, and that of any kernel within a loop (`jax.lax.scan`) up to a hundred times. XLA also computes a norm again within each
product that reads it.
"""

import contextlib
import contextvars
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from rahf import partitioning

Array = jax.Array
MANY_PIXELS = 2**14  # of a batch, from which on `kernel_gradient` goes by blocks of rows


_in_loop = contextvars.ContextVar("in_loop", default=False)


@contextlib.contextmanager
def in_loop():
    """Convolutions that are traced here get a gradient that is quick in a loop; elsewhere XLA's own is."""
    token = _in_loop.set(True)
    try:
        yield
    finally:
        _in_loop.reset(token)


def is_in_loop() -> bool:
    """Whether `in_loop` holds, on a CPU."""
    return _in_loop.get() and partitioning.device_kind() == "cpu"


def computed_once(x: Array) -> Array:
    """x, kept as it is, so that XLA computes it once and not within each product that reads it; other devices ignore it."""
    # Rounding to float32 changes nothing. XLA's library of CPU kernels cannot fuse it, and XLA drops its own barriers.
    return jax.lax.reduce_precision(x, 8, 23) if partitioning.device_kind() == "cpu" else x


def convolution_of(x: Array, kernel: Array) -> Callable | None:
    """The quickest function of (x, kernel) for a 3x3 convolution with stride 1 and padding 1; None: XLA's own.

    Args:
      x: [B, h, w, I]. kernel: [3, 3, I, O].
    """
    batch, h, w, features = x.shape
    if partitioning.device_kind() != "cpu" or x.dtype != jnp.float32 or kernel.size < 2**19:
        return None
    if batch * h * w <= 512:
        return patches
    if features >= 256 and h % 2 == w % 2 == 0 and x.size <= 2**24:  # tiles take four times the memory of x
        return winograd
    return None


def patches(x: Array, kernel: Array) -> Array:
    """A convolution as one product: [B, h, w, I], [3, 3, I, O] -> [B, h, w, O]."""
    _, h, w, _ = x.shape
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    x = jnp.concatenate([x[:, i : i + h, j : j + w] for i in range(3) for j in range(3)], axis=-1)
    return x @ kernel.reshape(-1, kernel.shape[-1])


def winograd(x: Array, kernel: Array) -> Array:
    """A convolution by Winograd's F(2x2, 3x3) (arXiv 1509.09308): 16 products for 4 pixels, not 36.

    [B, h, w, I], [3, 3, I, O] -> [B, h, w, O], h and w even.
    """
    batch, h, w, _ = x.shape
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    tiles = [[x[:, i : i + h : 2, j : j + w : 2] for j in range(4)] for i in range(4)]  # [B, h / 2, w / 2, I] each
    tiles = _both_axes(lambda a, b, c, d: (a - c, b + c, c - b, b - d), tiles)
    kernels = _both_axes(lambda a, b, c: (a, (a + b + c) / 2, (a - b + c) / 2, c), kernel)
    products = [[x @ k for x, k in zip(*rows, strict=True)] for rows in zip(tiles, kernels, strict=True)]
    pixels = _both_axes(lambda a, b, c, d: (a + b + c, b - c - d), products)
    x = jnp.stack([jnp.stack(row, axis=3) for row in pixels], axis=2)  # [B, h / 2, 2, w / 2, 2, O]
    return x.reshape(batch, h, w, -1)


def kernel_gradient(x: Array, cotangent: Array, size: tuple[int, int], padding, stride: int = 1) -> Array | None:
    """The gradient of a kernel: a product with patches; over many pixels a sum of products, one for each block of rows.

    Args:
      x: [B, h, w, C]. cotangent: [B, h', w', F]. size: of the kernel. padding: (before, after) of h and of w.

    Returns:
      [kh, kw, C, F]; None on other devices and for other types.
    """
    batch, h, w, features = cotangent.shape
    if partitioning.device_kind() != "cpu" or x.dtype != jnp.float32:
        return None
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))

    def of_rows(first, rows):
        block = jax.lax.dynamic_slice_in_dim(x, first * stride, (rows - 1) * stride + size[0], axis=1)
        ends = (rows - 1) * stride + 1, (w - 1) * stride + 1
        taps = [
            block[:, i : i + ends[0] : stride, j : j + ends[1] : stride] for i in range(size[0]) for j in range(size[1])
        ]
        of_block = jax.lax.dynamic_slice_in_dim(cotangent, first, rows, axis=1)
        patches = jnp.concatenate(taps, axis=-1)
        return patches.reshape(-1, patches.shape[-1]).T @ of_block.reshape(-1, features)

    if batch * h * w < MANY_PIXELS:
        total = of_rows(0, h)
    else:
        rows = math.gcd(h, 8)
        zeros = jnp.zeros((math.prod(size) * x.shape[-1], features))
        total, _ = jax.lax.scan(lambda total, first: (total + of_rows(first, rows), None), zeros, jnp.arange(0, h, rows))
    return total.reshape(*size, -1, features)


def _both_axes(transform, grid):
    """A transform of the columns of a grid of arrays, then of its rows."""
    columns = [transform(*column) for column in zip(*grid, strict=True)]
    return [transform(*row) for row in zip(*columns, strict=True)]
