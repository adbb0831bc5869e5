"""The two kinds of failure a user meets."""


class UserError(Exception):
    """Something the user can mend: the message says what is wrong, where, and what to do.

    The command line prints the message alone (the traceback comes with ``--debug``) and exits with 2.
    """


class DroppedShareError(UserError):
    """More rows of a station were dropped than its configuration allows."""
