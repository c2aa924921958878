"""SASRecCCE and SASRecSCE against RecBole's SASRec: parameters, scores, loss and gradients; bad weights."""

from __future__ import annotations

import copy
import pickle
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from recbole.data.interaction import Interaction
from recbole.model.sequential_recommender.sasrec import SASRec
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

from recbole_cce.models import sasrec
from recbole_cce.models.sasrec import SASRecCCE, SASRecSCE, fingerprint
from recbole_cce.nn import item_table
from recbole_cce.nn.batch import Batch, Counts, states_at
from recbole_cce.nn.losses.registry import LOSSES
from recbole_cce.nn.losses.sampled import CCEMinus
from recbole_cce.nn.losses.scalable import SCE
from tests.build import configure, experiment
from tests.nn.test_transformer import ATTENTION

MODELS = {"SASRecCCE": SASRecCCE, "SASRecSCE": SASRecSCE}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attn_dropout_prob": 0.0}


@pytest.fixture
def dataset(tiny_config):
    return experiment("SASRecCCE", tiny_config).train.dataset


@pytest.fixture
def pair(tiny_config, dataset):
    """RecBole's SASRec, and ours with its state dict; weights large enough that scores differ."""

    def make(model="SASRecCCE", dtype=torch.float32, **settings):
        settings = {**tiny_config, **settings}
        stock = SASRec(configure("SASRec", {**settings, "loss_type": "CE"}), dataset)
        for parameter in stock.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        ours = MODELS[model](configure(model, settings), dataset)
        ours.load_state_dict(stock.state_dict())
        return stock.to(dtype), ours.to(dtype)

    return make


def batch(n_items, length):
    """Random rows of every number of items from 1 to `length`, with a held-out item each."""
    generator = torch.Generator().manual_seed(3)
    lengths = torch.cat([torch.arange(1, length + 1), torch.tensor([length, 1])])
    items = torch.randint(1, n_items, (len(lengths), length), generator=generator)
    items[torch.arange(length) >= lengths[:, None]] = 0
    last = torch.randint(1, n_items, (len(lengths),), generator=generator)
    return Interaction({"item_id_list": items, "item_length": lengths, "item_id": last, "target_count": lengths})


@pytest.mark.parametrize("model", MODELS)
def test_state_dicts_go_both_ways(pair, model):
    stock, ours = pair(model)
    assert list(stock.state_dict()) == list(ours.state_dict())
    torch.nn.init.normal_(ours.item_embedding.weight)
    stock.load_state_dict(ours.state_dict())
    for name, value in stock.state_dict().items():
        assert torch.equal(value, ours.state_dict()[name]), name


@pytest.mark.parametrize("loss_type", LOSSES)
def test_no_loss_adds_to_the_state_dict(pair, loss_type):
    stock, ours = pair(loss_type=loss_type, negative_distribution="popularity")
    assert list(stock.state_dict()) == list(ours.state_dict())


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("length", [1, 6, 50])
def test_scores_are_those_of_recbole(pair, model, attention, length):
    stock, ours = pair(model, attention=attention, MAX_ITEM_LIST_LENGTH=length)
    stock.eval(), ours.eval()
    rows = batch(stock.n_items, length)
    with torch.no_grad():
        scores = stock.full_sort_predict(rows)
        assert scores.std() > 0.3
        torch.testing.assert_close(ours.full_sort_predict(rows), scores, rtol=0, atol=1e-5)
        torch.testing.assert_close(ours.predict(rows), stock.predict(rows), rtol=0, atol=1e-5)


@pytest.mark.parametrize("attention", ATTENTION)
def test_positions_from_the_end(pair, attention):
    """RecBole's model has the same scores for a row of n items with the vectors of its first n positions reversed."""
    stock, ours = pair(attention=attention, positions="end", MAX_ITEM_LIST_LENGTH=6)
    stock.eval(), ours.eval()
    rows = batch(stock.n_items, 6)
    own = stock.position_embedding.weight.detach().clone()
    with torch.no_grad():
        scores = ours.full_sort_predict(rows)
        for row, length in enumerate(rows["item_length"].tolist()):
            stock.position_embedding.weight[:length] = own[:length].flip(0)
            expected = stock.full_sort_predict(rows[row : row + 1])
            torch.testing.assert_close(scores[row : row + 1], expected, rtol=0, atol=1e-5)
            stock.position_embedding.weight.copy_(own)


