"""Time of causal attention on packed and padded rows, forward and backward, on one GPU.

    python -m benchmarks.attention --output=DIR

`own`: ops.packed_attention; `varlen_attn`: torch's, of 16 bits and without dropout; `padded`: torch's fused attention
on rows of the full width, with what it takes to put positions there and back. All start from query, key and value in
one tensor [P, 3, H, d] and end with its gradient. The median of replays of a CUDA graph.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.csv_file import write_csv
from benchmarks.training import BEAUTY
from recbole_cce.nn.attention import takes_variable_lengths, unpacked_attention, variable_length_attention
from recbole_cce.nn.packing import Packing, pack
from recbole_cce.ops import packed_attention

Attention = Callable[[torch.Tensor, Packing, float], torch.Tensor]
LENGTHS = {
    "2,048 of Beauty": (np.random.default_rng(0).permutation(np.repeat(np.arange(2, 51), BEAUTY))[:2048], 50),
    "1,024 x 100": (np.full(1024, 100), 100),
    "1,024 x 200": (np.full(1024, 200), 200),
}
HEADS, SIZES = 2, (32, 64, 128)


def own(mixed: torch.Tensor, packing: Packing, dropout: float) -> torch.Tensor:
    """Our kernels."""
    return packed_attention(*mixed.unbind(1), packing.spans, dropout, backend="triton")


def variable(mixed: torch.Tensor, packing: Packing, dropout: float) -> torch.Tensor:
    """torch's attention over sequences of their own lengths."""
    if not takes_variable_lengths(mixed[:, 0], dropout):
        raise ValueError("does not take it")
    return variable_length_attention(*mixed.unbind(1), packing)


def padded(mixed: torch.Tensor, packing: Packing, dropout: float) -> torch.Tensor:
    """torch's attention on padded rows."""
    return unpacked_attention(*mixed.unbind(1), packing, dropout)


def microseconds(attention: Attention, mixed: torch.Tensor, packing: Packing, dropout: float) -> float | str:
    """The median time of a forward and a backward pass, or why there is none."""
    mixed = mixed.detach().requires_grad_()
    upstream = torch.randn_like(mixed[:, 0])

    def step() -> None:
        mixed.grad = None
        attention(mixed, packing, dropout).backward(upstream)

    try:
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            step()
        side.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
    except (ValueError, torch.OutOfMemoryError) as error:
        return str(error).splitlines()[0][:40]
    times = []
    for _ in range(20):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(5):
            graph.replay()
        end.record()
        end.synchronize()
        times.append(200 * start.elapsed_time(end))
    return statistics.median(times[5:])


def rows() -> Iterator[dict[str, Any]]:
    """One for each problem."""
    dropouts = ((torch.bfloat16, 0.0), (torch.bfloat16, 0.6), (torch.float32, 0.0), (torch.float32, 0.6))
    for (name, (lengths, width)), size, (dtype, dropout) in itertools.product(LENGTHS.items(), SIZES, dropouts):
        packing = pack(torch.from_numpy(lengths).cuda(), width, int(lengths.sum()))
        mixed = torch.randn(int(lengths.sum()), 3, HEADS, size, dtype=dtype, device="cuda")
        row = {"rows": name, "head": size, "dtype": str(dtype).removeprefix("torch."), "dropout": dropout}
        for title, attention in (("own", own), ("varlen_attn", variable), ("padded", padded)):
            row[title] = microseconds(attention, mixed, packing, dropout)
        yield row | {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("results"))
    output = parser.parse_args().output
    output.mkdir(parents=True, exist_ok=True)
    done = []
    print("| rows | d | dtype | dropout | own, us | varlen_attn, us | padded, us |\n" + "|---" * 7 + "|")
    for row in rows():
        cells = [f"{cell:.0f}" if isinstance(cell, float) and cell > 1 else str(cell) for cell in row.values()]
        print("| " + " | ".join(cells[:7]) + " |", flush=True)
        done.append(row)
        write_csv(done, output / "attention.csv")
    print(f"\n{torch.cuda.get_device_name()}, torch {torch.__version__}")


if __name__ == "__main__":
    main()
