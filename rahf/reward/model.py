"""The reward r(x, z) of paper B: an MLP on features of an image and of a prompt, its loss, and its training.

The features can come from any network; `train.py` uses CLIP's embeddings.
"""

import dataclasses
import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm.auto import tqdm

from rahf import experiments, optimizers
from richhf_data import ranges, schema
from richhf_data.errors import UserError

Array = jax.Array
# Of what `fit` reads of a config; for `experiments.check_ranges`.
RANGES = {
    "seed": ranges.SEED,
    "model.hidden": ranges.Each(ranges.Range(1, 2**16, whole=True)),
    "loss.num_prompts": ranges.Range(2, 10_000, whole=True),  # the image's own included
    "loss.temperature": ranges.POSITIVE,
    "loss.classification_weight": ranges.WEIGHT,
    "train.batch_size": ranges.ROWS,
    "train.num_steps": ranges.COUNT,
    "train.learning_rate": optimizers.LEARNING_RATE,
    "train.weight_decay": ranges.WEIGHT,
    "train.eval_every": ranges.COUNT,
    "train.patience": ranges.COUNT,
}
partitioned = nn.with_logical_partitioning


class RewardMLP(nn.Module):
    """Features of an image and of a text -> reward in [0, 1].

    Each feature vector is scaled to a root mean square of 1. The first layer is one dense layer on both vectors
    concatenated, written as two products so that a prompt's product can be shared by many images.
    """

    hidden: tuple[int, ...] = (1024, 1024)

    @nn.compact
    def __call__(self, image: Array, text: Array) -> Array:
        """float32[..., E], float32[..., D] -> float32[...]; leading dimensions of size 1 are broadcast."""

        def dense(features, axes, scale, name, use_bias=True):
            return nn.Dense(
                features,
                use_bias=use_bias,
                kernel_init=partitioned(nn.initializers.variance_scaling(scale, "fan_in", "truncated_normal"), axes),
                bias_init=partitioned(nn.initializers.zeros, axes[1:]),
                name=name,
            )

        of_image = dense(self.hidden[0], ("embed", "mlp"), 1.0, "image")(_scaled(image))
        of_text = dense(self.hidden[0], ("embed", "mlp"), 1.0, "text", use_bias=False)(_scaled(text))
        x, axes = nn.relu(of_image + of_text), ("embed", "mlp")
        for i, features in enumerate(self.hidden[1:]):
            axes = axes[::-1]  # "model" shards the outputs of one layer and the inputs of the next, in turn
            x = nn.relu(dense(features, axes, 2.0, f"hidden_{i}")(x))
        return nn.sigmoid(dense(1, (axes[1], None), 1.0, "out")(x)[..., 0])


def _scaled(x):
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-12)


@dataclasses.dataclass(frozen=True)
class Features:
    """Training data: features of labelled images, of their prompts, and of each prompt's negatives.

    Attributes:
      image: float32[n, E]. label: float32[n], 0 or 1. prompt: int32[n], rows of `text`.
      text: float32[P, D], features of the prompts and of their negatives.
      negatives: int32[P, K], rows of `text` with prompts that say something else; ignored where the odds are 0.
      odds: float32[P, K], 0 or more: how likely each negative is drawn; 0 = absent.
    """

    image: np.ndarray
    label: np.ndarray
    prompt: np.ndarray
    text: np.ndarray
    negatives: np.ndarray
    odds: np.ndarray

    def __post_init__(self):
        (n, prompts), k = (len(self.label), len(self.text)), self.negatives.shape[-1]
        wanted = {"image": (n, self.image.shape[-1]), "prompt": (n,), "label": (n,), "text": (prompts, self.text.shape[-1])}
        for name, shape in (wanted | {"negatives": (prompts, k), "odds": (prompts, k)}).items():
            if getattr(self, name).shape != shape:
                raise UserError(f"features.{name}: got shape {getattr(self, name).shape}, expected {shape}")
        for name in ("image", "text"):
            if not np.isfinite(getattr(self, name)).all():
                raise UserError(f"features.{name}: got values that are not finite")


def draw_negatives(key: Array, negatives: Array, odds: Array, number: int) -> tuple[Array, Array]:
    """Draws `number` negatives of each prompt without replacement, with probabilities in proportion to their odds.

    Args:
      negatives: int32[B, K]. odds: float32[B, K].

    Returns:
      int32[B, number], and bool[B, number]: False where a prompt has fewer negatives.
    """
    number, missing = min(number, negatives.shape[1]), max(number - negatives.shape[1], 0)
    gumbel = jax.random.gumbel(key, odds.shape)  # Gumbel top-k trick
    places = jax.lax.top_k(jnp.where(odds > 0, jnp.log(odds) + gumbel, -jnp.inf), number)[1]
    drawn, there = (jnp.take_along_axis(x, places, axis=1) for x in (negatives, odds > 0))
    return jnp.pad(drawn, ((0, 0), (0, missing))), jnp.pad(there, ((0, 0), (0, missing)))


def reward_loss(
    rewards: Array, label: Array, there: Array, temperature: float, classification_weight: float
) -> tuple[Array, dict[str, Array]]:
    """Paper B's loss: mean squared error to the label, plus lambda times the loss of prompt classification.

    Prompt classification: softmax(rewards / T) must choose the image's own prompt among N. Its cross-entropy is averaged
    over the samples that have label 1 and a negative.

    Args:
      rewards: float32[B, N], with the image's own prompt first. label: float32[B], 0 or 1.
      there: bool[B, N], False for padding; the first column is True.
      temperature: T. classification_weight: lambda.

    Returns:
      The loss, and {"loss", "mse", "classification"}.
    """
    mse = jnp.mean(jnp.square(rewards[:, 0] - label))
    logits = jnp.where(there, rewards / temperature, -jnp.inf)
    entropy = jax.nn.logsumexp(logits, axis=1) - logits[:, 0]
    counts = label * there[:, 1:].any(axis=1).astype(jnp.float32)
    classification = jnp.sum(counts * entropy) / jnp.maximum(jnp.sum(counts), 1.0)
    loss = mse + classification_weight * classification
    return loss, {"loss": loss, "mse": mse, "classification": classification}


