"""Two processes over gloo on the CPU, along RecBole's own path; only its calls for NCCL and GPUs are replaced."""

from __future__ import annotations

import contextlib
import datetime
import itertools
import os
import random
import socket
import sys
import time

import numpy as np
import pytest
import recbole.trainer.trainer as recbole_trainer
import torch
from recbole.config import Config
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from recbole_cce.commands import recommend
from recbole_cce.nn.losses.registry import LOSSES
from recbole_cce.ops import negatives
from recbole_cce.plugin import entry_points
from recbole_cce.training import checkpoint
from recbole_cce.training.trainer import EfficientTrainer
from tests.build import experiment
from tests.conftest import write_inter

HEADER = "user_id:token\titem_id:token\ttimestamp:float"
SETTINGS = {
    "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
    "use_gpu": False,
    "state": "ERROR",
    "show_progress": False,
    "epochs": 2,
    "hidden_size": 16,
    "inner_size": 32,
    "MAX_ITEM_LIST_LENGTH": 8,
    "train_batch_size": 16,
    "num_negatives": 8,
    "metrics": ["NDCG", "Hit", "MRR", "ItemCoverage", "AveragePopularity", "GiniIndex", "ShannonEntropy"],
    "topk": [3, 5],
    "valid_metric": "NDCG@5",
    "eval_batch_size": 10,
}
# what training one whole batch over two processes must give, too: nothing random, equal shares of rows
EXACT = {
    "train_targets": "last",
    "loss_type": "CCE",
    "learner": "sgd",
    "learning_rate": 0.5,
    "shuffle": False,
    "hidden_dropout_prob": 0.0,
    "attn_dropout_prob": 0.0,
    "eval_step": 0,
}
# loss_type CE- shows its draws to the recorder
SAMPLED = {"loss_type": "CE-", "negative_distribution": "popularity"}
VALIDATED = {"learning_rate": 0.03, "eval_step": 1}  # the best epoch is an early one
GAUC = {"metrics": ["GAUC", "Hit"], "valid_metric": "GAUC"}


def replace_cuda():
    """RecBole's Config joins an NCCL group and takes a GPU for each process."""
    join, init_device = distributed.init_process_group, Config._init_device

    def init_process_group(backend, **kwargs):
        if not distributed.is_initialized():  # one group for all the Configs of a job
            join("gloo", timeout=datetime.timedelta(seconds=120), **kwargs)

    def cpu_device(self):
        init_device(self)
        self.final_config_dict["device"] = torch.device("cpu")

    distributed.init_process_group = init_process_group
    torch.cuda.set_device = lambda device: None
    Config._init_device = cpu_device
    recbole_trainer.DistributedDataParallel = lambda model, device_ids: DistributedDataParallel(model)


def pull_apart(rank):
    """Clocks that differ, and a disk that takes its time."""
    number, save = itertools.count(), torch.save
    recbole_trainer.get_local_time = lambda: f"{rank}-{next(number)}"

    def slow_save(*args, **kwargs):
        time.sleep(0.5)
        save(*args, **kwargs)

    torch.save = slow_save


def recorded(function, records):
    """`function`, with its results kept."""

    def call(*args, **kwargs):
        result = function(*args, **kwargs)
        records.append(result)
        return result

    return call


def weights(run):
    return {name: value.clone() for name, value in run.model.state_dict().items()}


def whole_run(rank, settings, found):
    """run_recbole in RecBole's spawn worker; its last epoch is saved, and loaded at once."""
    results, fit, evaluate = [], EfficientTrainer.fit, EfficientTrainer.evaluate

    def fit_and_keep(self, *args, **kwargs):
        result = fit(self, *args, **kwargs)
        found["weights"] = {name: value.clone() for name, value in self.model.state_dict().items()}
        found["file"] = str(self.saved_model_file)
        return result

    EfficientTrainer.fit, EfficientTrainer.evaluate = fit_and_keep, recorded(evaluate, results)
    settings = {**settings, **SAMPLED, "epochs": 1}
    entry_points.run_recboles(rank, "SASRecCCE", "odd", None, {"config_dict": settings})
    EfficientTrainer.fit, EfficientTrainer.evaluate = fit, evaluate
    found["results"] = results


