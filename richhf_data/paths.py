"""Writes files on a disk or in a bucket (gs://) whole or not at all."""

import contextlib
import os
import pathlib
import secrets
from collections.abc import Iterator
from typing import BinaryIO

import fsspec
from etils import epath

from richhf_data.errors import UserError


def absolute(path) -> epath.Path:
    """The absolute path of a local path; a URL stays as it is."""
    text = os.fspath(path)
    return epath.Path(text if "://" in text else os.path.abspath(text))


def check_file(what: str, path, expected: str) -> None:
    """Raises UserError if a local path is no regular file: to open a named pipe would wait for ever."""
    path = pathlib.Path(path)
    if path.is_file():
        return
    if path.exists():
        raise UserError(f"{what}: {path} is {'a folder' if path.is_dir() else 'no regular file'}; expected {expected}")
    raise UserError(f"{what}: no file {path}{', a link to nothing' * path.is_symlink()}; expected {expected}")


@contextlib.contextmanager
def writing(path) -> Iterator[epath.Path]:
    """Gives a new, empty file beside `path` to write; the file replaces `path` when the block ends without an error.

    Makes the folder. An error removes the file and leaves `path` as it was. The name of the file cannot be guessed, and
    on a disk the file is created exclusively, so that no link is followed.

    >>> with writing("out/weights.npz") as partial:
    ...     partial.write_bytes(data)
    """
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(_partial(path.name))
    if "://" not in os.fspath(path):
        os.close(os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    try:
        yield partial
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def replace(path, data: bytes) -> None:
    """Writes the file `path` whole or not at all; see `writing`."""
    with writing(path) as partial:
        partial.write_bytes(data)


@contextlib.contextmanager
def writing_url(url: str) -> Iterator[BinaryIO]:
    """As `writing`, for a path or a URL of any file system that fsspec knows; gives the open file. The folder must exist."""
    filesystem, path = fsspec.core.url_to_fs(url)
    partial = _partial(path)
    try:
        with filesystem.open(partial, "wb") as file:
            yield file
        filesystem.mv(partial, path)
    except BaseException:
        if filesystem.exists(partial):
            filesystem.rm(partial)
        raise


def _partial(name: str) -> str:
    return f"{name}.{secrets.token_hex(8)}.partial"
