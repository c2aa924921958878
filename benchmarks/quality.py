"""Quality and training time of models on real data, several runs side by side.

    python -m benchmarks.quality --data_path=DIR --datasets=ml-100k,amazon-beauty --models=SASRec,SASRecCCE \
        --seeds=2020,2021,2022 --parallel=6 --deadline=480 --output=DIR

Each run is a process of its own through RecBole's pipeline: its data set, split, loaders, trainer and evaluation. A
variant NAME=MODEL,key=value,... is a model with settings. Training stops before the epoch that would pass the time
limit of a run or the deadline of all; the best checkpoint so far is tested and the run is called cut. Results: one
JSON file a run, rewritten after each epoch, and a table.

Training seconds are those of the training epochs alone; seconds in all add validation and checkpoints, as RecBole's
fit does. Neither counts the reading of data, which is in the files as `data_seconds`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

COLUMNS = {"load_col": {"inter": ["user_id", "item_id", "timestamp"]}}
UNFILTERED = {"user_inter_num_interval": None, "item_inter_num_interval": None}
DATASETS = {  # the same for every model, whatever the files in properties/ say
    "ml-100k": {**COLUMNS, **UNFILTERED, "MAX_ITEM_LIST_LENGTH": 50},
    "amazon-beauty": {**COLUMNS, **UNFILTERED, "MAX_ITEM_LIST_LENGTH": 50},
    "ml-1m": {
        **COLUMNS,
        "user_inter_num_interval": "[5,inf)",
        "item_inter_num_interval": "[5,inf)",
        "MAX_ITEM_LIST_LENGTH": 200,
    },
}
TEST_SECONDS = 25  # kept free before the deadline for the test
KILL_SECONDS = 3  # and for the table


class TimeIsUp(Exception):
    """Raised by the epoch callback to stop RecBole's fit."""


def run(spec: dict[str, Any]) -> None:
    """Train and test one model; `spec`: model, dataset, seed, settings, time_limit, stop_at, output."""
    import recbole
    import torch
    from recbole.config import Config
    from recbole.data import create_dataset, data_preparation
    from recbole.utils import get_model, get_trainer, init_logger, init_seed

    from recbole_cce import registry

    sys.argv = sys.argv[:1]
    started = time.time()
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
    cuda = config["device"].type == "cuda"
    curve: list[dict[str, Any]] = []
    result = spec | {
        "state": "unfinished",
        "device": torch.cuda.get_device_name() if cuda else f"cpu, {torch.get_num_threads()} threads",
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "recbole": recbole.__version__},
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
        "valid_metric": config["valid_metric"].lower(),
        "train_batches": len(train_data),
        "data_seconds": time.time() - started,
        "curve": curve,
    }
    save(result)

    train_seconds: list[float] = []
    valid_results: list[dict[str, float]] = []
    trainer._train_epoch = timed(trainer._train_epoch, train_seconds, torch.cuda.synchronize if cuda else None)
    trainer._valid_epoch = kept(trainer._valid_epoch, valid_results)
    fit_started = time.time()

    def after_epoch(epoch: int, score: float) -> None:
        now = time.time()
        curve.append(
            {
                "epoch": epoch,
                "train_seconds": sum(train_seconds),
                "seconds": now - fit_started,
                "score": float(score),
                "valid": {name: float(value) for name, value in valid_results[-1].items()},
            }
        )
        result["peak_gpu_gib"] = torch.cuda.max_memory_allocated() / 2**30 if cuda else None
        save(result)
        epoch_seconds = curve[-1]["seconds"] - (curve[-2]["seconds"] if len(curve) > 1 else 0)
        if now + epoch_seconds > min(fit_started + spec["time_limit"], spec["stop_at"]):
            raise TimeIsUp

    try:
        trainer.fit(train_data, valid_data, show_progress=False, callback_fn=after_epoch)
        state = "finished"
    except TimeIsUp:
        state = "cut"
    test = trainer.evaluate(test_data, load_best_model=True, show_progress=False)
    save(result | {"state": state, "test": {name: float(value) for name, value in test.items()}})


