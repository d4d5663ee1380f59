"""Each metric against a second, obvious implementation, and the conventions for what the papers leave open."""

import subprocess
import sys

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics

from richhf_data import metrics
from richhf_data.schema import HEATMAPS, SCORES

KEYS = {
    *(f"score/{key}/{name}" for key in ("plcc", "srcc") for name in SCORES),
    *(f"heatmap/{key}/{name}" for key in ("mse", "mse_empty", "cc", "kld", "sim", "nss", "auc_judd") for name in HEATMAPS),
    *(f"keywords/{kind}/{key}" for kind in ("micro", "per_prompt") for key in ("precision", "recall", "f1")),
    "num_examples",
}
EVERY_METRIC = (metrics.mse, metrics.cc, metrics.kld, metrics.sim, metrics.nss, metrics.auc_judd)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def random_maps(rng, n=5, height=12, width=9):
    """Predictions and blobs of thirds, as three annotators leave them."""
    prediction = rng.random((n, height, width)).astype(np.float32)
    truth = rng.integers(0, 4, (n, height, width)) * (rng.random((n, height, width)) < 0.3) / 3
    return prediction, truth


def naive_auc_judd(prediction, truth, noise):
    """The definition, one threshold after the other."""
    prediction, fixated = (prediction + noise).ravel(), truth.ravel() > 0
    points = [(0.0, 0.0)]
    for threshold in sorted(prediction[fixated], reverse=True):
        above = prediction >= threshold
        points.append(((above & ~fixated).sum() / (~fixated).sum(), (above & fixated).sum() / fixated.sum()))
    x, y = np.array([*points, (1.0, 1.0)]).T
    return np.trapezoid(y, x)


def example(rng, prompt="a yellow cat", labels=(1, 0, 1), size=(12, 9)):
    heatmaps = (rng.integers(0, 4, (*size, 2)) * (rng.random((*size, 2)) < 0.3) * 85).astype(np.uint8)
    target = {
        "scores": rng.random(4).astype(np.float32),
        "score_mask": np.ones(4, bool),
        "heatmaps": heatmaps,
        "heatmap_mask": np.ones(2, bool),
        "prompt": prompt,
        "labels": None if labels is None else list(labels),
    }
    prediction = {
        "scores": rng.random(4).astype(np.float32),
        "heatmaps": rng.random((*size, 2)).astype(np.float32),
        "labelled_prompt": prompt,
    }
    return target, prediction


def examples(rng, n, **options):
    return (list(side) for side in zip(*(example(rng, **options) for _ in range(n)), strict=True))


# ---------------------------------------------------------------------------------------------------- heatmaps


def test_heatmap_metrics_equal_their_definitions_pixel_by_pixel(rng):
    prediction, truth = random_maps(rng)
    got = {metric.__name__: metric(prediction, truth) for metric in EVERY_METRIC}
    for i in range(len(prediction)):
        p, g = prediction[i].ravel().astype(np.float64), truth[i].ravel()
        np.testing.assert_allclose(got["mse"][i], sum((a - b) ** 2 for a, b in zip(p, g, strict=True)) / p.size)
        np.testing.assert_allclose(got["cc"][i], scipy.stats.pearsonr(p, g).statistic, rtol=1e-6)
        pn, gn = p / p.sum(), g / g.sum()
        expected = sum(b * np.log(b / (a + 1e-8) + 1e-8) for a, b in zip(pn, gn, strict=True))
        np.testing.assert_allclose(got["kld"][i], expected, rtol=1e-6)
        np.testing.assert_allclose(got["sim"][i], sum(min(a, b) for a, b in zip(pn, gn, strict=True)), rtol=1e-6)
        z = (p - np.mean(p)) / np.std(p, ddof=1)
        np.testing.assert_allclose(got["nss"][i], np.mean([a for a, b in zip(z, g, strict=True) if b > 0]), rtol=1e-6)
        noise = np.random.default_rng((0, i)).random(p.size).reshape(truth[i].shape) * 1e-7
        np.testing.assert_allclose(got["auc_judd"][i], naive_auc_judd(prediction[i].astype(float), truth[i], noise))


def test_auc_judd_is_the_area_under_the_roc_curve_but_for_its_straight_lines(rng):
    # Straight lines between the fixations' thresholds cut each of the true curve's steps: half a step of 1 / F in all.
    prediction, truth = random_maps(rng, height=40, width=40)
    for i, value in enumerate(metrics.auc_judd(prediction, truth)):
        fixated, p = truth[i].ravel() > 0, prediction[i].ravel()
        area = sklearn.metrics.roc_auc_score(fixated, p)
        last = np.mean(p[~fixated] >= p[fixated].min())
        np.testing.assert_allclose(value, area + last / (2 * fixated.sum()), atol=1e-6)


