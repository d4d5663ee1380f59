"""Tables of images and their prompts, with or without binary labels (1 = the image shows its prompt, 0 = it does not).

    {"prompt": "two red cats", "image": "images/0.png", "label": 1}      a line of a .jsonl file

A .parquet file has the columns prompt, image (bytes, Hugging Face's struct of bytes and path, or paths) and label. Paths are
relative to the folder of the file.
"""

import itertools
import pathlib
from collections.abc import Collection, Iterator, Sequence

import pyarrow
import pyarrow.parquet

from richhf_data import images, input_files, jsonl, parquet
from richhf_data.errors import UserError

MAX_NAMED = 5  # faults that a message lists
_ROWS_AT_ONCE = 32  # images in memory
_PICKED_AT_ONCE = 256  # the same, of rows that are read in another order than the file's


class ImageTable:
    """A table of images and prompts. Checks all rows when it is opened; `images` reads the images one by one.

    Args:
      path: a .jsonl or .parquet file, or a folder with an images.jsonl, such as `rahf.diffusion.sample` writes.

    Attributes:
      path: the file. prompts: list of texts. places: a name for each row in errors, "row 3"; numbers begin with 1.

    Raises:
      UserError: no such file, another format, a missing column, faulty rows; names the file and the first faulty rows, with
        what they have and what is expected.
    """

    name, columns = "pictures", ("prompt", "image")
    expected = '{"prompt": text, "image": path}'
    prompt, pictures = "prompt", ("image",)  # which columns have these
    optional: tuple[str, ...] = ()  # columns of a .parquet that are read where it has them
    endings, listing = (".jsonl", ".parquet"), "images.jsonl"  # of files; the file of a folder

    def __init__(self, path):
        self.path = pathlib.Path(path)
        if self.path.is_dir():
            self.path /= self.listing
        if not self.path.is_file():
            raise UserError(f"{self.name}: no file {self.path}")
        readers = {".jsonl": self._json_rows, ".parquet": self._parquet_rows}
        readers = {ending: readers[ending] for ending in self.endings}
        if self.path.suffix not in readers:
            raise UserError(f"{self.name}: {path} ends in {self.path.suffix!r}, expected one of {sorted(readers)}")
        self._rows = readers[self.path.suffix]
        rows, faults, self.places = [], [], []
        small = [name for name in self.columns if name not in self.pictures or self.path.suffix == ".jsonl"]
        for where, row in self._rows(small):
            if isinstance(row, str):
                faults.append(row)
            else:
                faults += [f"{where}: {fault}" for fault in self._faults(row)]
                rows.append(row)
                self.places.append(where)
        refuse(f"{self.name}: {self.path}", faults)
        if not rows:
            raise UserError(f"{self.name}: {self.path} has no rows, expected one per image with {', '.join(self.columns)}")
        self.prompts = [row[self.prompt] for row in rows]
        self._checked = rows

    def __len__(self):
        return len(self.prompts)

    def images(self, rows: Sequence[int] | None = None) -> Iterator[tuple[str, bytes]]:
        """Yields (file and row for errors, encoded image) of each row.

        Args:
          rows: which ones, from 0, in this order; by default all.

        Raises:
          UserError: a missing image.
        """
        for where, row in self._rows(["image"]) if rows is None else self._picked(rows):
            yield f"{self.name}: {self.path}: {where}", self._encoded(where, row, "image")

    def _picked(self, rows: Sequence[int]) -> Iterator[tuple[str, dict | str]]:
        for start in range(0, len(rows), _PICKED_AT_ONCE):
            part = rows[start : start + _PICKED_AT_ONCE]
            found = dict(zip(sorted(set(part)), self._rows(["image"], set(part)), strict=True))
            yield from (found[row] for row in part)

    def _encoded(self, where: str, row: dict | str, column: str) -> bytes:
        """The encoded image of a row from `_rows`."""
        if isinstance(row, str):
            refuse(f"{self.name}: {self.path}", [row])
        value = row[column]
        value = value.get("bytes") or value.get("path") if isinstance(value, dict) else value
        refuse(f"{self.name}: {self.path}", [f"{where}: {fault}" for fault in self._fault_of_image(column, value)])
        return value if isinstance(value, bytes) else images.read_bytes(self.path.parent / value)

    def _faults(self, row) -> list[str]:
        faults = [fault for name in self.pictures if name in row for fault in self._fault_of_image(name, row[name])]
        prompt = row[self.prompt]
        if not jsonl.is_text(prompt) or not prompt.strip():
            faults.append(f"{self.prompt}: got {prompt!r}, expected a text")
        return faults

    def _fault_of_image(self, column: str, value) -> list[str]:
        if isinstance(value, bytes) and value:
            return []
        if not jsonl.is_text(value) or not value:
            got = "no bytes" if value == b"" else repr(value)
            return [f"{column}: got {got}, expected a path or an image's bytes"]
        path = self.path.parent / value
        if reason := input_files.not_a_file(path):
            return [f"{column}: no file {path}" if reason == "no such file" else f"{column}: {path} is {reason}"]
        return []

    def _json_rows(self, columns, only: Collection[int] | None = None) -> Iterator[tuple[str, dict | str]]:
        """Yields ("row 3", the row, or an error message that names it). only: numbers of the rows, from 0."""
        with self.path.open("rb") as file:
            for place, (number, line) in enumerate(jsonl.lines(file)):
                if only is not None and place not in only:
                    continue
                where = f"row {number}"
                try:
                    row = jsonl.parse(line, self.expected, where)
                    if missing := [name for name in columns if name not in row]:
                        raise UserError(f"{where}: got no {', '.join(missing)}, expected {self.expected}")
                    yield where, {name: row[name] for name in columns}
                except UserError as error:
                    yield where, str(error)

    def _parquet_rows(self, columns, only: Collection[int] | None = None) -> Iterator[tuple[str, dict | str]]:
        """As `_json_rows`. Reads only the row groups that have one of the rows."""
        try:
            with pyarrow.parquet.ParquetFile(self.path, page_checksum_verification=True) as file:
                there = file.schema_arrow.names
                if missing := [name for name in self.columns if name not in there]:
                    has = parquet.listed(parquet.leaves(file.schema_arrow))
                    raise UserError(f"{self.name}: {self.path} has no column {', '.join(missing)}; it has {has}")
                columns = [*columns, *(name for name in self.optional if name in there)]
                size = _ROWS_AT_ONCE if set(columns) & set(self.pictures) else 2**14
                sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
                for group, place in zip(range(len(sizes)), itertools.accumulate(sizes, initial=0), strict=False):
                    if only is not None and not any(place <= row < place + sizes[group] for row in only):
                        continue
                    for batch in file.iter_batches(size, row_groups=[group], columns=columns):
                        for i in range(batch.num_rows):
                            if only is None or place in only:
                                where = f"row {place + 1}"
                                try:
                                    (row,) = batch.slice(i, 1).to_pylist()
                                except UnicodeDecodeError as error:
                                    row = f"{where}: got text that is not UTF-8 ({error}), expected UTF-8"
                                yield where, row
                            place += 1
        except (pyarrow.ArrowException, OSError) as error:
            raise parquet.unreadable(self.name, str(self.path), error) from error


class LabelledImages(ImageTable):
    """An `ImageTable` with a column label.

    Attributes:
      labels: list of 0 and 1, one for each row.
    """

    name, columns = "feedback", ("prompt", "image", "label")
    expected = '{"prompt": text, "image": path, "label": 0 or 1}'

    def __init__(self, path):
        super().__init__(path)
        self.labels = [int(row["label"]) for row in self._checked]

    def _faults(self, row):
        good = isinstance(row["label"], int | float) and row["label"] in (0, 1)
        return super()._faults(row) + ([] if good else [f"label: got {row['label']!r}, expected 0 or 1"])


def refuse(where: str, faults: Sequence[str]) -> None:
    """Raises UserError if there are faults, with the first `MAX_NAMED` of them, each on a line."""
    if faults:
        more = f"\n  and {len(faults) - MAX_NAMED} more" if len(faults) > MAX_NAMED else ""
        raise UserError(f"{where}:\n  " + "\n  ".join(faults[:MAX_NAMED]) + more)
