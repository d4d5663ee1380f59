"""Prepares pictures for annotators: a critic's suggestions, and which pictures it is not sure of or two critics disagree on.

    python -m rahf.suggest --workdir=run [--other=run2] --images=TABLE --output=FILE.jsonl

writes the table again, for `python -m richhf_data.annotate serve --images=FILE.jsonl [--suggest]`, with

  suggestion   {"points": {"implausibility": [[x, y], ...], ...}, "words": [1]}: what the critic would mark
  priority     with --other: the mean absolute difference of the critics' scores and heatmaps, in [0, 1]; without, of a
               critic with score_head.deviation: the mean deviation of its scores. A higher one is annotated first

TABLE is as in `richhf_data.annotate.choose`. Suggestions bias annotators; the server exports such answers apart.
"""

from collections.abc import Iterator

import cv2
import numpy as np
from absl import flags
from tqdm.auto import tqdm

from rahf import predictor
from richhf_data import command, keywords, ranges, schema
from richhf_data.annotate.choose import PictureTable

THRESHOLD = 0.3  # of a heatmap
MOST_POINTS = 9  # of a kind in a picture
_APART = 1.5  # radii between two points


def points(heatmap: np.ndarray, aspect: float = 1.0, threshold: float = THRESHOLD) -> Iterator[list[float]]:
    """The points [x, y], fractions in [0, 1], that mark a heatmap, float[h, w] in [0, 1]: its highest pixels that are apart.

    Args:
      aspect: the picture's width / height.
    """
    left = np.array(heatmap, np.float32)
    height, width = left.shape
    rows, columns = (np.arange(height) + 0.5) / height, (np.arange(width) + 0.5) / width
    for _ in range(MOST_POINTS):
        row, column = np.unravel_index(left.argmax(), left.shape)
        if left[row, column] < threshold:
            return
        x, y = columns[column], rows[row]
        near = ((columns - x) * aspect) ** 2 + ((rows - y) ** 2)[:, None] <= (_APART * schema.POINT_RADIUS) ** 2
        left[near] = -1
        yield [float(x), float(y)]


def suggest(table: PictureTable, critic: predictor.Model, other: predictor.Model | None, threshold: float) -> None:
    """Adds suggestion, and with another critic or deviations priority, to the rows of a table."""
    with tqdm(total=len(table.rows), desc="suggest", unit="picture", dynamic_ncols=True) as bar:
        for rows, pictures in table.batches():
            prompts = [row["prompt"] for row in rows]
            found = critic.predict(pictures, prompts)
            for number, (row, picture) in enumerate(zip(rows, pictures, strict=True)):
                aspect = picture.shape[1] / picture.shape[0]
                maps = {name: list(points(found.heatmaps[name][number], aspect, threshold)) for name in schema.HEATMAPS}
                tokens = keywords.tokenize(row["prompt"])
                labels = keywords.read_labels(found.labelled_prompts[number], tokens, critic.vocabulary.written)
                words = [place for place, label in enumerate(labels) if label == keywords.MISALIGNED]
                row["suggestion"] = {"points": maps, "words": words}
            if other is None and found.deviations:
                for row, priority in zip(rows, np.mean(list(found.deviations.values()), axis=0), strict=True):
                    row["priority"] = float(priority)
            if other is not None:
                second = other.predict(pictures, prompts)
                scores = np.mean([np.abs(found.scores[name] - second.scores[name]) for name in schema.SCORES], axis=0)
                maps = [_difference(found.heatmaps[name], second.heatmaps[name]) for name in schema.HEATMAPS]
                for row, priority in zip(rows, (scores + np.mean(maps, axis=0)) / 2, strict=True):
                    row["priority"] = float(priority)
            bar.update(len(rows))


def _difference(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """The mean absolute difference of heatmaps, float[B, h, w] of any two sizes: float[B]."""
    size = ours.shape[:0:-1]
    return np.array([np.abs(a - cv2.resize(b, size)).mean() for a, b in zip(ours, theirs, strict=True)])


def main() -> None:
    """The command."""
    args = flags.FLAGS
    table = PictureTable(args.images)
    output = table.checked_output(args.output)
    other = predictor.load(args.other) if args.other else None
    critic = predictor.load(args.workdir)
    for flag, model, parts in (("workdir", critic, ("heatmaps", "keywords")), ("other", other, ("scores", "heatmaps"))):
        if model:
            model.require(flag, *parts)
    suggest(table, critic, other, args.threshold)
    table.write(table.rows, output)
    print(f"{output}: {len(table.rows)} pictures")


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Of the critic: of rahf.train, or a folder that rahf.convert wrote.", required=True)
    flags.DEFINE_string("other", None, "Of another critic, to compare with.")
    flags.DEFINE_string("images", None, "Table of pictures and prompts: .jsonl, .parquet, or a folder.", required=True)
    flags.DEFINE_string("output", None, "The .jsonl file to write.", required=True)
    ranges.flag("threshold", THRESHOLD, "Of the heatmaps, for a point.", ranges.SHARE)
    command.run(main)
