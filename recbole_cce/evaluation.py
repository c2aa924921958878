"""What RecBole's Collector gets wrong at this scale: full ranking without a [users, items] score matrix.

Stock RecBole scores [eval_batch, V] at once, keeps a second matrix of that size to mark the positives and
moves non-tensors with .cpu(). Here a batch is ranked chunk by chunk over the catalogue; the metrics classes of
RecBole are untouched and see the same data.
"""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from recbole.data.interaction import Interaction
from recbole.evaluator import collector as recbole_collector

SCORE_ELEMENTS = 2**26  # scores held at a time with eval_chunk_items: auto (256 MiB in fp32)


class TopK(NamedTuple):
    """The best items of each user, in the place where RecBole passes a score matrix: items [users, k] int64."""

    items: torch.Tensor


def chunked_topk(
    hidden: torch.Tensor, weight: torch.Tensor, k: int, chunk_items: int, padding_idx: int = 0
) -> torch.Tensor:
    """Exact top-k items of each row of `hidden` by inner product, never holding more than one chunk of scores.

    Args:
        hidden: [users, D] user vectors.
        weight: [V+1, D] item table; row `padding_idx` is never returned.
        k: number of items per user.
        chunk_items: items scored at a time.

    Returns:
        [users, k] int64 row numbers of `weight`, best first. Equal scores may come in any order, as with
        torch.topk. Scores are computed in the dtype of the inputs.

    Raises:
        ValueError: k is larger than the number of items.
    """
    if k > weight.size(0) - 1:
        raise ValueError(f"topk: {k} is larger than the catalogue of {weight.size(0) - 1} items")
    best_scores = hidden.new_empty(hidden.size(0), 0)
    best_items = torch.empty(hidden.size(0), 0, dtype=torch.int64, device=hidden.device)
    for start in range(0, weight.size(0), chunk_items):
        scores = hidden @ weight[start : start + chunk_items].T
        if start <= padding_idx < start + chunk_items:
            scores[:, padding_idx - start] = -torch.inf
        scores, items = scores.topk(min(k, scores.size(1)), dim=1)
        best_scores = torch.cat([best_scores, scores], dim=1)
        best_items = torch.cat([best_items, items + start], dim=1)
        best_scores, order = best_scores.topk(min(k, best_scores.size(1)), dim=1)
        best_items = best_items.gather(1, order)
    return best_items


def auto_chunk_items(users: int) -> int:
    """Items per chunk so that one chunk of scores holds at most SCORE_ELEMENTS numbers."""
    return max(1, SCORE_ELEMENTS // max(1, users))


class Collector(recbole_collector.Collector):
    """RecBole's Collector, accepting ready-made top-k lists and correct over several processes.

    `n_samples`: rows of the evaluated split over all processes. Set by our trainer before each evaluation.
    RecBole averages the metrics of the processes instead, which is wrong for coverage-like metrics and counts
    twice the rows that DistributedSampler repeats to give every process equally many.
    """

    n_samples: int | None = None

    def needs_scores(self) -> bool:
        """Whether a metric looks at more than the top-k lists (GAUC, value metrics)."""
        return any(self.register.need(name) for name in ("rec.meanrank", "rec.score", "data.label"))

    def eval_batch_collect(
        self,
        scores_tensor: torch.Tensor | TopK,
        interaction: Interaction,
        positive_u: torch.Tensor,
        positive_i: torch.Tensor,
    ) -> None:
        """Collect one batch: `positive_i[j]` is a held-out item of the batch's user `positive_u[j]`."""
        if not isinstance(scores_tensor, TopK):
            super().eval_batch_collect(scores_tensor, interaction, positive_u, positive_i)
            return
        items = scores_tensor.items
        if self.register.need("rec.items"):
            self.data_struct.update_tensor("rec.items", items)
        if self.register.need("rec.topk"):
            positive_u, positive_i = positive_u.to(items.device), positive_i.to(items.device)
            found = (items[positive_u] == positive_i[:, None]).int()
            hits = torch.zeros_like(items, dtype=torch.int).index_add_(0, positive_u, found).clamp_(max=1)
            counts = torch.bincount(positive_u, minlength=len(items)).int()
            self.data_struct.update_tensor("rec.topk", torch.cat([hits, counts[:, None]], dim=1))

    def get_data_struct(self) -> recbole_collector.DataStruct:
        """Everything collected, on the CPU and from all processes; per-evaluation entries are then dropped."""
        collected = self.data_struct._data_dict
        if self.n_samples is not None and torch.distributed.is_initialized():
            for name in [name for name in ("rec.items", "rec.topk", "rec.meanrank") if name in collected]:
                collected[name] = gather_rows(collected[name], self.n_samples)
        result = recbole_collector.DataStruct()
        for name, value in collected.items():
            result.set(name, value.cpu() if isinstance(value, torch.Tensor) else copy.deepcopy(value))
        for name in ("rec.topk", "rec.meanrank", "rec.score", "rec.items", "data.label"):
            collected.pop(name, None)
        return result


def gather_rows(rows: torch.Tensor, total: int) -> torch.Tensor:
    """Put back in order what torch's DistributedSampler dealt out: process r of W holds rows r, r+W, r+2W, ...

    It repeats rows at the end so that every process has equally many; only the first `total` are kept.
    """
    shards = [torch.empty_like(rows) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(shards, rows.contiguous())
    return torch.stack(shards, dim=1).flatten(0, 1)[:total]
