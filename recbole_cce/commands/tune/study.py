"""What Optuna does: proposing settings, ending trials that are behind, a journal of both; imported where it is used.

A trial's value is its best validation so far, so that trials are compared by as many looks at a curve, and noise ends
none that was better before.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from recbole_cce.commands.tune.space import Parameter, Value

SURVIVORS = 2  # of so many trials that reach a rung one goes on
COMPARED = 4  # where fewer have come to a rung none ends: what differs may be noise
RANDOM = 10  # trials before proposals are made from what others had
TRIES = 50  # proposals in a row that were tried before: nothing is left


@dataclass(frozen=True)
class Proposal:
    """Settings to try: of the first trial none, it has the defaults."""

    number: int
    settings: dict[str, Value]


class Unlocked:
    """In the place of the journal's lock, which a kill would leave behind: its folder is held anyway."""

    def acquire(self) -> bool:
        """Nothing to wait for."""
        return True

    def release(self) -> None:
        """Nothing to give back."""


class Study:
    """The trials of a search, in a journal that outlives this process.

    Args:
        file: the journal; it goes on with what is there.
        space: what is searched.
        default: values of a default run, the first trial.
        seed: of the proposals.
        bigger: whether a larger value is better.
        first_rung: validations after which a trial is compared with others, then after twice as many, and so on.
    """

    def __init__(
        self,
        file: Path,
        space: list[Parameter],
        default: dict[str, Value],
        seed: int,
        bigger: bool,
        first_rung: int,
    ) -> None:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.space, self.default, self.bigger, self.first_rung = space, default, bigger, first_rung
        cut_partial_line(file)
        with quiet():
            self.study = optuna.create_study(
                storage=JournalStorage(JournalFileBackend(str(file), lock_obj=Unlocked())),
                study_name="tune",
                load_if_exists=True,
                direction="maximize" if bigger else "minimize",
                pruner=optuna.pruners.SuccessiveHalvingPruner(first_rung, SURVIVORS),
            )
            known = self.study.get_trials(deepcopy=False)
            self.study.sampler = optuna.samplers.TPESampler(
                # a study that goes on draws other numbers than at its begin
                seed=(seed + len(known)) % 2**32,
                n_startup_trials=RANDOM,
                multivariate=True,
                group=True,
                constant_liar=True,
            )
            self.interrupted = [trial for trial in known if trial.state == TrialState.RUNNING]
            if not known:
                self.study.enqueue_trial({one.key: default[one.key] for one in self._of_default()})
        self.trials: dict[int, optuna.trial.Trial] = {}  # under way
        self.reported: dict[int, set[int]] = {}

    def _of_default(self) -> list[Parameter]:
        """Those that take the value of a default run."""
        return [
            one
            for one in self.space
            if one.key in self.default and one.applies(self.default) and one.contains(self.default[one.key])
        ]

    def ask(self) -> Proposal | None:
        """The next settings: of a trial that was interrupted, or new ones; None where all have been tried."""
        with quiet():
            if self.interrupted:
                earlier = self.interrupted.pop(0)
                trial = optuna.trial.Trial(self.study, earlier._trial_id)
                return self._begin(trial, self._values(trial), set(earlier.intermediate_values))
            tried = [each.user_attrs.get("values") for each in self.study.get_trials(deepcopy=False)]
            for _ in range(TRIES):
                trial = self.study.ask()
                values = self._values(trial)
                if values not in tried:
                    return self._begin(trial, values, set())
                self.study.tell(trial, state=TrialState.FAIL)
        return None

    def _values(self, trial: optuna.trial.Trial) -> dict[str, Value]:
        if trial.number == 0:
            for one in self._of_default():
                one.suggest(trial)
            return self.default
        values: dict[str, Value] = {}
        for one in self.space:
            if one.applies(values):
                values[one.key] = one.suggest(trial)
        return values

    def _begin(self, trial: optuna.trial.Trial, values: dict[str, Value], reported: set[int]) -> Proposal:
        trial.set_user_attr("values", values)
        self.trials[trial.number], self.reported[trial.number] = trial, reported
        return Proposal(trial.number, {} if trial.number == 0 else values)

    def is_behind(self, number: int, validations: int, value: float) -> bool:
        """Whether a trial that has a best value after so many validations should end. The first one never does.

        Of the trials that reach a rung the better half goes on: each rung costs about as many epochs as any other.
        """
        rung, rest = divmod(validations, self.first_rung)
        if rest or rung & (rung - 1):  # not the first one times a power of two
            return False
        trial, reported = self.trials[number], self.reported[number]
        with quiet():
            if validations not in reported:
                reported.add(validations)
                trial.report(value, validations)
            is_worse = trial.should_prune()
        come = sum(validations in each.intermediate_values for each in self.study.get_trials(deepcopy=False))
        return is_worse and come >= COMPARED and number != 0

    def tell(self, number: int, value: float | None, whole: bool) -> None:
        """The end of a trial: its best value, None where it has none, and whether it was trained to its own end."""
        trial = self.trials.pop(number)
        with quiet():
            if value is None:
                self.study.tell(trial, state=TrialState.FAIL)
            elif whole:
                self.study.tell(trial, value)
            else:
                self.study.tell(trial, state=TrialState.PRUNED)

    def values(self) -> dict[int, dict[str, Value]]:
        """What was tried, by the number of the trial."""
        trials = self.study.get_trials(deepcopy=False)
        return {trial.number: trial.user_attrs["values"] for trial in trials if "values" in trial.user_attrs}

    @property
    def seconds(self) -> float:
        """That were spent on the search so far."""
        return self.study.user_attrs.get("seconds", 0.0)

    def spend(self, seconds: float) -> None:
        """Keep how many these are by now."""
        self.study.set_user_attr("seconds", seconds)

    def importances(self, best: dict[int, float]) -> dict[str, float]:
        """How much of what tells good trials from others each key explains; they sum to 1. Empty for a few trials.

        Args:
            best: value of each trial that has one; those that were ended early count as what they had.
        """
        copy = optuna.create_study(direction=self.study.direction)
        for trial in self.study.get_trials(deepcopy=False):
            if trial.number in best and trial.params:
                copy.add_trial(
                    optuna.trial.create_trial(
                        params=trial.params, distributions=trial.distributions, value=best[trial.number]
                    )
                )
        if len(copy.trials) < RANDOM:
            return {}
        with quiet():
            return optuna.importance.get_param_importances(copy)


def cut_partial_line(file: Path) -> None:
    """Remove what a kill has left of the last line of a journal, or the next line would be a part of it."""
    if file.exists():
        content = file.read_bytes()
        if not content.endswith(b"\n"):
            with open(file, "rb+") as stream:
                stream.truncate(content.rfind(b"\n") + 1)


@contextmanager
def quiet() -> Iterator[None]:
    """Without Optuna's warnings, of what is experimental and of distributions."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="optuna")
        warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
        warnings.filterwarnings("ignore", category=UserWarning)
        yield
