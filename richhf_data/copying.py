"""What a decoder may write if it must copy a prompt: its words in order, each with or without the suffix, and the end id.

`Copies` makes the automaton of a prompt. Each state lists the ids that may come next, of which the decoder takes the most
probable one, and the state after each. A word has the ids of the training target (`keywords.label_prompt`), so a decoder
that copies rightly without the constraint writes the same ids with it.

Where a sequence is too short for all marks, an id is allowed only if the other words still fit after it: a word is not
marked, so that no word is lost. A prompt that does not fit without any mark loses its last words; no word is cut.
"""

import functools
from collections.abc import Sequence

import numpy as np

from richhf_data import keywords, schema
from richhf_data.errors import UserError

OPTIONS = 3  # at most: the rest of the word's marked form, and the first id of either form of the next word
_STATES = 4  # for each id of the sequence; a word of n ids takes n, and those of its marked form that differ
_KEPT = 1024  # tables of prompts, and forms of 16 times as many tokens


def table_shape(length: int) -> tuple[int, int, int]:
    """Of `Copies.table` for sequences of `length` ids."""
    return _STATES * length, OPTIONS, 3


class Copies:
    """The automata of prompts, for one vocabulary.

    Args:
      vocabulary: a `vocabulary.Vocabulary`. length: T, the most ids of a sequence, with the end id.

    Attributes:
      table: prompt -> int32[S, K, 3], S and K of `table_shape`. Entry [state, option] has an id, the state after it and the
        last position, from 0 to T - 1, at which it may be written; -1 for no option. A state's ids are sorted. The first
        state is 0, in which an end id also ends.

    Raises:
      UserError: the vocabulary cannot write the suffix, or does not begin a word with white space.
    """

    def __init__(self, vocabulary, length: int):
        self._vocabulary, self._length = vocabulary, length
        suffix = keywords.SUFFIX
        if vocabulary.written(f"{suffix} {suffix}") != f"{suffix} {suffix}" or not vocabulary.begins_words(suffix):
            raise UserError(
                f"data.decoding: {vocabulary.path} does not write {suffix!r} as one word that begins with white space, "
                "expected a vocabulary that does, such as T5's; or set --config.data.decoding=free"
            )
        self._forms = functools.lru_cache(16 * _KEPT)(self._encode)
        self.table = functools.lru_cache(_KEPT)(self._table)

    def _table(self, prompt: str) -> np.ndarray:
        states = [{}]  # id -> the state after it, of each state; the first is the end here, and the beginning in the table
        needed = [0]  # the fewest ids from a state to the end

        def before(pieces: Sequence[int], options: dict[int, int]) -> dict[int, int]:
            """The options of a state from which `pieces` lead to one with `options`."""
            for piece in reversed(pieces):
                needed.append(1 + min(needed[then] for then in options.values()))
                states.append(options)
                options = {piece: len(states) - 1}
            return options

        options = {schema.EOS_ID: 0}
        for both, aligned, misaligned in reversed(self._fitting(prompt)):
            options = before(both, before(aligned, options) | before(misaligned, options))
        states[0] = options
        last = self._length - 1
        found = [
            (state, option, piece, then, last - needed[then])
            for state, options in enumerate(states)
            for option, (piece, then) in enumerate(sorted(options.items()))
        ]
        state, option, *entries = np.array(found, np.int32).T
        table = np.zeros(table_shape(self._length), np.int32)
        table[..., -1] = -1
        table[state, option] = np.stack(entries, axis=-1)
        table.flags.writeable = False
        return table

    def _fitting(self, prompt: str) -> list[tuple[list[int], list[int], list[int]]]:
        """`_forms` of the words that fit."""
        found, room, states = [], self._length - 1, _STATES * self._length - 1
        for token in keywords.tokenize(prompt):
            for forms in self._forms(token):
                both, aligned, misaligned = map(len, forms)
                room -= both + min(aligned, misaligned)
                states -= both + aligned + misaligned
                if room < 0 or states < 0:
                    return found
                found.append(forms)
        return found

    def _encode(self, token: str) -> list[tuple[list[int], list[int], list[int]]]:
        """The ids of each of its words: what both forms begin with, the rest of the aligned, and of the misaligned form."""
        found = []
        for forms in keywords.spellings(token):
            aligned, misaligned = (self._vocabulary.pieces(form)[: self._length] for form in forms)  # more never fit
            pairs = enumerate(zip(aligned, misaligned, strict=False))
            shared = next((i for i, (one, other) in pairs if one != other), min(len(aligned), len(misaligned)))
            if aligned:  # else the vocabulary deletes all of the word
                found.append((aligned[:shared], aligned[shared:], misaligned[shared:]))
        return found
