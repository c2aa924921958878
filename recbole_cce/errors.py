"""The one class that says whose mistake an error is."""

from __future__ import annotations

import textwrap


class UserError(ValueError):
    """A mistake in what the user gave: an option, a file, data. One line that names it, its value and valid ones.

    The command line prints it and ends with status 2; any other exception is a fault of ours and keeps its traceback.
    """


def reason(error: BaseException) -> str:
    """An error in one line that fits on a few of a screen; some of RecBole's hold a whole table."""
    return textwrap.shorten(f"{type(error).__name__}: {error}", 400, placeholder=" ...")
