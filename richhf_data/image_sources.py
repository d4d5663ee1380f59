"""Where the encoded image and the caption of a uid come from. Imports no TensorFlow.

A source is named by a SPEC; its paths may be local or URLs that fsspec knows (gs://, s3://, hf://):

  parquet:GLOB   Pick-a-Pic's shards: columns caption, image_0_uid, image_1_uid, jpg_0, jpg_1 (encoded images)
  table:GLOB     a parquet table with one row per image: a uid, or the path of an image named by its uid; a caption; and
                 the encoded image, as bytes or as Hugging Face's struct of bytes and path
  folder:DIR     images named by uid, in subfolders too, beside captions.csv, .jsonl or .parquet (or metadata.*)

The columns of a table and of a captions table are given, or guessed from `parquet.GUESSES`.
"""

import csv
import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Callable, Collection, Iterator
from typing import Protocol

import pyarrow
import pyarrow.parquet

from richhf_data import jsonl, parquet, paths
from richhf_data.errors import UserError
from richhf_data.images import EXTENSIONS

_ROWS_AT_ONCE = 16
_FILES_AT_ONCE = 500
_NAMED = 5  # how many faults an error names
_CAPTIONS = tuple(f"{stem}{suffix}" for stem in ("captions", "metadata") for suffix in (".csv", ".jsonl", ".parquet"))

Row = tuple[str, str | None, bytes | None]  # uid, caption, encoded image


class Shard(Protocol):
    """A part of a source that one process reads.

    Attributes:
      name: a file name, which changes when the content does. size: bytes.
    """

    name: str
    size: int

    def check(self) -> None:
        """Raises UserError if the shard cannot be read; reads no row."""

    def sample(self) -> list[str]:
        """The first few uids, for error messages."""

    def read(self, wanted: Collection[str], advance: Callable[[int], object]) -> Iterator[Row]:
        """Yields the row of every image whose uid is wanted, and calls `advance` with the number of bytes just read."""


@dataclasses.dataclass(frozen=True)
class ParquetShard:
    """A parquet file with two images per row (`pairs`) or one."""

    url: str
    name: str
    size: int
    pairs: bool
    columns: tuple[tuple[str, str], ...]  # the given columns: (uid, prompt or image; column)

    def check(self) -> None:
        """Raises UserError if it is not a parquet file or lacks the columns."""
        with self._open() as file:
            caption = self._columns(file.schema_arrow)[0]
            if parquet.is_texts(parquet.leaves(file.schema_arrow)[caption]):
                _say_first(caption)

    def sample(self) -> list[str]:
        with self._open() as file:
            uid = self._columns(file.schema_arrow)[1][0][0]
            batch = next(file.iter_batches(_NAMED, columns=[uid]), None)
            return [str(value) for value in parquet.values(batch, uid).to_pylist()] if batch is not None else []

    def read(self, wanted: Collection[str], advance: Callable[[int], object]) -> Iterator[Row]:
        """See `Shard`. Holds a few images and one page of an image column in memory.

        A row group with many images may store them in a single dictionary page, of which pyarrow holds three copies.
        """
        with self._open() as file:
            caption, pairs = self._columns(file.schema_arrow)
            done = 0
            for group in range(file.num_row_groups):
                try:
                    for uid, image in pairs:
                        where = f"images: {parquet.local(self.url)} row group {group}"
                        yield from _read_row_group(file, group, (uid, caption, image), wanted, where)
                except UserError:
                    raise
                except Exception as error:  # a file system's library raises its own
                    raise parquet.unreadable("images", self.url, error) from error
                now = self.size * (group + 1) // file.num_row_groups
                advance(now - done)
                done = now

    def _open(self) -> pyarrow.parquet.ParquetFile:
        return parquet.open_file("images", self.url)

    def _columns(self, schema: pyarrow.Schema) -> tuple[str, list[tuple[str, str]]]:
        """The caption's column, and the columns of uid and encoded image of each image in a row."""
        where = f"images: {parquet.local(self.url)}"
        if self.pairs:
            given = [
                {"uid": f"image_{side}_uid", "prompt": "caption", "image": f"jpg_{side}"} for side in ("0", "1")
            ]
            try:
                found = [parquet.choose_columns(parquet.leaves(schema), where, names) for names in given]
            except ValueError as error:
                raise UserError(
                    f"{error}. parquet: expects Pick-a-Pic's columns; a table with one image a row is table:GLOB"
                ) from error
        else:
            found = [parquet.choose_columns(parquet.leaves(schema), where, dict(self.columns))]
        return found[0]["prompt"], [(names["uid"], names["image"]) for names in found]


