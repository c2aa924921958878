"""The YAML files in properties/: names and columns of what RecBole downloads, keys that exist, recipes that run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import recbole
import torch
from recbole.config import Config
from recbole.data import create_dataset
from recbole.quick_start import run_recbole
from recbole.utils import argument_list, get_model, get_trainer

from recbole_cce.models.sasrec import EfficientSASRec
from recbole_cce.nn.losses.registry import declared
from recbole_cce.plugin import config_keys, entry_points, registration
from recbole_cce.plugin.config_checks import known_keys
from tests.conftest import write_inter

ROOT = Path(__file__).parent.parent.parent
RECBOLE = Path(recbole.__file__).parent / "properties" / "dataset"
URLS = registration.read_yaml(RECBOLE / "url.yaml")
DATASETS = sorted((ROOT / "properties" / "dataset").glob("*.yaml"))
RECIPES = sorted((ROOT / "properties" / "recipe").glob("*.yaml"))
MODELS = sorted((ROOT / "properties" / "model").glob("*.yaml"))

# Header lines of the .inter files that RecBole downloads, by the start of the data set's name.
HEADERS = {
    "amazon-": "user_id:token item_id:token rating:float timestamp:float",
    "ml-": "user_id:token item_id:token rating:float timestamp:float",
    "yelp": "user_id:token item_id:token rating:float timestamp:float useful:float funny:float cool:float "
    "review_id:token",
    "gowalla-": "user_id:token item_id:token timestamp:float latitude:float longitude:float num_repeat:float",
    "foursquare-": "user_id:token venue_id:token timezone_offset:float timestamp:float click_times:float",
    "steam-": "user_id:token play_hours:float products:token product_id:token page_order:float timestamp:float "
    "early_access:token page:float found_funny:token compensation:token times:float",
    "tmall-": "user_id:token seller_id:token item_id:token category_id:token timestamp:float interactions:float",
    "diginetica-": "session_id:token item_id:token timestamp:float",
    "yoochoose-buys-": "session_id:token timestamp:float item_id:token price:float quantity:float",
    "yoochoose-clicks-": "session_id:token timestamp:float item_id:token category:token",
    "retailrocket-": "timestamp:float visitor_id:token item_id:token",
}


def header_of(name: str) -> list[str]:
    return next(header for start, header in HEADERS.items() if name.startswith(start)).split()


def write_dataset(folder: Path, name: str, header: list[str], users: int = 12, length: int = 6) -> dict[str, list[str]]:
    """folder/name/name.inter: `users` users with `length` of 8 items each, and a user and an item seen 4 times only.

    Returns the items of each of the users in their order of time; lines are in another order.
    """
    roles = {"user_id": "user", "session_id": "user", "visitor_id": "user", "timestamp": "time"}
    roles |= {"item_id": "item", "venue_id": "item", "product_id": "item"}
    histories = {f"u{user}": [f"i{(user + step) % 8}" for step in range(length)] for user in range(users)}
    events = [(user, item, 10 + step) for user, items in histories.items() for step, item in enumerate(items)]
    events += [(f"u{user}", "rare", user) for user in range(4)]
    events += [("brief", f"i{step}", step) for step in range(4)]
    np.random.default_rng(0).shuffle(events)
    rows = []
    for user, item, time in events:
        cells = {"user": user, "item": item, "time": time}
        names = [column.partition(":")[0] for column in header]
        rows.append([cells[roles[column]] if column in roles else 1 for column in names])
    write_inter(folder, name, "\t".join(header), rows)
    return histories


def quiet(folder: Path, **more) -> dict:
    return {"data_path": str(folder), "state": "ERROR", "use_gpu": False, "gpu_id": "", "show_progress": False, **more}


@pytest.mark.parametrize("file", DATASETS, ids=lambda file: file.stem)
def test_data_set_can_be_downloaded_and_has_only_keys_of_recbole(file):
    assert file.stem in URLS
    known = set(registration.read_yaml(RECBOLE / "sample.yaml")) | set(argument_list.dataset_arguments)
    assert set(registration.read_yaml(file)) <= known


@pytest.mark.parametrize("file", DATASETS, ids=lambda file: file.stem)
def test_data_set_is_read_with_the_columns_of_recbole(tmp_path, file):
    """Every user's history in the order of time, without the user and the item that are seen less than five times."""
    histories = write_dataset(tmp_path / "data", file.stem, header_of(file.stem))
    train, _, test = create_dataset(Config("SASRecCCE", file.stem, config_dict=quiet(tmp_path / "data"))).build()
    rows = test[np.arange(len(test))]
    read = {}
    for user, items, last in zip(
        rows[test.uid_field], rows[test.iid_field + "_list"], rows[test.iid_field], strict=True
    ):
        tokens = test.id2token(test.iid_field, [*items[items > 0].tolist(), int(last)])
        read[test.id2token(test.uid_field, int(user))] = list(tokens)
    assert read == histories
    assert len(train) == len(histories)


