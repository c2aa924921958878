"""CCE- and BCE with negatives per position: gathered for one position, or for one row of the table."""

import triton
import triton.language as tl

from recbole_cce.ops.triton.exponentials import LN_2, LOG2_E, sigmoid, softplus
from recbole_cce.ops.triton.negatives import draw_rows, log_k_q, once
from recbole_cce.ops.triton.tiles import load_rows


@triton.jit
def per_position_forward_kernel(
    h_ptr,
    w_ptr,
    y_ptr,
    seed_ptr,
    table_ptr,
    log_q_ptr,
    loss_ptr,
    lse_ptr,
    slope_ptr,
    direction_ptr,
    unit_ptr,
    num_negatives,
    num_items,
    padding_idx,
    log_k,
    positive_weight,
    stride_hn,
    stride_hd,
    stride_wn,
    stride_wd,
    stride_y,
    D: tl.constexpr,
    BD: tl.constexpr,
    BK: tl.constexpr,
    DTYPE: tl.constexpr,
    POPULARITY: tl.constexpr,
    CORRECT: tl.constexpr,
    BINARY: tl.constexpr,
    DIRECTION: tl.constexpr,
):
    """One program: one position against its negatives, which no other position sees.

    BINARY: a sum of softplus, no log-sum-exp.
    """
    i_n = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BD)
    y = tl.load(y_ptr + i_n * stride_y)
    m_d = o_d < D
    m_y = o_d < tl.where(y == padding_idx, 0, D)  # an ignored row may be NaN: it is not read
    seed = tl.load(seed_ptr)
    b_h = tl.load(h_ptr + i_n * stride_hn + o_d * stride_hd, mask=m_y, other=0.0).to(DTYPE).to(tl.float32)
    p_target = w_ptr + y * stride_wn + o_d * stride_wd
    s_y = tl.sum(b_h * tl.load(p_target, mask=m_y, other=0.0).to(DTYPE).to(tl.float32), 0) * LOG2_E

    largest = s_y
    mass = 0.0
    b_sum = tl.zeros([BK, BD], tl.float32)  # a sum of its rows is taken once, at the end
    num_draws = tl.where(y == padding_idx, 0, num_negatives)  # an ignored row costs nothing
    for i_k in range(0, num_draws, BK):
        o_k = i_k + tl.arange(0, BK)
        b_row = once(draw_rows(seed, i_n * num_negatives + o_k, table_ptr, num_items, padding_idx, POPULARITY))
        m_k = (o_k < num_negatives) & (b_row != y)
        b_w = load_rows(w_ptr, b_row, stride_wn, stride_wd, m_k, o_d, D, DTYPE).to(tl.float32)
        b_s = tl.sum(b_w * b_h[None, :], 1) * LOG2_E
        if CORRECT:
            b_s -= log_k_q(log_q_ptr, b_row, log_k, padding_idx, POPULARITY)
        b_s = tl.where(m_k, b_s, -float("inf"))
        if BINARY:
            b_p = sigmoid(b_s)
            mass += tl.sum(softplus(b_s), 0)
        else:
            new = tl.maximum(largest, tl.max(b_s, 0))
            b_p = tl.exp2(b_s - new)
            scale = tl.exp2(largest - new)
            mass = mass * scale + tl.sum(b_p, 0)
            largest = new
            b_sum *= scale
        if DIRECTION:
            b_sum += b_p[:, None] * b_w

    if BINARY:
        total = num_negatives + 1.0
        loss = (mass + positive_weight * softplus(-s_y)) / total
        slope = tl.where(y == padding_idx, 0.0, -positive_weight * sigmoid(-s_y) / total)
    else:
        total = mass + tl.exp2(s_y - largest)
        lse = largest + tl.log2(total)
        loss = (lse - s_y) * LN_2
        slope = -mass / total
        tl.store(lse_ptr + i_n, lse)
    tl.store(loss_ptr + i_n, tl.where(y == padding_idx, 0.0, loss))
    tl.store(slope_ptr + i_n, slope)
    if DIRECTION:
        b_target = tl.load(p_target, mask=m_y, other=0.0).to(DTYPE).to(tl.float32)
        b_d = tl.sum(b_sum, 0) / total + slope * b_target
        if unit_ptr is not None:
            b_d *= tl.load(unit_ptr)
        tl.store(direction_ptr + i_n * D + o_d, b_d, mask=m_d)


