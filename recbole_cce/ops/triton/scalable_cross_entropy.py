"""SCE: what launches the kernels, as custom ops with gradients.

Selection and loss are two ops, of which only the second has gradients. The backward pass takes each position's winning
bucket only: winners of a bucket are listed, and losers cost nothing.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Optional

import torch
import triton

from recbole_cce.ops.triton import bucket_kernels, selection_kernels
from recbole_cce.ops.triton.launch import matrix_options, padded, precision, shared_memory
from recbole_cce.ops.triton.linear_cross_entropy import num_processors
from recbole_cce.ops.triton.negatives import NO_PADDING

BUFFER_ELEMENTS = 2**23  # fp32 numbers, or keys of twice the size, that are held at a time
SPACING = 8  # one row in so many is in the sample
DEVIATIONS = 5.0  # by which the sample may be wrong before a direction has to scan the table
SPARE = 4  # keys that a direction has memory for, in units of what it selects
MIN_CAPACITY = 4096


@dataclass(frozen=True)
class Blocks:
    """Shape of a program: rows of the side that stays, rows of the other side at a time."""

    stay: int
    stream: int
    warps: int
    stages: int


def score_blocks(dim: int, itemsize: int, table_itemsize: int, shared_memory: int) -> Blocks:
    """Rows of a table that stay, directions that stream past them: the first blocks that fit in shared memory.

    Args:
        dim: D.
        itemsize: bytes of a number in the products, 2 or 4.
        table_itemsize: bytes of a number of the table.
        shared_memory: bytes a program can have.
    """
    width = padded(dim)
    if itemsize == 4:
        return exact_blocks(width, shared_memory)
    options = [Blocks(64, 32, 4, 2), Blocks(32, 32, 4, 1)]
    if table_itemsize == 2 and width > 64:
        options = [Blocks(128, 32, 8, 2), *options]
    return first_that_fits(options, lambda b: (b.stay + b.stages * b.stream) * width * 2 + b.stay * 128, shared_memory)


def bucket_blocks(dim: int, itemsize: int, item_itemsize: int, shared_memory: int, kernel: str) -> Blocks:
    """The first blocks that fit in shared memory.

    Args:
        dim, itemsize, shared_memory: as for score_blocks().
        item_itemsize: bytes of a number of the table that items are gathered from.
        kernel: "loss" or "input": positions stay, items stream past them. "weight": the reverse.
    """
    width = padded(dim)
    if itemsize == 4:
        return exact_blocks(width, shared_memory)
    if width <= 64:  # small programs hide each other's waiting
        options = [Blocks(64, 64, 4, 3), Blocks(64, 32, 4, 2)]
    elif kernel == "loss":
        options = [Blocks(128, 64, 8, 1), Blocks(64, 32, 4, 2), Blocks(32, 32, 4, 1)]
    elif width > 256:  # the sum [stay, width] must fit in registers
        options = [Blocks(32, 32, 8, 2), Blocks(32, 16, 8, 1)]
    elif kernel == "input":
        options = [Blocks(64, 32, 4, 3), Blocks(64, 32, 4, 2), Blocks(32, 32, 4, 1)]
    else:
        options = [Blocks(32, 32, 4, 3), Blocks(32, 32, 4, 1)]
        if item_itemsize == 2:
            options = [Blocks(64, 32, 4, 3), *options]

    def memory(b: Blocks) -> int:
        # what streams waits in 16 bits, and before in fp32; probabilities
        waiting = 2 + 4 * (b.stages > 1) if item_itemsize == 4 or kernel == "weight" else 2 * b.stages
        used = b.stay * width * 2 + b.stream * width * waiting + b.stay * b.stream * 2
        # the gradient of the table goes through memory on its way out, when nothing else is there
        return max(used, b.stay * width * 4) if kernel == "weight" else used

    return first_that_fits(options, memory, shared_memory)


def exact_blocks(width: int, shared_memory: int) -> Blocks:
    """Blocks of products in fp32: without tensor cores they take their operands through registers, so small tiles."""
    options = [Blocks(32, 32, 4, 1), Blocks(16, 16, 4 if width <= 256 else 8, 1)]
    return first_that_fits(options[width > 256 :], lambda b: 4 * b.stay * width * 4, shared_memory)


def first_that_fits(options: list[Blocks], memory: Callable[[Blocks], int], shared_memory: int) -> Blocks:
    """The first of `options` that takes no more than `shared_memory`, else the last."""
    return next((blocks for blocks in options if memory(blocks) + 2**10 <= shared_memory), options[-1])


def scalable_cross_entropy(
    input: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    directions: torch.Tensor,
    bucket_size_x: int,
    bucket_size_y: int,
    padding_idx: int | None,
    rounding: torch.dtype | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """[N] losses, zero where not covered, and [N] bool covered; see ops.scalable_cross_entropy.

    A table that is rounded as it is read is so once where buckets take as many rows as there are.
    """
    dtype = rounding or torch.promote_types(input.dtype, weight.dtype)
    hidden, table = input.detach(), weight.detach()
    if len(directions) * bucket_size_y >= len(table):
        table = table.to(dtype)
    directions = directions.to(dtype)
    positions = top_rows(directions, hidden, target if padding_idx is not None else None, bucket_size_x, padding_idx)
    items = top_rows(directions, table, None, bucket_size_y, padding_idx)
    return bucket_cross_entropy(input, weight, target, positions, items, padding_idx, rounding, table)


@torch.library.custom_op("recbole_cce::top_rows", mutates_args=())
def top_rows(
    directions: torch.Tensor, table: torch.Tensor, target: Optional[torch.Tensor], k: int, padding_idx: Optional[int]
) -> torch.Tensor:
    """[B, k] int32, ascending: the rows of `table` with the largest inner products with each of `directions` [B, D].

    Of equal ones the lowest rows; products are of numbers in the dtype of `directions`. Left out are, with `target`,
    rows whose target is padding_idx, else row padding_idx; -1, which comes first, stands for what is missing then.
    """
    num_rows = len(table)
    rows = torch.empty(len(directions), k, dtype=torch.int32, device=table.device)
    if rows.numel() == 0:
        return rows
    if num_rows == 0:
        return rows.fill_(-1)
    itemsizes = directions.dtype.itemsize, table.dtype.itemsize
    blocks = score_blocks(table.size(1), *itemsizes, shared_memory(table.device))
    # of each block of the sample there is one score or more
    capacity = min(num_rows, max(MIN_CAPACITY, SPARE * k, triton.cdiv(num_rows, SPACING * blocks.stay)))
    step = max(1, min(len(directions), BUFFER_ELEMENTS // capacity))
    keys = torch.empty(step, capacity, dtype=torch.int64, device=table.device)
    bound = count = None
    if capacity < num_rows:
        bound = torch.empty(step, dtype=torch.float32, device=table.device)
        # of directions up to the end of a block, those beyond the last one full
        counters = triton.cdiv(step, blocks.stream) * blocks.stream, selection_kernels.COUNTER.value
        count = torch.full(counters, 2**30, dtype=torch.int32, device=table.device)
    for chunk, out in zip(directions.contiguous().split(step), rows.split(step), strict=True):
        select_rows(chunk, table, target, k, padding_idx, blocks, keys, bound, count, out)
    return rows.sort(dim=1).values


def select_rows(
    directions: torch.Tensor,
    table: torch.Tensor,
    target: torch.Tensor | None,
    k: int,
    padding_idx: int | None,
    blocks: Blocks,
    keys: torch.Tensor,
    bound: torch.Tensor | None,
    count: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """Write to `out` [B, k]. `keys` [.., capacity], `bound` and `count` [..] are memory for at least B directions; the
    latter two are None where all keys have room."""
    num_rows, capacity = len(table), keys.size(1)
    dtype = directions.dtype
    matrix = matrix_options(directions, table, dtype)
    common = {
        "direction_ptr": directions,
        "table_ptr": table,
        "y_ptr": target,
        "key_ptr": keys,
        "num_rows": num_rows,
        "padding_idx": NO_PADDING if padding_idx is None else padding_idx,
        "capacity": capacity,
        "stride_tn": matrix["stride_wn"],
        "stride_td": matrix["stride_wd"],
        "stride_y": 0 if target is None else target.stride(0),
        **{name: matrix[name] for name in ("D", "BD", "DTYPE")},
    }

    def score(mode: str, programs: int, group: int = 1, **options: Any) -> None:
        # a small table is scored by several programs a block, each for some directions
        parts = triton.cdiv(4 * num_processors(table.device), programs)
        each = triton.cdiv(triton.cdiv(len(directions), parts), blocks.stream) * blocks.stream
        selection_kernels.score_kernel[(programs, triton.cdiv(len(directions), each))](
            **{**common, **options},
            bound_ptr=bound,
            count_ptr=count,
            num_directions=len(directions),
            directions_each=each,
            num_samples=triton.cdiv(num_rows, SPACING),
            spacing=SPACING,
            BM=blocks.stay,
            BN=blocks.stream,
            GROUP=group,
            PRECISION=precision(),
            MODE=mode,
            ASSEMBLY=table.is_cuda,
            num_warps=blocks.warps,
            num_stages=blocks.stages,
        )

    block = min(2**12, triton.next_power_of_2(capacity))
    if bound is None:
        score("all", triton.cdiv(num_rows, blocks.stay))
    else:
        programs, group = sampling(num_rows, capacity, blocks.stay)
        rank = keys.view(torch.int32)
        score("sample", programs, group, key_ptr=rank)
        selection_kernels.bound_kernel[(len(directions),)](
            rank_ptr=rank,
            bound_ptr=bound,
            count_ptr=count,
            count=programs * (blocks.stay // group),
            capacity=capacity,
            place=place_of_bound(k),
            BLOCK=block,
            num_warps=max(1, block // 512),
        )
        score("reach", triton.cdiv(num_rows, blocks.stay))
    selection_kernels.select_kernel[(len(directions),)](
        **common,
        bound_ptr=bound,
        count_ptr=count,
        out_ptr=out,
        k=k,
        BR=16 if table.size(1) > 256 else 32,
        BLOCK=block,
        num_warps=max(1, block // 512),
    )


def sampling(num_rows: int, capacity: int, block: int) -> tuple[int, int]:
    """Blocks of sampled rows, and rows of a block that share a score, so that all scores have room."""
    programs = triton.cdiv(triton.cdiv(num_rows, SPACING), block)
    group = 1
    while programs * (block // group) > capacity:
        group *= 2
    return programs, group


def place_of_bound(k: int) -> int:
    """How many sampled rows should reach a bound that k of all rows must: k / SPACING, and DEVIATIONS of them more."""
    return math.ceil(((DEVIATIONS + math.sqrt(DEVIATIONS**2 + 4 * k / SPACING)) / 2) ** 2)


@top_rows.register_fake
def _(
    directions: torch.Tensor, table: torch.Tensor, target: torch.Tensor | None, k: int, padding_idx: int | None
) -> torch.Tensor:
    return table.new_empty(len(directions), k, dtype=torch.int32)


def bucket_cross_entropy(
    input: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    positions: torch.Tensor,
    items: torch.Tensor,
    padding_idx: int | None,
    rounding: torch.dtype | None,
    table: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest loss of each position over the buckets that hold it.

    Args:
        input, weight, target: [N, D], [V+1, D], [N].
        positions: [B, X] int32, each at most once in a bucket and none whose target is padding_idx; -1 is none.
        items: [B, Y] int32; -1 is none.
        table: `weight`, or its numbers rounded already, to read rows from.

    Returns:
        loss [N], 0 at positions in no bucket, and covered [N] bool.
    """
    dtype = rounding or torch.promote_types(input.dtype, weight.dtype)
    table = weight.detach() if table is None else table
    return forward(input, weight, table, target, positions, items, padding_idx, dtype)[:2]


