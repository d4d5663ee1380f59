"""The fuzzer: its changes depend on the seed alone, and its verdicts tell a refusal from a fault."""

import json
import pathlib
import random

import numpy as np
import PIL.Image
import pyarrow
import pyarrow.parquet
import pytest
import safetensors.numpy

from benchmarks.fuzz import __main__ as fuzz
from benchmarks.fuzz import doors, mutators


def write_good(folder):
    """A file of each suffix that a mutator names."""
    (folder / "a.json").write_text(json.dumps({"a": {"b": [1, 2.5]}, "c": "text"}))
    (folder / "a.jsonl").write_text('{"prompt": "a cat"}\n{"prompt": "two dogs"}\n')
    (folder / "a.txt").write_text("a cat\ntwo dogs\n")
    PIL.Image.new("RGB", (8, 6), (10, 200, 30)).save(folder / "a.png")
    safetensors.numpy.save_file({"a": np.ones((2, 3), np.float32), "b": np.ones(2, np.float32)}, folder / "a.safetensors")
    np.savez(folder / "a.npz", a=np.ones((2, 3), np.float32))
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["a cat"], "image": [b"x"]}), folder / "a.parquet")
    (folder / "a.tfrecord").write_bytes(bytes(100))


def changed(mutator, folder, seed):
    """(what was done, {file: bytes, or None where it is no file}) of a mutator on each file that it can change."""
    out = []
    for place in sorted(folder.parent.joinpath("good").iterdir()):
        if mutator.suffixes is None or place.suffix in mutator.suffixes:
            path = folder / place.name
            path.write_bytes(place.read_bytes())
            done = mutator.change(random.Random(seed), path)
            out.append((place.name, done, path.read_bytes() if path.is_file() and not path.is_symlink() else None))
            assert out[-1][2] != place.read_bytes(), (mutator.kind, place.name, done)
            if path.is_dir():
                path.rmdir()
            else:
                path.unlink(missing_ok=True)
    return out


@pytest.mark.parametrize("place", range(len(mutators.ALL)), ids=lambda place: mutators.ALL[place].kind.replace(" ", "_"))
def test_a_change_is_one_and_depends_on_the_seed_alone(place, tmp_path):
    (tmp_path / "good").mkdir()
    (tmp_path / "work").mkdir()
    write_good(tmp_path / "good")
    mutator = mutators.ALL[place]
    first = changed(mutator, tmp_path / "work", 3)
    assert first and first == changed(mutator, tmp_path / "work", 3)


def test_every_kind_of_change_takes_its_turn(tmp_path):
    good = tmp_path / "good"
    good.mkdir()
    write_good(good)
    door = doors.Door("door", "group", write_good, lambda folder: None, flags=("limit",))
    options = fuzz.changes(door, good, 0)
    first = options[: len(mutators.ALL) + 2]
    kinds = {option[0] if isinstance(option[0], str) else option[0].kind for option in first}
    assert kinds == {mutator.kind for mutator in mutators.ALL} | {"path", "flag"}
    case = fuzz.case_of(door, good, 0, 0, tmp_path / "cases")
    assert case == fuzz.case_of(door, good, 0, 0, tmp_path / "cases")
    assert (case.folder / "evil.py").is_file()


@pytest.mark.parametrize(
    ("code", "errors", "expected"),
    [
        (0, "", "ok"),
        (2, "error: limit: got 0, expected 1\n", "refused"),
        (2, "predict: 3/4\nerror: images: a.png: got a\n  row 3: nothing\n", "refused"),
        (2, "", "exit code 2 with 0 lines"),
        (2, "error: one of two\nerror: two of two\n", "exit code 2 with 2 lines"),
        (2, "error: got \x1b[31m, expected a\n", "control characters"),
        (0, "Traceback (most recent call last):\nOSError: x\n", "traceback: OSError: x"),
        (1, "", "exit code 1"),
    ],
)
def test_a_verdict_follows_from_exit_code_and_errors(code, errors, expected, tmp_path):
    (tmp_path / "stderr").write_text(errors)
    (tmp_path / "result.json").write_text("[1]")
    case = fuzz.Case("d-0", doors.DOORS[0], "cut", "", pathlib.Path(tmp_path), "input", "output", same=True)
    found, why = fuzz.verdict(case, code << 8, None, [1])
    assert found == expected if expected in ("ok", "refused") else found == "FAULT" and why.startswith(expected)
    assert fuzz.verdict(case, 9, None, [1])[0] == "FAULT"  # a signal
    if not code and not errors:
        assert fuzz.verdict(case, 0, None, [2]) == ("FAULT", "exit code 0, and another result than the good input's")
    (tmp_path / mutators.MARKER).touch()
    assert fuzz.verdict(case, code << 8, None, [1]) == ("FAULT", "code of the input was run")
