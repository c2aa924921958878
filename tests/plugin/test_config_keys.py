"""Every configuration key, RecBole's included: what it takes, and one error that says so for anything else."""

from __future__ import annotations

import functools
import pickle
import re
import sys

import pytest
import yaml
from recbole.config import Config, configurator
from recbole.data import create_dataset
from recbole.quick_start import run_recbole

from recbole_cce.errors import UserError
from recbole_cce.plugin import config_checks, config_keys, registration
from recbole_cce.plugin.config_sources import literal
from tests.conftest import write_inter


@pytest.fixture(autouse=True)
def yaml_once(monkeypatch):
    """RecBole's files are parsed once for all the Configs here."""
    monkeypatch.setattr(configurator.yaml, "load", load)


@functools.cache
def parsed(text, Loader):
    return pickle.dumps(yaml_load(text, Loader))


def load(text, Loader):
    return pickle.loads(parsed(text, Loader))


yaml_load = yaml.load
REALS = ["auto", "much", None, True, [0.5], float("nan"), float("inf")]
INTEGERS = [0, -3, 2.5, "many", None, True, [4], float("inf")]
FLAGS = [1, 0, "yes", None, "auto"]
DTYPES = ["bf16", "half", "float64", "int8", None, True, 16]

# key: (right values, wrong values, what the error must list)
KEYS = {
    "loss_type": (
        ["auto", "CE", "CCE", "CCE-", "CE-", "SCE", "BCE", "gBCE"],
        ["cce", "CCE--", "BPR", "", None, True, 3],
        "CE, CCE, CCE-, CE-, SCE, BCE, gBCE",
    ),
    "loss_backend": (["auto", "triton", "torch"], ["cuda", "Triton", None, True], "auto, triton, torch"),
    "loss_dtype": (["auto", "float32", "bfloat16", "float16"], DTYPES, "auto, float32, bfloat16, float16"),
    "cuda_graph": (["auto", True, False], ["Auto", 1, 0, None], "auto, True, False"),
    "checkpoint_interval": (["auto", 0, 0.5, 3600], ["never", -1, None, True, [1]], "a number >= 0 or auto"),
    "accumulate_steps": ([1, 4, 1000], [*INTEGERS, "auto"], "an integer >= 1"),
    "compile_encoder": (["auto", True, False], ["Auto", 1, 0, None], "auto, True, False"),
    "amp_dtype": (["auto", "float32", "bfloat16", "float16"], DTYPES, "auto, float32, bfloat16, float16"),
    "num_negatives": ([1, 512, 65536], [*INTEGERS, 65537, "auto"], "an integer from 1 to 65536"),
    "negative_sharing": (["tile", "none", "batch"], ["user", None, False], "tile, none, batch"),
    "negative_distribution": (["uniform", "popularity"], ["popular", None, True], "uniform, popularity"),
    "negative_alpha": ([0, 0.75, 10.0], [*REALS, -0.1, 10.5], "a number from 0 to 10"),
    "logq_correction": ([True, False], FLAGS, "True, False"),
    "exclude_seen": ([True, False], FLAGS, "True, False"),
    "positions": (["start", "end"], ["first", "", None, True], "start, end"),
    "weight_average": (
        ["auto", "none", 0.1, 1],
        ["Auto", "", 0, -0.1, 1.5, None, True, [0.1], float("nan")],
        "auto, none or a number above 0 and at most 1",
    ),
    "repeat_bias": (["auto", "learned", "none"], ["Auto", "", None, True, 0.5], "auto, learned, none"),
    "mix_x": ([True, False], FLAGS, "True, False"),
    "n_buckets": (["auto", 1, 10_000], INTEGERS, "an integer >= 1 or auto"),
    "bucket_size_x": (["auto", 1, 10_000], INTEGERS, "an integer >= 1 or auto"),
    "bucket_size_y": (["auto", 1, 10_000], INTEGERS, "an integer >= 1 or auto"),
    "eval_chunk_items": (["auto", 1, 10_000], INTEGERS, "an integer >= 1 or auto"),
    "gbce_t": ([0, 0.75, 1], [*REALS, -0.1, 1.5], "a number from 0 to 1"),
    "train_targets": (["all", "last"], ["every", None, True], "all, last"),
    "cache_data": ([True, False, "cache"], [1, 0, "", None, ["cache"]], "True, False or a folder"),
    "attention": (["auto", "sdpa", "packed", "recbole"], ["flash", None, True], "auto, sdpa, packed, recbole"),
    "architecture": (["recbole", "original"], ["sasrec", None, True], "recbole, original"),
    "adam_betas": (
        [[0.9, 0.98], [0, 0.5]],
        [0.9, [0.9], [0.9, 0.98, 0.99], [0.9, 1.0], [-0.1, 0.9], ["a", "b"], "auto", None, True],
        "two numbers in [0, 1)",
    ),
}


