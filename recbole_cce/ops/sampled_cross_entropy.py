"""Cross-entropy with negative sampling, CCE-, without the negatives or their logits in memory."""

from __future__ import annotations

import torch

from recbole_cce.ops import backend as backends
from recbole_cce.ops import checks, derivatives
from recbole_cce.ops.negatives import SHARINGS, Popularity, Uniform, make_seed
from recbole_cce.ops.reference import autocast_rounding
from recbole_cce.ops.reference import sampled_cross_entropy as reference


def sampled_cross_entropy(
    input: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    *,
    num_negatives: int,
    sampler: Uniform | Popularity | None = None,
    sharing: str = "tile",
    logq_correction: bool = True,
    seed: int | torch.Tensor | None = None,
    padding_idx: int | None = 0,
    reduction: str = "mean",
    backend: str = "auto",
) -> torch.Tensor:
    """Cross-entropy of each row's target against K sampled items.

    loss_i = -s_iy + log( exp(s_iy) + sum_{k: n_k != y} exp(s_{i n_k} - log(K q(n_k))) ),  n_1..n_K ~ q i.i.d.

    The sum over negatives is an unbiased estimate of the full one for any q; a negative that is the target itself
    contributes 0, and the target's logit is not corrected.

    Args:
        input: [N, D] hidden states.
        weight: [V+1, D] item table.
        target: [N] int64 rows of `weight`; rows equal to `padding_idx` count for nothing.
        num_negatives: K, draws per position, with replacement.
        sampler: q; Uniform() if None, or Popularity(counts, alpha).
        sharing: "none": each position draws its own K. "tile": up to 128 positions, N/128 apart from each other,
            share K draws. "batch": all share K draws. Each position sees K draws from q in each case.
        logq_correction: False drops log(K q), which is plain sampled softmax.
        seed: integer or 0-d int64 tensor that fixes the negatives; drawn from the device's generator if None.
        padding_idx: the row of `weight` that is never drawn; None makes every row a candidate.
        reduction: "mean" over the counted rows (0 if there are none), "sum", or "none": [N], 0 at ignored rows.
        backend: "auto", "triton" or "torch"; only "auto" may fall back to torch, and logs it once. The same seed
            gives the same negatives in each.

    Returns:
        The loss, fp32 (fp64 if an input is fp64).

    Dtypes: fp64, fp32, bf16 or fp16 inputs, also mixed. Under autocast their rows are rounded to its dtype as they
    are read. Logits, log-sum-exp and gradient sums are fp32 (fp64 for fp64); gradients have their input's dtype. The
    kernel rounds that of a 16-bit `input` twice where the upstream gradient is not a mean's.

    Raises:
        ValueError: a wrong shape, dtype, device, option or, on the CPU, target id; names the argument.
        RuntimeError: backend="triton" where the kernel cannot run.

    Source: CCE-, arXiv 2509.09682; the correction after Bengio & Senecal 2008.
    """
    checks.check_inputs(input, weight, target, padding_idx, reduction)
    draws = make_draws(input, weight, num_negatives, sampler, sharing, logq_correction, seed, padding_idx)
    dtypes = (input.dtype, weight.dtype, draws.rounding)
    counted = checks.counted(target, padding_idx)
    number = checks.number(counted)
    chosen = backends.choose("sampled_cross_entropy", backend, input.device, dtypes, input.size(1))
    if chosen == "triton":
        derivatives.refuse_forward_mode(input, weight)
        from recbole_cce.ops.triton import sampled_cross_entropy as kernels  # triton may be missing elsewhere

        loss = kernels.sampled_cross_entropy(input, weight, target, draws, number if reduction == "mean" else None)
    else:
        loss = reference.sampled_cross_entropy(input, weight, target, draws)
    return checks.reduce(loss, counted, number, reduction)


def make_draws(
    input: torch.Tensor,
    weight: torch.Tensor,
    num_negatives: int,
    sampler: Uniform | Popularity | None,
    sharing: str,
    logq_correction: bool,
    seed: int | torch.Tensor | None,
    padding_idx: int | None,
) -> reference.Draws:
    """Check what concerns the negatives and put it together."""
    checks.check_count("num_negatives", num_negatives)
    checks.check_choice("sharing", sharing, SHARINGS)
    sampler = Uniform() if sampler is None else sampler
    num_items = len(weight) - (padding_idx is not None)
    if not isinstance(sampler, (Uniform, Popularity)):
        raise ValueError(f"sampler: {sampler!r} is not valid; it takes Uniform() or Popularity(counts, alpha)")
    if isinstance(sampler, Popularity) and len(sampler.table) != num_items:
        raise ValueError(f"sampler: has counts of {len(sampler.table)} items, weight has {num_items}")
    if isinstance(sampler, Popularity) and sampler.table.device != weight.device:
        raise ValueError(f"sampler: is on {sampler.table.device}, weight on {weight.device}")
    return reference.Draws(
        sampler=sampler,
        seed=make_seed(seed, input.device),
        num_negatives=num_negatives,
        sharing=sharing,
        logq_correction=logq_correction,
        padding_idx=padding_idx,
        rounding=autocast_rounding(input, weight),
    )
