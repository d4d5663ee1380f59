"""Repairing pictures where a critic sees a flaw."""

import argparse
import dataclasses
import json
import types

import cv2
import numpy as np
import PIL.Image
import pytest
import scipy.ndimage
import tiny_diffusion

from rahf.diffusion import folder, regions, repair
from rahf.predictor import Feedback
from rahf.reward import specs
from richhf_data import images, schema
from richhf_data.errors import UserError

FLAW = (255, 0, 255)  # the colour that the critic below finds implausible
OPTIONS = repair.Options(steps=2, candidates=2, threshold=0.4, smallest=0.0)


class Critic:
    """Finds pixels of one colour implausible; a real function of the picture, of 16 by 16 values."""

    identity = "magenta"

    def __init__(self, fails_at=None):
        self.model, self.calls, self.fails_at = self, 0, fails_at

    def predict(self, pictures, prompts):
        self.calls += 1
        if self.calls == self.fails_at:
            raise KeyboardInterrupt
        flawed = [np.float32((np.abs(picture.astype(int) - FLAW) < 40).all(-1)) for picture in pictures]
        maps = np.stack([cv2.resize(one, (16, 16), interpolation=cv2.INTER_AREA) for one in flawed])
        scores = dict.fromkeys(schema.SCORES, np.float32([1 - one.mean() for one in flawed]))
        heatmaps = {"implausibility": maps, "misalignment": maps[:, ::-1]}
        return Feedback(scores, heatmaps, list(prompts), [["cat"]] * len(prompts))

    def text_ids(self, prompt):
        assert prompt

    def of_feedback(self, feedback):
        return feedback.scores["plausibility"]


@pytest.fixture(scope="module")
def model(unpacked):
    return folder.read(tiny_diffusion.write_weights(unpacked("diffusion_tiny") / "first"))


def picture(height, width, flaw=None):
    """Grey noise; `flaw`: (top, left, bottom, right) as shares."""
    image = np.random.default_rng(height).integers(60, 120, (height, width, 3)).astype(np.uint8)
    if flaw:
        top, left, bottom, right = (round(share * side) for share, side in zip(flaw, (height, width) * 2, strict=True))
        image[top:bottom, left:right] = FLAW
    return image


# ---- Geometry -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("shape", [(48, 64), (160, 90), (200, 31), (7, 7)])
@pytest.mark.parametrize(("threshold", "dilation", "smallest"), [(0.5, 0.06, 0.01), (0.3, 0.0, 0.0), (0.7, 0.2, 0.03)])
def test_a_mask_is_the_thresholded_dilated_heatmap(shape, threshold, dilation, smallest):
    heatmap = cv2.GaussianBlur(np.random.default_rng(1).random((16, 16)).astype(np.float32), (0, 0), 1.0)
    heatmap = (heatmap - heatmap.min()) / np.ptp(heatmap)
    large = cv2.resize(heatmap, shape[::-1], interpolation=cv2.INTER_LINEAR)
    numbers, count = scipy.ndimage.label(large >= threshold, np.ones((3, 3)))
    areas = scipy.ndimage.sum_labels(np.ones(shape), numbers, np.arange(1, count + 1))
    kept = np.isin(numbers, 1 + np.flatnonzero(areas >= smallest * large.size))
    radius = dilation * min(shape)
    y, x = np.mgrid[-int(radius) : int(radius) + 1, -int(radius) : int(radius) + 1]
    expected = scipy.ndimage.binary_dilation(kept, x * x + y * y <= radius * radius) if kept.any() else kept
    np.testing.assert_array_equal(regions.mask_of(heatmap, shape, threshold, dilation, smallest), expected)


def test_the_edge_is_soft_inside_of_the_mask():
    mask = np.zeros((40, 50), bool)
    mask[10:30, :25] = True
    shows = regions.opacity(mask, 3.0)
    assert (shows[~mask] == 0).all() and (shows[mask] > 0).all()
    np.testing.assert_allclose(shows[20, 20:26], [1, 1, 0.75, 0.5, 0.25, 0])  # 25 is outside
    assert shows[20, 0] == 1  # the picture's edge is not the mask's
    np.testing.assert_array_equal(regions.opacity(mask, 0.0), mask)


