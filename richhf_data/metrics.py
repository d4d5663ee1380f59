"""The benchmark's metrics, which compare predicted scores, heatmaps and keywords with the annotators'.

Definitions: "Rich Human Feedback for Text-to-Image Generation" (arXiv 2312.10240) section 4.2.1, made precise by the
PyTorch code of its first author (https://github.com/youweiliang/RichHF, metrics.py), so that numbers are comparable.

Conventions for cases that the papers leave open:

  score correlations    0 if the prediction or the truth is constant; nan with fewer than two examples
  constant heatmap      CC and NSS are 0; AUC-Judd is about 0.5, by the noise
  all-zero prediction   SIM is 0, and KLD is large but finite (the epsilons)
  empty truth           (no pixel marked) only MSE is defined; the other metrics are nan, and leave the example out
  every pixel marked    AUC-Judd has no negatives: it is nan and leaves the example out; CC and NSS are 0
  nothing to average    nan
  keywords              a precision or a recall of 0 / 0 is 0; nan if no target has labels; a token that cannot be written
                        (white space alone) counts as aligned
  captions              (of captioning datasets; in no paper) F1 of the words of prediction and caption, as multisets
  deviations            (in no paper) how well the predicted deviation of a label from its score says how far it is
  not predicted         nan

`per_example` gives what each example contributes, and `summarise` makes the metrics of it, for all examples or resamples.
"""

import collections
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import cv2
import numpy as np
from tabulate import tabulate

from richhf_data import keywords
from richhf_data.errors import UserError
from richhf_data.schema import HEATMAPS, SCORES

EPSILON = 1e-8
TIE_NOISE = 1e-7
TIE_SEED = 0
FLAT = 1e-6  # values that differ by less than this fraction of the largest count as equal

HEATMAP_METRICS = ("mse", "mse_empty", "cc", "kld", "sim", "nss", "auc_judd")
KEYWORD_METRICS = ("precision", "recall", "f1")

DEVIATION_METRICS = ("nll", "z2", "error_srcc", "factor")
PRIOR = 3  # labels with a mean z2 of 1 that `factor` adds to those that there are

_BINS = 1 << 16  # of `_counts_below`
_CHUNK_PIXELS = 1 << 20  # 8 MiB per float64 temporary, whatever the size of the set


# ---------------------------------------------------------------------------------------------------- heatmaps
# Every function takes (prediction, truth), two [n, h, w] arrays with values in [0, 1], and returns float64[n]. Sums run
# over the pixels of one image in their order in memory, so an image's value does not depend on the rest of the batch.


