"""The training loss: masked sums over rows, divided by the weights of the whole batch.

Rows differ in how many targets they have. With a mean over a microbatch, or over the rows of one device, the weight of a row
would depend on the rows beside it. Here a loss is a sum divided by the number of targets in the GLOBAL batch
(`loss_normalisers`), so losses, metrics and gradients of microbatches add up to those of the whole batch.
"""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from rahf.models.rahf import Outputs
from richhf_data import schema
from richhf_data.errors import UserError

Array = jax.Array
HEATMAP_LOSSES = ("mse", "cross_entropy")
LEAST = 1e-6  # the cross-entropy takes predictions nearer to 0 or 1 for this near
# The paper (arXiv 2312.10240, section 4.1) has a weighted sum of three losses and does not give the weights.
DEFAULT_WEIGHTS = {"score": 1.0, "heatmap": 1.0, "keyword": 1.0}


def loss_normalisers(batch: Mapping[str, Array], count_padding: bool = False) -> dict[str, Array]:
    """The divisors of the losses of a batch or its microbatches. They depend only on the targets.

    Args:
      count_padding: see `keyword_loss_sum`.

    Returns:
      float32 scalars, the numbers of targets: `score`, of scores; `heatmap`, of (row, map) pairs; `keyword`, of ids that
      are not padding; `word`, if the batch has them, of ids of a prompt whose word has a label. May be 0.
    """
    found = {
        "score": jnp.sum(batch["score_mask"], dtype=jnp.float32),
        "heatmap": jnp.sum(batch["heatmap_mask"], dtype=jnp.float32),
        "keyword": jnp.sum(_keyword_mask(batch["keyword_ids"], count_padding), dtype=jnp.float32),
    }
    if "word_weights" in batch:
        found["word"] = jnp.sum(batch["word_weights"] > 0, dtype=jnp.float32)
    return found


def score_loss_sum(predicted: Array, target: Array, mask: Array) -> Array:
    """Sum of squared errors where the mask is True: float32[B, 4] twice, bool[B, 4] -> float32 scalar."""
    return jnp.sum(jnp.square(jnp.where(mask, predicted - target, 0.0)))  # masked first, so that a nan gets gradient 0


def deviation_loss_sum(deviation: Array, predicted: Array, target: Array, mask: Array) -> Array:
    """Sum of Gaussian negative log-likelihoods of the target where the mask is True; no gradient to its mean `predicted`.

    Args:
      deviation: float32[B, 4], above 0. predicted, target: float32[B, 4]. mask: bool[B, 4].
    """
    error = jnp.where(mask, jax.lax.stop_gradient(predicted) - target, 0.0)
    loss = jnp.square(error / deviation) / 2 + jnp.log(deviation) + math.log(2 * math.pi) / 2
    return jnp.sum(jnp.where(mask, loss, 0.0))


def heatmap_loss_sum(predicted: Array, target: Array, mask: Array, kind: str = "mse") -> Array:
    """Sum over (row, map) where the mask is True of the mean over pixels of the squared error or the cross-entropy.

    Both are least where the prediction is the target's expectation. Through a sigmoid the gradient of the squared error
    vanishes where the prediction is near 0, as it is in most of a heatmap; that of the cross-entropy does not.

    Args:
      predicted: float32[B, h, w, 2] in [0, 1]. target: uint8[B, h, w, 2], 255 = 1. mask: bool[B, 2].
      kind: one of `HEATMAP_LOSSES`.

    Raises:
      UserError: the target has another resolution than the model predicts.
    """
    if predicted.shape != target.shape:
        raise UserError(
            f"heatmaps: got targets of shape {target.shape}, expected the model's {predicted.shape}; set the data's "
            "heatmap size to that of the model (RAHFConfig.heatmap_size)"
        )
    target = target.astype(jnp.float32) / 255.0
    if kind == "mse":
        errors = jnp.square(predicted - target)
    else:
        predicted = jnp.clip(predicted, LEAST, 1.0 - LEAST)
        errors = -target * jnp.log(predicted) - (1.0 - target) * jnp.log1p(-predicted)
    error = jnp.mean(errors, axis=(1, 2))  # [B, 2]
    return jnp.sum(jnp.where(mask, error, 0.0))


def _keyword_mask(targets: Array, count_padding: bool) -> Array:
    mask = targets != schema.PAD_ID
    # A row without keywords has no target, so its padding does not count either.
    return jnp.broadcast_to(jnp.any(mask, axis=-1, keepdims=True), mask.shape) if count_padding else mask


