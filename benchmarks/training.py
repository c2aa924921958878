"""Time, memory and where the time goes of training steps: RecBole's SASRec and ours, on one GPU.

    python -m benchmarks.training --output=DIR [--shapes=d256,beauty256] [--only="ours CCE-;RecBole"]

Every row goes through the real data set, loader, model, loss and trainer: `_train_epoch` of the trainer that RecBole
would take. The data set is synthetic and made in memory: each user's training history fills all but one position of a
row, so that SASRecCCE trains one row a user at all of its positions; items are drawn uniformly and all of them occur.
`beauty` and `beauty256` have the 22,363 users, 12,101 items and lengths of the 5-core of Amazon Beauty. RecBole's own
data set would write one copy of the history for each target, out of the question at these sizes: its SASRec gets the
same rows, each with its one target, from a list in memory. That leaves the making of its batches out of its times.

A target is what a loss is computed for: one a row with RecBole, every position with ours. Time per epoch is that of all
targets once: measured for ours, for RecBole's as many steps as its rows, one a target, make batches.

Busy is the share of the time between a profiled epoch's first and last kernel in which a kernel or a copy runs. Shares
are of the time of kernels, in another profiled epoch, launched one by one: a backward kernel counts where its forward
operation does. `table` is the gradients' accumulation, most of it the item table's.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import torch
from recbole.config import Config
from recbole.data import data_preparation
from recbole.utils import FeatureSource, FeatureType, get_model, get_trainer, init_seed

from benchmarks.csv_file import write_csv
from benchmarks.profiles import PARTS, busy_share, shares
from recbole_cce.data.dataset import LeanSequentialDataset

BYTES = 3.0e12  # measured on an H100 80GB HBM3: bytes a second of copies


@dataclass(frozen=True)
class Shape:
    """V items, D columns, L positions a row, batches of B rows; `steps` of them an epoch where lengths are full."""

    items: int
    columns: int
    length: int
    batch: int
    steps: int = 8
    beauty: bool = False

    def __str__(self) -> str:
        return f"{self.items} x {self.columns}, {self.batch} x {self.length}"


SHAPES = {
    "d64": Shape(26_744, 64, 50, 2048),
    "d256": Shape(26_744, 256, 200, 2048, steps=24),
    "l320": Shape(173_511, 256, 320, 1024, steps=24),
    "v1600k": Shape(1_600_000, 128, 200, 1024, steps=24),
    "beauty": Shape(12_101, 64, 50, 2048, beauty=True),
    "beauty256": Shape(12_101, 256, 50, 2048, beauty=True),
}
# users of the 5-core of Amazon Beauty with 2, 3, ... items in their training history; 50 stands for more, too
BEAUTY = (
    *(7162, 4221, 2680, 1811, 1366, 881, 695, 558, 439, 361, 262, 213, 207, 141, 118, 117, 112, 84, 74, 73, 66, 61, 54),
    *(44, 44, 38, 38, 30, 24, 23, 23, 22, 21, 20, 19, 17, 15, 15, 11, 10, 10, 9, 8, 8, 8, 7, 7, 4, 136),
)

# name -> model and settings. Compiled only where it says so: these runs are too short for compile_encoder: auto.
IMPLEMENTATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "RecBole": ("SASRec", {}),
    "RecBole, AMP": ("SASRec", {"enable_amp": True, "enable_scaler": True}),
    "ours CCE-": ("SASRecCCE", {"loss_type": "CCE-"}),
    "ours CCE-, compiled": ("SASRecCCE", {"loss_type": "CCE-", "compile_encoder": True}),
    "ours CCE-, K=512, compiled": (
        "SASRecCCE",
        {"loss_type": "CCE-", "num_negatives": 512, "compile_encoder": True},
    ),
    "ours CCE": ("SASRecCCE", {"loss_type": "CCE"}),
    "ours SCE": ("SASRecSCE", {"loss_type": "SCE"}),
    "ours gBCE": ("SASRecCCE", {"loss_type": "gBCE"}),
    "ours gBCE, plain torch": ("SASRecCCE", {"loss_type": "gBCE", "loss_backend": "torch"}),
    "ours BCE": ("SASRecCCE", {"loss_type": "BCE"}),
    "ours CE-, K=256": ("SASRecCCE", {"loss_type": "CE-", "num_negatives": 256}),
    "ours CE": ("SASRecCCE", {"loss_type": "CE"}),
    "ours CCE-, packed": ("SASRecCCE", {"loss_type": "CCE-", "attention": "packed"}),
    "ours CCE-, padded": ("SASRecCCE", {"loss_type": "CCE-", "attention": "sdpa"}),
    "ours CCE-, packed, compiled": ("SASRecCCE", {"loss_type": "CCE-", "attention": "packed", "compile_encoder": True}),
    "ours CCE-, padded, compiled": ("SASRecCCE", {"loss_type": "CCE-", "attention": "sdpa", "compile_encoder": True}),
}
LAYOUTS = [name for name in IMPLEMENTATIONS if "packed" in name or "padded" in name]


class Synthetic(LeanSequentialDataset):
    """Interactions from memory instead of a file."""

    def __init__(self, config: Config, frame: pd.DataFrame) -> None:
        self.frame = frame
        super().__init__(config)

    def _load_data(self, token: str, dataset_path: str) -> None:
        self.inter_feat = self.frame
        for field, ftype in (("user_id", "token"), ("item_id", "token"), ("timestamp", "float")):
            self.set_field_property(field, FeatureType(ftype), FeatureSource.INTERACTION, 1)
        self.user_feat = self.item_feat = None


def interactions(shape: Shape, seed: int = 0) -> pd.DataFrame:
    """Users one after another, their interactions in order: a first item, the training row's, and two to test."""
    rng = np.random.default_rng(seed)
    if shape.beauty:
        counts = np.repeat(np.arange(2, 51), BEAUTY) + 3
    else:
        counts = np.full(shape.steps * shape.batch, shape.length + 2)
    total = counts.sum()
    items = rng.integers(0, shape.items, total, dtype=np.int32)
    items[rng.permutation(total)[: shape.items]] = np.arange(shape.items)  # each occurs
    users = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    return pd.DataFrame({"user_id": users, "item_id": items, "timestamp": np.arange(total, dtype=np.float64)})


