"""What every launch needs: the device, its chip, the precision of products, how matrices lie in memory."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

BUFFER_ELEMENTS = 2**23  # fp32 numbers, or keys of twice the size, that are held at a time
HOPPER_MEMORY = 200 * 2**10  # bytes of shared memory: chips that multiply 16 bits out of it have more
DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def custom_op(name: str, mutates_args: Sequence[str] = ()) -> Callable[[Callable[..., Any]], torch.library.CustomOpDef]:
    """A torch.library.custom_op of ours that launches on the device of its first argument.

    Triton launches on the current device, whatever the device of the pointers is.
    """

    def register(function: Callable[..., Any]) -> torch.library.CustomOpDef:
        @functools.wraps(function)
        def on_device(first: torch.Tensor, *args: Any) -> Any:
            with torch.cuda.device_of(first):
                return function(first, *args)

        return torch.library.custom_op(f"recbole_cce::{name}", on_device, mutates_args=mutates_args)

    return register


def padded(size: int) -> int:
    """The next power of two, 16 at least: what blocks and products take."""
    return max(16, triton.next_power_of_2(size))


class Chip(NamedTuple):
    """What of a GPU decides how kernels are launched on it.

    Attributes:
        capability: compute capability.
        shared_memory: bytes that a program can have.
        processors: streaming multiprocessors.
    """

    capability: tuple[int, int]
    shared_memory: int
    processors: int


INTERPRETER = Chip((0, 0), 2**17, 4)


def chip(device: torch.device) -> Chip:
    """The one that kernels on tensors of a device are launched on; on those of the CPU the interpreter runs them."""
    return gpu(device) if device.type == "cuda" else INTERPRETER


@functools.cache
def gpu(device: torch.device) -> Chip:
    """What torch says of a GPU."""
    properties: Any = torch.cuda.get_device_properties(device)  # torch's types leave some of them out
    capability = properties.major, properties.minor
    return Chip(capability, properties.shared_memory_per_block_optin, properties.multi_processor_count)


def precision() -> str:
    """Products of fp32 inputs are exact in fp32 unless torch's matmul precision allows tf32."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def matrix_options(hidden: torch.Tensor, table: torch.Tensor, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of the kernels that say how hidden states and table lie in memory, and what products are of."""
    return {
        "stride_hn": hidden.stride(0),
        "stride_hd": hidden.stride(1),
        "stride_wn": table.stride(0),
        "stride_wd": table.stride(1),
        "D": table.size(1),
        "BD": padded(table.size(1)),
        "DTYPE": DTYPES[dtype],
    }
