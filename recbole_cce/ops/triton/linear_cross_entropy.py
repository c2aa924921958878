"""CCE: what launches the kernels, as custom ops with gradients.

The forward pass also sums up the direction of the gradient of each hidden state, from the logits that it has anyway:
d loss_i / d h_i does not depend on other positions, so the backward pass only scales it. That leaves four products
and two exponentials for each position and item. The gradient of the table goes block of items by block of items, so
nothing is added by two programs at once: two runs are always bit-equal.
"""

import functools
from dataclasses import dataclass
from typing import Any, Optional

import torch
import triton

from recbole_cce.ops.derivatives import first_derivative
from recbole_cce.ops.triton.direction import scale_direction
from recbole_cce.ops.triton.full_kernels import full_combine_kernel, full_forward_kernel, full_weight_gradient_kernel
from recbole_cce.ops.triton.launch import (
    HOPPER_MEMORY,
    chip,
    custom_op,
    matrix_options,
    padded,
    precision,
)
from recbole_cce.ops.triton.negatives import NO_PADDING

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # before Triton 3.4
    TensorDescriptor = None

MAX_SPLITS = 64
PIPELINED = 1 if TensorDescriptor is None else 2  # stages of products in fp32: old compilers cannot pipeline them
NO_POSITION = 2.0**100  # log-sum-exp of a slot without a position: all probabilities are 0
SLOTS = 128  # sorted positions come in whole blocks of so many


@dataclass(frozen=True)
class Blocks:
    """Shape of a program: rows of the side that stays, rows of the other side at a time; programs that a processor
    holds; most registers of a thread, where it takes a limit for that."""

    stay: int
    stream: int
    num_warps: int
    num_stages: int
    programs: int = 1
    registers: int | None = None


def full_blocks(dim: int, itemsize: int, shared_memory: int, precision: str = "ieee") -> Blocks:
    """The first blocks, in order of preference, whose rows fit in shared memory and whose sums in registers.

    In the forward pass positions stay and items stream past them; in the gradient of the table it is the reverse.

    Args:
        dim: D.
        itemsize: bytes of a number in the products, 2 or 4.
        shared_memory: bytes a program can have.
        precision: of products in fp32. How many rows stay does not depend on it.
    """
    width = padded(dim)
    if itemsize == 4:  # operands in registers, too
        stay, stream = (64, 32) if width <= 128 else (32, 16) if width <= 256 else (16, 16)
        if precision == "tf32" and shared_memory >= HOPPER_MEMORY:  # but these in shared memory
            return Blocks(stay, stay, 8, PIPELINED)
        return Blocks(stay, stream, 8, 1)
    if width <= 128:
        # small programs hide each other's waiting, if three fit on a multiprocessor (each takes 1 KiB more)
        stream = 128 if width <= 64 else 64
        tiles = (64 + 3 * stream) * width * 2 + 64 * stream * 2
        if 3 * (tiles + 2**10) <= shared_memory + 2**10:
            return Blocks(64, stream, 4, 3, programs=3, registers=168)
    num_warps = 4 if width <= 64 else 8
    # registers of a thread for the sum [stay, width]: half of them before Hopper, where operands are in registers, too
    registers = 128 if shared_memory >= HOPPER_MEMORY else 64
    if width > 256 and TensorDescriptor is None:  # old compilers abort on more, whose warps share a row
        registers = 64
    for stay, stream, num_stages in FULL_OPTIONS:
        tiles = (stay + num_stages * stream) * width * 2 + stay * stream * 2
        if stay * width <= registers * 32 * num_warps and tiles <= shared_memory:
            return Blocks(stay, stream, num_warps, num_stages, 2 if width <= 64 else 1)
    return Blocks(32, 16, num_warps, 1)


FULL_OPTIONS = [  # rows that stay, that stream, stages
    (128, 64, 3), (128, 64, 2), (128, 32, 2), (64, 64, 3), (64, 32, 3), (64, 32, 2), (32, 32, 3), (32, 32, 2),
]  # fmt: skip


