"""The four ops against their formulas in fp64: values, gradients, dtypes, reductions, edges, memory, bad input."""

from __future__ import annotations

import contextlib
import math

import pytest
import torch

from recbole_cce import ops
from recbole_cce.ops import backend, reference
from recbole_cce.ops.reference import scalable_cross_entropy as scalable_reference
from tests.memory import LargestOutput
from tests.ops import naive
from tests.ops.problems import SEED, Sampling, check, deterministic_algorithms, problem

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [0.05, 1.5], ids=["flat", "peaked"])
@pytest.mark.parametrize("padding_idx", [0, 5, None])
def test_linear(dtype, scale, padding_idx):
    hidden, weight, target = problem(scale=scale, dtype=dtype, padding_idx=padding_idx)
    check(
        lambda h, w: ops.linear_cross_entropy(h, w, target, padding_idx=padding_idx, reduction="none"),
        lambda h, w: naive.linear(h, w, target, padding_idx),
        hidden,
        weight,
        target,
        padding_idx,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sharing", ["none", "tile", "batch"])
@pytest.mark.parametrize("popularity", [False, True], ids=["uniform", "popularity"])
@pytest.mark.parametrize("correct", [True, False], ids=["corrected", "plain"])
def test_sampled(dtype, sharing, popularity, correct):
    hidden, weight, target = problem(n=300, dtype=dtype)
    way = Sampling(300, weight, sharing=sharing, popularity=popularity, correct=correct)
    check(
        lambda h, w: ops.sampled_cross_entropy(h, w, target, logq_correction=correct, reduction="none", **way.kwargs),
        lambda h, w: naive.sampled(h, w, target, way.drawn, way.correction.to(h.dtype)),
        hidden,
        weight,
        target,
    )


@pytest.mark.parametrize("v", [1, 2, 3], ids=lambda v: f"V={v}")
@pytest.mark.parametrize("padding_idx", [0, 1, None])
def test_sampled_with_forced_collisions(v, padding_idx):
    hidden, weight, target = problem(n=41, v=v, padding_idx=padding_idx)
    way = Sampling(41, weight, k=64, sharing="none", padding_idx=padding_idx)
    assert (way.drawn == target[:, None]).any()
    assert padding_idx is None or (way.drawn != padding_idx).all()
    check(
        lambda h, w: ops.sampled_cross_entropy(h, w, target, reduction="none", **way.kwargs),
        lambda h, w: naive.sampled(h, w, target, way.drawn, way.correction.to(h.dtype)),
        hidden,
        weight,
        target,
        padding_idx,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sharing", ["none", "tile", "batch"])
@pytest.mark.parametrize("beta", [1.0, 0.3])
def test_sampled_binary(dtype, sharing, beta):
    hidden, weight, target = problem(n=150, dtype=dtype)
    way = Sampling(150, weight, sharing=sharing)
    check(
        lambda h, w: ops.sampled_binary_cross_entropy(
            h, w, target, positive_weight=beta, reduction="none", **way.kwargs
        ),
        lambda h, w: naive.sampled_binary(h, w, target, way.drawn, beta),
        hidden,
        weight,
        target,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mix_x", [False, True])
def test_scalable(dtype, mix_x):
    hidden, weight, target = problem(n=60, dtype=dtype)
    sizes = {"n_buckets": 6, "bucket_size_x": 15, "bucket_size_y": 11, "mix_x": mix_x}
    positions, items = scalable_reference.select_buckets(
        hidden, weight, target, 6, 15, 11, mix_x, 0, torch.Generator().manual_seed(4)
    )
    covered = torch.zeros(60, dtype=torch.bool)
    covered[positions.unique()] = True
    assert (target[covered] != 0).all()
    check(
        lambda h, w: ops.scalable_cross_entropy(
            h, w, target, reduction="none", generator=torch.Generator().manual_seed(4), **sizes
        ),
        lambda h, w: naive.scalable(h, w, target, positions, items)[0],
        hidden,
        weight,
        target,
    )
    _, reported = ops.scalable_cross_entropy(
        hidden, weight, target, generator=torch.Generator().manual_seed(4), return_coverage=True, **sizes
    )
    assert torch.equal(reported, covered)


def test_scalable_selects_the_nearest():
    hidden, weight, target = problem(n=50, v=40, ignored=0)
    generator = torch.Generator().manual_seed(1)
    positions, items = scalable_reference.select_buckets(hidden, weight, target, 5, 7, 6, False, 0, generator)
    directions = torch.randn(5, 12, generator=torch.Generator().manual_seed(1))
    for b, direction in enumerate(directions):
        assert set(positions[b].tolist()) == set((hidden @ direction).argsort()[-7:].tolist())
        by_score = (weight @ direction).argsort(descending=True).tolist()
        by_score.remove(0)
        assert set(items[b].tolist()) == set(by_score[:6])


def test_mixed_directions_are_combinations_of_hidden_states():
    hidden = torch.zeros(30, 12)
    hidden[:, :4] = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
    hidden[20:] = torch.nan  # of positions that are ignored
    target = torch.arange(30) < 20
    generator = torch.Generator().manual_seed(0)
    directions = scalable_reference.random_directions(hidden, hidden, target.long(), 8, True, 0, generator)
    assert (directions[:, 4:] == 0).all() and (directions[:, :4] != 0).any()


def test_of_equal_losses_the_lowest_bucket_wins():
    """Buckets 1 and 2 hold the same position and items: were both to carry gradient, it would double."""
    hidden, weight, target = problem(n=4, v=9, ignored=0)
    positions = torch.tensor([[0, 1], [2, 3], [2, 3]])
    items = torch.tensor([[1, 2, 3], [4, 5, 6], [4, 5, 6]])
    check(
        lambda h, w: scalable_reference.bucket_cross_entropy(h, w, target, positions, items)[0],
        lambda h, w: naive.scalable(h, w, target, positions, items)[0],
        hidden,
        weight,
        target,
    )


# Shared behaviour


def call(name, hidden, weight, target, **kwargs):
    options = {
        "linear": {},
        "sampled": {"num_negatives": 5, "seed": SEED},
        "sampled_binary": {"num_negatives": 5, "seed": SEED},
        "scalable": {"n_buckets": 4, "bucket_size_x": 9, "bucket_size_y": 6},
    }[name]
    if name == "scalable":
        kwargs.setdefault("generator", torch.Generator().manual_seed(2))
    return getattr(ops, f"{name}_cross_entropy")(hidden, weight, target, **{**options, **kwargs})


OPS = ["linear", "sampled", "sampled_binary", "scalable"]


@pytest.mark.parametrize("op", OPS)
def test_gradcheck(op):
    hidden, weight, target = problem(n=11, v=9, d=4, dtype=torch.float64)
    hidden.requires_grad_(), weight.requires_grad_()
    for reduction in ("mean", "sum", "none"):
        assert torch.autograd.gradcheck(lambda h, w: call(op, h, w, target, reduction=reduction), (hidden, weight))  # noqa: B023


@pytest.mark.parametrize("op", OPS)
def test_reductions(op):
    hidden, weight, target = problem()
    rows = call(op, hidden, weight, target, reduction="none")
    counted = target != 0
    if op == "scalable":
        counted = call(op, hidden, weight, target, return_coverage=True)[1]
    assert rows.shape == (37,) and (rows[~counted] == 0).all() and (rows[counted] > 0).all()
    torch.testing.assert_close(call(op, hidden, weight, target, reduction="sum"), rows.sum())
    torch.testing.assert_close(call(op, hidden, weight, target), rows[counted].mean())


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("n", [0, 1, 5])
def test_no_counted_row(op, n):
    hidden, weight, target = problem(n=n)
    hidden.requires_grad_(), weight.requires_grad_()
    loss = call(op, hidden, weight, torch.zeros_like(target))
    loss.backward()
    assert loss.item() == 0 and (hidden.grad == 0).all() and (weight.grad == 0).all()
    assert call(op, hidden, weight, target, reduction="none").shape == (n,)


@pytest.mark.parametrize("op", OPS)
def test_ignored_rows_change_nothing(op):
    hidden, weight, target = problem(ignored=0)
    target[::3] = 0
    changed = hidden.clone()
    changed[::3] = 1e3
    # buckets hold every row that counts, so that their order does not matter
    kwargs = {"bucket_size_x": 37, "bucket_size_y": 53} if op == "scalable" else {}
    assert call(op, hidden, weight, target, **kwargs) == call(op, changed, weight, target, **kwargs)


def check_ignored(
    op, dtype=torch.float32, padding_idx=0, backend="auto", device="cpu", reduction="none", both=False, **kwargs
):
    """Whatever an ignored row, the padding row and the upstream gradients of ignored rows hold: the same to the bit."""
    hidden, weight, target = problem(n=40, v=20, dtype=dtype, padding_idx=padding_idx, device=device)
    target[0] = padding_idx
    if op == "scalable":  # empty slots, which hold no position
        kwargs = {"bucket_size_x": 40, **kwargs}

    def results(value, needed):
        h, w = hidden.clone(), weight.clone()
        upstream = torch.linspace(0.5, 1, 40, device=device)
        h[target == padding_idx] = w[padding_idx] = upstream[target == padding_idx] = value
        h.requires_grad_("input" in needed), w.requires_grad_("weight" in needed)
        options = {"padding_idx": padding_idx, "backend": backend, "reduction": reduction, **kwargs}
        if op == "scalable":
            options["generator"] = torch.Generator(device).manual_seed(2)
        loss = call(op, h, w, target, **options)
        loss.backward(upstream.to(loss.dtype) if reduction == "none" else None)
        return [tensor for tensor in (loss.detach(), h.grad, w.grad) if tensor is not None]

    for needed in (("input", "weight"),) if both else (("input",), ("weight",), ("input", "weight")):
        expected = results(0.5, needed)
        for one, two in zip(results(math.nan, needed), expected, strict=True):
            assert torch.equal(one, two)


IGNORING = [  # op, options that take another way through it
    ("linear", {}),
    *((op, {"sharing": sharing}) for op in ("sampled", "sampled_binary") for sharing in ("tile", "none", "batch")),
    ("sampled", {"num_negatives": 200}),
    ("scalable", {}),
    ("scalable", {"mix_x": True}),
]


@pytest.mark.parametrize(("op", "kwargs"), IGNORING)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_ignored_may_be_no_number(op, kwargs, dtype):
    for reduction in ("mean", "none"):
        check_ignored(op, dtype, padding_idx=5 if dtype == torch.float32 else 0, reduction=reduction, **kwargs)


def check_derivatives(op, backend="auto"):
    """Others than the first in reverse mode are refused, not taken for zero."""
    hidden, weight, target = problem()
    hidden.requires_grad_()
    loss = call(op, hidden, weight, target, backend=backend)
    with pytest.raises(RuntimeError, match="create_graph: True is not valid"):
        torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises((RuntimeError, NotImplementedError), match="forward"), torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(hidden.detach(), torch.ones_like(hidden))
        call(op, dual, weight, target, backend=backend)


@pytest.mark.parametrize("op", OPS)
def test_derivatives_that_it_has_not_are_refused(op):
    check_derivatives(op)


@pytest.mark.parametrize("op", OPS)
def test_strides_do_not_matter(op):
    hidden, weight, target = problem()
    wide_hidden, wide_weight = torch.zeros(37, 24), torch.zeros(12, 54)
    wide_hidden[:, ::2], wide_weight[:] = hidden, weight.T
    assert call(op, wide_hidden[:, ::2], wide_weight.T, target) == call(op, hidden, weight, target)


@pytest.mark.parametrize("op", OPS)
def test_only_the_gradients_asked_for(op):
    hidden, weight, target = problem()
    weight.requires_grad_()
    call(op, hidden, weight, target).backward()
    assert weight.grad is not None and hidden.grad is None


@pytest.mark.parametrize("op", OPS)
def test_autocast_rounds_inputs_and_keeps_gradients_in_fp32(op):
    hidden, weight, target = problem()
    rounded = [tensor.bfloat16().float() for tensor in (hidden, weight)]
    options = {"bucket_size_x": 37, "bucket_size_y": 53, "n_buckets": 1} if op == "scalable" else {}
    expected = call(op, *[tensor.requires_grad_() for tensor in rounded], target, **options)
    expected.backward()
    hidden.requires_grad_(), weight.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = call(op, hidden, weight, target, **options)
    loss.backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(hidden.grad, rounded[0].grad)
    torch.testing.assert_close(weight.grad, rounded[1].grad)


@pytest.mark.parametrize("op", OPS)
def test_mixed_dtypes(op):
    hidden, weight, target = problem()
    hidden = hidden.bfloat16().requires_grad_()
    weight.requires_grad_()
    loss = call(op, hidden, weight, target)
    loss.backward()
    assert (loss.dtype, hidden.grad.dtype, weight.grad.dtype) == (torch.float32, torch.bfloat16, torch.float32)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("sharing", ["none", "tile", "batch"])
def test_chunks_bound_memory_and_change_nothing(op, sharing, monkeypatch):
    n, v, d = 512, 3000, 8
    hidden, weight, target = problem(n=n, v=v, d=d)
    options = {"num_negatives": 700, "sharing": sharing} if op.startswith("sampled") else {}
    if op == "scalable":
        options = {"n_buckets": 40, "bucket_size_x": 60, "bucket_size_y": 90}

    def loss_and_gradients():
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        loss = call(op, h, w, target, **options)
        loss.backward()
        return loss, h.grad, w.grad

    whole = loss_and_gradients()
    # twice the largest of what is allowed to be whole: [V+1, D]
    monkeypatch.setattr(reference, "CHUNK_ELEMENTS", 2 * (v + 1) * d)
    with LargestOutput() as largest:
        chunked = loss_and_gradients()
    assert largest.numel <= reference.CHUNK_ELEMENTS
    for one, two in zip(whole, chunked, strict=True):
        torch.testing.assert_close(one, two)


def test_default_seed_follows_torch():
    hidden, weight, target = problem()
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append(ops.sampled_cross_entropy(hidden, weight, target, num_negatives=5).item())
    assert losses[0] == losses[1] != losses[2]


def test_seed_tensor_equals_integer():
    hidden, weight, target = problem()
    one = ops.sampled_cross_entropy(hidden, weight, target, num_negatives=5, seed=SEED)
    two = ops.sampled_cross_entropy(hidden, weight, target, num_negatives=5, seed=torch.tensor(SEED))
    assert one == two


def test_gbce_beta():
    """t = 0 is plain BCE, t = 1 weighs by the sampling rate (Petrov & Macdonald 2023)."""
    assert ops.sampled_binary_cross_entropy.__module__
    from recbole_cce.ops.sampled_binary_cross_entropy import gbce_beta

    assert gbce_beta(10, 101, 0) == pytest.approx(1)
    assert gbce_beta(10, 101, 1) == pytest.approx(0.1)
    assert gbce_beta(10, 101, 0.75) == pytest.approx(0.1 * (0.75 * (1 - 10) + 10))
    assert gbce_beta(500, 101, 0.75) == pytest.approx(1)


# Bad input


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h, w, t: (h[0], w, t), r"input: has shape \(12,\)"),
        (lambda h, w, t: (h, w[0], t), r"weight: has shape \(12,\)"),
        (lambda h, w, t: (h, w[:, 1:], t), r"weight: has 11 columns, input has 12"),
        (lambda h, w, t: (h, w, t[1:]), r"target: has 36 entries, input has 37 rows"),
        (lambda h, w, t: (h, w, t.int()), r"target: has dtype torch.int32, it takes torch.int64"),
        (lambda h, w, t: (h.long(), w, t), r"input: has dtype torch.int64"),
        (lambda h, w, t: (h, w.to("meta"), t), r"on different devices: cpu, meta, cpu"),
        (lambda h, w, t: (h, w, t + 100), r"target: has ids from 100 to .*, weight has rows 0 to 53"),
        (lambda h, w, t: (h, w, t - 1), r"target: has ids from -1"),
        (lambda h, w, t: (h, w[:1], t * 0), r"weight: has 1 row\(s\) with padding_idx 0"),
    ],
)
def test_wrong_inputs(op, change, message):
    with pytest.raises(ValueError, match=message):
        call(op, *change(*problem()))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"reduction": "average"}, "reduction: 'average' is not valid; it takes one of mean, sum, none"),
        ({"backend": "cuda"}, "backend: 'cuda' is not valid; it takes one of auto, triton, torch"),
        ({"padding_idx": 99}, "padding_idx: 99 is no row of weight, which has 54"),
    ],
)
def test_wrong_options(op, kwargs, message):
    with pytest.raises(ValueError, match=message):
        call(op, *problem(), **kwargs)


