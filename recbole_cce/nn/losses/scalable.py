"""Cross-entropy in buckets of hard items."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from recbole_cce import ops
from recbole_cce.keys import Key, flag, integer
from recbole_cce.nn.losses.base import Buffers, Loss
from recbole_cce.nn.losses.loss_sum import LossSum
from recbole_cce.nn.losses.registry import register_loss
from recbole_cce.ops.scalable_cross_entropy import auto_size

ITEMS_IN_BUCKET = 1024  # four times the op's default: hard items are missed less often (docs/study.md)


@register_loss("SCE")
class SCE(Loss):
    """Scalable cross-entropy over random-projection buckets (arXiv 2409.18721): ops.scalable_cross_entropy.

    `auto` counts the rows it is given, which is known without waiting for the device: the model passes few rows without
    a target, or, in a step of fixed size, as many as a batch can have. Its mean is over the positions that were in a
    bucket; `coverage` is their share of all positions that have a target.
    """

    counts_targets = False

    keys: ClassVar[Mapping[str, Key]] = {
        **Loss.keys,
        "n_buckets": Key("auto", integer(1, auto=True), "number of buckets; auto: int(2 sqrt(positions))"),
        "bucket_size_x": Key("auto", integer(1, auto=True), "positions per bucket; auto: n_buckets' rule"),
        "bucket_size_y": Key("auto", integer(1, auto=True), f"items per bucket; auto: {ITEMS_IN_BUCKET:,}"),
        "mix_x": Key(False, flag(), "bucket centres as random mixtures of hidden states"),
    }

    @classmethod
    def holds(cls, config: Mapping[str, Any], positions: int, items: int, width: int) -> Buffers:
        """Keys of the selection, 64 MiB at most; the table in 16 bits, if buckets take as many rows; the buckets'
        positions and items; loss, target logit, best bucket and target of each position; the positions that won in each
        bucket."""
        buckets, size_x = (sized(config[key], positions) for key in ("n_buckets", "bucket_size_x"))
        size_x, size_y = min(size_x, positions), min(items_in_bucket(config), items)
        selection = min(8 * buckets * max(4096, 4 * size_x, 4 * size_y), 2**26)
        table = 2 * width * (items + 1) if buckets * size_y > items else 0
        slots = 4 * buckets * size_x
        return Buffers(forward=selection, kept=table + slots + 4 * buckets * size_y + 24 * positions, backward=slots)

    def __init__(self, config: Mapping[str, Any], counts: torch.Tensor) -> None:
        super().__init__(config, counts)
        self.n_buckets: int | str = config["n_buckets"]
        self.bucket_size_x: int | str = config["bucket_size_x"]
        self.bucket_size_y = items_in_bucket(config)
        self.mix_x: bool = config["mix_x"]

    def forward(self, hidden: torch.Tensor, target: torch.Tensor, weight: torch.Tensor) -> LossSum:
        n_buckets, bucket_size_x = (sized(size, len(target)) for size in (self.n_buckets, self.bucket_size_x))
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


def sized(size: int | str, positions: int) -> int:
    """What n_buckets or bucket_size_x is for so many positions."""
    return max(1, auto_size(positions)) if isinstance(size, str) else size


def items_in_bucket(config: Mapping[str, Any]) -> int:
    """What bucket_size_y is."""
    return ITEMS_IN_BUCKET if config["bucket_size_y"] == "auto" else config["bucket_size_y"]
