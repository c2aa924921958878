"""The Triton kernels of CCE: the formula within its error, every way they are used.

On a GPU all combinations run. Without one, a few run in Triton's interpreter, and the kernels are compiled.
"""

from __future__ import annotations

import contextlib
import math
from unittest import mock

import pytest
import torch

from recbole_cce import ops
from tests.ops import naive
from tests.ops.problems import check, problem
from tests.ops.test_sampled_kernels import DTYPES, assert_close, needs_gpu


def in_splits(number):
    """The catalogue and the positions are split into so many parts; None: into as many as would be."""
    if number is None:
        return contextlib.nullcontext()
    from recbole_cce.ops.triton import linear_cross_entropy as kernels

    return mock.patch.object(kernels, "num_splits", lambda *_: number)


def check_kernels(
    n=300, v=53, d=12, dtype=torch.float32, padding_idx=0, uniform=False, slack=1e-6, splits=None, **kwargs
):
    """backend="triton" against the formula, at the error budget of the formula in the same dtype.

    `uniform`: all positions have the same upstream gradient, which the kernel for the table takes another way.
    """
    hidden, weight, target = problem(n, v, d, dtype=dtype, padding_idx=padding_idx, **kwargs)

    def same_gradient(loss):
        return loss.sum().expand(n) if uniform else loss

    with in_splits(splits):
        check(
            lambda h, w: same_gradient(
                ops.linear_cross_entropy(h, w, target, padding_idx=padding_idx, reduction="none", backend="triton")
            ),
            lambda h, w: same_gradient(
                torch.where(target != padding_idx, naive.linear(h, w, target, padding_idx), 0)
                if padding_idx is not None
                else naive.linear(h, w, target, padding_idx)
            ),
            hidden,
            weight,
            target,
            padding_idx,
            slack,
        )


def call(hidden, weight, target, **kwargs):
    return ops.linear_cross_entropy(hidden, weight, target, **{"backend": "triton", **kwargs})


def gradients(*args, **kwargs):
    hidden, weight, target = args
    hidden, weight = hidden.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()
    loss = call(hidden, weight, target, **kwargs)
    loss.sum().backward()
    return loss.detach(), hidden.grad, weight.grad


# Without a GPU


