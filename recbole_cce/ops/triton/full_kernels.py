"""CCE: full cross-entropy in blocks of positions x items. A block of one side stays, the other side streams past it.

Positions come sorted by their target, ignored ones last: `order` [N] says which position is in which slot, and the
first `bound[0]` slots hold a target. Targets of neighbours are then neighbours, so that almost no block holds one and
has to be masked, and whatever lies beyond them costs nothing.

Logits are in units of log 2: exp2 is the instruction that the hardware has. A softmax denominator is a reference
logit, where the exponentials are 1, and the mass of all items but the target in these units. It starts at the target's
logit: no maximum is needed as long as the others do not exceed it by a factor beyond fp32.
"""

import triton
import triton.language as tl

from recbole_cce.ops.triton.exponentials import LOG2_E
from recbole_cce.ops.triton.softmax import finish
from recbole_cce.ops.triton.tiles import add_product, load_rows, logits

SAFE_MASS = tl.constexpr(2.0**64)  # far below what fp32 and bf16 hold, so that sums of vectors cannot overflow either


@triton.jit
def target_logits(b_h, b_y, m_n, w_ptr, stride_wn, stride_wd, o_d, D: tl.constexpr, DTYPE: tl.constexpr):
    """[BM] logits of the targets: fp32 sums of the products of the same rounded rows."""
    b_target = load_rows(w_ptr, b_y, stride_wn, stride_wd, m_n, o_d, D, DTYPE)
    return tl.sum(b_h.to(tl.float32) * b_target.to(tl.float32), 1) * LOG2_E


@triton.jit
def sweep(
    b_h,
    b_y,
    b_ref,
    w_ptr,
    w_desc,
    first,
    last,
    low,
    high,
    num_rows,
    padding_idx,
    stride_wn,
    stride_wd,
    D: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
    BV: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    DIRECTION: tl.constexpr,
    ONLINE: tl.constexpr,
    UP: tl.constexpr,
    TMA: tl.constexpr,
):
    """BM positions against the rows first..last-1 of the table, without their targets and the padding row, which is not
    even read: it may be NaN, and 0 * NaN is NaN. With TMA, which reads all rows, it is none of these.

    low..high: the range of the targets. Returns the reference, and in its units the mass [BM] and, with DIRECTION, the
    sum of exp2(s - reference) W_j [BM, BD]. ONLINE: the reference follows the largest logit, UP above it.
    """
    o_d = tl.arange(0, BD)
    b_mass = tl.zeros([BM], tl.float32)
    b_off = tl.zeros([BM], tl.float32)
    b_sum = tl.zeros([BM, BD], tl.float32)
    for start in range(first, last, BV):
        o_v = start + tl.arange(0, BV)
        if TMA:
            b_w = w_desc.load([start, 0])
        else:
            m_v = (o_v < num_rows) & (o_v != padding_idx)
            b_w = load_rows(w_ptr, o_v, stride_wn, stride_wd, m_v, o_d, D, DTYPE)
        b_s = logits(b_h, b_w, PRECISION)
        stop = start + BV
        targets = (start <= high) & (stop > low)
        padding = (start <= padding_idx) & (stop > padding_idx)
        if targets | padding | (stop > num_rows):
            m_v = (o_v < num_rows) & (o_v != padding_idx)
            b_s = tl.where((o_v[None, :] != b_y[:, None]) & m_v[None, :], b_s, -float("inf"))
        if ONLINE:
            b_new = tl.maximum(b_ref, tl.max(b_s, 1) * LOG2_E - UP)
            b_scale = tl.exp2(b_ref - b_new)
            b_mass *= b_scale
            b_off *= b_scale
            if DIRECTION:
                b_sum *= b_scale[:, None]
            b_ref = b_new
        b_p = tl.exp2(b_s * LOG2_E - b_ref[:, None])
        # with what the last sum rounded off, or the error of a flat softmax would grow with the number of blocks
        b_add = tl.sum(b_p, 1) - b_off
        b_next = b_mass + b_add
        b_off = (b_next - b_mass) - b_add
        b_mass = b_next
        if DIRECTION:
            b_sum = add_product(b_p, b_w, b_sum, PRECISION)
    return b_ref, b_mass, b_sum


