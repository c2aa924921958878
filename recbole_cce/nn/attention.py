"""Causal attention behind one function, padded or packed."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch.nn import functional as F

from recbole_cce.nn.packing import Packing, unpack
from recbole_cce.ops.backend import before_ampere, constant_when_compiled, kernel_unavailable

# torch's attention over sequences of their own lengths and its option for a causal one, once has_varlen() is true
varlen_attn: Any = None
CAUSAL: dict[str, Any] = {}

# bytes of a number -> the longest rows for which our kernels are the fastest; fp32 has no tensor cores there
KERNEL_WIDTH = {2: 100, 4: 50}


def padded_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, dropout: float) -> torch.Tensor:
    """Causal attention on [B, L, heads, D / heads]."""
    query, key, value = (part.transpose(1, 2) for part in (query, key, value))
    context = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True)
    return context.transpose(1, 2)


def variable_length_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packing: Packing
) -> torch.Tensor:
    """torch's causal attention over sequences of their own lengths, on packed [P, heads, D / heads]."""
    bounds, width = packing.bounds, packing.width
    return varlen_attn(query, key, value, bounds, bounds, width, width, **CAUSAL)


def unpacked_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packing: Packing, dropout: float
) -> torch.Tensor:
    """Causal attention on packed [P, heads, D / heads], taken on padded rows."""
    query, key, value = (unpack(part, packing) for part in (query, key, value))
    context = padded_attention(query, key, value, dropout).flatten(0, 1)
    # a slot without a position takes any
    return context.index_select(0, packing.source.clamp(max=len(context) - 1))


def takes_kernels(query: torch.Tensor, width: int, dropout: float) -> bool:
    """Whether our kernels take [P, heads, D / heads]: short rows, and in 16 bits also what torch's op does not take."""
    if not query.is_cuda or kernel_unavailable("packed_attention", query.device, (query.dtype,), query.size(-1)):
        return False
    size = query.dtype.itemsize
    return width <= KERNEL_WIDTH[size] or (size == 2 and not takes_variable_lengths(query, dropout))


def takes_variable_lengths(query: torch.Tensor, dropout: float) -> bool:
    """Whether torch's attention over sequences of their own lengths takes [P, heads, D / heads]."""
    size = query.size(-1)
    return (
        dropout == 0
        and query.is_cuda
        and query.dtype in (torch.bfloat16, torch.float16)
        and size % 8 == 0
        and size <= 256
        and not before_ampere(query.device)
        and has_varlen()
    )


@constant_when_compiled
def has_varlen() -> bool:
    """Whether torch has the op, which is loaded now: torch._dynamo comes with it, which takes as long as torch."""
    global varlen_attn, CAUSAL
    if varlen_attn is None:
        try:
            from torch.nn.attention import varlen  # torch 2.10
        except ImportError:
            return False
        varlen_attn = varlen.varlen_attn
        parameters = inspect.signature(varlen_attn).parameters  # the option's name and form changed since
        CAUSAL = {"is_causal": True} if "is_causal" in parameters else {"window_size": (-1, 0)}
    return True


def causal_mask(valid: torch.Tensor) -> torch.Tensor:
    """RecBole's additive mask [B, 1, L, L]: 0 where a position may look, -10000 elsewhere."""
    mask = torch.tril(valid[:, None, None, :].expand(-1, -1, valid.size(1), -1))
    return torch.where(mask, 0.0, -10000.0)
