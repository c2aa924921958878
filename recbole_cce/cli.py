"""The command line: RecBole's flags, checked; `compare`, `tune`, `recommend`, `export`, `plan`, `doctor`."""

from __future__ import annotations

import argparse
import errno
import logging
import math
import platform
import re
import shlex
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import numpy as np
import pandas as pd
import torch

import recbole_cce
from recbole_cce import arrival, errors, ops
from recbole_cce.commands import plan, recommend
from recbole_cce.commands.compare import runs
from recbole_cce.commands.tune import command as tuning
from recbole_cce.distributed.processes import RankFailed
from recbole_cce.errors import UserError
from recbole_cce.plugin import (
    config_checks,
    config_keys,
    config_sources,
    entry_points,
    extensions,
    registration,
    repairs,
    saved_config,
)
from recbole_cce.training import checkpoint, interrupts

if TYPE_CHECKING:
    from recbole.config import Config  # its modules are imported after its repairs

EXAMPLES = """examples:
  %(prog)s                                                SASRecCCE on the ml-100k that RecBole ships
  %(prog)s --model=SASRecCCE --dataset=ml-20m             (RecBole downloads known data sets)
  %(prog)s --loss_type=CCE --train_batch_size=256         exact full softmax, other batch size
  %(prog)s --model=SASRecSCE --bucket_size_y=512
  %(prog)s --plugin=my_losses.py --loss_type=MyLoss       a loss of your own: docs/adding.md
  %(prog)s --config_files="my.yaml other.yaml" --epochs=20
  %(prog)s --model=SASRec --dataset=ml-1m                 RecBole's own model, same data and evaluation
  %(prog)s --dataset=ml-20m --resume                      go on with the last run: after a kill, or to more epochs
  %(prog)s --nproc=4 --gpu_id=0,1,2,3                     four GPUs of this machine
  %(prog)s compare --models=SASRec,GRU4Rec,SASRecCCE --vary=num_negatives:64,512 --output=study
  %(prog)s tune --dataset=ml-1m --budget=10m --parallel=8 --output=tuned
  %(prog)s recommend --checkpoint=saved/FILE.pth --k=50 --exclude-seen --output=top.csv
  %(prog)s export --checkpoint=saved/FILE.pth --output=items
  %(prog)s plan --items=1700000 --length=320 --hidden=256 --gpu-memory=24
  %(prog)s doctor                                         versions, GPU, active repairs of RecBole

Every other key of RecBole's configuration is a flag too, as --key=value. Flags win over configuration files.
"""
MOST_GIB = 10**6
TRUST = ("--trust-checkpoint", "--trust_checkpoint")
TRUST_HELP = (
    "read files of pickled objects, which may run any code: a checkpoint of stock RecBole, which is then written anew "
    "as a safe one"
)


