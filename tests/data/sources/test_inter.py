"""Atomic files as they stand: what is read of them against plain Python, what is left out, and what is an error."""

from __future__ import annotations

import io

import numpy as np
import pandas as pd
import pytest
from recbole.config import Config
from recbole.data import create_dataset
from recbole.data.dataset import Dataset
from recbole.utils import FeatureSource

from recbole_cce.data.sources import inter
from recbole_cce.errors import UserError
from recbole_cce.plugin import reading
from tests.build import experiment

HEADER = "user_id:token\titem_id:token\ttimestamp:float"
ROWS = [(f"u{u}", f"i{(u * 3 + k * 5) % 11}", 1000 + u + 100 * k) for k in (2, 0, 3, 1, 5, 4) for u in range(8)]
# what defaults, which may change, would decide
TRAINING = {
    "loss_type": "CCE-",
    "train_batch_size": 32,
    "learning_rate": 0.002,
    "hidden_dropout_prob": 0.5,
    "positions": "start",
    "weight_average": "none",
    "repeat_bias": "none",
}
COLUMNS = ["user_id", "item_id", "timestamp"]


@pytest.fixture
def settings(tmp_path):
    """A run of one epoch on the CPU; all columns of the files are loaded."""
    return {
        "data_path": str(tmp_path / "data"),
        "load_col": None,
        "gpu_id": "",
        "state": "ERROR",
        "epochs": 1,
        "topk": [3],
        "valid_metric": "MRR@3",
        "hidden_size": 16,
        "inner_size": 16,
        "show_progress": False,
        "cache_data": False,
    }


@pytest.fixture
def write(tmp_path):
    """Write the data set `ok`, or a file of it with another suffix."""

    def write(rows, header=HEADER, suffix="inter", encoding="utf-8", separator="\t", begin=b""):
        folder = tmp_path / "data" / "ok"
        folder.mkdir(parents=True, exist_ok=True)
        text = "\n".join([header, *(separator.join(map(str, row)) for row in rows)]) + "\n"
        (folder / f"ok.{suffix}").write_bytes(begin + text.encode(encoding))
        return str(folder / f"ok.{suffix}")

    return write


def load(settings, model="SASRecCCE", **more):
    own = {"train_neg_sample_args": None} if model == "SASRec" else {}
    return create_dataset(Config(model, "ok", config_dict={**settings, **own, **more}))


def result_of(settings, **more):
    """recall@3 and mrr@3 of a run."""
    run = experiment("SASRecCCE", {**settings, **TRAINING, **more}, dataset="ok")
    run.trainer.fit(run.train, run.valid)
    result = run.trainer.evaluate(run.test)
    return result["recall@3"], result["mrr@3"]


def changed(change):
    """ROWS, each with its number through `change`."""
    return [change(number, *row) for number, row in enumerate(ROWS)]


NAMES = {"i3": "NA", "i4": "null"}
NO_TIME = changed(lambda n, user, item, time: (user, item, "" if n % 9 == 0 else time))
CUT_SHORT = changed(lambda n, *row: row[:2] if n % 9 == 0 else row)
NO_RATING = changed(lambda n, user, item, time: (user, item, time, "" if n % 9 == 0 else 4))


