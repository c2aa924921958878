"""Recommendations and item vectors against all scores of the model, with histories read from the data file again."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from recbole_cce import cli
from recbole_cce.commands import recommend
from recbole_cce.errors import UserError
from tests.build import experiment


@pytest.fixture
def trained(tiny_config):
    """A finished run on `tiny` and its checkpoint; lists of 4 items show a part of what most users had."""
    run = experiment("SASRecCCE", {**tiny_config, "MAX_ITEM_LIST_LENGTH": 4, "eval_batch_size": 7, "epochs": 3})
    run.trainer.fit(run.train, run.valid)
    return run, run.trainer.saved_model_file


def history(run, user):
    """External tokens of all items of a user, in order."""
    table = pd.read_csv(
        Path(run.config["data_path"]) / "tiny.inter", sep="\t", names=["user", "item", "time"], skiprows=1
    )
    return table[table["user"] == user].sort_values("time")["item"].tolist()


def scores(run, user):
    """Scores of all items after the last interaction of a user; item tokens -> score."""
    items = [run.train.dataset.token2id("item_id", token) for token in history(run, user)[-4:]]
    row = torch.tensor([items + [0] * (4 - len(items))])
    checkpoint = torch.load(run.trainer.saved_model_file)
    run.model.load_state_dict(checkpoint["state_dict"])
    run.model.eval()
    user_vector = run.model.forward(row, torch.tensor([len(items)]))
    table = (user_vector @ run.model.item_embedding.weight.T)[0].tolist()
    term = checkpoint["other_parameter"]["repeat_bias"].tolist()
    ages = {token: age for age, token in reversed(list(enumerate(reversed(history(run, user)), start=1)))}
    for token, age in ages.items():
        table[run.train.dataset.token2id("item_id", token)] += term[sum(age >= a for a in (2, 3, 4, 5, 9, 17))]
    return {run.train.dataset.id2token("item_id", item): table[item] for item in range(1, run.model.n_items)}


@pytest.mark.parametrize("exclude_seen", [False, True])
def test_recommendations_are_the_best_items(trained, exclude_seen):
    run, checkpoint = trained
    recommend.recommend(checkpoint, "top.csv", k=6, exclude_seen=exclude_seen)
    table = pd.read_csv("top.csv")
    assert list(table.columns) == ["user", "item", "rank", "score"]
    assert sorted(table["user"].unique()) == sorted(f"u{user}" for user in range(40))
    for user, rows in table.groupby("user"):
        expected = scores(run, user)
        if exclude_seen:
            expected = {item: score for item, score in expected.items() if item not in history(run, user)}
        best = sorted(expected.values(), reverse=True)[:6]
        assert rows["rank"].tolist() == [1, 2, 3, 4, 5, 6]
        np.testing.assert_allclose(rows["score"], best, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose([expected[item] for item in rows["item"]], best, rtol=1e-5, atol=1e-6)


def test_lists_end_where_no_item_is_left(trained):
    run, checkpoint = trained
    recommend.recommend(checkpoint, "top.csv", k=30, exclude_seen=True)
    lengths = pd.read_csv("top.csv").groupby("user").size()
    assert lengths.to_dict() == {user: 30 - len(set(history(run, user))) for user in lengths.index}


def test_some_users_in_their_order(trained):
    _, checkpoint = trained
    recommend.recommend(checkpoint, "all.csv", k=3)
    users = ["u7", "u31", "u0", "u7"]
    Path("users.txt").write_text("\n".join(users) + "\n")
    recommend.recommend(checkpoint, "some.csv", k=3, users="users.txt")
    whole, some = pd.read_csv("all.csv"), pd.read_csv("some.csv")
    assert some["user"].tolist() == [user for user in users for _ in range(3)]
    for place, user in enumerate(users):
        mine = some[3 * place : 3 * place + 3].reset_index(drop=True)
        pd.testing.assert_frame_equal(mine, whole[whole["user"] == user].reset_index(drop=True), check_exact=False)


def test_users_without_interactions_get_no_list(tiny, tiny_config, caplog):
    """Known from a file of users alone; before, their lists left out the items of the next user."""
    users = "\n".join(f"{name}\t1" for name in ["early", *(f"u{user}" for user in range(40)), "late"])
    (tiny / "tiny" / "tiny.user").write_text(f"user_id:token\tage:float\n{users}\n")
    columns = {**tiny_config["load_col"], "user": ["user_id", "age"]}
    run = experiment("SASRecCCE", {**tiny_config, "load_col": columns, "epochs": 1})
    run.trainer.fit(run.train, run.valid)
    for exclude_seen in (False, True):
        recommend.recommend(run.trainer.saved_model_file, "top.csv", k=3, exclude_seen=exclude_seen)
        assert sorted(pd.read_csv("top.csv")["user"].unique()) == sorted(f"u{user}" for user in range(40))
        assert caplog.messages[-1:] == ["2 of 42 users have no interaction: they get no list"]
        caplog.clear()
    Path("users.txt").write_text("early\nu7\n")
    recommend.recommend(run.trainer.saved_model_file, "top.csv", k=3, users="users.txt")
    assert pd.read_csv("top.csv")["user"].tolist() == ["u7"] * 3
    Path("users.txt").write_text("early\nlate\n")
    with pytest.raises(UserError, match="--users: none of the 2 users has an interaction in tiny"):
        recommend.recommend(run.trainer.saved_model_file, "none.csv", k=3, users="users.txt")
    with pytest.raises(ValueError, match="user 41 has no interaction"):
        run.train.dataset.latest(torch.tensor([3, 41]))


def test_parquet_holds_the_same(trained):
    pytest.importorskip("pyarrow", exc_type=ImportError)  # which it raises where NumPy is too old for it
    _, checkpoint = trained
    recommend.recommend(checkpoint, "top.csv", k=3)
    recommend.recommend(checkpoint, "top.parquet", k=3)
    parquet = pd.read_parquet("top.parquet")
    assert parquet.dtypes.astype(str)[["rank", "score"]].tolist() == ["int32", "float32"]
    pd.testing.assert_frame_equal(parquet, pd.read_csv("top.csv"), check_dtype=False, check_exact=False)


def test_item_vectors(trained):
    run, checkpoint = trained
    recommend.export(checkpoint, "items")
    vectors, tokens = np.load("items.npy"), pd.read_csv("items.tsv", sep="\t")
    assert vectors.dtype == np.float32 and tokens["row"].tolist() == list(range(len(vectors)))
    assert sorted(tokens["item"]) == sorted({f"i{item}" for item in range(30)} & set(tokens["item"]))
    expected = scores(run, "u3")
    items = [run.train.dataset.token2id("item_id", token) for token in history(run, "u3")[-4:]]
    row = torch.tensor([items + [0] * (4 - len(items))])
    user_vector = run.model.forward(row, torch.tensor([len(items)]))[0].detach().numpy()
    new = ~tokens["item"].isin(history(run, "u3"))  # the others have the term for repeats besides
    expected = [expected[token] for token in tokens["item"][new]]
    np.testing.assert_allclose((vectors @ user_vector)[new], expected, rtol=1e-4)


def test_nothing_is_left_of_an_interrupted_file(trained, monkeypatch):
    _, checkpoint = trained
    Path("top.csv").write_text("before")
    calls = []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    original = recommend.top_items
    monkeypatch.setattr(recommend, "top_items", interrupted)
    with pytest.raises(KeyboardInterrupt):
        recommend.recommend(checkpoint, "top.csv", k=3)
    assert Path("top.csv").read_text() == "before"
    assert not [file for file in Path().iterdir() if file.name.startswith(".top")]


def command(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["run_recbole_cce.py", *flags])
    cli.main()


def test_commands(trained, monkeypatch):
    _, checkpoint = trained
    command(monkeypatch, "recommend", f"--checkpoint={checkpoint}", "--k=2", "--exclude-seen", "--output=top.csv")
    assert len(pd.read_csv("top.csv")) == 80
    command(monkeypatch, "export", f"--checkpoint={checkpoint}", "--output=items")
    assert Path("items.npy").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--k=31"], "--k: 31 is not valid; it takes 1 to 30, the number of items"),
        (["--k=0"], "--k: 0 is not valid"),
        (["--k=many"], "argument --k: invalid int value: 'many'"),
        (["--output=top.txt"], "--output: 'top.txt' is not valid; it takes a file that ends in .csv or .parquet"),
        (["--users=nobody.txt"], "--users: there is no file 'nobody.txt'"),
        (["--users=users.txt"], "--users: 2 of the 3 users of 'users.txt' are not in tiny as the .* the first is 'x'"),
        (["--checkpoint=no.pth"], "--checkpoint: there is no file 'no.pth'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes(trained, monkeypatch, capsys, flags, message):
    _, checkpoint = trained
    Path("users.txt").write_text("u1\nx\n[PAD]\n")
    with pytest.raises(SystemExit) as raised:
        command(monkeypatch, "recommend", f"--checkpoint={checkpoint}", "--output=top.csv", "--k=3", *flags)
    assert raised.value.code == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert not Path("top.csv").exists()


def test_a_model_of_recbole(tiny_config, tiny, monkeypatch):
    run = experiment("SASRec", {**tiny_config, "loss_type": "CE", "epochs": 1, "learning_rate": 0.01})
    run.trainer.fit(run.train, run.valid)
    with pytest.raises(ValueError, match="is one of SASRec; it takes one of SASRecCCE, SASRecSCE"):
        recommend.export(run.trainer.saved_model_file, "items")
