"""Checks of the files of other projects, for the readers."""

import pathlib
import re
from collections.abc import Iterable, Mapping

from rahf import pretrained
from rahf.weights import Tensors
from richhf_data import checked, json_files
from richhf_data.errors import UserError


def require(theirs: Mapping, needed: Iterable[str], what: str) -> None:
    """Refuses files without some tensors: UserError."""
    if missing := [name for name in needed if name not in theirs]:
        raise UserError(f"{what}: lacks {missing}, has {sorted(theirs)[: pretrained.MAX_NAMED]} ...; is it another format?")


def require_axes(theirs: Tensors, needed: Mapping[str, int], what: str) -> None:
    """Refuses files without some tensors, or with flatter ones: UserError.

    Args:
      needed: name of a tensor -> how many axes it has at least.
    """
    require(theirs, needed, what)
    for name, axes in needed.items():
        if len(shape := theirs[name].shape) < axes:
            raise UserError(f"{what}: the tensor {name} has shape {shape}, expected at least {axes} axes")


def count(theirs: Tensors, pattern: str) -> int:
    """How many different texts the pattern's first group has at the start of the tensors' names."""
    return len({match[1] for name in theirs if (match := re.match(pattern, name))})


def hugging_face_config(path, expected: str) -> tuple[dict, pathlib.Path]:
    """The config.json beside Hugging Face's weights, and its path."""
    path = pathlib.Path(path)
    file = (path if path.is_dir() else path.parent) / "config.json"
    if not file.is_file():
        raise UserError(f"weights: no {file}, expected Hugging Face's config.json beside the weights")
    config = json_files.read(file)
    if config.get("model_type") not in (None, expected):
        found = checked.shown(config["model_type"])
        raise UserError(f"weights: {file} is of a {found}, expected {expected!r}; choose another --source")
    return config, file
