"""The counting baseline against counts in plain Python."""

from collections import Counter, defaultdict

import numpy as np
import pytest
import torch

from recbole_cce.commands import recommend
from recbole_cce.errors import UserError
from tests.build import experiment


@pytest.fixture
def run(tiny_config):
    return experiment("Cooccurrence", {**tiny_config, "MAX_ITEM_LIST_LENGTH": 12, "eval_batch_size": 7})


def naive_scores(run):
    """score(user's history) -> [V+1], from the interactions that are targets or come before them in training."""
    data = run.train.dataset
    uid, iid = data.flat["user_id"].tolist(), data.flat["item_id"].tolist()
    targets = set(data.inter_feat["target_row"].tolist())
    counts, often = defaultdict(float), Counter(iid[place] for place in targets)
    for place in targets:
        for distance in range(1, 21):
            before = place - distance
            if before >= 0 and uid[before] == uid[place]:
                counts[iid[before], iid[place]] += distance**-0.5

    def score(items):
        result = np.zeros(data.item_num)
        for age, item in enumerate(reversed(items[-20:])):
            for other in range(1, data.item_num):
                weight = counts.get((item, other), 0) / (max(often[item], 1) * max(often[other], 1)) ** 0.25
                result[other] += 0.7**age * weight
        return result

    return score


def test_scores_are_counts(run):
    score = naive_scores(run)
    rows = next(iter(run.valid))[0]
    scores = run.model.full_sort_predict(rows)
    for row, (items, length) in enumerate(zip(rows["item_id_list"], rows["item_length"], strict=True)):
        np.testing.assert_allclose(scores[row].numpy(), score(items[:length].tolist()), rtol=1e-5, atol=1e-6)


def test_metrics_count_ties_against_it(run):
    run.trainer.fit(run.train, run.valid, saved=False)
    result = run.trainer.evaluate(run.test, load_best_model=False)
    score, hits = naive_scores(run), []
    for rows, _, _, target in run.test:
        for items, length, item in zip(rows["item_id_list"], rows["item_length"], target.tolist(), strict=True):
            scores = score(items[:length].tolist())
            hits.append(sum(round(s - scores[item], 6) >= 0 for s in scores[1:]) <= 10)
    assert result["recall@10"] == pytest.approx(np.mean(hits), abs=1e-4)


def test_runs_as_any_model(tiny_config):
    run = experiment("Cooccurrence", {**tiny_config, "exclude_seen": True, "MAX_ITEM_LIST_LENGTH": 12})
    score, best = run.trainer.fit(run.train, run.valid)
    assert best and 0 <= score <= 1
    assert run.trainer.evaluate(run.test)["recall@10"] >= 0
    assert torch.equal(run.model.nothing, torch.zeros(1))


def test_nothing_to_recommend_by(tiny_config):
    run = experiment("Cooccurrence", {**tiny_config, "MAX_ITEM_LIST_LENGTH": 12})
    run.trainer.fit(run.train, run.valid)
    with pytest.raises(UserError, match="is one of Cooccurrence, which has no item vectors"):
        recommend.recommend(run.trainer.saved_model_file, "top.csv")
