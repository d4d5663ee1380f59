"""From seqio tasks to the batches of `richhf_data.schema`: feature converter, training batches, evaluator."""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

import numpy as np

from richhf_data import builder, tasks
from richhf_data.errors import UserError
from richhf_data.tensorflow_cpu import seqio, tf

_Spec = seqio.FeatureConverter.FeatureSpec
_PERIOD = 10_000  # rows after which the order of a mixture's datasets repeats


class RAHFFeatureConverter(seqio.FeatureConverter):
    """Task features to the model's: renames `targets` to `keyword_ids` and drops what only the metrics need.

    The features have their final shapes and types (images and maps are uint8; the device makes floats of them), so this
    checks names, types, ranks and lengths, and pads and packs nothing.
    """

    MODEL_FEATURES: ClassVar = {
        "image": _Spec(tf.uint8, rank=3),
        "text_ids": _Spec(tf.int32, rank=2, sequence_dim=1),
        "keyword_ids": _Spec(tf.int32),
        "scores": _Spec(tf.float32),
        "score_mask": _Spec(tf.bool),
        "heatmaps": _Spec(tf.uint8, rank=3),
        "heatmap_mask": _Spec(tf.bool),
    }
    TASK_FEATURES: ClassVar = {"targets" if name == "keyword_ids" else name: spec for name, spec in MODEL_FEATURES.items()}
    PACKING_FEATURE_DTYPES = None

    def __init__(self, pack: bool = False, use_custom_packing_ops: bool = False):
        """`pack` and `use_custom_packing_ops` are T5X's. UserError if either is True."""
        if pack or use_custom_packing_ops:
            raise UserError("DatasetConfig.pack: got True, expected False: a row of a batch has one image")
        super().__init__(pack=False)

    def _convert_features(self, ds: tf.data.Dataset, task_feature_lengths: Mapping[str, int]) -> tf.data.Dataset:
        def convert(example):
            model = {self._model_name(key): example[key] for key in self.TASK_FEATURES}
            return {key: _with_length(value, self.MODEL_FEATURES[key], lengths[key]) for key, value in model.items()}

        lengths = self.get_model_feature_lengths(task_feature_lengths)
        return ds.map(convert, num_parallel_calls=tf.data.AUTOTUNE)

    def get_model_feature_lengths(self, task_feature_lengths: Mapping[str, int]) -> Mapping[str, int]:
        return {self._model_name(key): length for key, length in task_feature_lengths.items()}

    @staticmethod
    def _model_name(key: str) -> str:
        return "keyword_ids" if key == "targets" else key


def _with_length(value: tf.Tensor, spec, length: int) -> tf.Tensor:
    shape = value.shape.as_list()
    shape[spec.sequence_dim] = length
    return tf.ensure_shape(value, shape)


def evaluator(task: tasks.RichhfTask, split: str, num_examples: int | None = None) -> seqio.Evaluator:
    """seqio's Evaluator of a task: each example of the split once, in a fixed order, the first `num_examples` if given.

    Its `cached_model_datasets[task.name]` yields (index, features of one example as in schema.py). To evaluate:

      future, _ = evaluator.evaluate(compute_metrics=True, predict_with_aux_fn=predict)
      metrics = future.result()[task.name]    # {"score/plcc/plausibility": ...}

    where `predict(dataset, model_feature_shapes=None)` returns

      [(index, keyword ids int[T]), ...], {"scores": [float32[4], ...], "heatmaps": [float32[h, h, 2], ...]}

    with values in [0, 1]; the three lists in the same order, whichever it is; each index once and no padding row.

    Raises:
      UserError: no such split, or a task without metrics, of which seqio would silently evaluate nothing.
    """
    if not task.seqio_task.metric_fns:
        raise UserError(f"task {task.name!r} has no metric functions, expected some; register it with augment=False")
    _check_split(task, split)
    with builder.named(task.seqio_task.source.dataset.folder):
        return seqio.Evaluator(
            task.name,
            RAHFFeatureConverter(),
            eval_split=split,
            num_examples=num_examples,
            async_compute_metrics=False,
        )


def targets(evaluator: seqio.Evaluator, task: tasks.RichhfTask) -> list[dict]:
    """The true annotations (`tasks.postprocess`) of the evaluator's examples, in the order of their indices."""
    examples = evaluator.cached_task_datasets[task.name].as_numpy_iterator()
    return [tasks.postprocess("", example=example, is_target=True) for example in examples]