class Rows:
    """Batches in memory in the place of RecBole's loader."""

    shuffle = False

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class Data:
    """The loader of a shape's data, shared by all implementations."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        config = self.configure("SASRecCCE", {})
        dataset = Synthetic(config, interactions(shape))
        self.train, *_ = data_preparation(config, dataset)
        self.dataset = self.train.dataset
        assert self.dataset.item_num == shape.items + 1

    def configure(self, model: str, settings: dict[str, Any]) -> Config:
        """RecBole's configuration; dropout and layers are the defaults of SASRecCCE with either model."""
        common = {
            "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
            "MAX_ITEM_LIST_LENGTH": self.shape.length,
            "hidden_size": self.shape.columns,
            "train_batch_size": self.shape.batch,
            "hidden_dropout_prob": 0.5,
            "learning_rate": 0.001,
            "user_inter_num_interval": None,
            "item_inter_num_interval": None,
            "train_neg_sample_args": None,
            "show_progress": False,
            "state": "ERROR",
            "gpu_id": os.environ.get("CUDA_VISIBLE_DEVICES", "0"),  # which RecBole would overwrite
        }
        return Config(model, "synthetic", config_dict={**common, **settings})

    def rows_for_recbole(self) -> Rows:
        """Rows of one target, from our loader."""
        batches = []
        for batch in self.train:
            batches.append(batch)
            if len(batches) == min(4, self.shape.steps):
                break
        return Rows(batches)