KEYS |= dict.fromkeys(
    ["MAX_ITEM_LIST_LENGTH", "n_layers", "n_heads", "hidden_size", "inner_size", "eval_batch_size"],
    ([1, 7], [*INTEGERS, 10**30, "auto"], "an integer >= 1"),
)
KEYS["train_batch_size"] = (["auto", 1, 7], [*INTEGERS, 10**30], "an integer >= 1 or auto")
KEYS |= dict.fromkeys(
    ["epochs", "stopping_step", "eval_step", "worker"], ([0, 7], [*INTEGERS[1:], 10**30, "auto"], "an integer >= 0")
)
KEYS["attn_dropout_prob"] = ([0, 0.5, 1], [*REALS, -0.1, 1.5], "from 0 to 1")
KEYS["hidden_dropout_prob"] = (["auto", 0, 0.5, 1], [*REALS[1:], "Auto", -0.1, 1.5], "from 0 to 1 or auto")
KEYS["learning_rate"] = (["auto", 0, 1e-12, 3], [*REALS[1:], "Auto", -0.1], "a number >= 0 or auto")
KEYS["checkpoint_interval"] = (["auto", 0, 0.5, 600], [*REALS[1:], "Auto", -0.1], "a number >= 0 or auto")
KEYS |= dict.fromkeys(
    ["weight_decay", "layer_norm_eps", "initializer_range"],
    ([0, 1e-12, 0.02, 3], [*REALS, -0.1], "a number >= 0"),
)
KEYS |= dict.fromkeys(["reg_weight", "tail_ratio"], ([None, 0, 0.1], ["much", True, [0.5], -0.1], "a number >= 0"))
KEYS |= {
    "hidden_act": (
        ["gelu", "relu", "swish", "tanh", "sigmoid"],
        ["GELU", "silu", None, True],
        "gelu, relu, swish, tanh, sigmoid",
    ),
    "seed": ([0, 2020, 2**32 - 1], [-1, 2**32, 0.5, "random", None, True], "an integer from 0 to 4294967295"),
    "learner": (
        ["adam", "AdamW", "sgd", "adagrad", "rmsprop"],
        ["foo", "sparse_adam", "", None, True, 1, ["adam"]],
        "one of adam, adamw, sgd, adagrad, rmsprop",
    ),
    "gpu_id": (
        ["", "0", "0,1", "-1", "GPU-8f1c", "MIG-1/2/0"],
        ["gpu", "0,,1", "0;1", [0], True, 0.5, -2, {}],
        "numbers of GPUs, such as 0 or 0,1, or '' for the CPU",
    ),
    "state": (["INFO", "debug", None], ["LOUD", 1, True, ["INFO"]], "debug, info, warning, error, critical"),
    "metrics": (
        [["MRR"], ["ndcg", "MRR"]],
        [[], "", None, 3, ["Recal"], [1], {}, ["AUC", "MRR"], "mrr@10"],
        "",
    ),
    "topk": ([[10], [10, 20]], [[], 0, -1, "", "ten", 1.5, None, True, [0], [[10]], ["10"], (10, 20)], "integer >= 1"),
    "valid_metric": (["MRR@10", "ndcg@10"], ["", "MRR", "MRR@9", "AUC", "MRR@", None, 3, ["MRR@10"]], "it takes"),
    "eval_args": (
        [
            {"split": {"LS": split}, "order": "TO", "mode": mode}
            for split in ("valid_and_test", "valid_only", "test_only")
            for mode in ("full", "uni100", "pop10", {"valid": "uni10", "test": "full"}, "labeled")
        ]
        + [
            {"split": {split: [0.8, 0.1, 0.1]}, "group_by": group, "order": "TO"}
            for split in ("RS", "TS")
            for group in ("user", "none", None)
        ],
        [
            "LS",
            None,
            [],
            3,
            {},  # of RecBole's default the order is RO
            *(
                {"order": "TO", **args}
                for args in (
                    {"spilt": {"LS": "valid_and_test"}},
                    {"split": "LS"},
                    {"split": {}},
                    {"split": {"LS": "test"}},
                    {"split": {"RS": [0.8, 0.2]}},
                    {"split": {"RS": [0, 0.5, 0.5]}},
                    {"split": {"RS": [1, -1, 1]}},
                    {"split": {"RS": "0.8,0.1,0.1"}},
                    {"split": {"XS": [1, 1, 1]}},
                    {"split": {"LS": "test_only", "RS": [1, 1, 1]}},
                    {"group_by": "item"},
                    {"order": "OT"},
                    {"mode": "fulll"},
                    {"mode": "uni"},
                    {"mode": "uni0"},
                    {"mode": "popx"},
                    {"mode": {"train": "full"}},
                    {"mode": ["full"]},
                )
            ),
        ],
        "it takes",
    ),
    "repeatable": ([True], [False, 1, 0, "yes", None], "True"),
    "train_neg_sample_args": (
        [None],
        [{"distribution": "uniform", "sample_num": 1}, "uniform", 5, [], {}, True],
        "~ (nothing): the loss draws its own negatives, see num_negatives",
    ),
    "transform": (
        [None],
        ["mask_itemseq", "inverse_itemseq", "crop_itemseq", "reorder_itemseq", "user_defined", "foo", 1, True],
        "~ (nothing)",
    ),
    "clip_grad_norm": (
        [None, {"max_norm": 5}, {"max_norm": 0.5, "norm_type": float("inf")}],
        [5, "5", True, [], {}, {"norm_type": 2}, {"max_norm": "5"}, {"max_norm": 5, "norm": 2}],
        "a mapping such as {'max_norm': 5, 'norm_type': 2}",
    ),
    "encoding": (
        [None, "utf-8", "latin-1", "utf-8-sig", "gbk"],
        ["utf-9", " ", 8, True, ["utf-8"], "base64", "rot13"],
        "a text encoding that Python knows, such as utf-8",
    ),
    "rm_dup_inter": ([None, "first", "last"], ["all", True, False, 1, ["first"]], "one of first, last"),
    "val_interval": (
        [None, {}, {"rating": "[3,inf)"}, {"rating": [3, 5]}, {"genre": ["a", "b"]}],
        ["[3,inf)", 3, [], True, {"rating": "[3,inf"}, {"rating": 3}, {"rating": "high"}, {"rating": None}, {3: [1]}],
        "a mapping of columns to intervals such as '[3,inf)'",
    ),
    "seq_len": ([None, {"a": 3}], [3, {"a": 0}, {"a": "x"}, [], "a"], "a mapping of columns to lengths >= 1"),
    "threshold": (
        [None, {"rating": 3}],
        [3, {}, {"rating": "3"}, {"rating": 3, "other": 3}, ["rating"], "rating"],
        "one column and a number",
    ),
    "preload_weight": ([None, {"a": "b"}], ["a", ["a"], {"a": 1}, 3, True], "a mapping of columns of ids"),
    "discretization": (
        [None, {"a": {"method": "ED", "bucket": 3}}, {"a": {"method": "LD"}}],
        [
            3,
            [],
            "ED",
            {"a": "ED"},
            {"a": {"method": "ED"}},
            {"a": {"method": "XX"}},
            {"a": {"method": "ED", "bucket": 0}},
        ],
        "a mapping of columns to",
    ),
    "additional_feat_suffix": ([None, ["ent"]], [3, [], True, {}, [3]], "the suffix of a file"),
    "benchmark_filename": (
        [None, ["train", "valid", "test"]],
        ["train", [], ["train", "test"], [1, 2, 3], 3, True, {}],
        "a list of three suffixes",
    ),
}
KEYS |= dict.fromkeys(
    [
        *("use_gpu", "reproducibility", "show_progress", "save_dataset", "save_dataloaders", "shuffle", "require_pow"),
        *("enable_amp", "enable_scaler", "filter_inter_by_user_or_item", "kg_reverse_r"),
    ],
    ([True, False], FLAGS, "one of True, False"),
)
KEYS["valid_metric_bigger"] = ([True], FLAGS, "one of True, False")  # RecBole knows it itself
KEYS["log_wandb"] = ([False], FLAGS, "one of True, False")
KEYS["normalize_all"] = ([True, False, None], FLAGS[:3], "one of True, False")
KEYS |= dict.fromkeys(["data_path", "checkpoint_dir"], ([], ["", None, True, 3, ["a"], {}], "a path"))
KEYS["checkpoint_dir"] = (["saved", "a b", "a=b"], *KEYS["checkpoint_dir"][1:])
KEYS |= dict.fromkeys(
    ["dataset_save_path", "dataloaders_save_path"], ([None, "file.pth"], [True, 3, ["a"], {}], "a path, or ~ (nothing)")
)
KEYS |= dict.fromkeys(
    ["wandb_project", "field_separator", "seq_separator", "NEG_PREFIX", "LIST_SUFFIX"],
    (["\t", " ", "x"], ["", None, True, 3, ["a"], {}], "text"),
)
KEYS |= dict.fromkeys(
    [
        *("USER_ID_FIELD", "ITEM_ID_FIELD", "TIME_FIELD", "ITEM_LIST_LENGTH_FIELD", "POSITION_FIELD"),
        *("HEAD_ENTITY_ID_FIELD", "TAIL_ENTITY_ID_FIELD", "RELATION_ID_FIELD", "ENTITY_ID_FIELD"),
    ],
    (["column"], ["", None, True, 3, ["a"], {}], "the name of a column"),
)
KEYS |= dict.fromkeys(["RATING_FIELD", "LABEL_FIELD"], (["column", None], [True, 3, ["a"], {}], "the name of a column"))
KEYS |= dict.fromkeys(
    ["loss_decimal_place", "metric_decimal_place"],
    ([0, 4, 15], [-1, 16, 2.5, "four", None, True, [4], 10**30], "an integer from 0 to 15"),
)
KEYS |= dict.fromkeys(
    ["user_inter_num_interval", "item_inter_num_interval", "entity_kg_num_interval", "relation_kg_num_interval"],
    (
        [None, "[5,inf)", "(0, 4.5]", "[0,1];[5,9]", [2, 5], (2, 5), "(-inf,3)"],
        [
            100,
            "100",
            "[3,inf",
            "3,inf)",
            "[3]",
            "[a,b]",
            "[5,3]",
            "[nan,3]",
            "[1,2,3]",
            "[1,2][3,4]",
            "[3,4];",
            True,
            {},
        ],
        "an interval such as [5,inf) or (0,4.5]",
    ),
)
KEYS |= dict.fromkeys(
    [
        *("alias_of_user_id", "alias_of_item_id", "alias_of_entity_id", "alias_of_relation_id", "normalize_field"),
        "numerical_features",
    ],
    ([[], ["a", "b"]], ["a", 3, True, {}, [3], [None]], "a list of columns"),
)
KEYS |= dict.fromkeys(
    ["load_col", "unload_col", "unused_col"],
    (
        [None, {"inter": ["user_id"]}, {"inter": "*"}, {"item": []}],
        ["user_id", ["user_id"], {"inter": "user_id"}, {"inter": [1]}, {"inter": None}, 3, True],
        "a mapping such as {'inter': ['user_id', 'item_id']}",
    ),
)