@pytest.mark.parametrize(
    ("rows", "header", "more", "expected", "left_out"),
    [
        (ROWS, HEADER, {}, (0.25, 0.1875), None),
        (ROWS, HEADER.replace("float", "token"), {}, (0.25, 0.1875), None),
        (changed(lambda n, u, i, t: (u, '"' * (n in (3, 30)) + i, t)), HEADER, {}, (0.125, 0.0417), None),
        (changed(lambda n, u, i, t: (u, NAMES.get(i, i), t)), HEADER, {}, (0.25, 0.1875), None),
        (
            NO_TIME,
            HEADER,
            {},
            (0.375, 0.1875),
            "6 of 48 lines are left out, they have no timestamp; the first is line 2",
        ),
        (CUT_SHORT, HEADER, {}, (0.375, 0.1875), "6 of 48 lines are left out, they have no timestamp"),
        (
            NO_RATING,
            HEADER + "\trating:float",
            {"val_interval": {"rating": "[3,inf)"}},
            (0.375, 0.1875),
            "6 of 48 lines are left out, they have no rating; the first is line 2",
        ),
    ],
    ids=["ok", "time in tokens", "quotes", "NA", "no time", "cut short", "no rating"],
)
def test_what_a_run_reads(settings, write, caplog, rows, header, more, expected, left_out):
    write(rows, header)
    assert result_of(settings, **more) == expected
    assert [left_out in record.message for record in caplog.records] == [True] * (left_out is not None)


@pytest.mark.parametrize("model", ["SASRecCCE", "SASRec", "BPR"])
def test_rows_and_tokens(settings, write, caplog, model):
    """Of our models and of RecBole's: all but the lines without a user or an item."""
    odd = ['"', "'i", "NA", "null", "None", "nan", "", "  x ", "1.0", "01", "i\u00e9", "#", "\\t", "a,b", "-", '"a"']
    rows = changed(lambda n, u, i, t: ("" if n == 5 else u, "" if n == 20 else odd[n % 16] + i, t))
    write(rows)
    dataset = load(settings, model)
    kept = [row for row in rows if row[0] and row[1]]
    times = np.asarray(dataset.inter_feat["timestamp"]).tolist()
    users, items = (
        dataset.id2token(field, np.asarray(dataset.inter_feat[field], dtype=int)) for field in ("user_id", "item_id")
    )
    assert sorted(zip(users, items, times, strict=True)) == sorted(kept)
    assert dataset.item_num == 1 + len({row[1] for row in kept})
    assert [record.message.partition(": ")[2] for record in caplog.records] == [
        "1 of 48 lines are left out, they have no user_id; the first is line 7",
        "1 of 48 lines are left out, they have no item_id; the first is line 22",
    ]


def test_lines_are_counted_with_empty_ones(settings, write, caplog):
    write([*ROWS[:3], ("",), ("  ",), ("u1", "", 5), *ROWS[3:]])
    load(settings)
    assert "1 of 49 lines are left out, they have no item_id; the first is line 7" in caplog.text


@pytest.mark.parametrize("lines", [7, 2**21])
@pytest.mark.parametrize("separator", ["\t", ",", "::", "§"])
def test_columns_to_the_same_bits(settings, write, monkeypatch, separator, lines):
    """Numbers of all lengths, tokens, sequences, missing values, against a split of each line."""
    monkeypatch.setattr(inter, "LINES_AT_A_TIME", lines)
    rng = np.random.default_rng(4)
    rows = [
        (
            *row,
            rng.choice(["", "1e-3", "NaN", str(rng.random() * 10.0 ** rng.integers(-300, 300))]),
            rng.choice(["007", "7", "NA", "", "a b", '"q', 'in"side', "true"]),
            rng.choice(["", "a", "a NA  b", '"a null']),
            rng.choice(["", "0.5 1e3"]),
        )
        for row in ROWS
    ]
    header = (HEADER + "\trating:float\ttag:token\ttags:token_seq\tscores:float_seq").replace("\t", separator)
    path = write(rows, header, separator=separator)
    dataset = load(settings, field_separator=separator)
    frame = reading.load_feat(dataset, path, FeatureSource.INTERACTION)
    for name, column in zip(COLUMNS[:2], zip(*rows, strict=True), strict=False):
        assert frame[name].tolist() == list(column)
    assert frame["timestamp"].tolist() == [float(row[2]) for row in rows]
    rating, tag, tags, scores = list(zip(*rows, strict=True))[3:]
    # as the parser that RecBole asks for, which may be a bit off Python's
    expected = pd.read_csv(io.StringIO("\n".join(["x", *(text or "NaN" for text in rating)])), engine="python")["x"]
    assert np.array_equal(frame["rating"], expected, equal_nan=True)
    assert frame["tag"].astype(object).where(frame["tag"].notna(), "").tolist() == list(tag)
    assert [" ".join(values) for values in frame["tags"]] == [" ".join(text.split()) for text in tags]
    assert [values.tolist() for values in frame["scores"]] == [[0.5, 1000.0] if text else [] for text in scores]


