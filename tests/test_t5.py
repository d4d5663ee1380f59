"""T5: parity with T5X (versions 1.0 and 1.1), greedy decoding, padding."""

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rahf import readers, weights
from rahf.models import t5

VERSIONS = ("t5x_v1_1_tiny", "t5x_v1_0_tiny")


def load(unpacked, name):
    """(config, parameters, golden arrays) of a fixture: a T5X checkpoint and what T5X computed with it."""
    converted = readers.encoders.t5_t5x(unpacked(name) / "checkpoint_0")
    params = flax.traverse_util.unflatten_dict(dict(weights.read_all(converted.tensors)), sep="/")
    return t5.T5Config(**converted.config["t5"]), params, dict(np.load(unpacked(name) / "golden.npz"))


@pytest.mark.parametrize("name", VERSIONS)
def test_t5_equals_t5x(unpacked, name):
    config, params, golden = load(unpacked, name)
    module = t5.T5(config)
    ids, targets = golden["encoder_input_tokens"], golden["decoder_target_tokens"]
    made = nn.unbox(jax.eval_shape(module.init, jax.random.key(0), ids, targets))["params"]
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, made)

    def forward(module, ids, inputs):
        mask = ids != 0
        encoded = module.encode(module.embed(ids), mask)
        return encoded, module.decode(encoded, mask, inputs)

    inputs = t5.shift_right(targets)
    np.testing.assert_array_equal(inputs, golden["decoder_input_tokens"])
    encoded, logits = jax.jit(nn.apply(forward, module))({"params": params}, ids, inputs)
    # T5X masks padded queries too, we only padded keys: the outputs there differ and nobody reads them.
    np.testing.assert_allclose(encoded[ids != 0], golden["encoded"][ids != 0], atol=1e-5, rtol=0)
    np.testing.assert_allclose(logits[targets != 0], golden["logits"][targets != 0], atol=1e-5, rtol=1e-5)
    assert (ids == 0).any() and (targets == 0).any()  # the fixture tests padding


@pytest.mark.parametrize("name", VERSIONS)
def test_greedy_decode_equals_recomputing_the_prefix(unpacked, name):
    config, params, golden = load(unpacked, name)
    module = t5.T5(config)
    ids = np.concatenate([golden["encoder_input_tokens"], np.arange(2, 35).reshape(3, 11)]).astype(np.int32)
    mask, length = ids != 0, 12
    encoded = jax.jit(nn.apply(lambda module: module.encode(module.embed(ids), mask), module))({"params": params})

    expected = np.zeros((5, length), np.int32)
    decode = jax.jit(lambda prefix: module.apply({"params": params}, encoded, mask, prefix, method="decode"))
    ended = np.zeros(5, bool)
    for position in range(length):
        best = np.asarray(decode(t5.shift_right(expected)))[:, position].argmax(-1)
        expected[:, position] = np.where(ended, 0, best)
        ended |= expected[:, position] == t5.EOS_ID

    greedy = jax.jit(lambda: module.apply({"params": params}, encoded, mask, length, method="greedy_decode"))
    np.testing.assert_array_equal(greedy(), expected)
    assert len(np.unique(expected)) > 2  # not a constant


def test_greedy_decode_ends_rows_and_the_loop(unpacked):
    config, params, golden = load(unpacked, "t5x_v1_1_tiny")
    module = t5.T5(config)
    encoded, mask = golden["encoded"], golden["encoder_input_tokens"] != 0
    decode = jax.jit(lambda params: module.apply({"params": params}, encoded, mask, 6, method="greedy_decode"))
    free = np.asarray(decode(params))
    # Give the id that row 0 writes first the end's column: that row must end where it would have written it.
    first = free[0, 0]
    kernel = np.array(params["decoder"]["logits_dense"]["kernel"])
    kernel[:, [t5.EOS_ID, first]] = kernel[:, [first, t5.EOS_ID]]
    params["decoder"]["logits_dense"]["kernel"] = kernel
    ended = np.asarray(decode(params))
    assert ended[0].tolist() == [t5.EOS_ID, 0, 0, 0, 0, 0]


def test_longer_padding_changes_nothing(unpacked):
    config, params, golden = load(unpacked, "t5x_v1_1_tiny")
    module = t5.T5(config)
    apply = jax.jit(module.apply)
    ids, inputs = golden["encoder_input_tokens"], golden["decoder_input_tokens"]
    logits = apply({"params": params}, ids, inputs)
    padded = apply({"params": params}, np.pad(ids, ((0, 1), (0, 6))), np.pad(inputs, ((0, 1), (0, 4))))
    np.testing.assert_allclose(padded[:2, : inputs.shape[1]], logits, atol=1e-5, rtol=0)
    assert np.isfinite(padded).all()  # also in the row that has no key at all


def test_matmul_gives_its_gradients_in_the_dtype_of_its_factors():
    rng = np.random.default_rng(0)
    x, kernel = (jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in ((2, 5, 4), (4, 3)))
    value, pull_back = jax.vjp(lambda *factors: t5.matmul(*factors, jnp.float32), x, kernel)
    cotangent = rng.normal(size=(2, 5, 3)).astype(np.float32)
    exact = jax.vjp(jnp.matmul, *(np.asarray(factor, np.float32) for factor in (x, kernel)))
    np.testing.assert_allclose(value, exact[0], rtol=1e-5)
    for ours, theirs in zip(pull_back(cotangent), exact[1](cotangent), strict=True):
        assert ours.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(ours, np.float32), theirs, atol=1e-2 * np.abs(theirs).max())


def test_relative_position_buckets():
    buckets = t5.relative_position_buckets(300, 300, True, 32, 128)
    assert buckets[10, 10] == 0
    assert buckets[10, 9] == 1 and buckets[10, 11] == 17  # one direction each half
    assert buckets[299, 0] == 15 and buckets[0, 299] == 31  # beyond the maximal distance
    assert buckets.min() == 0 and buckets.max() == 31
    causal = t5.relative_position_buckets(300, 300, False, 32, 128)
    assert causal[10, 11] == 0 and causal[15, 0] == 15 and causal[299, 0] == 31


def test_shift_right():
    np.testing.assert_array_equal(t5.shift_right(np.array([[7, 8, 1, 0], [5, 1, 0, 0]])), [[0, 7, 8, 1], [0, 5, 1, 0]])


def test_an_id_outside_the_vocabulary_is_not_silent(unpacked):
    config, params, _ = load(unpacked, "t5x_v1_1_tiny")
    for wrong in (96, -1):
        ids = np.array([[wrong]], np.int32)
        assert np.isnan(t5.T5(config).apply({"params": params}, ids, method="embed")).all()


def test_t5_base_has_the_published_number_of_parameters():
    ids = np.zeros((1, 2), np.int32)

    def count(config):
        made = nn.unbox(jax.eval_shape(t5.T5(config).init, jax.random.key(0), ids, ids))
        return sum(leaf.size for leaf in jax.tree.leaves(made))

    assert count(t5.T5Config()) == 247_577_856  # T5 v1.1 base
    v1_0 = t5.T5Config(mlp_dim=3072, mlp_activations=("relu",), logits_via_embedding=True)
    assert count(v1_0) == 222_903_552  # T5 v1.0 base


def test_t5_names_an_unknown_activation():
    with pytest.raises(ValueError, match=r"mlp_activations\[.\]: got 'swish', expected one of"):
        t5.T5Config(mlp_activations=("swish",))
