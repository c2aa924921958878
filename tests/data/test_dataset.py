"""The lean data set against stock RecBole: every row and field of every split, and the order of time."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import recbole
import torch
from recbole.config import Config
from recbole.data import create_dataset, data_preparation

from recbole_cce.data import dataset
from tests.conftest import write_inter

ML100K = Path(recbole.__file__).parent / "dataset_example" / "ml-100k"


def splits(model: str, dataset: str, **settings):
    config = Config(model=model, dataset=dataset, config_dict={"gpu_id": "", "state": "ERROR", **settings})
    return create_dataset(config).build()


def assert_equal_splits(dataset: str, **settings):
    """All rows and fields of train, valid and test equal those of RecBole's SequentialDataset."""
    stock = splits("SASRec", dataset, train_neg_sample_args=None, **settings)
    ours = splits("SASRecCCE", dataset, train_targets="last", repeat_bias="none", **settings)
    for theirs, mine in zip(stock, ours, strict=True):
        assert len(theirs) == len(mine)
        theirs, mine = theirs[np.arange(len(theirs))], mine[np.arange(len(mine))]
        assert set(theirs.columns) == set(mine.columns)
        for field in theirs.columns:
            assert theirs[field].dtype == mine[field].dtype, field
            assert torch.equal(theirs[field], mine[field]), field


