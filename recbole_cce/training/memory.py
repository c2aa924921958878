"""Peak GPU memory of a training step, from running the real model without numbers.

Tensors under torch's FakeTensorMode have shapes and dtypes but no memory. The model's own loss_sum() and the backward
pass run on them, in bf16 autocast as on a GPU, and every storage is counted while something holds it: activations kept
for the backward pass, gradients, and what lives for a moment only. The losses in plain torch, CE and CE-, run likewise;
those that compute in kernels are replaced by what they hold, as they say it (`Loss.buffers`).
"""

from __future__ import annotations

import functools
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from recbole.config import Config
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from recbole_cce.nn.batch import TRAINED_SHARE, Batch, Counts
from recbole_cce.nn.item_table import PADDING, ItemTable
from recbole_cce.nn.losses import LOSSES, Buffers
from recbole_cce.nn.losses.loss_sum import LossSum
from recbole_cce.training import average
from recbole_cce.training.step_plan import StepPlan

# in a backward pass that a mode watches, autograd makes a new tensor where it would write into the first argument
IN_PLACE = (torch.ops.aten.add.Tensor, torch.ops.aten.index_add.default, torch.ops.aten.index_put.default)
# numbers that RecBole's optimizers keep for each one of a parameter; fp32 as it is
MOMENTS = {"adam": 2, "adamw": 2, "sgd": 0, "adagrad": 1, "rmsprop": 1}
CUBLAS = 2**26  # workspaces of cuBLAS on an H100: 32 MiB for the forward, 32 for the backward pass


