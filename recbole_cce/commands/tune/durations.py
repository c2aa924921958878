"""Seconds as people write them: 90s, 10m, 2h, 1h30m."""

from __future__ import annotations

import re

from recbole_cce.errors import UserError

UNITS = {"h": 3600, "m": 60, "s": 1}


def parse(text: str, option: str) -> float:
    """Seconds of a text such as 90s, 10m, 1.5h or 1h30m.

    Raises:
        UserError: it is none, or 0.
    """
    number = r"(\d{1,9}(?:\.\d{1,9})?)"
    match = re.fullmatch("".join(rf"(?:{number}{unit})?" for unit in UNITS), text)
    seconds = (
        sum(float(part) * size for part, size in zip(match.groups(), UNITS.values(), strict=True) if part)
        if match
        else 0
    )
    if not seconds > 0:
        raise UserError(f"{option}: {text!r} is not valid; it takes a time such as 90s, 10m, 2h or 1h30m")
    return seconds


def words(seconds: float) -> str:
    """'1h02m', '3m20s', '45s'."""
    whole = max(0, round(seconds))
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    if hours:
        return f"{hours}h{minutes:02}m"
    return f"{minutes}m{rest:02}s" if minutes else f"{rest}s"