@triton.jit
def store_results(
    b_ref, b_mass, b_sum, b_sy, b_y, o_i, b_n, m_n, w_ptr, loss_ptr, lse_ptr, slope_ptr, direction_ptr, residual_ptr,
    stride_wn, stride_wd, o_d, D: tl.constexpr, DTYPE: tl.constexpr, DIRECTION: tl.constexpr,
):  # fmt: skip
    """What is known of slots `o_i`, which hold positions `b_n`: loss and direction by position, the rest by slot."""
    b_loss, b_lse, b_slope, b_scale = finish(b_ref, b_mass, b_sy)
    tl.store(loss_ptr + b_n, b_loss, mask=m_n)
    tl.store(lse_ptr + o_i, b_lse, mask=m_n)
    tl.store(slope_ptr + o_i, b_slope, mask=m_n)
    if DIRECTION:
        b_target = load_rows(w_ptr, b_y, stride_wn, stride_wd, m_n, o_d, D, DTYPE)
        b_d = b_sum * b_scale[:, None] + b_slope[:, None] * b_target.to(tl.float32)
        m_d = m_n[:, None] & (o_d < D)[None, :]
        o_nd = b_n.to(tl.int64)[:, None] * D + o_d[None, :]
        tl.store(direction_ptr + o_nd, b_d, mask=m_d)
        if residual_ptr is not None:
            tl.store(residual_ptr + o_nd, b_d - b_d.to(direction_ptr.dtype.element_ty).to(tl.float32), mask=m_d)


@triton.jit
def full_forward_kernel(
    h_ptr,
    w_ptr,
    w_desc,
    y_ptr,
    order_ptr,
    bound_ptr,
    loss_ptr,
    lse_ptr,
    slope_ptr,
    direction_ptr,
    residual_ptr,
    part_ref_ptr,
    part_mass_ptr,
    part_sum_ptr,
    n,
    num_rows,
    padding_idx,
    split_rows,
    stride_hn,
    stride_hd,
    stride_wn,
    stride_wd,
    stride_y,
    D: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
    BV: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    DIRECTION: tl.constexpr,
    SPLIT: tl.constexpr,
    ONLINE: tl.constexpr,
    AGAIN: tl.constexpr,
    TMA: tl.constexpr,
):
    """One program: BM positions against one split of the catalogue, `split_rows` rows of it.

    Without SPLIT there is one split and the results are final. With it they are the parts [splits, N] of each one's
    reference and mass, and [splits, N, D] of the sum, for full_combine_kernel. AGAIN: only where a logit exceeded the
    target's by far, or was not a number, so that the mass is not safe: now ONLINE.
    """
    i_m = tl.program_id(0)
    i_s = tl.program_id(1)
    count = tl.load(bound_ptr)
    o_d = tl.arange(0, BD)
    o_i = i_m * BM + tl.arange(0, BM)
    work = i_m * BM < count
    if AGAIN:
        p_mark = part_mass_ptr + i_s.to(tl.int64) * n if SPLIT else lse_ptr
        b_mark = tl.load(p_mark + o_i, mask=o_i < count, other=0.0)
        work = work & (tl.max(tl.where(b_mark < SAFE_MASS, 0, 1), 0) > 0)
    if work:
        m_n = o_i < count
        b_n = tl.load(order_ptr + o_i, mask=m_n, other=0)
        b_y = tl.load(y_ptr + b_n.to(tl.int64) * stride_y, mask=m_n, other=-1).to(tl.int32)
        b_h = load_rows(h_ptr, b_n, stride_hn, stride_hd, m_n, o_d, D, DTYPE)
        b_sy = target_logits(b_h, b_y, m_n, w_ptr, stride_wn, stride_wd, o_d, D, DTYPE)
        low = tl.min(tl.where(m_n, b_y, num_rows), 0)
        high = tl.max(b_y, 0)
        # padding in front is left out by beginning behind it
        first = i_s * split_rows + tl.where(padding_idx == 0, 1, 0)
        last = tl.minimum(first + split_rows, num_rows)
        # fp16 takes probabilities down to 2^-38 of the largest, in units in which that is 2^14
        UP: tl.constexpr = 14.0 if DTYPE == tl.float16 else 0.0  # noqa: SIM300
        b_ref, b_mass, b_sum = sweep(
            b_h, b_y, b_sy - UP, w_ptr, w_desc, first, last, low, high, num_rows, padding_idx, stride_wn, stride_wd,
            D, BD, BM, BV, DTYPE, PRECISION, DIRECTION, ONLINE, UP, TMA,
        )  # fmt: skip
        if SPLIT:
            o_part = i_s.to(tl.int64) * n + o_i
            tl.store(part_ref_ptr + o_part, b_ref, mask=m_n)
            tl.store(part_mass_ptr + o_part, b_mass, mask=m_n)
            if DIRECTION:
                p_sum = part_sum_ptr + o_part[:, None] * D + o_d[None, :]
                tl.store(p_sum, b_sum, mask=m_n[:, None] & (o_d < D)[None, :])
        else:
            if not ONLINE:  # marks the log-sum-exp
                b_mass = tl.where(b_mass < SAFE_MASS, b_mass, float("nan"))
            store_results(
                b_ref, b_mass, b_sum, b_sy, b_y, o_i, b_n, m_n, w_ptr, loss_ptr, lse_ptr, slope_ptr, direction_ptr,
                residual_ptr, stride_wn, stride_wd, o_d, D, DTYPE, DIRECTION,
            )  # fmt: skip


