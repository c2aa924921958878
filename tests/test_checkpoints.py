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
import os
import pickle
import re
import runpy
import signal
import subprocess
import sys
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

from recbole_cce import checkpoints, cli, saved_config
from recbole_cce.models import sasrec
from tests.build import experiment
from tests.process import SCRIPT, python, python_path
from tests.test_compat import STOCK

# on `tiny`, validation improves up to epoch 4 and the run stops early, after epoch 8
SETTINGS = {"epochs": 12, "learning_rate": 0.03, "stopping_step": 3, "state": "INFO"}
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
from pathlib import Path

import torch

from recbole_cce import cli
from recbole_cce.trainer import EfficientTrainer

what, number = sys.argv.pop(1), int(sys.argv.pop(1))
step, save, calls = EfficientTrainer._forward_backward, torch.save, {"step": 0, "save": 0}


def kill_at(event):
    calls[event] += 1
    if (event, calls[event]) == (what, number):
        os.kill(os.getpid(), signal.SIGKILL)


def killed_step(*arguments):
    loss = step(*arguments)
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
    last = checkpoints.last_file(best)
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
            file = checkpoints.newest("saved", "SASRecCCE", "tiny")
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
    again.trainer.resume_checkpoint(checkpoints.last_file(run.trainer.saved_model_file))
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
    more.trainer.resume_checkpoint(checkpoints.newest("saved", "SASRecCCE", "tiny"))
    assert fit(more) == result
    assert list(more.trainer.train_loss_dict) == [6, 7, 8]
    assert_same(states("saved"), states("whole"))


def test_the_last_epoch_without_the_best(settings):
    run = experiment("SASRecCCE", settings)
    fit(run)
    best = Path(run.trainer.saved_model_file)
    best.unlink()
    with pytest.raises(ValueError, match=rf"{best.name}\.last needs saved/{best.name} beside it"):
        experiment("SASRecCCE", settings).trainer.resume_checkpoint(checkpoints.last_file(best))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"n_layers": 1}, r"does not fit this model's settings: .*trm_encoder\.layer\.1"),
        ({"learner": "sgd"}, "is a checkpoint of learner adam, not of sgd"),
    ],
    ids=["layers", "learner"],
)
def test_other_settings(settings, other, message):
    run = experiment("SASRecCCE", {**settings, "epochs": 1})
    fit(run)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        experiment("SASRecCCE", {**settings, **other}).trainer.resume_checkpoint(run.trainer.saved_model_file)


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
    for use in (run.trainer.resume_checkpoint, load_data_and_model, checkpoints.read):
        with pytest.raises(ValueError, match=message):
            use(str(file))
    with pytest.raises(ValueError, match=message):
        checkpoints.newest("saved", "SASRecCCE", "tiny")


def test_a_file_that_is_no_checkpoint():
    torch.save({"weight": torch.ones(3)}, "weights.pth")
    with pytest.raises(ValueError, match=r"weights\.pth is not a checkpoint of RecBole: it holds no configuration"):
        checkpoints.read("weights.pth")


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
        checkpoints.write({"config": {}, "other": {"function": lambda: None}}, tmp_path / "x.pth")
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
    assert torch.load(file, weights_only=True)["config"] == saved_config.kept(run.config)


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
            checkpoints.read("attack.pth")
    assert not Path("attacked").exists()
    for name in ("a configuration", "eval", "exec", "mkdir", "system"):
        attack(DANGEROUS[name])
        with contextlib.suppress(TypeError):  # of what is no checkpoint
            checkpoints.read("attack.pth", trust=True)
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
    config = saved_config.kept(experiment("SASRecCCE", settings).config)
    with pytest.raises(ValueError, match=message):
        saved_config.rebuilt(config | values)
    assert not Path("attacked").exists()


def test_a_configuration_is_what_it_was(settings):
    values = {"adam_betas": (0.9, 0.98), "numbers": {"a": [1, 2.5, None, True], 3: "[1, 2]"}, "scalar": np.float64(0.5)}
    config = experiment("SASRecCCE", {**settings, **values}).config
    assert saved_config.rebuilt(saved_config.kept(config)).final_config_dict == config.final_config_dict


@pytest.mark.parametrize("value", [datetime.date(2024, 5, 1), {"a": [{1}]}, b"x", np.ones(2), print])
def test_a_configuration_that_cannot_be_kept(settings, value):
    """Refused before training."""
    with pytest.raises(ValueError, match=r"launched: .* is a \w+, which a checkpoint cannot hold; it takes None, bool"):
        experiment("SASRecCCE", {**settings, "launched": value})


# Data that RecBole pickles


@pytest.mark.parametrize(
    "file", ["tiny-LeanSequentialDataset.pth", "tiny-for-SASRecCCE-dataloader.pth", "tiny-SequentialDataset.pth"]
)
def test_data_of_the_right_name_is_left_alone(settings, file, caplog):
    """And made anew."""
    model = "SASRec" if "-Seq" in file else "SASRecCCE"
    os.mkdir("saved")
    Path("saved", file).write_bytes(pickle.dumps(DANGEROUS["mkdir"]))
    run = experiment(model, settings)
    assert run.train.dataset.user_num == 41 and not Path("attacked").exists()
    assert ("--trust-checkpoint reads the file" in caplog.text) == ("loader" not in file)


@pytest.mark.parametrize("key", ["dataset_save_path", "dataloaders_save_path"])
def test_data_is_unpickled_if_trusted(settings, monkeypatch, capsys, key):
    Path("data.pth").write_bytes(pickle.dumps(DANGEROUS["mkdir"]))
    flags = ["run_recbole_cce.py", *FLAGS, f"--{key}=data.pth"]
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


def test_settings_of_models_run_nothing(tmp_path):
    kd_dagfm = importlib.import_module("recbole.model.context_aware_recommender.kd_dagfm")
    assert kd_dagfm.eval("CrossNet") is kd_dagfm.CrossNet
    for name in (RUN, "exit"):
        with pytest.raises(ValueError, match=r"teacher: .* is not valid; it takes one of .*CrossNet"):
            kd_dagfm.eval(name)
    ldiffrec = importlib.import_module("recbole.model.general_recommender.ldiffrec")
    np.save("vectors.npy", np.array([DANGEROUS["mkdir"]]), allow_pickle=True)
    with pytest.raises(ValueError, match="allow_pickle"):
        ldiffrec.np.load("vectors.npy", allow_pickle=True)
    assert not Path("attacked").exists()