def test_auc_judd_of_many_ties_is_that_of_the_noisy_map(rng):
    prediction, truth = random_maps(rng, height=30, width=30)
    prediction = np.round(prediction * 3) / 3
    values = metrics.auc_judd(prediction, truth)
    for i, value in enumerate(values):
        noise = np.random.default_rng((0, i)).random(900).reshape(30, 30) * 1e-7
        np.testing.assert_allclose(value, naive_auc_judd(prediction[i].astype(float), truth[i], noise))
    np.testing.assert_array_equal(values, metrics.auc_judd(prediction, truth))
    np.testing.assert_array_equal(values[3:], metrics.auc_judd(prediction[3:], truth[3:], indices=[3, 4]))
    assert (values[3:] != metrics.auc_judd(prediction[3:], truth[3:])).all()


def test_perfect_and_inverted_predictions_have_the_extreme_values(rng):
    _, truth = random_maps(rng, height=50, width=50)
    np.testing.assert_allclose(metrics.mse(truth, truth), 0)
    np.testing.assert_allclose(metrics.cc(truth, truth), 1, rtol=1e-6)
    np.testing.assert_allclose(metrics.cc(1 - truth, truth), -1, rtol=1e-6)
    np.testing.assert_allclose(metrics.sim(truth, truth), 1, rtol=1e-6)
    np.testing.assert_allclose(metrics.kld(truth, truth), 0, atol=1e-4)
    np.testing.assert_allclose(metrics.auc_judd(truth, truth), 1)
    assert (metrics.auc_judd(1 - truth, truth) < 0.01).all()


def test_hand_computed_four_pixels():
    prediction = np.array([[[0.8, 0.2], [0.4, 0.6]]])
    truth = np.array([[[1.0, 0.0], [1.0, 0.0]]])
    np.testing.assert_allclose(metrics.mse(prediction, truth), (0.04 + 0.04 + 0.36 + 0.36) / 4)
    np.testing.assert_allclose(metrics.sim(prediction, truth), 0.4 + 0.2)
    np.testing.assert_allclose(metrics.kld(prediction, truth), 0.5 * np.log(0.5 / 0.4) + 0.5 * np.log(0.5 / 0.2))
    np.testing.assert_allclose(metrics.nss(prediction, truth), 0.1 / np.sqrt(0.2 / 3))
    # Points (0, 0), (0, 1/2), (1/2, 1), (1, 1).
    np.testing.assert_allclose(metrics.auc_judd(prediction, truth), 0.375 + 0.5)


@pytest.mark.parametrize("level", [0.0, 0.1, 0.3, 1.0])
def test_constant_prediction_is_chance(rng, level):
    _, truth = random_maps(rng, height=60, width=60)
    prediction = np.full(truth.shape, level, np.float32)
    prediction[:, :3] *= np.float32(1 - 1e-7)  # the rounding of a resized constant map
    np.testing.assert_array_equal(metrics.cc(prediction, truth), 0)
    np.testing.assert_array_equal(metrics.nss(prediction, truth), 0)
    np.testing.assert_allclose(metrics.auc_judd(np.full(truth.shape, level), truth), 0.5, atol=0.05)
    assert np.isfinite(metrics.kld(prediction, truth)).all()
    if level == 0:
        np.testing.assert_array_equal(metrics.sim(prediction, truth), 0)
        assert (metrics.kld(prediction, truth) > 8).all()


def test_one_fixated_pixel():
    prediction = np.arange(16.0).reshape(1, 4, 4) / 15
    truth = np.zeros((1, 4, 4))
    truth[0, 3, 1] = 1 / 3  # the 14th of 16 values: 2 of 15 negatives are above
    np.testing.assert_allclose(metrics.auc_judd(prediction, truth), 1 - 0.5 * 2 / 15)
    np.testing.assert_allclose(metrics.nss(prediction, truth), (13 - 7.5) / np.std(np.arange(16), ddof=1), rtol=1e-6)
    np.testing.assert_allclose(metrics.sim(prediction, truth), 13 / 120, rtol=1e-6)


