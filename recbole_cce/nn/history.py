"""The items that users had before: which of them, and how long ago each one was last had."""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import torch


class History(NamedTuple):
    """Pairs of a row and an item of its user's history, each item once.

    Attributes:
        row: [P] int64, number of the row.
        item: [P] int64.
        age: [P] int64, how many interactions ago the user last had the item; 1 is the last interaction.
    """

    row: torch.Tensor
    item: torch.Tensor
    age: torch.Tensor


class UserHistories:
    """Histories in a table of interactions that is sorted by user and time.

    Args:
        users: [n] int64, ascending.
        items: [n] int64.
    """

    def __init__(self, users: torch.Tensor, items: torch.Tensor) -> None:
        self.users = users
        self.items = items

    @cached_property
    def following(self) -> torch.Tensor:
        """[n] which interaction is the next one of the same user with the same item; n where there is none."""
        position = self.items.argsort(stable=True)
        position = position[self.users[position].argsort(stable=True)]  # by user, item and time
        first, second = position[:-1], position[1:]
        same = (self.users[second] == self.users[first]) & (self.items[second] == self.items[first])
        following = torch.full_like(self.users, len(self.users))
        following[first[same]] = second[same]
        return following

    def before(self, end: torch.Tensor) -> History:
        """What the users of the interactions at `end` [N] had before them; `end` may be one past a user's last."""
        first = torch.searchsorted(self.users, self.users[end - 1])
        count = end - first
        row = torch.arange(len(end)).repeat_interleave(count)
        position = torch.arange(len(row)) - (count.cumsum(0) - count - first)[row]
        latest = self.following[position] >= end[row]  # else the item comes again
        row, position = row[latest], position[latest]
        return History(row, self.items[position], end[row] - position)


def listed(items: torch.Tensor, lengths: torch.Tensor) -> History:
    """The same of lists [N, L], padded with 0 on the right, of `lengths` [N], for which nothing else is known."""
    row, position = (items > 0).nonzero(as_tuple=True)
    item = items[row, position]
    key = row * (int(item.max()) + 1 if len(item) else 1) + item
    order = key.argsort(stable=True)  # of equal pairs the latest comes last
    latest = torch.ones_like(order, dtype=torch.bool)
    latest[:-1] = key[order][1:] != key[order][:-1]
    kept = order[latest].sort().values
    row, position = row[kept], position[kept]
    return History(row, item[kept], lengths[row] - position)
