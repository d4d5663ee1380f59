"""T5 encoder-decoder with T5X's parameter names, versions 1.0 and 1.1.

The model of "Exploring the Limits of Transfer Learning" (arXiv 1910.10683) as in T5X's `examples/t5/network.py`
(https://github.com/google-research/t5x): RMS layer norm without bias, unscaled attention logits, one relative-position
bias for all layers of a stack (in `scalable_t5` each layer has its own). Version 1.0 has a ReLU MLP and computes logits
from the scaled shared embedding. Version 1.1 has a gated GELU and its own output matrix. The tree under `T5` is the
`target` tree of a T5X checkpoint.

Three things differ from T5X. None changes an output at a position that is not padding.
  - The encoder reads embedded inputs, because RAHF puts image tokens before the prompt.
  - Only keys are masked. T5X masks padded queries too.
  - The key/value cache of decoding is an argument and a result, not module state.
"""

import dataclasses
from typing import Annotated, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from rahf.models.attention import attention
from rahf.models.layers import Dense, RMSNorm, matmul, partitioned, scan_layers
from rahf.partitioning import compute_copy
from richhf_data import checked
from richhf_data.checked import Layers, Share, Size
from richhf_data.errors import UserError
from richhf_data.ranges import Range

Array = jax.Array
ACTIVATIONS = {"relu": nn.relu, "gelu": nn.gelu, "linear": lambda x: x}
PAD_ID, EOS_ID = 0, 1  # of T5's vocabulary, as in richhf_data.schema


@dataclasses.dataclass(frozen=True)
class T5Config:
    """Sizes of a T5; the defaults are T5 v1.1 base."""

    vocab_size: Annotated[int, Range(2, 2**20)] = 32128  # with the ids for padding and the end
    emb_dim: Size = 768
    num_heads: Size = 12
    head_dim: Size = 64
    num_encoder_layers: Layers = 12
    num_decoder_layers: Layers = 12
    mlp_dim: Size = 2048
    mlp_activations: Annotated[tuple[Literal[tuple(ACTIVATIONS)], ...], Range(1, 4)] = ("gelu", "linear")  # v1.0: ("relu",)
    logits_via_embedding: bool = False  # v1.0: True
    num_buckets: Annotated[int, Range(4, 2**20)] = 32
    max_distance: Size = 128
    relpos_bias_per_layer: bool = False  # True in UMT5 and other models of T5X's `scalable_t5`
    dropout: Share = 0.1
    remat: bool = False  # recompute each layer in the backward pass
    scan: bool = False  # compile one layer of a stack and loop over all (`layers.scan_layers`); not in greedy decoding

    def __post_init__(self):
        checked.fields(self, "t5")
        if self.max_distance <= self.num_buckets // 2:
            raise UserError(
                f"t5.max_distance: got {self.max_distance}, expected more than half of num_buckets = {self.num_buckets}"
            )


def relative_position_buckets(
    length_q: int, length_k: int, bidirectional: bool, num_buckets: int, max_distance: int
) -> np.ndarray:
    """int32[length_q, length_k]: the bucket of key position minus query position.

    Half of the buckets hold one distance each. The others grow logarithmically up to `max_distance`. With `bidirectional`,
    earlier and later keys have half of the buckets each. Without, a later key counts as distance 0.
    """
    distance = np.arange(length_q)[:, None] - np.arange(length_k)[None, :]  # positive: the key is earlier
    offset = np.zeros_like(distance)
    if bidirectional:
        num_buckets //= 2
        offset = (distance < 0) * num_buckets
        distance = np.abs(distance)
    distance = np.maximum(distance, 0)
    exact = num_buckets // 2
    # float32 and its epsilon as in T5X, so that a distance on the border of two buckets falls into the same one.
    ratio = np.log(distance.astype(np.float32) / exact + np.finfo(np.float32).eps) / np.log(max_distance / exact)
    far = np.minimum(exact + (ratio * (num_buckets - exact)).astype(np.int32), num_buckets - 1)
    return (offset + np.where(distance < exact, distance, far)).astype(np.int32)


