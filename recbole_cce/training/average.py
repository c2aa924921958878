"""The average of a model's weights over the last part of training, which is what is validated, tested and saved.

The steps of the optimizer go about a good place rather than to it; the average of where they were is nearer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

# weight_average: auto; and up to how many parameters: beyond them, memory is what a run lacks
SHARE, MOST_PARAMETERS = 0.1, 2**26

# steps from one sample of the weights to the next: those of neighbouring steps are nearly the same, and each one costs
# as much as a third of an optimizer's step
EVERY = 8


class WeightAverage:
    """A running average over about the last `share` of all samples so far, beside the weights that are trained.

    Samples p_1, p_2, ... are the parameters after every EVERY-th step and at the end of an epoch;

        a_n = a_{n-1} + w_n (p_n - a_{n-1}),    w_n = g / (n + g - 1),    g = 1 / share

    so that it is p_1 at first and, as training slows, grows longer; with share = 1 it is the mean. This is the
    polynomial-decay averaging of Shamir and Zhang (ICML 2013). One more copy of the parameters, of their dtype and on
    their device; nothing waits for that. Processes whose parameters are equal have equal averages.

    Args:
        model: its parameters hold the running weights while an epoch is trained, and the average outside of one.
        share: in (0, 1].
    """

    def __init__(self, model: nn.Module, share: float) -> None:
        self.parameters = dict(model.named_parameters())
        self.decay = 1 / share
        self.samples = 0
        self.steps = 0  # since the last sample
        self.aside: dict[str, torch.Tensor] = {}  # what the parameters do not hold
        self.shown = False  # whether that is the running weights

    def step(self) -> None:
        """After a step of the optimizer."""
        self.steps += 1
        if self.steps == EVERY:
            self._sample()

    def show(self) -> None:
        """Put the average into the parameters, the running weights aside: after an epoch."""
        if self.steps:
            self._sample()
        if self.samples and not self.shown:
            self._swap()

    def hide(self) -> None:
        """Undo show(): before an epoch."""
        if self.shown:
            self._swap()

    def state(self) -> dict[str, Any] | None:
        """What a checkpoint holds besides the average, its `state_dict`: as load() takes it, between epochs."""
        return {"samples": self.samples, "running": self.aside} if self.shown else None

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a state() whose average is in the parameters."""
        self.samples, self.steps, self.shown = state["samples"], 0, True
        self.aside = {
            name: state["running"][name].to(parameter.device, copy=True) for name, parameter in self.parameters.items()
        }

    @torch.no_grad()
    def _sample(self) -> None:
        self.steps = 0
        self.samples += 1
        if not self.aside:
            self.aside = {name: torch.zeros_like(parameter) for name, parameter in self.parameters.items()}
        weight = self.decay / (self.samples + self.decay - 1)
        torch._foreach_lerp_(list(self.aside.values()), list(self.parameters.values()), weight)

    def _swap(self) -> None:
        # storages are exchanged, so that a CUDA graph finds the running weights where they were
        for name, parameter in self.parameters.items():
            parameter.data, self.aside[name] = self.aside[name], parameter.data
        self.shown = not self.shown


def share(wanted: Any, parameters: int) -> float | None:
    """What `weight_average` means for a model of so many parameters; None: no average."""
    if wanted == "auto":
        return SHARE if parameters <= MOST_PARAMETERS else None
    return None if wanted in (None, "none") else float(wanted)


def load_running(model: nn.Module, state: dict[str, Any]) -> None:
    """Put the running weights of a WeightAverage.state() into a model that goes on without an average."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(state["running"][name])