CASES = {
    "fp32": {"n": 150, "v": 200},
    "fp32, uniform": {"n": 150, "v": 200, "uniform": True},
    "fp16": {"n": 150, "v": 200, "dtype": torch.float16},
    "fp16, uniform": {"n": 150, "v": 200, "dtype": torch.float16, "uniform": True},
    "padding in the middle": {"n": 70, "v": 40, "d": 20, "padding_idx": 5},
    "no padding": {"n": 40, "v": 300, "padding_idx": None},
    "logits exceed the targets' by more than 2^64": {"n": 40, "v": 300, "scale": 8.0},
    "fp16, peaked": {"n": 40, "v": 300, "scale": 5.0, "dtype": torch.float16},
    "three items": {"n": 300, "v": 3, "dtype": torch.float16},
    "one item": {"n": 20, "v": 1},
    "one position": {"n": 1, "v": 7, "ignored": 0},
    # of logits of hundreds, fp32 rounds off as much as the sums that they are do
    "logits of hundreds": {"n": 96, "v": 300, "d": 64, "scale": 2.0, "slack": 0},
    # the gradient of 16 bits is rounded once
    "rounded once": {"n": 517, "v": 700, "d": 8, "dtype": torch.float16, "scale": 0.03, "uniform": True, "slack": 0},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("splits", [1, 3])
def test_kernels_in_the_interpreter(interpreter, splits, case):
    interpreter(check_kernels, splits=splits, **CASES[case])


def test_autocast_in_the_interpreter(interpreter):
    interpreter(check_autocast)


def check_autocast():
    """Copies that are rounded leave no bytes for sorted hidden states: they are gathered."""
    hidden, weight, target = problem(n=150, v=200)
    with in_splits(1), torch.autocast("cpu", dtype=torch.float16):
        autocast = gradients(hidden, weight, target)
    assert [tensor.dtype for tensor in autocast] == [torch.float32] * 3
    rounded = gradients(hidden.half().float(), weight.half().float(), target)
    assert_close(autocast[:1], rounded[:1])
    assert_close(autocast, rounded, tolerance=1e-3)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_ignored_rows_in_the_interpreter(interpreter, dtype, splits):
    interpreter(check_ignored, dtype, splits)


def check_ignored(dtype, splits):
    """Ignored rows are never read, a counted one is."""
    hidden, weight, target = problem(n=150, v=200, dtype=dtype)
    with in_splits(splits):
        expected = gradients(hidden, weight, target)
        hidden[target == 0] = torch.nan
        for one, two in zip(gradients(hidden, weight, target), expected, strict=True):
            assert torch.equal(one, two)
        hidden[(target != 0).nonzero()[7]] = torch.nan
        assert call(hidden, weight, target).isnan()
        assert call(hidden, weight, target, reduction="none").isnan().sum() == 1


def test_a_certain_target_in_the_interpreter(interpreter):
    interpreter(check_certain)


def check_certain():
    """The loss keeps its digits where the target has almost all of the probability."""
    hidden, weight = torch.eye(4), torch.zeros(5, 4)
    weight[1, 0] = 20.0
    loss = call(hidden[:1], weight, torch.tensor([1]))
    truth = torch.log1p(3 * torch.exp(torch.tensor(-20.0, dtype=torch.double)))
    assert abs(loss.double() / truth - 1) < 1e-5


def test_uses_in_the_interpreter(interpreter):
    interpreter(check_uses)


def check_uses():
    """No position, none that counts, strides, a second backward pass, one gradient alone."""
    hidden, weight, target = problem(n=30)
    loss, grad_hidden, grad_weight = gradients(hidden[:0], weight, target[:0])
    assert loss == 0 and grad_hidden.shape == (0, 12) and (grad_weight == 0).all()
    loss, grad_hidden, grad_weight = gradients(hidden, weight, torch.zeros_like(target))
    assert loss == 0 and (grad_hidden == 0).all() and (grad_weight == 0).all()
    wide = torch.zeros(30, 24)
    wide[:, ::2] = hidden
    strided = wide[:, ::2], weight.T.contiguous().T, target.repeat_interleave(2)[::2]
    for one, two in zip(gradients(*strided), gradients(hidden, weight, target), strict=True):
        assert torch.equal(one, two)

    hidden.requires_grad_(), weight.requires_grad_()
    loss = call(hidden, weight, target)
    loss.backward(retain_graph=True)
    once = hidden.grad.clone(), weight.grad.clone()
    loss.backward()
    assert_close((hidden.grad / 2, weight.grad / 2), once)
    assert_close([torch.autograd.grad(call(hidden, weight.detach(), target), hidden)[0]], once[:1])
    assert_close([torch.autograd.grad(call(hidden.detach(), weight, target), weight)[0]], once[1:])


@pytest.mark.parametrize("uniform", [True, False], ids=["uniform", "weighed"])
def test_fp16_does_not_underflow_in_the_interpreter(interpreter, uniform):
    interpreter(check_underflow, uniform)


def check_underflow(uniform):
    """fp16 holds no number below 2^-24: probabilities times an upstream gradient of 1e-6 are in larger units."""
    hidden, weight, target = problem(n=150, v=300, scale=0.2, ignored=0)
    factor = torch.tensor(1e-6).expand(150) if uniform else 1e-6 * torch.linspace(0.5, 1, 150)
    results = []
    for dtype in (torch.float32, torch.float16):
        w = weight.clone().requires_grad_()
        with torch.autocast("cpu", dtype=dtype):
            call(hidden.half().float(), w, target, reduction="none").backward(factor)
        results.append(w.grad)
    assert (results[0] - results[1]).norm() < 1e-3 * results[0].norm()


def test_compiled_in_the_interpreter(interpreter):
    interpreter(check_compiled)


def check_compiled():
    """One graph for all numbers of positions."""

    def step(h, w, y):
        with torch.autocast("cpu", dtype=torch.float16):
            return call(torch.tanh(h), w, y) * 2

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for n in (150, 170, 333):
        hidden, weight, target = problem(n=n, v=200)
        results = []
        for function in (step, compiled):
            h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
            loss = function(h, w, target)
            loss.backward()
            results.append((loss.detach(), h.grad, w.grad))
        assert_close(*results, tolerance=1e-5)


@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
def test_the_interpreter_multiplies_no_bf16(interpreter, autocast):
    """Its products would be wrong numbers."""
    with pytest.raises(RuntimeError, match="interpreter multiplies no bf16"):
        interpreter(check_bf16, autocast)


def check_bf16(autocast):
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        check_kernels(n=20, dtype=torch.float32 if autocast else torch.bfloat16)


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("shared_memory", [101376, 166912, 232448])
@pytest.mark.parametrize("dim", [8, 64, 100, 128, 256, 512])
def test_blocks_fit_in_registers(dim, shared_memory, itemsize):
    pytest.importorskip("triton")
    from recbole_cce.ops.triton import linear_cross_entropy as kernels

    blocks = kernels.full_blocks(dim, itemsize, shared_memory)
    # the sum of a program in registers of 32 bits: at most 128 of a thread's 255
    assert blocks.stay * max(16, dim) <= 128 * 32 * blocks.num_warps
    assert kernels.SLOTS % blocks.stream == 0


def test_splits_keep_all_processors_busy():
    pytest.importorskip("triton")
    from recbole_cce.ops.triton.linear_cross_entropy import MAX_SPLITS, num_splits

    assert num_splits(1000, 132, 50) <= 2  # enough programs already
    assert num_splits(143, 132, 1) == 1  # no memory
    for blocks, processors, most in ((1, 132, 1000), (16, 132, 20), (143, 132, 8), (133, 132, 4), (144, 264, 4)):
        splits = num_splits(blocks, processors, most)
        assert 1 < splits <= min(most, MAX_SPLITS)

        def waves(splits, blocks=blocks, processors=processors):
            return math.ceil(blocks * splits / processors) / splits

        assert waves(splits) < waves(1)


def test_positions_are_sorted_by_target():
    pytest.importorskip("triton")
    from recbole_cce.ops.triton.linear_cross_entropy import num_bounds, sort_positions

    for padding_idx in (0, 5, None):
        _, weight, target = problem(n=200, v=53, padding_idx=padding_idx)
        rows = len(weight)
        order, bounds = sort_positions(target, padding_idx, rows, 16)
        counted = [y for y in target.tolist() if y != padding_idx]
        assert len(order) == 256 and len(set(order.tolist())) == len(counted)
        assert (order[len(counted) :] == order[0]).all() and len(bounds) == num_bounds(rows, 16)
        assert bounds[0] == bounds[-1] == len(counted)
        assert target[order[: len(counted)]].tolist() == sorted(counted)
        for block in range(len(bounds) - 2):
            inside = target[order[bounds[block + 1] : bounds[block + 2]]]
            assert (inside // 16 == block).all() and len(inside) == sum(y // 16 == block for y in counted)


# On a GPU


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [0.05, 1.0, 4.0], ids=["flat", "peaked", "very-peaked"])
@pytest.mark.parametrize("d", [8, 24, 64, 100, 128, 256, 512])
@pytest.mark.parametrize("uniform", [False, True], ids=["weighed", "uniform"])
def test_dimensions(dtype, scale, d, uniform):
    check_kernels(n=517, v=1300, d=d, dtype=dtype, scale=scale / d**0.25, uniform=uniform, device="cuda")


@needs_gpu
@pytest.mark.parametrize(("n", "v"), [(1, 1), (1, 5), (37, 2), (129, 3), (640, 20_000), (20_000, 700), (33, 100_000)])
@pytest.mark.parametrize("padding_idx", [0, 1, None])
def test_sizes(n, v, padding_idx):
    for dtype in (torch.float32, torch.bfloat16):
        check_kernels(n=n, v=v, dtype=dtype, padding_idx=padding_idx, device="cuda")
        check_kernels(n=n, v=v, d=64, dtype=dtype, padding_idx=padding_idx, scale=0.3, device="cuda")


@needs_gpu
@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [0.3, 4.0])
def test_splits(scale, dtype, splits):
    check_kernels(n=1000, v=1500, d=64, dtype=dtype, scale=scale, splits=splits, device="cuda")