@pytest.mark.parametrize("op", ["sampled", "sampled_binary"])
@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_negatives": 0}, "num_negatives: 0 is not valid; it takes an integer >= 1"),
        ({"num_negatives": 2.5}, "num_negatives: 2.5"),
        ({"sharing": "user"}, "sharing: 'user' is not valid; it takes one of tile, none, batch"),
        ({"sampler": "uniform"}, "sampler: 'uniform'"),
        ({"sampler": ops.Popularity(torch.ones(7))}, "sampler: has counts of 7 items, weight has 53"),
        ({"seed": 1.5}, "seed: 1.5"),
        ({"seed": torch.zeros(2)}, r"seed: a tensor of shape \(2,\)"),
    ],
)
def test_wrong_sampling(op, kwargs, message):
    with pytest.raises(ValueError, match=message):
        call(op, *problem(), **kwargs)


@pytest.mark.parametrize("name", ["n_buckets", "bucket_size_x", "bucket_size_y"])
def test_wrong_bucket_sizes(name):
    with pytest.raises(ValueError, match=f"{name}: 0 is not valid; it takes an integer >= 1"):
        call("scalable", *problem(), **{name: 0})


def test_buckets_larger_than_memory():
    with pytest.raises(ValueError, match="n_buckets: 1000000000 buckets of 9 positions and 6 items are too many"):
        call("scalable", *problem(), n_buckets=10**9)