@pytest.mark.parametrize("shape", [(48, 64), (160, 90), (300, 31), (12, 9), (500, 700)])
def test_windows_cover_each_flaw_once(shape):
    rng = np.random.default_rng(0)
    for trial in range(20):
        mask = np.zeros(shape, bool)
        for _ in range(trial % 7 + 1):
            y, x = rng.integers(0, shape[0]), rng.integers(0, shape[1])
            mask[y : y + rng.integers(1, 9), x : x + rng.integers(1, 9)] = True
        windows, covered = regions.windows_of(mask, 16, 2.0), np.zeros(shape, int)
        for top, left, side in windows:
            covered[max(top, 0) : max(top + side, 0), max(left, 0) : max(left + side, 0)] += 1
            assert side >= min(16, max(shape))
            assert all((first >= 0 and first + side <= length) or side > length for first, length in
                       zip((top, left), shape, strict=True))  # fmt: skip
        assert (covered[mask] == 1).all() and covered.max() == 1
    dots = np.zeros((999, 999), bool)
    dots[::40, ::40] = True
    assert len(regions.windows_of(dots, 16, 1.0)) == 1


def test_what_is_put_back_as_it_was_cut_changes_nothing():
    image = picture(48, 31)
    mask = np.zeros((48, 31), bool)
    mask[2:9, 20:31] = True
    (window,) = regions.windows_of(mask, 40, 2.0)
    assert window.side == 40 and window.left < 0
    for size in (40, 80):
        copy = image.copy()
        drawn = regions.scaled(regions.cut(image, window), size).astype(np.float32) / 127.5 - 1
        regions.put_back(copy, drawn, window, mask.astype(np.float32))
        np.testing.assert_array_equal(copy[~mask], image[~mask])
        assert np.abs(copy.astype(int) - image).max() <= (0 if size == 40 else 40)
    whole = regions.to_draw(mask, window, 40, 8)
    assert whole.reshape(5, 8, 5, 8).any((1, 3)).sum() * 64 == whole.sum()  # cells are whole
    assert whole[regions.cut(mask.astype(np.uint8), window, cv2.BORDER_CONSTANT) > 0].all()


# ---- Repair ---------------------------------------------------------------------------------------------------------
MIDDLE, CORNER = (0.3, 0.4, 0.5, 0.6), (0, 0, 0.25, 0.25)
SMALL = {"4:3": (48, 64), "9:16": (64, 36), "narrow": (200, 31), "the model's": (16, 16)}
CASES = [(shape, flaw) for flaw in (MIDDLE, CORNER) for shape in SMALL.values()] + [((3648, 5472), MIDDLE)]


@pytest.mark.parametrize(("shape", "flaw"), CASES)
def test_the_flaw_is_drawn_anew_and_the_rest_stays(model, shape, flaw):
    image = picture(*shape, flaw)
    found = repair.repair(model, Critic(), image, "a red cat", OPTIONS)
    assert found.status == "repaired" and found.after > found.before and found.image.shape == image.shape
    np.testing.assert_array_equal(found.image[~found.mask], image[~found.mask])
    assert (found.image[found.mask] != image[found.mask]).any()
    (one,) = found.rounds
    assert one.chosen == int(np.argmax(one.scores)) and found.after == max(one.scores)
    expected = regions.mask_of(found.heatmap, shape, OPTIONS.threshold, OPTIONS.dilation, OPTIONS.smallest)
    np.testing.assert_array_equal(found.mask, expected)


