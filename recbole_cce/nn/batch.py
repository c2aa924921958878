"""A training batch."""

from __future__ import annotations

from typing import NamedTuple

import torch

from recbole_cce.nn.packing import Packing


class Places(NamedTuple):
    """How many places a training batch needs: as many as it has real positions and targets, or more of them.

    `fixed`: batches of other rows have equally many.
    """

    positions: int
    targets: int
    fixed: bool = False


def places_of(where: torch.Tensor | Packing, row: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """[N] the places among all that hidden_states() gives of N positions, by row and position in it."""
    if isinstance(where, Packing):
        return (where.starts[row] + position).clamp(max=len(where.index) - 1)  # a row of padding has no place
    return row * where.size(1) + position


def rows_at(
    hidden: torch.Tensor, where: torch.Tensor | Packing, row: torch.Tensor, position: torch.Tensor
) -> torch.Tensor:
    """[N, D] hidden states of N positions, by row and position in it, from all of them [P, D]."""
    # the gradient of index_select needs no sorting, that of hidden[index] does
    return hidden.index_select(0, places_of(where, row, position))


def last_positions(lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[B] rows and [B] their last positions; the first one of a row of padding."""
    return torch.arange(len(lengths), device=lengths.device), (lengths - 1).clamp(min=0)


def next_items(
    item_seq: torch.Tensor, lengths: torch.Tensor, last: torch.Tensor, count: torch.Tensor, places: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The positions of a batch that are trained, and their targets.

    Args:
        item_seq: [B, L] items, padded with 0 on the right.
        lengths: [B] how many there are in each row.
        last: [B] the item after the last one of each row.
        count: [B] how many of a row's last positions are trained: the others are in another row.
        places: N, the sum of `count` or more.

    Returns:
        [N] rows and [N] positions in them, in order, and [N] the items that come next; 0 in places that are left over.
    """
    width = item_seq.size(1)
    ends = count.cumsum(0)
    place = torch.arange(places, device=item_seq.device)
    row = torch.searchsorted(ends, place, right=True)
    left_over = row == len(count)
    row = row.clamp(max=len(count) - 1)
    following = lengths[row] - ends[row] + place + 1
    target = item_seq.flatten()[row * width + following.clamp(max=width - 1)]
    target = torch.where(following < lengths[row], target, last[row]).masked_fill(left_over, 0)
    return row, (following - 1).clamp(max=width - 1), target
