"""Cross-entropy over all items."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import functional as F

from recbole_cce import ops
from recbole_cce.nn.losses.base import Buffers, Loss, at_least_float32, of_targets
from recbole_cce.nn.losses.loss_sum import LossSum
from recbole_cce.nn.losses.registry import register_loss


@register_loss("CE")
class CE(Loss):
    """Full cross-entropy with all logits in memory, as RecBole's own head; the padding item is no candidate."""

    def forward(self, hidden: torch.Tensor, target: torch.Tensor, weight: torch.Tensor) -> LossSum:
        hidden = of_targets(hidden, target)
        with self.precision(hidden.device):
            logits = hidden.to(weight.dtype) @ weight[1:].T
        loss = F.cross_entropy(at_least_float32(logits), target - 1, ignore_index=-1, reduction="none")
        return LossSum.of_positions(loss, target)


@register_loss("CCE")
class CCE(Loss):
    """Full cross-entropy, exact, without the logits: ops.linear_cross_entropy."""

    @classmethod
    def holds(cls, config: Mapping[str, Any], positions: int, items: int, width: int) -> Buffers:
        """Hidden states and table in 16 bits; log-sum-exp, slope, order and target of each position."""
        kept = 2 * width * (positions + items + 1) + 20 * positions
        return Buffers(kept=kept, keeps_hidden=False, direction=True)

    def forward(self, hidden: torch.Tensor, target: torch.Tensor, weight: torch.Tensor) -> LossSum:
        with self.precision(hidden.device):
            mean = ops.linear_cross_entropy(hidden, weight, target, backend=self.backend)
        return LossSum(mean, (target != 0).sum())
