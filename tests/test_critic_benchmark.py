"""The table of benchmarks.critic: means, gains and their standard errors; and which runs it takes."""

import functools

import pytest

from benchmarks import critic
from rahf import experiments
from richhf_data import json_files


def finished(root, run, plcc, seconds=60.0):
    keys = {key: 0.5 for key in critic.COLUMNS.values()}
    scores = {f"score/plcc/{name}": plcc for name in ("plausibility", "alignment", "aesthetics", "overall")}
    (root / f"runs/{run}/eval").mkdir(parents=True)
    json_files.write(root / f"runs/{run}/eval/test.json", keys | scores)
    json_files.write(root / f"runs/{run}/cost.json", {"processor_seconds": seconds})


def test_the_table_has_gains_with_the_errors_of_both_rows(tmp_path):
    for run, plcc in {"base-0": 0.5, "base-1": 0.6, "text-0": 0.7, "text-1": 0.7, "marks-0": 0.55}.items():
        finished(tmp_path, run, plcc, seconds=90.0)
    found = critic.read(tmp_path)
    assert list(found) == ["base", "text", "marks"]
    _, _, base, text, marks = (line.split("|")[1:-1] for line in critic.table_of(found).splitlines())
    base, text, marks = ([cell.strip() for cell in row] for row in (base, text, marks))
    assert base[:2] == ["base", "2"] and base[-3:] == ["0.550 ± 0.050", "", "1.5"]
    assert text[-3:] == ["0.700 ± 0.000", "+0.150 ± 0.050", "1.5"]
    assert marks[-3:] == ["0.550 ± nan", "+0.000 ± nan", "1.5"]  # one seed has no error


def test_an_unknown_run_and_another_number_of_steps_are_refused(tmp_path):
    json_files.write(tmp_path / "pictures.json", {"train": 320})
    with pytest.raises(ValueError, match=r"--only: got no-0, expected some of base-0, "):
        critic.compare(tmp_path, ["no-0"], seeds=1, steps=10)
    with pytest.raises(ValueError, match=r"--steps: got 20, expected 10, as .* has 320 pictures"):
        critic.compare(tmp_path, ["base-0"], seeds=1, steps=20)


def test_all_options_together_are_those_of_the_shipped_critic():
    config = experiments.load("rahf_synth_shipped")
    for key, value in critic.RUNS["all"][1].items():
        assert functools.reduce(getattr, key.split("."), config) == value, key
