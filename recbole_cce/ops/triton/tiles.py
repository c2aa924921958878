"""Tiles of matrices: rows that are loaded, stored and added, and their products."""

import triton
import triton.language as tl


@triton.jit
def in_matrix(mask, o_d, D: tl.constexpr):
    """`mask` [R] of rows and the columns below D as a mask of a tile. `o_d`: all of the padded columns or a half."""
    if o_d.shape[0] == D or o_d.shape[0] * 2 == D:
        return mask[:, None]
    else:
        return mask[:, None] & (o_d < D)[None, :]


@triton.jit
def load_rows(
    ptr, rows, stride_row, stride_col, mask, o_d, D: tl.constexpr, DTYPE: tl.constexpr, STREAM: tl.constexpr = False
):
    """Columns `o_d` of rows of a matrix, rounded to DTYPE, zero past column D and where `mask` [R] is False.

    STREAM: read this once; it leaves the cache first.
    """
    p = ptr + rows.to(tl.int64)[:, None] * stride_row + o_d[None, :] * stride_col
    EVICT: tl.constexpr = "evict_first" if STREAM else ""
    return tl.load(p, mask=in_matrix(mask, o_d, D), other=0.0, eviction_policy=EVICT).to(DTYPE)


@triton.jit
def store_rows(ptr, rows, b, mask, o_d, D: tl.constexpr):
    """Write columns `o_d` of rows of a matrix [, D] where `mask` [R] is True; they leave the cache first."""
    p = ptr + rows.to(tl.int64)[:, None] * D + o_d[None, :]
    tl.store(p, b, mask=in_matrix(mask, o_d, D), eviction_policy="evict_first")


@triton.jit
def add_rows(ptr, rows, b, mask, o_d, D: tl.constexpr):
    """Add to columns `o_d` of rows of a matrix [, D] where `mask` [R] is True."""
    p = ptr + rows.to(tl.int64)[:, None] * D + o_d[None, :]
    tl.atomic_add(p, b, mask=in_matrix(mask, o_d, D), sem="relaxed")


@triton.jit
def halves(b_x):
    """Even and odd columns."""
    return tl.split(tl.reshape(b_x, [b_x.shape[0], b_x.shape[1] // 2, 2]))


@triton.jit
def logits(b_x, b_y, PRECISION: tl.constexpr):
    """b_x @ b_y.T in fp32."""
    LONG: tl.constexpr = b_x.shape[1] >= 64 and PRECISION == "ieee"
    if LONG and b_x.dtype == tl.float32:  # in this order: Triton 3.2 takes no other
        # Without tensor cores a product adds up its terms one by one: four sums have half the error of one. For the
        # last argument see add_product().
        b_x0, b_x1 = halves(b_x)
        b_y0, b_y1 = halves(b_y)
        b_x00, b_x01 = halves(b_x0)
        b_x10, b_x11 = halves(b_x1)
        b_y00, b_y01 = halves(b_y0)
        b_y10, b_y11 = halves(b_y1)
        b_s0 = tl.dot(b_x00, tl.trans(b_y00), input_precision=PRECISION, max_num_imprecise_acc=1)
        b_s1 = tl.dot(b_x01, tl.trans(b_y01), input_precision=PRECISION, max_num_imprecise_acc=1)
        b_s2 = tl.dot(b_x10, tl.trans(b_y10), input_precision=PRECISION, max_num_imprecise_acc=1)
        b_s3 = tl.dot(b_x11, tl.trans(b_y11), input_precision=PRECISION, max_num_imprecise_acc=1)
        return (b_s0 + b_s1) + (b_s2 + b_s3)
    else:
        return tl.dot(b_x, tl.trans(b_y), input_precision=PRECISION)


@triton.jit
def add_logits(b_s, b_x, b_y, PRECISION: tl.constexpr):
    """b_s + b_x @ b_y.T in fp32."""
    if b_x.dtype == tl.float32:
        return b_s + logits(b_x, b_y, PRECISION)
    else:
        return tl.dot(b_x, tl.trans(b_y), b_s, input_precision=PRECISION)


@triton.jit
def add_product(b_p, b_w, b_sum, PRECISION: tl.constexpr):
    """b_sum + b_p @ b_w, the sum in fp32."""
    if b_w.dtype == tl.float32:
        # Without tensor cores each term would be rounded to the size of the whole sum. The last argument, which
        # is about other dtypes, keeps the compiler from putting the sum back into the product.
        return b_sum + tl.dot(b_p, b_w, input_precision=PRECISION, max_num_imprecise_acc=1)
    else:
        return tl.dot(b_p.to(b_w.dtype), b_w, b_sum)
