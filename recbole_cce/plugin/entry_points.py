"""Running experiments: RecBole's own entry points, with equal data settings for every model.

`recbole.quick_start`'s run_recbole, objective_function and load_data_and_model work as they are once recbole_cce is
imported; HyperTuning takes recbole.quick_start.objective_function.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator
from logging import getLogger
from typing import Any

import recbole.quick_start
import recbole.quick_start.quick_start as recbole_quick_start
import torch
from recbole.config import Config
from recbole.data import data_preparation
from recbole.utils import get_model, init_logger, init_seed

from recbole_cce.distributed import processes
from recbole_cce.plugin import config_checks, extensions, registration, saved_config, saved_data
from recbole_cce.training import checkpoint

_run = recbole_quick_start.run
_run_recboles = recbole_quick_start.run_recboles
_get_trainer = recbole_quick_start.get_trainer


def run(
    model: str,
    dataset: str,
    config_file_list: list[str] | None = None,
    **kwargs: Any,
) -> dict[str, Any] | None:
    """recbole.quick_start.run, so that RecBole's own models read a data set as ours do.

    RecBole has defaults for ml-100k alone. Ours (properties/dataset) apply to registered models by themselves; for
    RecBole's models they are put before the user's configuration files, which win.

    Args:
        model, dataset, config_file_list: as RecBole's.
        **kwargs: config_dict, saved, nproc, world_size, ip, port, group_offset, as RecBole's. `resume` in config_dict
            names a checkpoint to go on from.

    Returns:
        RecBole's result: best_valid_score, valid_score_bigger, best_valid_result, test_result.
    """
    files = config_files(model, dataset, config_file_list or [])
    return recbole_quick_start.run(model, dataset, config_file_list=files, **kwargs)


def config_files(model: str, dataset: str, files: list[str]) -> list[str]:
    """The user's configuration files, after our defaults of the data set where RecBole's Config does not read them."""
    defaults = registration.dataset_defaults(dataset)
    return [str(defaults), *files] if model not in registration.MODELS and defaults is not None else list(files)


def configuration(model: str, dataset: str, files: list[str], settings: dict[str, Any] | None = None) -> Config:
    """The Config of run(), which RecBole makes anew in it."""
    return Config(model, dataset, config_files(model, dataset, files), settings)


def run_together(
    model: str,
    dataset: str,
    config_file_list: list[str] | None = None,
    config_dict: dict[str, Any] | None = None,
    saved: bool = True,
    nproc: int = 1,
    world_size: int = -1,
    ip: str = "localhost",
    port: str = "5678",
    group_offset: int = 0,
) -> dict[str, Any] | None:
    """RecBole's run; its processes end together, with one error that names the rank.

    Raises:
        RankFailed, UserError: see processes.launch().
    """
    if nproc == 1 and world_size <= 0:
        return _run(model, dataset, config_file_list, config_dict, saved)
    world_size = nproc if world_size == -1 else world_size
    group = {"world_size": world_size, "ip": ip, "port": port, "nproc": nproc, "offset": group_offset}
    queue = multiprocessing.get_context(processes.START_METHOD).SimpleQueue()
    settings = {"config_dict": {**(config_dict or {}), **group}, "queue": queue}
    arguments = (tuple(extensions.FILES), model, dataset, config_file_list, settings)
    processes.launch(run_with_extensions, arguments, nproc)
    return None if queue.empty() else queue.get()  # of the first process of all


def run_with_extensions(rank: int, modules: tuple[str, ...], *args: Any) -> None:
    """run_recboles(), after the user's own `modules`."""
    extensions.load_again(modules)
    run_recboles(rank, *args)


def run_recboles(rank: int, *args: Any) -> None:
    """RecBole's spawn worker. Unpickling it imports recbole_cce, so the models exist in the worker too."""
    share_threads(args[-1]["config_dict"]["nproc"])
    try:
        _run_recboles(rank, *args)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)  # torch would call it a success


def share_threads(processes: int) -> None:
    """Leave this process its share of the CPU: torch's threads wait by spinning, which slows down the other processes.

    OMP_NUM_THREADS, where it is set, is for each process already.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() // processes))


def create_dataset(config: Config) -> Any:
    """RecBole's, for its entry points alone: they go on to train, and valid_metric must be computed."""
    config_checks.check_valid_metric(config)
    return saved_data.create_dataset(config)


_watchers: list[Callable[[Any], None]] = []


@contextlib.contextmanager
def trainers_shown_to(look: Callable[[Any], None]) -> Iterator[None]:
    """Call `look` with each trainer that RecBole's entry points make meanwhile, before it trains."""
    _watchers.append(look)
    try:
        yield
    finally:
        _watchers.remove(look)


def get_trainer(model_type: Any, model_name: str) -> Callable[..., Any]:
    """RecBole's, for its entry points alone: their trainer goes on from the checkpoint that `resume` names."""
    trainer_class = _get_trainer(model_type, model_name)

    def make_trainer(config: Any, model: Any) -> Any:
        trainer = trainer_class(config, model)
        if config["resume"]:
            trainer.resume_checkpoint(config["resume"])
        for look in _watchers:
            look(trainer)
        return trainer

    return make_trainer


def load_data_and_model(model_file: str, trust_checkpoint: bool = False) -> tuple[Any, ...]:
    """RecBole's, of a file that runs no code.

    Args:
        model_file: as RecBole's.
        trust_checkpoint: read a file of pickled objects, as stock RecBole writes them, which may run any code, and
            write it anew as a safe one.

    Returns:
        RecBole's result: config, model, dataset, train_data, valid_data, test_data.

    Raises:
        UserError: names the file and what to do.
    """
    return data_and_model(checkpoint.make_safe(model_file) if trust_checkpoint else checkpoint.read(model_file))


def data_and_model(state: dict[str, Any]) -> tuple[Any, ...]:
    """The same of what the file holds."""
    config = saved_config.rebuilt(state["config"])
    init_logger(config)
    getLogger().info(config)
    init_seed(config["seed"], config["reproducibility"])
    dataset = saved_data.create_dataset(config)
    getLogger().info(dataset)
    loaders = data_preparation(config, dataset)
    init_seed(config["seed"], config["reproducibility"])
    model = get_model(config["model"])(config, loaders[0].dataset).to(config["device"])
    model.load_state_dict(state["state_dict"])
    model.load_other_parameter(state.get("other_parameter"))
    return config, model, dataset, *loaders


def install() -> None:
    """Put the functions above where RecBole's entry points look them up, and its users import them from."""
    recbole_quick_start.run = recbole.quick_start.run = run_together
    recbole_quick_start.run_recboles = run_recboles  # mp.spawn pickles its target by reference
    recbole_quick_start.create_dataset = create_dataset
    recbole_quick_start.get_trainer = get_trainer
    recbole_quick_start.load_data_and_model = recbole.quick_start.load_data_and_model = load_data_and_model
