"""agreement.py: alpha against the package krippendorff, the other figures against cases worked out by hand."""

import json
import pathlib
import subprocess
import sys
import warnings

import krippendorff
import numpy as np
import pytest
from html_page import Page
from tiny_data import annotation, prompt_of

from richhf_data import agreement, consolidate, keywords, metrics
from richhf_data.consolidate import AnnotatedImage, Annotation
from richhf_data.errors import UserError
from richhf_data.schema import HEATMAPS, SCORES

ROOT = pathlib.Path(__file__).parents[1]
EVIL = "<script>alert('x')</script>|`*"
NAN = np.nan
WIKIPEDIA = [  # https://en.wikipedia.org/wiki/Krippendorff%27s_alpha
    [NAN, NAN, NAN, NAN, NAN, 3, 4, 1, 2, 1, 1, 3, 3, NAN, 3],
    [1, NAN, 2, 1, 3, 3, 4, 3, NAN, NAN, NAN, NAN, NAN, NAN, NAN],
    [NAN, NAN, 2, 1, 3, 4, 4, NAN, 2, 1, 1, 3, 3, NAN, 4],
]


@pytest.fixture(autouse=True)
def no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def _image(prompt="a yellow cat", **annotations):
    return AnnotatedImage(prompt, "", annotations)


def _answer(points=(None, None), labels=None, scores=None):
    scores = (scores,) * 4 if scores is None or isinstance(scores, int | float) else scores
    return Annotation(points, labels, scores)


def _scored(*rows):
    """A picture of each row: the scores of ada, bo and cy, the same for all four; None = not asked."""
    return [
        _image(**{name: _answer(scores=score) for name, score in zip(("ada", "bo", "cy"), row, strict=True)}) for row in rows
    ]


def _random_pictures(number, seed=0, absent=0.1):
    """Pictures with two to four of five annotators, who agree more than by chance and leave some questions out."""
    rng = np.random.default_rng(seed)
    pictures = []
    for index in range(number):
        prompt, truth = prompt_of(f"u{index}"), rng.integers(1, 6, 4)
        wrong = rng.random(len(keywords.tokenize(prompt))) < 0.4
        spots = [rng.random((rng.integers(0, 3), 2)) for _ in HEATMAPS]
        given = {}
        for name in rng.permutation(["ada", "bo", "cy", "di", "ed"])[: rng.integers(2, 5)]:
            marks = [tuple(map(tuple, np.clip(one + rng.normal(0, 0.02, one.shape), 0, 1).tolist())) for one in spots]
            marks = [one if rng.random() < 0.8 else () for one in marks]
            labels = tuple(int(label) for label in ~(wrong ^ (rng.random(len(wrong)) < 0.1)))
            scores = np.clip(truth + rng.integers(-1, 2, 4), 1, 5).tolist()
            given[str(name)] = Annotation(
                points=tuple(None if rng.random() < absent else one for one in marks),
                labels=None if rng.random() < absent else labels,
                scores=tuple(None if rng.random() < absent else score for score in scores),
            )
        pictures.append(AnnotatedImage(prompt, "", given))
    return pictures


# ------------------------------------------------------------------------------------------------------------ alpha


@pytest.mark.parametrize("metric", agreement.METRICS)
@pytest.mark.parametrize("values", [2, 5, 200])
def test_alpha_equals_the_package(metric, values):
    rng = np.random.default_rng(values)
    for raters, units in ((2, 9), (3, 200), (7, 40)):
        truth = rng.integers(values, size=units)
        given = np.where(rng.random((raters, units)) < 0.6, truth, rng.integers(values, size=(raters, units))) / 4 - 1
        given[rng.random(given.shape) < 0.3] = NAN
        expected = krippendorff.alpha(reliability_data=given, level_of_measurement=metric)
        assert agreement.alpha(given, metric) == pytest.approx(expected, abs=1e-9)


def test_alpha_of_the_known_example():
    found = [agreement.alpha(WIKIPEDIA, metric) for metric in ("nominal", "interval")]
    assert found == pytest.approx([0.691358, 0.810845], abs=1e-6)


