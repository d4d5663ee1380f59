"""The mesh and where each array lives."""

import jax
import pytest
from flax import linen as nn
from jax.sharding import PartitionSpec

from configs import rahf_ci
from rahf import optimizers, partitioning, train
from rahf.models.rahf import RAHF, RAHFConfig


def shardings(mesh, kind="adamw"):
    config = rahf_ci.get_config()
    config.optimizer.kind = kind
    model = RAHF(RAHFConfig.from_dict(config.model.to_dict()))
    optimizer = optimizers.make_optimizer(config.optimizer, config.train.num_steps)
    return train.state_shardings(model, optimizer, config, mesh, jax.random.key(0))


def test_make_mesh_takes_the_devices_that_model_leaves():
    assert dict(partitioning.make_mesh(-1, 2).shape) == {"data": 4, "model": 2}


@pytest.mark.parametrize(("data", "model"), [(3, 1), (-1, 3), (4, 4)])
def test_make_mesh_refuses_a_product_that_is_not_the_devices(data, model):
    with pytest.raises(ValueError, match=r"their product must be 8"):
        partitioning.make_mesh(data, model)


def test_model_axis_splits_mlp_heads_and_vocabulary():
    _, placed = shardings(partitioning.make_mesh(4, 2))
    t5 = placed["params"]["t5"]
    assert t5["token_embedder"]["embedding"].spec == PartitionSpec("model", None)
    assert t5["encoder"]["layers_0"]["mlp"]["wi"]["kernel"].spec == PartitionSpec(None, "model")
    assert t5["encoder"]["layers_0"]["mlp"]["wo"]["kernel"].spec == PartitionSpec("model", None)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_optimizer_moments_are_sharded_over_data_too(kind):
    abstract, placed = shardings(partitioning.make_mesh(8, 1), kind)
    moments = [
        (leaf.shape, sharding.spec)
        for leaf, sharding in zip(
            jax.tree.leaves(abstract["opt_state"]), jax.tree.leaves(placed["opt_state"]), strict=True
        )
        if leaf.ndim >= 2
    ]
    divisible = [spec for shape, spec in moments if any(size % 8 == 0 for size in shape)]
    assert divisible
    assert all("data" in spec for spec in divisible)
    assert all("data" not in sharding.spec for sharding in jax.tree.leaves(placed["params"]))


def test_a_dimension_that_does_not_divide_is_named():
    boxed = {"mlp": {"kernel": nn.LogicallyPartitioned(jax.ShapeDtypeStruct((4, 7), "float32"), ("embed", "mlp"))}}
    with pytest.raises(ValueError, match=r"\['mlp'\]\['kernel'\]: axis 'mlp' of size 7 does not divide"):
        partitioning.param_shardings(partitioning.make_mesh(4, 2), boxed)
