"""ViT image encoder, with big_vision's parameter names.

The model of "An Image is Worth 16x16 Words" (arXiv 2010.11929), pre-norm. The parameter tree is that of big_vision's
`models/vit.py` (https://github.com/google-research/big_vision), so its files load without renaming; a class token,
where there is one, has a position of its own as in the AugReg files
(https://github.com/google-research/vision_transformer).

Small ViTs trained from scratch may have a stem (`stem_patch`): the patches are then embedded from features of their own
small patches instead of from pixels, as early convolutions help ViTs on little data (arXiv 2106.14881).
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from rahf.partitioning import compute_copy
from richhf_data.errors import UserError

Array = jax.Array
partitioned = nn.with_logical_partitioning


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """Sizes of a ViT; the defaults are ViT-B/16."""

    patch_size: int = 16
    width: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_dim: int = 3072
    dropout: float = 0.0
    class_token: bool = False
    stem_patch: int = 0  # pixels; 0 = no stem
    stem_width: int = 64
    gelu: str = "tanh"  # big_vision's approximation; "erf" is Hugging Face's exact one
    epsilon: float = 1e-6  # of the layer norms; 1e-12 in Hugging Face's
    remat: bool = False  # recompute each block in the backward pass
    scan: bool = False  # compile one block and loop over all: the same parameters and result, other dropout keys

    def __post_init__(self):
        if self.width % self.num_heads:
            raise UserError(f"vit.width: got {self.width}, expected a multiple of vit.num_heads = {self.num_heads}")
        if self.gelu not in ("tanh", "erf"):
            raise UserError(f"vit.gelu: got {self.gelu!r}, expected 'tanh' or 'erf'")
        if self.stem_patch and self.patch_size % self.stem_patch:
            raise UserError(f"vit.stem_patch: got {self.stem_patch}, expected a divisor of patch_size = {self.patch_size}")


class Projection(nn.Module):
    """Dense over the last `contract` axes to `features`, as flax's `DenseGeneral`: kernel [..., *features] and bias."""

    features: tuple[int, ...]
    axes: tuple[str, ...]
    contract: int = 1
    dtype: DTypeLike = jnp.float32
    kernel_init: nn.initializers.Initializer | None = None  # Xavier's uniform one by default
    bias_init: nn.initializers.Initializer = nn.initializers.zeros

    @nn.compact
    def __call__(self, x: Array) -> Array:
        inputs = x.shape[-self.contract :]
        shape = (*inputs, *self.features)
        # The fan-in and fan-out of the flattened matrix, as flax initialises it.
        init = self.kernel_init or nn.initializers.variance_scaling(
            1.0, "fan_avg", "uniform", range(len(inputs)), range(len(inputs), len(shape))
        )
        kernel = self.param("kernel", partitioned(init, self.axes), shape, jnp.float32)
        bias_axes = self.axes[self.contract :]
        bias = self.param("bias", partitioned(self.bias_init, bias_axes), self.features, jnp.float32)
        contracted = tuple(range(x.ndim - self.contract, x.ndim)), tuple(range(self.contract))
        # The features as one axis, as heads of 64 would leave half of a TPU's 128 lanes empty.
        kernel = compute_copy(kernel.reshape(*inputs, -1), self.axes[: self.contract + 1], self.dtype)
        x = jax.lax.dot_general(x.astype(self.dtype), kernel, (contracted, ((), ())))
        x = x + bias.astype(self.dtype).reshape((1,) * (x.ndim - 1) + (-1,))
        return x.reshape(*x.shape[:-1], *self.features)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def softmax(logits: Array, dtype: DTypeLike) -> Array:
    """float32[..., N] -> dtype[..., N], summing to 1; the backward pass reads what it gave, instead of the logits."""
    return jax.nn.softmax(logits).astype(dtype)


def _softmax_forward(logits, dtype):
    weights = softmax(logits, dtype)
    return weights, weights


