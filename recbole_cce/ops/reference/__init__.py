"""The definition of truth: each op in eager torch, on any device, in fp32 (fp64 for fp64 inputs), in bounded memory."""

import torch

CHUNK_ELEMENTS = 2**24  # numbers in one intermediate tensor: 64 MiB in fp32


def math_dtype(*tensors: torch.Tensor) -> torch.dtype:
    """fp64 if an input is fp64, else fp32."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def read(tensor: torch.Tensor, rounding: torch.dtype | None, dtype: torch.dtype) -> torch.Tensor:
    """Rows in the dtype of the mathematics, rounded on the way as autocast would round them."""
    return tensor.to(rounding or tensor.dtype).to(dtype)


def autocast_rounding(*tensors: torch.Tensor) -> torch.dtype | None:
    """The dtype that autocast would round `tensors` to, None outside autocast or for fp64."""
    device = tensors[0].device.type
    if math_dtype(*tensors) == torch.float64 or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)