def test_all_pixels_fixated_and_none(rng):
    prediction = rng.random((2, 8, 8))
    truth = np.stack([np.full((8, 8), 1 / 3), np.zeros((8, 8))])
    np.testing.assert_array_equal(metrics.auc_judd(prediction, truth), [np.nan, np.nan])
    for metric in (metrics.cc, metrics.kld, metrics.sim, metrics.nss):
        value = metric(prediction, truth)
        assert np.isfinite(value[0]) and np.isnan(value[1]), metric.__name__
    np.testing.assert_allclose(metrics.cc(prediction, truth)[0], 0)
    np.testing.assert_allclose(metrics.nss(prediction, truth)[0], 0, atol=1e-12)
    np.testing.assert_allclose(metrics.mse(prediction, truth)[1], np.mean(prediction[1] ** 2))


def test_heatmap_metrics_do_not_change_their_arguments(rng):
    prediction, truth = random_maps(rng)
    before = prediction.copy(), truth.copy()
    for metric in EVERY_METRIC:
        metric(prediction, truth)
    np.testing.assert_array_equal(prediction, before[0])
    np.testing.assert_array_equal(truth, before[1])


@pytest.mark.parametrize("metric", EVERY_METRIC)
def test_heatmap_metrics_name_a_wrong_shape(metric):
    with pytest.raises(ValueError, match=r"prediction: got shape \(4, 4\), expected a \[n, h, w\]"):
        metric(np.zeros((4, 4)), np.zeros((4, 4)))
    with pytest.raises(ValueError, match=r"truth: got shape \(1, 4, 5\), expected the prediction's \(1, 4, 4\)"):
        metric(np.zeros((1, 4, 4)), np.zeros((1, 4, 5)))


# ------------------------------------------------------------------------------------------------------ a whole set


def test_evaluate_returns_the_promised_keys_as_floats(rng):
    result = metrics.evaluate(*examples(rng, 4))
    assert set(result) == KEYS
    assert all(type(value) is float for value in result.values())
    assert result["num_examples"] == 4
    assert set(metrics.evaluate([], [])) == KEYS


def test_evaluate_scores_equal_scipy_where_the_mask_allows(rng):
    targets, predictions = examples(rng, 10)
    for i in (2, 5):
        targets[i]["score_mask"] = np.array([True, False, True, True])
        targets[i]["scores"][1] = np.nan
    result = metrics.evaluate(targets, predictions)
    for k, name in enumerate(SCORES):
        kept = [i for i in range(10) if k != 1 or i not in (2, 5)]
        truth, predicted = ([float(rows[i]["scores"][k]) for i in kept] for rows in (targets, predictions))
        assert result[f"score/plcc/{name}"] == pytest.approx(scipy.stats.pearsonr(truth, predicted).statistic)
        assert result[f"score/srcc/{name}"] == pytest.approx(scipy.stats.spearmanr(truth, predicted).statistic)


def test_evaluate_scores_of_constants_are_zero_and_of_one_example_nan(rng):
    targets, predictions = examples(rng, 6)
    for target, prediction in zip(targets, predictions, strict=True):
        prediction["scores"][0] = 0.633
        target["scores"][1] = 1.0
    result = metrics.evaluate(targets, predictions)
    for name in SCORES[:2]:
        assert result[f"score/plcc/{name}"] == result[f"score/srcc/{name}"] == 0.0
    assert np.isnan(metrics.evaluate(targets[:1], predictions[:1])["score/plcc/overall"])


def test_evaluate_averages_each_heatmap_metric_over_the_right_examples(rng):
    targets, predictions = examples(rng, 6)
    targets[1]["heatmaps"][..., 0] = 0
    targets[4]["heatmaps"][..., 0] = 0
    targets[5]["heatmap_mask"][0] = False
    targets[3]["heatmaps"][..., 0] = 255  # no negatives: left out of AUC-Judd only
    result = metrics.evaluate(targets, predictions)
    truth = np.stack([target["heatmaps"][..., 0] / 255 for target in targets])
    predicted = np.stack([prediction["heatmaps"][..., 0] for prediction in predictions])
    squares = metrics.mse(predicted, truth)
    assert result["heatmap/mse/implausibility"] == pytest.approx(squares[:5].mean())
    assert result["heatmap/mse_empty/implausibility"] == pytest.approx(squares[[1, 4]].mean())
    for metric in (metrics.cc, metrics.kld, metrics.sim, metrics.nss):
        expected = metric(predicted, truth)[[0, 2, 3]].mean()
        assert result[f"heatmap/{metric.__name__}/implausibility"] == pytest.approx(expected)
    areas = metrics.auc_judd(predicted, truth)
    assert result["heatmap/auc_judd/implausibility"] == pytest.approx(areas[[0, 2]].mean())
    assert np.isnan(result["heatmap/mse_empty/misalignment"])