@pytest.mark.parametrize("name", ["amazon-beauty", "ml-1m"])
def test_prepared_files_without_ratings_are_read_too(tmp_path, name):
    histories = write_dataset(tmp_path / "data", name, ["user_id:token", "item_id:token", "timestamp:float"])
    test = create_dataset(Config("SASRecCCE", name, config_dict=quiet(tmp_path / "data"))).build()[2]
    assert len(test) == len(histories)


def test_models_run_on_columns_of_other_names(tmp_path):
    write_dataset(tmp_path / "data", "steam-merged", header_of("steam-merged"))
    result = run_recbole("SASRecCCE", "steam-merged", config_dict=quiet(tmp_path / "data", num_negatives=4, **SHORT))
    assert 0 < result["test_result"]["ndcg@5"] <= 1


def test_models_of_recbole_get_the_same_data(tmp_path, monkeypatch):
    write_dataset(tmp_path / "data", "steam-merged", header_of("steam-merged"))
    files = []
    monkeypatch.setattr(
        entry_points.recbole_quick_start, "run", lambda *args, config_file_list, **_: files.extend(config_file_list)
    )
    entry_points.run("SASRec", "steam-merged")
    settings = quiet(tmp_path / "data", train_neg_sample_args=None)
    stock = create_dataset(Config("SASRec", "steam-merged", files, settings))
    ours = create_dataset(Config("SASRecCCE", "steam-merged", config_dict=quiet(tmp_path / "data")))
    assert (stock.user_num, stock.item_num, stock.inter_num) == (ours.user_num, ours.item_num, ours.inter_num)


@pytest.mark.parametrize("file", MODELS, ids=lambda file: file.stem)
def test_model_defaults_leave_data_and_evaluation_alone(file):
    """So that a comparison with a model of RecBole differs in nothing else. topk and the like are the user's too."""
    data = set(registration.read_yaml(RECBOLE / "sample.yaml")) | set(argument_list.dataset_arguments)
    assert not set(registration.read_yaml(file)) & (data | set(argument_list.evaluation_arguments))
    if file.stem != "Cooccurrence":  # which trains nothing
        given = set(registration.read_yaml(file))
        assert set(config_keys.keys_of_package()) <= given | set(declared()) | {"adam_betas"}
        assert not given & set(declared())  # one default in one place


# Recipes: what the authors' published configurations and code say, or docs/study.md

