"""Functions of the kernels, to the last digits of fp32."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from tests.ops.test_sampled_kernels import needs_gpu

triton = pytest.importorskip("triton")
tl = triton.language

from recbole_cce.ops.triton.exponentials import log_1p, sigmoid, softplus  # noqa: E402


@triton.jit
def functions_kernel(s_ptr, log_1p_ptr, sigmoid_ptr, softplus_ptr, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    s = tl.load(s_ptr + o)
    tl.store(log_1p_ptr + o, log_1p(tl.exp2(s)))
    tl.store(sigmoid_ptr + o, sigmoid(s))
    tl.store(softplus_ptr + o, softplus(s))


def check_functions(device="cpu"):
    """Logits in units of log 2 from where exp is the least normal number to where it is the largest."""
    logits = torch.linspace(-125, 125, 2**14, device=device)
    results = [torch.empty_like(logits) for _ in range(3)]
    functions_kernel[(len(logits) // 1024,)](logits, *results, BLOCK=1024)
    exact = logits.double() * math.log(2)
    truths = exact.exp().log1p(), exact.sigmoid(), F.softplus(exact, threshold=100)
    for result, truth in zip(results, truths, strict=True):
        # of an exponential 2^-22, and a few roundings after it
        assert ((result - truth) / truth).abs().max() < 5e-7
    ends = torch.tensor([-math.inf, math.inf], device=device).repeat(512)
    functions_kernel[(1,)](ends, *(result[:1024] for result in results), BLOCK=1024)
    assert results[1][:2].tolist() == [0, 1]
    assert results[2][:2].tolist() == [0, math.inf]


def test_functions_in_the_interpreter(interpreter):
    interpreter(check_functions)


@needs_gpu
def test_functions():
    check_functions("cuda")
