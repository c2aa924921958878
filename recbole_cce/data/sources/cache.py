"""A binary copy of a data set as it is before it is split: read in seconds where the text files take a minute.

RecBole's own copy (`save_dataset`, `dataset_save_path`) cannot be used without asking: it is a pickle, which runs
whatever stands in it, is not written atomically, and is read for other files, encodings or numerical features too. This
one holds arrays, each with a check sum, and JSON, and is used only where everything it was made from is as it was: the
bytes of the files, each setting that was read on the way, the programs that read and prepare, pandas and NumPy.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import recbole
import torch
from recbole.data.dataset import Dataset
from recbole.data.interaction import Interaction
from recbole.utils import FeatureSource, FeatureType

from recbole_cce.data import columns, tokens
from recbole_cce.data.sources import inter
from recbole_cce.data.tokens import packed, unpacked
from recbole_cce.errors import UserError
from recbole_cce.files import remove_parts, write_whole

DESCRIPTION = "description"  # of the arrays: JSON, and first in the file
PROGRAMS: list[Any] = [sys.modules[__name__], columns, inter, tokens]  # that read data; repairs are added
PLAIN = ("field2seqlen", "field2bucketnum", "file_size_list", "notes")  # attributes of a data set that JSON can hold
TOKENS, WEIGHTS = "field2id_token", "preloaded"  # those of a table for each field


class Reading:
    """A Config that remembers what was read from it."""

    def __init__(self, config: Any) -> None:
        self.config = config
        self.values: dict[str, str] = {}

    def __getitem__(self, name: str) -> Any:
        value = self.config[name]
        self.values[name] = repr(value)
        return value

    def __getattr__(self, name: str) -> Any:
        return getattr(self.config, name)


def of(dataset: Any) -> Cache | None:
    """The cache of a data set that is about to be loaded; None where `cache_data` is False.

    Nor is there one in RecBole's own folder, whose ml-100k is small.

    Raises:
        UserError: `cache_data` is a folder that cannot be made.
    """
    wanted = dataset.config["cache_data"]
    if not wanted:
        return None
    folder = Path(dataset.dataset_path if wanted is True else wanted)
    if Path(recbole.__file__).resolve().parent in folder.resolve().parents:
        return None
    if wanted is not True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"cache_data: {wanted!r} is not valid, it cannot be made a folder ({error.strerror}); "
                "it takes True, False or a folder"
            ) from None
    return Cache(folder / f"{dataset.dataset_name}-{type(dataset).__name__}.npz", sources(dataset))


def sources(dataset: Any) -> dict[str, str]:
    """What a copy is made from besides settings: the bytes of every file that RecBole looks for, and the programs."""
    config = dataset.config
    suffixes = [f"{name}.inter" for name in config["benchmark_filename"] or ()] or ["inter"]
    suffixes += ["user", "item", *(config["additional_feat_suffix"] or ())]
    data = [Path(dataset.dataset_path) / f"{dataset.dataset_name}.{suffix}" for suffix in suffixes]
    classes = [cls for cls in type(dataset).__mro__ if issubclass(cls, Dataset)]
    programs = [*(program.__file__ for program in PROGRAMS), *map(inspect.getfile, classes)]
    found = {name: version(name) for name in ("pandas", "numpy")}
    return found | {
        f"{path.parent.name}/{path.name}": digest(path) for path in [*map(Path, programs), *data] if path.is_file()
    }


def digest(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    total = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            total.update(block)
    return total.hexdigest()


@dataclass
class Cache:
    """One file for a data set, replaced when it was made from something else."""

    path: Path
    sources: dict[str, str]

    def read_into(self, dataset: Any) -> bool:
        """Fill a data set from the file; False where there is none, an old one or, with a warning, a damaged one."""
        remove_parts(self.path)
        if not self.path.is_file():
            return False
        try:
            with np.load(self.path, allow_pickle=False) as file:
                described = json.loads(str(file[DESCRIPTION]))
                settings = {name: repr(dataset.config[name]) for name in described["settings"]}
                if described["sources"] != self.sources or described["settings"] != settings:
                    return False
                arrays = {name: file[name] for name in file.files}  # all of them, before any is put to use
            restore(dataset, described, arrays)
        except Exception as error:  # damage can end in any error; zipfile compares the check sums
            dataset.logger.warning(
                f"{self.path} is damaged ({type(error).__name__}: {error}): the data set is read from its files again"
            )
            return False
        for note in getattr(dataset, "notes", ()):
            dataset.logger.warning(note)
        dataset.logger.debug(f"data set read from {self.path}")
        return True

    def write_from(self, dataset: Any, settings: dict[str, str]) -> None:
        """Store a data set that was just loaded with `settings`; a warning where that is impossible."""
        del settings["data_path"]  # the bytes of the files count, wherever they are
        # a file that changed while it was read would be taken for what it was before
        if dataset.config["local_rank"] != 0 or sources(dataset) != self.sources:
            return
        arrays: dict[str, Any] = describe(dataset, {"sources": self.sources, "settings": settings})
        try:
            # no fsync: what a power cut tears fails its check sums
            write_whole(self.path, lambda file: np.savez(file, **arrays))
        except OSError as error:
            dataset.logger.warning(
                f"cache_data: no copy of the data set is kept, {self.path} cannot be written: {error}"
            )


def describe(dataset: Any, described: dict[str, Any]) -> dict[str, np.ndarray]:
    """The arrays of a data set, after a description of them that restore() reads."""
    arrays: dict[str, np.ndarray] = {}
    described |= {name: getattr(dataset, name) for name in PLAIN if hasattr(dataset, name)}
    described["field2type"] = {field: ftype.value for field, ftype in dataset.field2type.items()}
    described["field2source"] = {
        field: source.value if isinstance(source, FeatureSource) else source
        for field, source in dataset.field2source.items()
    }
    arrays |= {f"{WEIGHTS}/{field}": values for field, values in dataset.preloaded.items()}
    described[WEIGHTS] = list(dataset.preloaded)
    owners: dict[int, str] = {}  # fields of one space of ids share one table: that of the first
    described[TOKENS] = {field: owners.setdefault(id(table), field) for field, table in dataset.field2id_token.items()}
    for field in owners.values():
        arrays[f"{TOKENS}/{field}"], arrays[f"{TOKENS}/{field}/lengths"] = packed(dataset.field2id_token[field])
    described["features"] = {name: list(getattr(dataset, name)) for name in dataset.feat_name_list}
    for name, fields in described["features"].items():
        arrays |= {f"{name}/{field}": getattr(dataset, name)[field].numpy() for field in fields}
    if dataset.time_rank is not None:
        arrays["time_rank"] = dataset.time_rank.numpy()
    return {DESCRIPTION: np.array(json.dumps(described)), **arrays}


def restore(dataset: Any, described: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    """Give a data set what describe() took from one."""
    dataset.begin_restored()
    for name in PLAIN:
        if name in described:
            setattr(dataset, name, described[name])
    dataset.field2type = {field: FeatureType(value) for field, value in described["field2type"].items()}
    known = [source.value for source in FeatureSource]
    dataset.field2source = {
        field: FeatureSource(value) if value in known else value for field, value in described["field2source"].items()
    }
    dataset.preloaded = {field: arrays[f"{WEIGHTS}/{field}"] for field in described[WEIGHTS]}
    tables = {
        field: unpacked(arrays[f"{TOKENS}/{field}"], arrays[f"{TOKENS}/{field}/lengths"])
        for field in dict.fromkeys(described[TOKENS].values())
    }
    dataset.field2id_token = {field: tables[owner] for field, owner in described[TOKENS].items()}
    ids = {field: {token: number for number, token in enumerate(table)} for field, table in tables.items()}
    dataset.field2token_id = {field: ids[owner] for field, owner in described[TOKENS].items()}
    dataset.user_feat = dataset.item_feat = None
    for name, fields in described["features"].items():
        setattr(dataset, name, Interaction({field: torch.from_numpy(arrays[f"{name}/{field}"]) for field in fields}))
    if "time_rank" in arrays:
        dataset.time_rank = torch.from_numpy(arrays["time_rank"])
    dataset.end_restored()
