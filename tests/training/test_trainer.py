"""Training, step by step and by its logs; resuming bit for bit; checkpoints that do not fit; extreme settings."""

from __future__ import annotations

import copy
import math
import multiprocessing
import os
import random
import re
import signal
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from recbole.utils import init_seed
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from recbole_cce import ops
from recbole_cce.data import dataset
from recbole_cce.training.trainer import autocast_dtype
from tests.build import experiment
from tests.conftest import write_inter

STEP = {  # one step of plain gradient descent over all sequences, without noise
    "learner": "sgd",
    "learning_rate": 0.1,
    "train_batch_size": 64,
    "loss_type": "CCE",
    "hidden_dropout_prob": 0.0,
    "attn_dropout_prob": 0.0,
}


def fit(run, **kwargs):
    return run.trainer.fit(run.train, run.valid, **kwargs)


def state(run):
    """Everything that a run leaves behind, as one flat dict of tensors."""
    found = {f"model.{name}": value for name, value in run.model.state_dict().items()}
    for index, moments in run.trainer.optimizer.state_dict()["state"].items():
        found |= {f"optimizer.{index}.{name}": value for name, value in moments.items()}
    _, keys, position, *_ = np.random.get_state()
    found |= {
        "torch": torch.get_rng_state(),
        "numpy": torch.tensor([*keys.tolist(), position]),
        "python": torch.tensor(random.getstate()[1]),
        "order": run.train.generator.get_state(),
        "scaler": torch.tensor([*run.trainer.scaler.state_dict().values()]),
    }
    return found


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_exact_loss_follows_recboles_curve(tiny_config, tiny, device, monkeypatch):
    """RecBole's SASRec and ours with CCE, of the last item alone and with the padding row as a candidate."""
    file = tiny / "tiny" / "tiny.inter"
    header, *rows = file.read_text().splitlines()
    rows = sorted((row.split("\t") for row in rows), key=lambda row: int(row[2]))
    # times that RecBole's float32 holds, or it would have another order of rows
    write_inter(tiny, "tiny", header, [(user, item, rank) for rank, (user, item, _) in enumerate(rows)])
    settings = {
        **tiny_config,
        "epochs": 6,
        "learning_rate": 0.01,
        "use_gpu": device == "cuda",
        "gpu_id": "0" if device == "cuda" else "",
    }
    stock = experiment("SASRec", settings)
    stock_valid = fit(stock)
    monkeypatch.setattr(ops, "linear_cross_entropy", partial(ops.linear_cross_entropy, padding_idx=None))
    ours = experiment(
        "SASRecCCE",
        {
            **settings,
            "repeat_bias": "none",
            "loss_type": "CCE",
            "loss_backend": "triton" if device == "cuda" else "torch",
            "train_targets": "last",
            "attention": "recbole",
            "attn_dropout_prob": 0.5,  # RecBole's, as all others are
            "amp_dtype": "float32",
            "cuda_graph": False,
        },
    )
    assert fit(ours) == stock_valid
    curve = list(ours.trainer.train_loss_dict.values())
    assert curve == pytest.approx(list(stock.trainer.train_loss_dict.values()), rel=1e-6)


def assert_same(one, two):
    assert one.keys() == two.keys()
    for name in one:
        assert torch.equal(one[name], two[name]), name


# Resuming


