"""Every config of RAHF builds, abstractly where it is large; the others' tests are beside what they train."""

import dataclasses
import pathlib

import jax
import pytest

from rahf import experiments, train
from rahf import program as programs
from rahf.models.rahf import RAHFConfig

FOLDER = pathlib.Path(__file__).parent.parent / "configs"
CONFIGS = sorted(path.stem for pattern in ("rahf_*.py", "baseline_*.py") for path in FOLDER.glob(pattern))


@pytest.mark.parametrize("name", CONFIGS)
def test_config_builds_its_training_state(name):
    config = experiments.load(name)
    training = programs.assemble(train.program(config), config)
    assert all(leaf.dtype in ("float32", "int32") for leaf in jax.tree.leaves(training.state))
    text = (FOLDER / f"{name}.py").read_text()
    for word in ("command", "hardware", "result"):
        assert word in text.partition('"""\n\n')[0]


@pytest.mark.parametrize("name", CONFIGS)
def test_config_has_at_most_60_keys_besides_the_models(name):
    config = experiments.load(name)
    sections = [section for section in config if section != "model"]
    assert sum(len(config[key]) if hasattr(config[key], "keys") else 1 for key in sections) <= 60


def test_base_config_names_every_option_of_the_model():
    def keys(tree):
        return {name: keys(value) if isinstance(value, dict) else None for name, value in tree.items()}

    assert keys(experiments.load("rahf_base").model.to_dict()) == keys(dataclasses.asdict(RAHFConfig()))
