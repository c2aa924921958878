"""The Transformer encoder of RecBole's SASRec on its own modules and parameters, with attention behind one function.

encode() has RecBole's order of operations, encode_original() that of the authors of SASRec.

Sequences are padded on the right and attention is causal, so a real position never looks at a padded one: no mask
is needed. Outputs at real positions equal RecBole's; outputs at padded positions mean nothing. Packed, the real
positions of all sequences stand one after another, and no layer sees another one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from recbole_cce.nn.attention import (
    causal_mask,
    padded_attention,
    takes_kernels,
    takes_variable_lengths,
    unpacked_attention,
    variable_length_attention,
)
from recbole_cce.nn.packing import Packing
from recbole_cce.ops import packed_attention


def encode(
    encoder: Any, embedded: torch.Tensor, where: torch.Tensor | Packing, attention: str = "sdpa"
) -> torch.Tensor:
    """Run RecBole's TransformerEncoder causally.

    Args:
        encoder: RecBole's module; its parameters and dropout rates are used as they are.
        embedded: [B, L, D] embedded items, or packed [P, D].
        where: [B, L] bool, True at real positions, which come first in each row; or the Packing of packed ones.
        attention: "sdpa" (torch's fused attention) or "recbole" (its own layers and mask, not for packed ones).

    Returns:
        Hidden states of the shape of `embedded`, meaningless where there is no real position; under autocast in its
        dtype, also between layers, with norms computed in fp32. On a CPU, and in fp32 with long rows, the attention
        product of packed ones is taken on padded rows.
    """
    if attention == "recbole" and isinstance(where, torch.Tensor):
        return encoder(embedded, causal_mask(where), output_all_encoded_layers=False)[-1]
    packing = where if isinstance(where, Packing) else None
    hidden = embedded
    for layer in encoder.layer:
        block = layer.multi_head_attention
        hidden = add_and_norm(block.LayerNorm, block.out_dropout(attend(block, hidden, hidden, packing)), hidden)
        hidden = feed_forward(layer.feed_forward, hidden)
    return hidden


def encode_original(
    encoder: Any, norm: nn.LayerNorm, embedded: torch.Tensor, where: torch.Tensor | Packing
) -> torch.Tensor:
    """As encode(), in the order of the original SASRec (Kang & McAuley, ICDM 2018, and their code).

    Queries and the residual are normalised, keys and values are not; dropout is in the feed-forward layers and after
    them, not on what attention gives. It takes as many norms as RecBole's encoder and the one of its embeddings:

        q = norm(x);  h = norm'(q + attention(q, x, x));  x = h + dropout(W2 act(dropout(W1 h)));  finally norm(x)

    Args:
        norm: the norm before the first layer, RecBole's of embeddings.
    """
    packing = where if isinstance(where, Packing) else None
    states = embedded
    for layer in encoder.layer:
        attention, block = layer.multi_head_attention, layer.feed_forward
        query = norm(states.to(norm.weight.dtype))
        hidden = add_and_norm(attention.LayerNorm, attend(attention, query, states, packing), query)
        inner = block.intermediate_act_fn(block.dropout(block.dense_1(hidden)))
        states = hidden + block.dropout(block.dense_2(inner))
        norm = block.LayerNorm
    return norm(states.to(norm.weight.dtype)).to(states.dtype)


def add_and_norm(norm: nn.LayerNorm, output: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """norm(output + hidden), computed in the dtype of its weights and given in that of `output`.

    Autocast leaves the result of norms in fp32, and so would be all that lies between two layers, at twice the bytes.
    """
    residual = output + hidden.to(output.dtype)
    return norm(residual.to(norm.weight.dtype)).to(output.dtype)


def attend(block: Any, hidden: torch.Tensor, memory: torch.Tensor, packing: Packing | None) -> torch.Tensor:
    """Attention of `hidden` on `memory`, both [B, L, D] or packed [P, D], before dropout, residual and norm."""
    dropout = block.attn_dropout.p if block.training else 0.0
    heads = (block.num_attention_heads, -1)
    layers = (block.query, block.key, block.value)
    if block.training and hidden is memory:
        # one product instead of three: fewer passes over hidden states and their gradient
        weight, bias = (torch.cat([getattr(layer, name) for layer in layers]) for name in ("weight", "bias"))
        query, key, value = F.linear(hidden, weight, bias).unflatten(-1, (3, *heads)).unbind(-3)
    else:
        of = (hidden, memory, memory)
        query, key, value = (layer(states).unflatten(-1, heads) for layer, states in zip(layers, of, strict=True))
    if packing is None:
        context = padded_attention(query, key, value, dropout)
    elif takes_kernels(query, packing.width, dropout):
        context = packed_attention(query, key, value, packing.spans, dropout)
    elif takes_variable_lengths(query, dropout):
        context = variable_length_attention(query, key, value, packing)
    else:
        context = unpacked_attention(query, key, value, packing, dropout)
    return block.dense(context.flatten(-2))


def feed_forward(block: Any, hidden: torch.Tensor) -> torch.Tensor:
    """RecBole's feed-forward block."""
    inner = block.intermediate_act_fn(block.dense_1(hidden))
    return add_and_norm(block.LayerNorm, block.dropout(block.dense_2(inner)), hidden)


def fuse_gelu(encoder: Any) -> None:
    """Make the GELU of RecBole's layers one operation instead of five, with the same result."""
    for layer in encoder.layer:
        block = layer.feed_forward
        if block.intermediate_act_fn == block.gelu:
            block.intermediate_act_fn = F.gelu