def test_the_table_has_every_key():
    assert set(KEYS) == set(config_keys.of_our_models())
    known = {
        key
        for key in config_checks.keys_of_recbole()
        if key in yaml_keys("overall.yaml") | yaml_keys("dataset/sample.yaml")
    }
    assert known <= set(config_keys.RECBOLE_KEYS)


def yaml_keys(file):
    return set(registration.read_yaml(config_checks.RECBOLE / "properties" / file))


@pytest.mark.parametrize("model", ["SASRecCCE", "SASRecSCE"])
@pytest.mark.parametrize("key", KEYS)
def test_right_values(tiny_config, key, model):
    for value in KEYS[key][0]:
        config = Config(model, "tiny", config_dict={**tiny_config, key: value})
        if key not in ("eval_args", "train_neg_sample_args"):  # RecBole adds what is missing
            assert config[key] == value or config[key] == literal(str(value))


def refused(settings, model="SASRecCCE", files=None):
    """The error of a Config of these settings."""
    with pytest.raises(UserError) as error:
        Config(model, "tiny", files, config_dict=settings)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("key", KEYS)
def test_wrong_values(tiny_config, key):
    _, wrong, valid = KEYS[key]
    for value in wrong:
        message = refused({**tiny_config, key: value})
        assert message.startswith(f"{key}: ")
        assert re.search(r"; it takes |not valid together: ", message)
        assert valid in message
        assert isinstance(value, (str, list)) or value is None or f"{key}: {value!r} " in message


