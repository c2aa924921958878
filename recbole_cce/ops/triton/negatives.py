"""Drawing negatives inside a kernel: the stream and the samplers of recbole_cce.ops.negatives, bit for bit."""

from __future__ import annotations

import triton
import triton.language as tl

from recbole_cce.ops.triton.exponentials import LOG2_E

NO_PADDING = 2**31 - 1  # stands for padding_idx=None in kernels: no row has this number


@triton.jit
def second(a, b):
    return b


@triton.jit
def once(numbers):
    """`numbers` [K], computed once and handed around.

    The compiler would draw again for each layout that wants the numbers, and in that layout many threads hold the same
    one. It does not do so with what a scan returns; this scan returns what it is given.
    """
    return tl.associative_scan(numbers, 0, second)


@triton.jit
def choose(word0, word1, size):
    """64 random bits, word0 the higher ones -> int32 in [0, size): the high word of their product."""
    b_size = tl.full(word0.shape, size, tl.uint32)
    return ((word0.to(tl.uint64) * b_size + tl.umulhi(word1, b_size)) >> 32).to(tl.int32)


@triton.jit
def draw_rows(seed, o_draw, table_ptr, num_items, padding_idx, POPULARITY: tl.constexpr):
    """Rows of the item table, int32, at the int64 numbers `o_draw` of the draws."""
    # tl.randint4x spelt out: before Triton 3.4 it draws 64-bit words where the numbers are 64-bit
    low, high = o_draw.to(tl.uint32), (o_draw >> 32).to(tl.uint32)
    word0, word1, word2, _ = tl.philox(seed, low, high, low * 0, low * 0)
    item = choose(word0, word1, num_items)
    if POPULARITY:
        p_entry = table_ptr + item.to(tl.int64) * 2
        keep = word2 < tl.load(p_entry).to(tl.uint32, bitcast=True)
        item = tl.where(keep, item, tl.load(p_entry + 1))
    return item + (item >= padding_idx).to(tl.int32)


@triton.jit
def log_k_q(log_q_ptr, rows, log_k, padding_idx, POPULARITY: tl.constexpr):
    """log2(K q) of drawn rows. `log_k`: log2 K, or log2(K / V) for uniform draws."""
    if POPULARITY:
        item = rows - (rows > padding_idx).to(tl.int32)
        return tl.load(log_q_ptr + item) * LOG2_E + log_k
    else:
        return tl.zeros(rows.shape, tl.float32) + log_k
