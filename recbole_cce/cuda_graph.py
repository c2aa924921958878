"""Forward and backward pass of a training step as one CUDA graph, launched at once instead of kernel by kernel.

A step of a few thousand targets computes for less time than Python takes to launch its two to three hundred kernels.
A graph replays them with the same shapes and addresses, so a batch is copied into fixed tensors: missing rows become
rows of padding, and the model keeps its targets in a fixed number of places.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from recbole.data.interaction import Interaction
from torch import nn

WARM_UP_STEPS = 3  # compile kernels, create handles and workspaces: nothing of that may happen in a capture


class GraphedStep:
    """`step(interaction)` -> loss, which leaves gradients in the model's parameters, captured and replayed.

    The first WARM_UP_STEPS batches, and those that do not fit, go through `step` itself. Random numbers are those
    that `step` would draw. The gradients stay where they are from one replay to the next: no zero_grad() between.

    Args:
        model: its `target_capacity` is set while `step` runs.
        step: clears the gradients, then forward and backward pass; reads nothing but `interaction`, waits for nothing.
        rows: of a full batch.
        target_capacity: the most targets that a batch may have, None if there is one a row.
        target_count: name of the field that counts a row's targets.
    """

    def __init__(
        self,
        model: nn.Module,
        step: Callable[[Interaction], torch.Tensor],
        rows: int,
        target_capacity: int | None,
        target_count: str,
    ) -> None:
        self.model = model
        self.step = step
        self.rows = rows
        self.target_capacity = target_capacity
        self.target_count = target_count
        self.device = next(model.parameters()).device
        self.stream = torch.cuda.Stream(self.device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.batch: Interaction | None = None
        self.loss: torch.Tensor | None = None
        self.gradients: list[torch.Tensor | None] = []
        self.warm_up_steps = WARM_UP_STEPS

    def __call__(self, interaction: Interaction) -> torch.Tensor:
        """The loss of a batch on the CPU; the gradients are then in the parameters."""
        if not self.fits(interaction):
            return self.step(interaction.to(self.device))
        self.fill(interaction)
        self.model.target_capacity = self.target_capacity
        try:
            if self.graph is None and self.warm_up_steps > 0:
                self.warm_up_steps -= 1
                return self.warm_up()
            if self.graph is None:
                self.capture()
        finally:
            self.model.target_capacity = None
        for parameter, gradient in zip(self.model.parameters(), self.gradients, strict=True):
            parameter.grad = gradient
        self.graph.replay()
        return self.loss.clone()

    def fits(self, interaction: Interaction) -> bool:
        """Whether the fixed tensors hold the batch."""
        if len(interaction) > self.rows:
            return False
        return self.target_capacity is None or int(interaction[self.target_count].sum()) <= self.target_capacity

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
            fixed[: len(values)].copy_(values.pin_memory(), non_blocking=True)
            fixed[len(values) :].zero_()

    def warm_up(self) -> torch.Tensor:
        """A step of its own on the stream of the capture."""
        main = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(main)
        with torch.cuda.stream(self.stream):
            loss = self.step(self.batch)
        main.wait_stream(self.stream)
        return loss

    def capture(self) -> None:
        """Record the step, without running it."""
        self.model.zero_grad()  # what the step would free is not of the graph's memory
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=self.stream):
            self.loss = self.step(self.batch)
        self.gradients = [parameter.grad for parameter in self.model.parameters()]
