"""Where CLIP looks: maps of the pixels that change the similarity of a picture and its prompt, a baseline of paper A.

    maps = GradientMaps("clip")(images, prompts)    # uint8[H, W, 3] of any sizes, texts -> float32[B, size, size] in [0, 1]

    gradient      the absolute gradient of the cosine with respect to the pixels, its maximum over the channels (Simonyan et
                  al., arXiv 1312.6034)
    smoothgrad    the same of the mean gradient of noisy copies (Smilkov et al., arXiv 1706.03825)
    gradcam       the patches' tokens before the last block, weighted by the mean gradient of each channel, where the sum is
                  positive (Selvaraju et al., arXiv 1610.02391)

The first two are smoothed by a Gaussian. Each map is divided by its maximum; a map of zeros stays as it is.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import scipy.ndimage

from rahf.fingerprint import fingerprint
from rahf.models.clip import CLIP, CLIPConfig, unit
from rahf.models.layers import normalize_image
from rahf.reward import embed
from rahf.reward.framing import Axis, placement, prepare
from richhf_data import checked, ranges, schema
from richhf_data.errors import UserError

Array = jax.Array
Kind = Literal["gradient", "smoothgrad", "gradcam"]
AT_ONCE = 8  # pictures whose activations are kept for the backward pass


@dataclasses.dataclass(frozen=True, eq=False)
class GradientMaps:
    """Maps of a CLIP.

    Attributes:
      folder: of rahf.convert, of kind "clip". kind: how the maps are computed.
      sigma: of the Gaussian, in pixels of the map, 0 for none; by default size / 40, 5.6 at 224. A point that an annotator
        marks stands for a disk of radius size / 20 (paper A, section 3.1), and this Gaussian is as wide as such a disk: its
        deviation along an axis is half the radius.
      copies, noise, seed: of SmoothGrad: noisy copies of a picture, their deviation as a share of the pixels' range.

    Raises:
      UserError: an unknown kind, a number out of its range, a folder of another kind.
    """

    folder: Any
    kind: Kind = "gradient"
    sigma: Annotated[float, ranges.Range(0, 8192)] | None = None
    copies: Annotated[int, ranges.COUNT] = 50  # as in the paper's figures
    noise: Annotated[float, ranges.SOME_SHARE] = 0.15  # the paper finds 0.1 to 0.2 good
    seed: Annotated[int, ranges.SEED] = 0

    def __post_init__(self):
        checked.fields(self, "gradient_map")
        assert self.size  # reads the folder

    @functools.cached_property
    def _clip(self) -> embed.Clip:
        return embed.Clip(self.folder)

    @property
    def size(self) -> int:
        """Both sides of a map."""
        return self._clip.config.vision.image_size

    @functools.cached_property
    def _options(self) -> dict:
        """What the kind reads."""
        blurred = {"sigma": self.size / 40 if self.sigma is None else self.sigma}
        noisy = blurred | {"copies": self.copies, "noise": self.noise, "seed": self.seed}
        return {"gradient": blurred, "smoothgrad": noisy, "gradcam": {}}[self.kind]

    @functools.cached_property
    def identity(self) -> str:
        """As of a reward (specs.py)."""
        return fingerprint("gradient_map", self._clip.digest, self.kind, self._options)

    @functools.cached_property
    def _maps(self) -> Callable:
        function = grad_cam if self.kind == "gradcam" else pixel_gradient
        return jax.jit(functools.partial(function, self._clip.config, **self._options))

    def __call__(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> np.ndarray:
        """B images, each uint8[H, W, 3] of any size, and B prompts -> float32[B, size, size] in [0, 1].

        A map covers the whole picture, squeezed to a square. It is 0 where CLIP does not look: at the ends of the longer
        side, which are cut off. A prompt that is too long loses its last pieces.

        Raises:
          UserError: different numbers of images and prompts, an image of another type, weights that are damaged.
        """
        if len(images) != len(prompts):
            raise UserError(f"gradient map: got {len(images)} images and {len(prompts)} prompts, expected as many")
        out = [np.zeros((0, self.size, self.size), np.float32)]
        for i in range(0, len(images), AT_ONCE):
            some = images[i : i + AT_ONCE]
            texts = self._clip.texts(prompts[i : i + AT_ONCE], cut=True)
            pixels = np.stack([prepare(image, self.size) for image in some])
            inputs = (schema.pad_rows(x, AT_ONCE) for x in (pixels, texts))
            maps = np.asarray(self._maps(self._clip.params, *inputs))[: len(some)]
            out += [whole_picture(one, *image.shape[:2])[None] for one, image in zip(maps, some, strict=True)]
        return np.concatenate(out)


def whole_picture(crop: np.ndarray, height: int, width: int) -> np.ndarray:
    """A map of CLIP's square of a picture -> the map of the whole picture of height x width pixels, as a square too.

    Args:
      crop: float32[size, size]. Each pixel covers as much of the result as of the picture.

    Returns:
      float32[size, size], the maximum 1 again, 0 outside of CLIP's square.
    """
    size = len(crop)
    rows, columns = (
        _spread(size, side, axis)
        for side, axis in zip((height, width), placement(height, width, size, "hugging_face"), strict=True)
    )
    return normalised(rows @ crop @ columns.T)


def _spread(size: int, side: int, axis: Axis) -> np.ndarray:
    """float32[size, size]: which mean of a crop's pixels each pixel of the whole picture has, along one axis."""
    if axis.scaled == size and not axis.cut:
        return np.eye(size, dtype=np.float32)
    # Edges of the crop's pixels in the whole picture, in pixels of the result.
    scale = (side - 2 * axis.cut) / axis.scaled
    edges = (axis.cut + (axis.start + np.arange(size + 1)) * scale) * size / side
    pixels = np.arange(size)[:, None]
    overlap = np.minimum(edges[None, 1:], pixels + 1) - np.maximum(edges[None, :-1], pixels)
    return np.clip(overlap, 0, None).astype(np.float32)


