"""JSON files, read and written in one way."""

import json

from etils import epath

from richhf_data import paths
from richhf_data.errors import UserError


def read(path) -> dict:
    """The object of a JSON file.

    Raises:
      UserError: the file is not JSON, or another value than an object.
    """
    try:
        value = json.loads(epath.Path(path).read_text())
    except ValueError as error:
        raise UserError(f"{path}: damaged, expected JSON ({error}); write or fetch it again") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: got a JSON {type(value).__name__}, expected an object")
    return value


def write(path, value) -> None:
    """Writes a JSON file whole or not at all. Not-a-number becomes null."""
    paths.replace(path, (json.dumps(_without_nan(value), indent=2, sort_keys=True) + "\n").encode())


def _without_nan(value):
    if isinstance(value, dict):
        return {key: _without_nan(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(entry) for entry in value]
    return None if isinstance(value, float) and value != value else value
