"""Tokens and their ids: the tables of a data set, in memory and in a file, and which columns share one."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
from recbole.data.dataset import Dataset
from recbole.utils import FeatureType

from recbole_cce.data.columns import is_presplit


def remap(self: Any, remap_list: list[tuple[pd.DataFrame, str, FeatureType]]) -> None:
    """Dataset._remap: columns that share ids become numbers, in the order in which their tokens appear, from 1 on.

    The table is of Python strings: in RecBole's, every token takes as many bytes as the longest.
    """
    if not remap_list:
        return
    tokens, stops = self._concat_remaped_tokens(remap_list)
    ids, found = pd.factorize(tokens)
    table = np.array(["[PAD]", *found], dtype=object)
    known = {token: number for number, token in enumerate(table)}
    for (feat, field, ftype), values in zip(remap_list, np.split(ids + 1, stops), strict=True):
        self.field2id_token.setdefault(field, table)
        self.field2token_id.setdefault(field, known)
        if ftype == FeatureType.TOKEN_SEQ:
            values = np.split(values, np.cumsum(feat[field].map(len))[:-1])
        feat[field] = values


def packed(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A table as bytes of UTF-8 [B] and the number of characters [V] of each token."""
    text = "".join(tokens).encode("utf-8", "surrogatepass")
    return np.frombuffer(text, dtype=np.uint8), np.fromiter(map(len, tokens), dtype=np.int64, count=len(tokens))


def unpacked(text: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The table that packed() was given."""
    whole = text.tobytes().decode("utf-8", "surrogatepass")
    stops = np.concatenate([[0], lengths.cumsum()]).tolist()
    if stops[-1] != len(whole):
        raise ValueError(f"{stops[-1]} characters of tokens, not {len(whole)}")
    return np.array([whole[start:stop] for start, stop in pairwise(stops)], dtype=object)


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