SPLITS = {
    "leave-one-out": {"eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "mode": "full"}},
    "ratio-by-user": {
        "eval_args": {"split": {"RS": [0.8, 0.1, 0.1]}, "group_by": "user", "order": "TO", "mode": "full"}
    },
    "ratio-global-time": {
        "eval_args": {"split": {"RS": [0.8, 0.1, 0.1]}, "group_by": "none", "order": "TO", "mode": "full"}
    },
}


def ranked_rows() -> tuple[str, list]:
    """ml-100k with the rank of each second in the place of the second: the same order, exact in float32.

    With the seconds themselves, scaled to [0, 1], stock RecBole confuses 148 pairs of neighbours.
    """
    lines = (ML100K / "ml-100k.inter").read_text().splitlines()
    rows = [line.split("\t") for line in lines[1:]]
    _, ranks = np.unique([int(row[3]) for row in rows], return_inverse=True)
    return lines[0], [(*row[:3], rank) for row, rank in zip(rows, ranks, strict=True)]


@pytest.fixture
def ml100k(tmp_path):
    header, rows = ranked_rows()
    folder = write_inter(tmp_path / "data", "ranked", header, rows)
    (folder / "ranked" / "ranked.item").write_text((ML100K / "ml-100k.item").read_text())
    return {
        "data_path": str(folder),
        "load_col": {"inter": ["user_id", "item_id", "rating", "timestamp"], "item": ["item_id", "class"]},
    }


@pytest.mark.parametrize("length", [5, 50])
@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
def test_splits_equal_stock_on_ml100k(ml100k, split, length):
    assert_equal_splits("ranked", **ml100k, MAX_ITEM_LIST_LENGTH=length, **split)


def test_splits_equal_stock_on_ml100k_as_shipped():
    """But for the users whose order stock RecBole loses in its cast of the time to float32."""
    stock, ours = splits("SASRec", "ml-100k", train_neg_sample_args=None), splits("SASRecCCE", "ml-100k")
    rank, time, uid = (
        field.numpy() for field in (ours[0].time_rank, ours[0].flat["timestamp"], ours[0].flat["user_id"])
    )
    confused = (np.diff(uid) == 0) & (np.diff(rank) > 0) & (np.diff(time) == 0)
    assert confused.sum() == 148
    exact = ~np.isin(np.arange(stock[0].user_num), uid[1:][confused])
    for theirs, mine in zip(stock[1:], ours[1:], strict=True):
        theirs, mine = theirs[np.arange(len(theirs))], mine[np.arange(len(mine))]
        assert torch.equal(theirs["user_id"].sort()[0], mine["user_id"].sort()[0])
        theirs, mine = (split[exact[split["user_id"]].nonzero()[0]] for split in (theirs, mine))
        theirs, mine = (split[split["user_id"].argsort()] for split in (theirs, mine))
        for field in theirs.columns:
            assert torch.equal(theirs[field], mine[field]), field


@pytest.fixture
def with_sequences(tmp_path):
    """ml-100k's first 10,000 interactions with a token_seq and a float_seq column, some of them empty."""
    rng = np.random.default_rng(1)
    rows = []
    for row in ranked_rows()[1][:10_000]:
        tags = " ".join(f"t{tag}" for tag in rng.integers(0, 20, rng.integers(0, 4)))
        scores = " ".join(f"{score:.2f}" for score in rng.random(rng.integers(0, 3)))
        rows.append((*row, tags, scores))
    header = "user_id:token\titem_id:token\trating:float\ttimestamp:float\ttags:token_seq\tscores:float_seq"
    return write_inter(tmp_path / "data", "tagged", header, rows)


@pytest.mark.parametrize("numerical", [[], ["timestamp", "scores"]], ids=str)
@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
def test_splits_equal_stock_with_extra_columns(with_sequences, split, numerical):
    columns = ["user_id", "item_id", "rating", "timestamp", "tags", "scores"]
    assert_equal_splits(
        "tagged",
        data_path=str(with_sequences),
        load_col={"inter": columns},
        numerical_features=["rating", *numerical],
        MAX_ITEM_LIST_LENGTH=7,
        **split,
    )


@pytest.mark.parametrize("split", [{"LS": "valid_only"}, {"LS": "test_only"}, {"TS": [0.8, 0.1, 0.1]}], ids=str)
def test_rarer_splits_equal_stock(tmp_path, split):
    header, rows = ranked_rows()
    assert_equal_splits(
        "part",
        data_path=str(write_inter(tmp_path / "data", "part", header, rows[:3000])),
        load_col={"inter": ["user_id", "item_id", "timestamp"]},
        eval_args={"split": split, "order": "TO", "mode": "full", "group_by": "user"},
    )


@pytest.mark.parametrize(
    "filters",
    [
        {"user_inter_num_interval": "[30,200]", "item_inter_num_interval": "[20,inf)"},
        {"user_inter_num_interval": "[20,30);(100,300]", "item_inter_num_interval": None},
        {"item_inter_num_interval": "[2,inf)", "load_col": {"inter": ["user_id", "item_id", "timestamp"]}},
        {"rm_dup_inter": "last", "filter_inter_by_user_or_item": False},
        {"val_interval": {"rating": "[4,5]", "item_id": [str(item) for item in range(1, 900, 2)]}},
    ],
    ids=str,
)
def test_splits_equal_stock_after_filters(ml100k, filters):
    item = Path(ml100k["data_path"]) / "ranked" / "ranked.item"
    lines = item.read_text().splitlines()
    item.write_text("\n".join([*lines[:1200], "new\ta film\t2001\tDrama", *lines[1300:]]) + "\n")
    assert_equal_splits("ranked", **{**ml100k, **filters})


def test_statistics_equal_stock(ml100k):
    configs = [
        Config(model, "ranked", config_dict={"train_neg_sample_args": None, **ml100k})
        for model in ("SASRec", "SASRecCCE")
    ]
    stock, ours = (create_dataset(config) for config in configs)
    assert str(stock) == str(ours)
    assert stock.user_counter == ours.user_counter


def test_integers_in_the_order_of_doubles():
    numbers = [-np.inf, -1e300, -2.5, -2.0, -1e-320, -0.0, 0.0, 1e-320, 1.0, 1.5, 1.7e9, 1e300, np.inf]
    numbers = torch.tensor(numbers, dtype=torch.float64)
    order = dataset.in_order(numbers)
    assert torch.equal(order[:, None] < order, numbers[:, None] < numbers)


def test_a_row_by_its_number(ml100k):
    train = splits("SASRecCCE", "ranked", **ml100k, train_targets="last")[0]
    one, some = train[7], train[np.array([7])]
    for field in some.columns:
        assert torch.equal(one[field], some[field][0]), field


def test_splits_equal_stock_without_unused_columns(ml100k):
    assert_equal_splits("ranked", **ml100k, unused_col={"inter": ["rating", "timestamp_list"]}, MAX_ITEM_LIST_LENGTH=9)


@pytest.fixture
def presplit(tmp_path):
    """Pre-split files with ready lists: prefixes of 30 users' histories of 3 to 9 items."""
    rng = np.random.default_rng(2)
    parts = {"train": [], "valid": [], "test": []}
    for user in range(30):
        items = [f"i{item}" for item in rng.integers(0, 25, rng.integers(4, 10))]
        for stop in range(1, len(items)):
            part = {len(items) - 1: "test", len(items) - 2: "valid"}.get(stop, "train")
            parts[part].append((f"u{user}", " ".join(items[:stop]), items[stop], stop))
    folder = tmp_path / "data" / "split"
    folder.mkdir(parents=True)
    for part, rows in parts.items():
        lines = ["user_id:token\titem_id_list:token_seq\titem_id:token\ttimestamp:float"]
        lines += ["\t".join(map(str, row)) for row in rows]
        (folder / f"split.{part}.inter").write_text("\n".join(lines) + "\n")
    return {
        "data_path": str(tmp_path / "data"),
        "benchmark_filename": ["train", "valid", "test"],
        "load_col": {"inter": ["user_id", "item_id_list", "item_id", "timestamp"]},
        "alias_of_item_id": ["item_id_list"],
    }, parts


def test_splits_equal_stock_with_benchmark_files(presplit):
    settings, parts = presplit
    assert_equal_splits("split", **settings)
    stock = splits("SASRec", "split", train_neg_sample_args=None, **settings)
    lengths = stock[0].inter_feat["item_length"].tolist()
    assert lengths == [len(row[1].split()) for row in parts["train"]]


def test_benchmark_training_keeps_the_longest_row_of_each_user(presplit):
    settings, parts = presplit
    train = splits("SASRecCCE", "split", **settings)[0]
    longest = {}
    for row in parts["train"]:
        longest[row[0]] = len(row[1].split())
    batch = train[np.arange(len(train))]
    tokens = train.id2token("user_id", batch["user_id"].numpy())
    assert dict(zip(tokens, batch["item_length"].tolist(), strict=True)) == longest


def targets_of(batch) -> list:
    """(user, position-independent) pairs (previous item, target) that all-position training makes of a batch."""
    pairs = []
    for user, items, length, last, count in zip(
        batch["user_id"].tolist(),
        batch["item_id_list"].tolist(),
        batch["item_length"].tolist(),
        batch["item_id"].tolist(),
        batch["target_count"].tolist(),
        strict=True,
    ):
        items = [*items[:length], last]
        pairs += [(user, *pair) for pair in itertools.pairwise(items)][-count:]
    return pairs


@pytest.mark.parametrize("length", [1, 5, 50])
@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
def test_all_positions_train_each_target_of_the_split_once(tmp_path, split, length):
    header, rows = ranked_rows()
    settings = {
        "data_path": str(write_inter(tmp_path / "data", "part", header, rows[:20_000])),
        "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
        "MAX_ITEM_LIST_LENGTH": length,
        **split,
    }
    stock = splits("SASRec", "part", train_neg_sample_args=None, **settings)[0]
    ours = splits("SASRecCCE", "part", **settings)[0]
    rows = stock[np.arange(len(stock))]
    previous = rows["item_id_list"].gather(1, rows["item_length"][:, None] - 1).squeeze(1)
    expected = zip(rows["user_id"].tolist(), previous.tolist(), rows["item_id"].tolist(), strict=True)
    batch = ours[np.arange(len(ours))]
    assert sorted(targets_of(batch)) == sorted(expected)
    assert len(ours) < len(stock) or length == 1
    # a target is predicted from at least half of what stock shows it: its history, up to the length
    shown = batch["item_length"] - batch["target_count"] + 1
    assert ((shown >= (length + 1) // 2) | (batch["item_length"] < length)).all()


def test_windows_leave_statistics_alone(ml100k):
    stock = splits("SASRec", "ranked", train_neg_sample_args=None, **ml100k)
    ours = splits("SASRecCCE", "ranked", **ml100k)
    assert stock[0].item_counter == ours[0].item_counter
    assert stock[0].inter_num == ours[0].inter_num
    for theirs, mine in zip(stock, ours, strict=True):
        assert (theirs.inter_matrix("csr") != mine.inter_matrix("csr")).nnz == 0


def test_order_is_that_of_the_seconds_in_the_file(tmp_path):
    """Seconds since 1970, one apart and not in file order: the cast to float32 cannot tell them apart."""
    rng = np.random.default_rng(3)
    rows = [(f"u{u}", f"i{rng.integers(9)}", 1_700_000_000 + 20 * u + step) for u in range(6) for step in range(15)]
    rng.shuffle(rows)
    write_inter(tmp_path / "data", "seconds", "user_id:token\titem_id:token\ttimestamp:float", rows)
    settings = {
        "data_path": str(tmp_path / "data"),
        "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
    }
    by_user = {}
    for user, item, _ in sorted(rows, key=lambda row: int(row[2])):
        by_user.setdefault(user, []).append(item)
    test = splits("SASRecCCE", "seconds", **settings)[2]
    batch = test[np.arange(len(test))]
    for user, items, last in zip(batch["user_id"], batch["item_id_list"], batch["item_id"], strict=True):
        tokens = [*test.id2token("item_id", items[items > 0].tolist()), test.id2token("item_id", int(last))]
        assert tokens == by_user[test.id2token("user_id", int(user))]
    # and across users, where the split is by global time: the last tenth of the targets
    test = splits("SASRecCCE", "seconds", **settings, **SPLITS["ratio-global-time"])[2]
    targets = sorted((row for row in rows if (row[2] - 1_700_000_000) % 20 > 0), key=lambda row: row[2])
    assert list(test.id2token("user_id", test.inter_feat["user_id"].tolist())) == [
        row[0] for row in targets[-len(test) :]
    ]


def test_batches_hold_the_rows_of_recbole_for_last_targets(tiny_config):
    settings = {"train_targets": "last", "repeat_bias": "none"}
    config = Config("SASRecCCE", "tiny", config_dict={**tiny_config, **settings})
    train, _, test = data_preparation(config, create_dataset(config))
    assert sum(len(batch) for batch in train) == len(train.dataset.inter_feat)
    batch, _, _, positive_i = next(iter(test))
    assert torch.equal(positive_i, batch["item_id"])
    assert "target_row" not in batch


# Batches made elsewhere from row numbers


def assert_same_batches(moved, train, device="cpu"):
    """All fields of all rows, and rows of zeros between them."""
    number = torch.arange(len(train)).flip(0)
    expected = train[number.numpy()]
    batch = moved.batch(torch.stack([number + 1, torch.zeros_like(number)], dim=1).flatten().to(device))
    assert set(batch.columns) == set(expected.columns)
    for field in expected.columns:
        values = batch[field].cpu()
        assert values.dtype == expected[field].dtype
        assert torch.equal(values[::2], expected[field]), field
        assert not values[1::2].any(), field


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
@pytest.mark.parametrize("train_targets", ["all", "last"])
@pytest.mark.parametrize("exclude_seen", [False, True])
def test_rows_gathered_elsewhere(tiny_config, train_targets, exclude_seen, device):
    settings = {**tiny_config, "MAX_ITEM_LIST_LENGTH": 4, "train_targets": train_targets, "exclude_seen": exclude_seen}
    train, *_ = splits("SASRecCCE", "tiny", **settings)
    assert_same_batches(train.on_device(torch.device(device)), train, device)


def test_sequences_gathered_elsewhere(with_sequences):
    columns = ["user_id", "item_id", "rating", "timestamp", "tags", "scores"]
    settings = {"data_path": str(with_sequences), "load_col": {"inter": columns}, "MAX_ITEM_LIST_LENGTH": 7}
    for train_targets in ("all", "last"):
        train, *_ = splits("SASRecCCE", "tagged", train_targets=train_targets, **settings)
        assert any(values.dim() == 3 for values in train[np.arange(3)].interaction.values())
        assert_same_batches(train.on_device(torch.device("cpu")), train)


def test_what_is_gathered_on_the_cpu(ml100k, presplit):
    """Columns of items' features, and lists that the files bring."""
    train, *_ = splits("SASRecCCE", "ranked", **ml100k)
    assert train.item_feat is not None and train.on_device(torch.device("cpu")) is None
    train, *_ = splits("SASRecCCE", "split", **presplit[0])
    assert train.on_device(torch.device("cpu")) is None


@pytest.mark.cuda
def test_data_larger_than_their_share_of_the_gpu_stay(tiny_config, monkeypatch):
    train, *_ = splits("SASRecCCE", "tiny", **tiny_config)
    monkeypatch.setattr(dataset, "RESIDENT_SHARE", 1e-12)
    assert train.on_device(torch.device("cuda")) is None


def test_counts(tiny_config):
    """What a batch needs, counted in it."""
    for train_targets in ("all", "last"):
        config = Config("SASRecCCE", "tiny", config_dict={**tiny_config, "train_targets": train_targets})
        train, *_ = data_preparation(config, create_dataset(config))
        for batch in train:
            counts = train.dataset.counts(batch)
            assert counts.positions == (batch["item_id_list"] != 0).sum()
            assert counts.targets == (batch["target_count"].sum() if train_targets == "all" else len(batch))


# Bad input


def read(tmp_path, header, rows, **settings):
    write_inter(tmp_path / "data", "bad", header, rows)
    columns = {"load_col": {"inter": ["user_id", "item_id", "timestamp"]}}
    return splits("SASRecCCE", "bad", data_path=str(tmp_path / "data"), **{**columns, **settings})


HEADER = "user_id:token\titem_id:token\ttimestamp:float"
ROWS = [(f"u{u}", f"i{(u + step) % 7}", step) for u in range(5) for step in range(5)]


def test_header_without_types(tmp_path):
    with pytest.raises(ValueError, match=r"bad\.inter: the header cell 'user_id' is not 'name:type'.*token_seq"):
        read(tmp_path, "user_id\titem_id\ttimestamp", ROWS)


def test_unknown_type(tmp_path):
    with pytest.raises(ValueError, match=r"'timestamp:int' is not 'name:type'"):
        read(tmp_path, "user_id:token\titem_id:token\ttimestamp:int", ROWS)


def test_missing_column(tmp_path):
    with pytest.raises(ValueError, match=r"ITEM_ID_FIELD: 'item_id' is not a column of .*user_id, movie, timestamp"):
        read(tmp_path, "user_id:token\tmovie:token\ttimestamp:float", ROWS)


def test_time_not_loaded(tmp_path):
    with pytest.raises(
        ValueError, match=r"load_col: the column 'timestamp' \(TIME_FIELD\).*\[user_id, item_id, timest"
    ):
        read(tmp_path, HEADER, ROWS, load_col={"inter": ["user_id", "item_id"]})


def test_nothing_left_after_filtering(tmp_path):
    with pytest.raises(ValueError, match=r"no interaction of bad is left.*user_inter_num_interval: '\[100,inf\)'"):
        read(tmp_path, HEADER, ROWS, user_inter_num_interval="[100,inf)")


def test_only_users_with_one_interaction(tmp_path):
    with pytest.raises(ValueError, match="no user of bad has two interactions"):
        read(tmp_path, HEADER, [(f"u{u}", "i1", u) for u in range(5)])


def test_a_user_with_one_interaction_has_no_row(tmp_path):
    train, valid, test = read(tmp_path, HEADER, [*ROWS, ("lonely", "i1", 9)])
    lonely = train.token2id("user_id", "lonely")
    for split in (train, valid, test):
        assert lonely not in split.inter_feat["user_id"].tolist()
    assert len(test) == 5


def test_lists_of_benchmark_files_longer_than_the_model_reads(presplit):
    settings, _ = presplit
    with pytest.raises(ValueError, match=r"MAX_ITEM_LIST_LENGTH: 3 .*seq_len"):
        splits("SASRecCCE", "split", MAX_ITEM_LIST_LENGTH=3, **settings)


def test_no_line_but_the_header(tmp_path):
    with pytest.raises(ValueError, match="no interaction of bad is left"):
        read(tmp_path, HEADER, [])


def test_missing_file(tmp_path):
    (tmp_path / "data" / "empty").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"empty\.inter not exist"):
        splits("SASRecCCE", "empty", data_path=str(tmp_path / "data"))
