"""Compiling a kernel for a chip that need not be here."""

from __future__ import annotations

import os
import re
import subprocess

import pytest

# compute capability -> bytes of shared memory that a program can have
CHIPS = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
POINTERS = {
    "h_ptr": "*bf16", "w_ptr": "*fp32", "y_ptr": "*i64", "seed_ptr": "*i64", "table_ptr": "*i32", "log_q_ptr": "*fp32",
    "loss_ptr": "*fp32", "lse_ptr": "*fp32", "slope_ptr": "*fp32", "direction_ptr": "*bf16", "grad_ptr": "*fp32",
    "unit_ptr": "*fp32", "grad_w_ptr": "*fp32", "row_ptr": "*i64", "out_ptr": "*i32", "order_ptr": "*i32",
    "start_ptr": "*i32", "end_ptr": "*i32",
}  # fmt: skip


def need_triton(*version):
    """Skip the test with an older Triton, or none."""
    triton = pytest.importorskip("triton")
    if tuple(map(int, triton.__version__.split(".")[:2])) < version:
        pytest.skip(f"needs Triton {'.'.join(map(str, version))}")


def compiled(kernel, capability, constants, types=POINTERS, options=None, aligned=()):
    """The kernel with those `constants` it takes; `types` of other arguments than i32; `aligned` ones are multiples of
    16, which Triton before 3.3 is not told."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if capability >= 100:
        need_triton(3, 3)
    constants = {name: constants[name] for name in kernel.arg_names if name in constants}
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    constexprs = {(i,): constants[name] for i, name in enumerate(kernel.arg_names) if name in constants}
    attributes = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if name in aligned}
    source = (kernel, signature, constexprs, attributes)
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 3):  # it names constants
        source = (kernel, {name: of for name, of in signature.items() if name not in constants}, constants)
    return triton.compile(ASTSource(*source), target=GPUTarget("cuda", capability, 32), options=options)


def spilled(kernel):
    """Bytes of a thread that did not fit in its registers, of what compiled() returns."""
    triton = pytest.importorskip("triton")
    tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
    if not os.path.exists(tool):
        pytest.skip("this Triton comes without cuobjdump")
    with open("kernel.cubin", "wb") as file:
        file.write(kernel.asm["cubin"])
    usage = subprocess.run([tool, "-res-usage", "kernel.cubin"], capture_output=True, text=True, check=True).stdout
    return int(re.search(r"STACK:(\d+)", usage)[1])
