"""Cross-entropy over all items."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from recbole_cce import ops
from recbole_cce.nn.losses.base import Loss, at_least_float32, of_targets
from recbole_cce.nn.losses.loss_sum import LossSum


class CE(Loss):
    """Full cross-entropy with all logits in memory, as RecBole's own head; the padding item is no candidate."""

    def forward(self, hidden: torch.Tensor, target: torch.Tensor, weight: torch.Tensor) -> LossSum:
        hidden = of_targets(hidden, target)
        with self.precision(hidden.device):
            logits = hidden.to(weight.dtype) @ weight[1:].T
        loss = F.cross_entropy(at_least_float32(logits), target - 1, ignore_index=-1, reduction="none")
        return LossSum.of_positions(loss, target)


class CCE(Loss):
    """Full cross-entropy, exact, without the logits: ops.linear_cross_entropy."""

    def forward(self, hidden: torch.Tensor, target: torch.Tensor, weight: torch.Tensor) -> LossSum:
        with self.precision(hidden.device):
            mean = ops.linear_cross_entropy(hidden, weight, target, backend=self.backend)
        return LossSum(mean, (target != 0).sum())
