"""Metrics of the chunked ranking against stock RecBole's, with equal weights, to the last printed digit; memory."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from recbole.data.interaction import Interaction
from recbole.evaluator import collector as recbole_collector
from recbole.evaluator import metrics as recbole_metrics

from recbole_cce.nn.history import History
from recbole_cce.nn.item_table import ItemTable, chunked_topk
from recbole_cce.training import evaluation
from recbole_cce.training.evaluation import auto_chunk_items
from tests.build import experiment
from tests.conftest import write_inter
from tests.data.test_dataset import SPLITS, ranked_rows
from tests.memory import LargestOutput

TOP_K = ["Recall", "MRR", "NDCG", "Hit", "Precision", "MAP"]
DIVERSITY = ["ItemCoverage", "AveragePopularity", "GiniIndex", "ShannonEntropy", "TailPercentage"]
RANKING = {"metrics": [*TOP_K, *DIVERSITY], "topk": [1, 5, 10, 20], "valid_metric": "MRR@10", "tail_ratio": 250}


class StockCollector(recbole_collector.Collector):
    """RecBole's, without its call of .cpu() on numbers and counters: its data is on the CPU here."""

    def get_data_struct(self):
        result = recbole_collector.DataStruct()
        result._data_dict = dict(self.data_struct._data_dict)
        for name in ("rec.topk", "rec.meanrank", "rec.items", "rec.score", "data.label"):
            self.data_struct._data_dict.pop(name, None)
        return result


@pytest.fixture(scope="module")
def ml100k(tmp_path_factory):
    """ml-100k with ranks as times, which RecBole's float32 tells apart; `part`: its first 150 users."""
    header, rows = ranked_rows()
    folder = tmp_path_factory.mktemp("data")
    write_inter(folder, "ranked", header, rows)
    write_inter(folder, "part", header, [row for row in rows if int(row[0]) <= 150])
    return {
        "data_path": str(folder),
        "load_col": {"inter": ["user_id", "item_id", "rating", "timestamp"]},
        "gpu_id": "",
        "state": "ERROR",
        "show_progress": False,
        "hidden_size": 32,
        "inner_size": 32,
        "positions": "start",  # as RecBole's SASRec, which takes the same weights
        "MAX_ITEM_LIST_LENGTH": 6,
        "learning_rate": 0.01,
        "train_batch_size": 512,
    }


@pytest.fixture(scope="module")
def weights(ml100k, tmp_path_factory):
    """State dicts that rank better than chance."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("run"))
        patch.setattr("sys.argv", ["test"])
        for dataset in ("ranked", "part"):
            run = experiment("SASRecCCE", ml100k, dataset)
            for epoch in range(2):
                run.trainer._train_epoch(run.train, epoch)
            found[dataset] = run.model.state_dict()
    return found


def prepared(model, settings, weights, dataset):
    """A run with those weights, ready to be evaluated; RecBole's SASRec with RecBole's collector."""
    run = experiment(model, {**settings, "loss_type": "CE"} if model == "SASRec" else settings, dataset)
    if model == "SASRec":
        run.trainer.eval_collector = StockCollector(run.config)
        classes = {name.lower(): cls for name, cls in vars(recbole_metrics).items()}
        computed = run.trainer.evaluator.metric_class
        computed.update({name: classes[name](run.config) for name in computed})
    run.model.load_state_dict(weights[dataset])
    run.trainer.eval_collector.data_collect(run.train)
    return run


def evaluate(run):
    """Metrics of the valid and of the test split, with the same NumPy random numbers each time."""
    np.random.seed(0)
    return [run.trainer.evaluate(split, load_best_model=False) for split in (run.valid, run.test)]


def both(settings, weights, dataset="part"):
    """RecBole's metrics, after a check that ours are the same."""
    stock, ours = (evaluate(prepared(model, settings, weights, dataset)) for model in ("SASRec", "SASRecCCE"))
    assert ours == stock
    return stock


