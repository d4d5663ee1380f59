"""RAHF in T5X: its trainer, evaluator and inference run our model, losses and data (docs/t5x.md).

    python -m t5x.train --gin_file=configs/t5x/finetune.gin --gin_file=configs/t5x/tiny.gin \\
        --gin.MODEL_DIR="'run'" --gin.DATA_DIR="'data/richhf'"

T5X is on no package index: docs/t5x.md says how to install it. The gin files name what is here. A run's config is one of
RAHF's (experiments.py); T5X's own settings are those of its gin files. The model directory also holds the config and the
vocabulary, as a workdir does, so that `rahf.convert --source=t5x-rahf` can read a checkpoint.
"""

import contextlib
import json
import os
import re
import types
from collections.abc import Callable, Mapping
from typing import Any

import flax.core
import flax.traverse_util
import jax
import numpy as np
from etils import epath
from flax import linen as nn
from flax.linen.partitioning import AxisMetadata
from ml_collections import ConfigDict

from rahf import experiments, losses, optimizers, partitioning, predictor, pretrained, sources, train, workdirs
from rahf.models import critics
from richhf_data.errors import UserError

try:
    import clu.metrics
    from clu.data import dataset_iterator
    from t5x import gin_utils, metrics, models, utils
    from t5x.optimizers import OptaxWrapper

    from rahf import features
    from richhf_data import preprocessors
except ImportError as error:
    raise UserError(f"t5x: cannot be imported ({error}); docs/t5x.md says how to install it") from error

Array = jax.Array
NONE = types.MappingProxyType({})
# What T5X's trainer does not do, and the value that says so.
FIXED = {
    "model.architecture": "rahf",
    "model.word_head": False,
    "data.decoding": "free",
    "optimizer.kind": "adamw",  # T5X knows how to divide the state of this one
    "optimizer.freeze": (),
    "optimizer.ema_decay": 0.0,
    "train.accumulation_steps": 1,  # Trainer.num_microbatches
    "train.marked_weight": 1.0,
}


# ---- The config -----------------------------------------------------------------------------------------------------


def config(
    name: str,
    num_steps: int,
    batch_size: int,
    seed: int = 0,
    data_dir: str = "",
    defaults: Mapping[str, Any] = NONE,
    overrides: Mapping[str, Any] = NONE,
) -> ConfigDict:
    """One of RAHF's configs, for T5X's trainer.

    Args:
      name: of a config, or a file. num_steps, batch_size, seed: T5X's `total_steps`, batch size and `random_seed`.
      data_dir: the dataset. defaults, overrides: {"init.vit": "vit"} and such, a gin file's and the user's.

    Raises:
      UserError: no such config or key; a value that is out of its range or that T5X's trainer does not have.
    """
    values = {"train.num_steps": num_steps, "train.batch_size": batch_size, "seed": seed, "data.data_dir": data_dir}
    values |= dict(defaults) | dict(overrides)
    return _overridden(experiments.load(name), values)


def config_of(checkpoint: str, data_dir: str = "", overrides: Mapping[str, Any] = NONE) -> ConfigDict:
    """The config of a T5X checkpoint of RAHF, as `summarize_config` wrote it, with the vocabulary of its model directory.

    Args:
      checkpoint: MODEL_DIR/checkpoint_N. data_dir: the config's by default. overrides: as for `config`.
    """
    model_dir = epath.Path(checkpoint).parent
    found = workdirs.read_config(model_dir).unlock()
    values = {"data.vocabulary": str(model_dir / "vocabulary.model")} | ({"data.data_dir": data_dir} if data_dir else {})
    return _overridden(found, values | dict(overrides))


def _overridden(found: ConfigDict, values: Mapping[str, Any]) -> ConfigDict:
    for key in values:
        experiments.check_key(found, key)
    try:
        found.update_from_flattened_dict(values)
    except (TypeError, ValueError) as error:
        raise UserError(f"overrides: got {dict(values)!r}, expected values of the config's types: {error}") from error
    train.check(found)
    for key, expected in FIXED.items():
        section, _, name = key.rpartition(".")
        if (value := found[section][name]) != expected:
            raise UserError(f"{key}: got {value!r}, expected {expected!r} in T5X (docs/t5x.md); set it in OVERRIDES")
    return found.lock()


def summarize_config(model_dir: str, summary_writer, step: int, *, config: ConfigDict) -> None:
    """T5X's summary of the gin config, and our config and vocabulary, as they are in a workdir.

    Raises:
      UserError: the model directory holds a run with another config.
    """
    workdir = workdirs.open_workdir(model_dir, config, train.RESUME_MAY_DIFFER)
    sources.install_vocabulary(config, workdir)
    gin_utils.summarize_gin_config(model_dir, summary_writer, step)


