"""Full cross-entropy in chunks of rows x items, with an online log-sum-exp."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from recbole_cce.ops import reference
from recbole_cce.ops.derivatives import first_derivative


def linear_cross_entropy(
    input: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, padding_idx: int | None
) -> torch.Tensor:
    """[N] losses, zero where target == padding_idx; see ops.linear_cross_entropy."""
    return LinearCrossEntropy.apply(input, weight, target, padding_idx, reference.autocast_rounding(input, weight))


class LinearCrossEntropy(torch.autograd.Function):
    """Saves the softmax denominator of each row and computes the logits again for the gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        input: torch.Tensor,
        weight: torch.Tensor,
        target: torch.Tensor,
        padding_idx: int | None,
        rounding: torch.dtype | None,
    ) -> torch.Tensor:
        ctx.padding_idx, ctx.rounding = padding_idx, rounding
        dtype = reference.math_dtype(input, weight)
        largest = torch.full((len(input),), torch.finfo(dtype).min, dtype=dtype, device=input.device)
        total = torch.zeros_like(largest)
        loss = torch.empty_like(largest)
        ignored = None if padding_idx is None else target == padding_idx
        with torch.autocast(input.device.type, enabled=False):
            for rows in row_chunks(len(input), weight):
                hidden = read_hidden(input, rows, ignored, rounding, dtype)
                for items in item_chunks(len(input), weight):
                    logits = hidden @ read_items(weight, items, padding_idx, rounding, dtype).T
                    mask_padding(logits, items, padding_idx)
                    largest[rows], total[rows] = reference.add_logits(largest[rows], total[rows], logits)
                positive = (hidden * reference.read(weight[target[rows]], rounding, dtype)).sum(1)
                loss[rows] = total[rows].log() + (largest[rows] - positive)
            if ignored is not None:
                loss.masked_fill_(ignored, 0)
        ctx.save_for_backward(input, weight, target, largest, total)
        return loss

    @staticmethod
    @first_derivative
    def backward(ctx: Any, grad: torch.Tensor) -> tuple:
        input, weight, target, largest, total = ctx.saved_tensors
        input_needed, weight_needed = ctx.needs_input_grad[:2]
        dtype = total.dtype
        ignored = None if ctx.padding_idx is None else target == ctx.padding_idx
        if ignored is not None:
            grad = grad.masked_fill(ignored, 0)
        grad_input = torch.zeros(input.shape, dtype=dtype, device=input.device) if input_needed else None
        grad_weight = torch.zeros(weight.shape, dtype=dtype, device=weight.device) if weight_needed else None
        with torch.autocast(input.device.type, enabled=False):
            for rows in row_chunks(len(input), weight):
                hidden, scale = read_hidden(input, rows, ignored, ctx.rounding, dtype), grad[rows, None].to(dtype)
                for items in item_chunks(len(input), weight):
                    vectors = read_items(weight, items, ctx.padding_idx, ctx.rounding, dtype)
                    logits = hidden @ vectors.T
                    mask_padding(logits, items, ctx.padding_idx)
                    slope = logits.sub_(largest[rows, None]).exp_().div_(total[rows, None])
                    # softmax minus one at the target before the products: a peaked softmax then cancels exactly
                    column = target[rows] - items.start
                    inside = (column >= 0) & (column < items.stop - items.start)
                    column = column.where(inside, 0)[:, None]
                    slope.scatter_add_(1, column, -inside[:, None].to(dtype)).mul_(scale)
                    if grad_input is not None:
                        grad_input[rows].addmm_(slope, vectors)
                    if grad_weight is not None:
                        grad_weight[items].addmm_(slope.T, hidden)
        return reference.cast(grad_input, input), reference.cast(grad_weight, weight), None, None, None


def chunk_sizes(n: int, weight: torch.Tensor) -> tuple[int, int]:
    """Rows and items of a chunk: 1024 rows if there are, then as many items as fit, then more rows if they do."""
    num_rows, dim = weight.shape
    limit = max(1, reference.CHUNK_ELEMENTS // dim)  # of rows and of items: their vectors are in memory too
    rows = max(1, min(n, 1024, limit))
    items = max(1, min(num_rows, limit, reference.CHUNK_ELEMENTS // rows))
    return max(1, min(n, limit, reference.CHUNK_ELEMENTS // items)), items


def row_chunks(n: int, weight: torch.Tensor) -> Iterator[slice]:
    """Slices of the positions."""
    size = chunk_sizes(n, weight)[0]
    return (slice(start, min(start + size, n)) for start in range(0, n, size))


def item_chunks(n: int, weight: torch.Tensor) -> Iterator[slice]:
    """Slices of the item table."""
    size = chunk_sizes(n, weight)[1]
    return (slice(start, min(start + size, len(weight))) for start in range(0, len(weight), size))


def read_hidden(
    input: torch.Tensor, rows: slice, ignored: torch.Tensor | None, rounding: torch.dtype | None, dtype: torch.dtype
) -> torch.Tensor:
    """Hidden states of some rows, zero where they are `ignored` [N]."""
    return reference.without(reference.read(input[rows], rounding, dtype), None if ignored is None else ignored[rows])


def read_items(
    weight: torch.Tensor, items: slice, padding_idx: int | None, rounding: torch.dtype | None, dtype: torch.dtype
) -> torch.Tensor:
    """Some rows of the table, of which the padding row is zero."""
    vectors = reference.read(weight[items], rounding, dtype)
    if padding_idx is None or not items.start <= padding_idx < items.stop:
        return vectors
    return reference.without(vectors, torch.arange(items.start, items.stop, device=weight.device) == padding_idx)


def mask_padding(logits: torch.Tensor, items: slice, padding_idx: int | None) -> None:
    """Take the padding row out of the candidates."""
    if padding_idx is not None and items.start <= padding_idx < items.stop:
        logits[:, padding_idx - items.start] = -torch.inf
