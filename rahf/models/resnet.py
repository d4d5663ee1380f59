"""ResNet v1.5, the image encoder of paper A's convolutional baseline.

"Deep Residual Learning for Image Recognition" (arXiv 1512.03385) with bottleneck blocks whose stride is in their 3x3
convolution, as in torchvision, timm and Hugging Face. The defaults are ResNet-50.

    image [B, H, W, 3] --stem--> [B, H/4, W/4, width] --stages--> [B, H/32, W/32, 32 * width]

Batch norms keep running statistics. These are parameters, `mean` and `var`, that no gradient reaches: a training step
computes them beside its loss (`statistics`), and `rahf/program.py` puts them in their places.
"""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Literal

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from rahf.models.layers import Conv, normalize_image, partitioned
from richhf_data import checked
from richhf_data.checked import Epsilon, Layers, Size
from richhf_data.ranges import Range

Array = jax.Array
MEAN = np.array([0.485, 0.456, 0.406], np.float32)  # of ImageNet's RGB in [0, 1], as torchvision, timm and Hugging Face
STD = np.array([0.229, 0.224, 0.225], np.float32)
STATISTICS = "statistics"  # the collection of running statistics that a training step returns
EXPANSION = 4  # output width of a block / width of its 3x3 convolution
MOMENTUM = 0.1  # weight of a batch in the running statistics, as in torch


@dataclasses.dataclass(frozen=True)
class ResNetConfig:
    """Sizes of a ResNet; the defaults are ResNet-50."""

    depths: Annotated[tuple[Layers, ...], Range(1, 8)] = (3, 4, 6, 3)  # blocks of each stage; a stage halves the grid
    width: Size = 64  # of the first stage's 3x3 convolutions; each stage doubles it
    stem: Literal["imagenet", "small"] = "imagenet"  # "small", for small images: 3x3, stride 2, no pooling
    epsilon: Epsilon = 1e-5  # of the batch norms
    frozen_norm: bool = False  # True: training uses the running statistics and leaves them as they are

    def __post_init__(self):
        checked.fields(self, "resnet")

    @property
    def stride(self) -> int:
        """Pixels of a side that one cell of the output grid covers."""
        return {"imagenet": 4, "small": 2}[self.stem] * 2 ** (len(self.depths) - 1)


class BatchNorm(nn.Module):
    """Batch norm over batch and pixels. Training takes the statistics of the global batch, in float32."""

    config: ResNetConfig
    dtype: DTypeLike
    scale_init: nn.initializers.Initializer = nn.initializers.ones

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        """dtype[B, h, w, C] -> dtype[B, h, w, C]."""

        def param(name, init):
            return self.param(name, partitioned(init, ("conv_out",)), x.shape[-1:], jnp.float32)

        scale, bias = param("scale", self.scale_init), param("bias", nn.initializers.zeros)
        mean, var = param("mean", nn.initializers.zeros), param("var", nn.initializers.ones)
        mean, var = jax.lax.stop_gradient((mean, var))
        if train and not self.config.frozen_norm:
            y, count = x.astype(jnp.float32), x.shape[0] * x.shape[1] * x.shape[2]
            batch_mean = y.mean((0, 1, 2))
            batch_var = jnp.square(y - batch_mean.reshape(1, 1, 1, -1)).mean((0, 1, 2))
            unbiased = batch_var * (count / max(count - 1, 1))  # torch normalises by the biased one and keeps this one
            if self.is_mutable_collection(STATISTICS):
                running = {"mean": (mean, batch_mean), "var": (var, unbiased)}
                for name, (old, new) in running.items():
                    self.put_variable(STATISTICS, name, (1 - MOMENTUM) * old + MOMENTUM * jax.lax.stop_gradient(new))
            mean, var = batch_mean, batch_var
        factor = scale * jax.lax.rsqrt(var + self.config.epsilon)
        shift = bias - mean * factor
        return (x.astype(jnp.float32) * factor.reshape(1, 1, 1, -1) + shift.reshape(1, 1, 1, -1)).astype(self.dtype)


class ConvNorm(nn.Module):
    """A convolution without bias, and its batch norm."""

    config: ResNetConfig
    features: int
    kernel_size: int
    stride: int = 1
    scale_init: nn.initializers.Initializer = nn.initializers.ones
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")  # He's, as torchvision
        padding = (self.kernel_size // 2,) * 2
        x = Conv(self.features, self.kernel_size, self.stride, padding, init, self.dtype, bias=False, name="conv")(x)
        return BatchNorm(self.config, self.dtype, self.scale_init, name="norm")(x, train)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions and a residual: [B, h, w, C] -> [B, h / stride, w / stride, EXPANSION * width]."""

    config: ResNetConfig
    width: int
    stride: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        def conv(features, kernel_size, stride, name, **options):
            return ConvNorm(self.config, features, kernel_size, stride, dtype=self.dtype, name=name, **options)

        features = EXPANSION * self.width
        y = nn.relu(conv(self.width, 1, 1, "conv_0")(x, train))
        y = nn.relu(conv(self.width, 3, self.stride, "conv_1")(y, train))
        y = conv(features, 1, 1, "conv_2", scale_init=nn.initializers.zeros)(y, train)  # each block begins as the identity
        if x.shape[-1] != features or self.stride > 1:
            x = conv(features, 1, self.stride, "shortcut")(x, train)
        return nn.relu(x + y)


class ResNet(nn.Module):
    """The network up to its last feature map. Parameters: stem, stage_I_block_J."""

    config: ResNetConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, image: Array, train: bool = False) -> Array:
        """uint8[B, H, W, 3], or float in [-1, 1] -> dtype[B, H / stride, W / stride, C], C = 32 * width in ResNet-50.

        ImageNet's mean and deviation are applied here. In training the collection `STATISTICS`, if it is mutable, receives
        the running statistics after this batch.

        Raises:
          UserError: the image is neither uint8 nor float.
        """
        config = self.config
        x = normalize_image(image).astype(jnp.float32) * 0.5 + 0.5
        x = ((x - MEAN.reshape(1, 1, 1, 3)) / STD.reshape(1, 1, 1, 3)).astype(self.dtype)
        kernel = {"imagenet": 7, "small": 3}[config.stem]
        x = nn.relu(ConvNorm(config, config.width, kernel, 2, dtype=self.dtype, name="stem")(x, train))
        if config.stem == "imagenet":
            x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        for i, depth in enumerate(config.depths):
            for j in range(depth):
                stride = 2 if i > 0 and j == 0 else 1
                x = Bottleneck(config, config.width * 2**i, stride, self.dtype, name=f"stage_{i}_block_{j}")(x, train)
        return x


def with_statistics(params: Mapping, statistics: Mapping) -> dict:
    """Parameters with the running statistics of a training step in place of the old ones."""
    flat = flax.traverse_util.flatten_dict(params) | flax.traverse_util.flatten_dict(statistics)
    return flax.traverse_util.unflatten_dict(flat)
