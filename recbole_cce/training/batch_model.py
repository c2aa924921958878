"""What a sequential model of RecBole needs to be trained on a Batch by a loss of this package."""

from __future__ import annotations

import torch
from recbole.data.interaction import Interaction

from recbole_cce.data.dataset import TARGET_COUNT
from recbole_cce.nn.batch import Batch, Counts
from recbole_cce.nn.losses.loss_sum import LossSum


class BatchModel:
    """Comes before RecBole's class in the bases of a model that has `train_targets`.

    The trainer then asks it for loss_sum(): of a Batch, whose counts it knows without waiting for the device.
    """

    train_targets: str
    ITEM_SEQ: str
    ITEM_SEQ_LEN: str
    POS_ITEM_ID: str

    def loss_sum(self, batch: Batch, packed: bool = False, compiled: bool = False) -> LossSum:
        """The loss of a batch, over all positions that it trains.

        Args:
            batch: on the device of the model.
            packed: whether the encoder may take the real positions one after another, without padding.
            compiled: whether it may be run by torch.compile.
        """
        raise NotImplementedError

    def batch(self, interaction: Interaction, counts: Counts | None = None) -> Batch:
        """The Batch in RecBole's fields; without `counts` they are read from the device.

        `train_targets: last` trains the last position of each row, as RecBole does.
        """
        items, lengths = interaction[self.ITEM_SEQ], interaction[self.ITEM_SEQ_LEN]
        trained = (lengths > 0).long() if self.train_targets == "last" else interaction[TARGET_COUNT]
        parts = items, lengths, interaction[self.POS_ITEM_ID], trained
        return Batch.counted(*parts) if counts is None else Batch(*parts, counts)

    def calculate_loss(self, interaction: Interaction) -> torch.Tensor:
        """The mean over the targets of a batch, where RecBole asks for it."""
        return self.loss_sum(self.batch(interaction)).mean
