"""Causal attention inside sequences that stand one after another, one sequence at a time."""

from __future__ import annotations

import math

import torch

from recbole_cce.ops import reference
from recbole_cce.ops.negatives import philox4x32


def packed_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    spans: torch.Tensor,
    dropout_p: float,
    seed: int | torch.Tensor | None,
) -> torch.Tensor:
    """[P, H, d]; see ops.packed_attention. `seed`: None without dropout. It waits for the device."""
    dtype = reference.math_dtype(query)
    outputs = [query[:0], key[:0], value[:0]]  # without a position, gradients are empty, too
    with torch.autocast(query.device.type, enabled=False):
        for start, end in spans.unique(dim=0).tolist():
            q, k, v = (part[start:end].transpose(0, 1).to(dtype) for part in (query, key, value))
            weights = causal_softmax(q @ k.mT / math.sqrt(query.size(-1)))
            if seed is not None:
                positions = torch.arange(start, end, device=query.device)
                weights = dropped(weights, kept(seed, positions, positions, len(q), dropout_p), dropout_p)
            outputs.append((weights @ v).transpose(0, 1).to(query.dtype))
    return torch.cat(outputs)


def causal_softmax(logits: torch.Tensor) -> torch.Tensor:
    """[H, L, L] logits -> weights of each query on the keys up to its position."""
    later = torch.ones_like(logits[0], dtype=torch.bool).triu(1)
    return logits.masked_fill(later, -math.inf).softmax(-1)


def dropped(weights: torch.Tensor, keep: torch.Tensor, dropout_p: float) -> torch.Tensor:
    """`weights` after dropout, which keeps those where `keep` is True."""
    return torch.where(keep, weights / max(1 - dropout_p, 2**-32), 0)


def kept(
    seed: int | torch.Tensor, query: torch.Tensor, key: torch.Tensor, heads: int, dropout_p: float
) -> torch.Tensor:
    """Which attention weights dropout keeps: those of the Philox words that are not among the lowest.

    The weight of position `query` on position `key` in a head has word key % 4 of counter (query, key // 4, head, 0).

    Args:
        seed: integer or 0-d int64 tensor.
        query: [M] int64 positions.
        key: [N] int64 positions.
        heads: H.
        dropout_p: the share that is dropped.

    Returns:
        [H, M, N] bool.
    """
    shape = (heads, len(query), len(key))
    head = torch.arange(heads, device=query.device)[:, None, None].expand(shape)
    counter = (query[:, None].expand(shape), (key // 4).expand(shape), head, torch.zeros_like(head))
    words = torch.stack(philox4x32(counter, (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF)))
    word = words.gather(0, (key % 4).expand(1, *shape))[0]
    return word >= round(dropout_p * 2**32)
