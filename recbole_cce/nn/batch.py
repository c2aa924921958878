"""A training batch, and which of its positions are trained on which targets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from recbole_cce.nn.packing import Packing

# of the positions; a loss then passes over the others sooner than a copy without them is made
TRAINED_SHARE = 0.9


class Counts(NamedTuple):
    """How many real positions and targets a batch has, known on the host; tensors of a step are made for as many.

    `fixed`: they are upper bounds, the same for batches of other rows; what is left over is padding.
    """

    positions: int
    targets: int
    fixed: bool = False


@dataclass(frozen=True)
class Batch:
    """Rows of users' histories and what comes after each of their positions.

    Attributes:
        items: [B, L] int64, padded with 0 on the right.
        lengths: [B] int64, how many items there are in each row; 0 in a row of padding.
        following: [B] int64, the item after the last one of each row.
        trained: [B] int64, how many of a row's last positions are trained: the others are in another row, or not at
            all.
        counts: of the whole batch.
    """

    items: torch.Tensor
    lengths: torch.Tensor
    following: torch.Tensor
    trained: torch.Tensor
    counts: Counts

    @classmethod
    def counted(
        cls, items: torch.Tensor, lengths: torch.Tensor, following: torch.Tensor, trained: torch.Tensor
    ) -> Batch:
        """A batch whose counts are read from its tensors, which waits for the device."""
        return cls(items, lengths, following, trained, Counts(int(lengths.sum()), int(trained.sum())))

    def targets(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The positions that are trained, and their targets.

        Returns:
            N = counts.targets rows [N] and positions in them [N], in order, and [N] the items that come next; the
            target is 0 in slots that are left over.
        """
        rows, width = self.items.shape
        ends = self.trained.cumsum(0)
        slot = torch.arange(self.counts.targets, device=self.items.device)
        row = torch.searchsorted(ends, slot, right=True)
        left_over = row == rows
        row = row.clamp(max=rows - 1)
        after = self.lengths[row] - ends[row] + slot + 1  # where in its row the target is
        target = self.items.flatten()[row * width + after.clamp(max=width - 1)]
        target = torch.where(after < self.lengths[row], target, self.following[row]).masked_fill(left_over, 0)
        return row, (after - 1).clamp(max=width - 1), target


def slots_of(where: torch.Tensor | Packing, row: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """[N] which hidden states of an encoder are those of N positions, given by row and position in it.

    Args:
        where: how the states lie: [B, L] in padded rows, of which the shape is read, or packed.
        row: [N] int64.
        position: [N] int64.
    """
    if isinstance(where, Packing):
        return (where.starts[row] + position).clamp(max=len(where.source) - 1)  # a row of padding has no slot
    return row * where.size(1) + position


def states_at(
    hidden: torch.Tensor, where: torch.Tensor | Packing, row: torch.Tensor, position: torch.Tensor
) -> torch.Tensor:
    """[N, D] the hidden states of N positions, by row and position in it, from all of them [P, D]."""
    # the gradient of index_select needs no sorting, that of hidden[index] does
    return hidden.index_select(0, slots_of(where, row, position))


def last_positions(lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[B] rows and [B] their last positions; the first one of a row of padding."""
    return torch.arange(len(lengths), device=lengths.device), (lengths - 1).clamp(min=0)
