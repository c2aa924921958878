"""The Triton kernels of CCE- and BCE: the same negatives as the formula, within its error; every way they are used.

On a GPU all combinations run. Without one, a few run in Triton's interpreter, and the kernels are compiled.
"""

from __future__ import annotations

import functools

import pytest
import torch

from recbole_cce import ops
from recbole_cce.ops import negatives
from tests.ops import naive
from tests.ops.problems import SEED, Sampling, assert_within, deterministic_algorithms, norms, problem

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHARINGS = ["tile", "none", "batch"]
LOSSES = ["softmax", "plain softmax", "binary"]
needs_gpu = pytest.mark.cuda


def op(loss):
    """The op with what makes it a loss."""
    if loss == "binary":
        return functools.partial(ops.sampled_binary_cross_entropy, positive_weight=0.3)
    return functools.partial(ops.sampled_cross_entropy, logq_correction=loss == "softmax")


def check_kernels(seeds=(0,), **kwargs):
    """backend="triton" against the formula, at the error budget of the formula in the same dtype."""
    assert_within(sum(kernel_norms(seed=seed, **kwargs) ** 2 for seed in seeds).sqrt())


def kernel_norms(
    n=300,
    v=53,
    d=12,
    k=9,
    sharing="tile",
    dtype=torch.float32,
    popularity=False,
    loss="softmax",
    padding_idx=0,
    **kwargs,
):
    """norms() of one problem."""
    hidden, weight, target = problem(n, v, d, dtype=dtype, padding_idx=padding_idx, **kwargs)
    way = Sampling(n, weight, k, sharing, popularity, loss == "softmax", padding_idx)

    def formula(h, w):
        if loss == "binary":
            return naive.sampled_binary(h, w, target, way.drawn, 0.3)
        return naive.sampled(h, w, target, way.drawn, way.correction.to(h.dtype))

    return norms(
        lambda h, w: op(loss)(h, w, target, reduction="none", backend="triton", **way.kwargs),
        formula,
        hidden,
        weight,
        target,
        padding_idx,
    )


def check_deterministic(**kwargs):
    """check_kernels() where sums must have an order."""
    with deterministic_algorithms():
        check_kernels(**kwargs)


def check_reduction(reduction, factor, n, v=53, device="cpu", **kwargs):
    """Against torch, with an upstream gradient `factor`; None: another one for each row."""
    args = problem(n=n, v=v, device=device)
    options = {"reduction": reduction, "factor": torch.rand(n, device=device) if factor is None else factor, **kwargs}
    assert_close(gradients(*args, **options), gradients(*args, **options, backend="torch"))


def check_compiled(loss, sharing, n, device="cpu", backend="inductor"):
    """A compiled model around the loss gives what the model gives, without a graph break."""
    hidden, weight, target = problem(n=n, device=device)

    def step(h, w):
        return call(torch.tanh(h), w, target, loss=loss, sharing=sharing) * 2

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend=backend)):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        value = function(h, w)
        value.backward()
        results.append((value.detach(), h.grad, w.grad))
    assert_close(*results)


# Without a GPU


SIZES = {"tile": 150, "batch": 150, "none": 20}  # positions: of two tiles, of more than one block
CASES = {
    "fp32": {},
    "popularity": {"popularity": True, "padding_idx": 5, "d": 20},
    "fp16": {"dtype": torch.float16, "v": 3, "k": 33, "padding_idx": None},
    "far from zero": {"scale": 6},
}
REDUCTIONS = [  # those of a mean's upstream gradient, of others, and of none
    ("mean", 1.0), ("mean", 3.0), ("mean", 0.0), ("sum", 1.0), ("sum", 3.0), ("none", 1.0), ("none", None),
]  # fmt: skip


@pytest.mark.parametrize("sharing", SHARINGS)
@pytest.mark.parametrize("loss", ["softmax", "binary"])
@pytest.mark.parametrize("case", CASES)
def test_kernels_in_the_interpreter(interpreter, case, loss, sharing):
    interpreter(check_kernels, n=SIZES[sharing], sharing=sharing, loss=loss, **CASES[case])


@pytest.mark.parametrize("sharing", SHARINGS)
def test_plain_softmax_in_the_interpreter(interpreter, sharing):
    interpreter(check_kernels, n=SIZES[sharing], sharing=sharing, loss="plain softmax", **CASES["fp16"])


