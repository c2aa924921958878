"""The one class that says whose mistake an error is."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake in what the user gave: an option, a file, data. One line that names it, its value and valid ones.

    The command line prints it and ends with status 2; any other exception is a fault of ours and keeps its traceback.
    """
