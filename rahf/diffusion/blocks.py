"""What Stable Diffusion's UNet and its VAE share."""

from typing import Annotated, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from rahf.models.attention import attention
from rahf.models.layers import Conv, Dense, GroupNorm, Projection
from richhf_data.checked import Size
from richhf_data.errors import UserError
from richhf_data.ranges import Range

Array = jax.Array
DTYPES = ("float32", "bfloat16", "float16")
Dtype = Literal[DTYPES]
Channels = Annotated[tuple[Size, ...], Range(1, 8)]  # of each block


def check_blocks(name: str, channels: tuple[int, ...], groups: int) -> None:
    """Checks what the configurations of UNet and VAE have in common. `name` is "unet" or "vae".

    Raises:
      UserError: channels that the groups do not divide.
    """
    if any(width % groups for width in channels):
        raise UserError(f"{name}.block_out_channels: got {channels}, expected multiples of norm_num_groups = {groups}")


class ResnetBlock(nn.Module):
    """Two convolutions, each after a norm and SiLU, with a residual. The time embedding is added between them."""

    features: int
    groups: int
    epsilon: float
    dtype: DTypeLike
    rows: int | None = None  # to convolve at a time

    @nn.compact
    def __call__(self, x: Array, time: Array | None = None) -> Array:
        """dtype[B, h, w, C], dtype[B or 1, E] -> dtype[B, h, w, features]."""

        def part(number, x, **options):
            norm = GroupNorm(self.groups, self.epsilon, self.dtype, name=f"norm{number}").of(x)
            conv = Conv(self.features, dtype=self.dtype, name=f"conv{number}", **options)
            return conv(x, lambda x: nn.silu(norm(x)), self.rows)

        y = part(1, x)
        if time is not None:
            time = dense(self.features, ("embed", "conv_out"), self.dtype, "time_emb_proj")(nn.silu(time))
            y = y + repeated(time, len(y))[:, None, None]
        y = part(2, y, kernel_init=nn.initializers.zeros)
        if x.shape[-1] != self.features:
            x = Conv(self.features, 1, dtype=self.dtype, name="conv_shortcut")(x)
        return x + y


def dense(features: int, axes: tuple[str, str], dtype, name: str, bias: bool = True, init=None):
    """A dense layer. `axes`: logical, of the kernel; the bias has the second. `init` is ignored without a bias."""
    init = init or nn.initializers.lecun_normal()
    if not bias:
        return Dense(features, axes, dtype, name=name)
    return Projection((features,), axes, dtype=dtype, kernel_init=init, name=name)


def repeated(x: Array, rows: int) -> Array:
    """[B, ...] -> [rows, ...]: each row rows / B times in succession, so that rows divided over devices stay on theirs."""
    return x if len(x) == rows else jnp.repeat(x, rows // len(x), axis=0)


def attend(x: Array, context: Array | tuple[Array, Array], heads: int, dtype, bias: bool = False) -> Array:
    """Attention of x to `context`. `bias`: of to_q, to_k and to_v.

    It makes the layers to_q, to_k, to_v and to_out in the module that calls it.

    Args:
      x: dtype[B, N, D].
      context: [R, L, C], or its keys and values, each dtype[R, L, D]. R is a multiple of B; x is `repeated` to it.

    Returns:
      dtype[R, N, D].
    """

    def project(y, name):
        return dense(x.shape[-1], ("embed", "joined_kv"), dtype, name, bias)(y)

    def split(y):  # [B, N, D] -> [B, N, A, K]
        y = y.reshape(*y.shape[:-1], heads, -1)
        return nn.with_logical_constraint(y, ("batch", "length", "heads", "kv"))

    if not isinstance(context, tuple):
        context = project(context, "to_k"), project(context, "to_v")
    key, value = map(split, context)
    query = repeated(split(project(x, "to_q")), len(key))
    query = query * query.shape[-1] ** -0.5
    y = attention(query, key, value)  # [R, N, A, K]
    return dense(x.shape[-1], ("joined_kv", "embed"), dtype, "to_out")(y.reshape(-1, *x.shape[1:]))
