"""A trained reward model as a function of images and prompts, and rejection sampling with any such function."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Annotated

import flax.traverse_util
import numpy as np

from rahf import weights, workdirs
from rahf.fingerprint import fingerprint
from rahf.models.parameters import param_shapes
from rahf.reward import differentiable, embed, model, specs
from rahf.reward.differentiable import Differentiable
from richhf_data import checked, json_files, paths
from richhf_data.checked import Size
from richhf_data.errors import UserError
from richhf_data.ranges import Range


@dataclasses.dataclass(frozen=True)
class ClipIdentity:
    """The CLIP whose embeddings the reward was trained on: its folder, and the digest of its files."""

    folder: str
    digest: str


@dataclasses.dataclass(frozen=True)
class MLPConfig:
    """The widths of the reward's hidden layers."""

    hidden: Annotated[tuple[Size, ...], Range(1, 64)]


@dataclasses.dataclass(frozen=True)
class Config:
    """What is read of a reward workdir's config.json."""

    clip: ClipIdentity
    model: MLPConfig


class Reward:
    """`reward(images, prompts)`: embeds with CLIP, then applies the MLP.

    Attributes:
      clip: embed.Clip. model: model.RewardMLP. params: the MLP's parameters.
    """

    def __init__(self, clip: embed.Clip, mlp: model.RewardMLP, params):
        self.clip, self.model, self.params = clip, mlp, params

    @functools.cached_property
    def identity(self) -> str:
        """Depends on all that the rewards depend on: CLIP's files, the MLP and its parameters."""
        params = flax.traverse_util.flatten_dict(self.params, sep="/")
        digests = {name: embed.key(np.asarray(leaf).tobytes()) for name, leaf in params.items()}
        return fingerprint("reward", self.clip.digest, self.model.hidden, digests)

    @functools.cached_property
    def differentiable(self) -> Differentiable:
        """The same reward as a JAX function of the pixels."""

        mlp = self.model

        def score(params, images, texts):
            return mlp.apply({"params": params}, images, texts)

        return differentiable.of_clip(self.clip, score, self.params, self.identity)

    def __call__(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> np.ndarray:
        """uint8[B, H, W, 3], or B images of any sizes, and B prompts -> float32[B] in [0, 1].

        Raises:
          UserError: different numbers of images and prompts, an image that is not uint8[H, W, 3], a prompt too long for
            CLIP, a reward that is not finite.
        """
        if len(images) != len(prompts):
            raise UserError(f"reward: got {len(images)} images and {len(prompts)} prompts, expected as many")
        rows = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
        texts = self.clip.texts(list(rows))[[rows[prompt] for prompt in prompts]]
        rewards = model.predict(self.model, self.params, self.clip.images(images), texts)
        if len(wrong := np.flatnonzero(~np.isfinite(rewards))):
            raise UserError(
                f"reward: got {rewards[wrong[0]]} for images[{wrong[0]}] and the prompt {prompts[wrong[0]][:80]!r}; the "
                "weights are damaged or too large: train the reward again"
            )
        return rewards


def load(workdir, clip=None) -> Reward:
    """Loads the reward model of a workdir of `rahf.reward.train`, with the weights of its best validation.

    Args:
      clip: the folder of its CLIP, if that has moved since the training.

    Raises:
      UserError: no such folder, weights of another architecture, or another CLIP than in training.
    """
    workdir = paths.absolute(workdir)
    if not (workdir / "config.json").is_file():
        raise UserError(f"workdir: {workdir} has no config.json; expected one of `python -m rahf.reward.train`")
    file = workdirs.verified(workdir / "config.json")
    values = json_files.read(file)
    if (kind := values.get("kind", "rahf")) != "reward":
        raise UserError(f"workdir: {workdir} holds a {checked.shown(kind)}, expected a reward model")
    config = json_files.conform(Config, values, file, extra=True)
    file = workdir / "weights.safetensors"
    if not file.is_file():
        raise UserError(f"workdir: {workdir} has no weights.safetensors yet; train until the first validation")
    folder = clip or config.clip.folder
    clip = embed.Clip(folder)
    if clip.digest != config.clip.digest:
        raise UserError(f"clip: {folder} is not the CLIP that {workdir} was trained with; pass clip=DIR of that one")
    mlp, width = model.RewardMLP(config.model.hidden), clip.config.projection_dim
    shapes = param_shapes(mlp.init, np.zeros((1, width), np.float32), np.zeros((1, width), np.float32))
    return Reward(clip, mlp, weights.read_params(file, shapes))


def write_params(params, file) -> None:
    """Writes the MLP's parameters as safetensors, whole or not at all."""
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    tensors = {name: weights.Tensor(array.shape, lambda array=array: np.asarray(array)) for name, array in flat.items()}
    weights.write_safetensors(file, tensors)


def keep_best(
    reward: Callable, candidates: Sequence[Sequence[np.ndarray]], prompts: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Rejection sampling: chooses among K images of each prompt the first one with the highest reward.

    Args:
      reward: `(images, prompts) -> float32[B]`, a `Reward` or any other function.
      candidates: uint8[B, K, H, W, 3], or K images for each of B prompts.

    Returns:
      int[B], the index of the chosen image for each prompt, and float32[B, K], all rewards.

    Raises:
      UserError: different numbers of candidates, or rewards that are not one finite number per image.
    """
    counts = {len(images) for images in candidates}
    if len(candidates) != len(prompts) or len(counts) != 1 or 0 in counts:
        raise UserError(
            f"candidates: got {len(candidates)} groups of {sorted(counts)} images for {len(prompts)} prompts, expected as "
            "many groups, each of the same number of images"
        )
    (k,) = counts
    images = [image for images in candidates for image in images]
    rewards = specs.checked(reward, images, np.repeat(prompts, k).tolist())
    rewards = rewards.reshape(len(prompts), k)
    return rewards.argmax(axis=1), rewards
