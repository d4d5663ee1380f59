"""JSON files, read and written in one way."""

import contextlib
import json
import os
import pathlib

from etils import epath

from richhf_data import checked, paths
from richhf_data.errors import UserError

MAX_BYTES = 2**26
MAX_DATA_BYTES = 2**32  # of a file with a row for each example of a dataset
MAX_DEPTH = 100  # levels of lists and objects


def read(path, max_bytes: int = MAX_BYTES) -> dict:
    """The object of a JSON file in UTF-8, with or without a byte order mark.

    NaN and infinity, which JSON does not have but Python and diffusers write, are read as floats. `checked.conform` refuses
    them as numbers.

    Raises:
      UserError: no such file; it is larger than `max_bytes`, not UTF-8 or not JSON, deeper than `MAX_DEPTH` levels, or holds
        another value than an object.
    """
    path = epath.Path(path)
    # A pathlib.Path knows a named pipe, which would hang; an epath.Path takes it for a file.
    if not (path if "://" in os.fspath(path) else pathlib.Path(path)).is_file():
        found = "is a folder" if path.is_dir() else "is no file" if path.exists() else "does not exist"
        raise UserError(f"{path}: {found}, expected a JSON file")
    with path.open("rb") as file:
        content = file.read(min(max_bytes, path.stat().length) + 1)  # it reserves as much
    return parse(content, path, max_bytes)


def parse(content: bytes, path, max_bytes: int = MAX_BYTES) -> dict:
    """The object of a JSON file's content; see `read`. `path` names the file in errors."""
    if len(content) > max_bytes:
        raise UserError(f"{path}: got more than {max_bytes:,} bytes, expected a JSON file of at most as many")
    too_deep = UserError(f"{path}: got more than {MAX_DEPTH} levels of lists and objects, expected at most as many")
    try:
        value = json.loads(content.decode("utf-8-sig"))
    except RecursionError:
        raise too_deep from None
    except ValueError as error:
        raise UserError(f"{path}: damaged, expected JSON in UTF-8 ({error}); write or fetch it again") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: got a JSON {type(value).__name__}, expected an object")
    level = [value]
    for _ in range(MAX_DEPTH):
        nodes = (node.values() if isinstance(node, dict) else node for node in level)
        level = [entry for node in nodes for entry in node if isinstance(entry, dict | list)]
        if not level:
            return value
    raise too_deep


def read_as(hint, path, extra: bool = False, max_bytes: int = MAX_BYTES):
    """A JSON file as an annotation says: a dataclass, `dict[str, str]`; see `checked.conform`.

    Raises:
      UserError: as `read`; another type, value or key than the annotation says. Names the file and the key.
    """
    return conform(hint, read(path, max_bytes), path, extra)


def conform(hint, value, path, extra: bool = False):
    """`checked.conform` of a value that the file `path` holds, which errors name."""
    with named(path):
        return checked.conform(hint, value, extra=extra)


@contextlib.contextmanager
def named(path):
    """Names a file in the errors of the block."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def write(path, value) -> None:
    """Writes a JSON file whole or not at all. Not-a-number becomes null."""
    paths.replace(path, (json.dumps(_without_nan(value), indent=2, sort_keys=True) + "\n").encode())


def _without_nan(value):
    if isinstance(value, dict):
        return {key: _without_nan(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(entry) for entry in value]
    return None if isinstance(value, float) and value != value else value
