"""Measures how much several annotators agree, and what each of them does differently. No TensorFlow.

  python -m richhf_data.agreement --annotations='annotations/*.jsonl' --output=DIR [--resamples=1000] [--seed=0]

reads the lines that `richhf_data.consolidate` reads, prints the tables, and writes them to DIR/agreement.md, with plots to
DIR/agreement.html, and every figure to DIR/agreement.json. Only pictures with two annotators or more count. An answer that
an annotator did not give is a gap, never a value.

An annotator is compared with the others of the same picture: with the mean of their scores, the mean of their disk maps
(pixels, as `consolidate` averages them) and the majority of their word labels. The keys of agreement.json:

  alpha/{SCORE,words}, and .../low, .../high     Krippendorff's alpha, and the bounds of its 95 % interval
  {equal,within_one}/{SCORE,all}                 share of pictures whose annotators gave one score; within one point
  difference/SCORE/{0,1,2,3,4}                   share of the pairs of annotators whose scores differ so, rounded
  marked_or_not/MAP                              share of pictures whose annotators agree whether there is anything to mark
  points/MAP, point_hits/MAP                     points of an annotator per picture; share of them that another one confirms
  compared/{SCORE,MAP,words}                     pictures that two annotators or more answered
  one_vs_others/...                              the keys of `metrics.evaluate`: each annotator as a prediction of the others
  ceiling/score/plcc/SCORE                       the highest PLCC with the mean score that a critic can expect (`ceiling`)
  annotator/NAME/...                             pictures; offset, absolute_difference and plcc, each also /SCORE;
                                                 points/MAP, point_hits/MAP, words_f1
  pictures, pictures_read, annotators, annotations   counts; all but the second of the pictures that count
"""

import dataclasses
import itertools
import pathlib
import re
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
import scipy.sparse
import scipy.stats
from absl import flags
from tabulate import tabulate
from tqdm.auto import tqdm

from richhf_data import command, consolidate, drawing, json_files, keywords, metrics, paths, plotting, ranges, schema
from richhf_data.errors import UserError
from richhf_data.schema import HEATMAPS, SCORES

METRICS = ("nominal", "ordinal", "interval")
RESAMPLES = 1000
INTERVAL = (2.5, 97.5)  # percentiles
MAP_SIZE = 64  # pixels of the compared maps, as in RichHF-Synth's reference results
PAPER = {"equal": schema.RATERS_EQUAL, "within_one": schema.RATERS_WITHIN_ONE}
FILES = ("agreement.md", "agreement.html", "agreement.json")
_MAP_METRICS = {  # undefined for an empty truth
    "cc": metrics.cc,
    "kld": metrics.kld,
    "sim": metrics.sim,
    "nss": metrics.nss,
    "auc_judd": metrics.auc_judd,
}
_TOLERANCE = 1e-9  # of scores, which need not be whole, and of squared distances
_BATCH = 256  # maps
_WEIGHTS = 1 << 21  # weights of pictures held at a time
_TEMPLATES = drawing.templates(pathlib.Path(__file__).parent)


# ---------------------------------------------------------------------------------------------- Krippendorff's alpha


@dataclasses.dataclass(frozen=True)
class Coincidences:
    """What alpha needs of the values of units, summed over groups of units: alpha of any groups is a weighted sum away.

    Attributes:
      values: float[V], the distinct values that are paired with another of their unit, rising.
      counts: sparse [groups, V], how often each is paired.
      cells: int[2, K], the places in `values` of each two different values that meet in a unit, the smaller one first.
      pairs: sparse [groups, K], the pairs of a unit with these values, each divided by (the unit's values - 1).
    """

    values: np.ndarray
    counts: scipy.sparse.csr_array
    cells: np.ndarray
    pairs: scipy.sparse.csr_array


