"""Attention over packed sequences: the formula within its error, dropout, and every way that the op is used.

On a GPU all combinations run. Without one, a few run in Triton's interpreter, and the kernels are compiled.
"""

from __future__ import annotations

import contextlib
import re
from unittest import mock

import pytest
import torch

from recbole_cce.ops import packed_attention, sequences
from recbole_cce.ops.reference import packed_attention as reference
from tests.ops import naive
from tests.ops.problems import SEED
from tests.ops.test_sampled_kernels import DTYPES, assert_close, needs_gpu

LENGTHS = {
    "short": [1, 1, 3, 1, 0, 7, 2, 1, 1, 0, 5],
    "ones": [1] * 70,
    "borders": [30, 5, 29, 1, 63, 2, 40, 0, 33],  # across those of blocks, and ending there
    "long": [150],
    "long among short": [1, 2, 140, 1, 0, 3],
    "one": [1],
}


def spans_of(lengths, device="cpu"):
    bounds = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return sequences(bounds, int(bounds[-1]))[1].to(device)


def problem(lengths, heads=2, d=16, dtype=torch.float32, scale=1.0, seed=0, device="cpu"):
    """Query, key and value in one tensor [P, 3, H, d], spans, and the gradient of the output."""
    generator = torch.Generator().manual_seed(seed)
    mixed = (torch.randn(sum(lengths), 3, heads, d, generator=generator) * scale).to(dtype).to(device)
    grad = torch.randn(sum(lengths), heads, d, generator=generator).to(dtype).to(device)
    return mixed, spans_of(lengths, device), grad


def gradients(mixed, spans, grad, dropout_p=0.0, **kwargs):
    """The output, and the gradients of query, key and value, which are views."""
    leaf = mixed.detach().clone().requires_grad_()
    out = packed_attention(*leaf.unbind(1), spans, dropout_p, **{"backend": "triton", "seed": SEED, **kwargs})
    out.backward(grad)
    return out.detach(), *leaf.grad.unbind(1)


def in_blocks(blocks):
    """Programs are of this shape; None: of that they would have."""
    if blocks is None:
        return contextlib.nullcontext()
    from recbole_cce.ops.triton import packed_attention as kernels

    return mock.patch.object(kernels, "packed_blocks", lambda *_: kernels.Blocks(*blocks))


def check_kernels(lengths, heads=2, d=16, dtype=torch.float32, dropout_p=0.0, backend="triton", blocks=None, **kwargs):
    """|fp64 truth - ours| <= |fp64 truth - the formula in the same dtype| + small, for output and gradients.

    Small is an eighth of what 16 bits resolve.
    """
    slack = {torch.float64: 1e-14, torch.float32: 1e-6}.get(dtype, torch.finfo(dtype).eps / 8)
    mixed, spans, grad = problem(lengths, heads, d, dtype, **kwargs)
    keep = None
    if dropout_p > 0:
        position = torch.arange(len(mixed), device=mixed.device)
        keep = reference.kept(SEED, position, position, heads, dropout_p)

    def formula(of):
        leaf = mixed.to(of, copy=True).requires_grad_()
        out = naive.attention(*leaf.unbind(1), lengths, keep, dropout_p)
        out.backward(grad.to(of))
        return out.detach().double(), *leaf.grad.double().unbind(1)

    with in_blocks(blocks):
        ours = gradients(mixed, spans, grad, dropout_p, backend=backend)
    assert all(tensor.dtype == dtype for tensor in ours) and ours[0].is_contiguous()
    names = ("out", "d query", "d key", "d value")
    for name, a, b, c in zip(names, formula(torch.float64), formula(dtype), ours, strict=True):
        error, budget = (a - c.double()).norm(), (a - b).norm()
        assert error <= budget + slack * (1 + a.norm()), f"{name}: {error:.3g} > {budget:.3g}"