def init(model: RewardMLP, image_width: int, text_width: int, key: Array) -> dict:
    """New parameters, boxed with their logical axes."""
    return model.init(key, jnp.zeros((1, image_width)), jnp.zeros((1, text_width)))["params"]


@functools.partial(jax.jit, static_argnames="model")
def _apply(model, params, image, text):
    return model.apply({"params": params}, image, text)


def predict(model: RewardMLP, params, image: np.ndarray, text: np.ndarray, batch_size: int = 512) -> np.ndarray:
    """float32[n, E], float32[n, D] -> float32[n] in [0, 1]."""
    out = np.zeros(len(image), np.float32)
    for i in range(0, len(image), batch_size):
        rows = [x[i : i + batch_size] for x in (image, text)]
        size = len(rows[0])
        padded = [schema.pad_rows(x, size + -size % min(batch_size, 32)) for x in rows]
        out[i : i + size] = np.asarray(_apply(model, params, *padded))[:size]
    return out


def fit(
    features: Features,
    train: np.ndarray,
    validation: np.ndarray,
    config,
    on_best: Callable[[dict, dict], None] = lambda params, metrics: None,
    log: Callable[[dict, int], None] = lambda values, step: None,
) -> tuple[dict, dict]:
    """Trains a reward model. The result depends only on `config` and the arrays.

    Args:
      train, validation: int[...], rows of `features`.
      config: with `seed`, `model.hidden`, `loss` (temperature, classification_weight, num_prompts) and `train`.
      on_best: called with the parameters and `{"step", "validation_mse"}` after each validation that is the best so far.
      log: called with {"loss", "mse", "classification", "validation_mse"} and the step after each validation.

    Returns:
      The parameters with the lowest validation error, and their `{"step", "validation_mse"}`.

    Raises:
      UserError: an empty part, a setting out of its range, or a loss that is not finite.
    """
    experiments.check_ranges(config, RANGES)
    _check_parts(train, validation)
    settings, loss = config.train, config.loss
    model = RewardMLP(tuple(config.model.hidden))
    schedule = optax.cosine_decay_schedule(settings.learning_rate, settings.num_steps)
    optimizer = optax.adamw(schedule, weight_decay=settings.weight_decay)
    init_key, step_key = jax.random.split(jax.random.key(config.seed))
    params = nn.unbox(init(model, features.image.shape[1], features.text.shape[1], init_key))
    opt_state = optimizer.init(params)
    num_negatives = loss.num_prompts - 1 if loss.classification_weight else 0
    tables = {field.name: jnp.asarray(getattr(features, field.name)) for field in dataclasses.fields(features)}

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, opt_state, tables, rows, key):
        own = tables["prompt"][rows]
        drawn, there = draw_negatives(key, tables["negatives"][own], tables["odds"][own], num_negatives)
        there = jnp.concatenate([jnp.ones((len(rows), 1), bool), there], axis=1)
        text = tables["text"][jnp.concatenate([own[:, None], drawn], axis=1)]  # [B, N, D]
        image, label = tables["image"][rows][:, None], tables["label"][rows]

        def loss_fn(params):
            rewards = model.apply({"params": params}, image, text)  # [B, N]
            return reward_loss(rewards, label, there, loss.temperature, loss.classification_weight)

        grads, metrics = jax.grad(loss_fn, has_aux=True)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, metrics

    held_out = features.image[validation], features.text[features.prompt[validation]]
    best, best_params, since = None, None, 0
    with tqdm(desc="train", total=settings.num_steps, unit="step", dynamic_ncols=True) as bar:
        for i, rows in zip(range(settings.num_steps), _batches(train, settings.batch_size, config.seed), strict=False):
            params, opt_state, metrics = step(params, opt_state, tables, rows, jax.random.fold_in(step_key, i))
            bar.update()
            if (i + 1) % settings.eval_every and i + 1 < settings.num_steps:
                continue
            if not np.isfinite(value := float(metrics["loss"])):
                raise UserError(f"train: the loss is {value} at step {i + 1}; lower --config.train.learning_rate")
            mse = float(np.mean(np.square(predict(model, params, *held_out) - features.label[validation])))
            bar.set_postfix(loss=f"{value:.4f}", validation_mse=f"{mse:.4f}")
            log({name: float(x) for name, x in metrics.items()} | {"validation_mse": mse}, i + 1)
            since += 1
            if best is None or mse < best["validation_mse"]:
                best, best_params, since = {"step": i + 1, "validation_mse": mse}, jax.device_get(params), 0
                on_best(best_params, best)
            if since >= settings.patience:
                break
    return best_params, best


def _batches(rows: np.ndarray, size: int, seed: int):
    """Endless batches int32[size], or of all rows if there are fewer. Each epoch has every row once."""
    rng, size = np.random.default_rng(seed), min(size, len(rows))
    left = rows[:0]
    while True:
        while len(left) < size:
            left = np.concatenate([left, rng.permutation(rows)])
        yield left[:size].astype(np.int32)
        left = left[size:]


def _check_parts(train, validation) -> None:
    for name, rows in (("training", train), ("validation", validation)):
        if not len(rows):
            raise UserError(f"feedback: the {name} part is empty, expected at least one row; more feedback is needed")
