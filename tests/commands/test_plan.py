"""Predicted memory against counts of another kind, proposals that fill the memory, and the command."""

from __future__ import annotations

import dataclasses
import functools
import re
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from recbole_cce import cli
from recbole_cce.commands.plan import Shape, most_negatives, steps
from recbole_cce.models.sasrec import SASRecCCE, encoded
from recbole_cce.nn.losses import LOSSES, Buffers
from recbole_cce.training.memory import CUBLAS, DryRun, LiveBytes, Memory, catalogue, largest
from recbole_cce.training.out_of_memory import GIB, USABLE
from recbole_cce.training.step_plan import StepPlan

ROOT = Path(__file__).parent.parent.parent
SMALL = Shape(items=500, length=10, hidden=16, layers=1, inner=32)


@functools.cache
def dry_run(shape: Shape = SMALL) -> DryRun:
    return shape.dry_run()


def memory(loss_type: str, rows: int, negatives: int, shape: Shape = SMALL) -> Memory:
    plan = StepPlan.full(rows, shape.length)
    return dry_run(shape).memory(plan, loss_type=loss_type, num_negatives=negatives)


def buffers(loss_type: str, n: int, shape: Shape) -> Buffers:
    """What a loss with its default keys says that it holds of n positions."""
    config = {name: key.default for name, key in LOSSES[loss_type].keys.items()}
    return LOSSES[loss_type].holds(config, n, shape.items, shape.hidden)


def peak(loss_type: str, rows: int = 400, negatives: int = 32, shape: Shape = SMALL) -> int:
    return memory(loss_type, rows, negatives, shape).peak


# The prediction


def kept_by_the_encoder(shape: Shape, rows: int) -> int:
    """Bytes that autograd saves in the real encoder on the CPU, each storage once, parameters apart; with a byte a
    number for the masks of dropout, which itself is off here."""
    config = dry_run(shape).config
    model = SASRecCCE(config, catalogue(config, 1))
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    vectors = torch.randn(rows, shape.length, shape.hidden, requires_grad=True)
    where = torch.ones(rows, shape.length, dtype=torch.bool)
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = encoded(model, vectors, where)
    assert hidden.requires_grad
    masks = rows * shape.length * shape.hidden * (1 + 2 * shape.layers)
    return masks + sum(
        tensor.untyped_storage().nbytes()
        for address, tensor in saved.items()
        if address not in own and tensor.numel() % (rows * shape.length) == 0  # no 16-bit copies of weights
    )


def test_activations_are_those_that_autograd_saves_in_the_real_encoder():
    shape = Shape(items=500, length=23, hidden=64)
    real = kept_by_the_encoder(shape, 3) / (3 * shape.length)
    # CE's worst moment is before the encoder's backward pass: its activations, 49 bytes of indices a position
    more, less = (memory("CE", rows, 1, shape).encoder for rows in (140, 100))
    assert (more - less) / (40 * shape.length) - 49 == pytest.approx(real, rel=0.03)


def test_bytes_a_position_from_a_tiny_batch_hold_for_a_larger_one():
    shape = Shape(items=500, length=23, hidden=64)
    assert kept_by_the_encoder(shape, 24) == pytest.approx(8 * kept_by_the_encoder(shape, 3), rel=0.01)
    small, double, large = (memory("CE", rows, 1, shape).encoder for rows in (100, 200, 1600))
    assert large - small == pytest.approx(15 * (double - small), rel=0.01)


def test_a_table_takes_20_bytes_a_number_a_large_one_16_and_its_logits_12_bytes_each():
    """Four of the 20 are of the average of the weights."""
    table = memory("CCE-", 1, 1, Shape(10**6, 10, 16))
    assert table.parameters == pytest.approx(20 * 16 * 10**6, rel=0.01)
    large = memory("CCE-", 1, 1, Shape(5 * 10**6, 10, 16))
    assert large.parameters == pytest.approx(16 * 16 * 5 * 10**6, rel=0.01)
    assert table.encoder - CUBLAS + table.loss < 2**20
    logits = [peak("CE", 400, shape=Shape(items, 10, 16)) for items in (10_000, 20_000)]
    assert logits[1] - logits[0] == pytest.approx(12 * 400 * 10 * 10_000, rel=0.05)


