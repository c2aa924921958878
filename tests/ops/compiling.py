"""Compiling a kernel for a chip that need not be here."""

from __future__ import annotations

import pytest

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

    if capability == 100:
        need_triton(3, 3)
    constants = {name: constants[name] for name in kernel.arg_names if name in constants}
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    constexprs = {(i,): constants[name] for i, name in enumerate(kernel.arg_names) if name in constants}
    attributes = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if name in aligned}
    source = (kernel, signature, constexprs, attributes)
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 3):  # it names constants
        source = (kernel, {name: of for name, of in signature.items() if name not in constants}, constants)
    return triton.compile(ASTSource(*source), target=GPUTarget("cuda", capability, 32), options=options)
