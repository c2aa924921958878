"""The item table."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


class Lookup(torch.autograd.Function):
    """Rows of the item table, and the table itself for the loss: its gradient from both is one tensor.

    Otherwise a second one of [V+1, D] would be filled, written to and added to the first: 16 bytes a number of the
    table in each step, where Adam has to move 28.
    """

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, items: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[V+1, D] table and items [...] -> [..., D] and the table."""
        ctx.save_for_backward(items)
        ctx.set_materialize_grads(False)
        ctx.shape = weight.shape
        return F.embedding(items, weight), weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_rows: torch.Tensor, grad_table: torch.Tensor | None) -> tuple[torch.Tensor, None]:
        """The loss's gradient, which nothing else holds, with those of the rows added, but for the padding item's."""
        (items,) = ctx.saved_tensors
        if grad_table is None:
            grad_table = grad_rows.new_zeros(ctx.shape)
        of_padding = grad_table[0].clone()
        grad_table.index_add_(0, items.flatten(), grad_rows.flatten(0, -2).to(grad_table.dtype))
        grad_table[0] = of_padding
        return grad_table, None
