"""Files that appear whole, and what stays of writers that were killed."""

from __future__ import annotations

import multiprocessing
import time
from pathlib import Path

import pytest

from recbole_cce.files import write_whole


def write_for_long(file, at_work):
    def write(stream):
        stream.write(b"half")
        at_work.release()
        time.sleep(60)

    write_whole(file, write)


@pytest.mark.parametrize("name", ["file.bin", "a[1]*?.bin"])
def test_parts_of_killed_writers_are_removed_and_no_others(tmp_path, name):
    file = tmp_path / name
    context = multiprocessing.get_context("fork")
    at_work = context.Semaphore(0)
    writers = [context.Process(target=write_for_long, args=(file, at_work)) for _ in range(2)]
    for writer in writers:
        writer.start()
        assert at_work.acquire(timeout=30)
    for writer in [None, *writers]:
        if writer:
            writer.kill()
            writer.join()
        write_whole(file, lambda stream: stream.write(b"whole"))
        assert len(parts(tmp_path)) == sum(writer.is_alive() for writer in writers)
    assert file.read_bytes() == b"whole"


def parts(folder: Path) -> list[Path]:
    """What lies beside finished files."""
    return [file for file in folder.iterdir() if file.name.startswith(".")]


def test_an_error_leaves_the_file_as_it_was(tmp_path):
    file = tmp_path / "file"
    write_whole(file, lambda stream: stream.write(b"before"))
    with pytest.raises(ZeroDivisionError):
        write_whole(file, lambda stream: stream.write(b"half") / 0)
    assert file.read_bytes() == b"before"
    assert parts(tmp_path) == []