def test_ce_minus_holds_the_vectors_of_all_negatives():
    shape = Shape(items=500, length=10, hidden=128, layers=1)
    more, less = (peak("CE-", 400, k, shape) for k in (64, 32))
    vectors = 400 * 10 * 32 * 128
    # their gradient as autograd has it and in the order of the rows, both fp32; 56 bytes a negative to sort them
    assert more - less == pytest.approx(8 * vectors + 56 * 400 * 10 * 32, rel=0.05)


def ce(hidden, weight, target):
    return F.cross_entropy(hidden @ weight.T, target)


def ce_minus(hidden, weight, target):
    rows = torch.empty(len(hidden), 255, dtype=torch.int64)
    negative = torch.einsum("nd,nkd->nk", hidden, weight[rows]).float()
    negative = negative.masked_fill(rows == target[:, None], -torch.inf)
    positive = (hidden * weight[target]).sum(1).float()
    return (torch.cat([positive[:, None], negative], 1).logsumexp(1) - positive).mean()


@pytest.mark.parametrize(
    ("loss", "n", "items", "dim", "mib"),
    [
        (ce, 65_536, 173_511, 256, 65014.3),
        (ce, 131_072, 18_345, 256, 13750.5),
        (ce_minus, 131_072, 173_511, 64, 10038.3),
    ],
)
def test_counts_are_what_was_measured_on_a_gpu(loss, n, items, dim, mib):
    """MiB beyond inputs and gradients of the losses in plain torch, all in bf16, of docs/benchmarks/losses.md."""
    assert f"{mib} |" in (ROOT / "docs" / "benchmarks" / "losses.md").read_text()
    with FakeTensorMode():
        hidden, weight = (torch.empty(rows, dim, dtype=torch.bfloat16, requires_grad=True) for rows in (n, items + 1))
        target = torch.empty(n, dtype=torch.int64)
        with LiveBytes() as live:
            value = loss(hidden, weight, target)
            live.gradient = weight.shape
            value.backward()
    gradients = 2 * dim * (n + items + 1)
    assert (CUBLAS + live.at_peak.total() - gradients) / 2**20 == pytest.approx(mib, rel=0.002)


@pytest.mark.parametrize("loss_type", LOSSES)
def test_more_of_anything_takes_more(loss_type):
    least = peak(loss_type)
    larger = {"items": 5000, "length": 20, "hidden": 32, "layers": 2, "inner": 64}
    for name, value in larger.items():
        assert peak(loss_type, shape=dataclasses.replace(SMALL, **{name: value})) > least, name
    assert peak(loss_type, rows=401) > least


def test_negatives_take_memory_where_their_vectors_are_held():
    assert peak("CE-", negatives=64) > peak("CE-", negatives=32)


@pytest.mark.parametrize("loss_type", ["CCE-", "BCE", "gBCE"])
def test_negatives_take_none_where_they_are_not(loss_type):
    assert peak(loss_type, negatives=4096) == peak(loss_type, negatives=1)


def test_parts_add_up():
    for loss_type in LOSSES:
        found = memory(loss_type, 400, 32)
        assert found.peak == found.parameters + found.encoder + found.loss
        assert found.parameters >= 12 * dry_run().numbers
        assert found.encoder > CUBLAS
        assert found.loss >= 0


# Buffers of the losses that are not run


def test_buffers_are_what_the_kernels_of_full_and_sampled_losses_return():
    pytest.importorskip("triton")
    from recbole_cce.ops.triton import linear_cross_entropy, sampled_cross_entropy

    n, shape = 4096, Shape(items=3000, length=8, hidden=64)
    with FakeTensorMode():
        hidden, weight = torch.empty(n, 64), torch.empty(3001, 64)
        target, seed = torch.empty(n, dtype=torch.int64), torch.empty((), dtype=torch.int64)
        copies = hidden.bfloat16(), weight.bfloat16()
        _, *kept, direction, residual = linear_cross_entropy.forward(
            hidden, weight, *copies, target, 0, torch.bfloat16, True
        )
        assert direction.shape == hidden.shape
        assert residual.numel() == 0
        full = sum(tensor.nbytes for tensor in (*kept, *copies, target))
        sampled = {}
        for name, positive_weight in (("CCE-", None), ("BCE", 1.0), ("gBCE", 0.5)):
            options = (None, None, None, 64, "tile", True, positive_weight, 0, torch.bfloat16, True)
            _, *kept, direction = sampled_cross_entropy.forward(hidden, weight, target, seed, *options)
            assert direction.shape == hidden.shape
            sampled[name] = sum(tensor.nbytes for tensor in (*kept, target))
    assert buffers("CCE", n, shape).kept == pytest.approx(full, rel=0.01)
    for name, held in sampled.items():
        assert buffers(name, n, shape).kept == pytest.approx(held, rel=0.01)


