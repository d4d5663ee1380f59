"""The one kind of error that a user can mend."""

import contextlib
import importlib
import itertools
import textwrap
import traceback
from collections.abc import Iterator

_IMPORTLIB = importlib.__file__.removesuffix("__init__.py")


class UserError(ValueError):
    """Wrong input, a wrong setting or a missing file. The message says what was got, what is expected, and how to mend it.

    A command prints it as one line and exits with 2 (command.py). Any other exception is a fault of the code and keeps its
    traceback.
    """


@contextlib.contextmanager
def in_code_of_the_user(name: str) -> Iterator[None]:
    """Makes an error of code that a user gave a UserError with that code's traceback.

    An attempt to end the program is an error too, so that its exit code is never taken for ours.

    Args:
      name: of the code, for the message.
    """
    try:
        yield
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)[2:]  # without those of this function and of its caller
        theirs = list(itertools.dropwhile(lambda frame: frame.filename.startswith(("<frozen", _IMPORTLIB)), frames))
        said = "".join([*traceback.format_list(theirs), *traceback.format_exception_only(error)]).rstrip()
        raise UserError(f"{name}: this code is yours, and it raised\n{textwrap.indent(said, '  ')}") from error
