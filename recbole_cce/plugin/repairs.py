"""Every repair of RecBole 1.2.1, one function each.

Each function acts only where it is needed, names the RecBole issue it answers and returns one sentence saying
what it did, or None where RecBole works unaided. `apply()` runs them all; `ACTIVE` keeps the sentences for
`python run_recbole_cce.py doctor`. `ELSEWHERE` lists what RecBole's Trainer and data set get wrong at scale: that is
answered for *our* models alone, by their data set (data/dataset.py) and their trainer (training/trainer.py).
"""

from __future__ import annotations

import builtins
import contextlib
import importlib
import importlib.metadata
import importlib.util
import os
import secrets
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse
import torch

from recbole_cce import arrival
from recbole_cce.distributed import seeds
from recbole_cce.errors import UserError

ACTIVE: dict[str, str] = {}


def numpy_aliases() -> str | None:
    """Give RecBole the NumPy names it uses (np.float, np.str, ...) on NumPy 2 (#2174, #2215).

    RecBole's own Config.compatibility_settings sets them from np.float_, np.complex_ and np.unicode_, which
    NumPy 2 removed.
    """
    if hasattr(np, "float_"):
        return None
    from recbole.config import Config

    aliases = {
        "bool": np.bool_,
        "int": np.int_,
        "float": np.float64,
        "complex": np.complex128,
        "object": np.object_,
        "str": np.str_,
        "long": np.int_,
        "unicode": np.str_,
    }

    def compatibility_settings(self: object | None = None) -> None:
        for name, value in aliases.items():
            setattr(np, name, value)

    compatibility_settings()  # Interaction needs np.float even where no Config was made
    Config.compatibility_settings = compatibility_settings
    return f"NumPy {np.__version__} lacks np.float_, np.complex_ and np.unicode_; aliases set from current names"


def plain_metrics() -> str | None:
    """Give metrics as plain floats: NumPy 2 prints np.float64(0.13), and torch.load refuses NumPy's numbers (#2155)."""
    from recbole.evaluator import Evaluator

    original = Evaluator.evaluate

    def evaluate(self: Any, dataobject: Any) -> dict[str, float]:
        result = original(self, dataobject)
        result.update((name, float(value)) for name, value in result.items())
        return result

    Evaluator.evaluate = evaluate
    return "metrics are plain floats, in the log and in checkpoints"


def scipy_update() -> str | None:
    """Give SciPy's dok_matrix the private _update back that LightGCN and other graph models call (#2034, #2090)."""
    if hasattr(scipy.sparse.dok_matrix, "_update"):
        return None

    def update(self: Any, values: dict[tuple[int, int], float]) -> None:
        self._dict.update(values)

    scipy.sparse.dok_matrix._update = update
    return f"SciPy {scipy.__version__} lacks dok_matrix._update, which graph models call; it is put back"


def ray_stand_in() -> str | None:
    """Import recbole.quick_start without ray (#1518, #1820, #2215).

    `from ray import tune` is its only use of ray, for one call `tune.report(**metrics)` that matters only
    under ray.tune. The stand-in lives in sys.modules while RecBole is imported and is removed after.
    """
    if "recbole.quick_start" in sys.modules:
        return None
    try:
        from ray import tune  # noqa: F401

        return None
    except Exception as error:  # an old ray fails on NumPy 2 with AttributeError, on new setuptools with others
        reason = f"{type(error).__name__}: {error}"

    broken = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "ray"}
    stand_ins: dict[str, Any] = {name: types.ModuleType(name) for name in ("ray", "ray.tune")}
    for name, stand_in in stand_ins.items():
        stand_in.__spec__ = ModuleSpec(name, loader=None, is_package=True)
        stand_in.__path__ = []
    stand_ins["ray"].tune = stand_ins["ray.tune"]
    stand_ins["ray.tune"].report = lambda *args, **metrics: None
    sys.modules.update(stand_ins)
    try:
        import recbole.quick_start  # noqa: F401
    finally:
        del sys.modules["ray"], sys.modules["ray.tune"]
        sys.modules.update(broken)
    return f"ray is not usable ({reason}); RecBole was imported with a stand-in for ray.tune.report"


