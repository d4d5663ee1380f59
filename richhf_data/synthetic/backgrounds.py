"""The ten backgrounds. Each paints uint8[size, size, 3] in place; positions are fractions of the picture."""

import cv2
import numpy as np

_BITS = 4  # sub-pixel bits of cv2's coordinates


def polygon(image: np.ndarray, points, colour) -> None:
    """Fills one polygon, given in fractions of the picture, anti-aliased."""
    corners = np.round((np.asarray(points) * image.shape[0] - 0.5) * (1 << _BITS)).astype(np.int32)
    cv2.fillPoly(image, [corners], colour, cv2.LINE_AA, _BITS)


def disk(image: np.ndarray, x, y, rx, ry, colour) -> None:
    """Fills one upright ellipse, given in fractions of the picture, anti-aliased."""
    scale = image.shape[0] * (1 << _BITS)
    centre = round(x * scale - (1 << _BITS) / 2), round(y * scale - (1 << _BITS) / 2)
    cv2.ellipse(image, centre, (round(rx * scale), round(ry * scale)), 0, 0, 360, colour, -1, cv2.LINE_AA, _BITS)


def _fade(image, top, bottom, start, stop):
    """A vertical gradient between two heights."""
    size = image.shape[0]
    first, last = int(start * size), int(np.ceil(stop * size))
    weight = np.linspace(0, 1, last - first)[:, None]
    rows = (1 - weight) * np.array(top) + weight * np.array(bottom)
    image[first:last] = rows[:, None, :].astype(np.uint8)


def _ridge(rng, base, height, steps):
    """The points of a bumpy horizon, closed at the bottom."""
    xs = np.linspace(-0.02, 1.02, steps)
    ys = base + height * (2 * rng.random(steps) - 1)
    return [*zip(xs, ys, strict=True), (1.02, 1.02), (-0.02, 1.02)]


def _forest(image, rng):
    _fade(image, (96, 150, 110), (58, 104, 66), 0, 0.7)
    _fade(image, (70, 92, 48), (46, 66, 34), 0.68, 1)
    for x in np.linspace(0, 1, 8) + 0.08 * (rng.random(8) - 0.5):
        width, top = 0.02 + 0.015 * rng.random(), 0.05 + 0.1 * rng.random()
        polygon(image, [(x - width, 0.74), (x - width, top), (x + width, top), (x + width, 0.74)], (70, 50, 36))
        for level in range(3):
            y = top + 0.14 * level
            polygon(image, [(x - 0.1, y + 0.16), (x, y - 0.12), (x + 0.1, y + 0.16)], (26, 74 + 8 * level, 44))


def _city(image, rng):
    _fade(image, (150, 170, 200), (225, 205, 190), 0, 0.8)
    x = -0.02
    while x < 1:
        width, top = 0.1 + 0.08 * rng.random(), 0.12 + 0.35 * rng.random()
        grey = int(70 + 60 * rng.random())
        polygon(image, [(x, 0.78), (x, top), (x + width, top), (x + width, 0.78)], (grey, grey, grey + 18))
        for column in range(2):
            for row in range(4):
                left, up = x + width * (0.2 + 0.4 * column), top + 0.04 + 0.08 * row
                if rng.random() < 0.7 and up < 0.7:
                    polygon(
                        image,
                        [(left, up), (left + 0.025, up), (left + 0.025, up + 0.035), (left, up + 0.035)],
                        (250, 226, 140),
                    )
        x += width + 0.005
    _fade(image, (96, 96, 102), (66, 66, 74), 0.76, 1)
    for x in np.arange(0, 1, 0.22):
        polygon(image, [(x, 0.87), (x + 0.12, 0.87), (x + 0.12, 0.895), (x, 0.895)], (235, 235, 220))


def _beach(image, rng):
    _fade(image, (120, 196, 245), (200, 232, 250), 0, 0.42)
    disk(image, 0.15 + 0.7 * rng.random(), 0.13, 0.08, 0.08, (255, 244, 170))
    _fade(image, (30, 130, 190), (70, 190, 205), 0.4, 0.66)
    polygon(image, _ridge(rng, 0.61, 0.015, 9), (246, 250, 250))
    polygon(image, _ridge(rng, 0.64, 0.015, 9), (238, 214, 158))
    for x, y in rng.random((10, 2)):
        disk(image, x, 0.7 + 0.28 * y, 0.02, 0.008, (212, 184, 126))


def _desert(image, rng):
    _fade(image, (250, 214, 150), (252, 236, 200), 0, 0.6)
    disk(image, 0.15 + 0.7 * rng.random(), 0.16, 0.09, 0.09, (255, 250, 225))
    for base, colour in ((0.5, (226, 160, 92)), (0.64, (210, 138, 70)), (0.8, (190, 116, 56))):
        polygon(image, _ridge(rng, base, 0.06, 6), colour)


