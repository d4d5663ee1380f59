"""seqio tasks of built datasets, for all variants of the model.

The task features of an example, which `rahf.features.RAHFFeatureConverter` turns into the batch of schema.py:

  image uint8[S, S, 3]   text_ids int32[R, L]   targets int32[T]   scores float32[4]   score_mask bool[4]
  heatmaps uint8[h, h, 2]   heatmap_mask bool[2]

An example also has uid, prompt, labels, labels_valid and labelled_prompt, which the metrics need.
"""

import dataclasses
import functools
import json
import zipfile
import zlib
from collections.abc import Iterator

import numpy as np
from absl import logging
from etils import epath

from richhf_data import builder, metrics, paths, preprocessors, schema, vocabulary
from richhf_data.errors import UserError
from richhf_data.tensorflow_cpu import seqio, tf, tfds


@dataclasses.dataclass(frozen=True)
class RichhfTask:
    """A registered seqio task, and what it was made with; see `register`. Paths are absolute.

    Attributes:
      name: in seqio's registry.
    """

    name: str
    data_dir: str
    variant: str
    image_size: int
    heatmap_size: int
    text_length: int
    keyword_length: int
    vocabulary: str
    augment: bool
    truncate_long_prompts: bool
    unread: tuple[str, ...]

    @property
    def seqio_task(self) -> seqio.Task:
        """The task itself."""
        return seqio.TaskRegistry.get(self.name)

    def lengths(self) -> dict[str, int]:
        """The length of each task feature, as seqio's converters take them."""
        return {
            "image": self.image_size,
            "text_ids": self.text_length,
            "targets": self.keyword_length,
            "scores": len(schema.SCORES),
            "score_mask": len(schema.SCORES),
            "heatmaps": self.heatmap_size,
            "heatmap_mask": len(schema.HEATMAPS),
        }


def register(
    data_dir,
    *,
    variant: str = "multi_head",
    image_size: int = 224,
    heatmap_size: int = 224,
    text_length: int = 64,
    keyword_length: int = 64,
    vocabulary_path=None,
    augment: bool = False,
    truncate_long_prompts: bool = False,
    unread: tuple[str, ...] = (),
) -> RichhfTask:
    """Registers the seqio task of a built dataset. The same arguments give the same task again.

    Args:
      data_dir: as given to `richhf_data.build`.
      variant: one of `schema.VARIANTS`.
      image_size, heatmap_size: pixels, both sides.
      text_length, keyword_length: ids, the end id included, of a prompt and of a labelled prompt.
      vocabulary_path: a SentencePiece model, or a folder with CLIP's tokenizer; data_dir/vocabulary.model by default.
      augment: crop and colour as for training (preprocessors.py). A task that augments has no metrics.
      truncate_long_prompts: cut texts that are longer than their length, with a warning, instead of refusing them.
      unread: "text_length", "keyword_length", or both: of texts that the model does not read. Those are cut.

    Returns:
      The task; its name is `richhf_<variant>`, `_augment` if it augments, and a hash of the arguments.

    Raises:
      UserError: no dataset or vocabulary there, an unknown variant, or a text that is too long.
    """
    data_dir = paths.absolute(data_dir)
    schema.task_prompts("", variant)  # refuses an unknown variant
    dataset = builder.open_built(data_dir)
    path = paths.absolute(vocabulary_path or data_dir / "vocabulary.model")
    arguments = {
        "data_dir": str(data_dir),
        "variant": variant,
        "image_size": image_size,
        "heatmap_size": heatmap_size,
        "text_length": text_length,
        "keyword_length": keyword_length,
        "vocabulary": str(path),
        "augment": augment,
        "truncate_long_prompts": truncate_long_prompts,
        "unread": unread,
    }
    digest = zlib.crc32(json.dumps(arguments, sort_keys=True).encode())
    task = RichhfTask(f"richhf_{variant}{'_augment' if augment else ''}_{digest:08x}", **arguments)
    if task.name in seqio.TaskRegistry.names():
        return task

    texts = vocabulary.of(path)
    lengths = {"text_length": text_length, "keyword_length": keyword_length}
    checked = {name: length for name, length in lengths.items() if name not in unread}
    _check_lengths(dataset.folder, texts, variant, checked, truncate_long_prompts)
    of_text, of_keywords = (
        {
            "vocabulary": _seqio_vocabulary(dataset.folder, texts, length),
            "length": length,
            "truncate": truncate_long_prompts or name in unread,
        }
        for name, length in lengths.items()
    )
    steps = [
        preprocessors.decode,
        *([preprocessors.seed, preprocessors.crop] if augment else []),
        functools.partial(preprocessors.resize, image_size=image_size, heatmap_size=heatmap_size),
        *([preprocessors.colour] if augment else []),
        functools.partial(preprocessors.texts, variant=variant, **of_text),
        functools.partial(preprocessors.keyword_target, **of_keywords),
    ]
    seqio.TaskRegistry.add(
        task.name,
        source=BuiltSource(dataset),
        preprocessors=steps,
        output_features={
            "image": seqio.ContinuousFeature(rank=3, dtype=tf.uint8),
            "text_ids": seqio.Feature(of_text["vocabulary"], add_eos=False, rank=2),
            "targets": seqio.Feature(of_keywords["vocabulary"], add_eos=False),
            "scores": seqio.ContinuousFeature(rank=1, dtype=tf.float32),
            "score_mask": seqio.ContinuousFeature(rank=1, dtype=tf.bool),
            "heatmaps": seqio.ContinuousFeature(rank=3, dtype=tf.uint8),
            "heatmap_mask": seqio.ContinuousFeature(rank=1, dtype=tf.bool),
        },
        postprocess_fn=postprocess,
        metric_fns=[] if augment else [functools.partial(evaluate, written=texts.written)],
    )
    return task


