"""Whose mistake an error is: a class says it."""

from __future__ import annotations

import contextlib
import textwrap
import traceback
from collections.abc import Iterator


class UserError(ValueError):
    """A mistake in what the user gave: an option, a file, data. One line that names it, its value and valid ones.

    The command line prints it and ends with status 2; any other exception is a fault of ours and keeps its traceback.
    """


@contextlib.contextmanager
def refusals_of_recbole() -> Iterator[None]:
    """Make UserErrors of the two exceptions by which RecBole's own code refuses what a user gave.

    The same exceptions out of torch, pandas or this package stay what they are.
    """
    try:
        yield
    except (ValueError, NotImplementedError) as error:
        frames = list(traceback.walk_tb(error.__traceback__))
        if not isinstance(error, UserError) and frames[-1][0].f_globals["__name__"].startswith("recbole."):
            raise UserError(str(error)) from error
        raise


def reason(error: BaseException) -> str:
    """An error in one line that fits on a few of a screen; some of RecBole's hold a whole table."""
    return textwrap.shorten(f"{type(error).__name__}: {error}", 400, placeholder=" ...")
