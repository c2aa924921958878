"""What `auto` means for settings that depend on the data: decided once, when the training split is known.

The rules are short and in terms of the data: see docs/study.md for what they were chosen by.
"""

from __future__ import annotations

import math
from logging import getLogger
from typing import Any

from recbole.config import Config
from recbole.utils import set_color

from recbole_cce.nn.losses.base import Loss
from recbole_cce.nn.losses.sampled import CCEMinus

# loss_type: up to so many items all of them cost about as much as 2,048 negatives
EXACT_ITEMS = 2**16
KEYS_OF_NEGATIVES = CCEMinus.keys.keys() - Loss.keys.keys()

# train_batch_size: targets of a step, a hundredth of an epoch's within these bounds
STEPS_PER_EPOCH, TARGETS_PER_STEP = 100, (4_000, 16_000)
ROWS_OF_LAST = 2048  # train_targets: last, as RecBole

# learning_rate: RecBole's is that of 5,000 targets; it grows with the root of their number
RECBOLE_RATE, RATE_TARGETS, RATE_BOUNDS = 0.001, 5_000, (0.0005, 0.002)

# hidden_dropout_prob: the more targets an item has, the less a model of it needs to be kept from learning them by heart
ENCODER_ITEMS = 1_600  # the encoder of the default size has as many parameters as so many items
MOST_DROPOUT, LEAST_DROPOUT = (0.5, 6), (0.1, 48)  # dropout, and the targets an item from which on it is that


def resolve(config: Config, train: Any) -> None:
    """Put values instead of `auto` into a configuration, and log them.

    Args:
        config: is changed.
        train: the training split, a LeanSequentialDataset.
    """
    chosen: dict[str, Any] = {}

    def choose(key: str, value: Any) -> None:
        if config[key] == "auto":
            config[key] = chosen[key] = value

    targets, rows, items = train.n_targets, len(train), train.item_num - 1
    given = getattr(config, "external_config_dict", {})  # a saved configuration has none
    choose("loss_type", loss_type(items, given))
    if config["train_targets"] == "last":
        choose("train_batch_size", ROWS_OF_LAST)
        choose("learning_rate", RECBOLE_RATE)
    else:
        accumulated = config["accumulate_steps"] or 1
        choose("train_batch_size", max(1, batch_size(targets, rows) // accumulated))
        choose("learning_rate", learning_rate(accumulated * config["train_batch_size"] * targets / rows))
    choose("hidden_dropout_prob", dropout(targets, items))
    if chosen:
        settings = ", ".join(f"{set_color(key, 'blue')}: {value}" for key, value in chosen.items())
        getLogger().info(f"auto, for {targets} targets in {rows} rows and {items} items: {settings}")


def loss_type(items: int, given: dict[str, Any]) -> str:
    """Exact while that is cheap, unless a key of negatives is `given`."""
    return "CCE" if items <= EXACT_ITEMS and not any(key in given for key in KEYS_OF_NEGATIVES) else "CCE-"


def batch_size(targets: int, rows: int) -> int:
    """Rows that have a step's targets on average."""
    least, most = TARGETS_PER_STEP
    step = min(max(targets / STEPS_PER_EPOCH, least), most)
    return max(1, round(step * rows / targets))


def learning_rate(step_targets: float) -> float:
    """Of a step of so many targets."""
    least, most = RATE_BOUNDS
    return round(min(max(RECBOLE_RATE * math.sqrt(step_targets / RATE_TARGETS), least), most), 6)


def dropout(targets: int, items: int) -> float:
    """In a straight line over the logarithm of the targets an item, the encoder being some items."""
    (most, few), (least, many) = MOST_DROPOUT, LEAST_DROPOUT
    share = math.log(targets / (items + ENCODER_ITEMS) / few) / math.log(many / few)
    return round(most + (least - most) * min(max(share, 0.0), 1.0), 2)