class RelativePositionBias(nn.Module):
    """A learned bias per head and bucket of distance: one table for all layers of a stack, or one for each."""

    config: T5Config
    bidirectional: bool
    depth: int  # layers of the stack

    @nn.compact
    def __call__(self, length_q: int, length_k: int) -> list[Array]:
        """A list of float32[1, A, length_q, length_k], one for each layer, to add to its attention logits."""
        config, shared = self.config, not self.config.relpos_bias_per_layer
        init = nn.initializers.variance_scaling(1.0, "fan_avg", "uniform", batch_axis=() if shared else (0,))
        init = partitioned(init, (*(() if shared else (None,)), "heads", "relpos_buckets"))
        shape = *(() if shared else (self.depth,)), config.num_heads, config.num_buckets
        tables = self.param("rel_embedding", init, shape, jnp.float32)
        buckets = relative_position_buckets(
            length_q, length_k, self.bidirectional, config.num_buckets, config.max_distance
        )
        # A product with a one-hot matrix, because the gradient of a gather is a slow scatter. Keys come before queries
        # because a TPU lays out the logits so, and the gradient sums theirs.
        one_hot = jax.nn.one_hot(buckets.T, config.num_buckets, dtype=jnp.float32)

        def bias(table):
            by_key = jnp.einsum("ar,kqr->akq", table, one_hot, precision=jax.lax.Precision.HIGHEST)
            return jnp.swapaxes(by_key, 1, 2)[None]

        return [bias(tables)] * self.depth if shared else [bias(table) for table in tables]


class KeysValues(NamedTuple):
    """The keys and values of an attention, dtype[B, N, A, K] each."""

    keys: Array
    values: Array


class T5Attention(nn.Module):
    """Multi-head attention with unscaled logits and softmax in float32.

    `keys_values` computes keys and values, so that decoding can cache them.
    """

    config: T5Config
    dtype: DTypeLike

    def setup(self):
        config = self.config
        joined = config.num_heads * config.head_dim
        # T5 does not scale the logits by 1/sqrt(head_dim). It scales the initial query kernel instead.
        self.query = Dense(joined, ("embed", "joined_kv"), self.dtype, scale=config.head_dim**-0.5)
        self.key = Dense(joined, ("embed", "joined_kv"), self.dtype)
        self.value = Dense(joined, ("embed", "joined_kv"), self.dtype)
        self.out = Dense(config.emb_dim, ("joined_kv", "embed"), self.dtype)
        self.drop = nn.Dropout(config.dropout, broadcast_dims=(-2,))

    def _split(self, x: Array) -> Array:
        x = x.reshape(*x.shape[:-1], self.config.num_heads, self.config.head_dim)  # [B, N, A, K]
        return nn.with_logical_constraint(x, ("batch", "length", "heads", "kv"))

    def keys_values(self, x: Array) -> KeysValues:
        return KeysValues(self._split(self.key(x)), self._split(self.value(x)))

    def __call__(
        self, x: Array, keys_values: KeysValues, mask: Array | None, bias: Array | None, train: bool, causal: bool = False
    ) -> Array:
        """x [B, Q, D], mask bool[B or 1, N] (True = keep), bias [1, A, Q, N] -> [B, Q, D]."""
        keys, values = keys_values
        if train:  # T5 drops the weights of a key for all queries, which is to drop its value
            batch, length, heads, _ = keys.shape
            kept = self.drop(jnp.ones((batch, heads, 1, length), values.dtype), deterministic=False)
            values = values * kept.transpose(0, 3, 1, 2)
        x = attention(self._split(self.query(x)), keys, values, bias=bias, mask=mask, causal=causal)  # [B, Q, A, K]
        return self.out(x.reshape(*x.shape[:-2], -1))  # [B, Q, D]


class T5Mlp(nn.Module):
    """The feed-forward block, gated if the config names two activations: [B, N, D] -> [B, N, D]."""

    config: T5Config
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        config = self.config
        hidden = None
        for i, activation in enumerate(config.mlp_activations):
            name = "wi" if len(config.mlp_activations) == 1 else f"wi_{i}"
            y = ACTIVATIONS[activation](Dense(config.mlp_dim, ("embed", "mlp"), self.dtype, name=name)(x))
            hidden = y if hidden is None else hidden * y  # [B, N, M]
        hidden = nn.Dropout(config.dropout, broadcast_dims=(-2,))(hidden, deterministic=not train)
        hidden = nn.with_logical_constraint(hidden, ("batch", "length", "mlp"))
        return Dense(config.emb_dim, ("mlp", "embed"), self.dtype, name="wo")(hidden)  # [B, N, D]


