"""Pictures of what a model says: one self-contained HTML page, and a figure for documents.

An item is a dictionary; `richhf_data.schema` says what each field means:

  image            uint8[H, W, 3], RGB
  prompt           str
  scores           {name: float in [0, 1]}, higher is better
  heatmaps         {name: float32[h, w] in [0, 1]}, any size: stretched over the image
  labelled_prompt  str, the prompt with `_0` on each misaligned word
  name             str, optional: the file or the uid that the image came from
  truth            optional, and so is each of its entries: scores and heatmaps as above, and labels (0 = misaligned or
                   1 = aligned for each token of the prompt)

What colours and marks mean is in `richhf_data.pictures`.
"""

import io
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.backends.backend_agg
import matplotlib.figure
import numpy as np

from richhf_data import drawing, keywords, paths
from richhf_data.errors import UserError

INLINED_SIDE = 384  # pixels: longer sides are shrunk before they go into the page
_WORD_COLORS = {"": "#222222", "misaligned": "#c81e1e", "missing": "#999999"}
_TEMPLATES = drawing.templates(pathlib.Path(__file__).parent)


def write(
    path: str | os.PathLike,
    items: Sequence[Mapping[str, Any]],
    *,
    title: str,
    tables: Sequence[Sequence[Sequence[str]]] = (),
) -> None:
    """Writes one HTML page that needs no other file and no network; the folder is made if it is not there.

    Args:
      path: the page, for instance `report.html`. Replaced in one step: a reader never sees half a page.
      items: see the module's docstring.
      title: the page's heading.
      tables: above the items, as `richhf_data.metrics.tables` gives them: lines of cells, header first.

    Raises:
      UserError: an item's field has the wrong shape, type or range; the message names it. Nothing is written then.
    """
    page = _TEMPLATES.get_template("report.html.jinja").render(
        title=title,
        tables=tables,
        items=[_view(i, item) for i, item in enumerate(items)],
    )
    paths.replace(path, page.encode())


def figure(items: Sequence[Mapping[str, Any]], path: str | os.PathLike) -> None:
    """Draws a few items as one PNG, a row each: image, heatmaps (model, annotators), scores; the prompt above.

    Args:
      items: see the module's docstring; at least one. All show the heatmaps and scores that the first has.
      path: the PNG, replaced in one step; the folder is made if it is not there.

    Raises:
      UserError: there is no item, or one has a field of the wrong shape, type or range.
    """
    if not items:
        raise UserError("items: got none, expected at least one")
    for i, item in enumerate(items):
        _check_item(i, item)
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
                _draw_prompt(sheet, axes, drawing.words(item["prompt"], _predicted_labels(item)))
        axes = sheet.add_subplot(grid[row, columns])
        _draw_scores(axes, item["scores"], truth.get("scores") or {})
        if row == len(items) - 1:
            axes.set_xlabel("scores, 0 to 1" + "\nbar: model, tick: annotators" * (len(sources) > 1), fontsize=8)
    png = io.BytesIO()
    sheet.savefig(png, format="png", facecolor="white")
    paths.replace(path, png.getvalue())


# ------------------------------------------------------------------------------------------------------ one item


def _view(i: int, item: Mapping[str, Any]) -> dict[str, Any]:
    """What the template shows of an item: texts, percentages and data URIs only."""
    _check_item(i, item)
    truth = item.get("truth") or {}
    true_scores, true_heatmaps = truth.get("scores") or {}, truth.get("heatmaps") or {}
    image = drawing.shrink(item["image"], INLINED_SIDE)
    shown = [{"caption": "image", "note": "{} x {}".format(*item["image"].shape[1::-1]), "uri": drawing.jpeg(image)}]
    for name, heatmap in item["heatmaps"].items():
        for source, values in (("model", heatmap), ("annotators", true_heatmaps.get(name))):
            if values is not None:
                note = f"{source}, peak {np.max(values):.2f}"
                shown.append({"caption": name, "note": note, "uri": drawing.jpeg(drawing.overlay(image, values))})
    scores = []
    for name, value in item["scores"].items():
        true = true_scores.get(name)
        true = None if true is None or np.isnan(true) else float(true)
        scores.append({"name": name, "value": float(value), "width": _percent(value), "truth": true,
                       "tick": None if true is None else _percent(true)})  # fmt: skip
    labels = truth.get("labels")
    errors = [abs(score["value"] - score["truth"]) for score in scores if score["truth"] is not None]
    return {
        "compared": bool(truth),
        "error": float(np.mean(errors)) if errors else 0.0,
        "name": item.get("name", ""),
        "words": drawing.words(item["prompt"], _predicted_labels(item)),
        "true_words": None if labels is None else drawing.words(item["prompt"], labels),
        "prompt": item["prompt"],
        "scores": scores,
        "pictures": shown,
    }


def _predicted_labels(item):
    return keywords.read_labels(item["labelled_prompt"], keywords.tokenize(item["prompt"]))


def _percent(value):
    return round(100 * min(max(float(value), 0.0), 1.0), 2)


# ----------------------------------------------------------------------------------------------------- the figure


def _draw_prompt(sheet, axes, words):
    """The prompt above a row, word by word: matplotlib has one colour per text."""
    renderer = sheet.canvas.get_renderer()
    scale = axes.get_window_extent(renderer).width
    x, y = 0.0, 1 + 0.08 * sheet.dpi / axes.get_window_extent(renderer).height  # 0.08 inches above the image
    room = 0.98 * sheet.bbox.width / scale
    for word, kind in words:
        style = {"color": _WORD_COLORS[kind], "fontweight": "bold" if kind == "misaligned" else "normal"}
        text = axes.text(x, y, word, transform=axes.transAxes, fontsize=9, parse_math=False, **style)
        # Trailing spaces have no extent: measure the word between two bars.
        probe = axes.text(0, 0, f"|{word}|", fontsize=9, parse_math=False, **style)
        bars = axes.text(0, 0, "||", fontsize=9, parse_math=False, **style)
        width = (probe.get_window_extent(renderer).width - bars.get_window_extent(renderer).width) / scale
        probe.remove()
        bars.remove()
        if x + width > room:
            text.set(text="...", color=_WORD_COLORS[""])
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
    # The bars keep away from the heatmaps: their labels stand left of the axes.
    left, bottom, width, height = axes.get_position().bounds
    axes.set_position((left + 0.38 * width, bottom + 0.08 * height, 0.62 * width, 0.84 * height))


# ---------------------------------------------------------------------------------------------------------- checks


def _check_item(i, item):
    drawing.check_image(f"items[{i}]['image']", item["image"])
    truth = item.get("truth") or {}
    for side, row in (("", item), ("['truth']", truth)):
        for name, heatmap in (row.get("heatmaps") or {}).items():
            drawing.check_heatmap(f"items[{i}]{side}['heatmaps'][{name!r}]", heatmap)
    for name, score in item["scores"].items():
        if not np.isfinite(score):
            raise UserError(f"items[{i}]['scores'][{name!r}]: got {score}, expected a number in [0, 1]")
    labels, tokens = truth.get("labels"), keywords.tokenize(item["prompt"])
    if labels is not None and len(labels) != len(tokens):
        raise UserError(
            f"items[{i}]['truth']['labels']: got {len(labels)} for the {len(tokens)} tokens of prompt "
            f"{item['prompt']!r}, expected one each (None if they are unknown)"
        )
