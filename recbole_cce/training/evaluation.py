"""Full ranking without a [users, items] score matrix.

Stock RecBole scores [eval_batch, V] at once, and keeps a second matrix of that size to mark the positives. Here a batch
is ranked chunk by chunk over the catalogue, and the metrics of RecBole see the same data.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from recbole.data.interaction import Interaction

from recbole_cce.nn.history import History
from recbole_cce.nn.item_table import ItemTable
from recbole_cce.nn.repeats import age_group

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