@pytest.mark.parametrize("metric", agreement.METRICS)
@pytest.mark.parametrize(
    "values",
    [
        [[3, 3], [3, 3]],
        [[1.1, 1.1, 1.1]] * 3,
        [[1, NAN], [NAN, 2]],
        [[1, 2, 3]],
        [[NAN, NAN]] * 2,
        np.zeros((2, 0)),
        np.zeros((0, 2)),
        [[3, 3, 1], [3, 3, NAN]],  # 1 has no partner
    ],
)
def test_alpha_is_nan_without_two_values_to_compare(values, metric):
    assert np.isnan(agreement.alpha(values, metric))


def test_alpha_of_full_agreement_and_of_contradiction():
    for metric in agreement.METRICS:
        assert agreement.alpha([[1, 2, 5], [1, 2, 5]], metric) == 1
    # Nominal: 4 values, 1 pair a unit, all different: observed 4, expected 2 * 2 * 2 = 8; 1 - 3 * 4 / 8.
    assert agreement.alpha([[1, 2], [2, 1]], "nominal") == pytest.approx(-0.5)


@pytest.mark.parametrize(
    ("values", "metric", "message"),
    [
        ([[1, 2], [1, 2]], "ratio", "metric: got 'ratio', expected one of nominal, ordinal, interval"),
        ([1, 2], "nominal", r"values: got shape \(2,\), expected numbers \[raters, units\]"),
        ([[1, np.inf], [1, 2]], "interval", "values: got an infinite value"),
    ],
)
def test_alpha_refuses_what_it_cannot_compare(values, metric, message):
    with pytest.raises(UserError, match=message):
        agreement.alpha(values, metric)


@pytest.mark.parametrize("metric", agreement.METRICS)
def test_weights_repeat_units(metric):
    rng = np.random.default_rng(0)
    values = rng.integers(1, 6, (3, 30)).astype(float)
    values[rng.random(values.shape) < 0.2] = NAN
    groups = np.arange(30) // 3
    weights = rng.integers(0, 4, (5, 10))
    found = agreement.alphas(agreement.coincidences(values, groups, 10), metric, weights.astype(float))
    repeated = [agreement.alpha(np.repeat(values, row[groups], axis=1), metric) for row in weights]
    np.testing.assert_allclose(found, repeated)


def test_intervals_are_percentiles_of_resampled_pictures():
    rng = np.random.default_rng(1)
    values = np.clip(rng.integers(1, 6, 60) + rng.integers(-1, 2, (3, 60)), 1, 5).astype(float)
    one = agreement.coincidences(values)
    (low, high), (again, _) = agreement.intervals([(one, "ordinal"), (one, "ordinal")], 400, seed=3)
    drawn = np.random.default_rng(3).integers(60, size=(400, 60))
    expected = np.percentile([agreement.alpha(values[:, rows], "ordinal") for rows in drawn], (2.5, 97.5))
    assert (low, high) == pytest.approx(expected) and low == again
    assert low < agreement.alpha(values, "ordinal") < high
    assert agreement.intervals([(one, "ordinal")], 400, seed=4) != [(low, high)]


def test_intervals_do_not_depend_on_how_many_resamples_are_held(monkeypatch):
    one = agreement.coincidences(WIKIPEDIA)
    whole = agreement.intervals([(one, "ordinal")], 50)
    monkeypatch.setattr(agreement, "_WEIGHTS", 100)
    assert agreement.intervals([(one, "ordinal")], 50) == whole


def test_there_is_no_interval_of_one_picture():
    words = agreement.coincidences([[0, 1, 1], [0, 1, 0]], np.zeros(3, int), 2)
    assert np.isnan(agreement.intervals([(words, "nominal")], 20)).all()


# ---------------------------------------------------------------------------------------------------- scores and words


def test_means_of_others():
    found = agreement.means_of_others(np.array([[1, 4, NAN], [2, NAN, 3], [5, 2, NAN]]))
    np.testing.assert_array_equal(found, [[3.5, 2, NAN], [3, NAN, NAN], [1.5, 4, NAN]])


