"""The inputs of diffusion training: outputs of the frozen parts for tables of images, cached on disk, and batches of them.

    cache/latents-*.npy    the VAE's posterior of each image, float32: 128 KiB for an image of 512 pixels
    cache/texts-*.npy      the text encoder's output for each different prompt, float32: 231 KiB in Stable Diffusion
    cache/rewards-*.npy    the reward of each of the model's own images
    cache/regions-*.npy    a critic's heatmaps of these on the latents' grid, float32: 32 KiB for an image of 512 pixels

The name of a file is a digest of everything that its content depends on.
"""

import dataclasses
import functools
import hashlib
import itertools
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated

import cv2
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from tqdm.auto import tqdm

from rahf import checkpoints, hosts, partitioning
from rahf.diffusion import folder
from rahf.fingerprint import fingerprint
from rahf.reward import embed, specs
from rahf.reward.image_table import ImageTable
from rahf.weights import Tensor
from richhf_data import checked, images, json_files, paths, schema
from richhf_data.errors import UserError
from richhf_data.ranges import Range

AT_ONCE = 16  # images or texts per device in a batch for a frozen part
REWARDED_AT_ONCE = 64  # images in a batch for a reward or a critic
SAVE_EVERY = 8  # batches between two saves of the cache


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
    """Images and prompts as the UNet reads them.

    Attributes:
      moments: float32[n, h, w, 2Z], mean and log variance of the VAE, on disk.
      text: int32[n], rows of the texts' embeddings.
      weight: float32[n], 0 or more; rows with 0 are never drawn.
      region: float32[n, h, w] in [0, 1], what a latent pixel weighs; None: 1.
    """

    moments: np.ndarray
    text: np.ndarray
    weight: np.ndarray
    region: np.ndarray | None = None

    def drawn(self, seed: int, purpose: int, first: int, count: int) -> np.ndarray:
        """Places `first` to `first + count` of an endless order of rows, int64[count]. Each epoch has every row once."""
        places = np.arange(first, first + count)
        size = np.count_nonzero(self.weight)
        return np.array([self._order(seed, purpose, place // size)[place % size] for place in places], np.int64)

    @functools.lru_cache(maxsize=4)  # noqa: B019  (two epochs of two tables, needed until the run ends)
    def _order(self, seed: int, purpose: int, epoch: int) -> np.ndarray:
        return np.random.default_rng((seed, purpose, epoch)).permutation(np.flatnonzero(self.weight))


def pretraining_rows(config) -> int:
    """The number of pre-training pairs in a batch, if a run has both kinds of rows."""
    return round(config.train.pretraining_share * config.train.batch_size)


def batches(
    own: Rows | None, pretraining: Rows | None, contexts: np.ndarray, config, rows: np.ndarray, start: int
) -> Iterator[dict[str, np.ndarray]]:
    """Endless batches for `make_loss`, from step `start` on. A batch depends only on the seed and its step.

    Args:
      contexts: float32[texts, L, D], with the empty prompt's last. rows: which rows of the global batch to return.
    """
    size = config.train.batch_size
    of_pretraining = size if own is None else 0 if pretraining is None else pretraining_rows(config)
    parts = [(own, size - of_pretraining), (pretraining, of_pretraining)]
    region = None if own is None else own.region
    for step in itertools.count(start):
        batch = {name: [] for name in ("moments", "text", "weight", "pretraining", *(() if region is None else ("region",)))}
        for purpose, (table, count) in enumerate(parts):
            if count:
                first = purpose * (size - of_pretraining)  # place of its first row in the batch
                kept = rows[(rows >= first) & (rows < first + count)] - first
                drawn = table.drawn(config.seed, purpose, step * count, count)[kept]
                batch["moments"].append(table.moments[drawn])
                batch["text"].append(table.text[drawn])
                batch["weight"].append(table.weight[drawn] * (1 - purpose))
                batch["pretraining"].append(np.full(len(drawn), purpose, np.float32))
                if region is not None:
                    batch["region"].append(np.ones((len(drawn), *region.shape[1:])) if purpose else region[drawn])
        batch = {name: np.concatenate(arrays) for name, arrays in batch.items()}
        dropped = np.random.default_rng((config.seed, 2, step)).random(size)[rows] < config.train.text_dropout
        batch["context"] = contexts[np.where(dropped, len(contexts) - 1, batch.pop("text"))]
        yield {name: array.astype(np.float32, copy=False) for name, array in batch.items()}


def batch_shapes(model: folder.Config, size: int, regions: bool = False) -> dict[str, tuple[int, ...]]:
    """name -> shape of each array of a batch, with weights of pixels or without; all are float32."""
    grid, text = model.unet.sample_size, model.text.text
    return {
        "moments": (size, grid, grid, 2 * model.vae.latent_channels),
        "weight": (size,),
        "pretraining": (size,),
        "context": (size, text.length, text.width),
        **({"region": (size, grid, grid)} if regions else {}),
    }


def kept(
    place: pathlib.Path, shape: tuple[int, ...], parts: Callable[[int], Iterator[np.ndarray]], dtype=np.float32
) -> np.ndarray:
    """An array on disk, dtype[*shape], computed part by part. Continues where a killed run stopped.

    Two runs that need the same array: one computes it, the other waits. Several hosts compute the same parts, each for its
    own disk, and start at the smallest number of rows that any of them has.

    Args:
      place: the .npy file. parts: called with the number of rows on disk, yields arrays with the following rows.

    Raises:
      UserError: `place` is a link.
    """
    done_file, done = place.with_suffix(".json"), 0
    if place.is_symlink():
        raise UserError(f"cache: {place} is a link, expected a file; delete it")
    with paths.locked(place.parent, f"{place.stem}.lock", wait=True), paths.naming(place):
        try:
            found = np.load(place, mmap_mode="r")
            if found.shape == shape and found.dtype == dtype:
                done = checked.conform(Annotated[int, Range(0, shape[0])], json_files.read(done_file)["rows"])
        except (OSError, ValueError, KeyError):  # missing or damaged: compute it again
            done = 0
        if jax.process_count() > 1:
            done = int(np.min(multihost_utils.process_allgather(np.int64(done))))
        if done == shape[0]:
            return np.load(place, mmap_mode="r")
        if not done:
            done_file.unlink(missing_ok=True)
            place.unlink(missing_ok=True)
        array = np.lib.format.open_memmap(place, "r+" if done else "w+", dtype, shape)
        with place.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)  # a full disk fails here, not after hours
        for i, part in enumerate(parts(done), 1):
            array[done : done + len(part)] = part
            done += len(part)
            if i % SAVE_EVERY == 0 or done == shape[0]:
                array.flush()
                json_files.write(done_file, {"rows": done})
    return np.load(place, mmap_mode="r")


def decoded(table: ImageTable, size: int, resize: bool, start: int = 0) -> Iterator[np.ndarray]:
    """The images of a table from row `start` on, uint8[size, size, 3].

    Raises:
      UserError: an image of another size, unless `resize`; names the row.
    """
    for where, encoded in itertools.islice(table.images(), start, None):
        image = images.decode(encoded, where)
        if image.shape[:2] != (size, size) and not resize:
            raise UserError(
                f"{where}: image: got {image.shape[1]} x {image.shape[0]} pixels, expected {size} x {size}, the size of "
                "the UNet's training; --config.data.resize=True scales and crops"
            )
        yield embed.prepare(image, size)


def frozen(model: folder.StableDiffusion, part: str, method: str, mesh) -> tuple[Callable[[np.ndarray], np.ndarray], int]:
    """A method of a frozen part as a function of numpy arrays, and its maximal batch size, `AT_ONCE` per device."""
    module, rows = model.config.modules[part], AT_ONCE * partitioning.sizes(mesh)["data"]

    def apply(params, x):
        outputs = module.apply({"params": params}, x, method=method)
        return jnp.concatenate(jax.tree.leaves(outputs), axis=-1)

    on_mesh = partitioning.MeshFunction(apply, mesh, out_shardings=partitioning.replicated(mesh))
    everywhere = functools.partial(partitioning.place, sharding=partitioning.replicated(mesh))
    params = functools.cache(lambda: jax.tree.map(everywhere, model.params[part]))  # not placed for what is on disk

    def call(x):
        placed = partitioning.place(schema.pad_rows(x, rows), partitioning.batch_sharding(mesh))
        return np.asarray(on_mesh(params(), placed))[: len(x)]

    return call, rows


def digests(params) -> list[tuple[str, int]]:
    """(name, digest) of each array or `Tensor`, sorted; reads one tensor at a time."""
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        found |= checkpoints.digests({checkpoints.keystr(path): leaf.read() if isinstance(leaf, Tensor) else leaf})
    return sorted(found.items())


def parts_of(items: Iterator, size: int, desc: str, total: int, done: int = 0) -> Iterator[list]:
    """Yields lists of `size` items, the last one maybe shorter, and shows a progress bar over the items."""
    with tqdm(desc=desc, total=total, initial=done, dynamic_ncols=True, disable=jax.process_index() > 0) as bar:
        while part := list(itertools.islice(items, size)):
            yield part
            bar.update(len(part))


def fingerprint_of_table(table: ImageTable, desc: str) -> str:
    """The fingerprint of a table's prompts and images; reads every image."""
    parts = parts_of(table.images(), REWARDED_AT_ONCE, desc, len(table))
    return fingerprint(table.prompts, [hashlib.sha256(encoded).hexdigest() for part in parts for _, encoded in part])


def of_images(
    table: ImageTable, function: Callable, desc: str, place: pathlib.Path | None, shape: tuple[int, ...], shown=None
) -> np.ndarray:
    """What a function gives for a table's images, float32[*shape], part by part. Every host has it of process 0.

    Args:
      function: (B decoded images, their prompts) -> float32[B, ...].
      place: the file in which it is `kept`, or None. shown: number of rows to skip -> the images; as they are by default.
    """

    def as_they_are(done):
        return (images.decode(encoded, where) for where, encoded in itertools.islice(table.images(), done, None))

    def parts(done):
        for part in parts_of((shown or as_they_are)(done), REWARDED_AT_ONCE, desc, len(table), done):
            yield hosts.agreed(function(part, table.prompts[done : done + len(part)]))
            done += len(part)

    return np.concatenate(list(parts(0))) if place is None else np.asarray(kept(place, shape, parts))


def rewards_of(table: ImageTable, digest: str, reward: Callable, cache: pathlib.Path) -> np.ndarray:
    """The rewards of a table, float32[n], of process 0. Cached only if the reward has an identity (reward/specs.py).

    Args:
      digest: `fingerprint_of_table`.

    Raises:
      UserError: the reward does not return one finite number per image.
    """
    identity = specs.identity_of(reward)

    def rewards(part, prompts):
        return specs.checked(reward, np.stack(part) if len({image.shape for image in part}) == 1 else part, prompts)

    place = identity and cache / f"rewards-{fingerprint(digest, identity)}.npy"
    return of_images(table, rewards, "rewards", place, (len(table),))


def heatmaps_of(critic, images: np.ndarray, prompts: Sequence[str], grid: int) -> np.ndarray:
    """A critic's heatmaps of B images, float32[B, grid, grid, 2] as in `schema.HEATMAPS`: their means over a grid's cells.

    Heatmaps of fewer pixels are interpolated.

    Raises:
      UserError: the critic does not give such heatmaps.
    """
    return on_grid(critic.predict(images, prompts).heatmaps, len(prompts), grid)


def on_grid(heatmaps: Mapping[str, np.ndarray], count: int, grid: int) -> np.ndarray:
    """A critic's heatmaps of so many images as `heatmaps_of` gives them. Raises as it does."""
    found = []
    for name in schema.HEATMAPS:
        expected = f"expected float[{count}, h, w] in [0, 1]"
        maps = specs.as_floats(f"critic: {name}", heatmaps.get(name), expected)
        if maps.ndim != 3 or len(maps) != count or not maps.size:
            raise UserError(f"critic: {name}: got shape {maps.shape}, {expected}")
        if not (maps.min() >= 0 and maps.max() <= 1):  # false for nan too
            raise UserError(f"critic: {name}: got values from {maps.min()} to {maps.max()}, {expected}")
        interpolation = cv2.INTER_AREA if min(maps.shape[1:]) > grid else cv2.INTER_LINEAR
        found.append([cv2.resize(heatmap, (grid, grid), interpolation=interpolation) for heatmap in maps])
    return np.clip(np.stack(found, axis=-1), 0, 1)  # area averages round to just above 1


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The tables of a config, and the outputs of the frozen parts for them.

    Attributes:
      tables: "images", "pretraining" -> ImageTable, for those that the config names.
      texts: the different prompts, then "".
      identities: fingerprints of the tables and of the "model".
    """

    config: object
    model: folder.StableDiffusion
    tables: dict[str, ImageTable]
    texts: list[str]
    identities: dict[str, str]

    @classmethod
    def of(cls, config, model: folder.StableDiffusion):
        """Opens and checks the tables. Raises UserError: no table, a faulty table, or a prompt that is too long."""
        if not config.data.images and not config.data.pretraining:
            raise UserError("data: got neither images nor pretraining, expected a table: --config.data.images=FILE")
        tables = {name: ImageTable(config.data[name]) for name in ("images", "pretraining") if config.data[name]}
        return cls.of_tables(config, model, tables)

    @classmethod
    def of_tables(
        cls,
        config,
        model: folder.StableDiffusion,
        tables: Mapping[str, ImageTable],
        prompts: Sequence[str] = (),
        identities: Mapping[str, str] | None = None,
    ):
        """Of tables that are open, and of prompts without pictures. Raises UserError: a prompt that is too long.

        identities: fingerprints of those tables that have one already; the others are read for it.
        """

        def check(prompt, name):
            try:
                model.text_ids([prompt], config.data.truncate_long_prompts)
            except UserError as error:
                hint = "--config.data.truncate_long_prompts=True drops the ends of long prompts"
                raise UserError(f"{name}: {error}; {hint}") from error

        for name, table in tables.items():
            for prompt, place in dict(zip(reversed(table.prompts), reversed(table.places), strict=True)).items():
                check(prompt, f"data.{name}: {table.path}: {place}")
        for prompt in prompts:
            check(prompt, "data.prompts")
        texts = dict.fromkeys([*prompts, *(prompt for table in tables.values() for prompt in table.prompts if prompt)])
        identities = dict(identities or {})
        for name in tables.keys() - identities.keys():
            identities[name] = fingerprint_of_table(tables[name], f"{name}: digest")
        vocabulary = [path for name in folder.VOCABULARY if (path := model.vocabulary / name).is_file()]
        sizes = dataclasses.replace(model.config, unet=dataclasses.replace(model.config.unet, remat=False))
        identities["model"] = fingerprint(digests(model.params), sizes, *vocabulary)
        return cls(config, model, dict(tables), [*texts, ""], identities)

    def contexts(self, cache: pathlib.Path, mesh) -> np.ndarray:
        """The text encoder's output for each of `texts`, float32[texts, L, D]."""
        encode, rows = frozen(self.model, "text_encoder", "text_tokens", mesh)
        tower, truncate = self.model.config.text.text, self.config.data.truncate_long_prompts
        ids = self.model.text_ids(self.texts, truncate)

        def parts(done):
            return map(encode, map(np.stack, parts_of(iter(ids[done:]), rows, "texts", len(ids), done)))

        key = fingerprint(ids.tolist(), self.model.config.text, digests(self.model.params["text_encoder"]))
        return kept(cache / f"texts-{key}.npy", (len(ids), tower.length, tower.width), parts)

    def moments(self, name: str, cache: pathlib.Path, mesh) -> np.ndarray:
        """The VAE's posterior (mean, log variance) of each image of a table, float32[n, h, w, 2Z]."""
        encode, rows = frozen(self.model, "vae", "encode", mesh)
        table, unet, vae = self.tables[name], self.model.config.unet, self.model.config.vae
        size = unet.sample_size * vae.factor

        def parts(done):
            resized = decoded(table, size, self.config.data.resize, done)
            return map(encode, map(np.stack, parts_of(resized, rows, f"{name}: latents", len(table), done)))

        shape = len(table), unet.sample_size, unet.sample_size, 2 * vae.latent_channels
        key = fingerprint(self.identities[name], size, self.config.data.resize, vae, digests(self.model.params["vae"]))
        return kept(cache / f"latents-{key}.npy", shape, parts)

    def rewards(self, reward: Callable, cache: pathlib.Path) -> np.ndarray:
        """The rewards of the model's own images, float32[n]. As `rewards_of`."""
        return rewards_of(self.tables["images"], self.identities["images"], reward, cache)

    def heatmaps(self, critic, cache: pathlib.Path) -> np.ndarray:
        """A critic's heatmaps of the model's own images as the UNet sees them, float32[n, h, w, 2], as `heatmaps_of`.

        Cached only if the critic has an identity. Every host has those of process 0.

        Args:
          critic: with `predict(images uint8[B, H, W, 3], prompts) -> rahf.predictor.Feedback`.
        """
        identity, table = specs.identity_of(critic, "critic"), self.tables["images"]
        grid, resize = self.model.config.unet.sample_size, self.config.data.resize
        size = grid * self.model.config.vae.factor

        def heatmaps(part, prompts):
            return heatmaps_of(critic, np.stack(part), prompts, grid)

        place = identity and cache / f"regions-{fingerprint(self.identities['images'], size, grid, resize, identity)}.npy"
        shown = functools.partial(decoded, table, size, resize)
        return of_images(table, heatmaps, "heatmaps", place, (len(table), grid, grid, len(schema.HEATMAPS)), shown)

    def rows(self, name: str, moments: np.ndarray, weight: np.ndarray, region: np.ndarray | None = None) -> Rows:
        """The rows of a table with their moments and weights."""
        numbers = {text: i for i, text in enumerate(self.texts)}
        return Rows(moments, np.array([numbers[prompt] for prompt in self.tables[name].prompts], np.int32), weight, region)
