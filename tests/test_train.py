"""The trainer: the same mathematics on any number of devices, resumed exactly, clear errors."""

import collections
import contextlib
import itertools
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
import types

import jax
import ml_collections
import numpy as np
import optax
import pytest
import quick_xla
from etils import epath
from flax import linen as nn

from rahf import checkpoints, experiments, loop, partitioning, sources, train
from rahf import program as programs
from richhf_data import schema
from richhf_data.errors import UserError

pytestmark = pytest.mark.usefixtures("standard_promotion")
ROOT = pathlib.Path(__file__).parent.parent


def ci_config(batch_size=16, **train_section):
    config = experiments.load("rahf_ci")
    config.data.source = "stream"
    config.train.update(batch_size=batch_size, **train_section)
    config.model.vit.stem_patch = 0  # its norm amplifies the rounding that another order of sums brings
    return config


def make_batch(config, tmp_path):
    vocabulary = sources.install_vocabulary(config, tmp_path)
    with_close = sources.training_batches(config, vocabulary, start=0)
    batch = next(with_close)
    with_close.close()
    batch["score_mask"][1, 2] = False  # absent targets, spread unevenly over the devices
    batch["heatmap_mask"][3:9] = False
    batch["keyword_ids"][5:11] = schema.PAD_ID
    return batch


def gradient_step(config, batch, devices):
    """The metrics and the gradient of one step from fixed parameters, on a mesh of these devices: the program of a run."""
    mesh = partitioning.make_mesh(devices=devices)
    optimizer = optax.sgd(1.0)  # so that the update is the gradient
    config.train.batch_size = len(batch["image"])
    training = programs.assemble(train.program(config), config, mesh, optimizer)
    params = jax.device_get(jax.jit(lambda key: nn.unbox(training.program.init(key)))(jax.random.key(0)))
    placed = jax.tree.map(lambda x, y: jax.device_put(x, y.sharding), params, training.params)
    new, metrics = training.step(training.init_state(placed), training.place(batch))
    return jax.device_get(metrics), jax.tree.map(lambda a, b: a - np.asarray(b), params, new["params"])


