"""Full cross-entropy over an item table without its logits in memory."""

from __future__ import annotations

import torch

from recbole_cce.ops import backend as backends
from recbole_cce.ops import checks, derivatives
from recbole_cce.ops.reference import autocast_rounding
from recbole_cce.ops.reference import linear_cross_entropy as reference


def linear_cross_entropy(
    input: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    *,
    padding_idx: int | None = 0,
    reduction: str = "mean",
    backend: str = "auto",
) -> torch.Tensor:
    """Cross-entropy of each row's target against every item, exact.

    loss_i = -s_iy + log sum_{j != padding_idx} exp(s_ij),  s_ij = <input_i, weight_j>,  y = target_i

    No gradient is filtered: softmaxes over items are flat, and their small entries carry most of the signal.

    Args:
        input: [N, D] hidden states.
        weight: [V+1, D] item table.
        target: [N] int64 rows of `weight`; rows equal to `padding_idx` count for nothing.
        padding_idx: the row of `weight` that is no candidate; None makes every row one.
        reduction: "mean" over the counted rows (0 if there are none), "sum", or "none": [N], 0 at ignored rows.
        backend: "auto", "triton" or "torch"; only "auto" may fall back to torch, and logs it once.

    Returns:
        The loss, fp32 (fp64 if an input is fp64).

    Dtypes: fp64, fp32, bf16 or fp16 inputs, also mixed. Under autocast their rows are rounded to its dtype as they
    are read. Logits, log-sum-exp and gradient sums are fp32 (fp64 for fp64); gradients have their input's dtype.

    Raises:
        ValueError: a wrong shape, dtype, device, option or, on the CPU, target id; names the argument.
        RuntimeError: backend="triton" where the kernel cannot run.

    Source: the standard loss; without logits after Wijmans et al., Cut Your Losses, arXiv 2411.09009.
    """
    checks.check_inputs(input, weight, target, padding_idx, reduction)
    rounding = autocast_rounding(input, weight)
    dtypes = (input.dtype, weight.dtype, rounding)
    chosen = backends.choose("linear_cross_entropy", backend, input.device, dtypes, input.size(1))
    if chosen == "triton":
        derivatives.refuse_forward_mode(input, weight)
        from recbole_cce.ops.triton import linear_cross_entropy as kernels  # triton may be missing elsewhere

        loss = kernels.linear_cross_entropy(input, weight, target, padding_idx, rounding)
    else:
        loss = reference.linear_cross_entropy(input, weight, target, padding_idx)
    counted = checks.counted(target, padding_idx)
    return checks.reduce(loss, counted, checks.number(counted), reduction)