def test_metrics_are_those_of_recbole(ml100k, weights):
    settings = {**ml100k, **RANKING}
    valid, test = stock = evaluate(prepared("SASRec", settings, weights, "ranked"))
    assert len(valid) == 4 * len(RANKING["metrics"])
    assert valid != test and valid["hit@10"] > 0.03 and 0 < valid["tailpercentage@10"] < 1
    ours = prepared("SASRecCCE", settings, weights, "ranked")
    for chunk in ("auto", 100, 841, 1683):
        ours.config["eval_chunk_items"] = chunk
        assert evaluate(ours) == stock, chunk


@pytest.mark.parametrize("metrics", [["GAUC"], ["GAUC", "NDCG", "ItemCoverage"]], ids=str)
def test_gauc_goes_through_all_scores(ml100k, weights, metrics):
    settings = {**ml100k, "metrics": metrics, "topk": [5], "valid_metric": "GAUC", "eval_chunk_items": 100}
    valid, _ = both(settings, weights)
    assert 0.5 < valid["gauc"] < 1


@pytest.mark.parametrize("split", ["ratio-by-user", "ratio-global-time"])
def test_users_with_several_held_out_items(ml100k, weights, split):
    settings = {**ml100k, **RANKING, **SPLITS[split], "eval_batch_size": 300, "eval_chunk_items": 100}
    both(settings, weights)


@pytest.mark.parametrize("mode", ["uni20", "pop10", {"valid": "uni20", "test": "full"}], ids=str)
@pytest.mark.parametrize("split", ["leave-one-out", "ratio-by-user"])
def test_sampled_evaluation(ml100k, weights, mode, split):
    """The same negatives from the same random numbers; in ratio splits a user's held-out items are ranked together."""
    args = {**SPLITS[split]["eval_args"], "mode": mode}
    # of more than there are different negatives, stock RecBole fills the lists with items that it did not rank
    settings = {"metrics": [*TOP_K, "ItemCoverage"], "topk": [1, 5], "valid_metric": "MRR@5", "eval_args": args}
    valid, test = both({**ml100k, **settings}, weights)
    assert valid["hit@5"] > 0.15  # among so few
    assert test["hit@5"] > 0.15 or isinstance(mode, dict)


@pytest.mark.parametrize("metrics", [["AUC", "LogLoss"], ["RMSE", "MAE"]], ids=str)
def test_labeled_evaluation(ml100k, weights, metrics):
    args = {"split": {"LS": "valid_and_test"}, "order": "TO", "mode": "labeled"}
    settings = {"metrics": metrics, "valid_metric": metrics[0], "threshold": {"rating": 4}, "eval_args": args}
    valid, _ = both({**ml100k, **settings}, weights)
    assert list(valid) == [metric.lower() for metric in metrics]


# Seen items


def naive_metrics(run, split):
    """Hit@10 and NDCG@10 from all scores, the histories read from the file again. A user has no item twice."""
    file = Path(run.config["data_path"]) / f"{run.config['dataset']}.inter"
    table = pd.read_csv(file, sep="\t", names=["user", "item", "rating", "time"], skiprows=1)
    table = table.sort_values("time", kind="stable")
    dataset, hits, gains = run.train.dataset, [], []
    for rows, *_ in split:
        scores = run.model.full_sort_predict(rows).view(len(rows), -1)
        for row in range(len(rows)):
            target, user = rows["item_id"][row].item(), dataset.id2token("user_id", rows["user_id"][row].item())
            items = dataset.token2id("item_id", table["item"][table["user"] == int(user)].astype(str).to_numpy())
            history = items[: items.tolist().index(target)].tolist()
            assert len(history) >= rows["item_length"][row]
            order = [item for item in scores[row].argsort(descending=True).tolist() if item not in {0, *history}]
            rank = order.index(target)
            hits.append(rank < 10)
            gains.append(1 / np.log2(rank + 2) if rank < 10 else 0)
    return {"hit@10": round(float(np.mean(hits)), 4), "ndcg@10": round(float(np.mean(gains)), 4)}


