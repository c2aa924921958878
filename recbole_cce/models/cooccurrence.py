"""A baseline without training: how often items follow one another, near the end of a user's history."""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.sparse
import torch
from recbole.config import Config
from recbole.data.interaction import Interaction
from recbole.model.abstract_recommender import SequentialRecommender
from recbole.utils import InputType
from torch import nn

from recbole_cce.data.rows import TARGET_ROW
from recbole_cce.nn.item_table import PADDING
from recbole_cce.plugin.registration import register_model
from recbole_cce.training.evaluation import TopK
from recbole_cce.training.trainer import EfficientTrainer

WINDOW = 20  # interactions: the distance of a pair, and the last ones of a history that count
RECENCY = 0.7  # weight of an interaction of the history, relative to the one after it
DISCOUNT = 0.25  # a count is divided by this power of how often each of its two items occurs


class Cooccurrence(SequentialRecommender):
    """Scores of counts, the same for every seed: nothing is trained.

    score(j) = sum_{a = 1..20} 0.7^(a-1) C[i_a, j],  C[i, j] = (n_i n_j)^-1/4 sum_{pairs i before j} d^-1/2

    i_a is the a-th last item of the history; a pair is two interactions of one user in the training split that are
    d = 1 to 20 apart; n counts an item there. The held-out item's score is made a little smaller: where scores are
    equal, it comes after the others. In full ranking, items without a score are not recommended.
    """

    input_type = InputType.POINTWISE

    def __init__(self, config: Config, dataset: Any) -> None:
        super().__init__(config, dataset)
        if dataset.flat is None:
            raise ValueError("benchmark_filename: Cooccurrence counts interactions, which pre-split files do not have")
        self.nothing = nn.Parameter(torch.zeros(1))  # RecBole builds an optimizer
        users, items = (dataset.flat[field].numpy() for field in (dataset.uid_field, dataset.iid_field))
        target = np.sort(dataset.inter_feat[TARGET_ROW].numpy())  # a user's first interaction is the target of no row
        self.pairs = discounted(counted_pairs(users, items, target, self.n_items), items[target], self.n_items)

    def calculate_loss(self, interaction: Interaction) -> torch.Tensor:
        """Zero."""
        return self.nothing.sum() * 0

    def scores(self, interaction: Interaction) -> scipy.sparse.csr_matrix:
        """[B, V+1] scores after the lists of a batch; most are 0, and those of the held-out items a little smaller."""
        items, lengths = (interaction[field].cpu().numpy() for field in (self.ITEM_SEQ, self.ITEM_SEQ_LEN))
        age = lengths[:, None] - np.arange(items.shape[1])  # 1 for the last one
        row, position = np.nonzero((age >= 1) & (age <= WINDOW))
        weights = RECENCY ** (age[row, position] - 1).astype(np.float32)
        recent = scipy.sparse.csr_matrix((weights, (row, items[row, position])), shape=(len(items), self.n_items))
        scores = recent @ self.pairs
        if self.POS_ITEM_ID in interaction:
            held_out = interaction[self.POS_ITEM_ID].cpu().numpy()
            found = scores.indices == np.repeat(held_out, np.diff(scores.indptr))
            scores.data[found] = np.nextafter(scores.data[found], np.float32(-np.inf))
        return scores

    def full_sort_predict(self, interaction: Interaction) -> torch.Tensor:
        """[B, V+1] scores after the lists of a batch."""
        return torch.from_numpy(self.scores(interaction).toarray()).to(self.nothing.device)

    def predict(self, interaction: Interaction) -> torch.Tensor:
        """[B] scores of one item a row."""
        item = interaction[self.ITEM_ID]
        return self.full_sort_predict(interaction).gather(1, item.to(self.nothing.device)[:, None]).squeeze(1)


class CooccurrenceTrainer(EfficientTrainer):
    """Evaluates; there is nothing to train."""

    def __init__(self, config: Config, model: Cooccurrence) -> None:
        super().__init__(config, model)
        self.epochs = 1

    def _train_epoch(self, *args: Any, **kwargs: Any) -> float:
        return 0.0

    def _full_sort_batch_eval(self, batched_data: tuple) -> tuple:
        if self.eval_collector.needs_scores():
            return super()._full_sort_batch_eval(batched_data)
        interaction, _, positive_u, positive_i = batched_data
        scores = self.model.scores(interaction)
        if self.config["exclude_seen"]:
            history = self.evaluated.history(interaction)
            pairs = np.ones(len(history.row), dtype=np.float32), (history.row.numpy(), history.item.numpy())
            scores = scores - scores.multiply(scipy.sparse.csr_matrix(pairs, shape=scores.shape))
        items = best_items(scipy.sparse.csr_matrix(scores), max(self.config["topk"]))
        return interaction, TopK(torch.from_numpy(items)), positive_u, positive_i


register_model(Cooccurrence, trainer=CooccurrenceTrainer)


def best_items(scores: scipy.sparse.csr_matrix, k: int) -> np.ndarray:
    """[B, k] the items with the largest scores above 0, best first; PADDING where a row has fewer."""
    best = np.full((scores.shape[0], k), PADDING, dtype=np.int64)
    for row, (first, end) in enumerate(zip(scores.indptr, scores.indptr[1:], strict=False)):
        values, items = scores.data[first:end], scores.indices[first:end]
        if len(values) > k:
            largest = np.argpartition(-values, k)[:k]
            values, items = values[largest], items[largest]
        order = np.argsort(-values)[: np.count_nonzero(values > 0)]
        best[row, : len(order)] = items[order]
    return best


def counted_pairs(users: np.ndarray, items: np.ndarray, target: np.ndarray, size: int) -> scipy.sparse.csr_matrix:
    """[V+1, V+1] sums of d^-1/2 over pairs whose later interaction is one of `target`.

    Args:
        users, items: [n] of interactions sorted by user and time.
        target: [m] which interactions are targets, none of them a user's first.
        size: V + 1.
    """
    total = scipy.sparse.csr_matrix((size, size), dtype=np.float32)
    for distance in range(1, WINDOW + 1):
        later = target[target >= distance]
        later = later[users[later] == users[later - distance]]
        weight = np.full(len(later), distance**-0.5, dtype=np.float32)
        total += scipy.sparse.coo_matrix((weight, (items[later - distance], items[later])), (size, size)).tocsr()
    return total


def discounted(pairs: scipy.sparse.csr_matrix, items: np.ndarray, size: int) -> scipy.sparse.csr_matrix:
    """Counts of frequent items made smaller: see DISCOUNT."""
    factor = np.maximum(np.bincount(items, minlength=size), 1).astype(np.float32) ** -DISCOUNT
    scale = scipy.sparse.diags(factor)
    return (scale @ pairs @ scale).tocsr()
