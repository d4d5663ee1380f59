"""The judge: a small convolutional network that recognises count, colour, thing and background of a picture.

It replaces the raters. It is trained on clean renders, slightly blurred, shifted and tinted, so that it also recognises the
pictures of a diffusion model.
"""

import dataclasses
import pathlib
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.alignment import drawings
from benchmarks.alignment.optimise import optimise
from rahf import weights
from rahf.diffusion.blocks import ResnetBlock
from rahf.models.layers import Conv, GroupNorm, normalize_image
from rahf.models.parameters import param_shapes
from rahf.reward import embed, predict, prompts
from richhf_data import json_files
from richhf_data.errors import UserError

Array = jax.Array
BATCH = 128
GROUPS = 8
WIDTHS = (48, 96, 128)


class Network(nn.Module):
    """Pictures -> features, and for each category the logits of its words.

    classes: (category, number of words) pairs.
    """

    classes: tuple[tuple[str, int], ...]
    widths: tuple[int, ...]  # each stage but the first halves the resolution
    num_features: int = 128

    @nn.compact
    def __call__(self, image: Array) -> tuple[Array, dict[str, Array]]:
        """float32[B, S, S, 3] in [-1, 1], or uint8 -> float32[B, num_features], {category: float32[B, words]}."""
        image = normalize_image(image)
        batch, size = image.shape[:2]
        x = image.reshape(batch, size // 2, 2, size // 2, 2, 3).transpose(0, 1, 3, 2, 4, 5)
        x = x.reshape(batch, size // 2, size // 2, 12)
        for i, width in enumerate(self.widths):
            x = Conv(width, stride=2 if i else 1, name=f"conv_{i}")(x)
            x = ResnetBlock(width, GROUPS, 1e-5, jnp.float32, name=f"block_{i}")(x)
        x = nn.silu(GroupNorm(GROUPS, 1e-5, name="norm")(x)).reshape(batch, -1)
        features = nn.silu(nn.Dense(self.num_features, name="features")(x))
        return features, {name: nn.Dense(number, name=name)(features) for name, number in self.classes}


def disturb(image: Array, key: Array) -> Array:
    """uint8[B, S, S, 3] -> float32 in about [-1, 1]: randomly mirrored, slightly shifted, blurred, tinted and noisy."""
    keys, batch, size = jax.random.split(key, 6), image.shape[0], image.shape[1]
    x = normalize_image(image)
    x = jnp.where(jax.random.bernoulli(keys[0], shape=(batch, 1, 1, 1)), x[:, :, ::-1], x)
    shift = jax.random.randint(keys[1], (2,), 0, 5)  # one for the whole batch
    x = jnp.pad(x, ((0, 0), (2, 2), (2, 2), (0, 0)), mode="edge")
    x = jax.lax.dynamic_slice(x, (0, shift[0], shift[1], 0), (batch, size, size, 3))
    soft = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    soft = (soft[:, :-2] + 2 * soft[:, 1:-1] + soft[:, 2:]) / 4
    soft = (soft[:, :, :-2] + 2 * soft[:, :, 1:-1] + soft[:, :, 2:]) / 4
    x = x + jax.random.uniform(keys[2], (batch, 1, 1, 1)) * (soft - x)
    gain, bias = jax.random.uniform(keys[3], (2, batch, 1, 1, 3), minval=-0.1, maxval=0.1)
    x = x * (1 + gain) + bias
    grain = jax.random.uniform(keys[4], (batch, 1, 1, 1), maxval=0.15)
    return x + grain * jax.random.normal(keys[5], x.shape)


def _labels(shown: Sequence[prompts.ParsedPrompt], words: prompts.Words) -> dict[str, np.ndarray]:
    return {
        name: np.array([getattr(words, name).index(getattr(prompt, name)) for prompt in shown], np.int32)
        for name in prompts.CATEGORIES
    }


def _network(words: prompts.Words, widths: Sequence[int]) -> Network:
    return Network(tuple((name, len(getattr(words, name))) for name in prompts.CATEGORIES), tuple(widths))


class Judge:
    """`judge(images, prompts)`: whether each category that a prompt names is drawn correctly.

    Attributes:
      words: prompts.Words, the words that it distinguishes. size: pixels of its input, both sides.
    """

    def __init__(self, words: prompts.Words, size: int, network: Network, params):
        self.words, self.size, self._params = words, size, params
        self._apply = jax.jit(lambda params, image: network.apply({"params": params}, image))

    def _read(self, images):
        found = []
        for i in range(0, len(images), BATCH):
            batch = np.stack([embed.prepare(np.asarray(image), self.size) for image in images[i : i + BATCH]])
            padded = np.pad(batch, ((0, BATCH - len(batch)), (0, 0), (0, 0), (0, 0)), mode="edge")  # one shape
            out, rows = jax.device_get(self._apply(self._params, padded)), len(batch)
            found.append(jax.tree.map(lambda x, rows=rows: x[:rows], out))
        if not found:
            raise UserError("judge: got no images, expected at least one")
        return jax.tree.map(lambda *parts: np.concatenate(parts), *found)

    def features(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """uint8[B, H, W, 3], or B of them of any sizes -> float32[B, D], the features before the output layers: for FID."""
        return self._read(images)[0]

    def facts(self, images: Sequence[np.ndarray]) -> list[prompts.ParsedPrompt]:
        """The most probable prompt of each picture."""
        logits = self._read(images)[1]
        best = {name: logits[name].argmax(axis=1) for name in prompts.CATEGORIES}
        return [
            prompts.ParsedPrompt(**{name: getattr(self.words, name)[best[name][i]] for name in prompts.CATEGORIES})
            for i in range(len(images))
        ]

    def __call__(self, images: Sequence[np.ndarray], texts: Sequence[str]) -> dict[str, np.ndarray]:
        """B pictures and prompts -> {category, "all": float32[B]}: 1 right, 0 wrong, nan where the prompt leaves it open.

        Raises:
          UserError: different numbers of pictures and prompts, or a prompt that the lists cannot make.
        """
        if len(images) != len(texts):
            raise UserError(f"judge: got {len(images)} images and {len(texts)} prompts, expected equal numbers")
        asked = [self.words.parse(text) for text in texts]
        if foreign := [text for text, prompt in zip(texts, asked, strict=True) if prompt is None]:
            raise UserError(f"judge: got the prompt {foreign[0]!r}, expected one made of {self.words}")
        facts, verdict = self.facts(images), {}
        for name in prompts.CATEGORIES:
            pairs = [(getattr(prompt, name), getattr(seen, name)) for prompt, seen in zip(asked, facts, strict=True)]
            verdict[name] = np.array([np.nan if word is None else word == seen for word, seen in pairs], np.float32)
        return verdict | {"all": np.nanmin(list(verdict.values()), axis=0)}


def accuracy(judge: Judge, images: Sequence[np.ndarray], shown: Sequence[str]) -> dict[str, float]:
    """{category, "all": share of pictures that the judge recognises as `shown` says}."""
    return {name: float(verdict.mean()) for name, verdict in judge(images, shown).items()}


def fit(
    folder,
    *,
    number: int = 30_000,
    steps: int = 800,
    learning_rate: float = 5e-3,
    seed: int = 10,
    words: prompts.Words = drawings.WORDS,
    size: int = drawings.SIZE,
    widths: Sequence[int] = WIDTHS,
    held_out: int = 2_000,
    workers: int | None = None,
) -> dict[str, float]:
    """Draws clean pictures, trains a judge on them, and writes it to a folder.

    Args:
      number, held_out: pictures to train on, and to measure with.
      seed: of the pictures and of the training.

    Returns:
      Its accuracy by category on the held-out pictures, also in config.json, which is written last.
    """
    folder = pathlib.Path(folder)
    (folder / "config.json").unlink(missing_ok=True)  # it says that the folder is finished
    table = drawings.captioned(number, seed, 0.0, words, size, workers)
    arrays = {"image": drawings.images(table)} | _labels([words.parse(text) for text in table["shown"].to_pylist()], words)
    network = _network(words, widths)
    params = nn.unbox(jax.jit(network.init)(jax.random.key(seed), arrays["image"][:1]))["params"]

    def loss(params, batch, key):
        _, logits = network.apply({"params": params}, disturb(batch["image"], key))
        losses = {name: optax.softmax_cross_entropy_with_integer_labels(logits[name], batch[name]).mean() for name in logits}
        return sum(losses.values()), losses

    options = dict(steps=steps, batch_size=min(BATCH, number), learning_rate=learning_rate, seed=seed, name="judge")
    params = optimise(loss, params, arrays, **options)
    table = drawings.captioned(held_out, seed + 1, 0.0, words, size, workers)
    found = accuracy(Judge(words, size, network, params), drawings.images(table), table["shown"].to_pylist())
    predict.write_params(params, folder / "weights.safetensors")
    config = {"kind": "judge", "size": size, "widths": list(widths), "words": dataclasses.asdict(words)}
    json_files.write(folder / "config.json", config | {"accuracy": found})
    return found


def load(folder) -> Judge:
    """Reads a judge from a folder that `fit` wrote.

    Raises:
      UserError: no such folder, or tensors of unexpected shapes.
    """
    folder = pathlib.Path(folder)
    config = json_files.read(folder / "config.json") if (folder / "config.json").is_file() else {}
    if config.get("kind") != "judge":
        raise UserError(f"judge: got {folder}, expected a folder that judge.fit wrote")
    words, size = prompts.words_of(config["words"]), config["size"]
    network = _network(words, config["widths"])
    shapes = param_shapes(network.init, np.zeros((1, size, size, 3), np.uint8))
    return Judge(words, size, network, weights.read_params(folder / "weights.safetensors", shapes))
