"""Checkpoint files: plain values and tensors, written at once or not at all, read without running code.

RecBole's file is that of the best epoch. Where the last epoch is another one, it is saved beside it, as `<file>.last`:
a run that is killed goes on from the newer of the two.
"""

from __future__ import annotations

import math
import os
import pickle
import tempfile
import time
import zipfile
from collections import defaultdict
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from enum import Enum
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import scipy.sparse
import torch

from recbole_cce.errors import UserError
from recbole_cce.files import remove_parts, write_whole

LAST = ".last"  # not *.pth: scripts that look for RecBole's files find what they did


def last_file(file: Path | str) -> Path:
    """Where the last epoch of a run is saved whose best one is saved in `file`."""
    return Path(f"{file}{LAST}")


def best_file(file: Path | str) -> Path:
    """The file of the best epoch, given either file of a run."""
    return Path(str(file).removesuffix(LAST))


def write(state: dict[str, Any], destination: Path) -> None:
    """torch.save of plain(state), whole or not at all.

    Raises:
        OSError: the disk is full, or the like; the destination is as it was.
        TypeError: a value that is not plain and cannot be made so.
    """
    state = plain(state)
    remove_parts(destination.with_name("*"))  # no other run has the name of one that was killed

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


def state_of(trainer: Any, epoch: int) -> dict[str, Any]:
    """What a checkpoint of a trainer holds, before plain(): RecBole's entries."""
    return {
        "config": trainer.config,
        "epoch": epoch,
        "cur_step": trainer.cur_step,
        "best_valid_score": trainer.best_valid_score,
        "state_dict": trainer.model.state_dict(),
        "other_parameter": trainer.model.other_parameter(),
        "optimizer": trainer.optimizer.state_dict(),
    }


def share_file_name(trainer: Any) -> None:
    """Let every process have the first one's file: RecBole names it after the second in which a process got there."""
    names = [trainer.saved_model_file]
    torch.distributed.broadcast_object_list(names)
    trainer.saved_model_file = names[0]


class Writer:
    """Writes checkpoints one after another, in a thread of its own, while training goes on.

    Attributes:
        begun: when the last one was asked for, by time.monotonic().
        seconds: that it took to copy and to write it, as long as none is under way.
    """

    def __init__(self) -> None:
        self.thread = ThreadPoolExecutor(1, "checkpoints")
        self.task: Future[None] | None = None
        self.begun, self.seconds = -math.inf, 0.0

    def write(self, state: dict[str, Any], file: Path, then_remove: Path | None = None) -> None:
        """Copy a state to the memory of the host, and write that to `file` after what is still to be written.

        Raises:
            OSError: an earlier one could not be written.
        """
        self.wait()
        self.begun = time.monotonic()
        copy = copied(state, torch.device("cpu"))
        self.task = self.thread.submit(self._write, copy, file, then_remove)

    def _write(self, state: dict[str, Any], file: Path, then_remove: Path | None) -> None:
        write(state, file)
        if then_remove is not None:
            then_remove.unlink(missing_ok=True)
        self.seconds = time.monotonic() - self.begun

    def is_busy(self) -> bool:
        """Whether one is under way.

        Raises:
            OSError: the last one could not be written.
        """
        if self.task is not None and self.task.done():
            self.wait()
        return self.task is not None

    def wait(self) -> None:
        """Until all are written.

        Raises:
            OSError: one could not be written.
        """
        task, self.task = self.task, None
        if task is not None:
            task.result()


def copied(state: Any, device: torch.device | None) -> Any:
    """A state with copies of its tensors, on a device, or each where it is."""
    if isinstance(state, torch.Tensor):
        return state.detach().to(device or state.device, copy=True)
    if isinstance(state, (list, tuple)):
        return type(state)(copied(item, device) for item in state)
    if isinstance(state, dict):
        return {key: copied(item, device) for key, item in state.items()}
    return state


def plain(state: dict[str, Any]) -> dict[str, Any]:
    """What RecBole keeps of a run, as stock torch.load reads it with weights_only=True and nothing allow-listed.

    Its configuration becomes a dict. Some models keep more than weights: arrays of NumPy and SciPy become tensors,
    which as_before() undoes; layers are left out, since their tensors are among the weights.

    Raises:
        TypeError: there is anything else; names where.
    """
    config = state["config"]
    rest = {key: value for key, value in state.items() if key != "config"}
    return {"config": dict(config) if isinstance(config, dict) else kept(config), **_plain(rest, "")}


def _plain(value: Any, name: str) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach()
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        return torch.from_numpy(np.asarray(value))
    if scipy.sparse.issparse(value):
        table = value.tocoo()
        return {"row": _plain(table.row, name), "column": _plain(table.col, name), "value": _plain(table.data, name)}
    if isinstance(value, Mapping):
        value = {key: item for key, item in value.items() if not isinstance(item, torch.nn.Module)}
    return _of_plain(value, name, _plain)


