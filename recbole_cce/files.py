"""Files written whole or not at all: beside their place first, then renamed to it."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def write_whole(file: Path, write: Callable[[BinaryIO], object]) -> None:
    """Let `write` fill a file that takes the place of `file` when it is complete.

    A kill, an error or a full disk leaves `file` as it was; of processes that write at once, one wins.
    """
    part = file.with_name(f".{file.name}.{uuid.uuid4().int}")
    try:
        with open(part, "wb") as stream:
            write(stream)
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)


def remove_parts(file: Path) -> None:
    """Remove what writers of `file` left behind that were killed."""
    for part in file.parent.glob(f".{file.name}.*[0-9]"):
        part.unlink(missing_ok=True)
