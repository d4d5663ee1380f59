"""Writes a contact sheet of a built dataset: one self-contained HTML page with pictures, annotations and statistics.

  python -m richhf_data.browse --data_dir=DIR --split=train --output=FILE_OR_DIR [--limit=200] [--sort=FIELD]
      [--filter='plausibility<0.5' ...] [--text=WORDS] [--uid=UID ...]

The statistics are over all examples that pass the filters; the pictures are of the first `limit` of them. The page has its
own filters and orders too. These are the fields to filter and sort by; a field is absent if its annotation is:

  plausibility, alignment, aesthetics, overall   the scores, 0 to 1
  implausibility_area, misalignment_area         share of the picture that an annotator marked, 0 to 1
  words, misaligned_words                        number of words in the prompt, and of those that are misaligned
"""

import heapq
import io
import math
import operator
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import cv2
import matplotlib
import matplotlib.figure
import numpy as np
from absl import flags
from tqdm.auto import tqdm

from richhf_data import command, drawing, keywords, paths, ranges, schema
from richhf_data.errors import UserError

AREAS = tuple(f"{name}_area" for name in schema.HEATMAPS)
FIELDS = (*schema.SCORES, *AREAS, "words", "misaligned_words")
THUMBNAIL = 192  # pixels
_THUMBNAIL_QUALITY = 75
_MEAN_MAP_SIZE = 64  # pixels
_COMPARISONS = {"<=": operator.le, ">=": operator.ge, "==": operator.eq, "<": operator.lt, ">": operator.gt}
_TEMPLATES = drawing.templates(pathlib.Path(__file__).parent)


def facts(example: Mapping[str, Any]) -> dict[str, float]:
    """The `FIELDS` of a decoded example (schema.py); nan for an absent annotation."""
    present, heatmaps = example["heatmap_mask"], np.moveaxis(example["heatmaps"], -1, 0)
    areas = [np.count_nonzero(one) / one.size if there else np.nan for one, there in zip(heatmaps, present, strict=True)]
    labels = example["labels"]
    return {
        **dict(zip(schema.SCORES, np.where(example["score_mask"], example["scores"], np.nan).tolist(), strict=True)),
        **dict(zip(AREAS, areas, strict=True)),
        "words": float(len(keywords.tokenize(example["prompt"]))),
        "misaligned_words": np.nan if labels is None else float(sum(one == keywords.MISALIGNED for one in labels)),
    }


def parse_filter(text: str) -> Callable[[Mapping[str, float]], bool]:
    """A condition on facts, such as `plausibility<0.5`; false for an absent field.

    Raises:
      UserError: the text is not a field, a comparison and a number.
    """
    match = re.fullmatch(r"\s*(\w+)\s*(<=|>=|==|<|>)\s*([-+.\w]+)\s*", text)
    try:
        if not match or match[1] not in FIELDS:
            raise ValueError
        field, compare, value = match[1], _COMPARISONS[match[2]], float(match[3])
        if not math.isfinite(value):
            raise ValueError
    except ValueError:
        raise UserError(
            f"filter: got {text!r}, expected FIELD<NUMBER (or <=, >, >=, ==), for instance 'plausibility<0.5', with one "
            f"of the fields {', '.join(FIELDS)}"
        ) from None
    return lambda one: bool(compare(one[field], value))


