"""The attention of every model, in the form that suits the device: softmax(query key + bias) value.

    plain      The whole matrix of weights, [B, A, Q, N], which the backward pass reads again. The fastest for short texts.
    blockwise  One block of queries and keys at a time ("Self-attention Does Not Need O(n^2) Memory", arXiv 2112.05682). The
               backward pass computes the blocks again, as in FlashAttention (arXiv 2205.14135).
    cudnn      cuDNN's flash attention, on NVIDIA GPUs.
    pallas     JAX's flash attention kernel for TPUs, from v3 on, where the logits are large.

`attention` chooses by device and size, unless a config's `mesh.attention` or --attention names a form.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from rahf import partitioning
from richhf_data.errors import UserError

Array = jax.Array
IMPLEMENTATIONS = ("plain", "blockwise", "cudnn", "pallas")
MASKED = -1e10  # a masked logit. Finite, so that a row without any key gives no NaN
QUERIES, KEYS = 512, 4096  # of a block: 8 MiB of float32 logits
WORTH = 2**18, 256  # logits of a head, and keys, from which on blocks are quicker than the matrix (benchmarks/README.md)
WORTH_ON_TPU = 2**20, 1024  # the same of the kernel; it pads to 128 tokens


def attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    bias: Array | None = None,
    mask: Array | None = None,
    causal: bool = False,
    implementation: str | None = None,
) -> Array:
    """Softmax attention. Logits and softmax are float32, products have the inputs' dtype.

    Args:
      query: dtype[B, Q, A, K], scaled. key, value: dtype[B, N, A, K].
      bias: float32[1, A, Q, N], added to the logits.
      mask: bool[B or 1, N], True = keep. causal: each query reads the keys up to its own position. Both replace a masked
        logit, with its bias, by `MASKED`.
      implementation: one of `IMPLEMENTATIONS`; by default what `choose` says, with what is forced.

    Returns:
      dtype[B, Q, A, K].

    Raises:
      UserError: another device's kernel is forced.
    """
    if implementation is None:
        implementation = choose(query, key, bias is not None or mask is not None, partitioning.forced_attention())
    if implementation == "plain":
        return _plain(query, key, value, bias, mask, causal)
    function = {"blockwise": _blockwise, "cudnn": _cudnn, "pallas": _pallas}[implementation]
    rows, heads = ("batch", None, "heads", None), (None, "heads", None, None)
    mask_axes = None if mask is None else ("batch" if mask.shape[0] == query.shape[0] else None, None)
    axes = rows, rows, rows, None if bias is None else heads, mask_axes
    local = partitioning.on_each_device(functools.partial(function, causal=causal), axes, rows)
    return local(query, key, value, bias, mask)


def choose(query: Array, key: Array, with_bias: bool = False, forced: str | None = None) -> str:
    """The implementation for these shapes on the devices that compute: one of `IMPLEMENTATIONS`.

    Args:
      with_bias: or a mask. The kernels take either as [B, A, Q, N] or nearly so, which is as large as the matrix, so it is
        for the other forms.
      forced: taken wherever it can compute these shapes.

    Raises:
      UserError: `forced` is a kernel for other devices.
    """
    kind, width = partitioning.device_kind(), query.shape[-1]
    device = {"cudnn": "NVIDIA", "pallas": "TPU"}.get(forced, "")
    if not kind.startswith(device):
        raise UserError(f"attention: got {forced!r} on {kind}, expected auto, plain or blockwise there")
    known = query.dtype != jnp.float32 and width % 8 == 0 and width <= 128 and not with_bias  # to cuDNN
    if forced in ("plain", "blockwise"):
        return forced
    if kind.startswith("NVIDIA") and known and _capability() >= 8:
        return "cudnn"
    on_tpu = kind.startswith("TPU")
    logits, keys = WORTH_ON_TPU if on_tpu else WORTH
    if forced != "pallas" and (query.shape[1] * key.shape[1] < logits or key.shape[1] < keys):
        return "plain"
    return "pallas" if on_tpu and kind != "TPU v2" and not with_bias else "blockwise"


def _capability() -> float:
    """Of this process's first GPU. Ampere, from which on cuDNN has flash attention, is 8.0."""
    return float(jax.local_devices(backend="gpu")[0].compute_capability)


