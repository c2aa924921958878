"""What all losses share."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from recbole_cce.keys import Key, one_of
from recbole_cce.nn.losses.loss_sum import LossSum

DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Buffers:
    """Bytes that a loss holds besides its inputs and the gradients of both.

    Attributes:
        forward, backward: during this pass.
        kept: from the forward to the end of the backward pass.
        keeps_hidden: whether the fp32 hidden states are kept, too.
        direction: whether the gradient of the hidden states is there from the forward pass on.
    """

    forward: int = 0
    kept: int = 0
    backward: int = 0
    keeps_hidden: bool = True
    direction: bool = False


class Loss(nn.Module):
    """Base of all losses. Holds no parameters, so that state dicts stay those of RecBole's SASRec.

    Args:
        config: the configuration, with a value for each of `keys`.
        counts: [V] how often each real item is a training target.

    Attributes:
        keys: the configuration keys that the loss reads; a subclass adds its own to those of its base.
        capturable: whether a CUDA graph can hold it: no size depends on values, nothing waits for the device.
        counts_targets: whether its count is the number of targets, known before it is computed.
    """

    keys: ClassVar[Mapping[str, Key]] = {
        "loss_backend": Key("auto", one_of("auto", "triton", "torch"), "kernels of the loss; auto falls back to torch"),
        "loss_dtype": Key("auto", one_of(*DTYPES), "precision of the loss's inputs; auto: that of amp_dtype"),
    }
    capturable: ClassVar[bool] = True
    counts_targets: ClassVar[bool] = True

    @classmethod
    def holds(cls, config: Mapping[str, Any], positions: int, items: int, width: int) -> Buffers | None:
        """What a step holds of this loss, for `plan`; None: whatever its plain torch does, which `plan` runs.

        Args:
            config: values of `keys`.
            positions: N, rows of hidden states.
            items: V.
            width: D.
        """
        return None

    def __init__(self, config: Mapping[str, Any], counts: torch.Tensor) -> None:
        super().__init__()
        self.backend: str = config["loss_backend"]
        self.dtype: str = config["loss_dtype"]

    def precision(self, device: torch.device) -> AbstractContextManager[Any]:
        """Autocast as `loss_dtype` says. The ops round their inputs to its dtype and keep logits in fp32; the products
        of CE and CE- are torch's own, with logits in that dtype."""
        if self.dtype == "auto":
            return contextlib.nullcontext()
        if self.dtype == "float32":
            return torch.autocast(device.type, enabled=False)
        return torch.autocast(device.type, dtype=getattr(torch, self.dtype))

    def forward(self, hidden: torch.Tensor, target: torch.Tensor, weight: torch.Tensor) -> LossSum:
        """The loss of [N, D] hidden states with [N] targets over an item table [V+1, D].

        Positions whose target is the padding item 0 count for nothing: what their hidden states hold reaches neither
        the loss nor a gradient.
        """
        raise NotImplementedError


def of_targets(hidden: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Zero for [N, D] hidden states whose target is the padding item: what they hold reaches no gradient."""
    return hidden.masked_fill((target == 0)[:, None], 0)


def at_least_float32(logits: torch.Tensor) -> torch.Tensor:
    """Logits in fp32, where a product under autocast or of 16-bit inputs is not."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
