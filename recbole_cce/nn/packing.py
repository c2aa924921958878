"""The real positions of padded rows, one after another."""

from __future__ import annotations

from typing import NamedTuple

import torch

from recbole_cce.ops import sequences

PACKED_SHARE = 0.5  # attention: auto packs a training batch of which at most so much is real


class Packing(NamedTuple):
    """Where the positions of B right-padded rows are when the real ones stand one after another in P slots.

    P may be larger than their number: what is left over are further sequences of padding, which no other one sees.

    Attributes:
        source: [P] int64, each slot's position in the flattened rows [B * width]; B * width where nothing is left.
        position: [P] int64, each slot's position in its row.
        starts: [B] int64, the first slot of each row.
        bounds: [B + ceil(P / width) + 1] int32, where sequences start, and P.
        spans: [P, 2] int32, where each slot's sequence starts and ends.
        width: positions of a padded row.
    """

    source: torch.Tensor
    position: torch.Tensor
    starts: torch.Tensor
    bounds: torch.Tensor
    spans: torch.Tensor
    width: int

    @property
    def from_end(self) -> torch.Tensor:
        """[P] int64, how many slots of its sequence come after each slot."""
        return self.spans[:, 1] - 1 - torch.arange(len(self.spans), device=self.spans.device)


def packs(attention: str, positions: int | None, padded: int) -> bool:
    """Whether `attention` means packed for a batch of `positions` real ones, None if unknown, among `padded`."""
    return attention == "packed" or (
        attention == "auto" and positions is not None and positions <= PACKED_SHARE * padded
    )


def pack(lengths: torch.Tensor, width: int, slots: int) -> Packing:
    """The Packing of rows with `lengths` [B] real positions, at most `width` each and `slots` in all; no wait for the
    device, as it is the caller who knows how many there are."""
    ends = lengths.cumsum(0)
    left_over = torch.arange(1, 1 - (-slots // width), device=lengths.device) * width
    bounds = torch.cat([ends.new_zeros(1), ends, ends[-1] + left_over]).clamp(max=slots).int()
    row, spans = sequences(bounds, slots)
    position = torch.arange(slots, device=lengths.device) - spans[:, 0]
    source = (row * width + position).clamp(max=len(lengths) * width)
    return Packing(source, position, ends - lengths, bounds, spans, width)


def unpack(packed: torch.Tensor, packing: Packing) -> torch.Tensor:
    """Put packed [P, ...] values back to their positions in [B, L, ...], zero elsewhere."""
    rows, shape = len(packing.starts), packed.shape[1:]
    # one row more, for the slots without a position
    padded = packed.new_zeros(rows * packing.width + 1, *shape).index_copy(0, packing.source, packed)
    return padded[:-1].view(rows, packing.width, *shape)
