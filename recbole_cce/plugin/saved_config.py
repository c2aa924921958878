"""The configuration in a checkpoint: plain values, and RecBole's Config made of them again.

RecBole pickles its Config, which can run any code when it is read, and a Config evaluates the strings it is made of.
What is here does neither.
"""

from __future__ import annotations

from typing import Any

import torch
from recbole.config import Config
from recbole.utils import EvaluatorType, InputType, ModelType, get_model

from recbole_cce.errors import UserError
from recbole_cce.nn.losses.registry import LOSSES
from recbole_cce.plugin import config_checks, extensions, registration
from recbole_cce.training.checkpoint import OF_ONE_RUN, kept

ENUMS = {"MODEL_TYPE": ModelType, "MODEL_INPUT_TYPE": InputType, "eval_type": EvaluatorType}


class RebuiltConfig(Config):
    """A Config of what kept() made of another one; no file or command line is read, and nothing is evaluated."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.compatibility_settings()
        self._init_parameters_category()
        self.model, self.dataset, self.model_class = values["model"], values["dataset"], get_model(values["model"])
        values = {key: value for key, value in values.items() if key not in OF_ONE_RUN}
        enums = {key: kind[values[key]] for key, kind in ENUMS.items() if values.get(key) is not None}
        on_gpu = values["gpu_id"] and torch.cuda.is_available()
        of_this_run = {
            "device": torch.device("cuda" if on_gpu else "cpu"),
            "single_spec": True,
            "local_rank": 0,
            "dataset_save_path": None,
            "dataloaders_save_path": None,
        }
        self.final_config_dict = values | enums | of_this_run


def rebuilt(values: dict[str, Any]) -> Config:
    """The Config that kept() gave the values of, for one process on this machine.

    Raises:
        UserError: they name a model or a loss that nobody has registered.
    """
    model, loss = str(values["model"]), values.get("loss_type")
    config_checks.check_model(model, "the checkpoint's model", extensions.MISSING)
    if model in registration.MODELS and loss not in (None, "auto", *LOSSES):
        raise UserError(
            f"the checkpoint's loss_type: there is no loss {loss!r}{config_checks.nearest(str(loss), LOSSES)}; "
            + extensions.MISSING
        )
    return RebuiltConfig(values)


# What may differ in a run that goes on from a checkpoint: key -> why. Whatever else differs makes it another run.
STEERS, APPLIED = "says how, where or how long a run works", "holds from the next epoch on"
MAY_DIFFER = dict.fromkeys(
    (
        *("gpu_id", "use_gpu", "worker", "state", "reproducibility", "show_progress", "log_wandb", "wandb_project"),
        *("data_path", "checkpoint_dir", "checkpoint_interval", "cache_data", "save_dataset", "save_dataloaders"),
        *("config_file", "config_files", "epochs", "stopping_step", "eval_step", "loss_decimal_place"),
        *("metrics", "topk", "eval_batch_size", "eval_chunk_items"),
        *("loss_backend", "attention", "cuda_graph", "compile_encoder"),
    ),
    STEERS,
) | dict.fromkeys(
    (
        *(
            "learning_rate",
            "weight_decay",
            "adam_betas",
            "clip_grad_norm",
            "train_batch_size",
            "accumulate_steps",
            "shuffle",
        ),
        *("hidden_dropout_prob", "attn_dropout_prob", "amp_dtype", "loss_dtype", "enable_amp", "enable_scaler"),
        *("num_negatives", "negative_sharing", "n_buckets", "bucket_size_x", "bucket_size_y", "weight_average"),
    ),
    APPLIED,
)


def check_resumed(saved: dict[str, Any], config: Config, file: Any) -> None:
    """Raise a UserError for the first key that makes a resumed run another one than that of its checkpoint.

    A key that an earlier version did not have may have any value; a loss_type that is still to be chosen is compared
    when the data are there.
    """
    present = kept(config)
    if present.get("loss_type") == "auto":
        present["loss_type"] = saved.get("loss_type")
    for key in ["model", "dataset", *saved]:
        if key not in MAY_DIFFER and key not in OF_ONE_RUN and _lists(saved[key]) != _lists(present.get(key)):
            raise UserError(f"{file} is a checkpoint of {key} {saved[key]}, not of {present.get(key)}")


def _lists(value: Any) -> Any:
    """A value with lists for its tuples: files know lists, flags either."""
    if isinstance(value, (list, tuple)):
        return [_lists(item) for item in value]
    return {key: _lists(item) for key, item in value.items()} if isinstance(value, dict) else value