def test_wrong_positive_weight():
    """A tensor's gradient would be lost."""
    for weight in (-1.0, math.inf, math.nan, torch.tensor(1.0, requires_grad=True)):
        with pytest.raises(ValueError, match="positive_weight: "):
            call("sampled_binary", *problem(), positive_weight=weight)


def check_kernels_ignore(*args, **kwargs):
    """To the bit, for which sums must have an order."""
    with deterministic_algorithms():
        check_ignored(*args, backend="triton", **kwargs)


@pytest.mark.parametrize(
    ("op", "dtype", "padding_idx", "kwargs"),
    [
        ("linear", torch.float32, 0, {}),
        ("linear", torch.float32, 0, {"reduction": "mean"}),
        ("sampled", torch.float16, 2, {"sharing": "tile"}),
        ("sampled", torch.float32, 4, {"sharing": "none"}),
        ("sampled_binary", torch.float16, 4, {"sharing": "none"}),
        ("scalable", torch.float32, 4, {}),
    ],
)
def test_kernels_ignore_the_same_in_the_interpreter(interpreter, op, dtype, padding_idx, kwargs):
    interpreter(check_kernels_ignore, op, dtype, padding_idx, both=True, **kwargs)


@pytest.mark.parametrize("op", OPS)
def test_kernels_refuse_the_same_in_the_interpreter(interpreter, op):
    interpreter(check_derivatives, op, "triton")


