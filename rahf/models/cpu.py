"""What XLA computes slowly on CPUs, written otherwise: the same results, up to rounding (figures in benchmarks/README.md).

XLA's 3x3 convolution of few pixels takes twice as long as a product of matrices. Here it becomes products: of patches for
few pixels, of Winograd's tiles for many. XLA also computes a norm again within each product that reads it.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from rahf import partitioning

Array = jax.Array


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


def _both_axes(transform, grid):
    """A transform of the columns of a grid of arrays, then of its rows."""
    columns = [transform(*column) for column in zip(*grid, strict=True)]
    return [transform(*row) for row in zip(*columns, strict=True)]
