"""95 % intervals of the metrics by a bootstrap over examples, and which rows may be as good as the best.

A resample draws as many examples as there are, with replacement. All rows share the resamples, so that a difference of two
rows is resampled in pairs. Intervals are the percentiles 2.5 and 97.5 of the resampled values (Efron & Tibshirani, An
Introduction to the Bootstrap, 1993, chapter 13); `benchmarks/tables.py` measures how often they hold the true value.

A row may be as good as the best unless another row is better by more than chance: multiple comparisons with the best (Hsu,
Multiple Comparisons, 1996, chapter 4), with the quantiles of the resamples. The best of several equal rows is the best by
luck, so that a plain interval of the difference from it would miss 0 too often.
"""

import dataclasses
from collections.abc import Collection, Iterator, Mapping

import numpy as np

from richhf_data import metrics
from richhf_data.metrics import PerExample
from richhf_data.schema import SCORES

RESAMPLES = 2000
INTERVAL = (2.5, 97.5)  # percentiles
SCORE_METRICS = ("plcc", "srcc", "rmse", "mae")
LOWER_IS_BETTER = {"mse", "mse_empty", "kld", "rmse", "mae"}
_WEIGHTS = 1 << 20  # weights of examples held at a time: 8 MiB


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A metric of a row.

    Attributes:
      value: nan if a constant prediction leaves it undefined.
      low, high: the bounds of its 95 % interval.
      best: whether no row has a better value. tied: whether the row may be as good as the best (`_is_worse`); true of the
        best. Both are False unless rows have different values.
    """

    value: float
    low: float
    high: float
    best: bool = False
    tied: bool = False


def resamples(n: int, count: int, seed: int) -> Iterator[np.ndarray]:
    """Yields float64[r, n], how often each example is in each of r resamples; `count` resamples in all."""
    rng, step = np.random.default_rng(seed), max(1, _WEIGHTS // n)
    for start in range(0, count, step):
        yield rng.multinomial(n, np.full(n, 1 / n), size=min(step, count - start)).astype(np.float64)


def figures(values: PerExample, weights: np.ndarray, ratings: bool = True) -> dict[str, np.ndarray]:
    """The metrics of resampled examples: those of `metrics.summarise`, undefined ones nan, and

      score/{rmse,mae}/NAME             of ratings in [0, 1]; of a reward, on a scale of its own, there are none
      score/{plcc,srcc,rmse,mae}/mean   over the four scores; nan unless all four are there

    Args:
      weights: [R, n], as in `metrics.summarise`. ratings: whether the scores are predictions of the annotators' own.

    Returns:
      Each float64[R].
    """
    found = metrics.summarise(values, weights)
    if ratings:
        errors = values.predicted_scores - values.true_scores
        squares, sizes = (metrics.means(one, weights).T for one in (errors**2, np.abs(errors)))
        found |= {f"score/rmse/{name}": np.sqrt(square) for name, square in zip(SCORES, squares, strict=True)}
        found |= {f"score/mae/{name}": size for name, size in zip(SCORES, sizes, strict=True)}
    for key in SCORE_METRICS if ratings else SCORE_METRICS[:2]:
        found[f"score/{key}/mean"] = np.mean([found[f"score/{key}/{name}"] for name in SCORES], axis=0)
    return found


def measured(values: PerExample, key: str) -> bool:
    """Whether there is anything to compute a metric of: predictions of examples with the target."""
    kind, metric, name = (key.split("/") + [""])[:3]
    if kind == "score":
        both = np.isfinite(values.true_scores) & np.isfinite(values.predicted_scores)
        return bool((both.sum(axis=0) > 1).all() if name == "mean" else both[:, SCORES.index(name)].sum() > 1)
    if kind == "heatmap":
        of = metric if metric in ("mse", "mse_empty") else "kld"  # which a constant map leaves defined
        return bool(np.isfinite(values.heatmaps[of][:, metrics.HEATMAPS.index(name)]).any())
    if kind == "keywords":
        return bool(np.isfinite(values.keywords).any())
    return bool(np.isfinite(values.captions).any())


def estimates(
    rows: Mapping[str, PerExample], rewards: Collection[str] = (), count: int = RESAMPLES, seed: int = 0
) -> dict[str, dict[str, Estimate]]:
    """Every metric of every row that has something to measure, with its interval and its mark.

    Args:
      rows: of the same examples in the same order. rewards: the rows whose scores are on a scale of their own.
      count: of resamples. seed: draws them.
    """
    lengths = {len(values) for values in rows.values()}
    assert len(lengths) == 1, lengths
    (n,) = lengths

    def of(weights):
        return {name: figures(values, weights, name not in rewards) for name, values in rows.items()}

    exact, parts = of(np.ones((1, n))), [of(weights) for weights in resamples(n, count, seed)]
    keys = {name: [key for key in found if measured(rows[name], key)] for name, found in exact.items()}
    draws = {name: {key: np.concatenate([part[name][key] for part in parts]) for key in keys[name]} for name in rows}
    found = {name: {} for name in rows}
    for key in dict.fromkeys(key for some in keys.values() for key in some):
        having = [name for name in rows if key in draws[name]]
        values = {name: float(exact[name][key][0]) for name in having}
        best, tied = _marks(key, values, {name: draws[name][key] for name in having})
        for name in having:
            low, high = (np.nan, np.nan) if np.isnan(values[name]) else _interval(draws[name][key])
            found[name][key] = Estimate(values[name], low, high, name in best, name in tied)
    return found


def _marks(key, values, draws):
    """The names of the best rows, and of those that may be as good."""
    names = [name for name, value in values.items() if np.isfinite(value)]
    if len({values[name] for name in names}) < 2:
        return set(), set()
    sign = -1 if key.split("/")[1] in LOWER_IS_BETTER else 1
    value, drawn = sign * np.array([values[name] for name in names]), sign * np.stack([draws[name] for name in names])
    best = {name for name, one in zip(names, value, strict=True) if one == value.max()}
    return best, best | {name for i, name in enumerate(names) if not _is_worse(i, value, drawn)}


def _is_worse(i: int, value: np.ndarray, drawn: np.ndarray) -> bool:
    """Whether a row is better than row i, in simultaneous lower bounds of their paired differences.

    The bounds are d + q s: d is the difference, s the standard deviation of its resamples, q the percentile 2.5 of the least
    (resample - d) / s over the other rows. Of two rows, the bound is that of their difference's 95 % interval.

    Args:
      value: [K], higher is better. drawn: [K, R], the resamples, nan where undefined.
    """
    gain, gains = np.delete(value - value[i], i), np.delete(drawn - drawn[i], i, axis=0)
    spread = np.ma.masked_invalid(gains).std(axis=1).filled(0)
    varies = spread > 1e-9 * np.abs(gain)
    if (gain[~varies] > 0).any():  # the same in every resample
        return True
    gain, gains, spread = gain[varies], gains[varies], spread[varies]
    least = np.fmin.reduce((gains - gain[:, None]) / spread[:, None], axis=0, initial=np.nan)
    return bool((gain + _interval(least)[0] * spread > 0).any())


def _interval(draws):
    """The percentiles of the resamples in which the metric is defined; nan if it is in none."""
    defined = draws[np.isfinite(draws)]
    return tuple(map(float, np.percentile(defined, INTERVAL))) if defined.size else (np.nan, np.nan)