def test_shares_are_of_the_pictures_that_two_scored():
    pictures = _scored((3, 3, 3), (3, 3, 4), (3, 4, 5), (2, 2, None), (1, None, None), (None, None, None))
    figures = agreement.measure(pictures, 10)
    for name in (*SCORES, "all"):
        assert (figures[f"equal/{name}"], figures[f"within_one/{name}"]) == (2 / 4, 3 / 4)
    assert figures["compared/overall"] == 4 and figures["pictures"] == 6 and figures["annotations"] == 18
    # Pairs: 3 of 0; 0, 1, 1; 1, 1, 2; 0.
    assert [figures[f"difference/overall/{points}"] for points in range(5)] == [5 / 10, 4 / 10, 1 / 10, 0, 0]


def test_scores_within_one_point_need_not_be_whole():
    figures = agreement.measure(_scored((2.1, 3.1, 2.1)), 1)  # 3.1 - 2.1 is above 1 in floats
    assert figures["within_one/overall"] == 1 and figures["equal/overall"] == 0


def test_ceiling_is_the_root_of_the_means_reliability():
    judges = [[9, 6, 8, 7, 10, 6], [2, 1, 4, 1, 5, 2], [5, 3, 6, 2, 6, 4], [8, 2, 8, 6, 9, 7]]
    # Shrout and Fleiss (1979), tables 2 and 4: ICC(1, 4) = (11.24 - 6.26) / 11.24 = 0.44.
    assert agreement.ceiling(np.array(judges, float)) ** 2 == pytest.approx(0.4428, abs=5e-4)
    assert agreement.ceiling(np.array([[1.0, 2, 4], [1, 2, 4]])) == 1
    assert agreement.ceiling(np.array([[1.0, 5, 1, 4], [5, 1, 4, 1]])) == 0
    for values in ([[1.0], [2.0]], [[3.0, 3], [3, 3]], [[1, 2, 4], [NAN] * 3]):
        assert np.isnan(agreement.ceiling(np.array(values, float)))


def test_ceiling_is_what_the_truth_reaches():
    rng = np.random.default_rng(0)
    truth = rng.normal(3, 1, 20_000)
    values = truth + rng.normal(0, 0.8, (4, 20_000))
    values[2:][rng.random((2, 20_000)) < 0.5] = NAN
    reached = np.corrcoef(np.nanmean(values, axis=0), truth)[0, 1]
    assert agreement.ceiling(values) == pytest.approx(reached, abs=0.005)


def test_words_are_compared_with_the_majority_of_the_others():
    picture = _image(
        ada=_answer(labels=(0, 0, 1)), bo=_answer(labels=(1, 0, 1)), cy=_answer(labels=(0, 0, 0)), di=_answer(scores=3)
    )
    # Of two others both must mark a word: ada {0, 1} and {1}; bo {1} and {0, 1}; cy {0, 1, 2} and {1}.
    found = agreement.compare_words([picture, _image(ada=_answer(labels=(0, 0, 0)), bo=_answer(scores=1))])
    assert found["both"][:3, 0].tolist() == [1, 1, 1]
    assert found["marked"][:3, 0].tolist() == [2, 1, 3]
    assert found["true"][:3, 0].tolist() == [1, 2, 1]
    assert np.isnan(found["both"][3]).all() and np.isnan(found["both"][:, 1]).all()
    figures = agreement.measure([picture], 1)
    expected = {"precision": 3 / 6, "recall": 3 / 4, "f1": 6 / 10}
    assert {key: figures[f"one_vs_others/keywords/micro/{key}"] for key in expected} == pytest.approx(expected)
    assert figures["one_vs_others/keywords/per_prompt/f1"] == pytest.approx((2 / 3 + 2 / 3 + 2 / 4) / 3)
    assert [figures[f"annotator/{name}/words_f1"] for name in ("ada", "bo", "cy")] == pytest.approx([2 / 3, 2 / 3, 2 / 4])
    assert np.isnan(figures["annotator/di/words_f1"]) and figures["compared/words"] == 1