@dataclasses.dataclass(frozen=True)
class FolderShard:
    """Some image files of a folder."""

    name: str
    size: int
    entries: tuple[tuple[str, str | None, str, int], ...]  # uid, caption, url, bytes

    def check(self) -> None:
        """Does nothing: `shards` has listed the folder."""

    def sample(self) -> list[str]:
        return [uid for uid, *_ in self.entries[:_NAMED]]

    def read(self, wanted: Collection[str], advance: Callable[[int], object]) -> Iterator[Row]:
        for uid, caption, url, size in self.entries:
            if uid in wanted:
                filesystem, path = parquet.open_url("images", url)
                try:
                    encoded = filesystem.cat_file(path)
                except Exception as error:
                    raise parquet.unreadable("images", url, error) from error
                yield uid, caption, encoded
            advance(size)


def shards(spec: str, wanted: Collection[str], columns: dict[str, str] | None = None) -> list[Shard]:
    """The shards of a source. Where two hold the same uid, the earlier one counts.

    Args:
      columns: {uid, prompt or image: its column}, in place of a guess.

    Raises:
      UserError: the SPEC is malformed, cannot be reached or matches nothing; `columns` has another key; the captions of a
        folder are missing or faulty.
    """
    kind, _, where = spec.partition(":")
    if kind not in ("parquet", "table", "folder") or not where:
        raise UserError(f"images: got {spec!r}, expected parquet:GLOB, table:GLOB or folder:DIR")
    columns = dict(columns or {})
    parquet.check_columns(columns)
    if kind == "parquet" and columns:
        raise UserError("columns: Pick-a-Pic's are known, expected none for parquet:GLOB; use table:GLOB")
    if kind == "folder":
        filesystem, path = parquet.open_url("images", where)
        try:
            return _folder(filesystem, path, wanted, columns)
        except ValueError:
            raise
        except Exception as error:
            raise parquet.unreadable("images", where, error) from error
    filesystem, files = parquet.files("images", where)
    return [
        ParquetShard(
            filesystem.unstrip_protocol(name),
            _name(pathlib.PurePosixPath(name).stem, [name, filesystem.ukey(name)]),
            info["size"] or 0,
            kind == "parquet",
            tuple(sorted(columns.items())),
        )
        for name, info in files.items()
    ]


@functools.cache
def _say_first(column: str) -> None:
    print(f"images: the column {column!r} holds lists of texts; the first of each is taken")


def _read_row_group(file, group: int, columns: tuple[str, str, str], wanted: Collection[str], where: str) -> Iterator[Row]:
    uid, caption, image = columns
    # Most row groups hold no wanted uid, and the uids are small to read.
    ids = parquet.values(file.read_row_group(group, columns=[uid]), uid).to_pylist()
    rows = {row: name for row, value in enumerate(ids) if (name := _uid(value, wanted)) is not None}
    if not rows:
        return
    start, last = 0, max(rows)
    for batch in file.iter_batches(_ROWS_AT_ONCE, row_groups=[group], columns=[caption, image], use_threads=False):
        captions, encoded = parquet.values(batch, caption), parquet.values(batch, image)
        for row in range(start, start + batch.num_rows):
            if row in rows:
                text, _ = parquet.first_text(captions[row - start], f"{where} row {row}: {caption}")
                yield rows[row], text, encoded[row - start].as_py()
        start += batch.num_rows
        if start > last:
            return


def _uid(value, wanted: Collection[str]) -> str | None:
    """The wanted uid that equals the value or the file name in it; None if there is none."""
    if value is None:
        return None
    value = str(value)
    path = pathlib.PurePosixPath(value)
    name = path.stem if path.suffix.lower() in EXTENSIONS else path.name
    return value if value in wanted else name if name in wanted else None


def _folder(filesystem, folder: str, wanted: Collection[str], columns: dict[str, str]) -> list[FolderShard]:
    if not filesystem.isdir(folder):
        expected = f"images named by uid and one of {', '.join(_CAPTIONS)}"
        raise UserError(f"images: no folder {folder} is there or can be reached, expected {expected}")
    if "image" in columns:
        raise UserError("columns: got image, expected uid and prompt alone: a folder's images are its files")
    captions = read_captions(filesystem, folder, wanted, columns)
    files = []
    for path, info in sorted(filesystem.find(folder, detail=True).items()):
        path = pathlib.PurePosixPath(path)
        if path.suffix.lower() in EXTENSIONS and path.stem in wanted:
            if info["type"] == "other":
                paths.check_file("images", path, "an image")
            files.append((path.stem, captions.get(path.stem), str(path), info))
    if not files:
        raise UserError(f"images: {folder} has no image called by a uid of the records, such as {min(wanted)}.jpg")
    result = []
    for start in range(0, len(files), _FILES_AT_ONCE):
        group = files[start : start + _FILES_AT_ONCE]
        states = [(uid, caption, path, filesystem.ukey(path)) for uid, caption, path, _ in group]
        entries = tuple((u, caption, filesystem.unstrip_protocol(path), info["size"]) for u, caption, path, info in group)
        result.append(FolderShard(_name("files", states), sum(entry[3] for entry in entries), entries))
    return result