def keyword_loss_sum(
    logits: Array, targets: Array, count_padding: bool = False, weights: Array | None = None
) -> tuple[Array, Array]:
    """Sum of the cross-entropy over targets that are not padding, and how many of these have the largest logit.

    Args:
      logits: float32[B, T, V]. targets: int32[B, T], 0 = padding.
      count_padding: padding after a target counts as a target too, as in the first author's PyTorch release.
      weights: float32[B, T], of each target's cross-entropy; 1 by default.

    Returns:
      float32 scalars: the sum and the number.
    """
    mask = _keyword_mask(targets, count_padding)
    # A masked sum stays local when the vocabulary is sharded; a gather would not.
    is_target = jnp.arange(logits.shape[-1])[None, None, :] == targets[..., None]
    target_logits = jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1)  # [B, T]
    loss = jax.nn.logsumexp(logits, axis=-1) - target_logits
    if weights is not None:
        loss = loss * weights
    correct = jnp.argmax(logits, axis=-1) == targets
    return jnp.sum(jnp.where(mask, loss, 0.0)), jnp.sum(mask & correct, dtype=jnp.float32)


def word_loss_sum(logits: Array, labels: Array, weights: Array) -> Array:
    """Weighted sum of the cross-entropies of words: whether each is misaligned.

    Args:
      logits: float32[B, L]. labels: bool[B, L], True = misaligned. weights: float32[B, L], 0 for what has no label.
    """
    loss = jax.nn.softplus(logits) - jnp.where(labels, logits, 0.0)
    return jnp.sum(jnp.where(weights > 0, weights * loss, 0.0))


def rahf_loss(
    outputs: Outputs,
    batch: Mapping[str, Array],
    normalisers: Mapping[str, Array],
    weights: Mapping[str, float],
    count_padding: bool = False,
    heatmap_loss: str = "mse",
    word_weight: float = 1.0,
) -> tuple[Array, dict[str, Array]]:
    """The weighted sum of score MSE, heatmap MSE and keyword cross-entropy.

    Args:
      outputs: the model's forward pass on `batch`. What it does not predict has no loss and no metric.
      batch: `scores`, `score_mask`, `heatmaps`, `heatmap_mask` and `keyword_ids` of richhf_data/schema.py; and, if they are
        not all 1, `keyword_weights`; and, for a model with a word head, `word_labels` and `word_weights` (sources.py).
      normalisers: `loss_normalisers` of the optimiser's batch, of which `batch` is a part or the whole.
      weights: `score`, `heatmap`, `keyword`.
      count_padding: see `keyword_loss_sum`; `normalisers` must be made with the same.
      heatmap_loss: see `heatmap_loss_sum`. word_weight: of the loss of the word head (`word_loss_sum`).

    Returns:
      float32 scalar loss; metrics `loss`, `loss_score`, `loss_heatmap`, `loss_keyword` (before weighting) and
      `keyword_accuracy` (of teacher-forced ids). Summed over microbatches with the same `normalisers` they are those of the
      whole batch. A kind without any target gives 0. With deviations their `loss_deviation` is added to the loss as it is:
      it trains their own layers alone.

    Raises:
      UserError: other names in `weights`; heatmap targets of another resolution than the model's.
    """
    if set(weights) != set(DEFAULT_WEIGHTS):
        raise UserError(f"loss weights: got {sorted(weights)}, expected exactly {sorted(DEFAULT_WEIGHTS)}")
    divide = {name: jnp.maximum(normalisers[name], 1.0) for name in DEFAULT_WEIGHTS}  # 0 / 1 without targets

    losses, metrics = {}, {}
    if outputs.scores is not None:
        losses["score"] = score_loss_sum(outputs.scores, batch["scores"], batch["score_mask"]) / divide["score"]
    if outputs.heatmaps is not None:
        total = heatmap_loss_sum(outputs.heatmaps, batch["heatmaps"], batch["heatmap_mask"], heatmap_loss)
        losses["heatmap"] = total / divide["heatmap"]
    if outputs.keyword_logits is not None:
        targets, of_targets = batch["keyword_ids"], batch.get("keyword_weights")
        total, correct = keyword_loss_sum(outputs.keyword_logits, targets, count_padding, of_targets)
        losses["keyword"], metrics["keyword_accuracy"] = total / divide["keyword"], correct / divide["keyword"]
    loss = sum(weights[name] * value for name, value in losses.items())
    if outputs.deviations is not None:
        total = deviation_loss_sum(outputs.deviations, outputs.scores, batch["scores"], batch["score_mask"])
        losses["deviation"] = total / divide["score"]
        loss += losses["deviation"]
    if outputs.word_logits is not None:
        total = word_loss_sum(outputs.word_logits, batch["word_labels"], batch["word_weights"])
        losses["word"] = total / jnp.maximum(normalisers["word"], 1.0)
        loss += word_weight * losses["word"]
    return loss, {"loss": loss, **{f"loss_{name}": value for name, value in losses.items()}, **metrics}