@triton.jit
def full_combine_kernel(
    h_ptr,
    w_ptr,
    y_ptr,
    order_ptr,
    bound_ptr,
    loss_ptr,
    lse_ptr,
    slope_ptr,
    direction_ptr,
    residual_ptr,
    part_ref_ptr,
    part_mass_ptr,
    part_sum_ptr,
    n,
    num_splits,
    stride_hn,
    stride_hd,
    stride_wn,
    stride_wd,
    stride_y,
    D: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
    DTYPE: tl.constexpr,
    DIRECTION: tl.constexpr,
):
    """One program: the parts of BM positions, added in the order of the splits."""
    count = tl.load(bound_ptr)
    o_d = tl.arange(0, BD)
    o_i = tl.program_id(0) * BM + tl.arange(0, BM)
    if tl.program_id(0) * BM < count:
        m_n = o_i < count
        b_n = tl.load(order_ptr + o_i, mask=m_n, other=0)
        b_y = tl.load(y_ptr + b_n.to(tl.int64) * stride_y, mask=m_n, other=0).to(tl.int32)
        b_h = load_rows(h_ptr, b_n, stride_hn, stride_hd, m_n, o_d, D, DTYPE)
        b_sy = target_logits(b_h, b_y, m_n, w_ptr, stride_wn, stride_wd, o_d, D, DTYPE)
        b_ref = tl.load(part_ref_ptr + o_i, mask=m_n, other=0.0)
        b_mass = tl.zeros([BM], tl.float32)
        b_sum = tl.zeros([BM, BD], tl.float32)
        for i_s in range(0, num_splits):
            o_part = tl.cast(i_s, tl.int64) * n + o_i
            b_part = tl.load(part_ref_ptr + o_part, mask=m_n, other=0.0)
            b_new = tl.maximum(b_ref, b_part)
            b_old_unit = tl.exp2(b_ref - b_new)
            b_part_unit = tl.exp2(b_part - b_new)
            b_mass = b_mass * b_old_unit + tl.load(part_mass_ptr + o_part, mask=m_n, other=0.0) * b_part_unit
            if DIRECTION:
                p_sum = part_sum_ptr + o_part[:, None] * D + o_d[None, :]
                b_add = tl.load(p_sum, mask=m_n[:, None] & (o_d < D)[None, :], other=0.0)
                b_sum = b_sum * b_old_unit[:, None] + b_add * b_part_unit[:, None]
            b_ref = b_new
        store_results(
            b_ref, b_mass, b_sum, b_sy, b_y, o_i, b_n, m_n, w_ptr, loss_ptr, lse_ptr, slope_ptr, direction_ptr,
            residual_ptr, stride_wn, stride_wd, o_d, D, DTYPE, DIRECTION,
        )  # fmt: skip


