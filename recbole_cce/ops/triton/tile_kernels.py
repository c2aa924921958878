"""CCE- where positions share tiles of negatives: small dense products on tensor cores.

Logits are in units of log 2 in all kernels: exp2 is the instruction that the hardware has.
"""

import triton
import triton.language as tl

from recbole_cce.ops.triton.negatives import draw_rows, log_k_q, once

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def load_rows(ptr, rows, stride_row, stride_col, mask, o_d, D: tl.constexpr, DTYPE: tl.constexpr):
    """[R, BD] rows of a matrix, rounded to DTYPE, zero past column D and where `mask` [R] is False."""
    p = ptr + rows.to(tl.int64)[:, None] * stride_row + o_d[None, :] * stride_col
    if o_d.shape[0] == D:
        b = tl.load(p, mask=mask[:, None], other=0.0)
    else:
        b = tl.load(p, mask=mask[:, None] & (o_d < D)[None, :], other=0.0)
    return b.to(DTYPE)


@triton.jit
def tile_forward_kernel(
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
    n,
    num_groups,
    blocks_per_group,
    num_negatives,
    num_items,
    padding_idx,
    log_k,
    stride_hn,
    stride_hd,
    stride_wn,
    stride_wd,
    stride_y,
    D: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    POPULARITY: tl.constexpr,
    CORRECT: tl.constexpr,
    DIRECTION: tl.constexpr,
):
    """One program: BM positions of one group against all of its negatives, with an online log-sum-exp."""
    i_group = tl.program_id(0) // blocks_per_group
    i_block = tl.program_id(0) % blocks_per_group
    o_d = tl.arange(0, BD)
    o_n = (i_block * BM + tl.arange(0, BM)).to(tl.int64) * num_groups + i_group
    m_n = o_n < n
    b_y = tl.load(y_ptr + o_n * stride_y, mask=m_n, other=0)
    m_y = m_n & (b_y != padding_idx)
    seed = tl.load(seed_ptr)

    b_h = load_rows(h_ptr, o_n, stride_hn, stride_hd, m_y, o_d, D, DTYPE)
    b_target = load_rows(w_ptr, b_y, stride_wn, stride_wd, m_y, o_d, D, DTYPE)
    b_own = tl.sum(b_h.to(tl.float32) * b_target.to(tl.float32), 1) * LOG2_E

    # the negatives' mass is kept apart from the positive's: 1 - p then loses no digit when p is near 1
    b_max = b_own
    b_mass = tl.zeros([BM], tl.float32)
    b_sum = tl.zeros([BM, BD], tl.float32)
    first_draw = i_group.to(tl.int64) * num_negatives
    for i_k in range(0, num_negatives, BK):
        o_k = i_k + tl.arange(0, BK)
        b_row = once(draw_rows(seed, first_draw + o_k, table_ptr, num_items, padding_idx, POPULARITY))
        m_k = o_k < num_negatives
        b_w = load_rows(w_ptr, b_row, stride_wn, stride_wd, m_k, o_d, D, DTYPE)
        b_s = tl.dot(b_h, tl.trans(b_w), input_precision=PRECISION) * LOG2_E
        if CORRECT:
            b_s -= log_k_q(log_q_ptr, b_row, log_k, padding_idx, POPULARITY)[None, :]
        b_s = tl.where((b_row[None, :] != b_y[:, None]) & m_k[None, :], b_s, -float("inf"))
        b_new = tl.maximum(b_max, tl.max(b_s, 1))
        b_p = tl.exp2(b_s - b_new[:, None])
        b_scale = tl.exp2(b_max - b_new)
        b_mass = b_mass * b_scale + tl.sum(b_p, 1)
        b_max = b_new
        if DIRECTION:
            b_sum = b_sum * b_scale[:, None]
            if DTYPE == tl.float32:  # noqa: SIM300
                # Without tensor cores each term would be rounded to the size of the whole sum. The last argument, which
                # is about other dtypes, keeps the compiler from putting the sum back into the product.
                b_sum += tl.dot(b_p, b_w, input_precision=PRECISION, max_num_imprecise_acc=1)
            else:
                b_sum = tl.dot(b_p.to(DTYPE), b_w, b_sum)

    b_total = b_mass + tl.exp2(b_own - b_max)
    b_lse = b_max + tl.log2(b_total)
    b_slope = -b_mass / b_total
    tl.store(loss_ptr + o_n, tl.where(m_y, (b_lse - b_own) * LN_2, 0.0), mask=m_n)
    tl.store(lse_ptr + o_n, b_lse, mask=m_n)
    tl.store(slope_ptr + o_n, tl.where(m_y, b_slope, 0.0), mask=m_n)
    if DIRECTION:
        b_target = load_rows(w_ptr, b_y, stride_wn, stride_wd, m_y, o_d, D, DTYPE)
        b_d = b_sum / b_total[:, None] + b_slope[:, None] * b_target.to(tl.float32)
        p_d = direction_ptr + o_n[:, None] * D + o_d[None, :]
        tl.store(p_d, tl.where(m_y[:, None], b_d, 0.0), mask=m_n[:, None] & (o_d < D)[None, :])


