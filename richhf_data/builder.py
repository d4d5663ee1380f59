"""TFDS builder `richhf`: joins RichHF records with the images and captions that they are about.

Beside the examples, the dataset's folder holds

  report.json      what was joined and what was left out (`report_table` prints it)
  prompts.json     {split: [[uid, prompt, labelled prompt], ...]}, so that prompts are read without the images
  constants.npz    `scores` float32[4], `heatmaps` float32[64, 64, 2]: the training split's means, both in [0, 1]
  references.json  a copy of the one beside the records, if there: {split: {row: {metric: value}}}
"""

import hashlib
import json
import pathlib
from collections.abc import Iterator

import cv2
import numpy as np

from richhf_data import images, keywords, records, schema
from richhf_data.tensorflow_cpu import tf, tfds

NAME, VERSION = "richhf", "1.0.0"
SPLITS = (*schema.SPLITS, "test_novel")
MEAN_MAP_SIZE = 64  # pixels
_NAMED = 5  # how many uids a report or an error names


def dataset_dir(data_dir) -> pathlib.Path:
    """The folder of the built dataset under `data_dir`."""
    return pathlib.Path(data_dir) / NAME / VERSION


class Richhf(tfds.core.GeneratorBasedBuilder):
    """RichHF examples: annotations, image and prompt.

    Args:
      data_dir: the dataset is written to data_dir/richhf/1.0.0.
      records: folder of `<split>.tfrecord` files; the splits are those of `SPLITS` that it holds.
      images: where images and captions come from, see images.py.
      max_missing_share: a split with a larger share of records without a usable image fails.
    """

    name = NAME
    VERSION = tfds.core.Version(VERSION)
    RELEASE_NOTES = {str(VERSION): "First version."}  # noqa: RUF012 - TFDS's interface
    code_path = pathlib.Path(__file__)  # TFDS 4.9.10 looks it up with importlib_resources, which it does not install

    def __init__(self, *, data_dir, records: str = "", images: str = "", max_missing_share: float = 0.01, **kwargs):
        self._records = pathlib.Path(records)
        self._images = images
        self._max_missing_share = max_missing_share
        self._report = {"splits": {}}
        self._prompts = {}
        self._constants = None
        super().__init__(data_dir=str(data_dir), **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text()
        return tfds.core.DatasetInfo(
            builder=self,
            description="Rich human feedback on generated images: four scores, two heatmaps, misaligned prompt words.",
            homepage="https://github.com/google-research-datasets/richhf-18k",
            features=tfds.features.FeaturesDict(
                {
                    "uid": text,
                    "prompt": text,
                    "image": tfds.features.Tensor(shape=(), dtype=tf.string),  # as it came: no second compression
                    "scores": tfds.features.Tensor(shape=(len(schema.SCORES),), dtype=tf.float32),
                    "heatmaps": tfds.features.Tensor(shape=(len(schema.HEATMAPS),), dtype=tf.string),
                    "labels": tfds.features.Sequence(tf.int32),
                    "labels_valid": tf.bool,
                    "labelled_prompt": text,  # empty where the labels do not match the prompt's tokens
                }
            ),
        )

    def _split_generators(self, dl_manager) -> dict:
        del dl_manager
        paths = record_paths(self._records)
        self._report |= {"records": digests(paths), "images": self._images}
        return {split: self._generate_examples(split, path) for split, path in paths.items()}

    def _generate_examples(self, split: str, path: pathlib.Path) -> Iterator[tuple[str, dict]]:
        position = {}  # uid -> record number
        for number, raw in enumerate(records.read_unchecked(path)):
            uid = records.uid_of(raw)
            if uid in position:
                raise ValueError(
                    f"records: {path}: uid {uid!r} is in record {position[uid]} and in {number}, expected it once; "
                    "remove one"
                )
            position[uid] = number
        if not position:
            raise ValueError(f"records: {path}: got no record for split {split!r}, expected some; remove or fill it")

        stored = records.RandomAccess([path])
        statistics = _Statistics()
        prompts, mismatches, undecodable = [], [], []
        num_records = len(position)
        for uid, prompt, image in images.find(self._images, position.keys()):
            number = position.pop(uid)
            if not _decodes(image):
                undecodable.append(uid)
                continue
            where = f"{path} record {number}"
            raw = records.parse(stored[number], where)
            example = records.decode(raw, where)
            tokens, labels = keywords.tokenize(prompt), example["labels"]
            valid = len(tokens) == len(labels)
            if not valid:
                mismatches.append(f"{uid} ({len(labels)} labels, {len(tokens)} tokens)")
            labelled = keywords.label_prompt(tokens, labels.tolist()) if valid else ""
            prompts.append([uid, prompt, labelled])
            statistics.add(example["scores"], example["heatmaps"])
            yield (
                uid,
                {
                    "uid": uid,
                    "prompt": prompt,
                    "image": image,
                    "scores": example["scores"],
                    "heatmaps": [raw[key] for key in schema.RAW_HEATMAPS.values()],
                    "labels": labels,
                    "labels_valid": valid,
                    "labelled_prompt": labelled,
                },
            )
        self._finish_split(split, num_records, sorted(position), undecodable, mismatches, statistics)
        self._prompts[split] = prompts

    def _finish_split(self, split, num_records, missing, undecodable, mismatches, statistics) -> None:
        lost = len(missing) + len(undecodable)
        if lost == num_records or lost > self._max_missing_share * num_records:
            raise ValueError(
                f"images: split {split!r}: {lost} of {num_records} records have no usable image "
                f"({len(missing)} missing{_some(missing)}; {len(undecodable)} do not decode{_some(undecodable)}), "
                f"expected at most a share of {self._max_missing_share:g} and at least one example; point --images "
                f"(now {self._images!r}) at all of them, or raise --max_missing_share"
            )
        self._report["splits"][split] = {
            "examples": num_records - lost,
            "published_examples": schema.PUBLISHED_COUNTS.get(split),
            "records": num_records,
            "images_missing": {"count": len(missing), "first": missing[:_NAMED]},
            "images_undecodable": {"count": len(undecodable), "first": undecodable[:_NAMED]},
            "label_mismatches": {"count": len(mismatches), "first": mismatches[:_NAMED]},
            **statistics.summary(),
        }
        if split == "train":
            self._constants = statistics.means()

    def _download_and_prepare(self, dl_manager, download_config) -> None:
        super()._download_and_prepare(dl_manager, download_config)
        # Still in TFDS's temporary folder: the dataset appears with all of these or not at all.
        folder = pathlib.Path(self.data_dir)
        (folder / "report.json").write_text(json.dumps(self._report, indent=2))
        (folder / "prompts.json").write_text(json.dumps(self._prompts))
        if self._constants is not None:
            np.savez(folder / "constants.npz", **self._constants)
        if (references := self._records / "references.json").is_file():
            (folder / "references.json").write_text(json.dumps(_read_references(references), indent=2))


class _Statistics:
    """Sums over a split, so that no example is kept."""

    def __init__(self):
        self._count = 0
        self._scores, self._squares = np.zeros(len(schema.SCORES)), np.zeros(len(schema.SCORES))
        self._empty = np.zeros(len(schema.HEATMAPS), int)
        self._maps = np.zeros((MEAN_MAP_SIZE, MEAN_MAP_SIZE, len(schema.HEATMAPS)))

    def add(self, scores: np.ndarray, heatmaps: np.ndarray) -> None:
        self._count += 1
        self._scores += scores
        self._squares += scores.astype(np.float64) ** 2
        small = cv2.resize(
            np.float32(heatmaps), (MEAN_MAP_SIZE, MEAN_MAP_SIZE), interpolation=cv2.INTER_AREA
        )
        self._empty += ~small.any(axis=(0, 1))
        self._maps += small / 255

    def means(self) -> dict[str, np.ndarray]:
        return {
            "scores": np.float32(self._scores / self._count),
            "heatmaps": np.float32(self._maps / self._count),
        }

    def summary(self) -> dict:
        mean = self._scores / self._count
        deviation = np.sqrt(np.maximum(self._squares / self._count - mean**2, 0))
        return {
            "score_mean": dict(zip(schema.SCORES, mean.tolist(), strict=True)),
            "score_std": dict(zip(schema.SCORES, deviation.tolist(), strict=True)),
            "empty_maps_share": dict(zip(schema.HEATMAPS, (self._empty / self._count).tolist(), strict=True)),
        }


def record_paths(folder) -> dict[str, pathlib.Path]:
    """The record file of each split that `folder` holds, in the order of `SPLITS`.

    Raises:
      ValueError: it holds none.
    """
    paths = {split: pathlib.Path(folder) / f"{split}.tfrecord" for split in SPLITS}
    present = {split: path for split, path in paths.items() if path.is_file()}
    if not present:
        names = ", ".join(path.name for path in paths.values())
        raise ValueError(f"records: {folder} holds none of {names}, expected at least one; see --records")
    return present


def digests(paths: dict[str, pathlib.Path]) -> dict[str, str]:
    """SHA-256 of each split's record file: tells whether a built dataset is of these records."""
    result = {}
    for split, path in paths.items():
        with open(path, "rb") as file:
            result[split] = hashlib.file_digest(file, "sha256").hexdigest()
    return result


def report_table(report: dict) -> str:
    """The report as text for a terminal: a row per split, then what was left out."""
    header = f"{'split':<11}{'examples':>9}{'published':>10}{'no image':>9}{'broken':>7}{'mismatch':>9}"
    header += "".join(f"{name[:12]:>14}" for name in schema.SCORES) + "   empty maps"
    lines, notes = [header], []
    for split, row in report["splits"].items():
        scores = "".join(f"{row['score_mean'][s]:>7.3f} ±{row['score_std'][s]:>5.3f}" for s in schema.SCORES)
        empty = ", ".join(f"{share:.1%} {name}" for name, share in row["empty_maps_share"].items())
        counts = [row[key]["count"] for key in ("images_missing", "images_undecodable", "label_mismatches")]
        lines.append(
            f"{split:<11}{row['examples']:>9}{row['published_examples'] or '-':>10}{counts[0]:>9}{counts[1]:>7}"
            f"{counts[2]:>9}{scores}   {empty}"
        )
        for key in ("images_missing", "images_undecodable", "label_mismatches"):
            if row[key]["count"]:
                notes.append(f"{split}: {row[key]['count']} {key.replace('_', ' ')}{_some(row[key]['first'])}")
    return "\n".join(lines + notes)


def _some(names: list[str]) -> str:
    return f", first {', '.join(names[:_NAMED])}" if names else ""


def _decodes(image: bytes) -> bool:
    """Whether the decoder that training uses can read the image."""
    try:
        tf.io.decode_image(image, channels=3, expand_animations=False)
    except tf.errors.InvalidArgumentError:
        return False
    return True


def _read_references(path: pathlib.Path) -> dict[str, dict[str, dict[str, float]]]:
    try:
        references = json.loads(path.read_text())
        return {
            split: {row: {metric: float(value) for metric, value in metrics.items()} for row, metrics in rows.items()}
            for split, rows in references.items()
        }
    except (json.JSONDecodeError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: got {error}, expected {{split: {{row: {{metric: number}}}}}}") from error
