"""The measured uses of a critic: their pictures, captions and truths."""

import numpy as np
import pytest

from benchmarks.alignment import drawings
from benchmarks.feedback import __main__ as loop
from benchmarks.feedback import config, pictures
from rahf.predictor import Feedback
from rahf.reward import prompts
from richhf_data import keywords
from richhf_data.errors import UserError
from richhf_data.synthetic import render


@pytest.fixture(scope="module")
def drawn():
    return [pictures.draw(drawings.KINDS[i % 7], 0.5, 0.3, (3, i)) for i in range(140)]


def test_a_wrong_caption_is_labelled_where_it_is_wrong(drawn):
    for one in drawn:
        tokens = keywords.tokenize(prompts.text(one.caption))
        labels = render.wrong_labels(one.picture)
        stated = [getattr(one.caption, name) for name in prompts.CATEGORIES]
        wrong = [token for token, label in zip(tokens, labels, strict=True) if label == keywords.MISALIGNED]
        differing = [
            name
            for name, word in zip(prompts.CATEGORIES, stated, strict=True)
            if word not in (None, getattr(one.shown, name))
        ]
        assert len(wrong) == len(differing)
        for name, token in zip(differing, wrong, strict=True):
            word = getattr(one.caption, name)
            assert token == word.split()[-1] or (name == "thing" and token[:3] == word[:3])
    assert 0.2 < np.mean([bool(one.picture.wrong) for one in drawn]) < 0.9


def test_artifacts_have_regions_and_cost_plausibility(drawn):
    for one in drawn:
        found = [region for region in one.regions if region.heatmap == 0]
        assert len(found) == len(one.picture.artifacts)
        assert (one.picture.latents[0] < 1) == bool(found)
    assert 0.35 < np.mean([bool(one.picture.artifacts) for one in drawn]) < 0.65
    (plain,) = {pictures.draw(("thing",), 0.0, 0.0, (3, i)).picture.artifacts for i in range(5)}
    assert plain == ()
    again = pictures.draw(drawings.KINDS[0], 0.5, 0.3, (3, 0))
    np.testing.assert_array_equal(again.image, drawn[0].image)


def test_every_second_picture_goes_through(drawn):
    images = np.stack([one.image for one in drawn[:5]])
    through = pictures.half_through(images, lambda images: images // 2)
    np.testing.assert_array_equal(through[::2], images[::2])
    np.testing.assert_array_equal(through[1::2], images[1::2] // 2)


def test_a_mask_elsewhere_has_the_same_size():
    class Model:
        def predict(self, images, texts):
            maps = np.zeros((1, 8, 8), np.float32)
            maps[:, 1:3, 1:4] = 0.9
            return Feedback({}, {"implausibility": maps}, [], [])

    critic = type("Critic", (), {"model": Model(), "of_feedback": None})()
    maps = loop.Elsewhere(critic).predict([None], ["a cat"]).heatmaps["implausibility"]
    assert maps.sum() == np.float32(0.9) * 6 and maps[0, 5:7, 5:8].all()


def test_the_config_is_in_its_ranges():
    found = config.get_config()
    loop.check(found)
    found.eval.prompts = 0
    with pytest.raises(UserError, match=r"eval\.prompts: got 0, expected"):
        loop.check(found)
