"""Binary cross-entropy with negative sampling: the losses of SASRec and gSASRec."""

from __future__ import annotations

import math

import torch

from recbole_cce.ops import backend as backends
from recbole_cce.ops import checks, derivatives
from recbole_cce.ops.negatives import Popularity, Uniform
from recbole_cce.ops.reference import sampled_cross_entropy as reference
from recbole_cce.ops.sampled_cross_entropy import make_draws


def sampled_binary_cross_entropy(
    input: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    *,
    num_negatives: int,
    positive_weight: float = 1.0,
    sampler: Uniform | Popularity | None = None,
    sharing: str = "tile",
    seed: int | torch.Tensor | None = None,
    padding_idx: int | None = 0,
    reduction: str = "mean",
    backend: str = "auto",
) -> torch.Tensor:
    """Binary cross-entropy of each row's target as positive and K sampled items as negatives.

    loss_i = -1/(K+1) * ( beta log sigmoid(s_iy) + sum_{k: n_k != y} log sigmoid(-s_{i n_k}) )

    Args:
        input, weight, target, num_negatives, sampler, sharing, seed, padding_idx, reduction, backend: as in
            sampled_cross_entropy.
        positive_weight: beta; 1 for SASRec, gbce_beta(...) for gSASRec.

    Returns:
        The loss, fp32 (fp64 if an input is fp64).

    Dtypes: as in sampled_cross_entropy.

    Raises:
        ValueError: a wrong shape, dtype, device, option or, on the CPU, target id; names the argument.
        RuntimeError: backend="triton" where the kernel cannot run.

    Source: Kang & McAuley, SASRec, ICDM 2018; Petrov & Macdonald, gSASRec, RecSys 2023.
    """
    checks.check_inputs(input, weight, target, padding_idx, reduction)
    draws = make_draws(input, weight, num_negatives, sampler, sharing, False, seed, padding_idx)
    if isinstance(positive_weight, torch.Tensor) or not 0 <= positive_weight < math.inf:
        raise ValueError(f"positive_weight: {positive_weight!r} is not valid; it takes a finite number >= 0")
    dtypes = (input.dtype, weight.dtype, draws.rounding)
    counted = checks.counted(target, padding_idx)
    number = checks.number(counted)
    chosen = backends.choose("sampled_binary_cross_entropy", backend, input.device, dtypes, input.size(1))
    if chosen == "triton":
        derivatives.refuse_forward_mode(input, weight)
        from recbole_cce.ops.triton import sampled_cross_entropy as kernels  # triton may be missing elsewhere

        mean = number if reduction == "mean" else None
        loss = kernels.sampled_cross_entropy(input, weight, target, draws, mean, positive_weight)
    else:
        loss = reference.sampled_binary_cross_entropy(input, weight, target, draws, positive_weight)
    return checks.reduce(loss, counted, number, reduction)


def gbce_beta(num_negatives: int, num_items: int, t: float) -> float:
    """Weight of the positive in gBCE (Petrov & Macdonald, RecSys 2023).

    beta = alpha (t (1 - 1/alpha) + 1/alpha) with the sampling rate alpha = K / (V - 1), at most 1. t = 0 gives 1,
    plain BCE; t = 1 gives alpha, calibrated probabilities.

    Args:
        num_negatives: K.
        num_items: V.
        t: calibration in [0, 1].

    Raises:
        ValueError: num_negatives or num_items below 1, t outside [0, 1].
    """
    checks.check_count("num_negatives", num_negatives)
    checks.check_count("num_items", num_items)
    if not 0 <= t <= 1:
        raise ValueError(f"t: {t!r} is not valid; it takes a number in [0, 1]")
    alpha = min(1.0, num_negatives / max(1, num_items - 1))
    return alpha * (t * (1 - 1 / alpha) + 1 / alpha)
