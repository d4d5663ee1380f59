"""The mesh and where each array lives."""

import functools
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_model
from flax import linen as nn
from jax.sharding import AbstractMesh, PartitionSpec

from rahf import experiments, partitioning, train
from rahf import program as programs
from rahf.models.rahf import RAHFConfig

GOLDEN = pathlib.Path(__file__).parent / "data" / "rahf_base_shardings.txt"
SHARDINGS = sorted(partitioning.SHARDED_PARTS)


def state(mesh, kind="adamw", sharding="fully_sharded", config=None):
    config = config or experiments.load("rahf_ci")
    config.optimizer.kind, config.optimizer.ema_decay, config.mesh.sharding = kind, 0.9, sharding
    config.train.batch_size = 256
    return programs.assemble(train.program(config), config, mesh).state


def specs(abstract):
    return jax.tree.map(lambda x: x.sharding.spec, abstract)


def test_make_mesh_takes_the_devices_that_model_leaves():
    mesh = partitioning.make_mesh(-1, 2, shard_group=2)
    assert dict(mesh.shape) == {"replica": 2, "shard": 2, "model": 2}
    assert partitioning.sizes(mesh) == {"data": 4, "model": 2}


@pytest.mark.parametrize(("data", "model"), [(3, 1), (-1, 3), (4, 4)])
def test_make_mesh_refuses_a_product_that_is_not_the_devices(data, model):
    with pytest.raises(ValueError, match=r"their product must be 8"):
        partitioning.make_mesh(data, model)


def test_model_axis_splits_mlp_heads_vocabulary_and_heads():
    params = specs(state(partitioning.make_mesh(4, 2), sharding="data_parallel")["params"])
    assert params["t5"]["token_embedder"]["embedding"] == PartitionSpec("model", None)
    assert params["t5"]["encoder"]["layers_0"]["mlp"]["wi"]["kernel"] == PartitionSpec(None, "model")
    assert params["t5"]["decoder"]["layers_0"]["mlp"]["wo"]["kernel"] == PartitionSpec("model", None)
    assert params["score_head_overall"]["dense_0"]["kernel"] == PartitionSpec(None, "model")
    deconv = params["heatmap_head_implausibility"]["up_0"]["deconv"]["conv"]["kernel"]
    assert deconv == PartitionSpec(None, None, None, "model")


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("sharding", SHARDINGS)
def test_shardings_divide_what_they_name(sharding, kind):
    abstract = state(partitioning.make_mesh(8, 1, shard_group=4), kind, sharding)
    for part in ("params", "ema", "opt_state"):
        divisible = [
            leaf.sharding.spec
            for leaf in jax.tree.leaves(abstract[part])
            if leaf.ndim >= 2 and any(size % 4 == 0 for size in leaf.shape)
        ]
        assert divisible
        for spec in divisible:
            assert ("shard" in jax.tree.leaves(tuple(spec))) == (part in partitioning.SHARDED_PARTS[sharding])


@pytest.mark.parametrize("sharding", ["optimizer_sharded", "fully_sharded"])
def test_product_sends_the_rows_instead_of_the_kernel(sharding):
    mesh = partitioning.make_mesh(4, 2, shard_group=2)
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(8, 32)).astype(np.float32), rng.normal(size=(32, 64)).astype(np.float32)
    axes = ("score_in", "score_out")
    boxed = {"kernel": nn.LogicallyPartitioned(jax.ShapeDtypeStruct((32, 64), "float32"), axes)}
    place = partitioning.param_shardings(mesh, boxed, sharding == "fully_sharded")["kernel"]
    placed = jax.device_put(x, partitioning.batch_sharding(mesh)), jax.device_put(kernel, place)

    def loss(x, kernel):
        return jnp.sum(jnp.sin(partitioning.product(x, kernel, axes)))

    compiled = partitioning.MeshFunction(jax.value_and_grad(loss, argnums=(0, 1)), mesh, sharding).lower(*placed).compile()
    found = compiled(*placed)
    wanted = jax.value_and_grad(lambda x, kernel: jnp.sum(jnp.sin(x @ kernel)), argnums=(0, 1))(x, kernel)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), found, wanted)
    gathered = re.findall(r"f32\[([\d,]+)\]\S* all-gather", compiled.as_text())
    assert "32,32" not in gathered and "32,64" not in gathered, gathered


def test_an_unknown_sharding_is_refused():
    with pytest.raises(ValueError, match=r"mesh.sharding: got 'zero', expected one of \['data_parallel'"):
        state(partitioning.make_mesh(), sharding="zero")


def test_a_mesh_without_its_sharding_is_a_fault():
    """`compute_copy` would be a cast alone, and the program another one."""
    with jax.set_mesh(partitioning.make_mesh()), pytest.raises(AssertionError, match="without its sharding"):
        partitioning.compute_copy(jnp.zeros((8, 8)), ("embed", "mlp"), jnp.bfloat16)


