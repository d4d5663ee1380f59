"""Prompts of a count, a colour, a thing and a background, and the prompts that say something else (paper B).

    "two red cats on the moon" -> "four red cats on the moon", "two blue cats on the moon", "two red cats in the sea", ...
"""

import dataclasses
import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from richhf_data.errors import UserError

SINGULAR = ("one", "1")  # counts that a thing follows in the singular; without a count it has an article


class Prompt(NamedTuple):
    """What a prompt asks for; None where it says nothing."""

    count: str | None
    colour: str | None
    thing: str
    background: str | None


CATEGORIES = Prompt._fields


@dataclasses.dataclass(frozen=True)
class Words:
    """The lists that prompts are made of; a thing may give its plural: "mouse/mice".

    Raises:
      UserError: a list with an empty or repeated word, no things, or two combinations that read the same.
    """

    count: tuple[str, ...]
    colour: tuple[str, ...]
    thing: tuple[str, ...]
    background: tuple[str, ...]

    def __post_init__(self):
        for name in CATEGORIES:
            words = getattr(self, name)
            if isinstance(words, str) or not all(isinstance(word, str) and word.strip() for word in words):
                raise UserError(f"prompts.{name}: got {words!r}, expected a list of words")
            if repeated := sorted({word for word in words if list(words).count(word) > 1}):
                raise UserError(f"prompts.{name}: got {repeated} more than once, expected different words")
        if not self.thing:
            raise UserError("prompts.thing: got an empty list, expected at least one thing")
        self._by_text  # noqa: B018  (finds combinations that read the same)

    @functools.cached_property
    def _by_text(self) -> dict[str, Prompt]:
        found = {}
        optional = [(None, *getattr(self, name)) for name in ("count", "colour", "background")]
        for count, colour, background in itertools.product(*optional):
            for thing in self.thing:
                prompt = Prompt(count, colour, thing, background)
                if (other := found.setdefault(_plain(text(prompt)), prompt)) != prompt:
                    raise UserError(f"prompts: {other} and {prompt} both read {text(prompt)!r}; expected different words")
        return found

    def parse(self, prompt_text: str) -> Prompt | None:
        """What the text asks for; None for a text that these lists do not make. Case and a final full stop do not count."""
        return self._by_text.get(_plain(prompt_text))

    def all(self) -> list[Prompt]:
        """Every combination that has a count, a colour or a background, in a fixed order."""
        return [prompt for prompt in self._by_text.values() if prompt.count or prompt.colour or prompt.background]

    def draw(self, number: int, seed: int) -> list[Prompt]:
        """So many different ones of `all`, their kinds (count alone, count and colour, ...) as even as the lists allow.

        Raises:
          UserError: the lists make fewer.
        """
        prompts = self.all()
        if not 0 < number <= len(prompts):
            raise UserError(f"prompts: got {number} to draw, expected 1 to {len(prompts)}, which is what the lists make")
        rng, kinds = np.random.default_rng(seed), {}
        for i in rng.permutation(len(prompts)):
            kinds.setdefault(kind(prompts[i]), []).append(prompts[i])
        rounds = itertools.zip_longest(*(kinds[name] for name in sorted(kinds)))
        return [prompt for turn in rounds for prompt in turn if prompt is not None][:number]

    def negatives(self, prompt: Prompt, change: Sequence[str] = CATEGORIES) -> dict[str, list[Prompt]]:
        """category -> the prompts that differ in it alone; a category that the prompt says nothing of is left out."""
        changed = {}
        for name in change:
            if (own := getattr(prompt, name)) is not None:
                changed[name] = [prompt._replace(**{name: word}) for word in getattr(self, name) if word != own]
        return changed


def text(prompt: Prompt) -> str:
    """As English: Prompt("two", "red", "cat", "on the moon") -> "two red cats on the moon"."""
    singular, _, plural = prompt.thing.partition("/")
    if prompt.count is None:
        rest = [prompt.colour, singular]
        first = "an" if (prompt.colour or singular)[0].lower() in "aeiou" else "a"
    else:
        rest = [prompt.colour, singular if prompt.count in SINGULAR else plural or _plural(singular)]
        first = prompt.count
    return " ".join(word for word in (first, *rest, prompt.background) if word)


def kind(prompt: Prompt) -> str:
    """The categories besides the thing that the prompt names: "count, colour"."""
    return ", ".join(name for name in CATEGORIES if name != "thing" and getattr(prompt, name) is not None)


def words_of(config: Mapping) -> Words:
    """The lists of a config's `prompts` section."""
    return Words(**{name: tuple(config[name]) for name in CATEGORIES})


def _plural(word: str) -> str:
    return word + ("es" if word.endswith(("s", "x", "z", "ch", "sh")) else "s")


def _plain(prompt_text: str) -> str:
    return " ".join(prompt_text.lower().split()).rstrip(".")
