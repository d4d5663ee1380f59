"""Chooses the place, size and pose of each thing of a picture."""

import dataclasses

import numpy as np

from richhf_data.synthetic import grammar

_WHOLE = (0.05, 0.1, 0.95, 0.95)
_HALVES = {  # relation -> (box of group 0, box of group 1), each left, top, right, bottom
    "left": ((0.03, 0.12, 0.5, 0.95), (0.5, 0.12, 0.97, 0.95)),
    "right": ((0.5, 0.12, 0.97, 0.95), (0.03, 0.12, 0.5, 0.95)),
    "above": ((0.05, 0.03, 0.95, 0.49), (0.05, 0.51, 0.95, 0.97)),
    "below": ((0.05, 0.51, 0.95, 0.97), (0.05, 0.03, 0.95, 0.49)),
}
_ANGLES = {"falling": 180, "leaning": 40, "sleeping": 90}


@dataclasses.dataclass(frozen=True)
class Placed:
    """One drawn thing. x, y, radius: fractions of the picture; angle: degrees clockwise; group: in the prompt's scene."""

    group: int
    thing: str
    colour: str
    attribute: str | None
    action: str | None
    x: float
    y: float
    radius: float
    angle: float
    flip: bool


def _cells(rng: np.random.Generator, box, count: int) -> list[tuple[float, float, float]]:
    """`count` places (x, y, radius) in a jittered grid over the box; a shorter last row is centred."""
    left, top, right, bottom = box
    width, height = right - left, bottom - top
    columns = max(1, round(np.sqrt(count * width / height)))
    rows = -(-count // columns)
    columns = -(-count // rows)
    room = min(width / columns, height / rows) / 2
    radius = min(0.29, room * (0.84 + 0.14 * rng.random()))
    cells = []
    for index in range(count):
        row, column = divmod(index, columns)
        in_row = min(columns, count - row * columns)
        slack_x, slack_y = width / in_row / 2 - radius, height / rows / 2 - radius
        x = left + width * (column + 0.5) / in_row + 0.6 * max(0, min(slack_x, 0.16)) * (2 * rng.random() - 1)
        y = top + height * (row + 0.5) / rows + 0.6 * max(0, slack_y) * (2 * rng.random() - 1)
        cells.append((x, y, radius * (0.9 + 0.1 * rng.random())))
    return cells


def arrange(
    rng: np.random.Generator, groups: list[tuple[int, grammar.Group]], relation: str | None
) -> tuple[Placed, ...]:
    """Places one or two groups, each given with its number in the prompt's scene, so that the relation holds.

    Without a relation the halves are drawn. Things lower in the picture come later, so that they are drawn in front.
    """
    if len(groups) == 2:
        boxes = _HALVES[relation or grammar.pick(rng, tuple(_HALVES))]
    else:
        boxes = (_WHOLE,)
    placed = []
    for (number, group), box in zip(groups, boxes, strict=True):
        facing = rng.random() < 0.5
        for x, y, radius in _cells(rng, box, group.count):
            angle = _ANGLES.get(group.action, 0)
            side = 1 if angle == 180 or rng.random() < 0.5 else -1
            placed.append(
                Placed(
                    group=number,
                    thing=group.thing,
                    colour=group.colour,
                    attribute=group.attribute,
                    action=group.action,
                    x=x,
                    y=y,
                    radius=radius,
                    angle=side * angle + 16 * (rng.random() - 0.5),
                    flip=facing if rng.random() < 0.75 else not facing,
                )
            )
    return tuple(sorted(placed, key=lambda item: item.y))
