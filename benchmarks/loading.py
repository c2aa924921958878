"""Time and memory of loading data: RecBole's sequential data set against ours, on synthetic interactions.

    python -m benchmarks.loading --interactions=2000000 --output=loading.csv
    python -m benchmarks.loading --interactions=20000000 --variants "recbole-cce" "recbole-cce, again"

The data are of MovieLens-20M's kind: its numbers of users and items, its columns, some users and items far more
frequent than others, lines in no order. Each measurement is a fresh process that reads the .inter file, builds the
splits (leave-one-out) and makes the first training batch. Memory is the peak of the process's resident set in a step,
above what it held after the imports. Linux only: the peak is read from, and set back through, /proc/self.
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

# RecBole's SASRec makes rows and splits as stock RecBole does, of files that are read as ours are; SASRecCCE with
# RecBole's targets; SASRecCCE as it comes, which leaves a binary copy of the data; and with that copy.
VARIANTS = {
    "RecBole": ("SASRec", {"train_neg_sample_args": "None"}),
    "recbole-cce, last": ("SASRecCCE", {"train_targets": "last", "cache_data": False}),
    "recbole-cce": ("SASRecCCE", {}),
    "recbole-cce, again": ("SASRecCCE", {}),
}
STEPS = ("read", "build", "total")  # rows of the table; the CSV has the first batch too
GIB = 2**30


def write_interactions(folder: Path, users: int, items: int, interactions: int, seed: int = 0) -> None:
    """Write folder/synthetic/synthetic.inter: Zipf popularity of users and items, seconds since 1970, any order."""
    rng = np.random.default_rng(seed)

    def zipf(number: int, exponent: float) -> np.ndarray:
        weights = np.arange(1, number + 1) ** -exponent
        return rng.choice(number, interactions, p=weights / weights.sum()).astype(np.int32)

    user = zipf(users, 0.5)
    columns = {
        "user_id:token": user,
        "item_id:token": zipf(items, 1.0),
        "rating:float": rng.integers(1, 11, interactions) / 2,
        # each user is there for about four months
        "timestamp:float": rng.integers(1_000_000_000, 1_400_000_000, users)[user]
        + rng.integers(10_000_000, size=interactions),
    }
    file = folder / "synthetic" / "synthetic.inter"
    file.parent.mkdir(parents=True)
    pd.DataFrame(columns).to_csv(file, sep="\t", index=False)


def resident(name: str) -> int:
    """VmRSS (now) or VmHWM (peak) of this process in bytes."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(name))


def measured(step: Callable[[], Any]) -> tuple[Any, float, int]:
    """Run `step`: its result, seconds, and the peak of memory on the way."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now
    start = time.perf_counter()
    result = step()
    return result, time.perf_counter() - start, resident("VmHWM")


def run(spec: dict[str, Any]) -> dict[str, float]:
    """Load the data once in this process; seconds and bytes of each step."""
    from recbole.config import Config
    from recbole.data import create_dataset, data_preparation

    import recbole_cce  # noqa: F401

    sys.argv = sys.argv[:1]
    config = Config(spec["model"], "synthetic", config_dict=spec["settings"])
    baseline = resident("VmRSS")
    dataset, read_seconds, read_peak = measured(lambda: create_dataset(config))
    built, build_seconds, build_peak = measured(dataset.build)
    dataset.build = lambda: built
    _, batch_seconds, batch_peak = measured(lambda: next(iter(data_preparation(config, dataset)[0])))
    return {
        "read_seconds": read_seconds,
        "read_bytes": read_peak - baseline,
        "build_seconds": build_seconds,
        "build_bytes": build_peak - baseline,
        "batch_seconds": batch_seconds,
        "batch_bytes": batch_peak - baseline,
        "total_seconds": read_seconds + build_seconds + batch_seconds,
        "total_bytes": max(read_peak, build_peak, batch_peak) - baseline,
    }


def measure(spec: dict[str, Any], folder: Path) -> dict[str, float]:
    """run() in a fresh process, in a folder where RecBole may write its logs."""
    command = [sys.executable, "-m", "benchmarks.loading", "--run", json.dumps(spec), "--result", "result.json"]
    environment = {"PYTHONPATH": str(Path(__file__).parent.parent), "PATH": ""}
    subprocess.run(command, cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL)
    return json.loads((folder / "result.json").read_text())


def table(results: dict[str, list[dict[str, float]]]) -> str:
    """Medians of the variants as Markdown, with how many times less each takes than the first one."""
    first = next(iter(results))

    def median(variant: str, key: str) -> float:
        return statistics.median(result[key] for result in results[variant])

    lines = [
        "| step | " + " | ".join(f"{variant}: s | GiB" for variant in results) + " |",
        "|---|" + "---|" * (2 * len(results)),
    ]
    for step in STEPS:
        cells = []
        for variant in results:
            seconds, size = median(variant, f"{step}_seconds"), median(variant, f"{step}_bytes")
            cells += [f"{seconds:.2f}", f"{size / GIB:.2f}"]
            if variant != first:
                cells[-2] += f" ({median(first, f'{step}_seconds') / seconds:.1f}x)"
                cells[-1] += f" ({median(first, f'{step}_bytes') / size:.1f}x)"
        lines.append(f"| {step} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def versions() -> str:
    """What the figures were measured with."""
    from importlib.metadata import version

    packages = ", ".join(f"{name} {version(name)}" for name in ("recbole", "torch", "numpy", "pandas"))
    return f"Python {platform.python_version()}, {packages}, {platform.machine()}"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=138_000)
    parser.add_argument("--items", type=int, default=27_000)
    parser.add_argument("--interactions", type=int, default=2_000_000)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--length", type=int, default=200, help="MAX_ITEM_LIST_LENGTH")
    parser.add_argument("--repeats", type=int, default=3, help="processes of each variant; the table has medians")
    parser.add_argument("--output", type=Path, help="CSV file with every measurement")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        args.result.write_text(json.dumps(run(json.loads(args.run))))
        return
    results: dict[str, list[dict[str, float]]] = {variant: [] for variant in args.variants}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_interactions(folder, args.users, args.items, args.interactions)
        common = {
            "data_path": name,
            "load_col": {"inter": ["user_id", "item_id", "rating", "timestamp"]},
            "user_inter_num_interval": "[5,inf)",
            "item_inter_num_interval": "[5,inf)",
            "MAX_ITEM_LIST_LENGTH": args.length,
            "train_batch_size": 1024,
            "state": "ERROR",
            "use_gpu": False,
        }
        for _ in range(args.repeats):
            for variant in args.variants:
                model, settings = VARIANTS[variant]
                if variant != "recbole-cce, again":
                    for copy in (folder / "synthetic").glob("*.npz"):
                        copy.unlink()
                results[variant].append(measure({"model": model, "settings": {**common, **settings}}, folder))
    print(f"`python -m benchmarks.loading {shlex.join(sys.argv[1:])}`, {versions()}\n\n{table(results)}")
    if args.output:
        with open(args.output, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["variant", *next(iter(results.values()))[0]])
            writer.writerows([variant, *row.values()] for variant, rows in results.items() for row in rows)


if __name__ == "__main__":
    main()
