"""Sources of examples (example_source.py) that are one table with images and annotations: Rapidata's, and captions.

Such a table has no splits. The uid of an example is a hash of its encoded image and a hash of its text. The hash of the
image decides the split (`schema.split_of`), so that all rows with the same image are in the same split. A row without an
image counts as a missing image; its place in the table stands for the hash.

To add a format, write its class and add a line to `FORMATS`.
"""

import collections
import dataclasses
import functools
import hashlib
import operator
import os
from collections.abc import Callable, Iterator

import cv2
import numpy as np
import pyarrow

from richhf_data import consolidate, images, input_files, jsonl, keywords, parquet, schema
from richhf_data.errors import UserError
from richhf_data.example_source import ExampleSource, Item

_ROWS_AT_ONCE = 4  # bounds memory: a row of Rapidata's has two maps of 1024 x 1024
NO_MISTAKES = "[No_mistakes]"  # the choice of an annotator who finds every word depicted
_NO_MAP = np.zeros((schema.RAW_MAP_SIZE, schema.RAW_MAP_SIZE), np.uint8)
WORD_THRESHOLD = 0.5  # of the annotators' weight: the majority, as in RichHF
GUESSES = {role: parquet.GUESSES[role] for role in ("image", "prompt")}
CAPTION_GUESSES = GUESSES | {"prompt": ("caption", "text", "prompt")}


def _item(uid: str, prompt: str, encoded: bytes, raw: dict, where: str, caption: str | None, max_pixels: int) -> Item:
    try:
        image, changes, _ = images.plain(encoded, max_pixels)
    except UserError as error:
        problem = ("images_undecodable", str(error)) if encoded else ("images_missing", "")
        return Item(uid, prompt, None, raw, where, caption, problem=problem)
    return Item(uid, prompt, image, raw, where, caption, changes)