@triton.jit
def tile_weight_gradient_kernel(
    grad_ptr,
    unit_ptr,
    h_ptr,
    w_ptr,
    y_ptr,
    seed_ptr,
    table_ptr,
    log_q_ptr,
    lse_ptr,
    slope_ptr,
    grad_w_ptr,
    row_ptr,
    first_program,
    n,
    num_groups,
    blocks_per_group,
    num_negatives,
    num_items,
    padding_idx,
    log_k,
    stride_grad,
    stride_hn,
    stride_hd,
    stride_wn,
    stride_wd,
    stride_y,
    D: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    POPULARITY: tl.constexpr,
    CORRECT: tl.constexpr,
    ATOMIC: tl.constexpr,
):
    """One program: what BM positions of one group give to the rows of its negatives and of their own targets.

    ATOMIC: added to grad_w [V+1, D] fp32. Otherwise the negatives' shares are stored, for a sum in a fixed order:
    grad_w is [programs, K, D], row_ptr [programs, K] gets their rows.
    """
    i_group = (first_program + tl.program_id(0)) // blocks_per_group
    i_block = (first_program + tl.program_id(0)) % blocks_per_group
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    o_n = (i_block * BM + tl.arange(0, BM)).to(tl.int64) * num_groups + i_group
    m_n = o_n < n
    b_y = tl.load(y_ptr + o_n * stride_y, mask=m_n, other=0)
    m_y = m_n & (b_y != padding_idx)
    seed = tl.load(seed_ptr)
    b_g = tl.load(grad_ptr + o_n * stride_grad, mask=m_y, other=0.0).to(tl.float32)
    # fp16: in units of the largest upstream gradient, since 1 / N times a probability would underflow
    unit = tl.load(unit_ptr) if unit_ptr is not None else 1.0
    b_lse = tl.load(lse_ptr + o_n, mask=m_y, other=0.0)

    b_h = load_rows(h_ptr, o_n, stride_hn, stride_hd, m_y, o_d, D, DTYPE)
    if ATOMIC:
        b_slope = tl.load(slope_ptr + o_n, mask=m_y, other=0.0) * b_g
        p_own = grad_w_ptr + b_y[:, None] * D + o_d[None, :]
        b_own = b_slope[:, None] * b_h.to(tl.float32)
        tl.atomic_add(p_own, b_own, mask=m_y[:, None] & m_d[None, :], sem="relaxed")
    first_draw = i_group.to(tl.int64) * num_negatives
    for i_k in range(0, num_negatives, BK):
        o_k = i_k + tl.arange(0, BK)
        b_row = once(draw_rows(seed, first_draw + o_k, table_ptr, num_items, padding_idx, POPULARITY))
        m_k = o_k < num_negatives
        b_w = load_rows(w_ptr, b_row, stride_wn, stride_wd, m_k, o_d, D, DTYPE)
        b_s = tl.dot(b_h, tl.trans(b_w), input_precision=PRECISION) * LOG2_E
        if CORRECT:
            b_s -= log_k_q(log_q_ptr, b_row, log_k, padding_idx, POPULARITY)[None, :]
        b_p = tl.exp2(b_s - b_lse[:, None]) * (b_g / unit)[:, None]
        b_p = tl.where((b_row[None, :] != b_y[:, None]) & m_k[None, :], b_p, 0.0)
        b_dw = tl.dot(tl.trans(b_p.to(DTYPE)), b_h, input_precision=PRECISION) * unit
        if ATOMIC:
            p_dw = grad_w_ptr + b_row.to(tl.int64)[:, None] * D + o_d[None, :]
            tl.atomic_add(p_dw, b_dw, mask=m_k[:, None] & m_d[None, :], sem="relaxed")
        else:
            o_share = tl.program_id(0).to(tl.int64) * num_negatives + o_k
            tl.store(grad_w_ptr + o_share[:, None] * D + o_d[None, :], b_dw, mask=m_k[:, None] & m_d[None, :])
            tl.store(row_ptr + o_share, b_row.to(tl.int64), mask=m_k)
