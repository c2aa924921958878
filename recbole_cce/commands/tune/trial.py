"""The processes of a search: one trains and validates a trial and never sees the test split, one tests the best."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from recbole.utils import get_trainer

from recbole_cce.commands.compare.report import best
from recbole_cce.commands.compare.trial import TimeIsUp, Trial, Watch, failure_kept, own_process
from recbole_cce.errors import reason
from recbole_cce.files import write_whole
from recbole_cce.plugin import entry_points

TABLE_SECONDS = 5  # for table, figures and page


@dataclass(frozen=True)
class Place:
    """Where and until when a trial runs."""

    end: float  # of the budget, by time.time()
    parallel: int  # trials at a time, which share the CPU
    share: int  # those of them that share its GPU


class Trained(Exception):
    """Raised after training to end RecBole's run before it tests."""


class Progress(Watch):
    """A watched trainer that asks after each validation whether it should go on, and leaves time for the test."""

    def __init__(self, trial: Trial, place: Place, is_behind: Callable[[int, float, float], bool]) -> None:
        super().__init__(trial, place.end, place.share)
        self.place, self.is_behind = place, is_behind
        self.validation_seconds = 0.0

    def fit(self, *args: Any, **kwargs: Any) -> Any:
        """The watched fit, and no test."""
        super().fit(*args, **kwargs)
        raise Trained

    def valid_epoch(self, *args: Any, **kwargs: Any) -> Any:
        """A validation, which takes about as long as the test."""
        begun = time.time()
        result = super().valid_epoch(*args, **kwargs)
        self.validation_seconds = max(self.validation_seconds, time.time() - begun)
        return result

    @property
    def reserve(self) -> float:
        """Seconds before the end of the budget that a process like this one needs to test, and the tables."""
        return self.fit_begun - self.begun + 2 * self.validation_seconds + TABLE_SECONDS

    def time_is_up(self) -> str | None:
        """Whether another epoch would end too late for the test."""
        self.stop_at = self.place.end - self.reserve
        return super().time_is_up()

    def after_epoch(self, epoch: int, score: float) -> None:
        """RecBole's callback after each validation."""
        self.result["fit_begun"] = self.fit_begun
        super().after_epoch(epoch, score)
        curve = self.result["curve"]
        point = best(self.result)
        assert point is not None, "the first validation has no number"
        if self.is_behind(len(curve), point["score"], self.reserve):
            raise TimeIsUp("pruned")


def train(progress: Progress) -> None:
    """RecBole's run_recbole with a watched trainer, as far as the test; keeps the result and its best checkpoint."""
    trial = progress.trial
    try:
        with entry_points.trainers_shown_to(progress.trainer):
            entry_points.run(trial.model, trial.dataset, list(trial.files), config_dict=dict(trial.settings))
    except Trained:
        trial.save(progress.result | {"state": progress.state})
    except torch.OutOfMemoryError as error:
        print(error)
        trial.save(progress.result | {"state": "out of memory", "reason": reason(error)})


def serve(channel: Connection) -> None:
    """A process that is ready to do one job, which the channel brings: a function, and what it takes after that."""
    try:
        job, *arguments = channel.recv()
    except EOFError:  # nothing is left to do
        return
    job(channel, *arguments)


def run(channel: Connection, trial: Trial, place: Place) -> None:
    """The job of one trial; after each validation it sends what is_behind() takes, and receives its answer."""

    def is_behind(*reported: float) -> bool:
        channel.send(reported)
        return channel.recv()

    own_process(trial, place.parallel)
    with failure_kept(trial):
        train(Progress(trial, place, is_behind))


def test(channel: Connection, trial: Trial, file: str, of: dict[str, Any]) -> None:
    """The job of testing the best checkpoint of a trial; writes what it found, and `of` what, to `file`."""
    own_process(trial, 1, log="test.txt")
    found = json.dumps(of | tested(trial), indent=1)
    write_whole(Path(file), lambda stream: stream.write(found.encode()))


def tested(trial: Trial) -> dict[str, Any]:
    """The metrics of the test, which is read once."""
    (checkpoint,) = Path(trial.folder).glob("*.pth")
    config, model, _, train, _, data = entry_points.load_data_and_model(str(checkpoint))
    trainer = get_trainer(config["MODEL_TYPE"], config["model"])(config, model)
    trainer.eval_collector.data_collect(train)
    begun = time.time()
    metrics = trainer.evaluate(data, load_best_model=False, show_progress=False)
    return {"test": {name: float(value) for name, value in metrics.items()}, "test_seconds": time.time() - begun}