def check_weights(dropout_p=0.4, backend="triton", device="cpu", dtype=torch.float32):
    """One-hot values give the weights as the output, one-hot gradients as the gradient of the values: in both, dropout
    keeps what the stream says."""
    lengths, heads, d = [3, 20, 1, 17], 3, 64
    mixed, spans, _ = problem(lengths, heads, d, dtype, scale=0.1, device=device)
    one_hot = torch.eye(d, dtype=dtype, device=device)[: len(mixed), None].expand(-1, heads, -1)
    mixed[:, 2] = one_hot
    out, *_, grad_value = gradients(mixed, spans, one_hot, dropout_p, backend=backend)
    position = torch.arange(len(mixed), device=device)
    mask = (position >= spans[:, :1]) & (position <= position[:, None])
    keep = reference.kept(SEED, position, position, heads, dropout_p).transpose(0, 1)
    assert torch.equal(out[:, :, : len(mixed)] > 0, keep & mask[:, None])
    assert torch.equal(grad_value[:, :, : len(mixed)].permute(2, 1, 0) > 0, keep & mask[:, None])
    assert_close([grad_value[:, :, : len(mixed)].permute(2, 1, 0)], [out[:, :, : len(mixed)]], tolerance=1e-2)


def check_uses(dropout_p, device="cpu"):
    """Layouts in memory, seeds, gradients that are asked for, a second backward pass."""
    mixed, spans, grad = problem([9, 1, 20, 4], d=8, device=device)
    expected = gradients(mixed, spans, grad, dropout_p)
    again = gradients(mixed, spans, grad, dropout_p, seed=torch.tensor(SEED, device=device))
    assert all(torch.equal(a, b) for a, b in zip(expected, again, strict=True))
    other = gradients(mixed, spans, grad, dropout_p, seed=SEED + 1)
    assert torch.equal(expected[0], other[0]) == (dropout_p == 0)
    # contiguous, heads outside, columns apart; a gradient and spans that are not contiguous
    query, key, value = (part.contiguous() for part in mixed.unbind(1))
    key = key.transpose(0, 1).contiguous().transpose(0, 1)
    value = value.repeat_interleave(2, -1)[..., ::2]
    leaves = [part.detach().requires_grad_() for part in (query, key, value)]
    options = {"seed": SEED, "backend": "triton"}
    out = packed_attention(*leaves, spans.T.contiguous().T, dropout_p, **options)
    out.backward(grad.repeat_interleave(2, -1)[..., ::2], retain_graph=True)
    for a, b in zip((out.detach(), *(leaf.grad for leaf in leaves)), expected, strict=True):
        assert torch.equal(a, b)
    out.backward(grad)  # a second time
    for leaf, b in zip(leaves, expected[1:], strict=True):
        assert torch.equal(leaf.grad, 2 * b)
    of_ones = gradients(mixed, spans, torch.ones_like(grad), dropout_p)
    for i, leaf in enumerate(leaves):  # only one gradient
        parts = [part if part is leaf else part.detach() for part in leaves]
        of_sum = packed_attention(*parts, spans, dropout_p, **options).sum()  # its gradient is expanded
        assert torch.equal(torch.autograd.grad(of_sum, leaf)[0], of_ones[1 + i])


def check_seeds(device="cpu"):
    """Without one it is drawn; all weights may be dropped; there may be no position; one derivative is all there is."""
    mixed, spans, grad = problem([9, 1, 20, 4], d=8, device=device)
    torch.manual_seed(3)
    one, two = (gradients(mixed, spans, grad, 0.5, seed=None)[0] for _ in range(2))
    torch.manual_seed(3)
    assert torch.equal(gradients(mixed, spans, grad, 0.5, seed=None)[0], one) and not torch.equal(one, two)
    assert all((part == 0).all() for part in gradients(mixed, spans, grad, 1.0))
    empty = gradients(mixed[:0], spans[:0], grad[:0], 0.5)
    assert [part.shape for part in empty] == [(0, 2, 8)] * 4
    total = packed_attention(*mixed.requires_grad_().unbind(1), spans, backend="triton").sum()
    with pytest.raises(RuntimeError, match="create_graph: True is not valid"):
        torch.autograd.grad(total, mixed, create_graph=True)


