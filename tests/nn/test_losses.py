"""The loss modules against their formulas in fp64, by hand; precision, seeds, statistics."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from recbole_cce.distributed.reductions import epoch_of
from recbole_cce.nn.losses.loss_sum import LossSum
from recbole_cce.nn.losses.registry import LOSSES
from recbole_cce.ops import negatives
from recbole_cce.ops.reference import scalable_cross_entropy as scalable
from tests.ops import naive

V, D, N, K = 40, 12, 300, 16
COUNTS = torch.arange(V) % 9
DEFAULTS = {
    "loss_backend": "auto",
    "loss_dtype": "auto",
    "num_negatives": K,
    "negative_sharing": "tile",
    "negative_distribution": "uniform",
    "negative_alpha": 1.0,
    "logq_correction": True,
    "n_buckets": "auto",
    "bucket_size_x": "auto",
    "bucket_size_y": "auto",
    "mix_x": False,
    "gbce_t": 0.75,
}


def make(loss_type, **settings):
    return LOSSES[loss_type]({**DEFAULTS, **settings}, COUNTS)


def problem(dtype=torch.double):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, D, generator=generator, dtype=dtype, requires_grad=True)
    weight = torch.randn(V + 1, D, generator=generator, dtype=dtype, requires_grad=True)
    target = torch.randint(0, V + 1, (N,), generator=generator)
    assert (target == 0).any()
    return hidden, target, weight


def drawn_by(seed, sharing, popularity, alpha=1.0):
    """[N, K] the rows that the positions draw after torch.manual_seed(seed)."""
    torch.manual_seed(seed)
    sampler = negatives.Popularity(COUNTS, alpha) if popularity else negatives.Uniform()
    groups = {"none": N, "tile": math.ceil(N / 128), "batch": 1}[sharing]
    seed = negatives.new_seed(torch.device("cpu"))
    drawn = negatives.draw_negatives(sampler, seed, torch.arange(groups), K, V + 1, 0)
    return drawn[torch.arange(N) % groups]


def log_q(drawn, popularity, alpha=1.0):
    q = COUNTS.double().clamp(min=1) ** alpha if popularity else torch.ones(V, dtype=torch.double)
    return (q / q.sum()).log().float()[drawn - 1]  # a loss keeps log q in fp32


def assert_equals(module, truth):
    """Loss and both gradients of a module after torch.manual_seed(7) equal those of the mean of `truth`, [N] losses."""
    results = []
    for function in (lambda *inputs: module(*inputs).mean, lambda h, t, w: truth(h, t, w)[t != 0].mean()):
        hidden, target, weight = problem()
        torch.manual_seed(7)
        loss = function(hidden, target, weight)
        loss.backward()
        results.append((loss.detach(), hidden.grad, weight.grad))
    for mine, exact in zip(*results, strict=True):
        torch.testing.assert_close(mine, exact, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("loss_type", ["CE", "CCE"])
def test_full(loss_type):
    assert_equals(make(loss_type), lambda h, t, w: naive.linear(h, w, t))


@pytest.mark.parametrize("loss_type", ["CCE-", "CE-"])
@pytest.mark.parametrize("sharing", ["none", "tile", "batch"])
@pytest.mark.parametrize("popularity", [False, True], ids=["uniform", "popularity"])
@pytest.mark.parametrize("correct", [True, False], ids=["corrected", "plain"])
def test_sampled(loss_type, sharing, popularity, correct):
    drawn = drawn_by(7, sharing, popularity, alpha=0.5)
    correction = log_q(drawn, popularity, alpha=0.5) + math.log(K) if correct else torch.zeros(())
    module = make(
        loss_type,
        negative_sharing=sharing,
        negative_distribution="popularity" if popularity else "uniform",
        negative_alpha=0.5,
        logq_correction=correct,
    )
    assert_equals(module, lambda h, t, w: naive.sampled(h, w, t, drawn, correction))


@pytest.mark.parametrize("sharing", ["none", "tile", "batch"])
@pytest.mark.parametrize("loss_type", ["BCE", "gBCE"])
def test_binary(loss_type, sharing):
    drawn = drawn_by(7, sharing, False)
    alpha = K / (V - 1)
    beta = alpha * (0.6 * (1 - 1 / alpha) + 1 / alpha) if loss_type == "gBCE" else 1.0
    module = make(loss_type, negative_sharing=sharing, gbce_t=0.6)
    assert_equals(module, lambda h, t, w: naive.sampled_binary(h, w, t, drawn, beta))


def test_binary_draws_by_popularity():
    drawn = drawn_by(7, "tile", True, alpha=2.0)
    module = make("BCE", negative_distribution="popularity", negative_alpha=2.0)
    assert_equals(module, lambda h, t, w: naive.sampled_binary(h, w, t, drawn, 1.0))


@pytest.mark.parametrize("mix_x", [False, True])
@pytest.mark.parametrize("sizes", [("auto", "auto", "auto"), (5, 20, 11)], ids=str)
def test_scalable(mix_x, sizes):
    settings = dict(zip(("n_buckets", "bucket_size_x", "bucket_size_y"), sizes, strict=True))
    hidden, target, weight = problem()
    rows = target.nonzero().squeeze(1)
    if sizes[0] == "auto":
        auto = int(2 * math.sqrt(N))
        sizes = (auto, auto, V)  # 256, and the catalogue has fewer
    torch.manual_seed(7)
    positions, items = scalable.select_buckets(hidden, weight, target, *sizes, mix_x, 0, None)
    loss, covered = naive.scalable(hidden, weight, target, positions, items)
    loss[covered].mean().backward()
    truth = loss[covered].mean().detach(), hidden.grad, weight.grad
    hidden, target, weight = problem()
    module = make("SCE", mix_x=mix_x, **settings)
    torch.manual_seed(7)
    loss = module(hidden, target, weight)
    loss.mean.backward()
    for mine, exact in zip((loss.mean.detach(), hidden.grad, weight.grad), truth, strict=True):
        torch.testing.assert_close(mine, exact, rtol=1e-9, atol=1e-12)
    assert loss.count == covered.sum()
    assert loss.statistics == {"coverage": (covered.sum(), len(rows))}


def test_coverage_is_that_of_all_batches_of_an_epoch():
    """Five and then all of 19 positions; one more is ignored."""
    hidden, target = torch.randn(20, D), torch.cat([torch.zeros(1, dtype=torch.int64), torch.arange(1, 20)])
    weight = torch.randn(V + 1, D)
    steps = [make("SCE", n_buckets=1, bucket_size_x=size)(hidden, target, weight) for size in (5, 20)]
    means, statistics = epoch_of(steps, several=False)
    assert statistics == {"coverage": (5 + 19) / (19 + 19)}
    assert means.tolist() == pytest.approx([step.mean.item() for step in steps])


@pytest.mark.parametrize("loss_type", LOSSES)
def test_all_positions_count_equally(loss_type):
    """The mean over the rows with a target; ignored rows are as if they were not there."""
    hidden, target, weight = problem()
    valid = target != 0
    # alike in both: one draw for all, or buckets that hold everything
    settings = {"negative_sharing": "batch", "n_buckets": 1, "bucket_size_x": N, "bucket_size_y": V}
    losses = []
    for rows in (slice(None), valid):
        torch.manual_seed(0)
        losses.append(make(loss_type, **settings)(hidden[rows], target[rows], weight).mean)
    torch.testing.assert_close(*losses)
    torch.manual_seed(0)
    nothing = make(loss_type, **settings)(hidden[~valid], target[~valid], weight)
    assert nothing.mean == nothing.count == 0


@pytest.mark.parametrize("loss_type", ["CCE-", "CE-", "SCE", "BCE", "gBCE"])
def test_random_numbers_follow_torch(loss_type):
    module = make(loss_type)
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append(module(*problem()).mean.item())
    assert losses[0] == losses[1] != losses[2]
    assert module(*problem()).mean != module(*problem()).mean


@pytest.mark.parametrize("loss_type", LOSSES)
@pytest.mark.parametrize("where", ["hidden", "weight"])
def test_nan_stays_nan(loss_type, where):
    hidden, target, weight = (tensor.detach() for tensor in problem(torch.float32))
    (hidden if where == "hidden" else weight)[:] = math.nan
    assert make(loss_type)(hidden, target, weight).mean.isnan()


# Precision

HALVES = ["bfloat16", "float16"]


def value(loss_type, hidden, target, weight, **settings):
    torch.manual_seed(0)
    return make(loss_type, **settings)(hidden, target, weight).mean


@pytest.mark.parametrize("loss_type", LOSSES)
@pytest.mark.parametrize("ambient", [None, *HALVES])
@pytest.mark.parametrize("dtype", HALVES)
def test_loss_dtype_rounds_the_inputs(loss_type, ambient, dtype):
    """Whatever autocast is around it. Of CE and CE- it rounds the logits too, as torch's products do."""
    settings = {"n_buckets": 1, "bucket_size_x": N, "bucket_size_y": V}  # rounding must not choose other buckets
    hidden, target, weight = problem(torch.float32)
    half = getattr(torch, dtype)
    exact = value(loss_type, hidden, target, weight, **settings)
    rounded = value(loss_type, hidden.to(half).float(), target, weight.to(half).float(), **settings)
    with torch.autocast("cpu", dtype=getattr(torch, ambient or "float16"), enabled=ambient is not None):
        loss = value(loss_type, hidden, target, weight, loss_dtype=dtype, **settings)
    assert loss.dtype == torch.float32
    assert abs(rounded - exact) > 1e-7
    if loss_type in ("CE", "CE-"):
        torch.testing.assert_close(loss, rounded, rtol=4 * torch.finfo(half).eps, atol=0)
        assert loss != exact
    else:
        torch.testing.assert_close(loss, rounded, rtol=1e-6, atol=0)