def test_rounds_go_on_until_nothing_is_left(model):
    image = picture(32, 32, (0.3, 0.3, 0.6, 0.6))
    soft = dataclasses.replace(OPTIONS, rounds=3, dilation=0.0, feather=0.1)  # the soft edge keeps some of the flaw
    found = repair.repair(model, Critic(), image, "cat", soft)
    assert found.status == "repaired" and 1 <= len(found.rounds) <= 3
    np.testing.assert_array_equal(found.image[~found.mask], image[~found.mask])
    numbers = [one.numbers for one in found.rounds]
    assert len({number for one in numbers for number in one}) == sum(map(len, numbers))  # other noise in each round


def test_pictures_are_left_alone_without_a_flaw_with_too_large_a_one_and_without_a_better_candidate(model):
    clean, full = picture(32, 48), picture(32, 48, (0, 0, 1, 1))
    for image, changes, status, rounds in (
        (clean, {}, "clean", 0),
        (full, {}, "too large", 0),
        (full, {"largest": 1.0}, "repaired", 1),
        (picture(32, 48, (0.2, 0.2, 0.5, 0.5)), {"margin": 1.0}, "kept", 1),
        (picture(32, 48, (0.2, 0.2, 0.5, 0.5)), {"smallest": 0.5}, "clean", 0),
        (picture(40_000, 31, (0.3, 0.0, 0.5, 1.0)), {}, "too large", 0),  # a square of 8,000 pixels at least
    ):
        found = repair.repair(model, Critic(), image, "cat", dataclasses.replace(OPTIONS, **changes))
        assert (found.status, len(found.rounds)) == (status, rounds)
        assert (found.status == "repaired") == (found.image != image).any() == found.mask.any()


def test_misaligned_words_follow_the_prompt_where_they_fit(model):
    image = picture(32, 32, (0.3, 0.3, 0.6, 0.6))
    options = dataclasses.replace(OPTIONS, add_words=True, region="misalignment")
    found = repair.repair(model, Critic(), image[::-1].copy(), "a red cat", options)
    assert [one.prompt for one in found.rounds] == ["a red cat, cat"]
    long = "cat " * 75
    assert repair._with_words(model, long, ["red"]) == long