@triton.jit
def pair_kernel(
    y_ptr,
    seed_ptr,
    table_ptr,
    out_ptr,
    order_ptr,
    first,
    last,
    num_negatives,
    num_items,
    padding_idx,
    stride_y,
    BLOCK: tl.constexpr,
    POPULARITY: tl.constexpr,
    MODE: tl.constexpr,
):
    """The pairs (position, row) of positions first..last-1: K draws each, then the target as pair K.

    MODE "count": out[row] += 1. MODE "sort": the slots of a row end before out[row], which goes down by 1 as
    order[slot] gets the position, counted from `first`, or its complement for the target. MODE "rows": out[pair] = row,
    or the number of rows of the table for a pair that counts for nothing: of an ignored position, or a draw of its
    target.
    """
    o_pair = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    o_i = o_pair // (num_negatives + 1)
    o_k = o_pair % (num_negatives + 1)
    o_n = first + o_i
    m_n = o_n < last
    b_y = tl.load(y_ptr + o_n * stride_y, mask=m_n, other=0)
    seed = tl.load(seed_ptr)
    b_row = draw_rows(seed, o_n * num_negatives + o_k, table_ptr, num_items, padding_idx, POPULARITY).to(tl.int64)
    m_target = o_k == num_negatives
    m_pair = m_n & (b_y != padding_idx) & (m_target | (b_row != b_y))
    b_row = tl.where(m_target, b_y, b_row)
    if MODE == "count":
        tl.atomic_add(out_ptr + b_row, 1, mask=m_pair, sem="relaxed")
    elif MODE == "sort":
        o_slot = tl.atomic_add(out_ptr + b_row, -1, mask=m_pair, sem="relaxed") - 1
        b_i = o_i.to(tl.int32)
        tl.store(order_ptr + o_slot, tl.where(m_target, ~b_i, b_i), mask=m_pair)
    else:
        num_rows = num_items + (padding_idx < num_items + 1).to(tl.int32)
        tl.store(out_ptr + o_pair, tl.where(m_pair, b_row, num_rows).to(tl.int32), mask=m_n)


@triton.jit
def row_weight_gradient_kernel(
    grad_ptr,
    h_ptr,
    w_ptr,
    log_q_ptr,
    lse_ptr,
    slope_ptr,
    order_ptr,
    start_ptr,
    grad_w_ptr,
    first,
    num_negatives,
    padding_idx,
    log_k,
    stride_grad,
    stride_hn,
    stride_hd,
    stride_wn,
    stride_wd,
    D: tl.constexpr,
    BD: tl.constexpr,
    BP: tl.constexpr,
    DTYPE: tl.constexpr,
    POPULARITY: tl.constexpr,
    CORRECT: tl.constexpr,
    BINARY: tl.constexpr,
    ADD: tl.constexpr,
):
    """One program: what the positions that a row of the table is paired with give to it, without atomics.

    order[start[row] : start[row + 1]]: the positions, counted from `first`, or their complements where the row is their
    target. ADD to what grad_w holds, or write it, zeros too.
    """
    i_row = tl.program_id(0)
    start = tl.load(start_ptr + i_row)
    end = tl.load(start_ptr + i_row + 1)
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    p_dw = grad_w_ptr + i_row.to(tl.int64) * D + o_d
    if start < end:
        p_w = w_ptr + i_row.to(tl.int64) * stride_wn + o_d * stride_wd
        b_w = tl.load(p_w, mask=m_d, other=0.0).to(DTYPE).to(tl.float32)
        b_sum = tl.zeros([BP, BD], tl.float32)
        for i_p in range(start, end, BP):
            o_p = i_p + tl.arange(0, BP)
            m_p = o_p < end
            b_i = tl.load(order_ptr + o_p, mask=m_p, other=0)
            m_target = b_i < 0
            o_n = first + tl.where(m_target, ~b_i, b_i).to(tl.int64)
            b_h = load_rows(h_ptr, o_n, stride_hn, stride_hd, m_p, o_d, D, DTYPE).to(tl.float32)
            b_s = tl.sum(b_h * b_w[None, :], 1) * LOG2_E
            if CORRECT:
                b_s -= log_k_q(log_q_ptr, tl.zeros([BP], tl.int32) + i_row, log_k, padding_idx, POPULARITY)
            if BINARY:
                b_p = sigmoid(b_s) / (num_negatives + 1)
            else:
                b_p = tl.exp2(b_s - tl.load(lse_ptr + o_n, mask=m_p, other=0.0))
            b_slope = tl.load(slope_ptr + o_n, mask=m_p, other=0.0)
            b_g = tl.load(grad_ptr + o_n * stride_grad, mask=m_p, other=0.0).to(tl.float32)
            b_c = tl.where(m_p, tl.where(m_target, b_slope, b_p) * b_g, 0.0)
            b_sum += b_c[:, None] * b_h
        b_dw = tl.sum(b_sum, 0)
        if ADD:
            b_dw += tl.load(p_dw, mask=m_d, other=0.0)
        tl.store(p_dw, b_dw, mask=m_d)
    else:
        if not ADD:
            tl.store(p_dw, tl.zeros([BD], tl.float32), mask=m_d)