def original_sasrec(model, items, dropout):
    """Hidden states [L, D] of the authors' model for one row without padding, with what `dropout` does to a tensor."""
    heads, weights = model.n_heads, model.state_dict()

    def linear(name, states):
        return states @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(name, states):
        centred = states - states.mean(-1, keepdim=True)
        scaled = centred / (centred.pow(2).mean(-1, keepdim=True) + model.layer_norm_eps).sqrt()
        return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    length, width = len(items), weights["item_embedding.weight"].size(1)
    states = weights["item_embedding.weight"][items] * width**0.5 + weights["position_embedding.weight"][:length]
    states, name = dropout(states), "LayerNorm"
    for number in range(model.n_layers):
        block = f"trm_encoder.layer.{number}"
        query = norm(name, states)
        memory = (linear(f"{block}.multi_head_attention.{kind}", states) for kind in ("key", "value"))
        parts = (linear(f"{block}.multi_head_attention.query", query), *memory)
        query_of, key, value = (part.view(length, heads, -1).transpose(0, 1) for part in parts)
        logits = query_of @ key.transpose(1, 2) / (width // heads) ** 0.5
        hidden = logits.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf).softmax(-1) @ value
        hidden = linear(f"{block}.multi_head_attention.dense", hidden.transpose(0, 1).reshape(length, width))
        hidden = norm(f"{block}.multi_head_attention.LayerNorm", query + hidden)
        inner = dropout(linear(f"{block}.feed_forward.dense_1", hidden)).relu()
        states = hidden + dropout(linear(f"{block}.feed_forward.dense_2", inner))
        name = f"{block}.feed_forward.LayerNorm"
    return norm(name, states)


class Threefold(torch.nn.Module):
    """In the place of a dropout, to see where it is."""

    def forward(self, states):
        return 3 * states


@pytest.mark.parametrize("attention", ["auto", "sdpa", "packed"])
@pytest.mark.parametrize("factor", [1, 3])
def test_original_architecture(pair, attention, factor):
    """Hidden states of every position, with each of the places of dropout, and their gradients."""
    settings = {"architecture": "original", "attention": attention, "hidden_act": "relu", **NO_DROPOUT}
    _, ours = pair(dtype=torch.double, MAX_ITEM_LIST_LENGTH=6, **settings)
    if factor > 1:
        ours.dropout = Threefold()
        for layer in ours.trm_encoder.layer:
            layer.feed_forward.dropout = Threefold()
    rows = batch(ours.n_items, 6)
    items, lengths = rows["item_id_list"], rows["item_length"]
    hidden, where, _ = ours.hidden_states(items, lengths)
    expected = []
    for row, length in enumerate(lengths.tolist()):
        expected.append(original_sasrec(ours, items[row, :length], lambda states: factor * states))
        at = states_at(hidden, where, torch.full((length,), row), torch.arange(length))
        torch.testing.assert_close(at, expected[-1])
    (gradient,) = torch.autograd.grad(hidden.sum() * 0 + at.sin().sum(), ours.position_embedding.weight)
    step = 1e-6 * torch.randn_like(gradient)
    with torch.no_grad():
        ends = []
        for sign in (1, -1):
            ours.position_embedding.weight += sign * step
            ends.append(original_sasrec(ours, items[-1, : lengths[-1]], lambda states: factor * states).sin().sum())
            ours.position_embedding.weight -= sign * step
    torch.testing.assert_close((gradient * step).sum(), (ends[0] - ends[1]) / 2, rtol=1e-5, atol=0)


