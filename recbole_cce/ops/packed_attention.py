"""Causal attention inside sequences that stand one after another, without padding."""

from __future__ import annotations

import torch

from recbole_cce.ops import backend as backends
from recbole_cce.ops import checks, derivatives
from recbole_cce.ops.negatives import make_seed
from recbole_cce.ops.reference import packed_attention as reference


def packed_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    spans: torch.Tensor,
    dropout_p: float = 0.0,
    *,
    seed: int | torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Causal attention of each position on its sequence, whatever the sequences' lengths.

    out_ih = sum_{j = start_i..i} w_ij v_jh,  w_ij = keep_ij / (1 - p) softmax_j(<q_ih, k_jh> / sqrt(d))

    A position's cost is that of the block of positions that it is in: short sequences share one.

    Args:
        query: [P, H, d], any strides.
        key: [P, H, d], likewise.
        value: [P, H, d], likewise.
        spans: [P, 2] int32, where each position's sequence starts and ends; see sequences(). They are checked where
            that costs no wait for a GPU, and under torch.autograd.detect_anomaly(); kernels read within the P
            positions anyway.
        dropout_p: p, the probability of each weight to be dropped.
        seed: integer or 0-d int64 tensor that fixes what is dropped; drawn from the device's generator if None.
        backend: "auto", "triton" or "torch"; only "auto" may fall back to torch, and logs it once. The same seed drops
            the same weights in each. On a GPU torch waits for it, the kernels do not.

    Returns:
        [P, H, d], contiguous.

    Dtypes: fp64, fp32, bf16 or fp16, the same for all three, and so are the output and the gradients. Logits, softmax
    and sums are fp32 (fp64 for fp64).

    Raises:
        ValueError: a wrong shape, dtype, device, option, probability or seed, or spans that are not those of the
            positions; names the argument.
        RuntimeError: backend="triton" where the kernel cannot run.
    """
    check_packed(query, key, value, spans, dropout_p)
    seed = make_seed(seed, query.device) if dropout_p > 0 else None
    chosen = backends.choose("packed_attention", backend, query.device, (query.dtype,), query.size(-1))
    # where that waits for nothing, or a fault is looked for; torch.compile traces neither
    if not torch.compiler.is_compiling() and (
        chosen == "torch" or spans.device.type == "cpu" or torch.is_anomaly_enabled()
    ):
        check_spans(spans)
    if chosen == "triton":
        derivatives.refuse_forward_mode(query, key, value)
        from recbole_cce.ops.triton import packed_attention as kernels  # triton may be missing elsewhere

        return kernels.packed_attention(query, key, value, spans, dropout_p, seed)
    return reference.packed_attention(query, key, value, spans, dropout_p, seed)


def sequences(bounds: torch.Tensor, positions: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The sequence of each of P positions [P] int64, and where it starts and ends [P, 2] int32; no wait for the device.

    Args:
        bounds: [S + 1] int32, where sequences start, the first at 0, and P; some may be empty.
        positions: P.
    """
    position = torch.arange(positions, dtype=bounds.dtype, device=bounds.device)
    end = torch.searchsorted(bounds, position, right=True)
    number = end - 1
    return number, bounds[torch.stack([number, end], 1)]


def check_packed(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, spans: torch.Tensor, dropout_p: float
) -> None:
    """Shapes, dtypes, devices and the probability."""
    if query.dim() != 3 or query.size(2) == 0:
        raise ValueError(f"query: has shape {tuple(query.shape)}, it takes [P, H, d] with d >= 1")
    if query.dtype not in checks.FLOATS:
        raise ValueError(f"query: has dtype {query.dtype}, it takes one of {', '.join(map(str, checks.FLOATS))}")
    for name, tensor in (("key", key), ("value", value)):
        if tensor.shape != query.shape:
            raise ValueError(f"{name}: has shape {tuple(tensor.shape)}, query has {tuple(query.shape)}")
        if tensor.dtype != query.dtype:
            raise ValueError(f"{name}: has dtype {tensor.dtype}, query has {query.dtype}")
    if spans.shape != (len(query), 2):
        raise ValueError(f"spans: has shape {tuple(spans.shape)}, it takes [P, 2], query has {len(query)} positions")
    if spans.dtype != torch.int32:
        raise ValueError(f"spans: has dtype {spans.dtype}, it takes torch.int32")
    for name, tensor in (("key", key), ("value", value), ("spans", spans)):
        if tensor.device != query.device:
            raise ValueError(f"{name}: is on {tensor.device}, query on {query.device}")
    if not 0 <= dropout_p <= 1:
        raise ValueError(f"dropout_p: {dropout_p!r} is not valid; it takes a number from 0 to 1")


def check_spans(spans: torch.Tensor) -> None:
    """Sequences stand one after another, and each position has the span of the one that it is in.

    A span is that of the position before, or it starts here, where the one before ends. It waits for the device.
    """
    positions = len(spans)
    position = torch.arange(positions, dtype=spans.dtype, device=spans.device)
    start, end = spans.unbind(1)
    before = torch.cat([spans.new_zeros(1, 2), spans])[:positions]
    begins = (start == position) & (before[:, 1] == position)
    right = (begins | ((start < position) & (spans == before).all(1))) & (position < end) & (end <= positions)
    wrong = (~right).nonzero()
    if len(wrong):
        first = int(wrong[0])
        raise ValueError(
            f"spans: position {first} has {spans[first].tolist()}, which is not where a sequence that it is in starts "
            f"and ends; see sequences()"
        )
