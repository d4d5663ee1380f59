"""CLIP's byte-pair tokenizer. Imports no TensorFlow."""

import pathlib
from collections.abc import Sequence

import numpy as np

from richhf_data import json_files, jsonl
from richhf_data.errors import UserError

FILES = ("tokenizer.json", "vocab.json", "merges.txt")  # the first alone, or the other two
OPTIONS = ("special_tokens_map.json", "tokenizer_config.json", "added_tokens.json")


class Tokenizer:
    """CLIP's byte-pair tokenizer, which `transformers` reads from the files of a Hugging Face folder.

    Raises:
      UserError: the folder has neither tokenizer.json nor vocab.json and merges.txt; one of them is damaged.
    """

    def __init__(self, folder):
        folder = pathlib.Path(folder)
        whole, *parts = ((folder / name).is_file() for name in FILES)
        if not whole and not all(parts):
            raise UserError(f"vocabulary: {folder} has neither tokenizer.json nor vocab.json with merges.txt, expected one")
        for name in (*FILES, *OPTIONS):
            if name.endswith(".json") and (folder / name).is_file():
                json_files.read(folder / name)
        import transformers  # takes seconds

        try:
            self._tokenizer = transformers.CLIPTokenizer.from_pretrained(folder, local_files_only=True)
            self.eos_id = self._tokenizer.eos_token_id
            self.num_ids("a cat")
        except Exception as error:  # the library raises errors of many kinds, Exception itself among them
            raise UserError(
                f"vocabulary: {folder} has a damaged tokenizer ({type(error).__name__}: {error}); fetch it again"
            ) from error

    def num_ids(self, text: str) -> int:
        """The number of ids of a text with start and end id, without truncation."""
        return len(self._tokenizer(_text(text), truncation=False, verbose=False)["input_ids"])

    def __call__(self, texts: Sequence[str], length: int = 77) -> np.ndarray:
        """int32[B, length]: start id, pieces, end id, padding. A longer text loses its last pieces, never the end id."""
        ids = self._tokenizer(list(map(_text, texts)), padding="max_length", truncation=True, max_length=length)["input_ids"]
        return np.asarray(ids, np.int32)


def _text(text) -> str:
    if not jsonl.is_text(text):
        raise UserError(f"prompt: got {text!r}, expected text")
    return text
