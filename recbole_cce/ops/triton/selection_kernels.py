"""The k rows of a table with the largest inner product with each of many directions, without all of these products.

A row's key for a direction holds its score and, below it, its number: keys differ, of equal scores the lowest row's is
the larger. So there is one answer, whatever the order in which keys are collected:

1. Score a sample of the rows and keep the largest score of each group of them. One of these is a bound, so far down
   that almost surely at least k rows reach it.
2. Score all rows, and collect the keys of those that reach the bound of their direction: one to three times k.
3. Select k of them. A direction for which there were fewer, or more than its share of memory holds, scans the table
   alone.
"""

import triton
import triton.language as tl

from recbole_cce.ops.triton.tiles import load_rows

EMPTY = tl.constexpr(-(2**63))  # below all keys: a row that is no candidate
COUNTER = tl.constexpr(8)  # a direction's counter has a sector of memory of its own, 32 bytes


@triton.jit
def ranks(b_s):
    """int32 in the order of the scores `b_s`, none of which is NaN; undone by bound_kernel()."""
    bits = (b_s + 0.0).to(tl.int32, bitcast=True)  # one zero
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def make_keys(b_s, o_r):
    """int64 keys of the scores `b_s` of rows `o_r` (int32). NaN counts as the largest score."""
    b_rank = tl.where(b_s == b_s, ranks(b_s), 0x7FFFFFFF)
    return (b_rank.to(tl.int64) << 32) | (0x7FFFFFFF - o_r).to(tl.int64)


@triton.jit
def candidates(o_r, y_ptr, num_rows, padding_idx, stride_y):
    """Which of the rows `o_r` can be selected: those with a target y, or all but padding_idx where there is no y."""
    m_r = o_r < num_rows
    if y_ptr is not None:
        b_y = tl.load(y_ptr + o_r.to(tl.int64) * stride_y, mask=m_r, other=0)
        return m_r & (b_y != padding_idx)
    else:
        return m_r & (o_r != padding_idx)


@triton.jit
def sampled_rows(o_j, spacing):
    """One row of each `spacing`, at numbers without a pattern: neighbours are alike, and so may be every fourth row."""
    offsets = (o_j.to(tl.uint32) * 2654435761) >> 16
    return o_j * spacing + (offsets % spacing.to(tl.uint32)).to(tl.int32)