def build(data: Data, model: str, settings: dict[str, Any]) -> SimpleNamespace:
    """Trainer and train data of one implementation, its weights made on the GPU."""
    config = data.configure(model, settings)
    init_seed(config["seed"], config["reproducibility"])
    with torch.device(config["device"]):
        network = get_model(model)(config, data.dataset)
    network = network.to(config["device"])  # of what was made from arrays
    trainer = get_trainer(config["MODEL_TYPE"], model)(config, network)
    return SimpleNamespace(trainer=trainer, data=data.rows_for_recbole() if model == "SASRec" else data.train)


def epoch_seconds(run: SimpleNamespace, epoch: int) -> float:
    """Seconds of an epoch, which ends with the last kernel."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    run.trainer._train_epoch(run.data, epoch)
    torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(data: Data, name: str, seconds: float) -> dict[str, Any]:
    """One row, or why there is none."""
    model, settings = IMPLEMENTATIONS[name]
    gc.collect()
    torch._dynamo.reset()
    torch._C._cuda_clearCublasWorkspaces()  # of the row before; they count as memory
    torch.cuda.empty_cache()
    try:
        return measure_steps(data, model, settings, seconds)
    except torch.OutOfMemoryError:
        return {"error": "out of memory"}
    except Exception as error:  # a row that fails is a result
        return {"error": f"{type(error).__name__}: {error}".splitlines()[0][:200]}


def measure_steps(data: Data, model: str, settings: dict[str, Any], seconds: float) -> dict[str, Any]:
    """As measure(), raising what goes wrong."""
    before = torch.cuda.memory_allocated()
    run = build(data, model, settings)
    torch.cuda.reset_peak_memory_stats()  # before the capture, whose memory later steps use without allocating it
    started = time.perf_counter()
    epoch_seconds(run, 0)  # compiles, captures
    first = time.perf_counter() - started
    estimate = epoch_seconds(run, 1)
    repeats = max(1, min(5, int(seconds / estimate)))
    epoch = statistics.median(epoch_seconds(run, number) for number in range(2, 2 + repeats))
    steps, targets = len(run.data), data.dataset.n_targets
    rows = sum(len(batch) for batch in run.data) if model == "SASRec" else len(data.dataset)
    result = {
        "step_ms": 1e3 * epoch / steps,
        "targets_per_s": (rows if model == "SASRec" else targets) / epoch,
        "epoch_s": epoch * targets / rows if model == "SASRec" else epoch,
        "peak_gib": (torch.cuda.max_memory_allocated() - before) / 2**30,
        "first_epoch_s": first,
        # gradient, two moments and the weight are read, all but the gradient written
        "adam_floor_ms": 1e3 * 28 * data.shape.items * data.shape.columns / BYTES,
    }
    try:
        result["busy"] = busy_share(run.trainer, lambda: epoch_seconds(run, 0))
        if getattr(run.trainer, "graphed_step", None) is None:
            result |= shares(run.trainer, lambda: epoch_seconds(run, 0))
        elif not settings.get("compile_encoder"):  # without a graph it would be compiled anew
            # the parts of a captured step have no names
            apart = build(data, model, {**settings, "cuda_graph": False})
            epoch_seconds(apart, 0)
            result |= shares(apart.trainer, lambda: epoch_seconds(apart, 0))
    except torch.OutOfMemoryError:
        pass  # two models at a time: the row stays without shares
    return result


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown; speeds beside those of RecBole's fp32 row of the same shape."""
    lines = [
        "| V x D, B x L | implementation | step, ms | targets/s | against RecBole | epoch, s | peak, GiB | busy | "
        + " | ".join(PARTS)
        + " | first epoch, s |",
        "|---" * (9 + len(PARTS)) + "|",
    ]
    for row in rows:
        if "error" in row:
            lines.append(f"| {row['shape']} | {row['name']} | {row['error']} |" + " |" * (6 + len(PARTS)))
            continue
        stock = [r for r in rows if r["shape"] == row["shape"] and r["name"] == "RecBole" and "error" not in r]
        against = f"{row['targets_per_s'] / stock[0]['targets_per_s']:.1f}" if stock else ""
        cells = [f"{row['step_ms']:.2f}", f"{row['targets_per_s']:,.0f}", against, f"{row['epoch_s']:.2f}"]
        cells += [f"{row['peak_gib']:.2f}", *(f"{100 * row[k]:.0f}%" if k in row else "" for k in ("busy", *PARTS))]
        cells += [f"{row['first_epoch_s']:.1f}"]
        lines.append(f"| {row['shape']} | {row['name']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def figure(rows: list[dict[str, Any]], output: Path) -> None:
    """For each shape, what a step of each implementation is made of."""
    from matplotlib.figure import Figure

    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    drawn = Figure(figsize=(11, 1.2 + 0.24 * len(rows) + 0.5 * len(shapes)), layout="constrained")
    counts = [sum(row["shape"] == shape for row in rows) for shape in shapes]
    axes = drawn.subplots(len(shapes), 1, squeeze=False, height_ratios=counts)[:, 0]
    for ax, shape in zip(axes, shapes, strict=True):
        group = [row for row in rows if row["shape"] == shape][::-1]
        for place, row in enumerate(group):
            left = 0.0
            for color, part in enumerate(PARTS):
                width = row.get("step_ms", 0.0) * row.get(part, 0.0)
                ax.barh(place, width, left=left, color=f"C{color}", label=None if place else part)
                left += width
            if not left:  # a captured and compiled step has no parts
                ax.barh(place, row.get("step_ms", 0.0), color="0.7")
            text = row["error"][:60] if "error" in row else f" {row['targets_per_s']:,.0f} targets/s"
            ax.text(max(left, row.get("step_ms", 0.0)), place, text, va="center", fontsize=7)
        ax.set(yticks=range(len(group)), yticklabels=[row["name"] for row in group], title=shape)
        ax.margins(x=0.2)
        ax.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xlabel("ms a step")
    drawn.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(PARTS), frameon=False)
    drawn.savefig(output / "training.png", dpi=130)