@pytest.mark.parametrize("model", ["SASRec", "BPR"])
@pytest.mark.parametrize("key", sorted(set(config_keys.RECBOLE_KEYS) - set(config_keys.SASREC_KEYS)))
def test_wrong_values_of_models_of_recbole(tiny_config, key, model):
    for value in KEYS[key][1]:
        if key == "repeatable" or value == {}:  # a general model has other defaults
            continue
        if key != "eval_args" or value is None or not isinstance(value, dict):
            assert refused({**tiny_config, key: value}, model).startswith(f"{key}: ")


@pytest.mark.parametrize(
    ("model", "key", "value"),
    [
        ("SASRec", "n_layers", "two"),
        ("GRU4Rec", "embedding_size", [64]),
        ("NeuMF", "mf_train", "yes"),
        ("NPE", "topk", "x"),
    ],
)
def test_a_key_of_a_model_of_recbole_takes_the_kind_of_its_default(tiny_config, model, key, value):
    assert refused({**tiny_config, key: value}, model).startswith(f"{key}: {value!r} is not valid; it takes ")


WAYS = {
    "num_negative: 5": "there is no key 'num_negative'; did you mean num_negatives",
    "lossType: SCE": "there is no key 'lossType'; did you mean loss_type",
    "xyzzy: 1": "there is no key 'xyzzy'",
    "loss_type:": "loss_type: None is not valid; it takes one of auto, CE, CCE",
    "n_buckets: many": "n_buckets: 'many' is not valid; it takes an integer >= 1 or auto",
    "user_inter_num_interval: '[3,inf'": "user_inter_num_interval: '[3,inf' is not valid; it takes an interval",
}


