"""Weights of a prompt's tokens: how much of the gradient passes through each token's keys and values."""

import functools
import re
from collections.abc import Callable, Sequence

import jax
import numpy as np

from rahf.diffusion.unet import Text
from richhf_data import clip_tokenizer, keywords
from richhf_data.errors import UserError

_WORD = re.compile(r"[\S\x1c-\x1f]+")  # Python takes these four for white space, the tokenizer does not


def weighted(text: Text, weights: jax.Array) -> Text:
    """The same keys and values, each token's gradient multiplied by its weight.

    Args:
      text: {transformer: (keys, values)} of `UNet.keys_values`, each [R, L, D]. weights: float32[R, L].
    """

    def of(x):
        fixed = jax.lax.stop_gradient(x)
        return fixed + weights.astype(x.dtype)[..., None] * (x - fixed)  # adds 0, so that the values stay bit for bit

    return jax.tree.map(of, text)


def token_weights(
    tokenizer: clip_tokenizer.Tokenizer,
    prompts: Sequence[str],
    words: Sequence[str] | None,
    strength: float,
    sign: int,
    length: int = 77,
    written: Callable[[str], str] = str,
) -> np.ndarray:
    """The weights of B prompts' tokens for `weighted`, float32[B, length].

    Tokens of a word that a critic finds misaligned weigh 1 - sign * strength, all others 1, start and end included. A word
    is what stands between white space ("cat,dog" is one); it is misaligned if the critic says so of any part of it.

    Args:
      words: B keyword sequences, `rahf.predictor.Feedback.labelled_prompts`: by the order of their words they tell which
        one of a repeated word is meant, unlike its `keywords`.
      strength: in [0, 1]. sign: 1 for a picture that is reinforced, -1 for one that is avoided.
      length: of a text with start and end id; the tokens of a longer one are cut as by the tokenizer.
      written: as of `keywords.read_labels`, the critic's `vocabulary.written`.

    Raises:
      UserError: a critic that predicts no keywords, another number of sequences, a strength or sign out of range.
    """
    if words is None or len(words) != len(prompts):
        got = "none" if words is None else len(words)
        raise UserError(f"words: got {got} for {len(prompts)} prompts, expected one each; take a critic with keywords")
    if not 0 <= strength <= 1 or sign not in (1, -1):
        raise UserError(f"words: got strength {strength} and sign {sign}, expected one in [0, 1], and 1 or -1")
    count, weights = functools.cache(lambda word: tokenizer.num_ids(word) - 2), np.ones((len(prompts), length), np.float32)
    for row, prompt, sequence in zip(weights, prompts, words, strict=True):
        labels = keywords.read_labels(sequence, keywords.tokenize(prompt), written)
        misaligned, begin = np.zeros(len(prompt), bool), 0  # of each character
        for piece, place in keywords.pieces(prompt):
            misaligned[begin : begin + len(piece)] = place is not None and labels[place] == keywords.MISALIGNED
            begin += len(piece)
        begin = 1  # after the start id
        for word in _WORD.finditer(prompt):
            end = begin + count(word.group())
            if misaligned[word.start() : word.end()].any():
                row[begin : min(end, length - 1)] = 1 - sign * strength
            begin = end
    return weights
