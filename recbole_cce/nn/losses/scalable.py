"""Cross-entropy in buckets of hard items."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from recbole_cce import ops
from recbole_cce.nn.losses.base import Loss
from recbole_cce.nn.losses.loss_sum import LossSum
from recbole_cce.ops.scalable_cross_entropy import auto_size

ITEMS_IN_BUCKET = 1024  # four times the op's default: hard items are missed less often (docs/study.md)


class SCE(Loss):
    """Scalable cross-entropy over random-projection buckets (arXiv 2409.18721): ops.scalable_cross_entropy.

    `auto` counts the rows it is given, which is known without waiting for the device: the model passes few rows without
    a target, or, in a step of fixed size, as many as a batch can have. Its mean is over the positions that were in a
    bucket; `coverage` is their share of all positions that have a target.
    """

    counts_targets = False

    def __init__(self, config: Mapping[str, Any], counts: torch.Tensor) -> None:
        super().__init__(config, counts)
        self.n_buckets: int | str = config["n_buckets"]
        self.bucket_size_x: int | str = config["bucket_size_x"]
        self.bucket_size_y: int = ITEMS_IN_BUCKET if config["bucket_size_y"] == "auto" else config["bucket_size_y"]
        self.mix_x: bool = config["mix_x"]

    def forward(self, hidden: torch.Tensor, target: torch.Tensor, weight: torch.Tensor) -> LossSum:
        n_buckets, bucket_size_x = (
            max(1, auto_size(len(target))) if size == "auto" else size for size in (self.n_buckets, self.bucket_size_x)
        )
        with self.precision(hidden.device):
            mean, covered = ops.scalable_cross_entropy(
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
        count = covered.sum()
        return LossSum(mean, count, {"coverage": (count, (target != 0).sum())})
