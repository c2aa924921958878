"""Cross-entropy over sampled negatives."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from recbole_cce import ops
from recbole_cce.keys import Key, flag, integer, one_of, real
from recbole_cce.nn.losses.base import Buffers, Loss, at_least_float32, of_targets
from recbole_cce.nn.losses.loss_sum import LossSum
from recbole_cce.nn.losses.registry import register_loss
from recbole_cce.ops import negatives


class SampledLoss(Loss):
    """A loss over K negatives drawn from `negative_distribution`, shared as `negative_sharing` says."""

    keys: ClassVar[Mapping[str, Key]] = {
        **Loss.keys,
        "num_negatives": Key(2048, integer(1, 65536), "negatives K per position"),
        "negative_sharing": Key("tile", one_of("tile", "none", "batch"), "who shares one draw of K negatives"),
        "negative_distribution": Key("uniform", one_of("uniform", "popularity"), "distribution q of the negatives"),
        "negative_alpha": Key(1.0, real(0, 10), "q proportional to count^alpha (popularity)"),
    }

    def __init__(self, config: Mapping[str, Any], counts: torch.Tensor) -> None:
        super().__init__(config, counts)
        self.num_negatives: int = config["num_negatives"]
        self.sharing: str = config["negative_sharing"]
        self.sampler = (
            ops.Uniform()
            if config["negative_distribution"] == "uniform"
            else ops.Popularity(counts, alpha=config["negative_alpha"])
        )


class SampledSoftmax(SampledLoss):
    """A sampled loss whose negatives' logits are corrected for how likely they were drawn."""

    keys: ClassVar[Mapping[str, Key]] = {
        **SampledLoss.keys,
        "logq_correction": Key(True, flag(), "subtract log(K q) from negative logits"),
    }

    def __init__(self, config: Mapping[str, Any], counts: torch.Tensor) -> None:
        super().__init__(config, counts)
        self.logq_correction: bool = config["logq_correction"]


@register_loss("CCE-")
class CCEMinus(SampledSoftmax):
    """Cross-entropy with negative sampling (arXiv 2509.09682): ops.sampled_cross_entropy."""

    @classmethod
    def holds(cls, config: Mapping[str, Any], positions: int, items: int, width: int) -> Buffers:
        """Log-sum-exp, slope and target of each position."""
        return Buffers(kept=16 * positions, direction=True)

    def forward(self, hidden: torch.Tensor, target: torch.Tensor, weight: torch.Tensor) -> LossSum:
        with self.precision(hidden.device):
            mean = ops.sampled_cross_entropy(
                hidden,
                weight,
                target,
                num_negatives=self.num_negatives,
                sampler=self.sampler,
                sharing=self.sharing,
                logq_correction=self.logq_correction,
                backend=self.backend,
            )
        return LossSum(mean, (target != 0).sum())


@register_loss("CE-")
class CEMinus(SampledSoftmax):
    """The same number as CCE-, with the rows of all negatives in memory [N, K, D]: the paper's baseline."""

    def forward(self, hidden: torch.Tensor, target: torch.Tensor, weight: torch.Tensor) -> LossSum:
        device = hidden.device
        groups = torch.arange(negatives.num_groups(len(hidden), self.sharing), device=device)
        drawn = negatives.draw_negatives(
            self.sampler, negatives.new_seed(device), groups, self.num_negatives, len(weight), padding_idx=0
        )
        drawn = drawn[torch.arange(len(hidden), device=device) % len(groups)]
        hidden, valid = of_targets(hidden, target).to(weight.dtype), target != 0
        with self.precision(device):
            positive = at_least_float32(torch.einsum("nd,nd->n", hidden, weight[target.where(valid, 1)]))
            negative = at_least_float32(torch.einsum("nd,nkd->nk", hidden, weight[drawn]))
        if self.logq_correction:
            negative = negative - (self.sampler.log_q(drawn - 1, len(weight) - 1) + math.log(self.num_negatives))
        negative = negative.masked_fill(drawn == target[:, None], -torch.inf)
        loss = torch.logsumexp(torch.cat([positive[:, None], negative], dim=1), dim=1) - positive
        return LossSum.of_positions(loss, target)