def _softmax_backward(dtype, weights, cotangent):
    del dtype
    weights, cotangent = weights.astype(jnp.float32), cotangent.astype(jnp.float32)
    # Rounded weights do not sum to 1, but what is common to a row's cotangents is to give nothing.
    total = jnp.sum(weights, axis=-1, keepdims=True)
    return (weights * (cotangent - jnp.sum(weights * cotangent, axis=-1, keepdims=True) / total),)


softmax.defvjp(_softmax_forward, _softmax_backward)


class Attention(nn.Module):
    """Multi-head self-attention; softmax in float32."""

    num_heads: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        width = x.shape[-1]
        head_dim = width // self.num_heads

        def project(name):
            heads = self.num_heads, head_dim
            x_heads = Projection(heads, ("embed", "heads", "kv"), dtype=self.dtype, name=name)(x)  # [B, N, A, K]
            return nn.with_logical_constraint(x_heads, ("batch", "length", "heads", "kv"))

        query, key, value = project("query") * head_dim**-0.5, project("key"), project("value")
        logits = jnp.einsum("bqak,bnak->baqn", query, key, preferred_element_type=jnp.float32)  # [B, A, N, N]
        weights = softmax(logits, self.dtype)
        x = jnp.einsum("baqn,bnak->bqak", weights, value)  # [B, N, A, K]
        return Projection((width,), ("heads", "kv", "embed"), contract=2, dtype=self.dtype, name="out")(x)  # [B, N, D]


class MlpBlock(nn.Module):
    """Dense, GELU, dense."""

    mlp_dim: int
    dropout: float
    approximate: bool  # the GELU by tanh
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        def dense(features, axes, name):
            return Projection((features,), axes, dtype=self.dtype, bias_init=nn.initializers.normal(1e-6), name=name)

        width = x.shape[-1]
        x = nn.gelu(dense(self.mlp_dim, ("embed", "mlp"), "Dense_0")(x), self.approximate)  # [B, N, M]
        x = nn.with_logical_constraint(x, ("batch", "length", "mlp"))
        x = nn.Dropout(self.dropout)(x, deterministic=not train)
        return dense(width, ("mlp", "embed"), "Dense_1")(x)  # [B, N, D]


class LayerNorm(nn.Module):
    """Over the last axis, statistics in float32. Flax's own refuses bfloat16 under strict promotion."""

    dtype: DTypeLike
    axis: str = "embed"
    epsilon: float = 1e-6
    centred: bool = False  # the mean is 0 already

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
        return (x * scale.reshape(broadcast) + bias.reshape(broadcast)).astype(self.dtype)