@pytest.mark.parametrize("items", [3000, 200_000])
def test_buffers_of_sce_are_what_its_kernel_returns(items):
    """The table is copied where buckets take as many rows as it has."""
    pytest.importorskip("triton")
    from recbole_cce.ops.triton import scalable_cross_entropy
    from recbole_cce.ops.triton.selection import top_rows

    n, shape = 4096, Shape(items=items, length=8, hidden=64)
    with FakeTensorMode():
        hidden, weight, target = torch.empty(n, 64), torch.empty(items + 1, 64), torch.empty(n, dtype=torch.int64)
        copy = weight.bfloat16() if items == 3000 else weight
        directions = torch.empty(int(2 * n**0.5), 64, dtype=torch.bfloat16)
        positions = top_rows(directions, hidden, target, int(2 * n**0.5), 0)
        chosen = top_rows(directions, weight, None, 1024, 0)
        loss, _, own, best, peak = scalable_cross_entropy.forward(
            hidden, weight, copy, target, positions, chosen, 0, torch.bfloat16
        )
        kept = sum(tensor.nbytes for tensor in (positions, chosen, loss, own, best, peak, target))
        kept += copy.nbytes if copy is not weight else 0
    assert buffers("SCE", n, shape).kept == kept
    assert buffers("SCE", n, shape).backward == positions.nbytes


# The proposal


@pytest.fixture(scope="module")
def proposals():
    budget = 2**28
    return budget, steps(SMALL, budget)


def test_there_is_one_for_every_loss(proposals):
    assert [step.loss_type for step in proposals[1]] == list(LOSSES)
    assert [step.loss_type for step in proposals[1] if step.negatives] == ["CCE-", "CE-", "BCE", "gBCE"]


def test_it_is_the_largest_that_fits(proposals):
    budget, found = proposals
    for step in found:
        assert step.memory == memory(step.loss_type, step.rows, step.negatives or 1)
        assert step.memory.peak <= budget < peak(step.loss_type, step.rows + 1, step.negatives or 1), step.loss_type


def test_rows_and_negatives_are_in_balance(proposals):
    """Twice the negatives do not fit with as many rows, or compute more than the encoder does."""
    budget, found = proposals
    for step in found:
        if step.negatives:
            assert step.negatives & (step.negatives - 1) == 0
            assert step.negatives <= min(step.rows, most_negatives(SMALL))
            twice = 2 * step.negatives
            assert twice > most_negatives(SMALL) or peak(step.loss_type, twice, twice) > budget


def test_what_is_given_is_kept():
    found = steps(SMALL, 2**28, batch_size=50, negatives=24)
    assert {step.rows for step in found} == {50}
    assert {step.negatives for step in found} == {None, 24}
    assert {step.negatives for step in steps(SMALL, 2**28, batch_size=50)} - {None} == {
        2 ** (most_negatives(SMALL).bit_length() - 1)
    }


def test_no_more_negatives_than_items_or_than_the_key_takes():
    assert most_negatives(dataclasses.replace(SMALL, items=7)) == 7
    assert most_negatives(Shape(10**6, 10**6, 64)) == 65536


@pytest.mark.parametrize("answer", [1, 2, 777, 2**20 - 1])
def test_largest_along_bent_lines(answer):
    """A line that bends up below the answer, one that bends down above it."""

    def cost(rows: int) -> int:
        return max(1000 + rows, 50 * rows) + min(7 * rows, 10**6)

    tried = []
    assert largest(lambda rows: tried.append(rows) or cost(rows), cost(answer), 2**20) == answer
    assert largest(cost, cost(1) - 1, 2**20) == 1  # it does not fit
    assert len(tried) < 40


# The command