@needs_gpu
@pytest.mark.parametrize("tma", [False, True])
def test_with_and_without_tma(tma, monkeypatch):
    from recbole_cce.ops.triton import linear_cross_entropy as kernels

    if not tma:
        monkeypatch.setattr(kernels, "descriptor", lambda *_: None)
    for d in (24, 64, 256):
        check_kernels(n=1001, v=999, d=d, dtype=torch.bfloat16, scale=0.3, splits=1, device="cuda")


@needs_gpu
def test_tf32_where_torch_allows_it():
    hidden, weight, target = problem(n=500, v=900, d=64, scale=0.4, device="cuda")
    exact = gradients(hidden, weight, target)
    torch.set_float32_matmul_precision("high")
    try:
        rounded = gradients(hidden, weight, target)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert_close(rounded, exact, tolerance=2e-3)
    assert not torch.equal(rounded[2], exact[2])


@needs_gpu
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_reductions(reduction):
    args = problem(n=400, device="cuda")
    assert_close(gradients(*args, reduction=reduction), gradients(*args, reduction=reduction, backend="torch"))


@needs_gpu
def test_strides_and_empty_input():
    hidden, weight, target = problem(n=300, device="cuda")
    wide = torch.zeros(300, 24, device="cuda")
    wide[:, ::2] = hidden
    expected = call(hidden, weight, target)
    assert call(wide[:, ::2], weight.T.contiguous().T, target.repeat_interleave(2)[::2]) == expected
    loss, grad_hidden, grad_weight = gradients(hidden[:0], weight, target[:0])
    assert loss == 0 and grad_hidden.shape == (0, 12) and (grad_weight == 0).all()
    assert call(hidden, weight, torch.zeros_like(target)) == 0


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ignored_rows_are_not_read_and_nan_is_seen(dtype):
    hidden, weight, target = problem(n=700, d=64, scale=0.3, dtype=dtype, device="cuda")
    expected = gradients(hidden, weight, target)
    hidden[target == 0] = torch.nan
    for one, two in zip(gradients(hidden, weight, target), expected, strict=True):
        assert torch.equal(one, two)
    hidden[(target != 0).nonzero()[3]] = torch.nan
    assert call(hidden, weight, target, reduction="none").isnan().sum() == 1


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_runs_are_bit_equal(dtype):
    args = problem(n=3000, v=40, d=64, dtype=dtype, device="cuda")
    for a, b in zip(gradients(*args), gradients(*args), strict=True):
        assert torch.equal(a, b)