@pytest.mark.parametrize("way", ["file", "config_dict"])
@pytest.mark.parametrize(("text", "message"), WAYS.items())
def test_every_way_in_is_checked(tiny_config, tmp_path, text, message, way):
    """The command line's own ways: test_cli.py."""
    (tmp_path / "own.yaml").write_text(text)
    own = yaml.safe_load(text)
    files, given = (["own.yaml"], tiny_config) if way == "file" else (None, {**tiny_config, **own})
    assert refused(given, files=files).startswith(message)


def test_an_empty_value_is_the_same_in_all_ways(tiny_config, tmp_path, monkeypatch):
    """None where a key takes that, '' where it takes that alone."""
    (tmp_path / "own.yaml").write_text("clip_grad_norm:\nencoding:\ngpu_id:\n")
    from_file = Config("SASRecCCE", "tiny", ["own.yaml"], {k: v for k, v in tiny_config.items() if k != "gpu_id"})
    from_dict = Config("SASRecCCE", "tiny", None, {**tiny_config, "clip_grad_norm": "", "encoding": "", "gpu_id": None})
    monkeypatch.setattr(sys, "argv", ["test", "--clip_grad_norm=", "--encoding=", "--gpu_id="])
    from_flag = Config("SASRecCCE", "tiny", None, tiny_config)
    for config in (from_file, from_dict, from_flag):
        assert [config[key] for key in ("clip_grad_norm", "encoding", "gpu_id")] == [None, None, ""]


def test_a_name_that_is_a_number_stays_text(tiny_config, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["test", "--checkpoint_dir=1e3", "--seed=7"])
    config = Config("SASRecCCE", "tiny", config_dict={**tiny_config, "wandb_project": "2024"})
    assert [config[key] for key in ("checkpoint_dir", "wandb_project", "seed")] == ["1e3", "2024", 7]


