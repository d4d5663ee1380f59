"""Values from files and command lines, checked against type annotations: types, ranges, choices, nested dataclasses.

    @dataclasses.dataclass(frozen=True)
    class Tower:
        depth: Layers = 12
        activation: Literal["relu", "gelu"] = "relu"

        def __post_init__(self):
            fields(self, "tower")  # Tower(depth=0): "tower.depth: got 0, expected an integer from 1 to 256"
"""

import dataclasses
import difflib
import functools
import math
import types
import typing
from collections.abc import Mapping
from typing import Annotated, Any

from richhf_data import jsonl
from richhf_data.errors import UserError
from richhf_data.ranges import Range

SHOWN = 80  # characters of a wrong value that a message shows


# Upper bounds are far above all published models; a larger number is an error or an attack, and would fill the memory.
Layers = Annotated[int, Range(1, 256)]
Size = Annotated[int, Range(1, 2**20)]  # widths, heads, vocabularies, positions
Pixels = Annotated[int, Range(1, 8192)]  # a side of an image or of a patch
Share = Annotated[float, Range(0, 1, without=(1,))]  # dropout
Epsilon = Annotated[float, Range(0, 1, without=(0, 1))]
Metric = typing.NewType("Metric", float)  # may be not-a-number
WORDS = {int: "an integer", float: "a number", str: "a text", bool: "true or false", types.NoneType: "null"}
WORDS |= {Metric: WORDS[float], Any: "any value"}


def fields(value, name: str) -> None:
    """Checks each field of a dataclass against its annotation. `name` precedes the field's in errors: "vit.depth".

    Raises:
      UserError: a wrong type or a value out of its range.
    """
    for field, hint in _hints(type(value)).items():
        conform(hint, getattr(value, field), f"{name}.{field}")


def conform(hint, value, name: str = "", extra: bool = False) -> Any:
    """`value` as the annotation says: lists become tuples where it says so, integers floats, mappings dataclasses.

    Args:
      hint: int, float (finite), Metric, str (without lone surrogates), bool, None, Any, Literal, X | Y, Annotated[X, Range],
        tuple[X, Y], tuple[X, ...], list[X], dict[str, X], or a dataclass of such fields. A bool is no integer.
      name: of the value, in errors.
      extra: ignore a mapping's keys that its dataclass lacks. They are refused otherwise.

    Raises:
      UserError: another type, a value out of its range, a missing key, an unknown key.
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any or (hint in (int, bool, types.NoneType) and type(value) is hint):
        return value
    if hint is str and jsonl.is_text(value):
        return value
    if hint is float and type(value) in (int, float) and _finite(value):
        return float(value)
    if hint is Metric and type(value) in (int, float) and (value != value or _finite(value)):
        return float(value)
    if origin is Annotated and _is_kind(arguments[0], value) and all(_measure(value) in bounds for bounds in arguments[1:]):
        return conform(arguments[0], value, name, extra)
    if origin is typing.Literal and any(type(value) is type(one) and value == one for one in arguments):
        return value
    if origin in (typing.Union, types.UnionType):
        for one in arguments:
            if _is_kind(one, value):
                return conform(one, value, name, extra)
    if origin in (tuple, list) and isinstance(value, list | tuple):
        hints = arguments[:1] * len(value) if origin is list or arguments[1:] == (...,) else arguments
        if len(hints) == len(value):
            if set(hints) == {str} and all(map(jsonl.is_text, value)):  # texts of a whole dataset
                return origin(value)
            entries = enumerate(zip(hints, value, strict=True))
            return origin(conform(one, entry, f"{name}[{i}]", extra) for i, (one, entry) in entries)
    if origin is dict and isinstance(value, Mapping):
        return {key: conform(arguments[1], entry, join(name, key), extra) for key, entry in value.items()}
    if dataclasses.is_dataclass(hint):
        if isinstance(value, hint):
            return value
        if isinstance(value, Mapping):
            return _make(hint, value, name, extra)
    raise UserError(f"{name or 'the file'}: got {shown(value)}, expected {_words(hint)}")


def _make(cls, values: Mapping, name: str, extra: bool):
    hints, out = _hints(cls), {}
    for key, value in values.items():
        if key in hints:
            out[key] = conform(hints[key], value, join(name, key), extra)
        elif not extra:
            near = difflib.get_close_matches(str(key), hints, n=1)
            hint = f"did you mean {join(name, near[0])!r}?" if near else f"expected one of {sorted(hints)}"
            raise UserError(f"unknown option {join(name, key)!r}; {hint}")
    for field in dataclasses.fields(cls):
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and field.name not in out:
            raise UserError(f"{join(name, field.name)}: missing, expected {_words(hints[field.name])}")
    return cls(**out)


def join(name: str, key) -> str:
    """The name of a mapping's entry: "vit.depth"."""
    return f"{name}.{plain(key)}" if name else plain(key)


def plain(text) -> str:
    """A text of a file as a message or a terminal can show it without quotes: shortened, without control characters."""
    text = str(text)[:SHOWN]
    return text if text.isprintable() else repr(text)


def shown(value) -> str:
    """A value as a message shows it, shortened. An integer may have too many digits for Python to print."""
    if type(value) is int and value.bit_length() > 8 * SHOWN:
        return f"an integer of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


_hints = functools.cache(functools.partial(typing.get_type_hints, include_extras=True))


def _finite(value) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer that no float holds
        return False


def _measure(value):
    """What a range bounds: a number itself, the number of entries of a list."""
    return value if isinstance(value, int | float) else len(value)


def _is_kind(hint, value) -> bool:
    """Whether the value is of an annotation's outer type, whatever its range and its entries."""
    origin = typing.get_origin(hint) or hint
    if origin is Annotated:
        return _is_kind(typing.get_args(hint)[0], value)
    if origin in (float, Metric):
        return type(value) in (int, float) and _finite(value)
    if origin in (tuple, list):
        return isinstance(value, list | tuple)
    if origin is dict or dataclasses.is_dataclass(origin):
        return isinstance(value, Mapping) or type(value) is origin
    return origin is Any or type(value) is origin or value in typing.get_args(hint)


def _words(hint) -> str:
    """What an annotation expects, in words."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint in WORDS:
        return WORDS[hint]
    if origin is Annotated:
        counted = {tuple: " entries", list: " entries", dict: " entries", str: " characters"}
        unit = counted.get(typing.get_origin(arguments[0]) or arguments[0], "")
        bounds = " and ".join(one.bounds() for one in arguments[1:])
        return f"{_words(arguments[0])}{',' if unit else ''} {bounds}{unit}"
    if origin is typing.Literal:
        return f"one of {arguments}" if len(arguments) > 1 else repr(arguments[0])
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(_words, arguments))
    if origin in (tuple, list):
        if origin is list or arguments[1:] == (...,):
            return f"a list (each entry {_words(arguments[0])})"
        return f"a list of {len(arguments)}: {', '.join(map(_words, arguments))}"
    if origin is dict:
        return f"an object, each value {_words(arguments[1])}"
    return f"an object with keys of {sorted(_hints(hint))}"
