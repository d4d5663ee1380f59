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


def of_function(function: Callable[[Array], Array], identity: str | None = None) -> Differentiable:
    """A function of images alone, as the module describes it."""
    return Differentiable(lambda params, images, rows: function(images), identity=identity)


def rahf_score(config: critics.CriticConfig, weights: Mapping[str, float]) -> Callable:
    """`Differentiable.score` of a RAHF: the weighted sum of some of `TERMS`. Its rows are text_ids int32[B, R, L]."""
    module, size = critics.module_of(config), config.image_size

    def score(params, images, rows):
        images = jax.image.resize(images, (len(images), size, size, 3), "linear")  # antialiased, as `predictor.resize`
        scores, heatmaps, *_ = module.apply({"params": params}, images, rows, method="perceive")
        terms = {}
        if scores is not None:
            terms |= zip(schema.SCORES, jnp.moveaxis(scores, -1, 0), strict=True)
        if heatmaps is not None:
            terms |= zip(schema.HEATMAPS, jnp.moveaxis(heatmaps.mean((1, 2)), -1, 0), strict=True)
        return sum(weight * terms[name] for name, weight in weights.items())

    return score


def of_rahf(model, weights: Mapping[str, float], identity: str) -> Differentiable:
    """The score of a `rahf.predictor.Model`."""

    def rows(prompts):
        return np.stack([model.text_ids(prompt) for prompt in prompts])

    return Differentiable(rahf_score(model.model_config, weights), model.params, rows, identity)


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