@pytest.mark.parametrize("chunk", ["auto", 100])
@pytest.mark.parametrize("split", ["leave-one-out", "ratio-global-time"])
def test_seen_items_are_ranked_last(ml100k, weights, split, chunk):
    """However long ago: lists of 6 items show a small part of what users had."""
    settings = {**ml100k, **SPLITS[split], "metrics": ["Hit", "NDCG"], "topk": [10], "valid_metric": "NDCG@10"}
    run = prepared("SASRecCCE", {**settings, "exclude_seen": True, "eval_chunk_items": chunk}, weights, "part")
    ours = evaluate(run)
    assert ours == [naive_metrics(run, loader) for loader in (run.valid, run.test)]
    shown = evaluate(prepared("SASRecCCE", settings, weights, "part"))
    assert ours[1]["hit@10"] > shown[1]["hit@10"]


def test_seen_items_and_scores_of_all(ml100k):
    settings = {**ml100k, "metrics": ["GAUC"], "valid_metric": "GAUC", "exclude_seen": True}
    with pytest.raises(ValueError, match="exclude_seen: True is not valid with metrics: GAUC"):
        experiment("SASRecCCE", settings, "part")


def of_lists(lists, counts, n_items, k, tail):
    """RecBole's metrics of the items of lists, by their definitions; `n_items` as RecBole counts them."""
    lists = [items[:k] for items in lists]
    times = Counter(item for items in lists for item in items)
    every = sorted([0] * (n_items - len(times)) + list(times.values()))
    total = sum(every)
    rare = {item for item, count in counts.items() if count <= tail}
    lists = [items for items in lists if items]
    return {
        "itemcoverage": len(times) / n_items,
        "averagepopularity": np.mean([np.mean([counts.get(item, 0) for item in items]) for items in lists]),
        "giniindex": sum((2 * i - n_items - 1) * count for i, count in enumerate(every, start=1)) / n_items / total,
        "shannonentropy": -sum(count / total * np.log(count / total) for count in times.values()) / len(times),
        "tailpercentage": np.mean([np.mean([item in rare for item in items]) for items in lists]),
    }


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        ("SASRecCCE", {"exclude_seen": True}),
        ("SASRecCCE", {"exclude_seen": True, "eval_chunk_items": 7}),
        ("SASRecCCE", {"eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "mode": "uni3"}}),
        ("SASRec", {"eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "mode": "uni3"}}),
    ],
    ids=str,
)
def test_no_metric_counts_items_that_were_not_recommended(tiny_config, tiny, monkeypatch, model, settings):
    """Nobody's list is as long as k; one user has had all items, so that nothing is left for the last interaction."""
    file = tiny / "tiny" / "tiny.inter"
    rows = [f"all\ti{item}\t{time}" for time, item in enumerate([*range(30), 7])]
    file.write_text(file.read_text() + "\n".join(rows) + "\n")
    settings = {**tiny_config, "metrics": ["Hit", *DIVERSITY], "topk": [3, 30], "valid_metric": "Hit@3", **settings}
    run = experiment(model, {**settings, "tail_ratio": 8})
    run.trainer.eval_collector.data_collect(run.train)
    run.model.eval()
    lists, hits = [], []
    if model == "SASRecCCE" and settings.get("exclude_seen"):
        with torch.no_grad():
            for rows, *_ in run.test:
                scores = run.model.full_sort_predict(rows).view(len(rows), -1)
                scores[:, 0] = -torch.inf
                history = run.test.dataset.history(rows)
                scores[history.row, history.item] = -torch.inf
                ranked = [row.argsort(descending=True)[: (row > -torch.inf).sum()].tolist() for row in scores]
                lists += ranked
                hits += [target in items for target, items in zip(rows["item_id"].tolist(), ranked, strict=True)]
        assert min(map(len, lists)) == 0
    else:
        rank = run.trainer._neg_sample_batch_eval

        def ranked(batch):
            result = rank(batch)
            for row in result[1]:
                lists.append(row.argsort(descending=True)[: (row > -torch.inf).sum()].tolist())
                hits.append(True)
            return result

        monkeypatch.setattr(run.trainer, "_neg_sample_batch_eval", ranked)
    found = run.trainer.evaluate(run.test, load_best_model=False)
    assert len(lists) == 41 and max(map(len, lists)) < 30
    assert found["hit@30"] == round(np.mean(hits), 4)
    counts = Counter(run.train.dataset.inter_feat["item_id"].tolist())
    for k in (3, 30):
        for name, value in of_lists(lists, counts, 31, k, 8).items():
            assert found[f"{name}@{k}"] == pytest.approx(value, abs=5.1e-5), (name, k)


# Top-k


@pytest.mark.parametrize("chunk", [1, 7, 101, 1000])
def test_topk_without_seen_items(chunk):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(20, 8, dtype=torch.double, generator=generator)
    weight = torch.randn(101, 8, dtype=torch.double, generator=generator)
    seen = torch.rand(20, 101, generator=generator) < 0.4
    seen[3], seen[4] = True, False
    scores = (hidden @ weight.T).masked_fill(seen, -torch.inf)
    scores[:, 0] = -torch.inf
    pairs = seen.nonzero(as_tuple=True)
    last = torch.full((len(pairs[0]),), -torch.inf, dtype=torch.double)
    top, items = chunked_topk(hidden, weight, 10, chunk, added=(*pairs, last))
    torch.testing.assert_close(top, scores.topk(10).values)
    unseen = torch.arange(20) != 3
    assert torch.equal(items[unseen], scores.topk(10).indices[unseen])
    nothing = torch.empty(0, dtype=torch.int64)
    added = (nothing, nothing, torch.empty(0, dtype=torch.double))
    assert torch.equal(
        chunked_topk(hidden, weight, 10, chunk, added=added)[1], chunked_topk(hidden, weight, 10, chunk)[1]
    )


@pytest.mark.parametrize("chunk", [1, 7, 50, 101, 102, 1000])
@pytest.mark.parametrize("padding_idx", [0, 60, 100])
def test_chunked_topk_is_topk(chunk, padding_idx):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(20, 8, dtype=torch.double, generator=generator)
    weight = torch.randn(101, 8, dtype=torch.double, generator=generator)
    weight[padding_idx] *= 100  # it would be first or last
    scores = hidden @ weight.T
    scores[:, padding_idx] = -torch.inf
    for k in (1, 10, 100):
        assert torch.equal(chunked_topk(hidden, weight, k, chunk, padding_idx)[1], scores.topk(k).indices)


@pytest.mark.parametrize("chunk", [1, 7, 100])
def test_ties(chunk):
    """Items are alike in fives: any of equal ones may be taken, but the scores are the best and no item comes twice."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randint(-3, 4, (20, 8), generator=generator).double()
    weight = torch.randint(-3, 4, (12, 8), generator=generator).double().repeat(5, 1)
    weight = torch.cat([torch.full((1, 8), 9.0, dtype=torch.double), weight])
    scores = hidden @ weight.T
    scores[:, 0] = -torch.inf
    top_scores, top = chunked_topk(hidden, weight, 17, chunk)
    assert torch.equal(top_scores, scores.gather(1, top))
    assert torch.equal(scores.gather(1, top), scores.topk(17).values)
    assert all(len(set(row)) == 17 and 0 not in row for row in top.tolist())
    assert sorted(chunked_topk(hidden[:1] * 0, weight, 60, chunk)[1][0].tolist()) == list(range(1, 61))


def test_topk_larger_than_the_catalogue(tiny_config):
    """Reported before training, not after its first epoch."""
    with pytest.raises(ValueError, match=r"topk: \[5, 31\] is not valid; it takes at most 30, the number of items"):
        experiment("SASRecCCE", {**tiny_config, "topk": [5, 31], "valid_metric": "Hit@5"})
    run = experiment("SASRecCCE", {**tiny_config, "topk": [5, 30], "valid_metric": "Hit@5"})
    result = run.trainer.evaluate(run.test, load_best_model=False)
    assert result["hit@30"] == 1 > result["hit@5"]
    experiment("SASRecCCE", {**tiny_config, "topk": [31], "metrics": ["GAUC"], "valid_metric": "GAUC"})


# Memory


@pytest.mark.parametrize("chunk", [40, "auto"])
def test_no_score_matrix(tmp_path, tiny_config, monkeypatch, chunk):
    """600 users and 1,800 items: their scores are 1,080,000 numbers, all else is smaller than 40 items' scores."""
    rows = [(f"u{user}", f"i{3 * user + step}", step) for user in range(600) for step in range(3)]
    write_inter(tmp_path / "data", "wide", "user_id:token\titem_id:token\ttimestamp:float", rows)
    limit = 600 * 40
    monkeypatch.setattr(evaluation, "SCORE_ELEMENTS", limit)
    assert auto_chunk_items(600) == 40
    settings = {"MAX_ITEM_LIST_LENGTH": 2, "hidden_size": 4, "inner_size": 8, "n_heads": 1, "eval_chunk_items": chunk}
    run = experiment("SASRecCCE", {**tiny_config, **RANKING, **settings}, "wide")
    run.trainer.eval_collector.data_collect(run.train)
    assert len(run.test) == 1 and run.model.n_items == 1801
    with LargestOutput() as largest:
        run.trainer.evaluate(run.test, load_best_model=False)
    assert largest.numel <= limit


@pytest.mark.parametrize("users", [1, 7, 1000])
def test_users_are_encoded_some_at_a_time(ml100k, weights, monkeypatch, users):
    settings = {**ml100k, **RANKING}
    expected = evaluate(prepared("SASRecCCE", settings, weights, "part"))
    monkeypatch.setattr(evaluation, "SCORE_ELEMENTS", users * 6 * 4 * 32)
    run = prepared("SASRecCCE", settings, weights, "part")
    sizes, forward = [], run.model.forward
    monkeypatch.setattr(
        run.model, "forward", lambda items, lengths: sizes.append(len(items)) or forward(items, lengths)
    )
    assert evaluate(run) == expected
    assert max(sizes) == min(users, 150) and sum(sizes) == len(run.valid._dataset) + len(run.test._dataset)


@pytest.mark.cuda
def test_many_users_and_items_need_four_gib(tiny_config):
    """4,096 users of 200 items each, 1.6 million items, 128 columns; beyond the model and the users' lists."""
    settings = {"hidden_size": 128, "inner_size": 512, "MAX_ITEM_LIST_LENGTH": 200, "use_gpu": True, "gpu_id": "0"}
    run = experiment("SASRecCCE", {**tiny_config, **settings})
    model = run.model.eval()
    model.item_embedding = ItemTable(1_600_001, 128, padding_idx=0, device="cuda")
    lists = torch.randint(1, 1_600_001, (4096, 200))
    rows = Interaction({"item_id_list": lists, "item_length": torch.full((4096,), 200)})
    row = torch.arange(4096).repeat_interleave(200)
    history = History(row, lists.flatten(), torch.ones_like(row))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.no_grad():
        scores, items = evaluation.top_items(model, rows, 100, "auto", history, exclude_seen=True)
        beyond = torch.cuda.max_memory_allocated() - before
        assert beyond <= 4 * 2**30, beyond
        hidden = model.forward(rows["item_id_list"][:8].cuda(), rows["item_length"][:8].cuda())
        every = (hidden @ model.item_embedding.weight.T).index_fill(1, torch.tensor([0], device="cuda"), -torch.inf)
        every.scatter_(1, lists[:8].cuda(), -torch.inf)
    torch.testing.assert_close(scores[:8], every.topk(100).values)
    assert scores.shape == items.shape == (4096, 100)
