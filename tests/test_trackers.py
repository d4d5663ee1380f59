"""trackers.py: a tracker gets what TensorBoard gets, through kills and without network; with the trackers' own packages.

What needs Weights & Biases or trackio is skipped where they are not installed: `make test-trackers` runs it.
"""

import importlib.util
import json
import os
import pathlib
import re
import signal
import sqlite3
import struct
import subprocess
import sys
import types

import cv2
import ml_collections
import numpy as np
import pytest
import quick_xla
from etils import epath
from tensorboard.backend.event_processing import event_accumulator

from rahf import experiments, trackers, train, workdirs
from richhf_data.errors import UserError

ROOT = pathlib.Path(__file__).parent.parent
INSTALLED = {name: importlib.util.find_spec(name) is not None for name in ("wandb", "trackio")}
CLOSED = "http://127.0.0.1:9"
PICTURE = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)


def needs(name):
    return pytest.mark.skipif(not INSTALLED[name], reason=f"{name} is not installed: make test-trackers")


def config_of(tracker, **values):
    return ml_collections.ConfigDict({"tracker": tracker, "optimizer": {"freeze": ("vit", "t5")}} | values)


# ---- What the trackers have -----------------------------------------------------------------------------------------
def wandb_records(file):
    """The records of a .wandb file: LevelDB's log format after a header of 7 bytes, in each record a protobuf."""
    from wandb.proto import wandb_internal_pb2

    data, position, record = file.read_bytes(), 7, b""
    while position + 7 <= len(data):
        if (left := 2**15 - position % 2**15) < 7:  # the rest of a block holds no header
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        record += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield wandb_internal_pb2.Record.FromString(record)
            record = b""


def of_wandb(workdir):
    """The runs' names; {(name, step): values}; the config; pictures by (name, step)."""
    names, values, config, pictures = set(), {}, {}, {}
    for folder in sorted((workdir / "wandb").glob("offline-run-*")):
        (file,) = folder.glob("*.wandb")
        for record in wandb_records(file):
            if record.HasField("run"):
                names.add(record.run.run_id)
                config |= {update.key: json.loads(update.value_json) for update in record.run.config.update}
            row = {tuple(item.nested_key) or (item.key,): json.loads(item.value_json) for item in record.history.item}
            for key, value in row.items():
                if len(key) == 1 and "/" in key[0]:
                    values.setdefault((key[0], row["step",]), []).append(value)
                elif key[-1] == "path":
                    picture = cv2.imread(str(folder / "files" / value))[..., ::-1]
                    pictures.setdefault((key[0], row["step",]), []).append(picture)
    return names, values, config, pictures


def of_trackio(workdir):
    """As `of_wandb`, from the database that trackio writes."""
    names, values, pictures = set(), {}, {}
    with sqlite3.connect(workdir / "trackio" / "project.db") as database:
        for name, step, text in database.execute("SELECT run_name, step, metrics FROM metrics"):
            names.add(name)
            for key, value in json.loads(text).items():
                if isinstance(value, dict):
                    picture = cv2.imread(str(workdir / "trackio" / "media" / value["file_path"]))[..., ::-1]
                    pictures.setdefault((key, step), []).append(picture)
                else:
                    values.setdefault((key, step), []).append(value)
        ((config,),) = database.execute("SELECT config FROM configs")
        assert database.execute("SELECT COUNT(DISTINCT run_id) FROM metrics").fetchone() == (1,)
    return names, values, json.loads(config), pictures


FOUND = {"wandb": of_wandb, "trackio": of_trackio}


def of_tensorboard(workdir):
    """{(name, step): value}, and the steps of the pictures."""
    events = event_accumulator.EventAccumulator(str(workdir / "tensorboard"))
    events.Reload()
    scalars = {(tag, e.step): e.value for tag in events.Tags()["scalars"] for e in events.Scalars(tag)}
    return scalars, [(tag, e.step) for tag in events.Tags()["images"] for e in events.Images(tag)]


