"""The one kind of error that a user can mend."""


class UserError(ValueError):
    """Wrong input, a wrong setting or a missing file. The message says what was got, what is expected, and how to mend it.

    A command prints it as one line and exits with 2 (command.py). Any other exception is a fault of the code and keeps its
    traceback.
    """
