"""Predicted and measured peak GPU memory of training steps, on one GPU.

    python -m benchmarks.memory

Predicted: what the command `plan` says. Measured: torch.cuda.max_memory_allocated() over three steps of SASRecCCE's own
trainer on random full-length rows, launched kernel by kernel, not compiled; a setting that does not fit says so.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import sys
import time
from dataclasses import dataclass

import torch
from recbole.data.interaction import Interaction
from recbole.utils import get_model, get_trainer, init_seed

import recbole_cce  # noqa: F401  registers the models
from recbole_cce.commands.plan import WITHOUT_DATA, Shape
from recbole_cce.data.dataset import TARGET_COUNT
from recbole_cce.nn.losses.registry import LOSSES
from recbole_cce.nn.losses.sampled import SampledLoss
from recbole_cce.plugin import entry_points
from recbole_cce.training.average import EVERY
from recbole_cce.training.memory import catalogue
from recbole_cce.training.out_of_memory import GIB
from recbole_cce.training.step_plan import StepPlan

STEPS = EVERY + 1  # the average of the weights exists then


@dataclass(frozen=True)
class Setting:
    """A loss, the model's shape, rows of a step and negatives where the loss has some."""

    loss_type: str
    shape: Shape
    rows: int
    negatives: int = 2048

    def __str__(self) -> str:
        shape = self.shape
        negatives = f", K={self.negatives}" if issubclass(LOSSES[self.loss_type], SampledLoss) else ""
        return f"{self.loss_type}{negatives}, {shape.items:,} x {shape.hidden}, {self.rows:,} x {shape.length}"


SETTINGS = (
    Setting("CCE-", Shape(26_744, 200, 256), 512),
    Setting("CCE", Shape(173_511, 320, 256), 256),
    Setting("CCE-", Shape(1_600_000, 200, 128), 512),
    Setting("CCE-", Shape(10_000_000, 50, 64), 1024),
    Setting("CE", Shape(26_744, 50, 64), 512),
    Setting("SCE", Shape(173_511, 100, 128), 512),
    Setting("CE-", Shape(173_511, 50, 64), 512, 256),
    Setting("gBCE", Shape(173_511, 50, 64), 512, 256),
)


def predicted(setting: Setting) -> int:
    """Bytes, by a dry run."""
    plan = StepPlan.full(setting.rows, setting.shape.length)
    return setting.shape.dry_run().memory(plan, loss_type=setting.loss_type, num_negatives=setting.negatives).peak


def measured(setting: Setting) -> int:
    """Bytes, on the GPU."""
    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()  # of the setting before; they count as memory
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    config = entry_points.configuration(
        "SASRecCCE",
        "none",
        [],
        {
            **setting.shape.settings,
            **WITHOUT_DATA,
            "loss_type": setting.loss_type,
            "num_negatives": setting.negatives,
            "train_batch_size": setting.rows,
            "gpu_id": os.environ.get("CUDA_VISIBLE_DEVICES", "0"),  # which RecBole would overwrite
            "state": "ERROR",
        },
    )
    init_seed(config["seed"], config["reproducibility"])
    with torch.device(config["device"]):
        model = get_model("SASRecCCE")(config, catalogue(config, setting.shape.items))
    model = model.to(config["device"]).train()
    trainer = get_trainer(config["MODEL_TYPE"], "SASRecCCE")(config, model)
    trainer.plan = StepPlan.full(setting.rows, setting.shape.length)
    torch.cuda.reset_peak_memory_stats()
    for _ in range(STEPS):
        trainer._step([batch(model, setting)], [trainer.plan.counts])
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def batch(model: torch.nn.Module, setting: Setting) -> Interaction:
    """Random full rows on the CPU, as the loader makes them."""
    rows, length, items = setting.rows, setting.shape.length, setting.shape.items
    return Interaction(
        {
            model.ITEM_SEQ: torch.randint(1, items + 1, (rows, length)),
            model.ITEM_SEQ_LEN: torch.full((rows,), length),
            model.POS_ITEM_ID: torch.randint(1, items + 1, (rows,)),
            TARGET_COUNT: torch.full((rows,), length),
        }
    )


def row(setting: Setting) -> str:
    """A line of the table."""
    guess = predicted(setting)
    try:
        truth = measured(setting)
    except torch.OutOfMemoryError:
        return f"| {setting} | {guess / GIB:.2f} | out of memory | |"
    except Exception as error:  # a row that fails is a result
        return f"| {setting} | {guess / GIB:.2f} | {f'{type(error).__name__}: {error}'.splitlines()[0][:150]} | |"
    return f"| {setting} | {guess / GIB:.2f} | {truth / GIB:.2f} | {100 * (guess / truth - 1):+.1f} |"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("it needs an NVIDIA GPU")
    sys.argv = sys.argv[:1]  # RecBole reads it
    logging.disable(logging.WARNING)
    started = time.perf_counter()
    print("| loss, items x hidden, rows x length | predicted, GiB | measured, GiB | error, % |\n|---|---|---|---|")
    for setting in SETTINGS:
        print(row(setting), flush=True)
    print(f"\n{torch.cuda.get_device_name()}, torch {torch.__version__}, {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