# ---- A run that is killed -------------------------------------------------------------------------------------------
# A run of 8 steps with a checkpoint at every second; the first start kills itself after the 5th.
RUN = f"""
import os, pathlib, signal, sys, time
sys.path.insert(0, "tests")
import test_train
from test_trackers import PICTURE
from rahf import loop

start = loop.start
def with_config(config, *arguments, **options):
    config.tracker, config.optimizer = sys.argv[2] + ":project", {{"freeze": ("vit", "t5")}}
    return start(config, *arguments, **options)
loop.start = with_config

for run in test_train.run_of(sys.argv[1], test_train.numbered, num_steps=8):
    run.log("dev", {{"error": 1 / run.step, "nothing": float("nan")}})
    if run.due(4):
        run.writer.image("samples", PICTURE, run.step)
    if run.step == 5 and "kill" in sys.argv:
        time.sleep(1.5)  # trackio writes every half second
        os.kill(os.getpid(), signal.{signal.SIGKILL.name})
"""


@pytest.mark.parametrize("name", [pytest.param(name, marks=needs(name)) for name in INSTALLED])
def test_a_killed_and_resumed_run_is_one_run_with_the_numbers_and_pictures_of_tensorboard(name, tmp_path):
    environment = os.environ | {"XLA_FLAGS": quick_xla.FLAGS, "TRACKIO_DIR": str(tmp_path / "trackio")}
    environment |= {"WANDB_MODE": "offline", "WANDB_X_TRANSACTION_LOG_FLUSH_INTERVAL": "0.2"}

    def start(*arguments):
        command = [sys.executable, "-c", RUN, str(tmp_path), name, *arguments]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)

    killed, resumed = start("kill"), start()
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert resumed.returncode == 0 and "resumed from step 4" in resumed.stdout, resumed.stderr
    assert "WARNING" not in killed.stderr + resumed.stderr

    names, values, config, pictures = FOUND[name](tmp_path)
    assert names == {trackers.name_of(epath.Path(tmp_path))}
    assert config["optimizer"] == {"freeze": ["vit", "t5"]} and config["train"]["num_steps"] == 8
    expected, shown = of_tensorboard(tmp_path)
    assert set(expected) <= set(values)
    for key, value in expected.items():
        assert any(np.float32(one) == np.float32(value) for one in values[key]), key
    loss = {step: found for (key, step), found in values.items() if key == "train/loss"}
    assert loss == {step: [sum(range(step - 1))] * (2 if step == 5 else 1) for step in range(1, 9)}
    error = {step: found for (key, step), found in values.items() if key == "dev/error"}
    assert error == {step: [1 / step] * (2 if step in (4, 5) else 1) for step in range(1, 9)}  # step 4 is done again
    assert set(shown) <= set(pictures) == {("samples", 4), ("samples", 8)}
    assert all(np.array_equal(one, PICTURE) for found in pictures.values() for one in found)


# ---- Without network, without key -----------------------------------------------------------------------------------
def logged(workdir, tracker):
    """Logs `SCALARS`."""
    with trackers.opened(epath.Path(workdir), config_of(tracker)) as writer:
        for step in range(3):
            writer.scalars("train", {"loss": step / 4}, step)


SCALARS = {("train/loss", step): step / 4 for step in range(3)}


def logged_without_server(workdir, tracker, **changes):
    """`logged` in a process of its own, whose trackers find no server."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "XLA_FLAGS": quick_xla.FLAGS}
    environment |= {"WANDB_BASE_URL": CLOSED, "WANDB_API_KEY": "a" * 40, "WANDB_INIT_TIMEOUT": "2"}
    environment |= {"TRACKIO_SERVER_URL": CLOSED, "TRACKIO_WRITE_TOKEN": "a", "TRACKIO_DIR": str(workdir / "trackio")}
    environment |= {"NETRC": str(workdir / "netrc"), "WANDB_CONFIG_DIR": str(workdir)} | changes
    code = f"import test_trackers as t; t.logged({str(workdir)!r}, {tracker!r})"
    options = {"env": environment, "stdin": subprocess.DEVNULL, "capture_output": True, "text": True}
    return subprocess.run([sys.executable, "-c", code], **options)


@needs("wandb")
def test_without_its_server_a_run_goes_on_and_wandb_keeps_it_to_be_sent_later(tmp_path):
    done = logged_without_server(tmp_path, "wandb:project")
    assert done.returncode == 0 and of_tensorboard(tmp_path)[0] == SCALARS, done.stderr
    _, values, config, _ = of_wandb(tmp_path)
    assert values == {key: [value] for key, value in SCALARS.items()} and config["optimizer"] == {"freeze": ["vit", "t5"]}
    (warning,) = [line for line in done.stderr.splitlines() if line.startswith("WARNING: wandb")]
    assert f"WARNING: wandb: not reached; the run goes into {tmp_path}/wandb/offline-run-" in warning


@needs("wandb")
def test_wandb_without_a_key_says_how_to_get_one(tmp_path):
    done = logged_without_server(tmp_path, "wandb:project", WANDB_API_KEY="")
    expected = r"UserError: tracker: .*No API key.*; wandb login, WANDB_MODE=offline, or --config.tracker=tensorboard$"
    assert done.returncode == 1 and re.search(expected, done.stderr, re.MULTILINE), done.stderr


@needs("trackio")
def test_without_its_server_a_run_goes_on_and_trackio_keeps_it_to_be_sent_later(tmp_path):
    done = logged_without_server(tmp_path, "trackio:project")
    assert done.returncode == 0 and of_tensorboard(tmp_path)[0] == SCALARS, done.stderr
    assert "Could not connect" in done.stderr
    assert of_trackio(tmp_path)[1] == {key: [value] for key, value in SCALARS.items()}


# ---- Without the packages -------------------------------------------------------------------------------------------
class Failing:
    """A tracker's run whose disk is full."""

    def log(self, values, step):
        raise OSError(28, "No space left on device")

    finish = log


