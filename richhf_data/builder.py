"""TFDS builder `richhf`: the one dataset format for every kind of feedback, from which models are trained.

The examples come from a source (example_source.py): `RecordFiles` here, which joins RichHF records with images, or one of
tables.py. Beside the examples, the folder of the dataset holds

  report.json      what was joined and what was left out (`report_table` prints it)
  prompts.json     {split: [[uid, prompt, labelled prompt], ...]}, for reading prompts without the images
  constants.npz    `scores` float32[4], `heatmaps` float32[64, 64, 2]: the means of the training split, both in [0, 1],
                   over the examples that have the target; nan if none has it
  references.json  a copy of the file beside the records, if there is one: {split: {row: {metric: value}}}
  digests.json     {split: {file of examples: SHA-256}}

`open_built` reads a dataset, which may be of someone else: with the features of this code, whatever its files name.
"""

import collections
import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any

import cv2
import numpy as np
import tabulate
from etils import epath

from richhf_data import checked, command, input_files, json_files, keywords, records, scan, schema
from richhf_data.errors import UserError
from richhf_data.example_source import ExampleSource, Item
from richhf_data.tensorflow_cpu import tf, tfds

NAME, VERSION = "richhf", "2.0.0"
SPLITS = (*schema.SPLITS, "test_novel")
PROBLEMS = {"images_missing": "no image", "images_undecodable": "broken", "images_ambiguous": "ambiguous"}
_COLUMNS = PROBLEMS | {"images_normalised": "normalised", "label_mismatches": "mismatch"}
MEAN_MAP_SIZE = 64  # pixels
TWELFTHS = 12  # steps of a score: the mean of three annotators' five Likert points
_NAMED = 5  # how many uids a report or an error names
_AGAIN = "copy the dataset again, or delete that folder and build it again"


def dataset_dir(data_dir) -> epath.Path:
    """The folder of the built dataset under `data_dir`."""
    return epath.Path(data_dir) / NAME / VERSION


@dataclasses.dataclass(frozen=True)
class Report:
    """What every report.json holds."""

    records: Any  # digests of what the dataset was built from
    splits: dict[str, dict[str, Any]]


def read_report(folder) -> dict:
    """The report.json of a dataset's folder. Raises UserError if it is not what `report_table` prints."""
    file = folder / "report.json"
    found = json_files.read(file, json_files.MAX_DATA_BYTES)
    json_files.conform(Report, found, file, extra=True)
    try:
        report_table(found)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise UserError(f"{file}: damaged ({type(error).__name__}: {error}), expected a build's report; {_AGAIN}") from error
    return found


def read_prompts(folder) -> dict[str, list[tuple[str, str, str]]]:
    """The prompts.json of a dataset's folder: {split: [(uid, prompt, labelled prompt), ...]}."""
    rows = dict[str, list[tuple[str, str, str]]]
    return json_files.read_as(rows, folder / "prompts.json", max_bytes=json_files.MAX_DATA_BYTES)


