"""The configuration in a checkpoint: plain values, and RecBole's Config made of them again.

RecBole pickles its Config, which can run any code when it is read, and a Config evaluates the strings it is made of.
What is here does neither.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from recbole.config import Config
from recbole.utils import EvaluatorType, InputType, ModelType, get_model

from recbole_cce import checks
from recbole_cce.errors import UserError

ENUMS = {"MODEL_TYPE": ModelType, "MODEL_INPUT_TYPE": InputType, "eval_type": EvaluatorType}
# what is asked of one run and says nothing about its model: processes, devices, files it reads or trusts
OF_ONE_RUN = {
    *("device", "single_spec", "local_rank", "world_size", "nproc", "offset", "ip", "port"),
    *("resume", "trust_checkpoint", "dataset_save_path", "dataloaders_save_path"),
}


def kept(config: Config) -> dict[str, Any]:
    """What a checkpoint keeps of a configuration.

    Raises:
        UserError: a value has a type that it cannot keep; names the key.
    """
    values = {key: value for key, value in config.final_config_dict.items() if key not in OF_ONE_RUN}
    enums = {key: values[key].name for key in ENUMS if values.get(key) is not None}
    return {key: _plain(value, key) for key, value in (values | enums).items()}


def _plain(value: Any, key: str) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or type(value) in (bool, int, float, str):
        return value
    if type(value) in (list, tuple):
        return type(value)(_plain(item, key) for item in value)
    if type(value) is dict:
        return {_plain(name, key): _plain(item, key) for name, item in value.items()}
    raise UserError(
        f"{key}: {value!r} is a {type(value).__name__}, which a checkpoint cannot hold; it takes None, booleans, "
        "numbers, strings, and lists, tuples and dictionaries of them"
    )


class RebuiltConfig(Config):
    """A Config of what kept() made of another one; no file or command line is read, and nothing is evaluated."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.compatibility_settings()
        self._init_parameters_category()
        self.model, self.dataset, self.model_class = values["model"], values["dataset"], get_model(values["model"])
        values = {key: value for key, value in values.items() if key not in OF_ONE_RUN}
        enums = {key: kind[values[key]] for key, kind in ENUMS.items() if values.get(key) is not None}
        on_gpu = values["gpu_id"] and torch.cuda.is_available()
        of_this_run = {
            "device": torch.device("cuda" if on_gpu else "cpu"),
            "single_spec": True,
            "local_rank": 0,
            "dataset_save_path": None,
            "dataloaders_save_path": None,
        }
        self.final_config_dict = values | enums | of_this_run


def rebuilt(values: dict[str, Any]) -> Config:
    """The Config that kept() gave the values of, for one process on this machine.

    Raises:
        UserError: they name no model.
    """
    checks.check_model(str(values["model"]), "the checkpoint's model")
    return RebuiltConfig(values)
