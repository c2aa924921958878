"""One run of a comparison, in a process of its own: RecBole's run_recbole with its trainer watched from outside.

The models, loaders, trainers and metrics are those of any other run; RecBole's data sets are ordered by exact times, as
ours are. What is recorded: the validation and the seconds after each epoch, peak GPU memory, the test metrics, and the
value of each test user in `users.npz`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import multiprocessing
import os
import platform
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import recbole
import torch

import recbole_cce
from recbole_cce.distributed.processes import end_with_parent
from recbole_cce.errors import UserError, reason
from recbole_cce.files import write_whole
from recbole_cce.plugin import entry_points, extensions, reading, registration, watched

# what result.json holds and what it is, in every state and where the run was tested
KEYS = {"name": str, "seed": int, "state": str, "curve": list, "parallel": int}
KEYS_OF_POINT = {"epoch": int, "best": bool, "score": float, "valid": dict, "train_seconds": float, "seconds": float}
KEYS_OF_TESTED = {"test": dict, "parameters": int, "device": str, "versions": dict, "config": dict}


@dataclass(frozen=True)
class Trial:
    """What one run is, and where it is kept: result.json, users.npz, log.txt and RecBole's checkpoint."""

    name: str  # its row in the table
    model: str
    dataset: str
    seed: int
    files: tuple[str, ...]  # configuration files of the user
    settings: dict[str, Any]  # keys that win over them
    time_limit: float | None  # seconds of training and validation
    folder: str
    modules: tuple[str, ...] = field(default=())  # to import first: they register losses and models

    def result(self) -> dict[str, Any]:
        """The result so far; its `state` says how far that is."""
        file = Path(self.folder) / "result.json"
        return json.loads(file.read_text()) if file.exists() else asdict(self) | {"state": "not started", "curve": []}

    def damage(self) -> str | None:
        """What is wrong with the files of this run, so that it must be repeated; None where nothing is."""
        file = Path(self.folder) / "result.json"
        if not file.exists():
            return None
        try:
            result = json.loads(file.read_bytes())
        except (ValueError, RecursionError) as error:
            return f"{file} is damaged ({error})"
        if not has(result, KEYS) or not all(has(point, KEYS_OF_POINT) for point in result["curve"]):
            return f"{file} is damaged (what a run writes is not in it)"
        if "test" not in result:
            return None
        if not has(result, KEYS_OF_TESTED):
            return f"{file} is damaged (what a tested run writes is not in it)"
        try:
            lengths = {len(values) for values in self.users().values()} if "test_split" in result else set()
        except Exception as error:  # zipfile and NumPy have another one for each byte that may be wrong
            return f"{Path(self.folder) / 'users.npz'} is damaged ({reason(error)})"
        return None if len(lengths) <= 1 else f"{Path(self.folder) / 'users.npz'} is damaged (lengths differ)"

    def save(self, result: dict[str, Any]) -> None:
        """Write the result whole or not at all: a process may be killed at any time."""
        text = json.dumps(result, indent=1)
        write_whole(Path(self.folder) / "result.json", lambda file: file.write(text.encode()))

    def users(self) -> dict[str, np.ndarray]:
        """Ids of the test users under `user`, and the values of each per-user metric."""
        with np.load(Path(self.folder) / "users.npz") as arrays:
            return dict(arrays)


class TimeIsUp(Exception):
    """Raised after an epoch to end RecBole's fit; `state` is the state of the run."""

    def __init__(self, state: str) -> None:
        super().__init__(state)
        self.state = state


def run(trial: Trial, stop_at: float, parallel: int, share: int) -> None:
    """The process of one run.

    Args:
        trial: the run.
        stop_at: time by which training should have ended; the state is then `stopped`.
        parallel: runs at a time, which share the CPU.
        share: those of them that share its GPU.
    """
    own_process(trial, parallel)
    with failure_kept(trial):
        if trial.model not in registration.MODELS:
            reading.order_exactly()
        train_and_test(Watch(trial, stop_at, share))


