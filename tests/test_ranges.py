"""Every number of a config and of a flag has its range, checked before anything is built or written."""

import argparse
import numbers
import pathlib
import re

import flax.traverse_util
import jax
import ml_collections
import numpy as np
import pytest
from absl import flags

from benchmarks.alignment import __main__ as alignment
from rahf import evaluate, experiments, sources, train
from rahf import program as programs
from rahf.diffusion import finetuning
from rahf.diffusion import train as diffusion_train
from rahf.diffusion.online import __main__ as online
from rahf.reward import train as reward_train
from richhf_data import browse, ranges, schema
from richhf_data.errors import UserError

ROOT = pathlib.Path(__file__).parent.parent
CHECKS = {
    "rahf": train.check,
    "diffusion": finetuning.check,
    "online": online.check,
    "reward": lambda config: experiments.check_ranges(config, reward_train.RANGES),
    "alignment": alignment.check,
}
ELSEWHERE = {"rahf": ("model.",)}  # what the dataclasses of the model check
HOSTILE = (float("nan"), float("inf"), -float("inf"), -1e6 - 1, 1e38, None, "many", True, [], (float("nan"),))


def config_of(name):
    if name == "alignment":
        return experiments.load(ROOT / "benchmarks/alignment/config.py")
    return experiments.load(name)


def numbers_of(values):
    """Those entries that are a number, or a sequence that holds one."""
    found = {}
    for key, value in values.items():
        leaves = jax.tree.leaves(value)
        if any(isinstance(leaf, numbers.Number) and not isinstance(leaf, bool) for leaf in leaves):
            found[key] = value
    return found


def test_every_number_of_every_config_has_its_range():
    done = set()
    for name in (*experiments.names(), "alignment"):
        config = config_of(name)
        kind = "alignment" if name == "alignment" else config.get("kind", "rahf")
        CHECKS[kind](config)
        values = flax.traverse_util.flatten_dict(config.to_dict(), keep_empty_nodes=True, sep=".")
        for key, value in numbers_of(values).items():
            if key.startswith(ELSEWHERE.get(kind, ())) or key == "data.mixture" or (kind, key) in done:
                continue
            done.add((kind, key))
            for bad in [*HOSTILE, *([(value[0], bad) for bad in HOSTILE] if isinstance(value, tuple) else [])]:
                changed = ml_collections.ConfigDict(flax.traverse_util.unflatten_dict(values | {key: bad}, sep="."))
                with pytest.raises(UserError, match=rf"^{re.escape(key)}: got .*, expected ") as caught:
                    CHECKS[kind](changed)
                assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("rahf_ci", "optimizer.learning_rate", -1e-3),
        ("rahf_ci", "optimizer.learning_rate", 0.0),
        ("rahf_ci", "optimizer.b2", 1.5),
        ("rahf_ci", "optimizer.b1", 1.0),
        ("rahf_ci", "optimizer.b2", 1 - 1e-9),  # 1 in float32
        ("rahf_ci", "optimizer.ema_decay", 1.5),
        ("rahf_ci", "optimizer.clip_norm", -1.0),
        ("rahf_ci", "optimizer.clip_norm", 0.0),
        ("rahf_ci", "optimizer.weight_decay", -0.1),
        ("rahf_ci", "optimizer.warmup_steps", -5),
        ("rahf_ci", "optimizer.learning_rate_multipliers.t5", -1.0),
        ("rahf_ci", "train.loss_weights.score", -1.0),
        ("rahf_ci", "train.batch_size", 0),
        ("rahf_ci", "eval.batch_size", -8),
        ("rahf_ci", "eval.every", 0),
        ("rahf_ci", "data.num_workers", -1),
        ("rahf_ci", "data.text_length", 0),
        ("rahf_ci", "data.source", "strem"),
        ("rahf_ci", "seed", -1),
        ("rahf_ci", "seed", 2**32),
        ("rahf_ci", "mesh.data", 0),
        ("rahf_ci", "mesh.data", -2),
        ("rahf_ci", "mesh.shard_group", 0),
        ("sd_reward", "train.text_dropout", 2.0),
        ("sd_reward", "train.beta", -1.0),
        ("sd_reward", "train.pretraining_share", 1.0),
        ("sd_reward", "reward.temperature", 0.0),
        ("sd_reward", "reward.fraction", 1.5),
        ("sd_reward", "region.power", -1.0),
        ("sd_reward", "lora.rank", -1),
        ("sd_reward", "lora.alpha", 0.0),
        ("sd_reward", "sample.guidance_scale", 1e38),
        ("sd_reward", "sample.seed", -1),
        ("sd_online", "beta", -0.1),
        ("sd_online", "rollout.steps", 0),
        ("sd_online", "policy.pictures", 0),
        ("sd_online", "policy.steps", 0.0),
        ("sd_online", "policy.clip", 0.0),
        ("sd_online", "policy.history", 1),
        ("sd_online", "gradient.start", 1.0),
        ("sd_online", "gradient.noisings", 0),
        ("sd_online", "preference.beta", 0.0),
        ("sd_online", "dense.words", 1.5),
        ("sd_online", "eval.patience", -1),
        ("reward_clip", "loss.temperature", 0.0),
        ("reward_clip", "loss.num_prompts", 1),
        ("reward_clip", "train.patience", 0),
        ("reward_clip", "eval.validation", 1.0),
        ("reward_clip", "eval.data_sizes", (0.0, 1.0)),
        ("reward_clip", "eval.data_sizes", ()),
        ("reward_clip", "model.hidden", (512, 0)),
        ("alignment", "base.optimizer.b2", 1.0),
        ("alignment", "eval.candidates", 0),
    ],
)
def test_a_value_out_of_its_range_is_refused_before_anything_is_written(name, key, value, tmp_path):
    config = config_of(name)
    config.update_from_flattened_dict({key: value})
    run = {
        "rahf_ci": train.train,
        "sd_reward": diffusion_train.train,
        "sd_online": online.train,
        "reward_clip": lambda config, workdir: reward_train.train(config, "feedback.jsonl", "clip", workdir),
        "alignment": alignment.run,
    }[name]
    with pytest.raises(UserError, match=rf"^{re.escape(key)}: got {re.escape(repr(value))}, expected "):
        run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_a_range_holds():
    assert all(value in ranges.RATE for value in (0, 0.0, 0.999, np.float32(0.5), np.float64(0.5)))
    assert all(value in ranges.COUNT for value in (1, np.int64(7), 2**31 - 1))
    assert all(value not in ranges.COUNT for value in (0, 1.0, True, "1", None, 2**31, 10**5000))
    assert -1 in programs.RANGES["mesh.data"] and -1 not in ranges.HOLDOUT
    assert str(ranges.RATE) == "a number of 0 or more and below 1"
    assert str(programs.RANGES["mesh.data"]) == "a whole number from 1 to 1,048,576, or -1"


