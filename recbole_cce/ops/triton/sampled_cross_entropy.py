"""CCE- and BCE: what launches the kernels, as custom ops with gradients.

The forward pass also computes the direction of the gradient of each hidden state: d loss_i / d h_i does not depend on
other positions, so the backward pass only scales it, and never gathers the negatives' vectors for it. For a mean, whose
upstream gradient is 1 / rows more often than not, the direction is kept in this unit, and nothing is left to be scaled.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, Optional

import torch
import triton

from recbole_cce.ops.derivatives import first_derivative
from recbole_cce.ops.negatives import Popularity, num_groups
from recbole_cce.ops.reference.sampled_cross_entropy import Draws
from recbole_cce.ops.triton.direction import scale_direction
from recbole_cce.ops.triton.launch import (
    BUFFER_ELEMENTS,
    HOPPER_MEMORY,
    chip,
    custom_op,
    matrix_options,
    padded,
    precision,
)
from recbole_cce.ops.triton.negatives import NO_PADDING
from recbole_cce.ops.triton.per_position_kernels import (
    pair_kernel,
    per_position_forward_kernel,
    row_weight_gradient_kernel,
)
from recbole_cce.ops.triton.tile_kernels import tile_forward_kernel, tile_weight_gradient_kernel


@dataclass(frozen=True)
class Blocks:
    """Shape of a program of the tile kernels."""

    positions: int
    negatives: int
    num_warps: int
    num_stages: int
    halves: bool = False


ROOM = 15 / 16  # of a chip's shared memory is planned with: another Triton may take some more


def tile_bytes(blocks: Blocks, width: int, itemsize: int) -> int:
    """Bytes of shared memory that the tile kernels take at most on chips that multiply out of registers.

    Rows arrive in fp32; as halves they are used in 16 bits before the others come. Products in fp32 have one of their
    sides there twice.
    """
    rows = blocks.positions + blocks.negatives
    if itemsize == 4:
        rows += max(blocks.positions, blocks.negatives)
    return rows * width * (2 if blocks.halves and itemsize == 2 else 4)


def tile_blocks(depth: int, dim: int, itemsize: int, shared_memory: int, gradient: bool = False) -> Blocks:
    """The first blocks, in order of preference, whose tiles fit in shared memory and do not spill registers.

    Args:
        depth: positions that share a draw.
        dim: D.
        itemsize: bytes of a number in the products, 2 or 4.
        shared_memory: bytes a program can have.
        gradient: of the kernel that computes the gradient of the table.
    """
    width = padded(dim)
    if itemsize == 2 and shared_memory >= HOPPER_MEMORY:
        blocks = hopper_blocks(width, shared_memory, gradient)
    else:
        options = register_blocks(width, itemsize, gradient)
        memory = ROOM * shared_memory
        blocks = next((option for option in options if tile_bytes(option, width, itemsize) <= memory), options[-1])
    return replace(blocks, positions=min(blocks.positions, padded(depth)))


def register_blocks(width: int, itemsize: int, gradient: bool) -> list[Blocks]:
    """Blocks where operands and sums of products are in registers: before Hopper, on consumer chips, and in fp32."""
    if itemsize == 4:
        if width <= 64:
            return [Blocks(32, 32, 8, 1)]
        return [Blocks(32, 16, 8, 1)] if width <= 128 else [Blocks(16, 16, 8, 1, gradient and width > 256)]
    if width <= 64:
        return [Blocks(128, 64, 4, 1) if gradient else Blocks(64, 32, 4, 1)]
    if width <= 256:
        return [Blocks(128 if width <= 128 else 64, 64, 8, 1, True) if gradient else Blocks(64, 32, 8, 2)]
    return [Blocks(32, 32, 8, 1, True)] if gradient else [Blocks(32, 16, 8, 1), Blocks(16, 16, 8, 1)]


def hopper_blocks(width: int, shared_memory: int, gradient: bool) -> Blocks:
    """Blocks of 16-bit products where these read shared memory."""
    if width <= (256 if gradient else 64):
        # small programs hide each other's waiting, if two or more fit on a multiprocessor (each takes 1 KiB more)
        positions, halves = (128, width > 128) if gradient else (64, False)
        # hidden states, and by turns vectors in 16 bits, probabilities and what a product takes on its way to memory
        tiles = positions * width * 2 + 64 * max(width * (2 if halves else 4), positions * 2)
        if 2 * (tiles + 2**10) <= shared_memory + 2**10:
            return Blocks(positions, 64, 4, 1, halves)
    for positions, negatives, stages in ((128, 64, 3), (128, 32, 3), (128, 64, 2), (128, 32, 2), (64, 32, 2)):
        # the accumulator [positions, width] must fit in 128 registers a thread
        if positions * width > 128 * 256:
            continue
        # hidden states, vectors as they arrive (fp32), vectors in 16 bits, and what is drawn
        tiles = positions * width * 2 + negatives * width * (4 * (stages - 1) + 2) + 2**11
        if gradient:  # probabilities
            tiles += positions * negatives * 2
        if tiles <= shared_memory:
            break
    else:
        positions, negatives, stages = 32, 16, 1
    # halves save registers
    return Blocks(positions, negatives, 8, stages, (width, negatives, stages) == (256, 64, 3))


def sampled_cross_entropy(
    input: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    draws: Draws,
    number: torch.Tensor | None,
    positive_weight: float | None = None,
) -> torch.Tensor:
    """[N] losses, zero where target == padding_idx; see ops.sampled_cross_entropy. `number`: of rows of a mean.

    With a `positive_weight` those of ops.sampled_binary_cross_entropy.
    """
    seed = draws.seed
    if not isinstance(seed, torch.Tensor):
        seed = torch.full((), seed, dtype=torch.int64, device=input.device)
    popularity = isinstance(draws.sampler, Popularity)
    # fp16 could not hold a direction in units of 1 / rows
    unit = None if number is None or input.dtype == torch.float16 else 1.0 / number
    return forward(
        input,
        weight,
        target,
        seed,
        draws.sampler.table if popularity else None,
        draws.sampler.log_probability if popularity else None,
        unit,
        draws.num_negatives,
        draws.sharing,
        draws.logq_correction,
        positive_weight,
        draws.padding_idx,
        draws.rounding or torch.promote_types(input.dtype, weight.dtype),
        torch.is_grad_enabled() and input.requires_grad,
    )[0]


@custom_op("sampled_cross_entropy")
def forward(
    input: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    seed: torch.Tensor,
    table: Optional[torch.Tensor],
    log_probability: Optional[torch.Tensor],
    unit: Optional[torch.Tensor],
    num_negatives: int,
    sharing: str,
    logq_correction: bool,
    positive_weight: Optional[float],
    padding_idx: Optional[int],
    dtype: torch.dtype,
    with_direction: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """See results(). A direction is in units of 1 / `unit`; BCE leaves the log-sum-exp as it is."""
    n, dim = input.shape
    loss, lse, slope, direction = results(input, with_direction)
    if n == 0:
        return loss, lse, slope, direction
    kernel_options = {
        "h_ptr": input,
        "w_ptr": weight,
        "y_ptr": target,
        "seed_ptr": seed,
        "table_ptr": table,
        "loss_ptr": loss,
        "lse_ptr": lse,
        "slope_ptr": slope,
        "direction_ptr": direction,
        "unit_ptr": unit,
        "positive_weight": positive_weight or 0.0,
        "stride_y": target.stride(0),
        "DIRECTION": with_direction,
        **common_options(
            input, weight, log_probability, num_negatives, logq_correction, positive_weight, padding_idx, dtype
        ),
    }
    if sharing == "none":
        draws, num_warps = per_position_blocks(dim)
        per_position_forward_kernel[(n,)](**kernel_options, BK=draws, num_warps=num_warps, num_stages=3)
    else:
        options, programs = tile_options(n, dim, sharing, dtype, input.device)
        tile_forward_kernel[(programs,)](**kernel_options, **options)
    return loss, lse, slope, direction


@forward.register_fake
def _(input: torch.Tensor, *options: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    return results(input, with_direction=options[-1])


def results(input: torch.Tensor, with_direction: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Memory for loss, log-sum-exp, slope = d loss / d target logit, and direction = d loss_i / d input_i."""
    loss, lse, slope = (input.new_empty(len(input), dtype=torch.float32) for _ in range(3))  # [N] each
    direction = input.new_empty(input.shape if with_direction else 0)  # [N, D] or [0]
    return loss, lse, slope, direction


