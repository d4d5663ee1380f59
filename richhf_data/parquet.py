"""Opens parquet files by path, pattern or URL, and finds their columns.

The names of a table's columns are given, or guessed from `GUESSES`.
"""

import collections
import os
from collections.abc import Collection, Sequence

import pyarrow
import pyarrow.compute
import pyarrow.parquet

from richhf_data import input_files, paths
from richhf_data.errors import UserError

_BUFFER = 1 << 20  # bytes; without one pyarrow reads a whole column of a row group
GUESSES = {  # compared without case, first match wins
    "uid": ("uid", "image_uid", "image_id", "filename", "file_name", "image_path", "path", "image.path", "key", "id"),
    "prompt": ("prompt", "caption", "text"),
    "image": ("image", "image_bytes", "img", "jpg", "jpeg", "png", "bytes"),
}


def open_url(what: str, url: str):
    """fsspec's file system of a URL or path, and the path there. UserError if it is unknown or not installed."""
    try:
        return input_files.open_url(url)
    except Exception as error:
        raise unreadable(what, url, error) from error


def files(what: str, pattern: str):
    """The file system of a pattern (a path or URL), and {path: info} of the files that match. UserError if none does."""
    filesystem, path = open_url(what, pattern)
    try:
        if input_files.is_local(pattern):
            found = {os.path.abspath(name): filesystem.info(name) for name in input_files.matches(path)}
        else:
            found = filesystem.glob(path, detail=True)
    except Exception as error:
        raise unreadable(what, pattern, error) from error
    for name in (name for name, info in found.items() if info["type"] == "other"):
        paths.check_file(what, name, "a parquet file")
    matched = {name: info for name, info in sorted(found.items()) if info["type"] == "file"}
    if not matched:
        raise UserError(f"{what}: no file matches {pattern!r}, expected parquet files; quote the pattern in a shell")
    return filesystem, matched


def open_file(what: str, url: str) -> pyarrow.parquet.ParquetFile:
    """Opens a parquet file and reads its footer. Pages that have a checksum are compared with it when they are read.

    Raises:
      UserError: it cannot be opened, or has two columns of one name.
    """
    try:
        filesystem, path = input_files.open_url(url)
        file = pyarrow.parquet.ParquetFile(path, filesystem=filesystem, buffer_size=_BUFFER, page_checksum_verification=True)
    except Exception as error:
        raise unreadable(what, url, error) from error
    try:
        check_names(file.schema_arrow.names, f"{what}: {local(url)}")
    except UserError:
        file.close()
        raise
    return file


def check_names(columns: Sequence[str], where: str) -> None:
    """Raises UserError if two columns have one name."""
    if twice := sorted(name for name, count in collections.Counter(columns).items() if count > 1):
        raise UserError(f"{where}: got more than one column {', '.join(twice)}, expected one; drop the others")


def unreadable(what: str, url: str, error: Exception) -> UserError:
    """The UserError to raise when reading a parquet file or reaching a URL raised `error`: what failed, and what to do."""
    said = " ".join(str(error).split())
    if isinstance(error, UnicodeDecodeError):
        return UserError(f"{what}: {local(url)}: got text that is not UTF-8 ({said}), expected UTF-8; write it again")
    of_pyarrow = type(error) is OSError and not error.errno  # a damaged page
    if of_pyarrow or isinstance(error, pyarrow.ArrowException):
        again = "download it again (in a git clone: git lfs pull)"
        return UserError(f"{what}: {local(url)} is not a readable parquet file ({said}); {again}")
    if input_files.is_local(url):
        return UserError(f"{what}: cannot reach {local(url)} ({type(error).__name__}: {said}); check path and rights")
    return UserError(
        f"{what}: cannot reach {url} ({type(error).__name__}: {said}); install what its file system needs (gs:// "
        "gcsfs, s3:// s3fs, hf:// huggingface_hub), check the network and your rights there, or give the path of a copy"
    )


def columns_of(items: Sequence[str]) -> dict[str, str]:
    """{role: column} of a flag's ROLE=COLUMN. Raises UserError for an item of another form."""
    if bad := [item for item in items if not all(item.partition("="))]:
        raise UserError(f"columns: got {bad[0]!r}, expected uid=NAME, prompt=NAME or image=NAME, separated by commas")
    return dict(item.split("=", 1) for item in items)