def own_process(trial: Trial, parallel: int, log: str = "log.txt") -> None:
    """Make this process that of a run, one of `parallel` at a time; what it prints goes to its log."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    if not parent.is_alive():
        sys.exit()  # the command was killed while this process imported torch, and may be there again
    threading.Thread(target=end_with_parent, daemon=True).start()  # which may be there again and start it anew
    stream = os.open(Path(trial.folder) / log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    sys.argv = sys.argv[:1]  # RecBole's Config looks for keys there
    entry_points.share_threads(parallel)
    extensions.load_again(trial.modules)


@contextlib.contextmanager
def failure_kept(trial: Trial) -> Iterator[None]:
    """Let the result say why a run has failed."""
    try:
        yield
    except Exception as error:
        trial.save(trial.result() | {"state": "failed", "reason": reason(error)})
        raise


def train_and_test(watch: Watch) -> None:
    """RecBole's run_recbole with a watched trainer; keeps the result."""
    trial = watch.trial
    try:
        with entry_points.trainers_shown_to(watch.trainer):
            outcome = entry_points.run(trial.model, trial.dataset, list(trial.files), config_dict=dict(trial.settings))
    except torch.OutOfMemoryError as error:
        print(error)
        trial.save(watch.result | {"state": "out of memory"})
        return
    assert outcome is not None  # as of several machines, on all but the first
    watch.save_users()
    trial.save(watch.result | {"state": watch.state, "test": outcome["test_result"]})


