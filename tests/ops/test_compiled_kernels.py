"""What the kernels take of each chip: shared memory, tensor memory, registers. They are compiled as they are launched.

`python -m benchmarks.compile_survey` does so for all sizes and numbers; here are the narrowest fits, and sizes on both
sides of the edges of what chooses blocks.
"""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from tests.ops.compiling import kernels_of, need_triton, too_much

# chip, op, D, numbers, whether with all variants
CASES = [
    (chip, op, dim, numbers, False)
    for op, cases in {
        "linear_cross_entropy": [(80, 256, "bf16")],
    }.items()
    for chip, dim, numbers in cases
]


@pytest.mark.parametrize(("chip", "op", "dim", "numbers", "thorough"), CASES)
def test_kernels_fit_and_do_not_spill(chip, op, dim, numbers, thorough):
    if chip >= 100:
        need_triton(3, 3)
    kernels = kernels_of(op, chip, dim, numbers, thorough)
    assert len(kernels) > 1 and not list(filter(None, (too_much(kernel, chip) for kernel in kernels)))
