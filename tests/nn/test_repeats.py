"""The term for items of the user's own history: its fit against a general optimizer, its way into every ranking."""

import math

import numpy as np
import pytest
import scipy.optimize
import torch
from torch import nn

from recbole_cce.nn import repeats
from recbole_cce.nn.history import History, UserHistories
from tests.build import experiment

AGES = (1, 2, 3, 4, 5, 9, 17, 33, 65, 129)


def group(age):
    """Which of AGES is the last that `age` reaches."""
    return sum(age >= first for first in AGES) - 1


class Table(nn.Module):
    """A model as fit() sees it."""

    def __init__(self, weight):
        super().__init__()
        self.item_embedding = nn.Embedding.from_pretrained(weight)


def problem(rows, items, returns, seed=0):
    """Vectors, a table, histories of up to 60 items, and targets drawn with `returns` [10] as the term."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(items + 1, 8, generator=generator, dtype=torch.float64)
    hidden = torch.randn(rows, 8, generator=generator, dtype=torch.float64)
    lengths = torch.randint(1, 60, (rows,), generator=generator)
    users = torch.arange(rows).repeat_interleave(lengths)
    had = torch.randint(1, items + 1, (len(users),), generator=generator)
    history = UserHistories(users, had).before(lengths.cumsum(0))
    scores = hidden @ weight.T
    scores[:, 0] = -torch.inf
    own = torch.full_like(scores, -1, dtype=torch.int64)
    own[history.row, history.item] = torch.tensor([group(age) for age in history.age.tolist()])
    with_term = scores + torch.where(own >= 0, torch.as_tensor(returns, dtype=torch.float64)[own], 0)
    target = torch.multinomial(with_term.softmax(1), 1, generator=generator)[:, 0]
    return Table(weight), hidden, target, history, scores.numpy(), own.numpy()


def test_fit_maximises_the_likelihood():
    """Against BFGS on the plain softmax over all items."""
    model, hidden, target, history, scores, own = problem(400, 30, np.linspace(-1, 1, 10))

    def loss(number):
        logits = scores + np.where(own >= 0, number[own], 0)
        log_sum = np.logaddexp.reduce(logits, axis=1)
        return -(logits[np.arange(400), target] - log_sum).sum() + repeats.PRIOR / 2 * (number**2).sum()

    best = scipy.optimize.minimize(loss, np.zeros(10), method="BFGS", options={"gtol": 1e-6})
    fitted = repeats.fit(model, hidden, target, history)
    assert loss(fitted.double().numpy()) <= best.fun + 1e-6
    np.testing.assert_allclose(fitted[:7], best.x[:7], atol=2e-3)  # no history has an age of the last three


def test_what_users_do_is_found_again():
    """Numbers that 40,000 targets were drawn with, within four standard errors of a share of them."""
    truth = np.array([2, 1, 0.5, 0, -0.5, -1, -2, 0, 0, 0])
    fitted = repeats.fit(*problem(40000, 50, truth)[:4]).numpy()
    np.testing.assert_allclose(fitted[:5], truth[:5], atol=0.1)
    np.testing.assert_allclose(fitted[5:7], truth[5:7], atol=0.2)


def test_nobody_returns():
    """Without a single return the factor is next to nothing, and finite."""
    fitted = repeats.fit(*problem(5000, 30, np.full(10, -math.inf))[:4])
    assert fitted.isfinite().all()
    assert (fitted[:6].exp() < 0.001).all()


def test_rows_that_are_all_own_items():
    """Shares that rounding makes larger than all there is, where nobody returns."""
    share = torch.zeros(50, 10, dtype=torch.float64)
    share[:, 0], share[:, 3] = 1 + 1e-6, 1e-5
    fitted = repeats.maximise(share, torch.zeros(10, dtype=torch.float64))
    assert fitted.isfinite().all() and fitted[0] < -5


def test_no_history_at_all():
    empty = torch.empty(0, dtype=torch.int64)
    model, hidden, target, *_ = problem(20, 10, np.zeros(10))
    assert (repeats.fit(model, hidden, target, History(empty, empty, empty)) == 0).all()


TERM = torch.tensor([3.0, -2, 1, -4, 2, -1, 5, 0, 0, 0])


def ranked(run, rows, exclude_seen=False):
    """Scores of all items for the rows of a batch, from the user's whole history in the flat table, in plain Python."""
    data = run.valid.dataset
    uid, iid = data.flat["user_id"].tolist(), data.flat["item_id"].tolist()
    hidden = run.model.forward(rows["item_id_list"], rows["item_length"])
    scores = hidden @ run.model.item_embedding.weight.T
    for row, end in enumerate(rows["target_row"].tolist()):
        first = uid.index(uid[end])
        for item, age in {iid[place]: end - place for place in range(first, end)}.items():
            scores[row, item] += -torch.inf if exclude_seen else TERM[group(age)]
    scores[:, 0] = -torch.inf
    return scores


