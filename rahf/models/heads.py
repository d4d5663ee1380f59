"""The score head and the heatmap head (arXiv 2312.10240, sections 4.1 and 9). Both read the fused feature map.

    score     convolutions, dense layers, sigmoid -> one number; or dense layers around a mean over positions (`pool`)
    heatmap   convolutions, deconvolutions with read-out convolutions, sigmoid -> one map

A norm and a ReLU follow every convolution and deconvolution but the last one. N is the batch size B times `strips`, the
number of strips that an image is cut into for the TPU (`rahf/models/tpu.py`).
"""

import dataclasses
import functools
from typing import Annotated, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from rahf.models import tpu
from rahf.models.layers import KERNEL_AXES, LayerNorm, RMSNorm, partitioned
from rahf.partitioning import compute_copy, product
from richhf_data import checked
from richhf_data.checked import Size
from richhf_data.errors import UserError
from richhf_data.ranges import Range

Array = jax.Array
STYLES = ("paper", "pytorch")


@dataclasses.dataclass(frozen=True)
class ScoreHeadConfig:
    """The dense sizes are the paper's. Filters and kernel are those on which reimplementations agree.

    Style "pytorch" is the first author's release (github.com/youweiliang/RichHF): RMS norms instead of layer norms.

    Pool "mean" is not in the paper: the first dense layer reads each position of the map, and the others the mean of its
    outputs. Flaws then count alike wherever they are, as in deep sets (arXiv 1703.06114). With `reads_text` another dense
    layer reads each position of the prompt, and its outputs are added up.

    `deviation` is not in the paper: another output layer says how far the label may be from the score, as in Nix & Weigend
    (1994) and arXiv 1703.04977. No gradient goes from it into the other layers, so they train as without it.
    """

    filters: Annotated[tuple[Size, ...], Range(0, 64)] = (768, 384, 128, 64)
    kernel_size: Annotated[int, Range(1, 64)] = 2
    padding: Literal["VALID", "SAME"] = "VALID"  # "SAME" where the grid is too small for VALID
    dense: Annotated[tuple[Size, ...], Range(0, 64)] = (2048, 1024)
    style: Literal[STYLES] = "paper"
    pool: Literal["flatten", "mean"] = "flatten"
    reads_text: bool = False
    deviation: bool = False

    def __post_init__(self):
        checked.fields(self, "score_head")
        if self.pool == "mean" and not self.dense:
            raise UserError("score_head.dense: got (), expected one layer or more for score_head.pool='mean'")
        if self.reads_text and self.pool != "mean":
            raise UserError(f"score_head.reads_text: got True, expected False for score_head.pool={self.pool!r}; or 'mean'")


@dataclasses.dataclass(frozen=True)
class HeatmapHeadConfig:
    """The paper's filters. Each deconvolution doubles the resolution. `output_hidden` is not in the paper.

    Style "pytorch" is the first author's release. It has RMS norms instead of layer norms; in the first convolutions they
    follow the ReLU, and there is none before the output. Each pair of read-outs has a residual. The deconvolutions are
    shifted by one pixel.
    """

    filters: Annotated[tuple[Size, ...], Range(0, 64)] = (768, 384)
    deconv_filters: Annotated[tuple[Size, ...], Range(0, 8)] = (768, 384, 384, 192)
    output_hidden: Size = 192
    style: Literal[STYLES] = "paper"
    remat: bool = False  # recompute each stage in the backward pass
    # Cut each image into this many strips, from the first deconvolution on whose input width divides by it. A TPU convolves
    # a large batch faster than a few images. The result differs by rounding alone.
    strips: Size = 1

    def __post_init__(self):
        checked.fields(self, "heatmap_head")


MIN_DEVIATION = 0.01
WORDS = 16  # the sum over a prompt's positions is divided by this, so that it is about as large as the mean over the image's