@pytest.mark.parametrize(
    "settings",
    [
        {"eval_step": 0},
        {"eval_step": 1},
        {"eval_step": 2},
        {"loss_type": "SCE", "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "mode": "uni5"}},
        {"attention": "packed", "amp_dtype": "bfloat16"},
        {"amp_dtype": "float16"},
        {"compile_encoder": True},
    ],
    ids=["no validation", "every epoch", "every other epoch", "sampled validation", "bfloat16", "float16", "compiled"],
)
def test_four_epochs_are_two_and_two(tiny_config, settings):
    settings = {**tiny_config, "epochs": 4, "learning_rate": 0.01, **settings}
    whole = experiment("SASRecCCE", settings)
    result = fit(whole)
    expected = state(whole)

    first = experiment("SASRecCCE", settings)
    first.trainer.epochs = 2
    fit(first)
    second = experiment("SASRecCCE", settings)
    init_seed(1, True)  # its own random numbers must not matter
    second.train.generator.manual_seed(1)
    second.trainer.resume_checkpoint(first.trainer.saved_model_file)
    assert 1 <= second.trainer.start_epoch <= 2
    assert fit(second) == result
    assert_same(state(second), expected)
    for epoch, loss in second.trainer.train_loss_dict.items():
        assert loss == whole.trainer.train_loss_dict[epoch]
    assert second.trainer.cur_step == whole.trainer.cur_step


def test_resuming_a_finished_run_leaves_its_checkpoint(tiny_config):
    """RecBole would write it anew as epoch -1: resumed once more, the run would train everything again."""
    settings = {**tiny_config, "epochs": 2, "learning_rate": 0.01}
    first = experiment("SASRecCCE", settings)
    result = fit(first)
    before = torch.load(first.trainer.saved_model_file)
    again = experiment("SASRecCCE", {**settings, "epochs": before["epoch"] + 1})
    again.trainer.resume_checkpoint(first.trainer.saved_model_file)
    assert fit(again) == result
    after = torch.load(first.trainer.saved_model_file)
    for name in ("epoch", "cur_step", "best_valid_score", "best_valid_result"):
        assert after[name] == before[name]
    assert torch.equal(after["random_states"][0]["torch"], before["random_states"][0]["torch"])


def test_a_resumed_run_keeps_the_best_result_so_far(tiny_config):
    first = experiment("SASRecCCE", tiny_config)
    fit(first)
    second = experiment("SASRecCCE", {**tiny_config, "epochs": 4})
    second.trainer.resume_checkpoint(first.trainer.saved_model_file)
    second.trainer.best_valid_score = math.inf  # nothing will be better
    _, result = fit(second)
    assert result is not None
    assert result == first.trainer.best_valid_result


# Saving


def half_a_save(then):
    """torch.save that writes half of a checkpoint and goes no further."""
    save = torch.save

    def torch_save(value, file, *args, **kwargs):
        save(value, "whole.pth")
        file.write(Path("whole.pth").read_bytes()[: os.path.getsize("whole.pth") // 2])
        file.flush()
        then()

    return torch_save


def test_a_failing_save_leaves_the_last_checkpoint(tiny_config, monkeypatch):
    run = experiment("SASRecCCE", tiny_config)
    fit(run)
    file = Path(run.trainer.saved_model_file)
    before = file.read_bytes()

    def full():
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", half_a_save(full))
    with pytest.raises(OSError, match="No space left"):
        run.trainer._save_checkpoint(5)
    assert file.read_bytes() == before
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def killed_save(settings, file):
    """In a process of its own."""
    run = experiment("SASRecCCE", settings)
    run.trainer.saved_model_file = file
    torch.save = half_a_save(lambda: os.kill(os.getpid(), signal.SIGKILL))
    run.trainer._save_checkpoint(5)


def test_a_killed_save_leaves_the_last_checkpoint(tiny_config):
    run = experiment("SASRecCCE", tiny_config)
    fit(run)
    file = Path(run.trainer.saved_model_file).resolve()
    before = file.read_bytes()
    process = multiprocessing.get_context("spawn").Process(target=killed_save, args=(tiny_config, str(file)))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert len(list(file.parent.iterdir())) == 2  # it was killed in the middle of it
    assert file.read_bytes() == before
    run.trainer.resume_checkpoint(file)


# Checkpoints that do not fit


@pytest.fixture
def others(tmp_path):
    """Folders with another `tiny`: `smaller`, with 20 items, and `renamed`, with 30."""
    rng = np.random.default_rng(4)
    for name, items, prefix in (("smaller", 20, "i"), ("renamed", 30, "other")):
        rows = [(f"u{u}", f"{prefix}{(7 * u + s) % items}", s) for u in range(40) for s in range(8)]
        rng.shuffle(rows)
        write_inter(tmp_path / name, "tiny", "user_id:token\titem_id:token\ttimestamp:float", rows)


@pytest.mark.parametrize(
    ("model", "folder", "message"),
    [
        ("SASRecSCE", "data", "is a checkpoint of model SASRecSCE, not of SASRecCCE"),
        ("SASRec", "data", "is a checkpoint of model SASRec, not of SASRecCCE"),
        ("SASRecCCE", "smaller", r"item table is 20 items x 16, this model's is 30 items x 16"),
        ("SASRecCCE", "renamed", "trained on another catalogue"),
    ],
)
def test_checkpoints_of_something_else(tiny_config, others, tmp_path, model, folder, message):
    other = experiment(model, {**tiny_config, "epochs": 1, "data_path": str(tmp_path / folder)})
    fit(other)
    run = experiment("SASRecCCE", tiny_config)
    file = other.trainer.saved_model_file
    with pytest.raises(ValueError, match=message):
        run.trainer.resume_checkpoint(file)
    if model == "SASRecCCE":
        with pytest.raises(ValueError, match=message):
            run.trainer.evaluate(run.test, model_file=file)


def test_nan_is_reported_and_the_last_checkpoint_survives(tiny_config):
    run = experiment("SASRecCCE", {**tiny_config, "epochs": 4})
    calculate_loss, calls = run.model.calculate_loss, []

    def loss(interaction):
        calls.append(None)
        return calculate_loss(interaction) * (math.nan if len(calls) == len(run.train) + 2 else 1)

    run.model.calculate_loss = loss
    weights = []
    with pytest.raises(ValueError, match=f"training loss is nan in epoch 1, first at step 1 of {len(run.train)}"):
        fit(run, callback_fn=lambda *_: weights.append(copy.deepcopy(run.model.state_dict())))
    assert run.model.item_embedding.weight.isnan().any()
    saved = torch.load(run.trainer.saved_model_file)
    assert saved["epoch"] == 0
    assert_same(saved["state_dict"], weights[0])
    assert all(value >= 0 for value in run.trainer.evaluate(run.test).values())


# Batches made where they are trained


@pytest.mark.parametrize("settings", [{}, {"train_targets": "last"}, {"attention": "packed"}], ids=str)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_resident_data_give_the_same_batches_in_the_same_order(tiny_config, monkeypatch, device, settings):
    """Bit for bit; also in a run that goes on with the other kind."""
    settings = {**tiny_config, "learning_rate": 0.01, "eval_step": 0, "cuda_graph": False, **settings}
    settings |= {"use_gpu": True, "gpu_id": "0"} if device == "cuda" else {}

    def trained(resident, epochs, resume=None):
        run = experiment("SASRecCCE", {**settings, "epochs": epochs})

        def make_resident(data):
            run.trainer.sizes = data.dataset.sizes()
            run.trainer.resident = data.dataset.on_device(run.trainer.device) if resident else None

        monkeypatch.setattr(run.trainer, "_make_resident", make_resident)
        batches, calculate_loss = [], run.model.calculate_loss

        def loss(interaction):
            batches.append({field: values.cpu() for field, values in interaction.interaction.items()})
            return calculate_loss(interaction)

        monkeypatch.setattr(run.model, "calculate_loss", loss)
        if resume:
            run.trainer.resume_checkpoint(resume)
        fit(run)
        return run, batches

    whole, expected = trained(False, 4)
    _, others = trained(True, 4)
    first, batches = trained(True, 2)
    second, rest = trained(False, 4, first.trainer.saved_model_file)
    assert second.trainer.start_epoch == 2 and whole.train.dataset.sizes()[0].sum() > 0
    for got in ([*batches[: len(expected) - len(rest)], *rest], others):
        assert len(got) == len(expected)
        for one, two in zip(got, expected, strict=True):
            assert_same(one, two)
    # the loader itself is as it was
    assert set(next(iter(first.train)).columns) == set(expected[0])


def test_where_the_encoder_is_compiled(tiny_config):
    for wanted, attention, expected in ((True, "auto", True), (False, "auto", False), ("auto", "auto", False)):
        run = experiment("SASRecCCE", {**tiny_config, "compile_encoder": wanted, "attention": attention})
        run.trainer._prepare(run.train, None)
        assert run.trainer.plan.compiled == expected
    run = experiment("SASRecCCE", {**tiny_config, "compile_encoder": True, "attention": "recbole"})
    with pytest.raises(ValueError, match="compile_encoder: True is not valid with attention: recbole; it takes auto"):
        fit(run)


@pytest.mark.cuda
def test_auto_compiles_what_is_trained_for_long(tiny_config):
    settings = {**tiny_config, "use_gpu": True, "gpu_id": "0"}
    for epochs, attention, expected in ((2, "auto", False), (10**9, "auto", True), (10**9, "recbole", False)):
        run = experiment("SASRecCCE", {**settings, "epochs": epochs, "attention": attention})
        run.trainer._prepare(run.train, None)
        assert run.trainer.plan.compiled == expected


@pytest.mark.cuda
@pytest.mark.parametrize("cuda_graph", [True, False])
@pytest.mark.parametrize("attention", ["sdpa", "packed"])
def test_compiled_training_is_the_same_to_rounding(tiny_config, attention, cuda_graph):
    """In 16 bits and in fp32; a last batch smaller than the others."""
    settings = {**tiny_config, **STEP, "train_batch_size": 16, "use_gpu": True, "gpu_id": "0", "epochs": 4}
    settings |= {"attention": attention, "cuda_graph": cuda_graph}
    for amp_dtype, rtol in (("float32", 1e-4), ("bfloat16", 1e-2)):
        curves = []
        for compiled in (False, True):
            run = experiment("SASRecCCE", {**settings, "amp_dtype": amp_dtype, "compile_encoder": compiled})
            fit(run)
            curves.append(list(run.trainer.train_loss_dict.values()))
        assert curves[1] == pytest.approx(curves[0], rel=rtol)


@pytest.mark.cuda
@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("settings", [{}, {"attention": "packed"}, {"train_targets": "last"}], ids=str)
def test_no_step_waits_for_the_gpu(tiny_config, monkeypatch, resident, settings):
    """Captured or not, with batches made on the GPU or on the CPU."""
    if not resident:
        monkeypatch.setattr(dataset, "RESIDENT_SHARE", 0)
    for cuda_graph in (False, True):
        gpu = {"use_gpu": True, "gpu_id": "0", "cuda_graph": cuda_graph, "clip_grad_norm": {"max_norm": 1.0}}
        run = experiment("SASRecCCE", {**tiny_config, **gpu, **settings})
        for epoch in range(2):  # compiles and captures
            run.trainer._train_epoch(run.train, epoch)
        assert (run.trainer.resident is not None) == resident
        torch.cuda.set_sync_debug_mode("error")
        try:
            for interaction in run.trainer._batches(run.train):
                counts = run.trainer._counts(run.train, interaction)
                run.trainer._step([interaction], [counts])
        finally:
            torch.cuda.set_sync_debug_mode("default")
        captured = run.trainer.graphed_step is not None and run.trainer.graphed_step.graph is not None
        assert captured == cuda_graph


# Steps


def gradient(run):
    """Gradients of the only batch, by hand, of a copy of the model."""
    model = copy.deepcopy(run.model)
    (batch,) = list(run.train)
    model.calculate_loss(batch).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("scale", [None, 1024.0])
@pytest.mark.parametrize("max_norm", [0.05, 1000.0])
def test_gradients_are_clipped_by_their_true_norm(tiny_config, scale, max_norm):
    """Not by that of the scaled ones."""
    run = experiment("SASRecCCE", {**tiny_config, **STEP, "clip_grad_norm": {"max_norm": max_norm}})
    assert len(run.train) == 1
    if scale:
        run.trainer.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    grads, before = gradient(run), copy.deepcopy(run.model.state_dict())
    norm = torch.stack([grad.norm() for grad in grads.values()]).norm().item()
    assert 0.1 < norm < 1000
    run.trainer._train_epoch(run.train, 0)
    for name, parameter in run.model.named_parameters():
        step = 0.1 * min(1.0, max_norm / norm) * grads[name]
        torch.testing.assert_close(before[name] - parameter.detach(), step, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("amp_dtype", ["float32", "bfloat16", "float16"])
def test_amp_dtype(tiny_config, amp_dtype):
    """Products in `amp_dtype`, parameters in float32, and nearly the same training."""
    run = experiment("SASRecCCE", {**tiny_config, **STEP, "amp_dtype": amp_dtype})
    assert run.trainer.scaler.is_enabled() == (amp_dtype == "float16")
    dtypes = set()
    run.model.trm_encoder.layer[0].feed_forward.dense_1.register_forward_hook(
        lambda module, inputs, output: dtypes.add(output.dtype)
    )
    grads, before = gradient(run), copy.deepcopy(run.model.state_dict())
    dtypes.clear()
    run.trainer._train_epoch(run.train, 0)
    assert dtypes == {getattr(torch, amp_dtype)}
    for name, parameter in run.model.named_parameters():
        assert parameter.dtype == torch.float32
        error = (before[name] - parameter.detach() - 0.1 * grads[name]).norm()
        assert error <= 0.05 * (0.1 * grads[name]).norm() + 1e-6, name


@pytest.mark.parametrize(
    ("amp_dtype", "enable_amp", "expected"),
    [
        ("auto", False, "float32"),
        ("auto", True, "bfloat16"),
        ("float32", True, "float32"),
        ("float16", None, "float16"),
    ],
)
def test_amp_dtype_on_a_cpu(amp_dtype, enable_amp, expected):
    assert autocast_dtype(amp_dtype, torch.device("cpu"), enable_amp) == getattr(torch, expected)


@pytest.mark.parametrize("learner", ["adam", "adamw"])
@pytest.mark.parametrize("betas", [[0.8, 0.98], None])
def test_adam_betas(tiny_config, learner, betas):
    """After one step, the moments are (1 - beta1) g and (1 - beta2) g^2."""
    settings = {} if betas is None else {"adam_betas": betas}
    run = experiment("SASRecCCE", {**tiny_config, **STEP, "learner": learner, **settings})
    grads = gradient(run)
    run.trainer._train_epoch(run.train, 0)
    beta1, beta2 = betas or (0.9, 0.999)
    for name, parameter in run.model.named_parameters():
        moments = run.trainer.optimizer.state[parameter]
        torch.testing.assert_close(moments["exp_avg"], (1 - beta1) * grads[name], rtol=1e-4, atol=1e-8)
        torch.testing.assert_close(moments["exp_avg_sq"], (1 - beta2) * grads[name] ** 2, rtol=1e-4, atol=1e-12)


def test_adam_betas_without_adam(tiny_config):
    with pytest.raises(ValueError, match=r"adam_betas: \[0.9, 0.98\] is not for learner: sgd; adam and adamw take it"):
        experiment("SASRecCCE", {**tiny_config, "learner": "sgd", "adam_betas": [0.9, 0.98]})


def test_logs(tiny_config, caplog):
    """Lines of RecBole's form, SCE's coverage, and the same numbers in TensorBoard."""
    run = experiment("SASRecSCE", {**tiny_config, "n_buckets": 2, "bucket_size_x": 10})
    loss_sum, losses, covered = run.model.loss_sum, [], []

    def loss(*arguments):
        value = loss_sum(*arguments)
        losses.append(value.mean.item())
        covered.append([number.item() for number in value.statistics["coverage"]])
        return value

    run.model.loss_sum = loss
    with caplog.at_level("INFO"):
        fit(run)
    text = re.sub(r"\x1b\[[0-9;]*m", "", caplog.text)
    steps = len(run.train)
    totals = [sum(losses[:steps]), sum(losses[steps:])]
    parts = [torch.tensor(part).sum(0).tolist() for part in (covered[:steps], covered[steps:])]
    coverages = [above / below for above, below in parts]
    for epoch, (total, coverage) in enumerate(zip(totals, coverages, strict=True)):
        assert 0 < coverage < 1
        line = rf"epoch {epoch} training \[time: (.*)s, train loss: {total:.4f}, targets/s: (\d+)\]"
        seconds, speed = map(float, re.search(line, text).groups())
        counted = sum((batch["target_count"]).sum().item() for batch in run.train)
        assert speed * (seconds - 0.006) <= counted <= speed * (seconds + 0.006) + seconds
        assert f"epoch {epoch} SCE [coverage: {coverage:.4f}]" in text
    assert "Saving current: " in text
    run.trainer.tensorboard.flush()
    events = EventAccumulator(run.trainer.tensorboard.log_dir).Reload()
    assert [event.value for event in events.Scalars("Loss/Train")] == pytest.approx(totals)
    assert [event.value for event in events.Scalars("Loss/coverage")] == pytest.approx(coverages)


@pytest.mark.cuda
def test_logs_on_a_gpu(tiny_config, caplog):
    with caplog.at_level("INFO"):
        fit(experiment("SASRecCCE", {**tiny_config, "use_gpu": True, "gpu_id": "0"}))
    text = re.sub(r"\x1b\[[0-9;]*m", "", caplog.text)
    assert len(re.findall(r"targets/s: \d+, peak GPU memory: \d+\.\d\d GiB\]", text)) == 2


# Extreme settings


@pytest.mark.parametrize("model", ["SASRecCCE", "SASRecSCE"])
@pytest.mark.parametrize(
    "settings",
    [
        {"MAX_ITEM_LIST_LENGTH": 1},
        {"MAX_ITEM_LIST_LENGTH": 1, "train_targets": "last"},
        {"num_negatives": 1000, "bucket_size_y": 1000},
        {"n_buckets": 1000, "bucket_size_x": 1000},
        {"train_batch_size": 1},
        {"num_negatives": 1, "n_buckets": 1, "bucket_size_x": 1, "bucket_size_y": 1},
    ],
    ids=str,
)
def test_extreme_settings_train_and_evaluate(tiny_config, model, settings):
    run = experiment(model, {**tiny_config, "epochs": 1, **settings})
    score, _ = fit(run)
    assert 0 <= score <= 1
    result = run.trainer.evaluate(run.test)
    assert all(0 <= value <= 1 for value in result.values()) and result["hit@10"] > 0
    assert 0 < run.trainer.train_loss_dict[0] < math.inf


def test_a_user_with_one_interaction(tiny_config):
    file = Path(tiny_config["data_path"], "tiny", "tiny.inter")
    file.write_text(file.read_text() + "lonely\ti1\t1600000000\n")
    run = experiment("SASRecCCE", tiny_config)
    fit(run)
    assert len(run.test._dataset) == 40
    assert all(0 <= value <= 1 for value in run.trainer.evaluate(run.test).values())


def test_no_epochs(tiny_config):
    """The untrained model is saved and tested."""
    run = experiment("SASRecCCE", {**tiny_config, "epochs": 0})
    before = copy.deepcopy(run.model.state_dict())
    assert fit(run) == (-math.inf, None)
    assert_same(torch.load(run.trainer.saved_model_file)["state_dict"], before)
    assert all(0 <= value <= 1 for value in run.trainer.evaluate(run.test).values())


def test_no_validation_saves_the_last_epoch(tiny_config):
    run = experiment("SASRecCCE", {**tiny_config, "eval_step": 0})
    assert fit(run) == (-math.inf, None)
    saved = torch.load(run.trainer.saved_model_file)
    assert saved["epoch"] == 1
    assert_same(saved["state_dict"], run.model.state_dict())