def assert_same_step(a, b):
    for name in a[0]:
        np.testing.assert_allclose(a[0][name], b[0][name], rtol=1e-5, err_msg=name)
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a[1]), jax.tree.leaves(b[1]), strict=True):
        scale = np.abs(x).max() + 1e-4 * a[0]["gradient_norm"]
        # Sums in another order, and layer norms over 4 channels that amplify. A wrong normaliser would show as 0.1 or more.
        np.testing.assert_allclose(x / scale, y / scale, atol=1e-4, err_msg=jax.tree_util.keystr(path))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A batch of 16 and its step on one device."""
    config = ci_config(batch_size=16)
    batch = make_batch(config, tmp_path_factory.mktemp("whole"))
    return batch, gradient_step(config, batch, jax.devices()[:1])


def test_loss_and_gradient_on_8_devices_equal_those_on_1(whole):
    batch, expected = whole
    assert_same_step(expected, gradient_step(ci_config(batch_size=16), batch, jax.devices()))


def test_accumulation_over_4_microbatches_equals_the_full_batch(whole):
    batch, expected = whole
    config = ci_config(batch_size=16)
    config.train.accumulation_steps = 4
    assert_same_step(expected, gradient_step(config, batch, jax.devices()[:1]))


def test_marks_weigh_and_the_word_head_trains_alike_on_8_devices(whole, tmp_path):
    config = ci_config(batch_size=16, marked_weight=3.0)
    config.model.word_head, config.train.word_weight = True, 0.5
    vocabulary = sources.install_vocabulary(config, tmp_path)
    with contextlib.closing(sources.training_batches(config, vocabulary, start=0)) as batches:
        batch = next(batches)
    weighed = batch["keyword_weights"] == 3
    assert weighed.any() and {vocabulary.decode([piece]) for piece in batch["keyword_ids"][weighed]} == {"_0"}
    texts, targets, marked = batch["text_ids"][:, -1], batch["keyword_ids"], batch["word_labels"]
    words = [vocabulary.decode(text[mask]).split() for text, mask in zip(texts, marked, strict=True)]
    assert words == [[w[:-2] for w in vocabulary.decode(row).split() if w.endswith("_0")] for row in targets]
    assert sum(map(len, words)) > 5 and ((batch["word_weights"] == 3) == marked).all()
    batch |= whole[0]
    expected = gradient_step(config, batch, jax.devices()[:1])
    assert_same_step(expected, gradient_step(config, batch, jax.devices()))
    metrics, weights = expected[0], {"word": config.train.word_weight, **config.train.loss_weights}
    np.testing.assert_allclose(
        metrics["loss"], sum(weight * metrics[f"loss_{name}"] for name, weight in weights.items()), rtol=1e-5
    )
    assert metrics["loss_keyword"] > 1.01 * whole[1][0]["loss_keyword"] and metrics["loss_word"] > 0.1


def test_rows_that_only_pad_change_neither_loss_nor_gradient(whole):
    batch, expected = whole
    padded = {name: np.concatenate([array, np.zeros_like(array)]) for name, array in batch.items()}
    assert_same_step(expected, gradient_step(ci_config(batch_size=16), padded, jax.devices()[:1]))


def test_batch_size_that_the_mesh_does_not_divide_is_refused(tmp_path):
    config = ci_config(batch_size=12)
    with pytest.raises(ValueError, match=r"train.batch_size: got 12, expected a multiple of 8 = 8 \(mesh.data\)"):
        train.train(config, tmp_path)


def command(workdir, *arguments):
    return [
        sys.executable, "-m", "rahf.train", "--config=configs/rahf_ci.py", f"--workdir={workdir}",
        "--config.data.source=stream", "--config.train.num_steps=40", "--config.eval.every=40",
        "--config.checkpoint_every=10", *arguments,
    ]  # fmt: skip


def saved_state(workdir, step):
    with checkpoints.manager(workdir, "checkpoints") as manager:
        abstract = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), manager.item_metadata(step)["state"].tree)
        return checkpoints.restore(manager, step, abstract)


def saved_steps(workdir):
    folder = workdir / "checkpoints"
    return sorted(int(name) for name in os.listdir(folder) if name.isdigit()) if folder.exists() else []


def run_and_signal(workdir, number, environment):
    """Runs the command until it has saved another step, then sends the signal; returns its exit code and what it printed."""
    before = saved_steps(workdir)
    process = subprocess.Popen(
        command(workdir), cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    while process.poll() is None and saved_steps(workdir)[-1:] == before[-1:]:
        time.sleep(0.005)
    process.send_signal(number)
    return process.wait(), process.stdout.read()


def test_a_run_killed_stopped_and_resumed_equals_the_uninterrupted_one(tmp_path):
    environment = os.environ | {"XLA_FLAGS": quick_xla.FLAGS}  # one device
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    subprocess.run(command(whole), cwd=ROOT, env=environment, check=True, capture_output=True)

    code, printed = run_and_signal(stopped, signal.SIGKILL, environment)
    assert code == -signal.SIGKILL, f"the run ended before it could be killed: {printed}"

    step = saved_steps(stopped)[-1]
    code, printed = run_and_signal(stopped, signal.SIGTERM, environment)
    assert code == 75, printed
    assert f"resumed from step {step}" in printed
    assert f"SIGTERM: saved step {saved_steps(stopped)[-1]} in " in printed

    resumed = subprocess.run(command(stopped), cwd=ROOT, env=environment, check=True, capture_output=True, text=True)
    assert "resumed from step" in resumed.stdout
    jax.tree.map(np.testing.assert_array_equal, saved_state(whole, 40), saved_state(stopped, 40))


def test_a_step_whose_loss_is_not_finite_changes_the_step_alone(tmp_path):
    config = ci_config(batch_size=8, accumulation_steps=2)
    config.optimizer.update(freeze=("vit",), ema_decay=0.9)
    batch = make_batch(config, tmp_path)
    mesh = partitioning.make_mesh(devices=jax.devices()[:1])
    training = programs.assemble(train.program(config), config, mesh)
    places = jax.tree.map(lambda x: x.sharding, training.state)

    def run(state, batch):
        return jax.device_get(training.step(jax.device_put(state, places), training.place(batch)))

    first = jax.device_get(training.init_state(training.init_params()))
    bad = batch | {"scores": batch["scores"].copy()}
    bad["scores"][6, 0] = np.nan  # of the second microbatch
    skipped, metrics = run(first, bad)
    assert metrics["skipped"] == 1
    assert skipped["step"] == 1
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(first), jax.tree.leaves(skipped), strict=True):
        assert x.tobytes() == y.tobytes() or path[0].key == "step", path

    good, metrics = run(run(skipped, batch)[0], batch)  # the warm-up's first learning rate is 0
    assert metrics["skipped"] == 0
    assert good["step"] == 3
    for name in ("params", "opt_state", "ema"):
        assert any(np.any(x != y) for x, y in zip(jax.tree.leaves(first[name]), jax.tree.leaves(good[name]), strict=True))
    jax.tree.map(np.testing.assert_array_equal, first["params"]["vit"], good["params"]["vit"])


def test_skipped_steps_are_counted_their_batches_kept_and_too_many_in_a_row_end_the_run(tmp_path):
    folder = tmp_path / "bad_batches"
    skips = loop.SkippedSteps(folder, limit=3, total=4, in_a_row=1)  # as resumed
    for step, skipped in ((11, 1), (12, 0), (13, 1), (14, 1)):
        skips.add(step, {"scores": np.full((2, 4), step, np.float32)}, np.int32(skipped))
    skips.settle()
    assert (skips.total, skips.in_a_row) == (7, 2)
    skips.add(15, {"scores": np.full((2, 4), np.nan, np.float32)}, np.int32(1))
    with pytest.raises(ValueError, match=r"not finite in 3 steps in a row, up to step 15; .*train.max_bad_steps=3"):
        skips.settle()
    assert sorted(os.listdir(folder)) == [f"step_{step:08d}_host_0.npz" for step in (13, 14, 15)]  # the newest three
    with np.load(folder / "step_00000014_host_0.npz") as kept:
        assert kept["step"] == 14
        np.testing.assert_array_equal(kept["scores"], np.full((2, 4), 14, np.float32))


def added(state, batch):
    """A step that adds the batch's number, as tiny as a step can be."""
    number = batch["number"][0]
    return {"sum": state["sum"] + number}, {"loss": state["sum"], "skipped": (number == 2).astype(int)}