@pytest.mark.parametrize("sharing", SHARINGS)
@pytest.mark.parametrize("loss", ["softmax", "binary"])
def test_deterministic_kernels_in_the_interpreter(interpreter, loss, sharing):
    interpreter(check_deterministic, n=SIZES[sharing], sharing=sharing, loss=loss, popularity=True)


@pytest.mark.parametrize("sharing", ["tile", "none"])
@pytest.mark.parametrize("loss", ["softmax", "binary"])
@pytest.mark.parametrize(("reduction", "factor"), REDUCTIONS)
def test_reductions_in_the_interpreter(interpreter, reduction, factor, loss, sharing):
    """With "batch" the same kernels are launched as with "tile"."""
    interpreter(check_reduction, reduction, factor, n=9, v=7, loss=loss, sharing=sharing, num_negatives=5)


@pytest.mark.parametrize(("loss", "sharing"), [("softmax", "tile"), ("binary", "none")])
def test_compiled_in_the_interpreter(interpreter, loss, sharing):
    """Compiled, it is one operator, which is told the loss and the sharing."""
    interpreter(check_compiled, loss, sharing, SIZES[sharing], backend="aot_eager")


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
@pytest.mark.parametrize("dim", [8, 50, 64, 100, 128, 256, 300, 512])
def test_blocks_fit_in_memory_and_registers(dim, shared_memory, itemsize):
    pytest.importorskip("triton")
    from recbole_cce.ops.triton import sampled_cross_entropy as kernels
    from recbole_cce.ops.triton.launch import padded

    width = padded(dim)
    for depth in (1, 20, 128, 100_000):
        for gradient in (False, True):
            blocks = kernels.tile_blocks(depth, dim, itemsize, shared_memory, gradient)
            assert min(16, blocks.positions, blocks.negatives) == 16
            assert blocks.positions < 2 * max(16, depth)
            assert blocks.halves <= (width > 64)
            sums = (blocks.negatives if gradient else blocks.positions) * width
            sums /= 1 + (gradient and blocks.halves)
            assert sums / (32 * blocks.num_warps) <= 128  # fp32 registers of a thread, of 255
            if itemsize == 4 or shared_memory < kernels.HOPPER_MEMORY:
                assert kernels.tile_bytes(blocks, width, itemsize) <= shared_memory
    draws, num_warps = kernels.per_position_blocks(dim)
    assert draws >= 16 and draws * width / (32 * num_warps) <= 64