def scan_layers(parent: nn.Module, layers: Sequence[nn.Module], call: Callable, x: Array, inputs=None) -> Array:
    """A loop over equal layers of `parent` in place of one after the other, so that one of them is compiled.

    Their parameters stay apart in the tree, so that checkpoints are the same; they are stacked for the loop, where they
    are sharded.

    Args:
      layers: each reads `x`, and gives the next one's.
      call: (layer, x, its inputs) -> x.
      inputs: a tree of arrays with one entry for each layer in front, or None.
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


class Block(nn.Module):
    """Self-attention and MLP, each after a norm and with a residual."""

    config: ViTConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        config = self.config
        drop = nn.Dropout(config.dropout, deterministic=not train)
        y = LayerNorm(self.dtype, epsilon=config.epsilon, name="LayerNorm_0")(x)
        x = x + drop(Attention(config.num_heads, self.dtype, name="MultiHeadDotProductAttention_0")(y))
        y = LayerNorm(self.dtype, epsilon=config.epsilon, name="LayerNorm_1")(x)
        mlp = MlpBlock(config.mlp_dim, config.dropout, config.gelu == "tanh", self.dtype, name="MlpBlock_0")
        x = x + drop(mlp(y, train))
        return nn.with_logical_constraint(x, ("batch", "length", "embed"))


class Transformer(nn.Module):
    """The blocks and the final norm."""

    config: ViTConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        block = nn.remat(Block, static_argnums=(2,)) if self.config.remat else Block
        blocks = [block(self.config, self.dtype, name=f"encoderblock_{i}") for i in range(self.config.depth)]
        if self.config.scan and not self.is_initializing():
            x = scan_layers(self, blocks, lambda layer, x, _: layer(x, train), x)
        else:
            for layer in blocks:
                x = layer(x, train)
        return LayerNorm(self.dtype, epsilon=self.config.epsilon, name="encoder_norm")(x)


class PatchEmbedding(nn.Module):
    """A convolution whose stride is its size: a matrix product of the flattened patches."""

    features: int
    patch: int
    axes: tuple[str, str]  # logical, of the kernel's inputs and outputs
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """dtype[B, H, W, C] -> dtype[B, H / patch, W / patch, features]."""
        (batch, height, width, channels), patch = x.shape, self.patch
        shape = (patch, patch, channels, self.features)
        init = partitioned(nn.initializers.lecun_normal(), ("conv_height", "conv_width", *self.axes))
        kernel = self.param("kernel", init, shape, jnp.float32)
        bias = self.param("bias", partitioned(nn.initializers.zeros, self.axes[1:]), shape[-1:], jnp.float32)
        h, w = height // patch, width // patch
        x = x.reshape(batch, h, patch, w, patch, channels)
        x = x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, h, w, patch * patch * channels)
        kernel = compute_copy(kernel, ("conv_height", "conv_width", *self.axes), self.dtype)
        return x @ kernel.reshape(-1, self.features) + bias.astype(self.dtype).reshape(1, 1, 1, -1)


class ViT(nn.Module):
    """Image -> tokens after the final norm. No pooling and no classifier."""

    config: ViTConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, image: Array, train: bool = False) -> Array:
        """
        Args:
          image: float[B, H, W, 3] in [-1, 1]; H and W multiples of the patch size. The position embedding is made for
            the size seen at initialisation.
          train: whether dropout is on (needs the "dropout" random stream).

        Returns:
          dtype[B, P, D], row by row over the grid; [B, P + 1, D] with the class token first, where there is one.

        Raises:
          UserError: the image's sides are no multiples of the patch size.
        """
        config, patch = self.config, self.config.patch_size
        batch, height, width, _ = image.shape
        if height % patch or width % patch:
            raise UserError(f"image: got {height}x{width} pixels, expected multiples of vit.patch_size = {patch}")
        x = image.astype(self.dtype)
        if config.stem_patch:
            x = PatchEmbedding(config.stem_width, config.stem_patch, ("conv_in", "conv_out"), self.dtype, name="stem")(x)
            x = nn.gelu(LayerNorm(self.dtype, axis="conv_out", name="stem_norm")(x))  # [B, H / s, W / s, F]
            patch //= config.stem_patch
        x = PatchEmbedding(config.width, patch, ("conv_in", "embed"), self.dtype, name="embedding")(x)  # [B, h, w, D]
        x = x.reshape(batch, -1, config.width)  # [B, P, D]

        if config.class_token:
            init = partitioned(nn.initializers.zeros, (None, None, "embed"))
            token = self.param("cls", init, (1, 1, config.width), jnp.float32).astype(self.dtype)
            x = jnp.concatenate([jnp.broadcast_to(token, (batch, 1, config.width)), x], axis=1)  # [B, P + 1, D]
        init = partitioned(nn.initializers.normal(config.width**-0.5), (None, "position", "embed"))
        positions = self.param("pos_embedding", init, (1, x.shape[1], config.width), jnp.float32)
        x = x + positions.astype(self.dtype)
        x = nn.Dropout(config.dropout)(x, deterministic=not train)
        x = nn.with_logical_constraint(x, ("batch", "length", "embed"))
        return Transformer(config, self.dtype, name="Transformer")(x, train)