def run_of(folder, source, num_steps=6, **calls):
    """A run whose step is `added`; yields as it does."""
    config = ml_collections.ConfigDict({"log_every": 1, "checkpoint_every": 2})
    config.train = {"num_steps": num_steps, "batch_size": 1, "max_bad_steps": 3}
    state = {"sum": jax.ShapeDtypeStruct((), np.int32, sharding=partitioning.replicated(partitioning.make_mesh()))}
    parts = {"place": jax.device_put, "step": jax.jit(added), "init_state": lambda params: params} | calls
    training = types.SimpleNamespace(state=state, **parts)
    with loop.start(config, epath.Path(folder), training, lambda: {"sum": np.int32(0)}, source) as run:
        for _ in run.steps():
            yield run


def numbered(start):
    for number in itertools.count(start):
        yield {"number": np.full(1, number)}


def test_batches_are_ready_before_their_steps_and_each_step_has_its_own(tmp_path):
    placed = []

    def place(rows):
        placed.append((threading.current_thread(), int(rows["number"][0])))
        return jax.device_put(rows)

    def step(state, batch):
        deadline = time.monotonic() + 60
        while len(placed) < 1 + int(batch["number"][0]) + loop.READY:  # they come while a step is computed
            assert time.monotonic() < deadline
            time.sleep(0.001)
        return added(state, batch)

    sums = [int(run.state["sum"]) for run in run_of(tmp_path, numbered, place=place, step=step)]
    assert sums == list(itertools.accumulate(range(6)))
    numbers = [number for _, number in placed]
    assert numbers == list(range(len(numbers))) and len(numbers) <= 6 + loop.READY
    assert len({thread for thread, _ in placed}) == 1 and not placed[0][0].is_alive()
    resumed = [run.step for run in run_of(tmp_path, numbered, num_steps=8)]
    assert resumed == [6, 7, 8] and int(saved_state(tmp_path, 8)["sum"]) == sum(range(8))
    with np.load(tmp_path / "bad_batches" / "step_00000003_host_0.npz") as kept:
        np.testing.assert_array_equal(kept["number"], [2])


