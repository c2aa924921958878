"""Models side by side: which runs a comparison takes, what a user can get wrong, and running what is not there yet.

What is compared is in variants.py. Each run is a process of its own (trial.py); tables, figures and the page are made
from what the runs left (report.py).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import multiprocessing
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from multiprocessing import connection, resource_tracker
from multiprocessing.context import SpawnProcess
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from recbole.config import Config
from recbole.data import create_dataset
from recbole.evaluator.base_metric import TopkMetric
from recbole.evaluator.register import metrics_dict
from recbole.utils import get_model, set_color
from tqdm import tqdm

from recbole_cce import keys
from recbole_cce.commands.compare import report
from recbole_cce.commands.compare.trial import Trial, run
from recbole_cce.commands.compare.variants import Variant, expand, parse_flags, parse_seeds, parse_variants, parse_vary
from recbole_cce.errors import UserError
from recbole_cce.files import locked, remove_parts
from recbole_cce.plugin import config_checks, config_sources, entry_points, extensions, registration

# keys that decide what is tested and how: equal for all models, or nothing could be compared
SAME = (
    *("eval_args", "repeatable", "metrics", "topk", "metric_decimal_place", "valid_metric", "exclude_seen"),
    *("benchmark_filename", "rm_dup_inter", "val_interval", "filter_inter_by_user_or_item"),
    *("user_inter_num_interval", "item_inter_num_interval"),
)
# keys that change no result: a run with another value of these is the same run
ASIDE = {"checkpoint_dir", "checkpoint_interval", "show_progress", "state", "gpu_id", "log_wandb", "wandb_project"}
TEST_SECONDS = 25  # kept free before the deadline for the tests
TABLE_SECONDS = 4  # and for the tables


def compare(
    output: str,
    models: str = "",
    variant: list[str] | None = None,
    vary: list[str] | None = None,
    dataset: str | None = None,
    config_files: str | None = None,
    seeds: str = "2020,2021,2022",
    metric: str = "NDCG@10",
    time_limit: float | None = None,
    deadline: float | None = None,
    parallel: int = 1,
    flags: list[str] | None = None,
    command: str = "",
) -> None:
    """Run what is missing, then write tables, figures and page into `output`; the options are those of the command.

    Raises:
        UserError: names the option, its value and what it takes, before any run starts; or matplotlib is missing,
            after the tables are written.
    """
    begun = time.time()
    for option, value in {"time-limit": time_limit, "deadline": deadline, "parallel": parallel}.items():
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"--{option}: {value} is not valid; it takes a number > 0")
    trials = plan(output, models, variant or [], vary or [], dataset, config_files, seeds, time_limit, flags or [])
    config = configuration(trials[0])
    metric, gpus = check_metric(metric, config), config["gpu_id"].split(",")
    if missing := next((trial for trial in trials if not is_done(trial)), None):
        check_data(configuration(missing))
    end = begun + (deadline or math.inf)
    with held(Path(output)):
        clean(Path(output), trials)
        try:
            waiting = [trial for trial in trials if not is_done(trial)]
            execute(waiting, len(trials), parallel, gpus, end, metric)
            crowded = [trial for trial in waiting if trial.result()["state"] == "out of memory" and not is_done(trial)]
            if crowded:  # what was missing may be what neighbours held
                execute(crowded, len(trials), len(gpus), gpus, end, metric)
        except KeyboardInterrupt:
            print("\ninterrupted; the same command goes on where it stopped", file=sys.stderr)
            sys.exit(130)
        report.write(Path(output), trials, metric, command)


def plan(
    output: str,
    models: str,
    variant: list[str],
    vary: list[str],
    dataset: str | None,
    config_files: str | None,
    seeds: str,
    time_limit: float | None,
    flags: list[str],
) -> list[Trial]:
    """Every run of the comparison, checked: variant by variant, seed by seed."""
    if Path(output).exists() and not Path(output).is_dir():
        raise UserError(f"--output: {output!r} is a file; it takes a folder")
    files = config_sources.file_names(config_files)
    in_files = config_sources.read_files(files, "--config_files")
    dataset = in_files.get("dataset", "ml-100k") if dataset is None else dataset
    config_checks.check_dataset(dataset)
    named = parse_variants(models, variant)
    common = {"show_progress": "False", **parse_flags(flags, in_files, [one.model for one in named])}
    if "seed" in common:
        raise UserError(f"--seed={common['seed']} is not an option of compare; --seeds has those of all models")
    numbers = parse_seeds(seeds)

    def config(one: Variant) -> Config:
        return entry_points.configuration(one.model, dataset, files, {**common, **one.settings})

    varied = parse_vary(vary, [one.model for one in named])
    for key, (first, *others) in varied.items():
        if key in SAME and others:
            name = named[0].name
            raise UserError(
                f"{key}: {name} {key}={first} has {first}, {name} {key}={others[0]} has {others[0]}; a comparison "
                f"takes one value, such as --{key}={first!r}"
            )
    expanded = [each for one in named for each in expand(one, varied, config)]
    for key in varied:
        if not any(key in one.settings for one in expanded):
            raise UserError(f"--vary: {key} changes nothing in {', '.join(one.name for one in named)}")
    configs = [config(one) for one in expanded]
    check_same(expanded, configs)
    config_checks.check_valid_metric(configs[0])
    if configs[0]["eval_step"] < 1:
        keys.refuse("eval_step", configs[0]["eval_step"], "an integer >= 1")

    trials: list[Trial] = []
    folders: dict[str, str] = {}  # folder -> the row of the table that has it
    for one, made in zip(expanded, configs, strict=True):
        for seed in numbers:
            key = digest({**made.final_config_dict, "seed": seed}, time_limit)
            folder = str(Path(output).resolve() / "runs" / f"{one.model}-{seed}-{key}")
            if folder in folders:
                raise UserError(f"--variant: {one.name!r} has the settings of {folders[folder]!r}")
            folders[folder] = one.name
            of_run = {"seed": seed, "checkpoint_dir": folder}
            trials.append(
                Trial(
                    name=one.name,
                    model=one.model,
                    dataset=dataset,
                    seed=seed,
                    files=tuple(files),
                    settings={**common, **one.settings, **of_run},
                    time_limit=time_limit,
                    folder=folder,
                    modules=modules_of(one.model),
                )
            )
    return trials


def modules_of(model: str) -> tuple[str, ...]:
    """What the process of a run imports first: the files of --plugin, and the module of a registered model."""
    return (*extensions.FILES, *([get_model(model).__module__] if model in registration.MODELS else []))


def configuration(trial: Trial) -> Config:
    """The Config of a run, as RecBole makes it."""
    return entry_points.configuration(trial.model, trial.dataset, list(trial.files), dict(trial.settings))


def digest(settings: dict[str, Any], time_limit: float | None) -> str:
    """A name for all that decides a result: a run of another name is another run."""
    kept = {key: value for key, value in settings.items() if key not in ASIDE}
    text = json.dumps([kept, time_limit], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


# What a user can get wrong


def check_metric(metric: str, config: Config) -> str:
    """The name RecBole gives to the metric that users are compared by."""
    names = [name.lower() for name in config["metrics"] if issubclass(metrics_dict[name.lower()], TopkMetric)]
    valid = [f"{name}@{k}" for name in names for k in config["topk"]]
    if metric.lower() not in valid:
        raise UserError(f"--metric: {metric!r} is not valid; it takes one of {', '.join(valid) or 'no metrics at all'}")
    return metric.lower()


def check_same(variants: list[Variant], configs: list[Config]) -> None:
    """Raise a UserError where two models would be tested on different interactions, or in another way."""
    for variant, config in zip(variants, configs, strict=True):
        for key in SAME:
            first, other = configs[0][key] or None, config[key] or None
            if first != other:
                raise UserError(
                    f"{key}: {variants[0].name} has {first!r}, {variant.name} has {other!r}; a comparison takes one "
                    f"value, such as --{key}={str(first).replace(' ', '')!r}"
                )


def check_data(config: Config) -> None:
    """Read the data set once, so that it is downloaded before several runs want it, and mistakes in it show."""
    items = create_dataset(config).item_num - 1
    if max(config["topk"]) > items:
        raise UserError(f"topk: {config['topk']} is not valid; it takes at most {items}, the number of items")


# Running


@contextlib.contextmanager
def held(output: Path, command: str = "compare") -> Iterator[None]:
    """The folder that `command` writes to, for this process alone.

    Raises:
        UserError: another command has it.
    """
    output.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(output))
        except BlockingIOError as error:
            raise UserError(
                f"--output: {str(output)!r} is that of another {command} that is running ({error}); it takes another "
                "folder, or the same one after that has ended"
            ) from None
        yield


def clean(output: Path, trials: list[Trial]) -> None:
    """Remove what killed commands left in the folder, and runs whose files are damaged, so that they are repeated."""
    for folder in (output, *output.glob("runs/*")):
        remove_parts(folder / "*")
    for trial in trials:
        if damage := trial.damage():
            print(f"{damage}: this run is repeated", file=sys.stderr)
            shutil.rmtree(trial.folder)


def is_done(trial: Trial) -> bool:
    """Whether a run need not be repeated: it was tested, or is too large for the device alone."""
    if trial.damage():
        return False
    result = trial.result()
    return result["state"] in ("finished", "cut") or (result["state"] == "out of memory" and result["parallel"] == 1)


def execute(trials: list[Trial], total: int, parallel: int, gpus: list[str], end: float, metric: str) -> None:
    """Run the trials, `parallel` at a time and each on one of `gpus`, until the time `end`; those that are killed then
    stay unfinished."""
    share = math.ceil(parallel / len(gpus))  # runs of a GPU
    spawn = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    stop_at = end - TEST_SECONDS
    waiting = list(trials)
    running: dict[int, tuple[Trial, SpawnProcess]] = {}  # by the sentinel of its process
    progress = tqdm(total=total, initial=total - len(trials), ncols=100, desc=set_color("Compare", "pink"))
    try:
        while waiting or running:
            while waiting and len(running) < parallel and time.time() < stop_at:
                one = waiting.pop(0)
                taken = [other.settings["gpu_id"] for other, _ in running.values()]
                one = replace(one, settings={**one.settings, "gpu_id": min(gpus, key=taken.count)})
                shutil.rmtree(one.folder, ignore_errors=True)
                Path(one.folder).mkdir(parents=True)
                one.save(asdict(one) | {"state": "unfinished", "parallel": share, "curve": []})
                process = spawn.Process(target=run, args=(one, stop_at, parallel, share))
                with interrupts_held():
                    process.start()
                    running[process.sentinel] = one, process
            left = end - TABLE_SECONDS - time.time()
            ended = connection.wait(list(running), None if left == math.inf else max(0, left))
            if not ended:
                return
            for sentinel in [one for one in running if one in ended]:
                one, process = running.pop(sentinel)
                process.join()
                progress.write(line(close(one, process), metric), file=sys.stderr)
                progress.update()
    finally:
        progress.close()
        for one, process in running.values():
            process.kill()
            process.join()
            remove_parts(Path(one.folder) / "*")


@contextlib.contextmanager
def interrupts_held() -> Iterator[None]:
    """Hold Ctrl-C back until the end, and for good from processes started meanwhile.

    One that is not known yet could not be ended. A terminal interrupts all processes; the command ends its runs itself.
    """
    held = []
    handler = signal.signal(signal.SIGINT, lambda *_: held.append(True))
    masks = hasattr(signal, "pthread_sigmask")  # not on Windows; what is started inherits the mask
    if masks:
        # or it would start with the first process and clear the mask; of what killed processes leave it would warn
        sys.warnoptions.append("ignore:resource_tracker")
        try:
            resource_tracker.ensure_running()
        finally:
            sys.warnoptions.pop()
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        if masks:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        signal.signal(signal.SIGINT, handler)
    if held:
        raise KeyboardInterrupt


def close(trial: Trial, process: BaseProcess) -> dict[str, Any]:
    """The result of a run whose process has ended; one that did not say how it went has failed."""
    result = trial.result()
    if result["state"] == "unfinished":
        result |= {"state": "failed", "reason": last_words(Path(trial.folder) / "log.txt", process)}
        trial.save(result)
    return result


def last_words(log: Path, process: BaseProcess) -> str:
    """Why a process has ended that did not say how it went."""
    code = process.exitcode
    assert code is not None
    if code < 0:
        return f"ended by signal {-code} ({signal.Signals(-code).name})"
    lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
    return lines[-1] if lines else "it printed nothing"


def line(result: dict[str, Any], metric: str) -> str:
    """One line on how a run went."""
    text = f"{result['name']}, seed {result['seed']}: {result['state']}"
    if "test" in result:
        text += f", test {metric} {result['test'][metric]}, {len(result['curve'])} epochs"
        text += f", {result['curve'][-1]['seconds']:.1f} s" if result["curve"] else ""
    return f"{text}: {result['reason']}" if "reason" in result else text
