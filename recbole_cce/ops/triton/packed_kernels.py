"""Causal attention inside sequences that stand one after another: blocks of positions, of whatever sequences.

`span` [P, 2] says where each position's sequence starts and ends. Starts and ends grow with positions, so what a block
of positions meets is one range: keys from the start of its first position on, queries up to the end of its last one.

Logits are in units of log 2: exp2 is the instruction that the hardware has. A program is a block of positions and a
head.
"""

import triton
import triton.language as tl

from recbole_cce.ops.triton.exponentials import LN_2
from recbole_cce.ops.triton.tiles import add_product, in_matrix, load_rows, logits

LOWEST = tl.constexpr(-3.4028234663852886e38)  # no logit is below; minus itself it is 0, as -inf is not
NOWHERE = tl.constexpr(2**31 - 1)  # the start of the sequence of a position past the last: it sees no key


@triton.jit
def seen(b_start, o_m, o_n):
    """[BM, BN]: whether keys `o_n` are in the sequences of queries `o_m`, which begin at `b_start`, and not after."""
    return (o_n[None, :] >= b_start[:, None]) & (o_n[None, :] <= o_m[:, None])


@triton.jit
def kept(seed_ptr, o_m, first, i_head, threshold, BM: tl.constexpr, BN: tl.constexpr):
    """[BM, BN]: which weights of queries `o_m` on the BN keys from `first`, a multiple of 4, on dropout keeps.

    Four neighbouring keys take the four words of one counter, as in kept() of the reference. `threshold`: the 32 bits
    of the lowest word that is kept.
    """
    b_zero = tl.zeros([BM, BN // 4], tl.int32)
    b_key = b_zero + (first // 4 + tl.arange(0, BN // 4))[None, :]
    word0, word1, word2, word3 = tl.philox(tl.load(seed_ptr), b_zero + o_m[:, None], b_key, b_zero + i_head, b_zero)
    least = threshold.to(tl.uint32, bitcast=True)
    b_0, b_1 = (word0 >= least).to(tl.int8), (word1 >= least).to(tl.int8)
    b_2, b_3 = (word2 >= least).to(tl.int8), (word3 >= least).to(tl.int8)
    return tl.reshape(tl.join(tl.join(b_0, b_2), tl.join(b_1, b_3)), [BM, BN]) != 0


@triton.jit(do_not_specialize=["threshold"])
def packed_forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    span_ptr,
    seed_ptr,
    out_ptr,
    lse_ptr,
    num_positions,
    scale,
    threshold,
    keep_scale,
    stride_qp,
    stride_qh,
    stride_kp,
    stride_kh,
    stride_vp,
    stride_vh,
    D: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """BM queries of a head: out [P, H, D] and log-sum-exp [H, P]. `seed_ptr`: None without dropout."""
    i_block, i_head = tl.program_id(0), tl.program_id(1)
    o_d = tl.arange(0, BD)
    o_m = i_block * BM + tl.arange(0, BM)
    m_m = o_m < num_positions
    b_q = load_rows(q_ptr + i_head * stride_qh, o_m, stride_qp, 1, m_m, o_d, D, DTYPE)
    b_start = tl.load(span_ptr + 2 * o_m.to(tl.int64), mask=m_m, other=NOWHERE)
    b_max = tl.full([BM], LOWEST, tl.float32)
    b_mass = tl.zeros([BM], tl.float32)
    b_sum = tl.zeros([BM, BD], tl.float32)
    first = tl.maximum(tl.load(span_ptr + 2 * (i_block * BM).to(tl.int64)), 0) // 4 * 4
    last = tl.minimum(i_block * BM + BM, num_positions)
    for start in range(first, last, BN):
        o_n = start + tl.arange(0, BN)
        b_k = load_rows(k_ptr + i_head * stride_kh, o_n, stride_kp, 1, o_n < last, o_d, D, DTYPE)
        b_v = load_rows(v_ptr + i_head * stride_vh, o_n, stride_vp, 1, o_n < last, o_d, D, DTYPE)
        b_s = logits(b_q, b_k, PRECISION) * scale
        b_s = tl.where(seen(b_start, o_m, o_n), b_s, -float("inf"))
        b_new = tl.maximum(b_max, tl.max(b_s, 1))
        b_p = tl.exp2(b_s - b_new[:, None])
        b_unit = tl.exp2(b_max - b_new)
        b_mass = b_mass * b_unit + tl.sum(b_p, 1)
        if seed_ptr is not None:
            b_p = tl.where(kept(seed_ptr, o_m, start, i_head, threshold, BM, BN), b_p, 0.0)
        b_sum = add_product(b_p, b_v, b_sum * b_unit[:, None], PRECISION)
        b_max = b_new
    b_mass = tl.maximum(b_mass, 1.0)  # its largest term is 1, but past the last position
    b_sum = b_sum / b_mass[:, None]
    if seed_ptr is not None:
        b_sum *= keep_scale
    o_out = (o_m.to(tl.int64) * tl.num_programs(1) + i_head) * D
    tl.store(out_ptr + o_out[:, None] + o_d[None, :], b_sum, mask=in_matrix(m_m, o_d, D))
    tl.store(lse_ptr + i_head.to(tl.int64) * num_positions + o_m, b_max + tl.log2(b_mass), mask=m_m)


@triton.jit
def weights_and_slopes(
    b_q,
    b_k,
    b_v,
    b_grad,
    b_lse,
    b_delta,
    b_start,
    o_m,
    o_n,
    first,
    seed_ptr,
    i_head,
    scale,
    threshold,
    keep_scale,
    BM: tl.constexpr,
    BN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """[BM, BN] weights after dropout of queries `o_m` on keys `o_n`, which begin at `first`, and the gradients of their
    logits."""
    b_s = logits(b_q, b_k, PRECISION) * scale
    b_p = tl.where(seen(b_start, o_m, o_n), tl.exp2(b_s - b_lse[:, None]), 0.0)
    b_slope = logits(b_grad, b_v, PRECISION)
    b_weight = b_p
    if seed_ptr is not None:
        b_keep = tl.where(kept(seed_ptr, o_m, first, i_head, threshold, BM, BN), keep_scale, 0.0)
        b_weight = b_p * b_keep
        b_slope *= b_keep
    # the first of a sequence has one weight, of no slope: the output that delta is from has been rounded
    return b_weight, tl.where((o_m > b_start)[:, None], b_p * (b_slope - b_delta[:, None]), 0.0)


@triton.jit(do_not_specialize=["threshold"])
def packed_backward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    span_ptr,
    seed_ptr,
    out_ptr,
    lse_ptr,
    grad_ptr,
    grad_q_ptr,
    grad_k_ptr,
    grad_v_ptr,
    num_positions,
    scale,
    threshold,
    keep_scale,
    stride_qp,
    stride_qh,
    stride_kp,
    stride_kh,
    stride_vp,
    stride_vh,
    D: tl.constexpr,
    BD: tl.constexpr,
    STAY: tl.constexpr,
    STREAM: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of STAY queries of a head, or of STAY keys and their values, by the third number of the program.

    `grad_ptr` [P, H, D], as the output and the gradients. The rows of grad * out sum up to delta, what a softmax takes
    off the slope of each weight; a program of keys sums them up again for the queries that it meets.
    """
    i_block, i_head = tl.program_id(0), tl.program_id(1)
    q_ptr += i_head * stride_qh
    k_ptr += i_head * stride_kh
    v_ptr += i_head * stride_vh
    stride_out = tl.num_programs(1) * D
    out_ptr += i_head * D
    grad_ptr += i_head * D
    lse_ptr += i_head.to(tl.int64) * num_positions
    o_d = tl.arange(0, BD)
    o_s = i_block * STAY + tl.arange(0, STAY)
    m_s = o_s < num_positions
    last = tl.minimum(i_block * STAY + STAY, num_positions)
    p_stay = o_s.to(tl.int64)[:, None] * stride_out + i_head * D + o_d[None, :]
    if tl.program_id(2) == 0:
        b_q = load_rows(q_ptr, o_s, stride_qp, 1, m_s, o_d, D, DTYPE)
        b_grad = load_rows(grad_ptr, o_s, stride_out, 1, m_s, o_d, D, DTYPE)
        b_out = load_rows(out_ptr, o_s, stride_out, 1, m_s, o_d, D, DTYPE)
        b_delta = tl.sum(b_grad.to(tl.float32) * b_out.to(tl.float32), 1)
        b_lse = tl.load(lse_ptr + o_s, mask=m_s, other=0.0)
        b_start = tl.load(span_ptr + 2 * o_s.to(tl.int64), mask=m_s, other=NOWHERE)
        b_grad_q = tl.zeros([STAY, BD], tl.float32)
        first = tl.maximum(tl.load(span_ptr + 2 * (i_block * STAY).to(tl.int64)), 0) // 4 * 4
        for start in range(first, last, STREAM):
            o_n = start + tl.arange(0, STREAM)
            b_k = load_rows(k_ptr, o_n, stride_kp, 1, o_n < last, o_d, D, DTYPE)
            b_v = load_rows(v_ptr, o_n, stride_vp, 1, o_n < last, o_d, D, DTYPE)
            _, b_slope = weights_and_slopes(
                b_q, b_k, b_v, b_grad, b_lse, b_delta, b_start, o_s, o_n, start, seed_ptr, i_head, scale, threshold,
                keep_scale, STAY, STREAM, PRECISION,
            )  # fmt: skip
            b_grad_q = add_product(b_slope, b_k, b_grad_q, PRECISION)
        tl.store(grad_q_ptr + p_stay, b_grad_q * (scale * LN_2), mask=in_matrix(m_s, o_d, D))
    else:
        b_k = load_rows(k_ptr, o_s, stride_kp, 1, m_s, o_d, D, DTYPE)
        b_v = load_rows(v_ptr, o_s, stride_vp, 1, m_s, o_d, D, DTYPE)
        b_grad_k = tl.zeros([STAY, BD], tl.float32)
        b_grad_v = tl.zeros([STAY, BD], tl.float32)
        end = tl.minimum(tl.load(span_ptr + 2 * (last - 1).to(tl.int64) + 1), num_positions)
        for start in range(i_block * STAY, end, STREAM):
            o_m = start + tl.arange(0, STREAM)
            m_m = o_m < end
            b_q = load_rows(q_ptr, o_m, stride_qp, 1, m_m, o_d, D, DTYPE)
            b_grad = load_rows(grad_ptr, o_m, stride_out, 1, m_m, o_d, D, DTYPE)
            b_out = load_rows(out_ptr, o_m, stride_out, 1, m_m, o_d, D, DTYPE)
            b_delta = tl.sum(b_grad.to(tl.float32) * b_out.to(tl.float32), 1)
            b_lse = tl.load(lse_ptr + o_m, mask=m_m, other=0.0)
            b_start = tl.load(span_ptr + 2 * o_m.to(tl.int64), mask=m_m, other=NOWHERE)
            b_weight, b_slope = weights_and_slopes(
                b_q, b_k, b_v, b_grad, b_lse, b_delta, b_start, o_m, o_s, i_block * STAY, seed_ptr, i_head, scale,
                threshold, keep_scale, STREAM, STAY, PRECISION,
            )  # fmt: skip
            b_grad_v = add_product(tl.trans(b_weight), b_grad, b_grad_v, PRECISION)
            b_grad_k = add_product(tl.trans(b_slope), b_q, b_grad_k, PRECISION)
        tl.store(grad_k_ptr + p_stay, b_grad_k * (scale * LN_2), mask=in_matrix(m_s, o_d, D))
        tl.store(grad_v_ptr + p_stay, b_grad_v, mask=in_matrix(m_s, o_d, D))
