"""What a loss returns: its mean, and over how many positions that is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

Ratio = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class LossSum:
    """A sum of losses over positions, kept as their mean and their number.

    Sums of several batches or processes add up to the loss of all their positions together, which means of batches
    of different sizes do not. The mean is what is kept because kernels have its gradient at hand.

    Attributes:
        mean: scalar, fp32 (fp64 of fp64 inputs): the mean loss of the counted positions, 0 where there is none.
        count: scalar, how many positions were counted.
        statistics: names of what a loss tells about itself -> a numerator and a denominator, both scalars; over an
            epoch each is added up before they are divided.
    """

    mean: torch.Tensor
    count: torch.Tensor
    statistics: Mapping[str, Ratio] = field(default_factory=dict)

    @classmethod
    def of_positions(cls, loss: torch.Tensor, target: torch.Tensor) -> LossSum:
        """Of losses [N] at positions with `target` [N], where those whose target is the padding item 0 do not count."""
        counted = target != 0
        count = counted.sum()
        return cls(loss.where(counted, 0).sum() / count.clamp(min=1), count)

    @classmethod
    def total(cls, parts: Sequence[LossSum]) -> LossSum:
        """Of the positions of all `parts` together; carries no gradient."""
        if len(parts) == 1:
            return parts[0].detached()
        count = torch.stack([part.count for part in parts]).sum()
        value = torch.stack([part.sum.detach() for part in parts]).sum()
        statistics = {}
        for name in parts[0].statistics:
            above, below = zip(*(part.statistics[name] for part in parts), strict=True)
            statistics[name] = torch.stack(above).sum(), torch.stack(below).sum()
        return cls(value / count.clamp(min=1), count, statistics)

    @property
    def sum(self) -> torch.Tensor:
        """The sum of the losses."""
        return self.mean * self.count

    def over(self, total: torch.Tensor) -> torch.Tensor:
        """sum / total: what these positions add to the mean over `total` positions. Exactly the mean where they are
        all of them."""
        return self.mean * (self.count / total.clamp(min=1))

    def detached(self) -> LossSum:
        """The same numbers without the graph that made them."""
        return replace(self, mean=self.mean.detach())

    def copied(self) -> LossSum:
        """The same numbers in other memory."""
        statistics = {name: (above.clone(), below.clone()) for name, (above, below) in self.statistics.items()}
        return LossSum(self.mean.clone(), self.count.clone(), statistics)
