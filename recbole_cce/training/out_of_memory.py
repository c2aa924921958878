"""What to lower, and to what, when a step or an evaluation needs more memory than there is."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import psutil
import torch
from recbole.config import Config
from torch import nn

from recbole_cce.nn.batch import Counts
from recbole_cce.training.memory import DryRun, largest
from recbole_cce.training.step_plan import StepPlan

UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
GIB = 2**30
USABLE = 0.9  # of the memory: the rest is lost to other processes, the CUDA context and between the blocks


def training_advice(
    config: Config, model_class: Callable[..., nn.Module], items: int, plan: StepPlan, peak: int, total: int
) -> str:
    """Which keys to lower, and to what, after a training step ran out of memory.

    What the step would have taken is predicted as the command `plan` does. The step needs `peak` bytes or more, as it
    did not end: where that is more than predicted, what grows with the batch is taken to be as much larger.

    Args:
        config: the run's configuration.
        model_class, items: the model's class, one of this package, and V.
        plan: of the step.
        peak: bytes that were allocated, with the request that failed.
        total: bytes of the device.
    """
    budget = USABLE * total
    dry_run = DryRun(config, model_class, items)
    predicted, least = dry_run.memory(plan), dry_run.memory(replace(plan, rows=1, counts=of_rows(plan, 1))).peak
    if least > budget:
        return (
            f"the item table, its gradient and the optimizer's moments take {predicted.parameters / GIB:.1f} GiB, "
            f"{total / GIB:.1f} are there: lower hidden_size: {config['hidden_size']}, or leave out rare items with "
            "item_inter_num_interval"
        )
    growing = max(predicted.peak - least, 1)
    scale = max(1.0, (peak - least) / growing)  # of what grows with the batch
    affordable = int(least + (budget - least) / scale)

    def rows(number: int) -> int:
        return dry_run.memory(replace(plan, rows=number, counts=of_rows(plan, number))).peak

    def length(number: int) -> int:
        shorter = replace(plan, length=number, counts=of_share(plan, number / plan.length))
        return dry_run.memory(shorter).peak

    def of_loss(key: str) -> Callable[[int], int]:
        return lambda number: dry_run.memory(plan, **{key: number}).peak

    keys: dict[str, tuple[int, Callable[[int], int]]] = {
        "train_batch_size": (plan.rows, rows),
        "MAX_ITEM_LIST_LENGTH": (plan.length, length),
    }
    if predicted.loss > predicted.encoder:  # what the loss holds may be made smaller, too
        for key in KEYS_OF_LOSS.get(config["loss_type"], ()):
            if config[key] != "auto":
                keys[key] = config[key], of_loss(key)
    found = {key: (value, largest(cost, affordable, value)) for key, (value, cost) in keys.items() if value > 1}
    if scale > 1:  # what ran out at its first step may need more than it had asked for
        found = {key: (value, min(number, value // 2)) for key, (value, number) in found.items()}
    text = lowered(found, max(peak, predicted.peak), total)
    return f"{text}, or use loss_type: CCE, which keeps no logits" if config["loss_type"] == "CE" else text


# keys of a loss that its memory grows with
KEYS_OF_LOSS = {"CE-": ("num_negatives",), "SCE": ("n_buckets", "bucket_size_x", "bucket_size_y")}


def of_rows(plan: StepPlan, rows: int) -> Counts:
    """The counts of a plan with other rows."""
    return of_share(plan, rows / plan.rows)


def of_share(plan: StepPlan, share: float) -> Counts:
    """The counts of a plan of which a share is left."""
    positions, targets = (max(1, math.ceil(share * number)) for number in plan.counts[:2])
    return Counts(positions, targets, fixed=True)


def evaluation_advice(
    config: Mapping[str, Any], model: nn.Module, chunk_items: int, needs_scores: bool, peak: int, total: int
) -> str:
    """The same after a ranking ran out of memory; `chunk_items`: what eval_chunk_items was, or was chosen as.

    With `needs_scores` (GAUC) all scores of a batch are held, and eval_chunk_items does nothing.
    """
    fixed = 16 * sum(parameter.numel() for parameter in model.parameters())
    needed = max(peak - fixed, 12 * config["eval_batch_size"] * (model.n_items if needs_scores else chunk_items))
    keys = {"eval_batch_size": config["eval_batch_size"]}
    if not needs_scores:
        keys["eval_chunk_items"] = chunk_items
    share = min(0.5, max(0.01, (USABLE * total - fixed) / needed))
    found = {key: (value, max(1, int(value * share))) for key, value in keys.items() if value > 1}
    return lowered(found, fixed + needed, total)


def lowered(keys: Mapping[str, tuple[int, int]], needed: int, total: int) -> str:
    """Each key with its value and a smaller one, either of which would do."""
    options = [f"{key} from {value} to {number}" for key, (value, number) in keys.items()]
    return f"{needed / GIB:.1f} GiB or more are needed, {total / GIB:.1f} are there: lower {', or '.join(options)}"


def requested(error: torch.OutOfMemoryError) -> int:
    """Bytes of the request that failed, from torch's message; 0 if it does not say."""
    found = re.search(r"Tried to allocate ([\d.]+) (KiB|MiB|GiB)", str(error))
    return int(float(found[1]) * UNITS[found[2]]) if found else 0


def usage(error: torch.OutOfMemoryError, device: torch.device) -> tuple[int, int]:
    """Bytes that would have been allocated, at least, and bytes of the device; called where the error is caught."""
    if device.type != "cuda":
        return psutil.Process().memory_info().rss + requested(error), psutil.virtual_memory().total
    return torch.cuda.memory_allocated(device) + requested(error), torch.cuda.mem_get_info(device)[1]
