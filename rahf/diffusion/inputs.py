"""What the frozen parts of a Stable Diffusion make of tables of pictures, kept on disk, and the batches drawn from it.

    cache/<model>/latents-*.npy    the VAE's posterior of each image
    cache/<model>/texts-*.npy      the text encoder's output for each different prompt
    cache/rewards-*.npy            the reward of each of the model's own images
"""

import dataclasses
import functools
import hashlib
import io
import itertools
import json
import pathlib
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from tqdm.auto import tqdm

from rahf import checkpoints, partitioning
from rahf.diffusion import folder
from rahf.reward import embed, sources
from rahf.reward.feedback import Pictures

AT_ONCE = 16  # images or texts per device that the frozen parts read
REWARDED_AT_ONCE = 64  # images that a reward is given
SAVE_EVERY = 8  # batches of them between two saves of the cache


@dataclasses.dataclass(frozen=True)
class Rows:
    """Images and prompts as the UNet sees them.

    Attributes:
      moments: float32[n, h, w, 2Z], on disk. text: int32[n], rows of the texts' embeddings.
      weight: float32[n] at least 0; the rows with 0 are never drawn.
    """

    moments: np.ndarray
    text: np.ndarray
    weight: np.ndarray

    def drawn(self, seed: int, purpose: int, first: int, count: int) -> np.ndarray:
        """int64[count]: rows of the endless order from place `first` on; each comes once before any comes again."""
        rows = np.flatnonzero(self.weight)
        places = np.arange(first, first + count)
        orders = {e: np.random.default_rng((seed, purpose, e)).permutation(rows) for e in np.unique(places // len(rows))}
        return np.array([orders[place // len(rows)][place % len(rows)] for place in places], np.int64)


def batches(
    own: Rows | None, pretraining: Rows | None, contexts: np.ndarray, config, rows: np.ndarray, start: int
) -> Iterator[dict[str, np.ndarray]]:
    """Endless batches from step `start` on, as `make_loss` reads them; a step's is a function of the seed and the step.

    Args:
      contexts: float32[texts, L, D], the last of them the empty prompt's. rows: those of the global batch to give.
    """
    size = config.train.batch_size
    of_pretraining = size if own is None else 0 if pretraining is None else round(config.train.pretraining_share * size)
    parts = [(own, size - of_pretraining), (pretraining, of_pretraining)]
    for step in itertools.count(start):
        batch = {name: [] for name in ("moments", "text", "weight", "pretraining")}
        for purpose, (table, count) in enumerate(parts):
            if count:
                first = purpose * (size - of_pretraining)  # place of its first row in the batch
                kept = rows[(rows >= first) & (rows < first + count)] - first
                drawn = table.drawn(config.seed, purpose, step * count, count)[kept]
                batch["moments"].append(table.moments[drawn])
                batch["text"].append(table.text[drawn])
                batch["weight"].append(table.weight[drawn] * (1 - purpose))
                batch["pretraining"].append(np.full(len(drawn), purpose, np.float32))
        batch = {name: np.concatenate(arrays) for name, arrays in batch.items()}
        dropped = np.random.default_rng((config.seed, 2, step)).random(size)[rows] < config.train.text_dropout
        batch["context"] = contexts[np.where(dropped, len(contexts) - 1, batch.pop("text"))]
        yield {name: array.astype(np.float32, copy=False) for name, array in batch.items()}


def batch_shapes(model: folder.Config, size: int) -> dict[str, tuple[int, ...]]:
    """{name: shape} of a batch, float32."""
    grid, text = model.unet.sample_size, model.text.text
    return {
        "moments": (size, grid, grid, 2 * model.vae.latent_channels),
        "weight": (size,),
        "pretraining": (size,),
        "context": (size, text.length, text.width),
    }


def kept(
    place: pathlib.Path, shape: tuple[int, ...], parts: Callable[[int], Iterator[np.ndarray]], dtype=np.float32
) -> np.ndarray:
    """An array on disk, dtype[*shape], computed part by part; goes on where a killed run left it.

    parts: the number of rows that are there -> arrays of the rows from there on.
    """
    done_file, done = place.with_suffix(".json"), 0
    place.parent.mkdir(parents=True, exist_ok=True)
    if done_file.is_file():
        array, done = np.lib.format.open_memmap(place, "r+"), checkpoints.read_json(done_file)["rows"]
    else:
        array = np.lib.format.open_memmap(place, "w+", dtype, shape)
    if array.shape != shape:
        raise ValueError(f"cache: {place} has the shape {array.shape}, expected {shape}; delete it, it is made again")
    for i, part in enumerate(parts(done) if done < len(array) else (), 1):
        array[done : done + len(part)] = part
        done += len(part)
        if i % SAVE_EVERY == 0 or done == len(array):
            array.flush()
            checkpoints.write_json(done_file, {"rows": done})
    return np.load(place, mmap_mode="r")


def decoded(pictures: Pictures, size: int, resize: bool, start: int = 0) -> Iterator[np.ndarray]:
    """uint8[size, size, 3] of each picture of a table.

    Raises:
      ValueError: one of another size, unless `resize`; names the row.
    """
    for where, encoded in itertools.islice(pictures.images(), start, None):
        image = embed.decode(encoded, where)
        if image.shape[:2] != (size, size) and not resize:
            raise ValueError(
                f"{where}: image: got {image.shape[1]} x {image.shape[0]} pixels, expected {size} x {size}, what the UNet "
                "was trained on; --config.data.resize=True scales and crops"
            )
        yield embed.prepare(image, size)


def frozen(model: folder.StableDiffusion, part: str, method: str, mesh) -> tuple[Callable[[np.ndarray], np.ndarray], int]:
    """A method of a frozen part, as a function of numpy arrays, and how many rows it reads at most: `AT_ONCE` a device."""
    module, rows = model.config.modules[part], AT_ONCE * partitioning.sizes(mesh)["data"]

    @functools.partial(jax.jit, out_shardings=partitioning.replicated(mesh))
    def apply(params, x):
        outputs = module.apply({"params": params}, x, method=method)
        return jnp.concatenate(jax.tree.leaves(outputs), axis=-1)

    def call(x):
        padded = np.pad(x, [(0, rows - len(x))] + [(0, 0)] * (x.ndim - 1), mode="edge")
        with partitioning.activate(mesh):
            placed = partitioning.place(padded, partitioning.batch_sharding(mesh))
            return np.asarray(apply(model.params[part], placed))[: len(x)]

    return call, rows


def parts_of(items: Iterator, size: int, desc: str, total: int, done: int) -> Iterator[np.ndarray]:
    """The items, `size` of them stacked at a time, the last ones fewer; with a progress bar over them."""
    with tqdm(desc=desc, total=total, initial=done, dynamic_ncols=True, disable=jax.process_index() > 0) as bar:
        while part := list(itertools.islice(items, size)):
            yield np.stack(part)
            bar.update(len(part))


def identity(*parts) -> str:
    """A name for what texts, numbers and files hold; of a file its length and its end count."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, pathlib.Path):
            with part.open("rb") as file:
                length = file.seek(0, io.SEEK_END)
                file.seek(max(0, length - 2**20))
                part = [length, hashlib.sha256(file.read()).hexdigest()]
        digest.update(json.dumps(part).encode())
    return digest.hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The tables of a config, checked, and what the frozen parts make of them when asked to.

    Attributes:
      tables: {"images", "pretraining"} -> Pictures, those that the config names. texts: the different prompts, then "".
    """

    config: object
    model: folder.StableDiffusion
    tables: dict[str, Pictures]
    texts: list[str]

    @classmethod
    def of(cls, config, model: folder.StableDiffusion):
        """Raises ValueError: no table, one that cannot be read, or a prompt that is too long; names the row."""
        if not config.data.images and not config.data.pretraining:
            raise ValueError("data: got neither images nor pretraining, expected a table: --config.data.images=FILE")
        tables = {name: Pictures(config.data[name]) for name in ("images", "pretraining") if config.data[name]}
        for name, table in tables.items():
            rows = {prompt: row for row, prompt in reversed(list(enumerate(table.prompts, 1)))}
            for prompt, row in rows.items():
                try:
                    model.text_ids([prompt], config.data.truncate_long_prompts)
                except ValueError as error:
                    hint = "--config.data.truncate_long_prompts=True drops ends"
                    raise ValueError(f"data.{name}: {table.path}: row {row}: {error}; {hint}") from error
        prompts = dict.fromkeys(prompt for table in tables.values() for prompt in table.prompts if prompt)
        return cls(config, model, tables, [*prompts, ""])

    def contexts(self, cache: pathlib.Path, mesh) -> np.ndarray:
        """float32[texts, L, D]."""
        encode, rows = frozen(self.model, "text_encoder", "text_tokens", mesh)
        tower = self.model.config.text.text

        def parts(done):
            for texts in parts_of(iter(self.texts[done:]), rows, "texts", len(self.texts), done):
                yield encode(self.model.text_ids(texts.tolist(), self.config.data.truncate_long_prompts))

        return kept(cache / f"texts-{identity(self.texts)}.npy", (len(self.texts), tower.length, tower.width), parts)

    def moments(self, name: str, cache: pathlib.Path, mesh) -> np.ndarray:
        """Of a table: float32[n, h, w, 2Z]."""
        encode, rows = frozen(self.model, "vae", "encode", mesh)
        table, unet = self.tables[name], self.model.config.unet
        size, resize = unet.sample_size * self.model.config.vae.factor, self.config.data.resize

        def parts(done):
            images = decoded(table, size, resize, done)
            return map(encode, parts_of(images, rows, f"{name}: latents", len(table), done))

        shape = len(table), unet.sample_size, unet.sample_size, 2 * self.model.config.vae.latent_channels
        return kept(cache / f"latents-{identity(table.path, size, resize)}.npy", shape, parts)

    def rewards(self, reward: Callable, cache: pathlib.Path) -> np.ndarray:
        """Of the model's own images: float32[n].

        Raises:
          ValueError: what the reward gives is no finite number for each image.
        """
        table = self.tables["images"]

        def parts(done):
            images = (embed.decode(encoded, where) for where, encoded in itertools.islice(table.images(), done, None))
            prompts = iter(table.prompts[done:])
            for part in parts_of(images, REWARDED_AT_ONCE, "rewards", len(table), done):
                yield sources.checked(reward, part, list(itertools.islice(prompts, len(part))))

        return kept(cache / f"rewards-{identity(table.path)}.npy", (len(table),), parts)

    def rows(self, name: str, moments: np.ndarray, weight: np.ndarray) -> Rows:
        """A table's rows, their moments and weights given."""
        numbers = {text: i for i, text in enumerate(self.texts)}
        return Rows(moments, np.array([numbers[prompt] for prompt in self.tables[name].prompts], np.int32), weight)
