"""Packed attention: what launches its kernels, as custom ops with gradients.

One launch for the output and one for all gradients: a training step on short sequences is many small launches. Nothing
is added by two programs at once, so that two runs are always bit-equal.
"""

import math
from typing import Any, NamedTuple, Optional

import torch
import triton

from recbole_cce.ops.derivatives import first_derivative
from recbole_cce.ops.triton.launch import DTYPES, custom_op, padded, precision
from recbole_cce.ops.triton.packed_kernels import packed_backward_kernel, packed_forward_kernel


class Blocks(NamedTuple):
    """Shape of a program: positions that stay, and that stream past them at a time."""

    stay: int
    stream: int
    num_warps: int


# Triton 3.6, told to load a block ahead, has one buffer for it, and on Hopper fills that while products still read it.
NUM_STAGES = 1


def packed_blocks(dim: int, itemsize: int) -> Blocks:
    """The largest blocks whose sums stay in registers in both passes; they fit in any chip's shared memory.

    Args:
        dim: d.
        itemsize: bytes of a number in the products, 2 or 4.
    """
    width = padded(dim)
    if itemsize == 4:  # products without tensor cores take their operands through registers
        return Blocks(32, 32, 4 if width <= 32 else 8) if width <= 64 else Blocks(16, 16, 8)
    return Blocks(64, 32, 4) if width <= 128 else Blocks(32, 32, 8)


def packed_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    spans: torch.Tensor,
    dropout_p: float,
    seed: int | torch.Tensor | None,
) -> torch.Tensor:
    """[P, H, d]; see ops.packed_attention. `seed`: None without dropout."""
    if seed is not None and not isinstance(seed, torch.Tensor):
        seed = torch.full((), seed, dtype=torch.int64, device=query.device)
    query, key, value = (part if part.stride(-1) == 1 else part.contiguous() for part in (query, key, value))
    return forward(query, key, value, spans.contiguous(), seed, dropout_p)[0]


@custom_op("packed_attention")
def forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    spans: torch.Tensor,
    seed: Optional[torch.Tensor],
    dropout_p: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [P, H, d]; log-sum-exp of the logits [H, P], in units of log 2."""
    positions, heads, dim = query.shape
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)  # [P, H, d]
    lse = torch.empty(heads, positions, dtype=torch.float32, device=query.device)  # [H, P]
    if out.numel() == 0:
        return out, lse
    blocks = packed_blocks(dim, query.itemsize)
    packed_forward_kernel[(triton.cdiv(positions, blocks.stay), heads)](
        out_ptr=out,
        lse_ptr=lse,
        BM=blocks.stay,
        BN=blocks.stream,
        num_warps=blocks.num_warps,
        num_stages=NUM_STAGES,
        **common_options(query, key, value, spans, seed, dropout_p),
    )
    return out, lse


@forward.register_fake
def _(query: torch.Tensor, *options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    positions, heads, _ = query.shape
    return query.new_empty(query.shape), query.new_empty(heads, positions, dtype=torch.float32)


@custom_op("packed_attention_gradients")
def gradients(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    spans: torch.Tensor,
    seed: Optional[torch.Tensor],
    out: torch.Tensor,
    lse: torch.Tensor,
    dropout_p: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of query, key and value [P, H, d], given `grad` of the output."""
    positions, heads, dim = query.shape
    grad_query, grad_key, grad_value = (
        torch.empty(query.shape, dtype=query.dtype, device=query.device) for _ in range(3)
    )
    if query.numel() == 0:
        return grad_query, grad_key, grad_value
    blocks = packed_blocks(dim, query.itemsize)
    packed_backward_kernel[(triton.cdiv(positions, blocks.stay), heads, 2)](
        out_ptr=out,
        lse_ptr=lse,
        grad_ptr=grad.contiguous(),
        grad_q_ptr=grad_query,
        grad_k_ptr=grad_key,
        grad_v_ptr=grad_value,
        STAY=blocks.stay,
        STREAM=blocks.stream,
        num_warps=blocks.num_warps,
        num_stages=NUM_STAGES,
        **common_options(query, key, value, spans, seed, dropout_p),
    )
    return grad_query, grad_key, grad_value


@gradients.register_fake
def _(
    grad: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *options: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    """Keep what the gradients need."""
    *tensors, ctx.dropout_p = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # torch would fill a gradient of the log-sum-exp with zeros
    ctx.save_for_backward(*tensors, *output)


@first_derivative
def backward(ctx: Any, grad: torch.Tensor | None, _: Any) -> tuple:
    """All three gradients, from one launch."""
    if grad is None:
        return (None,) * 6
    return *gradients(grad, *ctx.saved_tensors, ctx.dropout_p), None, None, None


forward.register_autograd(backward, setup_context=setup_context)


def common_options(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    spans: torch.Tensor,
    seed: torch.Tensor | None,
    dropout_p: float,
) -> dict[str, Any]:
    """Arguments that both kernels take."""
    positions, _, dim = query.shape
    threshold = min(round(dropout_p * 2**32), 2**32 - 1)
    return {
        "q_ptr": query,
        "k_ptr": key,
        "v_ptr": value,
        "span_ptr": spans,
        "seed_ptr": seed,
        "num_positions": positions,
        "scale": math.log2(math.e) / math.sqrt(dim),
        "threshold": threshold - 2**32 * (threshold >= 2**31),  # its bits as an int32, whatever its size
        "keep_scale": 0.0 if dropout_p == 1 else 1 / (1 - dropout_p),
        "stride_qp": query.stride(0),
        "stride_qh": query.stride(1),
        "stride_kp": key.stride(0),
        "stride_kh": key.stride(1),
        "stride_vp": value.stride(0),
        "stride_vh": value.stride(1),
        "D": dim,
        "BD": padded(dim),
        "DTYPE": DTYPES[query.dtype],
        "PRECISION": precision(),
    }
