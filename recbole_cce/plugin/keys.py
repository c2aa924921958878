"""Which values every configuration key takes: the keys of this package with what they mean, and RecBole's own.

Defaults are in properties/model/*.yaml; the command line's --help and every error message come from here.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from recbole_cce.errors import UserError
from recbole_cce.nn.losses.registry import LOSSES

Check = tuple[str, Callable[[Any], bool]]  # what is valid in words, and whether a value is


@dataclass(frozen=True)
class Key:
    """One configuration key: `accepts(value)` decides, `valid` says in words what it accepts."""

    help: str
    valid: str
    accepts: Callable[[Any], bool]


def _one_of(*options: Any) -> Check:
    # `is` for booleans: 1 == True, and --mix_x=1 is more likely a mistake than a wish
    return "one of " + ", ".join(map(str, options)), lambda value: any(
        value is option if isinstance(option, bool) else value == option for option in options
    )


def _integer(low: int, high: int | None = None, auto: bool = False, most: int = 2**31 - 1) -> Check:
    """An integer from low to high, or from low on: to `most`, beyond which nothing works."""
    span = f"an integer >= {low}" if high is None else f"an integer from {low} to {high}"
    if high is None and most < 2**31 - 1:
        span += f" and at most {most}"
    return (
        span + (" or auto" if auto else ""),
        lambda value: (
            (auto and value == "auto")
            or (
                isinstance(value, int)
                and not isinstance(value, bool)
                and low <= value <= (most if high is None else high)
            )
        ),
    )


def _real(low: float, high: float | None = None, auto: bool = False) -> Check:
    span = f"a number from {low:g} to {high:g}" if high is not None else f"a number >= {low:g}"
    return (
        span + (" or auto" if auto else ""),
        lambda value: (
            (auto and value == "auto")
            or (_number(value) and low <= value < math.inf and (high is None or value <= high))
        ),
    )


def _number(value: Any) -> bool:
    whole = isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63  # what torch takes
    return whole or (isinstance(value, float) and not math.isnan(value))


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _is_list(value: Any, accepts: Callable[[Any], bool]) -> bool:
    return isinstance(value, (list, tuple)) and len(value) > 0 and all(map(accepts, value))


def _is_mapping(value: Any, accepts: Callable[[Any], bool]) -> bool:
    return isinstance(value, dict) and all(_is_text(key) and accepts(each) for key, each in value.items())


def _betas(value: Any) -> bool:
    return _is_list(value, lambda beta: _number(beta) and 0 <= beta < 1) and len(value) == 2


def _folder_or_flag() -> Check:
    return "True, False or a folder", lambda value: isinstance(value, bool) or _is_text(value)


def _or_nothing(check: Check) -> Check:
    valid, accepts = check
    return f"{valid}, or ~ (nothing)", lambda value: value is None or accepts(value)


def _list_of(what: str, accepts: Callable[[Any], bool] = _is_text) -> Check:
    return f"a list of {what}", lambda value: _is_list(value, accepts) or value == []


def _columns() -> Check:
    """Of each file (by its suffix) a list of columns, or all of them."""
    return "a mapping such as {'inter': ['user_id', 'item_id']}, or '*' for the list", lambda value: _is_mapping(
        value, lambda names: names == "*" or _is_list(names, _is_text) or names == []
    )


def _seconds() -> tuple[str, Callable[[Any], bool]]:
    valid, accepts = _real(0)
    return f"{valid} or auto", lambda value: value == "auto" or accepts(value)


def intervals(value: Any) -> list[tuple[str, float, float, str]]:
    """The intervals of a text such as `[5,inf)` or `(0,1];[3,4)`: left bracket, ends, right bracket of each.

    Raises:
        UserError: it is no such text.
    """
    found = []
    for part in str(value).split(";"):
        match = re.fullmatch(r"\s*([\[(])([^,]+),([^,]+)([\])])\s*", part)
        try:
            low, high = map(float, match.groups()[1:3])
        except (AttributeError, ValueError):
            low, high = math.nan, math.nan
        if not low <= high:  # NaN, too
            raise UserError(f"{value!r} is not valid; it takes {INTERVAL}")
        found.append((match[1], low, high, match[4]))
    return found


def is_interval(value: Any) -> bool:
    """Whether intervals() takes it."""
    try:
        intervals(value)
    except UserError:
        return False
    return True


INTERVAL = "an interval such as [5,inf) or (0,4.5], or several with ; between them"


def _values(value: Any) -> bool:
    # of a column of numbers an interval, of a column of tokens a list
    return _is_mapping(value, lambda each: (_is_text(each) and is_interval(each)) or isinstance(each, (list, tuple)))


def _is_encoding(value: Any) -> bool:
    try:
        return _is_text(value) and isinstance("a".encode(value), bytes)
    except (LookupError, ValueError):
        return False


def _gpu_id(value: Any) -> bool:
    if isinstance(value, (int, tuple)) and not isinstance(value, bool):
        return all(isinstance(each, int) and each >= -1 for each in (value if isinstance(value, tuple) else [value]))
    one = r"\s*(-1|\d+|(GPU|MIG)-[\w/-]+)\s*"
    return isinstance(value, str) and re.fullmatch(rf"({one}(,{one})*)?", value) is not None


def _clip_grad_norm(value: Any) -> bool:
    def flag(each: Any) -> bool:
        return isinstance(each, bool)

    known = {"max_norm": _number, "norm_type": _number, "error_if_nonfinite": flag, "foreach": flag}
    return (
        isinstance(value, dict)
        and "max_norm" in value
        and all(key in known and known[key](each) for key, each in value.items())
    )


def _negatives(value: Any) -> bool:
    whole = _integer(0)[1]
    known = {
        "distribution": lambda each: each in (None, "None", "none", "uniform", "popularity"),
        "sample_num": lambda each: each == "none" or (whole(each) and each > 0),
        "alpha": lambda each: each == "none" or _number(each),
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
        and all(_number(share) and 0 <= share < math.inf for share in how)
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
            (each.get("method") == "ED" and _integer(1)[1](each.get("bucket"))) or each.get("method") == "LD"
        )

    return _is_mapping(value, how)


DTYPES = ("auto", "float32", "bfloat16", "float16")

KEYS: dict[str, Key] = {
    "loss_type": Key("training loss; auto: CCE up to 65,536 items, CCE- beyond", *_one_of("auto", *LOSSES)),
    "loss_backend": Key("kernels of the loss; auto falls back to torch", *_one_of("auto", "triton", "torch")),
    "loss_dtype": Key("precision of the loss's inputs; auto: that of amp_dtype", *_one_of(*DTYPES)),
    "num_negatives": Key("negatives K per position for CCE-, CE-, BCE, gBCE", *_integer(1, 65536)),
    "negative_sharing": Key("who shares one draw of K negatives", *_one_of("tile", "none", "batch")),
    "negative_distribution": Key("distribution q of the negatives", *_one_of("uniform", "popularity")),
    "negative_alpha": Key("q proportional to count^alpha (popularity)", *_real(0, 10)),
    "logq_correction": Key("subtract log(K q) from negative logits", *_one_of(True, False)),
    "n_buckets": Key("SCE: number of buckets; auto: int(2 sqrt(positions))", *_integer(1, auto=True)),
    "bucket_size_x": Key("SCE: positions per bucket; auto: n_buckets' rule", *_integer(1, auto=True)),
    "bucket_size_y": Key("SCE: items per bucket; auto: 1,024", *_integer(1, auto=True)),
    "mix_x": Key("SCE: bucket centres as random mixtures of hidden states", *_one_of(True, False)),
    "gbce_t": Key("gBCE: calibration t", *_real(0, 1)),
    "train_targets": Key("targets: every position, or the last as in RecBole", *_one_of("all", "last")),
    "cache_data": Key("binary copy of the data: in its folder, none, or in another folder", *_folder_or_flag()),
    "architecture": Key(
        "recbole: RecBole's SASRec; original: that of its authors' code, with the same parameters",
        *_one_of("recbole", "original"),
    ),
    "positions": Key(
        "where positions are counted from: the first item of a history or the last", *_one_of("start", "end")
    ),
    "attention": Key(
        "attention; packed: no layer works on padding; auto: packed where at most half of a training batch is real, or "
        "sdpa",
        *_one_of("auto", "sdpa", "packed", "recbole"),
    ),
    "accumulate_steps": Key(
        "batches whose gradients make one step, as if they were one batch; they fit where that does not", *_integer(1)
    ),
    "amp_dtype": Key("autocast dtype of training; auto: bfloat16 on GPUs that have it", *_one_of(*DTYPES)),
    "cuda_graph": Key("launch a training step as one CUDA graph; auto: small ones", *_one_of("auto", True, False)),
    "compile_encoder": Key(
        "torch.compile of the encoder's training steps; auto: where a run is long enough to pay it back",
        *_one_of("auto", True, False),
    ),
    "checkpoint_interval": Key(
        "seconds between two files of a run at least; auto: so many that saving takes a twentieth of its time at most",
        *_seconds(),
    ),
    "adam_betas": Key("beta1 and beta2 of adam and adamw", "two numbers in [0, 1), such as [0.9, 0.98]", _betas),
    "repeat_bias": Key(
        "add to the scores of a user's own items what training data say, by how long ago they were; auto: learned, "
        "unless none validates better where users often return",
        *_one_of("auto", "learned", "none"),
    ),
    "exclude_seen": Key("rank a user's earlier items last, in full ranking", *_one_of(True, False)),
    "eval_chunk_items": Key("items scored at a time in full ranking", *_integer(1, auto=True)),
}

FLAG = _one_of(True, False)
TEXT: Check = ("text", _is_text)
SEPARATOR: Check = ("text within a line", lambda value: _is_text(value) and not set(value) & set("\r\n"))
PATH: Check = ("a path", lambda value: _is_text(value) or isinstance(value, os.PathLike))
NAME: Check = ("the name of a column", _is_text)
PLACES = _integer(0, 15)
LEARNERS = ("adam", "adamw", "sgd", "adagrad", "rmsprop")
LEVELS = ("debug", "info", "warning", "error", "critical")


def _any_case(*options: str) -> Check:
    return _one_of(*options)[0], lambda value: isinstance(value, str) and value.lower() in options


# Keys that RecBole reads for every model, in the order of its overall.yaml and sample.yaml.
RECBOLE_KEYS: dict[str, Check] = {
    "gpu_id": ("numbers of GPUs, such as 0 or 0,1, or '' for the CPU", _gpu_id),
    "worker": _integer(0, most=1024),
    "use_gpu": FLAG,
    "seed": _integer(0, 2**32 - 1),
    "state": _or_nothing(_any_case(*LEVELS)),
    "reproducibility": FLAG,
    "data_path": PATH,
    "checkpoint_dir": PATH,
    "show_progress": FLAG,
    "save_dataset": FLAG,
    "dataset_save_path": _or_nothing(PATH),
    "save_dataloaders": FLAG,
    "dataloaders_save_path": _or_nothing(PATH),
    "log_wandb": FLAG,
    "wandb_project": TEXT,
    "shuffle": FLAG,
    "epochs": _integer(0),
    "train_batch_size": _integer(1),
    "learner": _any_case(*LEARNERS),
    "learning_rate": _real(0),
    "train_neg_sample_args": _or_nothing(
        ("a mapping such as {'distribution': 'uniform', 'sample_num': 1}, also of popularity", _negatives)
    ),
    "eval_step": _integer(0),
    "stopping_step": _integer(0),
    "clip_grad_norm": _or_nothing(("a mapping such as {'max_norm': 5, 'norm_type': 2}", _clip_grad_norm)),
    "weight_decay": _real(0),
    "loss_decimal_place": PLACES,
    "require_pow": FLAG,
    "enable_amp": FLAG,
    "enable_scaler": FLAG,
    "transform": _or_nothing(
        _one_of("mask_itemseq", "inverse_itemseq", "crop_itemseq", "reorder_itemseq", "user_defined", "None")
    ),
    "eval_args": (
        "a mapping of split ({'LS': 'valid_and_test'}, 'valid_only' or 'test_only'; {'RS': [0.8, 0.1, 0.1]} or 'TS', "
        "three shares), group_by (user or none), order (TO or RO) and mode (full, labeled, uni100, pop100; one or "
        "{'valid': ..., 'test': ...})",
        _eval_args,
    ),
    "repeatable": FLAG,
    "metrics": ("a name or a list of names", lambda value: _is_text(value) or _is_list(value, _is_text)),
    "topk": (
        "an integer >= 1 or a list of them, such as [5, 10]",
        lambda value: _integer(1)[1](value) or (isinstance(value, list) and _is_list(value, _integer(1)[1])),
    ),
    "valid_metric": ("the name of a metric, such as NDCG@10", _is_text),
    "valid_metric_bigger": FLAG,
    "eval_batch_size": _integer(1),
    "metric_decimal_place": PLACES,
    "tail_ratio": _or_nothing(_real(0)),
    "field_separator": SEPARATOR,
    "seq_separator": SEPARATOR,
    "encoding": _or_nothing(("a text encoding that Python knows, such as utf-8", _is_encoding)),
    "USER_ID_FIELD": NAME,
    "ITEM_ID_FIELD": NAME,
    "RATING_FIELD": _or_nothing(NAME),
    "TIME_FIELD": _or_nothing(NAME),
    "seq_len": _or_nothing(("a mapping of columns to lengths >= 1", lambda value: _is_mapping(value, _integer(1)[1]))),
    "LABEL_FIELD": _or_nothing(NAME),
    "threshold": _or_nothing(
        (
            "one column and a number, such as {'rating': 3}",
            lambda value: _is_mapping(value, _number) and len(value) == 1,
        )
    ),
    "NEG_PREFIX": TEXT,
    "numerical_features": _list_of("columns"),
    "load_col": _or_nothing(_columns()),
    "unload_col": _or_nothing(_columns()),
    "unused_col": _or_nothing(_columns()),
    "additional_feat_suffix": _or_nothing(
        ("the suffix of a file, or a list of them", lambda value: _is_text(value) or _is_list(value, _is_text))
    ),
    "rm_dup_inter": _or_nothing(_one_of("first", "last")),
    "val_interval": _or_nothing(
        ("a mapping of columns to intervals such as '[3,inf)', or to lists of tokens", _values)
    ),
    "filter_inter_by_user_or_item": FLAG,
    "user_inter_num_interval": _or_nothing((INTERVAL, is_interval)),
    "item_inter_num_interval": _or_nothing((INTERVAL, is_interval)),
    "alias_of_user_id": _or_nothing(_list_of("columns")),
    "alias_of_item_id": _or_nothing(_list_of("columns")),
    "alias_of_entity_id": _or_nothing(_list_of("columns")),
    "alias_of_relation_id": _or_nothing(_list_of("columns")),
    "preload_weight": _or_nothing(
        ("a mapping of columns of ids to columns of vectors", lambda value: _is_mapping(value, _is_text))
    ),
    "normalize_field": _or_nothing(_list_of("columns")),
    "normalize_all": _or_nothing(FLAG),
    "discretization": _or_nothing(
        ("a mapping of columns to {'method': 'ED', 'bucket': 10} or {'method': 'LD'}", _discretization)
    ),
    "ITEM_LIST_LENGTH_FIELD": NAME,
    "LIST_SUFFIX": TEXT,
    "MAX_ITEM_LIST_LENGTH": _integer(1, most=10**6),
    "POSITION_FIELD": NAME,
    "HEAD_ENTITY_ID_FIELD": NAME,
    "TAIL_ENTITY_ID_FIELD": NAME,
    "RELATION_ID_FIELD": NAME,
    "ENTITY_ID_FIELD": NAME,
    "kg_reverse_r": FLAG,
    "entity_kg_num_interval": _or_nothing((INTERVAL, is_interval)),
    "relation_kg_num_interval": _or_nothing((INTERVAL, is_interval)),
    "benchmark_filename": _or_nothing(
        (
            "a list of three suffixes, such as ['train', 'valid', 'test']",
            lambda value: _is_list(value, _is_text) and len(value) == 3,
        )
    ),
}

# Keys of RecBole's SASRec, which its other sequential models share.
SEQUENTIAL_KEYS: dict[str, Check] = {
    "n_layers": _integer(1, most=1024),
    "n_heads": _integer(1, most=1024),
    "hidden_size": _integer(1, most=65536),
    "inner_size": _integer(1, most=65536),
    "hidden_dropout_prob": _real(0, 1),
    "attn_dropout_prob": _real(0, 1),
    "hidden_act": _one_of("gelu", "relu", "swish", "tanh", "sigmoid"),
    "layer_norm_eps": _real(0),
    "initializer_range": _real(0),
}
# What the models of this package take beside or instead of the above.
SASREC_KEYS: dict[str, Check] = SEQUENTIAL_KEYS | {
    "reg_weight": _or_nothing(_real(0)),
    "train_batch_size": _integer(1, auto=True),
    "learning_rate": _real(0, auto=True),
    "hidden_dropout_prob": _real(0, 1, auto=True),
    "TIME_FIELD": NAME,
    "train_neg_sample_args": (
        "~ (nothing): the loss draws its own negatives, see num_negatives and negative_distribution",
        lambda value: value in (None, "None") or (isinstance(value, dict) and value.get("distribution") == "none"),
    ),
    "transform": (
        "~ (nothing): every position predicts the next item, so histories stay as they are, padded on the right",
        lambda value: value in (None, "None"),
    ),
}


def takes(default: Any) -> Check | None:
    """What a key of RecBole's own models takes: a value of the kind of its default. None where there is none."""
    if isinstance(default, bool):
        return FLAG
    if isinstance(default, (int, float)):
        return "a number", lambda value: isinstance(value, bool) or _number(value)
    if isinstance(default, list):
        return "a list", lambda value: isinstance(value, (list, tuple))
    return None


def refuse(name: str, value: Any, valid: str) -> None:
    """Raise the error of a value that is not valid.

    Raises:
        UserError: always.
    """
    raise UserError(f"{name}: {value!r} is not valid; it takes {valid}")


def validate(config: Mapping[str, Any], table: Mapping[str, Check]) -> None:
    """Check the value of every key of `table` that `config` has.

    Raises:
        UserError: names the key, its value and the valid ones.
    """
    for name, (valid, accepts) in table.items():
        if name in config and not accepts(config[name]):
            refuse(name, config[name], valid)


def of_our_models() -> dict[str, Check]:
    """The table of the models of this package."""
    return RECBOLE_KEYS | SASREC_KEYS | {name: (key.valid, key.accepts) for name, key in KEYS.items()}


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
