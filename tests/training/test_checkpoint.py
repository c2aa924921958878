"""Runs that are killed and resumed, in fresh processes; damaged files, full disks, files of stock RecBole."""

from __future__ import annotations

import builtins
import collections
import contextlib
import datetime
import errno
import importlib
import io
import json
import logging
import math
import os
import pickle
import re
import runpy
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse
import torch
import yaml
from recbole.config import Config
from recbole.data import dataset as recbole_dataset
from recbole.data import interaction
from recbole.model import layers
from recbole.model.abstract_recommender import AbstractRecommender
from recbole.quick_start import load_data_and_model
from recbole.sampler import sampler
from recbole.trainer import Trainer
from recbole.utils import enum_type

from recbole_cce import cli, files
from recbole_cce.models import sasrec
from recbole_cce.plugin import saved_config
from recbole_cce.training import checkpoint
from recbole_cce.training import trainer as trainer_module
from tests.build import configure, experiment
from tests.plugin.test_repairs import STOCK
from tests.process import SCRIPT, python, python_path

# on `tiny`, validation improves up to epoch 4 and the run stops early, after epoch 8
SETTINGS = {"epochs": 12, "learning_rate": 0.03, "stopping_step": 3, "state": "INFO", "checkpoint_interval": 0}
STEPS = 4  # of an epoch


@pytest.fixture
def settings(tiny_config, tmp_path):
    """tiny_config with SETTINGS, also in tiny.yaml."""
    settings = {**tiny_config, **SETTINGS}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(settings))
    return settings


FLAGS = ("--dataset=tiny", "--config_files=tiny.yaml")

# the command line, killed as by kill -9 in its n-th training step, or half-way through its n-th save
KILLED = """
import os
import signal
import sys
import threading
import time
from pathlib import Path

import torch

from recbole_cce import cli
from recbole_cce.training.trainer import EfficientTrainer

what, number = sys.argv.pop(1), int(sys.argv.pop(1))
step, save, calls = EfficientTrainer._forward_backward, torch.save, {"step": 0, "save": 0}


def kill_at(event):
    calls[event] += 1
    if (event, calls[event]) == (what, number):
        os.kill(os.getpid(), signal.SIGKILL)


def killed_step(*arguments):
    loss = step(*arguments)
    if calls["step"] + 1 == number:
        arguments[0].writer.wait()  # or what is being written would be lost, too
    kill_at("step")
    return loss


def killed_save(state, file):
    save(state, "whole.pth")
    content = Path("whole.pth").read_bytes()
    file.write(content[: len(content) // 2])
    file.flush()
    kill_at("save")
    file.write(content[len(content) // 2 :])


EfficientTrainer._forward_backward, torch.save = killed_step, killed_save
cli.main()
"""


def log_of(process, code=0):
    assert process.returncode == code, process.stderr[-3000:]
    return re.sub(r"\x1b\[[0-9;]*m", "", process.stderr)


def results(log):
    return re.findall(r"(?:best valid|test result) ?: (.*)", log)


def states(folder):
    """What the files of the best and of the last epoch hold, without the configuration; there is nothing else."""
    (best,) = Path(folder).glob("*.pth")
    last = checkpoint.last_file(best)
    assert {path.name for path in Path(folder).iterdir()} == {best.name, last.name}
    return [{key: value for key, value in torch.load(file).items() if key != "config"} for file in (best, last)]


def assert_same(one, two):
    """Equal in every number."""
    assert type(one) is type(two)
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, two)
    elif isinstance(one, dict):
        assert one.keys() == two.keys()
        for key in one:
            assert_same(one[key], two[key])
    elif isinstance(one, (list, tuple)):
        for mine, other in zip(one, two, strict=True):
            assert_same(mine, other)
    else:
        assert one == two


@pytest.fixture(scope="module")
def whole():
    """Results of the uninterrupted run, once made."""
    return {}


@pytest.mark.parametrize(
    ("what", "number", "resumed", "files"),
    [
        ("step", 3 * STEPS + 2, 3, 1),  # after an epoch that was the best
        ("step", 7 * STEPS + 2, 7, 2),
        ("save", 5, 4, 2),  # the best epoch's
        ("save", 7, 6, 3),  # the last epoch's
        ("save", 9, 8, 3),  # the last epoch's, when all training is over
    ],
    ids=["epoch after the best", "epoch", "save of the best", "save of the last", "last save"],
)
def test_killed_and_resumed(settings, tmp_path, whole, what, number, resumed, files):
    """It ends as the run that was not killed: files of the best and of the last epoch, results."""
    if not whole:
        log = log_of(python(SCRIPT, *FLAGS, "--checkpoint_dir=whole"))
        whole |= {"log": log, "states": states("whole")}
        assert "Finished training, best eval result in epoch 4" in log
        assert [state["epoch"] for state in whole["states"]] == [4, 8]
    (tmp_path / "killed.py").write_text(KILLED)
    killed = python("killed.py", what, number, *FLAGS, PYTHONPATH=python_path(SCRIPT.parent))
    log_of(killed, code=-signal.SIGKILL)
    assert len(os.listdir("saved")) == files  # with the half of one
    log = log_of(python(SCRIPT, *FLAGS, "--resume"))
    assert f"Resume training from epoch {resumed}\n" in log
    assert "will not be used" not in log
    epochs = r"epoch (\d+) training"
    assert re.findall(epochs, log) == re.findall(epochs, whole["log"])[resumed:]
    assert results(log) == results(whole["log"]) and len(results(log)) == 2
    assert_same(states("saved"), whole["states"])