def exhaustive_search() -> str | None:
    """Let HyperTuning's default search run with hyperopt > 0.2.5, which wants NumPy's Generator (#1320)."""
    try:
        version = importlib.metadata.version("hyperopt")
    except importlib.metadata.PackageNotFoundError:
        return None
    if tuple(map(int, version.split(".")[:3])) <= (0, 2, 5):
        return None
    from recbole.trainer import hyper_tuning

    class NumPyWithGenerators(types.ModuleType):
        """numpy, but its RandomState is a Generator."""

        random = types.SimpleNamespace(RandomState=np.random.default_rng)  # all that the module asks of it

        def __getattr__(self, name: str) -> Any:
            return getattr(np, name)

    hyper_tuning.np = NumPyWithGenerators("numpy")
    return f"hyperopt {version} refuses the RandomState of RecBole's exhaustive search; it gets a Generator"


def no_anomaly_detection() -> str | None:
    """Keep torch's anomaly detection as it was: importing RecBole's sequential models switches it on (not reported).

    The module of SINE calls torch.autograd.set_detect_anomaly(True) at import, and looking up any sequential model
    imports it: every backward pass of every model is then traced and searched for NaN.
    """
    before = torch.is_anomaly_enabled()
    importlib.import_module("recbole.model.sequential_recommender")
    if torch.is_anomaly_enabled() == before:
        return None
    torch.autograd.set_detect_anomaly(before)
    return "importing RecBole's models switches torch's anomaly detection on; it is off again"


def cross_entropy_defaults() -> str | None:
    """Let `model: SASRec` run with RecBole's own defaults (#955, #1208, #1320).

    RecBole's overall.yaml asks for a sampled negative, and its Config refuses that for sequential models with their
    default `loss_type: CE`, so that each of them needs `train_neg_sample_args: ~`. It is set only where RecBole would
    raise and the user has not said anything about it.
    """
    from recbole.config import Config
    from recbole.utils import ModelType

    original = Config._load_internal_config_dict

    def load_internal_config_dict(self: Any, model: str, model_class: Any, dataset: str) -> None:
        original(self, model, model_class, dataset)
        loss_type = {**self.internal_config_dict, **self.external_config_dict}.get("loss_type")
        if (
            model_class.type == ModelType.SEQUENTIAL
            and not hasattr(model_class, "input_type")
            and loss_type == "CE"
            and "train_neg_sample_args" not in self.external_config_dict
        ):
            self.internal_config_dict["train_neg_sample_args"] = None

    Config._load_internal_config_dict = load_internal_config_dict
    return "sequential models with loss_type CE need no train_neg_sample_args: ~"


def literals_only() -> str:
    """Read values of flags, files and config_dict as literals: RecBole passes them to eval() (not reported)."""
    from recbole_cce.plugin import config_sources

    config_sources.install()
    return "values of flags, files and config_dict are read as literals, not evaluated"


