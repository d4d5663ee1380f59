"""Metrics of a generator's images: Frechet distance, diversity, and means with standard errors."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from richhf_data.errors import UserError


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """The Frechet distance (FID) between two sets of features, float[n, D] and float[m, D].

    |mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)), arXiv 1706.08500, with the unbiased covariances A and B, in float64.
    With centred features X, A = X'X / (n - 1). Therefore tr (A B)^(1/2) is the sum of the singular values of
    X_a X_b' / ((n - 1) (m - 1))^(1/2). This needs no matrix square root and also holds for singular covariances (n <= D).

    Raises:
      UserError: other shapes, fewer than 2 rows, values that are not finite.
    """
    a, b = checked_features("a", a), checked_features("b", b)
    if a.shape[1] != b.shape[1]:
        raise UserError(f"features: got {a.shape[1]} and {b.shape[1]} columns, expected those of one network")
    if min(len(a), len(b)) < 2:
        raise UserError(f"features: got {len(a)} and {len(b)} rows, expected 2 or more for a covariance")
    means = a.mean(axis=0), b.mean(axis=0)
    roots = [np.linalg.qr((x - mean) / np.sqrt(len(x) - 1), mode="r") for x, mean in zip((a, b), means, strict=True)]
    traces = sum(np.sum(root**2) for root in roots)
    distance = np.sum((means[0] - means[1]) ** 2) + traces - 2 * np.linalg.norm(roots[0] @ roots[1].T, "nuc")
    return max(0.0, float(distance))


def diversity(features: np.ndarray, prompts: Sequence[str]) -> float:
    """How different the images of a prompt are, 0 to 2: their mean pairwise cosine distance (1 - cosine).

    The mean is over the pairs of a prompt, then over the prompts with two or more images; nan if there are none.

    Args:
      features: float[n, D], one row per image. prompts: the n images' prompts.

    Raises:
      UserError: different numbers of rows and prompts, values that are not finite, a row of zeros.
    """
    found = list(diversities(features, prompts).values())
    return float(np.mean(found)) if found else math.nan


def diversities(features: np.ndarray, prompts: Sequence[str]) -> dict[str, float]:
    """The `diversity` of each prompt with two or more images. Same arguments and errors."""
    features = checked_features("features", features)
    if len(features) != len(prompts):
        raise UserError(f"features: got {len(features)} rows for {len(prompts)} prompts, expected as many")
    lengths = np.linalg.norm(features, axis=1, keepdims=True)
    if not lengths.all():
        raise UserError(f"features: row {int(lengths.argmin())} is all zeros, expected one with a direction")
    rows = {}
    for row, prompt in zip(features / lengths, prompts, strict=True):
        rows.setdefault(prompt, []).append(row)
    found = {}
    for prompt, unit in rows.items():
        if (count := len(unit)) > 1:
            cosines = (np.sum(np.sum(unit, axis=0) ** 2) - count) / (count * (count - 1))
            found[prompt] = max(0.0, float(1 - cosines))
    return found


@dataclasses.dataclass(frozen=True)
class Mean:
    """A mean over images.

    Attributes:
      value: the mean; nan if there are no images. count: the number of images.
      shares: prompt -> sum of its images' deviations from the mean, divided by `count`. The shares add up to 0.
    """

    value: float
    count: int
    shares: Mapping[str, float]

    @property
    def error(self) -> float:
        """Standard error over prompts; s / sqrt(n) if all prompts are different, nan with fewer than 2 prompts."""
        count = len(self.shares)
        if count < 2:
            return math.nan
        return math.sqrt(count / (count - 1) * sum(share**2 for share in self.shares.values()))

    def __sub__(self, other: "Mean") -> "Mean":
        """The difference of two means. Its error is paired by prompt: common difficulty of a prompt cancels."""
        names = dict.fromkeys([*self.shares, *other.shares])
        shares = {name: self.shares.get(name, 0.0) - other.shares.get(name, 0.0) for name in names}
        return Mean(self.value - other.value, min(self.count, other.count), shares)


def mean_of(values: np.ndarray, prompts: Sequence[str]) -> Mean:
    """The mean of the values that are not nan, float[n], of images with the n prompts."""
    values = np.asarray(values, np.float64)
    rows = np.flatnonzero(~np.isnan(values))
    if not len(rows):
        return Mean(math.nan, 0, {})
    value, shares = values[rows].mean(), {}
    for row in rows:
        shares[prompts[row]] = shares.get(prompts[row], 0.0) + float(values[row] - value) / len(rows)
    return Mean(float(value), len(rows), shares)


def checked_features(name: str, values) -> np.ndarray:
    """Features as float64[n, D]. Raises UserError, which begins with `name`: another shape, values that are not finite."""
    values = np.asarray(values, np.float64)
    if values.ndim != 2 or not values.size:
        raise UserError(f"{name}: got shape {values.shape}, expected features [n, D], one row per image")
    if wrong := int(np.sum(~np.isfinite(values).all(axis=1))):
        raise UserError(f"{name}: got {wrong} of {len(values)} rows with values that are not finite")
    return values
