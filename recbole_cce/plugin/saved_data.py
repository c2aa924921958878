"""What RecBole saves of data as pickles (`save_dataset`, `save_dataloaders`), and reads back in later runs.

Data sets of this package are none of them: they are made from their files, or from the copy that `cache_data` keeps,
with the settings of their own run. Those of RecBole's models are made anew where a file or a setting is another by now:
RecBole looks neither at files nor at all settings, and goes on with those that were saved. A pickle can run any code as
it is read: none is, whatever its name and wherever that comes from, unless the run says `trust_checkpoint`.
"""

from __future__ import annotations

import contextlib
import pickle
from collections import defaultdict
from collections.abc import Iterator
from contextvars import ContextVar
from logging import getLogger
from types import SimpleNamespace
from typing import Any

import recbole.data
import recbole.data.dataset
import recbole.quick_start.quick_start as recbole_quick_start
from recbole.data import utils
from recbole.data.dataset import Dataset

from recbole_cce.data.dataset import LeanSequentialDataset
from recbole_cce.data.sources import cache
from recbole_cce.errors import UserError
from recbole_cce.plugin import reading, repairs

_create_dataset = recbole.data.create_dataset
_load_split_dataloaders = utils.load_split_dataloaders
_save_split_dataloaders = utils.save_split_dataloaders
_save = Dataset.save

KEYS = ("save_dataset", "dataset_save_path", "save_dataloaders", "dataloaders_save_path")
UNCOMPARED = ("encoding", "numerical_features", "discretization")  # settings that RecBole reads data with, besides


def create_dataset(config: Any) -> Dataset:
    """recbole.data.create_dataset."""
    ours = our_class(config)
    if ours is not None:
        dataset = ours(config)
        for key in KEYS:
            if config[key]:
                dataset.logger.warning(
                    f"{key}: {config[key]!r} is not used: the data of {config['model']} are made from their files, or "
                    "from the copy that cache_data keeps"
                )
        return dataset
    with unpickling(trusts(config, "dataset_save_path")):
        dataset = _create_dataset(config)
    return dataset if dataset.config is config or is_fresh(dataset, config) else type(dataset)(config)


def load_split_dataloaders(config: Any) -> tuple[Any, ...] | None:
    """recbole.data.utils.load_split_dataloaders."""
    if our_class(config) or not trusts(config, "dataloaders_save_path"):
        return None
    with unpickling(True):
        loaders = _load_split_dataloaders(config)
    return loaders if loaders and all(is_fresh(loader.dataset, config) for loader in loaders) else None


def save_split_dataloaders(config: Any, dataloaders: tuple[Any, ...]) -> None:
    """recbole.data.utils.save_split_dataloaders."""
    if our_class(config):
        return
    for loader in dataloaders:
        loader.dataset.made_from = made_from(loader.dataset)
    _save_split_dataloaders(config, dataloaders)


def save(self: Any) -> None:
    """Dataset.save."""
    self.made_from = made_from(self)
    _save(self)


def trusts(config: Any, key: str) -> bool:
    """Whether a run may unpickle saved data; an error where the key asks for it all the same."""
    if config[key] and not config["trust_checkpoint"]:
        raise UserError(
            f"{key}: {config[key]!r} holds pickled objects, and unpickling can run any code: if you trust whoever made "
            "it, use --trust-checkpoint"
        )
    return bool(config["trust_checkpoint"])


_trusted: ContextVar[bool] = ContextVar("trusted", default=False)


@contextlib.contextmanager
def unpickling(trusted: bool) -> Iterator[None]:
    """Let RecBole unpickle data meanwhile, or not."""
    before = _trusted.set(trusted)
    try:
        yield
    finally:
        _trusted.reset(before)


def load(file: Any) -> Any:
    """pickle.load for RecBole; of an untrusted file a data set whose settings are no run's, so that another is made."""
    if _trusted.get():
        return pickle.load(file)
    getLogger().warning(
        f"{file.name} holds pickled objects, which can run any code: the data set is made anew; --trust-checkpoint "
        "reads the file"
    )
    return SimpleNamespace(config=defaultdict(object))


def our_class(config: Any) -> type[LeanSequentialDataset] | None:
    """The class of a model's data sets, where it is one of this package."""
    found = getattr(recbole.data.dataset, f"{config['model']}Dataset", None)
    return found if isinstance(found, type) and issubclass(found, LeanSequentialDataset) else None


def is_fresh(dataset: Any, config: Any) -> bool:
    """Whether a data set that was read back is what would be made now; it gets the settings of this run."""
    saved, dataset.config, dataset.dataset_path = getattr(dataset, "made_from", None), config, config["data_path"]
    if saved == made_from(dataset):
        return True
    dataset.logger.warning("the data that were saved are of other files or settings: they are made anew")
    return False


def made_from(dataset: Any) -> dict[str, str]:
    """What a data set depends on and RecBole does not compare."""
    return cache.sources(dataset) | {name: repr(dataset.config[name]) for name in UNCOMPARED}


def install() -> None:
    """Put the functions above where RecBole looks them up, and its users import them from."""
    recbole.data.create_dataset = utils.create_dataset = recbole_quick_start.create_dataset = create_dataset
    utils.load_split_dataloaders = load_split_dataloaders
    utils.save_split_dataloaders = save_split_dataloaders
    utils.pickle = SimpleNamespace(load=load, dump=pickle.dump)
    Dataset.save = save
    cache.PROGRAMS += [repairs, reading]