@pytest.mark.parametrize("loss_type", LOSSES)
def test_loss_dtype_float32_is_exact_under_autocast(loss_type):
    hidden, target, weight = problem(torch.float32)
    exact = value(loss_type, hidden, target, weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = value(loss_type, hidden, target, weight, loss_dtype="float32")
        auto = value(loss_type, hidden, target, weight)
    assert loss == exact != auto
    # hidden states in 16 bits, the item table in 32: the latter is not rounded
    mixed = value(loss_type, hidden.bfloat16(), target, weight, loss_dtype="float32")
    torch.testing.assert_close(mixed, value(loss_type, hidden.bfloat16().float(), target, weight))


def test_ce_is_torch_cross_entropy():
    """With the padding item's logit at minus infinity."""
    hidden, target, weight = problem()
    logits = (hidden @ weight.T).index_fill(1, torch.tensor([0]), -math.inf)
    exact = F.cross_entropy(logits[target != 0], target[target != 0])
    torch.testing.assert_close(make("CE")(hidden, target, weight).mean, exact)


@pytest.mark.parametrize("loss_type", ["CCE", "CCE-", "SCE", "BCE", "gBCE"])
def test_loss_backend_reaches_the_op(loss_type):
    with pytest.raises(RuntimeError, match="backend: 'triton' cannot run"):
        make(loss_type, loss_backend="triton")(*problem())


@pytest.mark.parametrize("loss_type", LOSSES)
def test_ignored_rows_hold_anything(loss_type):
    """NaN in the hidden states of ignored rows and in the padding row changes neither the loss nor a gradient."""

    def gradients(filled):
        hidden, target, weight = problem()
        if filled is not None:
            with torch.no_grad():
                hidden[target == 0], weight[0] = filled, filled
        torch.manual_seed(3)
        loss = make(loss_type)(hidden, target, weight).mean
        return loss, *torch.autograd.grad(loss, (hidden, weight))

    expected = gradients(None)
    assert expected[0].isfinite()
    for filled in (torch.nan, torch.inf):
        for found, right in zip(gradients(filled), expected, strict=True):
            torch.testing.assert_close(found, right, rtol=0, atol=0)


# Sums


@pytest.mark.parametrize("loss_type", ["CE", "CCE", "CE-", "CCE-", "BCE", "gBCE"])
def test_sums_of_parts_are_the_sum_of_all(loss_type):
    """7 and 1 targets: each part over the number of both has the gradients of both in one batch."""
    settings = {"negative_sharing": "batch", "num_negatives": K}
    hidden, target, weight = problem()
    target = torch.where(target == 0, 1, target)[:8]
    one = slice(7), slice(7, 8)

    def gradients(parts):
        table = weight.detach().requires_grad_()
        states = hidden.detach()[:8].requires_grad_()
        total = torch.tensor(8)
        for part in parts:
            torch.manual_seed(0)  # one draw of negatives for all
            make(loss_type, **settings)(states[part], target[part], table).over(total).backward()
        return states.grad, table.grad

    for mine, exact in zip(gradients(one), gradients([slice(8)]), strict=True):
        torch.testing.assert_close(mine, exact, rtol=1e-9, atol=1e-12)


def test_a_sum_over_its_own_count_is_its_mean():
    """To the last bit, whatever the count: 1 / 49 * 49 is not 1 in fp32."""
    for count in range(1, 200):
        loss = LossSum(torch.rand(()), torch.tensor(count))
        assert loss.over(loss.count) == loss.mean
    assert LossSum(torch.tensor(0.0), torch.tensor(0)).over(torch.tensor(0)) == 0


def test_total_of_sums():
    parts = [
        LossSum(torch.tensor(2.0, requires_grad=True), torch.tensor(7), {"share": (torch.tensor(1), torch.tensor(7))}),
        LossSum(torch.tensor(4.0), torch.tensor(1), {"share": (torch.tensor(1), torch.tensor(1))}),
    ]
    total = LossSum.total(parts)
    assert (total.mean, total.count, total.sum) == (18 / 8, 8, 18)
    assert total.statistics == {"share": (2, 8)}
    assert not total.mean.requires_grad
