"""The page: the tables, and for each row its predictions against the truth, its errors, and its best and worst pictures."""

import dataclasses
import os
import pathlib
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np

from rahf import report
from rahf.tables.dataset import Dataset
from rahf.tables.layout import Table
from rahf.tables.predictions import Predictions, resized
from rahf.tables.targets import Targets
from richhf_data import drawing, jsonl, keywords, plotting
from richhf_data.annotate.choose import CATEGORY
from richhf_data.errors import UserError
from richhf_data.metrics import PerExample
from richhf_data.schema import HEATMAPS, SCORES

PICTURES = 3  # of each kind
_SIDE = 224  # pixels of a picture
_BINS = 8  # of a calibration curve, with as many examples each
_SIZE = ((3.4, 2.3), 150)  # of a plot: inches, pixels of an inch
_TEMPLATES = drawing.templates(pathlib.Path(__file__).parent)


@dataclasses.dataclass(frozen=True)
class Section:
    """A row on the page.

    Attributes:
      plots: of title, note and uri (a data URI). pictures: (what they are, views of rahf/report.py); note: what is missing.
    """

    name: str
    plots: list[dict[str, str]]
    pictures: list[tuple[str, list[dict]]]
    note: str


def render(title: str, notes: Sequence[str], tables: Sequence[Table], sections: Sequence[Section]) -> str:
    """The page as HTML, which needs no other file and no network."""
    template = _TEMPLATES.get_template("page_of_tables.html.jinja")
    return template.render(title=title, notes=notes, tables=tables, sections=sections)


def sections(
    found: Mapping[str, Predictions],
    values: Mapping[str, PerExample],
    truth: Targets,
    rewards: set[str],
    source: Dataset | None,
    categories: str | None,
) -> list[Section]:
    """What the page shows of each row.

    Args:
      found, values: of the rows. rewards: those whose scores are on a scale of their own. source: None for no pictures.
      categories: a .jsonl file, see `read_categories`.

    Raises:
      UserError: of the categories.
    """
    category_of = read_categories(categories, truth.uids) if categories else None
    chosen = {name: _choose(one, name in rewards) for name, one in values.items()}
    wanted = {truth.uids[place] for groups in chosen.values() for places in groups.values() for place in places}
    images = source.images(wanted) if source else {}
    with matplotlib.rc_context({"font.family": "sans-serif", "font.size": 8}):
        return [
            Section(
                name,
                _plots(one, truth, name in rewards, category_of),
                _views(found[name], truth, chosen[name], images, name in rewards) if source else [],
                "" if source else "Without --data_dir there are no pictures.",
            )
            for name, one in values.items()
        ]


def read_categories(path, uids: Sequence[str]) -> list[str]:
    """The category of each uid, by a line's uid, or the name of its image without folder and ending.

    Args:
      path: of lines such as `rahf.reward.categories` writes: {"image" or "uid": text, "category": text}.

    Raises:
      UserError: no such file, a line without them, or an example without a category.
    """
    expected, found = '{"uid": text, "category": text}, or "image" in place of "uid"', {}
    for row in jsonl.read(path, "categories", expected, (CATEGORY,)):
        uid = row.get("uid", os.path.splitext(os.path.basename(str(row.get("image", ""))))[0])
        if not jsonl.is_text(uid) or not uid:
            raise UserError(f"categories: {path}: got {str(row)[:80]}, expected {expected}")
        found[uid] = row[CATEGORY]
    if missing := [uid for uid in uids if uid not in found]:
        count = f"{len(missing)} of {len(uids)} examples"
        raise UserError(f"categories: {path}: {count} have none, the first {missing[0]!r}; expected one each")
    return [found[uid] for uid in uids]


# --------------------------------------------------------------------------------------------------------------- plots


def _plots(values, truth, is_reward, category_of):
    errors = np.abs(values.predicted_scores - values.true_scores)
    predicted = [i for i in range(len(SCORES)) if np.isfinite(errors[:, i]).sum() > 1]
    plots = [_scatter(values, i, is_reward) for i in predicted]
    if predicted:
        plots.append(_calibration_plot(values, predicted, is_reward))
    if predicted and not is_reward:
        error = _row_means(errors)
        words = np.array([len(prompt.split()) for prompt in truth.prompts])
        plots.append(_length_plot(error, words))
        if category_of is not None:
            plots.append(_category_plot(error, category_of))
    for i, name in enumerate(HEATMAPS):
        if np.isfinite(values.heatmaps["cc"][:, i]).any():
            plots.append(_histogram(values.heatmaps["cc"][:, i], name))
    return plots


def _row_means(values):
    """The mean of each row over what is not nan; nan of nothing."""
    there = np.isfinite(values)
    with np.errstate(invalid="ignore"):
        return np.where(there, values, 0).sum(axis=1) / there.sum(axis=1)


def _scatter(values, i, is_reward):
    figure, axes = plotting.figure(*_SIZE)
    if not is_reward:
        axes.plot([0, 1], [0, 1], color=plotting.NEUTRAL, linewidth=0.8)
        axes.set(xlim=(-0.03, 1.03))
    predicted, true = values.predicted_scores[:, i], values.true_scores[:, i]
    axes.plot(predicted, true, "o", color=plotting.SCORE_COLORS[i], markersize=2.5, alpha=0.35, markeredgewidth=0)
    axes.set(xlabel="predicted", ylabel="annotators", ylim=(-0.03, 1.03))
    return {"title": SCORES[i], "note": "each picture", "uri": plotting.uri(figure)}


