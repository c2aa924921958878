"""Time and memory of the losses and of their public peers on one GPU.

    python -m benchmarks.losses --published=DIR --output=DIR [--shapes=a,b] [--only="ours tile;ours none"] [--sweep k v]
    python -m benchmarks.losses --shapes=full --only="ours CCE;cut-cross-entropy;Liger;CE (torch)"
    python -m benchmarks.losses --published=DIR --shapes=sce

Forward, backward and both together: medians of CUDA events; where a step takes over 300 ms, the whole step alone, timed
once. Memory: the peak of the allocator beyond the inputs and beyond the gradients of both. Hidden states are bf16 and
the item table is an fp32 parameter, as in training with autocast; peers that take no fp32 table get a bf16 one, whose
copy is not counted against them, nor is the time to make it or to draw their negatives. The published kernel of CCE- is
imported from DIR (github.com/On-Point-RND/MemoryEfficientSRS), the published SCE from its subfolder sce
(github.com/AIRI-Institute/Scalable-SASRec), cut-cross-entropy and liger-kernel where they are installed. A peer that
does not fit is shown as out of memory.

Random data: hidden states and vectors are normal with logits of standard deviation 1; targets are uniform.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.csv_file import write_csv
from benchmarks.implementations import Problem, Shape, implementations, select
from recbole_cce.ops import negatives

# measured on an H100 80GB HBM3: dense bf16 products, copies, exponentials
FLOPS, BYTES, EXPONENTIALS, L2 = 798e12, 3.0e12, 3.7e12, 50e6


SHAPES = {
    "a": Shape(327_680, 173_511, 256, 511),
    "b": Shape(131_072, 18_345, 256, 511),
    "c": Shape(131_072, 173_511, 64, 255),
    "d": Shape(131_072, 1_600_000, 256, 4095),
    "full-a": Shape(65_536, 173_511, 256, 0),
    "full-b": Shape(131_072, 173_511, 64, 0),
    "full-c": Shape(131_072, 18_345, 64, 0),
    "full-d": Shape(131_072, 18_345, 256, 0),
    "full-e": Shape(32_768, 1_600_000, 128, 0),
    "sce-a": Shape(327_680, 173_511, 256, 0, (882, 882, 512)),
    "sce-b": Shape(131_072, 173_511, 64, 0, (724, 724, 256)),
    "sce-c": Shape(131_072, 1_600_000, 256, 0, (724, 724, 1024)),
}
SWEEPS = {
    "k": [Shape(32_768, 100_000, 128, k) for k in (15, 63, 255, 1023, 4095)],
    "v": [
        Shape(32_768, v, 128, 511, (362, 362, 256))
        for v in (10_000, 30_000, 100_000, 300_000, 1_000_000, 3_000_000, 10_000_000)
    ],
}
PATIENCE_MS = 300  # a step that takes longer is timed once, as a whole
SKIP_MS = 2000  # a step that takes longer is not measured at a larger K or V
# losses that have no K
WHOLE = (
    "ours CCE",
    "CE (torch)",
    "linear_cross_entropy (torch)",
    "cut-cross-entropy",
    "cut-cross-entropy, unfiltered",
    "Liger",
)
SCE = ("ours SCE", "ours SCE, deterministic", "SCE (torch)", "published SCE")
SETS = {kind: ",".join(name for name in SHAPES if name.startswith(kind)) for kind in ("full", "sce")}


def median_ms(function: Callable[[], Any], before: Callable[[], Any], seconds: float) -> float:
    """Median time of function() alone, which before() prepares, within about so many seconds."""

    def once() -> float:
        argument = before()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        # keeps the GPU busy while the launches are queued, as the layers before a loss do
        torch.cuda._sleep(4_000_000)
        start.record()
        function(argument)
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    once()
    first = once()
    return statistics.median(once() for _ in range(max(3, min(50, int(1000 * seconds / max(first, 0.01))))))


def measure(make: Callable, shape: Shape, seconds: float) -> dict[str, float | str]:
    """Times in ms and memory in MiB of one implementation, or why there are none."""
    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()  # 64 MiB that a peer before may have left, and that count as memory
    torch.cuda.empty_cache()
    try:
        return measure_times_and_memory(make, shape, seconds)
    except torch.cuda.OutOfMemoryError:
        return {"error": "out of memory"}
    except Exception as error:  # a peer that fails is a result
        return {"error": f"{type(error).__name__}: {error}".splitlines()[0][:150]}
    finally:
        torch.use_deterministic_algorithms(False)


def measure_times_and_memory(make: Callable, shape: Shape, seconds: float) -> dict[str, float | str]:
    """As measure(), raising what goes wrong."""
    problem = Problem(shape)
    loss = make(problem)
    inputs = sum(t.numel() * t.element_size() for t in (problem.hidden, problem.weight, problem.target))

    def clear(_: Any = None) -> None:
        problem.hidden.grad = problem.weight.grad = None

    def forward() -> torch.Tensor:
        clear()
        return loss()

    forward().backward()  # compiles
    clear()
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    forward().backward()
    end.record()
    end.synchronize()
    step_ms = start.elapsed_time(end)
    # what was asked for: the allocator gives up to 1 MiB more a tensor, inputs included
    peak = torch.cuda.memory_stats()["requested_bytes.all.peak"] - inputs
    gradients = sum(t.numel() * t.element_size() for t in (problem.hidden.grad, problem.weight.grad))
    memory = {"mib_beyond_inputs": peak / 2**20, "mib_beyond_gradients": (peak - gradients) / 2**20}
    apart = {}
    if problem.covered is not None:  # by SCE of this package
        apart["covered"] = problem.covered.float().mean().item()
    if step_ms > PATIENCE_MS:
        return apart | {"total_ms": step_ms} | memory
    if problem.covered is not None:
        apart["selection_ms"] = median_ms(lambda _: select(problem), clear, seconds)
    times = {
        "forward_ms": median_ms(lambda _: loss(), clear, seconds),
        "backward_ms": median_ms(lambda value: value.backward(), forward, seconds),
        "total_ms": median_ms(lambda _: loss().backward(), clear, seconds),
    }
    return apart | times | memory


def full_floor_ms(shape: Shape) -> float:
    """Least time of the full loss on an H100: four products and two exponentials a logit, which its kernels compute."""
    logits = shape.n * shape.v
    return 1e3 * max(8 * logits * shape.d / FLOPS, 2 * logits / EXPONENTIALS)


def floor_ms(shape: Shape, sharing: str) -> float:
    """Least time of forward and backward pass on an H100: four products, two exponentials a pair, and the bytes.

    Bytes: hidden states twice and their gradient; the table's gradient; where draws are shared, each drawn row gathered
    in fp32 twice and added once, else gathered once (the backward pass can gather hidden states, which stay in the L2
    cache). Of these rows as many cost nothing as the L2 cache holds of the table.
    """
    pairs = shape.n * shape.k
    rows = pairs if sharing == "none" else 3 * negatives.num_groups(shape.n, sharing) * shape.k
    table = shape.v * shape.d * 4
    moved = 3 * shape.n * shape.d * 2 + table + max(rows * shape.d * 4 * (1 - L2 / table), table)
    products = 8 * pairs * shape.d / FLOPS if sharing != "none" else 0
    return 1e3 * max(products, moved / BYTES, 2 * pairs / EXPONENTIALS)


def sce_floor_ms(shape: Shape, covered: float) -> float:
    """Time of SCE on an H100: its products, exponentials and bytes, whichever takes longest.

    Products: of the directions with all rows, of each bucket's positions with its items, and three times that for the
    covered positions in the backward pass. Bytes: hidden states for the directions, as positions of buckets and of
    winners, and their gradient; the table for the directions, its gradient, and the targets' vectors; the buckets'
    items, twice gathered and once added. Of gathered rows as many cost nothing as the L2 cache holds of the matrix.
    """
    n_buckets, size_x, size_y = shape.buckets
    winners = covered * shape.n
    products = n_buckets * (shape.n + shape.v) + (n_buckets * size_x + 3 * winners) * size_y
    exponentials = (n_buckets * size_x + 2 * winners) * size_y
    hidden, table = shape.n * shape.d * 2, shape.v * shape.d * 4
    positions = (n_buckets * size_x + winners) * shape.d * 2 * max(0, 1 - L2 / hidden)
    items = (3 * n_buckets * size_y + shape.n + 2 * winners) * shape.d * 4 * max(0, 1 - L2 / table)
    moved = 2 * hidden + 2 * table + positions + items
    return 1e3 * max(2 * products * shape.d / FLOPS, moved / BYTES, exponentials / EXPONENTIALS)


def figure(rows: list[dict[str, Any]], axis: str, output: Path) -> None:
    """Time and memory against K or V, both logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    for number, name in enumerate(dict.fromkeys(row["name"] for row in rows)):
        style = {"color": f"C{number}", "linestyle": "-" if name.startswith("ours") else ":"}
        style["marker"] = "o" if number < 10 else "s"  # colours repeat
        points = [row for row in rows if row["name"] == name and "total_ms" in row]
        failed = [row for row in rows if row["name"] == name and "error" in row]
        label = f"{name}: {failed[0]['error'][:30]} from {failed[0][axis]:,}" if failed else name
        for ax, key in zip(axes, ("total_ms", "mib_beyond_gradients"), strict=True):
            ax.plot([row[axis] for row in points], [max(row[key], 1e-2) for row in points], **style, label=label)
    for ax, title in zip(axes, ("forward + backward, ms", "peak memory beyond inputs and gradients, MiB"), strict=True):
        ax.set(xscale="log", yscale="log", xlabel={"k": "negatives K", "v": "items V"}[axis], title=title)
        ax.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=7)
    fixed = {"k": "V", "v": "K"}[axis]
    figure.suptitle(f"N = {rows[0]['n']}, D = {rows[0]['d']}, {fixed} = {rows[0][fixed.lower()]}, {rows[0]['gpu']}")
    figure.savefig(output / f"losses-{axis}.png", dpi=130)


