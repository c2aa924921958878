"""The Triton kernels of CCE- and BCE: the same negatives as the formula, within its error; every way they are used.

On a GPU all combinations run. Without one, a few run in Triton's interpreter, and the kernels are compiled.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import textwrap

import pytest
import torch

from recbole_cce import ops
from recbole_cce.ops import negatives
from tests.ops import naive
from tests.ops.compiling import CHIPS, POINTERS, compiled, need_triton, spilled
from tests.ops.problems import SEED, Sampling, assert_within, norms, problem

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


def check_reductions(loss, sharing, n, device="cpu"):
    """Each reduction against torch, with upstream gradients that are what a mean expects, and that are not."""
    args = problem(n=n, device=device)
    for reduction in ("mean", "sum", "none"):
        for factor in (1.0, 3.0, torch.rand(n, device=device) if reduction == "none" else 0.0):
            options = {"loss": loss, "sharing": sharing, "reduction": reduction, "factor": factor}
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


TYPES = POINTERS | {"log_k": "fp32", "positive_weight": "fp32"}

# fp32 products of the interpreter, which are NumPy's: by some CPUs one row's depend on where in a block it stands, so
# that a backward pass would not meet the logits of the forward pass; on a GPU it does
PRODUCTS = """
import numpy
matmul = numpy.matmul
numpy.matmul = lambda a, b, dtype: matmul(a, b, dtype=numpy.float64).astype(dtype)
"""


def run_python(program: str, **environment: str) -> str:
    """Run a program in a process of its own: Triton chooses its interpreter when it is imported."""
    path = os.path.join(os.getcwd(), "program.py")
    with open(path, "w") as file:
        file.write(PRODUCTS + textwrap.dedent(program))
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    result = subprocess.run(
        [sys.executable, path],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([root, *sys.path]), **environment},
        capture_output=True,
        text=True,
    )
    if "only 0-dimensional arrays can be converted" in result.stderr:
        pytest.skip("the interpreter of this Triton does not run with this NumPy")
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_kernels_in_the_interpreter():
    pytest.importorskip("triton")
    run_python(
        """
        import torch
        from tests.ops.test_sampled_kernels import check_compiled, check_kernels, check_reductions

        for sharing in ("tile", "none", "batch"):
            n = 20 if sharing == "none" else 150
            for loss in ("softmax", "binary"):
                check_kernels(n=n, sharing=sharing, loss=loss)
                check_kernels(n=n, sharing=sharing, loss=loss, popularity=True, padding_idx=5, d=20)
                check_kernels(n=n, sharing=sharing, loss=loss, dtype=torch.float16, v=3, k=33, padding_idx=None)
                check_kernels(n=n, sharing=sharing, loss=loss, scale=6)
                torch.use_deterministic_algorithms(True)
                check_kernels(n=n, sharing=sharing, loss=loss, popularity=True)
                torch.use_deterministic_algorithms(False)
                check_reductions(loss, sharing, n)
                check_compiled(loss, sharing, n, backend="aot_eager")
            check_kernels(
                n=n, sharing=sharing, loss="plain softmax", dtype=torch.float16, v=3, k=33, padding_idx=None
            )

        # its products of bf16 are wrong numbers: refused, also where autocast rounds to it
        import pytest
        with pytest.raises(RuntimeError, match="interpreter multiplies no bf16"):
            check_kernels(n=20, dtype=torch.bfloat16)
        with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(RuntimeError, match="no bf16"):
            check_kernels(n=20)
        """,
        TRITON_INTERPRET="1",
    )


@pytest.mark.parametrize("capability", [80, 90, 100], ids=lambda c: f"sm_{c}")
@pytest.mark.parametrize("binary", [False, True], ids=["softmax", "binary"])
@pytest.mark.parametrize("name", ["tile_forward", "tile_weight_gradient", "own_forward", "pair", "row_weight_gradient"])
def test_kernels_compile(name, binary, capability):
    language = pytest.importorskip("triton").language
    from recbole_cce.ops.triton import sampled_cross_entropy as kernels

    constants = {
        "D": 48, "BD": 64, "BM": 64, "BK": 32, "BP": 16, "BLOCK": 256, "DTYPE": language.bfloat16, "PRECISION": "ieee",
        "POPULARITY": True, "CORRECT": True, "DIRECTION": True, "ATOMIC": True, "MODE": "place", "HALVES": True,
        "BINARY": binary, "ADD": True, "UNIFORM": True,
    }  # fmt: skip
    kernel = getattr(kernels, f"{name}_kernel")
    assert compiled(kernel, capability, constants, TYPES).asm["cubin"]


def compile_tile_kernel(name, capability, dim, dtype, precision="ieee", binary=False, hidden="*fp32"):
    """As it is launched, under autocast with hidden states that a layer norm left in fp32."""
    need_triton(3, 3)
    from recbole_cce.ops.triton import sampled_cross_entropy as kernels
    from recbole_cce.ops.triton.launch import DTYPES, padded

    blocks = kernels.tile_blocks(128, dim, dtype.itemsize, CHIPS[capability], gradient=name != "tile_forward")
    constants = {
        "D": dim, "BD": padded(dim), "BM": blocks.positions, "BK": blocks.negatives, "HALVES": blocks.halves,
        "DTYPE": DTYPES[dtype], "PRECISION": precision, "POPULARITY": False, "CORRECT": not binary,
        "BINARY": binary, "DIRECTION": True, "ATOMIC": True, "stride_hd": 1, "stride_wd": 1, "stride_y": 1,
        "stride_grad": 1, "table_ptr": None, "log_q_ptr": None, "row_ptr": None, "unit_ptr": None,
    }  # fmt: skip
    launched = compiled(
        getattr(kernels, f"{name}_kernel"),
        capability,
        constants,
        TYPES | {"h_ptr": hidden, "direction_ptr": hidden},
        {"num_warps": blocks.num_warps, "num_stages": blocks.num_stages},
        aligned=[*POINTERS, "stride_hn", "stride_wn"],
    )
    return launched, kernels.tile_bytes(blocks, padded(dim), dtype.itemsize)


@pytest.mark.parametrize("hidden", ["*bf16", "*fp32"], ids=["bf16", "fp32"])
@pytest.mark.parametrize("dim", [256, 512])
@pytest.mark.parametrize("name", ["tile_forward", "tile_weight_gradient"])
def test_kernels_fit_in_the_memory_of_hopper(name, dim, hidden):
    for binary in (False, True):
        launched, _ = compile_tile_kernel(name, 90, dim, torch.bfloat16, binary=binary, hidden=hidden)
        assert launched.metadata.shared <= CHIPS[90]


SPILLS = 96  # bytes of a thread: two dozen registers, of 255


@pytest.mark.parametrize("capability", [80, 86, 120], ids=lambda c: f"sm_{c}")
@pytest.mark.parametrize("dim", [128, 256, 512])
@pytest.mark.parametrize("name", ["tile_forward", "tile_weight_gradient"])
def test_kernels_of_16_bits_fit_and_do_not_spill(name, dim, capability):
    """Chips that multiply out of registers; the formula by which blocks are chosen holds."""
    launched, memory = compile_tile_kernel(name, capability, dim, torch.bfloat16)
    assert launched.metadata.shared <= memory <= CHIPS[capability]
    assert spilled(launched) <= SPILLS


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
@pytest.mark.parametrize("dim", [64, 128, 256, 512])
@pytest.mark.parametrize("name", ["tile_forward", "tile_weight_gradient"])
def test_kernels_of_fp32_fit_and_do_not_spill(name, dim, precision):
    """Their blocks are the same on all chips: sm_86 has the least memory."""
    launched, memory = compile_tile_kernel(name, 86, dim, torch.float32, precision)
    assert launched.metadata.shared <= memory <= CHIPS[86]
    assert spilled(launched) <= SPILLS


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("shared_memory", sorted(set(CHIPS.values())))
def test_blocks_fit_the_chip(itemsize, shared_memory):
    pytest.importorskip("triton")
    from recbole_cce.ops.triton import sampled_cross_entropy as kernels
    from recbole_cce.ops.triton.launch import padded

    for dim in (8, 50, 64, 100, 128, 256, 300, 512):
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
        draws, num_warps = kernels.own_blocks(dim)
        assert draws >= 16 and draws * width / (32 * num_warps) <= 64


# On a GPU


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sharing", SHARINGS)
@pytest.mark.parametrize("popularity", [False, True], ids=["uniform", "popularity"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("deterministic", [False, True], ids=["fast", "deterministic"])
def test_kernels(dtype, sharing, popularity, loss, deterministic):
    torch.use_deterministic_algorithms(deterministic)
    try:
        check_kernels(
            n=1000, v=701, d=64, k=77, sharing=sharing, dtype=dtype, popularity=popularity, loss=loss,
            device="cuda",
        )  # fmt: skip
    finally:
        torch.use_deterministic_algorithms(False)


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
def test_reductions(loss, sharing):
    check_reductions(loss, sharing, n=400, device="cuda")


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
    torch.use_deterministic_algorithms(True)
    try:
        one, two = (gradients(*args, loss=loss, sharing=sharing) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
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
