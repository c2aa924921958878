"""Shapes of the programs of SCE's kernels: what fits in shared memory and registers."""

from collections.abc import Callable
from dataclasses import dataclass

from recbole_cce.ops.triton.launch import HOPPER_MEMORY, padded


@dataclass(frozen=True)
class Blocks:
    """Shape of a program: rows of the side that stays, rows of the other side at a time."""

    stay: int
    stream: int
    warps: int
    stages: int


def score_blocks(dim: int, itemsize: int, table_itemsize: int, shared_memory: int) -> Blocks:
    """Rows of a table that stay, directions that stream past them: the first blocks that fit in shared memory.

    Args:
        dim: D.
        itemsize: bytes of a number in the products, 2 or 4.
        table_itemsize: bytes of a number of the table.
        shared_memory: bytes a program can have.
    """
    width = padded(dim)
    if itemsize == 4:
        return exact_blocks(width, shared_memory)
    options = [Blocks(64, 32, 4, 2), Blocks(32, 32, 4, 1)]
    if table_itemsize == 2 and width > 64:
        options = [Blocks(128, 32, 8, 2), *options]
    return first_that_fits(options, lambda b: (b.stay + b.stages * b.stream) * width * 2 + b.stay * 128, shared_memory)


def bucket_blocks(dim: int, itemsize: int, item_itemsize: int, shared_memory: int, kernel: str) -> Blocks:
    """The first blocks that fit in shared memory.

    Args:
        dim, itemsize, shared_memory: as for score_blocks().
        item_itemsize: bytes of a number of the table that items are gathered from.
        kernel: "loss" or "input": positions stay, items stream past them. "weight": the reverse.
    """
    width = padded(dim)
    if itemsize == 4:
        return exact_blocks(width, shared_memory)
    if width <= 64:  # small programs hide each other's waiting
        options = [Blocks(64, 64, 4, 3), Blocks(64, 32, 4, 2)]
    elif kernel == "loss":
        options = [Blocks(128, 64, 8, 1), Blocks(64, 32, 4, 2), Blocks(32, 32, 4, 1)]
    elif width > 256:  # the sum [stay, width] must fit in registers
        options = [Blocks(32, 32, 8, 2), Blocks(32, 16, 8, 1)]
    elif kernel == "input":
        warps = 4 if width <= 128 or shared_memory >= HOPPER_MEMORY else 8  # before it operands are in registers, too
        options = [Blocks(64, 32, warps, 3), Blocks(64, 32, warps, 2), Blocks(32, 32, 4, 1)]
    else:
        options = [Blocks(32, 32, 4, 3), Blocks(32, 32, 4, 1)]
        if item_itemsize == 2:
            options = [Blocks(64, 32, 4, 3), *options]

    def memory(b: Blocks) -> int:
        # what streams waits in 16 bits, and before in fp32; probabilities
        waiting = 2 + 4 * (b.stages > 1) if item_itemsize == 4 or kernel == "weight" else 2 * b.stages
        used = b.stay * width * 2 + b.stream * width * waiting + b.stay * b.stream * 2
        # the gradient of the table goes through memory on its way out, when nothing else is there
        return max(used, b.stay * width * 4) if kernel == "weight" else used

    return first_that_fits(options, memory, shared_memory)


def exact_blocks(width: int, shared_memory: int) -> Blocks:
    """Blocks of products in fp32: without tensor cores they take their operands through registers, so small tiles."""
    options = [Blocks(32, 32, 4, 1), Blocks(16, 16, 4 if width <= 256 else 8, 1)]
    return first_that_fits(options[width > 256 :], lambda b: 4 * b.stay * width * 4, shared_memory)


def first_that_fits(options: list[Blocks], memory: Callable[[Blocks], int], shared_memory: int) -> Blocks:
    """The first of `options` that takes no more than `shared_memory`, else the last."""
    return next((blocks for blocks in options if memory(blocks) + 2**10 <= shared_memory), options[-1])
