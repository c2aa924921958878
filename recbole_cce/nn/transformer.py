"""The Transformer encoder of RecBole's SASRec on its own modules and parameters, with attention behind one function.

encode() has RecBole's order of operations, encode_original() that of the authors of SASRec.

Sequences are padded on the right and attention is causal, so a real position never looks at a padded one: no mask
is needed. Outputs at real positions equal RecBole's; outputs at padded positions mean nothing. Packed, the real
positions of all sequences stand one after another, and no layer sees another one.
"""

from __future__ import annotations

import inspect
from typing import NamedTuple

import torch
from recbole.model.layers import FeedForward, MultiHeadAttention, TransformerEncoder
from torch import nn
from torch.nn import functional as F

from recbole_cce.ops import packed_attention, sequences
from recbole_cce.ops.backend import before_ampere, kernel_unavailable

try:
    from torch.nn.attention.varlen import varlen_attn  # torch 2.10
except ImportError:
    varlen_attn = None
else:  # the option's name and form changed since
    parameters = inspect.signature(varlen_attn).parameters
    CAUSAL = {"is_causal": True} if "is_causal" in parameters else {"window_size": (-1, 0)}

PACKED_SHARE = 0.5  # attention: auto packs a training batch of which at most so much is real
# bytes of a number -> the longest rows for which our kernels are the fastest; fp32 has no tensor cores there
OWN_WIDTH = {2: 100, 4: 50}


class Packing(NamedTuple):
    """Where the positions of B right-padded rows are when the real ones stand one after another in P places.

    P may be larger than their number: what is left over are further sequences of padding, which no other one sees.

    Attributes:
        index: [P] int64, each place's position in the flattened rows [B * width]; B * width where nothing is left.
        position: [P] int64, each place's position in its row.
        starts: [B] int64, the first place of each row.
        bounds: [B + ceil(P / width) + 1] int32, where sequences start, and P.
        spans: [P, 2] int32, where each place's sequence starts and ends.
        width: positions of a padded row.
    """

    index: torch.Tensor
    position: torch.Tensor
    starts: torch.Tensor
    bounds: torch.Tensor
    spans: torch.Tensor
    width: int

    @property
    def from_end(self) -> torch.Tensor:
        """[P] int64, how many places of its sequence come after each place."""
        return self.spans[:, 1] - 1 - torch.arange(len(self.spans), device=self.spans.device)


def packs(attention: str, positions: int | None, padded: int) -> bool:
    """Whether `attention` means packed for a batch of `positions` real ones, None if unknown, among `padded`."""
    return attention == "packed" or (
        attention == "auto" and positions is not None and positions <= PACKED_SHARE * padded
    )


def pack(lengths: torch.Tensor, width: int, places: int) -> Packing:
    """The Packing of rows with `lengths` [B] real positions, at most `width` each and `places` in all; no wait for the
    device, as it is the caller who knows how many there are."""
    ends = lengths.cumsum(0)
    left_over = torch.arange(1, 1 - (-places // width), device=lengths.device) * width
    bounds = torch.cat([ends.new_zeros(1), ends, ends[-1] + left_over]).clamp(max=places).int()
    row, spans = sequences(bounds, places)
    position = torch.arange(places, device=lengths.device) - spans[:, 0]
    index = (row * width + position).clamp(max=len(lengths) * width)
    return Packing(index, position, ends - lengths, bounds, spans, width)


def encode(
    encoder: TransformerEncoder, embedded: torch.Tensor, where: torch.Tensor | Packing, attention: str = "sdpa"
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
    if attention == "recbole":
        return encoder(embedded, causal_mask(where), output_all_encoded_layers=False)[-1]
    packing = where if isinstance(where, Packing) else None
    hidden = embedded
    for layer in encoder.layer:
        block = layer.multi_head_attention
        hidden = add_and_norm(block.LayerNorm, block.out_dropout(attend(block, hidden, hidden, packing)), hidden)
        hidden = feed_forward(layer.feed_forward, hidden)
    return hidden


def encode_original(
    encoder: TransformerEncoder, norm: nn.LayerNorm, embedded: torch.Tensor, where: torch.Tensor | Packing
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


def attend(
    block: MultiHeadAttention, hidden: torch.Tensor, memory: torch.Tensor, packing: Packing | None
) -> torch.Tensor:
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
    elif takes_own(query, packing.width, dropout):
        context = packed_attention(query, key, value, packing.spans, dropout)
    elif takes_variable_lengths(query, dropout):
        context = variable_length_attention(query, key, value, packing)
    else:
        context = unpacked_attention(query, key, value, packing, dropout)
    return block.dense(context.flatten(-2))


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
    padded = (unpack(part, packing) for part in (query, key, value))
    context = padded_attention(*padded, dropout).flatten(0, 1)
    # a place without a position takes any
    return context.index_select(0, packing.index.clamp(max=len(context) - 1))


def takes_own(query: torch.Tensor, width: int, dropout: float) -> bool:
    """Whether our kernels take [P, heads, D / heads]: short rows, and in 16 bits also what torch's op does not take."""
    if not query.is_cuda or kernel_unavailable("packed_attention", query.device, (query.dtype,), query.size(-1)):
        return False
    size = query.dtype.itemsize
    return width <= OWN_WIDTH[size] or (size == 2 and not takes_variable_lengths(query, dropout))


def takes_variable_lengths(query: torch.Tensor, dropout: float) -> bool:
    """Whether torch's attention over sequences of their own lengths takes [P, heads, D / heads]."""
    size = query.size(-1)
    return (
        varlen_attn is not None
        and dropout == 0
        and query.is_cuda
        and query.dtype in (torch.bfloat16, torch.float16)
        and size % 8 == 0
        and size <= 256
        and not before_ampere(query.device)
    )


def feed_forward(block: FeedForward, hidden: torch.Tensor) -> torch.Tensor:
    """RecBole's feed-forward block."""
    inner = block.intermediate_act_fn(block.dense_1(hidden))
    return add_and_norm(block.LayerNorm, block.dropout(block.dense_2(inner)), hidden)


def fuse_gelu(encoder: TransformerEncoder) -> None:
    """Make the GELU of RecBole's layers one operation instead of five, with the same result."""
    for layer in encoder.layer:
        block = layer.feed_forward
        if block.intermediate_act_fn == block.gelu:
            block.intermediate_act_fn = F.gelu


def unpack(packed: torch.Tensor, packing: Packing) -> torch.Tensor:
    """Put packed [P, ...] values back to their places in [B, L, ...], zero elsewhere."""
    rows, shape = len(packing.starts), packed.shape[1:]
    # one row more, for the places without a position
    padded = packed.new_zeros(rows * packing.width + 1, *shape).index_copy(0, packing.index, packed)
    return padded[:-1].view(rows, packing.width, *shape)


def causal_mask(valid: torch.Tensor) -> torch.Tensor:
    """RecBole's additive mask [B, 1, L, L]: 0 where a position may look, -10000 elsewhere."""
    mask = torch.tril(valid[:, None, None, :].expand(-1, -1, valid.size(1), -1))
    return torch.where(mask, 0.0, -10000.0)
