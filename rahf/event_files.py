"""TensorBoard's event files in a bucket. Importing this module teaches tensorboardX to write gs:// paths."""

import io
import sys

import tensorboardX.record_writer
from etils import epath


class BucketFile:
    """An event file in a bucket. Nothing can be appended there, so each flush writes the whole file."""

    def __init__(self, path: str):
        self._path, self._buffer = epath.Path(path), io.BytesIO()

    def write(self, data: bytes) -> None:
        self._buffer.write(data)

    def flush(self) -> None:
        try:
            self._path.write_bytes(self._buffer.getvalue())
        except Exception as error:  # each client has its own; it would end tensorboardX's thread
            print(f"WARNING: {self._path}: not written, tried again at the next flush: {error}", file=sys.stderr, flush=True)

    close = flush

    # The interface that tensorboardX expects of a kind of file.
    open = classmethod(lambda cls, path: cls(path))
    directory_check = staticmethod(lambda path: None)


tensorboardX.record_writer.register_writer_factory("gs", BucketFile)
