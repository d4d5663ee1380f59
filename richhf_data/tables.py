"""Tables that hold pictures beside what is said of them, as sources of builder.py: Rapidata's, and captions.

Such a table comes in one piece. An example's uid is a hash of its encoded picture, then one of its text; the hash of
the picture decides its split (`schema.split_of`), so that a picture is in one split whatever is said of it. A row without
a picture has its place for both, and counts as an image that is missing.
"""

import collections
import functools
import hashlib
import json
import operator
from collections.abc import Iterator
from typing import NamedTuple

import cv2
import fsspec
import numpy as np
import pyarrow

from richhf_data import consolidate, images, keywords, parquet, schema
from richhf_data.errors import UserError

_ROWS_AT_ONCE = 4  # bounds memory, beside a compressed row group: Rapidata's rows have two maps of 1024 x 1024
NO_MISTAKES = "[No_mistakes]"  # what an annotator chooses who finds every word depicted
_NO_MAP = np.zeros((schema.RAW_MAP_SIZE, schema.RAW_MAP_SIZE), np.uint8)
WORD_THRESHOLD = 0.5  # of the annotators' weight: the majority, as in RichHF
GUESSES = {role: parquet.GUESSES[role] for role in ("image", "prompt")}
CAPTION_GUESSES = GUESSES | {"prompt": ("caption", "text", "prompt")}


class Item(NamedTuple):
    """An example on its way into a dataset (builder.py).

    uid: names it within the dataset. image: as `images.plain` leaves it; None when there is a problem. raw: its targets as
    a raw record (records.py), absent ones left out. where: names its place in errors. caption: what the decoder shall
    write instead of the prompt with its labels. changes: what `images.plain` did. problem: one of builder.py's
    `PROBLEMS` and the reason.
    """

    uid: str
    prompt: str
    image: bytes | None
    raw: dict
    where: str
    caption: str | None = None
    changes: str = ""
    problem: tuple[str, str] | None = None


def _item(uid: str, prompt: str, encoded: bytes, raw: dict, where: str, caption: str | None, max_pixels: int) -> Item:
    try:
        image, changes, _ = images.plain(encoded, max_pixels)
    except UserError as error:
        problem = ("images_undecodable", str(error)) if encoded else ("images_missing", "")
        return Item(uid, prompt, None, raw, where, caption, problem=problem)
    return Item(uid, prompt, image, raw, where, caption, changes)


class ParquetTable:
    """Rows of parquet files with an image and a text.

    Args:
      what: names the table in errors. pattern: of the files, paths or URLs as in images.py.
      columns: those called image and prompt where they are not to be guessed, as in images.py.
      guesses: {image or prompt: names, the first match wins}. kinds: {further column: one of `_KINDS`}.

    Raises:
      UserError: no file matches, one is not parquet, or it lacks a column or has it with another type; prints the
        columns found with their types.
    """

    def __init__(self, what: str, pattern: str, columns: dict[str, str], guesses: dict, kinds: dict[str, str]):
        self.what, self._kinds = what, kinds
        parquet.check_columns(columns, guesses)
        filesystem, files = parquet.files(what, pattern)
        self._chosen = {}  # url -> {image or prompt: its column}
        for url in map(filesystem.unstrip_protocol, files):
            with parquet.open_file(what, url) as file:
                found = parquet.leaves(file.schema_arrow)
            where = f"{what}: {parquet.local(url)}"
            self._chosen[url] = parquet.choose_columns(found, where, columns, guesses)
            wrong = [name for name, kind in self._kinds.items() if name not in found or not _KINDS[kind](found[name])]
            if wrong:
                expected = ", ".join(f"{name} ({self._kinds[name]})" for name in wrong)
                raise UserError(f"{where}: got columns {parquet.listed(found)}; expected also {expected}")

    def identity(self) -> list:
        """The columns; and each file's name, size and hash of its footer, which has the sizes and statistics of the data."""
        chosen = next(iter(self._chosen.values()))
        found = [[*(name.removesuffix(".bytes") for name in chosen.values()), *self._kinds]]
        for url in self._chosen:
            with fsspec.open(url, "rb") as file:
                size = file.seek(0, 2)
                file.seek(size - 8)
                file.seek(size - 8 - int.from_bytes(file.read(4), "little"))
                found.append([url.rpartition("/")[2], size, hashlib.sha256(file.read()).hexdigest()])
        return found

    def rows(self) -> Iterator[tuple[str, bytes, dict]]:
        """Yields (place, encoded image, arrow scalars of the prompt and of the further columns)."""
        for url, chosen in self._chosen.items():
            number = 0
            for batch in self._batches(url, [*chosen.values(), *self._kinds], _ROWS_AT_ONCE):
                encoded = parquet.values(batch, chosen["image"])
                others = {"prompt": parquet.values(batch, chosen["prompt"])}
                others |= {name: batch.column(name) for name in self._kinds}
                for row in range(batch.num_rows):
                    place = f"{parquet.local(url)} row {number}"
                    yield place, encoded[row].as_py() or b"", {name: column[row] for name, column in others.items()}
                    number += 1

    def column(self, name: str) -> np.ndarray:
        """All values of a column of numbers as float64, nan where there is none."""
        found = [batch.column(name) for url in self._chosen for batch in self._batches(url, [name], 1 << 16)]
        return np.concatenate([np.empty(0), *(values.to_numpy(zero_copy_only=False).astype(np.float64) for values in found)])

    def _batches(self, url: str, columns: list[str], rows: int) -> Iterator[pyarrow.RecordBatch]:
        with parquet.open_file(self.what, url) as file:
            try:
                yield from file.iter_batches(rows, columns=columns)
            except Exception as error:  # a file system's library raises its own
                raise parquet.unreadable(self.what, url, error) from error