def timed(method: Callable, seconds: list[float], wait: Callable | None) -> Callable:
    """`method`, adding the time of each call to `seconds`; `wait` waits for the device."""

    def call(*args: Any, **kwargs: Any) -> Any:
        start = time.time()
        value = method(*args, **kwargs)
        if wait:
            wait()
        seconds.append(time.time() - start)
        return value

    return call


def kept(method: Callable, results: list[dict[str, float]]) -> Callable:
    """A trainer's _valid_epoch, adding all its metrics to `results`: RecBole passes on the score alone."""

    def call(*args: Any, **kwargs: Any) -> Any:
        score, result = method(*args, **kwargs)
        results.append(result)
        return score, result

    return call


def save(result: dict[str, Any]) -> None:
    """Write a result whole or not at all: the process may be killed."""
    part = Path(result["output"] + ".part")
    part.write_text(json.dumps(result, indent=1))
    part.replace(result["output"])


def schedule(specs: list[dict[str, Any]], parallel: int, deadline: float) -> None:
    """Run the specs that have no result yet, `parallel` at a time, each with its share of the CPU's threads."""
    waiting = [spec for spec in specs if state(spec) not in ("finished", "cut")]
    running: list[tuple[dict[str, Any], subprocess.Popen]] = []
    threads = str(max(1, (os.cpu_count() or 1) // parallel))
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    for spec in waiting:
        save(spec | {"state": "not started", "curve": []})
    while waiting or running:
        while waiting and len(running) < parallel and time.time() < deadline - TEST_SECONDS:
            spec = waiting.pop(0)
            save(spec | {"state": "unfinished", "curve": []})
            with open(log_file(spec), "w") as log:
                command = [sys.executable, "-m", "benchmarks.quality", "--run", json.dumps(spec)]
                process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
            running.append((spec, process))
        time.sleep(0.5)
        late = time.time() > deadline - KILL_SECONDS
        for entry in running[:]:
            spec, process = entry
            if late and process.poll() is None:
                process.kill()
                process.wait()
            elif process.poll() is None:
                continue
            elif process.returncode != 0:
                save(json.loads(Path(spec["output"]).read_text()) | {"state": "failed"})
            running.remove(entry)
            print(f"{spec['dataset']} {spec['variant']} {spec['seed']}: {state(spec)}", flush=True)
        if not running and time.time() > deadline - TEST_SECONDS:
            return


def state(spec: dict[str, Any]) -> str:
    """finished, cut, failed, unfinished (killed at the deadline) or not started."""
    file = Path(spec["output"])
    return json.loads(file.read_text())["state"] if file.exists() else "not started"


def log_file(spec: dict[str, Any]) -> Path:
    """What the run printed."""
    return Path(spec["output"]).with_suffix(".log")


def table(output: Path) -> str:
    """Mean and deviation over seeds of every variant on every data set, as Markdown; failures below it.

    Quality is of the runs that were tested, time of those and of the unfinished ones, up to their last epoch.
    """
    groups, failures = defaultdict(list), []
    for file in sorted(output.glob("*.json")):
        result = json.loads(file.read_text())
        groups[result["dataset"], result["variant"]].append(result)
        if result["state"] == "failed":
            lines = log_file(result).read_text().strip().splitlines()
            failures.append(f"{file.stem} failed: {lines[-1] if lines else 'it printed nothing'}")
    lines = [
        "| data | model | runs | test NDCG@10 | test Hit@10 | valid NDCG@10 | best epoch | epochs | batches / epoch "
        "| training s / epoch | training s to best | training s | s in all to best | s in all | GiB |",
        "|" + "---|" * 15,
    ]
    for (dataset, variant), results in sorted(groups.items()):
        runs = ", ".join(f"{count} {name}" for name, count in Counter(r["state"] for r in results).items())
        tested = [r for r in results if "test" in r]
        begun = [r for r in results if r["curve"]]
        bests, ends = [best(r) for r in begun], [r["curve"][-1] for r in begun]
        cells = [
            cell([r["test"]["ndcg@10"] for r in tested], 4),
            cell([r["test"]["hit@10"] for r in tested], 4),
            cell([p["valid"]["ndcg@10"] for p in bests], 4),
            cell([p["epoch"] for p in bests], 0),
            cell([len(r["curve"]) for r in begun], 0),
            cell([r["train_batches"] for r in begun], 0),
            cell([p["train_seconds"] / len(r["curve"]) for p, r in zip(ends, begun, strict=True)], 2),
            cell([p["train_seconds"] for p in bests], 1),
            cell([p["train_seconds"] for p in ends], 1),
            cell([p["seconds"] for p in bests], 1),
            cell([p["seconds"] for p in ends], 1),
            cell([r["peak_gpu_gib"] or 0 for r in begun], 2),
        ]
        lines.append(f"| {dataset} | {variant} | {runs} | {' | '.join(cells)} |")
    hosts = Counter(f"{r['device']}, {r['versions']}" for results in groups.values() for r in results if r["curve"])
    return "\n".join([*lines, "", *failures, *hosts])


def best(result: dict[str, Any]) -> dict[str, Any]:
    """The epoch whose weights were kept: the highest score, the last one of equals."""
    return max(result["curve"], key=lambda point: (point["score"], point["epoch"]))


def cell(values: list[float], digits: int) -> str:
    """Mean, and the sample deviation of several."""
    if not values:
        return "-"
    deviation = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{deviation}"


def variant(text: str) -> tuple[str, str, dict[str, str]]:
    """'MODEL' or 'NAME=MODEL,key=value,...' -> name, model, settings."""
    name, _, definition = text.partition("=")
    model, *settings = (definition or name).split(",")
    return name, model, dict(setting.split("=", 1) for setting in settings)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_path", default="dataset", help="folder of the data sets; RecBole brings ml-100k itself")
    parser.add_argument("--datasets", default="ml-100k")
    parser.add_argument("--models", default="SASRec,SASRecCCE", help="models of RecBole or of this package")
    parser.add_argument("--variant", action="append", default=[], help="NAME=MODEL,key=value,...; may be repeated")
    parser.add_argument("--seeds", default="2020,2021,2022")
    parser.add_argument("--set", default="", help="key=value,... for every run")
    parser.add_argument("--parallel", type=int, default=1)
    parser.add_argument("--time_limit", type=float, default=1e9, help="seconds of training and validation in a run")
    parser.add_argument("--deadline", type=float, default=1e9, help="seconds from now until all has ended")
    parser.add_argument("--output", type=Path, default=Path("results"))
    parser.add_argument("--run", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        run(json.loads(args.run))
        return
    deadline = time.time() + args.deadline
    args.output.mkdir(parents=True, exist_ok=True)
    common = dict(setting.split("=", 1) for setting in args.set.split(",") if setting)
    variants = [variant(text) for text in [*filter(None, args.models.split(",")), *args.variant]]
    specs = []
    for dataset in args.datasets.split(","):
        for name, model, settings in variants:
            own = {"train_neg_sample_args": None} if model == "SASRec" else {}  # for loss_type: CE
            for seed in args.seeds.split(","):
                specs.append(
                    {
                        "variant": name,
                        "model": model,
                        "dataset": dataset,
                        "seed": int(seed),
                        "output": str(args.output / f"{dataset}-{name}-{seed}.json"),
                        "time_limit": args.time_limit,
                        "stop_at": deadline - TEST_SECONDS,
                        "settings": {
                            **DATASETS.get(dataset, {}),
                            **own,
                            "data_path": args.data_path,
                            "seed": int(seed),
                            "checkpoint_dir": str(args.output),
                            **common,
                            **settings,
                        },
                    }
                )
    schedule(specs, args.parallel, deadline)
    print(table(args.output))


if __name__ == "__main__":
    import recbole_cce  # noqa: F401  before RecBole is imported

    main()
