"""Trains RAHF: the whole story, from top to bottom.

    python -m rahf.train --config=configs/rahf_synth_tiny.py --workdir=DIR [--config.key=value ...]

A run that was killed goes on where its last checkpoint left it when the same command is given again: the batches and
the random numbers of a step are functions of the seed and the step alone. SIGTERM and SIGINT save before they end it.
How a step is taken, and what happens between steps, is in `rahf.loop`.
"""

import functools

import jax
import numpy as np
from absl import flags
from flax import linen as nn
from jax.experimental import multihost_utils

from rahf import (
    checkpoints,
    evaluate,
    experiments,
    hosts,
    loop,
    losses,
    optimizers,
    partitioning,
    predict,
    pretrained,
    sources,
)
from rahf.models import rahf as rahf_model
from richhf_data import command


def initial_state(model: rahf_model.RAHF, optimizer, config, key) -> dict:
    """`loop.initial_state` of fresh parameters."""
    image, text_ids, keyword_ids = rahf_model.dummy_inputs(model.config, config.data.text_length)
    return loop.initial_state(model.init(key, image, text_ids, keyword_ids)["params"], optimizer, config)


def make_train_step(model: rahf_model.RAHF, optimizer, schedule, config, mesh):
    """RAHF's update `(state, batch, key) -> (state, metrics)`, by `loop.make_train_step`."""
    loss_weights, count_padding = config.train.loss_weights.to_dict(), config.train.count_padding

    def loss_fn(params, rows, normalisers, key):
        inputs = rows["image"], rows["text_ids"], rows["keyword_ids"]
        outputs = model.apply({"params": params}, *inputs, train=True, rngs={"dropout": key})
        return losses.rahf_loss(outputs, rows, normalisers, loss_weights, count_padding)

    normalisers_of = functools.partial(losses.loss_normalisers, count_padding=count_padding)
    return loop.make_train_step(loss_fn, normalisers_of, optimizer, schedule, config, mesh)


def state_shardings(model, optimizer, config, mesh, key):
    """The training state as shapes (unboxed), and where each of its arrays lives."""
    return loop.state_shardings(jax.eval_shape(lambda key: initial_state(model, optimizer, config, key), key), config, mesh)


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
    loop.check_batch(config, mesh)

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

    def fresh():
        init = jax.jit(lambda key: nn.unbox(initial_state(model, optimizer, config, key)), out_shardings=shardings)
        state = init(init_key)
        tensors = pretrained.starting_tensors(config.init, abstract["params"], model_config)
        return state | {"params": pretrained.initialise(state["params"], tensors)}

    # ---- Data, update step, evaluation ------------------------------------------------------------------------------
    batch_sharding = partitioning.batch_sharding(mesh)
    own_rows = partitioning.local_rows(batch_sharding, config.train.batch_size)
    train_step = make_train_step(model, optimizer, schedule, config, mesh)
    train_step = loop.jit_train_step(train_step, mesh, shardings)
    whole = jax.jit(lambda params: params, out_shardings=partitioning.gathered(shardings["params"]))
    predictor = predict.Model(config, None, vocabulary, mesh)
    evaluation = evaluate.prepare(config, vocabulary, "dev", config.eval.num_examples)
    results = {}

    def update(state, rows):
        batch = partitioning.shard_batch(rows, batch_sharding)
        with partitioning.activate(mesh, config.mesh.rules):
            return train_step(state, batch, step_key)

    def look(step, state, writer, say):
        nonlocal best_value
        trained = state.get("ema", state["params"])
        predictor.params = whole(trained)
        results.update(evaluation.run(predictor))
        predictor.params = None
        value = float(multihost_utils.broadcast_one_to_all(np.float64(evaluate.selection(results))))
        for name, entry in results.items():
            if entry == entry:  # nan: nothing in the split to measure it on
                writer.add_scalar(f"dev/{name}", entry, step)
        say(f"step {step}: dev {evaluate.summary(results)}")
        if best_value is None or value > best_value:
            best_value = value
            checkpoints.save(best, step, trained, {"value": value})

    # ---- Loop -------------------------------------------------------------------------------------------------------
    batches_from = functools.partial(sources.training_batches, config, vocabulary, rows=own_rows)
    with checkpoints.manager(workdir, "best") as best:
        best_value = checkpoints.best_value(best)
        loop.run(config, workdir, abstract, shardings, fresh, batches_from, update, config.eval.every, look)
    return results


def main():
    """The command."""
    with hosts.joined(preemptible=True):
        train(flags.FLAGS.config, flags.FLAGS.workdir)


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "For checkpoints, logs, evaluations; a killed run resumes from it.")
    hosts.define_flags()
    flags.mark_flag_as_required("workdir")
    command.run(main, experiments.reader())
