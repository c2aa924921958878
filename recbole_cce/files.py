"""Files written whole or not at all: beside their place first, then renamed to it; folders that one process holds."""

from __future__ import annotations

import contextlib
import os
import socket
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # Windows, where locked() does nothing
    fcntl = None


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
    """Remove what writers of `file` left behind that were killed; its name `*` stands for all files of a folder."""
    for part in file.parent.glob(f".{file.name}.*[0-9]"):
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder until the end of the with-block, or of this process, however it ends.

    Raises:
        BlockingIOError: another process holds it; says which one.
    """
    if fcntl is None:
        yield
        return
    file = folder / ".lock"
    while True:
        lock = os.open(file, os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(lock, 1000).decode(errors="replace")
            os.close(lock)
            raise BlockingIOError(holder or "another process") from None
        except OSError:  # a file system without locks
            break
        if _is_at(lock, file):
            break
        os.close(lock)  # whoever held it removed it after it was opened here
    os.truncate(lock, 0)
    os.write(lock, f"process {os.getpid()} on {socket.gethostname()}".encode())
    try:
        yield
    finally:
        file.unlink(missing_ok=True)
        os.close(lock)


def _is_at(lock: int, file: Path) -> bool:
    """Whether an open file still stands where it was opened."""
    try:
        return os.path.samestat(os.fstat(lock), file.stat())
    except FileNotFoundError:
        return False
