"""Losses: hand-computed values, and sums that do not depend on how a batch is cut."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model

from rahf import losses, sources
from rahf.models import rahf
from richhf_data import schema
from richhf_data import vocabulary as vocabularies

HAND = {
    "scores": np.array([[0.5, 0, 0, 0], [1, 1, 0, 0]], np.float32),
    "score_mask": np.array([[True, True, False, False], [False, True, False, False]]),
    "heatmaps": np.array([[[[255, 0], [0, 0]]], [[[255, 255], [255, 255]]]], np.uint8),  # [2, 1, 2, 2]
    "heatmap_mask": np.array([[True, True], [False, False]]),
    "keyword_ids": np.array([[2, 1, 0], [1, 0, 0]], np.int32),
}


def hand_outputs():
    logits = np.zeros((2, 3, 4), np.float32)
    logits[0, 0, 2] = np.log(5)  # probability 5 / 8 of the target
    logits[:, 2] = 100  # at padding: counts nowhere
    return rahf.Outputs(
        jnp.array([[1.0, 0.2, 9, 9], [9, 0.5, 9, 9]]),
        jnp.full((2, 1, 2, 2), 0.5),
        jnp.asarray(logits),
    )


def whole_loss(outputs, batch, weights):
    return losses.rahf_loss(outputs, batch, losses.loss_normalisers(batch), weights)


def test_loss_by_hand():
    weights = {"score": 2.0, "heatmap": 3.0, "keyword": 0.5}
    loss, metrics = whole_loss(hand_outputs(), HAND, weights)
    score = (0.5**2 + 0.2**2 + 0.5**2) / 3
    heatmap = 0.25  # every pixel of both maps of row 0 is off by a half
    keyword = (np.log(8 / 5) + np.log(4) + np.log(4)) / 3
    np.testing.assert_allclose(metrics["loss_score"], score, rtol=1e-6)
    np.testing.assert_allclose(metrics["loss_heatmap"], heatmap, rtol=1e-6)
    np.testing.assert_allclose(metrics["loss_keyword"], keyword, rtol=1e-6)
    np.testing.assert_allclose(metrics["keyword_accuracy"], 1 / 3, rtol=1e-6)
    np.testing.assert_allclose(loss, 2 * score + 3 * heatmap + 0.5 * keyword, rtol=1e-6)
    assert metrics["loss"] == loss
    assert {k: float(v) for k, v in losses.loss_normalisers(HAND).items()} == {
        "score": 3,
        "heatmap": 2,
        "keyword": 3,
    }


def test_a_batch_without_targets_gives_zero_loss_and_gradient():
    empty = {name: np.zeros_like(value) for name, value in HAND.items()}

    def loss(outputs):
        return whole_loss(outputs, empty, losses.DEFAULT_WEIGHTS)[0]

    value, gradient = jax.value_and_grad(loss)(hand_outputs())
    assert value == 0
    assert all((np.asarray(leaf) == 0).all() for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize("variant", tiny_model.VARIANTS)
def test_microbatches_add_up_to_the_full_batch(variant):
    config = tiny_model.config(variant)
    model, params = tiny_model.model_and_params(config)
    batch = tiny_model.batch(config, 16)
    batch["keyword_ids"][:8] = 0  # very unequal halves
    normalisers = losses.loss_normalisers(batch)

    def loss(params, rows, normalisers):
        outputs = model.apply(params, rows["image"], rows["text_ids"], rows["keyword_ids"])
        return losses.rahf_loss(outputs, rows, normalisers, losses.DEFAULT_WEIGHTS)

    step = jax.jit(jax.grad(loss, has_aux=True))
    full = step(params, batch, normalisers)
    # Each half in a batch of its own, filled up with padding rows: one compilation serves all three.
    halves = [
        step(params, {name: np.concatenate([x[part], np.zeros_like(x[:8])]) for name, x in batch.items()}, normalisers)
        for part in (slice(0, 8), slice(8, 16))
    ]
    added = jax.tree.map(jnp.add, *halves)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-4), added, full)
    gradients = [np.abs(leaf).max() for leaf in jax.tree.leaves(full[0])]
    assert min(gradients) > 0  # every parameter takes part in the loss


def test_rows_that_pad_a_batch_change_no_loss():
    config = tiny_model.config()
    model, params = tiny_model.model_and_params(config)
    batch = tiny_model.batch(config, 3)
    padded = {name: np.pad(value, [(0, 2)] + [(0, 0)] * (value.ndim - 1)) for name, value in batch.items()}

    def metrics(rows):
        outputs = tiny_model.forward(model, params, rows)
        return whole_loss(outputs, rows, losses.DEFAULT_WEIGHTS)[1]

    expected = metrics(batch)
    assert expected["loss"] > 0
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), metrics(padded), expected)


def test_a_row_without_keywords_has_no_padding_to_count():
    logits = np.random.default_rng(0).normal(size=(2, 4, 6)).astype(np.float32)
    targets = np.array([[5, 1, 0, 0], [0, 0, 0, 0]], np.int32)
    masks = {"score_mask": np.zeros((2, 4), bool), "heatmap_mask": np.zeros((2, 2), bool)}
    assert losses.loss_normalisers({"keyword_ids": targets} | masks, count_padding=True)["keyword"] == 4
    both = losses.keyword_loss_sum(logits, targets, count_padding=True)
    np.testing.assert_allclose(both, losses.keyword_loss_sum(logits[:1], targets[:1], count_padding=True), rtol=1e-6)


def test_the_cross_entropy_of_heatmaps_has_the_gradient_of_a_sigmoid_and_a_finite_value_at_0_and_1():
    rng = np.random.default_rng(0)
    logits = rng.normal(scale=3, size=(2, 4, 4, 2)).astype(np.float32)
    target = rng.integers(0, 256, logits.shape).astype(np.uint8)
    mask = np.array([[True, False], [True, True]])

    def loss(logits):
        return losses.heatmap_loss_sum(jax.nn.sigmoid(logits), target, mask, "cross_entropy")

    predicted, wanted = 1 / (1 + np.exp(-logits.astype(np.float64))), target / 255
    each = -wanted * np.log(predicted) - (1 - wanted) * np.log(1 - predicted)
    value, gradient = jax.value_and_grad(loss)(logits)
    np.testing.assert_allclose(value, each.mean((1, 2))[mask].sum(), rtol=1e-5)
    np.testing.assert_allclose(gradient, (predicted - wanted) / 16 * mask[:, None, None], atol=1e-6)
    assert np.isfinite(
        losses.heatmap_loss_sum(
            np.eye(2, dtype=np.float32).reshape(1, 2, 2, 1), np.full((1, 2, 2, 1), 128, np.uint8), True, "cross_entropy"
        )
    )


def test_a_weight_of_marks_weighs_their_cross_entropy_alone():
    logits = np.random.default_rng(0).normal(size=(2, 5, 9)).astype(np.float32)
    targets = np.array([[5, 7, 8, 6, 1], [7, 6, 7, 8, 1]], np.int32)  # the suffix is 7, 8
    weights = sources.marked_weights(targets, [7, 8], 3.0)
    assert weights.tolist() == [[1, 3, 3, 1, 1], [1, 1, 3, 3, 1]]
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    each = -np.take_along_axis(log_probs, targets[..., None], -1)[..., 0]
    found = losses.keyword_loss_sum(logits, targets, weights=weights)
    np.testing.assert_allclose(found[0], (each * weights).sum(), rtol=1e-6)
    plain = losses.keyword_loss_sum(logits, targets)
    np.testing.assert_allclose(plain[0], each.sum(), rtol=1e-6)
    assert found[1] == plain[1]


def test_words_are_labelled_by_the_keywords_of_their_prompt(tmp_path):
    prompts = ["two red cats, in a forest", "a blue cup", "a red cup", "a cat"]
    vocabulary = vocabularies.train(prompts, tmp_path / "vocabulary.model", 60)
    marks = ["two_0 red cats_0 in a forest_0", "a blue_0 cup", "a red dog", "a cat_0"]
    texts = np.stack([vocabulary.encode(text, 40) for text in ("cats " + prompts[0], *prompts[1:])])
    targets = np.stack([vocabulary.encode(text, 60) for text in marks])
    targets[3] = 0  # a row without keywords
    found = sources.labelled_words(texts, targets, vocabulary, 3.0)
    assert found["word_labels"].dtype == bool and found["word_weights"].dtype == np.float32

    def words(of):
        return ["".join(vocabulary.spellings(row[mask])) for row, mask in zip(texts, of, strict=True)]

    assert words(found["word_labels"]) == ["twocatsforest", "blue", "", ""]
    assert words(found["word_weights"] == 3) == words(found["word_labels"])
    assert words(found["word_weights"] == 1) == ["redina", "acup", "", ""]  # neither what is before the prompt nor the comma
    assert len(vocabulary.pieces("forest")) > 1  # a word of several pieces

    logits = np.random.default_rng(0).normal(size=texts.shape).astype(np.float32)
    probability = 1 / (1 + np.exp(-logits.astype(np.float64)))
    each = -np.log(np.where(found["word_labels"], probability, 1 - probability))
    value, gradient = jax.value_and_grad(losses.word_loss_sum)(logits, **{k[5:]: v for k, v in found.items()})
    np.testing.assert_allclose(value, (each * found["word_weights"]).sum(), rtol=1e-6)
    np.testing.assert_allclose(gradient, (probability - found["word_labels"]) * found["word_weights"], atol=1e-6)


def test_loss_names_wrong_weights_and_sizes():
    with pytest.raises(ValueError, match=r"loss weights: got \['scores'\], expected exactly"):
        whole_loss(hand_outputs(), HAND, {"scores": 1.0})
    small = HAND | {"heatmaps": np.zeros((2, 4, 4, 2), np.uint8)}
    with pytest.raises(ValueError, match=r"targets of shape \(2, 4, 4, 2\), expected the model's \(2, 1, 2, 2\)"):
        whole_loss(hand_outputs(), small, losses.DEFAULT_WEIGHTS)


def test_absent_targets_take_no_part_in_the_gradient():
    rng = np.random.default_rng(0)
    outputs = rahf.Outputs(
        jnp.asarray(rng.random((3, 4)), jnp.float32),
        jnp.asarray(rng.random((3, 5, 4, 2)), jnp.float32),
        jnp.asarray(rng.normal(size=(3, 6, 9)), jnp.float32),
    )
    batch = {
        "scores": rng.random((3, 4)).astype(np.float32),
        "score_mask": np.array([[1, 1, 1, 1], [1, 1, 1, 0], [0, 0, 0, 0]], bool),  # as RichHF, Rapidata, captions
        "heatmaps": rng.integers(0, 256, (3, 5, 4, 2)).astype(np.uint8),
        "heatmap_mask": np.array([[1, 1], [0, 1], [0, 0]], bool),
        "keyword_ids": np.array([[2, 3, 1, 0, 0, 0], [0] * 6, [4, 5, 6, 7, 1, 0]], np.int32),
    }

    def loss(outputs, batch):
        return whole_loss(outputs, batch, losses.DEFAULT_WEIGHTS)[0]

    gradient = jax.grad(loss)(outputs, batch)
    score_error = np.where(batch["score_mask"], np.asarray(outputs.scores) - batch["scores"], 0)
    np.testing.assert_allclose(gradient.scores, 2 * score_error / 7, rtol=1e-5)  # 7 scores in all
    mask = batch["heatmap_mask"][:, None, None]
    map_error = np.where(mask, np.asarray(outputs.heatmaps) - batch["heatmaps"] / 255, 0)
    np.testing.assert_allclose(gradient.heatmaps, 2 * map_error / 20 / 3, rtol=1e-4)  # of 20 pixels, 3 maps in all
    written = batch["keyword_ids"] != schema.PAD_ID  # 8 ids in all
    error = np.asarray(jax.nn.softmax(outputs.keyword_logits)) - np.eye(9)[batch["keyword_ids"]]
    np.testing.assert_allclose(gradient.keyword_logits, np.where(written[..., None], error, 0) / 8, atol=1e-6)

    # What stands in the place of an absent target changes nothing, not even where it is no number.
    filled = batch | {
        "scores": np.where(batch["score_mask"], batch["scores"], np.nan).astype(np.float32),
        "heatmaps": np.where(mask, batch["heatmaps"], 255).astype(np.uint8),
    }
    jax.tree.map(np.testing.assert_array_equal, jax.grad(loss)(outputs, filled), gradient)
