"""Trains RAHF: the whole story, from top to bottom.

    python -m rahf.train --config=configs/rahf_synth_tiny.py --workdir=DIR [--config.key=value ...]

A run that was killed goes on where its last checkpoint left it when the same command is given again: the batches and
the random numbers of a step are functions of the seed and the step alone. SIGTERM and SIGINT save before they end it.
"""

import contextlib
import functools
import io
import os
import signal
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tensorboardX
import tensorboardX.record_writer
from absl import app, flags, logging
from etils import epath
from flax import linen as nn
from jax.experimental import multihost_utils
from ml_collections import config_flags
from tqdm.auto import tqdm

from rahf import checkpoints, evaluate, hosts, losses, optimizers, partitioning, predict, pretrained, sources
from rahf.models import rahf as rahf_model
from richhf_data import paths


def initial_state(model: rahf_model.RAHF, optimizer, config, key) -> dict:
    """Step 0: a dictionary of `step`, `params`, `opt_state`, and `ema` where `optimizer.ema_decay` is above 0.

    Parameters are boxed with their logical axis names; `flax.linen.unbox` takes them out.
    """
    image, text_ids, keyword_ids = rahf_model.dummy_inputs(model.config, config.data.text_length)
    params = model.init(key, image, text_ids, keyword_ids)["params"]
    state = {"step": jnp.zeros((), jnp.int32), "params": params, "opt_state": optimizer.init(nn.unbox(params))}
    if config.optimizer.ema_decay > 0:
        state["ema"] = params
    return state


def make_train_step(model: rahf_model.RAHF, optimizer, schedule, config, mesh):
    """The pure update `(state, batch, key) -> (state, metrics)`.

    The losses are normalised over the global batch, so neither the number of devices nor `train.accumulation_steps`
    changes the mathematics. Where the loss or the gradient is not finite, `skipped` is 1 and only the step changes.
    """
    microbatches = config.train.accumulation_steps
    loss_weights, count_padding = config.train.loss_weights.to_dict(), config.train.count_padding

    def train_step(state, batch, key):
        key = jax.random.fold_in(key, state["step"])
        normalisers = losses.loss_normalisers(batch, count_padding)

        def loss_fn(params, rows, index):
            outputs = model.apply(
                {"params": optimizers.stop_frozen(params, config.optimizer.freeze)},
                rows["image"],
                rows["text_ids"],
                rows["keyword_ids"],
                train=True,
                rngs={"dropout": jax.random.fold_in(key, index)},
            )
            return losses.rahf_loss(outputs, rows, normalisers, loss_weights, count_padding)

        gradient = jax.value_and_grad(loss_fn, has_aux=True)
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


def jit_train_step(model, optimizer, schedule, config, mesh, shardings):
    """`make_train_step` for arrays that live where `shardings` (of `state_shardings`) says; the old state is given up."""
    return jax.jit(
        make_train_step(model, optimizer, schedule, config, mesh),
        in_shardings=(shardings, partitioning.batch_sharding(mesh), None),
        out_shardings=(shardings, None),
        donate_argnums=0,
    )