@custom_op("sampled_cross_entropy_weight_gradient")
def weight_gradient(
    grad: torch.Tensor,
    input: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    seed: torch.Tensor,
    table: Optional[torch.Tensor],
    log_probability: Optional[torch.Tensor],
    lse: torch.Tensor,
    slope: torch.Tensor,
    num_negatives: int,
    sharing: str,
    logq_correction: bool,
    positive_weight: Optional[float],
    padding_idx: Optional[int],
    dtype: torch.dtype,
) -> torch.Tensor:
    """d loss / d weight [V+1, D], given `grad` [N] = d loss / d loss_i."""
    n, dim = input.shape
    if n == 0:
        return torch.zeros_like(weight)
    deterministic = torch.are_deterministic_algorithms_enabled()
    drawing = {
        "y_ptr": target,
        "seed_ptr": seed,
        "table_ptr": table,
        "stride_y": target.stride(0),
    }
    common = {
        "grad_ptr": grad,
        "h_ptr": input,
        "w_ptr": weight,
        "lse_ptr": lse,
        "slope_ptr": slope,
        "stride_grad": grad.stride(0),
        **common_options(
            input, weight, log_probability, num_negatives, logq_correction, positive_weight, padding_idx, dtype
        ),
    }
    # the sums are fp32: for an fp32 parameter this is its gradient, and no second one is made
    if sharing == "none":
        grad_weight = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
        per_position_weight_gradient(grad_weight, n, drawing, common, deterministic)
    else:
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        options, programs = tile_options(n, dim, sharing, dtype, input.device, gradient=True)
        unit = grad.abs().amax().clamp(min=torch.finfo(torch.float32).tiny) if dtype == torch.float16 else None
        options |= {"unit_ptr": unit, **drawing, **common}
        if not deterministic:
            tile_weight_gradient_kernel[(programs,)](
                **options, grad_w_ptr=grad_weight, row_ptr=None, first_program=0, ATOMIC=True
            )
        else:
            tile_weight_gradient_in_order(grad_weight, programs, options)
            target_slope = (slope * grad)[:, None]
            for rows in torch.arange(n, device=input.device).split(max(1, BUFFER_ELEMENTS // dim)):
                shares = target_slope[rows] * input[rows].to(dtype).float()
                if padding_idx is not None:
                    shares.masked_fill_((target[rows] == padding_idx)[:, None], 0)
                grad_weight.index_put_((target[rows],), shares, accumulate=True)
    return grad_weight.to(weight.dtype)


def tile_weight_gradient_in_order(grad_weight: torch.Tensor, programs: int, options: dict[str, Any]) -> None:
    """Add the negatives' shares in a fixed order: index_put_ sorts them where algorithms must be deterministic."""
    num_negatives, dim = options["num_negatives"], grad_weight.size(1)
    step = max(1, BUFFER_ELEMENTS // (num_negatives * dim))
    for first in range(0, programs, step):
        count = min(step, programs - first)
        shares = torch.empty(count * num_negatives, dim, dtype=torch.float32, device=grad_weight.device)  # [.., D]
        rows = torch.empty(count * num_negatives, dtype=torch.int64, device=grad_weight.device)  # of the shares
        tile_weight_gradient_kernel[(count,)](
            **options, grad_w_ptr=shares, row_ptr=rows, first_program=first, ATOMIC=False
        )
        grad_weight.index_put_((rows,), shares, accumulate=True)


def per_position_weight_gradient(
    grad_weight: torch.Tensor, n: int, drawing: dict[str, Any], common: dict[str, Any], deterministic: bool
) -> None:
    """Sort the pairs of position and row by row, some positions at a time, and let one program sum up each row.

    Atomics on [V+1, D] would cost several times as much: a row comes up K N / V times, each time elsewhere.
    """
    num_rows, dim = grad_weight.shape
    num_negatives = common["num_negatives"]
    drawing |= {name: common[name] for name in ("num_negatives", "num_items", "padding_idx", "POPULARITY")}
    options = {name: value for name, value in common.items() if name != "num_items"}
    block, num_warps = row_blocks(dim)
    # enough for long runs, while the hidden states of these positions stay in the L2 cache
    pairs = min(max(32 * num_rows, 2**23), 2**26)
    step = min(n, max(1, pairs // (num_negatives + 1)))
    buffer = torch.empty(step * (num_negatives + 1), dtype=torch.int32, device=grad_weight.device)
    for first in range(0, n, step):
        last = min(n, first + step)
        pairs = (last - first) * (num_negatives + 1)
        drawing |= {"first": first, "last": last, "BLOCK": 1024}
        programs = (triton.cdiv(pairs, 1024),)
        order = buffer[:pairs]
        if deterministic:
            pair_kernel[programs](**drawing, out_ptr=order, order_ptr=None, MODE="rows")
            rows, index = order.sort(stable=True)
            start = torch.arange(num_rows + 1, dtype=torch.int32, device=rows.device)
            start = torch.searchsorted(rows, start, out_int32=True)
            position = index // (num_negatives + 1)
            order = torch.where(index % (num_negatives + 1) == num_negatives, ~position, position).int()
        else:
            start = torch.zeros(num_rows + 1, dtype=torch.int32, device=order.device)
            pair_kernel[programs](**drawing, out_ptr=start, order_ptr=None, MODE="count")
            start.cumsum_(0)  # where each row ends; sorting the pairs turns that into where it starts
            pair_kernel[programs](**drawing, out_ptr=start, order_ptr=order, MODE="sort")
        row_weight_gradient_kernel[(num_rows,)](
            **options,
            order_ptr=order,
            start_ptr=start,
            grad_w_ptr=grad_weight,
            first=first,
            BP=block,
            ADD=first > 0,
            num_warps=num_warps,
        )


@weight_gradient.register_fake
def _(grad: torch.Tensor, input: torch.Tensor, weight: torch.Tensor, *options: Any) -> torch.Tensor:
    return weight.new_empty(weight.shape)


def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    """Keep what the gradients need; the direction becomes the gradient of the input in its own memory."""
    *tensors, num_negatives, sharing, logq_correction, positive_weight, padding_idx, dtype, _ = inputs
    ctx.options = (num_negatives, sharing, logq_correction, positive_weight, padding_idx, dtype)
    _, lse, slope, ctx.direction = output
    ctx.mark_non_differentiable(lse, slope, ctx.direction)
    ctx.set_materialize_grads(False)  # torch would fill an [N, D] tensor with zeros for the direction
    ctx.save_for_backward(*tensors, lse, slope)


@first_derivative
def backward(ctx: Any, grad: torch.Tensor, *_: Any) -> tuple:
    """Scale the directions; sum up the rows of the table."""
    *tensors, unit, lse, slope = ctx.saved_tensors
    grad_input = grad_weight = None
    if ctx.needs_input_grad[0]:
        if ctx.direction is None:  # a second backward pass through the same graph
            ctx.direction = forward(*tensors, unit, *ctx.options, True)[3]
        grad_input, ctx.direction = ctx.direction, None
        scale_direction(grad_input, grad, unit, None)
    if ctx.needs_input_grad[1]:
        grad_weight = weight_gradient(grad, *tensors, lse, slope, *ctx.options)
    return grad_input, grad_weight, *[None] * 12


forward.register_autograd(backward, setup_context=setup_context)


def common_options(
    input: torch.Tensor,
    weight: torch.Tensor,
    log_probability: torch.Tensor | None,
    num_negatives: int,
    logq_correction: bool,
    positive_weight: float | None,
    padding_idx: int | None,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """Arguments of the kernels that compute logits."""
    num_items = len(weight) - (padding_idx is not None)
    popularity = log_probability is not None
    return {
        "log_q_ptr": log_probability,
        "num_negatives": num_negatives,
        "num_items": num_items,
        "padding_idx": NO_PADDING if padding_idx is None else padding_idx,
        "log_k": math.log2(num_negatives) - (0 if popularity else math.log2(num_items)),
        **matrix_options(input, weight, dtype),
        "POPULARITY": popularity,
        "CORRECT": logq_correction,
        "BINARY": positive_weight is not None,
    }


def tile_options(
    n: int, dim: int, sharing: str, dtype: torch.dtype, device: torch.device, gradient: bool = False
) -> tuple[dict[str, Any], int]:
    """Arguments that the tile kernels share, and the number of programs."""
    groups = num_groups(n, sharing)
    depth = triton.cdiv(n, groups)
    blocks = tile_blocks(depth, dim, dtype.itemsize, chip(device).shared_memory, gradient)
    blocks_per_group = triton.cdiv(depth, blocks.positions)
    return {
        "n": n,
        "num_groups": groups,
        "blocks_per_group": blocks_per_group,
        "BM": blocks.positions,
        "BK": blocks.negatives,
        "HALVES": blocks.halves,
        "PRECISION": precision(),
        "num_warps": blocks.num_warps,
        "num_stages": blocks.num_stages,
    }, groups * blocks_per_group


def per_position_blocks(dim: int) -> tuple[int, int]:
    """Draws at a time and warps of the kernel of negatives per position."""
    width = padded(dim)
    draws = max(16, min(64, 4096 // width))
    return draws, max(1, draws * width // 1024)


def row_blocks(dim: int) -> tuple[int, int]:
    """Positions at a time and warps of the kernel that sums up a row of the table."""
    return 16, max(1, padded(dim) // 128)