def test_what_fails_at_a_tracker_is_told_once_and_tensorboard_has_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "trackio", types.SimpleNamespace(init=lambda **options: Failing()))
    logged(tmp_path, "trackio:project")
    assert of_tensorboard(tmp_path)[0] == SCALARS
    expected = "WARNING: trackio: not everything is logged there; TensorBoard has it: OSError: [Errno 28] No space left"
    assert capsys.readouterr().err.startswith(expected)


@pytest.mark.parametrize("tracker", ["wandb", "tensorboard:a", "wandbb:a", "wandb:", "trackio:a/b", "", "wandb:a\n"])
def test_an_unknown_tracker_is_refused(tracker):
    with pytest.raises(UserError, match=r"tracker: got .*, expected tensorboard, wandb:PROJECT or trackio:PROJECT"):
        trackers.check(config_of(tracker))


@pytest.mark.parametrize("module", [None, types.ModuleType("wandb")])  # None: an import fails; or a folder of this name
def test_a_missing_package_is_told_before_anything_is_written(module, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", module)
    config = experiments.load("rahf_ci")
    config.tracker, config.data.source = "wandb:project", "stream"
    with pytest.raises(UserError, match=r"tracker: wandb needs the package wandb, .*; pip install 'rahf\[trackers\]'"):
        train.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_config_without_the_key_logs_to_tensorboard_alone(tmp_path):
    with trackers.opened(epath.Path(tmp_path), ml_collections.ConfigDict()) as writer:
        writer.scalars("train", {"loss": 1.0}, 1)
    assert of_tensorboard(tmp_path)[0] == {("train/loss", 1): 1.0}
    assert [path.name for path in tmp_path.iterdir()] == ["tensorboard"]


def test_an_older_workdir_without_the_key_is_read_and_goes_on_with_any_tracker(tmp_path):
    config = experiments.load("rahf_ci")
    older = config.copy_and_resolve_references()
    del older.tracker
    (tmp_path / "config.json").write_text(older.to_json())
    assert workdirs.read_config(tmp_path).to_dict() == config.to_dict()
    config.tracker = "wandb:project"
    workdirs.check_config(tmp_path, config, train.RESUME_MAY_DIFFER)


def test_other_processes_than_0_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("jax.process_index", lambda: 1)
    monkeypatch.setitem(sys.modules, "trackio", types.SimpleNamespace(init=None))
    with trackers.opened(epath.Path(tmp_path), config_of("trackio:project")) as writer:
        writer.scalars("train", {"loss": 1.0}, 1)
        writer.image("samples", PICTURE, 1)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_the_name_of_a_run_is_of_its_folder_and_stays(tmp_path):
    folder = epath.Path(tmp_path / "my run, 2")
    name = trackers.name_of(folder)
    assert name.startswith("my-run--2-") and len(name) == 18 and trackers.name_of(folder) == name
    (folder / "tracker.json").write_text('{"run": ""}')
    with pytest.raises(UserError, match=r"tracker.json: run: got ''"):
        trackers.name_of(folder)
