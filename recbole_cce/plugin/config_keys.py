"""Which keys a configuration has: RecBole's, those of this package, and what losses and models declare.

RecBole declares nothing: what its keys take is said here. A loss declares its keys itself, so that the tables here are
made when they are asked for; the command line's --help and every error message come from them.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from typing import Any

from recbole_cce.errors import UserError
from recbole_cce.keys import (
    INTERVAL,
    Key,
    Values,
    any_case,
    flag,
    integer,
    is_interval,
    is_list,
    is_mapping,
    is_number,
    is_text,
    list_of,
    one_of,
    or_nothing,
    real,
)
from recbole_cce.nn.losses.base import DTYPES
from recbole_cce.nn.losses.registry import LOSSES, declared


def _betas(value: Any) -> bool:
    return is_list(value, lambda beta: is_number(beta) and 0 <= beta < 1) and len(value) == 2


def _share(value: Any) -> bool:
    return value in ("auto", "none") or (is_number(value) and 0 < value <= 1)


def _columns(value: Any) -> bool:
    # of each file (by its suffix) a list of columns, or all of them
    return is_mapping(value, lambda names: names == "*" or is_list(names, is_text) or names == [])


def _wanted(value: Any) -> bool:
    # of a column of numbers an interval, of a column of tokens a list
    return is_mapping(value, lambda each: (is_text(each) and is_interval(each)) or isinstance(each, (list, tuple)))


def _is_encoding(value: Any) -> bool:
    try:
        return is_text(value) and isinstance("a".encode(value), bytes)
    except (LookupError, ValueError):
        return False


def _gpu_id(value: Any) -> bool:
    if isinstance(value, (int, tuple)) and not isinstance(value, bool):
        return all(isinstance(each, int) and each >= -1 for each in (value if isinstance(value, tuple) else [value]))
    one = r"\s*(-1|\d+|(GPU|MIG)-[\w/-]+)\s*"
    return isinstance(value, str) and re.fullmatch(rf"({one}(,{one})*)?", value) is not None


def _clip_grad_norm(value: Any) -> bool:
    def is_flag(each: Any) -> bool:
        return isinstance(each, bool)

    known = {"max_norm": is_number, "norm_type": is_number, "error_if_nonfinite": is_flag, "foreach": is_flag}
    return (
        isinstance(value, dict)
        and "max_norm" in value
        and all(key in known and known[key](each) for key, each in value.items())
    )


def _negatives(value: Any) -> bool:
    whole = integer(0).accepts
    known = {
        "distribution": lambda each: each in (None, "None", "none", "uniform", "popularity"),
        "sample_num": lambda each: each == "none" or (whole(each) and each > 0),
        "alpha": lambda each: each == "none" or is_number(each),
        "dynamic": lambda each: isinstance(each, bool),
        "candidate_num": whole,
    }
    return value == "None" or (
        isinstance(value, dict)
        and "distribution" in value
        and all(key in known and known[key](each) for key, each in value.items())
    )


def _mode(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"full|labeled|(uni|pop)[1-9]\d{0,8}", value) is not None


def _split(value: Any) -> bool:
    if not isinstance(value, dict) or len(value) != 1:
        return False
    ((kind, how),) = value.items()
    if kind == "LS":
        return how in ("valid_and_test", "valid_only", "test_only")
    return (
        kind in ("RS", "TS")
        and isinstance(how, list)
        and len(how) == 3
        and all(is_number(share) and 0 <= share < math.inf for share in how)
        and how[0] > 0
    )


def _eval_args(value: Any) -> bool:
    known = {
        "split": _split,
        "group_by": lambda each: each is None or (isinstance(each, str) and each.lower() in ("user", "none")),
        "order": lambda each: each in ("TO", "RO"),
        "mode": lambda each: (
            _mode(each)
            or (isinstance(each, dict) and set(each) <= {"valid", "test"} and all(map(_mode, each.values())))
        ),
    }
    return isinstance(value, dict) and all(key in known and known[key](each) for key, each in value.items())


def _discretization(value: Any) -> bool:
    def how(each: Any) -> bool:
        return isinstance(each, dict) and (
            (each.get("method") == "ED" and integer(1).accepts(each.get("bucket"))) or each.get("method") == "LD"
        )

    return is_mapping(value, how)


# Keys of this package that are no loss's: see keys_of_package().
PACKAGE_KEYS: dict[str, Key] = {
    "train_targets": Key(None, one_of("all", "last"), "targets: every position, or the last as in RecBole"),
    "cache_data": Key(
        None,
        Values("True, False or a folder", lambda value: isinstance(value, bool) or is_text(value)),
        "binary copy of the data: in its folder, none, or in another folder",
    ),
    "architecture": Key(
        None,
        one_of("recbole", "original"),
        "recbole: RecBole's SASRec; original: that of its authors' code, with the same parameters",
    ),
    "positions": Key(
        None, one_of("start", "end"), "where positions are counted from: the first item of a history or the last"
    ),
    "attention": Key(
        None,
        one_of("auto", "sdpa", "packed", "recbole"),
        "attention; packed: no layer works on padding; auto: packed where at most half of a training batch is real, or "
        "sdpa",
    ),
    "accumulate_steps": Key(None, integer(1), "batches whose gradients make one step, as if they were one batch"),
    "amp_dtype": Key(None, one_of(*DTYPES), "autocast dtype of training; auto: bfloat16 on GPUs that have it"),
    "cuda_graph": Key(None, one_of("auto", True, False), "launch a training step as one CUDA graph; auto: small ones"),
    "compile_encoder": Key(
        None,
        one_of("auto", True, False),
        "torch.compile of the encoder's training steps; auto: where a run is long enough to pay it back",
    ),
    "checkpoint_interval": Key(
        None,
        real(0, auto=True),
        "seconds between two files of a run at least; auto: so many that saving takes a twentieth of its time at most",
    ),
    "weight_average": Key(
        None,
        Values("auto, none or a number above 0 and at most 1", _share),
        "average the weights over the last part of training, so large a share of it, for validation, test and files; "
        "auto: 0.1 up to 67 million parameters",
    ),
    "adam_betas": Key(
        None, Values("two numbers in [0, 1), such as [0.9, 0.98]", _betas), "beta1 and beta2 of adam and adamw"
    ),
    "repeat_bias": Key(
        None,
        one_of("auto", "learned", "none"),
        "add to the scores of a user's own items what training data say, by how long ago they were; auto: learned, "
        "unless none validates better where users often return",
    ),
    "exclude_seen": Key(None, flag(), "rank a user's earlier items last, in full ranking"),
    "eval_chunk_items": Key(None, integer(1, auto=True), "items scored at a time in full ranking"),
}

FLAG = flag()
TEXT = Values("text", is_text)
SEPARATOR = Values("text within a line", lambda value: is_text(value) and not set(value) & set("\r\n"))
PATH = Values("a path", lambda value: is_text(value) or isinstance(value, os.PathLike))
NAME = Values("the name of a column", is_text)
COLUMNS = Values("a mapping such as {'inter': ['user_id', 'item_id']}, or '*' for the list", _columns)
DECIMALS = integer(0, 15)
LEARNERS = ("adam", "adamw", "sgd", "adagrad", "rmsprop")
LEVELS = ("debug", "info", "warning", "error", "critical")

# Keys that RecBole reads for every model, in the order of its overall.yaml and sample.yaml.
RECBOLE_KEYS: dict[str, Values] = {
    "gpu_id": Values("numbers of GPUs, such as 0 or 0,1, or '' for the CPU", _gpu_id),
    "worker": integer(0, most=1024),
    "use_gpu": FLAG,
    "seed": integer(0, 2**32 - 1),
    "state": or_nothing(any_case(*LEVELS)),
    "reproducibility": FLAG,
    "data_path": PATH,
    "checkpoint_dir": PATH,
    "show_progress": FLAG,
    "save_dataset": FLAG,
    "dataset_save_path": or_nothing(PATH),
    "save_dataloaders": FLAG,
    "dataloaders_save_path": or_nothing(PATH),
    "log_wandb": FLAG,
    "wandb_project": TEXT,
    "shuffle": FLAG,
    "epochs": integer(0),
    "train_batch_size": integer(1),
    "learner": any_case(*LEARNERS),
    "learning_rate": real(0),
    "train_neg_sample_args": or_nothing(
        Values("a mapping such as {'distribution': 'uniform', 'sample_num': 1}, also of popularity", _negatives)
    ),
    "eval_step": integer(0),
    "stopping_step": integer(0),
    "clip_grad_norm": or_nothing(Values("a mapping such as {'max_norm': 5, 'norm_type': 2}", _clip_grad_norm)),
    "weight_decay": real(0),
    "loss_decimal_place": DECIMALS,
    "require_pow": FLAG,
    "enable_amp": FLAG,
    "enable_scaler": FLAG,
    "transform": or_nothing(
        one_of("mask_itemseq", "inverse_itemseq", "crop_itemseq", "reorder_itemseq", "user_defined", "None")
    ),
    "eval_args": Values(
        "a mapping of split ({'LS': 'valid_and_test'}, 'valid_only' or 'test_only'; {'RS': [0.8, 0.1, 0.1]} or 'TS', "
        "three shares), group_by (user or none), order (TO or RO) and mode (full, labeled, uni100, pop100; one or "
        "{'valid': ..., 'test': ...})",
        _eval_args,
    ),
    "repeatable": FLAG,
    "metrics": Values("a name or a list of names", lambda value: is_text(value) or is_list(value, is_text)),
    "topk": Values(
        "an integer >= 1 or a list of them, such as [5, 10]",
        lambda value: integer(1).accepts(value) or (isinstance(value, list) and is_list(value, integer(1).accepts)),
    ),
    "valid_metric": Values("the name of a metric, such as NDCG@10", is_text),
    "valid_metric_bigger": FLAG,
    "eval_batch_size": integer(1),
    "metric_decimal_place": DECIMALS,
    "tail_ratio": or_nothing(real(0)),
    "field_separator": SEPARATOR,
    "seq_separator": SEPARATOR,
    "encoding": or_nothing(Values("a text encoding that Python knows, such as utf-8", _is_encoding)),
    "USER_ID_FIELD": NAME,
    "ITEM_ID_FIELD": NAME,
    "RATING_FIELD": or_nothing(NAME),
    "TIME_FIELD": or_nothing(NAME),
    "seq_len": or_nothing(
        Values("a mapping of columns to lengths >= 1", lambda value: is_mapping(value, integer(1).accepts))
    ),
    "LABEL_FIELD": or_nothing(NAME),
    "threshold": or_nothing(
        Values(
            "one column and a number, such as {'rating': 3}",
            lambda value: is_mapping(value, is_number) and len(value) == 1,
        )
    ),
    "NEG_PREFIX": TEXT,
    "numerical_features": list_of("columns"),
    "load_col": or_nothing(COLUMNS),
    "unload_col": or_nothing(COLUMNS),
    "unused_col": or_nothing(COLUMNS),
    "additional_feat_suffix": or_nothing(
        Values("the suffix of a file, or a list of them", lambda value: is_text(value) or is_list(value, is_text))
    ),
    "rm_dup_inter": or_nothing(one_of("first", "last")),
    "val_interval": or_nothing(
        Values("a mapping of columns to intervals such as '[3,inf)', or to lists of tokens", _wanted)
    ),
    "filter_inter_by_user_or_item": FLAG,
    "user_inter_num_interval": or_nothing(Values(INTERVAL, is_interval)),
    "item_inter_num_interval": or_nothing(Values(INTERVAL, is_interval)),
    "alias_of_user_id": or_nothing(list_of("columns")),
    "alias_of_item_id": or_nothing(list_of("columns")),
    "alias_of_entity_id": or_nothing(list_of("columns")),
    "alias_of_relation_id": or_nothing(list_of("columns")),
    "preload_weight": or_nothing(
        Values("a mapping of columns of ids to columns of vectors", lambda value: is_mapping(value, is_text))
    ),
    "normalize_field": or_nothing(list_of("columns")),
    "normalize_all": or_nothing(FLAG),
    "discretization": or_nothing(
        Values("a mapping of columns to {'method': 'ED', 'bucket': 10} or {'method': 'LD'}", _discretization)
    ),
    "ITEM_LIST_LENGTH_FIELD": NAME,
    "LIST_SUFFIX": TEXT,
    "MAX_ITEM_LIST_LENGTH": integer(1, most=10**6),
    "POSITION_FIELD": NAME,
    "HEAD_ENTITY_ID_FIELD": NAME,
    "TAIL_ENTITY_ID_FIELD": NAME,
    "RELATION_ID_FIELD": NAME,
    "ENTITY_ID_FIELD": NAME,
    "kg_reverse_r": FLAG,
    "entity_kg_num_interval": or_nothing(Values(INTERVAL, is_interval)),
    "relation_kg_num_interval": or_nothing(Values(INTERVAL, is_interval)),
    "benchmark_filename": or_nothing(
        Values(
            "a list of three suffixes, such as ['train', 'valid', 'test']",
            lambda value: is_list(value, is_text) and len(value) == 3,
        )
    ),
}

# Keys of RecBole's SASRec, which its other sequential models share.
SEQUENTIAL_KEYS: dict[str, Values] = {
    "n_layers": integer(1, most=1024),
    "n_heads": integer(1, most=1024),
    "hidden_size": integer(1, most=65536),
    "inner_size": integer(1, most=65536),
    "hidden_dropout_prob": real(0, 1),
    "attn_dropout_prob": real(0, 1),
    "hidden_act": one_of("gelu", "relu", "swish", "tanh", "sigmoid"),
    "layer_norm_eps": real(0),
    "initializer_range": real(0),
}
# What the models of this package take beside or instead of the above.
SASREC_KEYS: dict[str, Values] = SEQUENTIAL_KEYS | {
    "reg_weight": or_nothing(real(0)),
    "train_batch_size": integer(1, auto=True),
    "learning_rate": real(0, auto=True),
    "hidden_dropout_prob": real(0, 1, auto=True),
    "TIME_FIELD": NAME,
    "train_neg_sample_args": Values(
        "~ (nothing): the loss draws its own negatives, see num_negatives and negative_distribution",
        lambda value: value in (None, "None") or (isinstance(value, dict) and value.get("distribution") == "none"),
    ),
    "transform": Values(
        "~ (nothing): every position predicts the next item, so histories stay as they are, padded on the right",
        lambda value: value in (None, "None"),
    ),
}


def takes(default: Any) -> Values | None:
    """What a key of RecBole's own models takes: a value of the kind of its default. None where there is none."""
    if isinstance(default, bool):
        return FLAG
    if isinstance(default, (int, float)):
        return Values("a number", lambda value: isinstance(value, bool) or is_number(value))
    if isinstance(default, list):
        return Values("a list", lambda value: isinstance(value, (list, tuple)))
    return None


