"""The command line: RecBole's flags, checked; `doctor`."""

from __future__ import annotations

import argparse
import difflib
import platform
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import recbole
import torch
from recbole.utils import argument_list

import recbole_cce
from recbole_cce import compat, ops, quick_start, registry, settings

EXAMPLES = """examples:
  %(prog)s                                                SASRecCCE on the ml-100k that RecBole ships
  %(prog)s --model=SASRecCCE --dataset=ml-20m             (RecBole downloads known data sets)
  %(prog)s --loss_type=CCE --train_batch_size=256         exact full softmax, other batch size
  %(prog)s --model=SASRecSCE --bucket_size_y=512
  %(prog)s --config_files="my.yaml other.yaml" --epochs=20
  %(prog)s --model=SASRec --dataset=ml-1m                 RecBole's own model, same data and evaluation
  %(prog)s --nproc=4 --gpu_id=0,1,2,3                     four GPUs of this machine
  %(prog)s doctor                                         versions, GPU, active repairs of RecBole

Every other key of RecBole's configuration is a flag too, as --key=value. Flags win over configuration files.
"""


def parser() -> argparse.ArgumentParser:
    """The named flags of RecBole's own script; every configuration key is accepted besides."""
    parser = argparse.ArgumentParser(
        prog="run_recbole_cce.py",
        description="Train and evaluate sequential recommenders with RecBole and memory-efficient losses.",
        epilog=EXAMPLES + "\nkeys added to RecBole's:\n" + keys_help(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--model", help="a model of this package or of RecBole (default: SASRecCCE)")
    parser.add_argument("--dataset", help="name of the data set, a folder in data_path (default: ml-100k)")
    parser.add_argument("--config_files", help="YAML files, separated by spaces; later ones win")
    parser.add_argument("--nproc", type=int, default=1, help="processes on this machine, one GPU each")
    parser.add_argument("--ip", default="localhost", help="address of the first machine")
    parser.add_argument("--port", default="5678", help="port on the first machine")
    parser.add_argument("--world_size", type=int, default=-1, help="processes on all machines (default: nproc)")
    parser.add_argument("--group_offset", type=int, default=0, help="rank of this machine's first process")
    return parser


def keys_help() -> str:
    """One line for each key of settings.KEYS with its default in SASRecCCE."""
    defaults = registry.read_yaml(registry.MODELS["SASRecCCE"])
    return "\n".join(
        f"  --{name}={defaults.get(name, '~')}\n      {key.help}; {key.valid}" for name, key in settings.KEYS.items()
    )


def main(arguments: list[str] | None = None) -> dict[str, Any] | None:
    """Run what the command line asks for and return RecBole's result.

    RecBole's Config reads its --key=value flags from sys.argv by itself.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments == ["doctor"]:
        print(doctor())
        return None
    args, rest = parser().parse_known_args(arguments)
    files = args.config_files.strip().split() if args.config_files else []
    try:
        in_files = {key: value for file in files for key, value in config_file(file).items()}
        model = args.model or in_files.get("model") or "SASRecCCE"
        check_model(model)
        check_flags(rest, in_files, model)
    except ValueError as error:
        parser().error(str(error))
    return quick_start.run(
        model,
        args.dataset or in_files.get("dataset") or "ml-100k",
        config_file_list=files,
        nproc=args.nproc,
        world_size=args.world_size,
        ip=args.ip,
        port=args.port,
        group_offset=args.group_offset,
    )


def config_file(file: str) -> dict[str, Any]:
    """A YAML file of the user's.

    Raises:
        ValueError: there is no such file.
    """
    if not Path(file).is_file():
        raise ValueError(f"--config_files: there is no file {file!r}")
    return registry.read_yaml(file)


def check_model(model: str) -> None:
    """Raise a ValueError with the nearest names where neither RecBole nor we have the model."""
    package = Path(recbole.__file__).parent
    known = set(registry.MODELS)
    for file in (package / "model").glob("*_recommender/*.py"):
        known.update(re.findall(r"^class (\w+)\(", file.read_text(encoding="utf-8"), re.MULTILINE))
    if model not in known:
        raise ValueError(f"--model: there is no model {model!r}{nearest(model, known)}")


def check_flags(flags: list[str], in_files: dict[str, Any], model: str) -> None:
    """Raise a ValueError for a flag that neither RecBole nor we know, with the nearest known one.

    RecBole itself ignores, with a warning, what is not of the form --key=value, and takes any key.
    """
    known = known_keys(model) | set(in_files)
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
    files += [package / "properties" / "overall.yaml", *(package / "properties").glob("dataset/*.yaml")]
    keys = set(settings.KEYS) | {key for file in files if file.is_file() for key in registry.read_yaml(file)}
    for name in ("general", "training", "evaluation", "dataset"):
        keys.update(getattr(argument_list, f"{name}_arguments"))
    for file in package.rglob("*.py"):  # some keys are read, but stand in no YAML file: tail_ratio, encoding, ...
        keys.update(re.findall(r"config\[\s*[\"'](\w+)[\"']\s*\]", file.read_text(encoding="utf-8")))
    return keys


def nearest(name: str, known: set[str]) -> str:
    """'; did you mean ...?' with the known names most like `name`."""
    by_lower = {candidate.lower(): candidate for candidate in known}
    matches = difflib.get_close_matches(name.lower(), by_lower, n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(by_lower[match] for match in matches)}?" if matches else ""


def doctor() -> str:
    """Versions, GPU, whether Triton kernels can run and why not, and the active repairs of RecBole."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError as error:
        triton_version = f"not importable ({error})"
    lines = [
        f"recbole-cce {recbole_cce.__version__}   RecBole {recbole.__version__}",
        f"Python {platform.python_version()}   torch {torch.__version__}   triton {triton_version}",
        f"NumPy {np.__version__}   pandas {pd.__version__}",
    ]
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        lines.append(
            f"GPU {index}: {device.name}, {device.total_memory / 2**30:.0f} GiB, sm_{device.major}{device.minor}"
        )
    reason = ops.triton_unavailable(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    lines.append("Triton kernels can run" if reason is None else f"Triton kernels cannot run: {reason}")
    lines.append("Active repairs of RecBole:")
    lines += [f"  {name}: {sentence}" for name, sentence in compat.ACTIVE.items()]
    return "\n".join(lines)
