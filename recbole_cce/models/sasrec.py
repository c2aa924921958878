"""SASRec (Kang & McAuley, ICDM 2018) with a memory-efficient head, trained on every position of a sequence."""

from __future__ import annotations

import functools
import hashlib
from collections import ChainMap
from collections.abc import Callable, Mapping
from typing import Any

import torch
from recbole.config import Config
from recbole.data.interaction import Interaction
from recbole.model.sequential_recommender.sasrec import SASRec
from recbole.utils import InputType
from torch import nn
from torch.nn import functional as F

from recbole_cce.errors import UserError
from recbole_cce.nn.batch import TRAINED_SHARE, Batch, Counts, last_positions, slots_of, states_at
from recbole_cce.nn.history import listed
from recbole_cce.nn.item_table import ItemTable
from recbole_cce.nn.losses.loss_sum import LossSum
from recbole_cce.nn.losses.registry import LOSSES
from recbole_cce.nn.packing import Packing, pack
from recbole_cce.nn.repeats import AGES, age_group
from recbole_cce.nn.transformer import encode, encode_original, fuse_gelu
from recbole_cce.plugin.registration import register_model
from recbole_cce.training.batch_model import BatchModel


class EfficientSASRec(BatchModel, SASRec):
    """RecBole's SASRec with its head replaced: same parameters, same scores, other loss.

    Each position of a row predicts the next item; with `train_targets: last` only the last one does, as in RecBole.
    `positions: end` counts positions from the last item, so that a next item is always predicted from position 0.
    `architecture: original` has the same parameters in the order of the authors' code: item vectors are multiplied by
    sqrt(D), keys and values are not normalised, dropout is elsewhere, matrices begin with Xavier's weights.
    """

    # RecBole would derive it from loss_type, and knows only CE and BPR
    input_type = InputType.POINTWISE

    def __init__(self, config: Config, dataset: Any) -> None:
        # SASRec itself accepts no other loss_type than CE and BPR
        super().__init__(ChainMap({"loss_type": "CE"}, config.final_config_dict), dataset)
        del self.loss_fct
        fuse_gelu(self.trm_encoder)
        self.loss_type = config["loss_type"]
        self.train_targets = config["train_targets"]
        self.attention = config["attention"]
        self.architecture = config["architecture"]
        self.positions = config["positions"]
        if self.architecture == "original":
            for parameter in self.parameters():
                if parameter.dim() > 1:
                    nn.init.xavier_uniform_(parameter)
        self.item_embedding: ItemTable = ItemTable.of(self.item_embedding)
        self.loss: nn.Module = LOSSES[self.loss_type](config, item_counts(dataset))
        self.catalogue = fingerprint(dataset.field2id_token[self.ITEM_ID])
        # added to the scores of items of the user's own history, by age; not a parameter, so that state dicts stay
        # those of RecBole's SASRec
        self.repeat_bias = torch.zeros(len(AGES))
        self.other_parameter_name = ["catalogue", "repeat_bias"]

    def hidden_states(
        self,
        item_seq: torch.Tensor,
        lengths: torch.Tensor,
        counts: Counts | None = None,
        packed: bool = False,
        compiled: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | Packing, torch.Tensor]:
        """Hidden states [P, D] of all positions, how they lie, and the item table [V+1, D] for a loss over them.

        Args:
            item_seq: [B, L] items, padded with 0 on the right.
            lengths: [B] how many there are in each row.
            counts: of the batch, if the host knows them.
            packed, compiled: as of loss_sum().
        """
        where: torch.Tensor | Packing
        if packed:
            # without counts it waits for the device
            where = pack(lengths, item_seq.size(1), counts.positions if counts else int(lengths.sum()))
            items = F.pad(item_seq.flatten(), (0, 1))[where.source]
        else:
            where, items = item_seq != 0, item_seq
        vectors, table = self.item_embedding.lookup(items)
        if self.architecture == "original":  # item vectors are then about as large as those of positions
            vectors = vectors * self.hidden_size**0.5
        if isinstance(where, Packing):  # not compiled: torch 2.6 then gets the gradient wrong
            # as in states_at(); few rows and many positions would make the sort slow besides
            position = where.position if self.positions == "start" else where.from_end
            vectors = vectors + self.position_embedding.weight.index_select(0, position)
        if not compiled:
            return encoded(self, vectors, where).flatten(0, -2), where, table
        if counts is None or not counts.fixed:
            for tensor in (vectors, *where[:5]) if isinstance(where, Packing) else (vectors, where):
                torch._dynamo.maybe_mark_dynamic(tensor, 0)
        return compiled_encoded()(self, vectors, where).flatten(0, -2), where, table

    def forward(self, item_seq: torch.Tensor, item_seq_len: torch.Tensor) -> torch.Tensor:
        """[B, L] items and [B] lengths -> [B, D] hidden states of the last positions."""
        hidden, where, _ = self.hidden_states(item_seq, item_seq_len, packed=self.attention == "packed")
        return states_at(hidden, where, *last_positions(item_seq_len))

    def predict(self, interaction: Interaction) -> torch.Tensor:
        """[B] scores of one item a row; what a user had is what the row lists."""
        items, lengths, item = (interaction[field] for field in (self.ITEM_SEQ, self.ITEM_SEQ_LEN, self.ITEM_ID))
        position = torch.arange(1, items.size(1) + 1, device=items.device)
        latest = ((items == item[:, None]) * position).amax(1)  # 0 where the list does not have it
        group = age_group((lengths - latest + 1).clamp(min=1))
        addend = self.repeat_bias.to(items.device)[group].masked_fill(latest == 0, 0)
        return super().predict(interaction) + addend

    def full_sort_predict(self, interaction: Interaction) -> torch.Tensor:
        """[B, V+1] scores of all items; what a user had is what the row lists."""
        scores = super().full_sort_predict(interaction)
        history = listed(interaction[self.ITEM_SEQ], interaction[self.ITEM_SEQ_LEN])
        scores[history.row, history.item] += self.repeat_bias.to(scores.device)[age_group(history.age)]
        return scores

    def loss_sum(self, batch: Batch, packed: bool = False, compiled: bool = False) -> LossSum:
        """The loss of `loss_type` over the targets of a batch."""
        hidden, where, table = self.hidden_states(batch.items, batch.lengths, batch.counts, packed, compiled)
        row, position, target = batch.targets()
        if batch.counts.targets < TRAINED_SHARE * len(hidden):
            return self.loss(states_at(hidden, where, row, position), target, table)
        every = target.new_zeros(len(hidden)).index_add_(0, slots_of(where, row, position), target)
        return self.loss(hidden, every, table)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As torch's, with a clear error when the weights belong to another catalogue or size.

        Raises:
            UserError: names what differs.
        """
        loaded, present = state_dict.get("item_embedding.weight"), self.item_embedding.weight
        if loaded is not None and loaded.shape != present.shape:
            raise UserError(
                f"the checkpoint's item table is {loaded.size(0) - 1} items x {loaded.size(1)}, this model's is "
                f"{present.size(0) - 1} items x {present.size(1)}: it was trained on another data set, with other "
                "filters or with another hidden_size"
            )
        loaded, present = state_dict.get("position_embedding.weight"), self.position_embedding.weight
        if loaded is not None and loaded.shape != present.shape:
            raise UserError(f"MAX_ITEM_LIST_LENGTH: {len(present)} is not the checkpoint's, which is {len(loaded)}")
        return super().load_state_dict(state_dict, strict, assign)

    def load_other_parameter(self, para: dict[str, Any] | None) -> None:
        """Refuse weights whose rows stand for other items.

        Raises:
            UserError: the checkpoint's catalogue has as many items, but not the same ones in the same order.
        """
        if para and para.get("catalogue", self.catalogue) != self.catalogue:
            raise UserError(
                f"the checkpoint was trained on another catalogue (item tokens {para['catalogue']}, this data set's "
                f"are {self.catalogue}): its rows stand for other items"
            )
        if para and "repeat_bias" in para:
            self.repeat_bias = para["repeat_bias"]


@register_model
class SASRecCCE(EfficientSASRec):
    """SASRec with cross-entropy over shared sampled negatives by default (`loss_type: CCE-`, arXiv 2509.09682)."""


@register_model
class SASRecSCE(EfficientSASRec):
    """SASRec with scalable cross-entropy by default (`loss_type: SCE`, arXiv 2409.18721)."""


def encoded(model: SASRec, vectors: torch.Tensor, where: torch.Tensor | Packing) -> torch.Tensor:
    """Hidden states [..., D] of items' vectors [B, L, D], or of packed ones [P, D] with those of their positions added;
    `where` as of layers.encode."""
    if not isinstance(where, Packing):
        table = model.position_embedding.weight
        if model.positions == "start":
            vectors = vectors + table[: vectors.size(1)]
        else:
            after = where.sum(1, keepdim=True) - 1 - torch.arange(vectors.size(1), device=vectors.device)
            vectors = vectors + table.index_select(0, after.clamp(min=0).flatten()).view_as(vectors)
    if model.architecture == "original":
        return encode_original(model.trm_encoder, model.LayerNorm, model.dropout(vectors), where)
    return encode(model.trm_encoder, model.dropout(model.LayerNorm(vectors)), where, model.attention)


@functools.cache
def compiled_encoded() -> Callable[[SASRec, torch.Tensor, torch.Tensor | Packing], torch.Tensor]:
    """encoded() of torch.compile: a function, so that modules and state dicts stay what they are."""
    return torch.compile(encoded)


def item_counts(dataset: Any) -> torch.Tensor:
    """[V] how often each real item is a target in the training split, each of its rows having one.

    Held-out interactions do not count, nor do a user's first ones, which are never a target.
    """
    items = dataset.inter_feat[dataset.iid_field]
    return torch.bincount(items, minlength=dataset.item_num)[1:]


def fingerprint(tokens: Any) -> str:
    """A short hash of the external item tokens in row order, to recognise the catalogue a model was trained on."""
    return hashlib.sha256("\n".join(map(str, tokens)).encode()).hexdigest()[:16]