# ---- The command ----------------------------------------------------------------------------------------------------
@pytest.fixture
def given(tmp_path, model, monkeypatch):
    """Arguments of `repair.run` for five pictures: with alpha, clean, a JPEG, full, broken."""
    place = tmp_path / "in"
    place.mkdir()
    alpha = np.dstack([picture(24, 32, (0.3, 0.3, 0.7, 0.7)), np.full((24, 32), 255, np.uint8)])
    alpha[:3, :, 3] = 0
    PIL.Image.fromarray(alpha).save(place / "0.png")
    PIL.Image.fromarray(picture(24, 24)).save(place / "1.png")
    PIL.Image.fromarray(picture(24, 24)).save(place / "2.jpg")
    PIL.Image.fromarray(picture(24, 24, (0, 0, 1, 1))).save(place / "3.png")
    (place / "4.png").write_bytes(b"no picture")
    rows = [{"image": f"in/{name}", "prompt": "a <red> cat"} for name in ("0.png", "1.png", "2.jpg", "3.png", "4.png")]
    (tmp_path / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    critics = types.SimpleNamespace(next=Critic())
    monkeypatch.setattr(specs, "critic_of", lambda spec, scores: critics.next)
    monkeypatch.setattr(folder, "read", lambda path: model)
    (tmp_path / "model").mkdir()
    arguments = {"images": str(tmp_path / "list.jsonl"), "prompt": None, "critic": "rahf:run", "model": tmp_path / "model"}
    return argparse.Namespace(**arguments, output=tmp_path / "out", critics=critics)


def test_a_folder_has_pictures_lines_and_a_page(given):
    assert repair.run(given, OPTIONS) == 1
    lines = [json.loads(line) for line in (given.output / "repairs.jsonl").read_text().splitlines()]
    assert [line["status"] for line in lines] == ["repaired", "clean", "clean", "too large", "failed"]
    before, after = images.read(given.images.replace("list.jsonl", "in/0.png")), images.read(given.output / "00000.png")
    mask = images.read(given.output / lines[0]["mask"])[..., 0] > 0
    np.testing.assert_array_equal(after[~mask], before[~mask])
    assert lines[0]["score_after"] > lines[0]["score_before"] and 0 < lines[0]["mask_share"] < 1
    (one,) = lines[0]["rounds"]
    assert len(one["scores"]) == 2 and one["chosen"] in (0, 1) and one["prompt"] == "a <red> cat"
    for number, name in ((1, "1.png"), (2, "2.jpg"), (3, "3.png")):
        original = given.output.parent / "in" / name
        assert (given.output / lines[number]["image"]).read_bytes() == original.read_bytes()
    rows = [json.loads(line) for line in (given.output / "images.jsonl").read_text().splitlines()]
    assert [row["image"] for row in rows] == ["00000.png", "00001.png", "00002.jpeg", "00003.png"]
    page = (given.output / "report.html").read_text()
    assert "a &lt;red&gt; cat" in page and "<red>" not in page
    assert page.count("<figure>") == 1 + 1 + 1 + 2 + 1 + 3 * 3  # original, heatmap, mask, two candidates, result; the rest


def test_a_killed_run_ends_with_the_same_files(given):
    repair.run(given, OPTIONS)
    expected = {file.name: file.read_bytes() for file in given.output.iterdir() if file.is_file()}
    given.output, given.critics.next = given.output.parent / "again", Critic(fails_at=3)
    with pytest.raises(KeyboardInterrupt):
        repair.run(given, OPTIONS)
    assert not (given.output / "repairs.jsonl").exists()
    given.critics.next = Critic()
    with pytest.raises(UserError, match=r"output: .*again holds images of another repair; choose another folder"):
        repair.run(given, dataclasses.replace(OPTIONS, candidates=3))
    repair.run(given, OPTIONS)
    assert given.critics.next.calls == 3  # the first picture took two
    assert {file.name: file.read_bytes() for file in given.output.iterdir() if file.is_file()} == expected
    repair.run(given, OPTIONS)
    assert given.critics.next.calls == 3


def test_what_cannot_be_is_refused(given, model):
    for options, message in (
        ({"candidates": 0}, "repair.candidates: got 0"),
        ({"threshold": 1.5}, "repair.threshold: got 1.5"),
        ({"region": "nose"}, "repair.region: got 'nose'"),
    ):
        with pytest.raises(UserError, match=message):
            repair.Options(**options)
    with pytest.raises(UserError, match="image: got 15 by 15 pixels"):
        repair.run(given, dataclasses.replace(OPTIONS, size=15))
    given.images = str(given.output.parent / "in" / "*.png")
    with pytest.raises(UserError, match=r"0.png has no prompt; pass --prompt"):
        repair.run(given, OPTIONS)
    for options, message in (
        ({"steps": 5000}, "steps: got 5000 for ddim"),
        ({"negative_prompt": "cat " * 80}, "takes 82 ids"),
        ({"size": 8192}, "size: got 8192, expected at most 20,000,000 pixels in all"),
    ):
        given.prompt = "cat"
        with pytest.raises(UserError, match=message):
            repair.run(given, dataclasses.replace(OPTIONS, **options))
    inside = argparse.Namespace(**vars(given) | {"output": given.output.parent / "in"})
    with pytest.raises(UserError, match=r"images: .*0.png is in .*in, where this command writes; choose another --output"):
        repair.run(inside, OPTIONS)
    given.output.mkdir()
    PIL.Image.new("RGB", (8, 8)).save(given.output / "00000.png")
    with pytest.raises(UserError, match=r"output: .*out holds images of another command; choose another folder"):
        repair.run(given, OPTIONS)
    (given.output / "00000.png").unlink()
    given.prompt = "cat " * 80
    with pytest.raises(UserError, match="takes 82 ids"):
        repair.run(given, OPTIONS)
    assert not list(given.output.glob("*.png"))
