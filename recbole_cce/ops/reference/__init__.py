"""The definition of truth: each op in eager torch, on any device, in fp32 (fp64 for fp64 inputs), in bounded memory."""

import torch

CHUNK_ELEMENTS = 2**24  # numbers in one intermediate tensor: 64 MiB in fp32


def math_dtype(*tensors: torch.Tensor) -> torch.dtype:
    """fp64 if an input is fp64, else fp32."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def read(tensor: torch.Tensor, rounding: torch.dtype | None, dtype: torch.dtype) -> torch.Tensor:
    """Rows in the dtype of the mathematics, rounded on the way as autocast would round them."""
    return tensor.to(rounding or tensor.dtype).to(dtype)


def without(rows: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
    """Rows [.., D] that are zero where `out` [..] is True: what counts for nothing may be NaN, and 0 * NaN is NaN."""
    return rows if out is None else rows.masked_fill(out[..., None], 0)


def autocast_rounding(*tensors: torch.Tensor) -> torch.dtype | None:
    """The dtype that autocast would round `tensors` to, None outside autocast or for fp64."""
    device = tensors[0].device.type
    if math_dtype(*tensors) == torch.float64 or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def add_logits(largest: torch.Tensor, total: torch.Tensor, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A softmax denominator, as its largest logit and the sum of exp(logit - largest), with more logits [..., k].

    The two are kept apart: one log-sum-exp would round to its own size and every probability would inherit that.
    `logits` is overwritten.
    """
    new = torch.maximum(largest, logits.amax(-1))
    return new, total * (largest - new).exp() + logits.sub_(new[..., None]).exp_().sum(-1)


def cast(gradient: torch.Tensor | None, parameter: torch.Tensor) -> torch.Tensor | None:
    """A finished gradient in the dtype of its parameter; None stays None, where none is needed."""
    return None if gradient is None else gradient.to(parameter.dtype)
