"""Several annotators' points, words and scores of one picture -> one example (paper section 3.2). Imports no TensorFlow.

  scores    mean over annotators of (s - 1) / 4
  labels    majority vote of each prompt token: misaligned when more than half of the annotators marked it
  heatmaps  each annotator's points become a binary map of disks, and the maps are averaged: with three annotators a
            pixel is 0, 85, 170 or 255
"""

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

from richhf_data import keywords, schema


@dataclasses.dataclass(frozen=True)
class Annotation:
    """What one annotator says of one picture.

    points: for each map of `schema.HEATMAPS`, the marked (x, y), fractions of width and height in [0, 1].
    labels: for each prompt token (`keywords.tokenize`), 0 = misaligned, 1 = aligned.
    scores: Likert 1 .. 5 for each of `schema.SCORES`, higher is better.
    """

    points: tuple[tuple[tuple[float, float], ...], ...]
    labels: tuple[int, ...]
    scores: tuple[float, ...]

    def to_json(self) -> dict:
        """Plain lists, numbers and strings, by the names of `schema`."""
        return {
            "points": {
                name: [list(point) for point in points]
                for name, points in zip(schema.HEATMAPS, self.points, strict=True)
            },
            "labels": list(self.labels),
            "scores": dict(zip(schema.SCORES, self.scores, strict=True)),
        }

    @classmethod
    def from_json(cls, value: dict) -> "Annotation":
        """The inverse of `to_json`.

        Raises:
          ValueError: a map or a score is missing.
        """
        for key, names in (("points", schema.HEATMAPS), ("scores", schema.SCORES)):
            if missing := set(names) - set(value.get(key, {})):
                raise ValueError(f"annotation {key}: got {sorted(value.get(key, {}))}, expected also {sorted(missing)}")
        return cls(
            points=tuple(tuple((float(x), float(y)) for x, y in value["points"][name]) for name in schema.HEATMAPS),
            labels=tuple(int(label) for label in value.get("labels", ())),
            scores=tuple(float(value["scores"][name]) for name in schema.SCORES),
        )


def disks(points: Iterable[Sequence[float]], size: int, radius: float = schema.POINT_RADIUS) -> np.ndarray:
    """bool[size, size]: the pixels whose centre lies within `radius` (a fraction of the height) of one of the points."""
    marked = np.zeros((size, size), bool)
    reach = radius * size
    for x, y in points:
        column, row = x * size - 0.5, y * size - 0.5  # in units where pixel (i, j) has its centre at (i, j)
        top, bottom = max(0, int(np.ceil(row - reach))), min(size, int(row + reach) + 1)
        left, right = max(0, int(np.ceil(column - reach))), min(size, int(column + reach) + 1)
        rows = (np.arange(top, bottom) - row) ** 2
        columns = (np.arange(left, right) - column) ** 2
        marked[top:bottom, left:right] |= rows[:, None] + columns[None, :] <= reach * reach
    return marked


def check(annotation: Annotation, num_tokens: int) -> None:
    """Raises ValueError where an annotation has wrong lengths, or points, labels or scores out of range."""
    if len(annotation.scores) != len(schema.SCORES):
        raise ValueError(f"scores: got {len(annotation.scores)}, expected {len(schema.SCORES)} ({schema.SCORES})")
    for name, score in zip(schema.SCORES, annotation.scores, strict=True):
        if not schema.LIKERT_LOW <= score <= schema.LIKERT_HIGH:
            raise ValueError(f"{name} score: got {score}, expected {schema.LIKERT_LOW} .. {schema.LIKERT_HIGH}")
    if len(annotation.points) != len(schema.HEATMAPS):
        raise ValueError(f"points: got {len(annotation.points)} lists, expected one for each of {schema.HEATMAPS}")
    for name, points in zip(schema.HEATMAPS, annotation.points, strict=True):
        for point in points:
            if len(point) != 2 or not (0 <= point[0] <= 1 and 0 <= point[1] <= 1):
                raise ValueError(f"{name} point: got {tuple(point)}, expected (x, y) as fractions in [0, 1]")
    if len(annotation.labels) != num_tokens:
        raise ValueError(f"labels: got {len(annotation.labels)}, expected {num_tokens}, one for each prompt token")
    for label in annotation.labels:
        if label not in (keywords.MISALIGNED, keywords.ALIGNED):
            raise ValueError(f"labels: got {label}, expected {keywords.MISALIGNED} or {keywords.ALIGNED}")


def consolidate(annotations: Sequence[Annotation], prompt: str, size: int = schema.RAW_MAP_SIZE) -> dict:
    """One example's targets from its annotators.

    Args:
      annotations: of one picture, at least one.
      prompt: its text; each annotation has one label for each of its tokens.
      size: pixels of a map, both sides (the records have 512).

    Returns:
      {scores: float32[4] in [0, 1], heatmaps: uint8[size, size, 2], labels: int32[tokens]}, as `schema` describes.

    Raises:
      ValueError: no annotation, a wrong length, or a score, point or label out of range.
    """
    if not annotations:
        raise ValueError("annotations: got none, expected at least one")
    if size < 1:
        raise ValueError(f"size: got {size}, expected at least 1 pixel")
    num_tokens = len(keywords.tokenize(prompt))
    for annotation in annotations:
        check(annotation, num_tokens)
    likert = np.mean([annotation.scores for annotation in annotations], axis=0)  # [4]
    scores = (likert - schema.LIKERT_LOW) / (schema.LIKERT_HIGH - schema.LIKERT_LOW)
    heatmaps = np.zeros((size, size, len(schema.HEATMAPS)), np.uint8)
    for index in range(len(schema.HEATMAPS)):
        if any(annotation.points[index] for annotation in annotations):
            votes = sum(disks(annotation.points[index], size).astype(np.float32) for annotation in annotations)
            heatmaps[..., index] = np.round(votes * (255 / len(annotations)))
    marks = sum(np.asarray(annotation.labels, np.int32) == keywords.MISALIGNED for annotation in annotations)
    labels = np.where(2 * marks > len(annotations), keywords.MISALIGNED, keywords.ALIGNED).astype(np.int32)
    return {"scores": scores.astype(np.float32), "heatmaps": heatmaps, "labels": labels}
