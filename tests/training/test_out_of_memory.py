"""What is said when memory does not suffice; the error is raised by hand, no GPU is needed."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from recbole_cce.commands.plan import WITHOUT_DATA, Shape
from recbole_cce.models.sasrec import SASRecCCE
from recbole_cce.nn.batch import Counts
from recbole_cce.plugin import entry_points
from recbole_cce.training import out_of_memory
from recbole_cce.training.out_of_memory import USABLE
from recbole_cce.training.step_plan import StepPlan
from tests.build import experiment
from tests.training.test_trainer import fit

GIB = 2**30
MESSAGE = "CUDA out of memory. Tried to allocate 1.50 GiB. GPU 0 has a total capacity of 79.11 GiB"


def full(*args, **kwargs):
    raise torch.OutOfMemoryError(MESSAGE)


def lowered(message):
    """Key -> (old, new) of a message."""
    return {key: (int(old), int(new)) for key, old, new in re.findall(r"(\w+) from (\d+) to (\d+)", message)}


@pytest.fixture
def gpu(monkeypatch):
    """A device of 2 GiB that holds 1 GiB."""
    usage = out_of_memory.usage
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: GIB)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 2 * GIB))
    monkeypatch.setattr(out_of_memory, "usage", lambda error, device: usage(error, torch.device("cuda")))


def test_a_training_step(tiny_config, gpu, monkeypatch):
    run = experiment("SASRecCCE", tiny_config)
    monkeypatch.setattr(run.model, "calculate_loss", full)
    with pytest.raises(torch.OutOfMemoryError) as error:
        fit(run)
    text = str(error.value)
    assert text.startswith(MESSAGE) and "in training: 2.5 GiB or more are needed, 2.0 are there" in text
    assert lowered(text) == {"train_batch_size": (16, 8), "MAX_ITEM_LIST_LENGTH": (8, 4)}


def test_an_evaluation(tiny_config, gpu, monkeypatch):
    run = experiment("SASRecCCE", tiny_config)
    monkeypatch.setattr(run.model, "forward", full)
    with pytest.raises(torch.OutOfMemoryError, match=r"in evaluation: 2\.5 GiB or more") as error:
        run.trainer.evaluate(run.valid, load_best_model=False)
    assert lowered(str(error.value)) == {"eval_batch_size": (4096, 2048), "eval_chunk_items": (31, 15)}
    run = experiment("SASRecCCE", {**tiny_config, "metrics": ["GAUC"], "valid_metric": "GAUC"})
    monkeypatch.setattr(run.model, "full_sort_predict", full)
    with pytest.raises(torch.OutOfMemoryError) as error:
        run.trainer.evaluate(run.valid, load_best_model=False)
    assert lowered(str(error.value)) == {"eval_batch_size": (4096, 2048)}


def test_on_a_cpu(tiny_config, monkeypatch):
    run = experiment("SASRecCCE", tiny_config)
    monkeypatch.setattr(run.model, "calculate_loss", full)
    with pytest.raises(torch.OutOfMemoryError) as error:
        fit(run)
    assert list(lowered(str(error.value))) == ["train_batch_size", "MAX_ITEM_LIST_LENGTH"]


def settings_of(items=100_000, **settings):
    shape = Shape(items, 200, 128, inner=512)
    return entry_points.configuration(
        "SASRecCCE", "none", [], {**shape.settings, **WITHOUT_DATA, "train_batch_size": 1024, **settings}
    )


def advice(peak=81 * GIB, real=None, items=100_000, total=80 * GIB, **settings):
    """For a step of 1,024 x 200 positions, D = 128; packed, so many of them are real."""
    plan = StepPlan.full(1024, 200)
    if real is not None:
        plan = replace(plan, counts=Counts(real, real, fixed=True), packed=True)
    return out_of_memory.training_advice(settings_of(items, **settings), SASRecCCE, items, plan, peak, total)


@pytest.mark.parametrize(
    ("settings", "keys"),
    [
        ({}, ["train_batch_size", "MAX_ITEM_LIST_LENGTH"]),
        ({"loss_type": "CE-"}, ["train_batch_size", "MAX_ITEM_LIST_LENGTH", "num_negatives"]),
    ],
    ids=str,
)
def test_keys_that_matter(settings, keys):
    assert list(lowered(advice(**settings))) == keys


@pytest.mark.parametrize("loss_type", ["CE", "CE-", "CCE-"])
def test_what_is_proposed_fits_as_planned(loss_type):
    """By the prediction of `plan` for a step with the proposal in place: it fits, and a larger one does not."""
    total = {"CE": 40, "CE-": 40, "CCE-": 2}[loss_type] * GIB
    found = lowered(advice(0, total=total, loss_type=loss_type, num_negatives=256))
    shape = Shape(100_000, 200, 128, inner=512)
    rows, length = (found[key][1] for key in ("train_batch_size", "MAX_ITEM_LIST_LENGTH"))
    fixed = {"loss_type": loss_type, "num_negatives": 256}

    def peak(rows, length, **settings):
        config = {**fixed, **settings}
        return replace(shape, length=length).dry_run().memory(StepPlan.full(rows, length), **config).peak

    assert peak(rows, 200) <= USABLE * total < peak(rows + 1, 200)
    assert peak(1024, length) <= 1.01 * USABLE * total and 0.99 * USABLE * total < peak(1024, length + 1)
    if loss_type == "CE-":
        negatives = found["num_negatives"][1]
        assert peak(1024, 200, num_negatives=negatives) <= USABLE * total
        assert USABLE * total < peak(1024, 200, num_negatives=negatives + 1)


def test_what_was_needed_is_what_plan_predicts():
    shape = Shape(100_000, 200, 128, inner=512)
    predicted = shape.dry_run().memory(StepPlan.full(1024, 200), loss_type="CE").peak / GIB
    assert f"{predicted:.1f} GiB or more are needed, 80.0 are there" in advice(0, loss_type="CE")


def test_logits_of_all_items():
    text = advice(0, items=1_600_000, loss_type="CE")
    assert text.endswith("or use loss_type: CCE, which keeps no logits")
    assert 15 < lowered(text)["train_batch_size"][1] < 25


def test_packed_batches_count_real_positions_alone():
    """Vectors of negatives for all positions are too many, for one in 200 of them they are not."""
    settings = {"loss_type": "CE-", "num_negatives": 2048}
    assert lowered(advice(0, **settings))["num_negatives"][1] < 350
    text = advice(100 * GIB, real=1024, **settings)
    assert lowered(text)["num_negatives"] == (2048, 1024)  # half: more was needed than is predicted


def test_a_table_that_leaves_no_room():
    text = advice(items=60_000_000)
    assert text.startswith("the item table, its gradient and the optimizer's moments take 114.4 GiB, 80.0 are there")
    assert "lower hidden_size: 128" in text and not lowered(text)


@pytest.mark.parametrize(
    ("text", "size"),
    [(MESSAGE, 1.5 * GIB), ("Tried to allocate 20.00 MiB.", 20 * 2**20), ("Tried to allocate 2 KiB", 2048), ("", 0)],
)
def test_the_size_that_was_requested(text, size):
    assert out_of_memory.requested(torch.OutOfMemoryError(text)) == size


@pytest.mark.cuda
def test_on_a_gpu(tiny_config):
    """More rows of logits than there is memory for, by hand: the advice is of the right size."""
    settings = {"use_gpu": True, "gpu_id": "0", "cuda_graph": False}
    run = experiment("SASRecCCE", {**tiny_config, **settings})
    calculate_loss = run.model.calculate_loss

    def too_much(interaction):
        return calculate_loss(interaction) + torch.zeros(2**40, device="cuda").sum()

    run.model.calculate_loss = too_much
    with pytest.raises(torch.OutOfMemoryError) as error:
        fit(run)
    assert re.search(r"in training: 409\d\.\d GiB or more are needed", str(error.value))
    assert lowered(str(error.value))["train_batch_size"] == (16, 1)
    run.model.calculate_loss = calculate_loss
    fit(run)  # nothing is left over
