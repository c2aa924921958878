"""Compiling what the ops launch, as they launch it, for chips that need not be here."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch

from recbole_cce.ops import Popularity, Uniform
from recbole_cce.ops.reference.sampled_cross_entropy import Draws
from tests.ops.problems import deterministic_algorithms

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime import driver  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from recbole_cce.ops.triton import launch  # noqa: E402
from recbole_cce.ops.triton import linear_cross_entropy as full  # noqa: E402
from recbole_cce.ops.triton import packed_attention as packed  # noqa: E402
from recbole_cce.ops.triton import sampled_cross_entropy as sampled  # noqa: E402
from recbole_cce.ops.triton import scalable_cross_entropy as scalable  # noqa: E402
from recbole_cce.ops.triton.selection import top_rows  # noqa: E402

VERSION = tuple(map(int, triton.__version__.split(".")[:2]))
CHIPS = {
    80: launch.Chip((8, 0), 166912, 108),
    86: launch.Chip((8, 6), 101376, 84),
    89: launch.Chip((8, 9), 101376, 128),
    90: launch.Chip((9, 0), 232448, 132),
    100: launch.Chip((10, 0), 232448, 148),
    120: launch.Chip((12, 0), 101376, 170),
}
SPARE = 2 * 2**10  # bytes of shared memory that another Triton may take on top
TENSOR_MEMORY = 512  # columns that chips have which keep sums there
SPILLS = 96  # bytes of a thread that may be spilled: two dozen registers, of 255


class Numbers(NamedTuple):
    """What hidden states and table are of, what products are of, and torch's precision of those in fp32."""

    hidden: torch.dtype
    table: torch.dtype
    products: torch.dtype
    precision: str = "highest"


NUMBERS = {
    "bf16": Numbers(torch.bfloat16, torch.bfloat16, torch.bfloat16),
    "fp16": Numbers(torch.float16, torch.float16, torch.float16),
    "autocast": Numbers(torch.float32, torch.float32, torch.bfloat16),
    "fp32": Numbers(torch.float32, torch.float32, torch.float32),
    "tf32": Numbers(torch.float32, torch.float32, torch.float32, "high"),
}


def need_triton(*version: int) -> None:
    """Skip the test with an older Triton."""
    if version > VERSION:
        pytest.skip(f"needs Triton {'.'.join(map(str, version))}")


class Driver(NamedTuple):
    """What the compiler asks of a chip's driver."""

    capability: int

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return -self.capability  # kernels are kept by this number, which no device has

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def compiling(capability: int) -> Iterator[list[Any]]:
    """Kernels that are launched on tensors of the CPU are compiled for a chip, and do not run: results are undefined.

    Gives them, in order.
    """
    kernels, launched = [], set()
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        kernels.append(run(self, *args, grid=grid, warmup=True, **kwargs))
        launched.add(self)

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(JITFunction, "run", compile_only))
        stack.enter_context(mock.patch.object(launch, "INTERPRETER", CHIPS[capability]))
        # numbers of rows are undefined, too
        stack.enter_context(mock.patch.object(torch.Tensor, "index_put_", lambda self, *_, **__: self))
        driver.set_active(Driver(capability))
        if torch.cuda.is_available():
            stack.callback(driver.reset_active)
        yield kernels
    for kernel in launched:  # which keep what was compiled, by the number of the device
        kernel.device_caches.clear()


