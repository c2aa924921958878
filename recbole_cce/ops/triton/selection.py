"""Selection of the rows with the largest scores: what launches its kernels, as a custom op without gradients."""

import math
from typing import Any, Optional

import torch
import triton

from recbole_cce.ops.backend import interpreted
from recbole_cce.ops.triton import selection_kernels
from recbole_cce.ops.triton.launch import BUFFER_ELEMENTS, chip, custom_op, matrix_options, precision
from recbole_cce.ops.triton.negatives import NO_PADDING
from recbole_cce.ops.triton.scalable_blocks import Blocks, score_blocks

SPACING = 8  # one row in so many is in the sample
DEVIATIONS = 5.0  # by which the sample may be wrong before a direction has to scan the table
SPARE = 4  # keys that a direction has memory for, in units of what it selects
MIN_CAPACITY = 4096


@custom_op("top_rows")
def top_rows(
    directions: torch.Tensor, table: torch.Tensor, target: Optional[torch.Tensor], k: int, padding_idx: Optional[int]
) -> torch.Tensor:
    """[B, k] int32, ascending: the rows of `table` with the largest inner products with each of `directions` [B, D].

    Of equal ones the lowest rows; products are of numbers in the dtype of `directions`. Left out are, with `target`,
    rows whose target is padding_idx, else row padding_idx; -1, which comes first, stands for what is missing then.
    """
    num_rows = len(table)
    rows = torch.empty(len(directions), k, dtype=torch.int32, device=table.device)
    if rows.numel() == 0:
        return rows
    if num_rows == 0:
        return rows.fill_(-1)
    itemsizes = directions.dtype.itemsize, table.dtype.itemsize
    blocks = score_blocks(table.size(1), *itemsizes, chip(table.device).shared_memory)
    # of each block of the sample there is one score or more
    capacity = min(num_rows, max(MIN_CAPACITY, SPARE * k, triton.cdiv(num_rows, SPACING * blocks.stay)))
    step = max(1, min(len(directions), BUFFER_ELEMENTS // capacity))
    keys = torch.empty(step, capacity, dtype=torch.int64, device=table.device)
    bound = count = None
    if capacity < num_rows:
        bound = torch.empty(step, dtype=torch.float32, device=table.device)
        # of directions up to the end of a block, those beyond the last one full
        counters = triton.cdiv(step, blocks.stream) * blocks.stream, selection_kernels.COUNTER.value
        count = torch.full(counters, 2**30, dtype=torch.int32, device=table.device)
    for chunk, out in zip(directions.contiguous().split(step), rows.split(step), strict=True):
        select_rows(chunk, table, target, k, padding_idx, blocks, keys, bound, count, out)
    return rows.sort(dim=1).values


def select_rows(
    directions: torch.Tensor,
    table: torch.Tensor,
    target: torch.Tensor | None,
    k: int,
    padding_idx: int | None,
    blocks: Blocks,
    keys: torch.Tensor,
    bound: torch.Tensor | None,
    count: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """Write to `out` [B, k]. `keys` [.., capacity], `bound` and `count` [..] are memory for at least B directions; the
    latter two are None where all keys have room."""
    num_rows, capacity = len(table), keys.size(1)
    dtype = directions.dtype
    matrix = matrix_options(directions, table, dtype)
    common = {
        "direction_ptr": directions,
        "table_ptr": table,
        "y_ptr": target,
        "key_ptr": keys,
        "num_rows": num_rows,
        "padding_idx": NO_PADDING if padding_idx is None else padding_idx,
        "capacity": capacity,
        "stride_tn": matrix["stride_wn"],
        "stride_td": matrix["stride_wd"],
        "stride_y": 0 if target is None else target.stride(0),
        **{name: matrix[name] for name in ("D", "BD", "DTYPE")},
    }

    def score(mode: str, programs: int, group: int = 1, **options: Any) -> None:
        # a small table is scored by several programs a block, each for some directions
        parts = triton.cdiv(4 * chip(table.device).processors, programs)
        each = triton.cdiv(triton.cdiv(len(directions), parts), blocks.stream) * blocks.stream
        selection_kernels.score_kernel[(programs, triton.cdiv(len(directions), each))](
            **{**common, **options},
            bound_ptr=bound,
            count_ptr=count,
            num_directions=len(directions),
            directions_each=each,
            num_samples=triton.cdiv(num_rows, SPACING),
            spacing=SPACING,
            BM=blocks.stay,
            BN=blocks.stream,
            GROUP=group,
            PRECISION=precision(),
            MODE=mode,
            ASSEMBLY=not interpreted(),
            num_warps=blocks.warps,
            num_stages=blocks.stages,
        )

    block = min(2**12, triton.next_power_of_2(capacity))
    if bound is None:
        score("all", triton.cdiv(num_rows, blocks.stay))
    else:
        programs, group = sampling(num_rows, capacity, blocks.stay)
        rank = keys.view(torch.int32)
        score("sample", programs, group, key_ptr=rank)
        selection_kernels.bound_kernel[(len(directions),)](
            rank_ptr=rank,
            bound_ptr=bound,
            count_ptr=count,
            count=programs * (blocks.stay // group),
            capacity=capacity,
            reaching=number_reaching(k),
            BLOCK=block,
            num_warps=max(1, block // 512),
        )
        score("reach", triton.cdiv(num_rows, blocks.stay))
    selection_kernels.select_kernel[(len(directions),)](
        **common,
        bound_ptr=bound,
        count_ptr=count,
        out_ptr=out,
        k=k,
        BR=16 if table.size(1) > 256 else 32,
        BLOCK=block,
        num_warps=max(1, block // 512),
    )


def sampling(num_rows: int, capacity: int, block: int) -> tuple[int, int]:
    """Blocks of sampled rows, and rows of a block that share a score, so that all scores have room."""
    programs = triton.cdiv(triton.cdiv(num_rows, SPACING), block)
    group = 1
    while programs * (block // group) > capacity:
        group *= 2
    return programs, group


def number_reaching(k: int) -> int:
    """How many sampled rows should reach a bound that k of all rows must: k / SPACING, and DEVIATIONS of them more."""
    return math.ceil(((DEVIATIONS + math.sqrt(DEVIATIONS**2 + 4 * k / SPACING)) / 2) ** 2)


@top_rows.register_fake
def _(
    directions: torch.Tensor, table: torch.Tensor, target: torch.Tensor | None, k: int, padding_idx: int | None
) -> torch.Tensor:
    return table.new_empty(len(directions), k, dtype=torch.int32)
