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
"""

import collections
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
    1 - (f_1 + ... + f_{F-1} + f_F / 2) / F: one sort of an image's negatives, and no loop over thresholds. (The PyTorch
    code counts one false positive too many at each threshold, a difference of 1 / number of negatives.)

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
        negatives = np.sort(noisy[~fixated])
        fixations = np.sort(noisy[fixated])  # rising: searchsorted is faster on neighbours
        false_positive_rates = 1.0 - np.searchsorted(negatives, fixations, side="left") / negatives.size
        values[row] = 1.0 - (false_positive_rates.sum() - 0.5 * false_positive_rates[0]) / count
    return values


def _pixels(prediction, truth):
    """Checks two [n, h, w] maps; both as float64[n, h * w]."""
    prediction, truth = np.asarray(prediction), np.asarray(truth)
    if prediction.ndim != 3 or prediction.size == 0:
        raise UserError(f"prediction: got shape {prediction.shape}, expected a [n, h, w] that is not empty")
    if truth.shape != prediction.shape:
        raise UserError(f"truth: got shape {truth.shape}, expected the prediction's {prediction.shape}")
    n = len(prediction)
    return prediction.reshape(n, -1).astype(np.float64), truth.reshape(n, -1).astype(np.float64)


def _constant(rows):
    """Whether the values of each row are equal up to float32 rounding; those of a resized constant map are."""
    low, high = rows.min(axis=-1), rows.max(axis=-1)
    return high - low <= FLAT * np.maximum(np.abs(low), np.abs(high))


def _empty(maps):
    return maps.max(axis=1) <= 0


def _dot(a, b):
    return (a * b).sum(axis=1)


# ------------------------------------------------------------------------------------------------------ a whole set


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
        size, labelled_prompt str ("a yellow_0 cat"). Sizes may differ between examples.
      written: how the decoder's vocabulary writes a text (`Vocabulary.written`), because words are compared as they are
        written; by default unchanged.

    Returns:
      Floats (nan without anything to measure; see the conventions of the module) with the keys

        score/{plcc,srcc}/{plausibility,alignment,aesthetics,overall}
        heatmap/{mse,mse_empty,cc,kld,sim,nss,auc_judd}/{implausibility,misalignment}
        keywords/{micro,per_prompt}/{precision,recall,f1}
        caption/word_f1, where any target is a caption
        num_examples

      Heatmaps: `mse` is the mean over all examples, `mse_empty` over those with an empty truth, the others over those
      without. Keywords, for the misaligned class: `micro` pools the tokens of all prompts, as in the paper's tables;
      `per_prompt` is the mean over prompts of each prompt's values, as in the PyTorch code. Because 0 / 0 is 0, a prompt
      without a misaligned word lowers that mean even if the prediction is perfect. In both, a token that the predicted
      sequence does not copy counts as not predicted.

    Raises:
      UserError: lengths or shapes do not match, or a prediction is not finite or out of range.
    """
    if len(targets) != len(predictions):
        raise UserError(f"predictions: got {len(predictions)} for {len(targets)} targets, expected one each")
    pairs = []
    for i, (target, prediction) in enumerate(zip(targets, predictions, strict=True)):
        _check(i, target, prediction)
        has_text = target["labels"] is not None or target.get("caption") is not None
        if np.any(target["score_mask"]) or np.any(target["heatmap_mask"]) or has_text:
            pairs.append((target, prediction))
    return {
        **_evaluate_scores(pairs),
        **_evaluate_heatmaps(pairs),
        **_evaluate_keywords(pairs, written),
        **_evaluate_captions(pairs, written),
        "num_examples": float(len(pairs)),
    }


def _check(i, target, prediction):
    for name, length in (("score", len(SCORES)), ("heatmap", len(HEATMAPS))):
        if np.shape(target[f"{name}_mask"]) != (length,):
            got = np.shape(target[f"{name}_mask"])
            raise UserError(f"targets[{i}]['{name}_mask']: got shape {got}, expected ({length},)")
    for side, row in (("targets", target), ("predictions", prediction)):
        if np.shape(row["scores"]) != (len(SCORES),):
            raise UserError(f"{side}[{i}]['scores']: got shape {np.shape(row['scores'])}, expected ({len(SCORES)},)")
        bad = ~np.isfinite(row["scores"]) & np.asarray(target["score_mask"], bool)
        if bad.any():
            k = int(np.argmax(bad))
            raise UserError(f"{side}[{i}]['scores']: got {SCORES[k]} = {row['scores'][k]}, expected a finite number")
    if not np.any(target["heatmap_mask"]):
        return
    truth, predicted = np.asarray(target["heatmaps"]), np.asarray(prediction["heatmaps"])
    if truth.dtype != np.uint8 or truth.ndim != 3 or truth.shape[2] != len(HEATMAPS) or truth.size == 0:
        raise UserError(
            f"targets[{i}]['heatmaps']: got {truth.dtype}{list(truth.shape)}, expected uint8[h, w, {len(HEATMAPS)}]"
        )
    if predicted.shape != truth.shape:
        raise UserError(
            f"predictions[{i}]['heatmaps']: got shape {predicted.shape}, expected the target's {truth.shape}; resize it"
        )
    for k, name in enumerate(HEATMAPS):
        if target["heatmap_mask"][k]:
            low, high = float(predicted[..., k].min()), float(predicted[..., k].max())
            if not (low >= 0.0 and high <= 1.0):  # false for nan too
                raise UserError(
                    f"predictions[{i}]['heatmaps']: got {name} from {low} to {high}, expected values in [0, 1]"
                )


