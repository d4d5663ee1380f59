"""Runs every command: parses its flags, calls it, and prints a user's error as one line.

Exit codes: 0 = done, 1 = a fault of the code, with its traceback, 2 = an error that the user can mend, with one line on the
error stream. The docstring of a command names further codes.
"""

import errno
import functools
import io
import os
import pathlib
import sys
from collections.abc import Callable
from typing import NoReturn

from absl import app, flags, logging

from richhf_data import paths
from richhf_data.errors import UserError

USER_ERROR = 2
_OURS = tuple(f"{pathlib.Path(__file__).parents[1] / name}{os.sep}" for name in ("rahf", "richhf_data"))


def run(main: Callable[[], object], read_arguments: Callable[[list[str]], list[str]] = list) -> None:
    """Parses the flags, then calls `main`.

    Args:
      read_arguments: called first with the arguments; returns those that remain to be parsed. It may define flags.
    """
    app.run(functools.partial(_main, main), flags_parser=functools.partial(_parse, read_arguments))


def message(error: Exception) -> str | None:
    """The line to print of an error that the user can mend; None for a fault of the code, which needs its traceback.

    The first are a `UserError`, and what the machine refuses: a full disk, no right to write, no such file, no more memory.
    """
    text = _text(error)
    return None if text is None else printable(text)


def _text(error: Exception) -> str | None:
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.errno and not str(error.filename).startswith(_OURS):
        text = f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror)
        return f"{text}; raise the limit, ulimit -a shows it" if error.errno in paths.PROCESS_LIMITS else text
    memory = "can't start new thread", "RESOURCE_EXHAUSTED: Out of memory"
    if isinstance(error, MemoryError) or str(error).startswith(memory):
        reason = str(error).partition("\n")[0] or "an allocation failed"
        return f"memory: ran out, {reason}; free some, raise the limit (ulimit -a shows it), or take smaller batches"
    return _full_disk(error)


def _full_disk(error: BaseException | None) -> str | None:
    """What a library says of a full disk, or what the error that it raised from says."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror)
        if type(error).__name__ == "ResourceExhaustedError":  # TensorFlow's, which names the file
            return str(error).partition("\n")[0]
        error = error.__cause__
    return None


def printable(text: str) -> str:
    r"""The text with escapes for characters that a terminal would obey or cannot show. Further lines begin with two spaces.

    >>> print(printable("uid \x1b[2J\nof\n  a file"))
    uid \x1b[2J\nof
      a file
    """
    lines = text.split("\n  ")
    return "\n  ".join("".join(one if one.isprintable() else repr(one)[1:-1] for one in line) for line in lines)


def wants_help(argv: list[str]) -> bool:
    """Whether --help, --helpshort or another flag for help is given."""
    return any(argument.startswith(("-help", "--help")) for argument in argv[1:])


def fail(text: str) -> NoReturn:
    """Prints an error of the user and ends the command."""
    sys.stdout.flush()
    print(f"error: {printable(text)}", file=sys.stderr, flush=True)
    raise SystemExit(USER_ERROR)


def _parse(read_arguments, argv):
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # not every locale has every character
    try:
        left = read_arguments(argv)
        for name in list(flags.FLAGS):  # so that --help lists the flags of our other modules too
            if str(flags.FLAGS.find_module_defining_flag(name)).startswith(("rahf", "richhf_data")):
                flags.FLAGS.register_key_flag_for_module(argv[0], flags.FLAGS[name])
        arguments = flags.FLAGS(left)
    except SystemExit as error:
        raise SystemExit(0 if wants_help(argv) else error.code) from None
    except flags.Error as error:
        fail(f"{error}; --help lists the flags")
    except (UserError, OSError) as error:
        if (text := message(error)) is None:
            raise
        fail(f"{text}; --help lists the flags")
    if len(arguments) > 1:
        fail(f"unexpected arguments {arguments[1:]}: flags begin with --, and texts and patterns need quotes in a shell")
    return arguments


def _main(main, argv):
    del argv
    logging.set_verbosity(logging.WARNING)  # Orbax, seqio, TFDS and XManager log every step
    logging.get_absl_logger().addFilter(lambda record: not record.exc_info)  # and the tracebacks of errors that they raise
    try:
        main()
    except Exception as error:
        if (text := message(error)) is None:
            raise
        fail(text)
