"""Which implementation of an op runs: a Triton kernel or plain torch."""

from __future__ import annotations

import functools
import importlib
import logging
import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch

BACKENDS = ("auto", "triton", "torch")
# of the Triton kernels: the least columns, and the most, whose sums still fit in the registers of a program
COLUMNS = {
    "linear_cross_entropy": (1, 512),
    "packed_attention": (8, 256),  # its gradient is from the rounded output: over fewer, that does not average out
    "sampled_binary_cross_entropy": (1, 512),
    "sampled_cross_entropy": (1, 512),
    "scalable_cross_entropy": (1, 512),
}
MIN_CAPABILITY = (8, 0)  # Ampere: bf16 tensor cores, and what torch's flash attention is written for

logger = logging.getLogger(__name__)

Function = TypeVar("Function", bound=Callable[..., Any])


def constant_when_compiled(function: Function) -> Function:
    """torch.compile calls `function` while it traces and keeps the result.

    The mark that torch.compiler.assume_constant_result leaves, which imports torch._dynamo: as long as torch itself.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]  # functions have no types of attributes
    return function


def interpreted() -> bool:
    """Whether Triton runs its kernels in its interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@constant_when_compiled
def before_ampere(device: torch.device) -> bool:
    """Whether a GPU is older than what kernels of 16 bits, torch's flash attention too, are written for."""
    return torch.cuda.get_device_capability(device) < MIN_CAPABILITY


def triton_unavailable(device: torch.device) -> str | None:
    """Why Triton kernels cannot run on `device`, or None where they can."""
    if device.type != "cuda" and not interpreted():
        return f"they need an NVIDIA GPU, the device is {device.type!r}"
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"triton cannot be imported: {error}"
    if device.type == "cuda" and before_ampere(device):
        capability = torch.cuda.get_device_capability(device)
        return f"they need compute capability {MIN_CAPABILITY[0]}.{MIN_CAPABILITY[1]}, the GPU has {capability}"
    return None


@constant_when_compiled
def choose(op: str, backend: str, device: torch.device, dtypes: tuple[torch.dtype | None, ...], dim: int) -> str:
    """ "triton" or "torch" for an op on a device. Only `auto` falls back, with one log line for each op and reason.

    `auto` does not choose the interpreter, which is for tests.

    Raises:
        ValueError: `backend` is none of auto, triton, torch.
        RuntimeError: `backend` is triton and the kernel cannot run; gives the reason.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend: {backend!r} is not valid; it takes one of {', '.join(BACKENDS)}")
    if backend == "torch" or (backend == "auto" and interpreted()):
        return "torch"
    reason = kernel_unavailable(op, device, dtypes, dim)
    if reason is None:
        return "triton"
    if backend == "triton":
        raise RuntimeError(f"backend: 'triton' cannot run {op}: {reason}")
    log_fallback(op, reason)
    return "torch"


@constant_when_compiled
def kernel_unavailable(op: str, device: torch.device, dtypes: tuple[torch.dtype | None, ...], dim: int) -> str | None:
    """Why the Triton kernels of an op cannot run, or None where they can."""
    reason = triton_unavailable(device)
    if reason is None and torch.float64 in dtypes:
        reason = "they have no fp64"
    if reason is None and interpreted() and torch.bfloat16 in dtypes:
        reason = "Triton's interpreter multiplies no bf16"
    least, most = COLUMNS[op]
    if reason is None and not least <= dim <= most:
        reason = f"they take {least} to {most} columns, input has {dim}"
    return reason


@functools.cache
def log_fallback(op: str, reason: str) -> None:
    """Say once that an op runs in plain torch."""
    logger.info("%s runs in plain torch, its Triton kernel cannot be used: %s", op, reason)