@needs_gpu
def test_fp16_does_not_underflow():
    """Means over many rows and items: probabilities times 1 / N are far below what fp16 holds."""
    n, v = 30_000, 20_000
    hidden, weight, target = problem(n=n, v=v, d=64, scale=0.2, dtype=torch.float16, device="cuda")
    ours = gradients(hidden, weight.float(), target)[2]  # mixed: products in fp32
    with torch.autocast("cuda", dtype=torch.float16):
        half = gradients(hidden, weight.float(), target)[2]
    assert (half - ours).norm() < 2e-3 * ours.norm()
    cold = torch.bincount(target, minlength=v + 1) == 0
    assert (half[cold] - ours[cold]).norm() < 2e-3 * ours[cold].norm()


@needs_gpu
def test_autocast_rounds_rows_and_keeps_gradients_in_fp32():
    hidden, weight, target = problem(n=300, d=64, device="cuda")
    rounded = gradients(hidden.bfloat16().float(), weight.bfloat16().float(), target)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        ours = gradients(hidden, weight, target)
    assert [tensor.dtype for tensor in ours] == [torch.float32] * 3
    assert_close(ours[:1], rounded[:1])
    assert_close(ours, rounded, tolerance=5e-3)  # probabilities are rounded to bf16 before the products


@needs_gpu
def test_second_backward_accumulation_and_checkpoint():
    hidden, weight, target = problem(n=300, device="cuda")
    expected = gradients(hidden, weight, target)
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    loss = call(h, w, target)
    loss.backward(retain_graph=True)
    loss.backward()
    call(h, w, target).backward()
    assert_close((loss.detach(), h.grad / 3, w.grad / 3), expected)
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    loss = torch.utils.checkpoint.checkpoint(lambda h: call(h, w, target), h, use_reentrant=False)
    loss.backward()
    assert_close((loss.detach(), h.grad, w.grad), expected)


