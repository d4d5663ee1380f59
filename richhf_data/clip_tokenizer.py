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

    Attributes:
      eos_id: the end id. size: of the ids.

    Raises:
      UserError: the folder has neither tokenizer.json nor vocab.json and merges.txt; one of them is damaged.
    """

    def __init__(self, folder):
        folder = pathlib.Path(folder)
        whole, *parts = ((folder / name).is_file() for name in FILES)
        if not whole and not all(parts):
            raise UserError(
                f"vocabulary: {folder} has neither tokenizer.json nor vocab.json with merges.txt, expected one; "
                "rahf.convert copies them from --vocabulary=FOLDER"
            )
        self._tokenizer = loaded("CLIPTokenizer", folder, (*FILES, *OPTIONS))
        self.eos_id, self.size = self._tokenizer.eos_token_id, len(self._tokenizer)

    def num_ids(self, text: str) -> int:
        """The number of ids of a text with start and end id, without truncation."""
        return len(self._tokenizer(text_of(text), truncation=False, verbose=False)["input_ids"])

    def __call__(self, texts: Sequence[str], length: int = 77) -> np.ndarray:
        """int32[B, length]: start id, pieces, end id, padding. A longer text loses its last pieces, never the end id."""
        options = {"padding": "max_length", "truncation": True, "max_length": length}
        return np.asarray(self._tokenizer(list(map(text_of, texts)), **options)["input_ids"], np.int32)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, without start, end and padding."""
        return self._tokenizer.decode([int(one) for one in ids], skip_special_tokens=True)


def loaded(kind: str, folder: pathlib.Path, files: Sequence[str]):
    """The tokenizer of transformers' class `kind` in a folder, whose `files` it may read. It has encoded a text.

    Raises:
      UserError: one of the files is damaged.
    """
    for name in files:
        if name.endswith(".json") and (folder / name).is_file():
            json_files.read(folder / name)
    import transformers  # takes seconds

    try:
        tokenizer = getattr(transformers, kind).from_pretrained(folder, local_files_only=True)
        tokenizer("a cat", truncation=False, verbose=False)
        return tokenizer
    except Exception as error:  # the library raises errors of many kinds, Exception itself among them
        raise UserError(
            f"vocabulary: {folder} has a damaged tokenizer ({type(error).__name__}: {error}); fetch it again"
        ) from error


def text_of(text) -> str:
    """A prompt as it is. Raises UserError for what is no text."""
    if not jsonl.is_text(text):
        raise UserError(f"prompt: got {text!r}, expected text")
    return text
