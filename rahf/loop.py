"""A training run: it resumes from its newest checkpoint, takes steps, logs and saves them, and stops on a signal.

What is computed is a `program.Training`; what happens besides the steps (evaluation, samples) is the caller's:

    with loop.start(config, workdir, training, initialise, batches_from) as run:
        for step in run.steps():
            if run.due(config.eval.every):
                ...
"""

import contextlib
import dataclasses
import io
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from tqdm.auto import tqdm

from rahf import ahead, checkpoints, partitioning, trackers
from rahf.program import Training
from richhf_data import paths
from richhf_data.errors import UserError

READY = 2  # batches that are read and placed on the devices before their steps
EXIT_CODES = {signal.SIGTERM: os.EX_TEMPFAIL, signal.SIGINT: 128 + signal.SIGINT}  # "start me again", stopped by the user


@contextlib.contextmanager
def start(
    config,
    workdir: epath.Path,
    training: Training,
    initialise: Callable[[], dict],
    batches_from: Callable[[int], Iterator[Mapping[str, np.ndarray]]],
    rollouts: "Rollouts | None" = None,
) -> Iterator["Run"]:
    """Opens a run in `workdir`, at its newest checkpoint or at step 0; closes its files and processes at the end.

    Args:
      initialise: gives the parameters of step 0.
      batches_from: step -> a generator of this process's rows of the batches from that step on. A thread takes them,
        `READY` ahead.
      rollouts: in place of `batches_from`, for batches that the run's own parameters make.

    Raises:
      UserError: no training state can be read; too many steps in a row whose loss or gradient is not finite.
      SystemExit: SIGTERM (code 75) or SIGINT (130) came; the state is saved.
    """
    writes, run = jax.process_index() == 0, None
    try:
        with contextlib.ExitStack() as stack:
            latest = stack.enter_context(checkpoints.manager(workdir, "checkpoints"))
            shapes = training.state if rollouts is None else training.state | {"kept": rollouts.shapes}
            state, saved = checkpoints.restore_latest(latest, shapes)
            kept = {} if state is None else state.pop("kept", {})
            if state is None:
                state, saved = training.init_state(initialise()), {"step": 0, "skipped": 0, "skipped_in_a_row": 0}
                kept = {} if rollouts is None else rollouts.empty()
            elif writes:
                print(f"resumed from step {saved['step']}", flush=True)
            processor_seconds = saved.get("processor_seconds", 0.0)
            step, num_steps, bad_batches = saved["step"], config.train.num_steps, workdir / "bad_batches"
            skips = SkippedSteps(bad_batches, config.train.max_bad_steps, saved["skipped"], saved["skipped_in_a_row"])
            if rollouts is None:
                batches = stack.enter_context(contextlib.closing(batches_from(step)))
                batches = ahead.taken(((rows, training.place(rows)) for rows in batches), READY)
                batches = stack.enter_context(contextlib.closing(batches))
            writer = stack.enter_context(trackers.opened(workdir, config, step))
            bar = stack.enter_context(
                tqdm(desc="train", total=num_steps, initial=step, unit="step", dynamic_ncols=True, disable=not writes)
            )
            stop = stack.enter_context(stop_signals())
            run = Run(config, training, state, step, latest, skips, writer, bar, stop)
            run.kept, run.batches = kept, rollouts.batches(run) if rollouts else batches
            run.processor_seconds = processor_seconds
            yield run
    except SystemExit:
        if writes and run and run.stopped:  # the checkpoint is on disk by now
            print(run.stopped, flush=True)
        raise


@dataclasses.dataclass(frozen=True)
class Rollouts:
    """Batches that the run's own parameters make.

    Attributes:
      batches: run -> a generator of (rows to keep of a bad batch, batch on the devices). It is asked for a batch right
        before the batch's step. It leaves in `run.kept` what a resumed run needs to go on at `run.step`.
      shapes: of `run.kept`, with shardings. It is saved with the training state.
    """

    batches: Callable[["Run"], Iterator[tuple[Mapping[str, np.ndarray], Mapping[str, jax.Array]]]]
    shapes: dict

    def empty(self) -> dict:
        """`run.kept` of step 0: zeros."""
        return jax.tree.map(lambda x: partitioning.place(np.zeros(x.shape, x.dtype), x.sharding), self.shapes)


