"""Draws annotations and predictions: heatmap colours, marked words, and the parts that all HTML pages share.

A colour stands for the same heatmap value in every picture: the colour scale runs over the square root of the value, from
0 (the grey image shows) to 1. Most predictions are small, and a linear scale would hide a value of 0.1; a separate scale
for each map would make a nearly empty map look alarming.

A page is a template beside its Python file. It extends `page.html.jinja` and contains its pictures as data URIs.
"""

import base64
import pathlib
from collections.abc import Sequence

import cv2
import jinja2
import matplotlib
import matplotlib.colors
import numpy as np

from richhf_data import keywords
from richhf_data.errors import UserError

JPEG_QUALITY = 85

# Without inferno's darkest quarter, which looks like a dark image.
COLORMAP = matplotlib.colors.ListedColormap(matplotlib.colormaps["inferno"](np.linspace(0.25, 1, 256)))
_SCALE_TICKS = (0.0, 0.05, 0.25, 0.5, 1.0)


def overlay(image: np.ndarray, heatmap: np.ndarray) -> np.ndarray:
    """Paints a heatmap over the image in grey: uint8[H, W, 3], float[h, w] in [0, 1] -> uint8[H, W, 3].

    Colour and opacity follow the square root of the value (see the module's docstring).

    Raises:
      UserError: the image is not uint8[H, W, 3], or the heatmap not [h, w] in [0, 1].
    """
    check_image("image", image)
    check_heatmap("heatmap", heatmap)
    height, width = image.shape[:2]
    heatmap = cv2.resize(np.asarray(heatmap, np.float32), (width, height), interpolation=cv2.INTER_LINEAR)
    level = np.sqrt(np.clip(heatmap, 0, 1))[..., None]
    grey = 0.85 * cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_RGB2GRAY)[..., None]
    color = 255 * COLORMAP(level[..., 0])[..., :3]
    opacity = np.minimum(1.2 * level, 0.85)
    return np.rint(opacity * color + (1 - opacity) * grey).astype(np.uint8)


def words(prompt: str, labels: Sequence[int | None]) -> list[tuple[str, str]]:
    """The prompt in pieces, each with its kind: "misaligned", "missing" (no label) or "".

    >>> words("a yellow cat!", [1, 0, None])
    [('a', ''), (' ', ''), ('yellow', 'misaligned'), (' ', ''), ('cat', 'missing'), ('!', '')]
    """
    pieces, end = [], 0
    for token, label in zip(keywords.tokenize(prompt), labels, strict=True):
        start = prompt.index(token, end)
        if start > end:
            pieces.append((prompt[end:start], ""))
        end = start + len(token)
        pieces.append((token, {keywords.MISALIGNED: "misaligned", None: "missing"}.get(label, "")))
    return [*pieces, (prompt[end:], "")] if prompt[end:] else pieces


def shrink(image: np.ndarray, side: int) -> np.ndarray:
    """The image, scaled down so that its longer side has at most `side` pixels."""
    scale = side / max(image.shape[:2])
    if scale >= 1:
        return image
    size = [max(1, round(length * scale)) for length in image.shape[1::-1]]
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA)


def jpeg(image: np.ndarray, quality: int = JPEG_QUALITY) -> str:
    """uint8[H, W, 3] as a data URI."""
    done, data = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])
    assert done
    return data_uri("image/jpeg", data.tobytes())


def data_uri(kind: str, data: bytes) -> str:
    """A data URI, which embeds a file in a page."""
    return f"data:{kind};base64," + base64.b64encode(data).decode()


def templates(folder: pathlib.Path) -> jinja2.Environment:
    """The templates of a folder and those of all pages. They escape everything that they print."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([folder, pathlib.Path(__file__).parent]),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.globals["gradient"] = ", ".join(matplotlib.colors.to_hex(COLORMAP(x)) for x in np.linspace(0, 1, 9))
    environment.globals["ticks"] = [(value, 100 * value**0.5) for value in _SCALE_TICKS]
    return environment


def check_image(name: str, image: np.ndarray) -> None:
    """Raises UserError unless the image is uint8[H, W, 3]."""
    if np.asarray(image).dtype != np.uint8 or np.ndim(image) != 3 or np.shape(image)[2] != 3 or not np.size(image):
        got = f"{np.asarray(image).dtype}{list(np.shape(image))}"
        raise UserError(f"{name}: got {got}, expected uint8[H, W, 3]")


def check_heatmap(name: str, heatmap: np.ndarray) -> None:
    """Raises UserError unless the heatmap is [h, w] with values in [0, 1]."""
    if np.ndim(heatmap) != 2 or not np.size(heatmap):
        raise UserError(f"{name}: got shape {np.shape(heatmap)}, expected [h, w]")
    low, high = float(np.min(heatmap)), float(np.max(heatmap))
    if not (low >= 0 and high <= 1):  # false for nan too
        raise UserError(f"{name}: got values from {low} to {high}, expected [0, 1] (divide uint8 by 255)")
