"""What a user can get wrong in a configuration, noticed before any data is read: names of keys and models, values.

Every Config is checked as it is made, whatever way its keys came in; the names of flags by the command line alone,
since a script of the user's may have flags of its own.
"""

from __future__ import annotations

import difflib
import functools
import importlib.util
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import recbole
import torch
from recbole.config import Config
from recbole.data.dataset import Dataset
from recbole.evaluator.base_metric import LossMetric
from recbole.evaluator.register import metric_types, metrics_dict
from recbole.utils import FeatureType, ModelType, argument_list

from recbole_cce import keys
from recbole_cce.errors import UserError
from recbole_cce.keys import Values
from recbole_cce.plugin import config_keys, registration

RECBOLE = Path(recbole.__file__).parent
KEY_IN_CODE = re.compile(r"""(?:(?<!_)config|final_config_dict)\[\s*["'](\w+)["']\s*\]""")

_get_final_config_dict = Config._get_final_config_dict


def install() -> None:
    """Let every Config be checked where it puts its sources together."""
    Config._get_final_config_dict = final_config_dict


def final_config_dict(self: Config) -> dict[str, Any]:
    """Config._get_final_config_dict, checked.

    Raises:
        UserError: names the key, its value and the valid ones.
    """
    sources = [Path(sys.modules[cls.__module__].__file__ or "") for cls in self.model_class.__mro__[:-1]]
    known = known_keys(self.model) | keys_in_code(tuple(sources))
    for key in self.file_config_dict | self.variable_config_dict:
        if key not in known:
            raise UserError(f"there is no key {key!r}{nearest(key, known)}")
    ours = self.model in registration.MODELS
    table = table_of(self.model, self.model_class, self.internal_config_dict)
    for key, value in self.external_config_dict.items():
        if value in ("", None) and key in table:
            self.external_config_dict[key] = nothing(table[key].accepts, value)
    config = _get_final_config_dict(self)
    keys.validate(config, table)
    if ours:
        config_keys.validate_together(config)
    check_evaluation(config, self.external_config_dict, self.model_class.type == ModelType.SEQUENTIAL)
    if "valid_metric" in self.external_config_dict:  # RecBole's default matters where a model is trained
        check_valid_metric(config)
    check_fields(config)
    return config


def nothing(accepts: Any, value: str | None) -> str | None:
    """An empty flag and an empty line of YAML are the same: None, or '' for the keys that take that alone."""
    return next((each for each in (None, "") if accepts(each)), value)


def table_of(model: str, model_class: Any, defaults: Mapping[str, Any]) -> dict[str, Values]:
    """What each key takes; keys of a model that it does not declare take values like their defaults."""
    ours = model in registration.MODELS
    table = dict(config_keys.RECBOLE_KEYS)
    if ours:
        of_model = {name: key.values for name, key in registration.declared(model_class).items()}
        table = config_keys.of_our_models() | of_model
    if model_class.type == ModelType.SEQUENTIAL and not ours:
        table |= {key: values for key, values in config_keys.SEQUENTIAL_KEYS.items() if key in defaults}
    others = {key: config_keys.takes(value) for key, value in defaults.items() if key not in table}
    table |= {key: values for key, values in others.items() if values is not None}
    of_recbole = model_class.__module__.startswith("recbole.")
    if of_recbole and "loss_type" in defaults and not hasattr(model_class, "input_type"):
        losses = f"CE or BPR, RecBole's losses; {', '.join(registration.MODELS)} have the others"
        table["loss_type"] = Values(losses, lambda value: value in ("CE", "BPR"))
    return table


def check_evaluation(config: Mapping[str, Any], given: Iterable[str], sequential: bool) -> None:
    """Raise a UserError for metrics that RecBole does not have, and for what sequential models do not take."""
    metrics = config["metrics"]
    names = [metrics] if isinstance(metrics, str) else list(metrics)
    for name in names:
        if name.lower() not in metric_types:
            known = {each.__name__ for each in metrics_dict.values()}
            raise UserError(
                f"metrics: {name!r} is not valid{nearest(name, known)}; it takes names of {', '.join(sorted(known))}"
            )
    if len({metric_types[name.lower()] for name in names}) > 1:
        raise UserError(f"metrics: {names} are not valid together: some look at ranks, others at the values of scores")
    if sequential and not config["repeatable"]:
        keys.refuse("repeatable", config["repeatable"], "True for sequential models")
    if sequential and "eval_args" in given and config["eval_args"].get("order", "RO") != "TO":
        keys.refuse("eval_args", config["eval_args"], "order: TO for sequential models")


def check_fields(config: Mapping[str, Any]) -> None:
    """Raise a UserError for columns that would be two things, and for what is not installed."""
    taken: dict[str, str] = {}
    for role in ("USER_ID_FIELD", "ITEM_ID_FIELD", "TIME_FIELD"):
        if config[role] is not None and taken.setdefault(config[role], role) != role:
            raise UserError(f"{role}: {config[role]!r} is {taken[config[role]]}, too; each takes a column of its own")
    if config["normalize_field"] and config["normalize_all"]:
        raise UserError(f"normalize_field: {config['normalize_field']} is not valid with normalize_all: True")
    if config["log_wandb"] and importlib.util.find_spec("wandb") is None:
        raise UserError("log_wandb: True is not valid: wandb is not installed; `pip install wandb`")