# ---- The whole matrix -----------------------------------------------------------------------------------------------


def _plain(query, key, value, bias, mask, causal):
    logits = jnp.einsum("bqak,bnak->baqn", query, key, preferred_element_type=jnp.float32)
    if bias is not None:
        logits = logits + bias
    if mask is not None:
        logits = jnp.where(mask[:, None, None], logits, MASKED)
    if causal:
        logits = jnp.where(jnp.tri(*logits.shape[2:], dtype=bool)[None, None], logits, MASKED)
    return jnp.einsum("baqn,bnak->bqak", softmax(logits, query.dtype), value)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def softmax(logits: Array, dtype: DTypeLike) -> Array:
    """float32[..., N] -> dtype[..., N]. The backward pass keeps the output, which is smaller than the float32 logits."""
    return jax.nn.softmax(logits).astype(dtype)


def _softmax_forward(logits, dtype):
    weights = softmax(logits, dtype)
    return weights, weights


def _softmax_backward(dtype, weights, cotangent):
    del dtype
    weights, cotangent = weights.astype(jnp.float32), cotangent.astype(jnp.float32)
    # A constant added to a row of the cotangent must not change the gradient. Rounded weights do not sum to 1 exactly, so
    # the row's mean is divided by their sum.
    total = jnp.sum(weights, axis=-1, keepdims=True)
    return (weights * (cotangent - jnp.sum(weights * cotangent, axis=-1, keepdims=True) / total),)


softmax.defvjp(_softmax_forward, _softmax_backward)


# ---- Blocks of queries and keys -------------------------------------------------------------------------------------
# One head of one image at a time. `_cut` gives query [A, B, i, q, K], key and value [A, B, j, n, K], bias [A, i, j, q, n]
# and mask bool[B, j, n]: i blocks of q queries, j blocks of n keys. Inside of `image` there is no A and B.


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _blockwise(query, key, value, bias, mask, causal):
    return _blockwise_forward(query, key, value, bias, mask, causal)[0]


def _blockwise_forward(query, key, value, bias, mask, causal):
    def image(q, k, v, bias, mask):
        def rows(i, q, bias):
            def step(state, blocks):
                j, k, v, bias, mask = blocks
                highest, total, out = state
                row, column = i * len(q) + jnp.arange(len(q))[:, None], j * len(k) + jnp.arange(len(k))[None]
                mask = None if mask is None else mask[None]
                logits, _ = _masked(_dot(q, k.T), bias, mask, row, column, causal, key.shape[1])
                now = jnp.maximum(highest, logits.max(-1, keepdims=True))
                weights, before = jnp.exp(logits - now), jnp.exp(highest - now)
                out = before * out + _dot(weights.astype(v.dtype), v)
                return (now, before * total + weights.sum(-1, keepdims=True), out), None

            start = jnp.full((len(q), 1), -jnp.inf), jnp.zeros((len(q), 1)), jnp.zeros(q.shape)
            (highest, total, out), _ = jax.lax.scan(step, start, (jnp.arange(len(k)), k, v, bias, mask))
            return (out / total).astype(q.dtype), highest[:, 0], total[:, 0]

        return _map(rows, jnp.arange(len(q)), q, bias)  # [i, q, K], [i, q], [i, q]

    def head(q, k, v, bias):
        return _map(lambda q, k, v, mask: image(q, k, v, bias, mask), q, k, v, masks)

    *parts, masks = _cut(query, key, value, bias, mask)
    out, highest, total = _map(head, *parts)
    out = _joined(out, query)
    return out, (query, key, value, bias, mask, out, highest, total)