def keys_of_package() -> dict[str, Key]:
    """The keys that this package adds to RecBole's: `loss_type`, those that losses declare, and its own.

    Raises:
        UserError: a loss declares a key that RecBole or this package has for something else.
    """
    loss_type = Key(None, one_of("auto", *LOSSES), "training loss; auto: CCE up to 65,536 items, CCE- beyond")
    of_losses = declared()
    for name in of_losses.keys() & (PACKAGE_KEYS.keys() | SASREC_KEYS.keys() | RECBOLE_KEYS.keys() | {"loss_type"}):
        raise UserError(f"a loss declares the key {name!r}, which has another meaning already: give it another name")
    return {"loss_type": loss_type, **of_losses, **PACKAGE_KEYS}


def of_our_models() -> dict[str, Values]:
    """What each key of a registered model takes."""
    return RECBOLE_KEYS | SASREC_KEYS | {name: key.values for name, key in keys_of_package().items()}


def validate_together(config: Mapping[str, Any]) -> None:
    """Check what the models of this package do not take together.

    Raises:
        UserError: names the keys, their values and the valid ones.
    """
    if config.get("architecture") == "original" and config.get("attention") == "recbole":
        raise UserError(
            "attention: 'recbole' is not valid with architecture: original, which RecBole's own layers do not have; it "
            "takes auto, sdpa or packed"
        )
    if config.get("adam_betas") is not None and config["learner"].lower() not in ("adam", "adamw"):
        raise UserError(
            f"adam_betas: {config['adam_betas']} is not for learner: {config['learner']}; adam and adamw take it"
        )
