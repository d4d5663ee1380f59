"""Gradient maps of CLIP: equal to torch's autograd, aligned with the whole picture, and what they refuse."""

import jax
import numpy as np
import pytest
import scipy.ndimage
import tiny_preference
from tiny_preference import PROMPTS, SIZE

from rahf import convert
from rahf.reward import gradient_map
from rahf.reward.gradient_map import GradientMaps
from richhf_data.errors import UserError


@pytest.fixture(scope="module")
def folder(unpacked, tmp_path_factory):
    output = tmp_path_factory.mktemp("clip")
    convert.convert("open-clip", tiny_preference.write(unpacked("preference_tiny"), "open_clip"), output)
    return output


@pytest.fixture(scope="module")
def plain(folder):
    return GradientMaps(folder, sigma=tiny_preference.SIGMA)


@pytest.mark.parametrize("kind", ["gradient", "smoothgrad", "gradcam"])
def test_maps_are_those_of_torchs_autograd(kind, folder, unpacked):
    options = {"sigma": tiny_preference.SIGMA, "copies": tiny_preference.COPIES}
    maps = GradientMaps(folder, kind, **options, noise=tiny_preference.NOISE, seed=tiny_preference.SEED)
    expected = np.load(unpacked("preference_tiny") / "open_clip" / "golden.npz")[kind]
    pictures = tiny_preference.pictures()
    found = maps(pictures, PROMPTS)
    for picture, ours, crop in zip(pictures, found, expected, strict=True):
        theirs = gradient_map.whole_picture(crop, *picture.shape[:2])
        assert theirs.max() == 1 and np.ptp(theirs) > 0.3
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_a_map_does_not_depend_on_its_batch(plain):
    pictures = tiny_preference.pictures() * 3  # more than are computed at once
    maps = plain(pictures, PROMPTS * 3)
    assert maps.shape == (12, SIZE, SIZE) and maps.dtype == np.float32
    np.testing.assert_allclose(maps[8:], maps[:4], atol=1e-6)
    np.testing.assert_allclose(plain(pictures[1:2], PROMPTS[1:2])[0], maps[1], atol=1e-6)
    np.testing.assert_array_equal(maps.max((1, 2)), 1)
    assert maps.min() == 0 and plain([], []).shape == (0, SIZE, SIZE)


def test_a_map_lies_where_the_picture_was_cut():
    """The middle of a wide picture is a narrow band of the whole one, whatever lies outside."""
    crop = np.zeros((24, 24), np.float32)
    crop[:, 12:] = 1
    whole = gradient_map.whole_picture(crop, 30, 90)
    assert np.ptp(whole) == 1
    np.testing.assert_allclose(whole[:, 8:16].mean(0), [0] * 4 + [1] * 4, atol=1e-6)  # the middle third
    assert not whole[:, :8].any() and not whole[:, 16:].any()
    np.testing.assert_array_equal(gradient_map.whole_picture(crop.T, 90, 30), whole.T)
    np.testing.assert_array_equal(gradient_map.whole_picture(crop, 50, 50), crop)
    line = gradient_map.whole_picture(np.ones((24, 24), np.float32), 1, 500)  # one column of 500 is seen
    assert line.max() == 1 and line[:, 11:13].sum() == line.sum()
    assert not gradient_map.whole_picture(np.zeros((24, 24), np.float32), 30, 90).any()


def test_a_marked_spot_is_found_where_it_is():
    """A bright column of a wide picture, seen by a score of CLIP's pixels, is in its place in the whole map."""
    picture = np.zeros((40, 100, 3), np.uint8)
    picture[:, 60:64] = 255
    seen = gradient_map.prepare(picture, SIZE)[..., 0] / np.float32(255)
    whole = gradient_map.whole_picture(np.abs(seen), 40, 100)
    np.testing.assert_allclose(whole.mean(0) @ (np.arange(SIZE) + 0.5) / whole.mean(0).sum(), 0.62 * SIZE, atol=0.3)


def test_the_gaussian_is_scipys_and_zeros_stay_zeros():
    maps = np.random.default_rng(0).random((9, 9)).astype(np.float32)
    blur = gradient_map.gaussian(9, 2.0)
    np.testing.assert_allclose(blur @ maps @ blur.T, scipy.ndimage.gaussian_filter(maps, 2.0), atol=1e-6)
    np.testing.assert_array_equal(gradient_map.gaussian(9, 0), np.eye(9))
    np.testing.assert_array_equal(gradient_map.normalised(jax.numpy.zeros((2, 3, 3))), 0)


def test_identities_differ_by_what_changes_a_map(folder, plain):
    identities = [GradientMaps(folder, kind).identity for kind in ("gradient", "smoothgrad", "gradcam")]
    identities += [plain.identity, GradientMaps(folder, "smoothgrad", seed=1).identity]
    assert len(set(identities)) == 5
    assert GradientMaps(folder, "gradcam", sigma=3.0, seed=1).identity == identities[2]  # it reads neither


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "lime"}, r"gradient_map.kind: got 'lime', expected one of \('gradient', 'smoothgrad', 'gradcam'\)"),
        ({"sigma": -1.0}, "gradient_map.sigma: got -1.0, expected"),
        ({"copies": 0}, "gradient_map.copies: got 0, expected"),
        ({"noise": 0.0}, "gradient_map.noise: got 0.0, expected"),
    ],
)
def test_wrong_options_are_named(options, message, folder):
    with pytest.raises(UserError, match=message):
        GradientMaps(folder, **options)


def test_wrong_inputs_are_named(plain, tmp_path):
    with pytest.raises(UserError, match="gradient map: got 1 images and 2 prompts, expected as many"):
        plain([np.zeros((4, 4, 3), np.uint8)], ["a", "b"])
    with pytest.raises(UserError, match=r"image: got float64\[4, 4, 3\], expected uint8\[H, W, 3\]"):
        plain([np.zeros((4, 4, 3))], ["a"])
    with pytest.raises(UserError, match=r"is no folder that rahf.convert wrote, expected one whose kind is clip"):
        GradientMaps(tmp_path)
