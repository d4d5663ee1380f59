"""Draws the figures of the README.

    python docs/figures.py --workdir=synth --data_dir=demo/data
"""

import io
import itertools
import os
import pathlib
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.backends.backend_agg
import matplotlib.figure
import numpy as np
from absl import flags

from rahf import predict, predictor, report
from richhf_data import command, drawing, keywords, paths, schema, synthetic
from richhf_data.errors import UserError

HERE = pathlib.Path(__file__).parent
WORD_COLORS = {"": "#222222", "misaligned": "#c81e1e", "missing": "#999999"}


def annotated(path, count=16, columns=4, size=192):
    """Draws RichHF-Synth examples: the image, both heatmaps over it, the labelled prompt above and the scores below."""
    rows = -(-count // columns)
    figure = matplotlib.figure.Figure(figsize=(5.2 * columns, 2.5 * rows))
    for index, example in enumerate(synthetic.examples("train", count, 1, size, size)):
        axes = figure.add_subplot(rows, columns, index + 1)
        maps = np.moveaxis(example.heatmaps.astype(np.float32) / 255, -1, 0)
        axes.imshow(np.hstack([example.image, *(drawing.overlay(example.image, heatmap) for heatmap in maps)]))
        axes.set_axis_off()
        text = keywords.label_prompt(keywords.tokenize(example.prompt), example.labels)
        axes.set_title("\n".join(textwrap.wrap(text, 58)), fontsize=9)
        scores = "   ".join(f"{name} {score:.2f}" for name, score in zip(schema.SCORES, example.scores, strict=True))
        axes.text(0.5, -0.04, scores, transform=axes.transAxes, ha="center", va="top", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=60)


def predictions(items: Sequence[Mapping[str, Any]], path: str | os.PathLike) -> None:
    """Draws items as a PNG, one row each: the prompt above image, heatmaps (model, annotators) and scores.

    Args:
      items: of rahf/report.py, one or more. All rows show the heatmaps and scores of the first item's names.
      path: the PNG. Written whole or not at all; its folder is made.

    Raises:
      UserError: no items, or one with a field of the wrong shape, type or range.
    """
    if not items:
        raise UserError("items: got none, expected at least one")
    for i, item in enumerate(items):
        report.check_item(i, item)
    names = list(items[0]["heatmaps"])
    sources = ("model", "annotators") if any(item.get("truth") for item in items) else ("model",)
    columns = 1 + len(names) * len(sources)
    side, bars, gap, bottom = 1.75, 2.5, 0.38, 0.42  # inches
    heights = [side * item["image"].shape[0] / item["image"].shape[1] for item in items]
    width, height = columns * side + bars, sum(heights) + len(items) * gap + bottom
    sheet = matplotlib.figure.Figure((width, height), dpi=120)
    matplotlib.backends.backend_agg.FigureCanvasAgg(sheet)  # draws without a display
    grid = sheet.add_gridspec(
        len(items), columns + 1, width_ratios=[side] * columns + [bars], height_ratios=heights, left=0.01, right=0.985,
        wspace=0.05, bottom=bottom / height, top=1 - gap / height, hspace=gap / np.mean(heights),
    )  # fmt: skip
    for row, item in enumerate(items):
        truth = item.get("truth") or {}
        maps = [(f"{name}\n{source}", source, name) for name in names for source in sources]
        for column, (label, source, name) in enumerate([("image", None, None), *maps]):
            axes = sheet.add_subplot(grid[row, column], xticks=[], yticks=[])
            axes.set_frame_on(False)
            heatmap = (item if source == "model" else truth).get("heatmaps", {}).get(name) if name else None
            if name is None or heatmap is not None:
                axes.imshow(item["image"] if name is None else drawing.overlay(item["image"], heatmap))
            else:
                axes.text(0.5, 0.5, "no label", ha="center", color="#999999", transform=axes.transAxes)
            if row == len(items) - 1:
                axes.set_xlabel(label, fontsize=8)
            if column == 0:
                _draw_prompt(sheet, axes, drawing.words(item["prompt"], report.predicted_labels(item)))
        axes = sheet.add_subplot(grid[row, columns])
        _draw_scores(axes, item["scores"], truth.get("scores") or {})
        if row == len(items) - 1:
            axes.set_xlabel("scores, 0 to 1" + "\nbar: model, tick: annotators" * (len(sources) > 1), fontsize=8)
    png = io.BytesIO()
    sheet.savefig(png, format="png", facecolor="white")
    paths.replace(path, png.getvalue())


def _draw_prompt(sheet, axes, words):
    """Writes the prompt above a row, word by word: a text of matplotlib has one colour."""
    renderer = sheet.canvas.get_renderer()
    scale = axes.get_window_extent(renderer).width
    x, y = 0.0, 1 + 0.08 * sheet.dpi / axes.get_window_extent(renderer).height  # 0.08 inches above the image
    room = 0.98 * sheet.bbox.width / scale
    for word, kind in words:
        style = {"color": WORD_COLORS[kind], "fontweight": "bold" if kind == "misaligned" else "normal"}
        text = axes.text(x, y, word, transform=axes.transAxes, fontsize=9, parse_math=False, **style)
        # Trailing spaces have no extent: measure the word between two bars.
        probe = axes.text(0, 0, f"|{word}|", fontsize=9, parse_math=False, **style)
        bars = axes.text(0, 0, "||", fontsize=9, parse_math=False, **style)
        width = (probe.get_window_extent(renderer).width - bars.get_window_extent(renderer).width) / scale
        probe.remove()
        bars.remove()
        if x + width > room:
            text.set(text="...", color=WORD_COLORS[""])
            return
        x += width


def _draw_scores(axes, scores, true_scores):
    for y, (name, value) in enumerate(scores.items()):
        axes.barh(y, 1, height=0.5, color="#eceef2")
        axes.barh(y, value, height=0.5, color="#4f7fd9")
        axes.text(1.04, y, f"{value:.2f}", va="center", fontsize=7.5)
        if true_scores.get(name) is not None:
            axes.plot([true_scores[name]] * 2, [y - 0.38, y + 0.38], color="#e07b00", linewidth=2.5)
    axes.set(xlim=(0, 1.25), ylim=(len(scores) - 0.3, -0.7), xticks=[], yticks=range(len(scores)))
    axes.set_yticklabels(scores, fontsize=7.5)
    axes.tick_params(length=0)
    axes.set_frame_on(False)
    # Leave room for the labels, which are left of the axes.
    left, bottom, width, height = axes.get_position().bounds
    axes.set_position((left + 0.38 * width, bottom + 0.08 * height, 0.62 * width, 0.84 * height))


def main():
    """The command."""
    annotated(HERE / "richhf_synth.png")
    model = predictor.load(flags.FLAGS.workdir)
    examples, _ = predict.dataset_examples(flags.FLAGS.data_dir, "test", 40)
    items = list(predict.predict_items(model, examples, 40))
    picked = [items[index] for index in map(int, flags.FLAGS.indices)]
    predictions(list(itertools.islice(picked, 4)), HERE / "predictions.png")


if __name__ == "__main__":
    flags.DEFINE_string("workdir", "demo/run", "A training run.")
    flags.DEFINE_string("data_dir", "demo/data", "The demo's dataset.")
    flags.DEFINE_list("indices", ["2", "6", "7"], "Which test examples to show.")
    command.run(main)
