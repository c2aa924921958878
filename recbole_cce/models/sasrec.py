"""SASRec (Kang & McAuley, ICDM 2018) with a memory-efficient head, trained on every position of a sequence."""

from __future__ import annotations

import hashlib
from collections import ChainMap
from collections.abc import Mapping
from typing import Any

import torch
from recbole.config import Config
from recbole.data.interaction import Interaction
from recbole.model.sequential_recommender.sasrec import SASRec
from recbole.utils import InputType
from torch import nn

from recbole_cce.data import TARGET_COUNT
from recbole_cce.layers import encode
from recbole_cce.losses import LOSSES


class EfficientSASRec(SASRec):
    """RecBole's SASRec with its head replaced: same parameters, same scores, other loss.

    Each position of a row predicts the next item; with `train_targets: last` only the last one does, as in RecBole.
    """

    # RecBole would derive it from loss_type, and knows only CE and BPR
    input_type = InputType.POINTWISE

    def __init__(self, config: Config, dataset: Any) -> None:
        # SASRec itself accepts no other loss_type than CE and BPR
        super().__init__(ChainMap({"loss_type": "CE"}, config.final_config_dict), dataset)
        del self.loss_fct
        self.loss_type = config["loss_type"]
        self.train_targets = config["train_targets"]
        self.attention = config["attention"]
        # places for the targets of a batch where their number must not depend on it: see cuda_graph.py
        self.target_capacity: int | None = None
        self.loss: nn.Module = LOSSES[self.loss_type](config, item_counts(dataset))
        self.catalogue = fingerprint(dataset.field2id_token[self.ITEM_ID])
        self.other_parameter_name = ["catalogue"]

    def hidden_states(self, item_seq: torch.Tensor) -> torch.Tensor:
        """[B, L] items, padded with 0 on the right -> [B, L, D] hidden states, meaningless at padded positions."""
        positions = self.position_embedding.weight[: item_seq.size(1)]
        embedded = self.dropout(self.LayerNorm(self.item_embedding(item_seq) + positions))
        return encode(self.trm_encoder, embedded, item_seq != 0, self.attention)

    def forward(self, item_seq: torch.Tensor, item_seq_len: torch.Tensor) -> torch.Tensor:
        """[B, L] items and [B] lengths -> [B, D] hidden states of the last positions."""
        return self.gather_indexes(self.hidden_states(item_seq), item_seq_len - 1)

    def calculate_loss(self, interaction: Interaction) -> torch.Tensor:
        """The loss of `loss_type`, averaged over the targets of the batch."""
        item_seq = interaction[self.ITEM_SEQ]
        lengths = interaction[self.ITEM_SEQ_LEN].clamp(min=1)  # a row of padding has none
        target = interaction[self.POS_ITEM_ID]
        if self.train_targets == "last":
            return self.loss(self.forward(item_seq, lengths), target, self.item_embedding.weight)
        target = next_items(item_seq, lengths, target, interaction[TARGET_COUNT]).flatten()
        if self.target_capacity is None:
            rows = target.nonzero().squeeze(1)  # waits for the device once a batch
        else:
            rows = (target == 0).to(torch.uint8).argsort(stable=True)[: self.target_capacity]
        hidden = self.hidden_states(item_seq).flatten(0, 1)[rows]
        return self.loss(hidden, target[rows], self.item_embedding.weight)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As torch's, with a clear error when the weights belong to another catalogue or size.

        Raises:
            ValueError: names what differs.
        """
        loaded, own = state_dict.get("item_embedding.weight"), self.item_embedding.weight
        if loaded is not None and loaded.shape != own.shape:
            raise ValueError(
                f"the checkpoint's item table is {loaded.size(0) - 1} items x {loaded.size(1)}, this model's is "
                f"{own.size(0) - 1} items x {own.size(1)}: it was trained on another data set, with other filters or "
                "with another hidden_size"
            )
        loaded, own = state_dict.get("position_embedding.weight"), self.position_embedding.weight
        if loaded is not None and loaded.shape != own.shape:
            raise ValueError(f"MAX_ITEM_LIST_LENGTH: {len(own)} is not the checkpoint's, which is {len(loaded)}")
        return super().load_state_dict(state_dict, strict, assign)

    def load_other_parameter(self, para: dict[str, Any] | None) -> None:
        """Refuse weights whose rows stand for other items.

        Raises:
            ValueError: the checkpoint's catalogue has as many items, but not the same ones in the same order.
        """
        if para and para.get("catalogue", self.catalogue) != self.catalogue:
            raise ValueError(
                f"the checkpoint was trained on another catalogue (item tokens {para['catalogue']}, this data set's "
                f"are {self.catalogue}): its rows stand for other items"
            )


class SASRecCCE(EfficientSASRec):
    """SASRec with cross-entropy over shared sampled negatives by default (`loss_type: CCE-`, arXiv 2509.09682)."""


class SASRecSCE(EfficientSASRec):
    """SASRec with scalable cross-entropy by default (`loss_type: SCE`, arXiv 2409.18721)."""


def next_items(item_seq: torch.Tensor, lengths: torch.Tensor, last: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """The target of every position: the item after it, the row's held-out `last` [B] at the end, 0 on padding.

    Only the last `count` [B] positions of a row have one: the others are trained in another row.
    """
    target = torch.cat([item_seq[:, 1:], item_seq.new_zeros(len(item_seq), 1)], dim=1)
    target = target.scatter(1, (lengths - 1)[:, None], last[:, None])
    position = torch.arange(item_seq.size(1), device=item_seq.device)
    return target.masked_fill(position < (lengths - count)[:, None], 0)


def item_counts(dataset: Any) -> torch.Tensor:
    """[V] how often each real item is a target in the training split, each of its rows having one.

    Held-out interactions do not count, nor do a user's first ones, which are never a target.
    """
    items = dataset.inter_feat[dataset.iid_field]
    return torch.bincount(items, minlength=dataset.item_num)[1:]


def fingerprint(tokens: Any) -> str:
    """A short hash of the external item tokens in row order, to recognise the catalogue a model was trained on."""
    return hashlib.sha256("\n".join(map(str, tokens)).encode()).hexdigest()[:16]