def select(
    examples: Iterable[Mapping[str, Any]],
    *,
    limit: int,
    filters: Sequence[str] = (),
    text: str = "",
    uids: Sequence[str] = (),
    sort: str = "",
    thumbnail: int = THUMBNAIL,
) -> tuple[list[dict], "Statistics"]:
    """The cards to show, at most `limit` and in order, and the statistics of all examples that pass the filters.

    Holds only the cards in memory. The arguments are the flags of the command.

    Raises:
      UserError: a malformed filter or `sort`, an unknown uid, or no example passes.
    """
    field, sign = sort.removeprefix("-"), -1 if sort.startswith("-") else 1
    if field and field not in FIELDS:
        raise UserError(f"sort: got {sort!r}, expected one of {', '.join(FIELDS)}, or one with - before it for downwards")
    conditions, uids = [parse_filter(one) for one in filters], set(uids)
    unseen = set(uids)
    statistics, kept = Statistics(), []  # kept: a heap of (rank, card), the lowest rank on top
    for index, example in enumerate(examples):
        found = facts(example)
        unseen.discard(example["uid"])
        if (
            (uids and example["uid"] not in uids)
            or text.casefold() not in f"{example['prompt']} {example['caption'] or ''}".casefold()
            or not all(condition(found) for condition in conditions)
        ):
            continue
        statistics.add(example, found)
        key = sign * found[field] if field else 0.0
        place = (-np.inf if np.isnan(key) else -key, -index)
        if len(kept) < limit:
            heapq.heappush(kept, (place, _card(example, found, thumbnail)))
        elif place > kept[0][0]:
            heapq.heapreplace(kept, (place, _card(example, found, thumbnail)))
    if unseen:
        raise UserError(f"uid: got {', '.join(sorted(unseen))}, expected some of the split's; correct or drop them")
    if not kept:
        asked = [*filters, *([f"text {text!r}"] if text else []), *([f"uid {', '.join(sorted(uids))}"] if uids else [])]
        raise UserError(f"no example passes {' and '.join(asked) or 'no filter'}, expected at least one; loosen them")
    return [card for _, card in sorted(kept, key=lambda entry: entry[0], reverse=True)], statistics


def write(path, cards: Sequence[dict], statistics: "Statistics", *, title: str, subtitle: str = "") -> None:
    """Writes one HTML page, whole or not at all; it needs no other file and no network."""
    page = _TEMPLATES.get_template("browse.html.jinja").render(
        title=title, subtitle=subtitle, cards=cards, plots=statistics.plots(), scores=schema.SCORES, fields=FIELDS
    )
    paths.replace(path, page.encode(errors="backslashreplace"))


def _card(example, found, thumbnail) -> dict[str, Any]:
    """What the template shows of an example: texts, numbers and data URIs."""
    image = drawing.shrink(example["image"], thumbnail)
    shown = [{"name": "image", "uri": drawing.jpeg(image, _THUMBNAIL_QUALITY), "note": ""}]
    for i, name in enumerate(schema.HEATMAPS):
        area, picture = found[AREAS[i]], {"name": name, "uri": None}
        if np.isnan(area):
            picture["note"] = "no label"
        elif not area:
            picture["note"] = "nothing marked"
        else:
            heat = cv2.resize(example["heatmaps"][..., i], image.shape[1::-1], interpolation=cv2.INTER_AREA)
            overlay = drawing.overlay(image, heat.astype(np.float32) / 255)
            picture |= {"uri": drawing.jpeg(overlay, _THUMBNAIL_QUALITY), "note": f"{area:.1%}"}
        shown.append(picture)
    labels = example["labels"]
    known = labels is not None
    return {
        "uid": example["uid"],
        "prompt": example["prompt"],
        "caption": example["caption"],
        "words": drawing.words(example["prompt"], labels if known else [keywords.ALIGNED] * int(found["words"])),
        "labelled": known,
        "facts": {name: None if np.isnan(value) else round(value, 4) for name, value in found.items()},
        "pictures": shown,
        "aspect": f"{image.shape[1]} / {image.shape[0]}",
        "size": "{} x {}".format(*example["image"].shape[1::-1]),
    }


# -------------------------------------------------------------------------------------------------- the statistics