class Richhf(tfds.core.GeneratorBasedBuilder):
    """Examples of feedback: an image, a prompt, and the annotations that exist.

    Args:
      data_dir: the dataset is written to data_dir/richhf/2.0.0.
      source: an `ExampleSource`; None to read a built dataset.
      max_missing_share: the build fails if a larger share of a split's records has no usable image.
    """

    name = NAME
    VERSION = tfds.core.Version(VERSION)
    RELEASE_NOTES = {str(VERSION): "Images are plain RGB or grey; targets may be absent."}  # noqa: RUF012 - TFDS's interface
    code_path = pathlib.Path(__file__)  # TFDS 4.9.10 looks it up with importlib_resources, which it does not install

    def __init__(self, *, data_dir, source: ExampleSource | None = None, max_missing_share: float = 0.01, **kwargs):
        self._source = source
        self._max_missing_share = max_missing_share
        self._report = {"splits": {}}
        self._prompts = {}
        self._constants = None
        self._verified = set()  # splits
        super().__init__(data_dir=str(data_dir), **kwargs)

    @property
    def folder(self) -> epath.Path:
        """Where the dataset is, or will be."""
        return epath.Path(self.data_dir)

    def check(self, split: str) -> None:
        """Refuses a split whose shards are not there, are cut, or have lengths that do not fit; reads no example.

        Of shards in a bucket the sizes alone are compared: their records are not worth a request each.

        Raises:
          UserError: names the shard.
        """
        info, size = self.info.splits[split], 0
        for path, count in zip(map(epath.Path, info.filepaths), info.shard_lengths, strict=True):
            if not path.is_file():
                raise UserError(f"data_dir: no file {path}, expected {count} examples of the split {split!r}; {_AGAIN}")
            if "://" in os.fspath(path):
                size += path.stat().length
            elif (found := len(records.extents(path))) != count:
                raise UserError(f"data_dir: {path}: got {found} examples, expected {count}; {_AGAIN}")
        if size and size != (expected := int(info.num_bytes) + info.num_examples * records.FRAME):
            raise UserError(
                f"data_dir: {self.folder}: got {size} bytes of the split {split!r}, expected {expected}; {_AGAIN}"
            )

    def verify(self, split: str) -> None:
        """As `check`, and reads all bytes of the shards on a disk, to compare them with what the build wrote.

        The build wrote their SHA-256, or else the checksum of each record. The checksums of records in a bucket are
        compared when the records are read.

        Raises:
          UserError: names the shard.
        """
        if split in self._verified:
            return
        self.check(split)
        digests = self.digests()
        for path in map(os.fspath, self.info.splits[split].filepaths):
            if "://" in path:
                continue
            if not digests:
                with named(path):
                    tf.data.TFRecordDataset(path).reduce(0, lambda count, _: count + 1)
            elif digests.get(split, {}).get(os.path.basename(path)) != _digest(path):
                raise UserError(f"data_dir: {path}: got other bytes than the build wrote (digests.json); {_AGAIN}")
        self._verified.add(split)

    def digests(self) -> dict[str, dict[str, str]]:
        """{split: {shard: SHA-256}}, as the build wrote them; {} in a dataset of an earlier version, which wrote none."""
        path = self.folder / "digests.json"
        return json_files.read_as(dict[str, dict[str, str]], path) if path.is_file() else {}

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
                    "image": tfds.features.Tensor(shape=(), dtype=tf.string),  # encoded, as `images.plain` returns it
                    "scores": tfds.features.Tensor(shape=(len(schema.SCORES),), dtype=tf.float32),
                    "score_mask": tfds.features.Tensor(shape=(len(schema.SCORES),), dtype=tf.bool),
                    "heatmaps": tfds.features.Tensor(shape=(len(schema.HEATMAPS),), dtype=tf.string),  # absent: empty
                    "heatmap_mask": tfds.features.Tensor(shape=(len(schema.HEATMAPS),), dtype=tf.bool),
                    "labels": tfds.features.Sequence(tf.int32),
                    "labels_valid": tf.bool,
                    # The decoder's target: a caption, or the prompt with its labels. Empty without labels, or if their
                    # number is not that of the prompt's tokens.
                    "labelled_prompt": text,
                }
            ),
        )

    def _split_generators(self, dl_manager) -> dict:
        del dl_manager
        self._report |= {"records": self._source.identity()}
        return {split: self._generate_examples(split) for split in self._source.splits}

    def _generate_examples(self, split: str) -> Iterator[tuple[str, dict]]:
        statistics = _Statistics()
        prompts, mismatches, num_records = [], [], 0
        lost = {problem: {} for problem in PROBLEMS}  # uid -> reason
        changed = {}  # uid -> what `images.plain` changed
        for item in self._source.examples(split):
            num_records += 1
            problem = item.problem
            if problem is None and not _decodes(item.image):
                problem = "images_undecodable", "TensorFlow's decoder refuses it"
            if problem is not None:
                lost[problem[0]][item.uid] = problem[1]
                continue
            if item.changes:
                changed[item.uid] = item.changes
            example = records.decode(item.raw, item.where, allow_absent=True)  # the source has checked what is required
            tokens, labels = keywords.tokenize(item.prompt), example["labels"]
            valid = labels is not None and len(tokens) == len(labels)
            if labels is not None and not valid:
                mismatches.append(f"{item.uid} ({len(labels)} labels, {len(tokens)} tokens)")
            pairs = zip(tokens, labels, strict=True) if valid else ()
            if blank := [token for token, label in pairs if label == keywords.MISALIGNED and not keywords.words(token)]:
                mismatches.append(f"{item.uid} (misaligned, but no word to mark: {blank[0]!r})")
            labelled = item.caption or (keywords.label_prompt(tokens, labels.tolist()) if valid else "")
            prompts.append([item.uid, item.prompt, labelled])
            statistics.add(example, bool(labelled))
            yield (
                item.uid,
                {
                    "uid": item.uid,
                    "prompt": item.prompt,
                    "image": item.image,
                    "scores": example["scores"],
                    "score_mask": example["score_mask"],
                    "heatmaps": [item.raw.get(key, b"") for key in schema.RAW_HEATMAPS.values()],
                    "heatmap_mask": example["heatmap_mask"],
                    "labels": labels if labels is not None else [],
                    "labels_valid": valid,
                    "labelled_prompt": labelled,
                },
            )
        self._prompts[split] = prompts
        if not num_records:
            raise UserError(
                f"records: split {split!r}: got no example, expected some; raise --holdout, or set it to 0 for train alone"
            )
        num_lost = sum(map(len, lost.values()))
        if num_lost == num_records or num_lost > self._max_missing_share * num_records:
            counts = "; ".join(f"{len(uids)} {PROBLEMS[problem]}{_some(uids)}" for problem, uids in lost.items())
            raise UserError(
                f"images: split {split!r}: {num_lost} of {num_records} records have no usable image ({counts}), expected at "
                f"most a share of {self._max_missing_share:g} and at least one example; {self._source.remedy}, or raise "
                "--max_missing_share"
            )
        self._report["splits"][split] = {
            "examples": num_records - num_lost,
            "published_examples": schema.PUBLISHED_COUNTS.get(split) if self._source.published else None,
            "records": num_records,
            **{problem: _reasons(uids) for problem, uids in lost.items()},
            "images_normalised": _reasons(changed),
            "label_mismatches": {"count": len(mismatches), "first": mismatches[:_NAMED]},
            **{key: {"count": len(names), "first": names[:_NAMED]} for key, names in self._source.notes(split).items()},
            **statistics.summary(),
        }
        if split == "train":
            self._constants = statistics.means()

    def _download_and_prepare(self, dl_manager, download_config) -> None:
        super()._download_and_prepare(dl_manager, download_config)
        # This is still TFDS's temporary folder: the dataset appears with all of these files or not at all.
        folder = pathlib.Path(self.data_dir)
        shards = {split: info.filepaths for split, info in self.info.splits.items()}
        digests = {split: {path.name: _digest(path) for path in paths} for split, paths in shards.items()}
        for name, value, indent in (("report", self._report, 2), ("prompts", self._prompts, None), ("digests", digests, 2)):
            (folder / f"{name}.json").write_text(json.dumps(value, indent=indent), encoding="utf-8")
        if self._constants is not None:
            np.savez(folder / "constants.npz", **self._constants)
        if self._source.references is not None and self._source.references.is_file():
            references = read_references(self._source.references)
            (folder / "references.json").write_text(json.dumps(references, indent=2), encoding="utf-8")


