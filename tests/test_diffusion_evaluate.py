"""How good generated pictures are: the metrics against formulas, the evaluation, the command and its report."""

import json
import math
import os
import pathlib
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest
import scipy.linalg
import tiny_clip
from html_page import Page

from rahf import experiments
from rahf.diffusion import comparison_page, evaluate, generator_metrics
from rahf.reward import embed, prompts
from rahf.reward.image_table import ImageTable

ROOT = pathlib.Path(__file__).parent.parent
WORDS = prompts.words_of(experiments.load("reward_clip").prompts)
PROMPTS = ["two red cats", "a blue dog", "a cat", "three dogs on the moon", "a glass of water"]


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    return tiny_clip.write(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def clip(clip_folder):
    return embed.Clip(clip_folder)


def picture(seed, level=128, size=(16, 16)):
    """A picture around a grey, from 0 to 255."""
    return np.random.default_rng(seed).normal(level, 20, (*size, 3)).clip(0, 255).astype(np.uint8)


def brightness(images, texts):
    return np.array([image.mean() / 255 for image in images])


def colours(images):
    return np.array([image.mean(axis=(0, 1)) for image in images])


# ---- Frechet distance -----------------------------------------------------------------------------------------------
def textbook(a, b):
    covariances = [np.cov(x, rowvar=False) for x in (a, b)]
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    return np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(sum(covariances) - 2 * root)


def test_frechet_distance_is_the_textbook_formula():
    for seed in range(5):
        rng = np.random.default_rng(seed)
        a = rng.normal(size=(200, 12)) @ rng.normal(size=(12, 12))
        b = rng.normal(size=(90, 12)) @ rng.normal(size=(12, 12)) + rng.normal(size=12)
        assert generator_metrics.frechet_distance(a, b) == pytest.approx(textbook(a, b), rel=1e-9)
        assert generator_metrics.frechet_distance(b, a) == pytest.approx(textbook(a, b), rel=1e-9)


def test_frechet_distance_is_the_closed_form_of_diagonal_gaussians():
    """Whitened samples have exactly the covariance that they are then scaled to."""
    rng = np.random.default_rng(0)
    sets = []
    for count, deviations, mean in ((50, [1.0, 2.0, 0.5], [0, 0, 0]), (80, [3.0, 2.0, 0.0], [1, -2, 0.5])):
        x = rng.normal(size=(count, 3))
        x = (x - x.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(x, rowvar=False))).T
        sets.append(x * deviations + mean)
    expected = (1 + 4 + 0.25) + (1 - 3) ** 2 + 0 + 0.5**2
    assert generator_metrics.frechet_distance(*sets) == pytest.approx(expected, rel=1e-10)