@pytest.mark.parametrize("exclude_seen", [False, True])
@torch.no_grad()
def test_ranking_has_the_term(tiny_config, exclude_seen):
    run = experiment("SASRecCCE", {**tiny_config, "MAX_ITEM_LIST_LENGTH": 4, "exclude_seen": exclude_seen})
    run.model.eval()
    run.model.repeat_bias = TERM
    run.trainer.evaluated = run.valid.dataset
    batch = next(iter(run.valid))
    _, top, _, _ = run.trainer._full_sort_batch_eval(batch)
    expected = ranked(run, batch[0], exclude_seen)
    torch.testing.assert_close(expected.gather(1, top.items), expected.topk(top.items.size(1)).values)


@torch.no_grad()
def test_scores_have_the_term(tiny_config):
    """Of predict and full_sort_predict, for the items that a row lists: here all that a user had."""
    run = experiment("SASRecCCE", {**tiny_config, "MAX_ITEM_LIST_LENGTH": 12})
    run.model.eval()
    run.model.repeat_bias = TERM
    rows = next(iter(run.valid))[0]
    expected = ranked(run, rows)
    scores = run.model.full_sort_predict(rows)
    torch.testing.assert_close(scores[:, 1:], expected[:, 1:])
    for item in (1, 7, 20):
        rows.update(type(rows)({"item_id": torch.full((len(rows),), item)}))
        torch.testing.assert_close(run.model.predict(rows), expected[:, item])


def test_term_is_fitted_saved_and_loaded(tiny_config):
    run = experiment("SASRecCCE", {**tiny_config, "repeat_bias": "learned"})
    run.trainer.fit(run.train, run.valid)
    assert run.model.repeat_bias.abs().max() > 0
    state = torch.load(run.trainer.saved_model_file)
    again = experiment("SASRecCCE", {**tiny_config, "repeat_bias": "learned"})
    again.trainer.evaluate(again.test, model_file=run.trainer.saved_model_file)
    assert torch.equal(again.model.repeat_bias, state["other_parameter"]["repeat_bias"])


@pytest.mark.parametrize("metric", ["NDCG@10", "AveragePopularity@10"])
def test_auto_leaves_out_a_term_that_harms(tiny_config, monkeypatch, metric):
    """Users of `tiny` often return: the better of two validations counts, whichever way the metric is better."""
    smaller_is_better = metric.startswith("Average")
    scores = {}
    for kind in ("none", "learned", "auto"):
        for term in (torch.full((10,), -50.0), torch.full((10,), 2.0)):
            monkeypatch.setattr(repeats, "fit", lambda *_, term=term: term)
            settings = {"repeat_bias": kind, "epochs": 1, "metrics": [metric.split("@")[0]], "valid_metric": metric}
            run = experiment("SASRecCCE", {**tiny_config, **settings, "topk": [10]})
            score, _ = run.trainer.fit(run.train, run.valid, saved=False)
            scores[kind, float(term[0])] = score
            if kind == "auto":
                assert torch.equal(run.model.repeat_bias, term) == (score != scores["none", float(term[0])])
    best = min if smaller_is_better else max
    for term in (-50.0, 2.0):
        assert scores["none", term] != scores["learned", term]
        assert scores["auto", term] == best(scores["none", term], scores["learned", term])


def test_term_is_fitted_without_validation(tiny_config):
    run = experiment("SASRecCCE", tiny_config)
    run.trainer.fit(run.train)
    assert torch.load(run.trainer.saved_model_file)["other_parameter"]["repeat_bias"].abs().max() > 0


def test_none_leaves_scores_alone(tiny_config):
    run = experiment("SASRecCCE", {**tiny_config, "repeat_bias": "none"})
    run.trainer.fit(run.train, run.valid, saved=False)
    assert (run.model.repeat_bias == 0).all()