def _calibration_plot(values, predicted, is_reward):
    figure, axes = plotting.figure(*_SIZE)
    if not is_reward:
        axes.plot([0, 1], [0, 1], color=plotting.NEUTRAL, linewidth=0.8)
    for i in predicted:
        x, y = values.predicted_scores[:, i], values.true_scores[:, i]
        known = np.isfinite(x) & np.isfinite(y)
        order = np.argsort(x[known], kind="stable")
        bins = [part for part in np.array_split(order, _BINS) if len(part)]
        points = [(x[known][part].mean(), y[known][part].mean()) for part in bins]
        style = {"color": plotting.SCORE_COLORS[i], "markersize": 3.5, "linewidth": 1, "label": SCORES[i]}
        axes.plot(*zip(*points, strict=True), "o-", **style)
    axes.set(xlabel="mean prediction", ylabel="mean of the annotators")
    plotting.legend(axes)
    return {"title": "Calibration", "note": f"{_BINS} bins of as many pictures", "uri": plotting.uri(figure)}


def _length_plot(error, words):
    figure, axes = plotting.figure(*_SIZE)
    edges = np.unique(np.quantile(words, np.linspace(0, 1, 6)).astype(int))
    places = np.clip(np.searchsorted(edges, words, side="right") - 1, 0, max(len(edges) - 2, 0))
    labels = [
        " to ".join(dict.fromkeys(str(end(words[places == place])) for end in (np.min, np.max)))
        for place in range(max(len(edges) - 1, 1))
    ]
    _bars(axes, [error[places == place] for place in range(len(labels))], labels)
    axes.set(xlabel="words of the prompt")
    return {"title": "Error of the scores by length", "note": "mean and 95 % interval", "uri": plotting.uri(figure)}


def _category_plot(error, category_of):
    figure, axes = plotting.figure(*_SIZE)
    names, category_of = sorted(set(category_of)), np.array(category_of)
    _bars(axes, [error[category_of == name] for name in names], names)
    return {"title": "Error of the scores by category", "note": "mean and 95 % interval", "uri": plotting.uri(figure)}


def _bars(axes, groups, labels):
    """A mean of each group with its normal 95 % interval."""
    for place, group in enumerate(groups):
        group = group[np.isfinite(group)]
        if len(group):
            reach = 1.96 * group.std(ddof=1) / np.sqrt(len(group)) if len(group) > 1 else 0
            axes.bar(place, group.mean(), 0.7, yerr=reach, color=plotting.SCORE_COLORS[1], ecolor=plotting.INK, capsize=2)
    axes.set(xticks=range(len(labels)), ylabel="mean absolute error")
    slanted = {"rotation": 25, "ha": "right"} if sum(map(len, labels)) > 30 else {}
    axes.set_xticklabels([label[:14] for label in labels], parse_math=False, **slanted)


def _histogram(cc, name):
    figure, axes = plotting.figure(*_SIZE)
    axes.hist(cc[np.isfinite(cc)], bins=np.linspace(-0.5, 1, 31), color=plotting.SCORE_COLORS[1])
    axes.set(xlabel="CC of a picture's heatmap", ylabel="pictures")
    return {"title": f"{name} heatmap", "note": "marked pictures", "uri": plotting.uri(figure)}


# ------------------------------------------------------------------------------------------------------------- pictures


def _choose(values: PerExample, is_reward: bool) -> dict[str, list[int]]:
    """{what they are: the places of pictures}: the best and the worst of the scores, and of each heatmap."""
    errors = np.abs(values.predicted_scores - values.true_scores)
    measures = {} if is_reward else {"scores, by mean absolute error": -_row_means(errors)}
    measures |= {f"{name} heatmap, by CC": values.heatmaps["cc"][:, i] for i, name in enumerate(HEATMAPS)}
    chosen = {}
    for what, goodness in measures.items():
        known = np.flatnonzero(np.isfinite(goodness))
        order = known[np.argsort(goodness[known], kind="stable")].tolist()
        if len(order) > 1:
            count = min(PICTURES, len(order) // 2)
            chosen |= {f"Best {what}": order[: -count - 1 : -1], f"Worst {what}": order[:count]}
    return chosen


def _views(found, truth, chosen, images, is_reward):
    return [
        (what, [_view(found, truth, place, images[truth.uids[place]], is_reward) for place in places])
        for what, places in chosen.items()
    ]


def _view(found, truth, place, image, is_reward):
    """A picture with its predictions and its truth, for rahf/report.py. A reward's number is not drawn as a score."""
    row, (true,) = found.row(found.places[truth.uids[place]]), truth.rows([place])
    tokens = keywords.tokenize(true["prompt"])
    labels = row["labels"]
    if labels is None and row["labelled_prompt"] is not None:
        labels = keywords.read_labels(row["labelled_prompt"], tokens)
    maps = None if row["heatmaps"] is None else resized(row["heatmaps"], truth.header.heatmap_size)
    scores = [i for i in range(len(SCORES)) if row["scores"] is not None and row["score_mask"][i] and not is_reward]
    item = {
        "image": drawing.shrink(image, _SIDE),
        "size": image.shape[1::-1],
        "prompt": true["prompt"],
        "scores": {SCORES[i]: float(row["scores"][i]) for i in scores},
        "heatmaps": {name: maps[..., i] for i, name in enumerate(HEATMAPS) if maps is not None and row["heatmap_mask"][i]},
        "labels": [keywords.ALIGNED] * len(tokens) if labels is None else labels,
        "name": true["uid"],
        "truth": {
            "scores": {name: float(true["scores"][i]) for i, name in enumerate(SCORES) if true["score_mask"][i]},
            "heatmaps": {
                name: true["heatmaps"][..., i].astype(np.float32) / 255
                for i, name in enumerate(HEATMAPS)
                if true["heatmap_mask"][i]
            },
            "labels": true["labels"],
        },
    }
    return report.view(place, item)