def postprocess(text: str, *, example: dict, is_target: bool) -> dict | str:
    """The true annotations of a task example, for `evaluate`; returns the text of a prediction unchanged.

    Returns:
      `scores` float32[4], `score_mask` bool[4], `heatmaps` uint8[h, h, 2], `heatmap_mask` bool[2], `prompt` str,
      `labels` list of int, or None without labels that match the prompt's tokens, `caption` str, or None if the decoder's
      target is not a caption, `uid` str.
    """
    if not is_target:
        return text
    written = example["labelled_prompt"].decode()
    return {
        **{key: np.asarray(example[key]) for key in ("scores", "score_mask", "heatmaps", "heatmap_mask")},
        "prompt": example["prompt"].decode(),
        "labels": np.asarray(example["labels"]).tolist() if example["labels_valid"] else None,
        "caption": written if written and not example["labels_valid"] else None,
        "uid": example["uid"].decode(),
    }


def evaluate(targets, predictions, aux_values, written=str) -> dict[str, float]:
    """seqio metric function: every metric of `metrics.evaluate`.

    Args:
      targets: what `postprocess` returns.
      predictions: labelled prompts, str, which seqio decoded.
      aux_values: `scores` n times float32[4] and `heatmaps` n times float32[h, h, 2], both in [0, 1]. `labelled_prompt`, n
        times str, takes the place of `predictions` where it is given; there may be `deviations`. None for what is not
        predicted.
      written: as in `metrics.evaluate`.
    """
    values = {"labelled_prompt": predictions} | aux_values
    rows = zip(*values.values(), strict=True)
    return metrics.evaluate(targets, [dict(zip(values, row, strict=True)) for row in rows], written)


def report(data_dir) -> dict:
    """The report of the build (see builder.py)."""
    return builder.read_report(_built(data_dir))


def references(data_dir) -> dict[str, dict[str, dict[str, float]]]:
    """Rows to print beside a result, {split: {row: {metric: value}}}; empty if the records have no references."""
    path = _built(data_dir) / "references.json"
    return builder.read_references(path) if path.is_file() else {}


def constants(data_dir) -> dict[str, np.ndarray] | None:
    """The means of the training split, which the constant predictor predicts; None without a training split.

    Returns:
      `scores` float32[4] and `heatmaps` float32[64, 64, 2], both in [0, 1]; nan if no example has the target.

    Raises:
      UserError: no dataset, or the file is damaged.
    """
    path = _built(data_dir) / "constants.npz"
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as arrays:
            found = {key: arrays[key] for key in ("scores", "heatmaps")}
        shapes = {"scores": (len(schema.SCORES),), "heatmaps": (*[builder.MEAN_MAP_SIZE] * 2, len(schema.HEATMAPS))}
        for key, array in found.items():
            if array.dtype != np.float32 or array.shape != shapes[key] or (array < 0).any() or (array > 1).any():
                raise ValueError(f"{key}: {array.dtype}{list(array.shape)}")
        return found
    except (TypeError, ValueError, LookupError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"data_dir: {path}: damaged ({error}), expected what a build writes; copy it again") from error


