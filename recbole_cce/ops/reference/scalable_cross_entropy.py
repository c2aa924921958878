"""SCE: bucket selection, the loss of each bucket's positions, and the largest loss of each position."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.nn import functional as F

from recbole_cce.ops import checks, reference
from recbole_cce.ops.derivatives import first_derivative


@torch.no_grad()
def select_buckets(
    input: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    n_buckets: int,
    bucket_size_x: int,
    bucket_size_y: int,
    mix_x: bool,
    padding_idx: int | None,
    generator: torch.Generator | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The positions and items nearest to random directions (SCE paper, section 3).

    Args:
        input: [N, D] hidden states.
        weight: [V+1, D] item table.
        target: [N]; positions whose target is padding_idx are in no bucket.
        n_buckets, bucket_size_x, bucket_size_y: B, X <= N and Y <= V.
        mix_x: directions are Gaussian combinations of the hidden states instead of Gaussian vectors.
        padding_idx: row that is no item, or None.
        generator: source of the directions; the device's default if None.

    Returns:
        positions [B, X] and items [B, Y], int64; -1 where there are not enough positions.
    """
    rounding = reference.autocast_rounding(input, weight)
    directions = random_directions(input, weight, target, n_buckets, mix_x, padding_idx, generator)
    positions = top_rows(directions, input, bucket_size_x, checks.counted(target, padding_idx), rounding)
    rows = torch.arange(len(weight), device=weight.device)
    return positions, top_rows(directions, weight, bucket_size_y, checks.counted(rows, padding_idx), rounding)


