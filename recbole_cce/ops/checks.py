"""Checks of arguments that all ops share. Every failure is a ValueError that names the argument and what it got."""

from __future__ import annotations

from typing import Any

import torch

REDUCTIONS = ("mean", "sum", "none")
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_inputs(
    input: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, padding_idx: int | None, reduction: str
) -> None:
    """Shapes, dtypes, devices and, where it costs no wait for a GPU, the range of `target`.

    On a GPU, target ids are checked under torch.autograd.detect_anomaly().
    """
    check_choice("reduction", reduction, REDUCTIONS)
    for name, tensor, dims in (("input", input, 2), ("weight", weight, 2), ("target", target, 1)):
        if tensor.dim() != dims:
            raise ValueError(f"{name}: has shape {tuple(tensor.shape)}, it takes {dims} dimension(s)")
    if input.size(1) == 0:
        raise ValueError(f"input: has shape {tuple(input.shape)}, it takes at least one column")
    if input.size(1) != weight.size(1):
        raise ValueError(f"weight: has {weight.size(1)} columns, input has {input.size(1)}")
    if len(target) != len(input):
        raise ValueError(f"target: has {len(target)} entries, input has {len(input)} rows")
    for name, tensor in (("input", input), ("weight", weight)):
        if tensor.dtype not in FLOATS:
            raise ValueError(f"{name}: has dtype {tensor.dtype}, it takes one of {', '.join(map(str, FLOATS))}")
    if target.dtype != torch.int64:
        raise ValueError(f"target: has dtype {target.dtype}, it takes torch.int64")
    if not input.device == weight.device == target.device:
        raise ValueError(
            f"input, weight and target are on different devices: {input.device}, {weight.device}, {target.device}"
        )
    rows = len(weight)
    if padding_idx is not None and not isinstance(padding_idx, int):
        raise ValueError(f"padding_idx: {padding_idx!r} is not valid; it takes an integer or None")
    if padding_idx is not None and not 0 <= padding_idx < rows:
        raise ValueError(f"padding_idx: {padding_idx} is no row of weight, which has {rows}")
    if rows - (padding_idx is not None) < 1:
        raise ValueError(f"weight: has {rows} row(s) with padding_idx {padding_idx}, so there is no item")
    if torch.compiler.is_compiling() or len(target) == 0:
        return
    if target.device.type == "cpu" or torch.is_anomaly_enabled():
        low, high = target.min().item(), target.max().item()
        if low < 0 or high >= rows:
            raise ValueError(f"target: has ids from {low} to {high}, weight has rows 0 to {rows - 1}")


def check_choice(name: str, value: Any, options: tuple[Any, ...]) -> None:
    """`value` is one of `options`."""
    if value not in options:
        raise ValueError(f"{name}: {value!r} is not valid; it takes one of {', '.join(map(str, options))}")


def check_count(name: str, value: Any) -> None:
    """`value` is an integer of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}: {value!r} is not valid; it takes an integer >= 1")


def reduce(loss: torch.Tensor, counted: torch.Tensor, number: torch.Tensor, reduction: str) -> torch.Tensor:
    """[N] losses, zero where not `counted` [N] -> their mean over the `number` of counted rows, their sum, or [N]."""
    if reduction == "none":
        return loss.where(counted, 0)  # nothing of an upstream gradient comes past here, were it NaN
    total = loss.sum()
    return total if reduction == "sum" else total / number


def counted(target: torch.Tensor, padding_idx: int | None) -> torch.Tensor:
    """[N] bool: the rows that have a target."""
    return torch.ones_like(target, dtype=torch.bool) if padding_idx is None else target != padding_idx


def number(counted: torch.Tensor) -> torch.Tensor:
    """How many rows a mean is over: the counted ones, at least 1, so that it is 0 where there are none."""
    return counted.sum().clamp(min=1)