def test_alpha_of_words_has_a_unit_for_each_word():
    pictures = [
        _image("a cat", ada=_answer(labels=(0, 1)), bo=_answer(labels=(0, 0))),
        _image("!", ada=_answer(labels=()), bo=_answer(labels=())),
        _image("two red dogs", ada=_answer(labels=(1, 1, 1)), bo=_answer(scores=1), cy=_answer(labels=(1, 0, 1))),
        _image("a dog", ada=_answer(labels=(1, 0)), bo=_answer(scores=1)),
    ]
    values = [[0, 1, 1, 1, 1], [0, 0, 1, 0, 1]]
    figures = agreement.measure(pictures, 50)
    assert figures["alpha/words"] == pytest.approx(krippendorff.alpha(values, level_of_measurement="nominal"))
    assert np.isnan(figures["alpha/overall"])


# --------------------------------------------------------------------------------------------------------------- maps


def test_points_are_near_within_a_twentieth_of_the_height():
    picture = _image(
        ada=_answer(points=(((0.5, 0.5), (0.9, 0.9), (0.1, 0.1)), ())),
        bo=_answer(points=(((0.53, 0.54), (0.16, 0.1)), ())),  # 0.05 and 0.06 away
        cy=_answer(points=((), None)),
        di=_answer(scores=1),
    )
    found = agreement.compare_maps([picture], 0)
    assert found["points"][:3, 0].tolist() == [3, 2, 0] and found["hits"][:3, 0].tolist() == [1, 1, 0]
    assert all(np.isnan(values[3]).all() for values in found.values())
    figures = agreement.measure([picture], 1)
    assert figures["points/implausibility"] == 5 / 3 and figures["point_hits/implausibility"] == 2 / 5
    assert figures["annotator/ada/points/implausibility"] == 3
    assert figures["annotator/ada/point_hits/implausibility"] == 1 / 3
    assert figures["annotator/bo/point_hits/implausibility"] == 1 / 2
    assert figures["annotator/cy/points/implausibility"] == 0 and np.isnan(figures["annotator/cy/points/misalignment"])
    assert figures["points/misalignment"] == 0 and np.isnan(figures["point_hits/misalignment"])


def test_an_annotators_own_points_confirm_nothing():
    twice = _image(ada=_answer(points=(((0.5, 0.5), (0.5, 0.5)), None)), bo=_answer(points=((), None)))
    assert agreement.compare_maps([twice], 0)["hits"][:, 0].tolist() == [0, 0]


def test_marked_or_not_counts_pictures():
    some, none, unasked = _answer(points=(((0.5, 0.5),), ())), _answer(points=((), ())), _answer(scores=1)
    pictures = [
        _image(ada=some, bo=some),
        _image(ada=some, bo=none),
        _image(ada=none, bo=none, cy=unasked),
        _image(ada=some, bo=unasked),
    ]
    figures = agreement.measure(pictures, 1)
    assert figures["marked_or_not/implausibility"] == 2 / 3 and figures["compared/implausibility"] == 3
    assert figures["marked_or_not/misalignment"] == 1


def test_a_map_predicts_the_mean_of_the_others():
    marks = {"ada": ((0.3, 0.3),), "bo": ((0.33, 0.3),), "cy": ((0.3, 0.3), (0.7, 0.7))}
    picture = _image(**{name: _answer(points=(points, ())) for name, points in marks.items()})
    found = agreement.compare_maps([picture], 0)
    ada, bo, cy = (consolidate.disks(points, agreement.MAP_SIZE).astype(float)[None] for points in marks.values())
    for place, (one, others) in enumerate(((ada, (bo + cy) / 2), (bo, (ada + cy) / 2), (cy, (ada + bo) / 2))):
        assert found["cc"][place, 0] == pytest.approx(np.corrcoef(one.ravel(), others.ravel())[0, 1])
        z = (one - one.mean()) / one.std(ddof=1)
        assert found["nss"][place, 0] == pytest.approx(z[others > 0].mean())
        assert found["mse"][place, 0] == pytest.approx(((one - others) ** 2).mean())
    empty = agreement.compare_maps([picture], 1)
    assert (empty["mse"] == 0).all() and (empty["mse_empty"] == 0).all() and np.isnan(empty["cc"]).all()


