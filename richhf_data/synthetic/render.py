"""Draws a planned picture at any size, with the exact region of each error."""

import dataclasses
import math

import cv2
import numpy as np

from richhf_data import schema
from richhf_data.synthetic import artifacts, backgrounds, flaws, grammar, layout, shapes

RGB = {
    "red": (216, 36, 38),
    "orange": (248, 132, 24),
    "yellow": (252, 222, 36),
    "green": (44, 164, 58),
    "blue": (36, 86, 226),
    "purple": (124, 44, 184),
    "pink": (252, 142, 196),
    "brown": (124, 72, 36),
    "black": (34, 34, 40),
    "white": (246, 246, 246),
}
_BITS = 4  # sub-pixel bits of cv2's coordinates


@dataclasses.dataclass(frozen=True)
class Region:
    """The visible area of one error. heatmap: index into schema.HEATMAPS; mask: bool[size, size]; severity in [0, 1]."""

    heatmap: int
    kind: str
    severity: float
    mask: np.ndarray


def _pose(item: layout.Placed, size: int) -> tuple[np.ndarray, np.ndarray]:
    """float32[2, 2] and float32[2]: unit coordinates of a thing -> pixels."""
    turn, scale = math.radians(item.angle), item.radius * size
    cos, sin, side = math.cos(turn) * scale, math.sin(turn) * scale, -1 if item.flip else 1
    matrix = np.array([[cos * side, -sin], [sin * side, cos]], np.float32)
    return matrix, np.array([item.x * size - 0.5, item.y * size - 0.5], np.float32)


def _fixed(points: np.ndarray) -> np.ndarray:
    return np.rint(points * (1 << _BITS)).astype(np.int32)


def _window(x: float, y: float, reach: float, size: int) -> tuple[slice, slice]:
    """The rows and columns within `reach` pixels of (x, y)."""
    rows = slice(max(0, int(y - reach)), min(size, int(y + reach) + 2))
    return rows, slice(max(0, int(x - reach)), min(size, int(x + reach) + 2))


def _blend(image: np.ndarray, window, colour, alpha: np.ndarray) -> None:
    """Mixes a colour into a window of the picture; alpha: float32[rows, columns] in [0, 1]."""
    view = image[window]
    alpha = alpha[..., None]
    view[:] = (view * (1 - alpha) + np.asarray(colour, np.float32) * alpha).astype(np.uint8)


def _around(item: layout.Placed, image: np.ndarray) -> None:
    """Draws the glow of a thing and its shadow on the ground."""
    size = image.shape[0]
    x, y, radius = item.x * size, item.y * size, item.radius * size
    if item.attribute == "glowing":
        window = _window(x, y, 1.6 * radius, size)
        rows, columns = np.ogrid[window]
        distance = ((rows - y) ** 2 + (columns - x) ** 2) / (1.55 * radius) ** 2
        _blend(image, window, (255, 252, 160), 1.25 * np.clip(1 - distance, 0, 0.72).astype(np.float32))
    drop = 1.12 if item.action == "jumping" else 0.92
    shadow_y, rx, ry = y + drop * radius, 0.75 * radius, 0.16 * radius
    window = _window(x, shadow_y, rx, size)
    rows, columns = np.ogrid[window]
    distance = ((rows - shadow_y) / ry) ** 2 + ((columns - x) / rx) ** 2
    _blend(image, window, (16, 16, 24), np.clip(1.3 - 1.3 * distance, 0, 0.5).astype(np.float32))


_MARKS = {  # action -> lines in units of the radius, drawn over the picture
    "jumping": [
        [(-0.6, 0.98), (-0.6, 1.3)],
        [(0, 1.05), (0, 1.4)],
        [(0.6, 0.98), (0.6, 1.3)],
    ],
    "falling": [
        [(-0.6, -1.35), (-0.6, -1.0)],
        [(0, -1.45), (0, -1.05)],
        [(0.6, -1.35), (0.6, -1.0)],
    ],
    "sleeping": [
        [(0.3, -0.95), (0.62, -0.95), (0.3, -0.6), (0.62, -0.6)],
        [(0.68, -1.4), (1.12, -1.4), (0.68, -0.98), (1.12, -0.98)],
    ],
    "leaning": [],
}


def _marks(item: layout.Placed, image: np.ndarray) -> None:
    scale = item.radius * image.shape[0]
    offset = np.array([item.x, item.y]) * image.shape[0]
    for line in _MARKS.get(item.action, ()):
        points = [_fixed(np.array(line) * scale + offset)]
        width = max(1, round(0.09 * scale))
        cv2.polylines(image, points, False, (20, 20, 40), width + 2, cv2.LINE_AA, _BITS)
        cv2.polylines(image, points, False, (255, 255, 255), width, cv2.LINE_AA, _BITS)