def open_built(data_dir) -> Richhf:
    """The dataset that a build wrote there, to be read with the features of this code.

    TFDS's own `builder_from_directory` imports whatever module features.json names.

    Raises:
      UserError: no dataset, or files that no build of this version wrote.
    """
    folder = dataset_dir(data_dir)
    if not (folder / "report.json").is_file():
        raise UserError(
            f"data_dir: no dataset in {folder}, expected one; run "
            f"python -m richhf_data.build --records=DIR --images=SPEC --data_dir={data_dir}"
        )
    path = folder / "dataset_info.json"
    info = json_files.read(path)
    for key, expected in (("name", NAME), ("version", VERSION), ("fileFormat", "tfrecord")):
        if info.get(key) != expected:
            raise UserError(f"{path}: {key}: got {info.get(key)!r}, expected {expected!r}; {_AGAIN}")
    try:
        dataset = Richhf(data_dir=data_dir)
        paths = {split: list(map(os.fspath, entry.filepaths)) for split, entry in dataset.info.splits.items()}
        if not all(paths.values()) or not paths:
            raise ValueError("got no split, or one without files")
    except Exception as error:  # TFDS's and protobuf's own
        raise UserError(f"{path}: {' '.join(str(error).split())}, expected what a build writes; {_AGAIN}") from error
    for split, shards in paths.items():
        names = [f"{NAME}-{split}.tfrecord-{number:05d}-of-{len(shards):05d}" for number in range(len(shards))]
        lengths = dataset.info.splits[split].shard_lengths
        if split not in SPLITS or shards != [os.fspath(dataset.folder / name) for name in names] or min(lengths) < 1:
            raise UserError(
                f"{path}: got a split {checked.shown(split)} in {checked.shown(shards)} of {checked.shown(lengths)} "
                f"examples, expected some of {SPLITS} in {names[0]} and so on; {_AGAIN}"
            )
    with tempfile.TemporaryDirectory() as ours:
        dataset.info.features.save_config(ours)
        expected = json_files.read(pathlib.Path(ours, "features.json"))
    if json_files.read(folder / "features.json") != expected:
        raise UserError(f"{folder / 'features.json'}: got other features than those of version {VERSION}; {_AGAIN}")
    return dataset


