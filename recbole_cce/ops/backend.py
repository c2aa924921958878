"""Which implementation of an op runs: a Triton kernel or plain torch."""

from __future__ import annotations

import functools
import importlib
import logging
from pathlib import Path

import torch

BACKENDS = ("auto", "triton", "torch")
MIN_CAPABILITY = (8, 0)  # Ampere: bf16 tensor cores

logger = logging.getLogger(__name__)


def triton_unavailable(device: torch.device) -> str | None:
    """Why Triton kernels cannot run on `device`, or None where they can."""
    if device.type != "cuda":
        return f"they need an NVIDIA GPU, the device is {device.type!r}"
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"triton cannot be imported: {error}"
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        return f"they need compute capability {MIN_CAPABILITY[0]}.{MIN_CAPABILITY[1]}, the GPU has {capability}"
    return None


def choose(op: str, backend: str, device: torch.device) -> str:
    """ "triton" or "torch" for an op on a device. Only `auto` falls back, with one log line for each op and reason.

    Raises:
        ValueError: `backend` is none of auto, triton, torch.
        RuntimeError: `backend` is triton and the kernel cannot run; gives the reason.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend: {backend!r} is not valid; it takes one of {', '.join(BACKENDS)}")
    if backend == "torch":
        return "torch"
    has_kernel = (Path(__file__).parent / "triton" / f"{op}.py").is_file()
    reason = triton_unavailable(device) if has_kernel else "this version has no Triton kernel for it"
    if reason is None:
        return "triton"
    if backend == "triton":
        raise RuntimeError(f"backend: 'triton' cannot run {op}: {reason}")
    log_fallback(op, reason)
    return "torch"


@functools.cache
def log_fallback(op: str, reason: str) -> None:
    """Say once that an op runs in plain torch."""
    logger.info("%s runs in plain torch, its Triton kernel cannot be used: %s", op, reason)
