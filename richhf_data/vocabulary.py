"""Vocabularies: SentencePiece, T5's own from a file or a small one trained on prompts; and CLIP's. Imports no TensorFlow."""

import functools
import hashlib
import io
import itertools
import tempfile
from collections.abc import Iterable, Sequence

import numpy as np
import sentencepiece
from etils import epath

from richhf_data import clip_tokenizer, keywords, paths, schema
from richhf_data.errors import UserError

CLIP_FILES = (*clip_tokenizer.OPTIONS, *reversed(clip_tokenizer.FILES))  # as they are written: the needed ones last
UNKNOWN = "⁇"  # what an unknown id reads as; SentencePiece writes it between spaces


class Vocabulary:
    """Text to ids and back. Ids: 0 = padding, 1 = end of sequence, 2 = unknown, as in T5's vocabulary.

    Args:
      path: a SentencePiece model, or a Hugging Face tokenizer folder that holds one as spiece.model.
    """

    def __init__(self, path):
        path = epath.Path(path)
        if path.is_dir():
            path /= "spiece.model"
        self.path = str(path)
        expected = "a SentencePiece model (*.model)"
        if "://" not in self.path:
            paths.check_file("vocabulary", path, expected)
        elif not path.is_file():
            raise UserError(f"vocabulary: no file {path}; expected {expected}")
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(path.read_bytes())
        except RuntimeError as error:
            raise UserError(f"vocabulary: {path} is not a SentencePiece model ({error})") from error
        ids = self._processor.pad_id(), self._processor.eos_id(), self._processor.unk_id()
        if ids != (schema.PAD_ID, schema.EOS_ID, schema.UNK_ID):
            raise UserError(f"vocabulary: {path} has (pad, eos, unk) = {ids}, expected (0, 1, 2) as T5's has")

    def copy(self, folder) -> None:
        """Writes the SentencePiece model to vocabulary.model in `folder`, whole or not at all."""
        paths.replace(epath.Path(folder) / "vocabulary.model", epath.Path(self.path).read_bytes())

    @property
    def digest(self) -> str:
        """SHA-256 of the SentencePiece model."""
        return hashlib.sha256(epath.Path(self.path).read_bytes()).hexdigest()

    @property
    def size(self) -> int:
        """Of the ids."""
        return self._processor.vocab_size()

    end_id = schema.EOS_ID

    def encode(self, text: str, length: int) -> np.ndarray:
        """int32[length]: the pieces and the end id, padded with zeros; a longer text loses its last pieces.

        `num_ids` gives the length without a cut.
        """
        ids = np.zeros(length, np.int32)
        pieces = self._processor.encode(text)[: length - 1] + [schema.EOS_ID]
        ids[: len(pieces)] = pieces
        return ids

    def pieces(self, text: str) -> list[int]:
        """The ids of `text`, without the end id."""
        return self._processor.encode(text)

    def pieces_of_suffix(self) -> list[int]:
        """The ids that the suffix of a misaligned word adds to a word.

        Raises:
          UserError: the vocabulary writes a word otherwise when it has the suffix.
        """
        word, marked = self.pieces("cat"), self.pieces("cat" + keywords.SUFFIX)
        if marked[: len(word)] != word or schema.UNK_ID in marked:
            raise UserError(
                f"vocabulary: {self.path} writes 'cat{keywords.SUFFIX}' with other ids than those of 'cat' and a suffix; "
                "expected one that does, such as T5's"
            )
        return marked[len(word) :]

    def spellings(self, ids: Sequence[int]) -> list[str]:
        """What each id writes, without white space."""
        return [piece.replace("▁", "") for piece in self._processor.id_to_piece(np.asarray(ids).tolist())]

    def begins_words(self, word: str) -> bool:
        """Whether white space begins the first piece of a word, and no other one."""
        first, *rest = self._processor.encode(word, out_type=str)
        return first.startswith("▁") and not any("▁" in piece for piece in rest)

    def num_ids(self, text: str) -> int:
        """The number of ids of `text`, with the end id."""
        return len(self._processor.encode(text)) + 1

    def knows(self, text: str) -> bool:
        """Whether `text` has the same words (`keywords.words`) after writing and reading, and no character is lost."""
        pieces = self._processor.encode(text)
        kept = schema.UNK_ID not in pieces and keywords.words(self._processor.decode(pieces)) == keywords.words(text)
        return kept and not any(map(_is_deleted, set(text)))

    def written(self, text: str) -> str:
        """The text as `decode` gives it back."""
        return spell(self._processor, self._processor.encode(text))

    def decode(self, ids: Sequence[int]) -> str:
        """The text before the first end id, without padding; `UNKNOWN` for an unknown id and one out of range."""
        return spell(self._processor, np.asarray(ids).tolist())