def _pattern(attribute: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """float32 in [0, 1]: 1 where the second colour is; u, v: unit coordinates."""
    if attribute == "striped":
        wave = np.sin(9.5 * u)
    elif attribute == "spotted":
        wave = np.cos(8 * u) * np.cos(8 * v) * 2.2 - 0.75
    else:
        wave = 3 * np.sin(7.5 * u) * np.sin(7.5 * v)
    return np.clip(0.5 + 2 * wave, 0, 1)


def _draw_thing(image: np.ndarray, item: layout.Placed, edits: dict[int, str], seed: int) -> np.ndarray | None:
    """Paints one thing. edits: part index -> "missing part" or "extra part".

    Returns:
      bool[size, size], the pixels that the edited parts may have changed; None without edits.
    """
    size = image.shape[0]
    matrix, offset = _pose(item, size)
    main = np.array(RGB[item.colour], np.float32)
    light = float(main @ (0.3, 0.59, 0.11))
    dark = main * 0.62 if light > 60 else main * 0.5 + 52
    tones = {"main": tuple(main.tolist()), "dark": tuple(dark.tolist())}
    outline = (26, 22, 32) if light > 60 else (206, 206, 214)
    width = max(1, round(0.055 * item.radius * size))
    reach = 1.6 * item.radius * size + 3
    window = _window(item.x * size, item.y * size, reach, size)
    body = np.zeros((size, size), np.uint8)  # every painted pixel
    coat = np.zeros((size, size), np.uint8) if item.attribute in ("striped", "spotted", "checkered") else None
    changed = np.zeros((size, size), np.uint8) if edits else None
    pieces = []
    for index, part in enumerate(shapes.THINGS[item.thing]):
        edit = edits.get(index)
        pieces.append((part, None, edit))
        if edit == "extra part":
            pieces.append((part, seed, edit))
    for part, copy_seed, edit in pieces:
        for polygon, tone in part.shapes:
            if copy_seed is not None:  # the second copy: turned about the thing's middle and pushed outwards
                turn = (0.7 + 0.5 * (copy_seed % 97) / 97) * (1 if copy_seed % 2 else -1)
                cos, sin = math.cos(turn), math.sin(turn)
                polygon = polygon @ np.array([[cos, sin], [-sin, cos]], np.float32) * 1.12
            points = _fixed(polygon @ matrix.T + offset)
            touched = changed is not None and (edit == "missing part" or copy_seed is not None)
            if touched:
                cv2.fillPoly(changed, [points], 1, cv2.LINE_8, _BITS)
                cv2.polylines(changed, [points], True, 1, width + 4, cv2.LINE_8, _BITS)  # and its soft rim
            if edit == "missing part":
                continue
            cv2.fillPoly(image, [points], tones.get(tone, tone), cv2.LINE_AA, _BITS)
            large = isinstance(tone, str) or len(part.shapes) < 3
            if large:
                cv2.polylines(image, [points], True, outline, width, cv2.LINE_AA, _BITS)
            cv2.fillPoly(body, [points], 255, cv2.LINE_8, _BITS)
            if coat is not None:
                cv2.fillPoly(coat, [points], 255 if tone == "main" else 0, cv2.LINE_8, _BITS)
    view = image[window]
    rows, columns = np.mgrid[window].astype(np.float32)
    inverse = np.linalg.inv(matrix)
    columns -= offset[0]
    rows -= offset[1]
    u = inverse[0, 0] * columns + inverse[0, 1] * rows
    v = inverse[1, 0] * columns + inverse[1, 1] * rows
    paint = view.astype(np.float32)
    if coat is not None:
        second = np.array((250, 250, 250) if light < 150 else (40, 34, 44), np.float32)
        alpha = (_pattern(item.attribute, u, v) * (coat[window] * (0.85 / 255)))[..., None]
        paint += alpha * (second - paint)
    # Light from the upper left, and a little relief across the thing.
    shade = (-0.22 * columns - 0.3 * rows) / (item.radius * size) + 0.05 * np.sin(11 * u + 7 * v)
    paint *= 1 + (shade * (body[window] * (1 / 255)))[..., None]
    np.clip(paint, 0, 255, out=paint)
    view[:] = paint
    return None if changed is None else changed.astype(bool)


def _shape_mask(item: layout.Placed, size: int) -> np.ndarray:
    """bool[size, size]: a thing's silhouette, drawn whole."""
    mask = np.zeros((size, size), np.uint8)
    matrix, offset = _pose(item, size)
    for part in shapes.THINGS[item.thing]:
        for polygon, _ in part.shapes:
            cv2.fillPoly(mask, [_fixed(polygon @ matrix.T + offset)], 1, cv2.LINE_8, _BITS)
    return mask.astype(bool)


def _grade(image: np.ndarray, style: flaws.Style, seed: int) -> np.ndarray:
    """Applies the style to each pixel; no region moves."""
    size = image.shape[0]
    rng = np.random.default_rng((seed, 2))
    dark, side = rng.random() < 0.5, 2 * math.pi * rng.random()
    # Colours: one 3 x 4 matrix for contrast, brightness, saturation and cast. A flawless picture is vivid.
    contrast = 1.12 - 0.7 * style.flatness
    level = 128 + (-62 if dark else 58) * style.flatness
    saturation = 1.1 - 0.62 * style.dullness
    grey = np.full((3, 3), 1 / 3)
    matrix = contrast * (saturation * np.eye(3) + (1 - saturation) * grey)
    bias = level - 128 * contrast + style.dullness * np.array([-4, 14, -34])
    image = cv2.transform(image, np.hstack([matrix, bias[:, None]]).astype(np.float32))
    if style.shade > 0.02:
        rows, columns = np.ogrid[:size, :size]
        y, x = (rows + 0.5) / size * 2 - 1, (columns + 0.5) / size * 2 - 1
        fall = 0.42 * (x * x + y * y) + 0.4 * (1 + x * math.cos(side) + y * math.sin(side))
        keep = np.clip(1 - style.shade * np.clip(fall, 0, 1) * 0.92, 0, 1)
        image = cv2.multiply(image, cv2.merge([keep.astype(np.float32)] * 3), dtype=cv2.CV_8U)
    if style.grain > 0.02:
        cells = min(size, 96)  # the grain's coarseness does not depend on the size
        noise = rng.standard_normal((cells, cells), np.float32) * (52 * style.grain)
        if cells != size:
            noise = cv2.resize(noise, (size, size), interpolation=cv2.INTER_NEAREST)
        image = cv2.add(image, cv2.merge([noise] * 3), dtype=cv2.CV_8U)
    return image


def render(picture: flaws.Picture, size: int) -> tuple[np.ndarray, list[Region]]:
    """Draws a picture.

    Args:
      picture: as `flaws.plan` made it.
      size: pixels, both sides.

    Returns:
      (image uint8[size, size, 3] RGB, the regions that an annotator may mark). Outside of the regions of artifacts the
      image is the same, bit for bit, as without artifacts.
    """
    image = backgrounds.paint(picture.background, np.random.default_rng((picture.seed, 1)), size)
    edits: dict[int, dict[int, str]] = {}
    for artifact in picture.artifacts:
        if artifact.target >= 0:
            edits.setdefault(artifact.target, {})[artifact.part] = artifact.kind
    seeds = {artifact.target: artifact for artifact in picture.artifacts if artifact.target >= 0}
    regions = []
    for index, item in enumerate(picture.objects):
        _around(item, image)
        changed = _draw_thing(image, item, edits.get(index, {}), seeds[index].seed if index in seeds else 0)
        _marks(item, image)
        if changed is not None:
            artifact = seeds[index]
            regions.append(Region(0, artifact.kind, artifact.severity, changed))
    palette = [RGB[item.colour] for item in picture.objects]
    for artifact in picture.artifacts:
        if artifact.target < 0:
            mask = artifacts.apply(image, artifact, palette)
            regions.append(Region(0, artifact.kind, artifact.severity, mask))
    for fact in picture.wrong:
        if fact.kind in ("colour", "attribute", "action"):
            for item in picture.objects:
                if item.group == fact.group:
                    mask = _shape_mask(item, size)
                    regions.append(Region(1, fact.kind, flaws.FACT_COST[fact.kind], mask))
    regions = [region for region in regions if region.mask.any()]
    return _grade(image, picture.style, picture.seed), regions


def union(regions: list[Region], size: int) -> np.ndarray:
    """uint8[size, size, 2], 0 or 255: all regions of each map of schema.HEATMAPS."""
    maps = np.zeros((size, size, len(schema.HEATMAPS)), np.uint8)
    for region in regions:
        maps[..., region.heatmap][region.mask] = 255
    return maps


def wrong_labels(picture: flaws.Picture) -> np.ndarray:
    """int32[tokens]: 0 for the words of the wrong facts."""
    count = len(grammar.keywords.tokenize(picture.prompt.text))
    labels = np.ones(count, np.int32)
    labels[[picture.prompt.facts[fact] for fact in picture.wrong]] = 0
    return labels