def coincidences(values: np.ndarray, groups: np.ndarray | None = None, num_groups: int | None = None) -> Coincidences:
    """The coincidences of float[raters, units] with nan gaps; the order of a unit's raters does not matter.

    Args:
      groups: int[units], the group of each unit, from 0 to `num_groups` - 1; by default each unit is its own.

    Raises:
      UserError: the values are not [raters, units], or one is infinite.
    """
    values = np.asarray(values, np.float64)
    if values.ndim != 2 or np.isinf(values).any():
        got = f"shape {values.shape}" if values.ndim != 2 else "an infinite value"
        raise UserError(f"values: got {got}, expected numbers [raters, units] with nan for what is absent")
    if groups is None:
        groups, num_groups = np.arange(values.shape[1]), values.shape[1]
    known = ~np.isnan(values)
    raters = known.sum(axis=0)  # [units]
    known &= raters > 1
    distinct = np.unique(values[known])
    places = np.searchsorted(distinct, np.where(known, values, distinct[0] if len(distinct) else 0))
    rows = np.broadcast_to(groups, values.shape)[known]
    counts = scipy.sparse.csr_array((np.ones(len(rows)), (rows, places[known])), shape=(num_groups, len(distinct)))
    found = [np.zeros((4, 0))]  # group, smaller and larger place, weight
    for one, other in itertools.combinations(range(len(values)), 2):
        units = np.flatnonzero(known[one] & known[other] & (places[one] != places[other]))
        two = np.sort(places[[one, other]][:, units], axis=0)
        found.append(np.stack([groups[units], *two, 1 / (raters[units] - 1)]))
    rows, low, high, weights = np.concatenate(found, axis=1)
    cells, columns = np.unique(np.stack([low, high]).astype(np.int64), axis=1, return_inverse=True)
    pairs = scipy.sparse.csr_array((weights, (rows.astype(np.int64), columns)), shape=(num_groups, cells.shape[1]))
    return Coincidences(distinct, counts, cells, pairs)


def alphas(found: Coincidences, metric: str, weights: np.ndarray) -> np.ndarray:
    """float64[n]: alpha with each group of units taken `weights`[n, groups] times; nan where it is undefined.

    With n_c the number of pairable values c, N their sum and d(c, k) the difference of two values, alpha is

      1 - (N - 1) * sum over the pairs of values of a unit, both orders, of d^2 / (the unit's values - 1)
                  / sum over c and k of n_c n_k d^2

    d is 0 or 1 (nominal), |c - k| (interval), or the difference of the values' mean ranks (ordinal: the sum of n_g from c
    to k less (n_c + n_k) / 2). It is undefined without two different values. Source: Krippendorff, Computing
    Krippendorff's Alpha-Reliability (2011), https://repository.upenn.edu/asc_papers/43.

    Raises:
      UserError: another metric.
    """
    if metric not in METRICS:
        raise UserError(f"metric: got {metric!r}, expected one of {', '.join(METRICS)}")
    counts, pairs = weights @ found.counts, weights @ found.pairs  # [n, V], [n, K]
    total = counts.sum(axis=1, keepdims=True)
    if metric == "nominal":
        observed = 2 * pairs.sum(axis=1)
        expected = total[:, 0] ** 2 - (counts**2).sum(axis=1)
    else:
        ranks = np.cumsum(counts, axis=1) - counts / 2
        scale = ranks if metric == "ordinal" else np.broadcast_to(found.values, counts.shape)
        mean = np.divide((counts * scale).sum(axis=1, keepdims=True), total, out=np.zeros_like(total), where=total > 0)
        low, high = found.cells
        observed = 2 * (pairs * (scale[:, low] - scale[:, high]) ** 2).sum(axis=1)
        expected = 2 * total[:, 0] * (counts * (scale - mean) ** 2).sum(axis=1)
    defined = (counts > 0).sum(axis=1) > 1
    ratio = np.divide((total[:, 0] - 1) * observed, expected, out=np.full(len(weights), np.nan), where=defined)
    return 1 - ratio


def alpha(values: np.ndarray, metric: str) -> float:
    """Krippendorff's alpha of float[raters, units] with nan gaps: 1 = full agreement, 0 = as by chance, below = less.

    Args:
      metric: "nominal", "ordinal" or "interval"; see `alphas`.

    Returns:
      nan if no unit has two values, or all values of these units are equal.

    Raises:
      UserError: another metric, values that are not [raters, units], or an infinite one.

    >>> alpha([[1, 2, 3, 3], [1, 2, 3, np.nan]], "ordinal")
    1.0
    """
    found = coincidences(values)
    return float(alphas(found, metric, np.ones((1, found.counts.shape[0])))[0])


