"""What is searched: files of the user's, read as literals; ranges around the defaults."""

from __future__ import annotations

import math

import numpy as np
import pytest
from recbole.data import create_dataset
from recbole.trainer.hyper_tuning import HyperTuning

from recbole_cce.commands.tune import defaults, durations, space
from recbole_cce.commands.tune.space import Parameter
from recbole_cce.errors import UserError
from recbole_cce.plugin import entry_points

HYPER = """
# short
learning_rate loguniform -8,0
hidden_dropout_prob uniform 0.1, 0.5
embedding_size choice [64, 96]
n_layers quniform 1,4,1
weight_decay quniform 0.1,0.45,0.1
mlp_hidden_size choice ['[64,64]','[128]']
"""


def test_hyper_file(tmp_path):
    (tmp_path / "hyper.test").write_text(HYPER)
    read = {one.key: one for one in space.read("hyper.test")}
    assert read["learning_rate"] == Parameter("learning_rate", low=math.exp(-8), high=1.0, log=True)
    assert read["hidden_dropout_prob"] == Parameter("hidden_dropout_prob", low=0.1, high=0.5)
    assert read["embedding_size"].choices == (64, 96)
    assert read["n_layers"].whole and (read["n_layers"].low, read["n_layers"].high) == (1, 4)
    assert read["mlp_hidden_size"].choices == ("[64,64]", "[128]")
    assert not read["weight_decay"].whole
    assert [read["weight_decay"].contains(value) for value in (0.1, 0.2, 0.4, 0.25, 0.5)] == [True] * 3 + [False] * 2


def test_hyper_file_means_what_it_means_in_recbole(tmp_path):
    """Values that hyperopt draws from the expressions that RecBole makes of the same lines."""
    hyperopt = pytest.importorskip("hyperopt")
    (tmp_path / "hyper.test").write_text(HYPER)
    read = {one.key: one for one in space.read("hyper.test")}
    theirs = HyperTuning._build_space_from_file("hyper.test")
    assert list(theirs) == list(read)
    rng = np.random.default_rng(0)
    for _ in range(200):
        drawn = hyperopt.pyll.stochastic.sample(theirs, rng=rng)
        for key, value in drawn.items():
            one = read[key]
            value = int(value) if one.whole else value
            assert one.contains(value), (key, value)


def test_yaml_says_the_same(tmp_path):
    (tmp_path / "space.yaml").write_text(
        "loguniform: {learning_rate: [-8, 0]}\nchoice: {embedding_size: [64, 96], mlp_hidden_size: [[64, 64], [128]]}\n"
    )
    read = space.read("space.yaml")
    assert read[:2] == [
        Parameter("learning_rate", low=math.exp(-8), high=1.0, log=True),
        Parameter("embedding_size", (64, 96)),
    ]
    assert read[2].choices == ("[64, 64]", "[128]")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("learning_rate choice [__import__('pathlib').Path('ran').touch()]", r"line 1 of 'hyper', .* is not a literal"),
        ("learning_rate choice open('ran','w')", r"is not a literal"),
        ("learning_rate uniform 0.1", r"it takes key uniform low,high"),
        ("learning_rate uniform 0.2,0.1", r"it takes key uniform low,high"),
        ("learning_rate uniform 0,1e999", r"it takes key uniform"),
        ("learning_rate loguniform 0,1000", r"it takes key loguniform"),
        ("learning_rate quniform 0,1,0", r"it takes key quniform low,high,step"),
        ("learning_rate choice []", r"it takes key choice \[value, value, ...\]"),
        ("learning_rate choice [0.1,0.1]", r"a value is there twice"),
        (
            "learning_rate normal 0,1",
            r"line 1 of 'hyper', 'learning_rate normal 0,1', is not valid; it takes key choice",
        ),
        ("learning_rate", r"is not valid; it takes key choice"),
        ("# nothing", r"'hyper' names no key"),
        ("a choice [1]\na choice [2]", r"'hyper' has 'a' twice"),
    ],
)
def test_one_error_for_a_wrong_line(tmp_path, line, message):
    (tmp_path / "hyper").write_text(line)
    with pytest.raises(UserError, match=message):
        space.read("hyper")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("normal: {learning_rate: [0, 1]}", r"'normal' in 'space.yaml' is not valid; it takes choice, uniform"),
        ("uniform: [1, 2]", r"'uniform' in 'space.yaml' is not valid"),
        ("uniform: {learning_rate: 3}", r"'learning_rate' in 'space.yaml', 3, is not valid; it takes key uniform"),
    ],
)
def test_one_error_for_wrong_yaml(tmp_path, text, message):
    (tmp_path / "space.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        space.read("space.yaml")


def space_of(model, settings):
    config = entry_points.configuration(model, "tiny", [], settings)
    dataset = create_dataset(config)
    if model.startswith("SASRecC"):
        dataset.build()  # where auto becomes a value
    found = {one.key: one for one in defaults.default_space(config, dataset.item_num - 1)}
    return config, found


def test_default_space_is_around_what_auto_picks(tiny_config):
    for key in ("learning_rate", "train_batch_size", "hidden_dropout_prob", "num_negatives"):
        del tiny_config[key]
    config, found = space_of("SASRecCCE", tiny_config)
    for key, one in found.items():
        value = one.value_of(config)
        assert value != "auto"
        assert one.contains(value) or one.only is not None, key
        space.check(
            [one], "SASRecCCE", lambda more: entry_points.configuration("SASRecCCE", "tiny", [], tiny_config | more)
        )
    assert {"learning_rate", "train_batch_size", "hidden_dropout_prob", "loss_type", "architecture"} <= set(found)
    assert found["learning_rate"].low < config["learning_rate"] < found["learning_rate"].high
    assert found["loss_type"].choices == ("CCE", "CCE-", "SCE")
    assert not {"hidden_size", "num_negatives"} & set(found)  # one is given, of 30 items there is one number to draw


def test_a_given_key_is_not_searched_and_its_loss_decides(tiny_config):
    _, found = space_of("SASRecCCE", tiny_config | {"loss_type": "SCE", "learning_rate": 0.01})
    assert not {"loss_type", "learning_rate", "num_negatives"} & set(found)


def test_default_space_of_recboles_models(tiny_config):
    for key in ("learning_rate", "train_batch_size", "hidden_dropout_prob", "num_negatives", "hidden_size"):
        del tiny_config[key]
    config, found = space_of("SASRec", tiny_config)
    assert set(found) == {
        *("learning_rate", "train_batch_size", "hidden_dropout_prob", "attn_dropout_prob", "hidden_size", "n_layers")
    }
    assert all(one.contains(one.value_of(config)) for one in found.values())
    _, found = space_of("GRU4Rec", tiny_config)
    assert {"dropout_prob", "embedding_size", "hidden_size", "num_layers"} <= set(found)
    assert space_of("Cooccurrence", {**tiny_config})[1] == {}


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("10m", 600), ("2h", 7200), ("1h30m", 5400), ("0.5m", 30), ("1m1s", 61)]
)
def test_durations(text, seconds):
    assert durations.parse(text, "--budget") == seconds


def test_durations_in_words():
    assert [durations.words(seconds) for seconds in (0.4, 59.6, 200, 3720)] == ["0s", "1m00s", "3m20s", "1h02m"]
