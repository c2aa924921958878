"""The configuration keys this package adds to RecBole's: what they mean and which values are valid.

Defaults are in properties/model/*.yaml; the command line's --help and every error message come from here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from recbole_cce.losses import LOSSES


@dataclass(frozen=True)
class Key:
    """One configuration key: `accepts(value)` decides, `valid` says in words what it accepts."""

    help: str
    valid: str
    accepts: Callable[[Any], bool]


def _one_of(*options: Any) -> tuple[str, Callable[[Any], bool]]:
    # `is` for booleans: 1 == True, and --mix_x=1 is more likely a mistake than a wish
    return "one of " + ", ".join(map(str, options)), lambda value: any(
        value is option if isinstance(option, bool) else value == option for option in options
    )


def _integer(low: int, high: int | None = None, auto: bool = False) -> tuple[str, Callable[[Any], bool]]:
    span = f"an integer from {low} to {high}" if high is not None else f"an integer >= {low}"
    return (
        span + (" or auto" if auto else ""),
        lambda value: (
            (auto and value == "auto")
            or (
                isinstance(value, int)
                and not isinstance(value, bool)
                and low <= value
                and (high is None or value <= high)
            )
        ),
    )


def _real(low: float, high: float | None = None) -> tuple[str, Callable[[Any], bool]]:
    return (
        f"a number from {low:g} to {high:g}" if high is not None else f"a number >= {low:g}",
        lambda value: (
            isinstance(value, (int, float))
            and not isinstance(value, bool)
            and low <= value < math.inf
            and (high is None or value <= high)
        ),
    )


def _betas(value: Any) -> bool:
    return (
        isinstance(value, (list, tuple))
        and len(value) == 2
        and all(isinstance(beta, (int, float)) and 0 <= beta < 1 for beta in value)
    )


def _seconds() -> tuple[str, Callable[[Any], bool]]:
    valid, accepts = _real(0)
    return f"{valid} or auto", lambda value: value == "auto" or accepts(value)


def _folder_or_flag() -> tuple[str, Callable[[Any], bool]]:
    return "True, False or a folder", lambda value: isinstance(value, bool) or (isinstance(value, str) and value != "")


DTYPES = ("auto", "float32", "bfloat16", "float16")

KEYS: dict[str, Key] = {
    "loss_type": Key("training loss", *_one_of(*LOSSES)),
    "loss_backend": Key("kernels of the loss; auto falls back to torch", *_one_of("auto", "triton", "torch")),
    "loss_dtype": Key("precision of the loss's inputs; auto: that of amp_dtype", *_one_of(*DTYPES)),
    "num_negatives": Key("negatives K per position for CCE-, CE-, BCE, gBCE", *_integer(1, 65536)),
    "negative_sharing": Key("who shares one draw of K negatives", *_one_of("tile", "none", "batch")),
    "negative_distribution": Key("distribution q of the negatives", *_one_of("uniform", "popularity")),
    "negative_alpha": Key("q proportional to count^alpha (popularity)", *_real(0, 10)),
    "logq_correction": Key("subtract log(K q) from negative logits", *_one_of(True, False)),
    "n_buckets": Key("SCE: number of buckets; auto: int(2 sqrt(positions))", *_integer(1, auto=True)),
    "bucket_size_x": Key("SCE: positions per bucket; auto: n_buckets' rule", *_integer(1, auto=True)),
    "bucket_size_y": Key("SCE: items per bucket; auto: 256", *_integer(1, auto=True)),
    "mix_x": Key("SCE: bucket centres as random mixtures of hidden states", *_one_of(True, False)),
    "gbce_t": Key("gBCE: calibration t", *_real(0, 1)),
    "train_targets": Key("targets: every position, or the last as in RecBole", *_one_of("all", "last")),
    "cache_data": Key("binary copy of the data: in its folder, none, or in another folder", *_folder_or_flag()),
    "architecture": Key(
        "recbole: RecBole's SASRec; original: that of its authors' code, with the same parameters",
        *_one_of("recbole", "original"),
    ),
    "attention": Key(
        "attention; packed: no layer works on padding; auto: packed where at most half of a training batch is real, or "
        "sdpa",
        *_one_of("auto", "sdpa", "packed", "recbole"),
    ),
    "amp_dtype": Key("autocast dtype of training; auto: bfloat16 on GPUs that have it", *_one_of(*DTYPES)),
    "cuda_graph": Key("launch a training step as one CUDA graph; auto: small ones", *_one_of("auto", True, False)),
    "compile_encoder": Key(
        "torch.compile of the encoder's training steps; auto: where a run is long enough to pay it back",
        *_one_of("auto", True, False),
    ),
    "checkpoint_interval": Key(
        "seconds between two files of a run at least; auto: so many that saving takes 5% of its time at most",
        *_seconds(),
    ),
    "adam_betas": Key("beta1 and beta2 of adam and adamw", "two numbers in [0, 1), such as [0.9, 0.98]", _betas),
    "exclude_seen": Key("rank a user's earlier items last, in full ranking", *_one_of(True, False)),
    "eval_chunk_items": Key("items scored at a time in full ranking", *_integer(1, auto=True)),
}

# Keys of RecBole that these models read, and where a wrong value would end in an error of torch or Python.
RECBOLE_KEYS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "MAX_ITEM_LIST_LENGTH": _integer(1),
    "n_layers": _integer(1),
    "n_heads": _integer(1),
    "hidden_size": _integer(1),
    "inner_size": _integer(1),
    "hidden_dropout_prob": _real(0, 1),
    "attn_dropout_prob": _real(0, 1),
    "hidden_act": _one_of("gelu", "relu", "swish", "tanh", "sigmoid"),
    "layer_norm_eps": _real(0),
    "initializer_range": _real(0),
    "epochs": _integer(0),
    "train_batch_size": _integer(1, auto=True),
    "eval_batch_size": _integer(1),
    "stopping_step": _integer(0),
    "learning_rate": _real(0),
    "weight_decay": _real(0),
    "seed": _integer(0, 2**32 - 1),
}


def validate(config: Mapping[str, Any]) -> None:
    """Check every key above, and that RecBole neither draws negatives for these models nor changes their histories.

    Raises:
        ValueError: names the key, its value and the valid ones.
    """
    ours = {name: (key.valid, key.accepts) for name, key in KEYS.items()}
    for name, (valid, accepts) in (ours | RECBOLE_KEYS).items():
        if name in config and not accepts(config[name]):
            raise ValueError(f"{name}: {config[name]!r} is not valid; it takes {valid}")
    if config.get("architecture") == "original" and config.get("attention") == "recbole":
        raise ValueError(
            "attention: 'recbole' is not valid with architecture: original, which RecBole's own layers do not have; it "
            "takes auto, sdpa or packed"
        )
    negatives = config.get("train_neg_sample_args")
    if negatives is not None and negatives != "None":
        raise ValueError(
            f"train_neg_sample_args: {negatives!r} is not valid; it takes ~ (nothing): the loss draws its own "
            "negatives, see num_negatives and negative_distribution"
        )
    if config.get("transform") not in (None, "None"):
        raise ValueError(
            f"transform: {config['transform']!r} is not valid; it takes ~ (nothing): every position predicts the next "
            "item, so histories stay as they are, padded on the right"
        )
