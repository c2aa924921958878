"""The losses of this package and of their public peers, as functions of one problem on the GPU."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.nn import functional as F

from recbole_cce import ops


@dataclass(frozen=True)
class Shape:
    """N positions, V items, D columns, K negatives; 0 where only losses over the whole catalogue are compared.

    `buckets`: how many, and positions and items in each, where SCE is compared.
    """

    n: int
    v: int
    d: int
    k: int
    buckets: tuple[int, int, int] | None = None

    def __str__(self) -> str:
        more = f", K={self.k}" if self.k else ""
        if self.buckets:
            more = ", {} buckets of {} x {}".format(*self.buckets)
        return f"{self.n} x {self.v} x {self.d}" + more


class Problem:
    """Inputs of one shape on the GPU."""

    def __init__(self, shape: Shape) -> None:
        generator = torch.Generator("cuda").manual_seed(0)
        self.shape = shape
        self.hidden = torch.randn(shape.n, shape.d, generator=generator, device="cuda", dtype=torch.bfloat16)
        self.weight = torch.randn(shape.v + 1, shape.d, generator=generator, device="cuda") / shape.d**0.5
        self.target = torch.randint(1, shape.v + 1, (shape.n,), generator=generator, device="cuda")
        self.hidden.requires_grad_(), self.weight.requires_grad_()
        self.covered: torch.Tensor | None = None  # by SCE, when it last ran

    def in_bf16(self) -> torch.Tensor:
        """A bf16 table in the place of the fp32 one."""
        self.weight = self.weight.detach().bfloat16().requires_grad_()
        return self.weight


def ours(problem: Problem, sharing: str) -> Callable[[], torch.Tensor]:
    """CCE- of this package."""

    def loss() -> torch.Tensor:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            return ops.sampled_cross_entropy(
                problem.hidden,
                problem.weight,
                problem.target,
                num_negatives=problem.shape.k,
                sharing=sharing,
                backend="triton",
            )

    return loss


def ours_full(problem: Problem) -> Callable[[], torch.Tensor]:
    """CCE of this package."""

    def loss() -> torch.Tensor:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            return ops.linear_cross_entropy(problem.hidden, problem.weight, problem.target, backend="triton")

    return loss


def ours_sce(problem: Problem, backend: str) -> Callable[[], torch.Tensor]:
    """SCE of this package."""
    n_buckets, size_x, size_y = problem.shape.buckets

    def loss() -> torch.Tensor:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            value, covered = ops.scalable_cross_entropy(
                problem.hidden,
                problem.weight,
                problem.target,
                n_buckets=n_buckets,
                bucket_size_x=size_x,
                bucket_size_y=size_y,
                return_coverage=True,
                backend=backend,
            )
        if backend == "triton":
            problem.covered = covered
        return value

    return loss


def select(problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    """What SCE of this package does before it computes losses."""
    from recbole_cce.ops.triton.selection import top_rows

    n_buckets, size_x, size_y = problem.shape.buckets
    directions = torch.randn(n_buckets, problem.shape.d, device="cuda").bfloat16()
    return (
        top_rows(directions, problem.hidden.detach(), problem.target, size_x, 0),
        top_rows(directions, problem.weight.detach(), None, size_y, 0),
    )


def deterministic_sce(problem: Problem) -> Callable[[], torch.Tensor]:
    """SCE of this package, two runs bit-equal."""
    torch.use_deterministic_algorithms(True)
    return ours_sce(problem, "triton")


def published_sce(problem: Problem, folder: Path) -> Callable[[], torch.Tensor]:
    """The loss of the authors of SCE, a method of their model: all of it in bf16."""
    module = import_apart(folder / "sce", "model")
    n_buckets, size_x, size_y = problem.shape.buckets
    model = SimpleNamespace(
        log2feats=lambda _: problem.hidden,
        item_emb=SimpleNamespace(weight=problem.in_bf16()),
        pad_token=0,
        n_buckets=n_buckets,
        bucket_size_x=size_x,
        bucket_size_y=size_y,
        mix_x=False,
    )

    def loss() -> torch.Tensor:
        torch.set_default_dtype(torch.bfloat16)  # of the random directions
        try:
            return module.SASRec.sce_forward(model, problem.target, problem.target)
        finally:
            torch.set_default_dtype(torch.float32)

    return loss


def deterministic(problem: Problem, sharing: str) -> Callable[[], torch.Tensor]:
    """CCE- of this package, two runs bit-equal."""
    torch.use_deterministic_algorithms(True)
    return ours(problem, sharing)


def torch_ce(problem: Problem) -> Callable[[], torch.Tensor]:
    """Full cross-entropy with its logits in memory."""
    weight = problem.in_bf16()
    return lambda: F.cross_entropy(problem.hidden @ weight.T, problem.target)


def torch_linear_ce(problem: Problem) -> Callable[[], torch.Tensor]:
    """Full cross-entropy of torch in chunks, in the versions that have it."""
    weight = problem.in_bf16()
    options = torch.nn.LinearCrossEntropyOptions()
    return lambda: F.linear_cross_entropy(problem.hidden, weight, problem.target, options=options)


def torch_ce_minus(problem: Problem) -> Callable[[], torch.Tensor]:
    """CCE- in plain torch with the vectors of all negatives in memory, each position its own."""
    weight, shape = problem.in_bf16(), problem.shape
    correction = torch.log(torch.tensor(shape.k / shape.v)).item()

    def loss() -> torch.Tensor:
        rows = torch.randint(1, shape.v + 1, (shape.n, shape.k), device="cuda")
        negative = torch.einsum("nd,nkd->nk", problem.hidden, weight[rows]).float() - correction
        negative = negative.masked_fill(rows == problem.target[:, None], -torch.inf)
        positive = (problem.hidden * weight[problem.target]).sum(1).float()
        return (torch.cat([positive[:, None], negative], 1).logsumexp(1) - positive).mean()

    return loss


def import_apart(path: Path | None, name: str) -> Any:
    """Import a module, of the folder `path` if given: two peers are packages of one name."""
    for module in [module for module in sys.modules if module.split(".")[0] == name.split(".")[0]]:
        del sys.modules[module]
    sys.path[:0] = [] if path is None else [str(path)]
    try:
        return __import__(name, fromlist=["_"])
    finally:
        del sys.path[: int(path is not None)]


def published(problem: Problem, folder: Path) -> Callable[[], torch.Tensor]:
    """The CCE- kernel of arXiv 2509.09682; its table of negatives is drawn before."""
    module = import_apart(folder / "kernels", "cut_cross_entropy.cce")
    weight, shape, target = problem.in_bf16(), problem.shape, problem.target - 1
    rows = torch.randint(0, shape.v, (shape.n, shape.k + 1), device="cuda")
    rows.masked_fill_(rows == target[:, None], shape.v)
    rows[:, 0] = target
    params = module.CCEParams(target, None, None, "mean", None, 0, target.shape, False, rows)
    return lambda: module.LinearCrossEntropyFunction.apply(problem.hidden, weight[1:], None, params)


def apple(problem: Problem, **options: Any) -> Callable[[], torch.Tensor]:
    """Full cross-entropy of cut-cross-entropy."""
    module = import_apart(None, "cut_cross_entropy")
    weight = problem.in_bf16()
    return lambda: module.linear_cross_entropy(problem.hidden, weight, problem.target, ignore_index=0, **options)


def liger(problem: Problem) -> Callable[[], torch.Tensor]:
    """Full cross-entropy of liger-kernel."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    weight, function = problem.in_bf16(), LigerFusedLinearCrossEntropyLoss(ignore_index=0)
    return lambda: function(weight, problem.hidden, problem.target)