@pytest.fixture
def command(monkeypatch, capsys):
    def call(*flags: str) -> tuple[str, str]:
        given = {flag.partition("=")[0] for flag in flags}
        small = {"--items": 500, "--length": 10, "--hidden": 16, "--gpu-memory": 1, "--layers": 1, "--inner": 32}
        words = [f"{name}={value}" for name, value in small.items() if name not in given]
        monkeypatch.setattr(sys, "argv", ["run_recbole_cce.py", "plan", *words, *flags])
        try:
            cli.main()
        except SystemExit as stop:
            assert stop.code == 2
        return tuple(capsys.readouterr())

    return call


def test_it_prints_a_table_and_flags(command):
    out, _ = command("--batch-size=400", "--negatives=32")
    rows = re.findall(r"^\| (\S+) +\|(.*)\|$", out, re.MULTILINE)
    assert [name for name, _ in rows[2:]] == list(LOSSES)
    cells = {name: [cell.strip() for cell in line.split("|")] for name, line in rows[2:]}
    found = memory("CE-", 400, 32)
    sizes = [found.peak, found.parameters, found.encoder, found.loss]
    assert cells["CE-"] == ["400", "32", *(f"{size / GIB:.2f}" for size in sizes), ""]
    assert cells["CCE"][:2] == ["400", ""]
    assert "--loss_type=CCE- --train_batch_size=400 --num_negatives=32 --MAX_ITEM_LIST_LENGTH=10 " in out
    assert "--loss_type=CCE --train_batch_size=400 --MAX_ITEM_LIST_LENGTH=10 " in out


def test_its_flags_are_those_of_a_run(command):
    out, _ = command("--batch-size=400", "--negatives=32")
    flags = next(line.split() for line in out.splitlines() if "--loss_type=CCE-" in line)
    cli.config_checks.check_flags(flags, {}, "SASRecCCE")


def test_a_loss_that_does_not_fit_says_so(command):
    """With 2^20 items the logits of a row are too many for what the table leaves."""
    table = 20 * 16 * 2**20
    out, _ = command("--items=1048576", f"--gpu-memory={1.15 * (table + CUBLAS) / USABLE / GIB}", "--batch-size=1")
    line = {name: line for name, line in re.findall(r"^\| (\S+) +\|(.*)\|$", out, re.MULTILINE)}
    assert "does not fit" in line["CE"]
    assert "does not fit" not in line["CCE-"]
    assert "--loss_type=CE " not in out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--items=-3"], r"--items: '-3' is not valid; it takes an integer >= 1"),
        (["--length=0"], r"--length: '0' is not valid; it takes an integer >= 1"),
        (["--hidden=1.5"], r"--hidden: '1.5' is not valid; it takes an integer >= 1"),
        (["--batch-size=-1"], r"--batch-size: '-1' is not valid; it takes an integer >= 1"),
        (["--gpu-memory=0"], r"--gpu-memory: '0' is not valid; it takes a number > 0"),
        (["--gpu-memory=nan"], r"--gpu-memory: 'nan' is not valid; it takes a number > 0"),
        (["--negatives=65537"], r"--negatives: 65537 is not valid; it takes an integer from 1 to 65536"),
        (["--hidden=16", "--heads=3"], r"--hidden: 16 is not valid with --heads=3; it takes a multiple of the heads"),
        (["--items=1" + "0" * 30], r"--items: '10+' is not valid; it takes an integer >= 1 and at most 10,000,000,000"),
        (["--length=100000000000"], r"--length: .* at most 100,000"),
        (["--hidden=100000000000000"], r"--hidden: .* at most 4,096"),
        (["--layers=1000000"], r"--layers: .* at most 100"),
        (["--inner=1" + "0" * 5000], r"--inner: .* at most 16,384"),
        (["--gpu-memory=1e300"], r"--gpu-memory: '1e300' is not valid; it takes a number > 0 and at most 1,000,000"),
        (["--items=10000000000", "--batch-size=1048576"], r"--gpu-memory: .* are too few"),
        (["--items=1000000", "--gpu-memory=0.1"], r"--gpu-memory: 0.1 GiB are too few for --items=1000000 --length=10"),
    ],
)
def test_mistakes(command, flags, message):
    out, err = command(*flags)
    assert out == ""
    assert re.search(message, err), err
    assert err.count("\n") == 1
