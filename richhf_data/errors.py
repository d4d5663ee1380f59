"""The one kind of error that a user can mend."""


class UserError(ValueError):
    """Wrong input, a wrong setting or a missing file: its message says what was got, what is expected, and how to mend it.

    A command prints it as one line and exits with 2 (command.py). Every other exception is a fault of the code and keeps
    its traceback.
    """