def check_compiled(device="cpu", backend="inductor"):
    """One graph, without a break, for all numbers of positions and sequences."""

    def step(mixed, spans, seed):
        query, key, value = torch.tanh(mixed).unbind(1)
        return packed_attention(query, key, value, spans, 0.3, seed=seed, backend="triton") * 2

    function = torch.compile(step, fullgraph=True, backend=backend)
    for lengths in ([9, 1, 20, 4], [40, 2], [1, 1, 17, 2, 2]):
        mixed, spans, grad = problem(lengths, d=8, device=device)
        results = []
        for called in (step, function):
            leaf = mixed.clone().requires_grad_()
            out = called(leaf, spans, torch.tensor(SEED, device=device))
            out.backward(grad)
            results.append((out.detach(), leaf.grad))
        assert_close(*results)

    def seedless(mixed, spans):
        return packed_attention(*(mixed * 1.0).unbind(1), spans, 0.4, backend="triton") * 1.0

    # each call draws its own dropout, the same one in both passes; weights as in check_weights()
    function = torch.compile(seedless, fullgraph=True, backend=backend)
    mixed, spans, _ = problem([5, 3], d=8, device=device)
    one_hot = torch.eye(8, device=device)[:, None].expand(-1, 2, -1)
    mixed[:, 2] = one_hot
    seen = []
    for _ in range(2):
        leaf = mixed.clone().requires_grad_()
        seen.append(function(leaf, spans))
        seen[-1].backward(one_hot)
        assert_close([leaf.grad[:, 2].permute(2, 1, 0)], [seen[-1].detach()])
    assert not torch.equal(*seen)


# Without a GPU


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("dropout_p", [0.0, 0.6, 1.0])
def test_reference(lengths, dropout_p):
    if dropout_p < 1:
        check_kernels(LENGTHS[lengths], dtype=torch.float64, dropout_p=dropout_p, backend="torch")
        check_kernels(LENGTHS[lengths], d=6, dropout_p=dropout_p, backend="torch")
    else:
        assert all((part == 0).all() for part in gradients(*problem(LENGTHS[lengths]), dropout_p, backend="torch"))


def test_weights_of_the_reference():
    check_weights(backend="torch")