def test_original_architecture_begins_with_xavier_weights(tiny_config, dataset):
    made = SASRecCCE(configure("SASRecCCE", {**tiny_config, "architecture": "original"}), dataset)
    for name, parameter in made.named_parameters():
        if parameter.dim() > 1:
            bound = (6 / sum(parameter.shape)) ** 0.5
            assert 0.8 * bound < parameter.abs().max() <= bound, name
            assert parameter.std().item() == pytest.approx(bound / 3**0.5, rel=0.15), name
        else:
            assert (parameter == (1 if "LayerNorm.weight" in name else 0)).all(), name


@pytest.mark.parametrize(("model", "loss_type", "loss"), [("SASRecCCE", "CCE-", CCEMinus), ("SASRecSCE", "SCE", SCE)])
def test_default_losses(tiny_config, dataset, model, loss_type, loss):
    config = configure(model, tiny_config)
    made = MODELS[model](config, dataset)
    assert config["loss_type"] == made.loss_type == loss_type and type(made.loss) is loss
    assert config["train_targets"] == "all"


# Training: loss and gradients


def without_padding(stock, rows):
    """RecBole's CE loss over the real items: the logit of the padding row, its candidate 0, left out."""
    hidden = stock.forward(rows["item_id_list"], rows["item_length"])
    return F.cross_entropy(hidden @ stock.item_embedding.weight[1:].T, rows["item_id"] - 1)


def assert_equal_gradients(stock, ours, truth):
    """After backward of `truth` and of our loss."""
    truth.backward()
    for (name, theirs), mine in zip(stock.named_parameters(), ours.parameters(), strict=True):
        assert theirs.grad.abs().max() > 1e-6 or name.endswith("key.bias"), name  # softmax does not see that one
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("attention", ATTENTION)
def test_last_targets_with_ce_give_the_loss_of_recbole_without_its_padding_item(pair, attention):
    stock, ours = pair(dtype=torch.double, loss_type="CE", train_targets="last", attention=attention, **NO_DROPOUT)
    rows = batch(stock.n_items, 8)
    loss, truth = ours.calculate_loss(rows), without_padding(stock, rows)
    torch.testing.assert_close(loss, truth, rtol=1e-12, atol=0)
    loss.backward()
    assert_equal_gradients(stock, ours, truth)
    assert (ours.item_embedding.weight.grad[0] == 0).all()


def test_recbole_counts_the_padding_item_among_the_candidates(pair):
    """Its loss is larger than ours by log(1 + p), p the padding item's weight relative to all real items'."""
    stock, ours = pair(dtype=torch.double, loss_type="CE", train_targets="last", **NO_DROPOUT)
    rows = batch(stock.n_items, 8)
    scores = stock.full_sort_predict(rows)
    p = (scores[:, 0] - scores[:, 1:].logsumexp(1)).exp()
    assert p.mean() > 0.01
    torch.testing.assert_close(stock.calculate_loss(rows) - ours.calculate_loss(rows), p.log1p().mean())
    stock.calculate_loss(rows).backward()
    assert (stock.item_embedding.weight.grad[0] != 0).any()


@pytest.mark.parametrize("attention", ATTENTION)
def test_all_targets_give_the_mean_over_all_prefixes(pair, attention):
    """Every prefix of every row as a row of its own, through RecBole's SASRec."""
    stock, ours = pair(dtype=torch.double, loss_type="CE", attention=attention, **NO_DROPOUT)
    rows = batch(stock.n_items, 8)
    prefixes = {"item_id_list": [], "item_length": [], "item_id": []}
    for items, length, last in zip(*(rows[field].tolist() for field in prefixes), strict=True):
        items = [*items[:length], last]
        for stop in range(1, length + 1):
            prefixes["item_id_list"].append([*items[:stop], *[0] * (8 - stop)])
            prefixes["item_length"].append(stop)
            prefixes["item_id"].append(items[stop])
    truth = without_padding(stock, {field: torch.tensor(value) for field, value in prefixes.items()})
    loss = ours.calculate_loss(rows)
    torch.testing.assert_close(loss, truth, rtol=1e-12, atol=0)
    loss.backward()
    assert_equal_gradients(stock, ours, truth)