def meant(name: str, shape: Shape) -> bool:
    """Whether an implementation has what it needs at a shape: buckets, or, unless it takes all items, negatives."""
    if name in SCE:
        return shape.buckets is not None
    return shape.k > 0 or (name in WHOLE and shape.buckets is None)


def run(
    names: list[str], shapes: list[Shape], found: dict, seconds: float, rows: list[dict[str, Any]], output: Path
) -> None:
    """Measure each implementation at each shape it is for; print and write as it goes, in case there is no time for the
    next. One over the whole catalogue runs once for all K, and none that was slow at a smaller shape of the same N and
    D."""
    whole, slow = {}, {}
    for shape in shapes:
        for name in names:
            if not meant(name, shape):
                continue
            key = name, replace(shape, k=0)
            smaller = slow.get((name, shape.n, shape.d))
            if key in whole:
                result = whole[key]
            elif smaller and smaller.v <= shape.v and smaller.k <= shape.k:
                where = f"V={smaller.v:,}" if smaller.v < shape.v else f"K={smaller.k:,}"
                result = {"error": f"over {SKIP_MS // 1000} s at {where}"}
            else:
                result = measure(found[name], shape, seconds)
            if result.get("total_ms", 0) > SKIP_MS:
                slow[name, shape.n, shape.d] = shape
            if name in WHOLE:
                whole[key] = result
            rows.append(
                {"name": name, **asdict(shape), **result}
                | {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
            )
            print(shape, "|", name, "|", {k: round(v, 3) if isinstance(v, float) else v for k, v in result.items()})
            sys.stdout.flush()
            write_csv(rows, output / "losses.csv")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--published", type=Path, help="checkout of the published CCE- code")
    parser.add_argument("--shapes", default="a,b,c,d", help="names; full or sce: all of a kind")
    parser.add_argument("--only", help="names of implementations, separated by ;")
    parser.add_argument("--sweep", nargs="+", choices=SWEEPS, default=[], help="also sweep K or V and draw the figure")
    parser.add_argument("--seconds", type=float, default=0.5, help="time for each median")
    parser.add_argument("--output", type=Path, default=Path("results"))
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    found = implementations(args.published)
    names = args.only.split(";") if args.only else list(found)
    unknown = [name for name in names if name not in found]
    if unknown:
        parser.error(f"--only: {unknown[0]!r} is not valid; it takes {'; '.join(found)}")
    shapes = [SHAPES[name] for name in SETS.get(args.shapes, args.shapes).split(",") if name]
    rows: list[dict[str, Any]] = []
    run(names, shapes, found, args.seconds, rows, args.output)
    for axis in args.sweep:
        first = len(rows)
        swept = [name for name in names if "deterministic" not in name]
        run(swept, SWEEPS[axis], found, args.seconds, rows, args.output)
        figure(rows[first:], axis, args.output)
    for row in rows:
        if "selection_ms" in row:
            loss_ms = row["forward_ms"] - row["selection_ms"]
            print(
                f"{row['name']}, {row['n']} x {row['v']} x {row['d']}: selection {row['selection_ms']:.2f}, "
                f"loss {loss_ms:.2f}, backward {row['backward_ms']:.2f} ms; {row['covered']:.1%} of positions covered"
            )
    print("\n| shape | implementation | forward | backward | total, ms | floor, ms | MiB beyond inputs and gradients |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        shape = Shape(*(row[field.name] for field in fields(Shape)))
        sharing = next((s for s in ("tile", "none", "batch") if s in row["name"].split(",")[0].split()), None)
        floor = f"{floor_ms(shape, sharing):.2f}" if sharing else ""
        if row["name"] == "ours CCE":
            floor = f"{full_floor_ms(shape):.2f}"
        if "covered" in row:
            floor = f"{sce_floor_ms(shape, row['covered']):.2f}"
        if "error" in row:
            print(f"| {shape} | {row['name']} | {row['error']} | | | | |")
        else:
            passes = [f"{row[key]:.2f}" if key in row else "" for key in ("forward_ms", "backward_ms")]
            print(
                f"| {shape} | {row['name']} | {passes[0]} | {passes[1]} | "
                f"{row['total_ms']:.2f} | {floor} | {row['mib_beyond_gradients']:.1f} |"
            )


if __name__ == "__main__":
    main()
