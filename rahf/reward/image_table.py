"""Tables of images and their prompts, with or without binary labels (1 = the image shows its prompt, 0 = it does not).

    {"prompt": "two red cats", "image": "images/0.png", "label": 1}      a line of a .jsonl file

A .parquet file has the columns prompt, image (bytes, Hugging Face's struct of bytes and path, or paths) and label. Paths are
relative to the folder of the file.
"""

import pathlib
from collections.abc import Iterator

import pyarrow
import pyarrow.parquet

from richhf_data import images, input_files, jsonl, parquet
from richhf_data.errors import UserError

MAX_NAMED = 5  # faults that a message lists
_ROWS_AT_ONCE = 32  # images in memory


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

    def __init__(self, path):
        self.path = pathlib.Path(path)
        if self.path.is_dir():
            self.path /= "images.jsonl"
        if not self.path.is_file():
            raise UserError(f"{self.name}: no file {self.path}")
        readers = {".jsonl": self._json_rows, ".parquet": self._parquet_rows}
        if self.path.suffix not in readers:
            raise UserError(f"{self.name}: {path} ends in {self.path.suffix!r}, expected one of {sorted(readers)}")
        self._rows = readers[self.path.suffix]
        rows, faults, self.places = [], [], []
        small = [name for name in self.columns if name != "image" or self.path.suffix == ".jsonl"]
        for where, row in self._rows(small):
            if isinstance(row, str):
                faults.append(row)
            else:
                faults += [f"{where}: {fault}" for fault in self._faults(row)]
                rows.append(row)
                self.places.append(where)
        self._refuse(faults)
        if not rows:
            raise UserError(f"{self.name}: {self.path} has no rows, expected one per image with {', '.join(self.columns)}")
        self.prompts = [row["prompt"] for row in rows]
        self._checked = rows

    def __len__(self):
        return len(self.prompts)

    def images(self) -> Iterator[tuple[str, bytes]]:
        """Yields (file and row for errors, encoded image) for each row, in order.

        Raises:
          UserError: a missing image.
        """
        for where, row in self._rows(["image"]):
            if isinstance(row, str):
                self._refuse([row])
            value = row["image"]
            value = value.get("bytes") or value.get("path") if isinstance(value, dict) else value
            self._refuse([f"{where}: {fault}" for fault in self._fault_of_image(value)])
            encoded = value if isinstance(value, bytes) else images.read_bytes(self.path.parent / value)
            yield f"{self.name}: {self.path}: {where}", encoded

    def _faults(self, row) -> list[str]:
        faults = [] if "image" not in row else self._fault_of_image(row["image"])
        if not jsonl.is_text(row["prompt"]) or not row["prompt"].strip():
            faults.append(f"prompt: got {row['prompt']!r}, expected a text")
        return faults

    def _fault_of_image(self, value) -> list[str]:
        if isinstance(value, bytes) and value:
            return []
        if not jsonl.is_text(value) or not value:
            got = "no bytes" if value == b"" else repr(value)
            return [f"image: got {got}, expected a path or an image's bytes"]
        path = self.path.parent / value
        if reason := input_files.not_a_file(path):
            return [f"image: no file {path}" if reason == "no such file" else f"image: {path} is {reason}"]
        return []

    def _refuse(self, faults) -> None:
        if faults:
            more = f"\n  and {len(faults) - MAX_NAMED} more" if len(faults) > MAX_NAMED else ""
            raise UserError(f"{self.name}: {self.path}:\n  " + "\n  ".join(faults[:MAX_NAMED]) + more)

    def _json_rows(self, columns) -> Iterator[tuple[str, dict | str]]:
        """Yields ("row 3", the row, or an error message that names it)."""
        with self.path.open("rb") as file:
            for number, line in jsonl.lines(file):
                where = f"row {number}"
                try:
                    row = jsonl.parse(line, self.expected, where)
                    if missing := [name for name in columns if name not in row]:
                        raise UserError(f"{where}: got no {', '.join(missing)}, expected {self.expected}")
                    yield where, {name: row[name] for name in columns}
                except UserError as error:
                    yield where, str(error)

    def _parquet_rows(self, columns) -> Iterator[tuple[str, dict | str]]:
        try:
            with pyarrow.parquet.ParquetFile(self.path, page_checksum_verification=True) as file:
                if missing := [name for name in self.columns if name not in file.schema_arrow.names]:
                    has = parquet.listed(parquet.leaves(file.schema_arrow))
                    raise UserError(f"{self.name}: {self.path} has no column {', '.join(missing)}; it has {has}")
                number = 0
                for batch in file.iter_batches(_ROWS_AT_ONCE if "image" in columns else 2**14, columns=list(columns)):
                    for place in range(batch.num_rows):
                        number += 1
                        where = f"row {number}"
                        try:
                            (row,) = batch.slice(place, 1).to_pylist()
                        except UnicodeDecodeError as error:
                            row = f"{where}: got text that is not UTF-8 ({error}), expected UTF-8"
                        yield where, row
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