class Run:
    """A run between its start and its end; see `start`.

    Attributes:
      state: the training state after `step` steps. kept: of `Rollouts`. writer: of `trackers`, for pictures.
      processor_seconds: of all steps so far but the first of each start, which compiles; without the caller's work.
      stopped: after a signal, what to print once the last checkpoint is on disk.
    """

    def __init__(self, config, training, state, step, latest, skips, writer, bar, stop):
        self.config, self.state, self.step, self.writer = config, state, step, writer
        self.kept, self.batches, self.stopped, self.processor_seconds = {}, iter(()), None, 0.0
        self._training, self._latest = training, latest
        self._skips, self._bar, self._stop = skips, bar, stop
        self._logged_at, self._logged_step, self._ended = time.monotonic(), step, False

    @property
    def params(self):
        """The parameters to evaluate: the moving average where there is one."""
        return self.state.get("ema", self.state["params"])

    def steps(self) -> Iterator[int]:
        """Takes the steps; yields the number of each after it has been taken, logged and, where due, saved.

        A resumed run yields the step it resumed from first: what was due there may have been cut short.
        """
        if self.step:
            yield from self._yield()
        first = True
        while self.step < self.config.train.num_steps and not self._ended:
            began = time.process_time()
            rows, batch = next(self.batches)
            self._take(rows, batch)
            self.processor_seconds += 0.0 if first else time.process_time() - began
            first = False
            yield from self._yield()

    def end(self) -> None:
        """Ends the run after this step, and saves it: the same command begins there."""
        if self.step not in self._latest.all_steps():
            self._save()
        self._ended = True

    def stop_between(self) -> None:
        """Within the making of a rollout: saves and ends where a signal came. Several hosts end after the next step.

        Raises:
          SystemExit: as `start`.
        """
        if jax.process_count() == 1 and (stopped_by := self._stop(self.step)):
            self._save_and_stop(stopped_by)

    def due(self, every: int) -> bool:
        """Whether something is due that is done every so many steps, and after the last one."""
        return self.step % every == 0 or self.step == self.config.train.num_steps

    def log(self, section: str, values: Mapping[str, float]) -> None:
        """Writes numbers of this step; nan, which nothing was measured for, is left out."""
        self.writer.scalars(section, {name: value for name, value in values.items() if value == value}, self.step)

    def print(self, text: str) -> None:
        """Prints a line above the progress bar, on process 0."""
        if jax.process_index() == 0:
            self._bar.write(text)

    def _yield(self):
        began = time.monotonic()
        yield self.step
        self._logged_at += time.monotonic() - began  # the caller's work is not the training's speed

    def _take(self, rows, batch) -> None:
        self.state, metrics = self._training.step(self.state, batch)
        self.step += 1
        self._skips.add(self.step, rows, metrics.pop("skipped"))
        self._bar.update()
        if self.due(self.config.log_every):
            self._log_step({name: float(value) for name, value in jax.device_get(metrics).items()})
        stopped_by = self._stop(self.step)
        if stopped_by:
            self._save_and_stop(stopped_by)
        if self.due(self.config.checkpoint_every):
            self._save()

    def _save(self) -> None:
        self._skips.settle()
        counts = {"skipped": self._skips.total, "skipped_in_a_row": self._skips.in_a_row}
        counts["processor_seconds"] = self.processor_seconds
        state = self.state | {"kept": self.kept} if self.kept else self.state
        checkpoints.save(self._latest, self.step, state, counts)

    def _save_and_stop(self, stopped_by) -> None:
        if self.step not in self._latest.all_steps():
            self._save()
        name, folder = signal.Signals(stopped_by).name, self._latest.directory
        self.stopped = f"{name}: saved step {self.step} in {folder}; the same command goes on from there"
        raise SystemExit(EXIT_CODES[stopped_by])

    def _log_step(self, metrics: dict[str, float]) -> None:
        now, skipped = time.monotonic(), self._skips.total
        speed = (self.step - self._logged_step) * self.config.train.batch_size / (now - self._logged_at)
        self._logged_at, self._logged_step = now, self.step
        self.writer.scalars("train", metrics | {"examples_per_second": speed, "skipped_steps": skipped}, self.step)
        shown = {"skipped": skipped} if skipped else {}
        self._bar.set_postfix(loss=f"{metrics['loss']:.4f}", examples_s=f"{speed:.0f}", **shown)


class SkippedSteps:
    """Counts steps whose update was skipped, keeps the newest `limit` of their batches, ends the run after `limit` in a row.

    A step is checked once the next one has been handed to the device, so that the device never waits.

    Attributes:
      total, in_a_row: how many steps were skipped, and how many of the last checked ones in a row.
    """

    def __init__(self, folder: epath.Path, limit: int, total: int, in_a_row: int):
        self.total, self.in_a_row = total, in_a_row
        self._folder, self._limit, self._waiting = folder, limit, None

    def add(self, step: int, batch, skipped) -> None:
        """Checks the step before this one."""
        self.settle()
        self._waiting = (step, batch, skipped)

    def settle(self) -> None:
        """Checks the last step.

        Raises:
          UserError: `limit` steps in a row were skipped.
        """
        if self._waiting is None:
            return
        (step, batch, skipped), self._waiting = self._waiting, None
        if not int(skipped):
            self.in_a_row = 0
            return
        self.total, self.in_a_row = self.total + 1, self.in_a_row + 1
        file = io.BytesIO()
        np.savez_compressed(file, step=step, **batch)
        paths.replace(self._folder / f"step_{step:08d}_host_{jax.process_index()}.npz", file.getvalue())
        own = [path for path in self._folder.iterdir() if path.name.endswith(f"_host_{jax.process_index()}.npz")]
        for old in sorted(own)[: -self._limit]:
            old.unlink()
        if self.in_a_row >= self._limit:
            raise UserError(
                f"the loss or its gradient was not finite in {self.in_a_row} steps in a row, up to step {step}; expected "
                f"fewer than train.max_bad_steps={self._limit}. Their updates were skipped; what was read for "
                f"them is in {self._folder}. Look at it, lower --config.optimizer.learning_rate (in another --workdir), or "
                "raise --config.train.max_bad_steps."
            )


@contextlib.contextmanager
def stop_signals():
    """Yields `step -> signal number or None`: whether to end after this step, the same step on every host.

    The first SIGTERM or SIGINT is noted; a second one ends the process at once. On several hosts JAX's preemption service
    takes SIGTERM and makes all of them agree on the step.
    """
    received = []
    several = jax.process_count() > 1
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, *(() if several else (signal.SIGTERM,)))}

    def note(number, frame):
        received.append(number)
        for handled in handlers:
            signal.signal(handled, signal.SIG_DFL)
        if several:
            os.kill(os.getpid(), signal.SIGTERM)

    def stop(step):
        if several and not multihost_utils.reached_preemption_sync_point(step):
            return None
        return received[0] if received else signal.SIGTERM if several else None

    for number in handlers:
        signal.signal(number, note)
    try:
        yield stop
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
