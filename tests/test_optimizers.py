"""Schedules and the optimiser."""

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest

from rahf import experiments, optimizers, partitioning
from rahf import program as programs

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


@pytest.mark.parametrize("size", [0.0, 0.1, 100.0])
def test_gradients_are_clipped_as_optax_clips_them(size):
    params = grads = {"a": size * jnp.arange(6.0), "b": size * jnp.ones((2, 2))}
    clip, optax_clip = optimizers._clipped(1.0), optax.clip_by_global_norm(1.0)
    wanted, state = optax_clip.update(grads, optax_clip.init(params))
    assert clip.init(params) == state
    for norm in (None, optax.global_norm(grads)):
        ours, _ = clip.update(grads, clip.init(params), norm=norm)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), ours, wanted)


def test_an_update_holds_no_copy_of_parameters_or_moments():
    sizes = [(256, 256)] * 20

    def loss(params, rows, normalisers, key):
        x = rows["x"]
        for i in range(len(sizes)):
            x = jnp.tanh(x @ params["heads"][str(i)])
        return x.sum(), {"loss": x.sum()}

    program = programs.Program(
        init=lambda key: {"heads": {str(i): jnp.zeros(size) for i, size in enumerate(sizes)}},
        loss=loss,
        normalisers=lambda batch: {},
        batch_shapes=lambda rows: {"x": ((rows, 256), "float32")},
        remat=(),
    )
    config = experiments.load("rahf_ci")
    config.optimizer.learning_rate_multipliers = {"heads": 1.0}
    training = programs.assemble(program, config, partitioning.make_mesh(devices=jax.devices()[:1]))
    memory = training.lower().compile().memory_analysis()
    params = sum(4 * leaf.size for leaf in jax.tree.leaves(training.params))
    assert memory.alias_size_in_bytes > 3 * params
    assert memory.temp_size_in_bytes < 1.3 * params  # the gradients, and what the loss holds


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
