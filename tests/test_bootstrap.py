"""Resampled metrics, intervals and marks."""

import dataclasses

import numpy as np
import pytest
import test_metrics

from benchmarks import tables as benchmark
from rahf.tables import bootstrap
from richhf_data import metrics
from richhf_data.schema import HEATMAPS, SCORES


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def examples(rng, n):
    """Targets and predictions with ties, gaps and marked words."""
    targets, predictions = test_metrics.examples(rng, n)
    for i, (target, prediction) in enumerate(zip(targets, predictions, strict=True)):
        target["scores"], prediction["scores"] = (np.round(6 * one["scores"]) / 6 for one in (target, prediction))
        target["score_mask"][1] = i % 4 != 0
        if i % 3 == 0:
            target["heatmaps"][..., 1] = 0
        if i % 5 == 0:
            target["labels"] = None
        prediction["labelled_prompt"] = ("a_0 yellow_0 cat", "a yellow_0 cat", "a yellow cat_0")[i % 3]
    return targets, predictions


def test_weights_summarise_as_the_examples_taken_as_often(rng):
    targets, predictions = examples(rng, 24)
    weights = rng.multinomial(24, np.full(24, 1 / 24), size=5)
    found = metrics.summarise(metrics.per_example(targets, predictions), weights, undefined=0.0)
    for row, own in enumerate(weights):
        taken = np.repeat(np.arange(24), own)
        expected = metrics.evaluate([targets[i] for i in taken], [predictions[i] for i in taken])
        assert found.keys() == expected.keys() - {"num_examples"}
        for key, values in found.items():
            assert values[row] == pytest.approx(expected[key], abs=1e-6, nan_ok=True), key  # AUC's noise has other seeds


def test_examples_measured_in_pieces_are_those_measured_at_once(rng):
    targets, predictions = examples(rng, 9)
    whole = metrics.per_example(targets, predictions)
    parts = [metrics.per_example(targets[i : i + 4], predictions[i : i + 4], range(9)[i : i + 4]) for i in (0, 4, 8)]
    joined = metrics.concatenate(parts)
    assert len(joined) == len(whole) == 9
    for field in dataclasses.fields(whole):
        np.testing.assert_equal(getattr(joined, field.name), getattr(whole, field.name))


def test_what_was_not_predicted_is_nan_and_the_rest_is_as_before(rng):
    targets, predictions = examples(rng, 12)
    whole = metrics.evaluate(targets, predictions)
    nothing = {"scores": None, "heatmaps": None, "labelled_prompt": None}
    for kept, prefixes in (
        ({"scores"}, {"score/"}),
        ({"heatmaps"}, {"heatmap/"}),
        ({"labelled_prompt"}, {"keywords/"}),
        ({"scores", "score_mask"}, {f"score/{key}/{SCORES[1]}" for key in ("plcc", "srcc")}),
        ({"heatmaps", "heatmap_mask"}, {f"heatmap/{key}/{HEATMAPS[0]}" for key in metrics.HEATMAP_METRICS}),
    ):
        masks = {"score_mask": np.arange(4) == 1, "heatmap_mask": np.arange(2) == 0}
        partial = [nothing | {key: (masks | one)[key] for key in kept} for one in predictions]
        for key, value in metrics.evaluate(targets, partial).items():
            if key != "num_examples":
                there = key.startswith(tuple(prefixes))
                assert value == pytest.approx(whole[key], nan_ok=True) if there else np.isnan(value), (kept, key)


def test_labels_stand_for_a_labelled_prompt(rng):
    targets, predictions = examples(rng, 6)
    read = {"a_0 yellow_0 cat": [0, 0, 1], "a yellow_0 cat": [1, 0, 1], "a yellow cat_0": [1, 1, 0]}
    labelled = [one | {"labels": read[one["labelled_prompt"]], "labelled_prompt": "no such words"} for one in predictions]
    assert metrics.evaluate(targets, labelled) == pytest.approx(metrics.evaluate(targets, predictions), nan_ok=True)
    with pytest.raises(ValueError, match=r"predicted labels: got 2 for the 3 tokens of prompt 'a yellow cat'"):
        metrics.evaluate(targets[1:2], [labelled[1] | {"labels": [0, 1]}])