@pytest.mark.cuda
@pytest.mark.parametrize(("op", "kwargs"), IGNORING)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("padding_idx", [0, 5])
def test_kernels_ignore_the_same(padding_idx, dtype, op, kwargs):
    check_kernels_ignore(op, dtype, padding_idx, device="cuda", **kwargs)


def test_kernels_are_launched_on_the_device_of_their_inputs(monkeypatch):
    """Each of them where that device is the current one, which nothing else makes it."""
    jit = pytest.importorskip("triton").runtime.jit
    monkeypatch.setattr(backend, "choose", lambda *_: "triton")
    entered, launched = [], []

    @contextlib.contextmanager
    def device_of(tensor):
        entered.append(tensor.device)
        yield
        entered.pop()

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(jit.JITFunction, "run", lambda kernel, **_: launched.append((kernel.fn.__name__, entered[-1:])))
    for op in OPS:
        for sharing in ("tile", "none") if "sampled" in op else ("",):
            hidden, weight, target = problem()
            hidden.requires_grad_(), weight.requires_grad_()
            call(op, hidden, weight, target, **({"sharing": sharing} if sharing else {})).backward()
    parts = [torch.zeros(5, 2, 8, requires_grad=True) for _ in range(3)]
    spans = torch.tensor([[0, 5]] * 5, dtype=torch.int32)
    ops.packed_attention(*parts, spans).sum().backward()
    assert len({name for name, _ in launched}) >= 18
    assert all(device == [torch.device("cpu")] for _, device in launched)


