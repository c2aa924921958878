"""The losses by the names that `loss_type` takes, and the keys that they declare."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

from recbole_cce.errors import UserError
from recbole_cce.keys import Key
from recbole_cce.nn.losses.base import Loss

LOSSES: dict[str, type[Loss]] = {}
L = TypeVar("L", bound=type[Loss])


def register_loss(name: str) -> Callable[[L], L]:
    """Decorator of a subclass of Loss: `loss_type` takes `name`, and every configuration has the loss's keys.

    The same class may be registered again, as a cell of a notebook does that is run twice.

    Raises:
        UserError: the name is no word or another loss's; the class is no Loss; a key's default is not one of its
            values, or another loss declares the key differently.
    """

    def register(cls: L) -> L:
        if not re.fullmatch(r"[A-Za-z][\w-]*", name) or name == "auto":
            raise UserError(f"loss {name!r}: the name is not valid; it takes letters, digits, _ and -, but not auto")
        if not (isinstance(cls, type) and issubclass(cls, Loss)):
            raise UserError(f"loss {name!r}: {cls!r} is not valid; it takes a subclass of recbole_cce.nn.losses.Loss")
        others = {other: loss for other, loss in LOSSES.items() if not _is_again(cls, loss)}
        if name in others:
            raise UserError(f"loss name {name!r} is taken: {others[name].__module__} has it; choose another")
        for key, of in cls.keys.items():
            if not of.accepts(of.default):
                raise UserError(
                    f"loss {name!r}: the default of {key}, {of.default!r}, is not valid; it takes {of.valid}"
                )
            for other, loss in others.items():
                if key in loss.keys and loss.keys[key] != of:
                    raise UserError(
                        f"loss {name!r} declares the key {key!r} in another way than {other}: take its declaration, or "
                        "give the key another name"
                    )
        LOSSES[name] = cls
        return cls

    return register


def _is_again(one: type, other: type) -> bool:
    return (one.__module__, one.__qualname__) == (other.__module__, other.__qualname__)


def declared() -> dict[str, Key]:
    """Every key of a loss, in the order of the losses; where not all of them read it, its help begins with who does."""
    readers: dict[str, list[str]] = {}
    for name, loss in LOSSES.items():
        for key in loss.keys:
            readers.setdefault(key, []).append(name)
    found: dict[str, Key] = {}
    for key, names in readers.items():
        of = LOSSES[names[0]].keys[key]
        found[key] = of if len(names) == len(LOSSES) else replace(of, help=f"{', '.join(names)}: {of.help}")
    return found
