"""Files written whole or not at all: under another name first, then renamed; folders that one process holds."""

from __future__ import annotations

import contextlib
import glob
import os
import socket
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, BinaryIO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]  # a module that may be missing has no type


def write_whole(file: Path, write: Callable[[BinaryIO], object]) -> None:
    """Let `write` fill a file that replaces `file` when it is complete.

    A kill, an error or a full disk leaves `file` as it was; of processes that write at once, one wins. What a kill
    leaves beside it the next writer removes.
    """
    remove_parts(file)
    part, stream, locked = _new_part(file)
    try:
        with stream:
            write(stream)
            stream.flush()
            if locked:  # until it is renamed it could be taken for one that a kill has left
                part.replace(file)
        if not locked:  # Windows renames no open file
            part.replace(file)
    finally:
        part.unlink(missing_ok=True)


def write_bytes(file: Path, content: bytes) -> None:
    """write_whole() of what is there already."""
    write_whole(file, lambda stream: stream.write(content))


def remove_parts(file: Path) -> None:
    """Remove what writers of `file` left behind that were killed; its name `*` stands for all files of the folder.

    Those at work hold a lock; without locks, none is removed.
    """
    name = "*" if file.name == "*" else glob.escape(file.name)
    for part in file.parent.glob(f".{name}.{'[0-9]' * 30}*"):
        with contextlib.suppress(OSError), open(part, "rb+") as stream:
            if lock(stream, wait=False):
                part.unlink()


def lock(stream: IO | int, wait: bool = True) -> bool:
    """Lock a file until it is closed or the process ends; False where another process has it, or there are no locks."""
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except (AttributeError, OSError):
        return False
    return True


def _new_part(file: Path) -> tuple[Path, BinaryIO, bool]:
    """An empty part, its stream and whether that is locked."""
    while True:
        part = file.with_name(f".{file.name}.{uuid.uuid4().int:039}")
        stream = open(part, "xb")  # noqa: SIM115  the caller closes it
        locked = lock(stream)
        if os.fstat(stream.fileno()).st_nlink:  # nobody removed it before it was locked
            return part, stream, locked
        stream.close()


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
        held = os.open(file, os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(held, 1000).decode(errors="replace")
            os.close(held)
            raise BlockingIOError(holder or "another process") from None
        except OSError:  # a file system without locks
            break
        if _is_at(held, file):
            break
        os.close(held)  # whoever held it removed it after it was opened here
    os.truncate(held, 0)
    os.write(held, f"process {os.getpid()} on {socket.gethostname()}".encode())
    try:
        yield
    finally:
        file.unlink(missing_ok=True)
        os.close(held)


def _is_at(held: int, file: Path) -> bool:
    """Whether an open file still stands where it was opened."""
    try:
        return os.path.samestat(os.fstat(held), file.stat())
    except FileNotFoundError:
        return False
