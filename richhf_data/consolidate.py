"""Consolidates the points, words and scores of several annotators into one example (paper section 3.2). No TensorFlow.

  python -m richhf_data.consolidate --annotations='annotations/*.jsonl' --images=DIR --output=DIR

reads your own annotations, one line per annotator and picture,

  {"uid": "cat7", "annotator": "ada", "prompt": "a yellow cat",
   "points": {"implausibility": [[0.25, 0.5]], "misalignment": []},   fractions of width and height
   "misaligned": [1],                                                  places of wrong words, or "labels": [1, 0, 1]
   "scores": {"plausibility": 4, "overall": 3}}                        1 to 5, higher is better

and the pictures DIR/<uid>.jpg (or .png, .webp, ...), and writes what `richhf_data.build --allow_absent` reads:
OUTPUT/<split>.tfrecord and OUTPUT/images with the pictures and captions.jsonl. A line leaves out what its annotator was
not asked; an empty list of points means that nothing is wrong. A target is consolidated over the annotators who gave it.

  scores    mean over annotators of (s - 1) / 4
  labels    majority vote for each prompt token: misaligned if more than half of the annotators marked it
  heatmaps  each annotator's points become a binary map of disks, and the maps are averaged: with three annotators a
            pixel is 0, 85, 170 or 255
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence

import cv2
import numpy as np
from absl import flags
from tqdm.auto import tqdm

from richhf_data import checked, command, images, input_files, json_files, jsonl, keywords, paths, ranges, schema
from richhf_data.errors import UserError

MARKER = "consolidated.json"  # marks a folder that this command wrote, and names its pictures
CAPTIONS = "captions.jsonl"
_LINE_KEYS = {"uid", "annotator", "prompt", "points", "labels", "misaligned", "scores"}
_NAMED = 20  # bad lines in a message


@dataclasses.dataclass(frozen=True)
class Annotation:
    """One annotator's answers about one picture. None means that they were not asked.

    Attributes:
      points: for each map of `schema.HEATMAPS`, the marked (x, y), fractions of width and height in [0, 1].
      labels: for each prompt token (`keywords.tokenize`), 0 = misaligned, 1 = aligned.
      scores: Likert 1 .. 5 for each of `schema.SCORES`, higher is better.
    """

    points: tuple[tuple[tuple[float, float], ...] | None, ...]
    labels: tuple[int, ...] | None
    scores: tuple[float | None, ...]

    def to_json(self) -> dict:
        """A JSON object with the names of `schema`, without what is None."""
        value = {
            "points": {
                name: [list(point) for point in points]
                for name, points in zip(schema.HEATMAPS, self.points, strict=True)
                if points is not None
            },
            "scores": {
                name: score for name, score in zip(schema.SCORES, self.scores, strict=True) if score is not None
            },
        }
        return value if self.labels is None else value | {"labels": list(self.labels)}

    @classmethod
    def from_json(cls, value: dict) -> "Annotation":
        """The inverse of `to_json`. It does not `check` the values.

        Raises:
          UserError: a name that is not in `schema`, or a value of another type.
        """
        points, labels, scores = value.get("points", {}), value.get("labels"), value.get("scores", {})
        for key, got, names in (("points", points, schema.HEATMAPS), ("scores", scores, schema.SCORES)):
            if not isinstance(got, dict) or set(got) - set(names):
                raise UserError(f"annotation {key}: got {json.dumps(got)[:80]}, expected only {', '.join(names)}")
        points = checked.conform(dict[str, tuple[tuple[float, ...], ...]], points, "annotation: points")
        scores = checked.conform(dict[str, float], scores, "annotation: scores")
        return cls(
            points=tuple(points.get(name) for name in schema.HEATMAPS),
            labels=checked.conform(tuple[int, ...] | None, labels, "annotation: labels"),
            scores=tuple(scores.get(name) for name in schema.SCORES),
        )


def disks(
    points: Iterable[Sequence[float]], size: int, radius: float = schema.POINT_RADIUS, aspect: float = 1.0
) -> np.ndarray:
    """bool[size, size]: the pixels whose centres lie within `radius` of a point.

    Args:
      radius: a fraction of the picture's height.
      aspect: the picture's width / height; the square map shows the picture squeezed by it.
    """
    marked = np.zeros((size, size), bool)
    reach = radius * size
    for x, y in points:
        column, row = x * size - 0.5, y * size - 0.5  # in units where pixel (i, j) has its centre at (i, j)
        top, bottom = max(0, int(np.ceil(row - reach))), min(size, int(row + reach) + 1)
        left, right = max(0, int(np.ceil(column - reach / aspect))), min(size, int(column + reach / aspect) + 1)
        rows = (np.arange(top, bottom) - row) ** 2
        columns = ((np.arange(left, right) - column) * aspect) ** 2
        marked[top:bottom, left:right] |= rows[:, None] + columns[None, :] <= reach * reach
    return marked


def check(annotation: Annotation, num_tokens: int) -> None:
    """Raises UserError if an annotation has wrong lengths, or points, labels or scores out of range."""
    if len(annotation.scores) != len(schema.SCORES):
        raise UserError(f"scores: got {len(annotation.scores)}, expected {len(schema.SCORES)} ({schema.SCORES})")
    for name, score in zip(schema.SCORES, annotation.scores, strict=True):
        if score is not None and not schema.LIKERT_LOW <= score <= schema.LIKERT_HIGH:
            raise UserError(f"{name} score: got {score}, expected {schema.LIKERT_LOW} .. {schema.LIKERT_HIGH}")
    if len(annotation.points) != len(schema.HEATMAPS):
        raise UserError(f"points: got {len(annotation.points)} lists, expected one for each of {schema.HEATMAPS}")
    for name, points in zip(schema.HEATMAPS, annotation.points, strict=True):
        for point in points or ():
            if len(point) != 2 or not (0 <= point[0] <= 1 and 0 <= point[1] <= 1):
                raise UserError(f"{name} point: got {tuple(point)}, expected (x, y) as fractions in [0, 1]")
    if annotation.labels is None:
        return
    if len(annotation.labels) != num_tokens:
        raise UserError(f"labels: got {len(annotation.labels)}, expected {num_tokens}, one for each prompt token")
    for label in annotation.labels:
        if label not in (keywords.MISALIGNED, keywords.ALIGNED):
            raise UserError(f"labels: got {label}, expected {keywords.MISALIGNED} or {keywords.ALIGNED}")


def consolidate(
    annotations: Sequence[Annotation], prompt: str, size: int = schema.RAW_MAP_SIZE, aspect: float = 1.0
) -> dict:
    """The targets of one picture from its annotations.

    Args:
      annotations: at least one.
      prompt: the picture's text; an annotation has one label for each of its tokens.
      size: pixels of a map, both sides (the records have 512).
      aspect: the picture's width / height.

    Returns:
      {scores: float32[4] in [0, 1], score_mask: bool[4], heatmaps: uint8[size, size, 2], heatmap_mask: bool[2], labels:
      int32[tokens] or None}, as `schema` describes. A target that no annotator gave has a mask of False and is 0; labels
      that no annotator gave are None.

    Raises:
      UserError: no annotation, a wrong length, or a score, point or label out of range.
    """
    if not annotations:
        raise UserError("annotations: got none, expected at least one")
    if size < 1:
        raise UserError(f"size: got {size}, expected at least 1 pixel")
    num_tokens = len(keywords.tokenize(prompt))
    for annotation in annotations:
        check(annotation, num_tokens)
    scores, score_mask = np.zeros(len(schema.SCORES), np.float32), np.zeros(len(schema.SCORES), bool)
    for index in range(len(schema.SCORES)):
        if given := _given(annotation.scores[index] for annotation in annotations):
            scores[index] = (np.mean(given) - schema.LIKERT_LOW) / (schema.LIKERT_HIGH - schema.LIKERT_LOW)
            score_mask[index] = True
    heatmaps = np.zeros((size, size, len(schema.HEATMAPS)), np.uint8)
    heatmap_mask = np.zeros(len(schema.HEATMAPS), bool)
    for index in range(len(schema.HEATMAPS)):
        given = _given(annotation.points[index] for annotation in annotations)
        heatmap_mask[index] = bool(given)
        if any(given):
            votes = sum(disks(points, size, aspect=aspect).astype(np.float32) for points in given)
            heatmaps[..., index] = np.round(votes * (255 / len(given)))
    labels = None
    if given := _given(annotation.labels for annotation in annotations):
        marks = (np.asarray(given, np.int32) == keywords.MISALIGNED).sum(axis=0)
        labels = np.where(2 * marks > len(given), keywords.MISALIGNED, keywords.ALIGNED).astype(np.int32)
    return {
        "scores": scores,
        "score_mask": score_mask,
        "heatmaps": heatmaps,
        "heatmap_mask": heatmap_mask,
        "labels": labels,
    }


def _given(values: Iterable) -> list:
    return [value for value in values if value is not None]


def raw_record(filename: str, targets: Mapping) -> dict:
    """The raw record (records.py) of targets that `consolidate` returned, without the absent ones."""
    raw = {schema.RAW_UID: filename}
    for index, name in enumerate(schema.SCORES):
        if targets["score_mask"][index]:
            raw[schema.RAW_SCORES[name]] = float(targets["scores"][index])
    for index, name in enumerate(schema.HEATMAPS):
        if targets["heatmap_mask"][index]:
            options = (cv2.IMWRITE_PNG_COMPRESSION, 1)  # fast
            raw[schema.RAW_HEATMAPS[name]] = cv2.imencode(".png", targets["heatmaps"][..., index], options)[1].tobytes()
    if targets["labels"] is not None:
        raw[schema.RAW_LABELS] = " ".join(map(str, targets["labels"]))
    return raw


# ------------------------------------------------------------------------------------------------ your own annotations


@dataclasses.dataclass
class AnnotatedImage:
    """The prompt of an image and its annotations, by the annotators' names.

    where: the file and line of its first annotation, for errors.
    """

    prompt: str
    where: str
    annotations: dict[str, Annotation]


def read(pattern: str) -> dict[str, AnnotatedImage]:
    """The annotations in the JSONL files that match a pattern (see the module), by uid, in the order of the lines.

    Raises:
      UserError: no file matches, or lines are wrong; names the file and number of the first 20.
    """
    files = input_files.matches(pattern)
    if not files:
        raise UserError(f"annotations: no file matches {pattern!r}, expected JSONL files; quote the pattern in a shell")
    pictures: dict[str, AnnotatedImage] = {}
    faults = []
    for path in files:
        paths.check_file("annotations", path, "a JSONL file")
        with open(path, "rb") as file:
            for number, line in jsonl.lines(file):
                try:
                    _add_line(pictures, line, f"{path} line {number}")
                except UserError as error:
                    faults.append(f"  {error}")
    if faults:
        more = f"\n  and {len(faults) - _NAMED} more" if len(faults) > _NAMED else ""
        raise UserError(f"annotations: {len(faults)} bad lines:\n" + "\n".join(faults[:_NAMED]) + more)
    if not pictures:
        raise UserError(f"annotations: the files that match {pattern!r} hold no line, expected annotations")
    return pictures


def _add_line(pictures: dict[str, AnnotatedImage], line: bytes, where: str) -> None:
    expected = f"an object with keys of {', '.join(sorted(_LINE_KEYS))}"
    value = jsonl.parse(line, expected, where)
    try:
        _add(pictures, value, where, expected)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def _add(pictures: dict[str, AnnotatedImage], value: dict, where: str, expected: str) -> None:
    if unknown := value.keys() - _LINE_KEYS:
        raise UserError(f"got {sorted(unknown)}, expected {expected}")
    for key in ("uid", "annotator", "prompt"):
        if not jsonl.is_text(value.get(key)) or not value[key].strip():
            raise UserError(f"{key}: got {value.get(key)!r}, expected text")
    uid, annotator, prompt = value["uid"], value["annotator"], value["prompt"]
    if pathlib.PurePosixPath(uid).name != uid or uid.startswith("."):
        raise UserError(f"uid: got {uid!r}, expected the picture's file name without its extension")
    tokens = keywords.tokenize(prompt)
    if "misaligned" in value:
        places = value["misaligned"]
        if "labels" in value:
            raise UserError("misaligned: got it beside labels, expected one of them")
        if not isinstance(places, list) or not all(type(i) is int and 0 <= i < len(tokens) for i in places):
            raise UserError(f"misaligned: got {places!r}, expected places from 0 to {len(tokens) - 1} in {tokens}")
        marked = (keywords.MISALIGNED if i in places else keywords.ALIGNED for i in range(len(tokens)))
        value["labels"] = list(marked)
    annotation = Annotation.from_json(value)
    check(annotation, len(tokens))
    if not _given((*annotation.scores, *annotation.points, annotation.labels)):
        raise UserError("got no answer, expected at least one of points, labels or misaligned, and scores; remove the line")
    picture = pictures.setdefault(uid, AnnotatedImage(prompt, where, {}))
    if picture.prompt != prompt:
        raise UserError(f"prompt: got {prompt!r}, expected that of uid {uid!r} in {picture.where}: {picture.prompt!r}")
    if annotator in picture.annotations:
        raise UserError(f"annotator {annotator!r} has annotated uid {uid!r} before, expected once; remove one line")
    picture.annotations[annotator] = annotation


def write(annotations: str, images_dir, output, holdout: float = schema.HOLDOUT, seed: int = 0) -> dict[str, int]:
    """Consolidates annotations into record files, pictures and captions; returns the counts of what it wrote.

    The uid of a picture decides its split (`schema.split_of`). Files appear when they are complete; the same command
    writes the same files again.

    Args:
      annotations: a pattern of JSONL files.
      images_dir: the folder of the pictures, named by uid.
      output: a new folder, or one that this command wrote.
      holdout: the share of dev, and of test. seed: draws the pictures that are held out.

    Raises:
      UserError: bad lines, a missing picture, or `output` holds other files.
    """
    pictures = read(annotations)
    output, folder = pathlib.Path(output), pathlib.Path(images_dir)
    if not folder.is_dir():
        raise UserError(f"images: no folder {folder}, expected one with the pictures, named by uid")
    files: dict[str, pathlib.Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in images.EXTENSIONS or path.stem not in pictures:
            continue
        if files.setdefault(path.stem, path) != path:
            raise UserError(f"images: got {files[path.stem]} and {path} for one uid, expected one; remove the other")
    if missing := [uid for uid in pictures if uid not in files]:
        raise UserError(
            f"images: {folder} lacks the pictures of {len(missing)} of {len(pictures)} uids, first "
            f"{', '.join(missing[:5])}; expected <uid>{'|'.join(images.EXTENSIONS)}"
        )
    for path in (folder, *files.values()):
        if paths.contains(output / "images", path):
            raise UserError(f"output: got {output}, whose images hold {path}, which is read; expected another folder")
    paths.finish_exchange(output)
    _check_output(output)
    aspects = {}
    for uid in pictures:
        width, height = images.size(files[uid])
        aspects[uid] = width / height
    from richhf_data import records  # TensorFlow: after the checks, which need none, and before anything is written

    counts = {"pictures": len(pictures), "annotations": sum(len(one.annotations) for one in pictures.values())}
    counts |= dict.fromkeys((*schema.SPLITS, *schema.SCORES, *schema.HEATMAPS, "labels", "partly answered"), 0)
    by_split = {split: [] for split in schema.SPLITS}
    for uid in pictures:
        by_split[schema.split_of(uid, holdout, seed)].append(uid)
    names = (*(f"{split}.tfrecord" for split in schema.SPLITS), "images", MARKER)
    with (
        paths.exchanging(output, names) as partial,
        tqdm(total=len(pictures), desc="consolidate", unit="picture") as bar,
    ):

        def consolidated(uids):
            for uid in uids:
                given = list(pictures[uid].annotations.values())
                targets = consolidate(given, pictures[uid].prompt, aspect=aspects[uid])
                for names, mask in ((schema.SCORES, "score_mask"), (schema.HEATMAPS, "heatmap_mask")):
                    for name, present in zip(names, targets[mask], strict=True):
                        counts[name] += int(present)
                counts["labels"] += targets["labels"] is not None
                asked = [(*one.scores, *one.points, one.labels) for one in given]
                counts["partly answered"] += any(0 < len(_given(one)) < len(one) for one in zip(*asked, strict=True))
                yield raw_record(files[uid].name, targets)
                paths.replace(partial / "images" / files[uid].name, files[uid].read_bytes())
                bar.update()

        for split, uids in by_split.items():
            counts[split] = len(uids)
            if uids:
                records.write(partial / f"{split}.tfrecord", consolidated(uids), allow_absent=True)
        captions = (json.dumps({"uid": uid, "caption": one.prompt}) + "\n" for uid, one in pictures.items())
        paths.replace(partial / "images" / CAPTIONS, "".join(captions).encode())
        marker = {"annotations": annotations, "holdout": holdout, "seed": seed, "files": _files(partial)}
        paths.replace(partial / MARKER, json.dumps(marker).encode())
    return counts


@dataclasses.dataclass(frozen=True)
class Marker:
    """What is read of `MARKER`; that of an earlier version names no files."""

    files: list[str] | None = None


def _check_output(output: pathlib.Path) -> None:
    """Refuses a folder with files that this command did not write, where it writes."""
    if not (output / MARKER).is_file():
        if paths.holds_files(output):
            raise UserError(f"output: {output} holds other files, expected a new folder; take another")
        return
    found = _files(output)
    written = json_files.read_as(Marker, output / MARKER, extra=True).files
    if foreign := sorted(set(found) - set(found if written is None else written)):
        raise UserError(f"output: {output} holds {foreign[0]}, which this command did not write; move it, or take another")


def _files(output: pathlib.Path) -> list[str]:
    """The record files and pictures in a folder, sorted."""
    found = (*(output / f"{split}.tfrecord" for split in schema.SPLITS), *(output / "images").glob("*"))
    return sorted(str(path.relative_to(output)) for path in found if os.path.lexists(path))


def main() -> None:
    """The command."""
    args = flags.FLAGS
    counts = write(args.annotations, args.images, args.output, args.holdout, args.split_seed)
    for name, count in counts.items():
        print(f"{name:<16}{count:>8}")
    if not counts["dev"]:
        print("dev has no picture, and training evaluates on dev: annotate more pictures, or raise --holdout")
    print(
        f"python -m richhf_data.build --records={args.output} --images=folder:{args.output}/images --allow_absent "
        "--data_dir=DIR"
    )


if __name__ == "__main__":
    flags.DEFINE_string("annotations", None, "Pattern of JSONL files.", required=True)
    flags.DEFINE_string("images", None, "Folder of the pictures, named by uid.", required=True)
    flags.DEFINE_string("output", None, "New folder for the record files.", required=True)
    ranges.flag("holdout", schema.HOLDOUT, "The share of dev, and of test.", ranges.HOLDOUT)
    ranges.flag("split_seed", 0, "Draws which pictures are held out.", ranges.SEED)
    command.run(main)
