"""The largest catalogue and the largest batch that each loss can train with on one GPU.

    python -m benchmarks.capacity --published=DIR --output=DIR [--only="ours tile;Liger"] [--axes=v,n] [--gpu-memory=80]

Two searches for each of benchmarks.implementations: the most items V at N = 32,768 positions, and the most positions N
at V = 1,000,000 items; D = 128, K = 511, for SCE buckets by its authors' rule. A size fits if one step of
training does: bf16 hidden states and their gradient, an fp32 item table, its gradient and Adam's two moments, loss,
backward pass and Adam step. Peers that take no fp32 table get a bf16 copy that the step makes and that their gradient
goes back through, as under autocast; the published kernel's negatives are drawn in the step. A step must also leave a
finite loss and gradients in the last rows: offsets of 32 bits that overflow need not crash.

Sizes double until one fails, then the bracket is bisected down to 3 %; --start, the first size, shortens a search of
steps that take minutes. A search ends early, "at least", where a step of twice as many would take longer than
--patience, at an error other than a lack of memory, and where its process takes longer than --seconds. Each
implementation has its own process, and a new one after an error, since a peer that reads out of bounds leaves its
process without a usable GPU. --gpu-memory: GiB (2**30 bytes) that tensors may take, for a card that stands for a
smaller one; what CUDA itself takes comes on top.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.csv_file import write_csv
from benchmarks.implementations import Problem, Shape, implementations
from recbole_cce.ops.scalable_cross_entropy import AUTO_BUCKET_SIZE_Y, auto_size

POSITIONS, ITEMS, COLUMNS, NEGATIVES = 32_768, 1_000_000, 128, 511
STARTS = {"v": 65_536, "n": 4_096}  # axis -> the first size that is tried, unless --start says another
PRECISION = 0.03
GIB = 2**30
NAMES = (
    "CE (torch)",
    "CE- (torch)",
    "published CCE-",
    "cut-cross-entropy",
    "Liger",
    "published SCE",
    "ours tile",
    "ours none",
    "ours CCE",
    "ours SCE",
)
HEADER = (
    f"| implementation | most items V at N = {POSITIONS:,} | GiB | most positions N at V = {ITEMS:,} | GiB |\n"
    "|---|---|---|---|---|"
)


class Training(Problem):
    """Inputs of one shape, of which the fp32 table is what is trained."""

    def in_bf16(self) -> torch.Tensor:
        """A copy of the table that gradients go through."""
        return self.weight.bfloat16()


class TooSlowError(Exception):
    """The next size would take longer than anyone wants to wait."""


def largest(fits: Callable[[int], bool], start: int, limit: int, precision: float) -> int:
    """The largest size up to `limit` that fits, at most by the share `precision` too small; 0 if `start` does not."""
    low, high = 0, start
    while high <= limit and fits(high):
        low, high = high, 2 * high
    high = min(high, limit + 1)  # the least size that is known not to fit
    while low and high - low > max(1, precision * low):
        middle = round(math.sqrt(low * high))
        if fits(middle):
            low = middle
        else:
            high = middle
    return low


def shape_at(axis: str, size: int) -> Shape:
    """So many items or positions, the other number fixed."""
    n, v = (POSITIONS, size) if axis == "v" else (size, ITEMS)
    return Shape(n, v, COLUMNS, NEGATIVES, (auto_size(n), auto_size(n), AUTO_BUCKET_SIZE_Y))


def limit(axis: str, memory: int) -> int:
    """The size at which so many bytes are full of what no loss can do without.

    That is four fp32 tables, the hidden states and their gradient in bf16, and the targets.
    """
    item, position = 16 * COLUMNS, 4 * COLUMNS + 8
    if axis == "v":
        return (memory - POSITIONS * position) // item - 1  # and the row of the padding
    return (memory - (ITEMS + 1) * item) // position


def step(make: Callable, shape: Shape) -> dict[str, float]:
    """Seconds and peak GiB of a training step with an optimizer that has its state already.

    Raises:
        ArithmeticError: the step went through, but not to what a loss is.
    """
    problem = Training(shape)
    optimizer = torch.optim.Adam([problem.weight], fused=True)
    problem.weight.grad = torch.zeros_like(problem.weight)
    optimizer.step()  # makes the moments
    optimizer.zero_grad()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    loss = make(problem)()  # nothing else holds the bf16 table: it can go as soon as the backward pass is through
    loss.backward()
    optimizer.step()
    torch.cuda.synchronize()
    result = {"seconds": time.perf_counter() - start, "gib": torch.cuda.max_memory_allocated() / GIB}
    # many rows, for SCE leaves positions out
    last = problem.target[-20_000:].topk(100).values
    if not loss.isfinite():
        raise ArithmeticError("the loss is not finite")
    if not (problem.weight.grad[last].any() and problem.hidden.grad[-1000:].any()):
        raise ArithmeticError("the last rows have no gradient")
    return result


def attempt(make: Callable, shape: Shape) -> dict[str, float] | None:
    """What step() returns, or None if it runs out of memory; other errors are raised."""
    gc.collect()
    torch.cuda.empty_cache()
    try:
        return step(make, shape)
    except Exception as error:
        # libraries say it in their own words, where not the allocator but CUDA has no more
        if any(words in str(error) for words in ("out of memory", "ALLOC_FAILED")):
            return None
        raise


def search(make: Callable, axis: str, start: int, memory: int, patience: float, report: Callable[..., None]) -> bool:
    """Find the largest size; report what is known after each trial and, with `end`, last of all.

    Returns:
        Whether the process can go on: False after an error, which may have left its GPU context unusable.
    """
    best: dict[str, Any] = {"largest": 0}
    top = limit(axis, memory)
    size, failed = 0, False

    def fits(candidate: int) -> bool:
        nonlocal best, size, failed
        size = candidate
        result = attempt(make, shape_at(axis, size))
        slow = result is not None and 2 * result["seconds"] > patience
        # the first step of all compiles, and so may one that takes far longer than half of its size did
        if slow and (not best["largest"] or result["seconds"] > 5 * best["seconds"]):
            result = attempt(make, shape_at(axis, size))
        if result is None:
            failed = True
            report(**best, tried=size)
            return False
        best = {"largest": size, **result}
        report(**best, tried=size)
        if not failed and 2 * size <= top and 2 * result["seconds"] > patience:
            raise TooSlowError
        return True

    try:
        largest(fits, start, top, PRECISION)
    except TooSlowError:
        report(**best, end=f"a step of twice as many would take over {patience:g} s")
    except Exception as error:  # a peer that fails is a result
        text = " ".join(f"{type(error).__name__}: {error}".replace("|", "/").split())[:120]
        report(**best, end=f"{text}, at {size:,}")
        return False
    else:
        report(**best, tried=size, end="")
    return True


def work(name: str, args: argparse.Namespace) -> None:
    """Search along the axes in a process of its own, a line of JSON for each report, up to an error."""
    properties = torch.cuda.get_device_properties(0)
    memory = properties.total_memory
    if args.gpu_memory:
        memory = min(memory, int(args.gpu_memory * GIB))
        torch.cuda.set_per_process_memory_fraction(memory / properties.total_memory)
    about = {"gpu": properties.name, "memory_gib": round(memory / GIB, 2), "torch": torch.__version__}
    make = implementations(args.published)[name]
    for axis in args.axes.split(","):

        def report(axis: str = axis, **known: Any) -> None:
            print(json.dumps({"name": name, "axis": axis, **known, **about}), flush=True)

        if not search(make, axis, args.start or STARTS[axis], memory, args.patience, report):
            os._exit(0)  # an unusable context may abort an orderly exit


def explore(name: str, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The row of each axis, by processes of their own."""
    axes = args.axes.split(",")
    options = [f"--patience={args.patience}"]
    options += [f"--published={args.published}"] if args.published else []
    options += [f"--gpu-memory={args.gpu_memory}"] if args.gpu_memory else []
    options += [f"--start={args.start}"] if args.start else []
    while axes:
        command = [sys.executable, "-m", "benchmarks.capacity", f"--work={name}", f"--axes={','.join(axes)}", *options]
        row: dict[str, Any] = {"name": name, "axis": axes[0], "largest": 0}
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            timer = threading.Timer(args.seconds, process.kill)
            timer.daemon = True
            started = time.perf_counter()
            timer.start()
            for line in process.stdout:
                if not line.startswith("{"):  # something that a peer prints
                    continue
                row = json.loads(line)
                print(f"{time.perf_counter() - started:6.1f} s", row, file=sys.stderr, flush=True)
                if "end" in row:
                    yield row
                    axes.remove(row["axis"])
                    row = {"name": name, "axis": axes[0], "largest": 0} if axes else {}
            timer.cancel()
        if axes and process.returncode != 0:
            late = time.perf_counter() - started > args.seconds
            why = f"over {args.seconds:g} s" if late else f"exit status {process.returncode}"
            yield {**row, "end": f"the process ended: {why}"}
            axes.pop(0)


