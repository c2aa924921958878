"""Exponentials and logarithms. Kernels keep logits in units of log 2: exp2 is the instruction that the hardware has."""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def log_1p(x):
    """log(1 + x) to the last digits for x >= 0 of any size."""
    u = 1.0 + x
    # what rounding 1 + x did to x, it does to u - 1 too; beyond 2^24 the two are x
    return tl.where(u == 1.0, x, tl.log2(u) * LN_2 * (x / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit
def sigmoid(s):
    """1 / (1 + exp(-s)); nothing overflows."""
    t = tl.exp2(-tl.abs(s))
    return tl.where(s > 0, 1.0, t) / (1.0 + t)


@triton.jit
def softplus(s):
    """log(1 + exp(s)), a natural logarithm."""
    return tl.maximum(s, 0.0) * LN_2 + log_1p(tl.exp2(-tl.abs(s)))