def safe_checkpoints() -> str | None:
    """Make checkpoints that stock torch.load reads with weights_only=True, its default since 2.6 (#2155, #2212).

    RecBole pickles its own classes into them, and reads them onto the device with all that training needs besides the
    weights. They are of plain values and tensors here, written beside their destination and renamed, so that a crash
    leaves the last good one, and read as needed.
    """
    from recbole.model.abstract_recommender import AbstractRecommender
    from recbole.trainer import trainer as module

    from recbole_cce.plugin import saved_config
    from recbole_cce.training import checkpoint

    class TorchWithPlainCheckpoints(types.ModuleType):
        """torch, but with the checkpoints of this package."""

        def __getattr__(self, name: str) -> Any:
            return getattr(torch, name)

        def save(self, state: dict[str, Any], file: str, **options: Any) -> None:
            checkpoint.write(state, Path(file))

        def load(self, file: str, **options: Any) -> dict[str, Any]:
            return checkpoint.read(file)

    def resume_checkpoint(self: Any, resume_file: Path | str) -> dict[str, Any]:
        """RecBole's, which also returns what the file holds.

        Raises:
            UserError: it is damaged, or one of a run that meant something else; names the first such key.
        """
        state = checkpoint.read(resume_file)
        saved_config.check_resumed(state["config"], self.config, resume_file)
        if "optimizer" not in state:
            raise UserError(f"{resume_file} holds a trained model alone: there is nothing to go on with")
        self.model.load_state_dict(state["state_dict"])
        self.model.load_other_parameter(state.get("other_parameter"))
        checkpoint.load_moments(self.optimizer, state["optimizer"])
        self.start_epoch, self.cur_step = state["epoch"] + 1, state["cur_step"]
        self.best_valid_score, self.saved_model_file = state["best_valid_score"], str(resume_file)
        self.logger.info(f"Checkpoint loaded. Resume training from epoch {self.start_epoch}")
        return state

    def load_other_parameter(self: Any, saved: dict[str, Any] | None) -> None:
        device = next((parameter.device for parameter in self.parameters()), torch.device("cpu"))
        for name, value in (saved or {}).items():
            setattr(self, name, checkpoint.as_before(value, getattr(self, name, None), device))

    init = module.Trainer.__init__

    def init_with_plain_config(self: Any, config: Any, model: Any) -> None:
        checkpoint.check(config)  # or it would fail after an epoch
        init(self, config, model)

    module.torch = TorchWithPlainCheckpoints("torch")
    module.Trainer.__init__ = init_with_plain_config
    module.Trainer._checkpoint_state = checkpoint.state_of
    module.Trainer._save_checkpoint = save_checkpoint
    module.Trainer.resume_checkpoint = resume_checkpoint
    AbstractRecommender.load_other_parameter = load_other_parameter
    return f"torch {torch.__version__} loads checkpoints with weights_only=True; they hold plain values and tensors"


def save_checkpoint(trainer: Any, epoch: int, verbose: bool = True, **kwargs: Any) -> None:
    """Trainer._save_checkpoint: atomic, in torch's default pickle protocol.

    Every process calls it, the first one of a machine writes. RecBole lets the others go on meanwhile: they would read
    the file of an older epoch.
    """
    from recbole.utils import set_color

    from recbole_cce.training import checkpoint

    distributed = not trainer.config["single_spec"]
    if distributed:
        checkpoint.share_file_name(trainer)
    if not distributed or trainer.config["local_rank"] == 0:
        destination = Path(kwargs.pop("saved_model_file", trainer.saved_model_file))
        checkpoint.write(trainer._checkpoint_state(epoch), destination)
        if verbose:
            trainer.logger.info(set_color("Saving current", "blue") + f": {destination}")
    if distributed:
        torch.distributed.barrier()


def numbers_alone() -> str | None:
    """Keep LDiffRec from unpickling its item vectors (not reported)."""
    from recbole.model.general_recommender import ldiffrec

    class NumPyWithoutPickles(types.ModuleType):
        """numpy, but it loads numbers alone."""

        def __getattr__(self, name: str) -> Any:
            return getattr(np, name)

        def load(self, file: str, **options: Any) -> np.ndarray:
            return np.load(file)

    ldiffrec.np = NumPyWithoutPickles("numpy")
    return "item vectors of LDiffRec are read as numbers, without pickles"


def names_of_their_own() -> str | None:
    """Give every run files of its own: RecBole names them after the second in which it starts (not reported)."""
    from recbole.trainer import trainer
    from recbole.utils import logger, utils

    original = utils.get_local_time

    def get_local_time() -> str:
        return f"{original()}-{secrets.token_hex(8)}"  # not of the generators that `seed` sets

    utils.get_local_time = logger.get_local_time = trainer.get_local_time = get_local_time
    return "checkpoints and logs of runs that start in one second have different names"


def atomic_files() -> str:
    """Read the files of a data set as they stand, and check what they are asked for (not reported).

    RecBole has pandas guess quotes and missing values, takes any type for any column, and drops other lines than those
    without a user or an item.
    """
    from recbole.data.dataset import Dataset

    from recbole_cce.plugin import reading

    Dataset._load_feat = reading.load_feat
    return "data files are read without quotes and guessed missing values; types of columns are checked"


def token_tables() -> str:
    """Keep tokens in the bytes that they take; give lists of pre-split files the ids of their items (not reported)."""
    from recbole.data.dataset import Dataset, SequentialDataset

    from recbole_cce.plugin import reading

    Dataset._remap = reading.remap
    SequentialDataset._set_alias = reading.set_alias
    SequentialDataset._init_alias = reading.init_alias
    return "tables of tokens take their bytes, not the longest token's for each; pre-split lists share the items' ids"