PUBLISHED = {
    "sce-beauty": {
        "MAX_ITEM_LIST_LENGTH": 200,
        "n_layers": 2,
        "n_heads": 1,
        "hidden_size": 64,
        "hidden_dropout_prob": 0.6,
        "attn_dropout_prob": 0.6,
        "loss_type": "SCE",
        "n_buckets": 202,
        "bucket_size_x": 202,
        "bucket_size_y": 256,
        "mix_x": False,
        "exclude_seen": True,
        "train_batch_size": 1024,
        "learning_rate": 0.001,
        "weight_decay": 0.0,
        "epochs": 300,
        "stopping_step": 50,
        "seed": 1235,
    },
    "cce-gowalla": {
        "MAX_ITEM_LIST_LENGTH": 320,
        "n_layers": 2,
        "n_heads": 2,
        "hidden_size": 256,
        "hidden_dropout_prob": 0.1,
        "attn_dropout_prob": 0.1,
        "loss_type": "CCE-",
        "num_negatives": 511,
        "negative_sharing": "none",
        "negative_distribution": "uniform",
        "train_batch_size": 1024,
        "learning_rate": 0.001,
        "weight_decay": 0.0,
        "epochs": 20,
        "stopping_step": 4,
    },
    "cce-ml-1m": {
        "MAX_ITEM_LIST_LENGTH": 200,
        "n_layers": 3,
        "hidden_size": 64,
        "loss_type": "CCE",
        "hidden_dropout_prob": 0.1,
        "learning_rate": 0.001404,
        "train_batch_size": 103,
        "positions": "end",
        "weight_average": "auto",
        "exclude_seen": True,
        "epochs": 300,
        "stopping_step": 20,
        "seed": 2020,
    },
    "cce-beauty": {
        "MAX_ITEM_LIST_LENGTH": 50,
        "n_layers": 2,
        "hidden_size": 64,
        "loss_type": "CCE",
        "hidden_dropout_prob": 0.5,
        "learning_rate": 0.000894,
        "train_batch_size": 687,
        "positions": "end",
        "weight_average": "auto",
        "exclude_seen": True,
        "epochs": 300,
        "stopping_step": 20,
        "seed": 2020,
    },
}


SHORT = {"epochs": 1, "topk": [5], "valid_metric": "NDCG@5"}  # of the few items of write_dataset


def recipe_config(file: Path, **changes) -> Config:
    recipe = registration.read_yaml(file)
    return Config(recipe["model"], recipe["dataset"], [str(file)], changes)


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_recipe_has_the_published_settings(tmp_path, file):
    recipe = registration.read_yaml(file)
    assert set(recipe) - {"model", "dataset"} <= known_keys(recipe["model"])
    config = recipe_config(file, state="ERROR")
    assert {key: config[key] for key in PUBLISHED[file.stem]} == PUBLISHED[file.stem]
    assert config["valid_metric"] == "NDCG@10"


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_recipe_runs(tmp_path, file):
    recipe = registration.read_yaml(file)
    write_dataset(tmp_path / "data", recipe["dataset"], header_of(recipe["dataset"]), users=40)
    result = run_recbole(
        recipe["model"],
        recipe["dataset"],
        [str(file)],
        quiet(tmp_path / "data", **SHORT),
    )
    assert 0 < result["test_result"]["ndcg@5"] <= 1


def test_recipes_of_papers_set_the_betas_of_adam(tmp_path):
    for file in (file for file in RECIPES if file.stem in ("sce-beauty", "cce-gowalla")):
        recipe = registration.read_yaml(file)
        write_dataset(tmp_path / "data", recipe["dataset"], header_of(recipe["dataset"]), users=40)
        config = recipe_config(file, **SHORT, **quiet(tmp_path / "data"))
        train = create_dataset(config).build()[0]
        model = get_model(config["model"])(config, train)
        assert isinstance(model, EfficientSASRec)
        optimizer = get_trainer(config["MODEL_TYPE"], config["model"])(config, model).optimizer
        assert isinstance(optimizer, torch.optim.Adam)
        assert optimizer.param_groups[0]["betas"] == (0.9, 0.98)


def test_every_recipe_is_checked():
    assert {file.stem for file in RECIPES} == set(PUBLISHED)
    assert len(DATASETS) > 30
