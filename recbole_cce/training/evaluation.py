"""What RecBole's Collector gets wrong at this scale: full ranking without a [users, items] score matrix.

Stock RecBole scores [eval_batch, V] at once, keeps a second matrix of that size to mark the positives and
moves non-tensors with .cpu(). Here a batch is ranked chunk by chunk over the catalogue, and the metrics of RecBole see
the same data. Where fewer than k items are left for a user, RecBole fills the list with items that were ranked last or
not at all; here it ends with the padding item, which no metric counts.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from recbole.data.interaction import Interaction
from recbole.evaluator import collector as recbole_collector
from recbole.evaluator import metrics

from recbole_cce.nn.history import History
from recbole_cce.nn.item_table import PADDING, ItemTable
from recbole_cce.nn.repeats import age_group

PER_ROW = ("rec.items", "rec.topk", "rec.meanrank")  # what ranking metrics are computed from
# Numbers of one tensor held at a time, 256 MiB in fp32: scores with eval_chunk_items: auto, and inner states of the
# encoder. A few of them live at a time, so that 2 GiB are enough whatever the numbers of users and items.
SCORE_ELEMENTS = 2**26


class TopK(NamedTuple):
    """The best items of each user, passed where RecBole passes a score matrix: items [users, k] int64."""

    items: torch.Tensor


def top_items(
    model: Any,
    rows: Interaction,
    k: int,
    chunk_items: int | str,
    history: History | None,
    exclude_seen: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """chunked_topk() for the lists of a batch, which is on the CPU as `history` is; chunk_items: eval_chunk_items.

    Items of the history, where it is given, get the model's `repeat_bias`, or are left out with `exclude_seen`.
    """
    hidden = user_vectors(model, rows)
    added = None
    if history is not None:
        if exclude_seen:
            addends = torch.full(history.age.shape, -torch.inf)
        else:
            addends = model.repeat_bias[age_group(history.age)]
        device = hidden.device
        added = history.row.to(device), history.item.to(device), addends.to(device)
    chunk = auto_chunk_items(len(hidden)) if isinstance(chunk_items, str) else chunk_items
    return table_of(model).best(hidden, k, chunk, added)


def table_of(model: Any) -> ItemTable:
    """The item table of a model, which may keep it as a plain embedding."""
    embedding = model.item_embedding
    return embedding if isinstance(embedding, ItemTable) else ItemTable.of(embedding)


def user_vectors(model: Any, rows: Interaction) -> torch.Tensor:
    """[users, D] hidden states after the lists of a batch, which is on the CPU; some rows at a time."""
    device = model.item_embedding.weight.device
    items, lengths = (rows[field].to(device) for field in (model.ITEM_SEQ, model.ITEM_SEQ_LEN))
    users = max(1, SCORE_ELEMENTS // (items.size(1) * 4 * model.item_embedding.embedding_dim))
    return torch.cat([model.forward(*part) for part in zip(items.split(users), lengths.split(users), strict=True)])


def auto_chunk_items(users: int) -> int:
    """Items per chunk so that one chunk of scores holds at most SCORE_ELEMENTS numbers."""
    return max(1, SCORE_ELEMENTS // max(1, users))


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
        """As RecBole's."""
        return super().get_coverage(recommended(item_matrix), num_items)


class ShannonEntropy(metrics.ShannonEntropy):
    """RecBole's, of the items of the lists; 0 without any."""

    def get_entropy(self, item_matrix: np.ndarray) -> float:
        """As RecBole's."""
        return super().get_entropy(recommended(item_matrix)) if item_matrix.any() else 0.0


class GiniIndex(metrics.GiniIndex):
    """RecBole's, of the items of the lists; 0 without any."""

    def get_gini(self, item_matrix: np.ndarray, num_items: int) -> float:
        """As RecBole's."""
        return super().get_gini(recommended(item_matrix), num_items) if item_matrix.any() else 0.0


class AveragePopularity(metrics.AveragePopularity):
    """RecBole's: the mean over a list's own items, and over the users who have a list."""

    def get_pop(self, item_matrix: np.ndarray, item_count: dict[int, int]) -> np.ma.MaskedArray:
        """As RecBole's, masked where a list has ended."""
        return np.ma.masked_array(super().get_pop(item_matrix, item_count), item_matrix == PADDING)

    def metric_info(self, values: np.ma.MaskedArray) -> np.ndarray:
        """See means_of_lists()."""
        return means_of_lists(values)


class TailPercentage(metrics.TailPercentage):
    """RecBole's: the share of a list's own items, averaged over the users who have a list."""

    def get_tail(self, item_matrix: np.ndarray, count_items: dict[int, int]) -> np.ma.MaskedArray:
        """As RecBole's, masked where a list has ended."""
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
