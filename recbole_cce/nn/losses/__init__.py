"""The training losses, one nn.Module per `loss_type`: forward(hidden [N, D], target [N], weight [V+1, D]) -> LossSum.

CE and CE- hold all their logits, in plain torch; the others call an op, which `loss_backend` concerns. A loss registers
itself, so that to import its file is all that makes it one.
"""

from recbole_cce.nn.losses import full, sampled, scalable, binary  # noqa: F401, I001  in the order of every list of them
from recbole_cce.nn.losses.base import Buffers, Loss
from recbole_cce.nn.losses.loss_sum import LossSum
from recbole_cce.nn.losses.registry import LOSSES, register_loss
from recbole_cce.nn.losses.sampled import SampledLoss

__all__ = ["LOSSES", "Buffers", "Loss", "LossSum", "SampledLoss", "register_loss"]