def check_columns(given: Collection[str], roles: Collection[str] = tuple(GUESSES)) -> None:
    """Raises UserError if a column is given for anything but the roles."""
    if unknown := set(given) - set(roles):
        raise UserError(f"columns: got {', '.join(sorted(unknown))}, expected some of {', '.join(roles)}")


def choose_columns(
    leaves: dict[str, pyarrow.DataType], where: str, given: dict[str, str], guesses: dict[str, tuple[str, ...]] = GUESSES
) -> dict[str, str]:
    """{role: column}: the given columns, and a guess by name and type for every other role. A prompt may be a list of texts.

    Args:
      leaves: {column: type} of the table. where: names the table in errors.
      given: {role: column}. guesses: {role: names of columns, the first match wins}.

    Raises:
      UserError: a given column is absent or of a wrong type, or no column has the right type and one of the names.
    """
    chosen, faults = {}, []
    for role, guessed in guesses.items():
        kinds, expected = _TYPES[role]
        given_kinds = [*kinds, pyarrow.types.is_integer] if role == "uid" else kinds
        if column := given.get(role):
            column = f"{column}.bytes" if f"{column}.bytes" in leaves else column
            if column not in leaves:
                faults.append(f"no column {column!r}")
            elif not any(fits(leaves[column]) for fits in given_kinds):
                faults.append(f"column {column!r} is {leaves[column]}, expected {expected}")
        else:
            known = [{_plain(name): name for name, kind in leaves.items() if fits(kind)} for fits in kinds]
            column = next((fitting[name] for fitting in known for name in guessed if name in fitting), None)
            if column is None:
                names = ", ".join(guessed)
                faults.append(f"no column for the {role}, expected {expected} called {names}, or --columns={role}=NAME")
        chosen[role] = column
    if faults:
        raise UserError(f"{where}: {'; '.join(faults)}. Columns there: {listed(leaves)}")
    return chosen


def _plain(name: str) -> str:
    return name.lower().removesuffix(".bytes")


def listed(leaves: dict[str, pyarrow.DataType]) -> str:
    """The columns with their types, for error messages."""
    return ", ".join(f"{name} ({kind})" for name, kind in leaves.items()) or "none"


def leaves(schema: pyarrow.Schema) -> dict[str, pyarrow.DataType]:
    """{column: type} of a schema; the fields of a struct follow as `column.field`."""
    found = {}
    for field in schema:
        found[field.name] = field.type
        if pyarrow.types.is_struct(field.type):
            found |= {f"{field.name}.{inner.name}": inner.type for inner in field.type}
    return found


def is_text(kind: pyarrow.DataType) -> bool:
    """Whether a column of this type holds strings, in any of Arrow's encodings."""
    if pyarrow.types.is_dictionary(kind):
        return is_text(kind.value_type)
    return pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind) or pyarrow.types.is_string_view(kind)


def is_list(kind: pyarrow.DataType) -> bool:
    """Whether a column of this type holds lists."""
    return pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind) or pyarrow.types.is_fixed_size_list(kind)


def is_texts(kind: pyarrow.DataType) -> bool:
    """Whether a column of this type holds lists of strings."""
    return is_list(kind) and is_text(kind.value_type)


def first_text(value: pyarrow.Scalar, where: str) -> tuple[str | None, int]:
    """(a text, or the first of a list of texts; how many there are). None if it is null.

    Args:
      where: names the value in errors.

    Raises:
      UserError: it is not UTF-8, which Arrow does not check.
    """
    values = value.values if is_list(value.type) else [value]
    if values is None or not len(values):
        return None, 0
    try:
        return values[0].as_py(), len(values)
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: got text that is not UTF-8 ({error}), expected UTF-8; write it again") from error


def _is_binary(kind: pyarrow.DataType) -> bool:
    return pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind) or pyarrow.types.is_binary_view(kind)


_TYPES = {
    "uid": ([is_text], "a string"),
    "prompt": ([is_text, is_texts], "a string or a list of strings"),
    "image": ([_is_binary], "binary"),
}


def values(batch, column: str):
    """A column of a table or batch; `column.field` names the field of a struct."""
    if column in batch.schema.names:
        return batch.column(column)
    name, _, field = column.partition(".")
    return pyarrow.compute.struct_field(batch.column(name), field)


def local(url: str) -> str:
    """A URL without file://, as people write paths."""
    return url.removeprefix("file://")
