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


@dataclass
class Running:
    """A trial under way; `begun`: after how many seconds of the search."""

    number: int
    trial: Trial
    process: BaseProcess
    channel: Connection
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
        try:
            while True:
                while more and len(self.running) < self.parallel and time.time() + 3 * self.reserve < self.end:
                    proposal = self.study.ask()
                    more = proposal is not None
                    if more:
                        self.start(proposal.number, proposal.settings)
                if not self.running:
                    return
                self.wait()
        finally:
            for one in self.running.values():
                end_process(one.process)
                remove_parts(Path(one.trial.folder) / "*")
            self.study.spend(self.seconds)

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
        ours, theirs = START.Pipe()
        place = Place(time.time(), self.end, self.parallel, self.share)
        process = START.Process(target=processes.run, args=(one, place, theirs))
        begun = self.seconds
        with interrupts_held():
            process.start()
            self.running[process.sentinel] = Running(number, one, process, ours, begun)
        theirs.close()

    def wait(self) -> None:
        """Answer what trials ask, and note those that have ended; end those that are too late."""
        channels = {one.channel: one for one in self.running.values() if not one.channel.closed}
        latest = self.end - max(self.reserve, TABLE_SECONDS) / 2
        ready = connection.wait([*channels, *self.running], max(0.0, latest - time.time()))
        for channel in channels.keys() & set(ready):
            self.answer(channels[channel])
        if not ready:  # an epoch takes longer than those before it
            for one in self.running.values():
                one.late = True
                end_process(one.process)
        for sentinel in [sentinel for sentinel, one in self.running.items() if one.process.exitcode is not None]:
            self.note(self.running.pop(sentinel))

    def answer(self, one: Running) -> None:
        """Whether a trial that has validated an epoch is behind the others."""
        try:
            validations, value, reserve = one.channel.recv()
            self.reserve = max(self.reserve, reserve)
            one.channel.send(self.study.is_behind(one.number, validations, value))
        except (EOFError, OSError):  # its process has ended
            one.channel.close()

    def note(self, one: Running) -> None:
        """Keep the result of a trial and say it; of checkpoints keep the best trial's alone."""
        one.process.join()
        one.channel.close()
        result = close(one.trial, one.process.exitcode)
        if one.late:
            result |= {"state": "late", "reason": "an epoch did not end within the budget"}
        result |= {"begun": one.begun, "ended": self.seconds}
        one.trial.save(result)
        self.results[one.number] = result
        if result["state"] not in ("stopped", "late"):  # these are run again where the budget is raised
            self.study.tell(one.number, value(result), result["state"] == "finished")
        self.study.spend(self.seconds)
        self.remove_checkpoints()
        print(self.line(one.number), file=sys.stderr, flush=True)
        if self.best is None and len(self.results) >= FAILURES:
            raise UserError(
                f"the first {len(self.results)} trials failed, the last: {result.get('reason', 'no epoch')}"
            )

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

    def test(self) -> Result:
        """The test of the best trial, or why there is none; once for each trial that is the best at an end."""
        file, number = self.output / "test.json", self.best
        one, point = self.trial(number), best(self.results[number])
        of = {"trial": number, "epoch": point["epoch"], "value": point["score"]}
        if file.exists():
            found = json.loads(file.read_text())
            if "test" in found and {key: found.get(key) for key in of} == of:
                return found
        process = START.Process(target=processes.test, args=(one, str(file), of))
        try:
            with interrupts_held():
                process.start()
            process.join()
        finally:
            end_process(process)
        if process.exitcode == 0:
            return json.loads(file.read_text())
        return of | {"reason": last_words(Path(one.folder) / "test.txt", process.exitcode)}


def value(result: Result) -> float | None:
    """The best validation of a trial; None where it failed: a run that fails is of no use."""
    point = best(result)
    return point["score"] if point and result["state"] in ("finished", "pruned", "stopped") else None


def described(values: dict[str, Value]) -> str:
    """'learning_rate 0.001, n_layers 2'."""
    return ", ".join(f"{key} {one}" for key, one in values.items())


def end_process(process: BaseProcess) -> None:
    """Kill it, if it is there."""
    process.kill()
    process.join()
