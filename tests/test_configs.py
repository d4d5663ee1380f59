"""Every config of RAHF builds, abstractly where it is large; the others' tests are beside what they train."""

import importlib
import pathlib

import jax
import pytest

from rahf import optimizers, partitioning, train
from rahf.models.rahf import RAHF, RAHFConfig

CONFIGS = sorted(path.stem for path in (pathlib.Path(__file__).parent.parent / "configs").glob("rahf_*.py"))


@pytest.mark.parametrize("name", CONFIGS)
def test_config_builds_its_training_state(name):
    module = importlib.import_module(f"configs.{name}")
    config = module.get_config()
    model = RAHF(RAHFConfig.from_dict(config.model.to_dict()))
    optimizer = optimizers.make_optimizer(config.optimizer, config.train.num_steps)
    mesh = partitioning.mesh_of(config.mesh)
    abstract, _ = train.state_shardings(model, optimizer, config, mesh, jax.random.key(0))
    assert all(leaf.dtype in ("float32", "int32") for leaf in jax.tree.leaves(abstract))
    for word in ("command", "hardware", "result"):
        assert word in module.__doc__


@pytest.mark.parametrize("name", CONFIGS)
def test_config_has_at_most_60_keys_besides_the_models(name):
    config = importlib.import_module(f"configs.{name}").get_config()
    sections = [section for section in config if section != "model"]
    assert sum(len(config[key]) if hasattr(config[key], "keys") else 1 for key in sections) <= 60