def test_a_map_against_an_empty_one():
    picture = _image(ada=_answer(points=(((0.5, 0.5),), ())), bo=_answer(points=((), ())))
    found = agreement.compare_maps([picture], 0)
    area = consolidate.disks([(0.5, 0.5)], agreement.MAP_SIZE).mean()
    assert found["mse_empty"][0, 0] == pytest.approx(area) and np.isnan(found["mse_empty"][1, 0])
    assert np.isnan(found["cc"][0, 0]) and found["cc"][1, 0] == found["nss"][1, 0] == 0  # a constant prediction


def test_one_against_the_others_equals_the_evaluation_of_a_model(monkeypatch):
    monkeypatch.setattr(agreement, "_BATCH", 7)
    pictures = _random_pictures(40)
    targets, predictions = [], []
    for picture in pictures:
        for name, one in picture.annotations.items():
            others = [other for key, other in picture.annotations.items() if key != name]
            target = consolidate.consolidate(others, picture.prompt, agreement.MAP_SIZE) | {"prompt": picture.prompt}
            alone = consolidate.consolidate([one], picture.prompt, agreement.MAP_SIZE)
            target["score_mask"] &= alone["score_mask"]
            target["heatmap_mask"] &= alone["heatmap_mask"]
            tokens = keywords.tokenize(picture.prompt)
            if one.labels is None:
                target["labels"] = None
            targets.append(target)
            copied = keywords.label_prompt(tokens, alone["labels"] if one.labels else [1] * len(tokens))
            predictions.append(alone | {"heatmaps": alone["heatmaps"] / np.float32(255), "labelled_prompt": copied})
    figures, expected = agreement.measure(pictures, 1), metrics.evaluate(targets, predictions)
    del expected["num_examples"]
    found = {key.removeprefix("one_vs_others/"): value for key, value in figures.items() if key.startswith("one_vs")}
    assert found.keys() == expected.keys() and np.isfinite(list(found.values())).all()
    for key, value in expected.items():  # targets are uint8, so that a half is 128 / 255
        assert found[key] == pytest.approx(value, abs=0.01 if "heatmap" in key else 1e-6), key


# --------------------------------------------------------------------------------------------------------- annotators


def test_an_annotator_is_compared_with_the_mean_of_the_others():
    figures = agreement.measure(_scored((5, 3, 4), (4, 2, 2), (2, 1, None), (3, None, None)), 1)
    # ada: 5 and 3.5, 4 and 2, 2 and 1; bo: 3 and 4.5, 2 and 3, 1 and 2.
    for name in SCORES:
        assert figures[f"annotator/ada/offset/{name}"] == figures["annotator/ada/offset"] == 1.5
        assert figures[f"annotator/bo/offset/{name}"] == pytest.approx(-3.5 / 3)
        assert figures[f"annotator/ada/plcc/{name}"] == pytest.approx(np.corrcoef([5, 4, 2], [3.5, 2, 1])[0, 1])
    assert figures["annotator/cy/offset"] == pytest.approx((0 - 1) / 2)
    assert figures["annotator/cy/absolute_difference"] == pytest.approx((0 + 1) / 2)
    assert figures["annotator/ada/pictures"] == 4
    pairs = [(5, 3.5), (3, 4.5), (4, 4), (4, 2), (2, 3), (2, 3), (2, 1), (1, 2)]
    assert figures["one_vs_others/score/plcc/overall"] == pytest.approx(np.corrcoef(np.transpose(pairs))[0, 1])


def test_a_constant_annotator_has_no_correlation():
    figures = agreement.measure(_scored((3, 1, 2), (3, 5, 4), (3, 2, 2)), 1)
    assert figures["annotator/ada/plcc/overall"] == 0 and figures["annotator/bo/plcc/overall"] > 0.9


def test_figures_do_not_depend_on_the_order():
    pictures = _random_pictures(30)
    turned = [AnnotatedImage(one.prompt, "", dict(reversed(one.annotations.items()))) for one in pictures]
    first, again, other = (agreement.measure(given, 30) for given in (pictures, pictures, turned))
    assert json.dumps(first) == json.dumps(again)
    assert json.dumps(agreement.measure(pictures, 30, seed=1)) != json.dumps(first)
    assert other == pytest.approx(first, nan_ok=True, abs=0.01)  # AUC's noise