def counts_by_columns() -> str:
    """Count the interactions of users and items by columns: RecBole takes a Python step for each (not reported)."""
    from recbole.data.dataset import dataset

    from recbole_cce.plugin import reading

    dataset.Counter = reading.counted
    return "interactions are counted without a Python step for each"


def pandas_fill_nan() -> str | None:
    """Fill missing values by assignment: `frame[column].fillna(inplace=True)` does nothing on pandas 3."""
    if not _copies_on_write():
        return None
    from recbole.data.dataset import dataset as module
    from recbole.utils import FeatureType

    def fill_nan(self: Any) -> None:
        for name in self.feat_name_list:
            feat = getattr(self, name)
            for field in feat:
                ftype = self.field2type[field]
                if ftype == FeatureType.TOKEN:
                    feat[field] = feat[field].fillna(0)
                elif ftype == FeatureType.FLOAT:
                    feat[field] = feat[field].fillna(feat[field].mean())
                else:
                    empty = np.array([], dtype=np.int64 if ftype == FeatureType.TOKEN_SEQ else np.float64)
                    feat[field] = [empty if isinstance(value, float) else value for value in feat[field]]

    module.Dataset._fill_nan = fill_nan
    return f"pandas {pd.__version__} ignores fillna(inplace=True) on a column; missing values are assigned"


def _copies_on_write() -> bool:
    frame = pd.DataFrame({"a": [np.nan]})
    with _warnings_ignored():
        frame["a"].fillna(0, inplace=True)
    return bool(frame["a"].isna().any())


@contextlib.contextmanager
def _warnings_ignored() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def pandas_sequence_lengths() -> str | None:
    """Keep `series.agg(len)` the length of each value: pandas 3 passes the whole series to the function.

    RecBole relies on it for every token_seq and float_seq column and for pre-split benchmark files.
    """
    with _warnings_ignored():
        if isinstance(pd.Series([[0, 1], [2]]).agg(len), pd.Series):
            return None
    from recbole.data.dataset import dataset, kg_dataset, sequential_dataset

    def length(value: Any) -> Any:
        return value.map(builtins.len) if isinstance(value, pd.Series) else builtins.len(value)

    # a module's own global shadows the builtin it asks for
    dataset.len = kg_dataset.len = sequential_dataset.len = length
    return f"pandas {pd.__version__} aggregates a whole series; lengths of sequence fields are taken one by one"


def quiet_warnings() -> str | None:
    """Keep warnings about RecBole's own code off the screen: a user can do nothing about them (not reported).

    pandas and torch announce changes that the other repairs answer; pandas 3 hands out read-only arrays, and torch
    warns about the tensors that RecBole makes of them and never writes to.
    """
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"recbole\.")
    # of its files, where they are compiled for the first time by Python 3.12 and later
    warnings.filterwarnings("ignore", category=SyntaxWarning, module=r".*[/\\]recbole[/\\]")
    chained = pd.errors.ChainedAssignmentError  # type: ignore[attr-defined]  # pandas-stubs leaves it out
    warnings.filterwarnings("ignore", category=chained, module=r"recbole\.")
    warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning, r"recbole\.")
    return "warnings of pandas and torch about RecBole's code are off"


def columns_of_options() -> str:
    """Name the option whose column no file has: RecBole ends in a KeyError, or leaves the option out (not reported)."""
    from recbole.data.dataset.dataset import Dataset

    original = Dataset._init_alias

    def init_alias(self: Any) -> None:
        from recbole_cce.plugin import config_checks

        config_checks.check_columns(self)
        original(self)

    Dataset._init_alias = init_alias
    return "options that name a column which no file has are errors"


def whole_downloads() -> str:
    """Download data sets whole or not at all, in one of several processes; without a group, too (#1989, #2050)."""
    from recbole.data.dataset import Dataset

    from recbole_cce.plugin import reading

    Dataset._load_data = reading.load_data
    Dataset._download = reading.download
    return "data sets are downloaded beside their folder, checked and renamed, by one process"