# The last epoch beside the best one


def fit(run, **kwargs):
    return run.trainer.fit(run.train, run.valid, **kwargs)


@pytest.mark.parametrize("eval_step", [1, 2])
def test_the_newest_file_is_of_the_epoch_before(settings, eval_step):
    """Throughout a run, whichever epoch was the best; the last epoch has a file of its own only if it was another."""
    run = experiment("SASRecCCE", {**settings, "eval_step": eval_step})
    train_epoch, valid_epoch, seen, scores = run.trainer._train_epoch, run.trainer._valid_epoch, [], {}

    def look_and_train(train_data, epoch, **kwargs):
        loss = train_epoch(train_data, epoch, **kwargs)
        if epoch:
            file = checkpoint.newest("saved", "SASRecCCE", "tiny")
            seen.append(
                (torch.load(file)["epoch"], file == Path(run.trainer.saved_model_file), len(os.listdir("saved")))
            )
        return loss

    def validate(*args, **kwargs):
        score, result = valid_epoch(*args, **kwargs)
        scores[run.trainer.trained_epoch] = score
        return score, result

    run.trainer._train_epoch, run.trainer._valid_epoch = look_and_train, validate
    fit(run)
    assert [epoch for epoch, _, _ in seen] == list(range(len(seen)))
    best = [
        epoch in scores and scores[epoch] >= max(scores[other] for other in scores if other <= epoch)
        for epoch in range(len(seen))
    ]
    assert sum(best) > 2 and not best[-1]
    assert [is_best for _, is_best, _ in seen] == best
    alone = best if eval_step == 1 else [True, *best[1:]]  # epoch 0 was not validated: there is no best one yet
    assert [files == 1 for _, _, files in seen] == alone


def test_nothing_is_saved_where_nothing_shall_be(settings):
    fit(experiment("SASRecCCE", settings), saved=False)
    assert os.listdir("saved") == []


def test_a_run_that_stopped_early_trains_no_more(settings):
    run = experiment("SASRecCCE", settings)
    result = fit(run)
    before = states("saved")
    again = experiment("SASRecCCE", settings)
    again.trainer.resume_checkpoint(checkpoint.last_file(run.trainer.saved_model_file))
    assert fit(again) == result
    assert again.trainer.train_loss_dict == {}
    assert_same(states("saved"), before)
    assert again.trainer.evaluate(again.test) == run.trainer.evaluate(run.test)


def test_a_finished_run_goes_on_with_more_epochs(settings):
    whole = experiment("SASRecCCE", {**settings, "checkpoint_dir": "whole"})
    result = fit(whole)
    run = experiment("SASRecCCE", {**settings, "epochs": 6})
    fit(run)
    more = experiment("SASRecCCE", settings)
    more.trainer.resume_checkpoint(checkpoint.newest("saved", "SASRecCCE", "tiny"))
    assert fit(more) == result
    assert list(more.trainer.train_loss_dict) == [6, 7, 8]
    assert_same(states("saved"), states("whole"))