class CLIPVocabulary:
    """CLIP's vocabulary with the methods of `Vocabulary`, for the fine-tuned CLIP.

    The ids of a text are CLIP's, from its start id to its end id, then 1 and zeros as in `Vocabulary`. CLIP reads nothing
    after its end id.

    Args:
      path: a Hugging Face folder with CLIP's tokenizer.
    """

    def __init__(self, path):
        self.path = str(path)
        with tempfile.TemporaryDirectory() as copy:
            if "://" in self.path:
                self.copy(copy)
            self._tokenizer = clip_tokenizer.Tokenizer(copy if "://" in self.path else path)
        self.size, self.end_id = self._tokenizer.size, self._tokenizer.eos_id

    def copy(self, folder) -> None:
        """Writes the tokenizer's files into `folder`, each whole or not at all."""
        for name, content in self._files().items():
            paths.replace(epath.Path(folder) / name, content)

    @property
    def digest(self) -> str:
        """SHA-256 of the tokenizer's files."""
        return hashlib.sha256(b"".join(name.encode() + content for name, content in self._files().items())).hexdigest()

    def _files(self) -> dict[str, bytes]:
        found = ((name, epath.Path(self.path) / name) for name in CLIP_FILES)
        return {name: file.read_bytes() for name, file in found if file.is_file()}

    def encode(self, text: str, length: int) -> np.ndarray:
        """int32[length]: start, pieces, end, 1, zeros; a longer text loses its last pieces."""
        ids = np.zeros(length, np.int32)
        pieces = [*self.pieces(text, length), schema.EOS_ID]
        ids[: len(pieces)] = pieces
        return ids

    def pieces(self, text: str, length: int) -> list[int]:
        """The ids from start to end, at most `length` - 1."""
        ids = self._tokenizer([text], length - 1)[0].tolist()
        return ids[: ids.index(self.end_id) + 1]

    def num_ids(self, text: str) -> int:
        """The number of ids of `text`, with its start, its end, and the 1."""
        return self._tokenizer.num_ids(text) + 1

    def knows(self, text: str) -> bool:
        """True: its pieces are bytes."""
        del text
        return True

    def written(self, text: str) -> str:
        """The text: nothing writes with this vocabulary."""
        return text

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids."""
        return self._tokenizer.decode(ids)


def of(path) -> Vocabulary | CLIPVocabulary:
    """The vocabulary of a SentencePiece model, or of a Hugging Face tokenizer folder: T5's or CLIP's.

    Raises:
      UserError: there is none.
    """
    folder = epath.Path(path)
    if folder.is_dir() and not (folder / "spiece.model").is_file():
        return CLIPVocabulary(path)
    return Vocabulary(path)


def spell(processor: sentencepiece.SentencePieceProcessor, ids: Sequence[int]) -> str:
    """`Vocabulary.decode` with a SentencePiece processor."""
    pieces = itertools.takewhile(lambda piece: piece != schema.EOS_ID, ids)
    kept = [piece if piece < processor.vocab_size() else schema.UNK_ID for piece in pieces if piece != schema.PAD_ID]
    return processor.decode(kept).replace(f" {UNKNOWN} ", UNKNOWN)


@functools.cache
def _is_deleted(character: str) -> bool:
    """Whether normalising deletes a character, as it does control characters that are no white space."""
    return keywords.words(f"a{character}b") == ["ab"]


def train(prompts: Iterable[str], path, size: int = 512) -> Vocabulary:
    """Trains a SentencePiece model on prompts and their labelled forms, and writes it to `path`. Deterministic.

    It uses byte-pair merges, which become whole words if there are few different words: RichHF-Synth's prompts take fewer
    than half as many ids as with a unigram model.

    Args:
      size: the most pieces; there are fewer if the prompts do not yield as many.

    Raises:
      UserError: the prompts have more different characters than `size` allows.
    """

    def sentences():
        for task in schema.TASKS:
            yield task
        for prompt in prompts:
            yield prompt
            tokens = keywords.tokenize(prompt)
            yield keywords.label_prompt(tokens, [keywords.MISALIGNED] * len(tokens))

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=sentences(),
            model_writer=model,
            model_type="bpe",
            vocab_size=size,
            hard_vocab_limit=False,
            character_coverage=1.0,
            user_defined_symbols=[keywords.SUFFIX],
            pad_id=schema.PAD_ID,
            eos_id=schema.EOS_ID,
            unk_id=schema.UNK_ID,
            bos_id=-1,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise UserError(f"vocabulary: {size} pieces cannot be trained on these prompts ({error}); allow more") from error
    paths.replace(path, model.getvalue())
    return Vocabulary(path)