def mse(prediction: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Mean squared error per image: [n, h, w], [n, h, w] -> float64[n]."""
    p, g = _pixels(prediction, truth)
    return np.mean((p - g) ** 2, axis=1)


def cc(prediction: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Pearson's correlation over pixels: [n, h, w], [n, h, w] -> float64[n]. 0 if a map is constant, nan if g is 0."""
    p, g = _pixels(prediction, truth)
    constant = _constant(p) | _constant(g)
    empty = _empty(g)
    p = p - p.mean(axis=1, keepdims=True)
    g = g - g.mean(axis=1, keepdims=True)
    value = _dot(p, g) / (np.sqrt(_dot(p, p)) * np.sqrt(_dot(g, g)) + EPSILON)
    return np.where(empty, np.nan, np.where(constant, 0.0, value))


def kld(prediction: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Kullback-Leibler divergence, lower is better: [n, h, w], [n, h, w] -> float64[n].

    sum g * log(g / (p + eps) + eps) over the maps divided by their sums; nan if the truth is empty.
    """
    p, g = _pixels(prediction, truth)
    marked = g > 0  # the term of any other pixel is 0, and its logarithm is not needed
    p_mass, g_mass = p.sum(axis=1, keepdims=True), g.sum(axis=1, keepdims=True)
    p = np.where(marked, p, 0.0) / (p_mass + EPSILON)
    g = g / (g_mass + EPSILON)
    ratio = np.divide(g, p + EPSILON, out=np.ones_like(g), where=marked)
    log = np.log(ratio + EPSILON, out=np.zeros_like(g), where=marked)
    return np.where(g_mass[:, 0] > 0, _dot(g, log), np.nan)


def sim(prediction: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Similarity: [n, h, w], [n, h, w] -> float64[n] in [0, 1].

    The sum of min(p, g) over the maps divided by their sums; nan if the truth is empty.
    """
    p, g = _pixels(prediction, truth)
    empty = _empty(g)
    p = p / (p.sum(axis=1, keepdims=True) + EPSILON)
    g = g / (g.sum(axis=1, keepdims=True) + EPSILON)
    return np.where(empty, np.nan, np.minimum(p, g).sum(axis=1))


def nss(prediction: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Normalised scanpath saliency: the z-scored prediction's mean where truth > 0. [n, h, w], [n, h, w] -> float64[n].

    The standard deviation divides by n - 1. 0 for a constant prediction, nan if the truth is empty.
    """
    p, g = _pixels(prediction, truth)
    constant, fixated = _constant(p), g > 0
    count = fixated.sum(axis=1)
    centred = p - p.mean(axis=1, keepdims=True)
    deviation = np.sqrt(_dot(centred, centred) / max(p.shape[1] - 1, 1))
    at_fixations = np.where(fixated, centred, 0.0).sum(axis=1) / np.maximum(count, 1)
    return np.where(count == 0, np.nan, np.where(constant, 0.0, at_fixations / (deviation + EPSILON)))


def auc_judd(prediction: np.ndarray, truth: np.ndarray, indices: Sequence[int] | None = None) -> np.ndarray:
    """Area under Judd's ROC curve: [n, h, w], [n, h, w] -> float64[n] in [0, 1]; chance is 0.5.

    Fixations are the pixels with truth > 0, thresholds the predicted values there; the curve joins (0, 0), the (false
    positive rate, true positive rate) of each threshold, and (1, 1) by straight lines. nan if all pixels are fixated or
    none is.

    Equal predictions are ordered by uniform noise in [0, 1e-7), drawn from a generator seeded by the image's index.

    With F fixations in falling order and f_j negatives at or above the j-th, as a rate, the trapezoids add up to
    1 - (f_1 + ... + f_{F-1} + f_F / 2) / F: no loop over thresholds. (The PyTorch code counts one false positive too
    many at each threshold, a difference of 1 / number of negatives.)

    Args:
      indices: the n images' places in the whole set, which seed their noise; default 0 ... n - 1.
    """
    p, g = _pixels(prediction, truth)
    indices = range(len(p)) if indices is None else indices
    if len(indices) != len(p):
        raise UserError(f"indices: got {len(indices)} for {len(p)} images, expected one each")
    values = np.full(len(p), np.nan)
    for row, index in enumerate(indices):
        fixated = g[row] > 0
        count = int(fixated.sum())
        if not 0 < count < fixated.size:
            continue
        noise = np.random.default_rng((TIE_SEED, int(index))).random(fixated.size)
        noisy = p[row] + noise * TIE_NOISE
        fixations = np.sort(noisy[fixated])  # rising: searchsorted is faster on neighbours
        negatives = noisy[~fixated]
        false_positive_rates = 1.0 - _counts_below(negatives, fixations) / negatives.size
        values[row] = 1.0 - (false_positive_rates.sum() - 0.5 * false_positive_rates[0]) / count
    return values


def _counts_below(values, thresholds):
    """How many values are below each of the rising thresholds, without sorting those that are far from all of them.

    Bins divide the span of the thresholds. Only the values of a bin with a threshold are sorted.
    """
    if len(values) < _BINS:
        return np.searchsorted(np.sort(values), thresholds, side="left")
    span = thresholds[-1] - thresholds[0]
    scale = _BINS / span if span > 0 else 0.0

    def bins(numbers):  # 0 below the first threshold, the last bin far above the last one
        return np.clip((numbers - thresholds[0]) * scale + 1, 0, _BINS + 3).astype(np.int32)

    places, own = bins(values), bins(thresholds)
    occupied = np.zeros(_BINS + 4, bool)
    occupied[own] = True
    near = np.sort(values[occupied[places]])
    far = np.where(occupied, 0, np.bincount(places, minlength=_BINS + 4)).cumsum()  # of the values up to each bin
    return far[own] + np.searchsorted(near, thresholds, side="left")


def _pixels(prediction, truth):
    """Checks two [n, h, w] maps; both as float64[n, h * w]."""
    prediction, truth = np.asarray(prediction), np.asarray(truth)
    if prediction.ndim != 3 or prediction.size == 0:
        raise UserError(f"prediction: got shape {prediction.shape}, expected a [n, h, w] that is not empty")
    if truth.shape != prediction.shape:
        raise UserError(f"truth: got shape {truth.shape}, expected the prediction's {prediction.shape}")
    n = len(prediction)
    return tuple(side.reshape(n, -1).astype(np.float64, copy=False) for side in (prediction, truth))


def _constant(rows):
    """Whether the values of each row are equal up to float32 rounding; those of a resized constant map are."""
    low, high = rows.min(axis=-1), rows.max(axis=-1)
    return high - low <= FLAT * np.maximum(np.abs(low), np.abs(high))


def _empty(maps):
    return maps.max(axis=1) <= 0


def _dot(a, b):
    return (a * b).sum(axis=1)


# ------------------------------------------------------------------------------------------------------ a whole set


@dataclasses.dataclass(frozen=True)
class PerExample:
    """What each of n examples contributes to the metrics; nan where the target is absent or was not predicted.

    Attributes:
      true_scores, predicted_scores: float64[n, 4].
      heatmaps: {name of `HEATMAP_METRICS`: float64[n, 2]}, nan also where the metric is undefined.
      constant_maps: bool[n, 2], whether the predicted map is constant; False without one.
      keywords: float64[n, 3], of the misaligned tokens: both predicted and true, predicted, true.
      captions: float64[n], the words' F1.
    """

    true_scores: np.ndarray
    predicted_scores: np.ndarray
    heatmaps: dict[str, np.ndarray]
    constant_maps: np.ndarray
    keywords: np.ndarray
    captions: np.ndarray

    def __len__(self):
        return len(self.captions)


def evaluate(
    targets: Sequence[Mapping[str, Any]], predictions: Sequence[Mapping[str, Any]], written: Callable[[str], str] = str
) -> dict[str, float]:
    """Every metric of a set of examples.

    Args:
      targets: one dictionary per example, in the schema's orders: scores float32[4], score_mask bool[4], heatmaps
        uint8[h, w, 2] (255 = every annotator), heatmap_mask bool[2], prompt str, labels (for each token of the prompt
        0 = misaligned or 1 = aligned) or None; and caption str if the decoder's target is a caption. Values that a mask
        excludes are ignored. A row without any target is padding and is ignored.
      predictions: as many, in the same order: scores float32[4], heatmaps float32[h, w, 2] in [0, 1] with the target's
        size, labelled_prompt str ("a yellow_0 cat"). Each is None if it was not predicted, and a score_mask bool[4] or a
        heatmap_mask bool[2] says so of a single score or map. There may be deviations float32[4] above 0, of the labels from
        the scores. In place of labelled_prompt there may be labels, one for each
        token of the prompt: 0, 1, or None for a token that was not copied. Sizes may differ between examples.
      written: how the decoder's vocabulary writes a text (`Vocabulary.written`), because words are compared as they are
        written; by default unchanged.

    Returns:
      Floats (nan without anything to measure; see the conventions of the module) with the keys

        score/{plcc,srcc}/{plausibility,alignment,aesthetics,overall}
        heatmap/{mse,mse_empty,cc,kld,sim,nss,auc_judd}/{implausibility,misalignment}
        keywords/{micro,per_prompt}/{precision,recall,f1}
        caption/word_f1, where any target is a caption
        score/{nll,z2,error_srcc,factor}/{plausibility,alignment,aesthetics,overall}, where deviations were predicted
        num_examples

      Heatmaps: `mse` is the mean over all examples, `mse_empty` over those with an empty truth, the others over those
      without. Keywords, for the misaligned class: `micro` pools the tokens of all prompts, as in the paper's tables;
      `per_prompt` is the mean over prompts of each prompt's values, as in the PyTorch code. Because 0 / 0 is 0, a prompt
      without a misaligned word lowers that mean even if the prediction is perfect. In both, a token that the predicted
      sequence does not copy counts as not predicted.

      Deviations: `nll` is the mean negative log-likelihood of a label, of a Gaussian around the score. `z2` is the mean of
      ((label - score) / deviation)**2; it is 1 where deviations are calibrated. `error_srcc` is the SRCC of |label - score|
      and deviation. `factor` calibrates: the deviations times it have a `z2` of 1, but that `PRIOR` labels more with a `z2`
      of 1 count, so that few examples change little.

    Raises:
      UserError: lengths or shapes do not match, or a prediction is not finite or out of range.
    """
    _check_all(targets, predictions)
    pairs = []
    for target, prediction in zip(targets, predictions, strict=True):
        has_text = target["labels"] is not None or target.get("caption") is not None
        if np.any(target["score_mask"]) or np.any(target["heatmap_mask"]) or has_text:
            pairs.append((target, prediction))
    values = _per_example(pairs, range(len(pairs)), written)
    summary = summarise(values, np.ones((1, len(pairs))), undefined=0.0)
    summary |= _summarise_deviations(values, [prediction.get("deviations") for _, prediction in pairs])
    return {key: float(value[0]) for key, value in summary.items()} | {"num_examples": float(len(pairs))}


def per_example(
    targets: Sequence[Mapping[str, Any]],
    predictions: Sequence[Mapping[str, Any]],
    indices: Sequence[int] | None = None,
    written: Callable[[str], str] = str,
) -> PerExample:
    """What each example contributes to the metrics.

    Args:
      targets, predictions, written: as in `evaluate`.
      indices: the examples' places in the whole set, which seed AUC-Judd's noise; default 0 ... n - 1.

    Raises:
      UserError: as `evaluate`.
    """
    _check_all(targets, predictions)
    indices = range(len(targets)) if indices is None else indices
    return _per_example(list(zip(targets, predictions, strict=True)), indices, written)


def concatenate(parts: Sequence[PerExample]) -> PerExample:
    """One `PerExample` of several, in their order."""

    def joined(field):
        return np.concatenate([getattr(part, field) for part in parts])

    heatmaps = {key: np.concatenate([part.heatmaps[key] for part in parts]) for key in HEATMAP_METRICS}
    others = ("true_scores", "predicted_scores", "constant_maps", "keywords", "captions")
    return PerExample(heatmaps=heatmaps, **{field: joined(field) for field in others})


def summarise(values: PerExample, weights: np.ndarray, undefined: float = np.nan) -> dict[str, np.ndarray]:
    """The metrics of resampled sets of examples.

    Args:
      values: of n examples.
      weights: [R, n], how often each example is in each of R sets; all 1 for the examples themselves.
      undefined: the value of what a constant prediction or truth leaves undefined: its score correlations; CC, NSS and
        AUC-Judd if every predicted map of marked pictures is constant; a precision or a recall of 0 / 0, `micro` alone. The
        conventions of the module, `evaluate`'s, are 0 (and AUC-Judd as it is).

    Returns:
      The keys of `evaluate` but num_examples; each float64[R], nan without anything to measure.
    """
    weights = np.asarray(weights, np.float64)
    return {
        **_summarise_scores(values, weights, undefined),
        **_summarise_heatmaps(values, weights, undefined),
        **_summarise_keywords(values, weights, undefined),
        **_summarise_captions(values, weights),
    }


def _check_all(targets, predictions):
    if len(targets) != len(predictions):
        raise UserError(f"predictions: got {len(predictions)} for {len(targets)} targets, expected one each")
    for i, (target, prediction) in enumerate(zip(targets, predictions, strict=True)):
        _check(i, target, prediction)


def _check(i, target, prediction):
    for name, length in (("score", len(SCORES)), ("heatmap", len(HEATMAPS))):
        for side, row in (("targets", target), ("predictions", prediction)):
            mask = row[f"{name}_mask"] if side == "targets" else row.get(f"{name}_mask", np.ones(length))
            if np.shape(mask) != (length,):
                raise UserError(f"{side}[{i}]['{name}_mask']: got shape {np.shape(mask)}, expected ({length},)")
    for side, row in (("targets", target), ("predictions", prediction)):
        if row["scores"] is None and side == "predictions":
            continue
        if np.shape(row["scores"]) != (len(SCORES),):
            raise UserError(f"{side}[{i}]['scores']: got shape {np.shape(row['scores'])}, expected ({len(SCORES)},)")
        there = np.asarray(target["score_mask"], bool)
        bad = ~np.isfinite(row["scores"]) & there & np.asarray(row.get("score_mask", there), bool)
        if bad.any():
            k = int(np.argmax(bad))
            raise UserError(f"{side}[{i}]['scores']: got {SCORES[k]} = {row['scores'][k]}, expected a finite number")
    deviations = np.ones(len(SCORES)) if prediction.get("deviations") is None else np.asarray(prediction["deviations"])
    if deviations.shape != (len(SCORES),) or not (np.isfinite(deviations) & (deviations > 0)).all():
        raise UserError(f"predictions[{i}]['deviations']: got {deviations}, expected {len(SCORES)} finite numbers above 0")
    if not np.any(target["heatmap_mask"]):
        return
    truth = np.asarray(target["heatmaps"])
    if truth.dtype != np.uint8 or truth.ndim != 3 or truth.shape[2] != len(HEATMAPS) or truth.size == 0:
        raise UserError(
            f"targets[{i}]['heatmaps']: got {truth.dtype}{list(truth.shape)}, expected uint8[h, w, {len(HEATMAPS)}]"
        )
    if prediction["heatmaps"] is None:
        return
    predicted = np.asarray(prediction["heatmaps"])
    if predicted.shape != truth.shape:
        raise UserError(
            f"predictions[{i}]['heatmaps']: got shape {predicted.shape}, expected the target's {truth.shape}; resize it"
        )
    for k, name in enumerate(HEATMAPS):
        if _has_map(target, prediction, k):
            low, high = float(predicted[..., k].min()), float(predicted[..., k].max())
            if not (low >= 0.0 and high <= 1.0):  # false for nan too
                raise UserError(
                    f"predictions[{i}]['heatmaps']: got {name} from {low} to {high}, expected values in [0, 1]"
                )


def _has_map(target, prediction, k):
    predicted = prediction["heatmaps"] is not None and prediction.get("heatmap_mask", (True,) * len(HEATMAPS))[k]
    return bool(target["heatmap_mask"][k] and predicted)


def _per_example(pairs, indices, written):
    everything = np.ones(len(SCORES), bool)
    true_scores, predicted_scores = np.full((2, len(pairs), len(SCORES)), np.nan)
    for row, (target, prediction) in enumerate(pairs):
        there = np.asarray(target["score_mask"], bool)
        true_scores[row, there] = np.asarray(target["scores"])[there]
        if prediction["scores"] is not None:
            there = there & np.asarray(prediction.get("score_mask", everything), bool)
            predicted_scores[row, there] = np.asarray(prediction["scores"])[there]
    return PerExample(
        true_scores,
        predicted_scores,
        *_heatmap_values(pairs, indices),
        np.array([_keyword_counts(*pair, written) for pair in pairs], np.float64).reshape(-1, 3),
        np.array([_caption_f1(*pair, written) for pair in pairs], np.float64),
    )


def _heatmap_values(pairs, indices):
    shape = len(pairs), len(HEATMAPS)
    values, constant = {key: np.full(shape, np.nan) for key in HEATMAP_METRICS}, np.zeros(shape, bool)
    for k in range(len(HEATMAPS)):
        for rows in _chunks(pairs, k):
            truth = np.stack([pairs[row][0]["heatmaps"][..., k] for row in rows]).astype(np.float64) / 255
            predicted = np.stack([pairs[row][1]["heatmaps"][..., k] for row in rows]).astype(np.float64)  # once for all
            empty = truth.max(axis=(1, 2)) <= 0
            constant[rows, k] = _constant(predicted.reshape(len(rows), -1))
            values["mse"][rows, k] = mse(predicted, truth)
            values["mse_empty"][rows, k] = np.where(empty, values["mse"][rows, k], np.nan)
            if marked := [row for row, is_empty in zip(rows, empty, strict=True) if not is_empty]:
                predicted, truth = predicted[~empty], truth[~empty]
                for key, metric in (("cc", cc), ("kld", kld), ("sim", sim), ("nss", nss)):
                    values[key][marked, k] = metric(predicted, truth)
                values["auc_judd"][marked, k] = auc_judd(predicted, truth, [indices[row] for row in marked])
    return values, constant


def _chunks(pairs, k):
    """Lists of rows that have heatmap k. The maps of a list have one size and at most `_CHUNK_PIXELS` pixels, or one row."""
    by_shape: dict[tuple[int, ...], list[int]] = {}
    for row, (target, prediction) in enumerate(pairs):
        if _has_map(target, prediction, k):
            by_shape.setdefault(np.shape(target["heatmaps"])[:2], []).append(row)
    for (height, width), rows in by_shape.items():
        step = max(1, _CHUNK_PIXELS // (height * width))
        for start in range(0, len(rows), step):
            yield rows[start : start + step]


def _keyword_counts(target, prediction, written):
    """True positives, predicted positives, positives; nan without labels or a prediction."""
    tokens = keywords.tokenize(target["prompt"])
    for side, row in (("labels", target), ("predicted labels", prediction)):
        if row.get("labels") is not None and len(row["labels"]) != len(tokens):
            raise UserError(
                f"{side}: got {len(row['labels'])} for the {len(tokens)} tokens of prompt {target['prompt']!r}, "
                "expected one each (None if they are unknown)"
            )
    if target["labels"] is None:
        return np.nan, np.nan, np.nan
    if prediction.get("labels") is not None:
        read = prediction["labels"]
    elif prediction.get("labelled_prompt") is not None:
        read = keywords.read_labels(prediction["labelled_prompt"], tokens, written)
    else:
        return np.nan, np.nan, np.nan
    writable = np.array([bool(keywords.written_words(token, written)) for token in tokens], bool)
    truth = (np.asarray(target["labels"]) == keywords.MISALIGNED) & writable
    predicted = np.array([label == keywords.MISALIGNED for label in read], bool)  # not copied (None): not predicted
    return (truth & predicted).sum(), predicted.sum(), truth.sum()


def _caption_f1(target, prediction, written):
    if target.get("caption") is None or prediction.get("labelled_prompt") is None:
        return np.nan
    truth = collections.Counter(keywords.written_words(target["caption"], written))
    predicted = collections.Counter(keywords.words(prediction["labelled_prompt"]))
    counts = [(truth & predicted).total(), predicted.total(), truth.total()]
    return _precision_recall_f1(np.array(counts, np.float64))[2]


def means(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted means of what is not nan: [n, K], [R, n] -> float64[R, K]; nan of nothing."""
    there = np.isfinite(values)
    with np.errstate(invalid="ignore"):
        return _weighted_sums(weights, np.where(there, values, 0.0)) / _weighted_sums(weights, there.astype(np.float64))


def _weighted_sums(weights, values):
    """[R, n], [n, K] -> [R, K]. A row does not depend on the others; by BLAS, R would decide its last bit."""
    return np.einsum("rn,nk->rk", weights, values)


def _summarise_scores(values, weights, undefined):
    found = {}
    for k, name in enumerate(SCORES):
        truth, predicted = values.true_scores[:, k], values.predicted_scores[:, k]
        known = np.isfinite(truth) & np.isfinite(predicted)
        truth, predicted, own = truth[known], predicted[known], weights[:, known]
        for key, correlation in (("plcc", _pearson), ("srcc", _spearman)):
            value = np.full(len(weights), np.nan)
            if known.sum() >= 2:
                value = correlation(truth, predicted, own)
                value = np.where(_constant_in(truth, own) | _constant_in(predicted, own), undefined, value)
            found[f"score/{key}/{name}"] = value
    return found


def _pearson(x, y, weights):
    """Pearson's correlation of n pairs with each row of weights [R, n]: float64[R]."""
    x, y = x - x.mean(), y - y.mean()  # of all: the resampled means are near 0, so that little cancels
    sums = _weighted_sums(weights, np.stack([x, y, x * x, y * y, x * y], axis=1))
    with np.errstate(invalid="ignore", divide="ignore"):
        x, y, xx, yy, xy = (sums / weights.sum(axis=1, keepdims=True)).T
        return np.clip((xy - x * y) / np.sqrt((xx - x * x) * (yy - y * y)), -1, 1)


def _spearman(x, y, weights):
    """The same of the ranks, which are those within each resample; equal values share their mean rank."""
    x, y = _centred_ranks(x, weights), _centred_ranks(y, weights)
    xx, yy, xy = (np.einsum("rn,rn,rn->r", weights, *pair) for pair in ((x, x), (y, y), (x, y)))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.clip(xy / np.sqrt(xx * yy), -1, 1)


def _centred_ranks(values, weights):
    """The rank of each value in each resample less the mean rank: float64[R, n]."""
    _, group, sizes = np.unique(values, return_inverse=True, return_counts=True)  # groups of equal values, rising
    first = np.cumsum(sizes) - sizes
    counts = np.add.reduceat(weights[:, np.argsort(group, kind="stable")], first, axis=1)
    total = weights.sum(axis=1, keepdims=True)
    return (np.cumsum(counts, axis=1) - (counts - 1) / 2 - (total + 1) / 2)[:, group]


def _constant_in(values, weights):
    """bool[R]: whether the values in each resample are equal, as `_constant`."""
    there = weights > 0
    low = np.where(there, values, np.inf).min(axis=1)
    high = np.where(there, values, -np.inf).max(axis=1)
    with np.errstate(invalid="ignore"):
        return high - low <= FLAT * np.maximum(np.abs(low), np.abs(high))


def _summarise_heatmaps(values, weights, undefined):
    found = {}
    for k, name in enumerate(HEATMAPS):
        averages = means(np.stack([values.heatmaps[key][:, k] for key in HEATMAP_METRICS], axis=1), weights).T
        marked = np.isfinite(values.heatmaps["kld"][:, k])
        all_constant = marked.any() and values.constant_maps[marked, k].all()
        for key, average in zip(HEATMAP_METRICS, averages, strict=True):
            if np.isnan(undefined) and all_constant and key in ("cc", "nss", "auc_judd"):
                average = np.full_like(average, undefined)
            found[f"heatmap/{key}/{name}"] = average
    return found


def _summarise_keywords(values, weights, undefined):
    known = np.isfinite(values.keywords).all(axis=1)
    counts, own = values.keywords[known], weights[:, known]
    if known.any():
        micro = _precision_recall_f1(_weighted_sums(own, counts), undefined)
        per_prompt = means(np.stack(_precision_recall_f1(counts), axis=1), own).T
    else:
        micro = per_prompt = np.full((len(KEYWORD_METRICS), len(weights)), np.nan)
    return {
        f"keywords/{kind}/{key}": value
        for kind, three in (("micro", micro), ("per_prompt", per_prompt))
        for key, value in zip(KEYWORD_METRICS, three, strict=True)
    }


def _summarise_captions(values, weights):
    if not np.isfinite(values.captions).any():
        return {}
    return {"caption/word_f1": means(values.captions[:, None], weights)[:, 0]}


def _summarise_deviations(values, deviations):
    """deviations: for each example float[4] or None -> {key: float64[1]}; nothing if all are None."""
    if all(row is None for row in deviations):
        return {}
    unknown = np.full(len(SCORES), np.nan)
    deviations = np.array([unknown if row is None else row for row in deviations], np.float64)
    errors, found = np.abs(values.true_scores - values.predicted_scores), {}
    for k, name in enumerate(SCORES):
        known = np.isfinite(errors[:, k]) & np.isfinite(deviations[:, k])
        error, deviation, one = errors[known, k], deviations[known, k], np.ones((1, known.sum()))
        four = dict.fromkeys(DEVIATION_METRICS, np.full(1, np.nan))
        if known.any():
            z2 = np.mean((error / deviation) ** 2, keepdims=True)
            four["z2"], four["nll"] = z2, z2 / 2 + np.mean(np.log(deviation)) + np.log(2 * np.pi) / 2
            four["factor"] = np.sqrt((known.sum() * z2 + PRIOR) / (known.sum() + PRIOR))
        if known.sum() >= 2:
            constant = _constant_in(error, one) | _constant_in(deviation, one)
            four["error_srcc"] = np.where(constant, 0.0, _spearman(error, deviation, one))
        found |= {f"score/{key}/{name}": value for key, value in four.items()}
    return found


def _precision_recall_f1(counts, undefined=0.0):
    """[..., 3], true positives, predicted positives and positives -> three [...]; 0 / 0 is `undefined`."""
    both, predicted, positives = np.moveaxis(counts, -1, 0)

    def ratio(part, whole):
        return np.divide(part, whole, out=np.full(np.shape(whole), undefined), where=whole > 0)

    return ratio(both, predicted), ratio(both, positives), ratio(2 * both, predicted + positives)


# ------------------------------------------------------------------------------------------------ baseline and tables


def constant_predictions(
    mean_scores: np.ndarray, mean_heatmaps: np.ndarray, targets: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """The predictions of the constant predictor: the means of the training set, and every prompt copied without a mark.

    A mean of nan (no training example has the target) becomes 0.5 for a score and 0 for a pixel.

    Args:
      mean_scores: float[4], the training targets' means.
      mean_heatmaps: float[h, w, 2] in [0, 1], the same; resized to the size of each target.
      targets: as in `evaluate`; only `prompt` and the size of `heatmaps` are read.

    Returns:
      One prediction per target, as `evaluate` takes them. Examples of one size share one heatmap array.
    """
    mean_scores, mean_heatmaps = np.asarray(mean_scores, np.float32), np.asarray(mean_heatmaps, np.float32)
    if mean_scores.shape != (len(SCORES),):
        raise UserError(f"mean_scores: got shape {mean_scores.shape}, expected ({len(SCORES)},)")
    if mean_heatmaps.ndim != 3 or mean_heatmaps.shape[2] != len(HEATMAPS):
        raise UserError(f"mean_heatmaps: got shape {mean_heatmaps.shape}, expected [h, w, {len(HEATMAPS)}]")
    mean_scores, mean_heatmaps = np.nan_to_num(mean_scores, nan=0.5), np.nan_to_num(mean_heatmaps, nan=0.0)
    resized: dict[tuple[int, int], np.ndarray] = {}
    predictions = []
    for target in targets:
        height, width = np.shape(target["heatmaps"])[:2]
        if (height, width) not in resized:
            interpolation = cv2.INTER_AREA if height < mean_heatmaps.shape[0] else cv2.INTER_LINEAR
            heatmaps = cv2.resize(mean_heatmaps, (width, height), interpolation=interpolation)
            resized[height, width] = np.clip(heatmaps, 0, 1)  # area averages round to just above 1
        tokens = keywords.tokenize(target["prompt"])
        copied = keywords.label_prompt(tokens, [keywords.ALIGNED] * len(tokens))
        predictions.append({"scores": mean_scores, "heatmaps": resized[height, width], "labelled_prompt": copied})
    return predictions


def tables(rows: Mapping[str, Mapping[str, float | None]]) -> list[list[list[str]]]:
    """The papers' result tables: scores, one per heatmap, misaligned words; captions and deviations, if a row has them.

    Returns:
      Tables of lines of cells; the first line is the header. A value that is absent, None or nan is "-". Keywords are in
      percent, as in the papers.

    Args:
      rows: {name of the line ("this model", "constant predictor", "ceiling"): what `evaluate` returned}.
    """

    def cell(metrics, keys, form, scale=1):
        values = [metrics.get(key) for key in keys]
        texts = ["-" if value is None or np.isnan(value) else format(scale * value, form) for value in values]
        return "-" if set(texts) == {"-"} else " / ".join(texts)

    def score_cells(metrics):
        means = {}  # over all four scores or none: means over fewer are not comparable between lines
        for key in ("plcc", "srcc"):
            values = [metrics.get(f"score/{key}/{name}") for name in SCORES]
            means[key] = None if None in values else np.mean(values)
        cells = [cell(metrics, [f"score/plcc/{name}", f"score/srcc/{name}"], ".3f") for name in SCORES]
        return [*cells, cell(means, ["plcc", "srcc"], ".3f")]

    def heatmap_cells(metrics, heatmap):
        forms = {key: ".5f" if key.startswith("mse") else ".3f" for key in HEATMAP_METRICS}
        return [cell(metrics, [f"heatmap/{key}/{heatmap}"], form) for key, form in forms.items()]

    def keyword_cells(metrics):
        kinds = [[f"keywords/{kind}/{key}" for key in KEYWORD_METRICS] for kind in ("micro", "per_prompt")]
        return [cell(metrics, keys, ".1f", scale=100) for keys in kinds]

    def deviation_cells(metrics):
        keys = ("nll", "z2", "error_srcc")
        return [cell(metrics, [f"score/{key}/{name}" for key in keys], ".3f") for name in SCORES]

    def lines(headers, cells):
        return [headers, *([name, *cells(metrics)] for name, metrics in rows.items())]

    heatmap_headers = ["MSE all", "MSE empty", "CC", "KLD", "SIM", "NSS", "AUC-Judd"]
    found = [
        lines(["PLCC / SRCC", *SCORES, "mean"], score_cells),
        *(
            lines([f"{name} heatmap", *heatmap_headers], lambda metrics, name=name: heatmap_cells(metrics, name))
            for name in HEATMAPS
        ),
        lines(["misaligned words", "micro P / R / F1, %", "per prompt P / R / F1, %"], keyword_cells),
    ]
    if any("caption/word_f1" in metrics for metrics in rows.values()):
        found.append(lines(["captions", "word F1, %"], lambda metrics: [cell(metrics, ["caption/word_f1"], ".1f", 100)]))
    if any(f"score/z2/{SCORES[0]}" in metrics for metrics in rows.values()):
        found.append(lines(["deviations: NLL / z2 / SRCC with the error", *SCORES], deviation_cells))
    return found


def table(rows: Mapping[str, Mapping[str, float | None]]) -> str:
    """The `tables` of `rows` as Markdown."""
    return "\n\n".join(
        tabulate(lines[1:], lines[0], tablefmt="github", disable_numparse=True, stralign="left")
        for lines in tables(rows)
    )
