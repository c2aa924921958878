"""The end of a softmax whose target is kept apart from the others."""

import triton
import triton.language as tl

from recbole_cce.ops.triton.exponentials import LN_2, log_1p


@triton.jit
def finish(b_ref, b_mass, b_sy):
    """Loss, log-sum-exp in units of log 2, slope = d loss / d target logit, and 1 / denominator in units of b_ref.

    The mass of the others is kept apart from the target's: 1 - p then loses no digit where p is near 1.
    """
    b_max = tl.maximum(b_ref, b_sy)
    b_unit = tl.exp2(b_ref - b_max)
    b_others = b_mass * b_unit
    b_total = b_others + tl.exp2(b_sy - b_max)
    b_log = tl.log2(b_total)
    b_loss = tl.where(b_sy >= b_ref, log_1p(b_others), (b_max - b_sy + b_log) * LN_2)
    return b_loss, b_max.to(tl.float64) + b_log, -b_others / b_total, b_unit / b_total