def _is_list(kind) -> bool:
    return pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind) or pyarrow.types.is_fixed_size_list(kind)


def _is_number(kind) -> bool:
    return pyarrow.types.is_floating(kind) or pyarrow.types.is_integer(kind)


def _is_heatmap(kind) -> bool:
    return _is_list(kind) and _is_list(kind.value_type) and _is_number(kind.value_type.value_type)


_KINDS = {
    "text": parquet.is_text,
    "number": _is_number,
    "list of lists of numbers": _is_heatmap,
}


class _Source:
    """What the sources here share: one table, split by a hash of each picture."""

    published, references, remedy = False, None, "see to the images of the rows in the table"

    def __init__(self, table, holdout: float, max_pixels: int):
        self._table, self._holdout, self._max_pixels, self._notes = table, holdout, max_pixels, {}
        self.splits = schema.SPLITS if holdout else ("train",)

    def notes(self, split: str) -> dict[str, list[str]]:
        return self._notes[split]

    def _rows(self, split: str, tidied=lambda text: text) -> Iterator[tuple[str, str, bytes, dict, str]]:
        """Yields (uid, text, encoded image, row, place) of a split's rows.

        A picture that comes again with the same text is dropped and noted. A row without an image has its place for a uid,
        so that each of them counts.
        """
        seen, notes = set(), collections.defaultdict(list)
        self._notes[split] = notes
        for where, image, row in self._table.rows():
            text = tidied(row["prompt"].as_py() or "")
            picture = hashlib.sha256(image or where.encode()).hexdigest()[:16]
            if schema.split_of(picture, self._holdout) != split:
                continue
            uid = f"{picture}-{hashlib.sha256(text.encode()).hexdigest()[:8]}" if image else where
            if uid in seen:
                notes["duplicates"].append(uid)
                continue
            seen.add(uid)
            yield uid, text, image, row, where


