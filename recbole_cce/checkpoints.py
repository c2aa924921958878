"""Checkpoint files: written at once or not at all, and read with one error for each thing that can be wrong with them.

RecBole's file is that of the best epoch. Where the last epoch is another one, it is saved beside it, as `<file>.last`:
a run that is killed goes on from the newer of the two.
"""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch

from recbole_cce.errors import UserError
from recbole_cce.files import write_whole

LAST = ".last"  # not *.pth: scripts that look for RecBole's files find what they did


def last_file(file: Path | str) -> Path:
    """Where the last epoch of a run is saved whose best one is saved in `file`."""
    return Path(f"{file}{LAST}")


def best_file(file: Path | str) -> Path:
    """The file of the best epoch, given either file of a run."""
    return Path(str(file).removesuffix(LAST))


def write(state: dict[str, Any], destination: Path) -> None:
    """torch.save, whole or not at all.

    Raises:
        OSError: the disk is full, or the like; the destination is as it was.
    """

    def save(file: BinaryIO) -> None:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())

    try:
        write_whole(destination, save)
    except BaseException as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__context__  # torch hides an error of the file behind one of its own
        if cause is None:
            raise
        kept = "the one saved before is as it was" if destination.exists() else "none was saved before"
        raise OSError(f"{destination}: the checkpoint could not be written ({cause}); {kept}") from error


def read(file: Path | str, trust: bool = False) -> dict[str, Any]:
    """A checkpoint, its tensors on the CPU and mapped from the file: little memory, whatever its size.

    Args:
        file: its path.
        trust: also unpickle objects, which can run any code that whoever made the file put there.

    Raises:
        UserError: it is damaged, needs `trust`, or is no checkpoint of RecBole.
    """
    damaged = f"{file} is truncated or corrupt: delete it, and resume from another checkpoint or train anew"
    if not _is_whole(file):
        raise UserError(damaged)
    try:
        state = torch.load(file, map_location="cpu", mmap=True, weights_only=not trust)
    except RuntimeError as error:
        raise UserError(damaged) from error
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{file} holds pickled objects, as stock RecBole writes them, and unpickling can run any code: if you "
            "trust whoever made it, use --trust-checkpoint, or load_data_and_model(file, trust_checkpoint=True)"
        ) from error
    if not isinstance(state, dict) or "config" not in state:
        raise UserError(f"{file} is not a checkpoint of RecBole: it holds no configuration")
    return state


def _is_whole(file: Path | str) -> bool:
    """Whether all of a file's checksums are right; torch.load does not look at them."""
    try:
        with zipfile.ZipFile(file) as archive:
            return archive.testzip() is None
    except (FileNotFoundError, PermissionError, IsADirectoryError):
        raise
    except Exception:  # zipfile has another error for each byte that may be wrong
        return False


def make_safe(file: Path | str) -> None:
    """Write a file of stock RecBole anew, so that torch.load reads it with weights_only=True from then on.

    Unpickles it: see `trust` of read().
    """
    write(read(file, trust=True), Path(file))


def newest(folder: Path | str, model: str, dataset: str, trust: bool = False) -> Path:
    """The file of a model and a data set that was written last.

    Raises:
        UserError: there is none, or a newer file cannot be read.
    """
    files = [file for suffix in ("", LAST) for file in Path(folder).glob(f"{model}-*.pth{suffix}")]
    for file in sorted(files, key=lambda file: file.stat().st_mtime_ns, reverse=True):
        config = read(file, trust)["config"]
        if (config["model"], config["dataset"]) == (model, dataset):
            return file
    raise UserError(f"--resume: there is no checkpoint of {model} on {dataset} in {str(folder)!r}")