def test_frechet_distance_of_fewer_rows_than_columns_needs_no_correction():
    """In the space that both span, embedded into more dimensions by a rotation, nothing changes."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(9, 5)), rng.normal(size=(7, 5)) * 2 + 1
    into, _ = np.linalg.qr(rng.normal(size=(40, 5)))
    assert generator_metrics.frechet_distance(a @ into.T, b @ into.T) == pytest.approx(textbook(a, b), rel=1e-9)
    assert generator_metrics.frechet_distance(a @ into.T, a @ into.T) == pytest.approx(0, abs=1e-9)
    few, other = rng.normal(size=(2, 40)), rng.normal(size=(3, 40))
    covariances = [np.cov(x, rowvar=False) for x in (few, other)]  # rank 1 and 2
    product = np.linalg.eigvals(covariances[0] @ covariances[1]).real
    expected = np.sum((few.mean(0) - other.mean(0)) ** 2) + np.trace(sum(covariances)) - 2 * np.sqrt(product.max())
    assert generator_metrics.frechet_distance(few, other) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_keeps_its_digits_far_from_zero():
    """float32 features with a large mean are computed in float64."""
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=(400, 4)).astype(np.float32) for _ in range(2))
    far = generator_metrics.frechet_distance(a + np.float32(4096), b + np.float32(4096))
    assert far == pytest.approx(textbook(a.astype(float), b.astype(float)), abs=1e-4)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (np.ones((5, 3)), np.ones((5, 4)), "features: got 3 and 4 columns, expected those of one network"),
        (np.ones((5, 3)), np.ones((1, 3)), "features: got 5 and 1 rows, expected 2 or more"),
        (np.full((5, 3), np.inf), np.ones((5, 3)), "a: got 5 of 5 rows with values that are not finite"),
        (np.ones((5, 3)), np.ones((5, 3, 2)), r"b: got shape \(5, 3, 2\), expected features \[n, D\]"),
    ],
)
def test_frechet_distance_names_what_is_wrong(a, b, message):
    with pytest.raises(ValueError, match=message):
        generator_metrics.frechet_distance(a, b)


# ---- Diversity, means -----------------------------------------------------------------------------------------------
def test_diversity_is_the_mean_cosine_distance_of_a_prompts_pairs():
    features = np.array([[1, 0], [0, 3], [2, 2], [1, 0], [-5, 0], [7, 7]], np.float32)
    texts = ["a", "a", "a", "b", "b", "c"]
    half = math.sqrt(0.5)
    assert generator_metrics.diversity(features, texts) == pytest.approx(((1 + 2 * (1 - half)) / 3 + 2) / 2)
    assert generator_metrics.diversity(features[:1].repeat(3, 0), "aaa") == pytest.approx(0)
    assert math.isnan(generator_metrics.diversity(features, "abcdef"))
    with pytest.raises(ValueError, match="features: row 2 is all zeros"):
        generator_metrics.diversity(features * [[1], [1], [0], [1], [1], [1]], texts)
    with pytest.raises(ValueError, match="features: got 6 rows for 5 prompts"):
        generator_metrics.diversity(features, texts[1:])


def test_a_means_error_is_the_usual_one_where_each_image_has_its_prompt():
    values = np.random.default_rng(0).normal(size=30)
    mean = generator_metrics.mean_of([*values, np.nan], range(31))
    assert (mean.value, mean.count) == (pytest.approx(values.mean()), 30)
    assert mean.error == pytest.approx(values.std(ddof=1) / np.sqrt(30))
    assert math.isnan(generator_metrics.mean_of(values, "a" * 30).error)
    assert math.isnan(generator_metrics.mean_of([np.nan], "a").value)


def test_a_means_error_is_right_for_images_that_share_prompts():
    """Of many evaluations with prompts drawn anew, the means spread as the errors say, and so do paired differences."""
    rng, texts = np.random.default_rng(0), np.repeat(np.arange(40), 4)
    found, differences = [], []
    for _ in range(400):
        of_prompt = rng.normal(size=40)[texts]  # both generators find the same prompts easy
        a, b = (generator_metrics.mean_of(of_prompt + 0.5 * rng.normal(size=160), texts) for _ in range(2))
        found.append((a.value, a.error))
        differences.append(((b - a).value, (b - a).error))
    for pairs in (found, differences):
        spread, errors = np.std([value for value, _ in pairs]), np.mean([error for _, error in pairs])
        assert errors == pytest.approx(spread, rel=0.12)
    assert np.mean(differences, axis=0)[1] < 0.4 * np.mean(found, axis=0)[1]


# ---- evaluate -------------------------------------------------------------------------------------------------------
def test_evaluate_tells_all_of_it(clip):
    texts = PROMPTS * 9  # more than a batch
    images = [picture(i, 40 + 4 * i) for i in range(len(texts))]
    images[3] = picture(3, 52, (20, 12))  # another size

    def judge(batch, part):
        assert len(batch) == len(part)
        counts = [{"two": 1, "three": 0}.get(text.split()[0], np.nan) for text in part]
        return {"all": brightness(batch, part) > 0.5, "count": counts}

    reference = evaluate.compute_features(colours, (picture(i, 200) for i in range(50)), 50)
    results = evaluate.evaluate(
        iter(images), texts, features=colours, reference=reference, reward=brightness, clip=clip, judge=judge, words=WORDS
    )
    kinds = ["count, colour", "colour", "thing", "count, background", "other"]
    means = [f"{name}/{kind}" for name in ("reward", "clip_score", "alignment/all") for kind in kinds]
    means += ["reward/all", "clip_score/all", "alignment/all", "alignment/count", "diversity"]
    assert set(results) == {"num_images", "fid", *(key + end for key in means for end in ("", "/se", "/n"))}
    assert all(isinstance(value, float) for value in results.values())
    rewards = brightness(images, texts)
    assert results["num_images"] == results["reward/all/n"] == 45
    assert results["fid"] == pytest.approx(textbook(colours(images), reference), rel=1e-4)
    assert results["reward/all"] == pytest.approx(rewards.mean(), rel=1e-5)
    assert results["reward/count, background"] == pytest.approx(rewards[3::5].mean(), rel=1e-5)
    assert results["reward/other"] == pytest.approx(rewards[4::5].mean(), rel=1e-5) and results["reward/other/n"] == 9
    assert results["diversity"] == pytest.approx(generator_metrics.diversity(colours(images), texts), rel=1e-4)
    cosines = np.sum(clip.images(images) * clip.texts(texts), axis=1)
    assert results["clip_score/all"] == pytest.approx(cosines.mean(), abs=1e-6)
    assert results["clip_score/thing"] == pytest.approx(cosines[2::5].mean(), abs=1e-6)
    assert results["alignment/all"] == pytest.approx(np.mean(rewards > 0.5))
    assert (results["alignment/count"], results["alignment/count/n"]) == (0.5, 18)


def test_evaluate_tells_what_it_is_given(clip):
    images = np.stack([picture(i) for i in range(4)])
    results = evaluate.evaluate(images, ["a cat"] * 4, clip=clip)
    means = ("clip_score/all", "diversity")
    assert set(results) == {"num_images"} | {key + end for key in means for end in ("", "/se", "/n")}
    assert results["diversity"] == pytest.approx(generator_metrics.diversity(clip.images(images), ["a cat"] * 4), abs=1e-6)
    assert evaluate.evaluate(images, ["a cat"] * 4) == {"num_images": 4.0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": [picture(0)] * 3}, "images: got 3 for 5 prompts"),
        ({"images": [picture(0)] * 6}, "images: got 6 or more for 5 prompts"),
        ({"images": [picture(0) / 255] * 5}, r"images: got float64\[16, 16, 3\], expected uint8"),
        ({"features": lambda images: np.ones(5)}, r"features: got shape \(5,\) of 5 images, expected finite \[5, D\]"),
        ({"features": lambda images: np.ones((4, 2))}, r"features: got shape \(4, 2\) of 5 images"),
        ({"features": lambda images: np.full((5, 2), np.nan)}, "features: got values that are not finite of 5 images"),
        ({"reward": lambda *_: np.zeros((5, 1))}, r"reward: got shape \(5, 1\), expected 5 finite numbers"),
        ({"judge": lambda *_: {"count": np.ones(5)}}, r"judge: got \['count'\], expected 'all' among them"),
        ({"judge": lambda *_: {"all": np.full(5, 0.5)}}, "judge: all: got .*, expected 5 of 0, 1 and nan"),
        ({"judge": lambda *_: {"all": np.ones(4)}}, r"judge: all: got .* of shape \(4,\), expected 5"),
        ({"reference": np.ones((9, 3))}, "reference: got one without features"),
        ({"reference": np.ones((9, 2)), "features": colours}, "features: got 3 and 2 columns"),
        ({"reference": np.ones((9, 4, 4, 3)), "features": colours}, r"reference: got shape .*, expected features \[n, D\]"),
    ],
)
def test_evaluate_names_what_is_wrong(change, message):
    with pytest.raises(ValueError, match=message):
        evaluate.evaluate(**({"images": [picture(i) for i in range(5)], "prompts": PROMPTS} | change))


# ---- The command ----------------------------------------------------------------------------------------------------
def write_set(folder, level, texts):
    """Pictures as rahf.diffusion.sample writes them."""
    folder.mkdir()
    for i in range(len(texts)):
        PIL.Image.fromarray(picture(i, level)).save(folder / f"{i}.png")
    rows = [{"image": f"{i}.png", "prompt": text, "seed": 0, "number": i} for i, text in enumerate(texts)]
    (folder / "images.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def command(*arguments, python_path=""):
    """(exit status, stdout, stderr)."""
    block = "import sys, runpy; sys.modules['tensorflow'] = None; "
    block += "runpy.run_module('rahf.diffusion.evaluate', run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", block, *map(str, arguments)],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(python_path)}, capture_output=True, text=True,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def test_the_command_compares_two_sets(tmp_path, clip_folder):
    evil = "<script>alert('x')</script>"
    texts = [text for text in [*PROMPTS, evil] for _ in range(2)]
    before, after = write_set(tmp_path / "before", 80, texts), write_set(tmp_path / "after", 160, [*texts, "only here"])
    (tmp_path / "own.py").write_text("def bright(images, prompts): return [image.mean() / 255 for image in images]\n")
    output, features = tmp_path / "out", f"--features=clip:{clip_folder}"
    arguments = [f"--images={before}", f"--images={after}", f"--output={output}", "--reward=python:own:bright", features]
    arguments += [f"--clip={clip_folder}", f"--reference={after}", "--config=configs/reward_clip.py"]
    status, out, err = command(*arguments, python_path=tmp_path)
    assert status == 0, err
    assert "before: 100%" in err and "after: 100%" in err and "features: 100%" in err

    results = json.loads((output / "results.json").read_text())
    assert list(results) == ["after", "before"]
    images = [picture(i, 80) for i in range(12)]
    clip = embed.Clip(clip_folder)
    expected = evaluate.evaluate(images, texts, reward=brightness, clip=clip, features=clip.images, words=WORDS)
    assert {key: value for key, value in results["before"].items() if key != "fid"} == {
        key: None if math.isnan(value) else pytest.approx(value, abs=1e-6) for key, value in expected.items()
    }
    assert results["before"]["fid"] > 1e-3 and results["after"]["fid"] == pytest.approx(0, abs=1e-6)
    difference = results["after"]["reward/all"] - results["before"]["reward/all"]
    assert results["after"]["reward/all/difference"] == pytest.approx(difference) and difference > 0.25
    (line,) = [line.split() for line in out.splitlines() if line.startswith("reward/all")]
    assert line[1:5] == ["12", "/", "13", f"{results['before']['reward/all']:.3f}"]
    assert f"{difference:+.3f}" in line

    page = Page(output / "report.html")
    assert page.texts("h2") == [*PROMPTS, evil]
    assert len(page.texts("img")) == 6 * 4 and not page.texts("script")
    assert all(attributes["src"].startswith("data:image/png") for tag, attributes, _ in page.elements if tag == "img")
    told = [text for text in page.texts("span") if text.startswith("reward")]
    assert told[:4] == [f"reward {picture(i, level).mean() / 255:.2f}" for level in (80, 160) for i in range(2)]
    assert {"fid", "reward/count, colour", "after - before"} <= {*page.texts("td"), *page.texts("th")}
    assert sorted(path.name for path in output.iterdir()) == ["report.html", "results.json"]


def test_the_command_prints_its_error(tmp_path):
    before = write_set(tmp_path / "before", 80, PROMPTS)
    (before / "1.png").unlink()
    status, _, err = command(f"--images={before}", f"--output={tmp_path / 'out'}", "--reward=python:math:pi")
    assert status == 2 and "Traceback" not in err and not (tmp_path / "out").exists()
    assert err.startswith(f"error: pictures: {before / 'images.jsonl'}:\n  row 2: image: no file")


OPTIONS = ("reference", "features", "reward", "clip", "config", "side_by_side", "margins", "responses")


class Args:
    """The command's flags."""

    def __init__(self, **values):
        vars(self).update(dict.fromkeys(OPTIONS) | {"name": []} | values)