def intervals(
    found: Sequence[tuple[Coincidences, str]], resamples: int = RESAMPLES, seed: int = 0
) -> list[tuple[float, float]]:
    """The bounds of alpha's 95 % interval for each (coincidences, metric): percentiles of a bootstrap over the groups.

    All have the same groups, and take the same ones in a resample. nan with fewer than two groups that have pairs of values,
    or where alpha is undefined; a resample in which it is undefined is left out.
    """
    (num_groups,) = {one.counts.shape[0] for one, _ in found}
    rng, step = np.random.default_rng(seed), max(1, _WEIGHTS // num_groups)
    samples = np.full((len(found), resamples), np.nan)
    with tqdm(total=resamples, desc="bootstrap", unit="resample", delay=0.5) as bar:
        for start in range(0, resamples, step):
            rows = range(start, min(start + step, resamples))
            drawn = [np.bincount(rng.integers(num_groups, size=num_groups), minlength=num_groups) for _ in rows]
            weights = np.array(drawn, np.float64)
            for sample, (one, metric) in zip(samples, found, strict=True):
                sample[rows.start : rows.stop] = alphas(one, metric, weights)
            bar.update(len(rows))
    bounds = []
    for sample, (one, _) in zip(samples, found, strict=True):
        sample = sample[~np.isnan(sample)]
        enough = len(sample) and np.count_nonzero(one.counts.sum(axis=1)) > 1
        bounds.append(tuple(map(float, np.percentile(sample, INTERVAL))) if enough else (np.nan, np.nan))
    return bounds


# ------------------------------------------------------------------------------------------- one annotator and the others
# Arrays are float[places, pictures]: a picture's annotators in the order of their lines, nan for what is absent.


def means_of_others(values: np.ndarray) -> np.ndarray:
    """For each value of float[places, pictures], the mean of its picture's others; nan for a gap, and without others."""
    known = ~np.isnan(values)
    others = known.sum(axis=0) - known
    given = np.where(known, values, 0.0)
    total = given.sum(axis=0) - given
    mean = np.divide(total, others, out=np.full(values.shape, np.nan), where=known & (others > 0))
    return np.round(mean, 9)  # equal means tie


def ceiling(values: np.ndarray) -> float:
    """The highest PLCC with the mean of a picture's scores, float[places, pictures], that a critic can expect.

    It is the square root of the mean's reliability, 1 - (error variance of the means) / (their variance): what the exact
    score of each picture would reach if annotators' errors were independent. The error variance is that of scores within a
    picture, divided by their number. With as many annotators for each picture the reliability is ICC(1, k) of Shrout and
    Fleiss (1979); correlations that errors attenuate are Spearman's (1904).

    Returns:
      A number in [0, 1]; nan with fewer than two pictures that two annotators or more scored, or if their means are equal.
    """
    values = values[:, (~np.isnan(values)).sum(axis=0) > 1]
    known = ~np.isnan(values)
    number = known.sum(axis=0)
    if len(number) < 2:
        return np.nan
    mean = np.where(known, values, 0.0).sum(axis=0) / number
    within = (np.where(known, values - mean, 0.0) ** 2).sum() / (number - 1).sum()
    variance = mean.var(ddof=1)
    if variance <= _TOLERANCE:
        return np.nan
    return float(np.sqrt(max(0.0, 1 - within * (1 / number).mean() / variance)))


def compare_maps(pictures: Sequence[consolidate.AnnotatedImage], index: int, size: int = MAP_SIZE) -> dict[str, np.ndarray]:
    """Compares each annotator's points for a map with those of the others of the picture.

    The pictures' aspect is not known: they count as square.

    Args:
      index: of the map in `schema.HEATMAPS`.
      size: pixels of the disk maps, both sides.

    Returns:
      float[places, pictures] by name, nan where fewer than two annotators were asked: `metrics.HEATMAP_METRICS` of the
      annotator's disk map as a prediction of the mean of the others' (also nan where a metric is); "points", their number;
      and "hits", the number of these within `schema.POINT_RADIUS` of the picture's height of another annotator's point.
    """
    shape = max(len(one.annotations) for one in pictures), len(pictures)
    found = {name: np.full(shape, np.nan) for name in (*metrics.HEATMAP_METRICS, "points", "hits")}
    batch: list[tuple[int, int, np.ndarray, np.ndarray]] = []
    for column, picture in enumerate(tqdm(pictures, desc=HEATMAPS[index], unit="picture", delay=0.5)):
        points = [one.points[index] for one in picture.annotations.values()]
        asked = [place for place, marks in enumerate(points) if marks is not None]
        if len(asked) < 2:
            continue
        found["points"][asked, column] = [len(points[place]) for place in asked]
        found["hits"][asked, column] = [_hits(points, place) for place in asked]
        if not any(points[place] for place in asked):
            found["mse"][asked, column] = found["mse_empty"][asked, column] = 0
            continue
        maps = np.stack([consolidate.disks(points[place], size) for place in asked])
        votes = maps.sum(axis=0)
        batch += [(place, column, one, (votes - one) / (len(asked) - 1)) for place, one in zip(asked, maps, strict=True)]
        if len(batch) >= _BATCH:
            _compare(found, batch)
            batch = []
    if batch:
        _compare(found, batch)
    return found


def _hits(points, place) -> int:
    """How many of an annotator's points lie near a point of another one."""
    others = [point for one, marks in enumerate(points) if one != place for point in marks or ()]
    if not others or not points[place]:
        return 0
    apart = np.array(points[place])[:, None] - np.array(others)
    return int(((apart**2).sum(axis=-1) <= schema.POINT_RADIUS**2 + _TOLERANCE).any(axis=1).sum())


def _compare(found, batch) -> None:
    places, columns, predictions, truths = (np.array(part) for part in zip(*batch, strict=True))
    error, marked = metrics.mse(predictions, truths), truths.any(axis=(1, 2))
    found["mse"][places, columns] = error
    found["mse_empty"][places, columns] = np.where(marked, np.nan, error)
    if marked.any():
        for name, metric in _MAP_METRICS.items():
            found[name][places[marked], columns[marked]] = metric(predictions[marked], truths[marked])


def compare_words(pictures: Sequence[consolidate.AnnotatedImage]) -> dict[str, np.ndarray]:
    """Compares the words that each annotator marked as misaligned with those that more than half of the others marked.

    Returns:
      float[places, pictures] by name, nan where fewer than two annotators were asked: "both" (words in both), "marked" (by
      the annotator) and "true" (by the majority of the others).
    """
    shape = max(len(one.annotations) for one in pictures), len(pictures)
    found = {name: np.full(shape, np.nan) for name in ("both", "marked", "true")}
    for column, picture in enumerate(pictures):
        labels = [one.labels for one in picture.annotations.values()]
        asked = [place for place, given in enumerate(labels) if given is not None]
        if len(asked) < 2:
            continue
        marked = np.array([labels[place] for place in asked]) == keywords.MISALIGNED  # [annotators, tokens]
        true = 2 * (marked.sum(axis=0) - marked) > len(asked) - 1
        for name, words in (("both", marked & true), ("marked", marked), ("true", true)):
            found[name][asked, column] = words.sum(axis=1)
    return found


# ------------------------------------------------------------------------------------------------------ the figures


def shared(pictures: Mapping[str, consolidate.AnnotatedImage]) -> list[consolidate.AnnotatedImage]:
    """The pictures with two annotators or more.

    Raises:
      UserError: there is none.
    """
    found = [one for one in pictures.values() if len(one.annotations) > 1]
    if not found:
        names = sorted({name for one in pictures.values() for name in one.annotations})
        by = f"{', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
        raise UserError(
            f"annotations: got {len(pictures)} pictures with one annotator each ({by}), expected one with two or more; "
            "give a pattern that matches the files of all annotators, and name a picture by one uid in all of them"
        )
    return found


def annotators(pictures: Sequence[consolidate.AnnotatedImage]) -> list[str]:
    """The names of the annotators, sorted."""
    return sorted({name for one in pictures for name in one.annotations})


def measure(pictures: Sequence[consolidate.AnnotatedImage], resamples: int = RESAMPLES, seed: int = 0) -> dict[str, float]:
    """Every figure of pictures with two annotators or more (`shared`); the module lists the keys.

    Args:
      resamples: of the bootstrap. seed: draws them.

    Returns:
      Finite numbers, or nan where there is nothing to measure. Correlations follow `metrics`: 0 if either side is constant.
      A micro F1 without any misaligned word is nan.
    """
    names = annotators(pictures)
    numbers = {name: number for number, name in enumerate(names)}
    shape = max(len(one.annotations) for one in pictures), len(pictures)
    who, scores = np.full(shape, -1), np.full((len(SCORES), *shape), np.nan)
    for column, picture in enumerate(pictures):
        for place, (name, annotation) in enumerate(picture.annotations.items()):
            who[place, column] = numbers[name]
            scores[:, place, column] = [np.nan if score is None else score for score in annotation.scores]
    others = np.stack([means_of_others(one) for one in scores])
    maps = [compare_maps(pictures, index) for index in range(len(HEATMAPS))]
    words = compare_words(pictures)
    figures = {
        "pictures": float(len(pictures)),
        "annotators": float(len(names)),
        "annotations": float((who >= 0).sum()),
        **_alpha_figures(pictures, scores, resamples, seed),
        **_score_figures(scores, others),
        **_map_figures(maps),
        **_word_figures(words),
    }
    order = np.argsort(who, axis=None, kind="stable")
    bounds = np.searchsorted(who.ravel()[order], np.arange(len(names) + 1))
    for name, (start, end) in zip(names, itertools.pairwise(bounds), strict=True):
        rows = order[start:end]
        given, rest = (one.reshape(len(SCORES), -1)[:, rows] for one in (scores, others))
        figures[f"annotator/{name}/pictures"] = float(len(rows))
        figures |= {f"annotator/{name}/{key}": value for key, value in _offsets(given, rest).items()}
        for heatmap, compared in zip(HEATMAPS, maps, strict=True):
            points, hits = (compared[key].ravel()[rows] for key in ("points", "hits"))
            figures[f"annotator/{name}/points/{heatmap}"] = _mean(points)
            figures[f"annotator/{name}/point_hits/{heatmap}"] = _ratio(np.nansum(hits), np.nansum(points))
        both, marked, true = (np.nansum(words[key].ravel()[rows]) for key in ("both", "marked", "true"))
        figures[f"annotator/{name}/words_f1"] = _ratio(2 * both, marked + true)
    return figures


def _alpha_figures(pictures, scores, resamples, seed):
    labels = [[one.labels for one in picture.annotations.values() if one.labels is not None] for picture in pictures]
    tokens = [len(given[0]) if given else 0 for given in labels]
    units = np.full((scores.shape[1], sum(tokens)), np.nan)
    for given, end in zip(labels, np.cumsum(tokens), strict=True):
        if given:
            units[: len(given), end - len(given[0]) : end] = given
    found = {name: (coincidences(values), "ordinal") for name, values in zip(SCORES, scores, strict=True)}
    found["words"] = (coincidences(units, np.repeat(np.arange(len(pictures)), tokens), len(pictures)), "nominal")
    figures = {}
    for (name, (one, metric)), (low, high) in zip(
        found.items(), intervals(list(found.values()), resamples, seed), strict=True
    ):
        value = alphas(one, metric, np.ones((1, one.counts.shape[0])))[0]
        figures |= {f"alpha/{name}": float(value), f"alpha/{name}/low": low, f"alpha/{name}/high": high}
    return figures


def _score_figures(scores, others):
    figures, spreads = {}, []
    for name, values, rest in zip(SCORES, scores, others, strict=True):
        known = ~np.isnan(values)
        spread = values.max(axis=0, where=known, initial=-np.inf) - values.min(axis=0, where=known, initial=np.inf)
        spread = spread[known.sum(axis=0) > 1]
        spreads.append(spread)
        figures[f"compared/{name}"] = float(len(spread))
        figures |= {f"{key}/{name}": value for key, value in _shares(spread).items()}
        apart = [np.abs(one - other) for one, other in itertools.combinations(values, 2)]
        apart = np.concatenate(apart)
        apart = np.rint(apart[~np.isnan(apart)])
        for points in range(schema.LIKERT_HIGH - schema.LIKERT_LOW + 1):
            figures[f"difference/{name}/{points}"] = _mean(apart == points)
        figures |= {f"one_vs_others/score/{key}/{name}": value for key, value in _correlations(values, rest).items()}
        figures[f"ceiling/score/plcc/{name}"] = ceiling(values)
    return figures | {f"{key}/all": value for key, value in _shares(np.concatenate(spreads)).items()}


def _shares(spread):
    return {"equal": _mean(spread <= _TOLERANCE), "within_one": _mean(spread <= 1 + _TOLERANCE)}


def _map_figures(maps):
    figures = {}
    for name, compared in zip(HEATMAPS, maps, strict=True):
        points, hits = compared["points"], compared["hits"]
        asked = (~np.isnan(points)).sum(axis=0)
        marked = (points > 0).sum(axis=0)[asked > 0]
        figures[f"compared/{name}"] = float((asked > 0).sum())
        figures[f"marked_or_not/{name}"] = _mean((marked == 0) | (marked == asked[asked > 0]))
        figures[f"points/{name}"] = _mean(points)
        figures[f"point_hits/{name}"] = _ratio(np.nansum(hits), np.nansum(points))
        figures |= {f"one_vs_others/heatmap/{key}/{name}": _mean(compared[key]) for key in metrics.HEATMAP_METRICS}
    return figures


def _word_figures(words):
    asked = ~np.isnan(words["both"])
    counts = np.stack([words[key][asked] for key in ("both", "marked", "true")])  # [3, annotations]
    both, marked, true = counts.sum(axis=1)
    micro = [_ratio(both, marked), _ratio(both, true), _ratio(2 * both, marked + true)]
    if marked + true > 0:
        micro = np.nan_to_num(micro)  # 0 / 0 is 0, as in `metrics`
    both, marked, true = counts
    per_prompt = [_mean(both / np.maximum(1, number)) for number in (marked, true)]
    per_prompt.append(_mean(2 * both / np.maximum(1, marked + true)))
    return {"compared/words": float(asked.any(axis=0).sum())} | {
        f"one_vs_others/keywords/{kind}/{key}": float(value)
        for kind, values in (("micro", micro), ("per_prompt", per_prompt))
        for key, value in zip(metrics.KEYWORD_METRICS, values, strict=True)
    }


def _offsets(given, others):
    """Of float[scores, n], one annotator's scores and the means of the others."""
    figures = {"offset": _mean(given - others), "absolute_difference": _mean(np.abs(given - others))}
    for name, values, rest in zip(SCORES, given, others, strict=True):
        figures[f"offset/{name}"] = _mean(values - rest)
        figures[f"absolute_difference/{name}"] = _mean(np.abs(values - rest))
        figures[f"plcc/{name}"] = _correlations(values, rest)["plcc"]
    return figures | {"plcc": _mean(np.array([figures[f"plcc/{name}"] for name in SCORES]))}


def _correlations(values, others) -> dict[str, float]:
    compared = ~np.isnan(others)
    values, others = values[compared], others[compared]
    if len(values) < 2:
        return {"plcc": np.nan, "srcc": np.nan}
    if any(np.ptp(one) <= metrics.FLAT * one.max() for one in (values, others)):
        return {"plcc": 0.0, "srcc": 0.0}
    return {
        "plcc": float(scipy.stats.pearsonr(values, others).statistic),
        "srcc": float(scipy.stats.spearmanr(values, others).statistic),
    }


def _mean(values) -> float:
    """The mean of what is not nan; nan of nothing."""
    values = values[~np.isnan(values)]
    return float(values.mean()) if values.size else np.nan


def _ratio(part, whole) -> float:
    return float(part / whole) if whole else np.nan


# ------------------------------------------------------------------------------------------------------- the report


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of the report: lines of cells, the header first, and a note that explains it."""

    title: str
    note: str
    lines: list[list[str]]


def tables(figures: Mapping[str, float], names: Sequence[str]) -> list[Table]:
    """The tables of what `measure` returned; names: of the annotators. What is not defined is "-"."""
    return [
        Table(
            "Scores and words",
            "Krippendorff's alpha is 1 for full agreement and 0 for agreement by chance: ordinal for scores, nominal for "
            "the words of the prompts. The intervals resample the pictures. Shares are of pictures.",
            _agreement_lines(figures),
        ),
        Table(
            "Points",
            "Agree whether to mark: the share of pictures where all annotators marked something, or none did. Near "
            f"another's: the share of points within {schema.POINT_RADIUS:g} of the picture's height of another annotator's "
            "point.",
            _map_lines(figures),
        ),
        *_comparison_tables(figures),
        Table(
            "Annotators",
            "Each against the others of the same pictures. Offset: the mean of the scores less the others' mean (above 0: "
            "more lenient), in points; difference: the same without signs; PLCC: the mean over the scores. Points: "
            "implausibility / misalignment.",
            _annotator_lines(figures, names),
        ),
    ]


def _agreement_lines(figures):
    def alpha_cells(name):
        value, low, high = (_cell(figures[f"alpha/{name}{bound}"], ".3f") for bound in ("", "/low", "/high"))
        return [_cell(figures[f"compared/{name}"], ",.0f"), value if low == "-" else f"{value} ({low} to {high})"]

    def shares(name):
        return [_percent(figures[f"{key}/{name}"]) for key in PAPER]

    return [
        ["", "pictures", "alpha (95 % interval)", "all equal", "within one point"],
        *([name, *alpha_cells(name), *shares(name)] for name in SCORES),
        ["all scores", "-", "-", *shares("all")],
        ["RichHF-18K, about", "-", "-", *(f"{share:.0%}".replace("%", " %") for share in PAPER.values())],
        ["words", *alpha_cells("words"), "-", "-"],
    ]


def _map_lines(figures):
    header = ["", "pictures", "agree whether to mark", "points per picture", "near another's"]
    return [header] + [
        [
            name,
            _cell(figures[f"compared/{name}"], ",.0f"),
            _percent(figures[f"marked_or_not/{name}"]),
            _cell(figures[f"points/{name}"], ".2f"),
            _percent(figures[f"point_hits/{name}"]),
        ]
        for name in HEATMAPS
    ]


def _comparison_tables(figures):
    others, highest = (
        {key.removeprefix(prefix): value for key, value in figures.items() if key.startswith(prefix)}
        for prefix in ("one_vs_others/", "ceiling/")
    )
    one = {"one annotator vs the others": others}
    scores, *rest = metrics.tables(one | {"estimated ceiling": highest})[:1] + metrics.tables(one)[1:]
    notes = (
        *[f"Each annotator's disk map as a prediction of the mean of the others', at {MAP_SIZE} pixels."] * len(HEATMAPS),
        "Each annotator's misaligned words as a prediction of those that most of the others marked.",
    )
    return [
        Table(
            "One annotator and the others: scores",
            "Each annotator's scores as a prediction of the mean of the others'. The ceiling is the highest PLCC with the "
            "mean of all annotators that a critic can expect, estimated from their reliability. A critic can be above the "
            "first line: it need not err as one annotator does.",
            scores,
        ),
        *(
            Table(f"One annotator and the others: {name}", note, lines)
            for name, note, lines in zip((*HEATMAPS, "words"), notes, rest, strict=True)
        ),
    ]


def _annotator_lines(figures, names):
    header = [
        "no.",
        "annotator",
        "pictures",
        "offset",
        "difference",
        "PLCC",
        "points per picture",
        "near another's",
        "words' F1",
    ]
    lines = [header]
    for number, name in enumerate(names, start=1):
        mine = {
            key: figures[f"annotator/{name}/{key}"]
            for key in ("pictures", "offset", "absolute_difference", "plcc", "words_f1")
        }
        points, hits = ([figures[f"annotator/{name}/{key}/{one}"] for one in HEATMAPS] for key in ("points", "point_hits"))
        lines.append(
            [
                str(number),
                " ".join(command.printable(name).split()),
                _cell(mine["pictures"], ",.0f"),
                _cell(mine["offset"], "+z.2f"),
                _cell(mine["absolute_difference"], ".2f"),
                _cell(mine["plcc"], ".3f"),
                " / ".join(_cell(value, ".2f") for value in points),
                " / ".join(_percent(value) for value in hits),
                _percent(mine["words_f1"]),
            ]
        )
    return lines


def _cell(value, form):
    return "-" if np.isnan(value) else format(value, form)


def _percent(value):
    return "-" if np.isnan(value) else f"{100 * value:.1f} %"


def summary(figures: Mapping[str, float]) -> str:
    """One line: what was compared."""
    counts = {key: f"{figures[key]:,.0f}" for key in ("pictures", "pictures_read", "annotators", "annotations")}
    return (
        "{pictures} of {pictures_read} pictures have two annotators or more; {annotations} annotations by {annotators} "
        "annotators".format(**counts)
    )


def markdown(figures: Mapping[str, float], found: Sequence[Table]) -> str:
    """The report as Markdown, without plots."""
    parts = ["# Annotators' agreement", summary(figures) + "."]
    for one in found:
        lines = [[_escaped(text) for text in line] for line in one.lines]
        aligned = tabulate(lines[1:], lines[0], tablefmt="github", disable_numparse=True, stralign="left")
        parts += [f"## {one.title}", one.note, aligned]
    return "\n\n".join(parts) + "\n"


def _escaped(text: str) -> str:
    return re.sub(r"[\\|<`*\[]", r"\\\g<0>", text)


def write(output, figures: Mapping[str, float], names: Sequence[str]) -> str:
    """Writes `FILES` into the folder `output`, each whole or not at all; returns the Markdown."""
    output, found = pathlib.Path(output), tables(figures, names)
    text = markdown(figures, found)
    page = _TEMPLATES.get_template("agreement.html.jinja").render(
        title="Annotators' agreement", subtitle=summary(figures), tables=found, plots=plots(figures, names)
    )
    paths.replace(output / "agreement.md", text.encode())
    paths.replace(output / "agreement.html", page.encode())
    json_files.write(output / "agreement.json", figures)
    return text


_MAP_COLORS = ("#d9443f", "#5b86d6")
_SIZE = ((3.6, 2.2), 200)  # of a plot: inches, pixels of an inch


def plots(figures: Mapping[str, float], names: Sequence[str]) -> list[dict[str, str]]:
    """Title, note and picture (a data URI of a PNG) of each plot. Annotators are shown by their numbers in the table."""
    with matplotlib.rc_context({"font.family": "sans-serif", "font.size": 8}):
        return [_alpha_plot(figures), _difference_plot(figures), _offset_plot(figures, names), _point_plot(figures, names)]


def _alpha_plot(figures):
    figure, axes = plotting.figure(*_SIZE)
    rows = (*SCORES, "words")
    for row, (name, color) in enumerate(zip(rows, (*plotting.SCORE_COLORS, plotting.INK), strict=True)):
        axes.plot([figures[f"alpha/{name}/{end}"] for end in ("low", "high")], [row, row], color=color, linewidth=2)
        axes.plot(figures[f"alpha/{name}"], row, "o", color=color, markersize=5)
    axes.axvline(0, color=plotting.NEUTRAL, linewidth=0.8)
    low = min([0.0, *(value for key, value in figures.items() if key.startswith("alpha/") and not np.isnan(value))])
    axes.set(yticks=range(len(rows)), yticklabels=rows, ylim=(len(rows) - 0.5, -0.5), xlim=(min(-0.02, 1.05 * low), 1.02))
    return {"title": "Krippendorff's alpha", "note": "95 % interval", "uri": plotting.uri(figure)}


def _difference_plot(figures):
    figure, axes = plotting.figure(*_SIZE)
    steps = np.arange(schema.LIKERT_HIGH - schema.LIKERT_LOW + 1)
    for place, (name, color) in enumerate(zip(SCORES, plotting.SCORE_COLORS, strict=True)):
        shares = [figures[f"difference/{name}/{step}"] for step in steps]
        axes.bar(steps + 0.2 * (place - 1.5), np.nan_to_num(shares), 0.18, color=color, label=name)
    axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.0f} %")
    axes.set(xticks=steps, xlabel="points apart")
    plotting.legend(axes)
    return {"title": "Two annotators' scores", "note": "share of pairs", "uri": plotting.uri(figure)}


def _offset_plot(figures, names):
    figure, axes = plotting.figure(*_SIZE)
    axes.axhline(0, color=plotting.NEUTRAL, linewidth=0.8)
    for place, (name, color) in enumerate(zip(SCORES, plotting.SCORE_COLORS, strict=True)):
        offsets = [figures[f"annotator/{one}/offset/{name}"] for one in names]
        axes.plot(
            np.arange(1, len(names) + 1) + 0.15 * (place - 1.5),
            offsets,
            "o",
            color=color,
            markersize=4,
            alpha=0.8,
            label=name,
        )
    low, high = axes.get_ylim()
    reach = max(0.5, abs(low), abs(high))
    _number_annotators(axes, names)
    axes.set(ylim=(-reach, reach))
    plotting.legend(axes)
    return {"title": "Offset from the others", "note": "points, above 0: lenient", "uri": plotting.uri(figure)}


def _point_plot(figures, names):
    figure, axes = plotting.figure(*_SIZE)
    for place, (name, color) in enumerate(zip(HEATMAPS, _MAP_COLORS, strict=True)):
        numbers = np.nan_to_num([figures[f"annotator/{one}/points/{name}"] for one in names])
        axes.bar(np.arange(1, len(names) + 1) + 0.36 * (place - 0.5), numbers, 0.34, color=color, label=name)
    _number_annotators(axes, names)
    plotting.legend(axes)
    return {"title": "Points per picture", "note": "by annotator", "uri": plotting.uri(figure)}


def _number_annotators(axes, names):
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(xlim=(0.4, len(names) + 0.6), xlabel="annotator, by number")


# ------------------------------------------------------------------------------------------------------ the command


def agreement(annotations: str, output, resamples: int = RESAMPLES, seed: int = 0) -> str:
    """Measures the agreement in the JSONL files that match a pattern and writes `FILES`; returns the Markdown.

    Raises:
      UserError: what `consolidate.read` refuses, or no picture has two annotators.
    """
    pictures = consolidate.read(annotations)
    compared = shared(pictures)
    figures = measure(compared, resamples, seed) | {"pictures_read": float(len(pictures))}
    return write(output, figures, annotators(compared))


def main() -> None:
    """The command."""
    args = flags.FLAGS
    print(agreement(args.annotations, args.output, args.resamples, args.seed))
    print(pathlib.Path(args.output) / "agreement.html")


if __name__ == "__main__":
    flags.DEFINE_string("annotations", None, "Pattern of JSONL files.", required=True)
    flags.DEFINE_string("output", None, "Folder for agreement.md, agreement.html and agreement.json.", required=True)
    ranges.flag("resamples", RESAMPLES, "Bootstrap samples of the intervals.", ranges.COUNT)
    ranges.flag("seed", 0, "Draws the bootstrap samples.", ranges.SEED)
    command.run(main)