class EncoderLayer(nn.Module):
    """Self-attention and feed-forward block, each with a norm before it and a residual."""

    config: T5Config
    dtype: DTypeLike

    def setup(self):
        self.pre_attention_layer_norm = RMSNorm(self.dtype)
        self.attention = T5Attention(self.config, self.dtype)
        self.pre_mlp_layer_norm = RMSNorm(self.dtype)
        self.mlp = T5Mlp(self.config, self.dtype)
        self.drop = nn.Dropout(self.config.dropout, broadcast_dims=(-2,))

    def __call__(self, x: Array, mask: Array, bias: Array, train: bool) -> Array:
        y = self.pre_attention_layer_norm(x)
        y = self.attention(y, self.attention.keys_values(y), mask, bias, train)
        x = x + self.drop(y, deterministic=not train)
        y = self.mlp(self.pre_mlp_layer_norm(x), train)
        x = x + self.drop(y, deterministic=not train)
        return nn.with_logical_constraint(x, ("batch", "length", "embed"))


class DecoderLayer(nn.Module):
    """Causal self-attention, attention to the encoder, feed-forward block; norms and residuals as in the encoder."""

    config: T5Config
    dtype: DTypeLike

    def setup(self):
        self.pre_self_attention_layer_norm = RMSNorm(self.dtype)
        self.self_attention = T5Attention(self.config, self.dtype)
        self.pre_cross_attention_layer_norm = RMSNorm(self.dtype)
        self.encoder_decoder_attention = T5Attention(self.config, self.dtype)
        self.pre_mlp_layer_norm = RMSNorm(self.dtype)
        self.mlp = T5Mlp(self.config, self.dtype)
        self.drop = nn.Dropout(self.config.dropout, broadcast_dims=(-2,))

    def encoder_keys_values(self, encoded: Array) -> KeysValues:
        return self.encoder_decoder_attention.keys_values(encoded)

    def __call__(
        self,
        x: Array,
        encoder: KeysValues,
        encoder_mask: Array,
        mask: Array | None,
        bias: Array,
        train: bool,
        cache: KeysValues | None = None,
        position: Array | None = None,
    ) -> tuple[Array, KeysValues]:
        """The output and the keys and values of the self-attention.

        Without a cache, x is the whole sequence [B, T, D], of which each position reads the earlier ones. With a cache, x is
        the token at `position`, [B, 1, D], and the returned keys and values are the cache with this position written.
        """
        y = self.pre_self_attention_layer_norm(x)
        own = self.self_attention.keys_values(y)
        if cache is not None:
            own = jax.tree.map(lambda old, new: jax.lax.dynamic_update_slice(old, new, (0, position, 0, 0)), cache, own)
        y = self.self_attention(y, own, mask, bias, train, causal=cache is None)
        x = x + self.drop(y, deterministic=not train)
        y = self.encoder_decoder_attention(
            self.pre_cross_attention_layer_norm(x), encoder, encoder_mask, None, train
        )
        x = x + self.drop(y, deterministic=not train)
        y = self.mlp(self.pre_mlp_layer_norm(x), train)
        x = x + self.drop(y, deterministic=not train)
        return nn.with_logical_constraint(x, ("batch", "length", "embed")), own


class Encoder(nn.Module):
    """Embedded tokens -> encoded tokens after the final norm, [B, N, D] -> [B, N, D]."""

    config: T5Config
    dtype: DTypeLike

    def setup(self):
        config = self.config
        layer = nn.remat(EncoderLayer, static_argnums=(4,)) if config.remat else EncoderLayer
        self.relpos_bias = RelativePositionBias(config, bidirectional=True, depth=config.num_encoder_layers)
        self.layers = [layer(config, self.dtype) for _ in range(config.num_encoder_layers)]
        self.encoder_norm = RMSNorm(self.dtype)
        self.drop = nn.Dropout(config.dropout, broadcast_dims=(-2,))

    def __call__(self, x: Array, mask: Array, train: bool) -> Array:
        x = self.drop(x.astype(self.dtype), deterministic=not train)
        biases = self.relpos_bias(x.shape[1], x.shape[1])
        if self.config.scan and not self.is_initializing():
            x = scan_layers(self, self.layers, lambda layer, x, bias: layer(x, mask, bias, train), x, jnp.stack(biases))
        else:
            for layer, bias in zip(self.layers, biases, strict=True):
                x = layer(x, mask, bias, train)
        return self.drop(self.encoder_norm(x), deterministic=not train)


