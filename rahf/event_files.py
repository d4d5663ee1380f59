"""TensorBoard's event files, on a disk or in a bucket. What cannot be written never ends a run.

Importing this module teaches tensorboardX to write to `address(folder)`.
"""

import io
import os
import sys

import tensorboardX.record_writer
from etils import epath


def address(folder: epath.Path) -> str:
    """What to give tensorboardX as the folder of its files."""
    return str(folder) if "://" in str(folder) else f"disk:{folder}"


class BucketFile:
    """An event file in a bucket. Nothing can be appended there, so each flush writes the whole file."""

    def __init__(self, path: str):
        self._path, self._buffer, self._warned = epath.Path(path), io.BytesIO(), False

    def write(self, data: bytes) -> None:
        self._buffer.write(data)

    def flush(self) -> None:
        try:
            self._write()
            self._warned = False
        except Exception as error:  # each client has its own; it would end tensorboardX's thread
            if not self._warned:
                text = f"WARNING: {self._path}: not written, tried again at each flush: {error}"
                print(text, file=sys.stderr, flush=True)
            self._warned = True

    def _write(self) -> None:
        self._path.write_bytes(self._buffer.getvalue())

    close = flush

    # The interface that tensorboardX expects of a kind of file.
    open = classmethod(lambda cls, path: cls(path))
    directory_check = staticmethod(lambda path: None)


class DiskFile(BucketFile):
    """An event file on a disk. Each flush appends what is new, whole or not at all."""

    def __init__(self, path: str):
        super().__init__(path.removeprefix("disk:"))

    def _write(self) -> None:
        size = os.path.getsize(self._path) if os.path.exists(self._path) else 0
        try:
            with open(self._path, "ab") as file:
                file.write(self._buffer.getvalue())
        except OSError:
            if os.path.exists(self._path):
                os.truncate(self._path, size)
            raise
        self._buffer = io.BytesIO()

    directory_check = staticmethod(lambda path: os.makedirs(path.removeprefix("disk:"), exist_ok=True))


tensorboardX.record_writer.register_writer_factory("gs", BucketFile)
tensorboardX.record_writer.register_writer_factory("disk", DiskFile)