class ParquetTable:
    """The rows of parquet files, each with an image and a text.

    Args:
      what: names the table in errors.
      pattern: of the files; paths or URLs that fsspec knows.
      columns: {image or prompt: its column}, in place of a guess.
      guesses: {image or prompt: names of columns, the first match wins}.
      kinds: {further column: one of `_KINDS`}.

    Raises:
      UserError: no file matches, one is not parquet, or it lacks a column or has it with another type; names the columns
        found and their types.
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
        """The columns; and of each file its name, size and a hash of its footer, which has the statistics of the data."""
        chosen = next(iter(self._chosen.values()))
        found = [[*(name.removesuffix(".bytes") for name in chosen.values()), *self._kinds]]
        for url in self._chosen:
            filesystem, path = parquet.open_url(self.what, url)
            with filesystem.open(path) as file:
                size = file.seek(0, 2)
                file.seek(size - 8)
                file.seek(size - 8 - int.from_bytes(file.read(4), "little"))
                found.append([url.rpartition("/")[2], size, hashlib.sha256(file.read()).hexdigest()])
        return found

    def rows(self) -> Iterator[tuple[str, bytes, dict]]:
        """Yields (place, encoded image, the prompt as `parquet.first_text` and arrow scalars of the further columns)."""
        for url, chosen in self._chosen.items():
            number = 0
            for batch in self._batches(url, [*chosen.values(), *self._kinds], _ROWS_AT_ONCE):
                encoded = parquet.values(batch, chosen["image"])
                texts = parquet.values(batch, chosen["prompt"])
                for row in range(batch.num_rows):
                    place = f"{parquet.local(url)} row {number}"
                    found = {"prompt": parquet.first_text(texts[row], f"{self.what}: {place}")}
                    found |= {name: batch.column(name)[row] for name in self._kinds}
                    yield place, encoded[row].as_py() or b"", found
                    number += 1

    def column(self, name: str) -> np.ndarray:
        """All values of a column of numbers as float64; nan for null."""
        found = [batch.column(name) for url in self._chosen for batch in self._batches(url, [name], 1 << 16)]
        return np.concatenate([np.empty(0), *(values.to_numpy(zero_copy_only=False).astype(np.float64) for values in found)])

    def _batches(self, url: str, columns: list[str], rows: int) -> Iterator[pyarrow.RecordBatch]:
        with parquet.open_file(self.what, url) as file:
            try:
                yield from file.iter_batches(rows, columns=columns)
            except Exception as error:  # a file system's library raises its own
                raise parquet.unreadable(self.what, url, error) from error


def _is_number(kind) -> bool:
    return pyarrow.types.is_floating(kind) or pyarrow.types.is_integer(kind)


def _is_heatmap(kind) -> bool:
    return parquet.is_list(kind) and parquet.is_list(kind.value_type) and _is_number(kind.value_type.value_type)


_KINDS = {
    "text": parquet.is_text,
    "number": _is_number,
    "list of lists of numbers": _is_heatmap,
}


class _Source:
    """One table, split by a hash of each image."""

    published, references, remedy = False, None, "see to the images of the rows in the table"

    def __init__(self, table, holdout: float, max_pixels: int):
        self._table, self._holdout, self._max_pixels, self._notes = table, holdout, max_pixels, {}
        self.splits = schema.SPLITS if holdout else ("train",)

    def notes(self, split: str) -> dict[str, list[str]]:
        return self._notes[split]

    def _rows(self, split: str, tidied=lambda text: text) -> Iterator[tuple[str, str, bytes, dict, str]]:
        """Yields (uid, text, encoded image, row, place) of the rows of a split.

        A repeated pair of image and text is dropped and noted; a row of several texts is noted. The uid of a row without an
        image is its place, so that every such row counts.
        """
        seen, notes = set(), collections.defaultdict(list)
        self._notes[split] = notes
        for where, image, row in self._table.rows():
            text, texts = row["prompt"]
            text = tidied(text or "")
            picture = hashlib.sha256(image or where.encode()).hexdigest()[:16]
            if schema.split_of(picture, self._holdout) != split:
                continue
            uid = f"{picture}-{hashlib.sha256(text.encode()).hexdigest()[:8]}" if image else where
            if uid in seen:
                notes["duplicates"].append(uid)
                continue
            seen.add(uid)
            if texts > 1:
                notes["rows_with_several_texts_of_which_the_first_is_taken"].append(uid)
            yield uid, text, image, row, where


class Rapidata(_Source):
    """Rapidata/text-2-image-Rich-Human-Feedback: parquet, Apache-2.0, 13,024 rows in one split when last seen.

    The format, from its card and its readers' code; it was not checked against the files, which were not available:
      columns      image {bytes, path} (one reader has it as image_name: `columns`); prompt; word_scores, a string;
                   alignment_score, coherence_score, style_score float32, the same with _norm, which are not read;
                   alignment_heatmap, coherence_heatmap, lists of rows of float16
      word_scores  JSON, [["A", 0.3], ["cat,", 1.2], ..., ["[No_mistakes]", 4.1]]: the prompt split by spaces. The
                   worse a word is depicted, the higher its score; annotators chose words, or [No_mistakes]
      heatmaps     1024 x 1024 in [0, 1]; null (not an empty map) if the annotators were not asked for one
      scores       1 to 5, higher is better
    Assumptions:
      scores       a column whose values all lie in [0, 1] has our scale already (the first release had one column per
                   score and does not document its scale); 1 to 5 becomes (s - 1) / 4, as in RichHF
      heatmaps     higher = more annotators marked the pixel
      words        an annotator adds the same weight to each of their choices, so the weight of all annotators is at
                   least the score of [No_mistakes] plus the score of the worst word

    Coherence becomes plausibility and implausibility, alignment becomes alignment and misalignment, style becomes
    aesthetics, and `overall` is absent. A word is misaligned if its score is more than `word_threshold` times that weight.
    If the words differ from the prompt's, or the weight is 0, the keywords are absent, and the report counts the example.

    Args:
      pattern, columns: as in `ParquetTable`. holdout: the share of dev, and of test. word_threshold: in [0, 1].
      max_pixels: larger images are scaled down.

    Raises:
      UserError: as `ParquetTable`; text that is not UTF-8; a score column has values outside of [0, 1] and of [1, 5].
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
            if not prompt.strip():
                self._notes[split]["empty_prompts"].append(uid)
                continue
            scores = [self._score(row, name, where) for name in schema.SCORES]
            maps = [self._heatmap(row, name, where) for name in schema.HEATMAPS]
            labels, problem = self._labels(parquet.first_text(row["word_scores"], f"{where}: word_scores")[0], prompt, where)
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
        """In [0, 1]; None if the row has no such score."""
        value = row[self.SCORES[name]].as_py() if name in self.SCORES else None
        if value is None or np.isnan(value):
            return None
        low, high = (schema.LIKERT_LOW, schema.LIKERT_HIGH) if self._likert[self.SCORES[name]] else (0, 1)
        return (value - low) / (high - low)

    def _heatmap(self, row: dict, name: str, where: str) -> np.ndarray | None:
        """uint8[512, 512]; None if the row has no such map."""
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
        """(a label for each token of the prompt, None), or (None, why there are none)."""
        if not text:
            return None, "without_word_scores"
        try:
            pairs = [_pair(*entry) for entry in jsonl.loads(text)]
        except (TypeError, ValueError) as error:
            raise UserError(
                f"{where}: word_scores: got {text[:80]!r} ({error}), expected JSON such as [[\"cat\", 0.5], ...]"
            ) from error
        if bad := [score for _, score in pairs if score < 0]:
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


