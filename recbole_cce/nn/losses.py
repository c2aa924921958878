"""The training losses, one nn.Module per `loss_type`: forward(hidden [N, D], target [N], weight [V+1, D]) -> scalar.

Each returns the mean over the rows whose target is not the padding item 0. CE and CE- hold all their logits, in plain
torch; the others call an op, which `loss_backend` concerns. To add a loss: write its op in recbole_cce/ops, a class
here, and its name in LOSSES.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from recbole_cce import ops
from recbole_cce.ops import negatives
from recbole_cce.ops.sampled_binary_cross_entropy import gbce_beta
from recbole_cce.ops.scalable_cross_entropy import auto_size


class Loss(nn.Module):
    """Base of all losses. `config`: the keys of recbole_cce/plugin/keys.py. `counts` [V]: how often each real item is
    a training target. Holds no parameters, so that state dicts stay those of RecBole's SASRec.

    Attributes:
        capturable: whether a CUDA graph can hold it: no size depends on values, nothing waits for the device.
    """

    capturable = True

    def __init__(self, config: Mapping[str, Any], counts: torch.Tensor) -> None:
        super().__init__()
        self.backend: str = config["loss_backend"]
        self.dtype: str = config["loss_dtype"]

    def precision(self, device: torch.device) -> AbstractContextManager[Any]:
        """Autocast as `loss_dtype` says. The ops round their inputs to its dtype and keep logits in fp32; the products
        of CE and CE- are torch's own, with logits in that dtype."""
        if self.dtype == "auto":
            return contextlib.nullcontext()
        if self.dtype == "float32":
            return torch.autocast(device.type, enabled=False)
        return torch.autocast(device.type, dtype=getattr(torch, self.dtype))

    def statistics(self) -> dict[str, float]:
        """Numbers about the epoch that just ended, for the log. Reading them waits for the device."""
        return {}


class SampledLoss(Loss):
    """A loss over K negatives drawn from `negative_distribution`, shared as `negative_sharing` says."""

    def __init__(self, config: Mapping[str, Any], counts: torch.Tensor) -> None:
        super().__init__(config, counts)
        self.num_negatives: int = config["num_negatives"]
        self.sharing: str = config["negative_sharing"]
        self.logq_correction: bool = config["logq_correction"]
        self.sampler = (
            ops.Uniform()
            if config["negative_distribution"] == "uniform"
            else ops.Popularity(counts, alpha=config["negative_alpha"])
        )


class CE(Loss):
    """Full cross-entropy with all logits in memory, as RecBole's own head; the padding item is no candidate."""

    def forward(self, hidden: torch.Tensor, target: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        hidden = of_targets(hidden, target)
        with self.precision(hidden.device):
            logits = hidden.to(weight.dtype) @ weight[1:].T
        loss = F.cross_entropy(at_least_float32(logits), target - 1, ignore_index=-1, reduction="sum")
        return loss / (target != 0).sum().clamp(min=1)


class CCE(Loss):
    """Full cross-entropy, exact, without the logits: ops.linear_cross_entropy."""

    def forward(self, hidden: torch.Tensor, target: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        with self.precision(hidden.device):
            return ops.linear_cross_entropy(hidden, weight, target, backend=self.backend)


class CCEMinus(SampledLoss):
    """Cross-entropy with negative sampling (arXiv 2509.09682): ops.sampled_cross_entropy."""

    def forward(self, hidden: torch.Tensor, target: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        with self.precision(hidden.device):
            return ops.sampled_cross_entropy(
                hidden,
                weight,
                target,
                num_negatives=self.num_negatives,
                sampler=self.sampler,
                sharing=self.sharing,
                logq_correction=self.logq_correction,
                backend=self.backend,
            )


class CEMinus(SampledLoss):
    """The same number as CCE-, with the rows of all negatives in memory [N, K, D]: the paper's baseline."""

    def forward(self, hidden: torch.Tensor, target: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
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
        return torch.where(valid, loss, 0).sum() / valid.sum().clamp(min=1)


ITEMS_IN_BUCKET = 1024  # four times the op's default: hard items are missed less often (docs/study.md)


class SCE(Loss):
    """Scalable cross-entropy over random-projection buckets (arXiv 2409.18721): ops.scalable_cross_entropy.

    `auto` counts the rows it is given, which is known without waiting for the device: the model passes few rows without
    a target, or, in a step of fixed size, places for as many as a batch can have.
    """

    def __init__(self, config: Mapping[str, Any], counts: torch.Tensor) -> None:
        super().__init__(config, counts)
        self.n_buckets: int | str = config["n_buckets"]
        self.bucket_size_x: int | str = config["bucket_size_x"]
        self.bucket_size_y: int = ITEMS_IN_BUCKET if config["bucket_size_y"] == "auto" else config["bucket_size_y"]
        self.mix_x: bool = config["mix_x"]
        # positions in a bucket, and positions, since the last call of statistics(); read once an epoch
        self.register_buffer("seen", torch.zeros(2, dtype=torch.int64), persistent=False)

    def forward(self, hidden: torch.Tensor, target: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        n_buckets, bucket_size_x = (
            max(1, auto_size(len(target))) if size == "auto" else size for size in (self.n_buckets, self.bucket_size_x)
        )
        with self.precision(hidden.device):
            loss, covered = ops.scalable_cross_entropy(
                hidden,
                weight,
                target,
                n_buckets=n_buckets,
                bucket_size_x=bucket_size_x,
                bucket_size_y=self.bucket_size_y,
                mix_x=self.mix_x,
                return_coverage=True,
                backend=self.backend,
            )
        self.seen += torch.stack([covered.sum(), (target != 0).sum()])
        return loss

    def statistics(self) -> dict[str, float]:
        """`coverage`: share of the positions that were in at least one bucket."""
        covered, positions = self.seen.tolist()
        self.seen.zero_()
        return {"coverage": covered / max(positions, 1)}


class BCE(SampledLoss):
    """Binary cross-entropy of SASRec with K negatives: ops.sampled_binary_cross_entropy."""

    positive_weight = 1.0

    def forward(self, hidden: torch.Tensor, target: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        with self.precision(hidden.device):
            return ops.sampled_binary_cross_entropy(
                hidden,
                weight,
                target,
                num_negatives=self.num_negatives,
                positive_weight=self.positive_weight,
                sampler=self.sampler,
                sharing=self.sharing,
                backend=self.backend,
            )


class GBCE(BCE):
    """Generalised binary cross-entropy of gSASRec (Petrov & Macdonald, RecSys 2023): BCE, its positive weighed."""

    def __init__(self, config: Mapping[str, Any], counts: torch.Tensor) -> None:
        super().__init__(config, counts)
        self.positive_weight = gbce_beta(self.num_negatives, len(counts), config["gbce_t"])


LOSSES: dict[str, type[Loss]] = {
    "CE": CE,
    "CCE": CCE,
    "CCE-": CCEMinus,
    "CE-": CEMinus,
    "SCE": SCE,
    "BCE": BCE,
    "gBCE": GBCE,
}


def of_targets(hidden: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Zero for [N, D] hidden states whose target is the padding item: what they hold reaches no gradient."""
    return hidden.masked_fill((target == 0)[:, None], 0)


def at_least_float32(logits: torch.Tensor) -> torch.Tensor:
    """Logits in fp32, where a product under autocast or of 16-bit inputs is not."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
