"""Forward and backward pass of a training step as one CUDA graph, launched at once instead of kernel by kernel.

A step of a few thousand targets computes for less time than Python takes to launch its two to three hundred kernels.
A graph replays them with the same shapes and addresses, so a batch is copied into fixed tensors: missing rows become
rows of padding, and what the model computes has room for a fixed number of positions and targets.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from recbole.data.interaction import Interaction
from torch import nn

from recbole_cce.nn.batch import Counts
from recbole_cce.nn.losses.loss_sum import LossSum

WARM_UP_STEPS = 3  # compile kernels, create handles and workspaces: nothing of that may happen in a capture


class GraphedStep:
    """`step(interaction, counts)` -> its loss, which leaves gradients in the model's parameters, captured and replayed.

    The first WARM_UP_STEPS batches, and those that do not fit, go through `step` itself. Random numbers are those
    that `step` would draw. The gradients stay where they are from one replay to the next: no zero_grad() between.

    Args:
        model: whose parameters get the gradients.
        step: clears the gradients, then forward and backward pass; reads nothing but `interaction`, waits for nothing.
        rows: of a full batch.
        capacity: the most that a batch may have.
    """

    def __init__(
        self, model: nn.Module, step: Callable[[Interaction, Counts], LossSum], rows: int, capacity: Counts
    ) -> None:
        self.model = model
        self.parameters = list(model.parameters())  # to walk through the modules at each step takes long
        self.step = step
        self.rows = rows
        self.capacity = capacity
        self.device = next(model.parameters()).device
        self.stream = torch.cuda.Stream(self.device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.batch: Interaction | None = None
        self.loss: LossSum | None = None
        self.gradients: list[torch.Tensor | None] = []
        self.warm_up_steps = WARM_UP_STEPS

    def __call__(self, interaction: Interaction, counts: Counts) -> LossSum:
        """The loss of a batch on the CPU; the gradients are then in the parameters."""
        if not self.fits(interaction, counts):
            return self.step(on_device(interaction, self.device), counts)
        self.fill(interaction)
        if self.graph is None and self.warm_up_steps > 0:
            self.warm_up_steps -= 1
            return self.warm_up()
        if self.graph is None:
            self.capture()
        assert self.graph is not None and self.loss is not None
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient
        self.graph.replay()
        return self.loss.copied()

    def fits(self, interaction: Interaction, counts: Counts) -> bool:
        """Whether the fixed tensors hold the batch."""
        return (
            len(interaction) <= self.rows
            and counts.positions <= self.capacity.positions
            and counts.targets <= self.capacity.targets
        )

    def fill(self, interaction: Interaction) -> None:
        """Copy the batch into the fixed tensors; rows past its end are zero."""
        if self.batch is None:
            self.batch = Interaction(
                {
                    field: torch.zeros(self.rows, *values.shape[1:], dtype=values.dtype, device=self.device)
                    for field, values in interaction.interaction.items()
                }
            )
        for field, values in interaction.interaction.items():
            fixed = self.batch[field]
            fixed[: len(values)].copy_(values.pin_memory(), non_blocking=True)  # pinned, or it waits for the device
            fixed[len(values) :].zero_()

    def warm_up(self) -> LossSum:
        """A step of its own on the stream of the capture."""
        main = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(main)
        with torch.cuda.stream(self.stream):
            loss = self.step(self.batch, self.capacity)
        main.wait_stream(self.stream)
        return loss

    def capture(self) -> None:
        """Record the step, without running it."""
        self.model.zero_grad()  # what the step would free is not of the graph's memory
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=self.stream):
            self.loss = self.step(self.batch, self.capacity)
        # the capture sets the random seed on its stream; it must not come after the first replay's
        torch.cuda.current_stream(self.device).wait_stream(self.stream)
        self.gradients = [parameter.grad for parameter in self.parameters]


def on_device(interaction: Interaction, device: torch.device) -> Interaction:
    """Interaction.to(), which on the way to a GPU does not wait for what is computed there."""
    if device.type != "cuda":
        return interaction.to(device)
    columns = interaction.interaction.items()
    return Interaction({field: values.pin_memory().to(device, non_blocking=True) for field, values in columns})
