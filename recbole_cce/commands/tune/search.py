"""The search: trials in processes, side by side, until the budget is spent, and the test of the best."""

from __future__ import annotations

import json
import math
import multiprocessing
import shutil
import sys
import time
from dataclasses import asdict, dataclass, replace
from multiprocessing import connection
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recbole_cce.commands.compare.report import best
from recbole_cce.commands.compare.runs import close, interrupts_held, last_words
from recbole_cce.commands.compare.trial import Trial
from recbole_cce.commands.tune import durations
from recbole_cce.commands.tune import trial as processes
from recbole_cce.commands.tune.space import Value
from recbole_cce.commands.tune.trial import TABLE_SECONDS, Place
from recbole_cce.errors import UserError
from recbole_cce.files import remove_parts

if TYPE_CHECKING:
    from recbole_cce.commands.tune.study import Study

Result = dict[str, Any]

FAILURES = 5  # when as many trials have ended and all failed, more will
START = multiprocessing.get_context("spawn")  # CUDA does not survive a fork


@dataclass(frozen=True)
class Worker:
    """A process for one job; to import torch takes seconds, so one is there before its job is."""

    process: BaseProcess
    channel: Connection

    def end(self) -> None:
        """Kill it, if it is there."""
        self.process.kill()
        self.process.join()
        self.channel.close()


@dataclass
class Running:
    """A trial under way; `begun`: after how many seconds of the search."""

    number: int
    trial: Trial
    worker: Worker
    begun: float
    late: bool = False  # killed, as its epoch did not end in time


