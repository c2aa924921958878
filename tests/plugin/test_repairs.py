"""Each repair of RecBole: what breaks without it, and that RecBole's own models train as they do without us."""

from __future__ import annotations

import ast
import collections
import io
import itertools
import json
import os
import re
import sys
import types
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import recbole
import scipy.sparse
import torch
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.evaluator import Evaluator
from recbole.evaluator.collector import DataStruct
from recbole.quick_start import load_data_and_model
from recbole.trainer import HyperTuning
from recbole.trainer import trainer as recbole_trainer
from recbole.utils import get_model, get_trainer, logger, url
from recbole.utils.case_study import full_sort_topk

from recbole_cce import arrival
from recbole_cce.plugin import repairs
from recbole_cce.training import checkpoint
from tests.conftest import write_inter
from tests.process import output, python, python_path


def experiment(model, settings):
    """A trained RecBole model, its loaders and its trainer."""
    config = Config(model, "tiny", config_dict=settings)
    dataset = create_dataset(config)
    train, valid, test = data_preparation(config, dataset)
    network = get_model(model)(config, train.dataset)
    trainer = get_trainer(config["MODEL_TYPE"], model)(config, network)
    trainer.fit(train, valid, verbose=False)
    return types.SimpleNamespace(config=config, dataset=dataset, train=train, test=test, model=network, trainer=trainer)


# Installing and importing


def test_without_recbole_one_error_gives_the_command():
    process = python("-c", "import sys; sys.modules['recbole'] = None; import recbole_cce.cli")
    last = process.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: recbole-cce needs RecBole 1.2.1.")
    assert "pip install --no-deps recbole==1.2.1" in last
    assert process.stderr.count("Traceback") == 1


def test_another_recbole_is_refused(monkeypatch):
    monkeypatch.setattr(recbole, "__version__", "1.1.1")
    with pytest.raises(ImportError, match=r"needs RecBole 1\.2\.1, found 1\.1\.1.*pip install --no-deps recbole==1\.2"):
        arrival.require()


ORDERS = {
    "ours first": ("import recbole_cce", "import recbole.quick_start"),
    "the package of RecBole first": ("import recbole", "import recbole_cce", "import recbole.quick_start"),
    "a room of ours first": ("import recbole_cce.plugin.entry_points", "import recbole.quick_start"),
    "ops first": ("import recbole_cce.ops", "import recbole.quick_start"),
    "registering first": ("from recbole_cce import register_model", "import recbole.quick_start"),
}


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_repairs_come_before_the_modules_of_recbole(order):
    """Whichever of the two is imported first."""
    watch = """
import sys

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "recbole.trainer.trainer":
            print("quick_start" in sys.modules, "numpy_aliases" in sys.modules["recbole_cce.plugin.repairs"].ACTIVE)

sys.meta_path.insert(0, Watch())
"""
    tell = """
from recbole_cce.plugin import registration, repairs
from recbole.quick_start import load_data_and_model
print(sorted(repairs.ACTIVE), list(registration.MODELS), load_data_and_model.__module__)
"""
    lines = output(watch + "\n".join(order) + tell).splitlines()
    aliases = "numpy_aliases" in repairs.ACTIVE
    models = ["SASRecCCE", "SASRecSCE", "Cooccurrence"]
    assert lines == [f"False {aliases}", f"{sorted(repairs.ACTIVE)} {models} recbole_cce.plugin.entry_points"]


def test_modules_of_recbole_that_ran_before_are_repaired():
    code = "from recbole.config import Config; import recbole_cce; print(Config('SASRecCCE', 'ml-100k')['loss_type'])"
    assert python("-c", code).stdout == "auto\n"


def test_too_late_is_refused():
    process = python("-c", "from recbole.data import create_dataset as make; import recbole_cce")
    assert process.stderr.splitlines()[-1] == (
        "ImportError: __main__.make is recbole.data.create_dataset as it was before its repair: import recbole_cce "
        "before RecBole in __main__"
    )


