"""Reads pickles that hold data alone, without the module pickle: no code of a pickle is ever found, made or called.

Trainers such as flow_grpo and verl-omni send their pictures so. A small interpreter runs the opcodes that make dictionaries,
lists, tuples, texts, bytes, numbers and None, and NumPy arrays and scalars of booleans, numbers, bytes and texts. It refuses
every other opcode and every other name. `pickletools.genops` of the standard library splits the bytes into opcodes; it
reserves no memory for what a pickle only declares.
"""

import pickletools
import re
from collections.abc import Callable

import numpy as np

from richhf_data.errors import UserError

MAX_OPCODES = 200_000
_DTYPE = re.compile(r"[<>|=]?([biufSU]\d{1,6}|\?)")
_CONSTANTS = {
    "NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_TUPLE": tuple,
}  # fmt: skip
_VALUES = {
    "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8",
    "SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "BYTEARRAY8",
}  # fmt: skip
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_KEYS = range(-(2**63), 2**63)  # the hash of a longer one takes long


class _Unbuilt:
    """A NumPy object between its REDUCE and its only BUILD. `keys`: the places of the memo that hold it."""

    def __init__(self, build: Callable):
        self.build, self.keys = build, []


def loads(data: bytes):
    """The value of a pickle of protocol 3 to 5.

    Raises:
      UserError: it is damaged, of another protocol, too long, or holds anything but data.
    """
    try:
        return _loads(data)
    except UserError:
        raise
    except (ValueError, TypeError, KeyError, IndexError, OverflowError, UnicodeError) as error:
        raise UserError(f"pickle: the request does not decode ({str(error)[:80]}), expected a whole pickle") from error


def _loads(data: bytes):
    stack, marks, memo, copied = [], [], {}, 0

    def taken(start: int) -> list:
        """Takes the values from this place of the stack on, none of them from before the last mark."""
        if start < (marks[-1] if marks else 0):
            raise ValueError("a value is missing")
        values = stack[start:]
        del stack[start:]
        return values

    for number, (opcode, argument, _) in enumerate(pickletools.genops(data)):
        name = opcode.name
        if number >= MAX_OPCODES:
            raise UserError(f"pickle: more than {MAX_OPCODES:,} opcodes, expected a batch of pictures with their prompts")
        if name in _VALUES:
            stack.append(bytes(argument) if name == "BYTEARRAY8" else argument)
        elif name in _CONSTANTS:
            constant = _CONSTANTS[name]
            stack.append(constant() if isinstance(constant, type) else constant)
        elif name in ("PROTO", "FRAME"):
            if name == "PROTO" and not 3 <= argument <= 5:
                raise UserError(f"pickle: got protocol {argument}, expected 3 to 5")
        elif name == "MARK":
            marks.append(len(stack))
        elif name in _TUPLES:
            stack.append(tuple(taken(len(stack) - _TUPLES[name])))
        elif name == "TUPLE":
            stack.append(tuple(taken(marks.pop())))
        elif name in ("APPEND", "APPENDS"):
            values = taken(len(stack) - 1 if name == "APPEND" else marks.pop())
            _of(list, stack[-1]).extend(values)
        elif name in ("SETITEM", "SETITEMS"):
            values = taken(len(stack) - 2 if name == "SETITEM" else marks.pop())
            for key, value in zip(values[::2], values[1::2], strict=True):
                _of(dict, stack[-1])[_key(key)] = value
        elif name in ("MEMOIZE", "BINPUT", "LONG_BINPUT"):
            key = len(memo) if name == "MEMOIZE" else argument
            memo[key] = stack[-1]
            if isinstance(stack[-1], _Unbuilt):
                stack[-1].keys.append(key)
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name == "STACK_GLOBAL":
            stack.append(_global(*taken(len(stack) - 2)))
        elif name == "GLOBAL":
            stack.append(_global(*argument.split(" ", 1)))
        elif name == "REDUCE":
            function, arguments = taken(len(stack) - 2)
            if not callable(function):
                raise ValueError("a call of what is no function")
            if function is _scalar:  # a copy of bytes, which may be in the pickle once and here many times
                copied += len(arguments[-1])
                if copied > len(data):
                    raise ValueError("the same bytes for too many values")
            stack.append(function(*_of(tuple, arguments)))
        elif name == "BUILD":
            unbuilt, state = taken(len(stack) - 2)
            value = _of(_Unbuilt, unbuilt).build(*_of(tuple, state))
            stack.append(value)
            memo.update(dict.fromkeys(unbuilt.keys, value))
            unbuilt.keys, unbuilt.build = [], _built_before
        elif name == "STOP":
            (value,) = stack
            if isinstance(value, _Unbuilt) or callable(value):
                raise ValueError("a part of an array alone")
            return value
        else:
            raise UserError(f"pickle: got the opcode {name}, expected data: dictionaries, lists, texts, bytes, numbers")
    raise ValueError("no end")


def _of(kind, value):
    if not isinstance(value, kind):
        raise ValueError(f"got a {type(value).__name__}")
    return value


def _key(key):
    if isinstance(key, int) and key not in _KEYS:
        raise ValueError("a long integer as a key")
    return _of(str | bytes | int | None, key)


def _built_before(*_):
    raise ValueError("a second BUILD of one object")


def _global(module: str, name: str):
    """What stands for a name of NumPy. Raises UserError for any other name."""
    found = _NUMPY.get((_of(str, module).replace("numpy.core", "numpy._core"), _of(str, name)))
    if found is None:
        raise UserError(f"pickle: got {module[:40]}.{name[:40]}, expected data alone: no functions, no classes")
    return found


def _ndarray():
    """Stands for the class numpy.ndarray, which is only ever an argument."""
    raise ValueError("a call of numpy.ndarray")


def _dtype(code, *_) -> _Unbuilt:
    if not _DTYPE.fullmatch(_of(str, code)):
        raise UserError(f"pickle: got an array of {code[:40]!r}, expected booleans, numbers, bytes or texts")

    def build(version, order, fields, names, *_):
        if fields is not None or names is not None:
            raise UserError("pickle: got an array of records, expected booleans, numbers, bytes or texts")
        return np.dtype(code).newbyteorder({"<": "<", ">": ">"}.get(order, "="))

    return _Unbuilt(build)


def _reconstruct(*_) -> _Unbuilt:
    return _Unbuilt(lambda version, shape, dtype, fortran, data: _array(data, dtype, shape, "F" if fortran else "C"))


def _array(data, dtype, shape, order="C") -> np.ndarray:
    return np.frombuffer(_of(bytes, data), _of(np.dtype, dtype)).reshape(shape, order="F" if order == "F" else "C")


def _scalar(dtype, data):
    (value,) = np.frombuffer(_of(bytes, data), _of(np.dtype, dtype))
    return value.item()


_NUMPY = {
    ("numpy", "ndarray"): _ndarray,
    ("numpy", "dtype"): _dtype,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "scalar"): _scalar,
    ("numpy._core.numeric", "_frombuffer"): _array,
}
