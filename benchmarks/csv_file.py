"""Rows of a benchmark as CSV."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any


def write_csv(rows: list[dict[str, Any]], file: Path) -> None:
    """Write `rows` with a column for each key of any of them; a row without it has an empty cell."""
    with open(file, "w", newline="") as stream:
        writer = csv.DictWriter(stream, list(dict.fromkeys(column for row in rows for column in row)))
        writer.writeheader()
        writer.writerows(rows)