def test_evaluate_without_a_marked_pixel_has_only_mse(rng):
    targets, predictions = examples(rng, 3)
    for target in targets:
        target["heatmaps"][:] = 0
    result = metrics.evaluate(targets, predictions)
    assert result["heatmap/mse/misalignment"] == result["heatmap/mse_empty/misalignment"] > 0
    for key in ("cc", "kld", "sim", "nss", "auc_judd"):
        assert np.isnan(result[f"heatmap/{key}/misalignment"])


@pytest.mark.parametrize("chunk", [1, 250, 1 << 20])
def test_evaluate_does_not_depend_on_the_chunks(rng, monkeypatch, chunk):
    rows = [example(rng, size=(12, 9) if i % 3 else (8, 8)) for i in range(9)]
    for _, prediction in rows:
        prediction["heatmaps"] = np.round(prediction["heatmaps"] * 2) / 2  # ties, so that the noise matters
    targets, predictions = zip(*rows, strict=True)
    monkeypatch.setattr(metrics, "_CHUNK_PIXELS", 300)
    expected = metrics.evaluate(targets, predictions)
    monkeypatch.setattr(metrics, "_CHUNK_PIXELS", chunk)
    np.testing.assert_equal(metrics.evaluate(targets, predictions), expected)


def test_evaluate_is_not_changed_by_padding(rng):
    targets, predictions = examples(rng, 5)
    expected = metrics.evaluate(targets, predictions)
    target, prediction = example(rng, prompt="", labels=None)
    target.update(score_mask=np.zeros(4, bool), heatmap_mask=np.zeros(2, bool))
    prediction.update(scores=np.full(4, np.nan), heatmaps=np.full((3, 3, 2), np.nan), labelled_prompt="a_0 b_0")
    for at in (5, 2, 0):
        targets.insert(at, target)
        predictions.insert(at, prediction)
    np.testing.assert_equal(metrics.evaluate(targets, predictions), expected)


# ------------------------------------------------------------------------------------------------------ keywords


def keywords_of(*cases):
    """The keyword metrics of (prompt, labels, labelled prompt) cases."""
    targets, predictions = [], []
    for prompt, labels, labelled_prompt in cases:
        target, prediction = example(np.random.default_rng(1), prompt=prompt, labels=labels)
        targets.append(target)
        predictions.append({**prediction, "labelled_prompt": labelled_prompt})
    result = metrics.evaluate(targets, predictions)
    return {key.removeprefix("keywords/"): value for key, value in result.items() if key.startswith("keywords/")}


def test_keywords_hand_computed():
    result = keywords_of(
        ("a yellow cat, sitting", [1, 0, 1, 0], "a yellow_0 cat_0 sitting"),  # 1 hit, 1 false alarm, 1 miss
        ("two dogs", [0, 1], "two_0 dogs"),  # 1 hit
        ("a red house", [1, 1, 1], "a red house"),  # nothing to find and nothing found
        ("a blue car", None, "a_0 blue_0 car_0"),  # unknown labels: left out
    )
    assert result["micro/precision"] == pytest.approx(2 / 3)
    assert result["micro/recall"] == pytest.approx(2 / 3)
    assert result["micro/f1"] == pytest.approx(2 / 3)
    assert result["per_prompt/precision"] == pytest.approx((1 / 2 + 1 + 0) / 3)
    assert result["per_prompt/recall"] == pytest.approx((1 / 2 + 1 + 0) / 3)
    assert result["per_prompt/f1"] == pytest.approx((1 / 2 + 1 + 0) / 3)


def test_keywords_word_not_copied_is_a_miss_and_no_false_alarm():
    result = keywords_of(("a yellow cat", [1, 0, 1], "a_0 cat"), ("a dog", [1, 0], "dog_0"))
    assert result["micro/precision"] == pytest.approx(1 / 2)
    assert result["micro/recall"] == pytest.approx(1 / 2)
    assert result["per_prompt/recall"] == pytest.approx((0 + 1) / 2)


def test_keywords_zero_over_zero_is_zero_and_no_labels_nan():
    assert set(keywords_of(("a cat", [0, 1], "a cat")).values()) == {0.0}
    assert all(np.isnan(value) for value in keywords_of(("a cat", None, "a cat_0")).values())