def write(rows: list[dict[str, Any]], output: Path) -> None:
    """The rows as CSV and as Markdown."""
    write_csv(rows, output / "training.csv")
    (output / "training.md").write_text(table(rows) + "\n")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=",".join(SHAPES), help="names, separated by commas")
    parser.add_argument("--only", help="names of implementations, separated by ;")
    parser.add_argument("--seconds", type=float, default=0.5, help="time for each median")
    parser.add_argument("--output", type=Path, default=Path("results"))
    args = parser.parse_args()
    sys.argv = sys.argv[:1]  # RecBole reads it
    args.output.mkdir(parents=True, exist_ok=True)
    unknown = [name for name in (args.only or "").split(";") if name and name not in IMPLEMENTATIONS]
    if unknown:
        parser.error(f"--only: {unknown[0]!r} is not valid; it takes {'; '.join(IMPLEMENTATIONS)}")
    logging.disable(logging.WARNING)
    rows: list[dict[str, Any]] = []
    for name in args.shapes.split(","):
        started = time.perf_counter()
        data = Data(SHAPES[name])
        names = args.only.split(";") if args.only else [key for key in IMPLEMENTATIONS if key not in LAYOUTS]
        if data.shape.beauty and not args.only:
            names = ["RecBole", "RecBole, AMP", *LAYOUTS]
        print(f"{name}: data in {time.perf_counter() - started:.1f} s, {data.dataset.n_targets} targets", flush=True)
        for implementation in names:
            started = time.perf_counter()
            row = {"shape": str(data.shape), "name": implementation, **measure(data, implementation, args.seconds)}
            rows.append(row | {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__})
            shown = {key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()}
            print(shown, f"{time.perf_counter() - started:.1f} s", flush=True)
            write(rows, args.output)  # after each, in case there is no time for the next
    print("\n" + table(rows))
    figure(rows, args.output)


if __name__ == "__main__":
    main()
