"""SCE: what launches the kernels, as custom ops with gradients.

Selection and loss are two ops, of which only the second has gradients. The backward pass takes each position's winning
bucket only: winners of a bucket are listed, and losers cost nothing.
"""

from typing import Any, Optional

import torch
import triton

from recbole_cce.ops.derivatives import first_derivative
from recbole_cce.ops.triton import bucket_kernels
from recbole_cce.ops.triton.launch import BUFFER_ELEMENTS, chip, custom_op, matrix_options, padded, precision
from recbole_cce.ops.triton.negatives import NO_PADDING
from recbole_cce.ops.triton.scalable_blocks import bucket_blocks
from recbole_cce.ops.triton.selection import top_rows


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


@custom_op("bucket_cross_entropy")
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
    """See results()."""
    n = len(input)
    loss, covered, target_logit, best, peak = results(input, positions, dtype)
    if n == 0:
        return loss, covered, target_logit, best, peak
    common = common_options(input, table, target, dtype)
    bucket_kernels.target_logit_kernel[(triton.cdiv(n, 16),)](
        **common,
        target_logit_ptr=target_logit,
        best_ptr=best,
        n=n,
        padding_idx=NO_PADDING if padding_idx is None else padding_idx,
        BM=16,
        num_warps=4,
    )
    blocks = bucket_blocks(
        input.size(1), dtype.itemsize, table.dtype.itemsize, chip(input.device).shared_memory, "loss"
    )
    blocks_per_bucket = triton.cdiv(positions.size(1), blocks.stay)
    if positions.numel() > 0:
        bucket_kernels.bucket_loss_kernel[(len(positions) * blocks_per_bucket,)](
            **common,
            position_ptr=positions,
            item_ptr=items,
            target_logit_ptr=target_logit,
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
    return loss, covered, target_logit, best, peak


@forward.register_fake
def _(
    input: torch.Tensor,
    weight: torch.Tensor,
    table: torch.Tensor,
    target: torch.Tensor,
    positions: torch.Tensor,
    *options: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    return results(input, positions, dtype=options[-1])


def results(
    input: torch.Tensor, positions: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Memory for loss, covered, target_logit, best and peak; see bucket_loss_kernel()."""
    loss, target_logit = (input.new_empty(len(input), dtype=torch.float32) for _ in range(2))  # [N] each
    covered = input.new_empty(len(input), dtype=torch.bool)  # [N]
    best = input.new_empty(len(input), dtype=torch.int64)  # [N]
    # of exact softmax denominators: only products of fp32 are exact enough to need them
    peak_shape = (*positions.shape, 2) if dtype == torch.float32 else 0
    peak = input.new_empty(peak_shape, dtype=torch.float32)  # [B, X, 2] or [0]
    return loss, covered, target_logit, best, peak


@custom_op("bucket_cross_entropy_gradients")
def gradients(
    grad: torch.Tensor,
    input: torch.Tensor,
    weight: torch.Tensor,
    table: torch.Tensor,
    target: torch.Tensor,
    positions: torch.Tensor,
    items: torch.Tensor,
    loss: torch.Tensor,
    target_logit: torch.Tensor,
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
        "target_logit_ptr": target_logit,
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
        blocks = bucket_blocks(dim, dtype.itemsize, table.dtype.itemsize, chip(input.device).shared_memory, "input")
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
    blocks = bucket_blocks(dim, dtype.itemsize, item_itemsize, chip(grad_weight.device).shared_memory, "weight")
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
    grad: torch.Tensor, input: torch.Tensor, weight: torch.Tensor, *options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    *_, input_needed, weight_needed = options
    return input.new_empty(input.shape if input_needed else 0), weight.new_empty(weight.shape if weight_needed else 0)


def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    """Keep what the gradients need."""
    *tensors, _, ctx.dtype = inputs
    loss, *rest = output
    ctx.mark_non_differentiable(*rest)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, loss, *rest[1:])


@first_derivative
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
