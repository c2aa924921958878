"""SCE in buckets: the loss of a bucket's positions against its items, and the gradients of those that won.

A position's softmax denominator is kept as its distance from the target's logit s_y, which is the loss:
p_j = exp(s_j - s_y - loss), d loss / d s_y = exp(-loss) - 1. Where products are of fp32, rounding these distances would
be the largest error of a peaked softmax: there `peak` [B, X, 2] has the largest logit and the log of the sum relative
to it. Losses and that log are in units of log 2 until they are final: exp2 is the instruction that the hardware has.
"""

import triton
import triton.language as tl

from recbole_cce.ops.triton.exponentials import LN_2, LOG2_E
from recbole_cce.ops.triton.softmax import finish
from recbole_cce.ops.triton.tiles import add_product, add_rows, load_rows, logits, store_rows

UNITS_16 = tl.constexpr(14.0)  # fp16 takes probabilities in units in which 1 is 2^14, or small ones would underflow


@triton.jit
def minus_expm1(x):
    """1 - exp(-x) to the last digits for x >= 0."""
    u = tl.exp2(-x * LOG2_E)
    # what rounding did to exp(-x) it does to its logarithm too; far from 1 there is nothing to repair
    near = (u > 0.5) & (u < 1.0)
    b_log = tl.log2(tl.where(near, u, 0.75)) * LN_2
    return tl.where(u == 1.0, x, tl.where(near, (u - 1.0) / b_log * x, 1.0 - u))


@triton.jit
def load_items(item_ptr, i_b, o_y, size_y):
    """Items of a bucket; -1 for none. A load with other=-1 would be too much for the pipelines of Triton 3.2."""
    b_item = tl.load(item_ptr + i_b.to(tl.int64) * size_y + o_y, mask=o_y < size_y, other=0)
    return tl.where(o_y < size_y, b_item, -1)