@pytest.mark.parametrize(
    ("encoding", "begin", "named"),
    [
        ("utf-8", b"\xef\xbb\xbf", None),
        ("utf-8", b"\xef\xbb\xbf", "utf8"),
        ("latin-1", b"", "latin-1"),
        ("utf-16", b"", "utf-16"),
    ],
)
def test_encodings(settings, write, encoding, begin, named):
    write(changed(lambda n, u, i, t: (u, "ö" + i, t)), encoding=encoding, begin=begin)
    dataset = load(settings, encoding=named)
    assert set(dataset.field2id_token["item_id"][1:]) == {f"öi{item}" for item in range(11)}


def test_paths_with_odd_characters(settings, write, tmp_path):
    write(ROWS)
    odd = tmp_path / "a=b [1] * é?"
    (tmp_path / "data").rename(odd)
    for _ in range(2):
        assert len(load(settings, data_path=str(odd), cache_data=True).inter_feat) == 48
    assert sorted(file.name for file in (odd / "ok").iterdir()) == ["ok-LeanSequentialDataset.npz", "ok.inter"]


def test_a_missing_value_is_no_label(settings, write, caplog):
    """RecBole would give the line the mean of all ratings, and by that a label."""
    write(NO_RATING, HEADER + "\trating:float")
    dataset = load(settings, "BPR", threshold={"rating": 3})
    assert dataset.inter_feat["label"].tolist() == [1] * 42
    assert "6 of 48 lines are left out, they have no rating" in caplog.text


def test_of_two_lines_of_a_user_the_first(settings, write, caplog):
    write(ROWS)
    write([(f"u{user}", user) for user in range(8)] + [("u3", 30), ("", 5)], "user_id:token\tage:float", "user")
    for model in ("SASRecCCE", "SASRec", "BPR"):
        dataset = load(settings, model)
        age = dict(zip(dataset.field2id_token["user_id"][1:], np.asarray(dataset.user_feat["age"])[1:], strict=True))
        assert age == {f"u{user}": user for user in range(8)}
        assert "1 of 10 lines are left out, an earlier line has the same user_id; the first is line 10" in caplog.text
        assert "1 of 10 lines are left out, they have no user_id; the first is line 11" in caplog.text
        caplog.clear()


# Histories in pre-split files


def presplit(write, lists=True, times=True):
    """Each user's history in order: the prefixes of the last two are valid and test."""
    header = [name for name in ("user_id:token", "item_id_list:token_seq", "item_id:token", "timestamp:float")]
    parts = {"train": [], "valid": [], "test": []}
    for user in range(8):
        history = [(item, time) for _, item, time in sorted(ROWS, key=lambda row: row[2]) if _ == f"u{user}"]
        for stop in range(1, 6):
            row = (f"u{user}", " ".join(item for item, _ in history[:stop]), *history[stop])
            parts[{5: "test", 4: "valid"}.get(stop, "train")].append(row)
    keep = [0, *[1] * lists, 2, *[3] * times]
    for part, rows in parts.items():
        header_of_part = "\t".join(header[place] for place in keep)
        write([[row[place] for place in keep] for row in rows], header_of_part, f"{part}.inter")
    return {"benchmark_filename": ["train", "valid", "test"]}


