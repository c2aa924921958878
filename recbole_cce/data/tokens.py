"""Tokens and their ids: the tables of a data set, in memory and in a file, and which columns share one."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
from recbole.utils import FeatureType


def remap(dataset: Any, columns: list[tuple[pd.DataFrame, str, FeatureType]], tokens: Any, stops: np.ndarray) -> None:
    """Make numbers of columns that share ids, in the order in which their tokens appear, from 1 on.

    The table is of Python strings: in RecBole's, every token takes as many bytes as the longest.

    Args:
        dataset: gets the table.
        columns: frame, name and type of each.
        tokens: those of all columns, one after another.
        stops: where each but the last one ends in them.
    """
    ids, found = pd.factorize(tokens)
    table = np.array(["[PAD]", *found], dtype=object)
    known = {token: number for number, token in enumerate(table)}
    for (feat, field, ftype), values in zip(columns, np.split(ids + 1, stops), strict=True):
        dataset.field2id_token.setdefault(field, table)
        dataset.field2token_id.setdefault(field, known)
        column: Any = values
        if ftype == FeatureType.TOKEN_SEQ:
            column = np.split(values, np.cumsum(feat[field].map(len))[:-1])
        feat[field] = column


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