def prompts(data_dir) -> dict[str, list[tuple[str, str, str]]]:
    """{split: [(uid, prompt, labelled prompt), ...]}, read without the images; a missing labelled prompt is ''."""
    return builder.read_prompts(_built(data_dir))


def decoded(data_dir, split: str, limit: int | None = None) -> tuple[Iterator[dict], int]:
    """The examples of a split at their stored sizes, the first `limit` if given; and their number.

    Returns:
      `uid` str, `prompt` str, `image` uint8[H, W, 3], `scores` float32[4], `heatmaps` uint8[512, 512, 2], `score_mask`,
      `heatmap_mask`, `labels` and `caption` as `postprocess` gives them.

    Raises:
      UserError: no dataset or no such split there.
    """
    dataset = builder.open_built(data_dir)
    splits = dataset.info.splits
    if split not in splits:
        raise UserError(f"split: got {split!r}, expected one of the dataset's: {', '.join(splits)}")
    dataset.check(split)
    count = splits[split].num_examples if limit is None else min(limit, splits[split].num_examples)
    once = tfds.ReadConfig(try_autocache=False)
    examples = preprocessors.decode(dataset.as_dataset(split=split, read_config=once).take(count))

    def items():
        with builder.named(dataset.folder):
            for example in examples.as_numpy_iterator():
                yield postprocess("", example=example, is_target=True) | {"image": example["image"]}

    return items(), count


class BuiltSource(seqio.DataSource):
    """The examples of a built dataset, as seqio's own source of TFDS datasets reads them.

    Attributes:
      dataset: a `builder.Richhf` of `builder.open_built`.
    """

    def __init__(self, dataset: builder.Richhf):
        self.dataset = dataset
        sizes = {split: info.num_examples for split, info in dataset.info.splits.items()}
        super().__init__(splits=sizes, num_input_examples=sizes)

    @property
    def supports_arbitrary_sharding(self) -> bool:
        return False

    def list_shards(self, split: str) -> list[str]:
        return [str(path) for path in self.dataset.info.splits[split].filepaths]

    def get_dataset(self, split: str, shuffle: bool = True, seed: int | None = None, shard_info=None, **unused):
        """See seqio. Raises UserError as `builder.Richhf.verify`."""
        del unused
        self.dataset.verify(split)
        read = tfds.ReadConfig(shuffle_seed=seed, skip_prefetch=True)
        if shard_info:
            read.input_context = tf.distribute.InputContext(shard_info.num_shards, shard_info.index)
        return self.dataset.as_dataset(split=split, shuffle_files=shuffle, read_config=read)


def _seqio_vocabulary(folder, texts: vocabulary.Vocabulary | vocabulary.CLIPVocabulary, length: int) -> seqio.Vocabulary:
    if isinstance(texts, vocabulary.Vocabulary):
        return preprocessors.SeqioVocabulary(texts.path)
    known = {text for rows in builder.read_prompts(folder).values() for _, *both in rows for text in both}
    return preprocessors.TextTable(texts, sorted(known), length)


def _built(data_dir) -> epath.Path:
    return builder.open_built(data_dir).folder


def _check_lengths(folder, pieces: vocabulary.Vocabulary, variant, limits, truncate) -> None:
    """Refuses texts that are too long, or logs them if they are to be truncated; logs texts with unknown characters.

    limits: the lengths that are read, by their names.
    """
    too_long, unknown = {key: [] for key in limits}, []
    for rows in builder.read_prompts(folder).values():
        for uid, prompt, labelled in rows:
            if not pieces.knows(f"{prompt} {labelled}"):
                unknown.append(uid)
            needed = max(map(pieces.num_ids, schema.task_prompts(prompt, variant)))
            for key, count in (("text_length", needed), ("keyword_length", pieces.num_ids(labelled))):
                if key in limits and count > limits[key]:
                    too_long[key].append((count, uid))
    if unknown:
        logging.warning(
            "%s: %d examples, the first %r, have characters that %s does not know, which are lost; was it made for them?",
            folder,
            len(unknown),
            unknown[0],
            pieces.path,
        )
    for key, found in too_long.items():
        if not found:
            continue
        needed, uid = max(found)
        message = (
            f"{key}: got {limits[key]}, but {len(found)} texts of {folder} take more ids, the longest {needed} with its end "
            f"id (uid {uid!r})"
        )
        if not truncate:
            raise UserError(f"{message}; expected {key} >= {needed}, or truncate_long_prompts")
        logging.warning("%s: their last pieces are cut", message)