def _evaluate_scores(pairs):
    import scipy.stats  # a second: every command would pay for it

    metrics = {}
    for k, name in enumerate(SCORES):
        kept = [(t["scores"][k], p["scores"][k]) for t, p in pairs if t["score_mask"][k]]
        truth, predicted = np.asarray(kept, np.float64).reshape(-1, 2).T
        for key, correlation in (("plcc", scipy.stats.pearsonr), ("srcc", scipy.stats.spearmanr)):
            if len(kept) < 2:
                value = np.nan
            elif _constant(truth) or _constant(predicted):
                value = 0.0
            else:
                value = correlation(truth, predicted).statistic
            metrics[f"score/{key}/{name}"] = float(value)
    return metrics


def _evaluate_heatmaps(pairs):
    metrics = {}
    for k, name in enumerate(HEATMAPS):
        values = {key: np.full(len(pairs), np.nan) for key in HEATMAP_METRICS}
        for rows in _chunks(pairs, k):
            truth = np.stack([pairs[row][0]["heatmaps"][..., k] for row in rows]).astype(np.float64) / 255
            predicted = np.stack([pairs[row][1]["heatmaps"][..., k] for row in rows])
            empty = truth.max(axis=(1, 2)) <= 0
            values["mse"][rows] = mse(predicted, truth)
            values["mse_empty"][rows] = np.where(empty, values["mse"][rows], np.nan)
            if marked := [row for row, is_empty in zip(rows, empty, strict=True) if not is_empty]:
                predicted, truth = predicted[~empty], truth[~empty]
                for key, metric in (("cc", cc), ("kld", kld), ("sim", sim), ("nss", nss)):
                    values[key][marked] = metric(predicted, truth)
                values["auc_judd"][marked] = auc_judd(predicted, truth, marked)
        for key in HEATMAP_METRICS:
            defined = values[key][np.isfinite(values[key])]
            metrics[f"heatmap/{key}/{name}"] = float(defined.mean()) if defined.size else float("nan")
    return metrics


def _chunks(pairs, k):
    """Lists of rows that have heatmap k. The maps of a list have one size and at most `_CHUNK_PIXELS` pixels, or one row."""
    by_shape: dict[tuple[int, ...], list[int]] = {}
    for row, (target, _) in enumerate(pairs):
        if target["heatmap_mask"][k]:
            by_shape.setdefault(np.shape(target["heatmaps"])[:2], []).append(row)
    for (height, width), rows in by_shape.items():
        step = max(1, _CHUNK_PIXELS // (height * width))
        for start in range(0, len(rows), step):
            yield rows[start : start + step]


def _evaluate_keywords(pairs, written):
    counts = []  # of true positives, predicted positives, positives, per prompt
    for target, prediction in pairs:
        if target["labels"] is None:
            continue
        tokens = keywords.tokenize(target["prompt"])
        if len(tokens) != len(target["labels"]):
            raise UserError(
                f"labels: got {len(target['labels'])} for the {len(tokens)} tokens of prompt {target['prompt']!r}, "
                "expected one each (None if they are unknown)"
            )
        writable = np.array([bool(keywords.written_words(token, written)) for token in tokens], bool)
        truth = (np.asarray(target["labels"]) == keywords.MISALIGNED) & writable
        read = keywords.read_labels(prediction["labelled_prompt"], tokens, written)
        predicted = np.array([label == keywords.MISALIGNED for label in read], bool)  # not copied (None): not predicted
        counts.append(((truth & predicted).sum(), predicted.sum(), truth.sum()))
    if not counts:
        return {f"keywords/{kind}/{key}": float("nan") for kind in ("micro", "per_prompt") for key in KEYWORD_METRICS}
    counts = np.asarray(counts, np.float64)
    micro = _precision_recall_f1(*counts.sum(axis=0))
    per_prompt = np.mean([_precision_recall_f1(*row) for row in counts], axis=0)
    return {
        f"keywords/{kind}/{key}": float(value)
        for kind, values in (("micro", micro), ("per_prompt", per_prompt))
        for key, value in zip(KEYWORD_METRICS, values, strict=True)
    }


def _evaluate_captions(pairs, written):
    values = []
    for target, prediction in pairs:
        if target.get("caption") is None:
            continue
        truth = collections.Counter(keywords.written_words(target["caption"], written))
        predicted = collections.Counter(keywords.words(prediction["labelled_prompt"]))
        values.append(_precision_recall_f1((truth & predicted).total(), predicted.total(), truth.total())[2])
    return {"caption/word_f1": float(np.mean(values))} if values else {}


def _precision_recall_f1(true_positives, predicted, positives):
    precision = true_positives / predicted if predicted else 0.0
    recall = true_positives / positives if positives else 0.0
    f1 = 2 * true_positives / (predicted + positives) if predicted + positives else 0.0
    return precision, recall, f1


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
    """The papers' result tables: scores, one per heatmap, misaligned words; and captions, if a row has them.

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
    return found


def table(rows: Mapping[str, Mapping[str, float | None]]) -> str:
    """The `tables` of `rows` as Markdown."""
    return "\n\n".join(
        tabulate(lines[1:], lines[0], tablefmt="github", disable_numparse=True, stralign="left")
        for lines in tables(rows)
    )