@contextlib.contextmanager
def named(place) -> Iterator[None]:
    """Makes a UserError that names the file or folder of an error about a damaged record or example."""
    damage = (tf.errors.DataLossError, tf.errors.InvalidArgumentError, tf.errors.NotFoundError)
    try:
        yield
    except (*damage, UnicodeDecodeError) as error:
        said = records.said_by(error) if isinstance(error, damage) else error
        raise UserError(f"data_dir: {place}: got a damaged example ({said}), expected a whole one; {_AGAIN}") from error


class RecordFiles:
    """An `ExampleSource` of RichHF records and the images of their uids.

    Args:
      where: the record files, as in `record_paths`.
      images: the images and captions, as `scan.gather` found them.
      allow_absent: accept records without some targets.

    Raises:
      UserError: what `record_paths` and `positions` refuse.
    """

    remedy = "point --images at all of them"

    def __init__(self, where, images: scan.Found, allow_absent: bool = False):
        self._paths = record_paths(where)
        self._positions = positions(self._paths, allow_absent)
        self._images, self._allow_absent = images, allow_absent
        self.splits, self.published = tuple(self._paths), not allow_absent
        self.references = next(iter(self._paths.values())).with_name("references.json")

    def identity(self) -> dict[str, str]:
        return digests(self._paths)

    def examples(self, split: str) -> Iterator[Item]:
        path, left = self._paths[split], dict(self._positions[split])
        stored = records.RandomAccess([path])
        for uid, prompt, image in self._images.read(self._positions[split]):
            number = left.pop(uid)
            where = f"{path} record {number}"
            raw = records.parse(stored[number], where, self._allow_absent)
            yield Item(uid, prompt, image, raw, where, changes=self._images.changes.get(uid, ""))
        for uid in sorted(left):
            problem = "images_missing", ""
            if uid in self._images.ambiguous:
                problem = "images_ambiguous", self._images.ambiguous[uid]
            elif uid in self._images.faults:
                problem = "images_undecodable", self._images.faults[uid]
            yield Item(uid, "", None, {}, str(path), problem=problem)

    def notes(self, split: str) -> dict[str, list[str]]:
        others = [position for name, position in self._positions.items() if name != split]
        return {"uids_in_other_splits": [uid for uid in self._positions[split] if any(uid in one for one in others)]}


