"""`tune`: its options, what a user can get wrong in them, and the search from begin to end."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from pathlib import Path
from typing import Any

from recbole.config import Config
from recbole.data import create_dataset

from recbole_cce.commands.compare.runs import ASIDE, held, modules_of
from recbole_cce.commands.compare.trial import Trial, plain
from recbole_cce.commands.compare.variants import parse_flags
from recbole_cce.commands.tune import durations, space
from recbole_cce.commands.tune.defaults import default_space
from recbole_cce.commands.tune.space import Parameter, Value
from recbole_cce.errors import UserError
from recbole_cce.files import write_whole
from recbole_cce.keys import refuse
from recbole_cce.plugin import config_checks, config_sources, entry_points, registration

STUDY = "study.json"  # in the output: what is searched
RUNGS = 20  # the first rung is this part of the epochs, at most
LAST_FIRST_RUNG = 8


def tune(
    output: str,
    model: str | None = None,
    dataset: str | None = None,
    config_files: str | None = None,
    space: str | None = None,
    budget: str = "10m",
    parallel: int = 1,
    flags: list[str] | None = None,
    command: str = "",
) -> None:
    """Search for settings that validate better than the defaults; the options are those of the command.

    Raises:
        UserError: names the option, its value and what it takes, before any trial starts; or no trial has a value.
    """
    begun = time.time()
    check_installed()
    seconds = durations.parse(budget, "--budget")
    files = config_sources.file_names(config_files)
    in_files = config_sources.read_files(files, "--config_files")
    model = in_files.get("model", "SASRecCCE") if model is None else model
    dataset = in_files.get("dataset", "ml-100k") if dataset is None else dataset
    config_checks.check_model(model)
    config_checks.check_dataset(dataset)
    given = parse_flags(flags or [], in_files, [model])

    def configure(settings: dict[str, Any]) -> Config:
        return entry_points.configuration(model, dataset, files, {"show_progress": "False", **given, **settings})

    config = configure({})
    check_validated(config)
    searched = read_space(space, model, configure)
    about = {
        "model": model,
        "dataset": dataset,
        "space": None if searched is None else [str(one) for one in searched],
        "settings": {key: plain(one) for key, one in config.final_config_dict.items() if key not in ASIDE},
    }
    check_output(Path(output), about)
    items = read_data(config)
    if searched is None and not (searched := default_space(config, items)):
        raise UserError(f"--space: {model} has no key that is searched without one; it takes a file that names some")
    with held(Path(output), "tune"):
        write_whole(Path(output) / STUDY, lambda file: file.write(json.dumps(about, indent=1).encode()))
        base = Trial(
            name="",
            model=model,
            dataset=dataset,
            seed=config["seed"],
            files=tuple(files),
            settings={"show_progress": "False", **given},
            time_limit=None,
            folder="",
            modules=modules_of(model),
        )
        set_by_user = in_files | config_sources.literals(given)
        search_and_report(base, searched, config, Path(output), parallel, begun, seconds, set_by_user, command)


def search_and_report(
    base: Trial,
    searched: list[Parameter],
    config: Config,
    output: Path,
    parallel: int,
    begun: float,
    seconds: float,
    given: dict[str, Any],
    command: str,
) -> None:
    """Run the search until its budget is spent, test the best trial, and write what was found."""
    # they take what check_installed() asks for
    from recbole_cce.commands.tune import report
    from recbole_cce.commands.tune.search import Search
    from recbole_cce.commands.tune.study import Study

    study = Study(
        output / "journal.log",
        searched,
        default_values(searched, config),
        seed=base.seed,
        bigger=config["valid_metric_bigger"],
        first_rung=min(LAST_FIRST_RUNG, max(1, config["epochs"] // config["eval_step"] // RUNGS)),
    )
    search = Search(study, base, output, parallel, config["gpu_id"].split(","), begun, seconds)
    metric = config["valid_metric"].lower()
    left = durations.words(search.end - begun)
    there = f"; {len(search.results)} trials are there" if search.results else ""
    print(f"{base.model} on {base.dataset}, by validation {metric}: {left} left{there}. Searched:")
    print("\n".join(f"  {one}" for one in searched), flush=True)
    try:
        search.run()
        number = search.best
        if number is None:
            raise UserError(f"--budget: within {durations.words(seconds)} no trial ended an epoch; it takes more")
        report.write(search, number, given, metric, search.test(number), command)
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on where it stopped", file=sys.stderr)
        sys.exit(130)
    finally:
        search.close()


def default_values(searched: list[Parameter], config: Config) -> dict[str, Value]:
    """What a default run has for the keys that are searched."""
    values: dict[str, Value] = {}
    for one in searched:
        if one.applies(values):
            values[one.key] = one.value_of(config)
    return values


# What a user can get wrong


def check_installed() -> None:
    """Raise a UserError where an optional package is missing."""
    missing = [name for name in ("optuna", "matplotlib") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"tune takes {' and '.join(missing)}: pip install {' '.join(missing)}")


def check_validated(config: Config) -> None:
    """Raise a UserError where epochs are not validated: there would be nothing to choose by."""
    config_checks.check_valid_metric(config)
    if config["eval_step"] < 1:
        refuse("eval_step", config["eval_step"], "an integer >= 1")
    ((kind, how),) = config["eval_args"]["split"].items()
    if how == "test_only" or (kind != "LS" and not how[1] > 0):
        refuse("eval_args", config["eval_args"], "a split with a validation, which says what trial is the best")


def read_space(file: str | None, model: str, configure: Any) -> list[Parameter] | None:
    """The parameters of --space, checked; None without it."""
    if file is None:
        return None
    searched = space.read(file)
    space.check(searched, model, configure)
    return searched


def check_output(output: Path, about: dict[str, Any]) -> None:
    """Raise a UserError for a folder that holds anything but this search."""
    if output.exists() and not output.is_dir():
        raise UserError(f"--output: {str(output)!r} is a file; it takes a folder")
    file = output / STUDY
    if not file.exists():
        if output.exists() and any(path.name != ".lock" for path in output.iterdir()):
            raise UserError(f"--output: {str(output)!r} holds other files; it takes a new folder, or one of tune's")
        return
    try:
        earlier = json.loads(file.read_bytes())
        settings = earlier.pop("settings") | earlier
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"--output: {str(file)!r} is damaged ({error}); it takes another folder") from None
    now = about["settings"] | {key: one for key, one in about.items() if key != "settings"}
    for key in sorted(settings.keys() | now.keys()):
        if settings.get(key) != now.get(key):
            raise UserError(
                f"--output: {str(output)!r} is of a search with {key}: {settings.get(key)!r}, not {now.get(key)!r}; it "
                "takes another folder, or what that search had"
            )


def read_data(config: Config) -> int:
    """Number of items. Data are read once here, so that they are downloaded, and a copy kept that trials read.

    In `config` `auto` becomes what the data decide.
    """
    dataset = create_dataset(config)
    items = dataset.item_num - 1
    if max(config["topk"]) > items:
        raise UserError(f"topk: {config['topk']} is not valid; it takes at most {items}, the number of items")
    if config["model"] in registration.MODELS:
        dataset.build()
    return items