# ---- In JAX ---------------------------------------------------------------------------------------------------------
def similarity(config: CLIPConfig, params, pixels: Array, texts: Array) -> Array:
    """The cosine: [B, size, size, 3] and embeddings of unit length float32[B, E] -> float32[B]."""
    images = CLIP(config).apply({"params": params}, pixels, method="encode_image")
    return jnp.sum(unit(images) * texts, axis=-1)


def pixel_gradient(
    config: CLIPConfig,
    params,
    pixels: Array,
    texts: Array,
    *,
    sigma: float,
    noise: float = 0,
    copies: int = 1,
    seed: int = 0,
) -> Array:
    """Maps of the gradient of the similarity with respect to the pixels.

    Args:
      pixels: float32[B, size, size, 3] in [-1, 1], or uint8. texts: float32[B, E] of unit length.
      sigma: of the Gaussian, in pixels. noise: the deviation as a share of the pixels' range, 0 for the pixels alone.
      copies: noisy copies. A copy's noise is the same for every picture, so that a map does not depend on its batch.

    Returns:
      float32[B, size, size] in [0, 1].
    """
    pixels = normalize_image(pixels)
    gradient = jax.grad(lambda x: similarity(config, params, x, texts).sum())
    if noise:

        def add(total, key):
            drawn = 2 * noise * jax.random.normal(key, (1, *pixels.shape[1:]))  # the range of the pixels is 2
            return total + gradient(pixels + drawn), None

        found, _ = jax.lax.scan(add, jnp.zeros_like(pixels), jax.random.split(jax.random.key(seed), copies))
    else:
        found = gradient(pixels)
    maps = jnp.abs(found).max(-1)
    blur = jnp.asarray(gaussian(maps.shape[1], sigma))
    return normalised(jnp.einsum("ih,bhw,jw->bij", blur, maps, blur, precision=jax.lax.Precision.HIGHEST))


def gaussian(size: int, sigma: float) -> np.ndarray:
    """float32[size, size]: the matrix that smooths a column, whose ends are mirrored."""
    eye = np.eye(size)
    return (scipy.ndimage.gaussian_filter1d(eye, sigma, axis=0) if sigma else eye).astype(np.float32)


def grad_cam(config: CLIPConfig, params, pixels: Array, texts: Array) -> Array:
    """Grad-CAM of the patches' tokens before the image tower's last block. Arguments and result as of `pixel_gradient`."""
    tower, batch = config.vision, len(pixels)
    last = "vision", f"block_{tower.depth - 1}"

    def of_tokens(change: Array):
        kept = []

        def add(block: Callable, args, kwargs, context):
            if context.module.path != last or context.method_name != "__call__":
                return block(*args, **kwargs)
            kept.append(args[0])
            return block(args[0] + change, *args[1:], **kwargs)

        with nn.intercept_methods(add):
            found = similarity(config, params, pixels, texts).sum()
        return found, kept[0]

    gradient, tokens = jax.grad(of_tokens, has_aux=True)(jnp.zeros((batch, tower.length, tower.width)))
    weights = gradient[:, 1:].mean(1, keepdims=True)  # [B, 1, D], without the class token
    maps = nn.relu(jnp.sum(weights * tokens[:, 1:], axis=-1))  # [B, P]
    side, size = tower.image_size // tower.patch_size, tower.image_size
    return normalised(jax.image.resize(maps.reshape(batch, side, side), (batch, size, size), "linear"))


def normalised(maps):
    """float32[..., h, w] at least 0 -> divided by the maximum of each map; zeros stay zeros."""
    highest = maps.max((-2, -1), keepdims=True)
    return maps / (highest + (highest == 0).astype(highest.dtype))
