"""What is said when memory does not suffice; the error is raised by hand, no GPU is needed."""

from __future__ import annotations

import re

import pytest
import torch

from recbole_cce.nn.batch import Places
from recbole_cce.training import out_of_memory
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
    assert run.model.places is None


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


class Model(torch.nn.Module):
    def __init__(self, n_items, columns):
        super().__init__()
        self.n_items = n_items
        self.item_embedding = torch.nn.Embedding(n_items, columns, device="meta")


CONFIG = {
    "train_batch_size": 1024,
    "MAX_ITEM_LIST_LENGTH": 200,
    "attention": "sdpa",
    "hidden_size": 128,
    "inner_size": 512,
    "n_layers": 2,
    "n_heads": 2,
    "loss_type": "CCE-",
    "num_negatives": 2048,
    "n_buckets": 800,
    "bucket_size_x": "auto",
    "bucket_size_y": 256,
}


MANY = Places(200_000, 200_000)


def advice(peak=81 * GIB, places=MANY, n_items=100_000, **settings):
    config = {**CONFIG, **settings}
    return out_of_memory.training_advice(config, Model(n_items, config["hidden_size"]), places, peak, 80 * GIB)


@pytest.mark.parametrize(
    ("settings", "keys"),
    [
        ({}, ["train_batch_size", "MAX_ITEM_LIST_LENGTH"]),
        ({"loss_type": "CE-"}, ["num_negatives", "train_batch_size", "MAX_ITEM_LIST_LENGTH"]),
        ({"loss_type": "SCE"}, ["train_batch_size", "MAX_ITEM_LIST_LENGTH", "n_buckets", "bucket_size_y"]),
    ],
    ids=str,
)
def test_keys_that_matter(settings, keys):
    assert list(lowered(advice(**settings))) == keys


def test_logits_of_all_items():
    """1,024 x 200 positions and 1.6 million items: 10 bytes a logit are 3.3 TB, of which 2% fit."""
    text = advice(n_items=1_600_000, loss_type="CE")
    assert text.endswith("or use loss_type: CCE, which keeps no logits")
    assert 15 < lowered(text)["train_batch_size"][1] < 25


def test_packed_batches_count_real_positions_alone():
    few = Places(1000, 1000)
    assert lowered(advice(100 * GIB, few, loss_type="CE-", attention="packed"))["num_negatives"][1] == 1024
    assert "num_negatives" not in advice(100 * GIB, few, loss_type="CE-", attention="sdpa")


def test_a_table_that_leaves_no_room():
    text = advice(n_items=60_000_000)
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