class _Statistics:
    """Running sums over a split. Each target is summed over the examples that have it."""

    def __init__(self):
        self._counts, self._map_counts, self._keywords = np.zeros(len(schema.SCORES)), np.zeros(len(schema.HEATMAPS)), 0
        self._scores, self._squares = np.zeros(len(schema.SCORES)), np.zeros(len(schema.SCORES))
        self._histogram = np.zeros((len(schema.SCORES), TWELFTHS + 1), int)
        self._empty = np.zeros(len(schema.HEATMAPS), int)
        self._maps = np.zeros((MEAN_MAP_SIZE, MEAN_MAP_SIZE, len(schema.HEATMAPS)))

    def add(self, example: dict, has_keywords: bool) -> None:
        """Adds a decoded record (records.py), whose absent targets are 0."""
        scores, there = example["scores"], example["score_mask"]
        self._counts += there
        self._map_counts += example["heatmap_mask"]
        self._keywords += has_keywords
        self._scores += scores
        self._squares += scores.astype(np.float64) ** 2
        self._histogram[np.flatnonzero(there), np.floor(scores[there] * TWELFTHS + 0.5).astype(int)] += 1
        small = cv2.resize(
            np.float32(example["heatmaps"]), (MEAN_MAP_SIZE, MEAN_MAP_SIZE), interpolation=cv2.INTER_AREA
        )
        self._empty += ~small.any(axis=(0, 1)) & example["heatmap_mask"]
        self._maps += small / 255

    def means(self) -> dict[str, np.ndarray]:
        """The mean of each target; nan if no example has it."""
        with np.errstate(invalid="ignore"):
            return {
                "scores": np.float32(self._scores / self._counts),
                "heatmaps": np.float32(self._maps / self._map_counts),
            }

    def summary(self) -> dict:
        """Counts, means and histograms, for JSON; None if no example has the target."""
        with np.errstate(invalid="ignore"):
            mean, empty = self._scores / self._counts, self._empty / self._map_counts
            deviation = np.sqrt(np.maximum(self._squares / self._counts - mean**2, 0))
        counts = [*self._counts, *self._map_counts, self._keywords]
        return {
            "targets": {
                name: int(count)
                for name, count in zip((*schema.SCORES, *schema.HEATMAPS, "keywords"), counts, strict=True)
            },
            "score_mean": _by_name(schema.SCORES, mean),
            "score_std": _by_name(schema.SCORES, deviation),
            "score_histogram": dict(zip(schema.SCORES, self._histogram.tolist(), strict=True)),
            "empty_maps_share": _by_name(schema.HEATMAPS, empty),
        }


def _by_name(names, values: np.ndarray) -> dict[str, float | None]:
    return {name: None if np.isnan(value) else float(value) for name, value in zip(names, values, strict=True)}


def record_paths(where) -> dict[str, pathlib.Path]:
    """{split: its record file, `<split>.tfrecord`}, in the order of `SPLITS`.

    Args:
      where: a folder, a file, or a pattern of files.

    Raises:
      UserError: there is no such file, there are two of a split, a file that is not in a folder has another name, or what
        `records.check_file` refuses.
    """
    paths = {split: pathlib.Path(where) / f"{split}.tfrecord" for split in SPLITS}
    names = ", ".join(path.name for path in paths.values())
    if pathlib.Path(where).is_dir():
        present = {split: path for split, path in paths.items() if os.path.lexists(path)}
    else:
        found = [pathlib.Path(path) for path in input_files.matches(where)]
        if other := [path for path in found if path.name not in names.split(", ")]:
            raise UserError(f"records: got {other[0]}, expected a file called {names}, which names its split; rename it")
        present = {split: path for split in SPLITS for path in found if path.stem == split}
        if len(present) < len(found):
            listed = ", ".join(map(str, found))
            raise UserError(f"records: {where} matches two files of a split ({listed}), expected one of each")
    for path in present.values():
        records.check_file(path)
    if not present:
        raise UserError(f"records: {where} holds none of {names}, expected at least one; see --records")
    return present


