"""What the kernels take of chips that need not be here: shared memory, and what does not fit in registers.

    python -m benchmarks.compile_survey [--quick] [--chips 80] [--ops linear_cross_entropy] [--dims 64] [--numbers bf16]

Compiles everything that both passes of each op launch, as they launch it (tests/ops/compiling.py), for every chip, at
widths on both sides of every edge of the functions that choose blocks. One line a kernel, which says what it takes too
much of; then a table: of each chip and kernel the largest share of the chip's shared memory, the most bytes of a thread
that were spilled, and where. All of it takes hours of one core, without a GPU; tests/ops/test_compiled_kernels.py keeps
a part of it true.
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

from recbole_cce.ops.backend import COLUMNS
from tests.ops.compiling import CHIPS, NUMBERS, OPS, kernels_of, spilled, too_much

DIMS = (16, 32, 64, 100, 128, 200, 256, 300, 512)


class Found(NamedTuple):
    """One kernel: where it was compiled, bytes of shared memory, bytes of a thread that were spilled."""

    chip: int
    op: str
    dim: int
    numbers: str
    kernel: str
    shared: int
    spilled: int


def main() -> None:
    """Print a line a kernel, then the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", type=int, nargs="+", choices=CHIPS, default=list(CHIPS))
    parser.add_argument("--ops", nargs="+", choices=OPS, default=list(OPS))
    parser.add_argument("--dims", type=int, nargs="+", default=DIMS)
    parser.add_argument("--numbers", nargs="+", choices=NUMBERS, default=list(NUMBERS))
    parser.add_argument("--quick", action="store_true", help="one variant of each launch, as the tests do")
    options = parser.parse_args()
    found = []
    for chip in options.chips:
        for op in options.ops:
            least, most = COLUMNS[op]
            for dim in (dim for dim in options.dims if least <= dim <= most):
                for numbers in options.numbers:
                    kernels_of.cache_clear()  # of what was printed
                    for kernel in kernels_of(op, chip, dim, numbers, not options.quick):
                        metadata = kernel.metadata
                        found.append(Found(chip, op, dim, numbers, metadata.name, metadata.shared, spilled(kernel)))
                        print(*found[-1], too_much(kernel, chip) or "", sep="\t", flush=True)
    print(table(found))


def table(found: list[Found]) -> str:
    """A line a chip and kernel."""
    lines = ["| chip | kernel | compiled | shared memory, at most | spilled, at most |", "|---|---|---:|---|---|"]
    for chip, kernel in sorted({(one.chip, one.kernel) for one in found}):
        ours = [one for one in found if (one.chip, one.kernel) == (chip, kernel)]
        wide, spilling = max(ours, key=lambda one: one.shared), max(ours, key=lambda one: one.spilled)
        share = wide.shared / CHIPS[chip].shared_memory
        lines.append(
            f"| sm_{chip} | {kernel} | {len(ours)} | {wide.shared} ({share:.0%}), {wide.numbers}, D = {wide.dim} "
            f"| {spilling.spilled}, {spilling.numbers}, D = {spilling.dim} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
