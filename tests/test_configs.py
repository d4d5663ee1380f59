"""Every config of RAHF builds, abstractly where it is large; the others' tests are beside what they train."""

import pathlib

import jax
import pytest

from rahf import experiments, optimizers, partitioning, train
from rahf.models.rahf import RAHF, RAHFConfig

FOLDER = pathlib.Path(__file__).parent.parent / "configs"
CONFIGS = sorted(path.stem for path in FOLDER.glob("rahf_*.py"))


@pytest.mark.parametrize("name", CONFIGS)
def test_config_builds_its_training_state(name):
    config = experiments.load(name)
    model = RAHF(RAHFConfig.from_dict(config.model.to_dict()))
    optimizer = optimizers.make_optimizer(config.optimizer, config.train.num_steps)
    mesh = partitioning.mesh_of(config.mesh)
    abstract, _ = train.state_shardings(model, optimizer, config, mesh, jax.random.key(0))
    assert all(leaf.dtype in ("float32", "int32") for leaf in jax.tree.leaves(abstract))
    text = (FOLDER / f"{name}.py").read_text()
    for word in ("command", "hardware", "result"):
        assert word in text.partition('"""\n\n')[0]


@pytest.mark.parametrize("name", CONFIGS)
def test_config_has_at_most_60_keys_besides_the_models(name):
    config = experiments.load(name)
    sections = [section for section in config if section != "model"]
    assert sum(len(config[key]) if hasattr(config[key], "keys") else 1 for key in sections) <= 60