def _blockwise_backward(causal, kept, cotangent):
    query, key, value, bias, mask, out, highest, total = kept
    mean = jnp.sum(out.astype(jnp.float32) * cotangent.astype(jnp.float32), axis=-1, keepdims=True)  # [B, Q, A, 1]

    def image(q, k, v, bias, mask, *others):
        def rows(sums, blocks):
            i, q, bias, cotangent, mean, highest, total = blocks

            def step(of_query, blocks):  # logits are [n, q] here: two of three gradients need no transposition
                j, k, v, bias, mask = blocks
                row, column = i * len(q) + jnp.arange(len(q))[None], j * len(k) + jnp.arange(len(k))[:, None]
                bias, mask = None if bias is None else bias.T, None if mask is None else mask[:, None]
                logits, free = _masked(_dot(k, q.T), bias, mask, row, column, causal, key.shape[1])
                weights = jnp.exp(logits - highest[None]) / total[None]
                of_logits = weights * (_dot(v, cotangent.T) - mean.T)
                of_logits = of_logits if free is None else jnp.where(free, of_logits, 0)
                rounded = of_logits.astype(k.dtype)
                of_bias = None if bias is None else of_logits.T
                of_key_value = _dot(rounded, q), _dot(weights.astype(v.dtype), cotangent)
                return of_query + _dot(rounded.T, k), (*of_key_value, of_bias)

            of_query, (of_key, of_value, of_bias) = jax.lax.scan(
                step, jnp.zeros(q.shape), (jnp.arange(len(k)), k, v, bias, mask)
            )
            return (sums[0] + of_key, sums[1] + of_value), (of_query, of_bias)

        start = jnp.zeros(k.shape), jnp.zeros(v.shape)
        (of_key, of_value), (of_query, of_bias) = jax.lax.scan(rows, start, (jnp.arange(len(q)), q, bias, *others))
        return of_query, of_key, of_value, of_bias

    def head(q, k, v, bias, *others):
        def step(of_bias, blocks):
            q, k, v, mask, *others = blocks
            *gradients, more = image(q, k, v, bias, mask, *others)
            return jax.tree.map(jnp.add, of_bias, more), gradients

        of_bias, gradients = jax.lax.scan(step, jax.tree.map(jnp.zeros_like, bias), (q, k, v, masks, *others))
        return *gradients, of_bias

    *parts, masks = _cut(query, key, value, bias, mask)
    queries = [_blocks(x, QUERIES) for x in (cotangent, mean)]
    *gradients, of_bias = _map(head, *parts, *queries, highest, total)
    gradients = [_joined(gradient, like) for gradient, like in zip(gradients, (query, key, value), strict=True)]
    if bias is not None:
        heads, i, j, q, n = of_bias.shape
        of_bias = of_bias.swapaxes(2, 3).reshape(1, heads, i * q, j * n)[:, :, : bias.shape[2], : bias.shape[3]]
    return *gradients, of_bias, None


_blockwise.defvjp(_blockwise_forward, _blockwise_backward)
_dot = functools.partial(jnp.matmul, preferred_element_type=jnp.float32)


def _map(function, *arrays):
    return jax.lax.map(lambda arrays: function(*arrays), arrays)


def _masked(logits, bias, mask, row, column, causal, length):
    """A block's logits with bias and masks, and where the inputs decide them (None: everywhere).

    Keys from `length` on are padding.
    """
    if bias is not None:
        logits = logits + bias
    free = mask
    if causal:
        free = column <= row if free is None else free & (column <= row)
    if free is not None:
        logits = jnp.where(free, logits, MASKED)
    if length % column.size:
        logits = jnp.where(column < length, logits, -jnp.inf)
    return logits, free


def _cut(query, key, value, bias, mask):
    """The inputs of `attention` in blocks, padded with zeros: query, key, value, bias, mask."""
    (i, q), (j, n) = _sizes(query.shape[1], QUERIES), _sizes(key.shape[1], KEYS)
    if bias is not None:
        padding = (0, i * q - bias.shape[2]), (0, j * n - bias.shape[3])
        bias = jnp.pad(bias[0], ((0, 0), *padding)).reshape(-1, i, q, j, n).swapaxes(2, 3)
    if mask is not None:
        mask = jnp.pad(mask, ((0, 0), (0, j * n - mask.shape[1]))).reshape(-1, j, n)
        mask = jnp.broadcast_to(mask, (query.shape[0], j, n))
    return _blocks(query, QUERIES), _blocks(key, KEYS), _blocks(value, KEYS), bias, mask