def test_an_error_in_the_batches_ends_the_run_at_its_step_with_its_own_traceback(tmp_path):
    def torn(start):
        yield from itertools.islice(numbered(start), 3)
        threads.append(threading.current_thread())
        raise OSError("the cable")

    threads, steps = [], []
    with pytest.raises(OSError, match="the cable") as caught:
        for run in run_of(tmp_path, torn):
            steps.append(run.step)
    assert steps == [1, 2, 3] and saved_steps(tmp_path) == [2]
    assert "torn" in {entry.name for entry in caught.traceback} and not threads[0].is_alive()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_while_a_batch_is_awaited_ends_the_run_after_its_step(tmp_path, capsys, number, code):
    closed = []

    def slow(start):
        try:
            for rows in numbered(start):
                if rows["number"] == 3:
                    os.kill(os.getpid(), number)
                    time.sleep(0.1)
                yield rows
        finally:
            closed.append(threading.current_thread())

    with pytest.raises(SystemExit) as stopped:
        collections.deque(run_of(tmp_path, slow, num_steps=100))
    assert stopped.value.code == code and closed == [threading.main_thread()]
    (*_, step) = saved_steps(tmp_path)
    assert f"{number.name}: saved step {step} in " in capsys.readouterr().out
    assert step < 6 and int(saved_state(tmp_path, step)["sum"]) == sum(range(step))


def test_a_run_that_diverges_ends_with_an_error_and_its_batches(tmp_path):
    with pytest.raises(UserError, match="was not finite in 3 steps in a row, up to step 3"):
        collections.deque(run_of(tmp_path, lambda start: ({"number": np.full(1, 2)} for _ in range(9))))
    assert len(os.listdir(tmp_path / "bad_batches")) == 3


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rahf_base", "got 0.5 with data.source=seqio, expected 0: captions are a dataset of their own there"),
        ("baseline_synth_resnet", "got 0.5, expected 0: this model has no decoder to write them"),
    ],
)
def test_captions_that_nothing_draws_or_writes_are_refused(name, message):
    config = experiments.load(name)
    config.data.captions = 0.5
    if name != "rahf_base":
        config.data.source = "stream"
    with pytest.raises(ValueError, match=f"data.captions: {message}"):
        train.check(config)


def test_unknown_config_key_names_the_nearest(tmp_path):
    result = subprocess.run(command(tmp_path, "--config.optimizer.learning_rat=1"), cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2
    assert "--config.optimizer.learning_rat: the config has no such key; did you mean 'learning_rate'?" in result.stderr
    assert "Traceback" not in result.stderr


def test_checkpoint_of_another_architecture_names_the_mismatches(tmp_path):
    wanted = {"dense": {"kernel": jax.ShapeDtypeStruct((2, 4), np.float32)}}
    with checkpoints.manager(tmp_path, "checkpoints") as manager:
        checkpoints.save(manager, 3, {"dense": {"kernel": np.zeros((2, 3), np.float32)}}, {})
        manager.wait_until_finished()
        with pytest.raises(ValueError, match=r"dense/kernel: the checkpoint has \(2, 3\), the config's model \(2, 4\)"):
            checkpoints.restore(manager, 3, wanted)
