"""The space that is searched where the user names none: ranges around what a model takes by default on these data."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import recbole
from recbole.config import Config
from recbole.utils import ModelType

from recbole_cce.commands.tune.space import Parameter
from recbole_cce.plugin import registration
from recbole_cce.plugin.config_sources import read_yaml

LOSSES = ("CCE", "CCE-", "SCE")
MOST_DROPOUT = 0.8


def default_space(config: Config, items: int) -> list[Parameter]:
    """Parameters that the model has and that nobody has given a value.

    Args:
        config: of a default run, without `auto` where the data decide.
        items: of the catalogue.
    """
    model = config["model"]
    candidates = of_this_package(config, items) if model in registration.MODELS else of_recbole(config)
    given, space = config.external_config_dict, []
    searched = {one.key for one in candidates} - set(given)
    for one in candidates:
        other, value = one.only or (None, None)
        if (
            one.key in searched
            and len(set(one.ends())) > 1
            and (other is None or other in searched or config[other] == value)
        ):
            space.append(one)
    return space


def of_this_package(config: Config, items: int) -> list[Parameter]:
    """For the keys that a model has defaults of."""
    own = registration.defaults(config["model"])
    if "learning_rate" not in own:  # it does not train
        return []
    space = around(config, "learning_rate", 4, 4) + around(config, "train_batch_size", 4, 4)
    for key, width in {"hidden_dropout_prob": 0.3, "attn_dropout_prob": 0.4}.items():
        if key in own:
            low, high = max(0.0, config[key] - width), min(MOST_DROPOUT, config[key] + width)
            space.append(Parameter(key, low=low, high=max(high, config[key])))
    if "loss_type" in own:
        space += losses(config, items)
    for key, choices in {"architecture": ("recbole", "original"), "positions": ("start", "end")}.items():
        if key in own:
            space.append(Parameter(key, choices))
    return space + sizes(config, own, (1, 2, 4))


def losses(config: Config, items: int) -> list[Parameter]:
    """loss_type and how much of the catalogue a loss looks at."""
    default = config["loss_type"]
    # where that of all items is not the default it is too slow
    choices = [default, *(loss for loss in LOSSES if loss not in (default, "CCE" if default == "CCE-" else ""))]
    return [
        Parameter("loss_type", tuple(choices)),
        Parameter("num_negatives", low=min(256, items), high=min(8192, items), log=True, only=("loss_type", "CCE-")),
        Parameter("bucket_size_y", low=min(128, items), high=min(4096, items), log=True, only=("loss_type", "SCE")),
    ]


def of_recbole(config: Config) -> list[Parameter]:
    """For RecBole's own models, from the names of their keys."""
    if config["MODEL_TYPE"] == ModelType.TRADITIONAL:  # counts
        return []
    file = Path(recbole.__file__).parent / "properties" / "model" / f"{config['model']}.yaml"
    own = read_yaml(file) if file.is_file() else {}
    space = around(config, "learning_rate", 10, 5) + around(config, "train_batch_size", 8, 2)
    for key in own:
        if re.search(r"drop(out)?(_|$)", key) and is_share(config[key]):
            space.append(Parameter(key, low=0.0, high=max(0.7, config[key])))
    return space + sizes(config, own, (0.5, 1, 2))


def around(config: Config, key: str, below: float, above: float) -> list[Parameter]:
    """A positive number, from a part of it to a multiple of it."""
    value = config[key]
    if not value > 0:
        return []
    low, high = value / below, value * above
    if isinstance(value, int):
        low, high = max(1, int(low)), int(high)
    return [Parameter(key, low=low, high=high, log=True)]


def sizes(config: Config, own: dict[str, Any], factors: tuple[float, ...]) -> list[Parameter]:
    """Width and depth."""
    space = []
    for key in ("hidden_size", "embedding_size"):
        if key in own:
            space.append(Parameter(key, tuple(int(config[key] * factor) for factor in factors)))
    for key in ("n_layers", "num_layers"):
        if key in own and isinstance(config[key], int):
            space.append(Parameter(key, low=1, high=max(4, config[key])))
    return space


def is_share(value: Any) -> bool:
    """Whether it is a number from 0 to less than 1."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 1
