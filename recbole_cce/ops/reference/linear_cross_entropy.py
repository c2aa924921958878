"""Full cross-entropy in chunks of rows x items, with an online log-sum-exp."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from recbole_cce.ops import reference


def linear_cross_entropy(
    input: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, padding_idx: int | None
) -> torch.Tensor:
    """[N] losses, zero where target == padding_idx; see ops.linear_cross_entropy."""
    return LinearCrossEntropy.apply(input, weight, target, padding_idx, reference.autocast_rounding(input, weight))


class LinearCrossEntropy(torch.autograd.Function):
    """Saves the log-sum-exp of each row and computes the logits again for the gradients."""

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
        lse = torch.empty(len(input), dtype=dtype, device=input.device)
        loss = torch.empty_like(lse)
        with torch.autocast(input.device.type, enabled=False):
            for rows in row_chunks(len(input), len(weight)):
                hidden = reference.read(input[rows], rounding, dtype)
                total = hidden.new_full((len(hidden),), -torch.inf)
                for items in item_chunks(len(input), len(weight)):
                    logits = hidden @ reference.read(weight[items], rounding, dtype).T
                    mask_padding(logits, items, padding_idx)
                    total = torch.logaddexp(total, logits.logsumexp(1))
                positive = (hidden * reference.read(weight[target[rows]], rounding, dtype)).sum(1)
                lse[rows], loss[rows] = total, total - positive
            if padding_idx is not None:
                loss.masked_fill_(target == padding_idx, 0)
        ctx.save_for_backward(input, weight, target, lse)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple:
        input, weight, target, lse = ctx.saved_tensors
        dtype = lse.dtype
        if ctx.padding_idx is not None:
            grad = grad.masked_fill(target == ctx.padding_idx, 0)
        grad_input = torch.zeros(input.shape, dtype=dtype, device=input.device)
        grad_weight = torch.zeros(weight.shape, dtype=dtype, device=weight.device)
        with torch.autocast(input.device.type, enabled=False):
            for rows in row_chunks(len(input), len(weight)):
                hidden, scale = reference.read(input[rows], ctx.rounding, dtype), grad[rows, None].to(dtype)
                for items in item_chunks(len(input), len(weight)):
                    vectors = reference.read(weight[items], ctx.rounding, dtype)
                    logits = hidden @ vectors.T
                    mask_padding(logits, items, ctx.padding_idx)
                    softmax = logits.sub_(lse[rows, None]).exp_().mul_(scale)
                    grad_input[rows] += softmax @ vectors
                    grad_weight[items] += softmax.T @ hidden
                grad_input[rows] -= scale * reference.read(weight[target[rows]], ctx.rounding, dtype)
                grad_weight.index_add_(0, target[rows], -scale * hidden)
        return grad_input.to(input.dtype), grad_weight.to(weight.dtype), None, None, None


def chunk_sizes(n: int, num_rows: int) -> tuple[int, int]:
    """Rows and items of a chunk of logits: as square as it must be, all items if they fit beside 1024 rows."""
    rows = max(1, min(n, 1024, reference.CHUNK_ELEMENTS))
    items = max(1, min(num_rows, reference.CHUNK_ELEMENTS // rows))
    return max(1, min(n, reference.CHUNK_ELEMENTS // items)), items


def row_chunks(n: int, num_rows: int) -> Iterator[slice]:
    """Slices of the positions."""
    size = chunk_sizes(n, num_rows)[0]
    return (slice(start, min(start + size, n)) for start in range(0, n, size))


def item_chunks(n: int, num_rows: int) -> Iterator[slice]:
    """Slices of the item table."""
    size = chunk_sizes(n, num_rows)[1]
    return (slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size))


def mask_padding(logits: torch.Tensor, items: slice, padding_idx: int | None) -> None:
    """Take the padding row out of the candidates."""
    if padding_idx is not None and items.start <= padding_idx < items.stop:
        logits[:, padding_idx - items.start] = -torch.inf