def test_keywords_micro_equals_sklearn(rng):
    cases, truth, predicted = [], [], []
    for _ in range(20):
        words = [f"w{i}" for i in range(rng.integers(3, 20))]
        labels, marks = rng.integers(0, 2, (2, len(words)))
        marked = " ".join(word + "_0" * (not mark) for word, mark in zip(words, marks, strict=True))
        cases.append((" ".join(words), labels.tolist(), marked))
        truth.extend(labels)
        predicted.extend(marks)
    result = keywords_of(*cases)
    expected = sklearn.metrics.precision_recall_fscore_support(truth, predicted, pos_label=0, average="binary")
    for key, value in zip(("precision", "recall", "f1"), expected, strict=False):
        assert result[f"micro/{key}"] == pytest.approx(value)


# ------------------------------------------------------------------------------------------------------ errors


def test_evaluate_names_what_is_wrong(rng):
    target, prediction = example(rng)
    cases = [
        ([target], [], r"predictions: got 0 for 1 targets"),
        (
            [target],
            [{**prediction, "scores": np.zeros(3)}],
            r"predictions\[0\]\['scores'\]: got shape \(3,\), expected",
        ),
        ([target], [{**prediction, "scores": np.array([0, np.nan, 0, 0])}], r"got alignment = nan, expected a finite"),
        ([{**target, "scores": np.array([0, 0, 0, np.inf])}], [prediction], r"targets\[0\].*overall = inf"),
        ([{**target, "score_mask": np.ones(3)}], [prediction], r"targets\[0\]\['score_mask'\]: got shape \(3,\)"),
        ([{**target, "heatmap_mask": True}], [prediction], r"'heatmap_mask'\]: got shape \(\), expected \(2,\)"),
        ([{**target, "heatmaps": target["heatmaps"] / 255}], [prediction], r"got float64\[12, 9, 2\], expected uint8"),
        (
            [target],
            [{**prediction, "heatmaps": np.zeros((6, 9, 2))}],
            r"got shape \(6, 9, 2\), expected the target's \(12, 9, 2\)",
        ),
        ([target], [{**prediction, "heatmaps": prediction["heatmaps"] * 255}], r"got implausibility from .* \[0, 1\]"),
        ([target], [{**prediction, "heatmaps": np.full((12, 9, 2), np.nan)}], r"got implausibility from nan to nan"),
        ([{**target, "labels": [1, 0]}], [prediction], r"labels: got 2 for the 3 tokens of prompt 'a yellow cat'"),
    ]
    for targets, predictions, message in cases:
        with pytest.raises(ValueError, match=message):
            metrics.evaluate(targets, predictions)


# ------------------------------------------------------------------------------------------------ baseline and tables


def test_constant_predictions_evaluate_to_no_skill(rng):
    targets = [example(rng, size=size)[0] for size in ((12, 9), (64, 48), (16, 16))]
    mean_heatmaps = rng.random((16, 16, 2)).astype(np.float32)
    predictions = metrics.constant_predictions(np.array([0.1, 0.2, 0.3, 0.4]), mean_heatmaps, targets)
    for target, prediction in zip(targets, predictions, strict=True):
        assert prediction["heatmaps"].shape == target["heatmaps"].shape
        assert prediction["heatmaps"].dtype == np.float32
        np.testing.assert_allclose(prediction["scores"], [0.1, 0.2, 0.3, 0.4], rtol=1e-6)
        assert prediction["labelled_prompt"] == "a yellow cat"
        np.testing.assert_allclose(prediction["heatmaps"].mean(), mean_heatmaps.mean(), atol=0.05)
    np.testing.assert_allclose(predictions[2]["heatmaps"], mean_heatmaps)
    result = metrics.evaluate(targets, predictions)
    assert result["score/plcc/overall"] == result["keywords/micro/recall"] == 0
    assert np.isfinite(result["heatmap/cc/implausibility"])


def test_constant_predictions_name_a_wrong_shape():
    with pytest.raises(ValueError, match=r"mean_scores: got shape \(3,\), expected \(4,\)"):
        metrics.constant_predictions(np.zeros(3), np.zeros((4, 4, 2)), [])
    with pytest.raises(ValueError, match=r"mean_heatmaps: got shape \(4, 4\), expected \[h, w, 2\]"):
        metrics.constant_predictions(np.zeros(4), np.zeros((4, 4)), [])


