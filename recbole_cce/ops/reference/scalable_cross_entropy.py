"""SCE: bucket selection, the loss of each bucket's positions, and the largest loss of each position."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from recbole_cce.ops import reference


@torch.no_grad()
def select_buckets(
    input: torch.Tensor,
    weight: torch.Tensor,
    n_buckets: int,
    bucket_size_x: int,
    bucket_size_y: int,
    mix_x: bool,
    padding_idx: int | None,
    generator: torch.Generator | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The positions and items nearest to random directions (SCE paper, section 3).

    Args:
        input: [N, D] hidden states of valid positions only.
        weight: [V+1, D] item table.
        n_buckets, bucket_size_x, bucket_size_y: B, X <= N and Y <= V.
        mix_x: directions are Gaussian combinations of the hidden states instead of Gaussian vectors.
        padding_idx: row that is no item, or None.
        generator: source of the directions; the device's default if None.

    Returns:
        positions [B, X] and items [B, Y], int64.
    """
    rounding, dtype = reference.autocast_rounding(input, weight), reference.math_dtype(input, weight)
    with torch.autocast(input.device.type, enabled=False):
        directions = random_directions(input, n_buckets, mix_x, generator, rounding, dtype)
        positions = top_rows(directions, input, bucket_size_x, None, rounding)
        items = top_rows(directions, weight, bucket_size_y, padding_idx, rounding)
    return positions, items


def random_directions(
    input: torch.Tensor,
    n_buckets: int,
    mix_x: bool,
    generator: torch.Generator | None,
    rounding: torch.dtype | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """[B, D] bucket centres."""
    options = {"generator": generator, "dtype": dtype, "device": input.device}
    if not mix_x:
        return torch.randn(n_buckets, input.size(1), **options)
    directions = torch.zeros(n_buckets, input.size(1), dtype=dtype, device=input.device)
    for rows in input.split(max(1, reference.CHUNK_ELEMENTS // max(n_buckets, input.size(1)))):
        directions += torch.randn(n_buckets, len(rows), **options) @ reference.read(rows, rounding, dtype)
    return directions


def top_rows(
    directions: torch.Tensor, table: torch.Tensor, k: int, excluded: int | None, rounding: torch.dtype | None
) -> torch.Tensor:
    """[B, k] the rows of `table` with the largest inner product with each direction, in no particular order.

    Chunks of the table, and the best k so far: neither all scores nor a copy of the table is in memory.
    """
    n_buckets, dim = directions.shape
    # not below k rows: the result [B, k] is there anyway, and smaller chunks would only merge more often
    size = max(1, k, min(len(table), reference.CHUNK_ELEMENTS // max(1, n_buckets, dim)))
    best = directions.new_empty(n_buckets, 0)
    chosen = torch.empty(n_buckets, 0, dtype=torch.int64, device=table.device)
    for start in range(0, len(table), size):
        scores = directions @ reference.read(table[start : start + size], rounding, directions.dtype).T
        if excluded is not None and start <= excluded < start + size:
            scores[:, excluded - start] = -torch.inf
        top = scores.topk(min(k, scores.size(1)), dim=1, sorted=False)
        best, chosen = torch.cat([best, top.values], dim=1), torch.cat([chosen, top.indices + start], dim=1)
        if best.size(1) > k:
            best, index = best.topk(k, dim=1, sorted=False)
            chosen = chosen.gather(1, index)
    return chosen


def bucket_cross_entropy(
    input: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, positions: torch.Tensor, items: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest loss of each position over the buckets that hold it.

    Args:
        input, weight, target: [N, D], [V+1, D], [N].
        positions: [B, X] positions in each bucket, each at most once in a bucket.
        items: [B, Y] items in each bucket.

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
        largest, total = torch.zeros(2, n, dtype=dtype, device=input.device)
        loss = torch.full_like(total, -torch.inf)
        winner = torch.full((n,), n_buckets, device=input.device)
        with torch.autocast(input.device.type, enabled=False):
            for bucket, position in chunks(positions, items, input.size(1)):
                scores, own, _, _ = bucket_logits(input, weight, target, position, items[bucket], rounding, dtype)
                top, mass = reference.add_logits(own, torch.ones_like(own), scores)
                value = (mass.log() + (top - own)).flatten()
                number = bucket[:, None].expand_as(position).flatten()
                position = position.flatten()
                before = loss.clone()
                loss.scatter_reduce_(0, position, value, "amax")
                best = (value == loss[position]) & (value > before[position])  # an earlier bucket wins a tie
                winner.masked_fill_(loss > before, n_buckets)
                winner.scatter_reduce_(0, position[best], number[best], "amin")
                won = best & (winner[position] == number)
                largest[position[won]], total[position[won]] = top.flatten()[won], mass.flatten()[won]
        covered = (winner < n_buckets) | loss.isnan()  # NaN equals nothing, so that it has no winner
        loss.masked_fill_(~covered, 0)
        ctx.rounding = rounding
        ctx.save_for_backward(input, weight, target, positions, items, largest, total, winner)
        ctx.mark_non_differentiable(covered)
        return loss, covered

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor, _: Any) -> tuple:
        input, weight, target, positions, items, largest, total, winner = ctx.saved_tensors
        input_needed, weight_needed = ctx.needs_input_grad[:2]
        dtype = total.dtype
        grad_input = torch.zeros(input.shape, dtype=dtype, device=input.device) if input_needed else None
        grad_weight = torch.zeros(weight.shape, dtype=dtype, device=weight.device) if weight_needed else None
        with torch.autocast(input.device.type, enabled=False):
            for bucket, position in chunks(positions, items, input.size(1)):
                scores, own, hidden, vectors = bucket_logits(
                    input, weight, target, position, items[bucket], ctx.rounding, dtype
                )
                # losers get 0; their denominator is that of another bucket, so clamp what could overflow
                won = winner[position] == bucket[:, None]
                scale = grad[position].to(dtype).where(won, 0)
                top, mass = largest[position], total[position]
                softmax = scores.sub_(top[:, :, None]).clamp_(max=0).exp_().mul_((scale / mass)[:, :, None])
                slope = ((own - top - mass.log()).expm1() * scale)[:, :, None]
                own_item = target[position]
                if input_needed:
                    to_own = slope * reference.read(weight[own_item], ctx.rounding, dtype)
                    grad_input.index_add_(0, position.flatten(), (softmax @ vectors + to_own).flatten(0, 1))
                if weight_needed:
                    to_items = softmax.transpose(1, 2) @ hidden
                    grad_weight.index_add_(0, items[bucket].flatten(), to_items.flatten(0, 1))
                    grad_weight.index_add_(0, own_item.flatten(), (slope * hidden).flatten(0, 1))
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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of b buckets: logits [b, X, Y], -inf at own targets; own logits [b, X]; hidden states and item vectors."""
    hidden = reference.read(input[position], rounding, dtype)
    vectors = reference.read(weight[item], rounding, dtype)
    own_item = target[position]
    scores = hidden @ vectors.transpose(1, 2)
    scores.masked_fill_(item[:, None, :] == own_item[:, :, None], -torch.inf)
    own = (hidden * reference.read(weight[own_item], rounding, dtype)).sum(2)
    return scores, own, hidden, vectors
