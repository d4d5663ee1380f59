"""Prompt tokens and labels to and from the keyword sequence ("a yellow_0 cat").

A token (`tokenize`) has a label, as in the published records. It is written as its words (`words`), which are free of white
space and of the characters that SentencePiece rewrites ("½", "ﬁ", full-width letters), so that a decoder which copies them
is understood. A prompt's own suffix is doubled: an aligned "gpt_0" is written "gpt_0_0", a misaligned one "gpt_0_0_0".
"""

import difflib
import re
from collections.abc import Callable, Sequence

import sentencepiece

from richhf_data.errors import UserError

MISALIGNED, ALIGNED = 0, 1
SUFFIX = "_0"
_SEPARATORS = re.compile(r'[,.?!":; ]+')
_NORMALISER = sentencepiece.SentencePieceNormalizer(rule_name="nmt_nfkc")  # of T5's vocabulary and of those that we train
_SPACE = "▁"  # SentencePiece's


def tokenize(prompt: str) -> list[str]:
    """Splits a prompt as the RichHF-18K release does: on any of `, . ? ! " : ;` and space, empties dropped.

    >>> tokenize('a yellow cat, "sitting"')
    ['a', 'yellow', 'cat', 'sitting']
    """
    return [token for token in _SEPARATORS.split(prompt) if token]


def pieces(prompt: str) -> list[tuple[str, int | None]]:
    """A prompt cut into its tokens, each with its place, and what stands between them, with None.

    >>> pieces('a cat, "sitting"')
    [('a', 0), (' ', None), ('cat', 1), (', "', None), ('sitting', 2), ('"', None)]
    """
    found, place = [], 0
    for text in re.split(f"({_SEPARATORS.pattern})", prompt):
        if text:
            token = not _SEPARATORS.fullmatch(text)
            found.append((text, place if token else None))
            place += token
    return found


def words(text: str) -> list[str]:
    """The words of a text as they are written and compared: normalised as by SentencePiece, split at any white space.

    >>> words("½ cup\\n"), words("\\u200b")
    (['1⁄2', 'cup'], [])
    """
    return _NORMALISER.normalize(text).replace(_SPACE, " ").split()


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
    """The keyword sequence that the decoder learns to write. A token without words, such as a line break, is left out.

    >>> label_prompt(['a', 'yellow', 'cat\\n'], [1, 0, 0])
    'a yellow_0 cat_0'
    >>> label_prompt(['gpt_0', 'gpt'], [1, 1])
    'gpt_0_0 gpt'

    Raises:
      UserError: the number of labels is not that of the tokens.
    """
    if len(tokens) != len(labels):
        raise UserError(f"labels: got {len(labels)} for {len(tokens)} prompt tokens, expected one each")
    marked = ((word, label) for token, label in zip(tokens, labels, strict=True) for word in words(token))
    return " ".join(_spelling(word, label == MISALIGNED) for word, label in marked)


def spellings(token: str) -> list[tuple[str, str]]:
    """How `label_prompt` writes each word of a token: as aligned, as misaligned.

    >>> spellings('cat'), spellings('gpt_0')
    ([('cat', 'cat_0')], [('gpt_0_0', 'gpt_0_0_0')])
    """
    return [(_spelling(word, False), _spelling(word, True)) for word in words(token)]


def read_words(sequence: str) -> list[tuple[str, int]]:
    """The words of a keyword sequence, each with its label.

    >>> read_words('a yellow_0 gpt_0_0')
    [('a', 1), ('yellow', 0), ('gpt_0', 1)]
    """
    found = []
    for word in words(sequence):
        count = _suffixes(word)  # twice the word's own, and one more if it is marked
        found.append((word[: len(word) - len(SUFFIX) * (count - count // 2)], MISALIGNED if count % 2 else ALIGNED))
    return found


def written_words(token: str, written: Callable[[str], str] = str) -> list[str]:
    """The words of a token as a decoder writes them; none for a token that cannot be written.

    Args:
      written: a text as the decoder's vocabulary writes it (`Vocabulary.written`); by default unchanged.
    """
    return words(written(" ".join(words(token))))


def read_labels(sequence: str, tokens: Sequence[str], written: Callable[[str], str] = str) -> list[int | None]:
    """The label of each prompt token according to a keyword sequence, which a model may have copied with mistakes.

    Words are matched to those of the tokens in order, by longest matching blocks. A token without a match gets None; one of
    several words is misaligned if any of them is.

    Args:
      written: as in `written_words`.

    >>> read_labels('a yellow_0 cat', ['a', 'yellow', 'cat'])
    [1, 0, 1]
    >>> read_labels('a dog_0', ['a', 'cat'])
    [1, None]
    """
    read = read_words(sequence)
    expected = [(word, place) for place, token in enumerate(tokens) for word in written_words(token, written)]
    labels: list[int | None] = [None] * len(tokens)
    matcher = difflib.SequenceMatcher(None, [word for word, _ in read], [word for word, _ in expected], autojunk=False)
    for block in matcher.get_matching_blocks():
        for offset in range(block.size):
            label, place = read[block.a + offset][1], expected[block.b + offset][1]
            labels[place] = label if labels[place] is None else min(label, labels[place])
    return labels


def misaligned_words(tokens: Sequence[str], labels: Sequence[int | None]) -> list[str]:
    """The tokens labelled as misaligned, in order; white space in one becomes a space."""
    return [" ".join(token.split()) for token, label in zip(tokens, labels, strict=True) if label == MISALIGNED]


def misaligned_in(sequence: str, prompt: str, written: Callable[[str], str] = str) -> list[str]:
    """The words of a prompt that a keyword sequence marks as misaligned; `written` as in `written_words`.

    >>> misaligned_in('a yellow_0 cat', 'a yellow cat')
    ['yellow']
    """
    tokens = tokenize(prompt)
    return misaligned_words(tokens, read_labels(sequence, tokens, written))


def _spelling(word: str, marked: bool) -> str:
    return word + SUFFIX * (_suffixes(word) + marked)


def _suffixes(word: str) -> int:
    """How many times a word ends with the suffix.

    >>> [_suffixes(word) for word in ("gpt", "gpt_0", "_0_0")]
    [0, 1, 2]
    """
    return (len(word) - len(re.sub(f"({SUFFIX})+$", "", word))) // len(SUFFIX)
