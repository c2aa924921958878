"""What processes add up among themselves, so that their steps and losses are those of one process with all rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import distributed, nn

from recbole_cce.nn.losses.loss_sum import LossSum

BUCKET = 2**20  # numbers; smaller gradients are sent together, as many calls take longer than their bytes


def sum_over_processes(number: torch.Tensor, several: bool) -> torch.Tensor:
    """A tensor added up over all processes, where there are `several`; the device is not waited for."""
    if not several:
        return number
    total = number.clone()
    distributed.all_reduce(total)
    return total


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace each gradient by its sum over all processes; a parameter without one, here or elsewhere, counts as 0."""
    small, waiting = [], []
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        if parameter.numel() < BUCKET:
            small.append(parameter.grad)
        else:
            waiting.append(distributed.all_reduce(parameter.grad, async_op=True))
    if small:
        together = torch.cat([gradient.flatten() for gradient in small])
        distributed.all_reduce(together)
        parts = together.split([gradient.numel() for gradient in small])
        torch._foreach_copy_(small, [part.view_as(gradient) for part, gradient in zip(parts, small, strict=True)])
    for each in waiting:
        each.wait()


def epoch_of(steps: Sequence[LossSum], several: bool) -> tuple[torch.Tensor, dict[str, float]]:
    """The mean loss [steps] of each step over all processes, fp64 on the CPU, and the statistics of all steps."""
    names = list(steps[0].statistics)
    rows = [(step.sum, step.count, *(number for name in names for number in step.statistics[name])) for step in steps]
    numbers = torch.stack([torch.stack([number.detach().double() for number in row]) for row in rows])
    total, count, *statistics = sum_over_processes(numbers, several).cpu().unbind(1)
    sums = [values.sum().item() for values in statistics]
    ratios = zip(names, sums[::2], sums[1::2], strict=True)
    return total / count.clamp(min=1), {name: above / max(below, 1) for name, above, below in ratios}