@needs_gpu
def test_only_the_gradients_asked_for():
    hidden, weight, target = problem(n=300, device="cuda")
    _, grad_hidden, grad_weight = gradients(hidden, weight, target)
    for h, w in ((hidden.clone().requires_grad_(), weight), (hidden, weight.clone().requires_grad_())):
        call(h, w, target).backward()
        assert_close([h.grad if h.requires_grad else w.grad], [grad_hidden if h.requires_grad else grad_weight])
    with torch.no_grad():
        assert_close([call(hidden, weight, target)], [call(hidden, weight, target, backend="torch")])


@needs_gpu
def test_compiled_without_graph_break():
    hidden, weight, target = problem(n=300, device="cuda")

    def step(h, w):
        return call(torch.tanh(h), w, target) * 2

    results = []
    for function in (step, torch.compile(step, fullgraph=True)):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        loss = function(h, w)
        loss.backward()
        results.append((loss.detach(), h.grad, w.grad))
    assert_close(*results)


@needs_gpu
def test_captured_in_a_graph():
    """Each replay sees the targets of its step, also another number of ignored ones."""
    hidden, weight, target = problem(n=300, device="cuda")
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    current = target.clone()

    def step():
        h.grad = w.grad = None
        loss = call(h, w, current)
        loss.backward()
        return loss

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    h.grad = w.grad = None
    with torch.cuda.graph(graph):
        loss = step()
    for seed in (1, 2):
        other = problem(n=300, seed=seed, ignored=0.3 * seed)[2].to("cuda")
        current.copy_(other)
        graph.replay()
        assert_close((loss.detach(), h.grad, w.grad), gradients(hidden, weight, other))


@needs_gpu
@pytest.mark.parametrize("table", [torch.float32, torch.bfloat16], ids=str)
def test_memory(table):
    """Beyond inputs and gradients: one 16-bit copy of the table and of the hidden states, 16 bytes a position."""
    n, v, d = 60_000, 30_000, 64
    hidden, weight, target = problem(n=n, v=v, d=d, scale=0.3, device="cuda")
    hidden, weight = hidden.bfloat16().requires_grad_(), weight.to(table).requires_grad_()
    for _ in range(2):
        hidden.grad = weight.grad = None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = call(hidden, weight, target)
        loss.backward()
    peak = torch.cuda.max_memory_allocated() - before - hidden.grad.nbytes - weight.grad.nbytes
    assert peak <= 2 * n * d + 2 * (v + 1) * d + 16 * n + 2**16


@needs_gpu
def test_table_beyond_32_bits():
    """V * D > 2^31: items at the far end of the table are read and written."""
    v, d = 2**31 // 256 + 10_000, 256
    weight = torch.zeros(v + 1, d, device="cuda", dtype=torch.bfloat16)
    weight[-20_000:].normal_()
    hidden = torch.randn(640, d, device="cuda", dtype=torch.bfloat16) / 16
    target = torch.arange(v - 639, v + 1, device="cuda")
    weight.requires_grad_()
    loss = call(hidden, weight, target, reduction="none")
    far = hidden.double() @ weight.detach()[-20_000:].double().T
    own = far[:, -640:].diagonal()
    zeros = torch.full((640, 1), math.log(v - 20_000), device="cuda", dtype=torch.double)
    assert_close([loss.detach()], [torch.cat([far, zeros], 1).logsumexp(1) - own])
    loss.sum().backward()
    assert (weight.grad[target].norm(dim=1) > 0).all() and weight.grad.isfinite().all()


@needs_gpu
def test_logits_beyond_32_bits():
    """N * V > 2^31, and N * D > 2^31: the last positions see what the formula says."""
    n, v, d = 2**31 // 64 + 1000, 100, 64
    hidden = torch.zeros(n, d, device="cuda", dtype=torch.bfloat16)
    hidden[-500:].normal_()
    weight = torch.randn(v + 1, d, device="cuda", dtype=torch.bfloat16) / 8
    target = torch.randint(1, v + 1, (n,), device="cuda")
    hidden.requires_grad_()
    loss = call(hidden, weight, target, reduction="none")
    last = hidden.detach()[-500:].double()
    assert_close([loss[-500:].detach()], [naive.linear(last, weight.double(), target[-500:])])
    assert_close([loss[:500].detach()], [torch.full((500,), math.log(v), device="cuda")])
    loss.sum().backward()
    assert (hidden.grad[-500:].norm(dim=1) > 0).all()
