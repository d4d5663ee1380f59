"""The fourteen kinds of thing as parts, and the parts as polygons.

Coordinates: x to the right and y down, both in [-1, 1]; a thing fills the square. A part's shapes are painted in order.
A tone is "main" (the thing's colour), "dark" (a darker shade of it), or a fixed RGB colour. A `loose` part is large
enough to be seen missing or doubled at 64 pixels.
"""

import dataclasses

import numpy as np

INK, WOOD, LEAF, CREAM = (30, 26, 34), (122, 80, 46), (66, 140, 62), (246, 232, 200)
GLASS, SUN, STEEL, TAN = (170, 215, 240), (250, 170, 40), (150, 156, 165), (216, 180, 130)


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of a thing: what may be missing or doubled."""

    name: str
    shapes: tuple[tuple[np.ndarray, str | tuple[int, int, int]], ...]  # (float32[points, 2], tone)
    loose: bool = False


def _ellipse(x, y, rx, ry, angle=0.0, points=18):
    turn = np.linspace(0, 2 * np.pi, points, endpoint=False)
    cos, sin = np.cos(np.radians(angle)), np.sin(np.radians(angle))
    u, v = rx * np.cos(turn), ry * np.sin(turn)
    return np.stack([x + u * cos - v * sin, y + u * sin + v * cos], 1).astype(np.float32)


def _polygon(*points):
    return np.array(points, np.float32)


def _box(left, top, right, bottom):
    return _polygon((left, top), (right, top), (right, bottom), (left, bottom))


def _bar(x0, y0, x1, y1, width):
    direction = np.array([x1 - x0, y1 - y0])
    normal = np.array([-direction[1], direction[0]]) / np.hypot(*direction) * width / 2
    start, end = np.array([x0, y0]), np.array([x1, y1])
    return np.array([start + normal, end + normal, end - normal, start - normal], np.float32)


def _part(name, *shapes, loose=False):
    return Part(name, tuple(shapes), loose)


THINGS = {
    "cat": (
        _part(
            "tail",
            (_polygon((0.25, 0.7), (0.68, 0.55), (0.7, -0.1), (0.98, -0.15), (1, 0.7), (0.4, 0.97)), "dark"),
            loose=True,
        ),
        _part("body", (_ellipse(-0.05, 0.45, 0.55, 0.52), "main")),
        _part("legs", (_bar(-0.32, 0.55, -0.32, 1, 0.24), "main"), (_bar(0.18, 0.55, 0.18, 1, 0.24), "main")),
        _part(
            "head",
            (_polygon((-0.68, -0.3), (-0.66, -1), (-0.16, -0.62)), "dark"),
            (_polygon((0.48, -0.3), (0.46, -1), (-0.04, -0.62)), "dark"),
            (_ellipse(-0.1, -0.28, 0.6, 0.45), "main"),
            (_ellipse(-0.34, -0.34, 0.12, 0.13), (190, 240, 120)),
            (_ellipse(0.14, -0.34, 0.12, 0.13), (190, 240, 120)),
            (_ellipse(-0.34, -0.34, 0.05, 0.11), INK),
            (_ellipse(0.14, -0.34, 0.05, 0.11), INK),
            (_polygon((-0.18, -0.16), (-0.02, -0.16), (-0.1, -0.06)), (240, 150, 160)),
            loose=True,
        ),
    ),
    "bird": (
        _part("legs", (_bar(-0.1, 0.5, -0.1, 1, 0.1), SUN), (_bar(0.2, 0.5, 0.2, 1, 0.1), SUN)),
        _part("tail", (_polygon((-0.35, 0.0), (-1, -0.4), (-1, 0.3), (-0.4, 0.35)), "dark"), loose=True),
        _part("body", (_ellipse(0, 0.2, 0.62, 0.45), "main")),
        _part(
            "head",
            (_polygon((0.68, -0.62), (1, -0.4), (0.68, -0.28)), SUN),
            (_ellipse(0.48, -0.45, 0.34, 0.34), "main"),
            (_ellipse(0.56, -0.52, 0.09, 0.09), (255, 255, 255)),
            (_ellipse(0.58, -0.52, 0.05, 0.05), INK),
            loose=True,
        ),
        _part("wing", (_polygon((0.28, 0.05), (-0.3, -0.7), (-0.72, -0.75), (-0.35, 0.42)), "dark"), loose=True),
    ),
    "fish": (
        _part("tail", (_polygon((0.35, 0), (1, -0.6), (0.82, 0), (1, 0.6)), "dark"), loose=True),
        _part("fin", (_polygon((-0.4, -0.3), (0.1, -0.88), (0.3, -0.25)), "dark"), loose=True),
        _part("body", (_ellipse(-0.2, 0, 0.78, 0.52), "main")),
        _part("belly fin", (_polygon((-0.2, 0.12), (0.12, 0.5), (0.2, 0.14)), "dark")),
        _part(
            "face",
            (_ellipse(-0.62, -0.12, 0.13, 0.13), (255, 255, 255)),
            (_ellipse(-0.64, -0.12, 0.07, 0.07), INK),
            (_bar(-0.95, 0.14, -0.7, 0.18, 0.06), INK),
        ),
    ),
    "butterfly": (
        _part(
            "left wing",
            (_ellipse(-0.5, -0.35, 0.5, 0.5, 25), "main"),
            (_ellipse(-0.42, 0.5, 0.38, 0.42, -25), "dark"),
            (_ellipse(-0.55, -0.35, 0.17, 0.17), CREAM),
            loose=True,
        ),
        _part(
            "right wing",
            (_ellipse(0.5, -0.35, 0.5, 0.5, -25), "main"),
            (_ellipse(0.42, 0.5, 0.38, 0.42, 25), "dark"),
            (_ellipse(0.55, -0.35, 0.17, 0.17), CREAM),
            loose=True,
        ),
        _part(
            "body",
            (_bar(0, -0.5, -0.25, -1, 0.07), INK),
            (_bar(0, -0.5, 0.25, -1, 0.07), INK),
            (_ellipse(0, 0.05, 0.11, 0.68), INK),
        ),
    ),
    "snail": (
        _part(
            "foot",
            (_polygon((-1, 0.9), (-0.95, 0.1), (-0.6, 0.1), (-0.5, 0.6), (1, 0.75), (1, 0.95)), TAN),
            (_bar(-0.88, 0.15, -1, -0.3, 0.08), TAN),
            (_bar(-0.68, 0.15, -0.6, -0.3, 0.08), TAN),
        ),
        _part(
            "shell",
            (_ellipse(0.2, 0.0, 0.72, 0.74), "main"),
            (_ellipse(0.15, 0.05, 0.46, 0.47), "dark"),
            (_ellipse(0.12, 0.08, 0.24, 0.24), "main"),
            loose=True,
        ),
        _part("eyes", (_ellipse(-1, -0.34, 0.09, 0.09), INK), (_ellipse(-0.58, -0.34, 0.09, 0.09), INK)),
    ),
    "robot": (
        _part("left arm", (_bar(-0.5, 0.0, -0.92, 0.45, 0.22), "dark"), loose=True),
        _part("right arm", (_bar(0.5, 0.0, 0.92, 0.45, 0.22), "dark"), loose=True),
        _part("legs", (_box(-0.38, 0.55, -0.1, 1), "dark"), (_box(0.1, 0.55, 0.38, 1), "dark")),
        _part("body", (_box(-0.55, -0.15, 0.55, 0.68), "main"), (_box(-0.28, 0.08, 0.28, 0.4), STEEL)),
        _part(
            "head",
            (_bar(0, -0.7, 0, -1, 0.08), STEEL),
            (_box(-0.42, -0.8, 0.42, -0.22), "main"),
            (_box(-0.28, -0.62, -0.06, -0.42), (120, 240, 250)),
            (_box(0.06, -0.62, 0.28, -0.42), (120, 240, 250)),
            loose=True,
        ),
    ),
    "flower": (
        _part(
            "stem",
            (_bar(0, -0.1, 0, 1, 0.13), LEAF),
            (_ellipse(0.3, 0.62, 0.3, 0.13, -25), LEAF),
            (_ellipse(-0.3, 0.72, 0.3, 0.13, 25), LEAF),
            loose=True,
        ),
        _part(
            "bloom",
            *(
                (
                    _ellipse(0.4 * np.cos(turn), -0.38 + 0.4 * np.sin(turn), 0.3, 0.22, np.degrees(turn), 14),
                    "main" if index % 2 else "dark",
                )
                for index, turn in enumerate(np.arange(6) * np.pi / 3)
            ),
            (_ellipse(0, -0.38, 0.2, 0.2), (96, 58, 34)),
            loose=True,
        ),
    ),
    "tree": (
        _part("trunk", (_polygon((-0.16, 0.1), (0.16, 0.1), (0.24, 1), (-0.24, 1)), WOOD), loose=True),
        _part(
            "crown",
            (_ellipse(-0.42, 0.02, 0.46, 0.38), "dark"),
            (_ellipse(0.42, 0.02, 0.46, 0.38), "dark"),
            (_ellipse(0, -0.42, 0.58, 0.55), "main"),
            loose=True,
        ),
    ),
    "mushroom": (
        _part("stem", (_polygon((-0.22, -0.05), (0.22, -0.05), (0.34, 1), (-0.34, 1)), CREAM), loose=True),
        _part(
            "cap",
            (
                _polygon(
                    *((np.cos(turn), 0.12 - 1.05 * np.sin(turn)) for turn in np.linspace(0, np.pi, 14)), (0, 0.28)
                ),
                "main",
            ),
            (_ellipse(-0.45, -0.25, 0.16, 0.14), CREAM),
            (_ellipse(0.1, -0.55, 0.18, 0.15), CREAM),
            (_ellipse(0.55, -0.12, 0.13, 0.11), CREAM),
            loose=True,
        ),
    ),
    "house": (
        _part("chimney", (_box(0.38, -0.9, 0.62, -0.2), (140, 80, 70))),
        _part("walls", (_box(-0.72, -0.2, 0.72, 1), "main")),
        _part("roof", (_polygon((-1, -0.12), (0, -1), (1, -0.12)), "dark"), loose=True),
        _part("door", (_box(-0.52, 0.35, -0.14, 1), WOOD)),
        _part("window", (_box(0.1, 0.2, 0.52, 0.6), GLASS)),
    ),
    "car": (
        _part(
            "cabin",
            (_polygon((-0.55, 0.05), (-0.32, -0.55), (0.35, -0.55), (0.62, 0.05)), "dark"),
            (_polygon((-0.4, 0.0), (-0.25, -0.42), (-0.04, -0.42), (-0.04, 0.0)), GLASS),
            (_polygon((0.06, 0.0), (0.06, -0.42), (0.28, -0.42), (0.46, 0.0)), GLASS),
            loose=True,
        ),
        _part(
            "body", (_polygon((-1, 0.5), (-0.95, 0.05), (-0.6, -0.02), (0.7, -0.02), (1, 0.15), (1, 0.5)), "main")
        ),
        _part("lamp", (_ellipse(0.92, 0.2, 0.08, 0.1), (255, 240, 150))),
        _part(
            "left wheel", (_ellipse(-0.55, 0.52, 0.29, 0.29), INK), (_ellipse(-0.55, 0.52, 0.13, 0.13), STEEL), loose=True
        ),
        _part(
            "right wheel", (_ellipse(0.55, 0.52, 0.29, 0.29), INK), (_ellipse(0.55, 0.52, 0.13, 0.13), STEEL), loose=True
        ),
    ),
    "boat": (
        _part("mast", (_bar(0, -1, 0, 0.5, 0.1), WOOD)),
        _part(
            "sail",
            (_polygon((0.1, -0.95), (0.9, 0.3), (0.1, 0.3)), CREAM),
            loose=True,
        ),
        _part("jib", (_polygon((-0.1, -0.7), (-0.72, 0.3), (-0.1, 0.3)), "main"), loose=True),
        _part("hull", (_polygon((-1, 0.42), (1, 0.42), (0.62, 1), (-0.66, 1)), "main")),
        _part("band", (_polygon((-1, 0.42), (1, 0.42), (0.93, 0.56), (-0.94, 0.56)), "dark")),
    ),
    "rocket": (
        _part("flame", (_polygon((-0.22, 0.6), (0, 1), (0.22, 0.6)), SUN)),
        _part("left fin", (_polygon((-0.32, 0.05), (-0.8, 0.75), (-0.3, 0.6)), "dark"), loose=True),
        _part("right fin", (_polygon((0.32, 0.05), (0.8, 0.75), (0.3, 0.6)), "dark"), loose=True),
        _part(
            "body",
            (_polygon((-0.28, 0.65), (-0.4, 0.1), (-0.38, -0.4), (0.38, -0.4), (0.4, 0.1), (0.28, 0.65)), "main"),
            (_ellipse(0, -0.02, 0.2, 0.2), GLASS),
        ),
        _part("nose", (_polygon((-0.38, -0.4), (-0.2, -0.8), (0, -1), (0.2, -0.8), (0.38, -0.4)), "dark"), loose=True),
    ),
    "cup": (
        _part(
            "handle",
            (
                _polygon(
                    *((0.4, -0.3), (0.85, -0.3), (1, 0), (0.85, 0.5), (0.4, 0.55)),
                    *((0.4, 0.35), (0.7, 0.3), (0.78, 0), (0.7, -0.1), (0.4, -0.1)),
                ),
                "dark",
            ),
            loose=True,
        ),
        _part("body", (_polygon((-0.8, -0.6), (0.56, -0.6), (0.42, 0.9), (-0.66, 0.9)), "main")),
        _part("rim", (_ellipse(-0.12, -0.6, 0.68, 0.2), "dark"), (_ellipse(-0.12, -0.6, 0.52, 0.12), (82, 50, 32))),
    ),
}