def test_flags_of_a_script_of_the_users_are_its_own(tiny_config, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--fold=3", "--num_negative=1"])
    assert Config("SASRecCCE", "tiny", config_dict=tiny_config)["fold"] == 3


@pytest.mark.parametrize(
    ("own", "message"),
    [
        (
            {"ITEM_ID_FIELD": "user_id"},
            "ITEM_ID_FIELD: 'user_id' is USER_ID_FIELD, too; each takes",
        ),
        ({"normalize_field": ["a"], "normalize_all": True}, "normalize_field: ['a'] is not valid with normalize_all: "),
        ({"adam_betas": [0.9, 0.98], "learner": "sgd"}, "adam_betas: [0.9, 0.98] is not for learner: sgd; adam and "),
        (
            {"metrics": ["NDCG"], "valid_metric": "MRR@10"},
            "valid_metric: 'MRR@10' is not among metrics and topk; it takes one of ndcg@10",
        ),
        (
            {"topk": 5, "valid_metric": "MRR@10"},
            "valid_metric: 'MRR@10' is not among metrics and topk; it takes one of hit@5, mrr@5, ",
        ),
    ],
)
def test_values_that_do_not_fit_each_other(tiny_config, own, message):
    assert refused({**tiny_config, **own}).startswith(message)


@pytest.mark.parametrize("model", ["SASRecCCE", "SASRec"])
def test_a_default_valid_metric_that_is_not_computed(tiny_config, model):
    """Before any data is read; a Config that trains nothing, or does not validate, is none of its business."""
    own = {**tiny_config, "topk": 5, "data_path": "nowhere"}
    Config(model, "tiny", config_dict=own)
    with pytest.raises(UserError, match=r"valid_metric: 'MRR@10' is not among .*; it takes one of hit@5, mrr@5, "):
        run_recbole(model, "tiny", config_dict=own)
    with pytest.raises(ValueError, match="Neither"):
        run_recbole(model, "tiny", config_dict={**own, "eval_step": 0})


@pytest.mark.parametrize("model", ["SASRecCCE", "SASRec"])
@pytest.mark.parametrize(
    ("column", "wanted"),
    [("rating", ["a"]), ("rating", [1, 2, 3]), ("genre", "[1,3]")],
    ids=["token", "three", "interval"],
)
def test_intervals_of_the_wrong_kind_of_column(tiny_config, tmp_path, model, column, wanted):
    rows = [(f"u{n % 4}", f"i{n % 5}", n, n % 3, "x") for n in range(20)]
    write_inter(
        tmp_path / "data", "tiny", "user_id:token\titem_id:token\ttimestamp:float\trating:float\tgenre:token", rows
    )
    own = {"load_col": None, "val_interval": {column: wanted}}
    config = Config(model, "tiny", config_dict={**tiny_config, **own})
    with pytest.raises(UserError, match=f"val_interval: .* for the column {column}:"):
        create_dataset(config)


@pytest.mark.parametrize("model", ["SASRecCCE", "SASRec"])
def test_another_separator_than_that_of_the_file(tiny_config, model):
    config = Config(model, "tiny", config_dict={**tiny_config, "field_separator": ";"})
    with pytest.raises(UserError, match=r"tiny\.inter: the header cell 'user_id:token.* field_separator ';'"):
        create_dataset(config)


@pytest.mark.parametrize("model", ["SASRecCCE", "SASRec"])
@pytest.mark.parametrize(
    ("own", "message"),
    [
        (
            {"alias_of_item_id": ["item"]},
            "alias_of_item_id: 'item' is not a column that is loaded; did you mean item",
        ),
        ({"alias_of_user_id": ["timestamp"]}, "alias_of_user_id: 'timestamp' is not valid; it takes columns of tokens"),
        (
            {"val_interval": {"times": "[0,1]"}},
            "val_interval: 'times' is not a column that is loaded; did you",
        ),
        ({"preload_weight": {"xx": "yy"}}, "preload_weight: 'xx' is not a column that is loaded"),
    ],
)
def test_options_that_name_columns_which_are_not_there(tiny_config, model, own, message):
    config = Config(model, "tiny", config_dict={**tiny_config, **own})
    with pytest.raises(UserError, match="^" + re.escape(message)):
        create_dataset(config)


def test_the_original_architecture_has_no_layers_of_recbole(tiny_config):
    with pytest.raises(ValueError, match=r"attention: 'recbole' is not valid with architecture: original.* packed$"):
        Config("SASRecCCE", "tiny", config_dict={**tiny_config, "architecture": "original", "attention": "recbole"})


def test_recboles_own_negatives_are_refused(tiny_config):
    negatives = {"distribution": "uniform", "sample_num": 1}
    with pytest.raises(ValueError, match=r"train_neg_sample_args: .*it takes ~ .*num_negatives"):
        Config("SASRecCCE", "tiny", config_dict={**tiny_config, "train_neg_sample_args": negatives})
    Config("SASRecCCE", "tiny", config_dict={**tiny_config, "train_neg_sample_args": None})


@pytest.mark.parametrize("transform", ["mask_itemseq", "inverse_itemseq", "crop_itemseq", "reorder_itemseq"])
def test_recboles_transforms_of_histories_are_refused(tiny_config, transform):
    with pytest.raises(ValueError, match=rf"transform: '{transform}' is not valid; it takes ~ "):
        Config("SASRecCCE", "tiny", config_dict={**tiny_config, "transform": transform})
    Config("SASRecCCE", "tiny", config_dict={**tiny_config, "transform": None})


def test_values_of_builtin_models_are_none_of_our_business(tiny_config):
    config = Config("SASRec", "tiny", config_dict={**tiny_config, "num_negatives": -1, "attention": "flash"})
    assert config["num_negatives"] == -1
