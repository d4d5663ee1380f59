"""Prompt tokens and labels to and from the keyword sequence ("a yellow_0 cat")."""

import difflib
import re
from collections.abc import Sequence

from richhf_data.errors import UserError

MISALIGNED, ALIGNED = 0, 1
SUFFIX = "_0"
_SEPARATORS = re.compile(r'[,.?!":; ]+')


def tokenize(prompt: str) -> list[str]:
    """Splits a prompt as the RichHF-18K release does: on any of `, . ? ! " : ;` and space, empties dropped.

    >>> tokenize('a yellow cat, "sitting"')
    ['a', 'yellow', 'cat', 'sitting']
    """
    return [token for token in _SEPARATORS.split(prompt) if token]


def parse_labels(text: str) -> list[int]:
    """The integers of a published `prompt_misalignment_label`: 0 and 1, separated by spaces.

    Raises:
      UserError: an entry is neither 0 nor 1.
    """
    entries = text.split()
    if bad := [entry for entry in entries if entry not in ("0", "1")]:
        raise UserError(f"prompt_misalignment_label: got entry {bad[0]!r} in {text[:80]!r}, expected 0 or 1")
    return [int(entry) for entry in entries]


def label_prompt(tokens: Sequence[str], labels: Sequence[int]) -> str:
    """The keyword sequence that the decoder learns to write.

    >>> label_prompt(['a', 'yellow', 'cat'], [1, 0, 1])
    'a yellow_0 cat'

    Raises:
      UserError: the number of labels is not that of the tokens.
    """
    if len(tokens) != len(labels):
        raise UserError(f"labels: got {len(labels)} for {len(tokens)} prompt tokens, expected one each")
    return " ".join(
        token + SUFFIX if label == MISALIGNED else token for token, label in zip(tokens, labels, strict=True)
    )


def read_labels(sequence: str, tokens: Sequence[str]) -> list[int | None]:
    """The label of each prompt token according to a keyword sequence, which a model may have copied with mistakes.

    Words are matched to tokens in order, by longest matching blocks. A token without a match gets None.

    >>> read_labels('a yellow_0 cat', ['a', 'yellow', 'cat'])
    [1, 0, 1]
    >>> read_labels('a dog_0', ['a', 'cat'])
    [1, None]
    """
    words, marks = [], []
    for word in sequence.split():
        marked = word.endswith(SUFFIX) and len(word) > len(SUFFIX)
        words.append(word[: -len(SUFFIX)] if marked else word)
        marks.append(MISALIGNED if marked else ALIGNED)
    labels: list[int | None] = [None] * len(tokens)
    matcher = difflib.SequenceMatcher(None, words, list(tokens), autojunk=False)
    for block in matcher.get_matching_blocks():
        for offset in range(block.size):
            labels[block.b + offset] = marks[block.a + offset]
    return labels


def misaligned_words(tokens: Sequence[str], labels: Sequence[int | None]) -> list[str]:
    """The tokens labelled as misaligned, in order."""
    return [token for token, label in zip(tokens, labels, strict=True) if label == MISALIGNED]