def test_largest_replicated_names_what_no_rule_divides():
    boxed = {
        "table": nn.LogicallyPartitioned(jax.ShapeDtypeStruct((9, 7), "float32"), ("position", "embed")),
        "mlp": nn.LogicallyPartitioned(jax.ShapeDtypeStruct((8, 8), "float32"), ("embed", "mlp")),
        "bias": nn.LogicallyPartitioned(jax.ShapeDtypeStruct((8,), "float32"), ("embed",)),
    }
    mesh = partitioning.make_mesh(4, 2)

    def largest(mesh, sharded):
        shardings = partitioning.param_shardings(mesh, boxed, sharded)
        return partitioning.largest_replicated(partitioning.placed_shapes(nn.unbox(boxed), shardings))

    assert largest(mesh, True) == [("table", 252), ("bias", 32)]
    assert largest(partitioning.make_mesh(1, 1, devices=jax.devices()[:1]), False) == []


def base_shardings() -> str:
    """A line for each parameter of the base config on 64 x 2 devices: name, shape, where it lives."""
    mesh = AbstractMesh((2, 32, 2), (*partitioning.DATA, "model"))
    abstract = state(mesh, config=experiments.load("rahf_base"))
    assert specs(abstract["ema"]) == specs(abstract["params"])
    lines = [
        f"{'/'.join(key.key for key in path)} {list(leaf.shape)} {[axis or '-' for axis in leaf.sharding.spec]}".replace(
            "'", ""
        )
        for path, leaf in jax.tree_util.tree_leaves_with_path(abstract["params"])
    ]
    return "\n".join(lines) + "\n"


def test_every_parameter_of_the_base_config_lives_where_the_golden_file_says():
    # Written by `python tests/test_partitioning.py`.
    assert base_shardings().splitlines() == GOLDEN.read_text().splitlines()


def gradient_config(sharding, data, model, shard_group, variant, scan):
    config = experiments.load("rahf_base")
    config.model = tiny_model.dividing(variant)
    for part in (config.model.vit, config.model.t5):
        part.scan = part.remat = scan
    config.train.batch_size, config.data.text_length, config.data.keyword_length = 8, 6, 5
    config.mesh.update(data=data, model=model, sharding=sharding, shard_group=shard_group)
    return config


@functools.cache
def loss_and_gradients(sharding, data, model, shard_group=2, variant="augmented_prompt", scan=False):
    """Of one real training step with dropout; an optimiser whose state is the gradient keeps it."""
    config = gradient_config(sharding, data, model, shard_group, variant, scan)
    mesh = partitioning.mesh_of(config.mesh, jax.devices()[: data * model])
    keep = optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params),
        lambda gradients, state, params: (jax.tree.map(jnp.zeros_like, gradients), gradients),
    )
    training = programs.assemble(train.program(config), config, mesh, keep)
    rng = np.random.default_rng(0)
    values = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype) / max(1, x.size) ** 0.25, training.state)
    state = jax.tree.map(lambda x, y: jax.device_put(x, y.sharding), values | {"step": np.int32(0)}, training.state)
    batch = tiny_model.batch(RAHFConfig.from_dict(config.model.to_dict()), 8)
    state, metrics = training.step(state, training.place(batch))
    return jax.device_get(metrics["loss"]), jax.device_get(state["opt_state"])


@pytest.mark.usefixtures("standard_promotion")  # optax promotes freely
@pytest.mark.parametrize(
    ("sharding", "data", "model", "options"),
    [
        *[(sharding, data, model, {}) for sharding in SHARDINGS for data, model in ((8, 1), (4, 2))],
        ("fully_sharded", 2, 4, {}),
        ("data_parallel", 1, 8, {}),  # as by any sharding: nothing is left to shard
        ("fully_sharded", 4, 2, {"variant": "multi_head", "scan": True, "shard_group": 16}),
    ],
)
def test_loss_and_every_gradient_are_the_same_on_any_mesh_by_any_sharding(sharding, data, model, options):
    expected_loss, expected = loss_and_gradients("data_parallel", 1, 1, **options)
    loss, gradients = loss_and_gradients(sharding, data, model, **options)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
    for (path, found), wanted in zip(jax.tree_util.tree_leaves_with_path(gradients), jax.tree.leaves(expected), strict=True):
        name, scale = jax.tree_util.keystr(path), np.abs(wanted).max()
        assert scale > 0, name
        # Softmax makes the gradient of the keys' biases 0: what is there is rounding.
        assert np.abs(found - wanted).max() <= max(1e-5 * scale, 1e-8), name


def test_a_dimension_that_does_not_divide_is_named():
    boxed = {"mlp": {"kernel": nn.LogicallyPartitioned(jax.ShapeDtypeStruct((4, 7), "float32"), ("embed", "mlp"))}}
    with pytest.raises(ValueError, match=r"\['mlp'\]\['kernel'\]: axis 'mlp' of size 7 does not divide"):
        partitioning.param_shardings(partitioning.make_mesh(4, 2), boxed)


if __name__ == "__main__":
    GOLDEN.write_text(base_shardings())
