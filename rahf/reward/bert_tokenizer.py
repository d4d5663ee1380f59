"""BERT's tokenizer as BLIP extends it."""

import pathlib
from collections.abc import Sequence

import numpy as np

from richhf_data import clip_tokenizer
from richhf_data.errors import UserError

FILES = ("tokenizer.json", "vocab.txt")  # one of them; the first is read where there are both
ADDED = ("[DEC]", "[ENC]")  # BLIP's tokens, whose ids follow BERT's


class Tokenizer:
    """The tokenizer of bert-base-uncased, which `transformers` reads from a folder, with BLIP's two tokens.

    Args:
      folder: with tokenizer.json or vocab.txt. vocab_size: the number of ids that the weights embed.

    Raises:
      UserError: the folder has neither file, a damaged one, or another number of ids.
    """

    def __init__(self, folder, vocab_size: int):
        folder = pathlib.Path(folder)
        if not any((folder / name).is_file() for name in FILES):
            raise UserError(
                f"vocabulary: {folder} has neither {' nor '.join(FILES)}; convert it again with --vocabulary=FOLDER of "
                "bert-base-uncased"
            )
        self._tokenizer = clip_tokenizer.loaded("BertTokenizer", folder, FILES)
        self._tokenizer.add_tokens(list(ADDED), special_tokens=True)
        if len(self._tokenizer) != vocab_size:
            raise UserError(
                f"vocabulary: {folder} has {len(self._tokenizer)} ids with {' and '.join(ADDED)}, the weights embed "
                f"{vocab_size}; expected bert-base-uncased"
            )

    def __call__(self, texts: Sequence[str], length: int) -> tuple[np.ndarray, np.ndarray]:
        """int32[B, length]: start id, pieces, end id, padding; and bool[B, length], False for padding.

        A longer text loses its last pieces, never the end id.
        """
        options = {"padding": "max_length", "truncation": True, "max_length": length}
        encoded = self._tokenizer(list(map(clip_tokenizer.text_of, texts)), **options)
        return np.asarray(encoded["input_ids"], np.int32), np.asarray(encoded["attention_mask"], bool)
