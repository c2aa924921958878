"""Quality and training time of models on real data, several runs side by side.

    python -m benchmarks.quality --data_path=DIR --datasets=amazon-beauty --models=SASRec,SASRecCCE \
        --seeds=2020,2021,2022 --parallel=6 --time_limit=480 --output=DIR

Each run is a process of its own through RecBole's pipeline: its data set, split, loaders, trainer and evaluation. A
variant NAME=MODEL,key=value,... is a model with settings. A run that reaches the time limit stops after that epoch and
is tested with its best checkpoint; its learning curve says how far it came. Results: one JSON file a run and a table.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np


class TimeIsUp(Exception):
    """Raised by the epoch callback to stop RecBole's fit."""


def run(spec: dict[str, Any]) -> dict[str, Any]:
    """Train and test one model; `spec`: model, dataset, settings, config_files, time_limit."""
    import torch
    from recbole.config import Config
    from recbole.data import create_dataset, data_preparation
    from recbole.utils import get_model, get_trainer, init_logger, init_seed

    from recbole_cce import registry

    sys.argv = sys.argv[:1]
    defaults = registry.dataset_defaults(spec["dataset"])
    files = [] if defaults is None or spec["model"] in registry.MODELS else [str(defaults)]
    config = Config(spec["model"], spec["dataset"], files, spec["settings"])
    init_seed(config["seed"], config["reproducibility"])
    init_logger(config)
    train_data, valid_data, test_data = data_preparation(config, create_dataset(config))
    init_seed(config["seed"], config["reproducibility"])
    model = get_model(config["model"])(config, train_data.dataset).to(config["device"])
    trainer = get_trainer(config["MODEL_TYPE"], config["model"])(config, model)
    trainer.saved_model_file = str(Path(spec["output"]).with_suffix(".pth").resolve())
    curve, start = [], time.time()

    def after_epoch(epoch: int, score: float) -> None:
        curve.append({"epoch": epoch, "seconds": time.time() - start, "valid": float(score)})
        if time.time() - start > spec["time_limit"]:
            raise TimeIsUp

    try:
        trainer.fit(train_data, valid_data, show_progress=False, callback_fn=after_epoch)
        cut = False
    except TimeIsUp:
        cut = True
    test = trainer.evaluate(test_data, load_best_model=True, show_progress=False)
    best = max(curve, key=lambda point: point["valid"])
    return {
        "test": {name: float(value) for name, value in test.items()},
        "best_epoch": best["epoch"],
        "seconds_to_best": best["seconds"],
        "seconds": curve[-1]["seconds"],
        "epochs": len(curve),
        "cut": cut,
        "peak_gpu_gib": torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        "curve": curve,
    }


def schedule(specs: list[dict[str, Any]], parallel: int) -> None:
    """Run the specs that have no result yet, `parallel` at a time, each with its share of the CPU's threads."""
    waiting = [spec for spec in specs if not Path(spec["output"]).exists()]
    running: list[tuple[dict[str, Any], subprocess.Popen]] = []
    threads = str(max(1, (os.cpu_count() or 1) // parallel))
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    while waiting or running:
        while waiting and len(running) < parallel:
            spec = waiting.pop(0)
            with open(Path(spec["output"]).with_suffix(".log"), "w") as log:
                command = [sys.executable, "-m", "benchmarks.quality", "--run", json.dumps(spec)]
                process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
            running.append((spec, process))
        time.sleep(0.5)
        for entry in [entry for entry in running if entry[1].poll() is not None]:
            running.remove(entry)
            spec, process = entry
            print(f"{spec['variant']} {spec['dataset']} {spec['seed']}: exit {process.returncode}", flush=True)


def table(output: Path) -> str:
    """Mean and deviation over seeds of every variant on every data set, as Markdown."""
    groups = defaultdict(list)
    for file in sorted(output.glob("*.json")):
        result = json.loads(file.read_text())
        groups[result["dataset"], result["variant"]].append(result)
    lines = [
        "| data | model | seeds | NDCG@10 | Hit@10 | best valid | best epoch "
        "| s / epoch | s to best | s in all | GiB |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (dataset, variant), results in sorted(groups.items()):

        def mean(*values: float, digits: int = 1, deviation: bool = False) -> str:
            text = f"{np.mean(values):.{digits}f}"
            return text + (f" ± {np.std(values, ddof=1):.{digits}f}" if deviation and len(values) > 1 else "")

        lines.append(
            f"| {dataset} | {variant}{' (cut)' if any(r['cut'] for r in results) else ''} | {len(results)} | "
            + " | ".join(
                [
                    mean(*(r["test"]["ndcg@10"] for r in results), digits=4, deviation=True),
                    mean(*(r["test"]["hit@10"] for r in results), digits=4, deviation=True),
                    mean(*(max(p["valid"] for p in r["curve"]) for r in results), digits=4),
                    mean(*(r["best_epoch"] for r in results), digits=0),
                    mean(*(r["seconds"] / r["epochs"] for r in results), digits=2),
                    mean(*(r["seconds_to_best"] for r in results)),
                    mean(*(r["seconds"] for r in results)),
                    mean(*(r["peak_gpu_gib"] or 0 for r in results), digits=2),
                ]
            )
            + " |"
        )
    return "\n".join(lines)


def variant(text: str) -> tuple[str, str, dict[str, str]]:
    """'MODEL' or 'NAME=MODEL,key=value,...' -> name, model, settings."""
    name, _, definition = text.partition("=")
    model, *settings = (definition or name).split(",")
    return name, model, dict(setting.split("=", 1) for setting in settings)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_path", default="dataset")
    parser.add_argument("--datasets", default="ml-100k")
    parser.add_argument("--models", default="SASRec,SASRecCCE", help="models of RecBole or of this package")
    parser.add_argument("--variant", action="append", default=[], help="NAME=MODEL,key=value,...; may be repeated")
    parser.add_argument("--seeds", default="2020,2021,2022")
    parser.add_argument("--set", default="", help="key=value,... for every run")
    parser.add_argument("--parallel", type=int, default=1)
    parser.add_argument("--time_limit", type=float, default=float("inf"), help="seconds of training in a run")
    parser.add_argument("--output", type=Path, default=Path("results"))
    parser.add_argument("--run", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        spec = json.loads(args.run)
        Path(spec["output"]).write_text(json.dumps(spec | run(spec), indent=1))
        return
    args.output.mkdir(parents=True, exist_ok=True)
    common = dict(setting.split("=", 1) for setting in args.set.split(",") if setting)
    variants = [variant(text) for text in [*filter(None, args.models.split(",")), *args.variant]]
    specs = []
    for dataset in args.datasets.split(","):
        for name, model, settings in variants:
            own = {"train_neg_sample_args": "None"} if model == "SASRec" else {}  # for loss_type: CE
            for seed in args.seeds.split(","):
                specs.append(
                    {
                        "variant": name,
                        "model": model,
                        "dataset": dataset,
                        "seed": int(seed),
                        "output": str(args.output / f"{dataset}-{name}-{seed}.json"),
                        "time_limit": args.time_limit,
                        "settings": {
                            **own,
                            "data_path": args.data_path,
                            "seed": int(seed),
                            "checkpoint_dir": str(args.output),
                            **common,
                            **settings,
                        },
                    }
                )
    schedule(specs, args.parallel)
    print(table(args.output))


if __name__ == "__main__":
    import recbole_cce  # noqa: F401  before RecBole is imported

    main()