class Decoder(nn.Module):
    """Embedded targets, shifted right -> hidden states [B, T, D]. `step` computes one position with a cache."""

    config: T5Config
    dtype: DTypeLike

    def setup(self):
        config = self.config
        layer = nn.remat(DecoderLayer, static_argnums=(6,)) if config.remat else DecoderLayer
        self.relpos_bias = RelativePositionBias(config, bidirectional=False, depth=config.num_decoder_layers)
        self.layers = [layer(config, self.dtype) for _ in range(config.num_decoder_layers)]
        self.decoder_norm = RMSNorm(self.dtype)
        if not config.logits_via_embedding:
            self.logits_dense = Dense(config.vocab_size, ("embed", "vocab"), self.dtype)
        self.drop = nn.Dropout(config.dropout, broadcast_dims=(-2,))

    def encoder_keys_values(self, encoded: Array) -> list[KeysValues]:
        return [layer.encoder_keys_values(encoded) for layer in self.layers]

    def __call__(self, x: Array, encoder: list[KeysValues], encoder_mask: Array, train: bool) -> Array:
        """All positions at once; each attends to itself and the earlier ones. [B, T, D] -> [B, T, D] after the norm."""
        length = x.shape[1]
        x = self.drop(x.astype(self.dtype), deterministic=not train)
        biases = self.relpos_bias(length, length)

        def call(layer, x, inputs):
            keys_values, bias = inputs
            return layer(x, keys_values, encoder_mask, None, bias, train)[0]

        if self.config.scan and not self.is_initializing():
            inputs = jax.tree.map(lambda *entries: jnp.stack(entries), *zip(encoder, biases, strict=True))
            x = scan_layers(self, self.layers, call, x, inputs)
        else:
            for layer, *inputs in zip(self.layers, encoder, biases, strict=True):
                x = call(layer, x, inputs)
        return self.drop(self.decoder_norm(x), deterministic=not train)

    def step(
        self, x: Array, position: Array, cache: list[KeysValues], encoder: list[KeysValues], encoder_mask: Array
    ) -> tuple[Array, list[KeysValues]]:
        """One position of every row: x [B, 1, D] -> [B, 1, D], and the caches with this position written."""
        length = cache[0].keys.shape[1]
        x = x.astype(self.dtype)
        biases = self.relpos_bias(length, length)
        mask = (jnp.arange(length) <= position)[None]
        written = []
        for layer, keys_values, old, bias in zip(self.layers, encoder, cache, biases, strict=True):
            bias = jax.lax.dynamic_slice_in_dim(bias, position, 1, axis=2)  # [1, A, 1, T]
            x, new = layer(x, keys_values, encoder_mask, mask, bias, False, old, position)
            written.append(new)
        return self.decoder_norm(x), written


class TokenEmbedder(nn.Module):
    """The embedding table, which also computes the logits if they share it."""

    config: T5Config
    dtype: DTypeLike

    def setup(self):
        init = partitioned(nn.initializers.normal(1.0), ("vocab", "embed"))
        shape = self.config.vocab_size, self.config.emb_dim
        self.embedding = self.param("embedding", init, shape, jnp.float32)

    def __call__(self, ids: Array) -> Array:
        """int[..., L] -> dtype[..., L, D]. An id outside the vocabulary gives NaN."""
        ids = ids.astype(jnp.uint32)  # as a signed index, -1 would be the last id
        table = compute_copy(self.embedding, ("vocab", "embed"), jnp.float32)  # its gradient sums rows in float32
        return jnp.take(table, ids, axis=0, mode="fill").astype(self.dtype)

    def logits(self, x: Array) -> Array:
        """[B, T, D] -> float32[B, T, V], scaled like T5 v1.0 with a shared embedding."""
        table = compute_copy(self.embedding, ("vocab", "embed"), self.dtype)
        return matmul(x, table.T, jnp.float32) * self.config.emb_dim**-0.5


