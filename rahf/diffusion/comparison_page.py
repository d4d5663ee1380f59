"""The table and the HTML page that compare sets of generated images, side by side."""

import dataclasses
import math
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from rahf.diffusion import side_by_side
from rahf.diffusion.generator_metrics import Mean
from richhf_data import drawing, images, paths
from richhf_data.errors import UserError

SHOWN, OF_EACH = 40, 4  # prompts on the page, images of each prompt
INLINED_SIDE = 256  # pixels: longer sides are shrunk before they go into the page
SOURCES = {"side_by_side": "by score", "responses": "by people"}  # of verdicts
_TEMPLATES = drawing.templates(pathlib.Path(__file__).parent.parent)


@dataclasses.dataclass
class Evaluated:
    """One set of images and its evaluation.

    Attributes:
      values: name of a measure -> one number per image. means: key -> Mean. results: what `evaluate` returns.
      shown: row -> its image as a data URI, for the rows on the page.
      verdicts: of a later set against the first, one of each of `SOURCES`.
    """

    name: str
    prompts: Sequence[str]
    values: Mapping[str, np.ndarray]
    means: Mapping[str, Mean]
    results: Mapping[str, float]
    shown: Mapping[int, str]
    verdicts: Mapping[str, side_by_side.Verdict] = dataclasses.field(default_factory=dict)


def table(sets: Sequence[Evaluated]) -> list[list[str]]:
    """Lines of cells, header first: the results of each set, and the difference of each later set from the first."""
    first, *others = sets
    names = [one.name for one in sets]
    lines = [["", "n", *names, *([f"{one.name} - {first.name}" for one in others])]]
    keys = [key for key in ("num_images", "fid") if key in first.results]
    for key in (*keys, *dict.fromkeys(key for one in sets for key in one.means)):
        if key in keys:
            numbers = [one.results[key] for one in sets]
            text = "{:.0f}" if key == "num_images" else "{:.4g}"
            later = [f"{number - numbers[0]:+.4g}" for number in numbers[1:]] if key == "fid" else [""] * len(others)
            lines.append([key, "", *(text.format(number) for number in numbers), *later])
            continue
        found = [one.means.get(key) for one in sets]
        counts = list(dict.fromkeys(str(mean.count) if mean else "-" for mean in found))
        cells = [_plus_minus(mean, "{:.3f}") if mean else "-" for mean in found]
        later = [_plus_minus(mean - found[0], "{:+.3f}") if mean and found[0] else "-" for mean in found[1:]]
        lines.append([key, " / ".join(counts), *cells, *later])
    return lines


def verdicts_of(sets: Sequence[Evaluated]) -> list[list[str]]:
    """Lines of cells, header first: the verdicts on the later sets. No lines if there are none."""
    found = {
        f"{one.name} against {sets[0].name}, {SOURCES[source]}": verdict
        for one in sets
        for source, verdict in one.verdicts.items()
    }
    return side_by_side.table(found) if found else []


def _plus_minus(mean: Mean, text: str) -> str:
    error = "" if math.isnan(mean.error) else f" ± {mean.error:.3f}"
    return "-" if math.isnan(mean.value) else text.format(mean.value) + error


def shown_rows(prompts: Sequence[Sequence[str]]) -> tuple[list[str], list[list[int]]]:
    """Chooses what the page shows: prompts spread evenly over those that all sets have, and rows of each set.

    Args:
      prompts: of each set, its rows' prompts.

    Raises:
      UserError: the sets have no prompt in common.
    """
    common = set.intersection(*map(set, prompts))
    shared = [text for text in dict.fromkeys(prompts[0]) if text in common]
    if not shared:
        got = " and ".join(repr(texts[0][:80]) for texts in prompts)
        raise UserError(f"images: the sets have no prompt in common, they begin with {got}; use the same prompts for each")
    count = min(SHOWN, len(shared))
    chosen = [shared[i * len(shared) // count] for i in range(count)]
    rows = []
    for texts in prompts:
        of = {text: [] for text in chosen}
        for row, text in enumerate(texts):
            if text in of and len(of[text]) < OF_EACH:
                of[text].append(row)
        rows.append([row for found in of.values() for row in found])
    return chosen, rows


def write_page(path, sets: Sequence[Evaluated], chosen: Sequence[str], words=None) -> None:
    """Writes one self-contained HTML page: the tables, and the images of the chosen prompts side by side."""
    kinds = words.kinds(chosen) if words else [""] * len(chosen)
    items = []
    for prompt, kind in zip(chosen, kinds, strict=True):
        columns = []
        for one in sets:
            rows = [row for row in one.shown if one.prompts[row] == prompt]
            columns.append([{"uri": one.shown[row], "lines": _caption(one.values, row)} for row in rows])
        items.append({"prompt": prompt, "kind": kind, "columns": columns})
    page = _TEMPLATES.get_template("generators.html.jinja").render(
        title="Generated pictures: " + ", ".join(one.name for one in sets),
        lines=table(sets),
        verdicts=verdicts_of(sets),
        names=[one.name for one in sets],
        items=items,
        across=max(len(column) for item in items for column in item["columns"]),
        shared=len(set.intersection(*(set(one.prompts) for one in sets))),
    )
    paths.replace(path, page.encode(errors="backslashreplace"))


def _caption(values, row) -> list[str]:
    names = {"reward": "reward", "side_by_side": "score", "clip_score": "CLIP"}
    lines = [f"{label} {values[name][row]:.2f}" for name, label in names.items() if name in values]
    if (verdict := values.get("alignment/all")) is not None and not np.isnan(verdict[row]):
        lines.append("right" if verdict[row] else "wrong")
    return lines


def inlined(image: np.ndarray) -> str:
    """An image, uint8[H, W, 3], as a data URI: JPEG, or PNG if it is small."""
    image = drawing.shrink(image, INLINED_SIDE)
    if max(image.shape[:2]) > INLINED_SIDE // 2:
        return drawing.jpeg(image)
    return drawing.data_uri("image/png", images.png(image))  # JPEG artefacts would be visible