# On a GPU


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sharing", SHARINGS)
@pytest.mark.parametrize("popularity", [False, True], ids=["uniform", "popularity"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("deterministic", [False, True], ids=["fast", "deterministic"])
def test_kernels(dtype, sharing, popularity, loss, deterministic):
    check = check_deterministic if deterministic else check_kernels
    check(n=1000, v=701, d=64, k=77, sharing=sharing, dtype=dtype, popularity=popularity, loss=loss, device="cuda")


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sharing", SHARINGS)
@pytest.mark.parametrize("scale", [0.05, 1.0], ids=["flat", "peaked"])
@pytest.mark.parametrize("d", [8, 24, 100, 128, 256, 512])
@pytest.mark.parametrize("loss", ["softmax", "binary"])
def test_dimensions(dtype, sharing, scale, d, loss):
    scale /= d**0.25
    check_kernels(n=517, v=300, d=d, k=130, sharing=sharing, dtype=dtype, loss=loss, scale=scale, device="cuda")


@needs_gpu
@pytest.mark.parametrize("sharing", SHARINGS)
@pytest.mark.parametrize("loss", ["softmax", "binary"])
def test_logits_far_from_zero(sharing, loss):
    """Their standard deviation is 100."""
    check_kernels(n=517, v=300, d=64, k=130, sharing=sharing, loss=loss, scale=10 / 64**0.25, device="cuda")


@needs_gpu
@pytest.mark.parametrize("sharing", SHARINGS)
@pytest.mark.parametrize(("n", "v", "k"), [(1, 1, 1), (1, 5, 300), (37, 2, 64), (129, 3, 1), (640, 20_000, 511)])
@pytest.mark.parametrize("padding_idx", [0, 1, None])
@pytest.mark.parametrize("loss", ["softmax", "binary"])
def test_sizes(sharing, n, v, k, padding_idx, loss):
    options = {"n": n, "v": v, "k": k, "sharing": sharing, "padding_idx": padding_idx, "loss": loss, "device": "cuda"}
    check_kernels(**options)
    # BCE of one item: the formula in 16 bits rounds little but d input, and that once; the kernel does so twice
    if v > 1 or loss == "softmax":
        seeds = range(50) if n == 1 and loss == "binary" else (0,)
        check_kernels(**options, dtype=torch.bfloat16, seeds=seeds)


@needs_gpu
@pytest.mark.parametrize("sharing", SHARINGS)
@pytest.mark.parametrize("loss", ["softmax", "binary"])
def test_many_negatives(sharing, loss):
    check_kernels(n=9, v=5000, d=16, k=65_536, sharing=sharing, loss=loss, device="cuda")


def call(hidden, weight, target, loss="softmax", **kwargs):
    options = {"num_negatives": 40, "seed": SEED, "backend": "triton", **kwargs}
    return op(loss)(hidden, weight, target, **options)


def gradients(*args, factor=1.0, **kwargs):
    hidden, weight, target = args
    hidden, weight = hidden.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()
    loss = call(hidden, weight, target, **kwargs)
    (factor * loss).sum().backward()
    return loss.detach(), hidden.grad, weight.grad


def assert_close(ours, truth, tolerance=2e-6):
    for one, two in zip(ours, truth, strict=True):
        assert (one.double() - two.double()).norm() <= tolerance * (1 + two.double().norm())


@needs_gpu
@pytest.mark.parametrize("sharing", SHARINGS)
@pytest.mark.parametrize("loss", ["softmax", "binary"])
@pytest.mark.parametrize(("reduction", "factor"), REDUCTIONS)
def test_reductions(reduction, factor, loss, sharing):
    check_reduction(reduction, factor, n=400, device="cuda", loss=loss, sharing=sharing)


@needs_gpu
@pytest.mark.parametrize("sharing", SHARINGS)
def test_strides_and_empty_input(sharing):
    hidden, weight, target = problem(n=300, device="cuda")
    wide = torch.zeros(300, 24, device="cuda")
    wide[:, ::2] = hidden
    expected = call(hidden, weight, target, sharing=sharing)
    tall = weight.T.contiguous().T
    assert call(wide[:, ::2], tall, target.repeat_interleave(2)[::2], sharing=sharing) == expected
    loss, grad_hidden, grad_weight = gradients(hidden[:0], weight, target[:0], sharing=sharing)
    assert loss == 0 and grad_hidden.shape == (0, 12) and (grad_weight == 0).all()
    assert call(hidden, weight, torch.zeros_like(target), sharing=sharing) == 0


@needs_gpu
@pytest.mark.parametrize("sharing", SHARINGS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("loss", ["softmax", "binary"])
def test_deterministic_runs_are_bit_equal(loss, sharing, dtype):
    args = problem(n=3000, v=40, d=64, dtype=dtype, device="cuda")
    with deterministic_algorithms():
        one, two = (gradients(*args, loss=loss, sharing=sharing) for _ in range(2))
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a, b)


@needs_gpu
@pytest.mark.parametrize("sharing", SHARINGS)
@pytest.mark.parametrize("d", [64, 256, 512])
@pytest.mark.parametrize("loss", ["softmax", "binary"])
def test_autocast_rounds_rows_and_keeps_gradients_in_fp32(loss, sharing, d):
    hidden, weight, target = problem(n=300, d=d, scale=(64 / d) ** 0.25, device="cuda")
    rounded = gradients(hidden.bfloat16().float(), weight.bfloat16().float(), target, loss=loss, sharing=sharing)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        ours = gradients(hidden, weight, target, loss=loss, sharing=sharing)
    assert [tensor.dtype for tensor in ours] == [torch.float32] * 3
    assert_close(ours[:1], rounded[:1])
    assert_close(ours, rounded, tolerance=5e-3)  # probabilities are rounded to bf16 before the products


@needs_gpu
@pytest.mark.parametrize("sharing", SHARINGS)
@pytest.mark.parametrize("loss", ["softmax", "binary"])
def test_second_backward_accumulation_and_checkpoint(loss, sharing):
    hidden, weight, target = problem(n=300, device="cuda")
    expected = gradients(hidden, weight, target, loss=loss, sharing=sharing)
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()

    def value(h):
        return call(h, w, target, loss=loss, sharing=sharing)

    first = value(h)
    first.backward(retain_graph=True)
    first.backward()
    value(h).backward()
    assert_close((first.detach(), h.grad / 3, w.grad / 3), expected)
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    first = torch.utils.checkpoint.checkpoint(value, h, use_reentrant=False)
    first.backward()
    assert_close((first.detach(), h.grad, w.grad), expected)


@needs_gpu
@pytest.mark.parametrize("sharing", SHARINGS)
def test_only_the_gradients_asked_for(sharing):
    hidden, weight, target = problem(n=300, device="cuda")
    _, grad_hidden, grad_weight = gradients(hidden, weight, target, sharing=sharing)
    for h, w in ((hidden.clone().requires_grad_(), weight), (hidden, weight.clone().requires_grad_())):
        call(h, w, target, sharing=sharing).backward()
        assert_close([h.grad if h.requires_grad else w.grad], [grad_hidden if h.requires_grad else grad_weight])


@needs_gpu
@pytest.mark.parametrize("sharing", SHARINGS)
@pytest.mark.parametrize("loss", ["softmax", "binary"])
def test_compiled_without_graph_break(loss, sharing):
    check_compiled(loss, sharing, n=300, device="cuda")


@needs_gpu
@pytest.mark.parametrize("sharing", SHARINGS)
@pytest.mark.parametrize("loss", ["softmax", "binary"])
def test_captured_in_a_graph(loss, sharing):
    """Each replay draws anew, as the seed tensor says."""
    hidden, weight, target = problem(n=300, device="cuda")
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    seed = torch.zeros((), dtype=torch.int64, device="cuda")

    def step():
        h.grad = w.grad = None
        value = call(h, w, target, loss=loss, sharing=sharing, seed=seed)
        value.backward()
        return value

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    h.grad = w.grad = None
    with torch.cuda.graph(graph):
        value = step()
    for number in (5, SEED):
        seed.fill_(number)
        graph.replay()
        expected = gradients(hidden, weight, target, loss=loss, sharing=sharing, seed=number)
        assert_close((value.detach(), h.grad, w.grad), expected)


@needs_gpu
def test_table_beyond_32_bits():
    """V * D > 2^31: items at the far end of the table are drawn, read and written."""
    v, d = 2**31 // 256 + 10_000, 256
    weight = torch.zeros(v + 1, d, device="cuda", dtype=torch.bfloat16)
    weight[-20_000:].normal_()
    hidden = torch.randn(640, d, device="cuda", dtype=torch.bfloat16) / 16
    target = torch.arange(v - 639, v + 1, device="cuda")
    weight.requires_grad_()
    for sharing in SHARINGS:
        weight.grad = None
        groups = torch.arange(640, device="cuda") % negatives.num_groups(640, sharing)
        way = negatives.draw_negatives(ops.Uniform(), SEED, groups, 2000, v + 1, 0)
        loss = call(hidden, weight, target, sharing=sharing, num_negatives=2000, reduction="none")
        rows = weight.detach()[way].double()
        scores = torch.einsum("nd,nkd->nk", hidden.double(), rows) - torch.log(
            torch.tensor(2000 / v, dtype=torch.double)
        )
        own = (hidden.double() * weight.detach()[target].double()).sum(1)
        scores = scores.masked_fill(way == target[:, None], -torch.inf)
        truth = torch.cat([own[:, None], scores], 1).logsumexp(1) - own
        assert_close([loss.detach()], [truth])
        loss.sum().backward()
        assert (weight.grad[target].norm(dim=1) > 0).all() and weight.grad.isfinite().all()


@needs_gpu
def test_draws_beyond_32_bits():
    """N * K > 2^31: the last positions draw what the stream says."""
    n, v, k = 70_000, 1000, 32_768
    hidden, weight, target = problem(n=n, v=v, d=8, device="cuda")
    loss = call(hidden, weight, target, sharing="none", num_negatives=k, reduction="none")
    last = torch.arange(n - 50, n, device="cuda")
    drawn = negatives.draw_negatives(ops.Uniform(), SEED, last, k, v + 1, 0)
    correction = torch.log(torch.tensor(k / v, dtype=torch.double))
    truth = naive.sampled(hidden[last].double(), weight.double(), target[last], drawn, correction)
    assert_close([loss[last]], [torch.where(target[last] != 0, truth, 0)])