@pytest.mark.parametrize("left_over", [0, 3])
def test_next_items(left_over):
    items = torch.tensor([[5, 6, 7, 8], [5, 6, 0, 0], [9, 0, 0, 0], [0, 0, 0, 0], [5, 5, 5, 0]])
    lengths, last = torch.tensor([4, 2, 1, 0, 3]), torch.tensor([1, 2, 3, 0, 4])
    for count, expected in (
        ([4, 2, 1, 0, 3], [[6, 7, 8, 1], [6, 2, 0, 0], [3, 0, 0, 0], [0, 0, 0, 0], [5, 5, 4, 0]]),
        ([2, 1, 1, 0, 2], [[0, 0, 8, 1], [0, 2, 0, 0], [3, 0, 0, 0], [0, 0, 0, 0], [0, 5, 4, 0]]),
    ):
        expected = torch.tensor(expected)
        counts = Counts(int(lengths.sum()), sum(count) + left_over)
        row, position, target = Batch(items, lengths, last, torch.tensor(count), counts).targets()
        assert torch.equal(torch.stack([row, position])[:, : sum(count)], expected.nonzero().T)
        assert target.tolist() == [*expected[expected != 0].tolist(), *[0] * left_over]
        assert len(row) == len(position) == sum(count) + left_over
        assert position.min() >= 0 and position.max() < 4


@pytest.mark.parametrize("train_targets", ["all", "last"])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("loss_type", LOSSES)
def test_every_loss_trains_every_parameter(tiny_config, model, loss_type, train_targets):
    run = experiment(model, {**tiny_config, "loss_type": loss_type, "train_targets": train_targets})
    before = {name: parameter.detach().clone() for name, parameter in run.model.named_parameters()}
    losses = [run.trainer._train_epoch(run.train, epoch) for epoch in range(3)]
    assert all(0 < loss < 1000 for loss in losses) and losses[2] < losses[0]
    for name, parameter in run.model.named_parameters():
        assert parameter.grad is not None, name
        assert not torch.equal(parameter, before[name]), name
    changed = (run.model.item_embedding.weight != before["item_embedding.weight"]).any(1)
    assert not changed[0]
    assert changed[run.train.dataset.inter_feat["item_id"]].all()


def test_popularity_counts_the_targets_of_the_training_split(tiny_config):
    """Once each, whatever `train_targets` is; neither held-out interactions nor a user's first."""
    histories = {}
    for line in Path(tiny_config["data_path"], "tiny", "tiny.inter").read_text().splitlines()[1:]:
        user, item, time = line.split("\t")
        histories.setdefault(user, []).append((int(time), item))
    counts = Counter()
    for history in histories.values():
        targets = [item for _, item in sorted(history)][1:]
        counts.update(targets[: max(1, len(targets) - 2)])  # RecBole leaves every user one to train
    for train_targets in ("all", "last"):
        settings = {"train_targets": train_targets, "negative_distribution": "popularity", "negative_alpha": 0.5}
        run = experiment("SASRecCCE", {**tiny_config, **settings})
        tokens = run.train.dataset.field2id_token["item_id"][1:]
        q = torch.tensor([max(1, counts[token]) for token in tokens]).double().sqrt()
        log_q = run.model.loss.sampler.log_q(torch.arange(len(tokens)), len(tokens))
        torch.testing.assert_close(log_q.double().exp(), q / q.sum(), rtol=1e-6, atol=0)


