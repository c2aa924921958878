"""Ctrl-C and SIGTERM: a program ends where its `finally` clauses run, and training where nothing it did is lost."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
Handler = Callable[[int, FrameType | None], None]


def end(number: int, said: str | None) -> None:
    """End the program: KeyboardInterrupt, with what was said about it, or exit status 143 for SIGTERM."""
    if number == signal.SIGINT:
        raise KeyboardInterrupt(*([said] if said else []))
    sys.exit(128 + number)


def end_at_once(number: int, frame: FrameType | None) -> None:
    """The answer of a program that has nothing to save."""
    end(number, None)


@contextlib.contextmanager
def answered(handler: Handler = end_at_once) -> Iterator[None]:
    """Let `handler` answer both signals, where the program that calls this package does not, in the with-block."""
    if threading.current_thread() is not threading.main_thread():  # Python calls handlers there alone
        yield
        return
    answers = {number: signal.getsignal(number) for number in SIGNALS}
    ours = (signal.SIG_DFL, signal.default_int_handler, end_at_once)
    answers = {number: answer for number, answer in answers.items() if answer in ours}
    for number in answers:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, answer in answers.items():
            signal.signal(number, answer)
