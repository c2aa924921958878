"""Every configuration key of the package: what it takes, and one error that says so for anything else."""

from __future__ import annotations

import pytest
from recbole.config import Config

from recbole_cce import settings

REALS = ["auto", "much", None, True, [0.5], float("nan"), float("inf")]
INTEGERS = [0, -3, 2.5, "many", None, True, [4], float("inf")]
FLAGS = [1, 0, "yes", None, "auto"]
DTYPES = ["bf16", "half", "float64", "int8", None, True, 16]

# key: (right values, wrong values, what the error must list)
KEYS = {
    "loss_type": (
        ["CE", "CCE", "CCE-", "CE-", "SCE", "BCE", "gBCE"],
        ["cce", "CCE--", "BPR", "", None, True, 3],
        "CE, CCE, CCE-, CE-, SCE, BCE, gBCE",
    ),
    "loss_backend": (["auto", "triton", "torch"], ["cuda", "Triton", None, True], "auto, triton, torch"),
    "loss_dtype": (["auto", "float32", "bfloat16", "float16"], DTYPES, "auto, float32, bfloat16, float16"),
    "cuda_graph": (["auto", True, False], ["Auto", 1, 0, None], "auto, True, False"),
    "compile_encoder": (["auto", True, False], ["Auto", 1, 0, None], "auto, True, False"),
    "amp_dtype": (["auto", "float32", "bfloat16", "float16"], DTYPES, "auto, float32, bfloat16, float16"),
    "num_negatives": ([1, 512, 65536], [*INTEGERS, 65537, "auto"], "an integer from 1 to 65536"),
    "negative_sharing": (["tile", "none", "batch"], ["user", None, False], "tile, none, batch"),
    "negative_distribution": (["uniform", "popularity"], ["popular", None, True], "uniform, popularity"),
    "negative_alpha": ([0, 0.75, 10.0], [*REALS, -0.1, 10.5], "a number from 0 to 10"),
    "logq_correction": ([True, False], FLAGS, "True, False"),
    "exclude_seen": ([True, False], FLAGS, "True, False"),
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
    ([1, 7], [*INTEGERS, "auto"], "an integer >= 1"),
)
KEYS["train_batch_size"] = (["auto", 1, 7], INTEGERS, "an integer >= 1 or auto")
KEYS |= dict.fromkeys(["epochs", "stopping_step"], ([0, 7], [*INTEGERS[1:], "auto"], "an integer >= 0"))
KEYS |= dict.fromkeys(["hidden_dropout_prob", "attn_dropout_prob"], ([0, 0.5, 1], [*REALS, -0.1, 1.5], "from 0 to 1"))
KEYS |= dict.fromkeys(
    ["learning_rate", "weight_decay", "layer_norm_eps", "initializer_range"],
    ([0, 1e-12, 0.02, 3], [*REALS, -0.1], "a number >= 0"),
)
KEYS |= {
    "hidden_act": (
        ["gelu", "relu", "swish", "tanh", "sigmoid"],
        ["GELU", "silu", None, True],
        "gelu, relu, swish, tanh, sigmoid",
    ),
    "seed": ([0, 2020, 2**32 - 1], [-1, 2**32, 0.5, "random", None, True], "an integer from 0 to 4294967295"),
}


def test_the_table_has_every_key():
    assert set(KEYS) == set(settings.KEYS) | set(settings.RECBOLE_KEYS)


@pytest.mark.parametrize("model", ["SASRecCCE", "SASRecSCE"])
@pytest.mark.parametrize("key", KEYS)
def test_right_values(tiny_config, key, model):
    for value in KEYS[key][0]:
        assert Config(model, "tiny", config_dict={**tiny_config, key: value})[key] == value


@pytest.mark.parametrize("key", KEYS)
def test_wrong_values(tiny_config, key):
    _, wrong, valid = KEYS[key]
    for value in wrong:
        with pytest.raises(ValueError) as error:
            Config("SASRecCCE", "tiny", config_dict={**tiny_config, key: value})
        assert str(error.value).startswith(f"{key}: ")
        assert "is not valid; it takes " in str(error.value)
        assert valid in str(error.value)
        assert isinstance(value, str) or f"{key}: {value!r} " in str(error.value)


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