@pytest.mark.parametrize("lengths", LENGTHS)
def test_sequences(lengths):
    numbers, expected, start = [], [], 0
    for i, length in enumerate(LENGTHS[lengths]):
        numbers += [i] * length
        expected += [[start, start + length]] * length
        start += length
    bounds = torch.tensor([0, *LENGTHS[lengths]], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    number, spans = sequences(bounds, start)
    assert number.tolist() == numbers and spans.tolist() == expected and spans.dtype == torch.int32
    assert sequences(torch.zeros(3, dtype=torch.int32), 0)[1].shape == (0, 2)


@pytest.mark.parametrize("dropout_p", [0.1, 0.6])
def test_dropout_keeps_its_share_independently(dropout_p):
    """Weights of neighbouring keys and queries, of other heads and with another seed."""
    heads, n = 3, 400
    positions = torch.arange(10**9, 10**9 + n)
    keep = reference.kept(SEED, positions, positions, heads, dropout_p).double() - (1 - dropout_p)
    variance = dropout_p * (1 - dropout_p)
    assert abs(keep.mean()) < 4 * (variance / keep.numel()) ** 0.5
    for word in range(4):
        assert abs(keep[..., word::4].mean()) < 4 * (4 * variance / keep.numel()) ** 0.5
    other = reference.kept(SEED + 1, positions, positions, heads, dropout_p).double() - (1 - dropout_p)
    pairs = [(keep, other), (keep[0], keep[1]), (keep[1], keep[2]), (keep, keep.transpose(1, 2))]
    for step in (1, 2, 3, 4):
        pairs += [(keep[:, step:], keep[:, :-step]), (keep[..., step:], keep[..., :-step])]
    for i, (one, two) in enumerate(pairs):
        if i == 3:  # a weight on itself is its own transpose
            one, two = (part.masked_fill(torch.eye(n, dtype=torch.bool), 0) for part in (one, two))
            one = one.triu()
        assert abs((one * two).mean()) < 4 * variance / one.numel() ** 0.5


ERRORS = [
    ("query", {"query": torch.zeros(5, 16)}),
    ("query", {"query": torch.zeros(5, 2, 0)}),
    ("query", {"query": torch.zeros(5, 2, 8, dtype=torch.int64)}),
    ("key", {"key": torch.zeros(4, 2, 8)}),
    ("key", {"key": torch.zeros(5, 2, 8, dtype=torch.float16)}),
    ("key", {"key": torch.zeros(5, 2, 8, device="meta")}),
    ("value", {"value": torch.zeros(5, 2, 16)}),
    ("value", {"value": torch.zeros(5, 2, 8, dtype=torch.float64)}),
    ("value", {"value": torch.zeros(5, 2, 8, device="meta")}),
    ("spans", {"spans": torch.zeros(5, dtype=torch.int32)}),
    ("spans", {"spans": torch.zeros(5, 2)}),
    ("spans", {"spans": torch.zeros(5, 2, dtype=torch.int32, device="meta")}),
    ("dropout_p", {"dropout_p": -0.1}),
    ("dropout_p", {"dropout_p": 1.5}),
    ("dropout_p", {"dropout_p": float("nan")}),
    ("seed", {"seed": 2**63, "dropout_p": 0.5}),
    ("seed", {"seed": torch.zeros(1, dtype=torch.int64), "dropout_p": 0.5}),
    ("backend", {"backend": "numpy"}),
]


@pytest.mark.parametrize(("name", "wrong"), ERRORS, ids=[f"{name}-{i}" for i, (name, _) in enumerate(ERRORS)])
def test_errors(name, wrong):
    right = {part: torch.zeros(5, 2, 8) for part in ("query", "key", "value")}
    right["spans"] = spans_of([2, 3])
    assert packed_attention(**right).shape == (5, 2, 8)
    with pytest.raises(ValueError, match=name):
        packed_attention(**{**right, **wrong})


@pytest.mark.parametrize(
    ("wrong", "position"),
    [
        ([[0, 2], [0, 2], [2, 5], [2, 5], [1, 5]], 4),  # begins in another one
        ([[0, 2], [0, 2], [2, 5], [2, 4], [2, 5]], 3),  # ends elsewhere than the one before
        ([[0, 3], [0, 3], [2, 5], [2, 5], [2, 5]], 2),  # begins before that ends
        ([[0, 2], [0, 2], [2, 9], [2, 9], [2, 9]], 2),  # beyond the last position
        ([[0, 2], [0, 2], [2, 3], [4, 5], [4, 5]], 3),  # after itself
        ([[-1, 2], [-1, 2], [2, 5], [2, 5], [2, 5]], 0),
        ([[0, 0], [0, 0], [0, 0], [0, 0], [0, 0]], 0),
    ],
)
def test_spans_of_other_sequences(wrong, position):
    parts = [torch.zeros(5, 2, 8)] * 3
    with pytest.raises(ValueError, match=f"spans: position {position} has {re.escape(str(wrong[position]))}"):
        packed_attention(*parts, torch.tensor(wrong, dtype=torch.int32))


def test_triton_where_it_cannot_run():
    with pytest.raises(RuntimeError, match="backend"):
        gradients(*problem([3, 4], dtype=torch.float64))


CASES = {
    **{f"{name}, fp32": {"lengths": name} for name in LENGTHS},
    **{f"{name}, fp16, dropout": {"lengths": name, "dtype": torch.float16, "dropout_p": 0.3} for name in LENGTHS},
    **{
        f"{kind}, {dtype}": {"lengths": "borders", "dtype": dtype, **options}
        for dtype in (torch.float32, torch.float16)
        for kind, options in {
            "d 8": {"d": 8, "heads": 1},
            "d 24": {"d": 24, "heads": 1},
            "d 80": {"d": 80, "heads": 1},
            "dropout": {"dropout_p": 0.6},
            "peaked": {"scale": 5.0},
            "flat": {"scale": 0.01},
        }.items()
    },
    **{
        f"blocks of {blocks}": {"lengths": "borders", "heads": 1, "dropout_p": 0.2, "blocks": blocks}
        for blocks in ((16, 64, 4), (64, 16, 4), (128, 128, 4))
    },
}


@pytest.mark.parametrize("case", CASES)
def test_kernels_in_the_interpreter(interpreter, case):
    interpreter(check_kernels, **{**CASES[case], "lengths": LENGTHS[CASES[case]["lengths"]]})


def test_weights_in_the_interpreter(interpreter):
    interpreter(check_weights)


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_uses_in_the_interpreter(interpreter, dropout_p):
    interpreter(check_uses, dropout_p)


def test_seeds_in_the_interpreter(interpreter):
    interpreter(check_seeds)


def test_compiled_in_the_interpreter(interpreter):
    interpreter(check_compiled, backend="aot_eager")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"dtype": torch.bfloat16}, "interpreter multiplies no bf16"), ({"d": 7}, "8 to 256"), ({"d": 257}, "8 to 256")],
)
def test_what_the_interpreter_cannot(interpreter, wrong, message):
    with pytest.raises(RuntimeError, match=message):
        interpreter(check_kernels, [3], **wrong)