@dataclass(frozen=True)
class Memory:
    """Bytes at the worst moment of a step.

    Attributes:
        parameters: with the optimizer's moments, their average and, where the table's gradient exists then, that.
        encoder: activations, their gradients, those of the encoder's parameters, the batch, cuBLAS.
        loss: what the loss holds beyond gradients.
    """

    parameters: int
    encoder: int
    loss: int

    @property
    def peak(self) -> int:
        """All of it."""
        return self.parameters + self.encoder + self.loss


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that tensor operations made and something still holds.

    Attributes:
        part: where what is made now belongs; set from outside.
        gradient: shape of the table, set where the backward pass begins: a tensor like it is its gradient, and counts
            as the part `gradient`.
        live: bytes of each part.
        at_peak: `live` when its sum was largest.
    """

    def __init__(self) -> None:
        super().__init__()
        self.part = "encoder"
        self.gradient: torch.Size | None = None
        self.live: Counter[str] = Counter()
        self.at_peak: Counter[str] = Counter()
        self.held: weakref.WeakKeyDictionary[torch.UntypedStorage, weakref.finalize] = weakref.WeakKeyDictionary()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation and count what it made."""
        if function is torch.ops.aten.index_put.default:
            self.sort(*args[1:3])
        output = function(*args, **(kwargs or {}))
        made = [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]
        given = {leaf.untyped_storage() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        if self.gradient is not None and function in IN_PLACE and args[0].untyped_storage() in self.held:
            self.held[args[0].untyped_storage()]()
        for tensor in made:
            if tensor.untyped_storage() not in given:
                self.hold(tensor)
        return output

    def hold(self, tensor: torch.Tensor) -> None:
        """Count the storage of a tensor, once, until it is gone."""
        storage, part = tensor.untyped_storage(), self.part
        if storage in self.held:
            return
        if tensor.shape == self.gradient and tensor.dtype == torch.float32 and not self.live["gradient"]:
            part = "gradient"
        self.live[part] += storage.nbytes()
        self.held[storage] = weakref.finalize(storage, self.live.subtract, {part: storage.nbytes()})
        self.note()

    def sort(self, indices: list[torch.Tensor], values: torch.Tensor) -> None:
        """Count what a GPU needs to add values at indices that repeat: six times the indices, to sort them, and the
        values in order."""
        scratch = sum(6 * index.nbytes for index in indices) + values.nbytes * (not values.is_contiguous())
        self.live[self.part] += scratch
        self.note()
        self.live[self.part] -= scratch

    def note(self) -> None:
        """Remember the peak."""
        if self.live.total() > self.at_peak.total():
            self.at_peak = self.live.copy()

    def enter_loss(self, loss: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        """Before its forward pass; its backward pass ends with the gradient of the hidden states."""
        self.part = "loss"
        inputs[0].register_hook(self.leave_loss)

    def leave_loss(self, *_: Any) -> None:
        """After its forward or its backward pass."""
        self.part = "encoder"


class StandIn(nn.Module):
    """A loss that computes nothing and holds what another one does."""

    def __init__(self, buffers: Buffers) -> None:
        super().__init__()
        self.held = buffers

    def forward(self, hidden: torch.Tensor, target: torch.Tensor, weight: torch.Tensor) -> LossSum:
        """As of a Loss."""
        return LossSum(Hold.apply(hidden, weight, self.held), (target != 0).sum())


class Hold(torch.autograd.Function):
    """The passes of StandIn."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, buffers: Buffers) -> torch.Tensor:
        kept = hidden.new_empty(buffers.kept, dtype=torch.uint8)
        ctx.direction = torch.empty_like(hidden) if buffers.direction else None
        hidden.new_empty(buffers.forward, dtype=torch.uint8)
        ctx.save_for_backward(weight, kept, *[hidden] * buffers.keeps_hidden)
        ctx.shape, ctx.spare = hidden.shape, buffers.backward
        return hidden.new_empty(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple:
        grad_hidden, ctx.direction = ctx.direction, None
        if grad_hidden is None:
            grad_hidden = grad.new_empty(ctx.shape)
        grad_weight = torch.empty_like(ctx.saved_tensors[0])
        grad.new_empty(ctx.spare, dtype=torch.uint8)
        return grad_hidden, grad_weight, None


class DryRun:
    """Training steps of a model of this package, on one GPU, launched kernel by kernel, not compiled.

    Args:
        config: of a run, in which nothing is left to be chosen (`auto`) that changes memory.
        model_class: the model's; one is made for the configuration, without numbers.
        items: V.
    """

    def __init__(self, config: Config, model_class: Callable[..., nn.Module], items: int) -> None:
        self.config, self.items = config, items
        self.fake = FakeTensorMode()
        self.model: Any = model_class(config, catalogue(config, 1))
        for module in self.model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                setattr(module, name, nn.Parameter(self.fake.from_tensor(parameter)))
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, self.fake.from_tensor(buffer))
        with self.fake:
            self.model.item_embedding = ItemTable(items + 1, config["hidden_size"], padding_idx=PADDING)
        for module in self.model.modules():
            if isinstance(module, nn.Dropout):
                module.forward = functools.partial(fused_dropout, module.p)  # type: ignore[method-assign]
        self.numbers = sum(parameter.numel() for parameter in self.model.parameters())
        copies = 1 + MOMENTS.get(str(config["learner"]).lower(), 2)
        copies += average.share(config["weight_average"], self.numbers) is not None
        self.kept = 4 * copies * self.numbers

    def memory(self, plan: StepPlan, **settings: Any) -> Memory:
        """Memory of a step; `settings` are keys of the loss that differ from the configuration's.

        Packed positions are counted as so many in full rows.
        """
        config = {**self.config.final_config_dict, **settings}
        model, live, length = self.model, LiveBytes(), plan.length
        rows = -(-plan.positions // length)
        n = min(plan.counts.targets, rows * length)
        attended = config["n_heads"] * length
        widest = max(self.items + 1, config["inner_size"], attended, config["num_negatives"] * config["hidden_size"])
        if 8 * rows * length * widest >= 2**62:  # more than torch counts, and than any memory
            return Memory(self.kept, 2**62, 0)
        loss = LOSSES[config["loss_type"]]
        seen = rows * length if n >= TRAINED_SHARE * rows * length else n
        buffers = loss.holds(config, seen, self.items, config["hidden_size"])
        model.loss = loss(config, torch.empty(0)) if buffers is None else StandIn(buffers)
        model.loss.register_forward_pre_hook(live.enter_loss)
        model.loss.register_forward_hook(live.leave_loss)
        model.zero_grad()
        with self.fake, live:
            lengths, following, trained = (torch.empty(rows, dtype=torch.int64) for _ in range(3))
            items = torch.empty(rows, length, dtype=torch.int64)
            batch = Batch(items, lengths, following, trained, Counts(rows * length, n))
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = model.loss_sum(batch).mean
            live.part, live.gradient = "loss", model.item_embedding.weight.shape
            loss.backward()
        peak = live.at_peak
        return Memory(self.kept + peak["gradient"], CUBLAS + peak["encoder"], peak["loss"])


def largest(peak: Callable[[int], int], budget: int, most: int) -> int:
    """The largest number from 1 to `most` with peak(number) <= budget; 1 where none is.

    Memory grows with what a step has along a few straight lines: where one crosses the budget is tried first.
    """
    fits, does_not = 1, most
    at_fits, at_does_not = peak(fits), peak(does_not)
    if at_fits > budget:
        return fits
    if at_does_not <= budget:
        return does_not
    while does_not - fits > 1:
        number = fits + (budget - at_fits) * (does_not - fits) // (at_does_not - at_fits)
        number = min(max(number, fits + 1), does_not - 1)
        at_number = peak(number)
        if at_number <= budget:
            fits, at_fits = number, at_number
        else:
            does_not, at_does_not = number, at_number
    return fits


def catalogue(config: Config, items: int) -> SimpleNamespace:
    """What a model wants to know of a data set, of so many items and no interactions."""
    item = config["ITEM_ID_FIELD"]
    return SimpleNamespace(
        num=lambda field: items + 1,
        iid_field=item,
        item_num=items + 1,
        inter_feat={item: torch.empty(0, dtype=torch.int64)},
        field2id_token={item: ()},
    )


def fused_dropout(p: float, input: torch.Tensor) -> torch.Tensor:
    """Dropout as on a GPU, where a mask of bytes is kept; a CPU's is as large as the input."""
    return torch.native_dropout(input, p, True)[0]
