"""Schedules and the optimiser."""

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest

from rahf import optimizers

pytestmark = pytest.mark.usefixtures("standard_promotion")


def section(**changes):
    values = {
        "kind": "adamw",
        "schedule": "rsqrt",
        "learning_rate": 0.015,
        "final_learning_rate": 1e-5,
        "warmup_steps": 2000,
        "weight_decay": 0.1,
        "b1": 0.9,
        "b2": 0.999,
        "clip_norm": 1.0,
        "freeze": (),
        "learning_rate_multipliers": {"vit": 1.0, "t5": 1.0, "heads": 1.0},
    }
    return ml_collections.ConfigDict(values | changes)


def test_rsqrt_is_the_papers_schedule():
    schedule = optimizers.make_schedule(section(), 20_000)
    # 1-based: the first update has 1/2000 of the peak, the 2000th all of it, then lr * sqrt(2000 / step).
    np.testing.assert_allclose(schedule(0), 0.015 / 2000, rtol=1e-6)
    np.testing.assert_allclose(schedule(1999), 0.015, rtol=1e-6)
    np.testing.assert_allclose(schedule(7999), 0.015 * np.sqrt(2000 / 8000), rtol=1e-6)


def test_cosine_ends_at_the_final_learning_rate():
    schedule = optimizers.make_schedule(section(schedule="cosine", warmup_steps=10), 100)
    np.testing.assert_allclose(schedule(10), 0.015, rtol=1e-6)
    np.testing.assert_allclose(schedule(100), 1e-5, rtol=1e-5)


def test_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match=r"optimizer.schedule: got 'linear', expected 'rsqrt' or 'cosine'"):
        optimizers.make_schedule(section(schedule="linear"), 10)


def test_a_warmup_of_all_steps_is_refused():
    with pytest.raises(ValueError, match=r"optimizer.warmup_steps: got 10, expected fewer than train.num_steps=10"):
        optimizers.make_schedule(section(schedule="cosine", warmup_steps=10), 10)


def test_weight_decay_spares_biases_and_scales():
    params = {"dense": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}, "norm": {"scale": jnp.ones(2)}}
    optimizer = optimizers.make_optimizer(section(warmup_steps=1), 10)
    zeros = {"dense": {"kernel": jnp.zeros((2, 2)), "bias": jnp.zeros(2)}, "norm": {"scale": jnp.zeros(2)}}
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    np.testing.assert_allclose(updates["dense"]["kernel"], -0.015 * 0.1, rtol=1e-6)
    assert not updates["dense"]["bias"].any()
    assert not updates["norm"]["scale"].any()


@pytest.mark.parametrize(
    ("path", "shape", "matrix"),
    [
        (("dense",), (6, 8), (6, 8)),
        (("conv",), (2, 2, 3, 8), (12, 8)),
        (("MultiHeadDotProductAttention_0", "query"), (8, 2, 3), (8, 6)),
        (("MultiHeadDotProductAttention_0", "out"), (2, 3, 8), (6, 8)),
    ],
)
def test_muon_moves_a_kernel_by_an_orthogonal_matrix_of_inputs_by_outputs(path, shape, matrix):
    params = {"kernel": jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)}
    for name in reversed(path):
        params = {name: params}
    optimizer = optimizers.make_optimizer(section(kind="muon", warmup_steps=1, weight_decay=0.0, clip_norm=1e9), 10)
    updates, _ = optimizer.update(params, optimizer.init(params), params)  # the gradient is the kernel itself
    (update,) = jax.tree.leaves(updates)
    singular = np.linalg.svd(np.asarray(update).reshape(matrix), compute_uv=False)
    # Five Newton-Schulz steps bring every singular value near 1: 0.7 to 1.2 by their authors.
    np.testing.assert_allclose(singular / (0.015 * 0.2 * np.sqrt(max(matrix))), 1.0, atol=0.35)


def test_muon_leaves_the_rest_to_adam_and_spares_it_of_decay():
    params = {"dense": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}, "token_embedder": {"embedding": jnp.ones((4, 2))}}
    optimizer = optimizers.make_optimizer(section(kind="muon", warmup_steps=1), 10)
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    np.testing.assert_allclose(updates["dense"]["kernel"], -0.015 * 0.1, rtol=1e-6)
    assert not updates["dense"]["bias"].any()
    small = jax.tree.map(lambda x: 0.01 * x, params)
    updates, _ = optimizer.update(small, optimizer.init(params), params)
    nadam = optax.nadam(0.015)
    expected, _ = nadam.update(small, nadam.init(params))
    np.testing.assert_allclose(updates["token_embedder"]["embedding"], expected["token_embedder"]["embedding"], rtol=1e-6)


def test_unknown_kind_is_refused():
    with pytest.raises(ValueError, match=r"optimizer.kind: got 'sgd', expected 'adamw' or 'muon'"):
        optimizers.make_optimizer(section(kind="sgd"), 10)
