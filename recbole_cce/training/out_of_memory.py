"""What to lower, and to what, when a step or an evaluation needs more memory than there is."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import psutil
import torch
from torch import nn

from recbole_cce.nn.batch import Places
from recbole_cce.nn.packing import packs

UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
GIB = 2**30
USABLE = 0.9  # of the memory: the rest is lost to other processes, the CUDA context and between the blocks


def training_advice(config: Mapping[str, Any], model: nn.Module, places: Places, peak: int, total: int) -> str:
    """Which keys to lower, and to what, after a training step ran out of memory.

    The step needs `peak` bytes or more: it did not end. So its parts are also estimated, bytes a position and bytes a
    target, and the larger number counts.

    Args:
        config: the run's configuration.
        model: with `n_items`; its parameters, their gradients and Adam's two moments are what no key below changes.
        places: of the step.
        peak: bytes that were allocated, with the request that failed.
        total: bytes of the device.
    """
    batch, length = config["train_batch_size"], config["MAX_ITEM_LIST_LENGTH"]
    padded = batch * length
    positions = places.positions if packs(config["attention"], places.positions, padded) else padded
    columns, loss_type = config["hidden_size"], config["loss_type"]
    fixed = 16 * sum(parameter.numel() for parameter in model.parameters())
    # hidden states, inner states and masks that the backward pass reads
    layers = positions * config["n_layers"] * (40 * columns + 8 * config["inner_size"])
    if config["attention"] == "recbole":
        layers += config["n_layers"] * 20 * batch * config["n_heads"] * length**2
    # logits and their gradients; negatives' vectors and theirs
    head = {
        "CE": 10 * places.targets * model.n_items,
        "CE-": 8 * places.targets * (config["num_negatives"] or 0) * columns,
    }.get(loss_type, 0)
    needed = max(peak - fixed, layers + head)
    share = (USABLE * total - fixed) / needed
    if share <= 0.01:
        return (
            f"the item table, its gradient and the optimizer's moments take {fixed / GIB:.1f} GiB, "
            f"{total / GIB:.1f} are there: lower hidden_size: {columns}, or leave out rare items with "
            "item_inter_num_interval"
        )
    keys = {"train_batch_size": batch, "MAX_ITEM_LIST_LENGTH": length}
    if head > layers and loss_type == "CE-":
        keys = {"num_negatives": config["num_negatives"], **keys}
    if loss_type == "SCE":
        keys |= {key: config[key] for key in ("n_buckets", "bucket_size_x", "bucket_size_y") if config[key] != "auto"}
    text = lowered(keys, share, fixed + needed, total)
    return f"{text}, or use loss_type: CCE, which keeps no logits" if loss_type == "CE" else text


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
    return lowered(keys, max(0.01, (USABLE * total - fixed) / needed), fixed + needed, total)


def lowered(keys: Mapping[str, int], share: float, needed: int, total: int) -> str:
    """Each key at its share, or at half: what ran out at its first step may need more than it had asked for."""
    share = min(share, 0.5)
    options = [f"{key} from {value} to {max(1, int(value * share))}" for key, value in keys.items() if value > 1]
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