def parser() -> argparse.ArgumentParser:
    """The named flags of RecBole's own script; every configuration key is accepted besides."""
    parser = argparse.ArgumentParser(
        description="Train and evaluate sequential recommenders with RecBole and memory-efficient losses.",
        epilog=EXAMPLES + "\nkeys added to RecBole's:\n" + keys_help(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        exit_on_error=False,
        parents=[plugin_parser()],
    )
    parser.add_argument("--model", help="a model of this package or of RecBole (default: SASRecCCE)")
    parser.add_argument("--dataset", help="name of the data set, a folder in data_path (default: ml-100k)")
    parser.add_argument("--config_files", help="YAML files, separated by spaces; later ones win")
    parser.add_argument(
        "--resume",
        nargs="?",
        const=True,
        metavar="FILE",
        help="go on training from a checkpoint; without FILE, from the newest one of this model and data set in "
        "checkpoint_dir. Give the other flags of that run again",
    )
    parser.add_argument(
        *TRUST, action="store_true", help=f"{TRUST_HELP}; a data set that save_dataset or save_dataloaders has written"
    )
    parser.add_argument("--nproc", type=whole(1), default=1, help="processes on this machine, one GPU each")
    parser.add_argument("--ip", default="localhost", help="address of the first machine")
    parser.add_argument("--port", type=whole(1, 2**16 - 1), default=5678, help="port on the first machine")
    parser.add_argument("--world_size", type=whole(-1), default=-1, help="processes on all machines (default: nproc)")
    parser.add_argument("--group_offset", type=whole(0), default=0, help="rank of this machine's first process")
    return parser


def plugin_parser() -> argparse.ArgumentParser:
    """The flag of all commands."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument(
        "--plugin",
        action="append",
        default=[],
        metavar="FILE.py",
        help="a Python file of your own that registers losses or models, which is run; may be repeated",
    )
    return parser


def recommend_parser() -> Parser:
    """Flags of `recommend`."""
    parser = checkpoint_parser("recommend", "Write the best items for each user, in external tokens.")
    parser.add_argument("--output", required=True, help="a .csv or .parquet file: user, item, rank, score")
    parser.add_argument("--k", type=int, default=50, help="items a user (default: 50)")
    parser.add_argument("--users", help="file with one user token a line (default: all users)")
    parser.add_argument("--exclude-seen", action="store_true", help="leave out items that the user has had")
    return parser


def export_parser() -> Parser:
    """Flags of `export`."""
    parser = checkpoint_parser("export", "Write item vectors for a vector index.")
    parser.add_argument("--output", required=True, help="prefix: PREFIX.npy gets the vectors, PREFIX.tsv their tokens")
    return parser


class Parser(argparse.ArgumentParser):
    """A parser of a command, whose errors are UserErrors of one line.

    Args:
        command: its name.
        takes_keys: whether every --key=value is taken besides, as `flags`, and what was given kept as `command`.
    """

    def __init__(self, command: str, description: str, takes_keys: bool = False, **kwargs: Any) -> None:
        super().__init__(
            prog=f"{Path(sys.argv[0]).name} {command}",
            description=description,
            allow_abbrev=False,
            exit_on_error=False,
            parents=[plugin_parser()],
            **kwargs,
        )
        self.takes_keys = takes_keys

    def values(self, args: list[str]) -> argparse.Namespace:
        """The values of a command's flags.

        Raises:
            UserError, argparse.ArgumentError: names the flag.
        """
        if not self.takes_keys:
            known = [option for action in self._actions for option in action.option_strings]
            for name in (word.partition("=")[0] for word in args):
                if name.startswith("--") and name not in known:
                    raise UserError(f"there is no option {name}{config_checks.nearest(name, known)}")
        namespace, flags = self.parse_known_args(args)
        del namespace.plugin  # run_command() has taken them
        if self.takes_keys:
            plugins = [f"--plugin={file}" for file in extensions.FILES.values()]
            namespace.flags, namespace.command = flags, shlex.join([*self.prog.split(), *args, *plugins])
        elif flags:
            raise UserError(f"{flags[0]!r} is not understood; flags are written --option=value")
        return namespace

    def error(self, message: str) -> NoReturn:
        """Raise what argparse would print, without the usage."""
        raise UserError(message)


def compare_parser() -> Parser:
    """Flags of `compare`."""
    parser = Parser(
        "compare",
        "Train and test models side by side on the same splits: tables, significance, figures, a page.",
        takes_keys=True,
        epilog="Every key of RecBole's configuration is a flag too, as --key=value, for all models. A command that was "
        "interrupted goes on where it stopped.",
    )
    parser.add_argument("--models", default="", help="models of this package or of RecBole, separated by commas")
    parser.add_argument(
        "--variant",
        action="append",
        metavar="NAME=MODEL,key=value,...",
        help="a model with settings of its own; may be repeated",
    )
    parser.add_argument(
        "--vary",
        action="append",
        metavar="key:value,value,...",
        help="values of a key, for the models that it means something to; may be repeated",
    )
    parser.add_argument("--dataset", help="name of the data set, a folder in data_path (default: ml-100k)")
    parser.add_argument("--config_files", help="YAML files, separated by spaces; later ones win")
    parser.add_argument("--seeds", default="2020,2021,2022", help="a run of each model for each (default: %(default)s)")
    parser.add_argument("--metric", default="NDCG@10", help="what users are compared by (default: %(default)s)")
    parser.add_argument("--time-limit", type=float, help="seconds after which training ends with the epoch")
    parser.add_argument("--deadline", type=float, help="seconds from now until all has ended, to go on another time")
    parser.add_argument("--parallel", type=int, default=1, help="runs at a time, spread over gpu_id (default: 1)")
    parser.add_argument("--output", required=True, help="folder for tables, figures, page and the runs themselves")
    return parser


def tune_parser() -> Parser:
    """Flags of `tune`."""
    parser = Parser(
        "tune",
        "Search for the settings of a model that validate best: best.yaml, a table, a page. Takes Optuna.",
        takes_keys=True,
        epilog="Every key of RecBole's configuration is a flag too, as --key=value: it has that value in all trials. A "
        "command that was interrupted goes on where it stopped, and one with a larger budget where it ended.",
    )
    parser.add_argument("--model", help="a model of this package or of RecBole (default: SASRecCCE)")
    parser.add_argument("--dataset", help="name of the data set, a folder in data_path (default: ml-100k)")
    parser.add_argument("--config_files", help="YAML files, separated by spaces; later ones win")
    parser.add_argument("--space", metavar="FILE", help="what is searched, as RecBole's `hyper` files or YAML")
    parser.add_argument("--budget", default="10m", help="time for everything: 90s, 10m, 2h (default: %(default)s)")
    parser.add_argument("--parallel", type=whole(1, 1024), default=1, help="trials at a time (default: %(default)s)")
    parser.add_argument("--output", required=True, help="folder for best.yaml, table, page and the trials themselves")
    return parser


def plan_parser() -> Parser:
    """Flags of `plan`."""
    parser = Parser(
        "plan",
        "Predict the peak GPU memory of a training step with each loss, and propose batch size and negatives that fill "
        "a GPU.",
    )
    length, width = whole(1, 10**5), whole(1, 2**12)
    parser.add_argument("--items", type=whole(1, 10**10), required=True, help="items of the catalogue")
    parser.add_argument("--length", type=length, required=True, help="positions of a row: MAX_ITEM_LIST_LENGTH")
    parser.add_argument("--hidden", type=width, required=True, help="hidden_size")
    parser.add_argument("--gpu-memory", type=positive_real, required=True, metavar="GIB", help="memory of the GPU, GiB")
    parser.add_argument("--batch-size", type=whole(1, plan.MOST_ROWS), help="rows of a step (default: proposed)")
    parser.add_argument("--negatives", type=whole(1), help="num_negatives (default: proposed)")
    parser.add_argument("--layers", type=whole(1, 100), default=2, help="n_layers (default: %(default)s)")
    parser.add_argument("--heads", type=width, default=2, help="n_heads (default: %(default)s)")
    parser.add_argument("--inner", type=whole(1, 2**14), default=256, help="inner_size (default: %(default)s)")
    return parser


def whole(low: int, high: int | None = None) -> Callable[[str], int]:
    """The type of an integer >= low, and <= high, of the command line."""

    def number(text: str) -> int:
        most = f" and at most {high:,}" if high is not None else ""
        # of the length of a number of 64 bits, or Python refuses it in words of its own
        if not re.fullmatch(r"-?\d{1,20}", text) or int(text) < low or (high is not None and int(text) > high):
            raise argparse.ArgumentTypeError(f"{text!r} is not valid; it takes an integer >= {low}{most}")
        return int(text)

    return number


def positive_real(text: str) -> float:
    """A number > 0, and no more GiB than any computer has, of the command line."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number <= MOST_GIB:
        raise argparse.ArgumentTypeError(f"{text!r} is not valid; it takes a number > 0 and at most {MOST_GIB:,}")
    return number


def checkpoint_parser(command: str, description: str) -> Parser:
    """A parser of a command that uses a trained model."""
    parser = Parser(command, description)
    parser.add_argument("--checkpoint", required=True, help="file in saved/ that training has written")
    parser.add_argument(*TRUST, action="store_true", help=TRUST_HELP)
    return parser


# name: parser of its flags, function of their values
COMMANDS: dict[str, tuple[Callable[[], Parser], Callable[..., None]]] = {
    "compare": (compare_parser, runs.compare),
    "tune": (tune_parser, tuning.tune),
    "recommend": (recommend_parser, recommend.recommend),
    "export": (export_parser, recommend.export),
    "plan": (plan_parser, plan.plan),
}


def keys_help() -> str:
    """One line for each key that this package adds to RecBole's, with its default in SASRecCCE."""
    defaults = registration.defaults("SASRecCCE")
    return "\n".join(
        f"  --{name}={defaults.get(name, '~')}\n      {key.help}; {key.valid}"
        for name, key in config_keys.keys_of_package().items()
    )


def main() -> None:
    """Run what sys.argv asks for; a mistake of the user's is one line on stderr and exit status 2."""
    try:
        with interrupts.answered(), errors.refusals_of_recbole():
            run_command()
    except KeyboardInterrupt as interrupt:
        if not interrupt.args:  # training says more
            print(
                "\ninterrupted; --resume goes on with training from the last checkpoint, if there is one",
                file=sys.stderr,
            )
        sys.exit(128 + signal.SIGINT)
    except RankFailed as error:
        parser().exit(1, f"{Path(sys.argv[0]).name}: error: {error}\n")
    except Exception as error:
        if not is_users_mistake(error):
            raise
        logging.getLogger().debug("where it was noticed", exc_info=error)
        message = " ".join(str(error).split())
        sys.stderr.write(f"{Path(sys.argv[0]).name}: error: {message}\n")
        sys.exit(2)


def run_command() -> None:
    """What sys.argv asks for, after the files of --plugin: they register what the other flags may name."""
    named, sys.argv[1:] = plugin_parser().parse_known_args(sys.argv[1:])
    extensions.load(named.plugin)
    if sys.argv[1:] == ["doctor"]:
        print(doctor())
    elif sys.argv[1:] and sys.argv[1] in COMMANDS:
        command_parser, command = COMMANDS[sys.argv[1]]
        # RecBole's Config would look for keys in what is left in sys.argv
        flags, sys.argv[1:] = sys.argv[2:], []
        command(**vars(command_parser().values(flags)))
    else:
        entry_points.run(**arguments())


def arguments() -> dict[str, Any]:
    """The arguments of entry_points.run that the command line and its configuration files ask for, checked.

    RecBole's Config reads the --key=value flags from sys.argv by itself.

    Raises:
        UserError, argparse.ArgumentError: names the option, its value and what it takes.
    """
    args, rest = parser().parse_known_args()
    # RecBole's Config reads sys.argv, too, and warns of flags without a value
    sys.argv = [word for word in sys.argv if word not in ("--resume", *TRUST)]
    files = config_sources.file_names(args.config_files)
    in_files = config_sources.read_files(files, "--config_files")
    model = in_files.get("model", "SASRecCCE") if args.model is None else args.model
    dataset = in_files.get("dataset", "ml-100k") if args.dataset is None else args.dataset
    config_checks.check_model(model)
    config_checks.check_dataset(dataset)
    config_checks.check_flags(rest, in_files, model)
    check_processes(args)
    config = entry_points.configuration(model, dataset, files)
    config_checks.check_valid_metric(config)
    config_checks.check_gpus(config, args.nproc)
    checkpoint.check(config)
    asked = {
        "resume": resumed_file(args.resume, args.trust_checkpoint, config),
        "trust_checkpoint": args.trust_checkpoint,
    }
    names = ("nproc", "world_size", "ip", "group_offset")
    return (
        {
            "model": model,
            "dataset": dataset,
            "config_file_list": files,
            "config_dict": {key: value for key, value in asked.items() if value},
        }
        | {name: getattr(args, name) for name in names}
        | {"port": str(args.port)}
    )


def check_processes(args: argparse.Namespace) -> None:
    """Raise a UserError for numbers of processes that do not fit each other, or a port that is taken."""
    if args.world_size != -1 and args.world_size < args.nproc + args.group_offset:
        raise UserError(
            f"--world_size: {args.world_size} is not valid; it takes at least nproc + group_offset, "
            f"{args.nproc} + {args.group_offset}"
        )
    several = args.nproc > 1 or args.world_size > 0
    if several and args.group_offset == 0:  # the first process of this machine listens there
        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as torch does
            try:
                listener.bind((args.ip, args.port))
            except socket.gaierror:
                raise UserError(f"--ip: {args.ip!r} is not valid; it takes the address of the first machine") from None
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    raise UserError(f"--port: {args.port} is in use on {args.ip}; choose another") from None


def resumed_file(resume: str | Literal[True] | None, trust: bool, config: Config) -> str | None:
    """The checkpoint that --resume (True: without a value) asks for, checked before any data is read.

    Raises:
        UserError: there is none, it is damaged, not to be trusted, or one of another run.
    """
    if resume is None:
        return None
    if resume is True:
        file = checkpoint.newest(config["checkpoint_dir"], config["model"], config["dataset"], trust)
    else:
        file = Path(resume)
        if not file.is_file():
            raise UserError(f"--resume: there is no file {resume!r}")
    state = checkpoint.make_safe(file) if trust else checkpoint.read(file)
    saved_config.check_resumed(state["config"], config, f"--resume: {file}")
    return str(file)


def is_users_mistake(error: Exception) -> bool:
    """Whether an error is about what the user gave, files or the network: its one line is all that is of use."""
    return isinstance(error, (UserError, argparse.ArgumentError, OSError))


def doctor() -> str:
    """Versions, GPU, whether Triton kernels can run and why not, and what is repaired of RecBole."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError as error:
        triton_version = f"not importable ({error})"
    lines = [
        f"recbole-cce {recbole_cce.__version__}   RecBole {arrival.RECBOLE_VERSION}",
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
    lines += [f"  {name}: {sentence}" for name, sentence in repairs.ACTIVE.items()]
    idle = [repair.__name__ for repair in repairs.REPAIRS if repair.__name__ not in repairs.ACTIVE]
    lines.append(f"Not needed here: {', '.join(idle) or 'none'}")
    lines.append(f"Answered by the trainer and the data set of {', '.join(registration.MODELS)}:")
    lines += [f"  {problem}: {answer}" for problem, answer in repairs.ELSEWHERE.items()]
    return "\n".join(lines)