def download_prompt() -> str | None:
    """Download data sets above 1 GB where nobody can answer RecBole's question whether to (not reported)."""
    from recbole.utils import url

    def answer(prompt: str) -> str:
        return input(prompt) if sys.stdin is not None and sys.stdin.isatty() else "y"

    url.input = answer  # a module's own global shadows the builtin it asks for
    return "without a terminal, data sets above 1 GB are downloaded without asking"


def seeds_of_processes() -> str:
    """Give each process of a run random numbers of its own, and the order of rows of several to `seed` (not reported).

    RecBole adds the number of a process to the seed, so that the second one of seed 2020 draws what the first one of
    2021 does, and its DistributedSampler knows no seed at all.
    """
    from recbole.data.dataloader.abstract_dataloader import AbstractDataLoader
    from recbole.trainer.trainer import AbstractTrainer
    from recbole.utils import init_seed

    trainer_init, loader_init = AbstractTrainer.__init__, AbstractDataLoader.__init__

    def init_trainer(self: Any, config: Any, model: Any) -> None:
        trainer_init(self, config, model)  # all have the first one's weights now
        if not config["single_spec"]:
            init_seed(seeds.of_rank(config["seed"], torch.distributed.get_rank()), config["reproducibility"])

    def init_loader(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        loader_init(self, config, *args, **kwargs)
        if not config["single_spec"]:
            self.sampler.seed = seeds.of_order(config["seed"])
            self.generator.manual_seed(seeds.of_rank(config["seed"], torch.distributed.get_rank()))

    AbstractTrainer.__init__, AbstractDataLoader.__init__ = init_trainer, init_loader
    return "processes of one run draw different numbers, and rows come in an order that depends on the seed"


def folders_of_workers() -> str | None:
    """Let several processes make ./log and ./saved at once: each makes a folder that it did not find (not reported)."""
    from recbole.utils import utils

    def ensure_dir(dir_path: str) -> None:
        os.makedirs(dir_path, exist_ok=True)

    utils.ensure_dir.__code__ = ensure_dir.__code__  # other modules hold the function itself
    return "processes of one run do not trip over each other when they make folders"


def collector_keeps_counters() -> str | None:
    """Let ItemCoverage, AveragePopularity, TailPercentage and the like run (#2131, #2191, #2194).

    Collector.get_data_struct calls .cpu() on everything, also on an int and on a Counter. Lists of users for whom fewer
    than k items are left are filled up with what was ranked last (not reported).
    """
    from recbole.evaluator.register import metrics_dict
    from recbole.trainer import trainer

    from recbole_cce.plugin import collector

    trainer.Collector = collector.Collector
    metrics_dict.update(collector.OF_ITEMS)
    return "coverage and popularity metrics no longer crash on .cpu(), and count what was recommended alone"


REPAIRS: list[Callable[[], str | None]] = [
    quiet_warnings,  # first: the next ones import RecBole's files
    numpy_aliases,
    plain_metrics,
    scipy_update,
    ray_stand_in,
    exhaustive_search,
    no_anomaly_detection,
    numbers_alone,
    names_of_their_own,
    cross_entropy_defaults,
    literals_only,
    safe_checkpoints,
    atomic_files,
    token_tables,
    counts_by_columns,
    pandas_fill_nan,
    pandas_sequence_lengths,
    columns_of_options,
    whole_downloads,
    download_prompt,
    seeds_of_processes,
    folders_of_workers,
    collector_keeps_counters,
]

# What is wrong in RecBole -> what answers it, for registered models alone.
ELSEWHERE: dict[str, str] = {
    "full ranking holds [users, items] scores twice (#1866, #1887)": "ranked in chunks, eval_chunk_items",
    "a resumed run has another data order and other random numbers (#1735, #2126)": "both are stored and restored",
    "mixed precision is fp16 only, clips scaled gradients and waits for the GPU in each step": "amp_dtype",
    "metrics over several GPUs count repeated rows twice": "computed over all users together",
    "each interaction copies the user's history, in a Python loop": "histories are gathered per batch",
    "timestamps are sorted as float32, which confuses those within 128 s": "sorted as they stand in the file",
}


def apply() -> None:
    """Run every repair once; ACTIVE then says which ones this machine needed and why."""
    arrival.require()
    for repair in REPAIRS:
        if repair.__name__ not in ACTIVE and (sentence := repair()):
            ACTIVE[repair.__name__] = sentence
