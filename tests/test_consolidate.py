"""Consolidation against cases worked out by hand."""

import dataclasses
import json

import numpy as np
import pytest

from richhf_data import consolidate, schema
from richhf_data.consolidate import Annotation

PLAIN = Annotation(points=((), ()), labels=(1, 1, 1), scores=(1, 2, 3, 5))
PROMPT = "a yellow cat"


def _changed(**changes):
    return dataclasses.replace(PLAIN, **changes)


def test_scores_are_the_mean_standardised():
    others = [_changed(scores=(2, 2, 5, 5)), _changed(scores=(3, 5, 4, 5))]
    scores = consolidate.consolidate([PLAIN, *others], PROMPT)["scores"]
    np.testing.assert_allclose(scores, [1 / 4, 2 / 4, 3 / 4, 1])
    assert scores.dtype == np.float32


def test_labels_are_the_majority():
    annotators = [_changed(labels=(1, 0, 0)), _changed(labels=(1, 0, 1)), _changed(labels=(0, 1, 1))]
    labels = consolidate.consolidate(annotators, PROMPT)["labels"]
    assert labels.tolist() == [1, 0, 1] and labels.dtype == np.int32
    assert consolidate.consolidate(annotators[1:], PROMPT)["labels"].tolist() == [1, 1, 1]  # a tie is aligned


def test_disk_is_the_pixels_whose_centres_are_near():
    marked = consolidate.disks([(0.5, 0.5)], 4, radius=0.25)  # of the 4 x 4 centres only the inner ones are within 1 px
    assert marked.tolist() == [[False] * 4, [False, True, True, False], [False, True, True, False], [False] * 4]
    marked = consolidate.disks([(0.125, 0.875)], 4, radius=0.25)  # the centre of the lower left pixel
    assert np.argwhere(marked).tolist() == [[2, 0], [3, 0], [3, 1]]


@pytest.mark.parametrize("size", [32, 64, 512])
@pytest.mark.parametrize("point", [(0.31, 0.62), (0.0, 1.0), (1.0, 0.49)])
def test_disk_equals_the_distance_of_every_pixel(size, point):
    y, x = (np.mgrid[:size, :size] + 0.5) / size
    near = (x - point[0]) ** 2 + (y - point[1]) ** 2 <= schema.POINT_RADIUS**2
    differ = near != consolidate.disks([point], size)
    assert near.any() and differ.sum() <= 2  # rounding on the rim


def test_heatmaps_are_the_mean_of_binary_maps():
    twice = _changed(points=(((0.5, 0.5), (0.51, 0.5)), ()))  # one annotator counts once, however often they click
    once = _changed(points=(((0.5, 0.5),), ((0.25, 0.75),)))
    heatmaps = consolidate.consolidate([twice, once, PLAIN], PROMPT, size=64)["heatmaps"]
    assert heatmaps.shape == (64, 64, 2) and heatmaps.dtype == np.uint8
    assert heatmaps[32, 32].tolist() == [170, 0]
    assert heatmaps[48, 16].tolist() == [0, 85]
    assert set(np.unique(heatmaps)) == {0, 85, 170}


def test_maps_of_two_sizes_mark_the_same_area():
    one = _changed(points=(((0.3, 0.4), (0.7, 0.72)), ()))
    small, large = (consolidate.consolidate([one], PROMPT, size)["heatmaps"].mean() for size in (64, 512))
    assert abs(small - large) < 0.05 * large


def test_annotation_survives_json():
    annotation = _changed(points=(((0.25, 0.5),), ()), labels=(1, 0, 1))
    value = json.loads(json.dumps(annotation.to_json()))
    assert value["scores"]["overall"] == 5 and value["points"]["implausibility"] == [[0.25, 0.5]]
    assert Annotation.from_json(value) == annotation
    del value["scores"]["overall"]
    with pytest.raises(ValueError, match=r"annotation scores: .* expected also \['overall'\]"):
        Annotation.from_json(value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": (1, 2, 3)}, "scores: got 3, expected 4"),
        ({"scores": (1, 2, 6, 3)}, "aesthetics score: got 6, expected 1 .. 5"),
        ({"scores": (0, 2, 3, 3)}, "plausibility score: got 0, expected 1 .. 5"),
        ({"scores": (float("nan"), 2, 3, 3)}, "plausibility score: got nan, expected 1 .. 5"),
        ({"points": ((),)}, "points: got 1 lists, expected one for each"),
        ({"points": ((), ((0.5, 1.2),))}, r"misalignment point: got \(0.5, 1.2\), expected \(x, y\) as fractions"),
        ({"points": (((0.5,),), ())}, r"implausibility point: got \(0.5,\), expected \(x, y\)"),
        ({"labels": (1, 1)}, "labels: got 2, expected 3, one for each prompt token"),
        ({"labels": (1, 2, 1)}, "labels: got 2, expected 0 or 1"),
    ],
)
def test_faults_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        consolidate.consolidate([PLAIN, _changed(**changes)], PROMPT)


def test_no_annotation_and_no_pixel_are_refused():
    with pytest.raises(ValueError, match="annotations: got none, expected at least one"):
        consolidate.consolidate([], PROMPT)
    with pytest.raises(ValueError, match="size: got 0"):
        consolidate.consolidate([PLAIN], PROMPT, size=0)
