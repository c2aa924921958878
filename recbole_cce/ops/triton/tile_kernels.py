"""CCE- and BCE where positions share tiles of negatives: small dense products on tensor cores."""

import triton
import triton.language as tl

from recbole_cce.ops.triton.exponentials import LN_2, LOG2_E, sigmoid, softplus
from recbole_cce.ops.triton.negatives import draw_rows, log_k_q, once
from recbole_cce.ops.triton.tiles import add_logits, add_product, add_rows, load_rows, logits, store_rows


@triton.jit
def logit_offset(log_q_ptr, b_row, m_k, log_k, padding_idx, POPULARITY: tl.constexpr, CORRECT: tl.constexpr):
    """What is taken off the logits of drawn rows: log2(K q) if CORRECT; infinity where `m_k` is False."""
    if CORRECT:
        b_offset = log_k_q(log_q_ptr, b_row, log_k, padding_idx, POPULARITY)
    else:
        b_offset = tl.zeros(b_row.shape, tl.float32)
    return tl.where(m_k, b_offset, float("inf"))


@triton.jit
def target_weight(b_sy, positive_weight):
    """-d / d s_y of positive_weight * softplus(-s_y), but not zero: one divides by it."""
    return tl.maximum(positive_weight * sigmoid(-b_sy), 1e-24)


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
    unit_ptr,
    n,
    num_groups,
    blocks_per_group,
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
    BM: tl.constexpr,
    BK: tl.constexpr,
    HALVES: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    POPULARITY: tl.constexpr,
    CORRECT: tl.constexpr,
    BINARY: tl.constexpr,
    DIRECTION: tl.constexpr,
):
    """One program: BM positions of one group against all of its negatives, with an online log-sum-exp.

    BINARY: with a sum of their softplus instead, which is the mass then, and no log-sum-exp.

    The targets come last, BK of them at a time, as if they were draws of which a position takes one: their
    logits and their share of the direction come out of the same products, and each target is gathered once.

    HALVES: the columns are taken in two halves, which saves registers at the start and the end.
    """
    i_group = tl.program_id(0) // blocks_per_group
    i_block = tl.program_id(0) % blocks_per_group
    BC: tl.constexpr = BD // 2 if HALVES else BD
    o_d = tl.arange(0, BC)
    o_m = tl.arange(0, BM)
    o_n = (i_block * BM + o_m).to(tl.int64) * num_groups + i_group
    m_n = o_n < n
    b_y = tl.load(y_ptr + o_n * stride_y, mask=m_n, other=0).to(tl.int32)
    m_y = m_n & (b_y != padding_idx)
    seed = tl.load(seed_ptr)
    b_h = load_rows(h_ptr, o_n, stride_hn, stride_hd, m_n, o_d, D, DTYPE, STREAM=True)
    if HALVES:
        b_h2 = load_rows(h_ptr, o_n, stride_hn, stride_hd, m_n, BC + o_d, D, DTYPE, STREAM=True)

    b_max = tl.full([BM], -3.0e38, tl.float32)  # finite: the first negatives may all be masked
    b_mass = tl.zeros([BM], tl.float32)
    b_sum = tl.zeros([BM, BC], tl.float32)
    b_sum2 = b_sum
    # wide rows of fp32 do not stay in registers as operands: they are read again, from an address that the
    # compiler takes for another one in each round
    REREAD: tl.constexpr = (DTYPE == tl.float32) & (BD >= 256)  # noqa: SIM300
    first_draw = i_group.to(tl.int64) * num_negatives
    for i_k in range(0, num_negatives, BK):
        o_k = i_k + tl.arange(0, BK)
        b_row = once(draw_rows(seed, first_draw + o_k, table_ptr, num_items, padding_idx, POPULARITY))
        m_k = o_k < num_negatives
        b_w = load_rows(w_ptr, b_row, stride_wn, stride_wd, m_k, o_d, D, DTYPE)
        if REREAD:
            b_h = load_rows(h_ptr, o_n + tl.minimum(i_k, 0), stride_hn, stride_hd, m_n, o_d, D, DTYPE)
        b_s = logits(b_h, b_w, PRECISION)
        if HALVES:
            b_w2 = load_rows(w_ptr, b_row, stride_wn, stride_wd, m_k, BC + o_d, D, DTYPE)
            b_s = add_logits(b_s, b_h2, b_w2, PRECISION)
        b_s = b_s * LOG2_E - logit_offset(log_q_ptr, b_row, m_k, log_k, padding_idx, POPULARITY, CORRECT)[None, :]
        b_s = tl.where(b_row[None, :] != b_y[:, None], b_s, -float("inf"))
        if BINARY:
            b_p = sigmoid(b_s)
            b_mass += tl.sum(softplus(b_s), 1)
        else:
            b_new = tl.maximum(b_max, tl.max(b_s, 1))
            b_p = tl.exp2(b_s - b_new[:, None])
            b_scale = tl.exp2(b_max - b_new)
            b_mass = b_mass * b_scale + tl.sum(b_p, 1)
            b_max = b_new
            b_sum *= b_scale[:, None]
            if HALVES:
                b_sum2 *= b_scale[:, None]
        if DIRECTION:
            b_sum = add_product(b_p, b_w, b_sum, PRECISION)
            if HALVES:
                b_sum2 = add_product(b_p, b_w2, b_sum2, PRECISION)

    # From here the sum is in units in which the target has weight 1, which is taken off: for a softmax the mean of the
    # negatives, whose mass is at least 1, its largest term, or 0.
    if not BINARY:
        b_scale = 1.0 / tl.maximum(b_mass, 1.0)
        b_sum *= b_scale[:, None]
        if HALVES:
            b_sum2 *= b_scale[:, None]
    b_sy = tl.zeros([BM], tl.float32)
    for i_m in range(0, BM, BK):
        o_t = i_m + tl.arange(0, BK)
        o_i = (i_block * BM + o_t).to(tl.int64) * num_groups + i_group
        m_t = (o_i < n) & (o_t < BM)
        b_row = tl.load(y_ptr + o_i * stride_y, mask=m_t, other=0)
        m_t &= b_row != padding_idx
        b_w = load_rows(w_ptr, b_row, stride_wn, stride_wd, m_t, o_d, D, DTYPE)
        if REREAD:
            b_h = load_rows(h_ptr, o_n + tl.minimum(i_m, 0), stride_hn, stride_hd, m_n, o_d, D, DTYPE)
        b_s = logits(b_h, b_w, PRECISION)
        if HALVES:
            b_w2 = load_rows(w_ptr, b_row, stride_wn, stride_wd, m_t, BC + o_d, D, DTYPE)
            b_s = add_logits(b_s, b_h2, b_w2, PRECISION)
        m_target = o_m[:, None] == o_t[None, :]
        b_sy += tl.sum(tl.where(m_target, b_s, 0.0), 1) * LOG2_E
        if BINARY:
            m_rows = (o_m >= i_m) & (o_m < i_m + BK)
            b_scale = tl.where(m_rows, 1.0 / target_weight(b_sy, positive_weight), 1.0)
            b_sum *= b_scale[:, None]
            if HALVES:
                b_sum2 *= b_scale[:, None]
        if DIRECTION:
            b_p = tl.where(m_target, -1.0, 0.0)
            b_sum = add_product(b_p, b_w, b_sum, PRECISION)
            if HALVES:
                b_sum2 = add_product(b_p, b_w2, b_sum2, PRECISION)

    if BINARY:
        b_loss = (b_mass + positive_weight * softplus(-b_sy)) / (num_negatives + 1)
        b_slope = -target_weight(b_sy, positive_weight) / (num_negatives + 1)
    else:
        # the negatives' mass is kept apart from the positive's: 1 - p then loses no digit when p is near 1
        b_new = tl.maximum(b_max, b_sy)
        b_mass *= tl.exp2(b_max - b_new)
        b_total = b_mass + tl.exp2(b_sy - b_new)
        b_lse = b_new + tl.log2(b_total)
        b_loss = (b_lse - b_sy) * LN_2
        b_slope = -b_mass / b_total
        tl.store(lse_ptr + o_n, b_lse, mask=m_n)
    tl.store(loss_ptr + o_n, tl.where(m_y, b_loss, 0.0), mask=m_n)
    tl.store(slope_ptr + o_n, tl.where(m_y, b_slope, 0.0), mask=m_n)
    if DIRECTION:
        b_factor = -b_slope * tl.load(unit_ptr) if unit_ptr is not None else -b_slope
        b_d = tl.where(m_y[:, None], b_sum * b_factor[:, None], 0.0)
        store_rows(direction_ptr, o_n, b_d, m_n, o_d, D)
        if HALVES:
            b_d = tl.where(m_y[:, None], b_sum2 * b_factor[:, None], 0.0)
            store_rows(direction_ptr, o_n, b_d, m_n, BC + o_d, D)


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
    HALVES: tl.constexpr,
    PRECISION: tl.constexpr,
    POPULARITY: tl.constexpr,
    CORRECT: tl.constexpr,
    BINARY: tl.constexpr,
    ATOMIC: tl.constexpr,
):
    """One program: what BM positions of one group give to the rows of its negatives and of their targets.

    ATOMIC: added to grad_w [V+1, D] fp32. Otherwise the negatives' shares are stored, for a sum in a fixed order:
    grad_w is [programs, K, D], row_ptr [programs, K] gets their rows.

    HALVES: the columns are taken in two halves: a product [BK, BD] goes to memory through as much shared memory as the
    hidden states take, so that only one program would fit.
    """
    i_group = (first_program + tl.program_id(0)) // blocks_per_group
    i_block = (first_program + tl.program_id(0)) % blocks_per_group
    BC: tl.constexpr = BD // 2 if HALVES else BD
    o_d = tl.arange(0, BC)
    o_n = (i_block * BM + tl.arange(0, BM)).to(tl.int64) * num_groups + i_group
    m_n = o_n < n
    b_y = tl.load(y_ptr + o_n * stride_y, mask=m_n, other=0)
    m_y = m_n & (b_y != padding_idx)
    seed = tl.load(seed_ptr)
    b_g = tl.load(grad_ptr + o_n * stride_grad, mask=m_y, other=0.0).to(tl.float32)
    # fp16: in units of the largest upstream gradient, since 1 / N times a probability would underflow
    unit = tl.load(unit_ptr) if unit_ptr is not None else 1.0
    if not BINARY:
        b_lse = tl.load(lse_ptr + o_n, mask=m_y, other=0.0)

    b_slope = tl.load(slope_ptr + o_n, mask=m_y, other=0.0) * b_g
    b_h = load_rows(h_ptr, o_n, stride_hn, stride_hd, m_y, o_d, D, DTYPE)
    if ATOMIC:
        add_rows(grad_w_ptr, b_y, b_slope[:, None] * b_h.to(tl.float32), m_y, o_d, D)
    if HALVES:
        b_h2 = load_rows(h_ptr, o_n, stride_hn, stride_hd, m_y, BC + o_d, D, DTYPE)
        if ATOMIC:
            add_rows(grad_w_ptr, b_y, b_slope[:, None] * b_h2.to(tl.float32), m_y, BC + o_d, D)

    b_g /= unit
    if BINARY:
        unit /= num_negatives + 1
    b_y = b_y.to(tl.int32)
    first_draw = i_group.to(tl.int64) * num_negatives
    for i_k in range(0, num_negatives, BK):
        o_k = i_k + tl.arange(0, BK)
        b_row = once(draw_rows(seed, first_draw + o_k, table_ptr, num_items, padding_idx, POPULARITY))
        m_k = o_k < num_negatives
        b_w = load_rows(w_ptr, b_row, stride_wn, stride_wd, m_k, o_d, D, DTYPE)
        b_s = logits(b_h, b_w, PRECISION)
        if HALVES:
            b_w = load_rows(w_ptr, b_row, stride_wn, stride_wd, m_k, BC + o_d, D, DTYPE)
            b_s = add_logits(b_s, b_h2, b_w, PRECISION)
        b_s = b_s * LOG2_E - logit_offset(log_q_ptr, b_row, m_k, log_k, padding_idx, POPULARITY, CORRECT)[None, :]
        b_p = (sigmoid(b_s) if BINARY else tl.exp2(b_s - b_lse[:, None])) * b_g[:, None]
        b_p = tl.trans(tl.where(b_row[None, :] != b_y[:, None], b_p, 0.0).to(DTYPE))
        b_dw = tl.dot(b_p, b_h, input_precision=PRECISION) * unit
        o_share = tl.program_id(0).to(tl.int64) * num_negatives + o_k
        if ATOMIC:
            add_rows(grad_w_ptr, b_row, b_dw, m_k, o_d, D)
        else:
            store_rows(grad_w_ptr, o_share, b_dw, m_k, o_d, D)
            tl.store(row_ptr + o_share, b_row.to(tl.int64), mask=m_k)
        if HALVES:
            b_dw = tl.dot(b_p, b_h2, input_precision=PRECISION) * unit
            if ATOMIC:
                add_rows(grad_w_ptr, b_row, b_dw, m_k, BC + o_d, D)
            else:
                store_rows(grad_w_ptr, o_share, b_dw, m_k, BC + o_d, D)
