"""The gradient of the hidden states: the directions that the forward pass left, times the upstream gradient."""

from typing import Optional

import torch
import triton
import triton.language as tl

from recbole_cce.ops.triton.launch import custom_op

BLOCK = 4096  # numbers of a program


@triton.jit
def scale_kernel(
    direction_ptr,
    residual_ptr,
    grad_ptr,
    unit_ptr,
    numbers,
    stride_grad,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    UNIFORM: tl.constexpr,
):
    """One program: BLOCK of the `numbers` in direction [N, D], with its residual if there is one, by grad [N] / unit.

    UNIFORM: all of `grad` is one number. If that is the unit already, which only the device knows, nothing is touched.
    """
    unit = tl.load(unit_ptr) if unit_ptr is not None else 1.0
    grad = tl.load(grad_ptr)
    OTHERS: tl.constexpr = 0 if UNIFORM else 1  # a number: the interpreter of Triton 3.2 knows no constant of one bit
    if ((grad != unit).to(tl.int32) + OTHERS) > 0:
        o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        b_g = tl.load(grad_ptr + o // D * stride_grad, mask=o < numbers, other=0.0).to(tl.float32) / unit
        b_d = tl.load(direction_ptr + o, mask=o < numbers, other=0.0).to(tl.float32)
        if residual_ptr is not None:
            b_d += tl.load(residual_ptr + o, mask=o < numbers, other=0.0).to(tl.float32)
        tl.store(direction_ptr + o, b_d * b_g, mask=o < numbers)


@custom_op("scale_direction", mutates_args=("direction",))
def scale_direction(
    direction: torch.Tensor, grad: torch.Tensor, unit: Optional[torch.Tensor], residual: Optional[torch.Tensor]
) -> None:
    """Multiply `direction` [N, D] by grad [N] / unit in its own memory.

    `residual` [N, D]: what 16 bits of the direction left out, so that the product is rounded only once.
    """
    if direction.numel() == 0:
        return
    scale_kernel[(triton.cdiv(direction.numel(), BLOCK),)](
        direction_ptr=direction,
        residual_ptr=residual,
        grad_ptr=grad,
        unit_ptr=unit,
        numbers=direction.numel(),
        stride_grad=grad.stride(0),
        D=direction.size(1),
        BLOCK=BLOCK,
        UNIFORM=grad.stride(0) == 0 or len(grad) == 1,
    )


@scale_direction.register_fake
def _(direction: torch.Tensor, grad: torch.Tensor, unit: torch.Tensor | None, residual: torch.Tensor | None) -> None:
    return None