def whole_batches(rank, settings, found):
    run = experiment("SASRecCCE", {**settings, **EXACT}, "even")
    run.trainer.fit(run.train, run.valid)
    found["weights"] = weights(run)


def resumed_run(rank, settings, found):
    """Four epochs, and two and two with batches made from row numbers; seeds are equal, as a script may leave them."""
    settings = {**settings, **SAMPLED, "eval_step": 0}
    for name, epochs in (("whole", 4), ("first", 2), ("second", 4)):
        run = experiment("SASRecCCE", {**settings, "epochs": epochs}, "odd")
        if name == "second":
            run.trainer.resume_checkpoint(found["file"])
        if name != "whole":  # as on a GPU
            run.trainer.sizes = run.train.dataset.sizes()
            run.trainer.resident = run.train.dataset.on_device(torch.device("cpu"))
            run.trainer._make_resident = lambda data: None
        drawn, draw = [], negatives.draw_negatives
        negatives.draw_negatives = recorded(draw, drawn)
        run.trainer.fit(run.train, run.valid)
        negatives.draw_negatives = draw
        found["file"] = run.trainer.saved_model_file
        found[name] = {"weights": weights(run), "drawn": drawn, "random": torch.get_rng_state()}


def killed_run(rank, settings, found):
    """Six epochs, and as many by a run that stops in the middle of one and another that is made by run_recbole."""
    settings = {**settings, **SAMPLED, **VALIDATED, "epochs": 6, "checkpoint_interval": 0}
    run = experiment("SASRecCCE", {**settings, "checkpoint_dir": "whole"}, "odd")
    found["whole result"] = run.trainer.fit(run.train, run.valid)
    found["whole"] = weights(run)

    run = experiment("SASRecCCE", {**settings, "checkpoint_dir": "killed"}, "odd")
    step, steps = run.trainer._forward_backward, itertools.count()

    def failing_step(*args):
        found.setdefault("name", run.trainer.saved_model_file)
        if next(steps) == 5 * len(run.train) + 1:
            raise InterruptedError
        return step(*args)

    run.trainer._forward_backward = failing_step
    with contextlib.suppress(InterruptedError):
        run.trainer.fit(run.train, run.valid)
    distributed.barrier()  # the first one has written what was under way
    found["file"] = str(checkpoint.newest("killed", "SASRecCCE", "odd"))
    distributed.barrier()  # before one of them writes again

    settings = {**settings, "checkpoint_dir": "killed", "resume": found["file"]}
    run = experiment("SASRecCCE", settings, "odd")
    trainer = entry_points.get_trainer(run.config["MODEL_TYPE"], "SASRecCCE")(run.config, run.model)
    found["resumed result"] = trainer.fit(run.train, run.valid)
    found["resumed"] = weights(run)
    found["epochs"] = list(trainer.train_loss_dict)


def seeded(rank, settings, found):
    """For each model and seed: what processes draw, and the order of rows in two epochs."""
    for model in ("SASRecCCE", "SASRec"):
        for seed in (2020, 2021):
            run = experiment(model, {**settings, "seed": seed}, "odd")
            drawn = {"torch": torch.rand(4), "numpy": torch.from_numpy(np.random.rand(4)), "python": random.random()}
            drawn["loader's workers"] = torch.rand(4, generator=run.train.generator)
            orders = []
            for epoch in (0, 1):
                run.train.sampler.set_epoch(epoch)
                orders.append(list(run.train.sampler))
            found[model, seed] = {"drawn": drawn, "orders": orders}


def mean_ranks(rank, settings, found):
    run = experiment("SASRecCCE", {**settings, **GAUC}, "odd")
    found["result"] = run.trainer.evaluate(run.test, load_best_model=False)


# rows of 7 and of 1 target; one draw of negatives for all positions, one bucket that holds everything
UNEVEN = EXACT | {
    "train_targets": "all",
    "epochs": 1,
    "negative_sharing": "batch",
    "n_buckets": 1,
    "bucket_size_x": 64,
    "bucket_size_y": 64,
}