def test_table_shows_every_row_and_a_dash_for_what_is_missing(rng):
    full = dict.fromkeys(KEYS, 0.5) | {"heatmap/mse/implausibility": 0.0092, "heatmap/nss/misalignment": float("nan")}
    ceiling = {f"score/{key}/{name}": 0.9 for key in ("plcc", "srcc") for name in SCORES[:3]}
    text = metrics.table({"this model": full, "ceiling": ceiling, "nothing": {"score/plcc/overall": None}})
    scores, implausibility, misalignment, words = (
        [[cell.strip() for cell in line.split("|")[1:-1]] for line in block.splitlines()] for block in text.split("\n\n")
    )
    assert scores[0] == ["PLCC / SRCC", *SCORES, "mean"]
    assert scores[2] == ["this model", *["0.500 / 0.500"] * 5]
    assert scores[3] == ["ceiling", *["0.900 / 0.900"] * 3, "-", "-"]
    assert scores[4] == ["nothing", *"-----"]
    assert implausibility[0][0] == "implausibility heatmap"
    assert implausibility[2] == ["this model", "0.00920", "0.50000", *["0.500"] * 5]
    assert misalignment[2][6] == "-" and misalignment[3] == ["ceiling", *"-------"]
    assert words[2] == ["this model", "50.0 / 50.0 / 50.0", "50.0 / 50.0 / 50.0"]


def test_metrics_import_without_tensorflow_and_jax():
    code = """
import sys
for name in ("tensorflow", "jax", "flax", "seqio"):
    sys.modules[name] = None
import richhf_data.metrics
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_evaluate_of_partly_absent_targets_is_that_of_the_examples_that_have_them(rng):
    targets, predictions = map(list, zip(*(example(rng) for _ in range(12)), strict=True))
    for i in range(12):  # a third lacks score 1, another third map 0 and the labels; nobody has score 3
        targets[i]["score_mask"][3] = False
        targets[i]["score_mask"][1] = i % 3 != 0
        targets[i]["heatmap_mask"][0] = i % 3 != 1
        if i % 3 == 1:
            targets[i]["labels"] = None
        if i in (3, 5):
            targets[i]["heatmaps"][..., 0] = 0
    found = metrics.evaluate(targets, predictions)

    def of_those(kept):
        return metrics.evaluate(*([rows[i] for i in range(12) if kept(i)] for rows in (targets, predictions)))

    for kept, part in (
        (lambda i: i % 3 != 0, f"/{SCORES[1]}"),
        (lambda i: i % 3 != 1, f"/{HEATMAPS[0]}"),
        (lambda i: i % 3 != 1, "keywords/"),
    ):
        expected = of_those(kept)
        for key in (key for key in KEYS if part in key):
            assert found[key] == pytest.approx(expected[key], abs=1e-6), key  # AUC breaks ties by an example's place
            assert np.isfinite(found[key]), key
    assert np.isnan([found[f"score/{key}/{SCORES[3]}"] for key in ("plcc", "srcc")]).all()
    assert "- / -" not in metrics.table({"model": found})
    assert found["num_examples"] == 12


def test_captions_hand_computed(rng):
    def caption(truth, written):
        target, prediction = example(rng, labels=None)
        nothing = {"score_mask": np.zeros(4, bool), "heatmap_mask": np.zeros(2, bool)}
        return target | nothing | {"caption": truth}, prediction | {"labelled_prompt": written}

    rows = [caption("a red cat", "a red cat"), caption("a a b", "a c"), caption("a cat", "")]
    found = metrics.evaluate(*map(list, zip(*rows, strict=True)))
    assert found["caption/word_f1"] == pytest.approx((1 + 2 * 1 / (3 + 2) + 0) / 3)
    assert found["num_examples"] == 3
    assert all(np.isnan(found[key]) for key in KEYS - {"num_examples"})
    assert "| model      | 46.7" in metrics.table({"model": found})
    with_none = metrics.evaluate(*map(list, zip(*rows, example(rng), strict=True)))
    assert with_none["caption/word_f1"] == found["caption/word_f1"] and with_none["num_examples"] == 4


def test_constant_predictions_of_an_unknown_mean_are_numbers(rng):
    target, _ = example(rng)
    mean_maps = np.full((6, 6, 2), 0.25, np.float32)
    mean_maps[..., 1] = np.nan
    (prediction,) = metrics.constant_predictions([0.1, np.nan, 0.3, 0.4], mean_maps, [target])
    np.testing.assert_allclose(prediction["scores"], [0.1, 0.5, 0.3, 0.4])
    np.testing.assert_allclose(prediction["heatmaps"].mean(axis=(0, 1)), [0.25, 0])