@pytest.mark.parametrize("steps", [0, 2, 5])
def test_counting_by_bins_is_counting_by_a_sort(rng, monkeypatch, steps):
    monkeypatch.setattr(metrics, "_BINS", 16)
    for _ in range(200):
        values, thresholds = (rng.random(rng.integers(1, 60)) * 10.0 ** rng.integers(-8, 1) for _ in range(2))
        if steps:  # with ties
            values, thresholds = (np.round(one * steps) / steps for one in (values, thresholds))
        found = metrics._counts_below(values, np.sort(thresholds))
        np.testing.assert_array_equal(found, (values[:, None] < np.sort(thresholds)).sum(axis=0))


def row(rng, truth, noise=0.1, **changes):
    """A `PerExample` of random metrics; scores are the truth with noise."""
    n = len(truth)
    found = metrics.PerExample(
        truth,
        truth + noise * rng.standard_normal(truth.shape),
        {key: rng.random((n, 2)) for key in metrics.HEATMAP_METRICS},
        np.zeros((n, 2), bool),
        rng.integers(1, 4, (n, 3)).astype(float),
        np.full(n, np.nan),
    )
    return dataclasses.replace(found, **changes)


def test_resamples_do_not_depend_on_how_many_are_held(rng, monkeypatch):
    values = row(rng, rng.random((30, 4)))
    expected = bootstrap.estimates({"a": values}, (), 200, 3)
    monkeypatch.setattr(bootstrap, "_WEIGHTS", 30 * 7)
    assert bootstrap.estimates({"a": values}, (), 200, 3) == expected
    assert bootstrap.estimates({"a": values}, (), 200, 4) != expected


def test_an_interval_of_a_mean_is_that_of_the_normal_law(rng):
    values = row(rng, rng.random((400, 4)))
    one = bootstrap.estimates({"a": values}, (), 2000)["a"]["heatmap/sim/misalignment"]
    sample = values.heatmaps["sim"][:, 1]
    reach = 1.96 * sample.std() / 20
    assert one.value == pytest.approx(sample.mean())
    assert [one.low, one.high] == pytest.approx([sample.mean() - reach, sample.mean() + reach], abs=0.003)
    assert not one.best and not one.tied  # of nothing to compare with


def test_marks_follow_the_paired_difference_and_the_direction(rng):
    truth = rng.random((200, 4))
    good, bad = row(rng, truth, 0.1), row(rng, truth, 0.8)
    near = dataclasses.replace(good, predicted_scores=good.predicted_scores + 1e-3 * rng.standard_normal((200, 4)))
    worse = {key: values + 0.05 for key, values in good.heatmaps.items()}  # by a little, on every picture
    bad = dataclasses.replace(bad, heatmaps=worse)
    found = bootstrap.estimates({"bad": bad, "good": good, "near": near}, (), 500)
    for key in ("score/plcc/overall", "score/srcc/mean", "score/rmse/overall", "score/mae/mean"):
        assert [found[name][key].tied for name in found] == [False, True, True], key
        assert not found["bad"][key].best and found["good"][key].best != found["near"][key].best
    assert found["bad"]["heatmap/cc/misalignment"].best and not found["good"]["heatmap/cc/misalignment"].tied
    assert found["good"]["heatmap/kld/misalignment"].best and found["near"]["heatmap/kld/misalignment"].best
    assert not found["bad"]["heatmap/mse/misalignment"].tied
    unpaired = found["bad"]["heatmap/cc/misalignment"]  # their own intervals overlap
    assert unpaired.low < found["good"]["heatmap/cc/misalignment"].high


