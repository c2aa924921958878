"""RecBole's own entry points with our models, each in a fresh process that imports recbole_cce and nothing else of it.

Truth: RecBole's data set and SASRec with the weights of the checkpoint, and metrics written out in NumPy.
"""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.model.sequential_recommender import SASRec

from tests.conftest import write_inter
from tests.process import output

MODELS = ["SASRecCCE", "SASRecSCE"]
SETTINGS = {
    "data_path": "data",
    "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
    "gpu_id": "",
    "use_gpu": False,
    "state": "ERROR",
    "show_progress": False,
    "epochs": 2,
    "learning_rate": 0.001,
    "hidden_size": 16,
    "inner_size": 32,
    "MAX_ITEM_LIST_LENGTH": 8,
    "train_batch_size": 16,
    "repeat_bias": "none",  # as RecBole, whose SASRec has the weights too
    "positions": "start",
    "metrics": ["Hit", "NDCG", "MRR"],
    "topk": [5, 10],
}

RUN = """
import json
import sys

import recbole_cce
from recbole.quick_start import {function}

if __name__ == "__main__":
    for model in sys.argv[1:] or ["SASRecCCE", "SASRecSCE"]:
        result = {function}(
            model=model, dataset="tiny", config_file_list=["tiny.yaml"], config_dict={{"checkpoint_dir": {folder}}}
        )
        print("RESULT", json.dumps(result))
"""