class Rapidata(_Source):
    """Rapidata/text-2-image-Rich-Human-Feedback: parquet, Apache-2.0, 13,024 rows in one split when last seen.

    What its card and its readers say (the files themselves could not be had to check):
      columns      image {bytes, path} (one reader has it as image_name: `columns`); prompt; word_scores, a string;
                   alignment_score, coherence_score, style_score float32, the same with _norm, which are not read;
                   alignment_heatmap, coherence_heatmap, lists of rows of float16
      word_scores  JSON, [["A", 0.3], ["cat,", 1.2], ..., ["[No_mistakes]", 4.1]]: the prompt split by spaces. A higher
                   score is a worse depicted word; annotators chose words, or [No_mistakes]
      heatmaps     1024 x 1024 in [0, 1]; null where none was asked for, which is not an empty map
      scores       1 to 5, higher is better
    What is assumed:
      scores       a column whose values all lie within [0, 1] is on our scale already (the first release had one column
                   of each score, whose scale no one says); 1 to 5 becomes (s - 1) / 4, as in RichHF
      heatmaps     higher = more annotators marked the pixel
      words        an annotator adds the same weight to all that they choose, so that the weight of all annotators is at
                   least that of [No_mistakes] and of the worst word together

    Here coherence is plausibility and implausibility, alignment is alignment and misalignment, style is aesthetics, and
    `overall` is absent. A word is misaligned where its score is more than `word_threshold` of that weight. Where the
    words are not those of the prompt, or there is no weight, the keywords are absent, and the report counts them.

    Args:
      pattern, columns: as of `ParquetTable`. holdout: the share of dev, and of test. word_threshold: in [0, 1]. max_pixels: larger
        images are scaled down.

    Raises:
      UserError: as `ParquetTable`; a score column's values are neither within [0, 1] nor within [1, 5].
    """

    SCORES = {"plausibility": "coherence_score", "alignment": "alignment_score", "aesthetics": "style_score"}  # noqa: RUF012
    HEATMAPS = {"implausibility": "coherence_heatmap", "misalignment": "alignment_heatmap"}  # noqa: RUF012
    def __init__(
        self,
        pattern: str,
        columns: dict[str, str] | None = None,
        holdout: float = schema.HOLDOUT,
        word_threshold: float = WORD_THRESHOLD,
        max_pixels: int = images.MAX_PIXELS,
    ):
        kinds = {"word_scores": "text"}
        kinds |= dict.fromkeys(self.SCORES.values(), "number")
        kinds |= dict.fromkeys(self.HEATMAPS.values(), "list of lists of numbers")
        super().__init__(ParquetTable("rapidata", pattern, columns or {}, GUESSES, kinds), holdout, max_pixels)
        self._threshold = word_threshold
        self._likert = {column: self._is_likert(column) for column in self.SCORES.values()}

    def _is_likert(self, column: str) -> bool:
        values = self._table.column(column)
        values = values[~np.isnan(values)]
        low, high = (values.min(), values.max()) if values.size else (0.0, 0.0)
        if low < 0 or high > schema.LIKERT_HIGH or (high > 1 and low < schema.LIKERT_LOW):
            raise UserError(
                f"rapidata: column {column}: got values from {low:g} to {high:g}, expected all of them from 0 to 1, or "
                f"all from {schema.LIKERT_LOW} to {schema.LIKERT_HIGH}"
            )
        return high > 1

    def identity(self) -> dict:
        return {"rapidata": self._table.identity(), "holdout": self._holdout, "word_threshold": self._threshold}

    def examples(self, split: str) -> Iterator[Item]:
        for uid, prompt, image, row, where in self._rows(split):
            scores = [self._score(row, name, where) for name in schema.SCORES]
            maps = [self._heatmap(row, name, where) for name in schema.HEATMAPS]
            labels, problem = self._labels(row["word_scores"].as_py(), prompt, where)
            if problem:
                self._notes[split][problem].append(uid)
            targets = {
                "scores": [score or 0 for score in scores],
                "score_mask": [score is not None for score in scores],
                "heatmaps": np.stack([_NO_MAP if values is None else values for values in maps], -1),
                "heatmap_mask": [values is not None for values in maps],
                "labels": labels,
            }
            yield _item(uid, prompt, image, consolidate.raw_record(uid, targets), where, None, self._max_pixels)

    def _score(self, row: dict, name: str, where: str) -> float | None:
        """In [0, 1]; None where the table has no such score."""
        value = row[self.SCORES[name]].as_py() if name in self.SCORES else None
        if value is None or np.isnan(value):
            return None
        low, high = (schema.LIKERT_LOW, schema.LIKERT_HIGH) if self._likert[self.SCORES[name]] else (0, 1)
        return (value - low) / (high - low)

    def _heatmap(self, row: dict, name: str, where: str) -> np.ndarray | None:
        """uint8[512, 512]; None where the row has no such map."""
        lines = row[self.HEATMAPS[name]].values
        if lines is None or len(lines) == 0:
            return None
        widths = set(lines.value_lengths().to_pylist())
        if len(widths) != 1 or widths & {None, 0}:
            raise UserError(f"{where}: {self.HEATMAPS[name]}: got rows of lengths {widths}, expected one length")
        values = lines.flatten().to_numpy(zero_copy_only=False).astype(np.float32).reshape(len(lines), -1)
        if not (values.min() >= 0 and values.max() <= 1):  # false for nan too
            raise UserError(
                f"{where}: {self.HEATMAPS[name]}: got values from {values.min()} to {values.max()}, expected [0, 1]"
            )
        size = schema.RAW_MAP_SIZE
        interpolation = cv2.INTER_AREA if len(lines) > size else cv2.INTER_LINEAR
        return np.rint(cv2.resize(values, (size, size), interpolation=interpolation) * 255).astype(np.uint8)

    def _labels(self, text: str | None, prompt: str, where: str) -> tuple[list[int] | None, str | None]:
        """A label for each of the prompt's tokens; or None, and why."""
        if not text:
            return None, "without_word_scores"
        try:
            pairs = [(str(word), float(score)) for word, score in json.loads(text)]
        except (TypeError, ValueError) as error:
            raise UserError(
                f"{where}: word_scores: got {text[:80]!r} ({error}), expected JSON such as [[\"cat\", 0.5], ...]"
            ) from error
        if bad := [score for _, score in pairs if not 0 <= score < np.inf]:
            raise UserError(f"{where}: word_scores: got the score {bad[0]}, expected none below 0")
        scores = [score for word, score in pairs if word != NO_MISTAKES for _ in keywords.tokenize(word)]
        tokens = [token for word, _ in pairs if word != NO_MISTAKES for token in keywords.tokenize(word)]
        right = [score for word, score in pairs if word == NO_MISTAKES]
        if tokens != keywords.tokenize(prompt):
            return None, "words_unlike_the_prompt"
        if len(right) != 1 or not scores or right[0] + max(scores) == 0:
            return None, "word_scores_without_weight"
        limit = self._threshold * (right[0] + max(scores))
        return [keywords.MISALIGNED if score > limit else keywords.ALIGNED for score in scores], None


