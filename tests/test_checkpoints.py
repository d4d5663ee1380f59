"""Checkpoints: what is damaged is noticed, never trained on, and never the end of a run whose state before is good."""

import os
import pathlib
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from rahf import checkpoints, experiments, partitioning, train
from rahf import program as programs
from richhf_data import json_files
from richhf_data.errors import UserError

pytestmark = pytest.mark.usefixtures("standard_promotion")
ROOT = pathlib.Path(__file__).parent.parent


def tree(seed):
    rng = np.random.default_rng(seed)
    return {
        "params": {"kernel": rng.normal(size=(64, 32)).astype(np.float32), "bias": rng.normal(size=32).astype(np.float32)},
        "count": np.int32(seed),
    }


def place(state, device=0):
    return jax.device_put(state, jax.devices()[device])


def abstract(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


def save_two(workdir):
    with checkpoints.manager(workdir, "checkpoints") as manager:
        for step in (2, 4):
            checkpoints.save(manager, step, place(tree(step)), {})
    return workdir


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A workdir with the training states 2 and 4."""
    return save_two(tmp_path_factory.mktemp("saved"))


def files(folder):
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())


def flip(data):
    return data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :]


def largest(folder):
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


@pytest.mark.parametrize("damage", [flip, lambda data: data[: len(data) // 2]], ids=["flipped", "truncated"])
def test_any_damaged_file_leads_to_the_saved_state_or_the_one_before(damage, saved, tmp_path, capsys):
    newest = saved / "checkpoints" / "4"
    fallbacks = set()
    for number, name in enumerate(files(newest)):
        workdir = tmp_path / str(number)
        shutil.copytree(saved, workdir)
        path = workdir / "checkpoints" / "4" / name
        path.write_bytes(damage(path.read_bytes()))
        with checkpoints.manager(workdir, "checkpoints") as manager:
            state, metadata = checkpoints.restore_latest(manager, abstract(place(tree(0))))
            assert_equal(state, tree(metadata["step"]))
            warned = capsys.readouterr().err
            if metadata["step"] == 2:
                fallbacks.add(name.parts[1] if name.parts[0] == "state" else str(name))
                assert "WARNING: checkpoint: " in warned
                assert str(workdir / "checkpoints" / "4") in warned
                assert str(workdir / "checkpoints" / "2") in warned
                assert (workdir / "damaged" / "checkpoints-4" / name).exists()
                checkpoints.save(manager, 4, place(tree(4)), {})  # the damaged one does not stand in the way
                manager.wait_until_finished()
                assert_equal(checkpoints.restore(manager, 4, abstract(place(tree(0)))), tree(4))
            else:
                assert metadata["step"] == 4
                assert "WARNING" not in warned
    assert {"metadata/metadata", "_METADATA", "_sharding", "manifest.ocdbt", "d", "ocdbt.process_0"} <= fallbacks


def test_a_flipped_byte_of_an_array_is_noticed_by_its_digest(saved, tmp_path):
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    path = largest(tmp_path / "checkpoints" / "4")
    path.write_bytes(flip(path.read_bytes()))
    with (
        checkpoints.manager(tmp_path, "checkpoints") as manager,
        pytest.raises(ValueError, match=r"4 is damaged: 1 of 3 arrays do not read as .* first is params/kernel"),
    ):
        checkpoints.restore(manager, 4, abstract(place(tree(0))))


def test_two_damaged_checkpoints_are_an_error_that_names_both(saved, tmp_path):
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    for step in ("2", "4"):
        path = largest(tmp_path / "checkpoints" / step)
        path.write_bytes(path.read_bytes()[:100])
    with checkpoints.manager(tmp_path, "checkpoints") as manager:
        with pytest.raises(ValueError, match=r"(?s)checkpoints/4 is damaged.*checkpoints/2 is damaged.*Put a copy back"):
            checkpoints.restore_latest(manager, abstract(place(tree(0))))
        assert sorted(manager.all_steps()) == [2, 4]  # nothing was moved


def test_damaged_best_is_set_aside_so_that_another_takes_its_place(tmp_path, capsys):
    with checkpoints.manager(tmp_path, "best") as best:
        checkpoints.save(best, 3, place(tree(3)), {"value": 0.5})
    path = tmp_path / "best" / "3" / "metadata" / "metadata"
    path.write_bytes(path.read_bytes().replace(b"0.5", b"0.7"))
    with checkpoints.manager(tmp_path, "best") as best:
        assert checkpoints.best_value(best, abstract(place(tree(0)))) is None
        assert "its metadata is not what was saved" in capsys.readouterr().err
        checkpoints.save(best, 3, place(tree(3)), {"value": 0.5})
        best.wait_until_finished()
        assert checkpoints.best_value(best, abstract(place(tree(0)))) == 0.5
    path = largest(tmp_path / "best" / "3")
    path.write_bytes(flip(path.read_bytes()))
    with checkpoints.manager(tmp_path, "best") as best:
        assert checkpoints.best_value(best, abstract(place(tree(0)))) is None
        assert "arrays do not read as they were saved" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["run[1]", "lr=1e-[3", "run*", "run?"])
def test_a_path_that_orbax_takes_for_a_pattern_is_refused(name, tmp_path):
    with pytest.raises(UserError, match=r"workdir: .* has a [*?[] in its path, expected none of \* \? \[ .* a link to"):
        checkpoints.check_path(tmp_path / name / "sub")
    checkpoints.check_path(tmp_path / "lr=1e-3]{},+@!" / "sub")


def test_a_save_that_cannot_be_read_back_is_an_error(tmp_path):
    workdir = tmp_path / "run[1]"  # Orbax merges nothing there, and commits
    message = r"(?s)could not write to .*run\[1\]/checkpoints: .*No checkpoint is there"
    with (
        pytest.raises(checkpoints.SaveError, match=message),
        checkpoints.manager(workdir, "checkpoints") as manager,
    ):
        checkpoints.save(manager, 2, place(tree(2)), {})
        checkpoints.save(manager, 4, place(tree(4)), {})
    assert os.listdir(workdir / "checkpoints") == ["2"]


def test_what_another_run_is_writing_is_left_alone(tmp_path):
    beside = tmp_path / "run1" / "checkpoints" / "4.orbax-checkpoint-tmp"
    beside.mkdir(parents=True)
    (tmp_path / "run[1]" / "checkpoints" / "4.orbax-checkpoint-tmp").mkdir(parents=True)
    with checkpoints.manager(tmp_path / "run[1]", "checkpoints") as manager:
        assert checkpoints.restore_latest(manager, abstract(place(tree(0)))) == (None, None)
    assert beside.exists() and os.listdir(tmp_path / "run[1]" / "checkpoints") == []


@pytest.mark.parametrize("change", ["removed", "another run"])
def test_a_workdir_that_is_gone_is_not_made_anew(change, tmp_path):
    workdir = tmp_path / "run"
    json_files.write(workdir / "config.json", {"seed": 0})
    with (
        pytest.raises(checkpoints.SaveError, match=r"run was removed, or another run began there: .* Step 4 is not saved"),
        checkpoints.manager(workdir, "checkpoints") as manager,
    ):
        checkpoints.save(manager, 2, place(tree(2)), {})
        manager.wait_until_finished()
        shutil.rmtree(workdir)
        if change == "another run":
            json_files.write(workdir / "config.json", {"seed": 1})
        checkpoints.save(manager, 4, place(tree(4)), {})
    assert not (workdir / "checkpoints").exists()


def test_digest_is_the_same_on_every_mesh_and_another_for_other_bits():
    values = np.random.default_rng(0).normal(size=(16, 24)).astype(np.float32)
    digest = checkpoints.digests({"x": values})["x"]
    mesh = partitioning.make_mesh(4, 2)
    for spec in (PartitionSpec("shard", "model"), PartitionSpec(None, "shard"), PartitionSpec()):
        assert checkpoints.digests({"x": jax.device_put(values, NamedSharding(mesh, spec))})["x"] == digest
    negated = values.copy()
    negated[[3, 4], 5] *= -1
    for other in (np.flip(values, 0), values.T, negated, np.where(values == values[7, 7], 0, values)):
        assert checkpoints.digests({"x": np.ascontiguousarray(other)})["x"] != digest
    zeros = np.zeros(4, np.float32)
    assert checkpoints.digests({"x": zeros}) != checkpoints.digests({"x": -zeros})


@pytest.mark.parametrize("dtype", [jnp.bool_, jnp.int8, jnp.bfloat16, jnp.int32, jnp.uint32])
def test_digest_tells_numbers_of_every_width_apart(dtype):
    ones, others = np.ones(5, dtype), np.asarray([1, 1, 1, 0, 1], dtype)
    assert checkpoints.digests({"x": ones}) == checkpoints.digests({"x": ones.copy()})
    assert checkpoints.digests({"x": ones}) != checkpoints.digests({"x": others})


def vit_state(mesh):
    """Random numbers in place of what rahf_ci's training state has for the ViT's kernels: parameters, both moments."""
    config = experiments.load("rahf_ci")
    shapes = programs.assemble(train.program(config), config, mesh).state
    rng = np.random.default_rng(0)
    return {
        f"{number:03d}": jax.device_put(rng.normal(size=shape.shape).astype(shape.dtype), shape.sharding)
        for number, (path, shape) in enumerate(jax.tree_util.tree_leaves_with_path(shapes))
        if {"'vit'", "'kernel'"} <= set(re.findall(r"'\w+'", jax.tree_util.keystr(path)))
    }


@pytest.mark.parametrize(("data", "model"), [(4, 2), (1, 1)])
def test_state_restores_on_another_mesh_and_number_of_devices(data, model, tmp_path):
    before = vit_state(partitioning.make_mesh(data, model, devices=jax.devices()[: data * model]))
    after = vit_state(partitioning.make_mesh(1, 1, devices=jax.devices()[:1]) if data == 4 else partitioning.make_mesh(4, 2))
    assert len(before) > 20
    with checkpoints.manager(tmp_path, "checkpoints") as manager:
        checkpoints.save(manager, 1, before, {})
    with checkpoints.manager(tmp_path, "checkpoints") as manager:
        restored, _ = checkpoints.restore_latest(manager, abstract(after))
    assert_equal(restored, before)
    assert {name: x.sharding for name, x in restored.items()} == {name: x.sharding for name, x in after.items()}


FILLS_THE_DISK = """
import resource, sys
import numpy as np
from rahf import checkpoints
checkpoints.jax.default_backend = lambda: "tpu"  # where a save is not awaited
with checkpoints.manager(sys.argv[1], "checkpoints") as manager:
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
    checkpoints.save(manager, 6, {"x": np.random.default_rng(0).normal(size=100_000)}, {})
    print("the save has begun", flush=True)
"""


def test_save_that_fails_in_the_background_is_told_and_leaves_the_last_checkpoint(saved, tmp_path):
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    result = subprocess.run([sys.executable, "-c", FILLS_THE_DISK, tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stdout == "the save has begun\n"
    error = result.stderr[result.stderr.rindex("SaveError: ") :]
    assert f"could not write to {tmp_path / 'checkpoints'}" in error
    assert "File too large" in error
    assert "The last good one is of step 4, intact" in error
    with checkpoints.manager(tmp_path, "checkpoints") as manager:
        assert_equal(checkpoints.restore_latest(manager, abstract(place(tree(0))))[0], tree(4))
        assert sorted(os.listdir(tmp_path / "checkpoints")) == ["2", "4"]  # what was half-written is gone