# ---- Data -----------------------------------------------------------------------------------------------------------


def task(config: ConfigDict) -> str:
    """The name of the seqio task of the config's dataset, without augmentation: to evaluate, and to infer."""
    return sources.register_task(config, sources.given_vocabulary(config), augment=False).name


def task_lengths(config: ConfigDict) -> dict[str, int]:
    """The length of each feature of that task."""
    return sources.register_task(config, sources.given_vocabulary(config), augment=False).lengths()


def training_batches(
    cfg, shard_id: int, num_shards: int, *unused, config: ConfigDict, model_dir: str, **unused_options
) -> "Batches":
    """T5X's `get_dataset_fn`: the batches of `rahf.train`.

    Args:
      cfg: a `utils.DatasetConfig`, of which the batch size is read. model_dir: of the run.
    """
    del unused, unused_options
    if cfg.batch_size != config.train.batch_size:
        raise UserError(f"DatasetConfig.batch_size: got {cfg.batch_size}, expected the config's {config.train.batch_size}")
    rows = np.arange(cfg.batch_size).reshape(num_shards, -1)[shard_id]
    return Batches(config, rows, model_dir)


class Batches(dataset_iterator.DatasetIterator):
    """The batches of `rahf.train`: those of a step depend on the seed and the step alone.

    So a checkpoint's step is all that a resumed run needs. T5X reads one batch ahead before its first checkpoint, and the
    file that `save` writes cannot know: the step is that of the checkpoint's folder. After a checkpoint of another run,
    which T5X restores too, it is 0.

    Args:
      rows: which rows of each global batch this process reads.
    """

    def __init__(self, config: ConfigDict, rows: np.ndarray, model_dir: str):
        self._config, self._rows, self._model_dir = config, rows, _real(model_dir)
        self._vocabulary = sources.given_vocabulary(config)
        self._batches = None
        self._begin(0)

    def _begin(self, step: int) -> None:
        with contextlib.suppress(AttributeError):
            self._batches.close()
        self._batches = sources.training_batches(self._config, self._vocabulary, step, rows=self._rows)

    def __next__(self) -> dict[str, np.ndarray]:
        return next(self._batches)

    def reset(self) -> None:
        self._begin(0)

    @property
    def element_spec(self) -> dict[str, dataset_iterator.ArraySpec]:
        shapes = sources.batch_shapes(self._config, len(self._rows))
        return {name: dataset_iterator.ArraySpec(np.dtype(dtype), shape) for name, (shape, dtype) in shapes.items()}

    def save(self, filename) -> None:
        epath.Path(filename).write_text(json.dumps({"seed": self._config.seed}))

    def restore(self, filename) -> None:
        folder, step = re.match(r"(.*)/checkpoint_(\d+)/", os.fspath(filename)).groups()
        self._begin(int(step) if _real(folder) == self._model_dir else 0)


def _real(folder) -> str:
    """One name for a local folder, whatever links lead there; a URL without a last slash."""
    return os.path.realpath(folder) if "://" not in os.fspath(folder) else os.fspath(folder).rstrip("/")


# ---- The model ------------------------------------------------------------------------------------------------------


def axis_rules() -> tuple[tuple[str, str], ...]:
    """What the mesh axis `model` divides, for `additional_rules` of T5X's own: our convolutions' and heads' axes."""
    return tuple((axis, place) for axis, place in partitioning.RULES if place == "model")


def optimizer(config: ConfigDict) -> OptaxWrapper:
    """The optimiser of `rahf.train`. It has its own schedule: T5X's learning rate is not read."""
    return OptaxWrapper(optimizers.make_optimizer(config.optimizer, config.train.num_steps))


def learning_rate(config: ConfigDict) -> Callable[[Array], Array]:
    """Step -> the learning rate of `optimizer`, for T5X's summaries."""
    return optimizers.make_schedule(config.optimizer, config.train.num_steps)


