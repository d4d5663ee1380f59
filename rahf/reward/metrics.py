"""How well numbers predict binary labels."""

import numpy as np
import scipy.stats


def auc(values: np.ndarray, labels: np.ndarray) -> float:
    """Area under the ROC curve, ties counted half; nan where the labels are all alike. float[n], int[n] of 0 and 1."""
    good = np.asarray(labels) == 1
    pairs = int(good.sum()) * int((~good).sum())
    if not pairs:
        return float("nan")
    ranks = scipy.stats.rankdata(values)
    return float((ranks[good].sum() - good.sum() * (good.sum() + 1) / 2) / pairs)


def accuracy(values: np.ndarray, labels: np.ndarray, threshold: float) -> float:
    """The share of labels that `values >= threshold` gets right."""
    return float(np.mean((np.asarray(values) >= threshold) == (np.asarray(labels) == 1)))


def f1(values: np.ndarray, labels: np.ndarray, threshold: float) -> float:
    """Of the label 1: harmonic mean of precision and recall of `values >= threshold`; nan where there is no 1 at all."""
    predicted, good = np.asarray(values) >= threshold, np.asarray(labels) == 1
    total = int(predicted.sum()) + int(good.sum())
    return float(2 * (predicted & good).sum() / total) if total else float("nan")


def best_threshold(values: np.ndarray, labels: np.ndarray) -> float:
    """The threshold with the highest accuracy, between two values; the lowest of several."""
    order = np.argsort(values, kind="stable")
    ordered, good = np.asarray(values, np.float64)[order], (np.asarray(labels) == 1)[order]
    ends = np.flatnonzero(np.diff(ordered)) + 1  # a threshold never parts equal values
    cuts = np.concatenate([[0], ends, [len(ordered)]])  # how many are below
    right = np.concatenate([[0], np.cumsum(~good)])[cuts] + good.sum() - np.concatenate([[0], np.cumsum(good)])[cuts]
    padded = np.concatenate([[-np.inf], ordered, [np.inf]])
    cut = cuts[np.argmax(right)]
    below, above = padded[cut], padded[cut + 1]
    return float(above if np.isinf(below) else np.nextafter(below, np.inf) if np.isinf(above) else (below + above) / 2)


def all_of(values: np.ndarray, labels: np.ndarray, threshold: float) -> dict[str, float]:
    """accuracy, f1 (both at the threshold) and auc."""
    return {
        "accuracy": accuracy(values, labels, threshold),
        "f1": f1(values, labels, threshold),
        "auc": auc(values, labels),
    }
