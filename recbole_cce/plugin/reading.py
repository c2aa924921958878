"""Methods of RecBole's data sets that read files, download them and number tokens, as the folder `data` does it.

One way for the data sets of all models. What RecBole does instead: repairs.py.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pandas as pd
import torch
from recbole.data.dataset import Dataset
from recbole.utils import FeatureSource, FeatureType

from recbole_cce.data import downloads, tokens
from recbole_cce.data.columns import is_presplit
from recbole_cce.data.sources import inter

_load_data = Dataset._load_data


def load_feat(self: Any, filepath: str, source: FeatureSource | str) -> pd.DataFrame | None:
    """Dataset._load_feat: see inter.load()."""
    return inter.load(self, filepath, source, *self._get_load_and_unload_col(source))


def load_data(self: Any, token: str, dataset_path: str) -> None:
    """Dataset._load_data, of files that are there: see downloads.ensure()."""
    downloads.ensure(self, self._get_download_url)
    _load_data(self, token, dataset_path)


def download(self: Any) -> None:
    """Dataset._download: see downloads.download()."""
    downloads.download(self, self._get_download_url)


def counted(values: Any = ()) -> Counter:
    """Counter(values), without a Python step for each value."""
    counts = pd.Series(values).value_counts()
    return Counter(counts[counts > 0].to_dict())


def remap(self: Any, remap_list: list[tuple[pd.DataFrame, str, FeatureType]]) -> None:
    """Dataset._remap: see tokens.remap()."""
    if remap_list:
        tokens.remap(self, remap_list, *self._concat_remaped_tokens(remap_list))


# Pre-split files bring histories as columns of their own, which RecBole gives ids of their own, too: a model then reads
# other items than it predicts.


def set_alias(self: Any, alias_name: str, default_value: list[str | None]) -> None:
    """SequentialDataset._set_alias: the fields that share ids and, in pre-split files, their lists."""
    Dataset._set_alias(self, alias_name, default_value)
    if is_presplit(self):
        fields = self.alias[alias_name].tolist()
        lists = [field + self.config["LIST_SUFFIX"] for field in fields]
        self.alias[alias_name] = np.array(list(dict.fromkeys([*fields, *filter(self.field2type.get, lists)])))


def init_alias(self: Any) -> None:
    """SequentialDataset._init_alias: fields of pre-split files that nothing is said of share ids with their lists."""
    if is_presplit(self):
        aliases = [self.config[f"alias_of_{name}_id"] or () for name in ("user", "item")]
        said = {self.uid_field, self.iid_field}.union(*aliases)
        for field in self.token_like_fields:
            list_field = field + self.config["LIST_SUFFIX"]
            if list_field in self.field2type and not {field, list_field} & said:
                self._set_alias(field, [field])
    Dataset._init_alias(self)


# Exact times, for models that are compared


def order_exactly() -> None:
    """Let RecBole's data sets sort by the time in the file, as ours do, so that all models have the same splits.

    They sort after a cast to float32, which cannot tell seconds since 1970 apart within 128 s: some users are tested on
    another item then. The time is float64 until the splits are made.
    """
    change_feat_format, build = Dataset._change_feat_format, Dataset.build

    def with_exact_time(self: Dataset) -> None:
        frame = self.inter_feat
        change_feat_format(self)
        if self.time_field in frame:
            exact = torch.from_numpy(frame[self.time_field].to_numpy(np.float64, copy=True))
            self.inter_feat.interaction[self.time_field] = exact

    def build_and_cast(self: Dataset) -> list[Dataset]:
        splits = build(self)
        for dataset in (self, *splits):
            fields = dataset.inter_feat.interaction
            fields.update({name: value.float() for name, value in fields.items() if value.dtype == torch.float64})
        return splits

    Dataset._change_feat_format, Dataset.build = with_exact_time, build_and_cast
