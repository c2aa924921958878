"""What a configuration key is: its default, the values that it takes, and one error for any other."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from recbole_cce.errors import UserError


class Values(NamedTuple):
    """The values that a key takes: `valid` says it in words, `accepts` decides."""

    valid: str
    accepts: Callable[[Any], bool]


@dataclass(frozen=True)
class Key:
    """A configuration key, as a loss or a model declares it.

    Attributes:
        default: its value where no file and no flag has one; None: a model's YAML file has the default, or nobody.
        values: what it takes, made by one of the functions below.
        help: what it does, in a few words.
    """

    default: Any
    values: Values
    help: str

    @property
    def valid(self) -> str:
        """The values it takes, in words."""
        return self.values.valid

    @property
    def accepts(self) -> Callable[[Any], bool]:
        """Whether a value is one of them."""
        return self.values.accepts


def refuse(name: str, value: Any, valid: str) -> None:
    """Raise the error of a value that is not valid.

    Raises:
        UserError: always.
    """
    raise UserError(f"{name}: {value!r} is not valid; it takes {valid}")


def validate(config: Mapping[str, Any], table: Mapping[str, Values]) -> None:
    """Check the value of every key of `table` that `config` has.

    Raises:
        UserError: names the key, its value and the valid ones.
    """
    for name, (valid, accepts) in table.items():
        if name in config and not accepts(config[name]):
            refuse(name, config[name], valid)


# Kinds of values


def one_of(*options: Any) -> Values:
    """One of some values."""
    # `is` for booleans: 1 == True, and --mix_x=1 is more likely a mistake than a wish
    return Values(
        "one of " + ", ".join(map(str, options)),
        lambda value: any(value is option if isinstance(option, bool) else value == option for option in options),
    )


def any_case(*options: str) -> Values:
    """One of some words, in small letters or large ones."""
    return Values(one_of(*options).valid, lambda value: isinstance(value, str) and value.lower() in options)


def flag() -> Values:
    """True or False."""
    return one_of(True, False)


def integer(low: int, high: int | None = None, auto: bool = False, most: int = 2**31 - 1) -> Values:
    """An integer from low to high, or from low on: to `most`, beyond which nothing works. With `auto`, that too."""
    span = f"an integer >= {low}" if high is None else f"an integer from {low} to {high}"
    if high is None and most < 2**31 - 1:
        span += f" and at most {most}"
    high = most if high is None else high
    return or_auto(auto, Values(span, lambda value: is_integer(value) and low <= value <= high))


def real(low: float, high: float | None = None, auto: bool = False) -> Values:
    """A number from low to high, or from low on, and finite. With `auto`, that too."""
    span = f"a number from {low:g} to {high:g}" if high is not None else f"a number >= {low:g}"
    most = math.inf if high is None else high
    return or_auto(auto, Values(span, lambda value: is_number(value) and low <= value < math.inf and value <= most))


def or_auto(auto: bool, values: Values) -> Values:
    """`values`, and the word auto where `auto` says so."""
    if not auto:
        return values
    return Values(f"{values.valid} or auto", lambda value: value == "auto" or values.accepts(value))


def or_nothing(values: Values) -> Values:
    """`values`, and nothing: ~ in YAML, None in Python."""
    return Values(f"{values.valid}, or ~ (nothing)", lambda value: value is None or values.accepts(value))


def list_of(what: str, accepts: Callable[[Any], bool] | None = None) -> Values:
    """A list, which may be empty, of texts or of what `accepts` takes; `what` names them."""
    return Values(f"a list of {what}", lambda value: value == [] or is_list(value, accepts or is_text))


# Kinds of a single value


def is_integer(value: Any) -> bool:
    """Whether a value is a whole number; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether a value is a number that torch takes: no NaN, no integer beyond 64 bits."""
    return (is_integer(value) and abs(value) < 2**63) or (isinstance(value, float) and not math.isnan(value))


def is_text(value: Any) -> bool:
    """Whether a value is a text with something in it."""
    return isinstance(value, str) and value != ""


def is_list(value: Any, accepts: Callable[[Any], bool]) -> bool:
    """Whether a value is a list or a tuple with something in it, all of which `accepts` takes."""
    return isinstance(value, (list, tuple)) and len(value) > 0 and all(map(accepts, value))


def is_mapping(value: Any, accepts: Callable[[Any], bool]) -> bool:
    """Whether a value is a dictionary from texts to what `accepts` takes."""
    return isinstance(value, dict) and all(is_text(key) and accepts(each) for key, each in value.items())


# Intervals

INTERVAL = "an interval such as [5,inf) or (0,4.5], or several with ; between them"


def is_interval(value: Any) -> bool:
    """Whether a value is a text such as `[5,inf)` or `(0,1];[3,4)`."""
    for part in str(value).split(";"):
        match = re.fullmatch(r"\s*[\[(]([^,]+),([^,]+)[\])]\s*", part)
        if match is None:
            return False
        try:
            low, high = map(float, match.groups())
        except ValueError:
            return False
        if not low <= high:  # NaN, too
            return False
    return True
