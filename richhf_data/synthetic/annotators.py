"""Three simulated annotators: what they mark, miss, add and click, and how they turn the latents into Likert scores.

The rates are calibrated to the paper (section 3.4: about 25 % of the pairs have three equal scores, about 85 % lie
within one point) and to the real plausibility labels (mean 0.633, deviation 0.205); tests/test_synthetic.py checks it.
"""

import math

import cv2
import numpy as np

from richhf_data import consolidate, keywords, schema
from richhf_data.synthetic import flaws, render

NUMBER = 3
BIAS, NOISE = 0.2, 0.53  # standard deviations in Likert points: an annotator's leniency, and the error of each score
POINTS_MAX = 9
AREA_PER_POINT = 2.0  # in disks: a larger region gets more points
PULL, JITTER = 0.25, 0.012  # pull of points to a region's middle; their deviation as a fraction of the picture
STRAY = (0.025, 0.012)  # for each map, how often an annotator marks a flawless spot
WORD_HIT, WORD_SLIP, WORD_STRAY = 0.86, 0.04, 0.006  # probability to click a wrong word, its neighbour, and any word


def marking_rate(severity: float) -> float:
    """The probability that an annotator marks a region."""
    return 0.6 + 0.34 * min(1.0, severity / 0.3)


def num_points(area: float) -> int:
    """The number of points in a region of this area (a fraction of the picture)."""
    return min(POINTS_MAX, 1 + int(area / (AREA_PER_POINT * math.pi * schema.POINT_RADIUS**2)))


def _points(rng: np.random.Generator, pixels: np.ndarray, size: int, count: int) -> np.ndarray:
    """float64[count, 2]: (x, y) in [0, 1] on a region given by its flat pixel indices."""
    picked = pixels[(rng.random(count) * len(pixels)).astype(np.int64)]
    points = np.stack([picked % size, picked // size], 1) + 0.5  # [count, 2]
    middle = np.array([(pixels % size).mean(), (pixels // size).mean()]) + 0.5
    points = (points + PULL * (middle - points)) / size + JITTER * rng.standard_normal((count, 2))
    return np.clip(points, 0, 1)


def annotate(
    rng: np.random.Generator, picture: flaws.Picture, regions: list[render.Region], labels: np.ndarray
) -> list[consolidate.Annotation]:
    """The annotations of `NUMBER` annotators for a rendered picture; labels: the exact int32[tokens]."""
    prepared = []
    for region in regions:
        pixels = np.flatnonzero(region.mask)
        area = len(pixels) / region.mask.size
        prepared.append((region, pixels, num_points(area)))
    likert = schema.LIKERT_LOW + (schema.LIKERT_HIGH - schema.LIKERT_LOW) * np.array(picture.latents)
    annotations = []
    for _ in range(NUMBER):
        points: list[list] = [[] for _ in schema.HEATMAPS]
        for region, pixels, count in prepared:
            if rng.random() < marking_rate(region.severity):
                count = max(1, count - (rng.random() < 0.25) + (rng.random() < 0.25))
                marks = _points(rng, pixels, region.mask.shape[0], count)
                points[region.heatmap].extend(map(tuple, marks.tolist()))
        for index, rate in enumerate(STRAY):
            if rng.random() < rate:
                points[index].append((rng.random(), rng.random()))
        clicked = np.ones(len(labels), np.int32)
        chance = rng.random(len(labels))
        clicked[chance < WORD_STRAY] = keywords.MISALIGNED
        for token in np.flatnonzero(labels == keywords.MISALIGNED):
            if chance[token] < WORD_HIT:
                clicked[token] = keywords.MISALIGNED
            elif chance[token] > 1 - WORD_SLIP:
                clicked[max(0, token - 1)] = keywords.MISALIGNED
        noise = BIAS * rng.standard_normal() + NOISE * rng.standard_normal(len(likert))
        scores = np.clip(np.rint(likert + noise), schema.LIKERT_LOW, schema.LIKERT_HIGH)
        annotations.append(
            consolidate.Annotation(
                points=tuple(tuple(marks) for marks in points),
                labels=tuple(clicked.tolist()),
                scores=tuple(scores.tolist()),
            )
        )
    return annotations


def expected_heatmaps(regions: list[render.Region], size: int) -> np.ndarray:
    """float32[size, size, 2] in [0, 1]: the probability of each pixel to be marked by an annotator, given the regions.

    It is a region's marking rate times the probability that one of its points is near enough: the best prediction.
    """
    radius = schema.POINT_RADIUS * size
    reach = int(radius)
    grid = np.arange(-reach, reach + 1) ** 2
    disk = (grid[:, None] + grid[None, :] <= radius * radius).astype(np.float32)
    rng = np.random.default_rng(0)
    spared = np.ones((size, size, len(schema.HEATMAPS)), np.float32)
    samples = 512
    for region in regions:
        pixels = np.flatnonzero(region.mask)
        points = _points(rng, pixels, region.mask.shape[0], samples)
        columns, rows = np.minimum((points * size).astype(np.int64), size - 1).T
        density = np.bincount(rows * size + columns, minlength=size * size).reshape(size, size) / samples
        near = cv2.filter2D(density.astype(np.float32), -1, disk, borderType=cv2.BORDER_CONSTANT)
        count = num_points(len(pixels) / region.mask.size)
        marked = marking_rate(region.severity) * (1 - np.clip(1 - near, 0, 1) ** count)
        spared[..., region.heatmap] *= 1 - marked
    return 1 - spared
