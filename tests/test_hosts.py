"""Several processes train as one does: the same numbers, checkpoints that go on on either, and an end together."""

import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import hosts_worker
import jax
import numpy as np
import pytest
import quick_xla
from tensorboard.backend.event_processing import event_accumulator
from tiny_data import built

from rahf import checkpoints, partitioning, train

pytestmark = pytest.mark.usefixtures("standard_promotion")
ROOT = pathlib.Path(__file__).parent.parent


def environment(cache) -> dict:
    flags = f"--xla_force_host_platform_device_count=4 {quick_xla.FLAGS}"
    return os.environ | {"XLA_FLAGS": flags, "JAX_COMPILATION_CACHE_DIR": str(cache)}


def processes() -> list[str]:
    with socket.socket() as one:
        one.bind(("localhost", 0))
        return [f"--coordinator=localhost:{one.getsockname()[1]}", "--num_processes=2"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with `one`, trained here on 8 devices, and `two`, by two processes of 4; the results; the processes' ends."""
    folder = tmp_path_factory.mktemp("hosts")
    one = train.train(hosts_worker.config(), folder / "one")
    shutil.copytree(folder / "one", folder / "resumed_by_two")
    command = [sys.executable, "tests/hosts_worker.py", str(folder), built(), *processes()]
    options, logs = {"cwd": ROOT, "env": environment(folder / "compiled")}, [folder / f"{i}.log" for i in range(2)]
    workers = []
    for i, log in enumerate(logs):  # a pipe that nobody reads would fill, and stop both
        with log.open("w") as file:
            workers.append(subprocess.Popen([*command, f"--process_id={i}"], stderr=file, **options))
    for worker in workers:
        worker.wait(timeout=600)
    errors = [log.read_text() for log in logs]
    assert all((folder / f"results_{i}.json").exists() for i in range(2)), errors
    results = [json.loads((folder / f"results_{i}.json").read_text()) for i in range(2)]
    return folder, one, results, [(worker.returncode, error) for worker, error in zip(workers, errors, strict=True)]


def losses(workdir) -> list[float]:
    events = event_accumulator.EventAccumulator(str(workdir / "tensorboard"))
    events.Reload()
    return [event.value for event in events.Scalars("train/loss")]


def saved(workdir, kind="checkpoints"):
    with checkpoints.manager(workdir, kind) as manager:
        step = manager.latest_step()
        abstract = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), manager.item_metadata(step)["state"].tree)
        return step, checkpoints.restore(manager, step, abstract)


def test_two_processes_train_as_one_does(runs):
    """And each has its share of the batches of both sources, whatever the mesh: hosts_worker.check_batches."""
    folder, *_ = runs
    np.testing.assert_allclose(losses(folder / "two"), losses(folder / "one"), rtol=1e-5)
    (step, one), (same_step, two) = saved(folder / "one"), saved(folder / "two")
    assert step == same_step == hosts_worker.STEPS
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(one["params"]), jax.tree.leaves(two["params"]), strict=True):
        name = jax.tree_util.keystr(path)
        if "['key']['bias']" not in name:  # softmax does not see it: its gradient is rounding, which Adam blows up
            np.testing.assert_allclose(y, x, rtol=0, atol=1e-5 * max(np.abs(x).max(), 1), err_msg=name)


def assert_same_metrics(got, expected):
    assert got.keys() == expected.keys()
    assert expected["num_examples"] == 7  # none is counted twice, nor the padding of the last batch
    for name, value in expected.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-4, atol=1e-5, err_msg=name)


def test_two_processes_have_the_metrics_of_one(runs):
    _, one, two, _ = runs
    assert json.dumps(two[0]) == json.dumps(two[1])
    assert_same_metrics(two[0]["trained"], one)


def test_a_checkpoint_goes_on_on_another_number_of_processes(runs, capsys):
    """Restoring checks every array's digest. Two go on with the one's, on a mesh whose `model` axis spans both."""
    folder, one, two, _ = runs
    assert_same_metrics(two[0]["resumed"], one)
    shutil.copytree(folder / "two", folder / "resumed_by_one")
    again = train.train(hosts_worker.config(), folder / "resumed_by_one")
    assert f"resumed from step {hosts_worker.STEPS}" in capsys.readouterr().out
    assert_same_metrics(again, two[0]["trained"])


def test_one_process_writes_the_summaries(runs):
    assert len(list((runs[0] / "two" / "tensorboard").iterdir())) == 1