def results(printed: str) -> list:
    return [json.loads(line.removeprefix("RESULT ")) for line in printed.splitlines() if line.startswith("RESULT ")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working folder with data/tiny (41 users, an odd number for two processes) and tiny.yaml."""
    folder = tmp_path_factory.mktemp("entry_points")
    rng = np.random.default_rng(0)
    rows = [
        (f"u{user}", f"i{item}", 100 * step + user)
        for user in range(41)
        for step, item in enumerate(rng.integers(0, 30, rng.integers(4, 13)))
    ]
    rng.shuffle(rows)
    write_inter(folder / "data", "tiny", "user_id:token\titem_id:token\ttimestamp:float", rows)
    (folder / "tiny.yaml").write_text("\n".join(f"{key}: {json.dumps(value)}" for key, value in SETTINGS.items()))
    return folder


@pytest.fixture(scope="module")
def trained(folder):
    """What run_recbole returns for each model; the checkpoints are in folders named after the models."""
    return dict(zip(MODELS, results(output(RUN.format(function="run_recbole", folder="model"), folder)), strict=True))


def checkpoint_of(folder, name):
    (file,) = (folder / name).glob("*.pth")
    return torch.load(file)


def stock(folder, checkpoint):
    """RecBole's SASRec with the weights of a checkpoint, RecBole's data set, and its batches of the test split."""
    settings = {**SETTINGS, "data_path": str(folder / "data"), "train_neg_sample_args": None}
    config = Config("SASRec", "tiny", config_dict=settings)
    dataset = create_dataset(config)
    train, _, test = data_preparation(config, dataset)
    model = SASRec(config, train.dataset)
    model.load_state_dict(checkpoint["state_dict"])
    return model.eval(), dataset, test


def numpy_metrics(folder, checkpoint, repeated=0) -> dict:
    """Hit, NDCG and MRR of the one held-out item of each user, from its rank among all items.

    `repeated`: that many users, from the first one, count twice, as RecBole has it over several processes.
    """
    model, _, test = stock(folder, checkpoint)
    ranks = []
    for interaction, _, _, positive in test:
        with torch.no_grad():
            scores = model.full_sort_predict(interaction)[:, 1:].double().numpy()
        own = scores[np.arange(len(scores)), positive.numpy() - 1]
        ranks += (1 + (scores > own[:, None]).sum(1)).tolist()
    assert len(ranks) == 41
    ranks = np.array(ranks + ranks[:repeated])
    found = {k: ranks <= k for k in SETTINGS["topk"]}
    return (
        {f"hit@{k}": found[k].mean() for k in found}
        | {f"ndcg@{k}": (found[k] / np.log2(ranks + 1)).mean() for k in found}
        | {f"mrr@{k}": (found[k] / ranks).mean() for k in found}
    )


@pytest.mark.parametrize("model", MODELS)
def test_run_recbole(folder, trained, model):
    expected = numpy_metrics(folder, checkpoint_of(folder, model))
    assert trained[model]["test_result"] == pytest.approx(expected, abs=5.1e-5)  # RecBole rounds to four places


def test_run_in_one_process(folder, trained):
    printed = output(RUN.format(function="run", folder="'one'"), folder)
    assert results(printed) == list(trained.values())


# RecBole's workers want nccl and a GPU each: this is the same code over gloo on the CPU, with a slow disk and clocks
# that differ. The main module does not import recbole_cce before it spawns: workers get it from what they are to run.
ON_THE_CPU = """
import json
import os
import socket
import sys
import time

import torch

init_process_group, ddp = torch.distributed.init_process_group, torch.nn.parallel.DistributedDataParallel
save = torch.save


def init_on_the_cpu(backend, rank, **options):
    import recbole.trainer.trainer

    recbole.trainer.trainer.get_local_time = lambda: f"by-process-{rank}"
    print("THREADS", torch.get_num_threads())
    init_process_group("gloo", rank=rank, **options)


def set_device(index):
    sys._getframe(1).f_locals["self"].final_config_dict["device"] = torch.device("cpu")


def save_slowly(*arguments, **options):
    time.sleep(0.5)
    save(*arguments, **options)


torch.distributed.init_process_group = init_on_the_cpu
torch.nn.parallel.DistributedDataParallel = lambda module, device_ids: ddp(module)
torch.cuda.set_device = set_device
torch.save = save_slowly
os.environ.pop("OMP_NUM_THREADS", None)
torch.set_num_threads(6)  # of a machine with so many cores

if __name__ == "__main__":
    import recbole_cce
    from recbole.quick_start import run

    for model in ["SASRecSCE", "SASRec"]:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        settings = {"gpu_id": "0,1", "checkpoint_dir": "two" + model}
        result = run(model, "tiny", ["tiny.yaml"], settings, nproc=2, port=str(port))
        print("RESULT", json.dumps(result))
"""


def test_run_in_two_processes(folder):
    printed = output(ON_THE_CPU, folder)
    assert re.findall(r"THREADS (\d+)", printed) == ["3"] * 4
    ours, stock = results(printed)
    expected = numpy_metrics(folder, checkpoint_of(folder, "twoSASRecSCE"))
    assert ours["test_result"] == pytest.approx(expected, abs=5.1e-5)
    expected = numpy_metrics(folder, checkpoint_of(folder, "twoSASRec"), repeated=1)
    assert stock["test_result"] == pytest.approx(expected, abs=1.1e-4)  # the mean of two rounded numbers, rounded


HYPER = """
import json

import recbole_cce
from recbole.quick_start import objective_function
from recbole.trainer import HyperTuning

for model in ["SASRecCCE", "SASRecSCE"]:
    search = HyperTuning(
        objective_function=objective_function,
        params_dict={"choice": {"learning_rate": [0.001, 0.01], "model": [model], "dataset": ["tiny"]}},
        fixed_config_file_list=["tiny.yaml"],
        algo=ALGO,
        max_evals=2,
    )
    search.run()
    search.export_result("found.txt")
    print("RESULT", json.dumps([search.best_params, search.best_score, search.params2result]))
"""


@pytest.mark.parametrize("algo", ["exhaustive", "bayes"])
def test_objective_function_under_hyper_tuning(folder, trained, algo):
    pytest.importorskip("hyperopt", reason="needs the extra: pip install recbole-cce[hyper]")
    printed = output(HYPER.replace("ALGO", repr(algo)), folder)
    for model, (best, score, tried) in zip(MODELS, results(printed), strict=True):
        scores = {name: result["best_valid_score"] for name, result in tried.items()}
        assert score == max(scores.values())
        assert scores[next(name for name in tried if f"learning_rate:{best['learning_rate']}," in name)] == score
        if algo == "exhaustive":
            assert len(tried) == 2
            default = next(result for name, result in tried.items() if "learning_rate:0.001," in name)
            assert default["test_result"] == trained[model]["test_result"]


LOAD = """
import glob
import json

import recbole_cce
from recbole.quick_start import load_data_and_model
from recbole.utils.case_study import full_sort_scores, full_sort_topk

for name in ["SASRecCCE", "SASRecSCE"]:
    config, model, dataset, train, valid, test = load_data_and_model(glob.glob(f"{name}/*.pth")[0])
    users = dataset.token2id("user_id", ["u3", "u0", "u40"])
    scores = full_sort_scores(users, model, test)
    values, items = full_sort_topk(users, model, test, k=5)
    result = [type(model).__name__, config["model"], scores[:, 1:].tolist(), values.tolist(), items.tolist()]
    print("RESULT", json.dumps(result))
"""


def test_load_data_and_model_and_case_study(folder, trained):
    for name, (cls, model, scores, values, items) in zip(MODELS, results(output(LOAD, folder)), strict=True):
        assert cls == model == name
        sasrec, dataset, test = stock(folder, checkpoint_of(folder, name))
        users = dataset.token2id("user_id", ["u3", "u0", "u40"])
        rows = {int(user): row for row, user in enumerate(test.dataset.inter_feat["user_id"])}
        with torch.no_grad():
            expected = sasrec.full_sort_predict(test.dataset[[rows[int(user)] for user in sorted(users)]])
        order = np.argsort(np.argsort(users))
        expected = expected[order, 1:]
        torch.testing.assert_close(torch.tensor(scores), expected, rtol=0, atol=1e-5)
        best, index = expected.topk(5)
        torch.testing.assert_close(torch.tensor(values), best, rtol=0, atol=1e-5)
        assert torch.equal(torch.tensor(items), index + 1)


PLAIN = """
import glob
import sys

import torch

checkpoint = torch.load(glob.glob("SASRecCCE/*.pth")[0], weights_only=True)
assert not {"recbole", "recbole_cce"} & sys.modules.keys()
print(checkpoint["config"]["model"])
"""


def test_a_checkpoint_is_read_by_torch_alone(folder, trained):
    assert output(PLAIN, folder).split() == ["SASRecCCE"]


def test_checkpoint_keeps_what_the_run_returned(folder, trained):
    for model in MODELS:
        checkpoint = checkpoint_of(folder, model)  # torch.load with weights_only, its default
        assert checkpoint["best_valid_score"] == trained[model]["best_valid_score"]
        assert checkpoint["config"]["hidden_size"] == SETTINGS["hidden_size"]
