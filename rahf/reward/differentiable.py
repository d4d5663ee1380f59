"""Rewards that JAX differentiates with respect to the pixels: what guides sampling (rahf/diffusion/guide.py).

`specs.differentiable_of` gives them by name. Your own is a `Differentiable`, or a JAX function of images alone:

    def brightness(images):  # float[B, H, W, 3] about in [-1, 1], not clipped -> float[B]
        return images.mean((1, 2, 3))
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rahf import partitioning
from rahf.models import critics
from rahf.models.clip import CLIP, unit
from rahf.reward.framing import framed
from richhf_data import schema
from richhf_data.errors import UserError

Array = jax.Array
TERMS = (*schema.SCORES, *schema.HEATMAPS)  # of a weighted sum; a heatmap counts with its mean over the picture


def no_rows(prompts: Sequence[str]) -> tuple:
    """The rows of a score that reads no prompt."""
    return ()


@dataclasses.dataclass(frozen=True, eq=False)
class Differentiable:
    """A score of images and their prompts.

    Attributes:
      score: (params, images, rows) -> float[B], a pure JAX function. images: float[B, H, W, 3] of any size, about in
        [-1, 1], as the VAE decodes them.
      params: what it reads beside: a pytree of arrays.
      rows: B prompts -> what it reads of them: a pytree of arrays [B, ...]. May raise UserError.
      identity: as of a reward (specs.py).
    """

    score: Callable[[Any, Array, Any], Array]
    params: Any = ()
    rows: Callable[[Sequence[str]], Any] = no_rows
    identity: str | None = None

    @functools.lru_cache(maxsize=2)  # noqa: B019  (a guide lives as long as its program)
    def placed(self, mesh: jax.sharding.Mesh | None):
        """The parameters, whole on every device of a mesh, or on the default device."""
        if mesh is None:
            return jax.device_put(self.params, jax.devices()[0])  # no copy of what is there
        return jax.tree.map(lambda x: partitioning.place(np.asarray(x), partitioning.replicated(mesh)), self.params)


def called(reward: Differentiable) -> Callable:
    """The reward as one of finished pictures, (images uint8[B, H, W, 3], prompts) -> float32[B]; of the same identity."""
    score, params = jax.jit(reward.score), functools.cache(lambda: jax.tree.map(_of_this_process, reward.params))

    def call(images, prompts):
        images = jnp.asarray(np.stack(images), jnp.float32) / 127.5 - 1
        return np.asarray(score(params(), images, reward.rows(prompts)), np.float32)

    call.identity = reward.identity
    return call


def _of_this_process(x):
    """An array on this process's devices, where it was whole on those of all processes."""
    return jax.device_put(x) if getattr(x, "is_fully_addressable", True) else x.addressable_data(0)


def of_function(function: Callable[[Array], Array], identity: str | None = None) -> Differentiable:
    """A function of images alone, as the module describes it."""
    return Differentiable(lambda params, images, rows: function(images), identity=identity)


def rahf_score(config: critics.CriticConfig, weights: Mapping[str, float]) -> Callable:
    """`Differentiable.score` of a RAHF: the weighted sum of some of `TERMS`. Its rows are text_ids int32[B, R, L]."""
    module, size = critics.module_of(config), config.image_size

    def score(params, images, rows):
        images = jax.image.resize(images, (len(images), size, size, 3), "linear")  # antialiased, as `images.resize`
        scores, heatmaps, *_ = module.apply({"params": params}, images, rows, method="perceive")
        terms = {}
        if scores is not None:
            terms |= zip(schema.SCORES, jnp.moveaxis(scores, -1, 0), strict=True)
        if heatmaps is not None:
            terms |= zip(schema.HEATMAPS, jnp.moveaxis(heatmaps.mean((1, 2)), -1, 0), strict=True)
        return sum(weight * terms[name] for name, weight in weights.items())

    return score


