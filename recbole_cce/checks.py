"""What a user can get wrong before anything runs: one ValueError that names the option, its value and valid ones."""

from __future__ import annotations

import difflib
import functools
import re
from pathlib import Path
from typing import Any

import recbole
import torch
from recbole.config import Config
from recbole.utils import argument_list

from recbole_cce import registry, settings
from recbole_cce.config_sources import read_yaml


def check_model(model: str, option: str = "--model") -> None:
    """Raise a ValueError with the nearest names where neither RecBole nor we have the model."""
    package = Path(recbole.__file__).parent
    known = set(registry.MODELS)
    for file in (package / "model").glob("*_recommender/*.py"):
        known.update(re.findall(r"^class (\w+)\(", file.read_text(encoding="utf-8"), re.MULTILINE))
    if model not in known:
        raise ValueError(f"{option}: there is no model {model!r}{nearest(model, known)}")


def check_config(config: Config, nproc: int) -> None:
    """Raise a ValueError for what RecBole notices late and explains badly: an unknown loss_type, too few GPUs."""
    if config["MODEL_INPUT_TYPE"] is None:
        raise ValueError(
            f"loss_type: {config['loss_type']!r} is not valid for {config['model']}, RecBole's losses are CE and BPR; "
            f"{', '.join(registry.MODELS)} have the others"
        )
    gpu_id = config["gpu_id"]
    named, there = len(gpu_id.split(",")), torch.cuda.device_count()
    if 1 < nproc > named:
        raise ValueError(
            f"--nproc={nproc} needs {nproc} GPUs, but gpu_id={gpu_id!r} names {named}; use --gpu_id=0,1,..."
        )
    if 1 < nproc > there:
        raise ValueError(f"--nproc={nproc} needs {nproc} GPUs, but of gpu_id={gpu_id!r} this machine has {there}")


def check_flags(flags: list[str], in_files: dict[str, Any], *models: str) -> None:
    """Raise a ValueError for a flag that neither RecBole nor we know, with the nearest known one.

    RecBole itself ignores, with a warning, what is not of the form --key=value, and takes any key.
    """
    known = set(in_files).union(*map(known_keys, models))
    for flag in flags:
        name = flag.lstrip("-").partition("=")[0]
        if not flag.startswith("--") or flag.count("=") != 1:
            raise ValueError(f"{flag!r} is not understood; flags are written --key=value")
        if name not in known:
            raise ValueError(f"there is no option --{name}{nearest(name, known)}")


def known_keys(model: str) -> set[str]:
    """Every configuration key that RecBole, the model or this package reads."""
    package = Path(recbole.__file__).parent
    files = [registry.MODELS.get(model, package / "properties" / "model" / f"{model}.yaml")]
    files += [package / "properties" / file for file in ("overall.yaml", "dataset/sample.yaml", "dataset/ml-100k.yaml")]
    keys = set(settings.KEYS) | {key for file in files if file.is_file() for key in read_yaml(file)}
    for name in ("general", "training", "evaluation", "dataset"):
        keys.update(getattr(argument_list, f"{name}_arguments"))
    return keys | keys_in_code()


@functools.cache
def keys_in_code() -> set[str]:
    """Keys that RecBole reads; some stand in no YAML file: tail_ratio, encoding, ..."""
    files = Path(recbole.__file__).parent.rglob("*.py")
    pattern = r"config\[\s*[\"'](\w+)[\"']\s*\]"
    return {key for file in files for key in re.findall(pattern, file.read_text(encoding="utf-8"))}


def nearest(name: str, known: set[str]) -> str:
    """'; did you mean ...?' with the known names most like `name`."""
    by_lower = {candidate.lower(): candidate for candidate in known}
    matches = difflib.get_close_matches(name.lower(), by_lower, n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(by_lower[match] for match in matches)}?" if matches else ""