def drawn_means(rng, rows):
    """The means of each row's values, [K, n] -> {name: mean}, {name: its resamples}."""
    n = rows.shape[1]
    means = rng.multinomial(n, np.full(n, 1 / n), size=400) @ rows.T / n
    return {str(i): float(row.mean()) for i, row in enumerate(rows)}, {str(i): means[:, i] for i in range(len(rows))}


def test_few_of_several_equal_rows_lose_their_mark(rng):
    lost = 0
    for _ in range(150):
        values, draws = drawn_means(rng, rng.standard_normal((8, 60)))
        lost += 8 - len(bootstrap._marks("heatmap/cc/misalignment", values, draws)[1])
    assert 0.01 < lost / (8 * 150) < 0.05  # 0.15 by the plain intervals of the differences from the best


def test_marks_of_two_rows_are_those_of_their_interval(rng):
    both = set()
    for shift in np.linspace(0.0, 0.6, 40):
        values, draws = drawn_means(rng, rng.exponential(size=(2, 60)) + [[0], [shift]])
        low, high = bootstrap._interval(draws["0"] - draws["1"])
        both.add(low <= 0 <= high)
        assert (len(bootstrap._marks("heatmap/cc/misalignment", values, draws)[1]) == 2) == (low <= 0 <= high)
    assert both == {True, False}


def test_a_noisy_row_hides_no_difference(rng):
    one = rng.standard_normal(100)
    rows = np.stack([one, one + 0.3 + 0.1 * rng.standard_normal(100), one + 0.5, 30 * rng.standard_normal(100) - 9])
    assert bootstrap._marks("heatmap/cc/misalignment", *drawn_means(rng, rows)) == ({"2"}, {"2"})
    rows[3] += rows[2].mean() - rows[3].mean() - 1e-3  # as good as the best
    best, tied = bootstrap._marks("heatmap/cc/misalignment", *drawn_means(rng, rows))
    assert (best, tied) == ({"2"}, {"2", "3"})


def test_a_constant_prediction_is_undefined_and_never_zero(rng):
    truth, n = rng.random((40, 4)), 40
    constant = row(rng, truth, predicted_scores=np.full((n, 4), 0.5), constant_maps=np.ones((n, 2), bool))
    found = bootstrap.estimates({"constant": constant, "good": row(rng, truth)}, (), 200)
    undefined = {key for key, one in found["constant"].items() if np.isnan(one.value)}
    names = (*SCORES, "mean")
    assert undefined == {f"score/{key}/{name}" for key in ("plcc", "srcc") for name in names} | {
        f"heatmap/{key}/{name}" for key in ("cc", "nss", "auc_judd") for name in HEATMAPS
    }
    assert not any(found["constant"][key].tied or found["constant"][key].best for key in undefined)
    assert np.isfinite(found["constant"]["score/rmse/overall"].high)
    never = np.stack([np.zeros(n), np.zeros(n), np.ones(n)], axis=1)
    words = bootstrap.estimates({"a": row(rng, truth, keywords=never)}, (), 200)["a"]
    assert np.isnan(words["keywords/micro/precision"].value) and words["keywords/micro/recall"].value == 0


def test_a_reward_has_correlations_and_no_errors(rng):
    found = bootstrap.estimates({"a": row(rng, rng.random((30, 4)))}, {"a"}, 200)["a"]
    assert {key.split("/")[1] for key in found if key.startswith("score/")} == {"plcc", "srcc"}


def test_intervals_hold_the_true_value_about_as_often_as_they_say():
    found = benchmark.coverage(100, 50, 200)  # of 100 intervals each, benchmarks/README.md has more
    assert set(found) == set(benchmark.population())
    for key, (held, _) in found.items():
        assert 0.85 <= held <= 1.0, (key, held)
    assert np.mean([held for held, _ in found.values()]) > 0.9
    assert np.mean([tied for _, tied in found.values()]) > 0.88