@torch.no_grad()
def random_directions(
    input: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    n_buckets: int,
    mix_x: bool,
    padding_idx: int | None,
    generator: torch.Generator | None,
) -> torch.Tensor:
    """[B, D] bucket centres, fp32 (fp64 for fp64) numbers of as many digits as those that they are multiplied with."""
    rounding, dtype = reference.autocast_rounding(input, weight), reference.math_dtype(input, weight)
    options: dict[str, Any] = {"generator": generator, "dtype": dtype, "device": input.device}
    with torch.autocast(input.device.type, enabled=False):
        if mix_x:
            directions = torch.zeros(n_buckets, input.size(1), dtype=dtype, device=input.device)
            size = max(1, reference.CHUNK_ELEMENTS // max(1, n_buckets, input.size(1)))
            counted = checks.counted(target, padding_idx)
            for hidden, mask in zip(input.split(size), counted.split(size), strict=True):
                hidden = reference.read(hidden, rounding, dtype).masked_fill(~mask[:, None], 0)
                directions += torch.randn(n_buckets, len(hidden), **options) @ hidden
            directions = F.normalize(directions, dim=1)  # fp16 could not hold sums over all positions
        else:
            directions = torch.randn(n_buckets, input.size(1), **options)
        return reference.read(directions, rounding or torch.promote_types(input.dtype, weight.dtype), dtype)


def top_rows(
    directions: torch.Tensor, table: torch.Tensor, k: int, candidates: torch.Tensor, rounding: torch.dtype | None
) -> torch.Tensor:
    """[B, k] the rows of `table` with the largest inner product with each direction, in no particular order.

    Only of `candidates` [rows] bool; -1 stands for what is missing then. Chunks of the table, and the best k so far:
    neither all scores nor a copy of the table is in memory.
    """
    n_buckets, dim = directions.shape
    # not below k rows: the result [B, k] is there anyway, and smaller chunks would only merge more often
    size = max(1, k, min(len(table), reference.CHUNK_ELEMENTS // max(1, n_buckets, dim)))
    best = directions.new_empty(n_buckets, 0)
    chosen = torch.empty(n_buckets, 0, dtype=torch.int64, device=table.device)
    for start in range(0, len(table), size):
        part = slice(start, start + size)
        with torch.autocast(table.device.type, enabled=False):
            scores = directions @ reference.read(table[part], rounding, directions.dtype).T
        scores.masked_fill_(~candidates[part], -torch.inf)
        top = scores.topk(min(k, scores.size(1)), dim=1, sorted=False)
        best, chosen = torch.cat([best, top.values], dim=1), torch.cat([chosen, top.indices + start], dim=1)
        if best.size(1) > k:
            best, index = best.topk(k, dim=1, sorted=False)
            chosen = chosen.gather(1, index)
    return chosen.masked_fill(best == -torch.inf, -1)


def bucket_cross_entropy(
    input: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, positions: torch.Tensor, items: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest loss of each position over the buckets that hold it.

    Args:
        input, weight, target: [N, D], [V+1, D], [N].
        positions: [B, X] positions in each bucket, each at most once in a bucket; -1 is none.
        items: [B, Y] items in each bucket; -1 is none.

    Returns:
        loss [N], 0 at positions in no bucket, and covered [N] bool.
    """
    return BucketCrossEntropy.apply(input, weight, target, positions, items, reference.autocast_rounding(input, weight))


class BucketCrossEntropy(torch.autograd.Function):
    """Saves for each position its softmax denominator and the bucket that won; only that pair carries gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        input: torch.Tensor,
        weight: torch.Tensor,
        target: torch.Tensor,
        positions: torch.Tensor,
        items: torch.Tensor,
        rounding: torch.dtype | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        dtype = reference.math_dtype(input, weight)
        n, n_buckets = len(input), len(positions)
        largest, total = torch.zeros(2, n + 1, dtype=dtype, device=input.device)  # the last is of those that do not win
        loss = torch.full((n,), -torch.inf, dtype=dtype, device=input.device)
        winner = torch.full((n,), n_buckets, device=input.device)
        with torch.autocast(input.device.type, enabled=False):
            for bucket, position in chunks(positions, items, input.size(1)):
                scores, target_logit, *_ = bucket_logits(
                    input, weight, target, position, items[bucket], rounding, dtype
                )
                top, mass = reference.add_logits(target_logit, torch.ones_like(target_logit), scores)
                value = (mass.log() + (top - target_logit)).masked_fill(position < 0, -torch.inf).flatten()
                number = bucket[:, None].expand_as(position).flatten()
                position = position.clamp(min=0).flatten()
                before = loss.clone()
                loss.scatter_reduce_(0, position, value, "amax")
                best = (value == loss[position]) & (value > before[position])  # an earlier bucket wins a tie
                winner.masked_fill_(loss > before, n_buckets)
                winner.scatter_reduce_(0, position, number.where(best, n_buckets), "amin")
                slot = position.where(best & (winner[position] == number), n)
                largest.scatter_(0, slot, top.flatten()), total.scatter_(0, slot, mass.flatten())
        covered = (winner < n_buckets) | loss.isnan()  # NaN equals nothing, so that it has no winner
        loss.masked_fill_(~covered, 0)
        ctx.rounding = rounding
        ctx.save_for_backward(input, weight, target, positions, items, largest, total, winner)
        ctx.mark_non_differentiable(covered)
        return loss, covered

    @staticmethod
    @first_derivative
    def backward(ctx: Any, grad: torch.Tensor, _: Any) -> tuple:
        input, weight, target, positions, items, largest, total, winner = ctx.saved_tensors
        input_needed, weight_needed = ctx.needs_input_grad[:2]
        dtype = total.dtype
        grad_input = torch.zeros(input.shape, dtype=dtype, device=input.device) if input_needed else None
        grad_weight = torch.zeros(weight.shape, dtype=dtype, device=weight.device) if weight_needed else None
        with torch.autocast(input.device.type, enabled=False):
            for bucket, position in chunks(positions, items, input.size(1)):
                scores, target_logit, hidden, vectors, targets = bucket_logits(
                    input, weight, target, position, items[bucket], ctx.rounding, dtype
                )
                # losers get 0, and a denominator that is one of theirs, so that nothing overflows
                won = (winner[position] == bucket[:, None]) & (position >= 0)
                position = position.clamp(min=0)
                scale = grad[position].to(dtype).where(won, 0)
                top, mass = largest[position].where(won, target_logit), total[position].where(won, 1)
                softmax = scores.sub_(top[:, :, None]).clamp_(max=0).exp_().mul_((scale / mass)[:, :, None])
                slope = ((target_logit - top - mass.log()).expm1() * scale)[:, :, None]
                target_item = target[position]
                if grad_input is not None:
                    grad_input.index_add_(0, position.flatten(), (softmax @ vectors + slope * targets).flatten(0, 1))
                if grad_weight is not None:
                    to_items = softmax.transpose(1, 2) @ hidden
                    grad_weight.index_add_(0, items[bucket].clamp(min=0).flatten(), to_items.flatten(0, 1))
                    grad_weight.index_add_(0, target_item.flatten(), (slope * hidden).flatten(0, 1))
        return reference.cast(grad_input, input), reference.cast(grad_weight, weight), None, None, None, None


def chunks(positions: torch.Tensor, items: torch.Tensor, dim: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Numbers of some buckets [b] and some of their positions [b, x], within CHUNK_ELEMENTS."""
    n_items = items.size(1)
    x = max(1, min(positions.size(1), reference.CHUNK_ELEMENTS // max(n_items, dim)))
    b = max(1, reference.CHUNK_ELEMENTS // max(x * n_items, x * dim, n_items * dim))
    for bucket in torch.arange(len(positions), device=positions.device).split(b):
        for position in positions[bucket].split(x, dim=1):
            yield bucket, position


def bucket_logits(
    input: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    position: torch.Tensor,
    item: torch.Tensor,
    rounding: torch.dtype | None,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of b buckets: logits [b, X, Y], -inf at the targets and -1; those of the targets [b, X]; hidden states, and
    vectors of the items and of the targets, zero at -1."""

    def gather(matrix: torch.Tensor, rows: torch.Tensor, none: torch.Tensor) -> torch.Tensor:
        return reference.without(reference.read(matrix[rows], rounding, dtype), none)

    target_item = target[position.clamp(min=0)]
    hidden = gather(input, position.clamp(min=0), position < 0)
    targets = gather(weight, target_item, position < 0)
    vectors = gather(weight, item.clamp(min=0), item < 0)
    scores = hidden @ vectors.transpose(1, 2)
    scores.masked_fill_((item[:, None, :] == target_item[:, :, None]) | (item < 0)[:, None, :], -torch.inf)
    return scores, (hidden * targets).sum(2), hidden, vectors, targets
