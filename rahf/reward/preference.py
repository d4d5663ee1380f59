"""Published scores of pictures and prompts, off the shelf, as rewards.

    clip_score     CLIP score: the cosine of the embeddings of image and prompt, -1 to 1 (arXiv 2104.08718)
    pickscore      PickScore: a CLIP's scaled cosine, trained on Pick-a-Pic (arXiv 2305.01569)
    hpsv2          HPSv2 and v2.1: the cosine of another CLIP, trained on HPD v2 (arXiv 2306.09341)
    aesthetic      LAION's aesthetic predictor; it reads no prompt
    imagereward    ImageReward (arXiv 2304.05977)

Each takes a folder that rahf.convert wrote, or its address (folders.py). `specs` gives them by name, docs/rewards.md says
where their weights are.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rahf import folders, pretrained, weights
from rahf.fingerprint import fingerprint
from rahf.models.blip import ImageReward, ImageRewardConfig
from rahf.models.clip import CLIP, Aesthetic, CLIPConfig, unit
from rahf.models.parameters import param_shapes
from rahf.reward import bert_tokenizer, embed
from rahf.reward.differentiable import Differentiable, no_rows
from rahf.reward.framing import Frame, framed, prepare
from richhf_data import checked, schema
from richhf_data.errors import UserError

Array = jax.Array
TEXT_TOWER = ("token_embedding", "text", "text_projection")  # parts of a CLIP that a guide does not need on its devices


def _reads_all(prompt: str) -> bool:
    return False


@dataclasses.dataclass(frozen=True, eq=False)
class Preference:
    """A score `(images, prompts) -> float32[B]`.

    Attributes:
      score: (params, pixels, rows) -> float32[B], in JAX. pixels: [B, size, size, 3], uint8 or float32 in [-1, 1].
      params: what it reads beside. rows: B prompts -> what it reads of them, a pytree of arrays [B, ...].
      size: both sides of the square that it reads. frame: how a picture becomes this square (framing.py).
      identity: as of a reward (specs.py). cuts: whether the score reads the beginning of a prompt alone.
    """

    score: Callable[[Any, Array, Any], Array]
    params: Any
    rows: Callable[[Sequence[str]], Any]
    size: int
    frame: Frame
    identity: str
    cuts: Callable[[str], bool] = _reads_all

    def __call__(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> np.ndarray:
        """B images, each uint8[H, W, 3] of any size, and B prompts -> float32[B].

        Raises:
          UserError: different numbers of images and prompts, an image of another type, a prompt that the score cannot read.
        """
        if len(images) != len(prompts):
            raise UserError(f"reward: got {len(images)} images and {len(prompts)} prompts, expected as many")
        if not len(images):
            return np.zeros(0, np.float32)
        rows, out = self.rows(prompts), []
        for i in range(0, len(images), embed.BATCH):
            pixels = np.stack([prepare(image, self.size, self.frame) for image in images[i : i + embed.BATCH]])
            # Few shapes to compile, and one picture alone costs no batch.
            padded = 1 << (len(pixels) - 1).bit_length()
            batch = jax.tree.map(lambda x, i=i, n=padded: schema.pad_rows(x[i : i + embed.BATCH], n), rows)
            out.append(np.asarray(self._score(self.params, schema.pad_rows(pixels, padded), batch))[: len(pixels)])
        return np.concatenate(out)

    @functools.cached_property
    def _score(self):
        return jax.jit(self.score)

    @functools.cached_property
    def differentiable(self) -> Differentiable:
        """The same score as a JAX function of the pixels."""

        def of_images(params, images, rows):
            return self.score(params, framed(images, self.size, self.frame), rows)

        return Differentiable(of_images, self.params, self.rows, self.identity)


# ---- Two embeddings of a CLIP ---------------------------------------------------------------------------------------
def clip_score(folder, cut: bool = False) -> Preference:
    """CLIP score of a folder of kind "clip".

    Args:
      cut: a prompt longer than the CLIP reads loses its last pieces. It is refused otherwise.
    """
    return _cosine("clip", embed.Clip(folder), "hugging_face", cut=cut)


def pickscore(folder) -> Preference:
    """PickScore of a folder of kind "clip": exp(logit_scale) times the cosine."""
    return _cosine("pickscore", embed.Clip(folder), "hugging_face", scaled=True)


def hpsv2(folder) -> Preference:
    """HPSv2 or v2.1 of a folder of kind "clip": the cosine."""
    return _cosine("hpsv2", embed.Clip(folder), "padded")


def _cosine(name: str, clip: embed.Clip, frame: Frame, scaled: bool = False, cut: bool = True) -> Preference:
    module = CLIP(clip.config, image_only=True)
    params = {part: clip.params[part] for part in clip.params if part not in TEXT_TOWER}

    def score(params, pixels, texts):
        images = unit(module.apply({"params": params}, pixels, method="encode_image"))
        return jnp.sum(images * texts, axis=-1) * (jnp.exp(params["logit_scale"]) if scaled else 1)

    def cuts(prompt):
        return clip.tokenizer.num_ids(prompt) > clip.config.text.length

    rows, identity = functools.partial(clip.texts, cut=cut), fingerprint(name, clip.digest)
    return Preference(score, params, rows, clip.config.vision.image_size, frame, identity, cuts)


# ---- Networks of their own ------------------------------------------------------------------------------------------
def aesthetic(folder) -> Preference:
    """LAION's aesthetic predictor of a folder of kind "aesthetic", about 1 to 10."""
    folder = pathlib.Path(folders.local_folder(folder))
    settings = pretrained.read(folder, "aesthetic").config
    config = checked.conform(CLIPConfig, settings["clip"])
    size, module = config.vision.image_size, Aesthetic(config, tuple(settings["hidden"]))
    params = _params(folder, module, np.zeros((1, size, size, 3), np.float32))

    def score(params, pixels, rows):
        return module.apply({"params": params}, pixels)

    return Preference(score, params, no_rows, size, "torchvision", _identity("aesthetic", folder))


def imagereward(folder) -> Preference:
    """ImageReward of a folder of kind "image_reward", normalised as the package does."""
    folder = pathlib.Path(folders.local_folder(folder))
    settings = pretrained.read(folder, "image_reward").config
    config = checked.conform(ImageRewardConfig, settings["image_reward"])
    size, module, length = config.image_size, ImageReward(config), config.text.length
    tokenizer = bert_tokenizer.Tokenizer(folder, config.text.vocab_size)
    ids = np.zeros((1, length), np.int32)
    params = _params(folder, module, np.zeros((1, size, size, 3), np.float32), ids, ids > 0)

    def score(params, pixels, rows):
        return module.apply({"params": params}, pixels, *rows)

    def rows(prompts):
        return tokenizer(prompts, length)

    def cuts(prompt):
        return bool(tokenizer([prompt], length + 1)[1].all())

    identity = _identity("imagereward", folder, *bert_tokenizer.FILES)
    return Preference(score, params, rows, size, "torchvision", identity, cuts)


def _params(folder: pathlib.Path, module, *inputs):
    shapes = param_shapes(module.init, *inputs)
    return jax.device_put(weights.read_params(folder / "weights.safetensors", shapes))


def _identity(name: str, folder: pathlib.Path, *more: str) -> str:
    files = (folder / file for file in ("config.json", "weights.safetensors", *more))
    return fingerprint(name, *(file for file in files if file.is_file()))