def steps_of(settings, **more):
    """Weights after the steps of one epoch, in which each batch begins with the same random numbers."""
    run = experiment("SASRecCCE", {**settings, **UNEVEN, **more}, "uneven")
    forward_backward = run.trainer._forward_backward

    def seeded_step(*args):
        torch.manual_seed(0)
        return forward_backward(*args)

    run.trainer._forward_backward = seeded_step
    loss = run.trainer._train_epoch(run.train, 0)
    return weights(run) | {"loss": torch.tensor(loss)}


def uneven(rank, settings, found):
    for loss_type in LOSSES:
        found[loss_type] = steps_of(settings, loss_type=loss_type)


JOBS = [uneven, whole_run, whole_batches, resumed_run, killed_run, seeded, mean_ranks]


def process(rank, folder, data, ports):
    """Do every job and keep what it found."""
    os.chdir(folder)
    sys.argv = ["test"]
    replace_cuda()
    pull_apart(rank)
    for job, port in zip(JOBS, ports, strict=True):
        group = {"local_rank": rank, "world_size": 2, "nproc": 2, "offset": 0, "ip": "localhost", "port": port}
        found = {}
        job(rank, {**SETTINGS, **group, "data_path": data, "gpu_id": "0,1"}, found)
        if distributed.is_initialized():
            distributed.destroy_process_group()
        torch.save(found, f"{job.__name__}.{rank}")


def free_port():
    with socket.socket() as server:
        server.bind(("localhost", 0))
        return server.getsockname()[1]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """data_path of `odd`, with 41 users to test, and `even`, with 8 users of 4 training rows each."""
    rng = np.random.default_rng(5)
    folder = tmp_path_factory.mktemp("data")
    for name, lengths in (("odd", rng.integers(4, 13, 41)), ("even", [7] * 8), ("uneven", [10, 4])):
        rows = [(f"u{u}", f"i{rng.integers(30)}", step) for u, length in enumerate(lengths) for step in range(length)]
        write_inter(folder, name, HEADER, rows)
    return str(folder)


@pytest.fixture(scope="module")
def found(data, tmp_path_factory):
    """Job -> what each of the two processes found."""
    folder = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(process, (str(folder), data, [free_port() for _ in JOBS]), nprocs=2)
    return {
        job.__name__: [torch.load(folder / f"{job.__name__}.{rank}", weights_only=False) for rank in (0, 1)]
        for job in JOBS
    } | {"folder": folder}


def alone(data, dataset, **settings):
    return experiment("SASRecCCE", {**SETTINGS, "data_path": data, "gpu_id": "", **settings}, dataset)


@pytest.mark.parametrize("loss_type", LOSSES)
def test_a_step_is_that_of_one_process_with_all_rows(found, data, loss_type):
    """7 targets on one process, 1 on the other; and one after another on one process."""
    settings = {**SETTINGS, "data_path": data, "gpu_id": ""}
    expected = steps_of(settings, loss_type=loss_type)
    apart = steps_of(settings, loss_type=loss_type, train_batch_size=1)
    assert any((apart[name] - value).abs().max() > 1e-3 for name, value in expected.items())
    accumulated = steps_of(settings, loss_type=loss_type, train_batch_size=1, accumulate_steps=2)
    for other in (*(process[loss_type] for process in found["uneven"]), accumulated):
        for name, value in expected.items():
            torch.testing.assert_close(other[name], value, rtol=1e-4, atol=1e-5, msg=name)


def assert_same(one, two):
    for name in one:
        assert torch.equal(one[name], two[name]), name


def test_processes_end_with_the_same_weights(found):
    one, two = found["whole_run"]
    assert_same(one["weights"], two["weights"])


def test_metrics_are_those_of_one_process(found, data):
    """41 users: torch gives one of them to both processes."""
    one, two = found["whole_run"]
    assert one["results"] == two["results"]
    run = alone(data, "odd", **SAMPLED)
    run.trainer.eval_collector.data_collect(run.train)
    result = run.trainer.evaluate(run.test, model_file=str(found["folder"] / one["file"]))
    assert result == one["results"][-1]
    assert set(result) == {f"{metric.lower()}@{k}" for metric in SETTINGS["metrics"] for k in (3, 5)}
    assert result["hit@5"] > 0


