"""What is searched: keys with the values that each may take, from a file of the user's; nothing in it is evaluated."""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recbole_cce.commands.compare.runs import ASIDE, SAME
from recbole_cce.errors import UserError
from recbole_cce.plugin import config_checks
from recbole_cce.plugin.config_sources import literal, read_yaml

if TYPE_CHECKING:
    from optuna.trial import Trial

Value = bool | int | float | str | None
# every trial has to be validated in the same way, on the same interactions
FIXED = (*SAME, *sorted(ASIDE), "seed", "model", "dataset", "data_path", "load_col", "eval_step")
KINDS = {
    "choice": "key choice [value, value, ...]",
    "uniform": "key uniform low,high",
    "loguniform": "key loguniform low,high (natural logarithms)",
    "quniform": "key quniform low,high,step",
}


@dataclass(frozen=True)
class Parameter:
    """One key that is searched: `choices`, or all from `low` to `high`, whole numbers where these are."""

    key: str
    choices: tuple[Value, ...] = ()
    low: float = 0
    high: float = 0
    step: float | None = None
    log: bool = False
    only: tuple[str, Value] | None = None  # another key, and its value without which this one means nothing

    @property
    def whole(self) -> bool:
        """Whether it takes integers."""
        return not self.choices and isinstance(self.low, int) and isinstance(self.high, int)

    def applies(self, values: dict[str, Value]) -> bool:
        """Whether it means something beside the values of the parameters before it."""
        return self.only is None or values.get(self.only[0]) == self.only[1]

    def suggest(self, trial: Trial) -> Value:
        """The value that Optuna proposes; four digits are enough for any of ours."""
        if self.choices:
            return trial.suggest_categorical(self.key, self.choices)
        if self.whole:
            return trial.suggest_int(self.key, self.low, self.high, step=int(self.step or 1), log=self.log)
        value = trial.suggest_float(self.key, self.low, self.high, step=self.step, log=self.log)
        return min(max(float(f"{value:.4g}"), self.low), self.high)

    def value_of(self, config: Any) -> Value:
        """What a configuration has, as this parameter would have it."""
        value = config[self.key]
        for choice in self.choices:  # RecBole reads text as literals
            read = literal(choice) if isinstance(choice, str) else choice
            if type(read) is type(value) and read == value:
                return choice
        return value if is_plain(value) else repr(value)

    def contains(self, value: Value) -> bool:
        """Whether it takes a value."""
        if self.choices:
            return any(type(choice) is type(value) and choice == value for choice in self.choices)
        if not isinstance(value, int if self.whole else (int, float)) or isinstance(value, bool):
            return False
        if not self.low <= value <= self.high:
            return False
        steps = 0.0 if self.step is None else (value - self.low) / self.step
        return abs(steps - round(steps)) < 1e-6

    def ends(self) -> tuple[Value, ...]:
        """Values that are valid where all are."""
        return self.choices or (self.low, self.high)

    def __str__(self) -> str:
        if self.choices:
            return f"{self.key}: one of {', '.join(map(str, self.choices))}"
        step = f" in steps of {self.step:g}" if self.step not in (None, 1) else ""
        only = f", with {self.only[0]} {self.only[1]}" if self.only else ""
        return f"{self.key}: {self.low:g} to {self.high:g}{step}{', logarithmic' if self.log else ''}{only}"


def read(file: str) -> list[Parameter]:
    """The parameters of a file: lines as RecBole's `hyper` files have them, or YAML with its `params_dict`.

    Raises:
        UserError: names the file, the line and what it takes.
    """
    is_yaml = Path(file).suffix in (".yaml", ".yml")
    entries = list(of_yaml(file) if is_yaml else of_lines(file))
    keys = [entry.key for entry in entries]
    for key in keys:
        if keys.count(key) > 1:
            raise UserError(f"--space: {file!r} has {key!r} twice")
    if not entries:
        raise UserError(f"--space: {file!r} names no key; it takes lines such as: {KINDS['choice']}")
    return entries


def of_lines(file: str) -> Iterable[Parameter]:
    """Lines `key kind values`; those that begin with # are comments."""
    try:
        lines = Path(file).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--space: there is no file {file!r}, or it cannot be read: {reason}") from None
    for number, line in enumerate(lines, 1):
        words = line.split(None, 2)
        if not words or words[0].startswith("#"):
            continue
        where = f"--space: line {number} of {file!r}, {line.strip()!r}, is not valid"
        if len(words) < 3 or words[1] not in KINDS:
            raise UserError(f"{where}; it takes {', '.join(KINDS.values())}")
        key, kind, text = words
        try:
            values = ast.literal_eval(text)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            raise UserError(f"{where}: {text!r} is not a literal; it takes {KINDS[kind]}") from None
        yield parameter(key, kind, values, where)


def of_yaml(file: str) -> Iterable[Parameter]:
    """A mapping of kinds to mappings of keys to lists of values."""
    for kind, keys in read_yaml(file, "--space").items():
        where = f"--space: {kind!r} in {file!r} is not valid"
        if kind not in KINDS or not isinstance(keys, dict):
            raise UserError(f"{where}; it takes {', '.join(KINDS)}, each a mapping of keys to lists of values")
        for key, values in keys.items():
            yield parameter(str(key), kind, values, f"--space: {key!r} in {file!r}, {values!r}, is not valid")


def parameter(key: str, kind: str, values: Any, where: str) -> Parameter:
    """A parameter from what a file says, with the meaning that it has in RecBole."""
    wrong = UserError(f"{where}; it takes {KINDS[kind]}")
    if not isinstance(values, (list, tuple)) or not values:
        raise wrong
    if kind == "choice":
        choices = tuple(one if is_plain(one) else repr(one) for one in values)
        if len({repr(one) for one in choices}) < len(choices):
            raise UserError(f"{where}: a value is there twice")
        return Parameter(key, choices)
    if len(values) != (3 if kind == "quniform" else 2) or not all(map(is_finite, values)):
        raise wrong
    low, high, *step = values
    if not low < high or (step and not step[0] > 0):
        raise wrong
    if kind == "uniform":
        return Parameter(key, low=float(low), high=float(high))
    if kind == "loguniform":
        try:
            return Parameter(key, low=math.exp(low), high=math.exp(high), log=True)
        except OverflowError:
            raise wrong from None
    first, last = (round(end / step[0]) * step[0] for end in (low, high))  # multiples of the step, as hyperopt's
    return Parameter(key, low=first, high=last, step=step[0])


def is_plain(value: Any) -> bool:
    """Whether it is one of the values that Optuna keeps."""
    return value is None or isinstance(value, (bool, int, float, str))


def is_finite(value: Any) -> bool:
    """Whether it is a number, and not infinite."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def check(space: Iterable[Parameter], model: str, configure: Callable[[dict[str, Any]], Any]) -> None:
    """Make a configuration of each value, or both ends, so that it is checked as any other is.

    Raises:
        UserError: names the key, its value and the valid ones.
    """
    known = config_checks.known_keys(model)
    for one in space:
        if one.key not in known:
            raise UserError(f"--space: there is no key {one.key!r}{config_checks.nearest(one.key, known)}")
        if one.key in FIXED:
            raise UserError(f"--space: {one.key!r} cannot be searched: it takes one value for all trials")
        for value in one.ends():
            try:
                configure({one.key: value})
            except UserError as error:
                raise UserError(f"--space: {error}") from None
