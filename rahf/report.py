"""A self-contained HTML page of images with the model's feedback on them.

An item is a dictionary with the fields of `richhf_data.schema`:

  image            uint8[H, W, 3], RGB
  prompt           str
  scores           {name: float in [0, 1]}, higher is better
  deviations       {name: float above 0}, optional: of the annotators' scores from them
  heatmaps         {name: float32[h, w] in [0, 1]} of any size; stretched over the image
  labelled_prompt  str, the prompt with `_0` on each misaligned word; None of a model that marks no words
  labels           optional: what `keywords.read_labels` reads in it with the model's vocabulary
  name             str, optional: the file or the uid of the image
  size             optional: (width, height) of the image before it was shrunk
  truth            optional: the annotators' scores and heatmaps, as above, and labels (0 = misaligned, 1 = aligned, for each
                   token of the prompt); each is optional

`richhf_data.drawing` explains colours and marks.
"""

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from richhf_data import drawing, keywords, paths
from richhf_data.errors import UserError

INLINED_SIDE = 384  # pixels; larger images are shrunk to this longer side
_TEMPLATES = drawing.templates(pathlib.Path(__file__).parent)


def write(
    path: str | os.PathLike,
    items: Sequence[Mapping[str, Any]],
    *,
    title: str,
    tables: Sequence[Sequence[Sequence[str]]] = (),
) -> None:
    """Writes one HTML page that needs no other file and no network. Makes its folder.

    Args:
      path: the page, for example `report.html`. Written whole or not at all.
      items: see the module's docstring.
      title: the page's heading.
      tables: shown above the items; each has lines of cells, header first, as `richhf_data.metrics.tables` makes them.

    Raises:
      UserError: a field of an item has the wrong shape, type or range; the message names it. Nothing is written.
    """
    write_views(path, [view(i, item) for i, item in enumerate(items)], title=title, tables=tables)


def write_views(
    path: str | os.PathLike,
    views: Sequence[Mapping[str, Any]],
    *,
    title: str,
    tables: Sequence[Sequence[Sequence[str]]] = (),
) -> None:
    """As `write`, from what `view` returned for each item."""
    page = render("report.html.jinja", items=views, title=title, tables=tables)
    paths.replace(path, page.encode(errors="backslashreplace"))  # a file's name may hold bytes that are no text


def render(template: str, **values) -> str:
    """A page of a template of this folder."""
    return _TEMPLATES.get_template(template).render(**values)


# ------------------------------------------------------------------------------------------------------ one item


def view(i: int, item: Mapping[str, Any]) -> dict[str, Any]:
    """Item number `i` for the page: JSON of texts, percentages and small pictures as data URIs.

    Raises:
      UserError: as `write`.
    """
    check_item(i, item)
    truth = item.get("truth") or {}
    true_scores, true_heatmaps = truth.get("scores") or {}, truth.get("heatmaps") or {}
    image = drawing.shrink(item["image"], INLINED_SIDE)
    size = item.get("size", item["image"].shape[1::-1])
    shown = [{"caption": "image", "note": "{} x {}".format(*size), "uri": drawing.jpeg(image)}]
    for name, heatmap in item["heatmaps"].items():
        for source, values in (("model", heatmap), ("annotators", true_heatmaps.get(name))):
            if values is not None:
                note = f"{source}, peak {np.max(values):.2f}"
                shown.append({"caption": name, "note": note, "uri": drawing.jpeg(drawing.overlay(image, values))})
    scores, deviations = [], item.get("deviations") or {}
    for name, value in item["scores"].items():
        true = true_scores.get(name)
        true = None if true is None or np.isnan(true) else float(true)
        scores.append({"name": name, "value": float(value), "width": _percent(value), "truth": true,
                       "tick": None if true is None else _percent(true), "deviation": deviations.get(name)})  # fmt: skip
    labels = truth.get("labels")
    errors = [abs(score["value"] - score["truth"]) for score in scores if score["truth"] is not None]
    return {
        "compared": bool(truth),
        "has_words": item.get("labelled_prompt", "") is not None,
        "has_heatmaps": bool(item["heatmaps"]),
        "error": float(np.mean(errors)) if errors else 0.0,
        "unsure": float(np.mean(list(deviations.values()))) if deviations else 0.0,
        "name": item.get("name", ""),
        "words": drawing.words(item["prompt"], predicted_labels(item)),
        "true_words": None if labels is None else drawing.words(item["prompt"], labels),
        "prompt": item["prompt"],
        "scores": scores,
        "pictures": shown,
    }


def predicted_labels(item: Mapping[str, Any]) -> list:
    """The labels of the prompt's tokens: the item's, or those in its `labelled_prompt`."""
    if "labels" in item:
        return item["labels"]
    return keywords.read_labels(item["labelled_prompt"], keywords.tokenize(item["prompt"]))


def _percent(value):
    return round(100 * min(max(float(value), 0.0), 1.0), 2)


# ---------------------------------------------------------------------------------------------------------- checks


def check_item(i: int, item: Mapping[str, Any]) -> None:
    """Raises UserError, which names the field of item number `i`, for a wrong shape, type or range."""
    drawing.check_image(f"items[{i}]['image']", item["image"])
    truth = item.get("truth") or {}
    for side, row in (("", item), ("['truth']", truth)):
        for name, heatmap in (row.get("heatmaps") or {}).items():
            drawing.check_heatmap(f"items[{i}]{side}['heatmaps'][{name!r}]", heatmap)
    for name, score in item["scores"].items():
        if not np.isfinite(score):
            raise UserError(f"items[{i}]['scores'][{name!r}]: got {score}, expected a number in [0, 1]")
    for name, deviation in (item.get("deviations") or {}).items():
        if not 0 < deviation < np.inf:
            raise UserError(f"items[{i}]['deviations'][{name!r}]: got {deviation}, expected a number above 0")
    labels, tokens = truth.get("labels"), keywords.tokenize(item["prompt"])
    if labels is not None and len(labels) != len(tokens):
        raise UserError(
            f"items[{i}]['truth']['labels']: got {len(labels)} for the {len(tokens)} tokens of prompt "
            f"{item['prompt']!r}, expected one each (None if they are unknown)"
        )
