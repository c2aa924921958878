"""SCE: bucket selection, the loss of each bucket's positions, and the largest loss of each position."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

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
    with torch.autocast(input.device.type, enabled=False):
        dtype = reference.math_dtype(input, weight)
        directions = random_directions(input.to(dtype), n_buckets, mix_x, generator)
        positions = top_rows(directions, input, bucket_size_x, None)
        items = top_rows(directions, weight, bucket_size_y, padding_idx)
    return positions, items


def random_directions(
    input: torch.Tensor, n_buckets: int, mix_x: bool, generator: torch.Generator | None
) -> torch.Tensor:
    """[B, D] bucket centres."""
    options = {"generator": generator, "dtype": input.dtype, "device": input.device}
    if not mix_x:
        return torch.randn(n_buckets, input.size(1), **options)
    directions = input.new_zeros(n_buckets, input.size(1))
    for rows in input.split(max(1, reference.CHUNK_ELEMENTS // n_buckets)):
        directions += torch.randn(n_buckets, len(rows), **options) @ rows
    return directions


def top_rows(directions: torch.Tensor, table: torch.Tensor, k: int, excluded: int | None) -> torch.Tensor:
    """[B, k] the rows of `table` with the largest inner product with each direction, in no particular order."""
    table = table.to(directions.dtype)
    chosen = []
    for some in directions.split(max(1, reference.CHUNK_ELEMENTS // len(table))):
        scores = some @ table.T
        if excluded is not None:
            scores[:, excluded] = -torch.inf
        chosen.append(scores.topk(k, dim=1, sorted=False).indices)
    return torch.cat(chosen)


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
    """Saves for each position its log-sum-exp and the bucket that won; only that pair carries gradient."""

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
        lse = torch.zeros(n, dtype=dtype, device=input.device)
        loss = torch.full_like(lse, -torch.inf)
        winner = torch.full((n,), n_buckets, device=input.device)
        with torch.autocast(input.device.type, enabled=False):
            for bucket, position in chunks(positions, items, input.size(1)):
                scores, own, _, _ = bucket_logits(input, weight, target, position, items[bucket], rounding, dtype)
                total = torch.logaddexp(scores.logsumexp(2), own)
                position, total, value = position.flatten(), total.flatten(), (total - own).flatten()
                before = loss.clone()
                loss.scatter_reduce_(0, position, value, "amax")
                best = (value == loss[position]) & (value > before[position])  # an earlier bucket wins a tie
                number = bucket[:, None].expand(-1, len(position) // len(bucket)).flatten()
                winner.masked_fill_(loss > before, n_buckets)
                winner.scatter_reduce_(0, position[best], number[best], "amin")
                won = best & (winner[position] == number)
                lse[position[won]] = total[won]
        covered = winner < n_buckets
        loss.masked_fill_(~covered, 0)
        ctx.rounding = rounding
        ctx.save_for_backward(input, weight, target, positions, items, lse, winner)
        ctx.mark_non_differentiable(covered)
        return loss, covered

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, _: Any) -> tuple:
        input, weight, target, positions, items, lse, winner = ctx.saved_tensors
        dtype = lse.dtype
        grad_input = torch.zeros(input.shape, dtype=dtype, device=input.device)
        grad_weight = torch.zeros(weight.shape, dtype=dtype, device=weight.device)
        with torch.autocast(input.device.type, enabled=False):
            for bucket, position in chunks(positions, items, input.size(1)):
                scores, own, hidden, vectors = bucket_logits(
                    input, weight, target, position, items[bucket], ctx.rounding, dtype
                )
                # losers get 0; their log-sum-exp is that of another bucket, so clamp what could overflow
                scale = torch.where(winner[position] == bucket[:, None], grad[position].to(dtype), 0)
                total = lse[position]
                softmax = (scores - total[:, :, None]).clamp_(max=0).exp_().mul_(scale[:, :, None])
                slope = ((own - total).exp() - 1) * scale
                to_own = slope[:, :, None] * reference.read(weight[target[position]], ctx.rounding, dtype)
                grad_input.index_add_(0, position.flatten(), (softmax @ vectors + to_own).flatten(0, 1))
                to_items = softmax.transpose(1, 2) @ hidden
                grad_weight.index_add_(0, items[bucket].flatten(), to_items.flatten(0, 1))
                grad_weight.index_add_(0, target[position].flatten(), (slope[:, :, None] * hidden).flatten(0, 1))
        return grad_input.to(input.dtype), grad_weight.to(weight.dtype), None, None, None, None


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
