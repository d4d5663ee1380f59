"""How CLIP and the scores built on it cut a picture of any size to the square that they read, bicubically.

hugging_face   the shorter side is scaled to the square's, then the middle is kept, as CLIP's processor in transformers
torchvision    the same, as the transforms of OpenAI, OpenCLIP and ImageReward: an odd rest is split the other way
padded         the longer side is scaled to the square's, and the rest is black, as in HPSv2
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image

from richhf_data.errors import UserError

Array = jax.Array
Frame = Literal["hugging_face", "torchvision", "padded"]
_MAX_ASPECT = 64  # of a picture; more is cut off before, so that the scaled picture stays small


class Axis(NamedTuple):
    """What happens to the rows, or to the columns, of a picture.

    Attributes:
      cut: how many are dropped at either end first. scaled: how many the others are scaled to.
      start: which of these is the square's first; below 0, black comes before them.
    """

    cut: int
    scaled: int
    start: int


def placement(height: int, width: int, size: int, frame: Frame) -> tuple[Axis, Axis]:
    """What happens to the rows and to the columns of a picture of height x width pixels."""
    shorter, longer = sorted((height, width))

    def axis(side):
        if frame == "padded":
            # HPSv2 refuses a side that scales to 0 pixels.
            scaled = max(1, round(side * (size / longer)))
            return Axis(0, scaled, -((size - scaled) // 2))
        cut = max(0, side - _MAX_ASPECT * shorter) // 2
        scaled = max(size, int(size * (side - 2 * cut) / shorter))
        rest = scaled - size
        return Axis(cut, scaled, rest // 2 if frame == "hugging_face" else round(rest / 2))

    return axis(height), axis(width)


def prepare(image: np.ndarray, size: int, frame: Frame = "hugging_face") -> np.ndarray:
    """uint8[H, W, 3] -> the square, uint8[size, size, 3], or in a padded frame float32 about in [-1, 1].

    HPSv2 scales numbers that are neither rounded nor clipped, so its values pass the ends of the range at sharp edges.

    Raises:
      UserError: another shape or dtype.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
        raise UserError(f"image: got {image.dtype}{list(image.shape)}, expected uint8[H, W, 3]")
    if image.shape[:2] == (size, size) and frame != "padded":
        return image
    rows, columns = placement(*image.shape[:2], size, frame)
    image = image[rows.cut : image.shape[0] - rows.cut, columns.cut : image.shape[1] - columns.cut]
    box = columns.start, rows.start, columns.start + size, rows.start + size

    def squared(picture):
        return np.asarray(picture.resize((columns.scaled, rows.scaled), PIL.Image.Resampling.BICUBIC).crop(box))

    if frame != "padded":
        return squared(PIL.Image.fromarray(image))
    channels = [squared(PIL.Image.fromarray(channel)) for channel in np.moveaxis(image, -1, 0).astype(np.float32)]
    return np.stack(channels, axis=-1) / np.float32(127.5) - 1


def framed(images: Array, size: int, frame: Frame = "hugging_face") -> Array:
    """`prepare` in JAX: float[B, H, W, 3] in [-1, 1] -> float[B, size, size, 3], without rounding."""
    for number, axis in enumerate(placement(*images.shape[1:3], size, frame), 1):
        side = images.shape[number]
        images = jax.lax.slice_in_dim(images, axis.cut, side - axis.cut, axis=number)
        if axis.scaled != images.shape[number]:
            shape = (*images.shape[:number], axis.scaled, *images.shape[number + 1 :])
            images = jax.image.resize(images, shape, "cubic")
        before, after = max(0, -axis.start), max(0, axis.start + size - axis.scaled)
        widths = [(0, 0)] * number + [(before, after)] + [(0, 0)] * (3 - number)
        images = jnp.pad(images, widths, constant_values=-1) if before or after else images
        images = jax.lax.slice_in_dim(images, axis.start + before, axis.start + before + size, axis=number)
    return images