@pytest.mark.parametrize("times", [True, False])
def test_lists_and_targets_are_of_one_space_of_ids(settings, write, times):
    more = presplit(write, times=times)
    result = result_of(settings, **more)
    assert result == result_of(settings, **more, alias_of_item_id=["item_id_list"]) == (0.25, 0.1042)
    ours, stock = load(settings, **more), load(settings, "SASRec", **more)
    for dataset in (ours, stock):
        assert dataset.item_num == 12
        assert dataset.field2id_token["item_id_list"] is dataset.field2id_token["item_id"]


def test_other_lists_share_ids_with_their_columns(settings, write):
    more = presplit(write)
    for part in more["benchmark_filename"]:
        rows = [("u1", "i1 i2", "i3", "b a", "a"), ("u2", "i2", "i1", "c", "b")]
        write(
            rows,
            "user_id:token\titem_id_list:token_seq\titem_id:token\tkind_list:token_seq\tkind:token",
            f"{part}.inter",
        )
    for model in ("SASRecCCE", "SASRec"):
        dataset = load(settings, model, **more)
        assert dataset.field2id_token["kind_list"] is dataset.field2id_token["kind"]
        assert sorted(dataset.field2id_token["kind"][1:]) == ["a", "b", "c"]


@pytest.mark.parametrize("model", ["SASRecCCE", "SASRec"])
def test_presplit_files_without_histories(settings, write, model):
    more = presplit(write, lists=False)
    with pytest.raises(UserError, match=r"benchmark_filename: 'item_id_list'.* is not a column of .*ok\.train\.inter"):
        load(settings, model, **more)


def test_rows_of_presplit_files_without_a_history(settings, write, caplog):
    more = presplit(write)
    write(
        [("u1", "", "i1", 5), ("u2", "i1", "i2", 6)],
        "user_id:token\titem_id_list:token_seq\titem_id:token\ttimestamp:float",
        "test.inter",
    )
    assert len(load(settings, **more).build()[2]) == 1
    assert "1 of 2 lines are left out, they have no item_id_list; the first is line 2" in caplog.text


# Mistakes: one line each, for our models and for RecBole's

MISTAKES = {
    "time in words": (
        HEADER.replace("float", "token"),
        r"ok\.inter: line 2 has '1200 h' in the column 'timestamp', wh",
    ),
    "items in numbers": (
        HEADER.replace("item_id:token", "item_id:float"),
        "ITEM_ID_FIELD: .* has item_id:float; it takes item_id:token",
    ),
    "items in sequences": (
        HEADER.replace("item_id:token", "item_id:token_seq"),
        "ITEM_ID_FIELD: .* has item_id:token_seq",
    ),
    "users in numbers": (HEADER.replace("user_id:token", "user_id:float"), "USER_ID_FIELD: .* has user_id:float"),
    "times in sequences": (
        HEADER.replace("float", "float_seq"),
        "TIME_FIELD: .* has timestamp:float_seq; it takes timestamp:float",
    ),
    "a column twice": (
        "user_id:token\titem_id:token\titem_id:token",
        "the column 'item_id' is twice in the header",
    ),
}


@pytest.mark.parametrize("model", ["SASRecCCE", "SASRec"])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_in_columns(settings, write, model, mistake):
    header, message = MISTAKES[mistake]
    write(changed(lambda n, u, i, t: (u, i, f"{t} h")), header)
    with pytest.raises(UserError, match=message):
        load(settings, model)


@pytest.mark.parametrize("name", ["row_number", "target_count", "target_row", "item_length", "item_id_list"])
def test_names_that_the_data_set_gives(settings, write, name):
    write(changed(lambda n, *row: (*row, n)), f"{HEADER}\t{name}:float")
    with pytest.raises(UserError, match=f"ok.inter: the column '{name}' has the name of one that the data set makes"):
        load(settings)
    assert len(load(settings, load_col={"inter": COLUMNS}).inter_feat) == 48