def training_batches(
    mixture: tasks.RichhfTask | Mapping[tasks.RichhfTask, float],
    batch_size: int,
    seed: int,
    start_step: int = 0,
    *,
    split: str = "train",
    rows: Sequence[int] | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Endless batches of schema.py. Each epoch has every example of the split once, in a new order.

    In a mixture each dataset has its own epochs, and its share of the rows is its rate (to a precision of 1 / 10,000),
    spread evenly over the stream.

    The batch of a step, with its augmentation, depends on the tasks, `batch_size`, `seed` and the step alone. A run that
    resumes at `start_step` reads the same batches as one without interruption, and nothing before them.

    Args:
      mixture: a task; or {task: how often, relative to the others, an example is drawn from it}.
      batch_size: rows of the global batch.
      start_step: the step of the first batch that is yielded.
      rows: which rows of each global batch are read and yielded, in this order; all by default.

    Raises:
      UserError: no such split; `rows` are not of the batch; no task; a rate that is not above 0, or below 1 / 10,000 of
        all; or tasks that differ in shapes, augmentation or vocabulary.
    """
    rows = np.arange(batch_size) if rows is None else np.asarray(rows, np.int64)
    if not len(rows) or rows.min() < 0 or rows.max() >= batch_size:
        raise UserError(f"rows: got {rows.tolist()} of a batch of {batch_size}, expected some of 0 to {batch_size - 1}")
    rates = mixture if isinstance(mixture, Mapping) else {mixture: 1.0}
    _check_mixture(rates)
    for task in rates:
        _check_split(task, split)
    pattern, sources = _Pattern.of(list(rates.values())), [task.seqio_task for task in rates]
    folders = ", ".join(str(source.source.dataset.folder) for source in sources)
    with builder.named(folders):
        dataset = _shuffled_examples(sources, pattern, split, seed, start_step, batch_size, rows)
    first = next(iter(rates))  # the tasks differ in their data alone: all have the first one's preprocessors
    dataset = first.seqio_task.preprocess_postcache(dataset, sequence_length=None, seed=seed)
    dataset = RAHFFeatureConverter()(dataset, first.lengths())
    dataset = dataset.batch(len(rows), drop_remainder=True).prefetch(2)

    def batches():
        with builder.named(folders):
            yield from dataset.as_numpy_iterator()

    return batches()


@dataclasses.dataclass(frozen=True)
class _Pattern:
    """Which dataset each row of the global stream is of, and which of that dataset's rows; repeats after `len(which)`.

    which: int64[P], the dataset. before: int64[P], the rows of that dataset before this one. totals: int64[K], the rows of
    each dataset in all.
    """

    which: np.ndarray
    before: np.ndarray
    totals: np.ndarray

    @classmethod
    def of(cls, rates: Sequence[float]) -> "_Pattern":
        """Each row goes to the dataset that lags most behind its rate."""
        shares = np.asarray(rates, np.float64) / np.sum(rates)
        period = _PERIOD if len(rates) > 1 else 1
        which, before, totals = np.zeros(period, np.int64), np.zeros(period, np.int64), np.zeros(len(rates), np.int64)
        for row in range(period):
            which[row] = np.argmax((row + 1) * shares - totals)
            before[row] = totals[which[row]]
            totals[which[row]] += 1
        if not totals.all():
            raise UserError(f"mixture: got a rate of {shares.min():g} of all, expected at least 1 / {_PERIOD:,}")
        return cls(which, before, totals)

    def place(self, position):
        """(dataset, place in that dataset's own stream) of a row of the global stream; int64 tensors."""
        repeat, row = position // len(self.which), position % len(self.which)
        dataset = tf.gather(self.which, row)
        return dataset, repeat * tf.gather(self.totals, dataset) + tf.gather(self.before, row)


def _shuffled_examples(
    mixed: Sequence[seqio.Task],
    pattern: _Pattern,
    split: str,
    seed: int,
    start_step: int,
    batch_size: int,
    rows: np.ndarray,
) -> tf.data.Dataset:
    """The tasks' stored examples, over and over, from a step on, each with its `seed`.

    They are kept in memory as they are stored (2 to 3 GB for RichHF-18K), so that any place of the stream costs the
    same. No Python runs inside: with tf.numpy_function here, some programs printed their last line and never ended.
    """
    for task in mixed:
        task.source.dataset.verify(split)
    infos = [task.source.dataset.info for task in mixed]
    sizes = np.asarray([info.splits[split].num_examples for info in infos], np.int64)
    files = tf.data.TFRecordDataset([path for info in infos for path in info.splits[split].filepaths])
    stored = files.batch(sizes.sum(), drop_remainder=True).get_single_element()  # string[all]
    starts = np.cumsum(sizes) - sizes
    base = tf.constant([seed & 0x7FFFFFFF, seed >> 31], tf.int64)

    def load(number):
        position = number // len(rows) * batch_size + tf.gather(rows, number % len(rows))  # in the global stream
        dataset, place = pattern.place(position)
        size = tf.gather(sizes, dataset)
        order = tf.cast(_fold(_fold(base, 2 * dataset), place // size), tf.int32)  # of the dataset's epoch
        index = tf.gather(starts, dataset) + tf.random.experimental.index_shuffle(place % size, order, size - 1)
        example = infos[0].features.deserialize_example(stored[index])
        return example | {"seed": tf.cast(_fold(_fold(base, 1), position), tf.int32)}

    numbers = tf.data.Dataset.range(start_step * len(rows), np.iinfo(np.int64).max)
    return numbers.map(load, num_parallel_calls=tf.data.AUTOTUNE)


def _fold(seed: tf.Tensor, number) -> tf.Tensor:
    """int64[2], not negative, from the seed and a number."""
    return tf.bitwise.bitwise_and(tf.random.fold_in(seed, number), 0x7FFFFFFF)


def _check_mixture(rates: Mapping[tasks.RichhfTask, float]) -> None:
    if not rates:
        raise UserError("mixture: got no task, expected at least one")
    first = dataclasses.asdict(next(iter(rates)))
    for task, rate in rates.items():
        if not 0 < rate < math.inf:
            raise UserError(f"mixture: got rate {rate} of task {task.name!r}, expected a number above 0; leave the task out")
        for key, value in dataclasses.asdict(task).items():
            if key not in ("name", "data_dir") and value != first[key]:
                expected = f"that of {first['name']!r}, {first[key]!r}"
                raise UserError(f"mixture: task {task.name!r} has {key} {value!r}, expected {expected}")


def _check_split(task: tasks.RichhfTask, split: str) -> None:
    if split not in (splits := task.seqio_task.splits):
        raise UserError(f"split: got {split!r}, expected one of the dataset's: {', '.join(splits)}")