def test_a_missing_number_is_named():
    config = experiments.load("rahf_ci")
    del config.optimizer.b1
    with pytest.raises(UserError, match=r"^optimizer.b1: got none, expected a number of 0 or more and below 1"):
        train.check(config)


def test_a_warmup_of_no_steps_is_refused_where_it_would_train_nothing(tmp_path):
    config = experiments.load("rahf_ci")
    config.optimizer.update(schedule="rsqrt", warmup_steps=0)
    with pytest.raises(UserError, match=r"optimizer.warmup_steps: got 0, expected 1 or more for optimizer.schedule='rsqrt'"):
        train.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("rate", [0, -0.5, float("nan"), float("inf"), True])
def test_a_mixtures_rates_are_above_0(rate):
    config = experiments.load("rahf_ci")
    config.data.update(source="seqio", mixture=(("a", 0.5), ("b", rate)))
    with pytest.raises(UserError, match=r"^data.mixture: got \('b', .*a rate above 0"):
        sources.evaluation_dir(config)  # which is called before the workdir is opened


def test_an_evaluation_checks_what_it_reads(tmp_path):
    config = experiments.load("rahf_ci")
    config.eval.batch_size = 0
    with pytest.raises(UserError, match=r"^eval.batch_size: got 0"):
        evaluate.evaluate(tmp_path, "test", config=config)


@pytest.mark.parametrize("holdout", [float("nan"), -0.1, 0.6])
def test_a_share_that_is_held_out_is_one(holdout):
    with pytest.raises(UserError, match=r"holdout: got .*, expected a number from 0 to 0.45"):
        schema.split_of("cat7", holdout)


@pytest.mark.parametrize("number", ["nan", "inf", "1e400"])
def test_a_filter_compares_with_a_number(number):
    with pytest.raises(UserError, match="filter: got 'plausibility<"):
        browse.parse_filter(f"plausibility<{number}")


# ---- Flags ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("allowed", "text"),
    [
        (ranges.HOLDOUT, "nan"),
        (ranges.HOLDOUT, "inf"),
        (ranges.HOLDOUT, "-0.1"),
        (ranges.HOLDOUT, "0.46"),
        (ranges.HOLDOUT, ""),
        (ranges.COUNT, "-1"),
        (ranges.COUNT, "0"),
        (ranges.COUNT, "1.5"),
        (ranges.COUNT, "many"),
        (ranges.COUNT, "9" * 5000),
    ],
)
def test_a_flag_out_of_its_range_is_named_with_what_is_expected(allowed, text):
    try:
        ranges.flag("number_of_a_test", None, "For this test.", allowed)
        with pytest.raises(flags.Error, match=rf"^flag --number_of_a_test={text}: expected {re.escape(str(allowed))}$"):
            flags.FLAGS(["command", f"--number_of_a_test={text}"])
    finally:
        delattr(flags.FLAGS, "number_of_a_test")
    parser = argparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--number", type=ranges.argument(allowed))
    with pytest.raises(argparse.ArgumentError, match=f"got {text}, expected"):
        parser.parse_args([f"--number={text}"])


def test_every_number_of_a_command_is_a_flag_with_a_range():
    folders = ("rahf", "richhf_data", "launch", "benchmarks", "docs")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    unbounded = re.compile(r"DEFINE_(multi_)?(integer|float)\b|type=(int|float)\b")
    assert [str(path) for path in files if unbounded.search(path.read_text())] == []
    assert sum(path.read_text().count("ranges.flag(") for path in files) >= 40