class Statistics:
    """Collects what the plots of the page show, example by example."""

    def __init__(self):
        self._facts = []
        self._maps = np.zeros((len(schema.HEATMAPS), _MEAN_MAP_SIZE, _MEAN_MAP_SIZE))

    def __len__(self):
        return len(self._facts)

    def add(self, example: Mapping[str, Any], found: Mapping[str, float]) -> None:
        """Counts an example with its `facts`."""
        self._facts.append([found[name] for name in FIELDS])
        for i, present in enumerate(example["heatmap_mask"]):
            if present:
                size = (_MEAN_MAP_SIZE, _MEAN_MAP_SIZE)
                heatmap = np.ascontiguousarray(example["heatmaps"][..., i], np.float32)
                self._maps[i] += cv2.resize(heatmap, size, interpolation=cv2.INTER_AREA) / 255

    def values(self, field: str) -> np.ndarray:
        """float[n]: a field's values, over the examples that have it."""
        column = np.array(self._facts)[:, FIELDS.index(field)]
        return column[~np.isnan(column)]

    def mean_heatmap(self, name: str) -> np.ndarray:
        """float[64, 64] in [0, 1], over the examples that have the map."""
        i = schema.HEATMAPS.index(name)
        return self._maps[i] / max(1, len(self.values(AREAS[i])))

    def correlations(self) -> np.ndarray:
        """float[4, 4]: Pearson's correlation of each two scores, over the examples with both; nan if one is constant."""
        scores = np.array(self._facts)[:, : len(schema.SCORES)]
        table = np.full((len(schema.SCORES), len(schema.SCORES)), np.nan)
        for i, j in np.ndindex(table.shape):
            pairs = scores[:, [i, j]]
            pairs = pairs[~np.isnan(pairs).any(axis=1)]
            if len(pairs) and (np.ptp(pairs, axis=0) > 0).all():
                table[i, j] = np.corrcoef(pairs.T)[0, 1]
        return table

    def plots(self) -> list[dict[str, str]]:
        """Title, note and picture (a data URI of an SVG) of each plot."""
        with matplotlib.rc_context({"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 8}):
            return [
                *(self._histogram(name, name, _SCORE_COLOR, bounds=(0, 1)) for name in schema.SCORES),
                self._correlation_plot(),
                self._share_plot(),
                *(self._mean_heatmap_plot(name) for name in schema.HEATMAPS),
                self._histogram("words", "prompt words", _COUNT_COLOR),
                self._histogram("misaligned_words", "misaligned words", _COUNT_COLOR),
            ]

    def _histogram(self, field, title, color, bounds=None):
        values = self.values(field)
        figure, axes = _figure()
        if len(values):
            distinct = np.unique(np.round(values, 6))
            # A mean of a few raters takes a few values: one bar each, because bins would leave gaps.
            if len(distinct) <= 30:
                places, counts = np.unique(np.round(values, 6), return_counts=True)
                width = 0.85 * np.diff(distinct).min() if len(distinct) > 1 else 0.04 if bounds else 0.85
            else:
                counts, edges = np.histogram(values, 20, bounds)
                places, width = (edges[1:] + edges[:-1]) / 2, 0.9 * (edges[1] - edges[0])
            axes.bar(places, counts, width, color=color)
            axes.axvline(values.mean(), color=_INK, linewidth=1, linestyle=(0, (3, 2)))
        if bounds:
            axes.set(xlim=(-0.05, 1.05), xticks=(0, 0.25, 0.5, 0.75, 1), xticklabels=("0", ".25", ".5", ".75", "1"))
        else:
            axes.xaxis.get_major_locator().set_params(integer=True)
        axes.yaxis.get_major_locator().set_params(integer=True, nbins=4)
        mean = f"{values.mean():.2f} ± {values.std():.2f}" if len(values) else "no labels"
        return {"title": title, "note": mean + self._count(values), "uri": _svg(figure)}

    def _count(self, values):
        return f", n {len(values):,}" if 0 < len(values) < len(self) else ""

    def _correlation_plot(self):
        figure, axes = _figure(spines=False)
        table = self.correlations()
        axes.imshow(table, cmap="RdBu_r", vmin=-1, vmax=1, aspect="auto")
        for (row, column), value in np.ndenumerate(table):
            text = "-" if np.isnan(value) else f"{value:.2f}"
            axes.text(column, row, text, ha="center", va="center", color="white" if abs(value) > 0.6 else "black")
        short = [name[:5] for name in schema.SCORES]
        axes.set(xticks=range(len(short)), yticks=range(len(short)), xticklabels=short, yticklabels=short)
        return {"title": "scores' correlation", "note": "Pearson", "uri": _svg(figure)}

    def _share_plot(self):
        figure, axes = _figure(spines=False)
        names = ["implausible areas", "misaligned areas", "misaligned words"]
        for row, field in enumerate((*AREAS, "misaligned_words")):
            values = self.values(field)
            empty, some = np.sum(values == 0), np.sum(values > 0)
            parts = ((some, _HEAT_COLOR), (empty, _NEUTRAL), (len(self) - len(values), "none"))
            left = 0.0
            for count, color in parts:
                share = count / len(self)
                axes.barh(row, share, 0.42, left, color=color, edgecolor=_NEUTRAL, linewidth=0.5)
                left += share
            label = f"{names[row]}: none in {empty / len(values):.1%}" if len(values) else f"{names[row]}: no labels"
            axes.text(0, row - 0.3, label, va="bottom", color=_INK)
        axes.set(xlim=(0, 1), ylim=(2.4, -0.75), yticks=(), xticks=(0, 0.5, 1), xticklabels=("0", "50 %", "100 %"))
        return {"title": "marked or empty", "note": f"{len(self):,} examples", "uri": _svg(figure)}

    def _mean_heatmap_plot(self, name):
        mean = self.mean_heatmap(name)
        figure, axes = _figure(spines=False)
        axes.imshow(mean, cmap=drawing.COLORMAP, vmin=0, vmax=max(mean.max(), 1e-9), interpolation="bilinear")
        axes.set(xticks=(), yticks=())
        return {"title": f"mean {name}", "note": f"peak {mean.max():.3f}", "uri": _svg(figure)}


_SCORE_COLOR, _COUNT_COLOR, _HEAT_COLOR = "#d97400", "#5b86d6", "#e0861f"
_INK, _NEUTRAL = "#7d8496", "#b9bfcc"  # legible on the light and the dark page


def _figure(spines=True):
    figure = matplotlib.figure.Figure((2.5, 1.65), layout="constrained")
    axes = figure.add_subplot()
    axes.patch.set_alpha(0)
    axes.tick_params(colors=_INK, labelsize=7.5, length=2 if spines else 0)
    for side, spine in axes.spines.items():
        spine.set(visible=spines and side in ("bottom", "left"), color=_NEUTRAL)
    return figure, axes


def _svg(figure) -> str:
    file = io.BytesIO()
    figure.savefig(file, format="svg", metadata={"Date": None}, transparent=True)
    return drawing.data_uri("image/svg+xml", file.getvalue())


# ------------------------------------------------------------------------------------------------------ the command


def browse(data_dir, split: str, output, **arguments) -> pathlib.Path:
    """Writes the page of a split and returns its path: `output` if that ends in .html, else output/<split>.html.

    Args:
      arguments: those of `select`.

    Raises:
      UserError: no such dataset or split, or what `select` refuses.
    """
    from richhf_data import tasks  # TensorFlow

    examples, count = tasks.decoded(data_dir, split)
    cards, statistics = select(tqdm(examples, total=count, desc=split, unit="example", delay=0.5), **arguments)
    path = pathlib.Path(output)
    path = path if path.suffix == ".html" else path / f"{split}.html"
    of = f" of {count:,}" if len(statistics) < count else ""
    shown = f", {len(cards):,} shown" if len(cards) < len(statistics) else ""
    plural = "" if len(statistics) == 1 else "s"
    write(path, cards, statistics, title=f"RichHF: {split}", subtitle=f"{len(statistics):,}{of} example{plural}{shown}")
    return path


def main() -> None:
    """The command."""
    args = flags.FLAGS
    path = browse(
        args.data_dir,
        args.split,
        args.output,
        limit=args.limit,
        filters=args.filter,
        text=args.text,
        uids=args.uid,
        sort=args.sort,
        thumbnail=args.thumbnail,
    )
    print(f"{path} ({path.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    flags.DEFINE_string("data_dir", None, "What richhf_data.build wrote.")
    flags.DEFINE_string("split", "train", "Which split.")
    flags.DEFINE_string("output", None, "The page, or a folder for it.")
    ranges.flag("limit", 200, "Most examples to show; about 40 kB each.", ranges.COUNT)
    flags.DEFINE_multi_string("filter", [], "Only examples that meet a condition, 'plausibility<0.5'; of several, all.")
    flags.DEFINE_string("text", "", "Only examples with this in their prompt or caption.")
    flags.DEFINE_multi_string("uid", [], "Only the example with this uid; of several, any.")
    flags.DEFINE_string("sort", "", "Sort by this field, lowest first; -FIELD: highest first. By default the stored order.")
    ranges.flag("thumbnail", THUMBNAIL, "Longer side of a picture, pixels.", ranges.Range(16, 2**13, whole=True))
    flags.mark_flags_as_required(["data_dir", "output"])
    command.run(main)
