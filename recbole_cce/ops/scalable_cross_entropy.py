"""Scalable cross-entropy, SCE: softmax over the hardest part of the catalogue, found by random projections."""

from __future__ import annotations

import math

import torch

from recbole_cce.ops import backend as backends
from recbole_cce.ops import checks, derivatives
from recbole_cce.ops.reference import autocast_rounding
from recbole_cce.ops.reference import scalable_cross_entropy as reference

AUTO_BUCKET_SIZE_Y = 256
MAX_SLOTS = 2**31 - 1


def scalable_cross_entropy(
    input: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    *,
    n_buckets: int | str = "auto",
    bucket_size_x: int | str = "auto",
    bucket_size_y: int | str = AUTO_BUCKET_SIZE_Y,
    mix_x: bool = False,
    generator: torch.Generator | None = None,
    padding_idx: int | None = 0,
    reduction: str = "mean",
    return_coverage: bool = False,
    backend: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy of positions against the items that share a bucket with them.

    Over the n rows that count: B random directions b; each takes the X positions with the largest <b, input_i> and
    the Y items with the largest <b, weight_j>, without gradient. In each bucket, for each of its positions,

    loss_i = -s_iy + log( exp(s_iy) + sum_{j in bucket, j != y} exp(s_ij) ),  y = target_i

    A position in several buckets keeps its largest loss (of equal ones the lowest bucket's), which alone carries
    gradient. A position in none is left out.

    Args:
        input: [N, D] hidden states.
        weight: [V+1, D] item table.
        target: [N] int64 rows of `weight`; rows equal to `padding_idx` are removed before anything else.
        n_buckets: B; "auto": int(2 sqrt(n)).
        bucket_size_x: X, at most n are used; "auto": int(2 sqrt(n)). Counting n for "auto" waits for the device, unless
            padding_idx is None; with numbers nothing does.
        bucket_size_y: Y, at most V are used; "auto": 256.
        mix_x: directions are Gaussian combinations of the hidden states instead of Gaussian vectors.
        generator: source of the directions; the device's default one if None.
        padding_idx: the row of `weight` that is in no bucket; None makes every row a candidate.
        reduction: "mean" over the covered positions (0 if there are none), "sum", or "none": [N], 0 elsewhere.
        return_coverage: also return [N] bool, True at positions that were in a bucket.
        backend: "auto", "triton" or "torch"; only "auto" may fall back to torch, and logs it once.

    Returns:
        The loss, fp32 (fp64 if an input is fp64), or (loss, covered).

    Dtypes: fp64, fp32, bf16 or fp16 inputs, also mixed. Under autocast their rows are rounded to its dtype as they
    are read. Logits, log-sum-exp and gradient sums are fp32 (fp64 for fp64); gradients have their input's dtype.

    Raises:
        ValueError: a wrong shape, dtype, device, option or, on the CPU, target id; names the argument.
        RuntimeError: backend="triton" where the kernel cannot run.

    Source: SCE, arXiv 2409.18721.
    """
    checks.check_inputs(input, weight, target, padding_idx, reduction)
    for name, size in (("n_buckets", n_buckets), ("bucket_size_x", bucket_size_x), ("bucket_size_y", bucket_size_y)):
        if size != "auto":
            checks.check_count(name, size)
    if generator is not None and generator.device.type != input.device.type:
        raise ValueError(f"generator: is on {generator.device}, input on {input.device}")
    if isinstance(n_buckets, str) or isinstance(bucket_size_x, str):
        auto = auto_size(len(target) if padding_idx is None else int(checks.counted(target, padding_idx).sum()))
        n_buckets = auto if isinstance(n_buckets, str) else n_buckets
        bucket_size_x = auto if isinstance(bucket_size_x, str) else bucket_size_x
    size_x = min(bucket_size_x, len(input))
    num_items = len(weight) - (padding_idx is not None)
    size_y = min(AUTO_BUCKET_SIZE_Y if isinstance(bucket_size_y, str) else bucket_size_y, num_items)
    if n_buckets * (size_x + size_y) > MAX_SLOTS:
        raise ValueError(
            f"n_buckets: {n_buckets} buckets of {size_x} positions and {size_y} items are too many; all of them "
            f"together hold at most {MAX_SLOTS}"
        )
    rounding = autocast_rounding(input, weight)
    dtypes = (input.dtype, weight.dtype, rounding)
    chosen = backends.choose("scalable_cross_entropy", backend, input.device, dtypes, input.size(1))
    if chosen == "triton":
        derivatives.refuse_forward_mode(input, weight)
        from recbole_cce.ops.triton import scalable_cross_entropy as kernels  # triton may be missing elsewhere

        directions = reference.random_directions(input, weight, target, n_buckets, mix_x, padding_idx, generator)
        loss, covered = kernels.scalable_cross_entropy(
            input, weight, target, directions, size_x, size_y, padding_idx, rounding
        )
    else:
        buckets = reference.select_buckets(
            input, weight, target, n_buckets, size_x, size_y, mix_x, padding_idx, generator
        )
        loss, covered = reference.bucket_cross_entropy(input, weight, target, *buckets)
    loss = checks.reduce(loss, covered, checks.number(covered), reduction)
    return (loss, covered) if return_coverage else loss


def auto_size(positions: int) -> int:
    """Buckets, and positions in each, for so many positions: the authors' rule."""
    return int(2 * math.sqrt(positions))
