"""Prompts made of a count, a colour, a thing and a background, and their negatives: prompts that differ in one of these.

Used by paper B's reward model.

    "two red cats on the moon" -> "four red cats on the moon", "two blue cats on the moon", "two red cats in the sea", ...
"""

import dataclasses
import functools
import itertools
import unicodedata
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from richhf_data.errors import UserError

SINGULAR = ("one", "1")  # counts with a thing in the singular


class ParsedPrompt(NamedTuple):
    """The parts of a prompt; None = absent."""

    count: str | None
    colour: str | None
    thing: str
    background: str | None


CATEGORIES = ParsedPrompt._fields


@dataclasses.dataclass(frozen=True)
class Words:
    """The words of each category. A thing may have an irregular plural: "mouse/mice".

    Raises:
      UserError: an empty or repeated word, no things, or two combinations with the same text.
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
        self._by_text  # noqa: B018  (raises for combinations with the same text)

    @functools.cached_property
    def _by_text(self) -> dict[str, ParsedPrompt]:
        found = {}
        optional = [(None, *getattr(self, name)) for name in ("count", "colour", "background")]
        for count, colour, background in itertools.product(*optional):
            for thing in self.thing:
                prompt = ParsedPrompt(count, colour, thing, background)
                if (other := found.setdefault(_plain(text(prompt)), prompt)) != prompt:
                    raise UserError(f"prompts: {other} and {prompt} both read {text(prompt)!r}; expected different words")
        return found

    def parse(self, prompt_text: str) -> ParsedPrompt | None:
        """The parts of a text; None for a text that these words do not make. Case, a final full stop, white space
        and the forms of characters (NFKC) are ignored."""
        return self._by_text.get(_plain(prompt_text))

    def all(self) -> list[ParsedPrompt]:
        """Every combination with a count, a colour or a background, in a fixed order."""
        return [prompt for prompt in self._by_text.values() if prompt.count or prompt.colour or prompt.background]

    def draw(self, number: int, seed: int) -> list[ParsedPrompt]:
        """Draws `number` different prompts of `all`, balanced over their kinds (count alone, count and colour, ...).

        Raises:
          UserError: `all` has fewer.
        """
        prompts = self.all()
        if not 0 < number <= len(prompts):
            raise UserError(f"prompts: got {number} to draw, expected 1 to {len(prompts)}, all that the lists make")
        rng, kinds = np.random.default_rng(seed), {}
        for i in rng.permutation(len(prompts)):
            kinds.setdefault(kind(prompts[i]), []).append(prompts[i])
        rounds = itertools.zip_longest(*(kinds[name] for name in sorted(kinds)))
        return [prompt for turn in rounds for prompt in turn if prompt is not None][:number]

    def kinds(self, texts: Sequence[str]) -> list[str]:
        """The `kind` of each text: "count, colour"; "thing" for a thing alone, "other" for a text of other words."""
        parsed = [self.parse(prompt_text) for prompt_text in texts]
        return ["other" if prompt is None else kind(prompt) or "thing" for prompt in parsed]

    def negatives(self, prompt: ParsedPrompt, change: Sequence[str] = CATEGORIES) -> dict[str, list[ParsedPrompt]]:
        """category -> the prompts that differ in it only. Leaves out the categories that the prompt does not have."""
        changed = {}
        for name in change:
            if (own := getattr(prompt, name)) is not None:
                changed[name] = [prompt._replace(**{name: word}) for word in getattr(self, name) if word != own]
        return changed


def text(prompt: ParsedPrompt) -> str:
    """The prompt in English: ParsedPrompt("two", "red", "cat", "on the moon") -> "two red cats on the moon"."""
    singular, _, plural = prompt.thing.partition("/")
    if prompt.count is None:
        rest = [prompt.colour, singular]
        first = "an" if (prompt.colour or singular)[0].lower() in "aeiou" else "a"
    else:
        rest = [prompt.colour, singular if prompt.count in SINGULAR else plural or _plural(singular)]
        first = prompt.count
    return " ".join(word for word in (first, *rest, prompt.background) if word)


def kind(prompt: ParsedPrompt) -> str:
    """The categories that the prompt has, without the thing: "count, colour"."""
    return ", ".join(name for name in CATEGORIES if name != "thing" and getattr(prompt, name) is not None)


def words_of(config: Mapping) -> Words:
    """The words in a config's `prompts` section."""
    return Words(**{name: tuple(config[name]) for name in CATEGORIES})


def _plural(word: str) -> str:
    return word + ("es" if word.endswith(("s", "x", "z", "ch", "sh")) else "s")


def _plain(prompt_text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", prompt_text).lower().split()).rstrip(".")