def rahf_heatmaps(config: critics.CriticConfig, names: Sequence[str]) -> Callable:
    """The mean of some of a RAHF's heatmaps, in the form of `rahf_score`: float32[B, h, w] in [0, 1]."""
    module, size = critics.module_of(config), config.image_size

    def heatmaps(params, images, rows):
        images = jax.image.resize(images, (len(images), size, size, 3), "linear")
        found = module.apply({"params": params}, images, rows, method="perceive")[1]
        return found[..., [schema.HEATMAPS.index(name) for name in names]].mean(-1).astype(jnp.float32)

    return heatmaps


def rows_of(model) -> Callable[[Sequence[str]], np.ndarray]:
    """Prompts -> the texts that a `rahf.predictor.Model` reads of them, int32[B, R, L]."""
    return lambda prompts: np.stack([model.text_ids(prompt) for prompt in prompts])


def of_rahf(model, weights: Mapping[str, float], identity: str) -> Differentiable:
    """The score of a `rahf.predictor.Model`."""
    return Differentiable(rahf_score(model.model_config, weights), model.params, rows_of(model), identity)


def of_clip(clip, score: Callable[[Any, Array, Array], Array], params, identity: str) -> Differentiable:
    """A score of CLIP's embeddings.

    Args:
      clip: rahf.reward.embed.Clip.
      score: (params, images, texts: float32[B, E] of unit length) -> float32[B].
    """
    module, size = CLIP(clip.config), clip.config.vision.image_size

    def of_images(params, images, texts):
        embedded = module.apply({"params": params["clip"]}, framed(images, size), method="encode_image")
        return score(params["head"], unit(embedded), texts)

    return Differentiable(of_images, {"clip": clip.params, "head": params}, clip.texts, identity)


# ---- Combinations ---------------------------------------------------------------------------------------------------
def checked_score(found, count: int, name: str = "the score") -> Array:
    """What a score returned for `count` images. Raises UserError, while it is traced, for another shape or type."""
    dtype, shape = getattr(found, "dtype", type(found).__name__), getattr(found, "shape", ())
    if shape != (count,) or not jnp.issubdtype(dtype, jnp.floating):
        got, expected = f"{dtype}{list(shape)}", f"float[{count}], one number an image"
        raise UserError(f"guide: got {got} from {name}, expected {expected}")
    return found


def weighted_sum(weights: Array, values: Array) -> Array:
    """float32[M] and the M members' values float32[M, B] -> float32[B]."""
    return jnp.sum(weights[:, None] * values, axis=0)


def pessimistic_mean(penalty: Array, values: Array) -> Array:
    """The mean minus `penalty` (float32[1]) times the standard deviation: float32[M, B] -> float32[B].

    Where the members agree, the deviation's gradient is 0.
    """
    mean = values.mean(axis=0)
    variance = jnp.square(values - mean[None]).mean(axis=0)
    differ = variance > jnp.finfo(jnp.float32).tiny  # of what is smaller, a device may round the root to 0
    return mean - penalty * jnp.where(differ, jnp.sqrt(jnp.where(differ, variance, 1)), 0)


def combined(
    members: Sequence[tuple[str, Differentiable]], combine: Callable[[Array], Array], identity: str | None
) -> Differentiable:
    """One score of several, whose params and rows are tuples of theirs.

    Args:
      members: (name, score) of each. combine: their values float32[M, B] -> float32[B].
    """
    names, scores = zip(*members, strict=True)

    def score(params, images, rows):
        found = [one.score(own, images, read) for one, own, read in zip(scores, params, rows, strict=True)]
        values = [checked_score(one, len(images), name) for one, name in zip(found, names, strict=True)]
        return combine(jnp.stack([one.astype(jnp.float32) for one in values]))

    def rows(prompts):
        return tuple(one.rows(prompts) for one in scores)

    return Differentiable(score, tuple(one.params for one in scores), rows, identity)
