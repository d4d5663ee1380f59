"""Files on a disk or in a bucket (gs://), in one way."""

import os

from etils import epath


def absolute(path) -> epath.Path:
    """The path from the root on; what is in a bucket is already."""
    text = os.fspath(path)
    return epath.Path(text if "://" in text else os.path.abspath(text))


def replace(path, data: bytes) -> None:
    """Writes a file whole or not at all: beside it, then renames; in a bucket too. Makes the folder."""
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(data)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