def _of_plain(value: Any, name: str, plain: Callable[[Any, str], Any]) -> Any:
    """A number, a text or None as it is; a list, a tuple or a dictionary of what `plain` makes of what it holds.

    Raises:
        TypeError: it is anything else; names where.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, (list, tuple)):
        return (list if isinstance(value, list) else tuple)(plain(item, name) for item in value)
    if isinstance(value, Mapping):
        return {plain(key, name): plain(item, f"{name}[{key!r}]") for key, item in value.items()}
    raise TypeError(f"a checkpoint cannot hold a {type(value).__name__}, as in {name}")


# What is asked of one run and says nothing about its model: processes, devices, files it reads or trusts.
OF_ONE_RUN = {
    *("device", "single_spec", "local_rank", "world_size", "nproc", "offset", "ip", "port"),
    *("resume", "trust_checkpoint", "dataset_save_path", "dataloaders_save_path"),
}


def kept(config: Any) -> dict[str, Any]:
    """What a checkpoint keeps of a configuration: plain values, members of enumerations by their names.

    Raises:
        UserError: a value has a type that it cannot keep; names the key.
    """
    return {key: _setting(value, key) for key, value in config.final_config_dict.items() if key not in OF_ONE_RUN}


def _setting(value: Any, key: str) -> Any:
    if isinstance(value, Enum):
        return value.name
    try:
        return _of_plain(value, key, lambda item, _: _setting(item, key))
    except TypeError:
        raise UserError(
            f"{key}: {value!r} is a {type(value).__name__}, which a checkpoint cannot hold; it takes None, booleans, "
            "numbers, strings, and lists, tuples and dictionaries of them"
        ) from None


def as_before(value: Any, like: Any, device: torch.device) -> Any:
    """What plain() made of a model's own state, as the model has it: of the kind of `like`, tensors on the device."""
    if scipy.sparse.issparse(like):
        positions = (value["row"].numpy(), value["column"].numpy())
        return type(like)(scipy.sparse.coo_matrix((value["value"].numpy(), positions), like.shape))
    if isinstance(like, np.ndarray):
        return value.numpy().view(type(like))
    if isinstance(value, torch.Tensor):
        return value.to(device, copy=True)  # not the bytes of the file
    if isinstance(value, (list, tuple)):
        return type(value)(as_before(item, None, device) for item in value)
    if isinstance(value, dict):
        items = {key: as_before(item, None, device) for key, item in value.items()}
        return defaultdict(like.default_factory, items) if isinstance(like, defaultdict) else items
    return value


def load_moments(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Load what an optimizer has learned of its parameters; its settings stay those of this run.

    The moments go from the file to the device of their parameters at once; on the CPU they are copied, or they would
    keep a file on the disk that has been replaced.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    moments = saved["state"]
    if parameters[0].device.type == "cpu":
        moments = copied(moments, None)
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})


def read(file: Path | str, trust: bool = False) -> dict[str, Any]:
    """A checkpoint, its tensors on the CPU and mapped from the file: little memory, whatever its size.

    Args:
        file: its path.
        trust: also unpickle objects, which can run any code that whoever made the file put there. Stock RecBole writes
            them, and so did this package once.

    Raises:
        UserError: it is damaged, needs `trust`, or is no checkpoint of RecBole.
    """
    damaged = f"{file} is truncated or corrupt: delete it, and resume from another checkpoint or train anew"
    if not _is_whole(file):
        raise UserError(damaged)
    try:
        state = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        if not trust:
            raise UserError(
                f"{file} holds pickled objects, as stock RecBole writes them, and unpickling can run any code: if you "
                "trust whoever made it, use --trust-checkpoint, or load_data_and_model(file, trust_checkpoint=True)"
            ) from error
        # runs whatever the file says: only here, and only where the user said to trust whoever made it
        state = torch.load(file, map_location="cpu", mmap=True, weights_only=False)
        state = plain(state) if isinstance(state, dict) and "config" in state else None
    except OSError:
        raise
    except Exception as error:  # the safe unpickler has another error for each thing that may be wrong
        raise UserError(damaged) from error
    config = state.get("config") if isinstance(state, dict) else None
    if not isinstance(config, dict) or not {"model", "dataset"} <= config.keys():
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


def make_safe(file: Path | str) -> dict[str, Any]:
    """Write a file of pickled objects anew, so that torch.load reads it with weights_only=True from then on.

    Unpickles it: see `trust` of read(), whose result it returns.
    """
    state = read(file, trust=True)
    write(state, Path(file))
    return state


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


def check(config: Any) -> None:
    """Raise a UserError where a run could not save what it trains: its configuration, or anything in checkpoint_dir."""
    kept(config)
    folder = config["checkpoint_dir"]
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, TypeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"checkpoint_dir: {folder!r} is not valid ({reason}); it takes a folder that can be written to"
        ) from None
