"""Shared fixtures: every test runs in a folder of its own, where RecBole writes its logs and checkpoints."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

import recbole_cce  # noqa: F401  repairs RecBole before any test imports it

torch.set_num_threads(1)  # the tensors here are tiny: threads would only wait for each other
if torch.cuda.is_available():
    # torch asks once how many GPUs there are: not after a test that hides them, as gpu_id="" does
    torch.cuda.init()
    torch.cuda.device_count()


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs an NVIDIA GPU")
        for item in items:
            if "cuda" in item.keywords:
                item.add_marker(skip)


@pytest.fixture(autouse=True)
def free_gpu_memory(request):
    """What a test leaves in torch's cache another process cannot have."""
    yield
    if "cuda" in request.keywords:
        torch.cuda.empty_cache()


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """RecBole writes ./log, ./log_tensorboard and ./saved, reads sys.argv and sets CUDA_VISIBLE_DEVICES."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["test"])
    with mock.patch.dict(os.environ):
        yield
    root = logging.getLogger()
    for handler in root.handlers[:]:
        if isinstance(handler, logging.FileHandler):
            root.removeHandler(handler)
            handler.close()


def write_inter(folder: Path, name: str, header: str, rows: list) -> Path:
    """Write folder/name/name.inter in RecBole's atomic format; returns the folder for data_path."""
    (folder / name).mkdir(parents=True, exist_ok=True)
    lines = [header, *("\t".join(map(str, row)) for row in rows)]
    (folder / name / f"{name}.inter").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def tiny(tmp_path):
    """data_path of `tiny`: 40 users, 30 items, 3 to 12 interactions each, in random order of lines."""
    rng = np.random.default_rng(0)
    rows = []
    for user in range(40):
        for step, item in enumerate(rng.integers(0, 30, rng.integers(3, 13))):
            rows.append((f"u{user}", f"i{item}", 1_600_000_000 + 1000 * step + user))
    rng.shuffle(rows)
    return write_inter(tmp_path / "data", "tiny", "user_id:token\titem_id:token\ttimestamp:float", rows)


@pytest.fixture
def tiny_config(tiny):
    """A quick configuration for run_recbole and Config on `tiny`, on the CPU: RecBole's SASRec in what a step does."""
    return {
        "data_path": str(tiny),
        "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
        "gpu_id": "",
        "use_gpu": False,
        "state": "ERROR",
        "show_progress": False,
        "epochs": 2,
        "hidden_size": 16,
        "inner_size": 32,
        "MAX_ITEM_LIST_LENGTH": 8,
        "train_batch_size": 16,
        "learning_rate": 0.002,
        "hidden_dropout_prob": 0.5,
        "num_negatives": 8,
        "positions": "start",
        "weight_average": "none",
    }
