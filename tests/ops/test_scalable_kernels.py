"""The Triton kernels of SCE: exactly the rows that a whole sort selects, the formula within its error, every use.

On a GPU all combinations run. Without one, a few run in Triton's interpreter, and the kernels are compiled.
"""

from __future__ import annotations

import contextlib
import functools
from unittest import mock

import pytest
import torch

from recbole_cce import ops
from recbole_cce.ops.reference import scalable_cross_entropy as reference
from tests.ops import naive
from tests.ops.problems import check, deterministic_algorithms, problem
from tests.ops.test_sampled_kernels import DTYPES, assert_close, needs_gpu

SIZES = {"n_buckets": 6, "bucket_size_x": 40, "bucket_size_y": 30}


def memory_for(directions):
    """So many directions have memory at a time, each for 256 keys; None: as many as would have, for more keys."""
    from recbole_cce.ops.triton import selection

    if directions is None:
        return contextlib.nullcontext()
    return mock.patch.multiple(selection, MIN_CAPACITY=256, BUFFER_ELEMENTS=256 * directions)


def first_by_score(directions, table, candidates, k):
    """[B, k] rows with the largest scores in fp64, of equal ones the lowest, ascending; -1 for what is missing."""
    scores = directions.double() @ table.double().T
    scores[:, ~candidates] = -torch.inf
    ordered = scores.sort(dim=1, descending=True, stable=True)
    rows = ordered.indices.masked_fill(ordered.values == -torch.inf, -1)[:, :k]
    missing = rows.new_full((len(rows), k - rows.size(1)), -1)
    return torch.cat([rows, missing], dim=1).sort(dim=1).values


def check_selection(n_buckets, rows, d, k, dtype=torch.float32, with_target=True, device="cpu", at_a_time=None):
    """Small integers: products are exact in all dtypes, and equal ones are frequent."""
    from recbole_cce.ops.triton import selection

    generator = torch.Generator().manual_seed(0)
    directions, table = (torch.randint(-3, 4, (n, d), generator=generator).to(device, dtype) for n in (n_buckets, rows))
    target = torch.randint(0, 4, (rows,), generator=generator).to(device)
    candidates = target != 0 if with_target else torch.arange(rows, device=device) != 0
    with memory_for(at_a_time):
        ours = selection.top_rows(directions, table, target if with_target else None, k, 0)
    assert torch.equal(ours.long(), first_by_score(directions, table, candidates, k))