class Captions(_Source):
    """Pictures and their captions, for pre-training: the decoder writes the caption, every other target is absent.

    Args:
      where: a pattern of parquet files, as of `ParquetTable`; or tfds:NAME, a TFDS dataset that is prepared already, of which the
        split `train` is read.
      prompt: what the encoder reads in the place of a prompt.
      columns: as of `ParquetTable`, `prompt` for the caption; TFDS features have their parts joined by "/" (captions/text). Of
        several captions of a picture the first is taken.
      holdout: the share of dev, and of test.
      tfds_data_dir: where TFDS keeps its datasets; its default otherwise.
      max_pixels: larger images are scaled down.

    Raises:
      UserError: as `ParquetTable`; or no such TFDS dataset or feature.
    """

    def __init__(
        self,
        where: str,
        prompt: str = "image caption",
        columns: dict[str, str] | None = None,
        holdout: float = schema.HOLDOUT,
        tfds_data_dir: str | None = None,
        max_pixels: int = images.MAX_PIXELS,
    ):
        if where.startswith("tfds:"):
            table = _TfdsTable(where.removeprefix("tfds:"), columns or {}, tfds_data_dir)
        else:
            table = ParquetTable("captions", where, columns or {}, CAPTION_GUESSES, {})
        super().__init__(table, holdout, max_pixels)
        self._prompt = prompt

    def identity(self) -> dict:
        return {"captions": self._table.identity(), "prompt": self._prompt, "holdout": self._holdout}

    def examples(self, split: str) -> Iterator[Item]:
        for uid, caption, image, _, where in self._rows(split, lambda text: " ".join(text.split())):
            if not caption:
                self._notes[split]["empty_captions"].append(uid)
                continue
            yield _item(uid, self._prompt, image, {schema.RAW_UID: uid}, where, caption, self._max_pixels)


class _TfdsTable:
    """As `ParquetTable`, of a TFDS dataset's split `train`."""

    def __init__(self, name: str, columns: dict[str, str], data_dir: str | None):
        parquet.check_columns(columns, CAPTION_GUESSES)
        from richhf_data.tensorflow_cpu import tfds

        try:
            self._builder = tfds.builder(name, data_dir=data_dir)
        except (tfds.core.registered.DatasetNotFoundError, ValueError) as error:
            where = data_dir or "TFDS's default folder"
            raise UserError(
                f"captions: no TFDS dataset {name!r} is known or in {where}, expected its name; see --tfds_data_dir"
            ) from error
        info = self._builder.info
        if "train" not in info.splits:
            raise UserError(
                f"captions: TFDS dataset {name!r} is not prepared in {self._builder.data_dir}, expected its split train; "
                "prepare it with tfds.load, or see --tfds_data_dir"
            )
        chosen = {}
        for role, guesses in CAPTION_GUESSES.items():
            guess = next((name for name in guesses if name in info.features), guesses[0])
            feature = chosen[role] = columns.get(role, guess)
            found = info.features
            for part in feature.split("/"):
                found = found[part] if part in getattr(found, "keys", list)() else None
            if found is None:
                got = f"captions: {name!r}: got features {info.features}"
                raise UserError(f"{got}, expected {feature}, or --columns={role}=NAME, parts joined by /")
        self._image, self._caption = chosen["image"], chosen["prompt"]
        self._decoders = None
        if isinstance(_part(info.features, self._image), tfds.features.Image):
            self._decoders = tfds.decode.SkipDecoding()
            for part in reversed(self._image.split("/")):
                self._decoders = {part: self._decoders}

    def identity(self) -> list:
        return [self._builder.info.full_name, self._builder.info.splits["train"].num_examples, self._image, self._caption]

    def rows(self) -> Iterator[tuple[str, bytes, dict]]:
        from richhf_data.tensorflow_cpu import tfds

        read = tfds.ReadConfig(interleave_cycle_length=1)  # in the files' order
        for number, example in enumerate(self._builder.as_dataset(split="train", decoders=self._decoders, read_config=read)):
            texts = np.atleast_1d(_part(example, self._caption).numpy()).tolist()
            caption = pyarrow.scalar(texts[0].decode() if texts else "")
            where = f"{self._builder.info.full_name} example {number}"
            yield where, _part(example, self._image).numpy(), {"prompt": caption}


def _part(tree, name: str):
    """What "a/b" names in nested dicts."""
    return functools.reduce(operator.getitem, name.split("/"), tree)
