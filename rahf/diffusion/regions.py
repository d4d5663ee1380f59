"""The region of a picture to draw anew: from a heatmap to a mask, and to square windows that a generator can draw."""

import typing
from collections.abc import Sequence

import cv2
import numpy as np

MAX_WINDOWS = 64  # of a picture; with more, one window holds them all


class Window(typing.NamedTuple):
    """A square of `side` pixels whose first pixel is (top, left); a part of it may lie outside of the picture."""

    top: int
    left: int
    side: int

    def overlaps(self, other: "Window") -> bool:
        """Whether they have a pixel in common."""
        return all(a < b + other.side and b < a + self.side for a, b in zip(self[:2], other[:2], strict=True))


def mask_of(heatmap: np.ndarray, shape: Sequence[int], threshold: float, dilation: float, smallest: float) -> np.ndarray:
    """The flawed region of a picture, bool[H, W].

    The heatmap is stretched over the picture (bilinear). Pixels of `threshold` or more are flawed. Groups of them that
    touch, also at corners, are dropped if they are small; the rest grows by a disk.

    Args:
      heatmap: float32[h, w] in [0, 1]. shape: (H, W).
      dilation: radius of the disk, as a share of the shorter side. smallest: of a group, as a share of the picture.
    """
    height, width = shape
    values = cv2.resize(np.asarray(heatmap, np.float32), (width, height), interpolation=cv2.INTER_LINEAR)
    flawed = (values >= threshold).astype(np.uint8)
    _, numbers, stats, _ = cv2.connectedComponentsWithStats(flawed, connectivity=8)
    large = stats[:, cv2.CC_STAT_AREA] >= smallest * height * width
    large[0] = False  # the rest of the picture
    kept = large[numbers]
    radius = dilation * min(height, width)
    if not kept.any() or radius < 1:
        return kept
    distance = cv2.distanceTransform((~kept).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    return distance <= radius


def opacity(mask: np.ndarray, feather: float) -> np.ndarray:
    """How much of the new picture shows, float32[H, W]: 0 outside of the mask, rising to 1 within `feather` pixels of it."""
    if not mask.any() or mask.all() or feather < 1:
        return mask.astype(np.float32)
    inside = cv2.distanceTransform(mask.astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    return np.minimum(inside / np.float32(feather + 1), 1)


def windows_of(mask: np.ndarray, size: int, context: float) -> list[Window]:
    """Windows without a common pixel that cover the mask, each group of its pixels whole in one.

    A window is `context` times as wide as its groups' box, and `size` pixels or more as far as the picture has them. It lies
    inside of the picture where it fits.

    Args:
      mask: bool[H, W]. size: pixels that a generator draws, both sides.
    """
    count, _, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    boxes = [(y, x, y + h, x + w) for x, y, w, h, _ in stats[1:].tolist()]
    if count - 1 > MAX_WINDOWS:
        boxes = [_union(boxes)]
    found = [(box, _around(box, mask.shape, size, context)) for box in boxes]
    while pair := next(((a, b) for a in found for b in found if a is not b and a[1].overlaps(b[1])), None):
        box = _union([one[0] for one in pair])
        found = [one for one in found if one not in pair] + [(box, _around(box, mask.shape, size, context))]
    return sorted(window for _, window in found)


def _union(boxes) -> tuple[int, int, int, int]:
    tops, lefts, bottoms, rights = zip(*boxes, strict=True)
    return min(tops), min(lefts), max(bottoms), max(rights)


def _around(box, shape, size, context) -> Window:
    top, left, bottom, right = box
    longer = max(bottom - top, right - left)
    side = max(longer, min(max(round(context * longer), size), max(shape)))
    places = []
    for first, last, length in ((top, bottom, shape[0]), (left, right, shape[1])):
        middle = (first + last - side) // 2
        places.append(min(max(middle, 0), length - side) if side <= length else (length - side) // 2)
    return Window(*places, side)


def cut(array: np.ndarray, window: Window, beyond: int = cv2.BORDER_REPLICATE) -> np.ndarray:
    """The window's pixels, [side, side, ...]. beyond: what lies outside of the picture, a border type of OpenCV."""
    (rows, top, bottom), (columns, left, right) = _inside(window, array.shape)
    return cv2.copyMakeBorder(array[rows, columns], top, bottom, left, right, beyond)


def _inside(window: Window, shape) -> list[tuple[slice, int, int]]:
    """For rows and columns: those of the picture in the window, and how many lie before and after them."""
    found = []
    for first, length in zip(window[:2], shape, strict=False):
        start, stop = max(first, 0), min(first + window.side, length)
        found.append((slice(start, stop), start - first, first + window.side - stop))
    return found


def scaled(array: np.ndarray, size: int) -> np.ndarray:
    """A square picture, [n, n, ...], at another size."""
    if len(array) == size:
        return array
    shrinks = len(array) > size
    return cv2.resize(array, (size, size), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC)


def to_draw(mask: np.ndarray, window: Window, size: int, cell: int) -> np.ndarray:
    """The mask in a window at the generator's size, bool[size, size]: every cell of pixels that it touches, whole.

    cell: pixels of a latent, both sides; a divisor of `size`.
    """
    part = cut(mask.astype(np.uint8), window, cv2.BORDER_CONSTANT).astype(np.float32)
    cells = (
        (scaled(part, size) > (0 if window.side >= size else 1e-3))
        .reshape(size // cell, cell, size // cell, cell)
        .any((1, 3))
    )
    return cells.repeat(cell, 0).repeat(cell, 1)


def put_back(image: np.ndarray, drawn: np.ndarray, window: Window, shows: np.ndarray) -> None:
    """Lays a drawn window over a picture, in place.

    Args:
      image: uint8[H, W, 3]. drawn: float32[S, S, 3] in [-1, 1]. shows: `opacity`, float32[H, W]; where it is 0, the picture
        stays bit for bit.
    """
    (rows, top, _), (columns, left, _) = _inside(window, image.shape)
    new = scaled((np.clip(drawn, -1, 1) + 1) * 127.5, window.side)
    old, share = image[rows, columns], shows[rows, columns]
    new = new[top : top + old.shape[0], left : left + old.shape[1]]
    mixed = np.rint(np.clip(old + share[..., None] * (new - old), 0, 255)).astype(np.uint8)
    old[share > 0] = mixed[share > 0]
