"""Selecting the best picture of each prompt."""

import json

import numpy as np
import PIL.Image
import pytest

from rahf.diffusion import inputs, select
from rahf.reward.image_table import ImageTable
from richhf_data import images
from richhf_data.errors import UserError

PROMPTS = ["a cat", "a dog", "a cat", "a cow", "a dog", "a cat"]
BRIGHTNESS = [51, 255, 204, 102, 255, 204]


class Brightness:
    """A reward whose calls are counted. Fails in one call."""

    identity = "brightness"

    def __init__(self, fails_at=None):
        self.calls, self.fails_at = 0, fails_at

    def __call__(self, pictures, prompts):
        self.calls += 1
        if self.calls == self.fails_at:
            raise KeyboardInterrupt
        return [picture.mean() / 255 for picture in pictures]


@pytest.fixture
def table(tmp_path):
    """A table of one-coloured pictures; the third is a JPEG."""
    folder, rows = tmp_path / "own", []
    folder.mkdir()
    for i, (prompt, value) in enumerate(zip(PROMPTS, BRIGHTNESS, strict=True)):
        name = f"{i}.jpg" if i == 2 else f"{i}.png"
        PIL.Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(folder / name)
        rows.append({"prompt": prompt, "image": name})
    (folder / "images.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return ImageTable(folder)


def lines(file):
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_the_first_of_the_highest_is_taken_if_it_reaches_the_threshold():
    rewards = np.float32([0.1, 0.8, 0.7, 0.9, 0.8, 0.7])
    assert select.best(PROMPTS, rewards, 0.0) == [2, 1, 3]
    assert select.best(PROMPTS, rewards, np.float32(0.8)) == [1, 3]
    assert select.best(PROMPTS, rewards, 0.95) == []


def test_a_folder_holds_the_selected_pictures_as_they_were(table, tmp_path):
    found = select.select(table, Brightness(), tmp_path / "out", 0.5)
    assert found.rows == [2, 1]
    np.testing.assert_allclose(found.rewards, np.array(BRIGHTNESS) / 255, rtol=1e-6)
    selected = ImageTable(tmp_path / "out")
    assert selected.prompts == ["a cat", "a dog"]
    originals = list(table.images())
    assert [encoded for _, encoded in selected.images()] == [originals[2][1], originals[1][1]]
    rows = lines(tmp_path / "out" / "images.jsonl")
    assert [(row["image"], row["number"]) for row in rows] == [("00002.jpeg", 2), ("00001.png", 1)]
    assert images.read(tmp_path / "out" / "00001.png").mean() == 255
    every = lines(tmp_path / "out" / "rewards.jsonl")
    assert [row["number"] for row in every if row["selected"]] == [1, 2]
    assert [row["prompt"] for row in every] == PROMPTS


def test_a_killed_run_continues_with_the_rewards_that_it_has(table, tmp_path, monkeypatch):
    monkeypatch.setattr(inputs, "REWARDED_AT_ONCE", 2)
    monkeypatch.setattr(inputs, "SAVE_EVERY", 1)
    with pytest.raises(KeyboardInterrupt):
        select.select(table, Brightness(fails_at=3), tmp_path / "out", 0.5)
    assert not (tmp_path / "out" / "images.jsonl").exists()
    again = Brightness()
    assert select.select(table, again, tmp_path / "out", 0.5).rows == [2, 1]
    assert again.calls == 1
    written = (tmp_path / "out" / "images.jsonl").read_bytes()
    select.select(table, again, tmp_path / "out", 0.5)
    assert again.calls == 1 and (tmp_path / "out" / "images.jsonl").read_bytes() == written


def test_what_cannot_be_is_refused(table, tmp_path):
    with pytest.raises(UserError, match=r"threshold: got 1\.5, but the highest reward is 1; choose a lower one"):
        select.select(table, Brightness(), tmp_path / "out", 1.5)
    assert not list((tmp_path / "out").glob("*.png"))
    select.select(table, Brightness(), tmp_path / "out", 0.5)
    with pytest.raises(UserError, match=r"output: .* holds images of another threshold; choose another folder"):
        select.select(table, Brightness(), tmp_path / "out", 0.6)
    with pytest.raises(UserError, match="reward: got 1 values that are not finite"):
        select.select(table, lambda pictures, prompts: [np.nan] + [1.0] * 5, tmp_path / "other", 0.5)
