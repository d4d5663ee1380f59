"""The prompts of RichHF-Synth: scenes, the words that describe them, and the prompt token that states each fact.

A prompt has one or two groups of things. A group has a count, a colour and a kind of thing, and may have an attribute
and an action. Two groups may have a relation, and a scene may have a background.

  "two striped red cats jumping to the left of a blue cup, on the beach"
"""

import dataclasses

import numpy as np

from richhf_data import keywords
from richhf_data.errors import UserError

NUMBERS = ("one", "two", "three", "four", "five", "six")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
PLURALS = {
    "cat": "cats",
    "bird": "birds",
    "fish": "fish",
    "butterfly": "butterflies",
    "snail": "snails",
    "robot": "robots",
    "flower": "flowers",
    "tree": "trees",
    "mushroom": "mushrooms",
    "house": "houses",
    "car": "cars",
    "boat": "boats",
    "rocket": "rockets",
    "cup": "cups",
}
THINGS = tuple(PLURALS)
ATTRIBUTES = ("striped", "spotted", "checkered", "glowing")
ACTIONS = ("jumping", "falling", "leaning", "sleeping")
RELATIONS = {  # relation -> its wordings; the word between stars states the fact
    "left": ("to the *left* of",),
    "right": ("to the *right* of",),
    "above": ("*above*", "*over*"),
    "below": ("*below*", "*under*"),
}
OPPOSITES = {"left": "right", "right": "left", "above": "below", "below": "above"}
BACKGROUNDS = {
    "forest": "in the *forest*",
    "city": "in the *city*",
    "beach": "on the *beach*",
    "desert": "in the *desert*",
    "snow": "in the *snow*",
    "moon": "on the *moon*",
    "sea": "in the *sea*",
    "field": "in a *field*",
    "table": "on a *table*",
    "mountains": "in the *mountains*",
}
OPENINGS = ("a picture of", "a drawing of", "a photo of")

SPLITS = ("train", "dev", "test", "test_novel")
# Colour-thing pairs that occur in test_novel alone: one for each thing, each colour at most twice.
HELD_OUT = frozenset((COLOURS[(3 * index + 1) % len(COLOURS)], thing) for index, thing in enumerate(THINGS))

_COUNT_WEIGHTS = (np.cumsum((0.42, 0.2, 0.14, 0.1, 0.07, 0.07)), np.cumsum((0.62, 0.24, 0.14)))


@dataclasses.dataclass(frozen=True)
class Fact:
    """A statement of the prompt. kind: count, colour, attribute, thing or action (of a group), relation or background."""

    kind: str
    group: int = 0


@dataclasses.dataclass(frozen=True)
class Group:
    """Things of one kind with their count, colour, attribute and action."""

    thing: str
    colour: str
    count: int
    attribute: str | None = None
    action: str | None = None


@dataclasses.dataclass(frozen=True)
class Scene:
    """relation: the position of group 0 relative to group 1; None = not stated."""

    groups: tuple[Group, ...]
    relation: str | None = None
    background: str | None = None


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A text and the scene that it describes. facts: the prompt token that states each (index into `keywords.tokenize`)."""

    text: str
    scene: Scene
    facts: dict[Fact, int]


def is_held_out(colour: str, thing: str) -> bool:
    """Whether the pair of a colour and a thing occurs in `test_novel` alone."""
    return (colour, thing) in HELD_OUT


def pick(rng: np.random.Generator, items):
    """One item, uniformly; many times faster than `rng.choice`."""
    return items[int(rng.random() * len(items))]


def _sample_group(rng: np.random.Generator, index: int, split: str, novel: bool) -> Group:
    while True:
        thing, colour = pick(rng, THINGS), pick(rng, COLOURS)
        if is_held_out(colour, thing) == novel:
            break
    return Group(
        thing=thing,
        colour=colour,
        count=1 + int(np.searchsorted(_COUNT_WEIGHTS[index], rng.random() * _COUNT_WEIGHTS[index][-1])),
        attribute=pick(rng, ATTRIBUTES) if rng.random() < 0.35 else None,
        action=pick(rng, ACTIONS) if index == 0 and rng.random() < 0.3 else None,
    )


def sample_scene(rng: np.random.Generator, split: str) -> Scene:
    """A scene of `split`: every scene of test_novel has a held-out colour-thing pair, and no other scene has one.

    Raises:
      UserError: an unknown split.
    """
    if split not in SPLITS:
        raise UserError(f"split: got {split!r}, expected one of {SPLITS}")
    number = 1 if rng.random() < 0.5 else 2
    novel = int(rng.random() * number) if split == "test_novel" else -1
    groups = [_sample_group(rng, index, split, index == novel) for index in range(number)]
    if number == 2 and groups[0].thing == groups[1].thing:  # "a red cat above a blue cat" is hard to read off a picture
        groups = groups[novel : novel + 1] if novel >= 0 else groups[:1]
    relation = pick(rng, tuple(RELATIONS)) if len(groups) == 2 and rng.random() < 0.75 else None
    background = pick(rng, tuple(BACKGROUNDS)) if rng.random() < (0.75 if len(groups) == 1 else 0.6) else None
    return Scene(tuple(groups), relation, background)


def write(rng: np.random.Generator, scene: Scene) -> Prompt:
    """Describes a scene in 3 to 20 words."""
    words: list[str] = []
    facts: dict[Fact, int] = {}

    def add(text: str, fact: Fact | None = None):
        for word in text.split():
            if fact and ("*" in word or " " not in text):
                facts[fact] = len(words)
            words.append(word.strip("*"))

    def add_group(index: int):
        group = scene.groups[index]
        rest = [word for word in (group.attribute, group.colour) if word]
        if group.count == 1 and rng.random() < 0.65:
            add("an" if rest[0][0] in "aeiou" else "a")
        else:
            add(NUMBERS[group.count - 1], Fact("count", index))
        if group.attribute:
            add(group.attribute, Fact("attribute", index))
        add(group.colour, Fact("colour", index))
        add(group.thing if group.count == 1 else PLURALS[group.thing], Fact("thing", index))
        if group.action:
            add(group.action, Fact("action", index))

    place_first = scene.background is not None and rng.random() < 0.2
    if place_first:
        add(BACKGROUNDS[scene.background], Fact("background"))
        words[-1] += ","
    elif rng.random() < 0.2:
        add(pick(rng, OPENINGS))
    add_group(0)
    if len(scene.groups) == 2:
        if scene.relation:
            add(pick(rng, RELATIONS[scene.relation]), Fact("relation"))
        else:
            add("and")
        add_group(1)
    if scene.background and not place_first:
        if rng.random() < 0.3:
            words[-1] += ","
        add(BACKGROUNDS[scene.background], Fact("background"))
    text = " ".join(words) + ("." if rng.random() < 0.08 else "")
    assert len(keywords.tokenize(text)) == len(words)
    return Prompt(text, scene, facts)


def sample(rng: np.random.Generator, split: str) -> Prompt:
    """A prompt of `split`."""
    return write(rng, sample_scene(rng, split))