@pytest.mark.cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("op", OPS)
def test_kernels_run_where_their_inputs_are(op):
    """On another GPU than the current one."""
    results = []
    for device in ("cuda:0", "cuda:1"):
        hidden, weight, target = problem(device=device)
        hidden.requires_grad_(), weight.requires_grad_()
        generator = {"generator": torch.Generator(device).manual_seed(2)} if op == "scalable" else {}
        every = {"bucket_size_x": 37, "bucket_size_y": 53} if op == "scalable" else {}
        loss = call(op, hidden, weight, target, backend="triton", **generator, **every)
        loss.backward()
        results.append([tensor.cpu() for tensor in (loss.detach(), hidden.grad, weight.grad)])
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two)
    assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("op", OPS)
def test_triton_says_why_it_cannot(op):
    with pytest.raises(RuntimeError, match=rf"backend: 'triton' cannot run {op}_cross_entropy: "):
        call(op, *problem(), backend="triton")


def test_fallback_is_logged_once(caplog):
    from recbole_cce.ops import backend

    backend.log_fallback.cache_clear()
    with caplog.at_level("INFO", logger=backend.__name__):
        for _ in range(3):
            call("linear", *problem())
    assert len([line for line in caplog.messages if "plain torch" in line]) == 1


def test_buckets_larger_than_the_data():
    hidden, weight, target = problem(n=6, v=3)
    loss = ops.scalable_cross_entropy(
        hidden, weight, target, n_buckets=2, bucket_size_x=10_000, bucket_size_y=10_000, reduction="none"
    )
    # every position against the whole catalogue
    torch.testing.assert_close(loss, torch.where(target != 0, naive.linear(hidden, weight, target), 0))