@triton.jit
def claim(b_s, b_bound, b_r, o_b, count_ptr, ASSEMBLY: tl.constexpr):
    """Slots for the scores of rows x directions that reach the direction's bound, -1 for others and rows < 0.

    `count_ptr` as int64. Like put() in assembly on a GPU: the compiler would bring slots and keys into layouts for
    stores side by side, at seven times the instructions.
    """
    if ASSEMBLY:
        return tl.inline_asm_elementwise(
            """{
            .reg .pred p;
            .reg .b64 at;
            setp.geu.f32 p, $1, $2;
            setp.ge.and.s32 p, $3, 0, p;
            mov.b32 $0, -1;
            @!p bra done;
            mad.wide.u32 at, $4, 32, $5;
            atom.relaxed.gpu.global.add.u32 $0, [at], 1;
            done:
            }""",
            "=&r,f,f,r,r,l",
            [b_s, b_bound, b_r, o_b, count_ptr],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    else:
        m_key = ((b_s >= b_bound) | (b_s != b_s)) & (b_r >= 0)
        p_count = (count_ptr + o_b.to(tl.int64) * 32 + tl.zeros(b_s.shape, tl.int64)).to(
            tl.pointer_type(tl.int32), bitcast=True
        )
        return tl.where(m_key, tl.atomic_add(p_count, 1, mask=m_key, sem="relaxed"), -1)


@triton.jit
def put(b_s, b_slot, b_r, o_b, key_ptr, capacity, ASSEMBLY: tl.constexpr):
    """Store the keys of the scores that have a slot below the capacity. `key_ptr` as int64."""
    if ASSEMBLY:
        tl.inline_asm_elementwise(
            """{
            .reg .pred p;
            .reg .b32 high, low, sign;
            .reg .b64 at;
            setp.lt.u32 p, $2, $6;
            @!p bra done;
            add.f32 high, $1, 0f00000000;
            shr.s32 sign, high, 31;
            and.b32 sign, sign, 0x7fffffff;
            xor.b32 high, high, sign;
            setp.nan.f32 p, $1, $1;
            @p mov.b32 high, 0x7fffffff;
            sub.s32 low, 0x7fffffff, $3;
            mad.lo.u32 sign, $4, $6, $2;
            mad.wide.u32 at, sign, 8, $5;
            st.global.v2.b32 [at], {low, high};
            done:
            mov.b32 $0, 0;
            }""",
            "=&r,f,r,r,r,l,r",
            [b_s, b_slot, b_r, o_b, key_ptr, capacity],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    else:
        p_key = (key_ptr + (o_b * capacity + b_slot).to(tl.int64) * 8).to(tl.pointer_type(tl.int64), bitcast=True)
        tl.store(p_key, make_keys(b_s, b_r), mask=(b_slot >= 0) & (b_slot < capacity))


@triton.jit
def score_kernel(
    direction_ptr,
    table_ptr,
    y_ptr,
    bound_ptr,
    count_ptr,
    key_ptr,
    num_rows,
    num_directions,
    directions_each,
    padding_idx,
    capacity,
    num_samples,
    spacing,
    stride_tn,
    stride_td,
    stride_y,
    D: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    GROUP: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    MODE: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):
    """One program: the keys of BM rows for `directions_each` directions, BN at a time.

    key [directions, capacity]. MODE "all": the key of each row. MODE "sample": instead of keys the rank of the largest
    score of each GROUP sampled rows. MODE "reach": in any order the keys whose scores reach bound [directions], of
    which count [directions] says how many there are; those beyond the capacity are lost. NaN in a row claims slots of
    directions beyond the last one too, as many as fill a block: their counters exist, at the capacity or above.
    """
    i_m = tl.program_id(0)
    o_d = tl.arange(0, BD)
    if MODE == "sample":
        o_j = i_m + tl.arange(0, BM) * tl.num_programs(0)  # neighbours are in different groups
        o_r = tl.where(o_j < num_samples, sampled_rows(o_j, spacing), num_rows)
    else:
        o_r = i_m * BM + tl.arange(0, BM)
    m_r = candidates(o_r, y_ptr, num_rows, padding_idx, stride_y)
    b_t = load_rows(table_ptr, o_r, stride_tn, stride_td, m_r, o_d, D, DTYPE)
    first = tl.program_id(1) * directions_each
    last = tl.minimum(first + directions_each, num_directions)
    blocks = tl.cdiv(last - first, BN)
    end = blocks
    if MODE == "reach":  # slots of a block are waited for while the next one is scored, after the last one none
        end = blocks + 1
        b_old = tl.zeros([BM, BN], tl.float32)
        b_slot = tl.full([BM, BN], -1, tl.int32)
    for i in range(0, end):
        # programs begin with different directions, or all would wait for the same counters
        o_b = first + (i + i_m) % blocks * BN + tl.arange(0, BN)
        m_b = o_b < last
        b_b = load_rows(direction_ptr, o_b, D, 1, m_b, o_d, D, DTYPE)
        b_s = tl.dot(b_t, tl.trans(b_b), input_precision=PRECISION)
        if MODE == "reach":
            o_before = first + (i + i_m + blocks - 1) % blocks * BN + tl.arange(0, BN)
            put(b_old, b_slot, o_r[:, None], o_before[None, :], key_ptr.to(tl.int64), capacity, ASSEMBLY)
            b_old = b_s
            b_bound = tl.load(bound_ptr + o_b, mask=m_b, other=float("inf"))
            b_r = tl.where(m_r & (i < blocks), o_r, -1)
            b_slot = claim(b_s, b_bound[None, :], b_r[:, None], o_b[None, :], count_ptr.to(tl.int64), ASSEMBLY)
        elif MODE == "sample":
            b_s = tl.where(m_r[:, None], b_s, -float("inf"))
            b_s = tl.max(tl.reshape(b_s, [BM // GROUP, GROUP, BN]), 1)
            o_g = i_m * (BM // GROUP) + tl.arange(0, BM // GROUP)
            b_s = tl.where(b_s == b_s, b_s, float("inf"))
            tl.store(key_ptr + o_b[None, :] * capacity + o_g[:, None], ranks(b_s), mask=m_b[None, :])
        else:
            b_key = tl.where(m_r[:, None] & m_b[None, :], make_keys(b_s, o_r[:, None]), EMPTY)
            p_key = key_ptr + o_b.to(tl.int64)[None, :] * capacity
            tl.store(p_key + o_r[:, None], b_key, mask=(o_r < num_rows)[:, None] & m_b[None, :])


@triton.jit
def kth_key(key_ptr, count, k, BLOCK: tl.constexpr, BITS: tl.constexpr = 64):
    """A number that k of the `count` keys reach, the least one if there are not more: bit by bit from the highest.

    Where keys are different, no more than k reach it.
    """
    TYPE: tl.constexpr = tl.int64 if BITS == 64 else tl.int32
    LEAST: tl.constexpr = -(2 ** (BITS - 1))
    o_k = tl.arange(0, BLOCK)
    b_key = tl.load(key_ptr + o_k, mask=o_k < count, other=LEAST)
    bound = tl.full((), LEAST, TYPE)
    reached = tl.full((), 0, tl.int32) + count
    bit = tl.full((), BITS - 1, TYPE)
    while (bit >= 0) & (reached != k):
        trial = bound + (tl.full((), 1, TYPE) << bit)
        number = tl.sum((b_key >= trial).to(tl.int32), 0)
        for start in range(BLOCK, count, BLOCK):
            b_more = tl.load(key_ptr + start + o_k, mask=start + o_k < count, other=LEAST)
            number += tl.sum((b_more >= trial).to(tl.int32), 0)
        enough = number >= k
        bound = tl.where(enough, trial, bound)
        reached = tl.where(enough, number, reached)
        bit -= 1
    return bound


@triton.jit
def bound_kernel(rank_ptr, bound_ptr, count_ptr, count, capacity, reaching, BLOCK: tl.constexpr):
    """One program: the bound of a direction, which `reaching` of its sampled ranks reach; nothing is collected yet."""
    i_b = tl.program_id(0)
    rank = kth_key(rank_ptr + i_b.to(tl.int64) * capacity, count, reaching, BLOCK, 32)
    rank = tl.maximum(rank, -2139095041)  # of minus infinity; ranks below are of no number
    bits = rank ^ ((rank >> 31) & 0x7FFFFFFF)
    tl.store(bound_ptr + i_b, bits.to(tl.float32, bitcast=True))
    tl.store(count_ptr + i_b * COUNTER, 0)


@triton.jit
def scan(
    key_ptr, direction_ptr, table_ptr, y_ptr, num_rows, padding_idx, capacity, k, stride_tn, stride_td, stride_y,
    D: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Collect keys of the whole table for one direction; whenever the memory is full, only the k largest stay."""
    o_d = tl.arange(0, BD)
    o_k = tl.arange(0, BLOCK)
    b_b = tl.load(direction_ptr + o_d, mask=o_d < D, other=0.0).to(tl.float32)
    bound = tl.full((), EMPTY, tl.int64)
    count = 0
    for start in range(0, num_rows, BR):
        o_r = start + tl.arange(0, BR)
        m_r = candidates(o_r, y_ptr, num_rows, padding_idx, stride_y)
        b_t = load_rows(table_ptr, o_r, stride_tn, stride_td, m_r, o_d, D, DTYPE).to(tl.float32)
        b_key = make_keys(tl.sum(b_t * b_b[None, :], 1), o_r)
        m_r &= b_key >= bound
        tl.store(key_ptr + count + tl.cumsum(m_r.to(tl.int32), 0) - 1, b_key, mask=m_r)
        count += tl.sum(m_r.to(tl.int32), 0)
        if count > capacity - BR:
            tl.debug_barrier()
            bound = kth_key(key_ptr, count, k, BLOCK)
            kept = 0
            for first in range(0, count, BLOCK):
                b_kept = tl.load(key_ptr + first + o_k, mask=first + o_k < count, other=EMPTY)
                m_k = (b_kept >= bound) & (b_kept != EMPTY)
                tl.debug_barrier()  # what is written over has been read, by this or another thread
                tl.store(key_ptr + kept + tl.cumsum(m_k.to(tl.int32), 0) - 1, b_kept, mask=m_k)
                kept += tl.sum(m_k.to(tl.int32), 0)
            count = kept
            tl.debug_barrier()
    tl.debug_barrier()
    return count


@triton.jit
def select_kernel(
    direction_ptr,
    table_ptr,
    y_ptr,
    bound_ptr,
    count_ptr,
    key_ptr,
    out_ptr,
    num_rows,
    padding_idx,
    capacity,
    k,
    stride_tn,
    stride_td,
    stride_y,
    D: tl.constexpr,
    BD: tl.constexpr,
    BR: tl.constexpr,
    BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """One program: the rows out [directions, k] of the k largest keys of a direction; -1 where there are fewer.

    Without count_ptr the keys of all rows are there.
    """
    i_b = tl.program_id(0).to(tl.int64)
    p_key = key_ptr + i_b * capacity
    p_out = out_ptr + i_b * k
    count = num_rows
    if count_ptr is not None:
        count = tl.load(count_ptr + i_b * COUNTER)
        # minus infinity lets all rows through, were they fewer than k
        too_few = (count < k) & (tl.load(bound_ptr + i_b) > -float("inf"))
        if too_few | (count > capacity):
            count = scan(
                p_key, direction_ptr + i_b * D, table_ptr, y_ptr, num_rows, padding_idx, capacity, k, stride_tn,
                stride_td, stride_y, D, BD, BR, BLOCK, DTYPE,
            )  # fmt: skip
    bound = kth_key(p_key, count, k, BLOCK)
    o_k = tl.arange(0, BLOCK)
    filled = 0
    for start in range(0, count, BLOCK):
        b_key = tl.load(p_key + start + o_k, mask=start + o_k < count, other=EMPTY)
        m_k = (b_key >= bound) & (b_key != EMPTY)
        b_row = 0x7FFFFFFF - (b_key & 0x7FFFFFFF).to(tl.int32)
        tl.store(p_out + filled + tl.cumsum(m_k.to(tl.int32), 0) - 1, b_row, mask=m_k)
        filled += tl.sum(m_k.to(tl.int32), 0)
    for start in range(filled, k, BLOCK):
        tl.store(p_out + start + o_k, -1, mask=start + o_k < k)