@triton.jit
def full_weight_gradient_kernel(
    grad_ptr,
    unit_ptr,
    h_ptr,
    h_desc,
    w_ptr,
    y_ptr,
    order_ptr,
    bound_ptr,
    lse_ptr,
    lse_desc,
    slope_ptr,
    grad_w_ptr,
    part_ptr,
    num_rows,
    padding_idx,
    stride_grad,
    stride_hn,
    stride_hd,
    stride_wn,
    stride_wd,
    stride_y,
    D: tl.constexpr,
    BD: tl.constexpr,
    BN: tl.constexpr,
    BV: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    UNIFORM: tl.constexpr,
    SPLIT: tl.constexpr,
    GATHER: tl.constexpr,
    TMA: tl.constexpr,
):
    """One program: what one split of the positions gives to BV rows of the table.

    bound [1:]: the slots where the positions begin whose targets are in a block of rows. The first split is
    written to grad_w [V+1, D], with SPLIT the others to part [splits - 1, V+1, D]. UNIFORM: all positions have the
    upstream gradient grad[0]. Without GATHER the hidden states are sorted already.
    """
    i_v = tl.program_id(0)
    i_s = tl.program_id(1)
    count = tl.load(bound_ptr)
    share = tl.cdiv(tl.cdiv(count, BN), tl.num_programs(1)) * BN  # positions of a split
    first = i_s * share
    last = tl.minimum(first + share, count)
    low = tl.load(bound_ptr + 1 + i_v)
    high = tl.load(bound_ptr + 2 + i_v)
    o_d = tl.arange(0, BD)
    o_v = i_v * BV + tl.arange(0, BV)
    m_v = o_v < num_rows
    b_w = load_rows(w_ptr, o_v, stride_wn, stride_wd, m_v, o_d, D, DTYPE)
    # fp16: in units in which the largest upstream gradient is 2^14, since 1 / N times a probability would underflow
    UP: tl.constexpr = 14.0 if DTYPE == tl.float16 else 0.0  # noqa: SIM300
    unit = tl.load(grad_ptr).to(tl.float32) if UNIFORM else tl.load(unit_ptr)

    b_sum = tl.zeros([BV, BD], tl.float32)
    for start in range(first, last, BN):
        # nothing is masked: slots past the last target hold the first one's position, with probability 0
        if TMA:
            b_h = h_desc.load([start, 0])
            b_lse = lse_desc.load([start])
        else:
            o_i = start + tl.arange(0, BN)
            b_n = tl.load(order_ptr + o_i) if GATHER else o_i
            b_h = load_rows(h_ptr, b_n, stride_hn, stride_hd, o_i >= 0, o_d, D, DTYPE)
            b_lse = tl.load(lse_ptr + o_i)
        b_s = logits(b_w, b_h, PRECISION)
        b_high = b_lse.to(tl.float32)
        b_p = b_s * LOG2_E - (b_high - UP)[None, :]
        if b_lse.dtype == tl.float64:
            b_p -= (b_lse - b_high).to(tl.float32)[None, :]
        b_p = tl.exp2(b_p)
        if not UNIFORM:
            b_n = tl.load(order_ptr + start + tl.arange(0, BN))
            b_g = tl.load(grad_ptr + b_n.to(tl.int64) * stride_grad).to(tl.float32)
            b_p *= (b_g / unit)[None, :]
        if (start < high) & (start + BN > low):
            b_n = tl.load(order_ptr + start + tl.arange(0, BN))
            b_y = tl.load(y_ptr + b_n.to(tl.int64) * stride_y).to(tl.int32)
            b_p = tl.where(o_v[:, None] != b_y[None, :], b_p, 0.0)
        b_sum = add_product(b_p, b_h, b_sum, PRECISION)

    # The targets' share. Its factors are added in two parts, which have twice the digits of a 16-bit number; one
    # product in the loop, as the layout of two in a row is not the one of the sum.
    low = tl.maximum(low, first)
    high = tl.minimum(high, last)
    PARTS: tl.constexpr = 1 if DTYPE == tl.float32 else 2  # noqa: SIM300
    for i in range(0, tl.cdiv(tl.maximum(high - low, 0), BN) * PARTS):
        o_i = low + i // PARTS * BN + tl.arange(0, BN)
        m_n = o_i < high
        b_n = tl.load(order_ptr + o_i, mask=m_n, other=0)
        b_h = load_rows(h_ptr, b_n if GATHER else o_i, stride_hn, stride_hd, m_n, o_d, D, DTYPE)
        b_y = tl.load(y_ptr + b_n.to(tl.int64) * stride_y, mask=m_n, other=-1).to(tl.int32)
        b_c = tl.load(slope_ptr + o_i, mask=m_n, other=0.0) * (2.0**UP)
        if not UNIFORM:
            b_c *= tl.load(grad_ptr + b_n.to(tl.int64) * stride_grad, mask=m_n, other=0.0).to(tl.float32) / unit
        if PARTS == 2:
            b_c = tl.where(i % 2 == 0, b_c, b_c - b_c.to(DTYPE).to(tl.float32))
        b_p = tl.where(o_v[:, None] == b_y[None, :], b_c[None, :], 0.0)
        b_sum = add_product(b_p, b_h, b_sum, PRECISION)

    b_sum = tl.where((o_v != padding_idx)[:, None], b_sum * (unit * 2.0**-UP), 0.0)
    o_dw = o_v.to(tl.int64)[:, None] * D + o_d[None, :]
    m_dw = m_v[:, None] & (o_d < D)[None, :]
    if SPLIT:
        if i_s > 0:
            tl.store(part_ptr + (i_s - 1).to(tl.int64) * num_rows * D + o_dw, b_sum, mask=m_dw)
        else:
            tl.store(grad_w_ptr + o_dw, b_sum, mask=m_dw)
    else:
        tl.store(grad_w_ptr + o_dw, b_sum, mask=m_dw)
