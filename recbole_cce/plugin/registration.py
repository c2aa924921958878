"""Puts models, their data sets, trainers and defaults where RecBole looks them up by name.

RecBole finds a model in the module recbole.model.<kind>_recommender.<lower-case name>, its data set as
recbole.data.dataset.<Name>Dataset, its trainer as recbole.trainer.<Name>Trainer and its defaults when Config loads
its YAML files. Nothing is written into site-packages.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import recbole
import recbole.data.dataset
import recbole.trainer
from recbole.config import Config
from recbole.model.abstract_recommender import SequentialRecommender
from recbole.utils import get_model

from recbole_cce.data.dataset import LeanSequentialDataset
from recbole_cce.errors import UserError
from recbole_cce.keys import Key
from recbole_cce.nn.losses import registry
from recbole_cce.plugin.config_sources import read_yaml as read_yaml
from recbole_cce.training.trainer import EfficientTrainer

PACKAGE = Path(__file__).parent.parent
# beside the package in a checkout, inside it in a wheel
PROPERTIES = next(path for path in (PACKAGE / "properties", PACKAGE.parent / "properties") if path.is_dir())
MODELS: dict[str, Path] = {}  # registered name -> YAML file of its defaults


def register_model(
    cls: type[SequentialRecommender],
    defaults: Path | str | None = None,
    dataset: type = LeanSequentialDataset,
    trainer: type = EfficientTrainer,
) -> type[SequentialRecommender]:
    """Make `cls` a model that RecBole finds by its class name.

    Args:
        cls: a SequentialRecommender defined in an importable module, from which other processes import it.
        defaults: YAML file of the model's defaults; properties/model/<Name>.yaml of this package if None.
        dataset: data set class to use with it.
        trainer: trainer class to use with it.

    Returns:
        `cls`, so that it works as a decorator.

    Raises:
        UserError: RecBole, or an earlier call, already has a model of that name; no other process could import
            the class; there is no file of defaults.
    """
    name = cls.__name__
    if cls.__module__ == "__main__":
        raise UserError(f"model {name!r} is defined in the main script: move it to a module that can be imported")
    alias = f"recbole.model.sequential_recommender.{name.lower()}"
    taken = [str(file) for file in Path(recbole.__file__).parent.glob(f"model/*_recommender/{name.lower()}.py")]
    taken += [alias] if alias in sys.modules else []
    for package, attribute in ((recbole.data.dataset, f"{name}Dataset"), (recbole.trainer, f"{name}Trainer")):
        taken += [f"{package.__name__}.{attribute}"] if hasattr(package, attribute) else []
    if taken:
        raise UserError(f"model name {name!r} is taken: {taken[0]} exists; choose another class name")
    defaults = Path(defaults) if defaults else PROPERTIES / "model" / f"{name}.yaml"
    if not defaults.is_file():
        raise UserError(f"defaults: there is no file {str(defaults)!r} with the defaults of {name}")
    sys.modules[alias] = sys.modules[cls.__module__]
    setattr(recbole.data.dataset, f"{name}Dataset", dataset)
    setattr(recbole.trainer, f"{name}Trainer", trainer)
    MODELS[name] = defaults
    return cls


def declared(cls: type) -> Mapping[str, Key]:
    """The keys that a model's class declares, in an attribute `keys`."""
    return getattr(cls, "keys", {})


def defaults(model: str) -> dict[str, Any]:
    """The defaults of a registered model: those that losses and the class itself declare, then its YAML file."""
    keys = {**registry.declared(), **declared(get_model(model))}
    return {name: key.default for name, key in keys.items() if key.default is not None} | read_yaml(MODELS[model])


def dataset_defaults(dataset: str) -> Path | None:
    """Our YAML file for a data set that RecBole has none for."""
    path = PROPERTIES / "dataset" / f"{dataset}.yaml"
    return path if path.is_file() else None


_load_internal_config_dict = Config._load_internal_config_dict


def load_internal_config_dict(self: Config, model: str, model_class: type, dataset: str) -> None:
    """Config._load_internal_config_dict with the defaults of registered models; others are left alone."""
    _load_internal_config_dict(self, model, model_class, dataset)
    if model not in MODELS:
        return
    self.internal_config_dict.update(defaults(model))
    if path := dataset_defaults(dataset):
        self.internal_config_dict.update(read_yaml(path))


def install() -> None:
    """Let Config know the defaults of registered models."""
    Config._load_internal_config_dict = load_internal_config_dict
