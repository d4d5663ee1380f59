"""The judges: a convolutional network that says whether a picture has an artifact, and what it shows.

They replace people and are used for verdicts alone. The network is that of `benchmarks.alignment.judge`, trained on the
exact truth of renders, half of which went through the VAE as the generator's pictures do.
"""

import pathlib
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import numpy as np
import optax

from benchmarks.alignment import drawings, judge
from benchmarks.alignment.optimise import optimise
from benchmarks.feedback import pictures
from rahf import weights
from rahf.models.parameters import param_shapes
from rahf.reward import predict, prompts
from richhf_data import json_files

CLASSES = (*((name, len(getattr(drawings.WORDS, name))) for name in prompts.CATEGORIES), ("artifact", 2))
FACTS = prompts.CATEGORIES


class Judges(judge.Judge):
    """`judges(images, prompts)` says whether each category is right, as `judge.Judge`; `artifact(images)` the other."""

    def artifact(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """The probability that a picture has an artifact, float32[B]."""
        logits = self._read(images)[1]["artifact"]
        return np.asarray(jax.nn.softmax(logits)[:, 1])

    def __call__(self, images, texts):
        return super().__call__(images, texts) | {"no_artifact": (self.artifact(images) < 0.5).astype(np.float32)}


def _network() -> judge.Network:
    return judge.Network(CLASSES, judge.WIDTHS)


def _arrays(table, through: Callable) -> dict[str, np.ndarray]:
    shown = [drawings.WORDS.parse(text) for text in table["shown"].to_pylist()]
    images = pictures.half_through(drawings.images(table), through)
    return {"image": images, "artifact": np.array(table["artifact"].to_pylist(), np.int32)} | judge._labels(
        shown, drawings.WORDS
    )


def fit(folder, config, seed: int, through: Callable) -> dict[str, float]:
    """Trains the judges and writes them; returns their accuracy on held-out renders, also in config.json, written last."""
    folder = pathlib.Path(folder)
    arrays = _arrays(pictures.table(config.train, seed, 0.5, 0.0), through)
    network = _network()
    params = nn.unbox(jax.jit(network.init)(jax.random.key(seed), arrays["image"][:1]))["params"]

    def loss(params, batch, key):
        _, logits = network.apply({"params": params}, judge.disturb(batch["image"], key))
        losses = {name: optax.softmax_cross_entropy_with_integer_labels(logits[name], batch[name]).mean() for name in logits}
        return sum(losses.values()), losses

    options = dict(steps=config.steps, batch_size=judge.BATCH, learning_rate=5e-3, seed=seed, name="judges")
    params = optimise(loss, params, arrays, **options)
    predict.write_params(params, folder / "weights.safetensors")
    table = pictures.table(config.held_out, seed + 1, 0.5, 0.0)
    found = accuracy(_judges(params), table, through)
    json_files.write(folder / "config.json", {"kind": "judges", "accuracy": found})
    return found


def accuracy(judges: Judges, table, through: Callable) -> dict[str, float]:
    """Share of pictures that the judges read right: each category, "all" of them, "artifact"; half through the VAE."""
    arrays = _arrays(table, through)
    right = judges(arrays["image"], table["shown"].to_pylist())
    found = {name: float(right[name].mean()) for name in (*FACTS, "all")}
    return found | {"artifact": float(np.mean((judges.artifact(arrays["image"]) >= 0.5) == arrays["artifact"]))}


def _judges(params) -> Judges:
    return Judges(drawings.WORDS, drawings.SIZE, _network(), params)


def load(folder) -> Judges:
    """Reads the judges that `fit` wrote."""
    size = drawings.SIZE
    shapes = param_shapes(_network().init, np.zeros((1, size, size, 3), np.uint8))
    return _judges(weights.read_params(pathlib.Path(folder) / "weights.safetensors", shapes))