def test_mean_ranks_are_those_of_one_process(found, data):
    run = alone(data, "odd", **GAUC)
    result = run.trainer.evaluate(run.test, load_best_model=False)
    assert result == found["mean_ranks"][0]["result"] == found["mean_ranks"][1]["result"]


def test_gradients_are_averaged(found, data):
    """The same batches in one process give the same weights."""
    run = alone(data, "even", **EXACT)
    before = weights(run)
    assert len(run.train) == 2 and len(run.train._dataset) == 32
    run.trainer.fit(run.train, run.valid)
    for name, value in run.model.state_dict().items():
        assert not torch.equal(value, before[name]) or name.endswith("key.bias"), name
        for process in found["whole_batches"]:
            torch.testing.assert_close(process["weights"][name], value, rtol=1e-4, atol=1e-6)


def test_processes_draw_different_negatives(found):
    for name in ("whole", "second"):
        one, two = (process[name]["drawn"] for process in found["resumed_run"])
        assert len(one) == len(two) >= 4
        for mine, other in zip(one, two, strict=True):
            assert not torch.equal(mine[0], other[0])


@pytest.mark.parametrize("model", ["SASRecCCE", "SASRec"])
def test_streams_of_seeds_and_processes_differ(found, model):
    """Of RecBole's own models, too; one order for both processes, and another one for each seed and epoch."""
    both = found["seeded"]
    runs = [process[model, seed] for seed in (2020, 2021) for process in both]
    for name in ("torch", "numpy", "python", "loader's workers"):
        assert len({str(run["drawn"][name]) for run in runs}) == 4, name
    torch.manual_seed(2020)
    assert torch.equal(both[0][model, 2020]["drawn"]["torch"], torch.rand(4))  # as one process has it
    orders = {str(dealt) for run in runs for dealt in run["orders"]}
    assert len(orders) == 8
    for seed in (2020, 2021):
        for one, two in zip(*(process[model, seed]["orders"] for process in both), strict=True):
            assert set(one + two) == set(range(max(one + two) + 1)) and len(set(one) & set(two)) <= 1


def test_two_and_two_epochs_are_four(found):
    for process in found["resumed_run"]:
        assert_same(process["whole"]["weights"], process["second"]["weights"])
        assert torch.equal(process["whole"]["random"], process["second"]["random"])
        drawn = [*process["first"]["drawn"], *process["second"]["drawn"]]
        for mine, other in zip(process["whole"]["drawn"], drawn, strict=True):
            assert torch.equal(mine, other)


def test_killed_and_resumed(found):
    """From the last epoch, which was not the best one."""
    assert len({process["name"] for process in found["killed_run"]}) == 1  # before anything was saved
    for process in found["killed_run"]:
        assert process["file"].endswith(".pth.last")
        assert process["epochs"] == [5]
        assert process["whole result"] == process["resumed result"]
        assert_same(process["whole"], process["resumed"])


def test_a_checkpoint_of_two_processes_resumed_by_one(found, data, caplog):
    run = alone(data, "odd", **SAMPLED, epochs=5)
    run.trainer.resume_checkpoint(str(found["folder"] / found["resumed_run"][0]["file"]))
    run.trainer.fit(run.train, run.valid)
    assert "the checkpoint has the random numbers of 2 processes, these are 1" in caplog.text
    assert list(run.trainer.train_loss_dict) == [4]


def test_a_checkpoint_of_two_processes_is_used_by_one(found, tmp_path):
    """Without a process group."""
    file = str(found["folder"] / found["whole_run"][0]["file"])
    config, model, *_ = entry_points.load_data_and_model(file)
    assert config["single_spec"] is True and config["world_size"] is None
    assert_same(torch.load(file)["state_dict"], model.state_dict())
    recommend.recommend(file, str(tmp_path / "top.csv"), k=2)
    assert len((tmp_path / "top.csv").read_text().splitlines()) == 1 + 2 * 41
    recommend.export(file, str(tmp_path / "items"))
    assert np.array_equal(np.load(tmp_path / "items.npy"), model.item_embedding.weight[1:].detach())