def check_sample_misleads(rows, k, d=32, better=False, device="cpu", at_a_time=None):
    """Rows in the sample score low: more keys than there is memory for reach the bound, and the table is scanned. Or
    high, and fewer than k do."""
    counts = []
    from recbole_cce.ops.triton import selection

    number = torch.arange(-(-rows // selection.SPACING))
    sampled = number * selection.SPACING + ((number * 2654435761) % 2**32 // 2**16) % selection.SPACING
    generator = torch.Generator().manual_seed(0)
    table = torch.randint(8, 16, (rows, d), generator=generator)
    table[sampled[sampled < rows]] += 16 if better else -16
    table = table.to(device, torch.float16)
    directions = torch.ones(3, d, device=device, dtype=torch.float16)
    directions[1] = torch.arange(d) % 5 - 2
    select_kernel = selection.selection_kernels.select_kernel

    def spy(grid, capacity, count_ptr, **options):
        counts.append(((count_ptr[:3, 0] < k) if better else (count_ptr[:3, 0] > capacity)).any())
        select_kernel[grid](capacity=capacity, count_ptr=count_ptr, **options)

    class Spy:
        def __getitem__(self, grid):
            return functools.partial(spy, grid)

    spied = mock.patch.object(selection.selection_kernels, "select_kernel", Spy())
    with spied, memory_for(at_a_time):
        ours = selection.top_rows(directions, table, None, k, None)
    assert counts == [True]
    everything = torch.ones(rows, dtype=torch.bool, device=device)
    assert torch.equal(ours.long(), first_by_score(directions, table, everything, k))


EXTREMES = {
    "all equal": (0.0, {}, [0, 1, 2, 3, 4]),
    "NaN here and there": (0.0, {7: torch.nan, 8: -torch.nan, -100: torch.nan}, [0, 1, 7, 8, -100]),
    "nothing but NaN": (torch.nan, {}, [0, 1, 2, 3, 4]),
    "infinite": (-torch.inf, {-90: torch.inf}, [0, 1, 2, 3, -90]),
}


def check_extreme_scores(case, rows=5000, device="cpu", at_a_time=None):
    """Rows of one number, but for some of another: which ones are selected, those below 0 counted from the end."""
    from recbole_cce.ops.triton import selection

    number, others, expected = EXTREMES[case]
    table = torch.full((rows, 16), number, device=device, dtype=torch.float16)
    for row, other in others.items():
        table[row] = other
    directions = torch.ones(2, 16, device=device, dtype=torch.float16)
    with memory_for(at_a_time):
        selected = selection.top_rows(directions, table, None, 5, None)
    assert selected.tolist() == [[row % rows for row in expected]] * 2


def check_few_candidates(rows=5000, device="cpu", at_a_time=None):
    """None, and fewer than are to be selected, all with scores of minus infinity."""
    from recbole_cce.ops.triton import selection

    table = torch.full((rows, 16), -torch.inf, device=device, dtype=torch.float16)
    directions = torch.ones(2, 16, device=device, dtype=torch.float16)

    target = torch.zeros(rows, dtype=torch.int64, device=device)
    for candidates in ([], [70, rows - 1]):
        target[candidates] = 3
        with memory_for(at_a_time):
            selected = selection.top_rows(directions, table, target, 5, 0)
        assert selected.tolist() == [[-1] * (5 - len(candidates)) + candidates] * 2


def check_buckets(
    n=60, v=90, d=20, n_buckets=6, size_x=25, size_y=31, dtype=torch.float32, padding_idx=0, empty=3,
    deterministic=False, **kwargs
):  # fmt: skip
    """The losses of given buckets, some of whose slots are empty, at the error budget of the formula in the same dtype.

    The formula is written for the CPU, pair by pair.
    """
    from recbole_cce.ops.triton import scalable_cross_entropy as kernels

    hidden, weight, target = problem(n, v, d, dtype=dtype, padding_idx=padding_idx, **kwargs)
    generator = torch.Generator().manual_seed(1)
    valid = (torch.ones(n) if padding_idx is None else (target != padding_idx).cpu()).nonzero().squeeze(1)
    real = torch.tensor([row for row in range(len(weight)) if row != padding_idx])
    positions, items = (
        torch.stack([rows[torch.randperm(len(rows), generator=generator)[:size]] for _ in range(n_buckets)])
        for rows, size in ((valid, size_x), (real, size_y))
    )
    # where rounding decides which of two buckets has the larger loss, the gradients are those of either
    exact = naive.bucket_losses(hidden.cpu().double(), weight.cpu().double(), target.cpu(), positions, items)
    largest = [sorted(losses, reverse=True)[:2] for losses in exact]
    close = torch.tensor([len(two) == 2 and bool(1e-12 < (two[0] - two[1]) / (1 + two[0]) < 1e-5) for two in largest])
    positions = positions.masked_fill(close[positions], -1)
    assert close.float().mean() < 0.5
    none = torch.full((n_buckets, empty), -1)
    slots = [torch.cat([none, rows], dim=1).int().to(hidden.device) for rows in (positions, items)]
    covered = None

    def ours(h, w):
        nonlocal covered
        loss, covered = kernels.bucket_cross_entropy(h, w, target, *slots, padding_idx, None)
        return loss

    def truth(h, w):
        return naive.scalable(h.cpu(), w.cpu(), target.cpu(), positions, items)[0].to(h.device)

    with deterministic_algorithms(deterministic):
        check(ours, truth, hidden, weight, target, padding_idx)
    expected = torch.zeros(n, dtype=torch.bool)
    expected[positions[positions >= 0]] = True
    assert torch.equal(covered.cpu(), expected)


def call(hidden, weight, target, seed=5, **kwargs):
    generator = None if seed is None else torch.Generator(hidden.device).manual_seed(seed)
    options = {**SIZES, "generator": generator, "backend": "triton", **kwargs}
    return ops.scalable_cross_entropy(hidden, weight, target, **options)


def gradients(hidden, weight, target, factor=1.0, **kwargs):
    hidden, weight = hidden.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()
    loss = call(hidden, weight, target, **kwargs)
    (factor * loss).sum().backward()
    return loss.detach(), hidden.grad, weight.grad


REDUCTIONS = [  # those of a mean's upstream gradient, of others, and of none
    ("mean", 1.0), ("mean", 3.0), ("mean", 0.0), ("sum", 1.0), ("sum", 3.0), ("none", 1.0), ("none", None),
]  # fmt: skip


def check_reduction(reduction, factor, n, device="cpu", **kwargs):
    """The same buckets and numbers as the torch backend, with an upstream gradient `factor`; None: one for each row."""
    args = problem(n=n, device=device)
    options = {"reduction": reduction, "factor": torch.rand(n, device=device) if factor is None else factor, **kwargs}
    assert_close(gradients(*args, **options), gradients(*args, **options, backend="torch"))


def check_coverage(n, device="cpu", **kwargs):
    """The same positions as with the torch backend, some of them all."""
    args = problem(n=n, device=device)
    _, ours = call(*args, return_coverage=True, **kwargs)
    _, truth = call(*args, return_coverage=True, backend="torch", **kwargs)
    assert torch.equal(ours, truth) and ours.any() and not ours.all()


def check_published(n, v, d, size_x, size_y, device="cpu", **kwargs):
    """Inputs without padding, and the same directions: the loss and gradients of the published algorithm."""
    hidden, weight, target = problem(n, v, d, ignored=0, device=device, **kwargs)
    target = target.clamp(min=1)
    generator = torch.Generator(device).manual_seed(5)
    directions = reference.random_directions(hidden, weight, target, 12, False, 0, generator)
    results = []
    for loss in (
        lambda h, w: call(h, w, target, n_buckets=12, bucket_size_x=size_x, bucket_size_y=size_y),
        lambda h, w: naive.published_scalable(h, w, target, directions, size_x, size_y),
    ):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        value = loss(h, w)
        value.backward()
        results.append((value.detach(), h.grad, w.grad))
    assert_close(*results)


def check_more_than_there_is(device="cpu"):
    """Fewer positions than a bucket takes, fewer items; rows that are no numbers, ignored and counted ones."""
    hidden, weight, target = problem(n=30, v=9, device=device)
    every = {"n_buckets": 2, "bucket_size_x": 10_000, "bucket_size_y": 10_000}
    loss, covered = call(hidden, weight, target, reduction="none", return_coverage=True, **every)
    full = naive.linear(hidden, weight, target)  # every position against the whole catalogue
    torch.testing.assert_close(loss, torch.where(target != 0, full, 0))
    assert torch.equal(covered, target != 0)
    expected = gradients(hidden, weight, target, mix_x=True, **every)
    hidden[target == 0] = torch.nan
    assert_close(gradients(hidden, weight, target, mix_x=True, **every), expected)
    hidden[(target != 0).nonzero()[7]] = torch.nan
    assert call(hidden, weight, target, reduction="none", **every).isnan().sum() == 1


def check_no_position(auto, device="cpu"):
    """None at all, and none that counts."""
    sizes = dict.fromkeys(SIZES, "auto") if auto else SIZES
    hidden, weight, target = problem(n=30, device=device)
    for args in ((hidden[:0], weight, target[:0]), (hidden, weight, torch.zeros_like(target))):
        loss, grad_hidden, grad_weight = gradients(*args, **sizes)
        assert loss == 0 and grad_hidden.shape == args[0].shape
        assert (grad_hidden == 0).all() and (grad_weight == 0).all()


def check_compiled(n, device="cpu", backend="inductor"):
    """A compiled model around the loss gives what the model gives, without a graph break."""
    hidden, weight, target = problem(n=n, device=device)

    def step(h, w):
        return call(torch.tanh(h), w, target, seed=None, bucket_size_x=n, bucket_size_y=53) * 2

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend=backend)):
        torch.manual_seed(0)
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        loss = function(h, w)
        loss.backward()
        results.append((loss.detach(), h.grad, w.grad))
    assert_close(results[1], results[0])


# Without a GPU


SELECTIONS = {  # buckets, rows, D, k
    "few of many": (5, 300, 12, 7),
    "more than there are": (3, 50, 12, 60),
    "blocks of directions": (35, 330, 16, 9, torch.float16),
}
BUCKETS = {
    "fp32": {},
    "fp16": {"dtype": torch.float16, "padding_idx": 5},
    "three items": {"n": 20, "v": 3, "size_x": 16, "size_y": 3, "padding_idx": None, "empty": 0},
    "probabilities of 0 and 1": {"scale": 6.0},
}


@pytest.mark.parametrize("case", SELECTIONS)
@pytest.mark.parametrize("with_target", [True, False], ids=["positions", "items"])
def test_selection_in_the_interpreter(interpreter, with_target, case):
    interpreter(check_selection, *SELECTIONS[case], with_target=with_target)


@pytest.mark.parametrize(("directions", "k", "at_a_time"), [(12, 50, 10), (35, 9, 40)])
def test_selection_by_a_sample_in_the_interpreter(interpreter, directions, k, at_a_time):
    """Directions in parts, and in two blocks."""
    interpreter(check_selection, directions, 400, 12, k, at_a_time=at_a_time)


@pytest.mark.parametrize(("k", "better"), [(9, False), (60, True)])
def test_sample_misleads_in_the_interpreter(interpreter, k, better):
    interpreter(check_sample_misleads, 1000, k, better=better, at_a_time=10)


@pytest.mark.parametrize("case", EXTREMES)
def test_extreme_scores_in_the_interpreter(interpreter, case):
    interpreter(check_extreme_scores, case, rows=500, at_a_time=10)


def test_few_candidates_in_the_interpreter(interpreter):
    interpreter(check_few_candidates, rows=500, at_a_time=10)


@pytest.mark.parametrize("case", BUCKETS)
@pytest.mark.parametrize("deterministic", [False, True], ids=["fast", "deterministic"])
def test_buckets_in_the_interpreter(interpreter, deterministic, case):
    interpreter(check_buckets, deterministic=deterministic, **BUCKETS[case])


@pytest.mark.parametrize(("reduction", "factor"), REDUCTIONS)
def test_reductions_in_the_interpreter(interpreter, reduction, factor):
    interpreter(check_reduction, reduction, factor, n=150)


@pytest.mark.parametrize("mix_x", [False, True])
def test_coverage_in_the_interpreter(interpreter, mix_x):
    interpreter(check_reduction, "mean", 1.0, n=150, mix_x=mix_x)
    interpreter(check_coverage, 150, mix_x=mix_x)


def test_published_in_the_interpreter(interpreter):
    interpreter(check_published, 150, 90, 20, 40, 30)


def test_more_than_there_is_in_the_interpreter(interpreter):
    interpreter(check_more_than_there_is)


@pytest.mark.parametrize("auto", [False, True], ids=["", "auto"])
def test_no_position_in_the_interpreter(interpreter, auto):
    interpreter(check_no_position, auto)


def test_compiled_in_the_interpreter(interpreter):
    interpreter(check_compiled, 60, backend="aot_eager")


def test_sample_fits_in_memory():
    """Each group of sampled rows has memory for its key, and there are enough groups for a bound."""
    pytest.importorskip("triton")
    from recbole_cce.ops.triton import selection

    for k in (1, 5, 256, 882, 5000):
        least = max(selection.MIN_CAPACITY, selection.SPARE * k)
        for rows in (least + 1, 3 * least, 100_000, 1_600_000, 2**31 - 1):
            for block in (16, 64, 128):
                capacity = max(selection.MIN_CAPACITY, selection.SPARE * k, -(-rows // (selection.SPACING * block)))
                if rows > capacity:
                    programs, group = selection.sampling(rows, capacity, block)
                    groups = programs * (block // group)
                    assert group <= block and programs * block * selection.SPACING >= rows
                    assert selection.number_reaching(k) <= groups <= capacity


# On a GPU


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_target", [True, False], ids=["positions", "items"])
@pytest.mark.parametrize(
    ("n_buckets", "rows", "d", "k"),
    [(1, 1, 8, 1), (5, 300, 24, 300), (3, 50, 12, 60), (70, 5000, 64, 9), (129, 60_000, 256, 882), (33, 9000, 512, 1)],
)
def test_selection(n_buckets, rows, d, k, dtype, with_target):
    check_selection(n_buckets, rows, d, k, dtype, with_target, device="cuda")


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_selection_of_real_numbers(dtype):
    """Rows in the order of fp64 scores, but for those within the rounding of a sum in fp32."""
    from recbole_cce.ops.triton import selection

    generator = torch.Generator("cuda").manual_seed(0)
    directions, table = (torch.randn(n, 128, generator=generator, device="cuda").to(dtype) for n in (100, 200_000))
    ours = selection.top_rows(directions, table, None, 500, None).long()
    assert (ours.diff(dim=1) > 0).all() and (ours >= 0).all()
    scores = directions.double() @ table.double().T
    assert (scores.gather(1, ours) >= scores.topk(500).values[:, -1:] - 1e-4).all()


@needs_gpu
@pytest.mark.parametrize(
    ("rows", "k", "better"), [(20_000, 9, False), (200_000, 700, False), (20_000, 200, True), (200_000, 700, True)]
)
def test_sample_misleads(rows, k, better):
    check_sample_misleads(rows, k, better=better, device="cuda")


@needs_gpu
@pytest.mark.parametrize("case", EXTREMES)
def test_extreme_scores(case):
    check_extreme_scores(case, device="cuda")


@needs_gpu
def test_few_candidates():
    check_few_candidates(device="cuda")


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [0.05, 1.0, 6.0], ids=["flat", "peaked", "certain"])
@pytest.mark.parametrize("d", [8, 24, 64, 100, 128, 256, 512])
@pytest.mark.parametrize("deterministic", [False, True], ids=["fast", "deterministic"])
def test_buckets(dtype, scale, d, deterministic):
    check_buckets(
        n=250, v=300, d=d, n_buckets=7, size_x=150, size_y=130, dtype=dtype, scale=scale / d**0.25,
        deterministic=deterministic, device="cuda",
    )  # fmt: skip


@needs_gpu
@pytest.mark.parametrize("padding_idx", [0, 1, None])
@pytest.mark.parametrize(("n", "v", "size_x", "size_y"), [(1, 1, 1, 1), (37, 2, 20, 2), (129, 700, 1, 600)])
def test_sizes(n, v, size_x, size_y, padding_idx):
    for dtype in (torch.float32, torch.bfloat16):
        check_buckets(
            n=n, v=v, size_x=size_x, size_y=size_y, dtype=dtype, padding_idx=padding_idx, ignored=0.2 * (n > 1),
            device="cuda",
        )  # fmt: skip


@needs_gpu
@pytest.mark.parametrize("mix_x", [False, True])
@pytest.mark.parametrize(("reduction", "factor"), REDUCTIONS)
def test_reductions(reduction, factor, mix_x):
    check_reduction(reduction, factor, n=400, device="cuda", mix_x=mix_x)


@needs_gpu
@pytest.mark.parametrize("mix_x", [False, True])
def test_coverage(mix_x):
    check_coverage(400, device="cuda", mix_x=mix_x)


@needs_gpu
def test_published():
    check_published(3000, 20_000, 64, 200, 300, device="cuda", scale=64**-0.25)


@needs_gpu
def test_more_than_there_is():
    check_more_than_there_is(device="cuda")


@needs_gpu
@pytest.mark.parametrize("auto", [False, True], ids=["", "auto"])
def test_no_position(auto):
    check_no_position(auto, device="cuda")


@needs_gpu
def test_strides():
    hidden, weight, target = problem(n=300, device="cuda")
    wide = torch.zeros(300, 24, device="cuda")
    wide[:, ::2] = hidden
    tall = weight.T.contiguous().T
    assert call(wide[:, ::2], tall, target.repeat_interleave(2)[::2]) == call(hidden, weight, target)


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_deterministic_runs_are_bit_equal(dtype):
    args = problem(n=9000, v=5000, d=64, dtype=dtype, device="cuda")
    sizes = {"n_buckets": 70, "bucket_size_x": 300, "bucket_size_y": 260}
    with deterministic_algorithms():
        one, two = (gradients(*args, **sizes) for _ in range(2))
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a, b)
    assert_close(gradients(*args, **sizes), one)


@needs_gpu
@pytest.mark.parametrize("d", [64, 256, 512])
def test_autocast_rounds_rows_and_keeps_gradients_in_fp32(d):
    hidden, weight, target = problem(n=300, d=d, scale=(64 / d) ** 0.25, device="cuda")
    with torch.autocast("cuda", dtype=torch.bfloat16):
        ours = gradients(hidden, weight, target)
        truth = gradients(hidden, weight, target, backend="torch")
    assert [tensor.dtype for tensor in ours] == [torch.float32] * 3
    assert_close(ours[:1], truth[:1])
    assert_close(ours, truth, tolerance=5e-3)  # probabilities are rounded to bf16 before the products


@needs_gpu
def test_second_backward_and_checkpoint():
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


@needs_gpu
def test_compiled_without_graph_break():
    """Inductor draws other directions, so all positions and items are in each bucket."""
    check_compiled(300, device="cuda")


@needs_gpu
@pytest.mark.parametrize("mix_x", [False, True])
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_captured_in_a_graph(mix_x, backend):
    """Nothing waits for the device, and each replay draws other directions, those of torch's generator."""
    hidden, weight, target = problem(n=3000, device="cuda")
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()

    def step():
        h.grad = w.grad = None
        loss, covered = call(h, w, target, seed=None, mix_x=mix_x, backend=backend, return_coverage=True)
        loss.backward()
        return loss, covered

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    h.grad = w.grad = None
    with torch.cuda.graph(graph, stream=side):
        loss, covered = step()
    torch.cuda.current_stream().wait_stream(side)  # which the capture sets the random seed on
    found = []
    for seed in (1, 2):
        torch.cuda.manual_seed(seed)
        graph.replay()
        captured = loss.detach().clone(), h.grad.clone(), w.grad.clone()
        torch.cuda.manual_seed(seed)
        assert_close(captured, gradients(hidden, weight, target, seed=None, mix_x=mix_x, backend=backend))
        found.append(covered.clone())
    assert not torch.equal(*found)


@needs_gpu
def test_table_beyond_32_bits():
    """V * D > 2^31: items at the far end of the table are selected, read and written."""
    v, d = 2**31 // 256 + 10_000, 256
    weight = torch.zeros(v + 1, d, device="cuda", dtype=torch.bfloat16)
    weight[-20_000:].normal_()
    hidden = torch.randn(640, d, device="cuda", dtype=torch.bfloat16) / 16
    target = torch.arange(v - 639, v + 1, device="cuda")
    far = weight[-20_001:].clone()
    far[0] = 0
    weight.requires_grad_()
    sizes = {"n_buckets": 9, "bucket_size_x": 200, "bucket_size_y": 300, "reduction": "none"}
    loss = call(hidden, weight, target, **sizes)
    loss.sum().backward()
    # the same from the last rows alone: items nearest to a direction are never the zero vectors before them
    expected, _, grad_far = gradients(hidden, far, target - (v + 1 - len(far)), **sizes)
    assert_close([loss.detach()], [expected])
    assert_close([weight.grad[-20_000:].float()], [grad_far[1:].float()], tolerance=5e-3)
    assert (weight.grad[:-20_000] == 0).all()