def spilled(kernel: Any) -> int:
    """Bytes of a thread that did not fit in its registers."""
    tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
    if not os.path.exists(tool):
        pytest.skip("this Triton comes without cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return int(re.search(r"STACK:(\d+)", usage)[1])


def too_much(kernel: Any, capability: int) -> str | None:
    """What of a chip a kernel takes too much of, or None."""
    most = {
        "bytes of shared memory": (kernel.metadata.shared, CHIPS[capability].shared_memory - SPARE),
        "columns of tensor memory": (getattr(kernel.metadata, "tmem_size", None) or 0, TENSOR_MEMORY),
        "bytes of a thread spilled": (spilled(kernel), SPILLS),
    }
    found = [f"{taken} {name}, of {limit}" for name, (taken, limit) in most.items() if taken > limit]
    return f"{kernel.metadata.name}: {', '.join(found)}" if found else None


def problem(dim: int, numbers: Numbers, rows: int = 512) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, a table of as many rows and targets."""
    hidden, weight = (torch.ones(rows, dim, dtype=dtype).requires_grad_() for dtype in numbers[:2])
    return hidden, weight, torch.arange(rows)


def backward(loss: torch.Tensor, uniform: bool) -> None:
    """With an upstream gradient that is the same for all rows, or one of each row's own."""
    loss.backward(torch.ones(1).expand(len(loss)) if uniform else torch.ones(len(loss)))


def linear_cross_entropy(dim: int, numbers: Numbers, thorough: bool) -> None:
    """Whole or split catalogue, with whole blocks of rows fetched by the chip or not, sorted rows or gathered ones."""
    variants = ((3, 5, False), (1, 0, True), (1, 5, False), (3, 0, True))
    for splits, padding_idx, uniform in variants if thorough else variants[:1]:
        with mock.patch.object(full, "num_splits", lambda *_, splits=splits: splits):
            backward(full.linear_cross_entropy(*problem(dim, numbers), padding_idx, numbers.products), uniform)


def sampled_cross_entropy(dim: int, numbers: Numbers, thorough: bool) -> None:
    """Both losses, samplers and ways to share negatives, also where sums must have an order."""
    variants = ((False, True, False), (True, False, False), (True, True, True))
    for sharing in ("tile", "none"):
        for binary, popularity, deterministic in variants if thorough else variants[:1]:
            hidden, weight, target = problem(dim, numbers)
            draws = Draws(
                sampler=Popularity(torch.ones(len(weight) - 1)) if popularity else Uniform(),
                seed=torch.tensor(0),
                num_negatives=64,
                sharing=sharing,
                logq_correction=True,
                padding_idx=0,
                rounding=numbers.products,
            )
            number, positive_weight = (None, 0.5) if binary else (torch.tensor(512), None)
            with deterministic_algorithms(deterministic):
                loss = sampled.sampled_cross_entropy(hidden, weight, target, draws, number, positive_weight)
                backward(loss, not binary)


def scalable_cross_entropy(dim: int, numbers: Numbers, thorough: bool) -> None:
    """Buckets of whole blocks and of others, also where sums must have an order; many rows to select from, and few."""
    for deterministic, size in ((False, 64), (True, 30)) if thorough else ((False, 64),):
        hidden, weight, target = problem(dim, numbers)
        slots = torch.arange(size, dtype=torch.int32).expand(6, -1).contiguous()
        with deterministic_algorithms(deterministic):
            loss, _ = scalable.bucket_cross_entropy(hidden, weight, target, slots, slots, 0, numbers.products)
            backward(loss, not deterministic)
    directions = torch.ones(64, dim, dtype=numbers.products)
    for rows in (2**15, 512) if thorough else (2**15,):
        _, table, target = problem(dim, numbers, rows)
        top_rows(directions, table.detach(), target if rows == 512 else None, 64, 0)


def packed_attention(dim: int, numbers: Numbers, thorough: bool) -> None:
    """With dropout and without."""
    for dropout_p in (0.3, 0.0) if thorough else (0.3,):
        mixed = torch.ones(256, 3, 2, dim, dtype=numbers.products).requires_grad_()
        spans = torch.tensor([[0, 256]], dtype=torch.int32).expand(256, -1)
        out = packed.packed_attention(*mixed.unbind(1), spans, dropout_p, torch.tensor(0) if dropout_p else None)
        out.sum().backward()


# each with all of its variants, or the first of them alone
OPS: dict[str, Callable[[int, Numbers, bool], None]] = {
    "linear_cross_entropy": linear_cross_entropy,
    "sampled_cross_entropy": sampled_cross_entropy,
    "scalable_cross_entropy": scalable_cross_entropy,
    "packed_attention": packed_attention,
}


@functools.cache
def kernels_of(op: str, capability: int, dim: int, numbers: str, thorough: bool = True) -> list[Any]:
    """Everything that both passes of an op launch on a chip, each kernel once. What was compiled is kept."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(NUMBERS[numbers].precision)
    try:
        with compiling(capability) as kernels:
            OPS[op](dim, NUMBERS[numbers], thorough)
    finally:
        torch.set_float32_matmul_precision(before)
    return list({kernel.hash: kernel for kernel in kernels}.values())