def _snow(image, rng):
    _fade(image, (176, 196, 220), (222, 232, 242), 0, 0.6)
    polygon(image, _ridge(rng, 0.52, 0.03, 6), (236, 242, 250))
    polygon(image, _ridge(rng, 0.72, 0.03, 6), (250, 252, 255))
    for x, y in rng.random((26, 2)):
        disk(image, x, y, 0.012, 0.012, (255, 255, 255))


def _moon(image, rng):
    _fade(image, (6, 6, 18), (20, 18, 40), 0, 0.62)
    for x, y in rng.random((30, 2)):
        disk(image, x, 0.55 * y, 0.006, 0.006, (250, 250, 240))
    x = 0.2 + 0.6 * rng.random()
    disk(image, x, 0.16, 0.09, 0.09, (50, 110, 200))
    disk(image, x + 0.02, 0.14, 0.04, 0.03, (80, 170, 90))
    polygon(image, _ridge(rng, 0.55, 0.02, 7), (150, 150, 154))
    for x, y in rng.random((9, 2)):
        disk(image, x, 0.62 + 0.36 * y, 0.06, 0.025, (112, 112, 118))
        disk(image, x, 0.627 + 0.36 * y, 0.05, 0.018, (132, 132, 138))


def _sea(image, rng):
    _fade(image, (28, 140, 200), (8, 40, 110), 0, 1)
    for level in range(7):
        y, shift = 0.08 + 0.135 * level, rng.random()
        xs = np.linspace(0, 1, 25)
        wave = y + 0.018 * np.sin(2 * np.pi * (4 * xs + shift))
        band = [*zip(xs, wave, strict=True), *zip(xs[::-1], wave[::-1] + 0.022, strict=True)]
        polygon(image, band, (70, 172, 216) if level < 4 else (36, 100, 170))
    for x, y in rng.random((12, 2)):
        disk(image, x, y, 0.012, 0.012, (150, 215, 240))


def _field(image, rng):
    _fade(image, (96, 170, 240), (190, 224, 250), 0, 0.6)
    for x, y in rng.random((3, 2)):
        for shift in (-0.07, 0, 0.07):
            disk(image, x + shift, 0.08 + 0.2 * y, 0.08, 0.04, (250, 252, 255))
    polygon(image, _ridge(rng, 0.53, 0.03, 6), (126, 190, 80))
    _fade(image, (112, 182, 66), (70, 138, 44), 0.6, 1)
    for x, y in rng.random((16, 2)):
        foot = 0.64 + 0.35 * y
        polygon(image, [(x - 0.02, foot), (x, foot - 0.05), (x + 0.02, foot)], (58, 118, 36))


def _table(image, rng):
    _fade(image, (232, 214, 196), (212, 190, 170), 0, 0.5)
    for x in np.arange(0.05 + 0.05 * rng.random(), 1, 0.14):
        polygon(image, [(x, 0), (x + 0.05, 0), (x + 0.05, 0.5), (x, 0.5)], (200, 164, 150))
    _fade(image, (176, 116, 66), (140, 86, 46), 0.48, 1)
    polygon(image, [(0, 0.47), (1, 0.47), (1, 0.5), (0, 0.5)], (102, 60, 32))
    for y in (0.6, 0.72, 0.86):
        polygon(image, [(0, y), (1, y + 0.01), (1, y + 0.022), (0, y + 0.012)], (112, 68, 36))


def _mountains(image, rng):
    _fade(image, (140, 160, 214), (238, 206, 204), 0, 0.8)
    for x, top, half in ((0.2, 0.2, 0.34), (0.8, 0.24, 0.36), (0.5, 0.1, 0.4)):
        x, top = x + 0.1 * (rng.random() - 0.5), top + 0.08 * rng.random()
        polygon(image, [(x - half, 0.82), (x, top), (x + half, 0.82)], (92, 84, 116))
        cap = 0.26
        polygon(
            image,
            [
                (x - half * cap, top + (0.82 - top) * cap),
                (x, top),
                (x + half * cap, top + (0.82 - top) * cap),
                (x + half * 0.1, top + 0.12),
                (x, top + 0.2),
                (x - half * 0.12, top + 0.12),
            ],
            (246, 246, 252),
        )
    _fade(image, (78, 106, 84), (52, 76, 62), 0.8, 1)


PAINTERS = {
    "forest": _forest,
    "city": _city,
    "beach": _beach,
    "desert": _desert,
    "snow": _snow,
    "moon": _moon,
    "sea": _sea,
    "field": _field,
    "table": _table,
    "mountains": _mountains,
}


def paint(name: str, rng: np.random.Generator, size: int) -> np.ndarray:
    """uint8[size, size, 3]: the background with a soft texture."""
    image = np.zeros((size, size, 3), np.uint8)
    PAINTERS[name](image, rng)
    texture = cv2.resize(rng.integers(0, 22, (12, 12), np.uint8), (size, size), interpolation=cv2.INTER_CUBIC)
    return cv2.subtract(image, cv2.merge([texture] * 3))