def test_gradients_of_lookup_and_loss_are_one():
    """As nn.Embedding's and the table's own, added; the padding row's is the loss's alone."""
    items, factor = torch.tensor([[3, 0, 3], [1, 4, 0]]), torch.randn(2, 3, 5, dtype=torch.double)
    weight = torch.randn(6, 5, dtype=torch.double)
    gradients = []
    for lookup in (
        lambda leaf: (F.embedding(items, leaf, padding_idx=0), leaf),
        lambda leaf: item_table.Lookup.apply(leaf, items),
    ):
        for uses_table in (True, False):
            leaf = weight.clone().requires_grad_()
            rows, table = lookup(leaf)
            ((rows * factor).sum() + (table.exp().sum() if uses_table else 0)).backward()
            gradients.append(leaf.grad)
    for theirs, ours in zip(gradients[:2], gradients[2:], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    assert gradients[2][0].all() and not gradients[3][0].any()


# Compiled


COMPILERS = [
    "aot_eager",
    pytest.param("inductor", marks=pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")),
]


@pytest.mark.parametrize("backend", COMPILERS)
@pytest.mark.parametrize(
    ("attention", "architecture"), [("sdpa", "recbole"), ("packed", "recbole"), ("packed", "original")]
)
@pytest.mark.parametrize("train_targets", ["all", "last"])
def test_compiled_steps_are_equal_and_compiled_once(pair, monkeypatch, backend, attention, architecture, train_targets):
    """Loss and gradients of batches of other sizes, the smaller last one among them; one compilation for all."""
    compiler = CompileCounterWithBackend(backend)
    monkeypatch.setattr(sasrec, "compiled_encoded", lambda: torch.compile(sasrec.encoded, backend=compiler))
    torch._dynamo.reset()
    settings = {"attention": attention, "architecture": architecture, "train_targets": train_targets, **NO_DROPOUT}
    _, ours = pair(loss_type="CCE", **settings)
    names = list(ours.state_dict())
    whole = batch(ours.n_items, 8)
    for rows in (whole, whole[3:], whole[[0, 5]], whole[:6]):
        results = []
        for compiled in (False, True):
            ours.zero_grad()
            loss = ours.loss_sum(ours.batch(rows), packed=attention == "packed", compiled=compiled).mean
            loss.backward()
            results.append([loss.detach(), *(parameter.grad for parameter in ours.parameters())])
        for eager, compiled in zip(*results, strict=True):
            torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-6)
    assert compiler.frame_count == 1
    with torch.no_grad():  # evaluation is not compiled
        ours.eval().full_sort_predict(whole)
    assert compiler.frame_count == 1
    assert list(ours.state_dict()) == names
    assert list(copy.deepcopy(ours).state_dict()) == names == list(pickle.loads(pickle.dumps(ours)).state_dict())


# Bad input


def test_weights_of_another_catalogue_size(pair):
    stock, ours = pair()
    state = {**stock.state_dict(), "item_embedding.weight": torch.zeros(100, 16)}
    with pytest.raises(ValueError, match=r"table is 99 items x 16, this model's is 30 items x 16: .*other filters"):
        ours.load_state_dict(state)


def test_weights_of_another_hidden_size(pair):
    stock, _ = pair(hidden_size=8)
    _, ours = pair()
    with pytest.raises(ValueError, match=r"30 items x 8, this model's is 30 items x 16: .*another hidden_size"):
        ours.load_state_dict(stock.state_dict())


def test_weights_of_another_length(pair):
    stock, _ = pair(MAX_ITEM_LIST_LENGTH=5)
    _, ours = pair()
    with pytest.raises(ValueError, match="MAX_ITEM_LIST_LENGTH: 8 is not the checkpoint's, which is 5"):
        ours.load_state_dict(stock.state_dict())


def test_weights_of_another_catalogue_of_the_same_size(pair, dataset):
    _, ours = pair()
    tokens = dataset.field2id_token["item_id"]
    assert ours.other_parameter()["catalogue"] == fingerprint(tokens)
    ours.load_other_parameter(ours.other_parameter())
    ours.load_other_parameter({})  # weights of RecBole's SASRec bring none
    with pytest.raises(ValueError, match=r"another catalogue .*its rows stand for other items"):
        ours.load_other_parameter({"catalogue": fingerprint(tokens[::-1])})
