"""The tables of benchmarks.critic: gains and their standard errors; and which runs it takes."""

import functools
import itertools

import numpy as np
import pytest
from scipy import stats

from benchmarks import critic
from rahf import experiments
from richhf_data import json_files


def finished(root, run, plcc, seconds=60.0):
    keys = {key: 0.5 for key in critic.COLUMNS.values()}
    scores = {f"score/plcc/{name}": plcc for name in ("plausibility", "alignment", "aesthetics", "overall")}
    (root / f"runs/{run}/eval").mkdir(parents=True)
    json_files.write(root / f"runs/{run}/eval/test.json", keys | scores)
    json_files.write(root / f"runs/{run}/cost.json", {"processor_seconds": seconds})


def test_every_three_options_are_in_a_balanced_part_of_the_runs():
    assert len(critic.design()) == 16
    for three in itertools.combinations(critic.OPTIONS, 3):  # so that no effect of two enters the gain of a third
        found = [tuple(name in names for name in three) for names in critic.design()]
        assert all(found.count(had) == 2 for had in itertools.product((False, True), repeat=3))


def test_gains_are_the_differences_of_the_halves_and_their_errors_those_of_the_noise(tmp_path):
    random, adds = np.random.default_rng(0), dict(zip(critic.OPTIONS, (0.1, 0.05, 0.0, 0.2, -0.1, 0.15), strict=True))
    values = {names: 0.4 + sum(adds[name] for name in names) + random.normal(0, 0.01) for names in critic.design()}
    for run, names in critic.RUNS.items():
        if not run.startswith("augmented"):
            finished(tmp_path, run, values[names], seconds=60 * (1 + ("hybrid" in names)))
    gain, error, deviation = critic.gains(critic.read(tmp_path))
    for row, name in enumerate(critic.OPTIONS):
        halves = [[value for names, value in values.items() if (name in names) == has] for has in (True, False)]
        np.testing.assert_allclose(gain[row, 0], np.mean(halves[0]) - np.mean(halves[1]), atol=1e-12)
        assert abs(gain[row, 0] - adds[name]) < 3 * error[row, 0]
    np.testing.assert_allclose(error[:, 0], deviation[0] * 2 / 4, rtol=1e-9)  # of two means over 8 runs
    assert stats.chi2.ppf(0.001, 9) < 9 * (deviation[0] / 0.01) ** 2 < stats.chi2.ppf(0.999, 9)
    np.testing.assert_allclose(gain[:, -1], [0, 0, 1, 0, 0, 0], atol=1e-12)


def test_the_tables_show_gains_and_runs(tmp_path):
    finished(tmp_path, "base", 0.5)
    finished(tmp_path, "augmented", 0.9)
    assert critic.gains(critic.read(tmp_path)) is None
    assert "gain" not in critic.tables_of(critic.read(tmp_path))
    for run, names in critic.RUNS.items():
        if run not in ("base", "augmented", "augmented+all"):
            finished(tmp_path, run, 0.5 + 0.1 * ("words" in names), seconds=90.0 if "words" in names else 60.0)
    options, runs = critic.tables_of(critic.read(tmp_path)).strip().split("\n\n")
    (words,) = (line for line in options.splitlines() if "a head for words" in line)
    cells = [cell.strip() for cell in words.split("|")[1:-1]]
    assert cells[1] == "+0.100 ± 0.000" and cells[-1] == "+0.5 ± 0.0"
    assert len(runs.splitlines()) == 2 + 16 + 1 + 1
    assert "| deviation of one run " in runs and "| augmented " in runs


def test_an_unknown_run_and_another_number_of_pictures_are_refused(tmp_path):
    json_files.write(tmp_path / "pictures.json", {"train": 320})
    with pytest.raises(ValueError, match=r"--only: got no, expected some of base, text\+entropy, "):
        critic.compare(tmp_path, ["no"], pictures=320)
    with pytest.raises(ValueError, match=r"--pictures: got 640, expected 320, as .* has so many"):
        critic.compare(tmp_path, ["base"], pictures=640)


def test_all_options_together_are_those_of_the_shipped_critic():
    config = experiments.load("rahf_synth_shipped")
    tuned = {"train.loss_weights.heatmap", "optimizer.warmup_steps"}  # after the benchmark, and by the length of the run
    for key, value in (item for _, changes in critic.OPTIONS.values() for item in changes.items() if item[0] not in tuned):
        assert functools.reduce(getattr, key.split("."), config) == value, key