def state_shardings(model, optimizer, config, mesh, key):
    """The training state as shapes (unboxed), and where each of its arrays lives."""
    boxed = jax.eval_shape(lambda key: initial_state(model, optimizer, config, key), key)
    abstract = nn.unbox(boxed)
    if config.mesh.rules not in partitioning.RULE_SETS:
        raise ValueError(f"mesh.rules: got {config.mesh.rules!r}, expected one of {sorted(partitioning.RULE_SETS)}")
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
        raise ValueError(
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
          ValueError: that makes `limit` in a row.
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
            raise ValueError(
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


def train(config, workdir) -> dict[str, float]:
    """Runs `config` to its end in `workdir`; returns the last periodic evaluation's metrics.

    Raises:
      SystemExit: SIGTERM (code 75) or SIGINT (130) came; the state is saved.
    """
    # ---- Mesh, model, optimiser -------------------------------------------------------------------------------------
    mesh = partitioning.mesh_of(config.mesh)
    model_config = rahf_model.RAHFConfig.from_dict(config.model.to_dict())
    model = rahf_model.RAHF(model_config)
    schedule = optimizers.make_schedule(config.optimizer, config.train.num_steps)
    optimizer = optimizers.make_optimizer(config.optimizer, config.train.num_steps)
    check_batch(config, mesh)

    # ---- State, sharded ---------------------------------------------------------------------------------------------
    init_key, step_key = jax.random.split(jax.random.key(config.seed))
    abstract, shardings = state_shardings(model, optimizer, config, mesh, init_key)
    optimizers.check_freeze(abstract["params"], config.optimizer.freeze)
    num_params = sum(leaf.size for leaf in jax.tree.leaves(abstract["params"]))

    # ---- Workdir, vocabulary ----------------------------------------------------------------------------------------
    first = jax.process_index() == 0  # of the processes: the one that writes and tells
    if first and checkpoints.is_new(workdir):  # nothing is written for a config whose weights or data are not there
        pretrained.starting_tensors(config.init, abstract["params"], model_config)
        sources.check_splits(config)
    workdir = checkpoints.open_workdir(workdir, config)
    vocabulary = sources.install_vocabulary(config, workdir)
    predict.check_vocabulary(model_config, vocabulary)
    say = functools.partial(print, flush=True) if first else lambda text: None
    say(f"workdir {workdir}: {jax.device_count()} {jax.devices()[0].platform} devices of {jax.process_count()} processes")
    sizes = " x ".join(f"{name} {size}" for name, size in partitioning.sizes(mesh).items())
    say(f"{num_params:,} parameters, mesh {sizes}, {config.mesh.rules}")

    # ---- Checkpoint or a fresh start --------------------------------------------------------------------------------
    with checkpoints.manager(workdir, "checkpoints") as latest, checkpoints.manager(workdir, "best") as best:
        targets = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings)
        state, saved = checkpoints.restore_latest(latest, targets)
        if state is None:
            saved = {"step": 0, "skipped": 0, "skipped_in_a_row": 0}
            init = jax.jit(lambda key: nn.unbox(initial_state(model, optimizer, config, key)), out_shardings=shardings)
            state = init(init_key)
            tensors = pretrained.starting_tensors(config.init, abstract["params"], model_config)
            state["params"] = pretrained.initialise(state["params"], tensors)
            if "ema" in state:
                copied = functools.partial(jax.tree.map, jnp.copy)
                state["ema"] = jax.jit(copied, out_shardings=shardings["ema"])(state["params"])
        else:
            say(f"resumed from step {saved['step']}")
        step, bad_batches = saved["step"], workdir / "bad_batches"
        skips = SkippedSteps(bad_batches, config.train.max_bad_steps, saved["skipped"], saved["skipped_in_a_row"])
        best_value = checkpoints.best_value(best)

        # ---- Data, update step, evaluation --------------------------------------------------------------------------
        num_steps, batch_size = config.train.num_steps, config.train.batch_size
        batch_sharding = partitioning.batch_sharding(mesh)
        own_rows = partitioning.local_rows(batch_sharding, batch_size)
        batches = sources.training_batches(config, vocabulary, start=step, rows=own_rows)
        train_step = jit_train_step(model, optimizer, schedule, config, mesh, shardings)
        whole = jax.jit(lambda params: params, out_shardings=partitioning.gathered(shardings["params"]))
        predictor = predict.Model(config, None, vocabulary, mesh)
        evaluation = evaluate.prepare(config, vocabulary, "dev", config.eval.num_examples)
        results = {}

        # ---- Loop ---------------------------------------------------------------------------------------------------
        with (
            contextlib.closing(batches),
            tensorboardX.SummaryWriter(str(workdir / "tensorboard"), purge_step=step or None, write_to_disk=first) as writer,
            tqdm(desc="train", total=num_steps, initial=step, unit="step", dynamic_ncols=True, disable=not first) as bar,
            stop_signals() as stop,
        ):
            logged_at, logged_step, stopped_by = time.monotonic(), step, None
            while stopped_by is None:
                # What a run resumes with was saved before its evaluation, which may have been cut short: done again.
                if step and (step % config.eval.every == 0 or step == num_steps):
                    trained = state.get("ema", state["params"])
                    predictor.params = whole(trained)
                    results = evaluation.run(predictor)
                    predictor.params = None
                    value = float(multihost_utils.broadcast_one_to_all(np.float64(evaluate.selection(results))))
                    for name, entry in results.items():
                        if entry == entry:  # nan: nothing in the split to measure it on
                            writer.add_scalar(f"dev/{name}", entry, step)
                    if first:
                        bar.write(f"step {step}: dev {evaluate.summary(results)}")
                    if best_value is None or value > best_value:
                        best_value = value
                        checkpoints.save(best, step, trained, {"value": value})
                    logged_at, logged_step = time.monotonic(), step
                if step == num_steps:
                    break

                rows = next(batches)
                batch = partitioning.shard_batch(rows, batch_sharding)
                with partitioning.activate(mesh, config.mesh.rules):
                    state, metrics = train_step(state, batch, step_key)
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
        say(f"{name}: saved step {step} in {workdir / 'checkpoints'}; the same command goes on from there")
        raise SystemExit(EXIT_CODES[stopped_by])
    return results


def main(argv):
    """The command."""
    logging.set_verbosity(logging.WARNING)  # Orbax and seqio tell of each step they take
    logging.get_absl_logger().addFilter(lambda record: not record.exc_info)  # and log the tracebacks of what they raise
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    with hosts.joined(preemptible=True):
        train(flags.FLAGS.config, flags.FLAGS.workdir)


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "The experiment: a file of configs/.")
    flags.DEFINE_string("workdir", None, "For checkpoints, logs, evaluations; a killed run resumes from it.")
    hosts.define_flags()
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main)