def implementations(folder: Path | None) -> dict[str, Callable[[Problem], Callable[[], torch.Tensor]]]:
    """Name -> function of a problem that returns a function of nothing: the loss."""
    found = {
        "ours tile": lambda problem: ours(problem, "tile"),
        "ours none": lambda problem: ours(problem, "none"),
        "ours batch": lambda problem: ours(problem, "batch"),
        "ours CCE": ours_full,
        "ours tile, deterministic": lambda problem: deterministic(problem, "tile"),
        "ours none, deterministic": lambda problem: deterministic(problem, "none"),
        "ours SCE": lambda problem: ours_sce(problem, "triton"),
        "ours SCE, deterministic": deterministic_sce,
        "SCE (torch)": lambda problem: ours_sce(problem, "torch"),
        "CE- (torch)": torch_ce_minus,
        "CE (torch)": torch_ce,
        "linear_cross_entropy (torch)": torch_linear_ce,
        "cut-cross-entropy": apple,
        "cut-cross-entropy, unfiltered": lambda problem: apple(problem, filter_eps=None),
        "Liger": liger,
    }
    if folder is None:
        return found
    return {
        "published CCE-": lambda problem: published(problem, folder),
        "published SCE": lambda problem: published_sce(problem, folder),
        **found,
    }
