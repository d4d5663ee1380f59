"""Plans the errors of the simulated generator: false facts, artifacts and poor style.

For each picture three correlated target qualities (plausibility, alignment, aesthetics) are drawn, each with nearly the
distribution of the real plausibility labels. Errors are chosen that come close to these targets. The latents, which the
annotators turn into scores, are computed from the chosen errors alone, so that a score depends on visible errors only.
"""

import dataclasses
import math

import cv2
import numpy as np

from richhf_data.synthetic import grammar, layout, shapes
from richhf_data.synthetic.grammar import Fact, pick

# Plausibility of the 955 real test images: how many have a label of 1/12, 2/12, ... 12/12.
REAL_HISTOGRAM = (7, 12, 26, 50, 87, 147, 143, 144, 113, 90, 66, 69)
CORRELATION = 0.55  # between any two target qualities, as normal scores
SPREAD, SHIFT = 0.97, 0.0  # of the targets about the real mean; calibrated, see tests/test_synthetic.py

# How much alignment a wrong fact costs, and how often the generator gets it wrong, relative to the others.
FACT_COST = {
    "thing": 0.42,
    "colour": 0.32,
    "background": 0.32,
    "relation": 0.27,
    "count": 0.25,
    "attribute": 0.24,
    "action": 0.24,
}
FACT_RATE = {
    "thing": 1.2,
    "colour": 1.0,
    "background": 1.6,
    "relation": 0.8,
    "count": 1.0,
    "attribute": 0.5,
    "action": 0.5,
}
# Colours and backgrounds that look too similar to count as an error.
_NEAR = [
    {"red", "orange"},
    {"orange", "yellow"},
    {"orange", "brown"},
    {"red", "brown"},
    {"purple", "pink"},
    {"red", "pink"},
    {"blue", "purple"},
    {"brown", "black"},
    {"beach", "desert"},
    {"forest", "field"},
    {"snow", "mountains"},
    {"beach", "sea"},
    {"field", "mountains"},
]

ARTIFACTS = ("warp", "smear", "blur", "noise patch", "fragments", "nonsense text", "missing part", "extra part")
PART_ARTIFACTS = ("missing part", "extra part")
ON_THINGS = ("warp", "smear", "blur")  # invisible on an empty background
_SEVERITY = math.sqrt(math.pi)  # an artifact costs the square root of its nominal area
_PART_SEVERITY = 1.5  # a missing or extra part costs this times the square root of its area
OVERALL = (0.4, 0.35, 0.25)  # plausibility, alignment, aesthetics
OVERALL_SPREAD = 1.25  # spreads the mean, which varies less than its parts, over the whole scale


@dataclasses.dataclass(frozen=True)
class Artifact:
    """kind: of `ARTIFACTS`; x, y, radius: fractions of the picture; target, part: indices of a thing and its part, or -1."""

    kind: str
    x: float
    y: float
    radius: float
    severity: float
    seed: int
    target: int = -1
    part: int = -1


@dataclasses.dataclass(frozen=True)
class Style:
    """Flaws of the whole picture, each from 0 = none to 1 = the worst."""

    flatness: float  # washed out or under-exposed
    dullness: float  # grey, and with a sickly cast
    shade: float  # harsh light from one side and a heavy vignette
    grain: float  # coarse grain all over


@dataclasses.dataclass(frozen=True)
class Picture:
    """What the renderer draws, and the exact truth. latents: float64[4] in [0, 1], order schema.SCORES."""

    prompt: grammar.Prompt
    wrong: tuple[Fact, ...]
    objects: tuple[layout.Placed, ...]
    background: str
    artifacts: tuple[Artifact, ...]
    style: Style
    latents: tuple[float, float, float, float]
    seed: int


_QUANTILES = np.concatenate([[0.0], np.cumsum(REAL_HISTOGRAM) / sum(REAL_HISTOGRAM)])
_REAL_MEAN = 0.633


