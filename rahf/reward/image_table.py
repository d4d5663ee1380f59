"""Tables of pictures and their prompts; with a label, whether people found that the one shows the other, binary feedback.

    {"prompt": "two red cats", "image": "images/0.png", "label": 1}      a line of a .jsonl file; paths beside the file

A .parquet file has the columns prompt, image (bytes, a struct with bytes as Hugging Face's, or paths) and label.
"""

import pathlib
from collections.abc import Iterator

import pyarrow
import pyarrow.parquet

from richhf_data import jsonl, parquet
from richhf_data.errors import UserError

MAX_NAMED = 5  # faults in a message
_ROWS_AT_ONCE = 32  # of images in memory


class Pictures:
    """A table's rows, its prompts checked; images are read when asked for. Other columns are not read.

    Args:
      path: a .jsonl or .parquet file, or a folder with an images.jsonl, which `rahf.diffusion.sample` writes.

    Attributes:
      path: the file. prompts: list of texts. places: as many names of rows, for errors: "row 3".

    Raises:
      UserError: no such file, another format, a column that is missing, rows that are not as above; names the file, the
        first faulty rows (from 1 on), what they have and what is expected.
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
            raise UserError(f"{self.name}: {self.path} has no rows, expected a row an image with {', '.join(self.columns)}")
        self.prompts = [row["prompt"] for row in rows]
        self._checked = rows

    def __len__(self):
        return len(self.prompts)

    def images(self) -> Iterator[tuple[str, bytes]]:
        """(the file and row, the image as it is encoded) of each row, in order.

        Raises:
          UserError: an image that is missing.
        """
        for where, row in self._rows(["image"]):
            if isinstance(row, str):
                self._refuse([row])
            value = row["image"]
            value = value.get("bytes") or value.get("path") if isinstance(value, dict) else value
            self._refuse([f"{where}: {fault}" for fault in self._fault_of_image(value)])
            encoded = value if isinstance(value, bytes) else (self.path.parent / value).read_bytes()
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
        if not (self.path.parent / value).is_file():
            return [f"image: no file {self.path.parent / value}"]
        return []

    def _refuse(self, faults) -> None:
        if faults:
            more = f"\n  and {len(faults) - MAX_NAMED} more" if len(faults) > MAX_NAMED else ""
            raise UserError(f"{self.name}: {self.path}:\n  " + "\n  ".join(faults[:MAX_NAMED]) + more)

    def _json_rows(self, columns) -> Iterator[tuple[str, dict | str]]:
        """(row 3, the row; or an error that names the row)."""
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

    def _parquet_rows(self, columns) -> Iterator[tuple[str, dict]]:
        try:
            with pyarrow.parquet.ParquetFile(self.path) as file:
                if missing := [name for name in self.columns if name not in file.schema_arrow.names]:
                    has = parquet.listed(parquet.leaves(file.schema_arrow))
                    raise UserError(f"{self.name}: {self.path} has no column {', '.join(missing)}; it has {has}")
                number = 0
                for batch in file.iter_batches(_ROWS_AT_ONCE if "image" in columns else 2**14, columns=list(columns)):
                    for row in batch.to_pylist():
                        number += 1
                        yield f"row {number}", row
        except (pyarrow.ArrowException, OSError) as error:
            raise parquet.unreadable(self.name, str(self.path), error) from error


class Feedback(Pictures):
    """Pictures with labels.

    Attributes:
      labels: list of 0 and 1, as long as the prompts.
    """

    name, columns = "feedback", ("prompt", "image", "label")
    expected = '{"prompt": text, "image": path, "label": 0 or 1}'

    def __init__(self, path):
        super().__init__(path)
        self.labels = [int(row["label"]) for row in self._checked]

    def _faults(self, row):
        good = isinstance(row["label"], int | float) and row["label"] in (0, 1)
        return super()._faults(row) + ([] if good else [f"label: got {row['label']!r}, expected 0 or 1"])
