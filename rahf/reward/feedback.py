"""Binary feedback: tables of a prompt, an image, and whether people found that the one shows the other.

    {"prompt": "two red cats", "image": "images/0.png", "label": 1}      a line of a .jsonl file; paths beside the file

A .parquet file has the columns prompt, image (bytes, a struct with bytes as Hugging Face's, or paths) and label.
"""

import json
import pathlib
from collections.abc import Iterator

import pyarrow
import pyarrow.parquet

from richhf_data import images as richhf_images

COLUMNS = ("prompt", "image", "label")
MAX_NAMED = 5  # faults in a message
_ROWS_AT_ONCE = 32  # of images in memory


class Feedback:
    """A file's rows, its prompts and labels checked; images are read when asked for.

    Attributes:
      prompts: list of texts. labels: list of 0 and 1, as long.

    Raises:
      ValueError: no such file, another format, a column that is missing, rows that are not as above; names the file, the
        first faulty rows (from 1 on), what they have and what is expected.
    """

    def __init__(self, path):
        self.path = pathlib.Path(path)
        if not self.path.is_file():
            raise ValueError(f"feedback: no file {path}")
        readers = {".jsonl": self._json_rows, ".parquet": self._parquet_rows}
        if self.path.suffix not in readers:
            raise ValueError(f"feedback: {path} ends in {self.path.suffix!r}, expected one of {sorted(readers)}")
        self._rows = readers[self.path.suffix]
        self.prompts, self.labels, faults = [], [], []
        for where, row in self._rows(("prompt", "label") if self.path.suffix == ".parquet" else COLUMNS):
            if isinstance(row, str):
                faults.append(f"{where}: {row}")
                continue
            if not isinstance(row["prompt"], str) or not row["prompt"].strip():
                faults.append(f"{where}: prompt: got {row['prompt']!r}, expected a text")
            if not isinstance(row["label"], int | float) or row["label"] not in (0, 1):
                faults.append(f"{where}: label: got {row['label']!r}, expected 0 or 1")
            if "image" in row:
                faults += self._fault_of_image(row["image"], where)
            self.prompts.append(row["prompt"])
            self.labels.append(row["label"])
        self._refuse(faults)
        if not self.prompts:
            raise ValueError(f"feedback: {path} has no rows, expected a row an image with {', '.join(COLUMNS)}")
        self.labels = [int(label) for label in self.labels]

    def __len__(self):
        return len(self.prompts)

    def images(self) -> Iterator[tuple[str, bytes]]:
        """(the file and row, the image as it is encoded) of each row, in order.

        Raises:
          ValueError: an image that is missing.
        """
        for where, row in self._rows(COLUMNS):
            value = row["image"]
            value = value.get("bytes") or value.get("path") if isinstance(value, dict) else value
            self._refuse(self._fault_of_image(value, where))
            encoded = value if isinstance(value, bytes) else (self.path.parent / value).read_bytes()
            yield f"feedback: {self.path}: {where}", encoded

    def _fault_of_image(self, value, where) -> list[str]:
        if isinstance(value, bytes) and value:
            return []
        if not isinstance(value, str) or not value:
            got = "no bytes" if value == b"" else repr(value)
            return [f"{where}: image: got {got}, expected a path or an image's bytes"]
        if not (self.path.parent / value).is_file():
            return [f"{where}: image: no file {self.path.parent / value}"]
        return []

    def _refuse(self, faults) -> None:
        if faults:
            more = f"\n  and {len(faults) - MAX_NAMED} more" if len(faults) > MAX_NAMED else ""
            raise ValueError(f"feedback: {self.path}:\n  " + "\n  ".join(faults[:MAX_NAMED]) + more)

    def _json_rows(self, columns) -> Iterator[tuple[str, dict | str]]:
        """(row 3, the row, or what is wrong with it)."""
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                    yield f"row {number}", {name: row[name] for name in columns}
                except (ValueError, KeyError, TypeError):
                    got = line[:80].decode(errors="replace").strip()
                    yield f"row {number}", f'got {got!r}, expected {{"prompt": text, "image": path, "label": 0 or 1}}'

    def _parquet_rows(self, columns) -> Iterator[tuple[str, dict]]:
        try:
            with pyarrow.parquet.ParquetFile(self.path) as file:
                if missing := [name for name in COLUMNS if name not in file.schema_arrow.names]:
                    has = richhf_images.listed(richhf_images.leaves(file.schema_arrow))
                    raise ValueError(f"feedback: {self.path} has no column {', '.join(missing)}; it has {has}")
                number = 0
                for batch in file.iter_batches(_ROWS_AT_ONCE if "image" in columns else 2**14, columns=list(columns)):
                    for row in batch.to_pylist():
                        number += 1
                        yield f"row {number}", row
        except (pyarrow.ArrowException, OSError) as error:
            raise richhf_images.unreadable("feedback", str(self.path), error) from error
