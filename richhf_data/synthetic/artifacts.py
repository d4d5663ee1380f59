"""Artifacts that are painted onto a finished picture. Each changes pixels only within the mask that it returns."""

import math

import cv2
import numpy as np

from richhf_data.synthetic import flaws

_BITS = 4


def _window(artifact: flaws.Artifact, size: int, reach: float):
    """((rows, columns) slices, float32 offsets of the window's pixels from the artifact's centre)."""
    x, y, reach = artifact.x * size - 0.5, artifact.y * size - 0.5, reach * artifact.radius * size
    top, bottom = max(0, int(y - reach)), min(size, int(y + reach) + 2)
    left, right = max(0, int(x - reach)), min(size, int(x + reach) + 2)
    dy = np.arange(top, bottom, dtype=np.float32)[:, None] - np.float32(y)
    dx = np.arange(left, right, dtype=np.float32)[None, :] - np.float32(x)
    return (slice(top, bottom), slice(left, right)), dx, dy


def _oval(artifact, rng, size):
    """(window, dx, dy, distance from the centre, 1 at the rim of an oval of the artifact's nominal area)."""
    stretch, turn = 1 + 0.35 * rng.random(), math.pi * rng.random()
    window, dx, dy = _window(artifact, size, 1.4)
    cos, sin, radius = math.cos(turn), math.sin(turn), artifact.radius * size
    along = (cos * dx + sin * dy) / (radius * stretch)
    across = (cos * dy - sin * dx) / (radius / stretch)
    return window, dx, dy, np.sqrt(along * along + across * across)


def _mix(image, window, changed, distance):
    """Blends changed pixels in where distance < 1, softly at the rim; returns the mask."""
    alpha = np.clip((1 - distance) * 5, 0, 1)[..., None]
    view = image[window]
    view[:] = view + alpha * (changed.astype(np.float32) - view)
    mask = np.zeros(image.shape[:2], bool)
    mask[window] = distance < 1
    return mask


def _warp(image, artifact, rng, palette):
    size = image.shape[0]
    window, dx, dy, distance = _oval(artifact, rng, size)
    fade = np.clip(1 - distance, 0, 1)
    turn = (2.6 + 1.6 * rng.random()) * (1 if rng.random() < 0.5 else -1) * fade
    cos, sin = np.cos(turn), np.sin(turn)
    ripple = 0.3 * artifact.radius * size * np.sin(distance * 11) * np.sqrt(fade)
    xs = artifact.x * size - 0.5 + cos * dx - sin * dy + ripple
    ys = artifact.y * size - 0.5 + sin * dx + cos * dy + ripple
    changed = cv2.remap(image, xs, ys, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)
    return _mix(image, window, changed, distance)


def _smear(image, artifact, rng, palette):
    window, _, _, distance = _oval(artifact, rng, image.shape[0])
    length = max(5, round(1.1 * artifact.radius * image.shape[0]))
    kernel = (length, 1) if rng.random() < 0.5 else (1, length)
    view = np.ascontiguousarray(image[window])
    return _mix(image, window, cv2.blur(cv2.blur(view, kernel), kernel), distance)


def _blur(image, artifact, rng, palette):
    window, _, _, distance = _oval(artifact, rng, image.shape[0])
    view = np.ascontiguousarray(image[window])
    return _mix(image, window, cv2.GaussianBlur(view, (0, 0), 0.34 * artifact.radius * image.shape[0]), distance)


def _noise(image, artifact, rng, palette):
    window, _, _, distance = _oval(artifact, rng, image.shape[0])
    height, width = distance.shape
    noise = cv2.resize(rng.integers(0, 256, (9, 9, 3), np.uint8), (width, height), interpolation=cv2.INTER_NEAREST)
    return _mix(image, window, 0.25 * image[window] + 0.75 * noise, distance)


def _fragments(image, artifact, rng, palette):
    size = image.shape[0]
    before, mask = image.copy(), np.zeros((size, size), np.uint8)
    radius, centre = artifact.radius * size, np.array([artifact.x, artifact.y]) * size - 0.5
    for _ in range(8):
        turn, far = 2 * math.pi * rng.random(), radius * 0.78 * math.sqrt(rng.random())
        middle = centre + far * np.array([math.cos(turn), math.sin(turn)])
        angles = 2 * math.pi * (rng.random() + np.array([0, 0.28 + 0.1 * rng.random(), 0.62 + 0.1 * rng.random()]))
        corners = middle + radius * 0.34 * np.stack([np.cos(angles), np.sin(angles)], 1)
        points = [np.rint(corners * (1 << _BITS)).astype(np.int32)]
        colour = palette[int(rng.random() * len(palette))] if rng.random() < 0.6 else rng.integers(0, 256, 3).tolist()
        width = max(1, round(size / 96))
        cv2.fillPoly(image, points, colour, cv2.LINE_AA, _BITS)
        cv2.polylines(image, points, True, (20, 18, 26), width, cv2.LINE_AA, _BITS)
        cv2.fillPoly(mask, points, 1, cv2.LINE_8, _BITS)
    return mask.astype(bool) | (image != before).any(axis=-1)


def _text(image, artifact, rng, palette):
    size, before = image.shape[0], image.copy()
    radius, centre = artifact.radius * size, np.array([artifact.x, artifact.y]) * size - 0.5
    turn = 0.5 * (rng.random() - 0.5)
    turn = np.array([[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]])
    # Five made-up letters on a label, each a stroke through random corners of a 2 x 3 grid.
    box = np.array([(-1.3, -0.6), (1.3, -0.6), (1.3, 0.6), (-1.3, 0.6)])
    label = [np.rint((box @ turn * radius + centre) * (1 << _BITS)).astype(np.int32)]
    width = max(1, round(0.11 * radius))
    paper, ink = ((250, 248, 236), (30, 24, 40)) if rng.random() < 0.7 else ((36, 30, 60), (250, 240, 120))
    cv2.fillPoly(image, label, paper, cv2.LINE_AA, _BITS)
    cv2.polylines(image, label, True, ink, width, cv2.LINE_AA, _BITS)
    for letter in range(5):
        corners = np.stack([0.34 * rng.integers(0, 2, 5), 0.38 * rng.integers(0, 3, 5)], 1)
        stroke = corners + (-1.12 + 0.47 * letter, -0.38)
        points = [np.rint((stroke @ turn * radius + centre) * (1 << _BITS)).astype(np.int32)]
        cv2.polylines(image, points, False, ink, width, cv2.LINE_AA, _BITS)
    mask = np.zeros((size, size), np.uint8)
    cv2.fillPoly(mask, label, 1, cv2.LINE_8, _BITS)
    return mask.astype(bool) | (image != before).any(axis=-1)


_PAINTERS = {
    "warp": _warp,
    "smear": _smear,
    "blur": _blur,
    "noise patch": _noise,
    "fragments": _fragments,
    "nonsense text": _text,
}


def apply(image: np.ndarray, artifact: flaws.Artifact, palette: list) -> np.ndarray:
    """Paints an artifact onto uint8[size, size, 3], in place. palette: RGB colours for fragments.

    Returns:
      bool[size, size], the artifact's region.
    """
    return _PAINTERS[artifact.kind](image, artifact, np.random.default_rng((artifact.seed, 3)), palette)
