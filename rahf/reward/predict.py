"""A trained reward model as a function of images and prompts, and rejection sampling with any such function."""

from collections.abc import Callable, Sequence

import flax.linen as nn
import flax.traverse_util
import jax
import numpy as np

from rahf import checkpoints, weights
from rahf.reward import embed, model, sources
from richhf_data import json_files, paths
from richhf_data.errors import UserError


class Reward:
    """`reward(images, prompts)`: CLIP, then the MLP.

    Attributes:
      clip: embed.Clip. model: model.RewardMLP. params: its parameters.
    """

    def __init__(self, clip: embed.Clip, mlp: model.RewardMLP, params):
        self.clip, self.model, self.params = clip, mlp, params

    def __call__(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> np.ndarray:
        """uint8[B, H, W, 3], or B images of any sizes, and B prompts -> float32[B] in [0, 1].

        Raises:
          UserError: not as many images as prompts, an image that is not uint8[H, W, 3], a prompt too long for CLIP.
        """
        if len(images) != len(prompts):
            raise UserError(f"reward: got {len(images)} images and {len(prompts)} prompts, expected as many")
        different = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
        texts = self.clip.texts(list(different))[[different[prompt] for prompt in prompts]]
        return model.predict(self.model, self.params, self.clip.images(images), texts)


def load(workdir, clip=None) -> Reward:
    """The reward model of a workdir of `rahf.reward.train`, as its best validation found it.

    Args:
      clip: the folder of its CLIP, where that is no longer where training found it.

    Raises:
      UserError: no such folder, weights of another architecture, or another CLIP than the one it was trained with.
    """
    workdir = paths.absolute(workdir)
    if not (workdir / "config.json").is_file():
        raise UserError(f"workdir: {workdir} has no config.json; expected one of `python -m rahf.reward.train`")
    config = json_files.read(workdir / "config.json")
    if (kind := config.get("kind", "rahf")) != "reward":
        raise UserError(f"workdir: {workdir} holds a {kind}, expected a reward model")
    file = workdir / "weights.safetensors"
    if not file.is_file():
        raise UserError(f"workdir: {workdir} has no weights.safetensors yet; go on training until its first validation")
    folder = clip or config["clip"]["folder"]
    clip = embed.Clip(folder)
    if clip.digest != config["clip"]["digest"]:
        raise UserError(f"clip: {folder} is not the CLIP that {workdir} was trained with; pass clip=DIR of that one")
    mlp, width = model.RewardMLP(tuple(config["model"]["hidden"])), clip.config.projection_dim
    wanted = nn.unbox(jax.eval_shape(lambda key: model.init(mlp, width, width, key), jax.random.key(0)))
    wanted = {name: leaf.shape for name, leaf in flax.traverse_util.flatten_dict(wanted, sep="/").items()}
    tensors = weights.open_safetensors(file)
    checkpoints.check_shapes({name: tensor.shape for name, tensor in tensors.items()}, wanted, file)
    return Reward(clip, mlp, flax.traverse_util.unflatten_dict(dict(weights.read_all(tensors)), sep="/"))


def write_params(params, file) -> None:
    """The MLP's parameters as safetensors, whole or not at all."""
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    tensors = {name: weights.Tensor(array.shape, lambda array=array: np.asarray(array)) for name, array in flat.items()}
    weights.write_safetensors(file, tensors)


def keep_best(
    reward: Callable, candidates: Sequence[Sequence[np.ndarray]], prompts: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Rejection sampling: of K images of each prompt, the one with the highest reward; the first of equals.

    Args:
      reward: `(images, prompts) -> float32[B]`, a `Reward` or any other function.
      candidates: uint8[B, K, H, W, 3], or K images for each of B prompts.

    Returns:
      int[B], which one to keep of each, and float32[B, K], all rewards.

    Raises:
      UserError: not K candidates of every prompt, or rewards that are not finite or not one an image.
    """
    counts = {len(images) for images in candidates}
    if len(candidates) != len(prompts) or len(counts) != 1 or 0 in counts:
        raise UserError(
            f"candidates: got {len(candidates)} groups of {sorted(counts)} images for {len(prompts)} prompts, expected as "
            "many groups, each of the same number of images"
        )
    (k,) = counts
    images = [image for images in candidates for image in images]
    rewards = sources.checked(reward, images, np.repeat(prompts, k).tolist())
    rewards = rewards.reshape(len(prompts), k)
    return rewards.argmax(axis=1), rewards
