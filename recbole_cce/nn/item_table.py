"""The item table: the only owner of the numbers of the catalogue, and all that is done with them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

PADDING = 0  # the row that is no item


class ItemTable(nn.Embedding):
    """A vector [D] for each of V items, and row 0 for padding: [V+1, D], trained as input and as output.

    It is an nn.Embedding, so that a state dict is that of RecBole's models.
    """

    @classmethod
    def of(cls, embedding: nn.Embedding) -> ItemTable:
        """A table on the numbers of an embedding whose row 0 is padding; no number is drawn or copied."""
        rows, width = embedding.weight.shape
        return cls(rows, width, padding_idx=PADDING, _weight=embedding.weight.detach())

    def lookup(self, items: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Vectors [..., D] of `items` [...], and the table [V+1, D] for a loss over it.

        In training the gradients of both reach the table as one tensor.
        """
        if self.training and torch.is_grad_enabled():
            return Lookup.apply(self.weight, items)
        return self(items), self.weight

    def best(
        self,
        hidden: torch.Tensor,
        k: int,
        chunk_items: int,
        added: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """chunked_topk() of user vectors `hidden` [users, D] over this table."""
        return chunked_topk(hidden, self.weight, k, chunk_items, added=added)

    def vectors(self) -> torch.Tensor:
        """[V, D] fp32 on the CPU: the items', without padding."""
        return self.weight.detach()[1:].float().cpu()


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


def chunked_topk(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    k: int,
    chunk_items: int,
    padding_idx: int = PADDING,
    added: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Exact top-k items of each row of `hidden` by inner product, never holding more than one chunk of scores.

    Args:
        hidden: [users, D] user vectors.
        weight: [V+1, D] item table; row `padding_idx` is no item.
        k: number of items per user, at most V.
        chunk_items: items scored at a time.
        added: rows of `hidden` and of `weight` [P] each, different pairs, and what is added to their scores [P]; with
            -inf they are left out. None adds nothing.

    Returns:
        [users, k] scores and [users, k] int64 row numbers of `weight`, best first; where fewer than k are left, -inf
        and `padding_idx` come after them. Equal scores may come in any order, as with torch.topk. Scores are computed
        in the dtype of the inputs.
    """
    best_scores = hidden.new_empty(hidden.size(0), 0)
    best_items = torch.empty(hidden.size(0), 0, dtype=torch.int64, device=hidden.device)
    starts = range(0, weight.size(0), chunk_items)
    if added is not None:
        added_items, order = added[1].sort()
        added_users, addends = added[0][order], added[2][order]
        ends = torch.tensor([*starts, weight.size(0)], device=added_items.device)
        bounds = torch.searchsorted(added_items, ends).tolist()
    for i, start in enumerate(starts):
        scores = hidden @ weight[start : start + chunk_items].T
        if start <= padding_idx < start + chunk_items:
            scores[:, padding_idx - start] = -torch.inf
        if added is not None:
            pairs = slice(bounds[i], bounds[i + 1])
            scores[added_users[pairs], added_items[pairs] - start] += addends[pairs]
        scores, items = scores.topk(min(k, scores.size(1)), dim=1)
        best_scores = torch.cat([best_scores, scores], dim=1)
        best_items = torch.cat([best_items, items + start], dim=1)
        best_scores, order = best_scores.topk(min(k, best_scores.size(1)), dim=1)
        best_items = best_items.gather(1, order)
    return best_scores, best_items.masked_fill_(best_scores == -torch.inf, padding_idx)