def cells(row: dict[str, Any] | None) -> str:
    """The largest size and its memory, as two cells of the table."""
    if row is None:
        return " | "
    if not row["largest"]:
        return f"{row['end'] or 'not even ' + format(row['tried'], ',')} | "
    size = f"at least {row['largest']:,} ({row['end']})" if row["end"] else f"{row['largest']:,}"
    return f"{size} | {row['gib']:.1f}"


def line(name: str, rows: list[dict[str, Any]]) -> str:
    """A row of the table."""
    found = {row["axis"]: row for row in rows if row["name"] == name}
    return f"| {name} | {cells(found.get('v'))} | {cells(found.get('n'))} |"


def write(rows: list[dict[str, Any]], output: Path) -> None:
    """What is known, as CSV and as Markdown."""
    write_csv(rows, output / "capacity.csv")
    lines = [HEADER, *(line(name, rows) for name in dict.fromkeys(row["name"] for row in rows))]
    (output / "capacity.md").write_text("\n".join(lines) + "\n")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--published", type=Path, help="checkout of the published CCE- code")
    parser.add_argument("--only", help="names of implementations, separated by ;")
    parser.add_argument("--axes", default="v,n", help="what to search: v, n or both")
    parser.add_argument("--start", type=int, help="the first size that is tried; smaller ones are not")
    parser.add_argument("--gpu-memory", type=float, help="GiB (2**30 bytes) for tensors; default: all of the GPU")
    parser.add_argument("--patience", type=float, default=20, help="seconds that a step may be expected to take")
    parser.add_argument("--seconds", type=float, default=240, help="time after which a process is ended")
    parser.add_argument("--output", type=Path, default=Path("results"))
    parser.add_argument("--work", help=argparse.SUPPRESS)  # the implementation of this process
    args = parser.parse_args()
    if not set(args.axes.split(",")) <= set(STARTS):
        parser.error(f"--axes: {args.axes!r} is not valid; it takes v, n or v,n")
    if not torch.cuda.is_available():
        parser.error("it needs an NVIDIA GPU")
    if args.work:
        work(args.work, args)
        return
    found = [name for name in NAMES if name in implementations(args.published)]
    names = args.only.split(";") if args.only else found
    unknown = [name for name in names if name not in found]
    if unknown:
        parser.error(f"--only: {unknown[0]!r} is not valid; it takes {'; '.join(found)}")
    args.output.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    print(HEADER, flush=True)
    for name in names:
        for row in explore(name, args):
            rows.append(row)
            write(rows, args.output)
        print(line(name, rows), flush=True)


if __name__ == "__main__":
    main()