class ScoreHead(nn.Module):
    """Feature map, and the prompt's positions if `config.reads_text` -> one score, maybe with its deviation."""

    config: ScoreHeadConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array, text: Array | None = None, mask: Array | None = None) -> Array:
        """x dtype[B, h, w, D], text dtype[B, L, D], mask bool[B, L] (True = keep) -> float32[B] in [0, 1].

        With `config.deviation` float32[B, 2]: the score, and the standard deviation of its label around it. Labels are in
        [0, 1], so that it is at most 1.

        Raises:
          UserError: the grid is too small for the convolutions.
        """
        config = self.config
        shrink = len(config.filters) * (config.kernel_size - 1) if config.padding == "VALID" else 0
        if min(x.shape[1:3]) <= shrink:
            raise UserError(
                f"score_head: got a grid of {x.shape[1]}x{x.shape[2]}, expected more than {shrink} on each side for "
                f"{len(config.filters)} VALID convolutions; set score_head.padding to 'SAME' or use fewer filters"
            )
        conv = functools.partial(
            ConvNorm, kernel_size=config.kernel_size, padding=config.padding, style=config.style, dtype=self.dtype
        )
        for i, features in enumerate(config.filters):
            x = nn.relu(conv(features, name=f"conv_{i}")(x))

        def dense(features, name, x):
            return nn.relu(ScoreDense(features, "score_out", self.dtype, name=name)(x))

        layers = [(features, f"dense_{i}") for i, features in enumerate(config.dense)]
        if config.pool == "mean":
            first, *layers = layers
            pooled = [jnp.mean(dense(*first, x), axis=(1, 2))]
            if config.reads_text:
                words = dense(first[0], "dense_text", text)  # [B, L, F]
                pooled.append(jnp.sum(jnp.where(mask[..., None], words, 0), axis=1) / WORDS)
            x = jnp.concatenate(pooled, axis=-1)
        else:
            x = x.reshape(x.shape[0], -1)  # [B, h' * w' * F]
        for features, name in layers:
            x = dense(features, name, x)
        score = nn.sigmoid(ScoreDense(1, None, jnp.float32, name="output")(x))  # [B, 1]
        if not config.deviation:
            return score[:, 0]
        share = nn.sigmoid(ScoreDense(1, None, jnp.float32, name="deviation")(jax.lax.stop_gradient(x)))
        return jnp.concatenate([score, MIN_DEVIATION + (1 - MIN_DEVIATION) * share], axis=1)


class HeatmapHead(nn.Module):
    """Feature map -> one heatmap."""

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
                x, strips = tpu.to_strips(x, config.strips), config.strips
            x = stage(features, config.style, strips, self.dtype, name=f"up_{i}")(x)
        output = ConvNorm if paper else HeadConv
        x = nn.relu(output(config.output_hidden, strips=strips, dtype=self.dtype, name="output_0")(x))
        return nn.sigmoid(ConvToOne(strips, self.dtype, name="output_1")(x))


class UpStage(nn.Module):
    """One deconvolution and its two read-out convolutions: [N, h, w, C] -> [N, 2h, 2w, F]."""

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


class ConvNorm(nn.Module):
    """A convolution or deconvolution, then the style's norm over channels."""

    features: int
    kernel_size: int = 3  # of a convolution; a deconvolution has 3
    padding: str = "SAME"
    deconv: bool = False
    relu_first: bool = False  # between convolution and norm
    style: str = "paper"
    strips: int = 1
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        paper = self.style == "paper"
        options = {"centred": paper, "strips": self.strips, "dtype": self.dtype, "name": "conv"}
        if self.deconv:
            x = Deconv(self.features, style=self.style, **options)(x)
        else:
            x = HeadConv(self.features, kernel_size=self.kernel_size, padding=self.padding, **options)(x)
        if self.relu_first:
            x = nn.relu(x)
        if paper:
            x = LayerNorm(self.dtype, axis="conv_out", centred=True, name="norm")(x)
        else:
            x = RMSNorm(self.dtype, axis="conv_out", epsilon=1e-8, name="norm")(x)
        return nn.with_logical_constraint(x, ("batch", "height", "width", "conv_out"))


