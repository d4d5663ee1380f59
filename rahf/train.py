"""Trains RAHF, or a baseline: the whole story, from top to bottom.

    python -m rahf.train --config=rahf_synth_tiny --workdir=DIR [--config.key=value ...]

A run that was killed resumes from its last checkpoint when the same command is given again: the batches and the random
numbers of a step depend on the seed and the step alone. SIGTERM (exit code 75) and SIGINT (130) save before they end it.
"""

import dataclasses
import functools

import jax
import numpy as np
from absl import flags
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
    predictor,
    pretrained,
    sources,
    trackers,
    workdirs,
)
from rahf import program as programs
from rahf.models import critics
from rahf.models.resnet import STATISTICS
from richhf_data import command, ranges

# Of a config, for `experiments.check_ranges`; the model's own numbers are checked by `critics.config_of`.
RANGES = programs.RANGES | evaluate.RANGES | {
    "data.num_workers": ranges.NUMBER_OF_PROCESSES,
    "data.left_out.*": ranges.NUMBER,
    "data.captions": ranges.SHARE,
    "eval.every": ranges.COUNT,
    "train.loss_weights.*": ranges.WEIGHT,
    "train.marked_weight": ranges.WEIGHT,
    "train.word_weight": ranges.WEIGHT,
    "train.heatmap_loss": ranges.OneOf(losses.HEATMAP_LOSSES),
}
# What may differ when a run is resumed: nothing of this changes its result.
RESUME_MAY_DIFFER = (
    *workdirs.CONDUCT,
    "data.data_dir",  # data.json compares what the folder holds
    "data.vocabulary",
    "data.num_workers",
    "model.heatmap_head.remat",
    "model.heatmap_head.strips",
    "model.t5.remat",
    "model.vit.remat",
)


def check(config) -> None:
    """Refuses a value that is missing or out of its range: UserError."""
    critics.config_of(config.model.to_dict())
    experiments.check_ranges(config, RANGES)
    sources.check_captions(config)


def program(config) -> programs.Program:
    """RAHF or a baseline as a config says, to be assembled (program.py). Its loss without a key (None) has no dropout."""
    model_config = critics.config_of(config.model.to_dict())
    if "resnet" in config.optimizer.freeze:  # with its running statistics
        resnet = dataclasses.replace(model_config.resnet, frozen_norm=True)
        model_config = dataclasses.replace(model_config, resnet=resnet)
    model = critics.module_of(model_config)
    loss_weights, count_padding = config.train.loss_weights.to_dict(), config.train.count_padding
    heatmap_loss, word_weight = config.train.heatmap_loss, config.train.word_weight

    def init(key):
        return model.init(key, *critics.dummy_inputs(model_config, config.data.text_length))["params"]

    def loss(params, rows, normalisers, key):
        inputs = rows["image"], rows["text_ids"], rows["keyword_ids"]
        train, rngs = key is not None, {} if key is None else {"dropout": key}
        outputs, statistics = model.apply({"params": params}, *inputs, train=train, rngs=rngs, mutable=[STATISTICS])
        loss, metrics = losses.rahf_loss(
            outputs, rows, normalisers, loss_weights, count_padding, heatmap_loss, word_weight
        )
        return loss, metrics | statistics  # under the name STATISTICS, if the model has any

    return programs.Program(
        init=init,
        loss=loss,
        normalisers=functools.partial(losses.loss_normalisers, count_padding=count_padding),
        batch_shapes=functools.partial(sources.batch_shapes, config),
        remat=tuple(f"model.{part}.remat" for part in ("vit", "t5", "heatmap_head") if part in config.model),
    )


def train(config, workdir) -> dict[str, float]:
    """Runs `config` to its end in `workdir`; returns the last periodic evaluation's metrics.

    Raises:
      UserError: a config, dataset, vocabulary or weights that do not fit; a workdir of another run.
      SystemExit: as `loop.start`.
    """
    # ---- Model, mesh, training step ---------------------------------------------------------------------------------
    check(config)
    trackers.check(config)
    checkpoints.check_path(workdir)
    model_config = critics.config_of(config.model.to_dict())
    training = programs.assemble(program(config), config)

    # ---- Workdir, vocabulary, data ----------------------------------------------------------------------------------
    if jax.process_index() == 0 and workdirs.is_new(workdir):  # write nothing for weights or data that are not there
        pretrained.starting_tensors(config.init, training.params, model_config)
        sources.check_splits(config)
    data = sources.identity(config)
    workdir = workdirs.open_workdir(workdir, config, RESUME_MAY_DIFFER)
    vocabulary = sources.install_vocabulary(config, workdir)
    predictor.check_vocabulary(model_config, vocabulary, config.data.text_length)
    workdirs.record(workdir / "data.json", data | {"vocabulary": vocabulary.digest}, "data")
    print_run(workdir, training)

    def initialise():
        tensors = pretrained.starting_tensors(config.init, training.params, model_config)
        return pretrained.initialise(training.init_params(), tensors)

    batches_from = functools.partial(sources.training_batches, config, vocabulary, rows=training.own_rows)
    predict = predictor.Predictor(config, vocabulary, training.mesh)
    evaluation = evaluate.Evaluation(predict, "dev", config.eval.num_examples)

    # ---- Steps; evaluation, the best checkpoint ---------------------------------------------------------------------
    results = {}
    with (
        checkpoints.manager(workdir, "best") as best,
        loop.start(config, workdir, training, initialise, batches_from) as run,
    ):
        best_value = checkpoints.best_value(best, training.params)
        for step in run.steps():
            if not run.due(config.eval.every):
                continue
            results = evaluation.run(run.params)
            run.log("dev", results)
            run.print(f"step {step}: dev {evaluate.summary(results)}")
            value = float(multihost_utils.broadcast_one_to_all(np.float64(evaluate.selection(results))))
            if best_value is None or value > best_value:
                best_value = value
                about = {"value": value, "processor_seconds": run.processor_seconds}
                checkpoints.save(best, step, evaluate.calibrated(run.params, results), about)
    return results


def print_run(workdir, training: programs.Training) -> None:
    """Prints on process 0 what is trained, and where."""
    if jax.process_index() > 0:
        return
    devices = f"{jax.device_count()} {jax.devices()[0].platform} devices of {jax.process_count()} processes"
    params, freeze = jax.tree_util.tree_leaves_with_path(training.params), training.config.optimizer.freeze
    count = sum(leaf.size for path, leaf in params if not optimizers.is_frozen(path, freeze))
    sizes = " x ".join(f"{name} {size}" for name, size in partitioning.sizes(training.mesh).items())
    print(f"workdir {workdir}: {devices}, mesh {sizes}, {training.config.mesh.sharding}", flush=True)
    print(f"{count:,} parameters are trained", flush=True)


def main():
    """The command."""
    with hosts.joined(preemptible=True), hosts.locked(flags.FLAGS.workdir):
        train(flags.FLAGS.config, flags.FLAGS.workdir)


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "For checkpoints, logs, evaluations; a killed run resumes from it.")
    hosts.define_flags()
    flags.mark_flag_as_required("workdir")
    command.run(main, experiments.reader(kinds=("rahf",)))
