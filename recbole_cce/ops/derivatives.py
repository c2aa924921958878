"""Which derivatives the ops have: the first, in reverse mode. Others are refused, which torch would take for zero."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad


def first_derivative(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A backward pass that refuses to be differentiated again.

    torch's once_differentiable lets a second derivative pass as zero where the upstream gradient is a constant.

    Raises:
        RuntimeError: it runs with create_graph=True.
    """

    @functools.wraps(backward)
    def refuse(ctx: Any, *grads: Any) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError("create_graph: True is not valid; the losses and kernels have no second derivative")
        return backward(ctx, *grads)

    return refuse


def refuse_forward_mode(*tensors: torch.Tensor) -> None:
    """Kernels have no derivatives in forward mode.

    Raises:
        RuntimeError: a tensor has a tangent.
    """
    if torch.compiler.is_compiling():
        return
    if any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
        raise RuntimeError("the kernels have no derivatives in forward mode; backend='torch' may have")