class HeadConv(nn.Module):
    """Convolution of stride 1: [N, h, w, C] -> dtype[N, h, w, F], or smaller with padding "VALID".

    `centred` subtracts the mean over the output channels from kernel and bias. The output's mean over channels is then 0,
    which is the first half of a layer norm and costs nothing per pixel.
    """

    features: int
    kernel_size: int = 3
    padding: str = "SAME"
    centred: bool = False
    strips: int = 1
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape = (self.kernel_size, self.kernel_size, x.shape[-1], self.features)
        kernel, bias = _kernel_and_bias(self, nn.initializers.he_normal(), shape)
        total = self.kernel_size - 1 if self.padding == "SAME" else 0
        padding = total // 2, total - total // 2
        return tpu.convolve(x.astype(self.dtype), kernel, self.strips, padding, padding) + bias


class Deconv(nn.Module):
    """Deconvolution of stride 2 with a 3x3 kernel: [N, h, w, C] -> dtype[N, 2h, 2w, F]. `centred` as in `HeadConv`."""

    features: int
    style: str = "paper"
    centred: bool = False
    strips: int = 1
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        # He's initialisation, but an output pixel meets 9 / 4 of the 9 taps on average.
        init = nn.initializers.variance_scaling(2.0 * 4.0, "fan_in", "truncated_normal")
        kernel, bias = _kernel_and_bias(self, init, (3, 3, x.shape[-1], self.features))
        return tpu.deconv2x(x.astype(self.dtype), kernel, self.style, self.strips) + bias


def _kernel_and_bias(module: HeadConv | Deconv, init, shape: tuple[int, ...]) -> tuple[Array, Array]:
    """A layer's parameters as it computes with them: dtype[*shape] and dtype[1, 1, 1, F]."""
    kernel = module.param("kernel", partitioned(init, KERNEL_AXES), shape, jnp.float32)
    bias = module.param("bias", partitioned(nn.initializers.zeros, ("conv_out",)), shape[-1:], jnp.float32)
    if module.centred:
        kernel, bias = (x - jnp.mean(x, axis=-1, keepdims=True) for x in (kernel, bias))
    return compute_copy(kernel, KERNEL_AXES, module.dtype), bias.astype(module.dtype).reshape(1, 1, 1, -1)


class ConvToOne(nn.Module):
    """A 3x3 convolution with one output channel, and the strips joined: [N, h, w, C] -> float32[B, h, strips * w]."""

    strips: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array) -> Array:
        axes = (*KERNEL_AXES[:3], None)
        kernel = self.param("kernel", partitioned(nn.initializers.he_normal(), axes), (3, 3, x.shape[-1], 1), jnp.float32)
        bias = self.param("bias", partitioned(nn.initializers.zeros, (None,)), (1,), jnp.float32)
        kernel = compute_copy(kernel, axes, self.dtype)
        return bias.reshape(1, 1, 1) + tpu.convolve_to_one(x.astype(self.dtype), kernel, self.strips)


class ScoreDense(nn.Module):
    """x @ kernel + bias, [..., I] -> [..., O]. The kernel may be much larger than the rows (`partitioning.product`)."""

    features: int
    axis: str | None  # logical, of the outputs
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array) -> Array:
        axes, shape = ("score_in", self.axis), (x.shape[-1], self.features)
        kernel = self.param("kernel", partitioned(nn.initializers.he_normal(), axes), shape, jnp.float32)
        bias = self.param("bias", partitioned(nn.initializers.zeros, axes[1:]), shape[1:], jnp.float32)
        rows = x.astype(self.dtype).reshape(-1, x.shape[-1])
        y = product(rows, kernel, axes) + bias.astype(self.dtype).reshape(1, -1)
        return y.reshape(*x.shape[:-1], self.features)