# On a GPU


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.6])
@pytest.mark.parametrize("d", [8, 24, 32, 64, 100, 128, 256])
@pytest.mark.parametrize("scale", [0.05, 1.0, 4.0], ids=["flat", "peaked", "very-peaked"])
def test_dimensions(scale, d, dropout_p, dtype):
    lengths = [*LENGTHS["borders"], *LENGTHS["short"], 320, *LENGTHS["ones"]]
    check_kernels(lengths, d=d, dtype=dtype, dropout_p=dropout_p, scale=scale / d**0.25, device="cuda")


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("heads", [1, 3, 8])
def test_lengths(heads, lengths, dtype):
    for dropout_p in (0.0, 0.3):
        check_kernels(LENGTHS[lengths], heads, 32, dtype, dropout_p, device="cuda")


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_random_lengths(dtype):
    for seed in range(5):
        lengths = torch.randint(0, 50, (80,), generator=torch.Generator().manual_seed(seed)).pow(2).div(49).long()
        for d in (32, 64):
            check_kernels(lengths.tolist(), 2, d, dtype, 0.2, seed=seed, device="cuda")


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights(dtype):
    check_weights(device="cuda", dtype=dtype)


@needs_gpu
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_uses(dropout_p):
    check_uses(dropout_p, "cuda")


@needs_gpu
def test_seeds():
    check_seeds("cuda")


@needs_gpu
def test_compiled_without_graph_break():
    check_compiled("cuda")


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_runs_are_bit_equal(dtype):
    args = problem([50, 3, 1] * 300, d=32, dtype=dtype, device="cuda")
    for a, b in zip(gradients(*args, 0.2), gradients(*args, 0.2), strict=True):
        assert torch.equal(a, b)


@needs_gpu
def test_captured_in_a_graph():
    """Each replay sees the spans of its step and draws its own dropout, the same one in both passes."""
    lengths, heads, d = [3, 20, 1, 17], 3, 64
    mixed, spans, _ = problem(lengths, heads, d, scale=0.1, device="cuda")
    one_hot = torch.eye(d, device="cuda")[: len(mixed), None].expand(-1, heads, -1).contiguous()
    mixed[:, 2] = one_hot
    mixed.requires_grad_()

    def step():
        mixed.grad = None
        out = packed_attention(*mixed.unbind(1), spans, 0.4)
        out.backward(one_hot)
        return out

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    seen = []
    for other in ([3, 20, 1, 17], [3, 20, 1, 17], [11, 11, 11, 8]):
        spans.copy_(spans_of(other))
        graph.replay()
        weights = out.detach()[:, :, : len(mixed)].clone()
        assert_close([mixed.grad[:, 2, :, : len(mixed)].permute(2, 1, 0)], [weights])
        position = torch.arange(len(mixed), device="cuda")
        mask = (position >= spans[:, :1]) & (position <= position[:, None])
        assert (weights[~mask[:, None].expand_as(weights)] == 0).all()
        assert 0.4 < (weights > 0).sum() / (heads * mask.sum()) < 0.8
        seen.append(weights > 0)
    assert not torch.equal(seen[0], seen[1])


@needs_gpu
def test_nothing_waits_for_the_gpu():
    mixed, _, grad = problem([50, 3, 1] * 30, d=32, device="cuda")
    bounds = torch.tensor([0, *[50, 3, 1] * 30], dtype=torch.int32, device="cuda").cumsum(0, dtype=torch.int32)
    torch.cuda.set_sync_debug_mode("error")
    try:
        gradients(mixed, sequences(bounds, len(mixed))[1], grad, 0.2, seed=None)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_gpu
def test_positions_beyond_32_bits():
    """P * 3 * H * d > 2^31: the last positions see what the formula says."""
    positions, d = 2**31 // (3 * 256) + 1000, 256
    mixed = torch.zeros(positions, 3, 1, d, device="cuda", dtype=torch.bfloat16)
    last, spans, grad = problem([1] * 7 + [13] * 21, 1, d, torch.bfloat16, device="cuda")
    mixed[-len(last) :] = last
    position = torch.arange(positions, dtype=torch.int32, device="cuda")
    far = torch.stack([position, position + 1], 1)
    far[-len(last) :] = spans + (positions - len(last))
    upstream = torch.zeros(positions, 1, d, device="cuda", dtype=torch.bfloat16)
    upstream[-len(last) :] = grad
    for ours, expected in zip(gradients(mixed, far, upstream), gradients(last, spans, grad), strict=True):
        assert_close([ours[-len(last) :]], [expected], tolerance=1e-2)
        assert (ours[: -len(last)] == 0).all()
