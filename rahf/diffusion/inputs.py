"""What the frozen parts of a Stable Diffusion make of tables of pictures, kept on disk, and the batches drawn from it.

    cache/latents-*.npy    the VAE's posterior of each image, float32: 128 KiB for one of 512 pixels
    cache/texts-*.npy      the text encoder's output for each different prompt, float32: 231 KiB for Stable Diffusion's
    cache/rewards-*.npy    the reward of each of the model's own images

A file's name is a digest of all that it depends on.
"""

import dataclasses
import fcntl
import functools
import hashlib
import itertools
import json
import os
import pathlib
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from tqdm.auto import tqdm

from rahf import checkpoints, partitioning
from rahf.diffusion import folder
from rahf.reward import embed, sources
from rahf.reward.feedback import Pictures
from richhf_data import images, json_files, schema
from richhf_data.errors import UserError

AT_ONCE = 16  # images or texts per device that the frozen parts read
REWARDED_AT_ONCE = 64  # images that a reward is given
SAVE_EVERY = 8  # batches of them between two saves of the cache


@dataclasses.dataclass(frozen=True, eq=False)
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
        places = np.arange(first, first + count)
        size = np.count_nonzero(self.weight)
        return np.array([self._order(seed, purpose, place // size)[place % size] for place in places], np.int64)

    @functools.lru_cache(maxsize=4)  # noqa: B019  (two epochs of two tables, which live as long as the run)
    def _order(self, seed: int, purpose: int, epoch: int) -> np.ndarray:
        return np.random.default_rng((seed, purpose, epoch)).permutation(np.flatnonzero(self.weight))


def pretraining_rows(config) -> int:
    """How many rows of a batch are pre-training pairs, where there are both kinds."""
    return round(config.train.pretraining_share * config.train.batch_size)


def batches(
    own: Rows | None, pretraining: Rows | None, contexts: np.ndarray, config, rows: np.ndarray, start: int
) -> Iterator[dict[str, np.ndarray]]:
    """Endless batches from step `start` on, as `make_loss` reads them; a step's is a function of the seed and the step.

    Args:
      contexts: float32[texts, L, D], the last of them the empty prompt's. rows: those of the global batch to give.
    """
    size = config.train.batch_size
    of_pretraining = size if own is None else 0 if pretraining is None else pretraining_rows(config)
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

    A run that wants what another computes at this moment waits for it. Several hosts compute the same parts, each for its
    own disk, from where the one begins that has the fewest.

    Args:
      parts: the number of rows that are there -> arrays of the rows from there on.
    """
    done_file, done = place.with_suffix(".json"), 0
    place.parent.mkdir(parents=True, exist_ok=True)
    with place.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            found = np.load(place, mmap_mode="r")
            if found.shape == shape and found.dtype == dtype:
                done = json_files.read(done_file)["rows"]
        except (OSError, ValueError, KeyError):  # not there, cut short, or not told how far it is: anew
            done = 0
        if jax.process_count() > 1:
            done = int(np.min(multihost_utils.process_allgather(np.int64(done))))
        if done == shape[0]:
            return np.load(place, mmap_mode="r")
        if not done:
            done_file.unlink(missing_ok=True)
        array = np.lib.format.open_memmap(place, "r+" if done else "w+", dtype, shape)
        with place.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)  # a full disk is told now
        for i, part in enumerate(parts(done), 1):
            array[done : done + len(part)] = part
            done += len(part)
            if i % SAVE_EVERY == 0 or done == shape[0]:
                array.flush()
                json_files.write(done_file, {"rows": done})
    return np.load(place, mmap_mode="r")


def decoded(pictures: Pictures, size: int, resize: bool, start: int = 0) -> Iterator[np.ndarray]:
    """uint8[size, size, 3] of each picture of a table.

    Raises:
      UserError: one of another size, unless `resize`; names the row.
    """
    for where, encoded in itertools.islice(pictures.images(), start, None):
        image = images.decode(encoded, where)
        if image.shape[:2] != (size, size) and not resize:
            raise UserError(
                f"{where}: image: got {image.shape[1]} x {image.shape[0]} pixels, expected {size} x {size}, what the UNet "
                "was trained on; --config.data.resize=True scales and crops"
            )
        yield embed.prepare(image, size)


def frozen(model: folder.StableDiffusion, part: str, method: str, mesh) -> tuple[Callable[[np.ndarray], np.ndarray], int]:
    """A method of a frozen part, as a function of numpy arrays, and how many rows it reads at most: `AT_ONCE` a device."""
    module, rows = model.config.modules[part], AT_ONCE * partitioning.sizes(mesh)["data"]

    def apply(params, x):
        outputs = module.apply({"params": params}, x, method=method)
        return jnp.concatenate(jax.tree.leaves(outputs), axis=-1)

    on_mesh = partitioning.MeshFunction(apply, mesh, out_shardings=partitioning.replicated(mesh))

    def call(x):
        placed = partitioning.place(schema.pad_rows(x, rows), partitioning.batch_sharding(mesh))
        return np.asarray(on_mesh(model.params[part], placed))[: len(x)]

    return call, rows


def parts_of(items: Iterator, size: int, desc: str, total: int, done: int = 0) -> Iterator[list]:
    """Lists of `size` items, the last one shorter; with a progress bar over the items."""
    with tqdm(desc=desc, total=total, initial=done, dynamic_ncols=True, disable=jax.process_index() > 0) as bar:
        while part := list(itertools.islice(items, size)):
            yield part
            bar.update(len(part))


def identity(*parts) -> str:
    """A name for what numbers, texts, files and dataclasses hold."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, pathlib.Path):
            with part.open("rb") as file:
                part = hashlib.file_digest(file, "sha256").hexdigest()
        elif dataclasses.is_dataclass(part):
            part = dataclasses.asdict(part)
        digest.update(json.dumps(part, sort_keys=True).encode())
    return digest.hexdigest()[:16]


def identity_of_pictures(table: Pictures, desc: str) -> str:
    """Of all that a table holds; reads every image."""
    parts = parts_of(table.images(), REWARDED_AT_ONCE, desc, len(table))
    return identity(table.prompts, [hashlib.sha256(encoded).hexdigest() for part in parts for _, encoded in part])


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The tables of a config, checked, and what the frozen parts make of them when asked to.

    Attributes:
      tables: {"images", "pretraining"} -> Pictures, those that the config names. texts: the different prompts, then "".
      identities: of the tables, and of the whole "model".
    """

    config: object
    model: folder.StableDiffusion
    tables: dict[str, Pictures]
    texts: list[str]
    identities: dict[str, str]

    @classmethod
    def of(cls, config, model: folder.StableDiffusion):
        """Raises UserError: no table, one that cannot be read, or a prompt that is too long; names the row."""
        if not config.data.images and not config.data.pretraining:
            raise UserError("data: got neither images nor pretraining, expected a table: --config.data.images=FILE")
        tables = {name: Pictures(config.data[name]) for name in ("images", "pretraining") if config.data[name]}
        for name, table in tables.items():
            for prompt, place in dict(zip(reversed(table.prompts), reversed(table.places), strict=True)).items():
                try:
                    model.text_ids([prompt], config.data.truncate_long_prompts)
                except UserError as error:
                    hint = "--config.data.truncate_long_prompts=True drops ends"
                    raise UserError(f"data.{name}: {table.path}: {place}: {error}; {hint}") from error
        prompts = dict.fromkeys(prompt for table in tables.values() for prompt in table.prompts if prompt)
        identities = {name: identity_of_pictures(table, f"{name}: digest") for name, table in tables.items()}
        vocabulary = [path for name in folder.VOCABULARY if (path := model.vocabulary / name).is_file()]
        sizes = dataclasses.replace(model.config, unet=dataclasses.replace(model.config.unet, remat=False))
        identities["model"] = identity(sorted(checkpoints.digests(model.params).items()), sizes, *vocabulary)
        return cls(config, model, tables, [*prompts, ""], identities)

    def contexts(self, cache: pathlib.Path, mesh) -> np.ndarray:
        """float32[texts, L, D]."""
        encode, rows = frozen(self.model, "text_encoder", "text_tokens", mesh)
        tower, truncate = self.model.config.text.text, self.config.data.truncate_long_prompts
        ids = self.model.text_ids(self.texts, truncate)

        def parts(done):
            return map(encode, map(np.stack, parts_of(iter(ids[done:]), rows, "texts", len(ids), done)))

        key = identity(ids.tolist(), self.model.config.text, self._digests("text_encoder"))
        return kept(cache / f"texts-{key}.npy", (len(ids), tower.length, tower.width), parts)

    def moments(self, name: str, cache: pathlib.Path, mesh) -> np.ndarray:
        """Of a table: float32[n, h, w, 2Z]."""
        encode, rows = frozen(self.model, "vae", "encode", mesh)
        table, unet, vae = self.tables[name], self.model.config.unet, self.model.config.vae
        size = unet.sample_size * vae.factor

        def parts(done):
            resized = decoded(table, size, self.config.data.resize, done)
            return map(encode, map(np.stack, parts_of(resized, rows, f"{name}: latents", len(table), done)))

        shape = len(table), unet.sample_size, unet.sample_size, 2 * vae.latent_channels
        key = identity(self.identities[name], size, self.config.data.resize, vae, self._digests("vae"))
        return kept(cache / f"latents-{key}.npy", shape, parts)

    def rewards(self, reward: Callable, cache: pathlib.Path) -> np.ndarray:
        """Of the model's own images: float32[n]. What the reward says of the first of them tells it from others.

        Raises:
          UserError: what the reward gives is no finite number for each image.
        """
        table = self.tables["images"]

        def rewarded(part, done):
            part = np.stack(part) if len({image.shape for image in part}) == 1 else part
            return sources.checked(reward, part, table.prompts[done : done + len(part)])

        def images_from(done):
            return (images.decode(encoded, where) for where, encoded in itertools.islice(table.images(), done, None))

        def parts(done):
            for part in parts_of(images_from(done), REWARDED_AT_ONCE, "rewards", len(table), done):
                yield rewarded(part, done)
                done += len(part)

        first = rewarded(list(itertools.islice(images_from(0), REWARDED_AT_ONCE)), 0)
        key = identity(self.identities["images"], first.tolist())
        rewards = np.asarray(kept(cache / f"rewards-{key}.npy", (len(table),), parts))
        return multihost_utils.broadcast_one_to_all(rewards) if jax.process_count() > 1 else rewards

    def rows(self, name: str, moments: np.ndarray, weight: np.ndarray) -> Rows:
        """A table's rows, their moments and weights given."""
        numbers = {text: i for i, text in enumerate(self.texts)}
        return Rows(moments, np.array([numbers[prompt] for prompt in self.tables[name].prompts], np.int32), weight)

    def _digests(self, part: str) -> list:
        return sorted(checkpoints.digests(self.model.params[part]).items())