def test_one_column_in_two_files(settings, write):
    write(changed(lambda n, *row: (*row, n)), f"{HEADER}\trating:float")
    write([(f"i{item}", item) for item in range(11)], "item_id:token\trating:float", "item")
    with pytest.raises(UserError, match=r"ok\.item: the column 'rating' is in another file, too"):
        load(settings)


def test_no_line_with_a_time(settings, write):
    write(changed(lambda n, u, i, t: (u, i, "")))
    with pytest.raises(UserError, match=r"ok\.inter: no line has user_id and item_id and timestamp"):
        load(settings)


def test_a_line_with_more_cells(settings, write):
    write(changed(lambda n, *row: (*row, "x") if n == 9 else row))
    with pytest.raises(UserError, match=r"ok\.inter: line 11 has more cells than the header; .* field_separator '\\t'"):
        load(settings)


@pytest.mark.parametrize("place", [0, 40])
def test_text_in_another_encoding(settings, write, place):
    write(changed(lambda n, u, i, t: (u, i + "é" * (n == place), t)), encoding="latin-1")
    with pytest.raises(UserError, match=r"encoding: .*ok\.inter is not utf-8 text .*; set its encoding"):
        load(settings)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("encoding", "utf-99"),
        ("encoding", 5),
        ("field_separator", ""),
        ("field_separator", "\n"),
        ("field_separator", 5),
        ("seq_separator", ""),
        ("rm_dup_inter", "no"),
        ("rm_dup_inter", False),
        ("user_inter_num_interval", 100),
        ("user_inter_num_interval", "[5,inf"),
        ("item_inter_num_interval", "[9,3]"),
        ("item_inter_num_interval", "[a,3]"),
        ("item_inter_num_interval", "[1,3];"),
        ("val_interval", "[3,inf)"),
        ("val_interval", {"timestamp": "[3,inf"}),
        ("val_interval", {"timestamp": ["1"]}),
        ("val_interval", {"item_id": "[1,2]"}),
        ("val_interval", {"item_id": [1, 2]}),
        ("val_interval", {"tags": ["a"]}),
    ],
    ids=str,
)
@pytest.mark.parametrize("model", ["SASRecCCE", "BPR"])
def test_settings_that_filter_nothing(settings, write, model, setting, value):
    write(changed(lambda n, *row: (*row, "a b")), f"{HEADER}\ttags:token_seq")
    with pytest.raises(UserError, match=f"^{setting}: .* is not valid; it takes "):
        load(settings, model, **{setting: value})


def test_intervals_that_filter(settings, write):
    write(changed(lambda n, *row: (*row, n % 5)), f"{HEADER}\trating:float")
    for interval, kept in {"(1,3]": {2, 3}, "[0,1);[4,inf)": {0, 4}, "[2, 2]": {2}}.items():
        ratings = load(settings, val_interval={"rating": interval}).inter_feat["rating"]
        assert set(ratings.tolist()) == kept


# Token tables


def test_one_long_token_does_not_widen_the_others(settings, write, tmp_path):
    long = "x" * 3_000_000
    write(changed(lambda n, u, i, t: (u, long if n == 9 else i, t)))
    for _ in range(2):
        dataset = load(settings, cache_data=True)
        assert sorted(dataset.field2id_token["item_id"], key=len)[-1] == long
        assert dataset.field2id_token["item_id"].nbytes < 200
        assert dataset.id2token("item_id", dataset.token2id("item_id", [long])).tolist() == [long]
    assert (tmp_path / "data" / "ok" / "ok-LeanSequentialDataset.npz").stat().st_size < 3_100_000


def test_what_was_left_out_is_said_of_the_copy_too(settings, write, caplog, monkeypatch):
    write(NO_TIME)
    load(settings, cache_data=True)
    (first,) = caplog.messages
    monkeypatch.setattr(Dataset, "_load_data", None)
    load(settings, cache_data=True)
    assert caplog.messages == [first, first]