def test_pictures_of_one_annotator_do_not_count():
    pictures = {"a": _image(ada=_answer(scores=3)), "b": _image(ada=_answer(scores=2), bo=_answer(scores=3))}
    assert agreement.shared(pictures) == [pictures["b"]]
    with pytest.raises(
        ValueError, match=r"got 1 pictures with one annotator each \(ada\), expected one with two or more; giv"
    ):
        agreement.shared({"a": pictures["a"]})


# ------------------------------------------------------------------------------------------------------------- report


def test_what_nobody_can_compare_is_a_dash(tmp_path):
    pictures = [_image(ada=_answer(scores=(3, None, None, None)), bo=_answer(points=((), None)))] * 2
    figures = agreement.measure(pictures, 5) | {"pictures_read": 2.0}
    text = agreement.write(tmp_path, figures, ["ada", "bo"])
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    assert ["plausibility", "0", "-", "-", "-"] in rows and ["implausibility", "0", "-", "-", "-"] in rows
    assert ["1", "ada", "2", "-", "-", "-", "- / -", "- / -", "-"] in rows
    written = json.loads((tmp_path / "agreement.json").read_text())
    assert written["alpha/plausibility"] is None and written["pictures"] == 2
    assert "nan" not in text


def test_ceiling_of_a_score_is_in_the_table():
    figures = agreement.measure(_random_pictures(30), 5)
    tables = {table.title: table.lines for table in agreement.tables(figures, [])}
    ceiling = tables["One annotator and the others: scores"][2]
    assert ceiling[:2] == ["estimated ceiling", f"{figures['ceiling/score/plcc/plausibility']:.3f} / -"]
    value, low, high = (figures[f"alpha/words{key}"] for key in ("", "/low", "/high"))
    words = next(line for line in tables["Scores and words"] if line[0] == "words")
    assert words[2] == f"{value:.3f} ({low:.3f} to {high:.3f})" and low < value < high


def test_a_command_that_fails_writes_nothing(tmp_path):
    (tmp_path / "lines.jsonl").write_text(json.dumps(annotation("u", "ada")))
    with pytest.raises(UserError, match="got 1 pictures with one annotator each"):
        agreement.agreement(str(tmp_path / "lines.jsonl"), tmp_path / "out")
    with pytest.raises(UserError, match="annotations: no file matches"):
        agreement.agreement(str(tmp_path / "*.json"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_command_line(tmp_path):
    lines = [annotation(f"u{i}", name) for i in range(6) for name in ("ada", EVIL, "b\n$o")] + [annotation("alone", "ada")]
    for number, rows in enumerate((lines[:9], lines[9:])):
        (tmp_path / f"{number}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in rows))
    command = [sys.executable, "-m", "richhf_data.agreement", f"--output={tmp_path / 'out'}", "--resamples=20"]
    done = subprocess.run([*command, f"--annotations={tmp_path}/*.jsonl"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    out = {path.name: path for path in (tmp_path / "out").iterdir()}
    assert sorted(out) == sorted(agreement.FILES)
    text = out["agreement.md"].read_text()
    assert done.stdout.startswith(text) and "6 of 7 pictures have two annotators or more; 18 annotations by 3" in text
    assert r"| \<script>alert('x')\</script>\|\`\* " in text and r"b\\n$o" in text
    figures = json.loads(out["agreement.json"].read_text())
    assert figures["pictures"] == 6 and figures["pictures_read"] == 7 and figures[f"annotator/{EVIL}/pictures"] == 6
    assert all(value is None or np.isfinite(value) for value in figures.values())

    page = Page(out["agreement.html"])
    tags = {tag for tag, _, _ in page.elements}
    assert "script" not in tags and EVIL in page.texts("td")
    (policy,) = [one["content"] for _, one, _ in page.elements if one.get("http-equiv") == "Content-Security-Policy"]
    assert "default-src 'none'" in policy
    images = [one["src"] for tag, one, _ in page.elements if tag == "img"]
    assert len(images) == 4 and all(image.startswith("data:image/png;base64,") for image in images)
