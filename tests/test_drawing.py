"""drawing.py: the overlay's colours are where the heatmap is, words are marked, a file is replaced whole."""

import numpy as np

from richhf_data import drawing


def test_overlay_colours_what_is_marked_and_leaves_the_rest_grey():
    image = np.full((40, 40, 3), (200, 100, 50), np.uint8)
    heatmap = np.zeros((40, 40), np.float32)
    heatmap[:20] = 1.0
    result = drawing.overlay(image, heatmap)
    assert result.shape == image.shape and result.dtype == np.uint8
    assert (np.ptp(result[25:], axis=2) == 0).all()
    assert (result[:15, :, 0].astype(int) - result[:15, :, 2] > 50).all()  # inferno's end is yellow
    weak, strong = (np.ptp(drawing.overlay(image, np.full((2, 2), value)), axis=2).mean() for value in (0.02, 0.3))
    assert 3 < weak < strong


def test_overlay_stretches_the_heatmap_over_the_image():
    heatmap = np.zeros((4, 4), np.float32)
    heatmap[0, 3] = 1.0
    colored = np.ptp(drawing.overlay(np.zeros((60, 80, 3), np.uint8), heatmap), axis=2) > 0
    assert colored[:15, 60:].all() and not colored[30:].any() and not colored[:, :40].any()