@triton.jit
def target_logit_kernel(
    h_ptr,
    w_ptr,
    y_ptr,
    target_logit_ptr,
    best_ptr,
    n,
    padding_idx,
    stride_hn,
    stride_hd,
    stride_wn,
    stride_wd,
    stride_y,
    D: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """One program: the logits of the targets of BM positions; no bucket is their best yet."""
    o_d = tl.arange(0, BD)
    o_n = tl.program_id(0) * BM + tl.arange(0, BM)
    m_n = o_n < n
    b_y = tl.load(y_ptr + o_n.to(tl.int64) * stride_y, mask=m_n, other=0)
    m_y = m_n & (b_y != padding_idx)
    b_h = load_rows(h_ptr, o_n, stride_hn, stride_hd, m_y, o_d, D, DTYPE).to(tl.float32)
    b_w = load_rows(w_ptr, b_y, stride_wn, stride_wd, m_y, o_d, D, DTYPE).to(tl.float32)
    tl.store(target_logit_ptr + o_n, tl.sum(b_h * b_w, 1), mask=m_n)
    tl.store(best_ptr + o_n, tl.zeros([BM], tl.int64), mask=m_n)


@triton.jit
def bucket_loss_kernel(
    h_ptr,
    w_ptr,
    y_ptr,
    position_ptr,
    item_ptr,
    target_logit_ptr,
    best_ptr,
    peak_ptr,
    size_x,
    size_y,
    blocks_per_bucket,
    stride_hn,
    stride_hd,
    stride_wn,
    stride_wd,
    stride_y,
    D: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: the losses of BM positions of a bucket against its items, with an online log-sum-exp.

    best [N]: the bits of a position's largest loss (in units of log 2), and below them its bucket's number, of equal
    losses the lowest one; 0 where no bucket held the position. NaN is larger than any loss. peak: see above.
    """
    i_b = tl.program_id(0) // blocks_per_bucket
    o_d = tl.arange(0, BD)
    o_x = tl.program_id(0) % blocks_per_bucket * BM + tl.arange(0, BM)
    o_slot = i_b.to(tl.int64) * size_x + o_x
    b_n = tl.load(position_ptr + o_slot, mask=o_x < size_x, other=-1)
    m_n = b_n >= 0
    b_y = tl.load(y_ptr + b_n.to(tl.int64) * stride_y, mask=m_n, other=0).to(tl.int32)
    b_sy = tl.load(target_logit_ptr + b_n, mask=m_n, other=0.0)
    b_h = load_rows(h_ptr, b_n, stride_hn, stride_hd, m_n, o_d, D, DTYPE)
    b_ref = b_sy
    b_mass = tl.zeros([BM], tl.float32)
    for i_y in range(0, size_y, BN):
        o_y = i_y + tl.arange(0, BN)
        b_item = load_items(item_ptr, i_b, o_y, size_y)
        m_item = b_item >= 0
        b_w = load_rows(w_ptr, b_item, stride_wn, stride_wd, m_item, o_d, D, DTYPE)
        b_s = logits(b_h, b_w, PRECISION)
        b_s = tl.where((b_item[None, :] != b_y[:, None]) & m_item[None, :], b_s, -float("inf"))
        b_new = tl.maximum(b_ref, tl.max(b_s, 1))
        b_p = tl.exp2((b_s - b_new[:, None]) * LOG2_E)
        b_mass = b_mass * tl.exp2((b_ref - b_new) * LOG2_E) + tl.sum(b_p, 1)
        b_ref = b_new
    b_loss, _, _, _ = finish((b_ref - b_sy) * LOG2_E, b_mass, b_sy * 0.0)
    b_loss *= LOG2_E
    if peak_ptr is not None:
        tl.store(peak_ptr + 2 * o_slot, b_ref, mask=o_x < size_x)
        b_log = tl.log2(b_mass + tl.exp2((b_sy - b_ref) * LOG2_E))
        tl.store(peak_ptr + 2 * o_slot + 1, b_log, mask=o_x < size_x)
    bits = b_loss.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    b_key = (bits.to(tl.int64) << 32) | (0x7FFFFFFF - i_b).to(tl.int64)
    tl.atomic_max(best_ptr + b_n, b_key, mask=m_n, sem="relaxed")


@triton.jit
def loss_of(b_key):
    """The loss in keys of `best`, in units of log 2."""
    return (b_key >> 32).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def largest_loss_kernel(best_ptr, loss_ptr, covered_ptr, n, BLOCK: tl.constexpr):
    """One program: what `best` says of BLOCK positions."""
    o_n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b_key = tl.load(best_ptr + o_n, mask=o_n < n, other=0)
    tl.store(loss_ptr + o_n, loss_of(b_key) * LN_2, mask=o_n < n)
    tl.store(covered_ptr + o_n, b_key > 0, mask=o_n < n)


@triton.jit
def uncovered_kernel(best_ptr, grad_h_ptr, n, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr):
    """One program: no gradient for those of BM positions that no bucket held; other rows are written elsewhere."""
    o_n = tl.program_id(0) * BM + tl.arange(0, BM)
    m_n = (o_n < n) & (tl.load(best_ptr + o_n, mask=o_n < n, other=1) == 0)
    store_rows(grad_h_ptr, o_n, tl.zeros([BM, BD], tl.float32), m_n, tl.arange(0, BD), D)


@triton.jit
def winner_kernel(
    position_ptr, best_ptr, peak_ptr, winner_ptr, winner_peak_ptr, count_ptr, size_x, BLOCK: tl.constexpr
):
    """One program: the positions of a bucket that have their largest loss in it, in the order of its slots."""
    i_b = tl.program_id(0)
    o_bucket = i_b.to(tl.int64) * size_x
    count = 0
    for start in range(0, size_x, BLOCK):
        o_x = start + tl.arange(0, BLOCK)
        b_n = tl.load(position_ptr + o_bucket + o_x, mask=o_x < size_x, other=-1)
        b_key = tl.load(best_ptr + b_n, mask=b_n >= 0, other=0)
        m_won = (b_n >= 0) & ((b_key & 0x7FFFFFFF).to(tl.int32) == 0x7FFFFFFF - i_b)
        o_winner = o_bucket + count + tl.cumsum(m_won.to(tl.int32), 0) - 1
        tl.store(winner_ptr + o_winner, b_n, mask=m_won)
        if peak_ptr is not None:
            for half in tl.static_range(2):
                b_peak = tl.load(peak_ptr + 2 * (o_bucket + o_x) + half, mask=m_won)
                tl.store(winner_peak_ptr + 2 * o_winner + half, b_peak, mask=m_won)
        count += tl.sum(m_won.to(tl.int32), 0)
    tl.store(count_ptr + i_b, count)


@triton.jit
def load_winners(winner_ptr, peak_ptr, y_ptr, target_logit_ptr, best_ptr, o_slot, m_n, stride_y):
    """Position, target, reference of its logits, log of the softmax denominator there, and loss, of the slots `o_slot`
    of winners."""
    b_n = tl.load(winner_ptr + o_slot, mask=m_n, other=0)
    b_y = tl.load(y_ptr + b_n.to(tl.int64) * stride_y, mask=m_n, other=0).to(tl.int32)
    b_sy = tl.load(target_logit_ptr + b_n, mask=m_n, other=0.0)
    b_loss = loss_of(tl.load(best_ptr + b_n, mask=m_n, other=0))
    b_ref, b_log = b_sy, b_loss
    if peak_ptr is not None:
        b_ref = tl.load(peak_ptr + 2 * o_slot, mask=m_n, other=0.0)
        b_log = tl.load(peak_ptr + 2 * o_slot + 1, mask=m_n, other=0.0)
    return b_n, b_y, b_ref, b_log, b_loss


@triton.jit
def probabilities(b_s, b_ref, b_log, b_y, b_item, DTYPE: tl.constexpr):
    """Of logits of positions x items; 0 at the targets, and in fp16 in larger units."""
    UP: tl.constexpr = UNITS_16 if DTYPE == tl.float16 else 0.0  # noqa: SIM300
    b_s = (b_s - b_ref) * LOG2_E - (b_log - UP)
    return tl.where((b_item != b_y) & (b_item >= 0), tl.exp2(b_s), 0.0)


@triton.jit
def bucket_input_gradient_kernel(
    grad_ptr,
    h_ptr,
    w_ptr,
    y_ptr,
    item_ptr,
    winner_ptr,
    peak_ptr,
    count_ptr,
    target_logit_ptr,
    best_ptr,
    grad_h_ptr,
    size_x,
    size_y,
    blocks_per_bucket,
    stride_grad,
    stride_hn,
    stride_hd,
    stride_wn,
    stride_wd,
    stride_y,
    D: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: the gradients of BM winners of a bucket; each position wins once, so that its row is just stored."""
    i_b = tl.program_id(0) // blocks_per_bucket
    i_x = tl.program_id(0) % blocks_per_bucket * BM
    count = tl.load(count_ptr + i_b)
    if i_x < count:
        o_d = tl.arange(0, BD)
        o_x = i_x + tl.arange(0, BM)
        m_n = o_x < count
        o_slot = i_b.to(tl.int64) * size_x + o_x
        b_n, b_y, b_ref, b_log, b_loss = load_winners(
            winner_ptr, peak_ptr, y_ptr, target_logit_ptr, best_ptr, o_slot, m_n, stride_y
        )
        b_h = load_rows(h_ptr, b_n, stride_hn, stride_hd, m_n, o_d, D, DTYPE)
        b_sum = tl.zeros([BM, BD], tl.float32)
        for i_y in range(0, size_y, BN):
            o_y = i_y + tl.arange(0, BN)
            b_item = load_items(item_ptr, i_b, o_y, size_y)
            b_w = load_rows(w_ptr, b_item, stride_wn, stride_wd, b_item >= 0, o_d, D, DTYPE)
            b_s = logits(b_h, b_w, PRECISION)
            b_p = probabilities(b_s, b_ref[:, None], b_log[:, None], b_y[:, None], b_item[None, :], DTYPE)
            b_sum = add_product(b_p, b_w, b_sum, PRECISION)
        UP: tl.constexpr = UNITS_16 if DTYPE == tl.float16 else 0.0  # noqa: SIM300
        b_g = tl.load(grad_ptr + b_n.to(tl.int64) * stride_grad, mask=m_n, other=0.0).to(tl.float32)
        b_target = load_rows(w_ptr, b_y, stride_wn, stride_wd, m_n, o_d, D, DTYPE).to(tl.float32)
        b_sum = b_sum * (2.0**-UP) - minus_expm1(b_loss * LN_2)[:, None] * b_target
        store_rows(grad_h_ptr, b_n, b_sum * b_g[:, None], m_n, o_d, D)


@triton.jit
def bucket_weight_gradient_kernel(
    grad_ptr,
    unit_ptr,
    h_ptr,
    w_ptr,
    y_ptr,
    item_ptr,
    winner_ptr,
    peak_ptr,
    count_ptr,
    target_logit_ptr,
    best_ptr,
    grad_w_ptr,
    first_bucket,
    size_x,
    size_y,
    blocks_per_bucket,
    stride_grad,
    stride_hn,
    stride_hd,
    stride_wn,
    stride_wd,
    stride_y,
    D: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    ATOMIC: tl.constexpr,
):
    """One program: what the winners of a bucket give to the rows of BN of its items.

    ATOMIC: added to grad_w [V+1, D] fp32. Otherwise stored for a sum in a fixed order: grad_w [buckets, Y, D].
    """
    i_b = first_bucket + tl.program_id(0) // blocks_per_bucket
    o_y = tl.program_id(0) % blocks_per_bucket * BN + tl.arange(0, BN)
    count = tl.load(count_ptr + i_b)
    LEAST: tl.constexpr = 1 if ATOMIC else 0  # without winners there is nothing to add, but zeros to store
    if count >= LEAST:
        o_d = tl.arange(0, BD)
        b_item = load_items(item_ptr, i_b, o_y, size_y)
        b_w = load_rows(w_ptr, b_item, stride_wn, stride_wd, b_item >= 0, o_d, D, DTYPE)
        # fp16: in units of the largest upstream gradient too, since 1 / N times a probability would underflow
        unit = tl.load(unit_ptr) if unit_ptr is not None else 1.0
        b_sum = tl.zeros([BN, BD], tl.float32)
        for i_x in range(0, count, BM):
            o_x = i_x + tl.arange(0, BM)
            m_n = o_x < count
            o_slot = i_b.to(tl.int64) * size_x + o_x
            b_n, b_y, b_ref, b_log, _ = load_winners(
                winner_ptr, peak_ptr, y_ptr, target_logit_ptr, best_ptr, o_slot, m_n, stride_y
            )
            b_g = tl.load(grad_ptr + b_n.to(tl.int64) * stride_grad, mask=m_n, other=0.0).to(tl.float32) / unit
            b_h = load_rows(h_ptr, b_n, stride_hn, stride_hd, m_n, o_d, D, DTYPE)
            b_s = logits(b_w, b_h, PRECISION)
            b_p = probabilities(b_s, b_ref[None, :], b_log[None, :], b_y[None, :], b_item[:, None], DTYPE)
            b_sum = add_product(b_p * b_g[None, :], b_h, b_sum, PRECISION)
        UP: tl.constexpr = UNITS_16 if DTYPE == tl.float16 else 0.0  # noqa: SIM300
        b_sum *= unit * (2.0**-UP)
        if ATOMIC:
            add_rows(grad_w_ptr, b_item, b_sum, b_item >= 0, o_d, D)
        else:
            o_out = (i_b - first_bucket).to(tl.int64) * size_y + o_y
            store_rows(grad_w_ptr, o_out, b_sum, o_y < size_y, o_d, D)


@triton.jit
def target_gradient_kernel(
    grad_ptr,
    h_ptr,
    y_ptr,
    loss_ptr,
    grad_w_ptr,
    n,
    stride_grad,
    stride_hn,
    stride_hd,
    stride_y,
    D: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """One program: what BM positions give to the rows of their targets; uncovered ones have loss 0 and give nothing."""
    o_d = tl.arange(0, BD)
    o_n = tl.program_id(0) * BM + tl.arange(0, BM)
    b_loss = tl.load(loss_ptr + o_n, mask=o_n < n, other=0.0)
    m_n = b_loss != 0.0
    b_y = tl.load(y_ptr + o_n.to(tl.int64) * stride_y, mask=m_n, other=0)
    b_g = tl.load(grad_ptr + o_n.to(tl.int64) * stride_grad, mask=m_n, other=0.0).to(tl.float32)
    b_h = load_rows(h_ptr, o_n, stride_hn, stride_hd, m_n, o_d, D, DTYPE).to(tl.float32)
    add_rows(grad_w_ptr, b_y, b_h * (-minus_expm1(b_loss) * b_g)[:, None], m_n, o_d, D)