def check_valid_metric(config: Mapping[str, Any]) -> None:
    """Raise a UserError for a valid_metric that is not computed; RecBole would notice after the first epoch."""
    metrics, topk = config["metrics"], config["topk"]
    computed = []
    for name in map(str.lower, [metrics] if isinstance(metrics, str) else metrics):
        by_rank = name != "gauc" and not issubclass(metrics_dict[name], LossMetric)
        computed += [f"{name}@{k}" for k in ([topk] if isinstance(topk, int) else topk)] if by_rank else [name]
    if config["eval_step"] > 0 and config["valid_metric"].lower() not in computed:
        raise UserError(
            f"valid_metric: {config['valid_metric']!r} is not among metrics and topk; it takes one of "
            f"{', '.join(sorted(computed))}"
        )


def check_columns(dataset: Dataset) -> None:
    """Raise a UserError for an option that names a column which no file has, or one of a type that it does not take."""
    columns = [column for column in (*dataset.field2type, dataset.label_field) if column]
    aliases = [option for option in config_keys.RECBOLE_KEYS if option.startswith("alias_of_")]
    for option in (*aliases, "val_interval", "preload_weight", "numerical_features", "normalize_field"):
        for column in dataset.config[option] or ():
            if column not in columns:
                raise UserError(f"{option}: {column!r} is not a column that is loaded{nearest(column, columns)}")
            if option in aliases and dataset.field2type.get(column) not in (FeatureType.TOKEN, FeatureType.TOKEN_SEQ):
                raise UserError(f"{option}: {column!r} is not valid; it takes columns of tokens")


def check_model(model: str, option: str = "--model", else_do: str = "") -> None:
    """Raise a UserError with the nearest names where neither RecBole nor we have the model; it ends with `else_do`."""
    known = set(registration.MODELS)
    for file in (RECBOLE / "model").glob("*_recommender/*.py"):
        known.update(re.findall(r"^class (\w+)\(", file.read_text(encoding="utf-8"), re.MULTILINE))
    if model not in known:
        raise UserError(
            f"{option}: there is no model {model!r}{nearest(str(model), known)}{else_do and f'; {else_do}'}"
        )


def check_dataset(dataset: Any) -> None:
    """Raise a UserError for what is no name."""
    if not isinstance(dataset, str) or not dataset:
        keys.refuse("--dataset", dataset, "the name of a data set, a folder in data_path")


def check_gpus(config: Config, nproc: int) -> None:
    """Raise a UserError for fewer GPUs than processes."""
    gpu_id = config["gpu_id"]
    named, there = len(gpu_id.split(",")), torch.cuda.device_count()
    if 1 < nproc > named:
        raise UserError(
            f"--nproc={nproc} needs {nproc} GPUs, but gpu_id={gpu_id!r} names {named}; use --gpu_id=0,1,..."
        )
    if 1 < nproc > there:
        raise UserError(f"--nproc={nproc} needs {nproc} GPUs, but of gpu_id={gpu_id!r} this machine has {there}")


def check_flags(flags: list[str], in_files: Iterable[str], *models: str) -> None:
    """Raise a UserError for a flag that neither RecBole nor we know, with the nearest known one.

    RecBole itself ignores, with a warning, what is not of the form --key=value, and takes any key.
    """
    known = set(in_files).union(*map(known_keys, models))
    for flag in flags:
        name, equals, _ = flag.removeprefix("--").partition("=")
        if not (flag.startswith("--") and equals):
            raise UserError(f"{flag!r} is not understood; flags are written --key=value")
        if name not in known:
            raise UserError(f"there is no option --{name}{nearest(name, known)}")


def known_keys(model: str) -> set[str]:
    """Every configuration key that RecBole, one of its models, `model` or this package reads."""
    of_model = set(registration.defaults(model)) if model in registration.MODELS else set()
    return of_model | set(config_keys.keys_of_package()) | keys_of_recbole()


@functools.cache
def keys_of_recbole() -> frozenset[str]:
    """Keys of RecBole's YAML files and code; some stand in one of them only: encoding, tail_ratio, ..."""
    files = [RECBOLE / "properties" / "overall.yaml", RECBOLE / "properties" / "dataset" / "sample.yaml"]
    files += [*RECBOLE.glob("properties/model/*.yaml"), *RECBOLE.glob("properties/quick_start_config/*.yaml")]
    known = {key for file in files for key in re.findall(r"^(\w+)\s*:", file.read_text("utf-8"), re.MULTILINE)}
    for name in ("general", "training", "evaluation", "dataset"):
        known.update(getattr(argument_list, f"{name}_arguments"))
    return frozenset(
        known
        | keys_in_code(tuple(RECBOLE.rglob("*.py")))
        | {"resume", "trust_checkpoint", "config_files", "group_offset"}
    )


@functools.cache
def keys_in_code(files: tuple[Path, ...]) -> frozenset[str]:
    """Keys that the code in `files` looks up in a Config."""
    return frozenset(
        key for file in set(files) if file.suffix == ".py" for key in KEY_IN_CODE.findall(file.read_text("utf-8"))
    )


def nearest(name: str, known: Iterable[str]) -> str:
    """'; did you mean ...?' with the known names most like `name`."""
    by_lower = {candidate.lower(): candidate for candidate in sorted(known)}
    matches = difflib.get_close_matches(name.lower(), by_lower, n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(by_lower[match] for match in matches)}?" if matches else ""