def positions(paths: dict[str, pathlib.Path], allow_absent: bool = False) -> dict[str, dict[str, int]]:
    """{split: {uid: number of its record}}.

    Raises:
      UserError: no record in a file; a uid twice; what `records.read_unchecked` refuses.
    """
    result = {}
    for split, path in paths.items():
        position = result[split] = {}
        for number, raw in enumerate(records.read_unchecked(path, allow_absent)):
            uid = records.uid_of(raw)
            if uid in position:
                raise UserError(
                    f"records: {path}: uid {uid!r} is in record {position[uid]} and in {number}, expected it once; "
                    "remove one"
                )
            position[uid] = number
        if not position:
            raise UserError(f"records: {path}: got no record for split {split!r}, expected some; remove or fill it")
    return result


def digests(paths: dict[str, pathlib.Path]) -> dict[str, str]:
    """{split: SHA-256 of its record file}, by which a built dataset is recognised."""
    return {split: _digest(path) for split, path in paths.items()}


def _digest(path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def report_table(report: dict) -> str:
    """The report as text: a row per split, what was left out or changed, and histograms of the scores."""
    splits, scores, notes = [], [], []
    for split, row in report["splits"].items():
        counts = {title: row[key]["count"] for key, title in _COLUMNS.items()}
        empty = {
            f"empty {name}": "-" if share is None else f"{share:.1%}" for name, share in row["empty_maps_share"].items()
        }
        published = row["published_examples"] or "-"
        splits.append({"split": split, "examples": row["examples"], "published": published, **counts, **empty})
        for name in (name for name in schema.SCORES if row["targets"][name]):
            mean, deviation = row["score_mean"][name], row["score_std"][name]
            histogram = dict(enumerate(row["score_histogram"][name]))
            scores.append({"split": split, "score": name, "mean": mean, "std": deviation, **histogram})
        for key, value in row.items():
            if isinstance(value, dict) and value.get("count"):
                reasons = "".join(f"; {count} {reason}" for reason, count in value.get("reasons", {}).items())
                notes.append(f"{split}: {value['count']} {key.replace('_', ' ')}{_some(value['first'])}{reasons}")
        if absent := {name: count for name, count in row["targets"].items() if count < row["examples"]}:
            counts = ", ".join(f"{name} {count}" for name, count in absent.items())
            notes.append(f"{split}: examples with the target, of {row['examples']}: {counts}")
    counted = ["", f"How many examples have each score, in {TWELFTHS}ths:", _table(scores)] if scores else []
    return "\n".join([_table(splits), *map(command.printable, notes), *counted])


def _table(rows: list[dict]) -> str:
    return tabulate.tabulate(rows, headers="keys", floatfmt=".3f", missingval="-")


def _reasons(reasons: dict[str, str]) -> dict:
    """The report's entry for {uid: reason}: the count, the first uids, and how often each reason occurs."""
    counts = collections.Counter(filter(None, reasons.values())).most_common()
    return {"count": len(reasons), "first": list(reasons)[:_NAMED], **({"reasons": dict(counts)} if counts else {})}


def _some(names) -> str:
    return f", first {', '.join(list(names)[:_NAMED])}" if names else ""


def _decodes(image: bytes) -> bool:
    """Whether training's decoder can read the image."""
    try:
        tf.io.decode_image(image, channels=3, expand_animations=False)
    except tf.errors.InvalidArgumentError:
        return False
    return True


def read_references(path) -> dict[str, dict[str, dict[str, float | None]]]:
    """{split: {row: {metric: value}}}."""
    return json_files.read_as(dict[str, dict[str, dict[str, checked.Metric | None]]], path)
