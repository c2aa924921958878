"""The models of a comparison, each with settings of its own, from the options of the command that name them."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import recbole
from recbole.config import Config
from recbole.utils import argument_list

from recbole_cce.errors import UserError
from recbole_cce.nn.losses.registry import LOSSES, declared
from recbole_cce.plugin import config_checks, registration
from recbole_cce.plugin.config_sources import read_yaml


@dataclass(frozen=True)
class Variant:
    """A model with settings of its own: one row of the table."""

    name: str
    model: str
    settings: dict[str, str]


def parse_variants(models: str, texts: list[str]) -> list[Variant]:
    """--models=A,B and each --variant=NAME=MODEL,key=value,..."""
    variants = [Variant(model, model, {}) for model in models.split(",") if model]
    for text in texts:
        name, _, definition = text.partition("=")
        model, *pairs = re.split(r",(?=\w+=)", definition)
        if not (name and model) or "," in name or "=" in model:
            raise UserError(f"--variant: {text!r} is not valid; it takes NAME=MODEL,key=value,...")
        settings = dict(pair.split("=", 1) for pair in pairs)
        variants.append(Variant(name, model, settings))
    if not variants:
        raise UserError("--models: '' is not valid; it takes names of models, separated by commas")
    for variant in variants:
        config_checks.check_model(variant.model, "--models" if variant.name == variant.model else "--variant")
        config_checks.check_flags([f"--{key}={value}" for key, value in variant.settings.items()], {}, variant.model)
        if "seed" in variant.settings:
            raise UserError(f"--variant: {variant.name!r} names a seed; --seeds has those of all models")
    names = [variant.name for variant in variants]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"--models: {name!r} is there twice; --variant=NAME={name},key=value gives it another name")
    return variants


def parse_flags(flags: list[str], in_files: dict[str, Any], models: list[str]) -> dict[str, str]:
    """RecBole's keys from --key=value."""
    config_checks.check_flags(flags, in_files, *models)
    settings: dict[str, str] = {}
    for key, value in (flag[2:].split("=", 1) for flag in flags):
        if key in settings:
            raise UserError(f"--{key} is there twice, as {settings[key]!r} and {value!r}")
        settings[key] = value
    return settings


def parse_seeds(text: str) -> list[int]:
    """--seeds=2020,2021."""
    parts = text.split(",")
    if not all(re.fullmatch(r"\d{1,9}", part) for part in parts) or len(set(parts)) < len(parts):
        raise UserError(f"--seeds: {text!r} is not valid; it takes different integers >= 0, separated by commas")
    return [int(part) for part in parts]


def parse_vary(texts: list[str], models: list[str]) -> dict[str, list[str]]:
    """Each --vary=key:value,value; commas in brackets belong to a value."""
    varied = {}
    for text in texts:
        key, _, values = text.partition(":")
        parts = re.split(r",(?![^\[({]*[\])}])", values)
        if not key or not all(parts) or len(set(parts)) < len(parts):
            raise UserError(f"--vary: {text!r} is not valid; it takes key:value,value,... with different values")
        known = set().union(*map(config_checks.known_keys, models)) - {"seed"}
        if key not in known:
            raise UserError(f"--vary: there is no key {key!r}{config_checks.nearest(key, known)}")
        if key in varied:
            raise UserError(f"--vary: {key} is there twice; it takes all its values at once")
        varied[key] = parts
    return varied


def expand(variant: Variant, varied: dict[str, list[str]], config: Any) -> list[Variant]:
    """The variant with each combination of values of the keys that mean something to it, each once."""
    expanded: dict[str, Variant] = {}
    for values in itertools.product(*varied.values()):
        combination = dict(zip(varied, values, strict=True))
        # another loss reads other keys, so that this is known for a combination only
        made = config(replace(variant, settings={**variant.settings, **combination}))
        known = {key: value for key, value in combination.items() if reads(made, key)}
        name = " ".join([variant.name, *(f"{key}={value}" for key, value in known.items())])
        expanded.setdefault(name, Variant(name, variant.model, {**variant.settings, **known}))
    return list(expanded.values())


def reads(config: Config, key: str) -> bool:
    """Whether a key changes anything for a model with its loss."""
    model, package = config["model"], Path(recbole.__file__).parent / "properties"
    # a key of negatives makes auto what reads them
    loss = LOSSES.get("CCE-" if config["loss_type"] == "auto" else config["loss_type"])
    loss = loss if model in registration.MODELS else None
    if loss is not None and key in declared():
        return key in loss.keys
    if model in registration.MODELS and key in registration.defaults(model):
        return True
    files = [package / name for name in (f"model/{model}.yaml", "overall.yaml", "dataset/sample.yaml")]
    return key in argument_list.training_arguments or any(key in read_yaml(file) for file in files if file.is_file())