class Watch:
    """Wraps the methods of one trainer, and keeps what it sees in `result`."""

    def __init__(self, trial: Trial, stop_at: float, share: int) -> None:
        self.trial, self.stop_at = trial, stop_at
        self.begun = self.fit_begun = time.time()
        self.state = "finished"
        self.testing = False
        self.train_seconds = self.train_peak = 0.0
        self.users: list[torch.Tensor] = []  # of each row of the test split
        self.pairs: list[torch.Tensor] = []  # [2, positives]: user and item
        self.values: dict[str, np.ndarray] = {}  # of each row
        self.result = asdict(trial) | {
            "state": "unfinished",
            "parallel": share,
            "curve": [],
            "versions": versions(),
        }
        trial.save(self.result)

    def trainer(self, trainer: Any) -> None:
        """Watch a trainer."""
        self.watched, self.config = trainer, trainer.config
        self.cuda = self.config["device"].type == "cuda"
        self.result |= {
            "device": torch.cuda.get_device_name() if self.cuda else f"CPU, threads: {torch.get_num_threads()}",
            "parameters": sum(parameter.numel() for parameter in trainer.model.parameters()),
            "config": {key: plain(value) for key, value in sorted(self.config.final_config_dict.items())},
            "valid_metric": self.config["valid_metric"].lower(),
        }
        watched.put_around(
            trainer,
            fit=self.fit,
            train_epoch=self.train_epoch,
            valid_epoch=self.valid_epoch,
            full_sort_batch=self.full_sort_batch,
            neg_sample_batch=self.neg_sample_batch,
            topk_result=self.topk_result,
        )

    def fit(self, fit: Callable, train_data: Any, valid_data: Any = None, **kwargs: Any) -> Any:
        """RecBole's fit, ended where the time is up."""
        if not valid_data:
            raise UserError("eval_args: a comparison needs a validation split, which says what epoch is the best")
        self.fit_begun = time.time()
        self.result |= {"data_seconds": self.fit_begun - self.begun, "train_batches": len(train_data)}
        try:
            outcome = fit(train_data, valid_data, callback_fn=self.after_epoch, **kwargs)
        except TimeIsUp as up:
            self.state = up.state
            outcome = self.watched.best_valid_score, self.watched.best_valid_result
        self.testing = True
        return outcome

    def train_epoch(self, train_epoch: Callable, *args: Any, **kwargs: Any) -> Any:
        """An epoch; the device is waited for, so that its seconds are not counted elsewhere."""
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        begun = time.time()
        loss = train_epoch(*args, **kwargs)
        if self.cuda:
            torch.cuda.synchronize()
            self.train_peak = max(self.train_peak, torch.cuda.max_memory_allocated() / 2**30)
        self.train_seconds += time.time() - begun
        if self.time_is_up():
            self.watched.eval_step = 1  # validate this epoch, so that there is a checkpoint to test
        return loss

    def valid_epoch(self, valid_epoch: Callable, *args: Any, **kwargs: Any) -> Any:
        """A validation, of which RecBole passes on the score alone."""
        score, self.valid = valid_epoch(*args, **kwargs)
        return score, self.valid

    def after_epoch(self, epoch: int, score: float) -> None:
        """RecBole's callback after each validation."""
        peaks = [point["peak_gpu_gib"] or 0 for point in self.result["curve"]]
        self.result["curve"].append(
            {
                "epoch": epoch,
                "best": self.watched.cur_step == 0,  # so far, and its weights were kept
                "score": float(score),
                "valid": {name: float(value) for name, value in self.valid.items()},
                "train_seconds": self.train_seconds,
                "seconds": time.time() - self.fit_begun,
                "train_peak_gpu_gib": self.train_peak if self.cuda else None,
                "peak_gpu_gib": max([torch.cuda.max_memory_allocated() / 2**30, *peaks]) if self.cuda else None,
            }
        )
        self.trial.save(self.result)
        if state := self.time_is_up():
            raise TimeIsUp(state)

    def time_is_up(self) -> str | None:
        """`cut` past the limit of the run, `stopped` where another epoch would end past the time to stop, or None."""
        now, curve = time.time(), self.result["curve"]
        if self.trial.time_limit is not None and now - self.fit_begun > self.trial.time_limit:
            return "cut"
        epoch_seconds = (now - self.fit_begun) / (len(curve) + 1)
        return "stopped" if now + epoch_seconds > self.stop_at else None

    def full_sort_batch(self, evaluate: Callable, batch: tuple) -> Any:
        """Scores of one batch of the split: a row for each user, or for each interaction of sequential models."""
        if self.testing:
            self.keep_rows(batch[0][self.config["USER_ID_FIELD"]], batch)
        return evaluate(batch)

    def neg_sample_batch(self, evaluate: Callable, batch: tuple) -> Any:
        """The same of positives and sampled negatives, whose rows the second part of the batch numbers."""
        if self.testing and batch[1] is not None:  # None with value metrics
            users = torch.empty(int(batch[1].max()) + 1, dtype=torch.int64)
            users[batch[1]] = batch[0][self.config["USER_ID_FIELD"]]
            self.keep_rows(users, batch)
        return evaluate(batch)

    def keep_rows(self, users: torch.Tensor, batch: tuple) -> None:
        """Remember the users of the rows of a batch, and their held-out items."""
        self.users.append(users)
        self.pairs.append(torch.stack([users[batch[2]], batch[3]]))

    def topk_result(self, topk_result: Callable, name: str, value: np.ndarray) -> dict[str, float]:
        """RecBole's average over the rows; `value` [rows, largest k] is what it averages."""
        if self.testing:
            self.values |= {f"{name}@{k}": value[:, k - 1] for k in self.config["topk"]}
        return topk_result(name, value)

    def save_users(self) -> None:
        """Keep the mean of each test user's rows, and a digest of the test split: pairs need the same one."""
        if not self.values:
            return
        users, row = np.unique(torch.cat(self.users).numpy(), return_inverse=True)
        means = {name: np.bincount(row, value) / np.bincount(row) for name, value in self.values.items()}
        arrays: dict[str, Any] = {"user": users, **means}
        write_whole(Path(self.trial.folder) / "users.npz", lambda file: np.savez_compressed(file, **arrays))
        pairs = torch.cat(self.pairs, dim=1).numpy()
        pairs = pairs[:, np.lexsort(pairs)]
        digest = hashlib.sha256(np.ascontiguousarray(pairs).tobytes()).hexdigest()[:16]
        self.result |= {"test_users": len(users), "test_interactions": pairs.shape[1], "test_split": digest}


def has(found: Any, keys: dict[str, type]) -> bool:
    """Whether an object that JSON held has these keys, with values of these types."""
    return isinstance(found, dict) and all(isinstance(found.get(key), kind) for key, kind in keys.items())


def plain(value: Any) -> Any:
    """A value of a Config as JSON has it."""
    return json.loads(json.dumps(value, default=str))


def versions() -> dict[str, str]:
    """Of what computes the numbers."""
    return {
        "recbole-cce": recbole_cce.__version__,
        "recbole": recbole.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }
