"""Cross-entropy over sampled negatives, in chunks of groups x positions x negatives.

Position i shares the negatives of group i mod G, so the positions are seen as a matrix [M, G], M = ceil(N / G): all
logits of a chunk are one batched product [G, M, D] x [G, K, D].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from recbole_cce.ops import negatives, reference
from recbole_cce.ops.derivatives import first_derivative


@dataclass(frozen=True)
class Draws:
    """Which negatives the positions see: everything but the inputs."""

    sampler: negatives.Uniform | negatives.Popularity
    seed: int | torch.Tensor
    num_negatives: int
    sharing: str
    logq_correction: bool
    padding_idx: int | None
    rounding: torch.dtype | None


@dataclass(frozen=True)
class Chunk:
    """Some positions of some groups. Groups differ by one in size: slots past the end hold a group's first position.

    So they see finite numbers, and weigh nothing. Results go to `slots`, which are all different, in buffers that
    are longer than N: no choice by a mask, for which a GPU would have to wait.
    """

    drawn: torch.Tensor  # [G, K] rows of the negatives
    slots: torch.Tensor  # [G, M] rows of the result; N and more past the end
    target: torch.Tensor  # [G, M]
    ignored: torch.Tensor | None  # [G, M] bool, None where no position can be
    hidden: torch.Tensor  # [G, M, D], zero where ignored


def chunks(
    input: torch.Tensor, target: torch.Tensor, draws: Draws, num_rows: int, dtype: torch.dtype
) -> Iterator[Chunk]:
    """All positions, in chunks whose products with a chunk of negatives stay below CHUNK_ELEMENTS."""
    n, dim = input.shape
    total = negatives.num_groups(n, draws.sharing)
    depth = -(-n // total)
    k = negatives_per_chunk(draws.num_negatives, dim)
    positions = max(1, min(depth, reference.CHUNK_ELEMENTS // max(k, dim)))
    groups = max(1, reference.CHUNK_ELEMENTS // max(positions * max(k, dim), k * dim))
    # a draw is a hundred operations, however few numbers it draws, which are int64
    at_once = groups * max(1, reference.CHUNK_ELEMENTS // 8 // (groups * draws.num_negatives))
    numbers = torch.arange(total, device=input.device)
    slots = torch.arange(total * depth, device=input.device).view(depth, total).T
    rows = slots.where(slots < n, numbers[:, None])
    for block_numbers, *block in split((numbers, slots, rows, target[rows]), at_once):
        drawn = negatives.draw_negatives(
            draws.sampler, draws.seed, block_numbers, draws.num_negatives, num_rows, draws.padding_idx
        )
        for group_drawn, *group in split((drawn, *block), groups):
            for chunk_slots, chunk_rows, chunk_target in split(group, positions, dim=1):
                ignored = None if draws.padding_idx is None else chunk_target == draws.padding_idx
                hidden = reference.without(reference.read(input[chunk_rows], draws.rounding, dtype), ignored)
                yield Chunk(group_drawn, chunk_slots, chunk_target, ignored, hidden)


def split(tensors: Sequence[torch.Tensor], size: int, dim: int = 0) -> Iterator[tuple[torch.Tensor, ...]]:
    """The same parts of each."""
    return zip(*(tensor.split(size, dim) for tensor in tensors), strict=True)


def num_slots(n: int, draws: Draws) -> int:
    """N, up to whole rounds over the groups."""
    total = negatives.num_groups(n, draws.sharing)
    return -(-n // total) * total


def negatives_per_chunk(num_negatives: int, dim: int) -> int:
    """Negatives of one group whose vectors are in memory at a time."""
    return max(1, min(num_negatives, reference.CHUNK_ELEMENTS // dim))


def logits(
    chunk: Chunk, weight: torch.Tensor, draws: Draws
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Rows [G, k] of negatives, their vectors [G, k, D] and corrected logits [G, M, k], some negatives at a time.

    A negative that is the position's target has logit -inf.
    """
    size = negatives_per_chunk(draws.num_negatives, weight.size(1))
    num_items = len(weight) - (draws.padding_idx is not None)
    for drawn in chunk.drawn.split(size, dim=1):
        vectors = reference.read(weight[drawn], draws.rounding, chunk.hidden.dtype)
        scores = torch.bmm(chunk.hidden, vectors.transpose(1, 2))
        if draws.logq_correction:
            log_q = draws.sampler.log_q(negatives.to_items(drawn, draws.padding_idx), num_items)
            scores -= (log_q + math.log(draws.num_negatives))[:, None, :]
        yield drawn, vectors, scores.masked_fill_(drawn[:, None, :] == chunk.target[:, :, None], -torch.inf)


def counted_logits(
    chunk: Chunk, weight: torch.Tensor, draws: Draws
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """As logits(), with each item once: exp(logit) is what all of its draws weigh together, 0 where it has none.

    The same sum in fewer terms where there are more draws than items.
    """
    size = negatives_per_chunk(draws.num_negatives, weight.size(1))
    num_items = len(weight) - (draws.padding_idx is not None)
    groups = len(chunk.drawn)
    cells = chunk.drawn + torch.arange(groups, device=weight.device)[:, None] * len(weight)
    counts = torch.zeros(groups * len(weight), dtype=chunk.hidden.dtype, device=weight.device)
    counts = counts.index_add_(0, cells.flatten(), counts.new_ones(()).expand(cells.numel())).view(groups, -1)
    for items in torch.arange(num_items, device=weight.device).split(size):
        rows = negatives.to_rows(items, draws.padding_idx)
        vectors = reference.read(weight[rows], draws.rounding, chunk.hidden.dtype).expand(groups, -1, -1)
        offset = counts[:, rows].log()
        if draws.logq_correction:
            offset -= draws.sampler.log_q(items, num_items) + math.log(draws.num_negatives)
        scores = torch.baddbmm(offset[:, None, :], chunk.hidden, vectors.transpose(1, 2))
        column = negatives.to_items(chunk.target, draws.padding_idx) - items[0]
        inside = (column >= 0) & (column < len(items))
        column = column.where(inside, 0)[:, :, None]
        scores.scatter_(2, column, scores.gather(2, column).masked_fill_(inside[:, :, None], -torch.inf))
        yield rows.expand(groups, -1), vectors, scores


def softmax_logits(
    chunk: Chunk, weight: torch.Tensor, draws: Draws
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """The shorter of the two ways through the negatives of a softmax."""
    terms = counted_logits if draws.num_negatives > len(weight) else logits
    return terms(chunk, weight, draws)


def sampled_cross_entropy(
    input: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, draws: Draws
) -> torch.Tensor:
    """[N] losses, zero where target == padding_idx; see ops.sampled_cross_entropy."""
    return SampledCrossEntropy.apply(input, weight, target, draws)


class SampledCrossEntropy(torch.autograd.Function):
    """Saves each position's softmax denominator; the gradients draw the negatives and compute the logits again."""

    @staticmethod
    def forward(
        ctx: Any, input: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, draws: Draws
    ) -> torch.Tensor:
        dtype = reference.math_dtype(input, weight)
        largest = torch.empty(num_slots(len(input), draws), dtype=dtype, device=input.device)
        total, loss = torch.empty_like(largest), torch.empty_like(largest)
        with torch.autocast(input.device.type, enabled=False):
            for chunk in chunks(input, target, draws, len(weight), dtype):
                positive = positives(chunk, weight, draws)[1]
                top, mass = positive, torch.ones_like(positive)
                for _, _, scores in softmax_logits(chunk, weight, draws):
                    top, mass = reference.add_logits(top, mass, scores)
                largest[chunk.slots], total[chunk.slots] = top, mass
                loss[chunk.slots] = mass.log() + (top - positive)
            loss = loss[: len(input)]
            if draws.padding_idx is not None:
                loss.masked_fill_(target == draws.padding_idx, 0)
        ctx.draws = draws
        ctx.save_for_backward(input, weight, target, largest, total)
        return loss

    @staticmethod
    @first_derivative
    def backward(ctx: Any, grad: torch.Tensor) -> tuple:
        input, weight, target, largest, total = ctx.saved_tensors

        def slopes(chunk: Chunk, scores: torch.Tensor, of_positive: bool) -> torch.Tensor:
            """d loss / d logit: softmax, minus one for the positive."""
            top, mass = largest[chunk.slots], total[chunk.slots]
            if of_positive:
                return (scores - top - mass.log()).expm1()
            return scores.sub_(top[:, :, None]).exp_().div_(mass[:, :, None])

        needed = ctx.needs_input_grad
        return *gradients(needed, input, weight, target, ctx.draws, grad, softmax_logits, slopes), None, None


def positives(chunk: Chunk, weight: torch.Tensor, draws: Draws) -> tuple[torch.Tensor, torch.Tensor]:
    """Vectors [G, M, D] and logits [G, M] of each position's target, zero where it is ignored."""
    vectors = reference.read(weight[chunk.target], draws.rounding, chunk.hidden.dtype)
    vectors = reference.without(vectors, chunk.ignored)
    return vectors, (chunk.hidden * vectors).sum(2)


def gradients(
    needed: tuple[bool, ...],
    input: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    draws: Draws,
    grad: torch.Tensor,
    terms: Callable[..., Iterator[tuple[torch.Tensor, ...]]],
    slopes: Callable[..., torch.Tensor],
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Gradients of input and weight, given `terms`, which goes through the negatives, and `slopes`: d loss / d
    logit of the positive or of a chunk of negatives, in a tensor of its own."""
    dtype = reference.math_dtype(input, weight)
    if draws.padding_idx is not None:
        grad = grad.masked_fill(target == draws.padding_idx, 0)
    slots = num_slots(len(input), draws)
    grad = F.pad(grad.to(dtype), (0, slots - len(input)))
    grad_input = torch.empty(slots, input.size(1), dtype=dtype, device=input.device) if needed[0] else None
    grad_weight = torch.zeros(weight.shape, dtype=dtype, device=weight.device) if needed[1] else None
    with torch.autocast(input.device.type, enabled=False):
        for chunk in chunks(input, target, draws, len(weight), dtype):
            scale = grad[chunk.slots][:, :, None]
            vectors, positive = positives(chunk, weight, draws)
            positive_slope = slopes(chunk, positive, True)[:, :, None] * scale
            direction = vectors.mul_(positive_slope)
            for drawn, vectors, scores in terms(chunk, weight, draws):
                slope = slopes(chunk, scores, False).mul_(scale)
                if needed[0]:
                    direction.baddbmm_(slope, vectors)
                if grad_weight is not None:
                    slope = slope.transpose(1, 2)
                    grad_weight.index_add_(0, drawn.flatten(), torch.bmm(slope, chunk.hidden).flatten(0, 1))
            if grad_input is not None:
                grad_input[chunk.slots] = direction
            if grad_weight is not None:  # the large terms last: the many small ones would be rounded to their size
                grad_weight.index_add_(0, chunk.target.flatten(), (positive_slope * chunk.hidden).flatten(0, 1))
    grad_input = None if grad_input is None else grad_input[: len(input)]
    return reference.cast(grad_input, input), reference.cast(grad_weight, weight)


def sampled_binary_cross_entropy(
    input: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, draws: Draws, positive_weight: float
) -> torch.Tensor:
    """[N] losses, zero where target == padding_idx; see ops.sampled_binary_cross_entropy."""
    return SampledBinaryCrossEntropy.apply(input, weight, target, draws, positive_weight)


class SampledBinaryCrossEntropy(torch.autograd.Function):
    """Saves nothing but its inputs."""

    @staticmethod
    def forward(
        ctx: Any,
        input: torch.Tensor,
        weight: torch.Tensor,
        target: torch.Tensor,
        draws: Draws,
        positive_weight: float,
    ) -> torch.Tensor:
        dtype = reference.math_dtype(input, weight)
        loss = torch.empty(num_slots(len(input), draws), dtype=dtype, device=input.device)
        with torch.autocast(input.device.type, enabled=False):
            for chunk in chunks(input, target, draws, len(weight), dtype):
                total = -positive_weight * F.logsigmoid(positives(chunk, weight, draws)[1])
                for _, _, scores in logits(chunk, weight, draws):
                    total += F.softplus(scores).sum(2)
                loss[chunk.slots] = total / (draws.num_negatives + 1)
            loss = loss[: len(input)]
            if draws.padding_idx is not None:
                loss.masked_fill_(target == draws.padding_idx, 0)
        ctx.draws, ctx.positive_weight = draws, positive_weight
        ctx.save_for_backward(input, weight, target)
        return loss

    @staticmethod
    @first_derivative
    def backward(ctx: Any, grad: torch.Tensor) -> tuple:
        input, weight, target = ctx.saved_tensors

        def slopes(chunk: Chunk, scores: torch.Tensor, of_positive: bool) -> torch.Tensor:
            """d loss / d logit, before the division by K + 1."""
            return -ctx.positive_weight * (-scores).sigmoid() if of_positive else scores.sigmoid()

        grad = grad / (ctx.draws.num_negatives + 1)
        return (
            *gradients(ctx.needs_input_grad, input, weight, target, ctx.draws, grad, logits, slopes),
            None,
            None,
            None,
        )