def num_splits(blocks: int, processors: int, most: int) -> int:
    """Into how many equal parts to split the work of each block so that all processors have some until the end.

    Args:
        blocks: programs without a split.
        processors: programs that run at a time.
        most: the largest number that memory allows.
    """
    most = max(1, min(most, MAX_SPLITS, -(-8 * processors // blocks)))
    # waves of programs, each a 1 / splits of a block's work, and what starting and adding up a split costs
    return min(range(1, most + 1), key=lambda splits: -(-blocks * splits // processors) / splits * (1 + splits / 64))


def descriptor(matrix: torch.Tensor, rows: int, dtype: torch.dtype) -> Any:
    """What the chip needs to fetch blocks of so many whole rows by itself; None if it cannot: before Hopper, or where
    rows are not aligned or have another dtype than the products. Rows past the end are zero."""
    if (
        TensorDescriptor is None
        or matrix.dtype != dtype
        or dtype.itemsize != 2
        or matrix.stride(1) != 1
        or matrix.stride(0) * 2 % 16
    ):
        return None
    if chip(matrix.device).capability < (9, 0) or matrix.data_ptr() % 16:
        return None
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), [rows, padded(matrix.size(1))])


def linear_cross_entropy(
    input: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    padding_idx: int | None,
    rounding: torch.dtype | None,
) -> torch.Tensor:
    """[N] losses, zero where target == padding_idx; see ops.linear_cross_entropy."""
    dtype = rounding or torch.promote_types(input.dtype, weight.dtype)
    hidden, table = input.detach(), weight.detach()
    if dtype.itemsize == 2:  # rows are read many times: rounded once, they are half as long
        hidden, table = hidden.to(dtype), table.to(dtype)
    with_direction = torch.is_grad_enabled() and input.requires_grad
    return forward(input, weight, hidden, table, target, padding_idx, dtype, with_direction)[0]


@custom_op("linear_cross_entropy")
def forward(
    input: torch.Tensor,
    weight: torch.Tensor,
    hidden: torch.Tensor,
    table: torch.Tensor,
    target: torch.Tensor,
    padding_idx: Optional[int],
    dtype: torch.dtype,
    with_direction: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Both passes' softmax, and the directions of the gradients of the hidden states.

    Args:
        input, weight: [N, D] and [V+1, D], what has gradients.
        hidden, table: the same, the numbers to read.

    Returns:
        loss: [N].
        lse, slope: [S], of each slot in the order of the targets, log-sum-exp and d loss / d target logit. Without
            tensor cores lse is fp64: rounded, it would be the largest error of a peaked softmax.
        order, bounds: see sort_positions().
        direction: [N, D], d loss_i / d input_i, or [0].
        residual: [N, D], what a direction of 16 bits left out, or [0].
    """
    n, dim = hidden.shape
    num_rows = len(table)
    blocks = full_blocks(dim, dtype.itemsize, chip(hidden.device).shared_memory, precision())
    order, bounds = sort_positions(target, padding_idx, num_rows, blocks.stay)
    loss = torch.zeros(n, dtype=torch.float32, device=hidden.device)  # [N]
    lse = torch.full((len(order),), NO_POSITION, dtype=lse_dtype(dtype), device=hidden.device)  # [S]
    slope = torch.empty(len(order), dtype=torch.float32, device=hidden.device)  # [S]
    direction, residual = (
        torch.zeros(shape, dtype=input.dtype, device=hidden.device) for shape in direction_shapes(input, with_direction)
    )
    if n == 0:
        return loss, lse, slope, order, bounds, direction, residual
    programs = triton.cdiv(n, blocks.stay)
    # The parts of a split are gone before the gradient of the table needs as much memory as they may take.
    part_bytes = 4 * n * (2 + dim * with_direction)
    splits = num_splits(
        programs,
        chip(hidden.device).processors * blocks.programs,
        min(num_rows * dim * weight.itemsize // part_bytes, triton.cdiv(num_rows, 4 * blocks.stream)),
    )
    split_rows = triton.cdiv(triton.cdiv(num_rows, blocks.stream), splits) * blocks.stream
    parts = [
        torch.empty(splits, *shape, dtype=torch.float32, device=hidden.device) if splits > 1 else None
        for shape in ((n,), (n,), (n, dim) if with_direction else (0,))
    ]
    options = {
        "loss_ptr": loss,
        "lse_ptr": lse,
        "slope_ptr": slope,
        "direction_ptr": direction,
        "residual_ptr": residual if residual.numel() else None,
        "part_ref_ptr": parts[0],
        "part_mass_ptr": parts[1],
        "part_sum_ptr": parts[2],
        "n": n,
        "DIRECTION": with_direction,
        **common_options(hidden, table, target, order, bounds, dtype),
    }
    # which cannot leave out a row in the middle
    desc = descriptor(table, blocks.stream, dtype) if padding_idx in (None, 0) else None
    launch = functools.partial(
        full_forward_kernel[(programs, splits)],
        **options,
        w_desc=desc,
        num_rows=num_rows,
        padding_idx=NO_PADDING if padding_idx is None else padding_idx,
        split_rows=split_rows,
        BM=blocks.stay,
        BV=blocks.stream,
        PRECISION=precision(),
        SPLIT=splits > 1,
        TMA=desc is not None,
        num_warps=blocks.num_warps,
        num_stages=blocks.num_stages,
        maxnreg=blocks.registers,
    )
    online = dtype == torch.float16
    launch(ONLINE=online, AGAIN=False)
    if not online:
        launch(ONLINE=True, AGAIN=True)
    if splits > 1:
        full_combine_kernel[(triton.cdiv(n, 16),)](**options, num_splits=splits, BM=16, num_warps=4)
    return loss, lse, slope, order, bounds, direction, residual


@forward.register_fake
def _(
    input: torch.Tensor,
    weight: torch.Tensor,
    hidden: torch.Tensor,
    table: torch.Tensor,
    target: torch.Tensor,
    padding_idx: int | None,
    dtype: torch.dtype,
    with_direction: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    n, dim = hidden.shape
    loss = hidden.new_empty(n, dtype=torch.float32)  # [N]
    lse = hidden.new_empty(num_slots(n), dtype=lse_dtype(dtype))  # [S]
    slope = hidden.new_empty(num_slots(n), dtype=torch.float32)  # [S]
    block = full_blocks(dim, dtype.itemsize, chip(hidden.device).shared_memory).stay
    order = hidden.new_empty(num_slots(n), dtype=torch.int32)  # [S]
    bounds = hidden.new_empty(num_bounds(len(table), block), dtype=torch.int32)
    direction, residual = (
        hidden.new_empty(shape, dtype=input.dtype) for shape in direction_shapes(input, with_direction)
    )
    return loss, lse, slope, order, bounds, direction, residual


def lse_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of the log-sum-exps, where products are of `dtype`."""
    return torch.float64 if dtype == torch.float32 else torch.float32


def direction_shapes(input: torch.Tensor, with_direction: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of direction and residual."""
    return input.shape if with_direction else (0,), input.shape if with_direction and input.itemsize == 2 else (0,)


@custom_op("linear_cross_entropy_weight_gradient")
def weight_gradient(
    grad: torch.Tensor,
    hidden: torch.Tensor,
    table: torch.Tensor,
    target: torch.Tensor,
    lse: torch.Tensor,
    slope: torch.Tensor,
    order: torch.Tensor,
    bounds: torch.Tensor,
    padding_idx: Optional[int],
    dtype: torch.dtype,
    weight_dtype: torch.dtype,
    spare: int,
) -> torch.Tensor:
    """d loss / d weight [V+1, D], given `grad` [N] = d loss / d loss_i. `spare`: bytes that it may take on top."""
    n, dim = hidden.shape
    if n == 0:
        return torch.zeros(table.shape, dtype=weight_dtype, device=table.device)
    blocks = full_blocks(dim, dtype.itemsize, chip(hidden.device).shared_memory, precision())
    programs = triton.cdiv(len(table), blocks.stay)
    bytes_each = 4 * table.numel()
    # the first split is written to the gradient itself if that is fp32
    most = spare // bytes_each + (weight_dtype == torch.float32)
    most = min(most, triton.cdiv(n, 4 * blocks.stream))
    splits = num_splits(programs, chip(hidden.device).processors * blocks.programs, most)
    # with one split the bytes to spare hold sorted hidden states
    gather = splits > 1 or spare < hidden.nbytes
    desc = lse_desc = None
    if not gather:
        hidden = hidden.index_select(0, order)
        desc = descriptor(hidden, blocks.stream, dtype)
        lse_desc = None if desc is None else TensorDescriptor(lse, list(lse.shape), [1], [blocks.stream])
    sum_dtype = weight_dtype if splits == 1 else torch.float32
    grad_weight = torch.empty(table.shape, dtype=sum_dtype, device=table.device)  # [V+1, D]
    parts = None
    if splits > 1:
        parts = torch.empty(splits - 1, *table.shape, dtype=torch.float32, device=table.device)  # [splits-1, V+1, D]
    uniform = n == 1 or grad.stride(0) == 0
    full_weight_gradient_kernel[(programs, splits)](
        grad_ptr=grad,
        unit_ptr=None if uniform else grad.abs().amax().float().clamp(min=torch.finfo(torch.float32).tiny),
        lse_ptr=lse,
        slope_ptr=slope,
        grad_w_ptr=grad_weight,
        part_ptr=parts,
        num_rows=len(table),
        padding_idx=NO_PADDING if padding_idx is None else padding_idx,
        stride_grad=grad.stride(0),
        **common_options(hidden, table, target, order, bounds, dtype),
        BN=blocks.stream,
        BV=blocks.stay,
        PRECISION=precision(),
        UNIFORM=uniform,
        SPLIT=splits > 1,
        GATHER=gather,
        h_desc=desc,
        lse_desc=lse_desc,
        TMA=desc is not None,
        num_warps=blocks.num_warps,
        num_stages=blocks.num_stages
        + 2 * (gather and blocks.num_stages > 1),  # the order is loaded as far ahead of the rows
        maxnreg=blocks.registers,
    )
    for part in () if parts is None else parts:
        grad_weight += part
    return grad_weight.to(weight_dtype)


@weight_gradient.register_fake
def _(grad: torch.Tensor, hidden: torch.Tensor, table: torch.Tensor, *options: Any) -> torch.Tensor:
    *_, weight_dtype, _ = options
    return table.new_empty(table.shape, dtype=weight_dtype)


def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    """Keep what the gradients need; the direction becomes the gradient of the input in its own memory."""
    input, weight, hidden, table, target, ctx.padding_idx, ctx.dtype, _ = inputs
    _, *rest, direction, residual = output
    ctx.directions = direction, residual
    ctx.input_dtype, ctx.weight_dtype = input.dtype, weight.dtype
    ctx.mark_non_differentiable(*rest, direction, residual)
    ctx.set_materialize_grads(False)  # torch would fill an [N, D] tensor with zeros for the direction
    ctx.save_for_backward(hidden, table, target, *rest)


@first_derivative
def backward(ctx: Any, grad: torch.Tensor, *_: Any) -> tuple:
    """Scale the directions; sum up the rows of the table, when the residual's memory is free again."""
    hidden, table, target, *rest = ctx.saved_tensors
    grad_input = grad_weight = None
    if ctx.needs_input_grad[0]:
        if ctx.directions is None:  # a second backward pass through the same graph
            like = hidden.new_empty(hidden.shape, dtype=ctx.input_dtype), table.new_empty(0, dtype=ctx.weight_dtype)
            ctx.directions = forward(*like, hidden, table, target, ctx.padding_idx, ctx.dtype, True)[-2:]
        grad_input, residual = ctx.directions
        ctx.directions = None
        scale_direction(grad_input, grad, None, residual if residual.numel() else None)
        del residual
    if ctx.needs_input_grad[1]:
        # where nothing had to be copied to be rounded, parts of the sum may take as much memory as 16-bit copies
        spare = sum(
            2 * numbers.numel()
            for numbers, dtype in ((hidden, ctx.input_dtype), (table, ctx.weight_dtype))
            if numbers.dtype == dtype
        )
        grad_weight = weight_gradient(
            grad, hidden, table, target, *rest, ctx.padding_idx, ctx.dtype, ctx.weight_dtype, spare
        )
    return grad_input, grad_weight, *[None] * 6


forward.register_autograd(backward, setup_context=setup_context)


def num_bounds(num_rows: int, block: int) -> int:
    """How many bounds sort_positions() returns."""
    return -(-num_rows // block) + 2


def sort_positions(
    target: torch.Tensor, padding_idx: int | None, num_rows: int, block: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The positions in the order of their targets [S], and bounds in it. Nothing waits for the device.

    Ignored positions come last and are replaced by the first of all: whatever is in their rows is never read. So are
    the slots up to S, the next multiple of SLOTS. Bounds: how many positions are not ignored and, after that number,
    where the targets in each block of rows begin and the last one ends.
    """
    last = torch.iinfo(torch.int32).max
    key = target if padding_idx is None else target.masked_fill(target == padding_idx, last)
    key, order = key.int().sort(stable=True)  # [N] each
    edges = torch.arange(-1, num_bounds(num_rows, block) - 1, dtype=torch.int32, device=target.device) * block
    edges[:1] = num_rows
    bounds = torch.searchsorted(key, edges, out_int32=True)
    slots = order.new_zeros(num_slots(len(target)), dtype=torch.int32)  # [S]
    slots[: len(target)] = order
    counted = torch.arange(len(slots), dtype=torch.int32, device=slots.device) < bounds[0]
    return slots.where(counted, slots[:1]), bounds


def num_slots(n: int) -> int:
    """Of n sorted positions, up to a multiple of SLOTS."""
    return -(-n // SLOTS) * SLOTS


def common_options(
    hidden: torch.Tensor,
    table: torch.Tensor,
    target: torch.Tensor,
    order: torch.Tensor,
    bounds: torch.Tensor,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """Arguments that all kernels take."""
    return {
        "h_ptr": hidden,
        "w_ptr": table,
        "y_ptr": target,
        "order_ptr": order,
        "bound_ptr": bounds,
        "stride_y": target.stride(0),
        **matrix_options(hidden, table, dtype),
    }