IMPORT = """
import os
import sys
import warnings

import torch

warnings.filterwarnings("error", module="recbole_cce")

before = dict(os.environ)


def trap(*arguments, **options):
    raise AssertionError("a CUDA call at import")


for name in ("init", "_lazy_init", "is_available", "device_count", "current_device", "get_device_properties"):
    setattr(torch.cuda, name, trap)
torch.autograd.set_detect_anomaly({anomaly})
import recbole_cce
import recbole

assert torch.is_anomaly_enabled() == {anomaly}
# what torch itself adds as it is imported is its own
assert all(one.__module__.startswith("torch.") for one in torch.serialization.get_safe_globals())
assert not torch.cuda.is_initialized()
assert dict(os.environ) == before
import recbole.quick_start.quick_start as quick_start

print(sorted(name for name in sys.modules if name.split(".")[0] == "ray"), quick_start.tune.report(ndcg=1))
"""


@pytest.mark.parametrize("anomaly", [False, True])
def test_import_makes_no_cuda_call_and_leaves_torch_as_it_was(anomaly):
    printed = output(IMPORT.format(anomaly=anomaly))
    if "ray" in repairs.ACTIVE.get("ray_stand_in", ""):
        assert printed.split() == ["[]", "None"]


def fake_ray(folder, tune):
    (folder / "ray").mkdir()
    (folder / "ray" / "__init__.py").write_text("")
    (folder / "ray" / "tune.py").write_text(tune)
    return {"PYTHONPATH": python_path(folder)}


def test_ray_that_cannot_be_imported(tmp_path):
    code = "import recbole_cce, sys; from recbole.quick_start import run; print('ray.tune' in sys.modules)"
    process = python("-c", code, **fake_ray(tmp_path, "import numpy; numpy.no_such_name"))
    assert process.stdout.split() == ["False"], process.stderr


def test_ray_that_works_is_left_alone(tmp_path):
    code = "import recbole_cce, recbole.quick_start.quick_start as q; print(q.tune.report())"
    process = python("-c", code, **fake_ray(tmp_path, "def report(**metrics): return 'the real one'"))
    assert process.stdout.strip() == "the real one", process.stderr


