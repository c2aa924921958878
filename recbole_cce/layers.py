"""The Transformer encoder of RecBole's SASRec on its own modules and parameters, with attention behind one function.

Sequences are padded on the right and attention is causal, so a real position never looks at a padded one: no mask
is needed. Outputs at real positions equal RecBole's; outputs at padded positions mean nothing.
"""

from __future__ import annotations

import torch
from recbole.model.layers import FeedForward, MultiHeadAttention, TransformerEncoder
from torch.nn import functional as F


def encode(encoder: TransformerEncoder, embedded: torch.Tensor, valid: torch.Tensor, attention: str) -> torch.Tensor:
    """Run RecBole's TransformerEncoder causally.

    Args:
        encoder: RecBole's module; its parameters and dropout rates are used as they are.
        embedded: [B, L, D] embedded items.
        valid: [B, L] bool, True at real positions, which come first in each row.
        attention: "sdpa" (torch's fused attention), "packed" (all token-wise layers see only the real positions),
            "recbole" (its own layers and mask) or "auto" ("sdpa").

    Returns:
        [B, L, D] hidden states; zero (packed) or meaningless at padded positions.
    """
    if attention == "recbole":
        return encoder(embedded, causal_mask(valid), output_all_encoded_layers=False)[-1]
    if attention == "packed":
        rows = valid.flatten().nonzero().squeeze(1)  # waits for the device once a batch
        hidden = embedded.flatten(0, 1)[rows]
    else:
        rows, hidden = None, embedded
    for layer in encoder.layer:
        hidden = feed_forward(layer.feed_forward, attend(layer.multi_head_attention, hidden, valid.shape, rows))
    return hidden if rows is None else unpack(hidden, valid.shape, rows)


def attend(
    block: MultiHeadAttention, hidden: torch.Tensor, shape: torch.Size, rows: torch.Tensor | None
) -> torch.Tensor:
    """One attention block with residual and norm, on [B, L, D] or, with `rows`, on packed [N, D] hidden states."""

    def heads(projected: torch.Tensor) -> torch.Tensor:  # -> [B, heads, L, D / heads]
        if rows is not None:
            projected = unpack(projected, shape, rows)
        return projected.unflatten(-1, (block.num_attention_heads, -1)).transpose(1, 2)

    context = F.scaled_dot_product_attention(
        heads(block.query(hidden)),
        heads(block.key(hidden)),
        heads(block.value(hidden)),
        dropout_p=block.attn_dropout.p if block.training else 0.0,
        is_causal=True,
    )
    context = context.transpose(1, 2).flatten(2)
    if rows is not None:
        context = context.flatten(0, 1)[rows]
    return block.LayerNorm(block.out_dropout(block.dense(context)) + hidden)


def feed_forward(block: FeedForward, hidden: torch.Tensor) -> torch.Tensor:
    """RecBole's feed-forward block, its GELU as one operation instead of five."""
    activation = F.gelu if block.intermediate_act_fn == block.gelu else block.intermediate_act_fn
    inner = activation(block.dense_1(hidden))
    return block.LayerNorm(block.dropout(block.dense_2(inner)) + hidden)


def unpack(hidden: torch.Tensor, shape: torch.Size, rows: torch.Tensor) -> torch.Tensor:
    """Put packed [N, D] hidden states back to their places in [B, L, D], zero elsewhere."""
    padded = hidden.new_zeros(shape.numel(), hidden.size(-1)).index_copy(0, rows, hidden)
    return padded.view(*shape, hidden.size(-1))


def causal_mask(valid: torch.Tensor) -> torch.Tensor:
    """RecBole's additive mask [B, 1, L, L]: 0 where a position may look, -10000 elsewhere."""
    mask = torch.tril(valid[:, None, None, :].expand(-1, -1, valid.size(1), -1))
    return torch.where(mask, 0.0, -10000.0)