def read_captions(filesystem, folder: str, wanted: Collection[str], columns: dict[str, str]) -> dict[str, str]:
    """uid -> caption of the wanted uids, from the captions table in a folder. UserError without exactly one such table."""
    paths = [path for name in _CAPTIONS if filesystem.isfile(path := f"{folder}/{name}")]
    if len(paths) != 1:
        got = " and ".join(paths) or "none"
        raise UserError(f"images: {folder}: got {got}, expected one of {', '.join(_CAPTIONS)} with uid and caption")
    (path,) = paths
    captions = {}
    for number, (value, caption) in enumerate(_caption_rows(filesystem, path, columns), 1):
        uid = _uid(value, wanted)
        if uid is not None and captions.setdefault(uid, caption) != caption:
            raise UserError(
                f"images: {path} entry {number}: uid {uid!r} has the captions {captions[uid]!r} and {caption!r}, expected "
                "one; remove the other"
            )
    return captions


def _caption_rows(filesystem, path: str, columns: dict[str, str]) -> Iterator[tuple[str, str | None]]:
    """Yields (uid or path, caption) of each entry of a captions table."""

    def names(leaves) -> tuple[str, str]:
        guesses = {role: parquet.GUESSES[role] for role in ("uid", "prompt")}
        chosen = parquet.choose_columns(leaves, f"images: {path}", columns, guesses)
        return chosen["uid"], chosen["prompt"]

    if path.endswith(".parquet"):
        with filesystem.open(path) as file:
            try:
                table = pyarrow.parquet.ParquetFile(file, page_checksum_verification=True).read()
            except (pyarrow.ArrowException, OSError) as error:
                raise parquet.unreadable("images", path, error) from error
        parquet.check_names(table.schema.names, f"images: {path}")
        leaves = parquet.leaves(table.schema)
        uid, prompt = names(leaves)
        if parquet.is_texts(leaves[prompt]):
            _say_first(prompt)
        for row, values in enumerate(zip(parquet.values(table, uid), parquet.values(table, prompt), strict=True)):
            yield tuple(parquet.first_text(value, f"images: {path} row {row}")[0] for value in values)
        return
    if path.endswith(".csv"):
        try:
            with filesystem.open(path, "r", encoding="utf-8-sig", newline="") as file:
                yield from _csv_rows(csv.DictReader(file, strict=True), path, names)
        except UnicodeDecodeError:
            with filesystem.open(path, "rb") as file:
                for number, line in enumerate(file, 1):
                    jsonl.decode(line, f"images: {path} line {number}")
            raise
        return
    expected, chosen = '{"uid": "...", "caption": "..."}', None
    with filesystem.open(path, "rb") as file:
        for number, line in jsonl.lines(file):
            where = f"images: {path} line {number}"
            entry = jsonl.parse(line, expected, where)
            uid, prompt = chosen = chosen or names(dict.fromkeys(entry, pyarrow.string()))
            value = entry.get(uid)
            yield value if type(value) is int else jsonl.text_of(entry, uid, expected, where), jsonl.text_of(
                entry, prompt, expected, where
            )


def _csv_rows(reader: csv.DictReader, path: str, names) -> Iterator[tuple[str, str]]:
    line = 1
    try:
        parquet.check_names(reader.fieldnames or (), f"images: {path}")
        uid, prompt = names(dict.fromkeys(reader.fieldnames or (), pyarrow.string()))
        line = reader.line_num + 1
        for row in reader:
            if None in row or None in row.values():  # more fields than the header has, or fewer
                line = reader.line_num
                got = sum(len(value) if key is None else value is not None for key, value in row.items())
                raise csv.Error(f"{got} fields")
            yield row[uid], row[prompt]
            line = reader.line_num + 1  # so that an unclosed quote is reported where it opens, not at the end of the file
    except csv.Error as error:
        raise UserError(
            f"images: {path} line {line}: got {error}, expected as many fields as the header "
            'has; put a field with a comma, a quote or a line break in quotes, such as "a cat, on a ""table"""'
        ) from error


def _name(stem: str, state) -> str:
    """`stem` and a digest of the state of the files, for a file name that changes with them."""
    return f"{stem}-{hashlib.sha256(json.dumps(state).encode()).hexdigest()[:16]}"
