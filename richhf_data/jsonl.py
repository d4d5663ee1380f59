"""Reads and writes JSONL, and reads text files, all by the same rules.

A file is UTF-8, with or without a byte order mark. A line ends at "\\n" or "\\r\\n" and nowhere else: not at U+2028, U+0085
or a form feed. Blank lines are skipped.

The argument `where` of a function is the place that its errors name, for instance "prompts: list.jsonl line 3".
"""

import codecs
import json
import math
import pathlib
from collections.abc import Iterable, Iterator
from typing import BinaryIO

from richhf_data import paths
from richhf_data.errors import UserError

_SHOWN = 80  # characters of a faulty line in an error
_DIGITS = 300  # of an integer that a float can store


def lines(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Yields (number from 1 on, line without its end) of each line that is not blank."""
    for number, line in enumerate(file, 1):
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if line.strip():
            yield number, line.removesuffix(b"\n").removesuffix(b"\r")


def decode(data: bytes, where: str) -> str:
    """UTF-8 text without a byte order mark. Raises UserError if it is not UTF-8, or has zeros, as UTF-16 has."""
    try:
        if b"\0" in data:
            raise ValueError("a byte 0, as in UTF-16")
        return data.removeprefix(codecs.BOM_UTF8).decode()
    except ValueError as error:
        shown = data[:_SHOWN].decode(errors="replace")
        raise UserError(f"{where}: got {shown!r}, which is not UTF-8 ({error}), expected UTF-8; save it as UTF-8") from error


def loads(text: str):
    """The value of a JSON text. Raises ValueError if it is not JSON, is nested too deeply, or holds NaN or a number that no
    float can store, such as 1e400."""
    try:
        return json.loads(
            text,
            parse_constant=_finite,
            parse_float=_finite,
            parse_int=lambda digits: int(digits) if len(digits) < _DIGITS else _finite(digits),
        )
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _finite(number: str) -> float:
    value = float(number)
    if not math.isfinite(value):
        raise ValueError(f"{number[:_SHOWN]} is no finite number")
    return value


def parse(line: bytes, expected: str, where: str) -> dict:
    """The JSON object of a line.

    Raises:
      UserError: the line is not UTF-8 or not a JSON object.
    """
    text = decode(line, where)
    try:
        value = loads(text)
    except ValueError as error:
        raise UserError(f"{where}: got {text[:_SHOWN]!r}, which is not JSON ({error}), expected {expected}") from error
    if not isinstance(value, dict):
        raise UserError(f"{where}: got {text[:_SHOWN]!r}, which is not an object, expected {expected}")
    return value


def text_of(row: dict, name: str, expected: str, where: str, blank: bool = True) -> str:
    """A value that must be text.

    Raises:
      UserError: it is missing, null, not text, blank (if `blank` is False), or holds a lone surrogate, which no encoding can
        store.
    """
    if name not in row:
        raise UserError(f"{where}: got no {name!r} in {json.dumps(row)[:_SHOWN]}, expected {expected}")
    if not is_text(row[name]) or not (blank or row[name].strip()):
        note = ", a lone surrogate" if isinstance(row[name], str) and not is_text(row[name]) else ""
        raise UserError(f"{where}: {name}: got {repr(row[name])[:_SHOWN]}{note}, expected {expected}")
    return row[name]


def is_text(value) -> bool:
    """Whether a value is a string without lone surrogates."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def read(path, what: str, expected: str, texts: tuple[str, ...], blank: bool = True) -> Iterator[dict]:
    """Yields the objects of a JSONL file.

    Args:
      what: the file's role, for errors ("prompts"). expected: a good line, for errors. texts: keys whose values are text.
      blank: whether these may be blank.

    Raises:
      UserError: no such file, or a line that is not as expected.
    """
    for where, line in _lines_of(path, what):
        row = parse(line, expected, where)
        for name in texts:
            text_of(row, name, expected, where, blank)
        yield row


def write(path, rows: Iterable[dict]) -> None:
    """Writes an object per line, the file whole or not at all."""
    paths.replace(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


def read_texts(path, what: str) -> Iterator[str]:
    """Yields the lines of a text file, without the white space around them; errors as `read`."""
    for where, line in _lines_of(path, what):
        if text := decode(line, where).strip():
            yield text


def _lines_of(path, what: str) -> Iterator[tuple[str, bytes]]:
    if not pathlib.Path(path).is_file():
        raise UserError(f"{what}: no file {path}")
    with open(path, "rb") as file:
        for number, line in lines(file):
            yield f"{what}: {path} line {number}", line
