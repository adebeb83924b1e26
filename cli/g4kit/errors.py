"""What goes wrong in a way that the user can understand: one message, no traceback, an exit code."""

FAILED = 1
USAGE = 2


class UserError(Exception):
    """Shown to the user as it stands. It says where, what was got, and what to write or do instead."""

    exit_code = USAGE


class FailedError(UserError):
    """Something that was asked for rightly and did not succeed."""

    exit_code = FAILED