def _pair(word, score) -> tuple[str, float]:
    if not isinstance(word, str) or type(score) not in (int, float):
        raise TypeError(f"{[word, score]} in the place of a word and its score")
    return word, float(score)


class Captions(_Source):
    """Images and captions, for pre-training: the decoder writes the caption, and every other target is absent.

    Args:
      where: a pattern of parquet files, as in `ParquetTable`; or tfds:NAME, a TFDS dataset that is prepared already, of
        which the split `train` is read.
      caption_prompt: what the encoder reads, the same for every image.
      columns: as in `ParquetTable`, where `prompt` is the column of the caption; for TFDS the path of a feature, such as
        "captions/text". Of several captions of an image the first is taken.
      holdout: the share of dev, and of test.
      tfds_data_dir: where TFDS keeps its datasets; TFDS's default if None.
      max_pixels: larger images are scaled down.

    Raises:
      UserError: as `ParquetTable`; or no such TFDS dataset or feature.
    """

    def __init__(
        self,
        where: str,
        caption_prompt: str = schema.CAPTION_PROMPT,
        columns: dict[str, str] | None = None,
        holdout: float = schema.HOLDOUT,
        tfds_data_dir: str | None = None,
        max_pixels: int = images.MAX_PIXELS,
    ):
        if not jsonl.is_text(caption_prompt):
            raise UserError(f"caption_prompt: got {caption_prompt!r}, expected text in UTF-8")
        if where.startswith("tfds:"):
            table = _TfdsTable(where.removeprefix("tfds:"), columns or {}, tfds_data_dir)
        else:
            table = ParquetTable("captions", where, columns or {}, CAPTION_GUESSES, {})
        super().__init__(table, holdout, max_pixels)
        self._prompt = caption_prompt

    def identity(self) -> dict:
        return {"captions": self._table.identity(), "prompt": self._prompt, "holdout": self._holdout}

    def examples(self, split: str) -> Iterator[Item]:
        for uid, caption, image, _, where in self._rows(split, lambda text: " ".join(text.split())):
            if not caption:
                self._notes[split]["empty_captions"].append(uid)
                continue
            yield _item(uid, self._prompt, image, {schema.RAW_UID: uid}, where, caption, self._max_pixels)