@torch.library.custom_op("recbole_cce::bucket_cross_entropy", mutates_args=())
def forward(
    input: torch.Tensor,
    weight: torch.Tensor,
    table: torch.Tensor,
    target: torch.Tensor,
    positions: torch.Tensor,
    items: torch.Tensor,
    padding_idx: Optional[int],
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """loss [N]; covered [N] bool; own [N], logits of the targets; best [N] and peak, see bucket_loss_kernel()."""
    n = len(input)
    loss, own = (torch.empty(n, dtype=torch.float32, device=input.device) for _ in range(2))
    best = torch.empty(n, dtype=torch.int64, device=input.device)
    covered = torch.empty(n, dtype=torch.bool, device=input.device)
    peak = torch.empty(peak_shape(positions, dtype), dtype=torch.float32, device=input.device)
    if n == 0:
        return loss, covered, own, best, peak
    common = common_options(input, table, target, dtype)
    bucket_kernels.own_logit_kernel[(triton.cdiv(n, 16),)](
        **common,
        own_ptr=own,
        best_ptr=best,
        n=n,
        padding_idx=NO_PADDING if padding_idx is None else padding_idx,
        BM=16,
        num_warps=4,
    )
    blocks = bucket_blocks(input.size(1), dtype.itemsize, table.dtype.itemsize, shared_memory(input.device), "loss")
    blocks_per_bucket = triton.cdiv(positions.size(1), blocks.stay)
    if positions.numel() > 0:
        bucket_kernels.bucket_loss_kernel[(len(positions) * blocks_per_bucket,)](
            **common,
            position_ptr=positions,
            item_ptr=items,
            own_ptr=own,
            best_ptr=best,
            peak_ptr=peak if peak.numel() else None,
            size_x=positions.size(1),
            size_y=items.size(1),
            blocks_per_bucket=blocks_per_bucket,
            BM=blocks.stay,
            BN=blocks.stream,
            PRECISION=precision(),
            num_warps=blocks.warps,
            num_stages=blocks.stages,
        )
    bucket_kernels.largest_loss_kernel[(triton.cdiv(n, 1024),)](
        best_ptr=best, loss_ptr=loss, covered_ptr=covered, n=n, BLOCK=1024
    )
    return loss, covered, own, best, peak


@forward.register_fake
def _(
    input: torch.Tensor,
    weight: torch.Tensor,
    table: torch.Tensor,
    target: torch.Tensor,
    positions: torch.Tensor,
    items: torch.Tensor,
    padding_idx: int | None,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    dtypes = (torch.float32, torch.bool, torch.float32, torch.int64)
    of_positions = (input.new_empty(len(input), dtype=of) for of in dtypes)
    return *of_positions, input.new_empty(peak_shape(positions, dtype), dtype=torch.float32)


def peak_shape(positions: torch.Tensor, dtype: torch.dtype) -> tuple[int, ...]:
    """Of exact softmax denominators: only products of fp32 are exact enough to need them."""
    return (*positions.shape, 2) if dtype == torch.float32 else (0,)


@torch.library.custom_op("recbole_cce::bucket_cross_entropy_gradients", mutates_args=())
def gradients(
    grad: torch.Tensor,
    input: torch.Tensor,
    weight: torch.Tensor,
    table: torch.Tensor,
    target: torch.Tensor,
    positions: torch.Tensor,
    items: torch.Tensor,
    loss: torch.Tensor,
    own: torch.Tensor,
    best: torch.Tensor,
    peak: torch.Tensor,
    dtype: torch.dtype,
    input_needed: bool,
    weight_needed: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """d loss / d input [N, D] and d loss / d weight [V+1, D], given `grad` [N] = d loss / d loss_i, or [0]."""
    grad_input = torch.empty(input.shape if input_needed else 0, dtype=input.dtype, device=input.device)
    # the sums are fp32: for an fp32 parameter this is its gradient, and no second one is made
    grad_weight = torch.zeros(weight.shape if weight_needed else 0, dtype=torch.float32, device=weight.device)
    if positions.numel() == 0:
        return grad_input.zero_(), grad_weight.to(weight.dtype)
    winners, winner_peak = torch.empty_like(positions), torch.empty_like(peak)
    with_peak = peak.numel() > 0
    count = torch.empty(len(positions), dtype=torch.int32, device=input.device)
    bucket_kernels.winner_kernel[(len(positions),)](
        position_ptr=positions,
        best_ptr=best,
        peak_ptr=peak if with_peak else None,
        winner_ptr=winners,
        winner_peak_ptr=winner_peak,
        count_ptr=count,
        size_x=positions.size(1),
        BLOCK=min(1024, padded(positions.size(1))),
    )
    common = {
        **common_options(input, table, target, dtype),
        "grad_ptr": grad,
        "stride_grad": grad.stride(0),
        "item_ptr": items,
        "winner_ptr": winners,
        "peak_ptr": winner_peak if with_peak else None,
        "count_ptr": count,
        "own_ptr": own,
        "best_ptr": best,
        "size_x": positions.size(1),
        "size_y": items.size(1),
        "PRECISION": precision(),
    }
    if input_needed:
        dim = input.size(1)
        bucket_kernels.uncovered_kernel[(triton.cdiv(len(input), 16),)](
            best_ptr=best, grad_h_ptr=grad_input, n=len(input), D=dim, BD=padded(dim), BM=16, num_warps=4
        )
        blocks = bucket_blocks(dim, dtype.itemsize, table.dtype.itemsize, shared_memory(input.device), "input")
        blocks_per_bucket = triton.cdiv(positions.size(1), blocks.stay)
        bucket_kernels.bucket_input_gradient_kernel[(len(positions) * blocks_per_bucket,)](
            **common,
            grad_h_ptr=grad_input,
            blocks_per_bucket=blocks_per_bucket,
            BM=blocks.stay,
            BN=blocks.stream,
            num_warps=blocks.warps,
            num_stages=blocks.stages,
        )
    if weight_needed:
        unit = grad.abs().amax().float().clamp(min=torch.finfo(torch.float32).tiny) if dtype == torch.float16 else None
        add_weight_gradient(grad_weight, {**common, "unit_ptr": unit}, target, items, loss, dtype)
    return grad_input, grad_weight.to(weight.dtype)


def add_weight_gradient(
    grad_weight: torch.Tensor,
    common: dict[str, Any],
    target: torch.Tensor,
    items: torch.Tensor,
    loss: torch.Tensor,
    dtype: torch.dtype,
) -> None:
    """Add what all winners give to the rows of their buckets' items and of their targets."""
    dim = grad_weight.size(1)
    deterministic = torch.are_deterministic_algorithms_enabled()
    item_itemsize = common["w_ptr"].dtype.itemsize
    blocks = bucket_blocks(dim, dtype.itemsize, item_itemsize, shared_memory(grad_weight.device), "weight")
    blocks_per_bucket = triton.cdiv(items.size(1), blocks.stay)
    # in a fixed order: shares of some buckets at a time, which index_put_ sorts by their rows
    step = max(1, BUFFER_ELEMENTS // (items.size(1) * dim)) if deterministic else len(items)
    for first in range(0, len(items), step):
        rows = items[first : first + step].flatten()
        shares = torch.empty(len(rows), dim, dtype=torch.float32, device=rows.device) if deterministic else grad_weight
        bucket_kernels.bucket_weight_gradient_kernel[(len(rows) // items.size(1) * blocks_per_bucket,)](
            **common,
            grad_w_ptr=shares,
            first_bucket=first,
            blocks_per_bucket=blocks_per_bucket,
            BM=blocks.stream,
            BN=blocks.stay,
            ATOMIC=not deterministic,
            num_warps=blocks.warps,
            num_stages=blocks.stages,
        )
        if deterministic:  # a slot without an item has no share, whatever row it counts for
            grad_weight.index_put_((rows.clamp(min=0).long(),), shares, accumulate=True)
    n, input, grad = len(loss), common["h_ptr"], common["grad_ptr"]
    if not deterministic:
        names = ("grad_ptr", "h_ptr", "y_ptr", "stride_grad", "stride_hn", "stride_hd", "stride_y", "D", "BD", "DTYPE")
        bucket_kernels.target_gradient_kernel[(triton.cdiv(n, 16),)](
            **{name: common[name] for name in names}, loss_ptr=loss, grad_w_ptr=grad_weight, n=n, BM=16, num_warps=4
        )
        return
    slope = ((-loss).expm1() * grad)[:, None]
    for rows in torch.arange(n, device=input.device).split(max(1, BUFFER_ELEMENTS // dim)):
        shares = torch.where(loss[rows, None] != 0, slope[rows] * input[rows].to(dtype).float(), 0)
        grad_weight.index_put_((target[rows],), shares, accumulate=True)


@gradients.register_fake
def _(
    grad: torch.Tensor,
    input: torch.Tensor,
    weight: torch.Tensor,
    table: torch.Tensor,
    target: torch.Tensor,
    positions: torch.Tensor,
    items: torch.Tensor,
    loss: torch.Tensor,
    own: torch.Tensor,
    best: torch.Tensor,
    peak: torch.Tensor,
    dtype: torch.dtype,
    input_needed: bool,
    weight_needed: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    return input.new_empty(input.shape if input_needed else 0), weight.new_empty(weight.shape if weight_needed else 0)


def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    """Keep what the gradients need."""
    *tensors, _, ctx.dtype = inputs
    loss, *rest = output
    ctx.mark_non_differentiable(*rest)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, loss, *rest[1:])


def backward(ctx: Any, grad: torch.Tensor, *_: Any) -> tuple:
    """The gradients of input and weight that are needed."""
    input_needed, weight_needed = ctx.needs_input_grad[:2]
    grad_input, grad_weight = gradients(grad, *ctx.saved_tensors, ctx.dtype, input_needed, weight_needed)
    return grad_input if input_needed else None, grad_weight if weight_needed else None, *[None] * 6


forward.register_autograd(backward, setup_context=setup_context)


def common_options(
    input: torch.Tensor, table: torch.Tensor, target: torch.Tensor, dtype: torch.dtype
) -> dict[str, Any]:
    """Arguments that all kernels of buckets take."""
    return {
        "h_ptr": input,
        "w_ptr": table,
        "y_ptr": target,
        "stride_y": target.stride(0),
        **matrix_options(input, table, dtype),
    }