def test_a_process_that_is_killed_in_training_ends_the_other(runs):
    folder, _, _, ((code, said), (killed, last_words)) = runs
    assert (code, killed) == (1, -signal.SIGKILL), said
    assert "error: process 0 of 2: " in said
    for text in (said, last_words):
        assert "give the same command again on all machines" in text.splitlines()[-1]
    assert (folder / "killed" / "config.json").exists()


def test_a_notice_to_one_process_stops_all_at_the_same_step(runs, tmp_path):
    """The program is that of `runs`, so its compilation is there."""
    command = [
        sys.executable, "-m", "rahf.train", "--config=configs/rahf_ci.py", f"--workdir={tmp_path / 'run'}",
        f"--config.data.data_dir={built()}", "--config.data.text_length=60", "--config.model.vit.stem_patch=0",
        *(f"--config.optimizer.{name}={value}" for name, value in hosts_worker.OPTIMIZER.items()),
        "--config.train.num_steps=100000", "--config.checkpoint_every=100000", "--config.eval.every=100000", *processes(),
    ]  # fmt: skip
    logs, started = [tmp_path / f"log_{i}" for i in range(2)], []
    try:
        for i, log in enumerate(logs):
            with log.open("w") as file:
                options = {"cwd": ROOT, "env": environment(runs[0] / "compiled"), "stdout": file, "stderr": file}
                started.append(subprocess.Popen([*command, f"--process_id={i}"], **options))
        while "loss=" not in logs[0].read_text():
            assert [process.poll() for process in started] == [None, None], [log.read_text() for log in logs]
            time.sleep(0.1)
        started[1].send_signal(signal.SIGTERM)
        assert [process.wait(300) for process in started] == [75, 75], [log.read_text() for log in logs]
    finally:
        for process in started:
            process.kill()
            process.wait()
    (step,) = (path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert f"SIGTERM: saved step {step} in " in logs[0].read_text()
    assert "saved step" not in logs[1].read_text()  # process 0 tells


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--process_id=0"], "--coordinator, --num_processes: got nothing, expected --coordinator, --num_processes and --"),
        (["--coordinator=a:1", "--num_processes=2", "--process_id=2"], "--process_id: got 2, expected 0 to 1"),
        (["--coordinator=a", "--num_processes=2", "--process_id=1"], "--coordinator: got 'a', expected HOST:PORT"),
    ],
)
def test_processes_that_do_not_fit_together_are_refused(arguments, message, tmp_path):
    command = [sys.executable, "-m", "rahf.train", "--config=configs/rahf_ci.py", f"--workdir={tmp_path}", *arguments]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2
    assert f"error: {message}" in result.stderr
    assert "Traceback" not in result.stderr


def test_local_rows_are_those_of_this_processs_devices():
    sharding = partitioning.batch_sharding(partitioning.make_mesh(-1, 2))
    np.testing.assert_array_equal(partitioning.local_rows(sharding, 8), np.arange(8))


SCRIPT = """
import os, signal, sys
from absl import app, flags
from jax.experimental import multihost_utils
from rahf import hosts

def main(argv):
    with hosts.joined():
        multihost_utils.sync_global_devices("all are there")
        if flags.FLAGS.process_id == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        multihost_utils.sync_global_devices("never")

hosts.JOIN_SECONDS, hosts.HEARTBEAT_SECONDS = map(int, (sys.argv.pop(), sys.argv.pop()))
hosts.define_flags()
flags.DEFINE_string("workdir", None, "")
app.run(main)
"""


def test_a_process_that_no_longer_answers_ends_the_other():
    """JAX's client ends it by SIGABRT, from C++; what to do is still the last line."""
    command, options = [sys.executable, "-c", SCRIPT, *processes()], {"cwd": ROOT, "stderr": subprocess.PIPE, "text": True}
    pair = [subprocess.Popen([*command, f"--process_id={i}", "5", "60"], **options) for i in range(2)]
    try:
        said = pair[0].communicate(timeout=120)[1]
    finally:
        for process in pair:
            process.kill()
    pair[1].communicate()
    assert pair[0].returncode != 0
    assert "give the same command again on all machines" in said.splitlines()[-1]


def test_a_coordinator_that_never_answers_is_an_error():
    command = [sys.executable, "-c", SCRIPT, *processes(), "--process_id=1", "100", "2"]
    result = subprocess.run(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert result.returncode != 0
    last = result.stderr.splitlines()[-1]
    assert last.startswith("error: --coordinator=localhost:")
    assert "not all processes came together in 2 s; expected the same command on every machine" in last