def imports(file):
    """Packages that a file imports when it is imported itself, outside of functions and try blocks."""
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            yield from (name.name.partition(".")[0] for name in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.partition(".")[0]


def test_dependencies_are_what_recbole_imports():
    text = (Path(__file__).parent.parent.parent / "pyproject.toml").read_text(encoding="utf-8")
    listed = set(re.findall(r'"([\w-]+)', text.partition("dependencies = [")[2].partition("\n]\n")[0]))
    imported = {name for file in Path(recbole.__file__).parent.rglob("*.py") for name in imports(file)}
    imported -= {*sys.stdlib_module_names, "recbole", "ray"}
    imported -= {"lightgbm", "xgboost"}  # models that RecBole itself leaves to the user
    imported |= {"psutil", "thop"}  # imported inside functions that every run calls
    listed_as = {"yaml": "pyyaml", "sklearn": "scikit-learn"}
    # torch.utils.tensorboard wants tensorboard, thop wants distutils
    assert listed == {listed_as.get(name, name) for name in imported} | {"tensorboard", "setuptools", "triton"}


# NumPy, SciPy, hyperopt


def test_numpy_names_of_recbole():
    Config.compatibility_settings(None)
    names = {"bool": np.bool_, "int": np.int_, "float": np.float64, "complex": np.complex128, "object": np.object_}
    for name, value in {**names, "str": np.str_, "long": np.int_, "unicode": np.str_}.items():
        assert getattr(np, name) is value


def test_metrics_are_plain_floats(tiny_config):
    config = Config("BPR", "tiny", config_dict={**tiny_config, "metrics": ["Hit", "NDCG"], "topk": [2]})
    collected = DataStruct()
    collected.set("rec.topk", torch.tensor([[0, 1, 1], [0, 0, 1], [1, 0, 1]]))  # hits at two ranks, positives
    result = Evaluator(config).evaluate(collected)
    assert result == {"hit@2": 0.6667, "ndcg@2": pytest.approx((1 / np.log2(3) + 1) / 3, abs=5e-5)}
    assert {type(value) for value in result.values()} == {float}


def test_graph_models_build_their_matrix(tiny_config):
    run = experiment("LightGCN", {**tiny_config, "epochs": 1})
    users, items = run.train.dataset.inter_feat["user_id"], run.train.dataset.inter_feat["item_id"]
    size = run.dataset.user_num + run.dataset.item_num
    adjacency = np.zeros((size, size))
    adjacency[users, run.dataset.user_num + items] = adjacency[run.dataset.user_num + items, users] = 1
    degree = (adjacency > 0).sum(1) + 1e-7
    expected = adjacency / np.sqrt(degree)[:, None] / np.sqrt(degree)
    torch.testing.assert_close(run.model.norm_adj_matrix.to_dense().double(), torch.tensor(expected), rtol=1e-5, atol=0)


def test_exhaustive_search_tries_each_combination_once():
    pytest.importorskip("hyperopt", reason="needs the extra: pip install recbole-cce[hyper]")
    space, tried = {"a": [1, 2, 3], "b": ["x", "y"]}, []

    def objective(settings, files):
        tried.append((settings["a"], settings["b"]))
        score = settings["a"] * (settings["b"] == "x")
        return {"model": "", "best_valid_score": score, "valid_score_bigger": True} | dict.fromkeys(
            ("best_valid_result", "test_result")
        )

    search = HyperTuning(objective, params_dict={"choice": space}, early_stop=100)
    search.run()
    assert sorted(tried) == sorted(itertools.product(*space.values()))
    assert search.best_score == 3


# Configuration


def test_sequential_models_run_with_their_default_loss(tiny_config):
    def sampling(model, **settings):
        return Config(model, "tiny", config_dict={**tiny_config, **settings})["train_neg_sample_args"]["distribution"]

    assert sampling("SASRec") == sampling("GRU4Rec") == "none"
    assert sampling("SASRec", loss_type="BPR") == sampling("BPR") == "uniform"
    with pytest.raises(ValueError, match="should be None when the loss_type is CE"):
        sampling("SASRec", train_neg_sample_args={"distribution": "uniform"})


# Checkpoints


@pytest.mark.parametrize("model", ["BPR", "EASE", "ItemKNN", "SASRec", "SASRecF"])
def test_checkpoints_of_builtin_models_are_read_safely(tiny, tiny_config, model):
    items = "\n".join(f"i{item}\tc{item % 4}" for item in range(30))
    (tiny / "tiny" / "tiny.item").write_text(f"item_id:token\tclass:token\n{items}\n")
    columns = {"load_col": {**tiny_config["load_col"], "item": ["item_id", "class"]}, "selected_features": ["class"]}
    run = experiment(model, {**tiny_config, **columns})
    result = run.trainer.evaluate(run.test, load_best_model=True)
    checkpoint = torch.load(run.trainer.saved_model_file, weights_only=True)
    assert set(types_in(checkpoint)) <= {type(None), bool, int, float, str, list, tuple, dict, torch.Tensor}
    assert checkpoint["best_valid_score"] == run.trainer.best_valid_score
    config, again, *_ = load_data_and_model(run.trainer.saved_model_file)
    assert config.final_config_dict == run.config.final_config_dict
    trainer = get_trainer(config["MODEL_TYPE"], model)(config, again)
    trainer.eval_collector.data_collect(run.train)
    assert trainer.evaluate(run.test, load_best_model=False) == result
    assert 0 < result["hit@10"] <= 1


def types_in(value):
    """Of a value and of all that is in it."""
    yield type(value)
    if isinstance(value, dict):
        value = [*value, *value.values()]
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from types_in(item)


def test_what_models_keep_besides_weights():
    """Each kind that a model of RecBole has."""
    table = scipy.sparse.random(5, 4, 0.5, "lil", np.float32, np.random.default_rng(0))
    array, ripples = (
        np.matrix([[1.5, 2.5]]),
        collections.defaultdict(list, {3: [(torch.tensor([1]), torch.tensor([2]))]}),
    )
    before = {"table": table, "array": array, "ripples": ripples, "layer": torch.nn.Linear(1, 1), "none": None, "n": 3}
    plain = checkpoint.plain({"config": {}, "other": before})["other"]
    assert set(types_in(plain)) <= {type(None), int, str, list, tuple, dict, torch.Tensor}
    assert plain.keys() == before.keys() - {"layer"}
    after = {name: checkpoint.as_before(value, before[name], torch.device("cpu")) for name, value in plain.items()}
    for name, value in after.items():
        assert type(value) is type(before[name])
    assert (after["table"] != table).nnz == 0 and after["table"].dtype == np.float32
    assert np.array_equal(after["array"], array)
    assert after["ripples"] == ripples and after["ripples"][7] == []
    assert (after["none"], after["n"]) == (None, 3)


def test_a_crash_while_saving_leaves_the_last_checkpoint(tiny_config, monkeypatch):
    run = experiment("BPR", tiny_config)

    def save_half(state, file):
        file.write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", save_half)
    with pytest.raises(OSError, match="No space left"):
        run.trainer._save_checkpoint(9)
    assert torch.load(run.trainer.saved_model_file)["epoch"] < 9
    assert len(os.listdir("saved")) == 1


def test_processes_that_make_a_folder_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(os.path, "exists", lambda path: False)  # it was not there when this process looked
    for module in (logger, recbole_trainer):
        module.ensure_dir(str(tmp_path))


# pandas


def test_missing_values_are_filled(tmp_path, tiny_config):
    rows = [
        (f"u{user}", f"i{(user + step) % 5}", step, "" if step == 1 else step, "" if step == 2 else "a b", "0.5")
        for user in range(6)
        for step in range(4)
    ]
    header = "user_id:token\titem_id:token\ttimestamp:float\trating:float\ttags:token_seq\tscores:float_seq"
    write_inter(tmp_path / "data", "tiny", header, rows)
    (tmp_path / "data" / "tiny" / "tiny.item").write_text(
        "item_id:token\tclass:token\ni0\tx\ni1\t\ni2\tx y\ni3\t\ni4\t\n"
    )
    dataset = create_dataset(Config("BPR", "tiny", config_dict={**tiny_config, "load_col": None}))
    interactions = dataset.inter_feat
    known = [0.0, 2.0, 3.0]
    assert sorted(set(interactions["rating"])) == pytest.approx([0.0, np.mean(known), 2.0, 3.0])
    tags = [list(dataset.id2token("tags", row)) for row in interactions["tags"]]
    assert tags == [[] if time == 2 else ["a", "b"] for time in interactions["timestamp"]]
    assert np.concatenate(interactions["scores"].to_list()).tolist() == [0.5] * len(rows)
    classes = dataset.id2token("class", dataset.item_feat["class"].astype(int))
    by_item = dict(zip(dataset.id2token("item_id", dataset.item_feat["item_id"]), classes, strict=True))
    assert by_item == {"[PAD]": "[PAD]", "i0": "x", "i1": "[PAD]", "i2": "x y", "i3": "[PAD]", "i4": "[PAD]"}


def test_lengths_of_sequences(tmp_path, tiny_config):
    """RecBole cuts flat token ids back into rows with `series.agg(len)`."""
    rng = np.random.default_rng(0)
    tags = [" ".join(f"t{tag}" for tag in rng.integers(0, 9, rng.integers(1, 5))) for _ in range(40)]
    rows = [(f"u{row % 8}", f"i{row % 7}", row, tag) for row, tag in enumerate(tags)]
    write_inter(tmp_path / "data", "tiny", "user_id:token\titem_id:token\ttimestamp:float\ttags:token_seq", rows)
    dataset = create_dataset(Config("BPR", "tiny", config_dict={**tiny_config, "load_col": None}))
    interactions = dataset.inter_feat.sort_values("timestamp")
    assert [" ".join(dataset.id2token("tags", row)) for row in interactions["tags"]] == tags
    if "pandas_sequence_lengths" in repairs.ACTIVE:
        from recbole.data.dataset import kg_dataset

        assert kg_dataset.len(pd.Series([[1, 2], []])).tolist() == [2, 0]
        assert kg_dataset.len([1, 2, 3]) == 3


# Downloads


def test_nobody_is_asked_without_a_terminal(monkeypatch):
    large = types.SimpleNamespace(info=lambda: {"Content-Length": str(3 << 30)})
    monkeypatch.setattr(url.ur, "urlopen", lambda address: large)
    monkeypatch.setattr(sys, "stdin", io.StringIO("n\n"))
    assert url.decide_download("http://localhost/large.zip")
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    assert not url.decide_download("http://localhost/large.zip")


# Evaluation


@pytest.mark.parametrize("model", ["BPR", "SASRec"])
def test_coverage_metrics_of_builtin_models(tiny_config, model):
    metrics = ["ItemCoverage", "AveragePopularity", "ShannonEntropy", "GiniIndex", "TailPercentage", "Hit"]
    run = experiment(model, {**tiny_config, "metrics": metrics, "valid_metric": "Hit@5", "topk": [5]})
    result = run.trainer.evaluate(run.test, load_best_model=False)
    users = run.test.dataset.inter_feat["user_id"].unique().numpy()
    _, items = full_sort_topk(users, run.model, run.test, k=5)
    items, counts = items.numpy(), run.train.dataset.item_counter
    assert result["itemcoverage@5"] == pytest.approx(len(np.unique(items)) / run.dataset.item_num, abs=5e-5)
    popularity = np.vectorize(lambda item: counts.get(item, 0))(items)
    assert result["averagepopularity@5"] == pytest.approx(popularity.mean(), abs=5e-5)


# Built-in models train as they do in RecBole

TRAIN = """
import json
import sys

{prepare}
import torch
from recbole.config import Config
from recbole.quick_start import run_recbole

for model in ["BPR", "GRU4Rec", "SASRec"]:
    settings = json.load(open("settings.json"))
    if model != "BPR":
        settings["train_neg_sample_args"] = None
    config = Config(model, "tiny", config_dict=dict(settings))
    result = run_recbole(model, "tiny", config_dict=dict(settings), saved=False)
    print("RESULT", json.dumps([result, {{key: str(value) for key, value in config.final_config_dict.items()}}]))
"""
# the least that lets RecBole 1.2.1 start here, without this package
STOCK = """
import types

import numpy as np

np.float_, np.complex_, np.unicode_ = np.float64, np.complex128, np.str_
sys.modules["ray"] = types.SimpleNamespace(tune=None)
"""


def test_builtin_models_train_as_in_stock_recbole(tiny_config):
    with open("settings.json", "w") as file:
        json.dump({**tiny_config, "epochs": 3}, file)
    ours, stock = (
        [line for line in output(TRAIN.format(prepare=prepare)).splitlines() if line.startswith("RESULT")]
        for prepare in ("import recbole_cce", STOCK)
    )
    assert len(stock) == 3
    for mine, theirs in zip(ours, stock, strict=True):
        mine, theirs = (json.loads(line.removeprefix("RESULT")) for line in (mine, theirs))
        assert mine[1] == theirs[1]
        assert mine[0] == theirs[0]
        assert mine[0]["test_result"]["hit@10"] > 0


@pytest.mark.parametrize(("file", "shown"), [("/x/site-packages/recbole/model/a.py", False), ("/x/mine/a.py", True)])
def test_syntax_warnings_of_recbole_alone_are_off(file, shown):
    """Python 3.12 and later warn where they compile some of its files for the first time."""
    process = python("-c", f"import recbole_cce, recbole; compile('1 is 1', {file!r}, 'exec')")
    assert process.returncode == 0, process.stderr
    assert ("SyntaxWarning" in process.stderr) == shown