class T5(nn.Module):
    """Embedder, encoder and decoder. Every method works on a padded batch."""

    config: T5Config
    dtype: DTypeLike = jnp.float32

    def setup(self):
        self.token_embedder = TokenEmbedder(self.config, self.dtype)
        self.encoder = Encoder(self.config, self.dtype)
        self.decoder = Decoder(self.config, self.dtype)

    def embed(self, ids: Array) -> Array:
        """int32[..., L] -> dtype[..., L, D]."""
        return self.token_embedder(ids)

    def encode(self, embedded: Array, mask: Array, train: bool = False) -> Array:
        """Full self-attention: embedded inputs [B, N, D], mask bool[B, N] (True = keep) -> dtype[B, N, D]."""
        return self.encoder(embedded, mask, train)

    def _logits(self, x: Array) -> Array:
        if self.config.logits_via_embedding:
            logits = self.token_embedder.logits(x)
        else:
            logits = self.decoder.logits_dense(x, jnp.float32)
        return nn.with_logical_constraint(logits, ("batch", "length", "vocab"))

    def decode(self, encoded: Array, encoder_mask: Array, inputs: Array, train: bool = False) -> Array:
        """Teacher forcing.

        Args:
          encoded: dtype[B, N, D]; encoder_mask: bool[B, N].
          inputs: int32[B, T], the targets shifted right (`shift_right`).

        Returns:
          float32[B, T, V] logits.
        """
        encoder = self.decoder.encoder_keys_values(encoded)
        return self._logits(self.decoder(self.embed(inputs), encoder, encoder_mask, train))  # [B, T, V]

    def __call__(self, input_ids: Array, decoder_inputs: Array, train: bool = False) -> Array:
        """Text to text: int32[B, L], int32[B, T] -> float32[B, T, V] logits; id 0 is padding."""
        mask = input_ids != PAD_ID
        return self.decode(self.encode(self.embed(input_ids), mask, train), mask, decoder_inputs, train)

    def encoder_keys_values(self, encoded: Array) -> list[KeysValues]:
        return self.decoder.encoder_keys_values(encoded)

    def decode_step(
        self, ids: Array, position: Array, cache: list[KeysValues], encoder: list[KeysValues], encoder_mask: Array
    ) -> tuple[Array, list[KeysValues]]:
        """ids int32[B] at `position` -> logits float32[B, V] of the next id, and the caches with this position written."""
        x, cache = self.decoder.step(self.embed(ids[:, None]), position, cache, encoder, encoder_mask)
        return self._logits(x)[:, 0], cache

    def greedy_decode(self, encoded: Array, encoder_mask: Array, max_length: int, copy: Array | None = None) -> Array:
        """The most probable id at each step, in one loop on the device with cached keys and values.

        Args:
          encoded: dtype[B, N, D]; encoder_mask: bool[B, N].
          max_length: T. The loop ends earlier when every row has ended.
          copy: int32[B, S, K, 3], the only ids that each row may write (`richhf_data.copying.Copies.table`); by default all.

        Returns:
          int32[B, T]: ids up to and with the end id 1, then zeros.
        """
        config, batch = self.config, encoded.shape[0]
        encoder = self.encoder_keys_values(encoded)
        shape = batch, max_length, config.num_heads, config.head_dim
        empty = KeysValues(jnp.zeros(shape, self.dtype), jnp.zeros(shape, self.dtype))
        # A bound module must not be called inside a jax loop, but its unbound copy and its variables may.
        module, variables = self.unbind()

        def unfinished(state):
            position, _, _, ended, _, _ = state
            return (position < max_length) & ~jnp.all(ended)

        def step(state):
            position, previous, ids, ended, place, cache = state
            logits, cache = module.apply(
                variables, previous, position, cache, encoder, encoder_mask, method="decode_step"
            )
            if copy is None:
                best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
            else:
                best, place = _best_allowed(logits, copy, place, position)
            following = jnp.where(ended, PAD_ID, best)
            ids = jax.lax.dynamic_update_slice(ids, following[:, None], (0, position))
            return position + 1, following, ids, ended | (following == EOS_ID), place, cache

        state = (
            jnp.int32(0),
            jax.lax.full((batch,), PAD_ID, jnp.int32),
            jax.lax.full((batch, max_length), PAD_ID, jnp.int32),
            jnp.zeros(batch, bool),
            None if copy is None else jnp.zeros(batch, jnp.int32),  # the state in `copy`
            [empty] * config.num_decoder_layers,
        )
        return jax.lax.while_loop(unfinished, step, state)[2]


def _best_allowed(logits: Array, copy: Array, place: Array, position: Array) -> tuple[Array, Array]:
    """The allowed id of the largest logit, int32[B], and the state after it, int32[B].

    logits float32[B, V]; copy int32[B, S, K, 3]; place int32[B], the state before it; position int32[].
    """
    options = jnp.take_along_axis(copy, place[:, None, None, None], axis=1)[:, 0]  # [B, K, 3]
    ids, following, last = options[..., 0], options[..., 1], options[..., 2]  # [B, K]
    values = jnp.maximum(jnp.take_along_axis(logits, ids, axis=1), jnp.finfo(jnp.float32).min)
    best = jnp.argmax(jnp.where(position <= last, values, -jnp.inf), axis=1)[:, None]  # [B, 1]
    return tuple(jnp.take_along_axis(x, best, axis=1)[:, 0] for x in (ids, following))


def shift_right(ids: Array) -> Array:
    """Targets -> decoder inputs, int32[B, T] -> int32[B, T]: a 0 in front, the last id dropped.

    >>> shift_right(jnp.array([[7, 8, 1, 0]])).tolist()
    [[0, 7, 8, 1]]
    """
    return jnp.pad(ids, ((0, 0), (1, 0)))[:, :-1]
