"""The score head and the heatmap head (arXiv 2312.10240, sections 4.1 and 9). Both read the fused feature map."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from rahf.models.vit import LayerNorm

Array = jax.Array
KERNEL_AXES = ("conv_height", "conv_width", "conv_in", "conv_out")
partitioned = nn.with_logical_partitioning


@dataclasses.dataclass(frozen=True)
class ScoreHeadConfig:
    """Filters and kernel from reimplementations that agree; the dense sizes are the paper's."""

    filters: tuple[int, ...] = (768, 384, 128, 64)
    kernel_size: int = 2
    padding: str = "VALID"  # "SAME" where the grid is too small for VALID
    dense: tuple[int, ...] = (2048, 1024)

    def __post_init__(self):
        if self.padding not in ("VALID", "SAME"):
            raise ValueError(f"score_head.padding: got {self.padding!r}, expected 'VALID' or 'SAME'")


@dataclasses.dataclass(frozen=True)
class HeatmapHeadConfig:
    """The paper's filters; each deconvolution doubles the resolution. `output_hidden` is not in the paper."""

    filters: tuple[int, ...] = (768, 384)
    deconv_filters: tuple[int, ...] = (768, 384, 384, 192)
    residual: bool = False  # around each pair of read-out convolutions, as the first author's PyTorch release has it
    output_hidden: int = 192
    remat: bool = False  # recompute each stage in the backward pass


CONV_DIMENSIONS = ("NHWC", "HWIO", "NHWC")


def deconv2x(x: Array, kernel: Array) -> Array:
    """`jax.lax.conv_transpose(x, kernel, (2, 2), "SAME")` of a 3x3 kernel, in the form that the platform is quick at.

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
        return jax.lax.conv_transpose(x, kernel, (2, 2), "SAME")

    return jax.lax.platform_dependent(x, kernel, cpu=deconv2x_by_parity, default=dilated)


def deconv2x_by_parity(x: Array, kernel: Array) -> Array:
    """`deconv2x` as four small convolutions of stride 1, one for each parity of the output's row and column.

    In one dimension, output 2i is `kernel[0] * x[i - 1] + kernel[2] * x[i]` and output 2i + 1 is `kernel[1] * x[i]`: of
    the 36 multiplications per input pixel of a convolution over spread-out inputs, 9 are not with a zero.
    """
    batch, h, w, _ = x.shape
    x = jnp.pad(x, ((0, 0), (1, 0), (1, 0), (0, 0)))  # [B, 1 + h, 1 + w, C]
    taps = {0: slice(0, None, 2), 1: slice(1, 2)}  # of the kernel, by parity

    def of_parity(row, column):  # [B, h, w, F]
        part = kernel[taps[row], taps[column]]
        return jax.lax.conv_general_dilated(
            x[:, row:, column:], part, (1, 1), "VALID", dimension_numbers=CONV_DIMENSIONS
        )

    x = jnp.stack([jnp.stack([of_parity(row, column) for column in (0, 1)], axis=3) for row in (0, 1)], axis=2)
    return x.reshape(batch, 2 * h, 2 * w, kernel.shape[-1])  # from [B, h, 2, w, 2, F]


class Conv(nn.Module):
    """Stride 1, or the stride-2 deconvolution `deconv2x`; the same parameters."""

    features: int
    kernel_size: int
    padding: str = "SAME"
    deconv: bool = False
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
            x = deconv2x(x, kernel)
        else:
            x = jax.lax.conv_general_dilated(x, kernel, (1, 1), self.padding, dimension_numbers=CONV_DIMENSIONS)
        return x + bias.astype(self.dtype).reshape(1, 1, 1, -1)


class ConvNorm(nn.Module):
    """Convolution, then layer norm over channels (statistics in float32)."""

    features: int
    kernel_size: int = 3
    padding: str = "SAME"
    deconv: bool = False
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = Conv(self.features, self.kernel_size, self.padding, self.deconv, self.dtype, name="conv")(x)
        x = LayerNorm(self.dtype, axis="conv_out", name="norm")(x)
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
            x = nn.relu(ConvNorm(features, config.kernel_size, config.padding, dtype=self.dtype, name=f"conv_{i}")(x))
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
    residual: bool
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = nn.relu(ConvNorm(self.features, deconv=True, dtype=self.dtype, name="deconv")(x))  # [B, 2h, 2w, F]
        y = nn.relu(ConvNorm(self.features, dtype=self.dtype, name="readout_0")(x))
        y = ConvNorm(self.features, dtype=self.dtype, name="readout_1")(y)
        return nn.relu(x + y if self.residual else y)


class HeatmapHead(nn.Module):
    """Feature map -> one heatmap: convolutions, deconvolutions with read-out convolutions, sigmoid."""

    config: HeatmapHeadConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """dtype[B, h, w, D] -> float32[B, h * 2**n, w * 2**n] in [0, 1], n the number of deconvolutions."""
        config = self.config
        for i, features in enumerate(config.filters):
            x = nn.relu(ConvNorm(features, dtype=self.dtype, name=f"conv_{i}")(x))
        stage = nn.remat(UpStage) if config.remat else UpStage
        for i, features in enumerate(config.deconv_filters):
            x = stage(features, config.residual, self.dtype, name=f"up_{i}")(x)
        x = nn.relu(ConvNorm(config.output_hidden, dtype=self.dtype, name="output_0")(x))
        x = Conv(1, 3, dtype=self.dtype, name="output_1")(x)  # [B, H, W, 1]
        return nn.sigmoid(x[..., 0].astype(jnp.float32))
