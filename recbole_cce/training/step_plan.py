"""How the training steps of a data set are made: packed or padded, captured, compiled, and for how many positions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from recbole_cce.errors import UserError
from recbole_cce.nn.batch import Counts
from recbole_cce.nn.packing import packs
from recbole_cce.ops.backend import triton_unavailable

# of cuda_graph: auto; a larger step computes for longer than Python takes to launch it
MAX_GRAPHED_POSITIONS = 2**18

# of compile_encoder: auto, on an H100; saved per number of a layer's hidden states
SECONDS_SAVED = 1e-10
SECONDS_TO_COMPILE = 20


@dataclass(frozen=True)
class StepPlan:
    """Decided once for a data set; what trains, what predicts memory and what advises read the same numbers.

    Attributes:
        rows: of a full batch.
        length: positions of a padded row.
        counts: the most real positions and targets that a full batch practically has.
        packed: whether the encoder takes the real positions alone.
        captured: whether a step is launched as one CUDA graph.
        compiled: whether the encoder is run by torch.compile.
    """

    rows: int
    length: int
    counts: Counts
    packed: bool = False
    captured: bool = False
    compiled: bool = False

    @classmethod
    def full(cls, rows: int, length: int, last: bool = False) -> StepPlan:
        """Of full rows, the most that a batch can have, trained at every position or only at the `last` one."""
        return cls(rows, length, Counts(rows * length, rows if last else rows * length))

    @classmethod
    def made(
        cls, config: Mapping[str, Any], loss: nn.Module, loader: Any, device: torch.device, distributed: bool
    ) -> StepPlan:
        """Of a loader of training batches.

        Raises:
            UserError: cuda_graph or compile_encoder is True where that cannot be.
        """
        data = loader.dataset
        rows, length = min(loader.batch_size, len(data)), config["MAX_ITEM_LIST_LENGTH"]
        padded = len(data) * length
        real = int(data.sizes()[0].sum())
        packed = packs(config["attention"], real, padded)
        plan = cls(rows, length, data.capacity(rows), packed)
        captured = captures(config, loss, plan.positions, device, distributed)
        compiled = compiles(config, real if packed else padded, device)
        return cls(rows, length, plan.counts, packed, captured, compiled)

    @property
    def positions(self) -> int:
        """Positions that the encoder computes in a full step."""
        return self.counts.positions if self.packed else self.rows * self.length


def captures(
    config: Mapping[str, Any], loss: nn.Module, positions: int, device: torch.device, distributed: bool
) -> bool:
    """What `cuda_graph` means for steps of so many positions.

    Raises:
        UserError: it is True where a step cannot be captured.
    """
    wanted, batches = config["cuda_graph"], config["accumulate_steps"] or 1
    obstacles = {
        f"on {device.type}": device.type != "cuda",
        "with several processes": distributed,
        f"with accumulate_steps: {batches}": batches > 1,
        f"with loss_type: {config['loss_type']}": not loss.capturable,
    }
    for obstacle, present in obstacles.items():
        if present and wanted is True:
            raise UserError(f"cuda_graph: True is not valid {obstacle}; it takes auto or False there")
    if wanted is False or any(obstacles.values()):
        return False
    return wanted is True or (wanted == "auto" and positions <= MAX_GRAPHED_POSITIONS)


def compiles(config: Mapping[str, Any], positions: int, device: torch.device) -> bool:
    """What `compile_encoder` means for epochs of so many positions.

    Compiled, each position of a step is read and written less often; the more positions all steps have, the more that
    saves. RecBole stops early, so that of the epochs asked for a tenth is expected.

    Raises:
        UserError: it is True with RecBole's own layers.
    """
    wanted, attention = config["compile_encoder"], config["attention"]
    if wanted is True and attention == "recbole":
        raise UserError("compile_encoder: True is not valid with attention: recbole; it takes auto or False there")
    if wanted != "auto":
        return wanted is True
    if attention == "recbole" or device.type != "cuda" or triton_unavailable(device) is not None:
        return False
    numbers = positions * config["hidden_size"] * config["n_layers"] * config["epochs"] / 10
    return numbers * SECONDS_SAVED > SECONDS_TO_COMPILE
