"""CLIP's embeddings of images and texts, cached on disk by content.

    cache/<CLIP>/image/<name>.npz     keys: the SHA-256 of each encoded image; embeddings: float32[n, E]
    cache/<CLIP>/text/<name>.npz      likewise, of texts

A file is written whole or not at all. Several runs can share a cache.
"""

import dataclasses
import functools
import hashlib
import io
import pathlib
import zipfile
from collections.abc import Iterable, Sequence

import jax
import numpy as np
from tqdm.auto import tqdm

from rahf import folders, pretrained, weights
from rahf.models.clip import CLIP, CLIPConfig, unit
from rahf.models.parameters import param_shapes
from rahf.reward.framing import prepare
from richhf_data import checked, clip_tokenizer, paths, schema
from richhf_data import images as richhf_images
from richhf_data.errors import UserError

BATCH = 32  # images or texts at a time
FILE = 8 * BATCH  # embeddings per file: as many are lost when a run is killed


class Clip:
    """A frozen CLIP, from a folder or an address (folders.py) that `rahf.convert` wrote, of kind "clip".

    Attributes:
      config: CLIPConfig. params: its parameters.
      digest: SHA-256 of the folder's files; the embeddings depend on nothing else.

    Raises:
      UserError: no such folder, tensors of other shapes, or no tokenizer files.
    """

    def __init__(self, folder):
        folder = pathlib.Path(folders.local_folder(folder))
        self.config = checked.conform(CLIPConfig, pretrained.read(folder, "clip").config["clip"])
        self.tokenizer = clip_tokenizer.Tokenizer(folder)
        self.digest = _digest([folder / name for name in ("config.json", "weights.safetensors", *clip_tokenizer.FILES)])
        module, size = CLIP(self.config), self.config.vision.image_size
        image, ids = np.zeros((1, size, size, 3), np.float32), np.zeros((1, self.config.text.length), np.int32)
        shapes = param_shapes(module.init, image, ids)
        self.params = jax.device_put(weights.read_params(folder / "weights.safetensors", shapes))
        self._encode = {
            method: jax.jit(functools.partial(_unit, module, method)) for method in ("encode_image", "encode_text")
        }

    def images(self, images: Sequence[np.ndarray], names: Sequence[str] = ()) -> np.ndarray:
        """B images, each uint8[H, W, 3] of any size -> their embeddings, float32[B, E] of unit length.

        Args:
          names: what to call each image in errors.

        Raises:
          UserError: an embedding that is not finite.
        """
        names = names or [f"images[{i}]" for i in range(len(images))]
        return self._batches("encode_image", [prepare(image, self.config.vision.image_size) for image in images], names)

    def texts(self, texts: Sequence[str], cut: bool = False) -> np.ndarray:
        """B texts -> their embeddings, float32[B, E] of unit length.

        Args:
          cut: a longer text than the text tower reads loses its last pieces. It is refused otherwise.

        Raises:
          UserError: a text that is too long, or whose embedding is not finite.
        """
        length = self.config.text.length
        for text in () if cut else texts:
            if (count := self.tokenizer.num_ids(text)) > length:
                raise UserError(
                    f"prompt: {text[:80]!r} takes {count} ids with its start and end, CLIP reads {length}; shorten it"
                )
        names = [f"prompt {text[:80]!r}" for text in texts]
        return self._batches("encode_text", self.tokenizer(texts, length) if len(texts) else [], names)

    def _batches(self, method, rows, names) -> np.ndarray:
        out = [np.zeros((0, self.config.projection_dim), np.float32)]
        for i in range(0, len(rows), BATCH):
            batch = np.stack(rows[i : i + BATCH])
            out.append(np.asarray(self._encode[method](self.params, schema.pad_rows(batch, BATCH)))[: len(batch)])
        out = np.concatenate(out)
        if len(wrong := np.flatnonzero(~np.isfinite(out).all(axis=1))):
            raise UserError(f"{names[wrong[0]]}: CLIP's embedding is not finite; its weights are damaged, convert it again")
        return out


def _unit(module, method, params, x):
    return unit(module.apply({"params": params}, x, method=method))


def key(data: bytes) -> str:
    """The cache key of an encoded image or text."""
    return hashlib.sha256(data).hexdigest()


@dataclasses.dataclass
class _Store:
    """The embeddings in one folder. New ones are written to disk `FILE` at a time."""

    folder: pathlib.Path

    def __post_init__(self):
        self.known, self._new = {}, {}
        for file in sorted(self.folder.glob("*.npz")):
            try:
                with np.load(file, allow_pickle=False) as arrays:
                    self.known |= dict(zip(arrays["keys"].tolist(), arrays["embeddings"], strict=True))
            except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
                raise UserError(f"cache: {file} is damaged ({error}); delete it, and the run computes it again") from error

    def add(self, found: dict[str, np.ndarray]) -> None:
        self._new |= found
        self.known |= found
        if len(self._new) >= FILE:
            self.save()

    def save(self) -> None:
        if self._new:
            file = io.BytesIO()
            np.savez(file, keys=np.array(list(self._new)), embeddings=np.stack(list(self._new.values())))
            paths.replace(self.folder / f"{key(''.join(self._new).encode())[:32]}.npz", file.getvalue())
            self._new = {}


def embed_images(clip: Clip, rows: Iterable[tuple[str, bytes]], cache, total: int) -> tuple[list[str], np.ndarray]:
    """Keys and embeddings, float32[n, E], of n encoded images, in order.

    Args:
      rows: pairs of a text that begins an error message, and an encoded image. total: n, for the progress bar.

    Raises:
      UserError: an image that does not decode. Earlier embeddings stay in the cache.
    """
    store, keys, waiting = _Store(pathlib.Path(cache) / clip.digest[:16] / "image"), [], {}

    def flush():
        if waiting:
            names, arrays = zip(*waiting.values(), strict=True)
            store.add(dict(zip(waiting, clip.images(arrays, names), strict=True)))
            waiting.clear()

    try:
        for where, encoded in tqdm(rows, desc="images", unit="image", total=total, dynamic_ncols=True):
            keys.append(key(encoded))
            if keys[-1] not in store.known and keys[-1] not in waiting:
                image = prepare(richhf_images.decode(encoded, where), clip.config.vision.image_size)
                waiting[keys[-1]] = where, image
                if len(waiting) == BATCH:
                    flush()
        flush()
    finally:
        store.save()
    return keys, np.stack([store.known[name] for name in keys])


def embed_texts(clip: Clip, texts: Sequence[str], cache) -> np.ndarray:
    """Embeddings, float32[n, E], of n texts, in order. Raises as `Clip.texts`."""
    store, keys = _Store(pathlib.Path(cache) / clip.digest[:16] / "text"), [key(text.encode()) for text in texts]
    missing = {name: text for name, text in zip(keys, texts, strict=True) if name not in store.known}
    names = list(missing)
    try:
        with tqdm(desc="texts", unit="text", total=len(texts), initial=len(texts) - len(names), dynamic_ncols=True) as bar:
            for i in range(0, len(names), BATCH):
                batch = names[i : i + BATCH]
                store.add(dict(zip(batch, clip.texts([missing[name] for name in batch]), strict=True)))
                bar.update(len(batch))
    finally:
        store.save()
    return np.stack([store.known[name] for name in keys])


def _digest(files: Iterable[pathlib.Path]) -> str:
    total = hashlib.sha256()
    for path in files:
        if path.is_file():
            with path.open("rb") as file:
                total.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()
