"""`plan`: how many rows and negatives a training step of each loss can have on a GPU, and what they take."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from typing import Any

from recbole_cce.errors import UserError
from recbole_cce.models.sasrec import SASRecCCE
from recbole_cce.nn.losses.registry import LOSSES
from recbole_cce.nn.losses.sampled import SampledLoss
from recbole_cce.plugin import entry_points
from recbole_cce.training.memory import DryRun, Memory, largest
from recbole_cce.training.out_of_memory import GIB, USABLE
from recbole_cce.training.step_plan import StepPlan

MOST_NEGATIVES = 2**16
MOST_ROWS = 2**20
COLUMNS = ("loss", "batch size", "negatives", "peak GiB", "parameters + optimizer", "encoder", "loss", "")


# Instead of auto where there are no data: memory is the same with any dropout but 0, and any learning rate.
WITHOUT_DATA = {"hidden_dropout_prob": 0.5, "learning_rate": 0.001, "loss_type": "CCE-"}


@dataclass(frozen=True)
class Shape:
    """A model: V `items`, rows of `length` positions, D = `hidden`; otherwise RecBole's SASRec."""

    items: int
    length: int
    hidden: int
    layers: int = 2
    heads: int = 2
    inner: int = 256

    @property
    def settings(self) -> dict[str, Any]:
        """RecBole's keys."""
        return {
            "MAX_ITEM_LIST_LENGTH": self.length,
            "hidden_size": self.hidden,
            "n_layers": self.layers,
            "n_heads": self.heads,
            "inner_size": self.inner,
        }

    def dry_run(self) -> DryRun:
        """Steps of a SASRecCCE of this shape, with its defaults otherwise."""
        config = entry_points.configuration("SASRecCCE", "none", [], {**self.settings, **WITHOUT_DATA})
        return DryRun(config, SASRecCCE, self.items)


@dataclass(frozen=True)
class Step:
    """A training step: rows of a batch, negatives (None where the loss has none) and its memory."""

    loss_type: str
    rows: int
    negatives: int | None
    memory: Memory


def plan(
    items: int,
    length: int,
    hidden: int,
    gpu_memory: float,
    batch_size: int | None = None,
    negatives: int | None = None,
    layers: int = 2,
    heads: int = 2,
    inner: int = 256,
) -> None:
    """Print steps() as a table, and the flags of those that fit.

    Args:
        items: V.
        length, hidden, layers, heads, inner: MAX_ITEM_LIST_LENGTH, hidden_size, n_layers, n_heads, inner_size.
        gpu_memory: GiB of the GPU.
        batch_size, negatives: rows of a step and num_negatives; proposed if None.

    Raises:
        UserError: hidden is no multiple of heads; too many negatives; no loss fits.
    """
    if hidden % heads:
        raise UserError(f"--hidden: {hidden} is not valid with --heads={heads}; it takes a multiple of the heads")
    key = SampledLoss.keys["num_negatives"]
    if negatives is not None and not key.accepts(negatives):
        raise UserError(f"--negatives: {negatives} is not valid; it takes {key.valid}")
    shape = Shape(items, length, hidden, layers, heads, inner)
    budget = int(USABLE * gpu_memory * GIB)
    found = steps(shape, budget, batch_size, negatives)
    if all(step.memory.peak > budget for step in found) and (batch_size is None or negatives is None):
        least = min(found, key=lambda step: step.memory.peak)
        raise UserError(
            f"--gpu-memory: {gpu_memory:g} GiB are too few for --items={items} --length={length} --hidden={hidden}: "
            f"of {USABLE * gpu_memory:.2f} GiB that a step may take, {least.loss_type} takes "
            f"{least.memory.peak / GIB:.2f} at a batch size of {least.rows}"
        )
    print(f"Training steps on {gpu_memory:g} GiB, of which {USABLE:.0%} are filled at most; GiB at the worst moment:\n")
    print(table(found, budget))
    print("\nFlags:")
    for step in found:
        if step.memory.peak <= budget:
            print(f"  {flags(step, shape)}")


def steps(shape: Shape, budget: int, batch_size: int | None = None, negatives: int | None = None) -> list[Step]:
    """For each loss the largest step within `budget` bytes, or of one row where none is.

    Negatives are a power of two: as many as rows if memory allows both, since more of both is better than of one, but
    no more than most_negatives(). What is given is not chosen.
    """
    dry_run = shape.dry_run()

    def step(loss_type: str) -> Step:
        sampled = "num_negatives" in LOSSES[loss_type].keys

        def memory(rows: int, k: int) -> Memory:
            return dry_run.memory(StepPlan.full(rows, shape.length), loss_type=loss_type, num_negatives=k)

        def peak(rows: int, k: int) -> int:
            return memory(rows, k).peak

        k = negatives or 1
        if negatives is None and sampled:
            powers = [2**power for power in range(most_negatives(shape).bit_length())]
            k = powers[max(0, bisect_right(powers, budget, key=lambda k: peak(batch_size or k, k)) - 1)]
        rows = batch_size or largest(lambda rows: peak(rows, k), budget, MOST_ROWS)
        return Step(loss_type, rows, k if sampled else None, memory(rows, k))

    return [step(loss_type) for loss_type in LOSSES]


def most_negatives(shape: Shape) -> int:
    """The K at which a loss with K negatives a position computes as much as the encoder: beyond it K costs time.

    Products of forward and backward pass for a position: 8 K D of the loss; of the encoder three times those of its
    forward pass, 2 (4 D^2 + 2 D inner + D length) a layer.
    """
    as_encoder = 3 * shape.layers * (4 * shape.hidden + 2 * shape.inner + shape.length) // 4
    return min(as_encoder, shape.items, MOST_NEGATIVES)


def table(found: list[Step], budget: int) -> str:
    """Markdown, columns aligned; what a step that does not fit would take at least stands there, too."""
    lines: list[tuple[str, ...]] = [COLUMNS]
    for step in found:
        memory = step.memory
        sizes = [memory.peak, memory.parameters, memory.encoder, memory.loss]
        lines.append(
            (
                step.loss_type,
                f"{step.rows:,}",
                "" if step.negatives is None else f"{step.negatives:,}",
                *(f"{size / GIB:.2f}" for size in sizes),
                "" if memory.peak <= budget else "does not fit",
            )
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(COLUMNS))]
    rows = [[line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in lines]
    rule = ["-" * width for width in widths]
    return "\n".join(f"| {' | '.join(row)} |" for row in (rows[0], rule, *rows[1:]))


def flags(step: Step, shape: Shape) -> str:
    """The configuration of a step, to be pasted after run_recbole_cce.py."""
    keys = {"loss_type": step.loss_type, "train_batch_size": step.rows, "num_negatives": step.negatives}
    keys |= shape.settings
    return " ".join(f"--{key}={value}" for key, value in keys.items() if value is not None)