class Search:
    """Runs the trials that a study proposes.

    Args:
        study: of Optuna.
        base: a trial without settings of its own and without a folder of its own.
        output: folder of the study.
        parallel: trials at a time, spread over `gpus`.
        begun: when the command began, by time.time().
        budget: seconds of the study in all; those that earlier commands spent are a part of it.

    Attributes:
        results: of the trials that have ended, by number.
    """

    def __init__(
        self, study: Study, base: Trial, output: Path, parallel: int, gpus: list[str], begun: float, budget: float
    ) -> None:
        self.study, self.base, self.output = study, base, output
        self.parallel, self.gpus = parallel, gpus
        self.share = math.ceil(parallel / len(gpus))
        self.begun, self.spent = begun, study.seconds
        self.end = begun + max(0.0, budget - self.spent)
        self.reserve = 0.0  # seconds that the test and the tables take, as the trials said
        self.running: dict[int, Running] = {}  # by the sentinel of its process
        self.spare: Worker | None = None
        self.results: dict[int, Result] = {}
        for number in study.values():
            one = self.trial(number)
            if one.damage() is None and one.result()["state"] not in ("not started", "unfinished"):
                self.results[number] = one.result()

    @property
    def seconds(self) -> float:
        """Spent on the study so far."""
        return self.spent + time.time() - self.begun

    @property
    def best(self) -> int | None:
        """The trial with the best value, the first of equal ones; None where none has any."""
        values = {number: value(result) for number, result in sorted(self.results.items())}
        known = {number: one for number, one in values.items() if one is not None}
        sign = 1 if self.study.bigger else -1
        return max(known, key=lambda number: sign * known[number], default=None)

    def run(self) -> None:
        """Until the budget is spent, or every setting has been tried.

        Raises:
            UserError: the first trials have all failed; says why.
        """
        more = True
        while True:
            while more and len(self.running) < self.parallel and self.has_time():
                proposal = self.study.ask()
                more = proposal is not None
                if proposal is not None:
                    self.start(proposal.number, proposal.settings)
            if not self.running:
                break
            self.wait()
        if more and self.results:
            self.study.spend(max(self.study.seconds, self.spent + self.end - self.begun))  # nothing is left

    def close(self) -> None:
        """End all processes; where trials are under way, their seconds are spent all the same."""
        if self.running:
            self.study.spend(self.seconds)
        for one in self.running.values():
            one.worker.end()
            remove_parts(Path(one.trial.folder) / "*")
        if self.spare is not None:
            self.spare.end()

    def has_time(self) -> bool:
        """Whether another trial could train for a while."""
        return time.time() + max(3 * self.reserve, TABLE_SECONDS) < self.end

    def trial(self, number: int, settings: dict[str, Value] | None = None) -> Trial:
        """A trial of the study."""
        folder = str(self.output / "trials" / f"{number:04}")
        own = {**self.base.settings, **(settings or {}), "checkpoint_dir": folder}
        return replace(self.base, name=str(number), settings=own, folder=folder)

    def start(self, number: int, settings: dict[str, Value]) -> None:
        """Begin a trial, on the GPU that has the fewest; anew where it was stopped or interrupted."""
        one = self.trial(number, settings)
        taken = [other.trial.settings["gpu_id"] for other in self.running.values()]
        one = replace(one, settings={**one.settings, "gpu_id": min(self.gpus, key=taken.count)})
        self.results.pop(number, None)
        shutil.rmtree(one.folder, ignore_errors=True)
        Path(one.folder).mkdir(parents=True)
        one.save(asdict(one) | {"state": "unfinished", "parallel": self.share, "curve": []})
        worker, self.spare = self.spare or new_worker(), None
        self.running[worker.process.sentinel] = Running(number, one, worker, self.seconds)
        worker.channel.send((processes.run, one, Place(self.end, self.parallel, self.share)))
        self.spare = new_worker()

    def wait(self) -> None:
        """Answer what trials ask, and note those that have ended; end those that are too late."""
        channels = {one.worker.channel: one for one in self.running.values() if not one.worker.channel.closed}
        latest = self.end - max(self.reserve, TABLE_SECONDS) / 2
        ready = connection.wait([*channels, *self.running], max(0.0, latest - time.time()))
        for channel in channels.keys() & set(ready):
            self.answer(channels[channel])
        if not ready:  # an epoch takes longer than those before it
            for one in self.running.values():
                one.late = True
                one.worker.end()
        for sentinel in [key for key, one in self.running.items() if one.worker.process.exitcode is not None]:
            self.note(self.running.pop(sentinel))

    def answer(self, one: Running) -> None:
        """Whether a trial that has validated an epoch is behind the others."""
        try:
            validations, value, reserve = one.worker.channel.recv()
            self.reserve = max(self.reserve, reserve)
            one.worker.channel.send(self.study.is_behind(one.number, validations, value))
        except (EOFError, OSError):  # its process has ended
            one.worker.channel.close()

    def note(self, one: Running) -> None:
        """Keep the result of a trial and say it; of checkpoints keep the best trial's alone."""
        one.worker.end()
        result = close(one.trial, one.worker.process)
        if one.late:
            result |= {"state": "late", "reason": "an epoch did not end within the budget"}
        result |= {"begun": one.begun, "ended": self.seconds}
        if "fit_begun" in result:  # from time.time() to seconds of the search
            result["fit_at"] = result["fit_begun"] - self.begun + self.spent
        one.trial.save(result)
        self.results[one.number] = result
        if result["state"] not in ("stopped", "late"):  # these are run again where the budget is raised
            self.study.tell(one.number, value(result), result["state"] == "finished")
        self.study.spend(self.seconds)
        self.remove_checkpoints()
        print(self.line(one.number), file=sys.stderr, flush=True)
        failed = [each["reason"] for each in self.results.values() if each["state"] in ("failed", "out of memory")]
        if self.best is None and len(failed) >= FAILURES:
            raise UserError(f"the first {len(failed)} trials failed, the last: {failed[-1]}")

    def remove_checkpoints(self) -> None:
        """Of all trials that have ended but the best."""
        for number in self.results:
            if number != self.best:
                for file in Path(self.trial(number).folder).glob("*.pth*"):
                    file.unlink()

    def line(self, number: int) -> str:
        """How a trial went, and how the search stands."""
        result, values = self.results[number], self.study.values()[number]
        found = value(result)
        text = f"trial {number}: {result['state'] if found is None else f'{found:.4f}, ' + result['state']}"
        if result["curve"]:
            text += f" after {result['curve'][-1]['epoch'] + 1} epochs"
        text += f", {result['ended'] - result['begun']:.0f} s"
        text += f" ({result['reason']})" if "reason" in result else ""
        text += f"; {'defaults: ' if number == 0 else ''}{described(values)}"
        if self.best is not None:
            text += f"; best: {value(self.results[self.best]):.4f}, trial {self.best}"
        return f"{text}; {durations.words(self.end - time.time())} left"

    def test(self, number: int) -> Result:
        """The test of the best trial, or why there is none; once for each trial that is the best at an end."""
        file, one, point = self.output / "test.json", self.trial(number), best(self.results[number])
        assert point is not None
        of = {"trial": number, "epoch": point["epoch"], "value": point["score"]}
        if file.exists():
            found = json.loads(file.read_text())
            if "test" in found and {key: found.get(key) for key in of} == of:
                return found
        worker, self.spare = self.spare or new_worker(), None
        worker.channel.send((processes.test, one, str(file), of))
        try:
            worker.process.join()
        finally:
            worker.end()
        if worker.process.exitcode == 0:
            return json.loads(file.read_text())
        return of | {"reason": last_words(Path(one.folder) / "test.txt", worker.process)}


def new_worker() -> Worker:
    """A process that waits for a job."""
    ours, theirs = START.Pipe()
    process = START.Process(target=processes.serve, args=(theirs,))
    worker = Worker(process, ours)
    try:
        with interrupts_held():
            process.start()
    except KeyboardInterrupt:
        worker.end()
        raise
    theirs.close()
    return worker


def value(result: Result) -> float | None:
    """The best validation of a trial; None where it failed: a run that fails is of no use."""
    point = best(result)
    return point["score"] if point and result["state"] in ("finished", "pruned", "stopped") else None


def described(values: dict[str, Value]) -> str:
    """'learning_rate 0.001, n_layers 2'."""
    return ", ".join(f"{key} {one}" for key, one in values.items())
