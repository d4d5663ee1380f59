"""What the trainers share: the update, the state's shardings, and the loop that saves, resumes and tells.

`rahf.train` and `rahf.diffusion.train` say what is computed; here is how a step is taken and what happens between steps.
"""

import contextlib
import functools
import io
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tensorboardX
import tensorboardX.record_writer
from etils import epath
from flax import linen as nn
from jax.experimental import multihost_utils
from tqdm.auto import tqdm

from rahf import checkpoints, optimizers, partitioning
from richhf_data import paths
from richhf_data.errors import UserError


def initial_state(params, optimizer, config) -> dict:
    """Step 0: a dictionary of `step`, `params`, `opt_state`, and `ema` where `optimizer.ema_decay` is above 0.

    params: boxed with their logical axis names; `flax.linen.unbox` takes them out.
    """
    state = {"step": jnp.zeros((), jnp.int32), "params": params, "opt_state": optimizer.init(nn.unbox(params))}
    if config.optimizer.ema_decay > 0:
        state["ema"] = params
    return state


def make_train_step(loss_fn: Callable, normalisers_of: Callable, optimizer, schedule, config, mesh):
    """The pure update `(state, batch, key) -> (state, metrics)`.

    The losses are normalised over the global batch, so neither the number of devices nor `train.accumulation_steps`
    changes the mathematics. Where the loss or the gradient is not finite, `skipped` is 1 and only the step changes.

    Args:
      loss_fn: (params, rows, normalisers, key) -> (loss, metrics with `loss`), which add up over parts of a batch.
      normalisers_of: batch -> what the losses of its parts are divided by.
    """
    microbatches = config.train.accumulation_steps

    def train_step(state, batch, key):
        key = jax.random.fold_in(key, state["step"])
        normalisers = normalisers_of(batch)

        def part(params, rows, index):
            params = optimizers.stop_frozen(params, config.optimizer.freeze)
            return loss_fn(params, rows, normalisers, jax.random.fold_in(key, index))

        gradient = jax.value_and_grad(part, has_aux=True)
        if microbatches == 1:
            (_, metrics), grads = gradient(state["params"], batch, 0)
        else:
            rows = jax.tree.map(lambda x: x.reshape(microbatches, -1, *x.shape[1:]), batch)
            spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, partitioning.DATA))
            rows = jax.lax.with_sharding_constraint(rows, spread)

            def accumulate(total, scanned):
                (_, metrics), grads = gradient(state["params"], *scanned)
                return jax.tree.map(jnp.add, total, (grads, metrics)), None

            first = jax.tree.map(lambda x: x[0], rows)
            (_, metrics), grads = jax.eval_shape(gradient, state["params"], first, 0)
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (grads, metrics))
            (grads, metrics), _ = jax.lax.scan(accumulate, zeros, (rows, jnp.arange(microbatches)))

        updates, opt_state = optimizer.update(grads, state["opt_state"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        metrics |= {"gradient_norm": optax.global_norm(grads), "learning_rate": schedule(state["step"])}
        new = {"params": params, "opt_state": opt_state}
        if "ema" in state:
            decay = config.optimizer.ema_decay
            new["ema"] = jax.tree.map(lambda old, now: old - (1 - decay) * (old - now), state["ema"], params)
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["gradient_norm"])
        new = jax.tree.map(lambda now, old: jnp.where(finite, now, old), new, {name: state[name] for name in new})
        return {"step": state["step"] + 1} | new, metrics | {"skipped": 1 - finite.astype(jnp.int32)}

    return train_step


def jit_train_step(train_step, mesh, shardings):
    """`make_train_step`'s for arrays that live where `shardings` (of `state_shardings`) says; the old state is given up."""
    return jax.jit(
        train_step,
        in_shardings=(shardings, partitioning.batch_sharding(mesh), None),
        out_shardings=(shardings, None),
        donate_argnums=0,
    )


def state_shardings(boxed, config, mesh):
    """The training state as shapes (unboxed), and where each of its arrays lives; from a boxed abstract `initial_state`."""
    abstract = nn.unbox(boxed)
    if config.mesh.rules not in partitioning.RULE_SETS:
        raise UserError(f"mesh.rules: got {config.mesh.rules!r}, expected one of {sorted(partitioning.RULE_SETS)}")
    divided = partitioning.RULE_SETS[config.mesh.rules]
    like_params = {
        name: partitioning.param_shardings(mesh, boxed["params"], name in divided) for name in ("params", "ema", "opt_state")
    }
    shardings = {"step": partitioning.replicated(mesh), "params": like_params["params"]}
    shardings["opt_state"] = partitioning.optimizer_shardings(
        mesh, abstract["opt_state"], abstract["params"], like_params["opt_state"]
    )
    if "ema" in abstract:
        shardings["ema"] = like_params["ema"]
    return abstract, shardings


def check_batch(config, mesh) -> None:
    """Refuses a batch size that the devices and the accumulation do not divide."""
    data = partitioning.sizes(mesh)["data"]
    unit = data * config.train.accumulation_steps
    if config.train.batch_size % unit:
        raise UserError(
            f"train.batch_size: got {config.train.batch_size}, expected a multiple of {unit} = "
            f"{data} (mesh.data) x {config.train.accumulation_steps} (train.accumulation_steps)"
        )


class SkippedSteps:
    """Counts steps whose update was skipped, keeps the newest `limit` of their batches, ends the run after `limit` in a row.

    A step is looked at when the next one has been handed to the device, which so never waits.

    Attributes:
      total, in_a_row: how many steps were skipped, and how many of them up to the last step that was looked at.
    """

    def __init__(self, folder: epath.Path, limit: int, total: int, in_a_row: int):
        self.total, self.in_a_row = total, in_a_row
        self._folder, self._limit, self._waiting = folder, limit, None

    def add(self, step: int, batch, skipped) -> None:
        """Looks at the step before this one."""
        self.settle()
        self._waiting = (step, batch, skipped)

    def settle(self) -> None:
        """Looks at the last step.

        Raises:
          UserError: that makes `limit` in a row.
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
        for old in sorted(self._folder.glob(f"*_host_{jax.process_index()}.npz"))[: -self._limit]:
            old.unlink()
        if self.in_a_row >= self._limit:
            raise UserError(
                f"the loss or its gradient was not finite in {self.in_a_row} steps in a row, up to step {step}; expected "
                f"fewer than train.max_bad_steps={self._limit}. Their updates were skipped, their batches are in "
                f"{self._folder}. Look at these, lower --config.optimizer.learning_rate (in another --workdir), or raise "
                "--config.train.max_bad_steps."
            )


@contextlib.contextmanager
def stop_signals():
    """Yields `step -> signal number or None`: whether to end after this step, the same step on every host.

    SIGTERM and SIGINT are noted once; the second ends the process at once. On several hosts JAX's preemption service
    takes SIGTERM, tells all of them, and they agree on the step.
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


class BucketFile:
    """An event file of TensorBoard in a bucket, where nothing can be appended: written whole at each flush."""

    def __init__(self, path: str):
        self._path, self._buffer = epath.Path(path), io.BytesIO()

    def write(self, data: bytes) -> None:
        self._buffer.write(data)

    def flush(self) -> None:
        try:
            self._path.write_bytes(self._buffer.getvalue())
        except Exception as error:  # each client has its own; it would end tensorboardX's thread
            print(f"WARNING: {self._path}: not written, tried again at the next flush: {error}", file=sys.stderr, flush=True)

    close = flush

    # What tensorboardX asks of the kind of file that a prefix stands for.
    open = classmethod(lambda cls, path: cls(path))
    directory_check = staticmethod(lambda path: None)


tensorboardX.record_writer.register_writer_factory("gs", BucketFile)

EXIT_CODES = {signal.SIGTERM: os.EX_TEMPFAIL, signal.SIGINT: 128 + signal.SIGINT}  # "start me again", "the user's wish"


def run(
    config,
    workdir: epath.Path,
    abstract,
    shardings,
    fresh: Callable[[], dict],
    batches_from: Callable[[int], Iterator[dict[str, np.ndarray]]],
    update: Callable,
    look_every: int,
    look: Callable,
) -> None:
    """Takes the steps from the newest checkpoint's, or 0, to `train.num_steps`.

    Args:
      abstract, shardings: of `state_shardings`. fresh: gives the state of step 0, without `ema`, which begins as a copy of
        the parameters.
      batches_from: step -> a generator of this process's rows of the batches from there on.
      update: (state, rows) -> (state, metrics), by `make_train_step`.
      look: called as (step, state, writer, say) every `look_every` steps and after the last, also where a run resumes
        there: what was begun may have been cut short. writer: tensorboardX's; say: prints a line above the progress bar.

    Raises:
      SystemExit: SIGTERM (code 75) or SIGINT (130) came; the state is saved.
      UserError: too many steps in a row whose loss or gradient is not finite.
    """
    num_steps, batch_size = config.train.num_steps, config.train.batch_size
    first = jax.process_index() == 0  # of the processes: the one that writes and tells
    with checkpoints.manager(workdir, "checkpoints") as latest:
        targets = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings)
        state, saved = checkpoints.restore_latest(latest, targets)
        if state is None:
            state, saved = fresh(), {"step": 0, "skipped": 0, "skipped_in_a_row": 0}
            if "ema" in abstract:
                copied = functools.partial(jax.tree.map, jnp.copy)
                state["ema"] = jax.jit(copied, out_shardings=shardings["ema"])(state["params"])
        elif first:
            print(f"resumed from step {saved['step']}", flush=True)
        step, bad_batches = saved["step"], workdir / "bad_batches"
        skips = SkippedSteps(bad_batches, config.train.max_bad_steps, saved["skipped"], saved["skipped_in_a_row"])
        with (
            contextlib.closing(batches_from(step)) as batches,
            tensorboardX.SummaryWriter(str(workdir / "tensorboard"), purge_step=step or None, write_to_disk=first) as writer,
            tqdm(desc="train", total=num_steps, initial=step, unit="step", dynamic_ncols=True, disable=not first) as bar,
            stop_signals() as stop,
        ):
            logged_at, logged_step, stopped_by = time.monotonic(), step, None
            while stopped_by is None:
                if step and (step % look_every == 0 or step == num_steps):
                    look(step, state, writer, bar.write if first else lambda text: None)
                    logged_at, logged_step = time.monotonic(), step
                if step == num_steps:
                    break

                rows = next(batches)
                state, metrics = update(state, rows)
                step += 1
                skips.add(step, rows, metrics.pop("skipped"))
                bar.update()

                if step % config.log_every == 0 or step == num_steps:
                    metrics = {name: float(value) for name, value in jax.device_get(metrics).items()}
                    now = time.monotonic()
                    speed = (step - logged_step) * batch_size / (now - logged_at)
                    logged_at, logged_step = now, step
                    for name, value in (metrics | {"examples_per_second": speed, "skipped_steps": skips.total}).items():
                        writer.add_scalar(f"train/{name}", value, step)
                    shown = {"skipped": skips.total} if skips.total else {}
                    bar.set_postfix(loss=f"{metrics['loss']:.4f}", examples_s=f"{speed:.0f}", **shown)

                stopped_by = stop(step)
                if stopped_by or step % config.checkpoint_every == 0 or step == num_steps:
                    skips.settle()
                    counts = {"skipped": skips.total, "skipped_in_a_row": skips.in_a_row}
                    checkpoints.save(latest, step, state, counts)
    if stopped_by:
        name = signal.Signals(stopped_by).name
        if first:
            print(f"{name}: saved step {step} in {workdir / 'checkpoints'}; the same command goes on from there", flush=True)
        raise SystemExit(EXIT_CODES[stopped_by])