def _sizes(length, most):
    """(number, size) of equal blocks of at most `most` positions."""
    number = -(-length // most)
    return number, -(-length // number)


def _blocks(x, most):
    """[B, N, A, K] -> [A, B, number, size, K]."""
    number, size = _sizes(x.shape[1], most)
    x = jnp.pad(x, ((0, 0), (0, number * size - x.shape[1]), (0, 0), (0, 0)))
    return x.reshape(x.shape[0], number, size, *x.shape[2:]).transpose(3, 0, 1, 2, 4)


def _joined(blocks, like):
    """[A, B, number, size, K] -> `like`'s shape [B, N, A, K] and dtype."""
    x = blocks.transpose(1, 2, 3, 0, 4)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, : like.shape[1]].astype(like.dtype)


# ---- cuDNN ----------------------------------------------------------------------------------------------------------


def _cudnn(query, key, value, bias, mask, causal):
    """JAX refuses the gradient of odd lengths, which are padded here."""
    queries, keys = query.shape[1], key.shape[1]
    more_queries, more_keys = queries % 2, keys % 2
    if mask is not None:
        mask = jnp.pad(mask, ((0, 0), (0, more_keys)))[:, None, None]  # [B or 1, 1, 1, N]
    if bias is not None:
        bias = jnp.pad(bias.astype(query.dtype), ((0, 0), (0, 0), (0, more_queries), (0, more_keys)))
    key, value = (jnp.pad(x, ((0, 0), (0, more_keys), (0, 0), (0, 0))) for x in (key, value))
    out = jax.nn.dot_product_attention(
        jnp.pad(query, ((0, 0), (0, more_queries), (0, 0), (0, 0))), key, value, bias, mask,
        scale=1.0, is_causal=causal, implementation="cudnn",
        key_value_seq_lengths=jnp.full(query.shape[:1], keys) if more_keys else None,
    )  # fmt: skip
    return out[:, :queries]


# ---- Pallas on TPUs -------------------------------------------------------------------------------------------------


def _pallas(query, key, value, bias, mask, causal):
    """A TPU v3 multiplies float32 alone in a kernel, so its inputs are cast; the matrix unit rounds them to bfloat16."""
    from jax.experimental.pallas.ops.tpu import flash_attention as flash  # takes half a second

    (batch, queries, _, width), keys, dtype = query.shape, key.shape[1], query.dtype
    operand = jnp.float32 if partitioning.device_kind() == "TPU v3" else dtype
    more_queries, more_keys = -queries % 128, -keys % 128
    more_width = -width % 128 if width > 128 else 0

    def laid_out(x, more):
        x = jnp.pad(x, ((0, 0), (0, more), (0, 0), (0, more_width)))
        return jnp.swapaxes(x, 1, 2).astype(operand)  # [B, A, N, K]

    ids = None  # a query reads the keys with its own id
    if mask is not None or more_keys:
        mask = jnp.ones((1, keys), bool) if mask is None else mask
        mask = jnp.broadcast_to(jnp.pad(mask, ((0, 0), (0, more_keys))), (batch, keys + more_keys))
        ids = flash.SegmentIds(jnp.ones((batch, queries + more_queries), jnp.int32), mask.astype(jnp.int32))
    if bias is not None:
        bias = jnp.pad(bias, ((0, 0), (0, 0), (0, more_queries), (0, more_keys)))
        bias = jnp.broadcast_to(bias, (batch, *bias.shape[1:]))
    most = 512 if width <= 128 else 256  # tokens of a block, for a v3's 16 MiB of on-chip memory
    q, k = math.gcd(queries + more_queries, most), math.gcd(keys + more_keys, most)
    sizes = flash.BlockSizes(
        q, k, k, 1,
        block_q_major_dkv=q, block_q_dkv=q, block_k_major_dkv=k, block_k_dkv=k,
        block_q_dq=q, block_k_major_dq=min(k, 256), block_k_dq=min(k, 256),
    )  # fmt: skip
    out = flash.flash_attention(
        laid_out(query, more_queries), laid_out(key, more_keys), laid_out(value, more_keys), bias, ids,
        causal=causal, block_sizes=sizes,
    )  # fmt: skip
    return jnp.swapaxes(out, 1, 2)[:, :queries, :, :width].astype(dtype)
