"""What a trained model is used for: lists of items for users, and item vectors for an index, in external tokens."""

from __future__ import annotations

from collections.abc import Iterator
from logging import getLogger
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pandas as pd
import torch
from recbole.utils import set_color
from torch import nn
from tqdm import tqdm

from recbole_cce.data.dataset import LeanSequentialDataset
from recbole_cce.errors import UserError
from recbole_cce.files import write_whole
from recbole_cce.nn import repeats
from recbole_cce.plugin import entry_points, registration
from recbole_cce.training.checkpoint import make_safe, read
from recbole_cce.training.evaluation import table_of, top_items

FORMATS = (".csv", ".parquet")


def recommend(
    checkpoint: str,
    output: str,
    k: int = 50,
    users: str | None = None,
    exclude_seen: bool = False,
    trust_checkpoint: bool = False,
) -> None:
    """Write the k items with the highest scores after each user's last interaction, best first.

    The columns of `output` are user, item (external tokens), rank (from 1) and score. Users come in the order of
    `users`, or of the data set's ids. Rows are written as they are computed, and the file appears when it is complete.

    Users without an interaction, whom a file of users names, get no list; a warning counts them.

    Args:
        checkpoint: file that training has saved; the data set is read as its configuration says.
        output: path of a .csv or a .parquet file, which takes pyarrow.
        k: items a user.
        users: file with one external user token a line; None is all users.
        exclude_seen: leave out items that a user has had. Lists are shorter where too few are left.
        trust_checkpoint: as of load_data_and_model().

    Raises:
        UserError: a wrong option, an unknown user, no user with an interaction, a checkpoint of a model that is not of
            this package.
    """
    suffix = Path(output).suffix
    if suffix not in FORMATS:
        raise UserError(f"--output: {output!r} is not valid; it takes a file that ends in {' or '.join(FORMATS)}")
    tokens = [] if users is None else read_tokens(users)
    config, model, dataset = load(checkpoint, trust_checkpoint)
    if not 1 <= k < model.n_items:
        raise UserError(f"--k: {k} is not valid; it takes 1 to {model.n_items - 1}, the number of items")
    ids = torch.arange(1, dataset.user_num) if users is None else user_ids(dataset, tokens, users)
    ids = with_history(dataset, ids)
    tables = recommendations(model, dataset, ids, k, exclude_seen, config)
    write_whole(Path(output), lambda file: WRITERS[suffix](file, tables))
    getLogger().info(f"{k} items for each of {len(ids)} users: {output}")


def export(checkpoint: str, output: str, trust_checkpoint: bool = False) -> None:
    """Write item vectors for a vector index: `output`.npy [V, D] fp32, and `output`.tsv with the token of each row.

    A user's scores are the inner products of the model's user vector with these.

    Raises:
        UserError: as recommend().
    """
    _, model, dataset = load(checkpoint, trust_checkpoint)
    vectors = table_of(model).vectors().numpy()
    tokens = dataset.field2id_token[dataset.iid_field][1:]
    write_whole(Path(f"{output}.npy"), lambda file: np.save(file, vectors))
    table = pd.DataFrame({"row": np.arange(len(tokens)), "item": tokens})
    write_whole(Path(f"{output}.tsv"), lambda file: table.to_csv(file, sep="\t", index=False, mode="wb"))
    getLogger().info(f"vectors of {len(tokens)} items: {output}.npy, their tokens: {output}.tsv")


def load(checkpoint: str, trust: bool) -> tuple[Any, Any, LeanSequentialDataset]:
    """Configuration, model ready to score, and training split, whose flat table holds all interactions."""
    if not Path(checkpoint).is_file():
        raise UserError(f"--checkpoint: there is no file {checkpoint!r}")
    state = make_safe(checkpoint) if trust else read(checkpoint)
    name = state["config"]["model"]
    if name not in registration.MODELS:
        raise UserError(
            f"--checkpoint: {checkpoint!r} is one of {name}; it takes one of {', '.join(registration.MODELS)}"
        )
    config, model, _, train_data, _, _ = entry_points.data_and_model(state)
    if not hasattr(model, "item_embedding"):
        raise UserError(f"--checkpoint: {checkpoint!r} is one of {name}, which has no item vectors")
    return config, model.eval(), train_data.dataset


def read_tokens(file: str) -> list[str]:
    """The lines of a file."""
    if not Path(file).is_file():
        raise UserError(f"--users: there is no file {file!r}")
    return Path(file).read_text(encoding="utf-8").splitlines()


def user_ids(dataset: LeanSequentialDataset, tokens: list[str], file: str) -> torch.Tensor:
    """[U] ids of external user tokens."""
    known = dataset.field2token_id[dataset.uid_field]
    unknown = [token for token in tokens if token not in known or known[token] == 0]
    if unknown:
        raise UserError(
            f"--users: {len(unknown)} of the {len(tokens)} users of {file!r} are not in {dataset.dataset_name} as the "
            f"checkpoint's settings filter it, the first is {unknown[0]!r}"
        )
    return torch.tensor([known[token] for token in tokens], dtype=torch.int64)


def with_history(dataset: LeanSequentialDataset, users: torch.Tensor) -> torch.Tensor:
    """Those of `users` [U] who have an interaction."""
    left = users[dataset.history_lengths(users) > 0]
    if len(left) == 0:
        raise UserError(f"--users: none of the {len(users)} users has an interaction in {dataset.dataset_name}")
    if len(left) < len(users):
        getLogger().warning(f"{len(users) - len(left)} of {len(users)} users have no interaction: they get no list")
    return left


@torch.no_grad()
def recommendations(
    model: nn.Module, dataset: LeanSequentialDataset, users: torch.Tensor, k: int, exclude_seen: bool, config: Any
) -> Iterator[pd.DataFrame]:
    """The table of recommend(), some users at a time."""
    user_tokens, item_tokens = (dataset.field2id_token[field] for field in (dataset.uid_field, dataset.iid_field))
    batches = users.split(config["eval_batch_size"])
    progress = tqdm(batches, ncols=100, desc=set_color("Recommend", "pink"), disable=not config["show_progress"])
    for batch in progress:
        rows = dataset.latest(batch)
        history = dataset.history(rows) if exclude_seen or repeats.wanted(config) else None
        top = top_items(model, rows, k, config["eval_chunk_items"], history, exclude_seen)
        scores, items = (part.cpu() for part in top)
        left = scores > -torch.inf
        row, rank = left.nonzero(as_tuple=True)
        yield pd.DataFrame(
            {
                "user": user_tokens[batch[row].numpy()],
                "item": item_tokens[items[left].numpy()],
                "rank": rank.numpy() + 1,
                "score": scores[left].float().numpy(),
            }
        )


def write_csv(file: BinaryIO, tables: Iterator[pd.DataFrame]) -> None:
    """Tables one after another, under one header."""
    for number, table in enumerate(tables):
        table.to_csv(file, mode="wb", header=number == 0, index=False)


def write_parquet(file: BinaryIO, tables: Iterator[pd.DataFrame]) -> None:
    """Tables one after another, a row group each."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise UserError("--output: a .parquet file takes pyarrow: pip install pyarrow; a .csv file does not") from error
    names = {"user": pyarrow.string(), "item": pyarrow.string(), "rank": pyarrow.int32(), "score": pyarrow.float32()}
    schema = pyarrow.schema(names.items())
    with parquet.ParquetWriter(file, schema) as writer:
        for table in tables:
            writer.write_table(pyarrow.Table.from_pandas(table, schema, preserve_index=False))


WRITERS = {".csv": write_csv, ".parquet": write_parquet}