def _wishes(rng: np.random.Generator) -> np.ndarray:
    """float64[3]: target plausibility, alignment and aesthetics."""
    common, own = rng.standard_normal(), rng.standard_normal(3)
    normal = math.sqrt(CORRELATION) * common + math.sqrt(1 - CORRELATION) * own
    uniform = [0.5 * (1 + math.erf(value / math.sqrt(2))) for value in normal]
    quality = np.interp(uniform, _QUANTILES, (np.arange(13) + 0.5) / 12)
    return np.clip(_REAL_MEAN + SHIFT + SPREAD * (quality - _REAL_MEAN), 0.02, 1)


def _far(name: str, other: str) -> bool:
    return name != other and {name, other} not in _NEAR


def _wrong_facts(rng: np.random.Generator, prompt: grammar.Prompt, burden: float) -> list[Fact]:
    """Facts whose costs sum to about `burden`. A wrong thing has no other wrong facts."""
    open_facts = list(prompt.facts)
    wrong: list[Fact] = []
    while open_facts:
        rates = np.array([FACT_RATE[fact.kind] for fact in open_facts]).cumsum()
        fact = open_facts.pop(int(np.searchsorted(rates, rng.random() * rates[-1])))
        if FACT_COST[fact.kind] / 2 > burden:  # the sum is closer without it
            continue
        if fact.kind == "thing" and any(other.kind in ("thing", "relation") for other in wrong):
            continue
        wrong.append(fact)
        burden -= FACT_COST[fact.kind]
        if fact.kind == "thing":
            wrong = [other for other in wrong if other == fact or other.kind == "background" or other.group != fact.group]
            open_facts = [
                other
                for other in open_facts
                if other.kind == "background" or (other.kind != "relation" and other.group != fact.group)
            ]
    return wrong


def _depict(rng, prompt: grammar.Prompt, wrong: list[Fact], split: str):
    """([(group number, group as drawn)], relation as drawn, background as drawn)."""
    scene = prompt.scene
    drawn = []
    for number, group in enumerate(scene.groups):
        changes = {}
        colour, thing = group.colour, group.thing
        for fact in wrong:
            if fact.group != number or fact.kind in ("relation", "background"):
                continue
            if fact.kind == "thing":
                others = {other.thing for other in scene.groups}
                things = [
                    name
                    for name in grammar.THINGS
                    if name not in others and not (split != "test_novel" and grammar.is_held_out(colour, name))
                ]
                changes["thing"] = pick(rng, things)
            elif fact.kind == "colour":
                others = {other.colour for other in scene.groups}
                colours = [
                    name
                    for name in grammar.COLOURS
                    if _far(name, colour)
                    and name not in others
                    and not (split != "test_novel" and grammar.is_held_out(name, thing))
                ]
                changes["colour"] = pick(rng, colours)
            elif fact.kind == "count":
                changes["count"] = pick(rng, [n for n in range(1, 7 if number == 0 else 5) if n != group.count])
            elif fact.kind == "attribute":
                changes["attribute"] = pick(rng, [None, *(a for a in grammar.ATTRIBUTES if a != group.attribute)])
            elif fact.kind == "action":
                changes["action"] = pick(rng, [None, *(a for a in grammar.ACTIONS if a != group.action)])
        missing = "thing" in changes
        if missing and len(scene.groups) == 2 and rng.random() < 0.6:
            continue  # the thing is left out; otherwise another kind of thing takes its place
        drawn.append((number, dataclasses.replace(group, **changes)))
    relation, background = scene.relation, scene.background
    if Fact("relation") in wrong:
        relation = grammar.OPPOSITES[relation]
    if Fact("background") in wrong:
        background = pick(rng, [name for name in grammar.BACKGROUNDS if _far(name, background)])
    return drawn, relation, background or pick(rng, tuple(grammar.BACKGROUNDS))


