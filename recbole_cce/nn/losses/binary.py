"""Binary cross-entropy over sampled negatives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from recbole_cce import ops
from recbole_cce.keys import Key, real
from recbole_cce.nn.losses.base import Buffers
from recbole_cce.nn.losses.loss_sum import LossSum
from recbole_cce.nn.losses.registry import register_loss
from recbole_cce.nn.losses.sampled import SampledLoss
from recbole_cce.ops.sampled_binary_cross_entropy import gbce_beta


@register_loss("BCE")
class BCE(SampledLoss):
    """Binary cross-entropy of SASRec with K negatives: ops.sampled_binary_cross_entropy."""

    positive_weight = 1.0

    @classmethod
    def holds(cls, config: Mapping[str, Any], positions: int, items: int, width: int) -> Buffers:
        """Log-sum-exp, slope and target of each position."""
        return Buffers(kept=16 * positions, direction=True)

    def forward(self, hidden: torch.Tensor, target: torch.Tensor, weight: torch.Tensor) -> LossSum:
        with self.precision(hidden.device):
            mean = ops.sampled_binary_cross_entropy(
                hidden,
                weight,
                target,
                num_negatives=self.num_negatives,
                positive_weight=self.positive_weight,
                sampler=self.sampler,
                sharing=self.sharing,
                backend=self.backend,
            )
        return LossSum(mean, (target != 0).sum())


@register_loss("gBCE")
class GBCE(BCE):
    """Generalised binary cross-entropy of gSASRec (Petrov & Macdonald, RecSys 2023): BCE, its positive weighed."""

    keys: ClassVar[Mapping[str, Key]] = {**BCE.keys, "gbce_t": Key(0.75, real(0, 1), "calibration t")}

    def __init__(self, config: Mapping[str, Any], counts: torch.Tensor) -> None:
        super().__init__(config, counts)
        self.positive_weight = gbce_beta(self.num_negatives, len(counts), config["gbce_t"])