class _TfdsTable:
    """As `ParquetTable`, for the split `train` of a TFDS dataset."""

    def __init__(self, name: str, columns: dict[str, str], data_dir: str | None):
        parquet.check_columns(columns, CAPTION_GUESSES)
        from richhf_data.tensorflow_cpu import tfds

        try:
            self._builder = tfds.builder(name, data_dir=data_dir)
        except Exception as error:  # of TFDS, of protobuf, of the dataset's own code
            where = data_dir or "TFDS's default folder"
            said = "none is known or there"
            if not isinstance(error, tfds.core.registered.DatasetNotFoundError):
                said = " ".join(str(error).split())
            raise UserError(
                f"captions: no TFDS dataset {name!r} in {where}: {said}; expected its name; see --tfds_data_dir"
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
            kind = found.get_tensor_info()
            shapes = ((),) if role == "image" else ((), (None,))
            of_bytes = getattr(kind, "shape", None) in shapes and kind.tf_dtype.name == "string"
            if not of_bytes and not (role == "image" and isinstance(found, tfds.features.Image)):
                expected = "an image or its bytes" if role == "image" else "a text or a list of texts"
                raise UserError(f"captions: {name!r}: {feature}: got {kind}, expected {expected}; see --columns")
        self._image, self._caption = chosen["image"], chosen["prompt"]
        self._decoders = None
        if isinstance(_part(info.features, self._image), tfds.features.Image):
            self._decoders = tfds.decode.SkipDecoding()
            for part in reversed(self._image.split("/")):
                self._decoders = {part: self._decoders}

    def identity(self) -> list:
        return [self._builder.info.full_name, self._builder.info.splits["train"].num_examples, self._image, self._caption]

    def rows(self) -> Iterator[tuple[str, bytes, dict]]:
        from richhf_data import builder, records
        from richhf_data.tensorflow_cpu import tfds

        name, split = self._builder.info.full_name, self._builder.info.splits["train"]
        for path in map(os.fspath, split.filepaths):
            if "://" not in path and self._builder.info.file_format is tfds.core.FileFormat.TFRECORD:
                records.extents(path)
        read = tfds.ReadConfig(interleave_cycle_length=1)  # in the files' order
        with builder.named(self._builder.data_dir):
            examples = self._builder.as_dataset(split="train", decoders=self._decoders, read_config=read)
            for number, example in enumerate(examples):
                texts = np.atleast_1d(_part(example, self._caption).numpy()).tolist()
                where = f"{name} example {number}"
                caption = jsonl.decode(texts[0], f"captions: {where}") if texts else None
                yield where, _part(example, self._image).numpy(), {"prompt": (caption, len(texts))}


def _part(tree, name: str):
    """The value at the path "a/b" of nested dicts."""
    return functools.reduce(operator.getitem, name.split("/"), tree)


@dataclasses.dataclass(frozen=True)
class Format:
    """A format of tables that `richhf_data.build --records=PREFIX...` reads.

    Attributes:
      spec: a value of --records, for messages.
      options: the flags that it uses, beside those that every format uses.
      open: (what follows the prefix, columns=, max_pixels=, and the options) -> the source.
    """

    spec: str
    options: tuple[str, ...]
    open: Callable[..., ExampleSource]


# By the prefix of --records; the longest that matches decides. A new option also needs a flag of its name in build.py.
FORMATS = {
    "rapidata:": Format("rapidata:GLOB", ("holdout", "word_threshold"), Rapidata),
    "captions:": Format("captions:GLOB", ("holdout", "caption_prompt"), Captions),
    "captions:tfds:": Format(
        "captions:tfds:NAME",
        ("holdout", "caption_prompt", "tfds_data_dir"),
        lambda name, **options: Captions(f"tfds:{name}", **options),
    ),
}


def find_format(records) -> tuple[Format, str] | None:
    """The format of a value of --records, and what follows its prefix; None if it names record files.

    Raises:
      UserError: it has the form KIND:..., with another kind.
    """
    records = str(records)
    if fitting := [prefix for prefix in FORMATS if records.startswith(prefix)]:
        prefix = max(fitting, key=len)
        return FORMATS[prefix], records.removeprefix(prefix)
    kind, colon, rest = records.partition(":")
    if colon and kind.isidentifier() and not rest.startswith("//") and not input_files.matches(records):
        specs = ", ".join(one.spec for one in FORMATS.values())
        raise UserError(f"records: got {records!r}, expected record files (a folder, a file or a pattern), {specs}")
    return None
