"""Rows of a table whose columns are gathered when they are asked for: what RecBole indexes, splits and sorts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, MutableMapping
from typing import Any

import numpy as np
import torch
from recbole.data.interaction import Interaction

# Column of inter_feat: where in the flat table the row's target is. In a batch only with exclude_seen.
TARGET_ROW = "target_row"


class Gathered(MutableMapping[str, torch.Tensor]):
    """Columns of a table at some of its rows, each gathered when it is asked for; and columns `of_rows` themselves."""

    def __init__(self, table: dict[str, torch.Tensor], of_rows: dict[str, torch.Tensor], names: Iterable[str]) -> None:
        self.table = table
        self.of_rows = of_rows
        self.names = dict.fromkeys(names)

    def at(self, index: Any) -> Gathered:
        """These columns at fewer or other rows."""
        return Gathered(self.table, {name: values[index] for name, values in self.of_rows.items()}, self.names)

    def __getitem__(self, name: str) -> torch.Tensor:
        if name in self.of_rows:
            return self.of_rows[name]
        if name in self.names:
            return self.table[name][self.of_rows[TARGET_ROW]]
        raise KeyError(name)

    def __setitem__(self, name: str, values: torch.Tensor) -> None:
        self.of_rows[name] = values
        self.names[name] = None

    def __delitem__(self, name: str) -> None:
        del self.names[name]
        self.of_rows.pop(name, None)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


class Rows(Interaction):
    """An Interaction whose columns are Gathered; RecBole's would copy all of them for each split and each sort.

    It also takes rows by a tensor: RecBole's makes a Python list of each index.
    """

    def __init__(self, columns: Gathered) -> None:
        self.interaction = columns
        self.length = columns[TARGET_ROW].numel()

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, str):
            return self.interaction[index]
        if isinstance(index, (list, range)):
            index = np.asarray(index) if len(index) else np.empty(0, dtype=np.int64)
        if isinstance(index, np.ndarray):
            index = torch.from_numpy(index)
        return Rows(self.interaction.at(index))

    def _reindex(self, index: Any) -> None:
        self.interaction = self.interaction.at(torch.as_tensor(index))
