"""Random problems for the ops, the ways to sample, and the error budget that every implementation must keep."""

from __future__ import annotations

import math
from contextlib import contextmanager

import torch

from recbole_cce import ops
from recbole_cce.ops import negatives

SEED = 2**40 + 7


def problem(n=37, v=53, d=12, scale=1.0, dtype=torch.float32, seed=0, padding_idx=0, ignored=0.2, device="cpu"):
    """Random hidden states, item table and targets with duplicates; some rows ignored."""
    generator = torch.Generator().manual_seed(seed)
    hidden = (torch.randn(n, d, generator=generator) * scale).to(dtype)
    weight = (torch.randn(v + (padding_idx is not None), d, generator=generator) * scale).to(dtype)
    target = torch.randint(0, len(weight), (n,), generator=generator)
    if padding_idx is not None:
        target[torch.rand(n, generator=generator) < ignored] = padding_idx
    return hidden.to(device), weight.to(device), target.to(device)


@contextmanager
def deterministic_algorithms(deterministic=True):
    """Sums have an order, or need none."""
    torch.use_deterministic_algorithms(deterministic)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


class Sampling:
    """One way to draw negatives, with the draws and corrections written out.

    Attributes:
        kwargs: arguments of the sampled ops.
        drawn: [n, k] rows that each position sees.
        correction: log(K q) of each, or 0.
    """

    def __init__(self, n, weight, k=9, sharing="tile", popularity=False, correct=True, padding_idx=0):
        v, device = len(weight) - (padding_idx is not None), weight.device
        counts = torch.arange(v) % 7
        self.kwargs = {
            "num_negatives": k,
            "sharing": sharing,
            "seed": SEED,
            "padding_idx": padding_idx,
            "sampler": (ops.Popularity(counts, alpha=0.5) if popularity else ops.Uniform()).to(device),
        }
        groups = {"none": n, "tile": -(-n // 128), "batch": 1}[sharing]
        drawn = negatives.draw_negatives(
            self.kwargs["sampler"], SEED, torch.arange(groups, device=device), k, len(weight), padding_idx
        )
        self.drawn = drawn[torch.arange(n, device=device) % groups]
        items = torch.tensor([i for i in range(len(weight)) if i != padding_idx])
        item_of_row = torch.full((len(weight),), -1).scatter(0, items, torch.arange(v))
        q = counts.double().clamp(min=1) ** 0.5 if popularity else torch.ones(v, dtype=torch.double)
        log_q = (q / q.sum()).log().float().to(device)  # the ops keep log q in fp32
        self.correction = log_q[item_of_row.to(device)[self.drawn]] + math.log(k) if correct else log_q.new_zeros(())


def check(ours, truth, hidden, weight, target, padding_idx=0, slack=1e-6):
    """|fp64 truth - ours| <= |fp64 truth - the formula in the same dtype| + small, for loss and both gradients."""
    assert_within(norms(ours, truth, hidden, weight, target, padding_idx), slack)


def assert_within(norms, slack=1e-6):
    """The norms of norms() or, for problems so small that rounding is a matter of luck, of many of them together."""
    for name, (error, budget, size) in zip(("loss", "d input", "d weight"), norms, strict=True):
        assert error <= budget + slack * (1 + size), f"{name}: {error:.3g} > {budget:.3g}"


def norms(ours, truth, hidden, weight, target, padding_idx):
    """[3, 3] norms: of loss and both gradients, what ours and what the formula in the same dtype are off; their own."""
    valid = torch.ones_like(target, dtype=torch.bool) if padding_idx is None else target != padding_idx
    upstream = torch.rand(len(target), generator=torch.Generator().manual_seed(9)).to(target.device)

    def evaluate(function, dtype):
        h, w = (tensor.detach().to(dtype, copy=True).requires_grad_() for tensor in (hidden, weight))
        loss = function(h, w)
        loss = torch.where(valid, loss, 0)
        (loss * upstream.to(loss.dtype)).sum().backward()
        return [tensor.double() for tensor in (loss.detach(), h.grad, w.grad)]

    exact = evaluate(truth, torch.float64)
    same = evaluate(truth, hidden.dtype)
    got = evaluate(ours, hidden.dtype)
    rows = zip(exact, same, got, strict=True)
    return torch.stack([torch.stack([(a - c).norm(), (a - b).norm(), a.norm()]) for a, b, c in rows])
