"""What RecBole's Collector and its metrics of items get wrong at scale and over several processes.

Stock RecBole moves non-tensors with .cpu(), and averages what several processes found. Where fewer than k items are
left for a user, it fills the list with items that were ranked last or not at all; here the list ends with the padding
item, which no metric counts.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from recbole.data.interaction import Interaction
from recbole.evaluator import collector as recbole_collector
from recbole.evaluator import metrics

from recbole_cce.nn.item_table import PADDING
from recbole_cce.training.evaluation import TopK

PER_ROW = ("rec.items", "rec.topk", "rec.meanrank")  # what ranking metrics are computed from


class Collector(recbole_collector.Collector):
    """RecBole's Collector, accepting ready-made top-k lists and correct over several processes.

    RecBole averages the metrics of the processes, which is wrong for coverage-like metrics and counts twice the rows
    that DistributedSampler repeats to give every process equally many. Here what ranking metrics are computed from
    has one row for each row of the evaluated split, and is gathered.

    Attributes:
        n_samples: rows of the evaluated split over all processes, set by our trainer before each evaluation; None, as
            with RecBole's trainers, leaves the processes apart.
    """

    n_samples: int | None = None

    def needs_scores(self) -> bool:
        """Whether a metric looks at all scores (GAUC), not just at the top-k lists."""
        return self.register.need("rec.meanrank")

    def eval_batch_collect(
        self,
        scores_tensor: torch.Tensor | TopK,
        interaction: Interaction,
        positive_u: torch.Tensor,
        positive_i: torch.Tensor,
    ) -> None:
        """Collect one batch. With top-k lists, `positive_i[j]` is the one held-out item of row j."""
        if not isinstance(scores_tensor, TopK):
            super().eval_batch_collect(scores_tensor, interaction, positive_u, positive_i)
            if self.register.need("rec.items"):
                items = self.data_struct.get("rec.items")[-len(scores_tensor) :]
                items[scores_tensor.gather(1, items) == -torch.inf] = PADDING
            return
        items = scores_tensor.items
        if self.register.need("rec.items"):
            self.data_struct.update_tensor("rec.items", items)
        if self.register.need("rec.topk"):
            hits = items == positive_i.to(items.device)[:, None]
            positives = hits.new_ones(len(items), 1)
            self.data_struct.update_tensor("rec.topk", torch.cat([hits, positives], dim=1).int())

    def get_data_struct(self) -> recbole_collector.DataStruct:
        """Everything collected, on the CPU and from all processes; per-evaluation entries are then dropped."""
        collected = self.data_struct._data_dict
        result = recbole_collector.DataStruct()
        for name, value in collected.items():
            if self.n_samples is not None and torch.distributed.is_initialized() and name in PER_ROW:
                value = gather_rows(value, self.n_samples)
            result.set(name, value.cpu() if isinstance(value, torch.Tensor) else value)
        for name in (*PER_ROW, "rec.score", "data.label"):
            collected.pop(name, None)
        return result


def gather_rows(rows: torch.Tensor, total: int) -> torch.Tensor:
    """Put back in order what torch's DistributedSampler dealt out: process r of W holds rows r, r+W, r+2W, ...

    It repeats rows at the end so that every process has equally many; only the first `total` are kept.
    """
    shards = [torch.empty_like(rows) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(shards, rows.contiguous())
    return torch.stack(shards, dim=1).flatten(0, 1)[:total]


# RecBole's metrics of the items themselves


class ItemCoverage(metrics.ItemCoverage):
    """RecBole's, of the items of the lists."""

    def get_coverage(self, item_matrix: np.ndarray, num_items: int) -> float:
        """The share of the items that are in some list."""
        return super().get_coverage(recommended(item_matrix), num_items)


class ShannonEntropy(metrics.ShannonEntropy):
    """RecBole's, of the items of the lists; 0 without any."""

    def get_entropy(self, item_matrix: np.ndarray) -> float:
        """The entropy of how often each item is in a list."""
        return super().get_entropy(recommended(item_matrix)) if item_matrix.any() else 0.0


class GiniIndex(metrics.GiniIndex):
    """RecBole's, of the items of the lists; 0 without any."""

    def get_gini(self, item_matrix: np.ndarray, num_items: int) -> float:
        """How unequally often the items are in lists."""
        return super().get_gini(recommended(item_matrix), num_items) if item_matrix.any() else 0.0


class AveragePopularity(metrics.AveragePopularity):
    """RecBole's: the mean over a list's own items, and over the users who have a list."""

    def get_pop(self, item_matrix: np.ndarray, item_count: dict[int, int]) -> np.ma.MaskedArray:
        """[users, k] how often each item of a list is a target of training, masked where the list has ended."""
        return np.ma.masked_array(super().get_pop(item_matrix, item_count), item_matrix == PADDING)

    def metric_info(self, values: np.ma.MaskedArray) -> np.ndarray:
        """See means_of_lists()."""
        return means_of_lists(values)


class TailPercentage(metrics.TailPercentage):
    """RecBole's: the share of a list's own items, averaged over the users who have a list."""

    def get_tail(self, item_matrix: np.ndarray, count_items: dict[int, int]) -> np.ma.MaskedArray:
        """[users, k] whether each item of a list is a rare one, masked where the list has ended."""
        return np.ma.masked_array(super().get_tail(item_matrix, count_items), item_matrix == PADDING)

    def metric_info(self, values: np.ma.MaskedArray) -> np.ndarray:
        """See means_of_lists()."""
        return means_of_lists(values)


OF_ITEMS: dict[str, type[Any]] = {
    metric.__name__.lower(): metric
    for metric in (ItemCoverage, ShannonEntropy, GiniIndex, AveragePopularity, TailPercentage)
}


def recommended(item_matrix: np.ndarray) -> np.ndarray:
    """[N, 1]: the items of lists [users, k], which may have ended before."""
    return item_matrix[item_matrix != PADDING][:, None]


def means_of_lists(values: np.ma.MaskedArray) -> np.ndarray:
    """[1, k]: the mean of the first 1 to k values of each list [users, k], averaged over the lists that have any.

    RecBole takes means over users of what this returns.
    """
    counts = np.ma.masked_equal((~np.ma.getmaskarray(values)).cumsum(axis=1), 0)
    return (values.filled(0).cumsum(axis=1) / counts).mean(axis=0, keepdims=True).filled(0)