def test_the_last_epoch_without_the_best(settings):
    run = experiment("SASRecCCE", settings)
    fit(run)
    best = Path(run.trainer.saved_model_file)
    best.unlink()
    with pytest.raises(ValueError, match=rf"{best.name}\.last needs saved/{best.name} beside it"):
        experiment("SASRecCCE", settings).trainer.resume_checkpoint(checkpoint.last_file(best))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"n_layers": 1}, "n_layers 2, not of 1"),
        ({"n_heads": 4}, "n_heads 2, not of 4"),
        ({"hidden_act": "relu"}, "hidden_act gelu, not of relu"),
        ({"architecture": "original"}, "architecture recbole, not of original"),
        ({"learner": "sgd"}, "learner adam, not of sgd"),
        ({"loss_type": "CCE"}, "loss_type CCE-, not of CCE"),
        ({"seed": 1}, "seed 2020, not of 1"),
        ({"valid_metric": "NDCG@10"}, "valid_metric MRR@10, not of NDCG@10"),
        ({"exclude_seen": True}, "exclude_seen False, not of True"),
        (
            {"eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "mode": "uni5"}},
            r"eval_args \{.*\}, not of",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_other_settings(settings, other, message):
    run = experiment("SASRecCCE", {**settings, "epochs": 1})
    fit(run)
    file = run.trainer.saved_model_file
    with pytest.raises(ValueError, match=f"{file} is a checkpoint of {message}"):
        experiment("SASRecCCE", {**settings, **other}).trainer.resume_checkpoint(file)


def test_settings_that_hold_from_the_next_epoch_on(settings):
    run = experiment("SASRecCCE", {**settings, "epochs": 1})
    fit(run)
    other = {"learning_rate": 0.5, "weight_decay": 0.25, "adam_betas": (0.5, 0.75), "train_batch_size": 7, "topk": 10}
    other |= {"hidden_dropout_prob": 0.25, "num_negatives": 3, "eval_batch_size": 9, "epochs": 2}
    other |= {"load_col": {"inter": ("user_id", "item_id", "timestamp")}}  # the same
    again = experiment("SASRecCCE", {**settings, **other})
    again.trainer.resume_checkpoint(run.trainer.saved_model_file)
    (group,) = again.trainer.optimizer.param_groups
    assert (group["lr"], group["weight_decay"], group["betas"]) == (0.5, 0.25, (0.5, 0.75))
    moments = again.trainer.optimizer.state[again.model.item_embedding.weight]
    assert torch.equal(moments["exp_avg"], run.trainer.optimizer.state[run.model.item_embedding.weight]["exp_avg"])
    steps = []
    step = again.trainer._forward_backward
    again.trainer._forward_backward = lambda *args: steps.append(1) or step(*args)
    fit(again)
    assert len(steps) == len(again.train) > STEPS


@pytest.mark.parametrize("model", ["SASRec", "BPR"])
def test_models_of_recbole_go_on_with_other_settings(settings, model):
    run = experiment(model, {**settings, "epochs": 1})
    fit(run)
    again = experiment(model, {**settings, "learning_rate": 0.5})
    again.trainer.resume_checkpoint(run.trainer.saved_model_file)
    assert again.trainer.optimizer.param_groups[0]["lr"] == 0.5
    assert again.trainer.start_epoch == 1
    other = {"n_heads": 4} if model == "SASRec" else {"embedding_size": 8}
    with pytest.raises(ValueError, match=r"n_heads 2, not of 4|embedding_size 64, not of 8"):
        experiment(model, {**settings, **other}).trainer.resume_checkpoint(run.trainer.saved_model_file)


# Memory


def test_a_file_is_mapped_and_goes_from_the_host_to_its_parameters(settings, monkeypatch):
    """Nothing of it is read onto the device; on the CPU nothing trained is the file's own memory."""
    run = experiment("SASRecCCE", {**settings, "epochs": 1})
    fit(run)
    file, loads, load = run.trainer.saved_model_file, [], torch.load
    monkeypatch.setattr(torch, "load", lambda *args, **options: loads.append(options) or load(*args, **options))
    again = experiment("SASRecCCE", settings)
    again.trainer.evaluate(again.test, model_file=file)
    again.trainer.resume_checkpoint(file)
    load_data_and_model(file)
    stock = experiment("SASRec", {**settings, "epochs": 1})
    fit(stock)
    stock.trainer.evaluate(stock.test)
    stock.trainer.resume_checkpoint(stock.trainer.saved_model_file)
    assert len(loads) == 5
    assert all(options == {"map_location": "cpu", "mmap": True, "weights_only": True} for options in loads)
    for trainer in (again.trainer, stock.trainer):
        for moments in trainer.optimizer.state.values():
            assert not moments["exp_avg"].untyped_storage().filename


@pytest.mark.cuda
def test_testing_and_resuming_take_no_second_copy(settings):
    wide = {"use_gpu": True, "gpu_id": "0", "hidden_size": 512, "inner_size": 2048, "epochs": 1, "amp_dtype": "float32"}
    run = experiment("SASRecCCE", {**settings, **wide})
    fit(run)
    size = sum(parameter.nbytes for parameter in run.model.parameters())
    file = run.trainer.saved_model_file
    del run
    again = experiment("SASRecCCE", {**settings, **wide})
    again.trainer.evaluate(again.test, load_best_model=False)  # what an evaluation takes, and workspaces
    for use, kept in (
        (lambda: again.trainer.evaluate(again.test, model_file=file), 0),
        (lambda: again.trainer.resume_checkpoint(file), 2),
    ):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        use()
        assert torch.cuda.max_memory_allocated() - before < (kept + 0.5) * size


# When files are written


class Clock:
    """time, which stands still but where a test moves it."""

    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now

    def __getattr__(self, name):
        return getattr(time, name)


@pytest.mark.parametrize(
    ("interval", "expected", "written"),
    [(0, 0, range(9)), (3, 9, [0, 3, 6, 8]), ("auto", 0, [0, 4, 8]), ("auto", 0.19, [3, 7, 8]), (99, 0, [0, 8])],
)
def test_files_are_written_at_their_time(settings, monkeypatch, interval, expected, written):
    """An epoch takes one second, and a file 0.19: a twentieth of 3.8. What is kept meanwhile is not lost.

    `expected`: how long the first file should take, by its bytes, before any was written.
    """
    clock, epochs = Clock(), []
    monkeypatch.setattr(checkpoint, "time", clock)
    monkeypatch.setattr(trainer_module, "time", clock)
    run = experiment("SASRecCCE", {**settings, "checkpoint_interval": interval, "checkpoint_dir": "late"})
    state = sum(parameter.nbytes for parameter in run.model.parameters()) * 3  # with Adam's moments
    monkeypatch.setattr(trainer_module, "DISK", state / expected if expected else math.inf)
    train_epoch, write = run.trainer._train_epoch, checkpoint.write

    def slow_write(state, file):
        epochs.append(state["epoch"])
        clock.now += 0.19
        write(state, file)

    def slow_epoch(train_data, epoch, **kwargs):
        loss = train_epoch(train_data, epoch, **kwargs)
        run.trainer.writer.wait()
        clock.now = 1001.0 + epoch
        return loss

    monkeypatch.setattr(checkpoint, "write", slow_write)
    run.trainer._train_epoch = slow_epoch
    result = fit(run)
    assert sorted({*epochs} - {4}) == sorted({*written} - {4}) and 4 in epochs
    whole = experiment("SASRecCCE", settings)
    assert fit(whole) == result
    assert_same(states("late"), states("saved"))


def test_training_goes_on_while_a_file_is_written(settings, monkeypatch):
    """With the numbers of the epoch that it is of."""
    run = experiment("SASRecCCE", {**settings, "epochs": 2, "checkpoint_interval": 99, "eval_step": 0})
    write, trained, weights = checkpoint.write, threading.Event(), []

    def waiting_write(state, file):
        assert trained.wait(60)
        write(state, file)

    monkeypatch.setattr(checkpoint, "write", waiting_write)
    train_epoch = run.trainer._train_epoch

    def epoch(*args, **kwargs):
        loss = train_epoch(*args, **kwargs)
        weights.append(run.model.item_embedding.weight.detach().clone())
        if len(weights) == 2:
            assert os.listdir("saved") == []
            trained.set()
            run.trainer.writer.wait()
            saved = torch.load(run.trainer.saved_model_file)
            assert saved["epoch"] == 0
            assert torch.equal(saved["state_dict"]["item_embedding.weight"], weights[0])
        return loss

    run.trainer._train_epoch = epoch
    fit(run)
    assert torch.load(run.trainer.saved_model_file)["epoch"] == 1


def test_a_file_that_cannot_be_written_ends_the_run(settings, monkeypatch):
    run = experiment("SASRecCCE", settings)
    calls = []

    def full_disk(state, file):
        calls.append(state["epoch"])
        raise OSError("no space left")

    monkeypatch.setattr(checkpoint, "write", full_disk)
    with pytest.raises(OSError, match="no space left"):
        fit(run)
    assert calls == [0] and len(run.trainer.train_loss_dict) <= 2


def test_an_error_in_training_loses_no_best_epoch(settings):
    run = experiment("SASRecCCE", {**settings, "checkpoint_interval": 99})
    step, steps = run.trainer._step, []

    def failing_step(*args):
        steps.append(1)
        if len(steps) == 3 * STEPS + 2:  # the epochs before improved
            raise RuntimeError("CUDA error")
        return step(*args)

    run.trainer._step = failing_step
    with pytest.raises(RuntimeError, match="CUDA error"):
        fit(run)
    assert torch.load(run.trainer.saved_model_file)["epoch"] == 2


# Signals

SIGNALLED = """
import os
import signal
import sys

from recbole_cce import cli
from recbole_cce.training.trainer import EfficientTrainer

number, steps, at = int(sys.argv.pop(1)), [0], [int(step) for step in sys.argv.pop(1).split(",")]
step = EfficientTrainer._forward_backward


def signalled_step(*arguments):
    steps[0] += 1
    if steps[0] in at:
        os.kill(os.getpid(), number)
    return step(*arguments)


EfficientTrainer._forward_backward = signalled_step
cli.main()
"""


@pytest.mark.parametrize(
    ("number", "code", "interval", "steps", "epoch", "ended"),
    [
        (signal.SIGINT, 130, 0, [3 * STEPS + 2], 2, 3),  # all is saved: at once
        (signal.SIGTERM, 143, 99, [3 * STEPS + 2], 3, 4),  # after the epoch
        (signal.SIGINT, 130, 99, [3 * STEPS + 2, 3 * STEPS + 3], 2, 3),  # twice: the best one, which was kept
        (signal.SIGTERM, 143, 0, [2], None, 0),
    ],
    ids=["Ctrl-C", "SIGTERM", "Ctrl-C twice", "first epoch"],
)
def test_signals(settings, tmp_path, number, code, interval, steps, epoch, ended):
    """One line that says how to go on, and no traceback."""
    (tmp_path / "signalled.py").write_text(SIGNALLED)
    flags = (*FLAGS, f"--checkpoint_interval={interval}")
    path = python_path(SCRIPT.parent)
    process = python("signalled.py", int(number), ",".join(map(str, steps)), *flags, PYTHONPATH=path)
    log = log_of(process, code)
    assert "Traceback" not in log and log.count("interrupted") == 1
    assert len(re.findall(r"epoch \d+ training", log)) == ended
    last = log.strip().splitlines()[-1]
    if epoch is None:
        assert last == "interrupted: no epoch was over, nothing is saved"
        assert os.listdir("saved") == []
        return
    file = re.fullmatch(r"interrupted: the same command with --resume=(\S+) goes on after epoch (\d+)", last)
    assert int(file[2]) == epoch and torch.load(file[1])["epoch"] == epoch
    assert not list(Path("saved").glob(".*"))
    again = experiment("SASRecCCE", settings)
    again.trainer.resume_checkpoint(file[1])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_program_without_training_ends_in_one_line_too(monkeypatch, capsys, number):
    monkeypatch.setattr(cli, "run_command", lambda: (os.kill(os.getpid(), number), time.sleep(60)))
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 128 + number
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert ("--resume goes on" in capsys.readouterr().err) == (number == signal.SIGINT)


# Names and folders


def test_runs_that_start_in_one_second_have_files_of_their_own(settings, monkeypatch):
    names = {experiment("SASRecCCE", settings).trainer.saved_model_file for _ in range(3)}  # with one seed
    assert len(names) == 3
    for name in names:
        assert Path(name).match("saved/SASRecCCE-*.pth")


@pytest.mark.parametrize("folder", ["tiny.yaml", "tiny.yaml/saved", "/proc/saved"])
def test_a_folder_that_cannot_be_written_to(settings, monkeypatch, capsys, folder):
    """Before any data is read."""
    monkeypatch.setattr(
        sys, "argv", ["run_recbole_cce.py", *FLAGS, "--data_path=nowhere", f"--checkpoint_dir={folder}"]
    )
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    assert f"checkpoint_dir: '{folder}' is not valid (" in capsys.readouterr().err


def test_parts_of_writers_that_were_killed_are_removed(settings):
    """Whatever run they are of; not those of writers at work."""
    os.mkdir("saved")
    dead = Path("saved", f".SASRecCCE-other.pth.{'7' * 39}")
    dead.write_bytes(b"half")
    for other in (".hidden.1", "SASRecCCE-other.pth"):
        Path("saved", other).write_bytes(b"x")

    def write(stream):
        checkpoint.write({"config": {}}, Path("saved/x.pth"))
        assert len(list(Path("saved").glob(".SASRecCCE-mine.pth.*"))) == 1

    files.write_whole(Path("saved/SASRecCCE-mine.pth"), write)
    assert sorted(os.listdir("saved")) == [".hidden.1", "SASRecCCE-mine.pth", "SASRecCCE-other.pth", "x.pth"]


# Damaged files


@pytest.mark.parametrize("damage", ["half", "all but one byte", "empty", "text", "one bit of a weight"])
def test_damaged_files(settings, damage):
    run = experiment("SASRecCCE", {**settings, "epochs": 1})
    fit(run)
    file = Path(run.trainer.saved_model_file)
    content = file.read_bytes()
    at = content.index(run.model.item_embedding.weight.detach().numpy().tobytes()) + 100
    flipped = content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]
    damaged = [content[: len(content) // 2], content[:-1], b"", b"epoch: 3\n" * 99, flipped]
    file.write_bytes(
        dict(zip(("half", "all but one byte", "empty", "text", "one bit of a weight"), damaged, strict=True))[damage]
    )
    message = rf"^{file} is truncated or corrupt: delete it, and resume from another checkpoint or train anew$"
    for use in (run.trainer.resume_checkpoint, load_data_and_model, checkpoint.read):
        with pytest.raises(ValueError, match=message):
            use(str(file))
    with pytest.raises(ValueError, match=message):
        checkpoint.newest("saved", "SASRecCCE", "tiny")


def test_a_file_that_is_no_checkpoint():
    torch.save({"weight": torch.ones(3)}, "weights.pth")
    with pytest.raises(ValueError, match=r"weights\.pth is not a checkpoint of RecBole: it holds no configuration"):
        checkpoint.read("weights.pth")


# Full disks


class FullDisk(io.FileIO):
    """A file on a disk with room for a part of it."""

    def write(self, data):
        if self.tell() + len(data) > 20_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(data)


@pytest.mark.parametrize("saved_before", [True, False])
def test_a_full_disk(settings, monkeypatch, saved_before):
    """torch has an error of its own, which does not say why."""
    run = experiment("SASRecCCE", settings)
    if saved_before:
        run.trainer._save_checkpoint(3)
    file = Path(run.trainer.saved_model_file)
    before = file.read_bytes() if saved_before else None
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left on device") as error:
        patch.setattr(builtins, "open", lambda path, mode: FullDisk(path, mode))
        run.trainer._save_checkpoint(4)
    assert cli.is_users_mistake(error.value)
    kept = "the one saved before is as it was" if saved_before else "none was saved before"
    assert str(error.value).startswith(f"{file}: the checkpoint could not be written (") and kept in str(error.value)
    assert os.listdir("saved") == ([file.name] if saved_before else [])
    if saved_before:
        assert file.read_bytes() == before


def test_other_errors_of_a_save_stay_what_they_are(tmp_path):
    with pytest.raises(TypeError, match=r"a checkpoint cannot hold a function, as in \['other'\]\['function'\]"):
        checkpoint.write({"config": {}, "other": {"function": lambda: None}}, tmp_path / "x.pth")
    assert os.listdir(tmp_path) == []


# Files of stock RecBole

STOCK_RUN = f"""
import json
import sys
{STOCK}
import torch
from recbole.quick_start import run_recbole

if __name__ == "__main__":
    settings = json.load(open("stock.json"))
    try:
        run_recbole("SASRec", "tiny", config_dict=settings)
    except Exception as error:
        print(type(error).__name__)
"""


@pytest.fixture
def stock(settings, tmp_path):
    """A checkpoint that stock RecBole wrote, which current torch does not let it read again."""
    (tmp_path / "stock.json").write_text(json.dumps({**settings, "epochs": 2, "train_neg_sample_args": None}))
    (tmp_path / "stock.py").write_text(STOCK_RUN)
    process = python("stock.py")
    assert process.stdout.split() == ["UnpicklingError"], process.stderr
    (file,) = Path("saved").glob("*.pth")
    return file


REFUSED = r"SASRec-\S+\.pth holds pickled objects.*unpickling can run any code.*use --trust-checkpoint, or load_data_a"


def command(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["run_recbole_cce.py", "--model=SASRec", *FLAGS, "--epochs=3", *flags])
    cli.main()


@pytest.mark.parametrize(("named", "trust"), [(True, "--trust-checkpoint"), (False, "--trust_checkpoint")])
def test_stock_files_are_resumed_if_trusted(stock, monkeypatch, capsys, caplog, named, trust):
    resume = f"--resume={stock}" if named else "--resume"
    before = stock.read_bytes()
    with pytest.raises(SystemExit) as stop:
        command(monkeypatch, resume)
    assert stop.value.code == 2
    assert re.search(REFUSED, capsys.readouterr().err.strip().splitlines()[-1])
    assert stock.read_bytes() == before
    weights = torch.load(stock, weights_only=False)["state_dict"]
    with caplog.at_level("INFO"):
        command(monkeypatch, resume, trust)
    assert caplog.text.count("Resume training from epoch") == 1
    safe = torch.load(stock, weights_only=True)
    assert safe["config"]["model"] == "SASRec"
    assert safe["state_dict"].keys() == weights.keys()


def test_stock_files_are_loaded_if_trusted(stock):
    with pytest.raises(ValueError, match=REFUSED):
        load_data_and_model(str(stock))
    expected = torch.load(stock, weights_only=False)["state_dict"]
    for trust in ({"trust_checkpoint": True}, {}):  # once is enough
        _, model, *_ = load_data_and_model(str(stock), **trust)
        assert_same(dict(model.state_dict()), dict(expected))


def test_files_of_earlier_versions_are_used_if_trusted(settings, monkeypatch, capsys):
    """They hold the Config itself."""
    run = experiment("SASRecCCE", {**settings, "epochs": 1})
    fit(run)
    file = run.trainer.saved_model_file
    torch.save({**torch.load(file), "config": run.config, "state_dict": run.model.state_dict()}, file)
    flags = ["run_recbole_cce.py", "export", f"--checkpoint={file}", "--output=items"]
    monkeypatch.setattr(sys, "argv", [*flags])
    with pytest.raises(SystemExit):
        cli.main()
    assert "holds pickled objects" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", [*flags, "--trust-checkpoint"])
    cli.main()
    assert np.array_equal(np.load("items.npy"), run.model.item_embedding.weight[1:].detach())
    assert torch.load(file, weights_only=True)["config"] == checkpoint.kept(run.config)


# Files that would run code

RUN = "__import__('os').mkdir('attacked')"


class Call:
    """Pickled, a call of a function as it is read."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def callables():
    """What files of RecBole, and of earlier versions of this package, name; and what an attack would name."""
    for package in ("general", "sequential", "context_aware", "knowledge_aware"):
        importlib.import_module(f"recbole.model.{package}_recommender")
    models = [*subclasses(AbstractRecommender)]
    assert len(models) > 90 and {sasrec.SASRecCCE, sasrec.SASRecSCE} < set(models)
    modules = (interaction, layers, sampler, enum_type, recbole_dataset)
    classes = [cls for module in modules for cls in vars(module).values() if isinstance(cls, type)]
    classes = [cls for cls in classes if cls.__module__.startswith("recbole.")]
    arrays = [np.empty(0).__reduce__()[0], np.float64().__reduce__()[0], np.ndarray, np.matrix, np.dtype]
    arrays += [type(np.dtype(name)) for name in ("bool", "int32", "int64", "float32", "float64", "str", "object")]
    arrays += [scipy.sparse.csr_matrix, scipy.sparse.csc_matrix, scipy.sparse.lil_matrix]
    others = [torch.nn.Embedding, torch.nn.ModuleList, torch.nn.ModuleDict, list, collections.defaultdict]
    others += [yaml.FullLoader, logging.getLogger, getattr, subprocess.Popen, runpy.run_path, importlib.import_module]
    yield from (Call(one) for one in [*models, *classes, *arrays, *others])
    yield from DANGEROUS.values()


def subclasses(cls):
    for child in cls.__subclasses__():
        yield child
        yield from subclasses(child)


DANGEROUS = {
    "a configuration": Call(Config, "SASRecCCE", "ml-100k", None, {"x": RUN}),
    "eval": Call(eval, RUN),
    "exec": Call(exec, RUN),
    "mkdir": Call(os.mkdir, "attacked"),
    "system": Call(os.system, "mkdir attacked"),
    "yaml": Call(yaml.load, f'!!python/object/apply:eval ["{RUN}"]', yaml.UnsafeLoader),
    "loader": Call(yaml.FullLoader, "x: 1"),
    "logger": Call(logging.getLogger, "attacked"),
}


def attack(call, file="attack.pth"):
    """A checkpoint with a call in it, beside what a reader looks at first."""
    config = {"model": "SASRecCCE", "dataset": "tiny"}
    torch.save({"config": config, "epoch": 0, "state_dict": {}, "optimizer": call}, file)


def test_no_call_is_made():
    """By torch.load, or by this package; the dangerous ones do what they are to do where a file is trusted."""
    for call in callables():
        attack(call)
        with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
            torch.load("attack.pth", weights_only=True)
        with pytest.raises(ValueError, match="--trust-checkpoint"):
            checkpoint.read("attack.pth")
    assert not Path("attacked").exists()
    for name in ("eval", "exec", "mkdir", "system"):
        attack(DANGEROUS[name])
        with contextlib.suppress(TypeError):  # of what is no checkpoint
            checkpoint.read("attack.pth", trust=True)
        os.rmdir("attacked")


@pytest.mark.parametrize("name", DANGEROUS)
def test_no_way_in_makes_a_call(settings, monkeypatch, capsys, name):
    run = experiment("SASRecCCE", settings)
    best, last = "saved/SASRecCCE-attack.pth", "saved/SASRecCCE-attack.pth.last"
    attack(DANGEROUS[name], best)
    for read in (
        load_data_and_model,
        run.trainer.resume_checkpoint,
        lambda file: run.trainer.evaluate(run.test, model_file=file),
        lambda file: Trainer.resume_checkpoint(run.trainer, file),
    ):
        with pytest.raises(ValueError, match="--trust-checkpoint"):
            read(best)
    for file, *flags in (
        [best, *FLAGS, f"--resume={best}"],
        [best, *FLAGS, "--resume"],
        [last, *FLAGS, "--resume"],
        [best, "recommend", f"--checkpoint={best}", "--output=top.csv"],
        [best, "export", f"--checkpoint={best}", "--output=items"],
    ):
        os.replace(next(Path("saved").glob("*attack*")), file)
        monkeypatch.setattr(sys, "argv", ["run_recbole_cce.py", *flags])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert stop.value.code == 2 and "--trust-checkpoint" in capsys.readouterr().err
    assert not Path("attacked").exists()


def test_strings_of_a_configuration_are_not_evaluated(settings, monkeypatch):
    run = experiment("SASRecCCE", {**settings, "epochs": 1})
    fit(run)
    file = run.trainer.saved_model_file
    state = torch.load(file)
    state["config"] |= {"x": RUN, "hidden_act": "gelu", "numbers": ["1 + 1", (RUN, {"y": RUN})], "resume": RUN}
    torch.save(state, file)
    config, *_ = load_data_and_model(file)
    assert (config["x"], config["numbers"], config["resume"]) == (RUN, ["1 + 1", (RUN, {"y": RUN})], None)
    monkeypatch.setattr(sys, "argv", ["run_recbole_cce.py", "export", f"--checkpoint={file}", "--output=items"])
    cli.main()
    monkeypatch.setattr(sys, "argv", ["run_recbole_cce.py", *FLAGS, "--epochs=2", f"--resume={file}"])
    with pytest.raises(SystemExit):  # x is not there now
        cli.main()
    assert not Path("attacked").exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": "../../x"}, r"the checkpoint's model: there is no model '\.\./\.\./x'"),
        ({"model": "os"}, "there is no model 'os'"),
    ],
)
def test_names_in_a_configuration_are_of_what_there_is(settings, values, message):
    config = checkpoint.kept(experiment("SASRecCCE", settings).config)
    with pytest.raises(ValueError, match=message):
        saved_config.rebuilt(config | values)
    assert not Path("attacked").exists()


def test_a_configuration_is_what_it_was(settings):
    config = configure("SASRecCCE", {**settings, "adam_betas": (0.9, 0.98)})
    config["numbers"] = {"a": [1, 2.5, None, True], 3: "[1, 2]"}
    config["scalar"] = np.float64(0.5)
    assert saved_config.rebuilt(checkpoint.kept(config)).final_config_dict == config.final_config_dict


@pytest.mark.parametrize("value", [datetime.date(2024, 5, 1), {"a": [{1}]}, b"x", np.ones(2), print], ids=repr)
def test_a_configuration_that_cannot_be_kept(settings, value):
    """Refused before training."""
    run = experiment("SASRecCCE", settings)
    run.config["launched"] = value
    for make in (lambda: type(run.trainer)(run.config, run.model), lambda: Trainer(run.config, run.model)):
        with pytest.raises(
            ValueError, match=r"launched: .* is a \w+, which a checkpoint cannot hold; it takes None, b"
        ):
            make()


# Data that RecBole pickles


@pytest.mark.parametrize("model", ["SASRecCCE", "SASRec"])
@pytest.mark.parametrize("file", ["LeanSequentialDataset", "SequentialDataset", "for-{}-dataloader"])
def test_data_of_the_right_name_is_left_alone(settings, model, file, caplog):
    """And made anew."""
    os.mkdir("saved")
    Path("saved", f"tiny-{file.format(model)}.pth").write_bytes(pickle.dumps(DANGEROUS["mkdir"]))
    run = experiment(model, settings)
    assert run.train.dataset.user_num == 41 and not Path("attacked").exists()
    would_be_used = (model, file) == ("SASRec", "SequentialDataset")
    assert ("--trust-checkpoint reads the file" in caplog.text) == would_be_used


@pytest.mark.parametrize("key", ["dataset_save_path", "dataloaders_save_path"])
def test_data_is_unpickled_if_trusted(settings, monkeypatch, capsys, key):
    Path("data.pth").write_bytes(pickle.dumps(DANGEROUS["mkdir"]))
    flags = ["run_recbole_cce.py", "--model=SASRec", *FLAGS, f"--{key}=data.pth"]
    monkeypatch.setattr(sys, "argv", [*flags])
    with pytest.raises(SystemExit):
        cli.main()
    assert f"{key}: 'data.pth' holds pickled objects" in capsys.readouterr().err
    assert not Path("attacked").exists()
    monkeypatch.setattr(sys, "argv", [*flags, "--trust-checkpoint"])
    with pytest.raises(AttributeError if key.startswith("dataset") else TypeError):  # None is no data
        cli.main()
    assert Path("attacked").exists()


def test_a_checkpoint_does_not_make_a_run_trust_anything(settings):
    run = experiment("SASRecCCE", {**settings, "epochs": 1})
    fit(run)
    Path("data.pth").write_bytes(pickle.dumps(DANGEROUS["mkdir"]))
    state = torch.load(run.trainer.saved_model_file)
    trusting = {"trust_checkpoint": True, "dataset_save_path": "data.pth", "dataloaders_save_path": "data.pth"}
    torch.save({**state, "config": state["config"] | trusting}, "trusting.pth")
    load_data_and_model("trusting.pth")
    assert not Path("attacked").exists()


def test_item_vectors_run_nothing():
    ldiffrec = importlib.import_module("recbole.model.general_recommender.ldiffrec")
    np.save("vectors.npy", np.array([DANGEROUS["mkdir"]]), allow_pickle=True)
    with pytest.raises(ValueError, match="allow_pickle"):
        ldiffrec.np.load("vectors.npy", allow_pickle=True)
    assert not Path("attacked").exists()