class RAHFModel(models.BaseTransformerModel):
    """RAHF for T5X. The forward pass, the losses and the data's converter are ours.

    Args:
      config: of `config`. optimizer_def: `optimizer` by default.
      num_microbatches: T5X's, which adds up their gradients: each loss is divided by it.
    """

    FEATURE_CONVERTER_CLS = features.RAHFFeatureConverter

    def __init__(self, config: ConfigDict, optimizer_def=None, num_microbatches: int | None = None):
        self.config, self.model_config = config, critics.config_of(config.model.to_dict())
        self._loss, self._parts = train.program(config).loss, num_microbatches or 1
        found = sources.given_vocabulary(config)
        predictor.check_vocabulary(self.model_config, found, config.data.text_length)
        vocabulary = preprocessors.SeqioVocabulary(found.path)
        super().__init__(
            module=critics.module_of(self.model_config),
            input_vocabulary=vocabulary,
            output_vocabulary=vocabulary,
            optimizer_def=optimizer_def or optimizer(config),
        )

    def get_initial_variables(self, rng, input_shapes, input_types=None):
        """`params`, and `params_axes`: their logical axes in T5X's form. The shapes of a batch change no parameter's."""
        del input_shapes, input_types
        boxed = self.module.init(rng, *critics.dummy_inputs(self.model_config, self.config.data.text_length))["params"]
        axes = flax.traverse_util.flatten_dict(nn.get_partition_spec(boxed))
        axes = {(*path[:-1], f"{path[-1]}_axes"): AxisMetadata(tuple(spec)) for path, spec in axes.items()}
        return flax.core.freeze({"params": nn.unbox(boxed), "params_axes": flax.traverse_util.unflatten_dict(axes)})

    def loss_fn(self, params, batch, dropout_rng):
        """`losses.rahf_loss` of the batch, and its metrics. No dropout without a key."""
        normalisers = losses.loss_normalisers(batch, self.config.train.count_padding)
        # As rahf.train folds in the number of the microbatch: of one, dropout is the same.
        key = None if dropout_rng is None else jax.random.fold_in(dropout_rng, 0)
        with partitioning.forcing_attention("plain"):  # XLA cannot divide the other forms over T5X's mesh by itself
            loss, found = self._loss(params, batch, normalisers, key)
        loss, rows = loss / self._parts, len(batch["scores"])
        return loss, {
            "loss": metrics.AveragePerStep(total=loss),
            **{name: _average(value, normalisers[_target(name)]) for name, value in found.items() if name != "loss"},
            "timing/seqs_per_second": metrics.TimeRate.from_model_output(numerator=rows),
            "timing/steps_per_second": metrics.StepsPerTime.from_model_output(),
        }

    def predict_batch_with_aux(self, params, batch, rng=None):
        """Keyword ids int32[B, T]; `scores` float32[B, 4], `heatmaps` float32[B, h, w, 2], `deviations` if it has them."""
        del rng
        inputs, length = (batch["image"], batch["text_ids"]), self.config.data.keyword_length
        with partitioning.forcing_attention("plain"):
            found = self.module.apply({"params": params}, *inputs, length, method=self.module.predict)
        scores, heatmaps, ids, *deviations = found
        return ids, {"scores": scores, "heatmaps": heatmaps} | ({"deviations": deviations[0]} if deviations else {})

    def score_batch(self, params, batch, return_intermediates=False):
        """float32[B]: the log-likelihood of `keyword_ids`."""
        if return_intermediates:
            raise UserError("score_batch: got return_intermediates=True, expected False: the model keeps none")

        def score(logits, targets):
            return -losses.keyword_loss_sum(logits[None], targets[None], self.config.train.count_padding)[0]

        return jax.vmap(score)(self._compute_logits(params, batch), batch["keyword_ids"])

    def _compute_logits(self, params, batch, dropout_rng=None):
        inputs, rngs = (batch["image"], batch["text_ids"], batch["keyword_ids"]), {}
        if dropout_rng is not None:
            rngs = {"dropout": dropout_rng}
        with partitioning.forcing_attention("plain"):
            outputs = self.module.apply({"params": params}, *inputs, train=bool(rngs), rngs=rngs)
        return outputs.keyword_logits


def _target(metric: str) -> str:
    """The normaliser of a metric of `losses.rahf_loss`."""
    return {"loss_deviation": "score", "keyword_accuracy": "keyword"}.get(metric, metric.removeprefix("loss_"))


def _average(value: Array, count: Array) -> clu.metrics.Average:
    """A mean over targets, which counts as they do when it is merged with those of other batches."""
    return clu.metrics.Average(total=value * count, count=count)


class Initializer(utils.TrainStateInitializer):
    """T5X's, whose start from scratch has the weights of the config's section `init`: folders that rahf.convert wrote."""

    def __init__(self, *, init_fn: Callable, **options):
        super().__init__(init_fn=init_fn, **options)
        self._model = init_fn.__self__

    def from_scratch(self, init_rng):
        state = super().from_scratch(init_rng)
        params = flax.core.unfreeze(state.params)
        tensors = pretrained.starting_tensors(self._model.config.init, params, self._model.model_config)
        return state.replace_params(flax.core.freeze(pretrained.initialise(params, tensors))) if tensors else state