def test_run_names_what_is_wrong(tmp_path):
    sets = {name: write_set(tmp_path / name, 80, texts) for name, texts in (("a", PROMPTS), ("b", ["a house"]))}
    (tmp_path / "c").mkdir()
    again = write_set(tmp_path / "c" / "a", 90, PROMPTS)
    (sets["b"] / "0.png").write_bytes(b"no picture")
    for values, message in (
        (
            {"images": [sets["a"], sets["b"]], "reward": "python:math:pow"},
            "images: the sets have no prompt in common, they begin with 'two",
        ),
        ({"images": [sets["a"], again]}, r"name: got \['a', 'a'\] for 2 sets of images, expected a different --name"),
        ({"images": [sets["a"]], "name": ["x", "y"]}, r"name: got \['x', 'y'\] for 1 sets"),
        ({"images": [sets["a"]]}, "got no reward, CLIP or features, expected one or more: --reward"),
        (
            {"images": [sets["a"]], "reference": sets["a"], "reward": "python:math:pow"},
            "reference: got a table without --features",
        ),
        ({"images": [sets["a"]], "reward": "x:y"}, "reward: got 'x:y', expected reward:... or rahf:..."),
        ({"images": [sets["a"]], "reward": "x:y", "config": {}}, "config: has no section prompts"),
        ({"images": [tmp_path / "none"], "reward": "x:y"}, "pictures: no file .*none"),
        ({"images": [sets["b"]], "features": "python:builtins:len"}, "images.jsonl: row 1: image: does not decode"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate.run(Args(output=tmp_path / "out", **values))
    assert not list((tmp_path / "out").iterdir())


def test_compare_shows_a_judges_verdicts(tmp_path):
    texts = ["a cat"] * 3 + ["a dog"]
    tables = {name: ImageTable(write_set(tmp_path / name, level, texts)) for name, level in (("a", 60), ("b", 190))}

    def judge(images, part):
        right = brightness(images, part) > 0.5
        return {"all": np.where([text == "a cat" for text in part], right, np.nan), "thing": right}

    before, after = evaluate.compare(tables, tmp_path / "out", judge=judge, words=WORDS)
    assert (before.results["alignment/all"], before.results["alignment/all/n"]) == (0, 3)
    assert (after.results["alignment/thing"], after.results["alignment/thing/n"]) == (1, 4)
    assert after.results["alignment/thing/difference"] == 1 and after.results["alignment/all/thing"] == 1
    told = [text for text in Page(tmp_path / "out" / "report.html").texts("span") if text]
    assert told == ["wrong"] * 3 + ["right"] * 3


def test_the_report_shows_prompts_spread_over_all_of_them():
    texts = [f"{i}" for i in range(100) for _ in range(6)]
    chosen, (first, second) = comparison_page.shown_rows([texts, ["99", "50", *texts[:10], "other"]])
    assert chosen == ["0", "1", "50", "99"] and second == [2, 3, 4, 5, 8, 9, 10, 11, 1, 0]
    assert first == [0, 1, 2, 3, 6, 7, 8, 9, 300, 301, 302, 303, 594, 595, 596, 597]
    chosen, (rows,) = comparison_page.shown_rows([texts])
    assert len(chosen) == comparison_page.SHOWN and len(rows) == 4 * comparison_page.SHOWN and chosen[:3] == ["0", "2", "5"]