_PART_AREA = {
    thing: [
        math.sqrt(sum(abs(cv2.contourArea(polygon)) for polygon, _ in part.shapes)) if part.loose else 0
        for part in parts
    ]
    for thing, parts in shapes.THINGS.items()
}  # the square root of the area of each loose part, for a thing of radius 1


def _artifacts(rng: np.random.Generator, objects: tuple[layout.Placed, ...], burden: float) -> tuple[Artifact, ...]:
    """Artifacts whose severities sum to about `burden`."""
    if burden < 0.105:
        return ()
    number = min(5, max(1, round(burden / 0.19 * (0.6 + 0.8 * rng.random()))))
    shares = 0.6 + 0.8 * rng.random(number)
    shares *= burden / shares.sum()
    chosen, touched = [], set()
    for share in shares:
        kind = pick(rng, ARTIFACTS)
        seed = int(rng.integers(2**31))
        if kind in PART_ARTIFACTS:
            parts = [
                (abs(_PART_SEVERITY * size * item.radius - share), index, part)
                for index, item in enumerate(objects)
                for part, size in enumerate(_PART_AREA[item.thing])
                if size and index not in touched
            ]
            if parts:
                _, target, part = min(parts)
                item = objects[target]
                severity = _PART_SEVERITY * _PART_AREA[item.thing][part] * item.radius
                if abs(severity - share) < 0.1:
                    touched.add(target)
                    chosen.append(Artifact(kind, item.x, item.y, item.radius, severity, seed, target, part))
                    continue
            kind = pick(rng, ARTIFACTS[:6])
        radius = float(np.clip(share / _SEVERITY, 0.055, 0.2))
        if kind in ON_THINGS or rng.random() < 0.35:
            item = pick(rng, objects)
            turn, far = 2 * math.pi * rng.random(), 0.6 * item.radius * rng.random()
            x, y = item.x + far * math.cos(turn), item.y + far * math.sin(turn)
        else:
            x, y = 0.12 + 0.76 * rng.random(2)
        x, y = np.clip([x, y], 0.06, 0.94).tolist()
        chosen.append(Artifact(kind, x, y, radius, _SEVERITY * radius, seed))
    return tuple(chosen)


_STYLE_COST = 0.62  # what one flaw at its worst costs


def _style(rng: np.random.Generator, burden: float) -> Style:
    shares = rng.standard_exponential(4)
    amounts = np.minimum(1, shares / shares.sum() * burden / _STYLE_COST)
    rest = burden / _STYLE_COST - amounts.sum()
    return Style(*np.minimum(1, amounts + rest / 4 * (amounts < 1)).tolist())


def plan(rng: np.random.Generator, prompt: grammar.Prompt, split: str, right: bool = False) -> Picture:
    """Plans one picture of `prompt` with all its errors; a function of the generator's state and the arguments.

    right: no fact of the prompt is wrong; artifacts and style have their flaws.
    """
    wished = 1 - _wishes(rng)
    wrong = [] if right else _wrong_facts(rng, prompt, wished[1])
    drawn, relation, background = _depict(rng, prompt, wrong, split)
    objects = layout.arrange(rng, drawn, relation)
    artifacts = _artifacts(rng, objects, wished[0])
    style = _style(rng, wished[2])
    plausibility = max(0.0, 1 - sum(artifact.severity for artifact in artifacts))
    alignment = max(0.0, 1 - sum(FACT_COST[fact.kind] for fact in wrong))
    aesthetics = max(0.0, 1 - _STYLE_COST * sum(dataclasses.astuple(style)))
    mean = sum(weight * score for weight, score in zip(OVERALL, (plausibility, alignment, aesthetics), strict=True))
    overall = min(1.0, max(0.0, _REAL_MEAN + OVERALL_SPREAD * (mean - _REAL_MEAN)))
    return Picture(
        prompt=prompt,
        wrong=tuple(wrong),
        objects=objects,
        background=background,
        artifacts=artifacts,
        style=style,
        latents=(plausibility, alignment, aesthetics, overall),
        seed=int(rng.integers(2**31)),
    )
