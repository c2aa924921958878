"""Every repair of RecBole 1.2.1, one function each.

Each function acts only where it is needed, names the RecBole issue it answers and returns one sentence saying
what it did, or None where RecBole works unaided. `apply()` runs them all; `ACTIVE` keeps the sentences for
`python run_recbole_cce.py doctor`. What RecBole's Trainer and Collector get wrong at scale for *our* models is
answered by subclasses in trainer.py and evaluation.py.
"""

from __future__ import annotations

import builtins
import contextlib
import importlib
import importlib.util
import os
import sys
import tempfile
import types
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

RECBOLE_VERSION = "1.2.1"
INSTALL_COMMAND = f"pip install --no-deps recbole=={RECBOLE_VERSION}"

ACTIVE: dict[str, str] = {}


def require_recbole() -> None:
    """Raise one ImportError with the install command when RecBole 1.2.1 is not there (#2215).

    pip cannot resolve RecBole's own requirements on Python >= 3.12 (ray<=2.6.3 has no wheel), so it is no
    dependency of ours that pip could install by itself.
    """
    if importlib.util.find_spec("recbole") is None:
        raise ImportError(f"recbole-cce needs RecBole {RECBOLE_VERSION}. Install it with:  {INSTALL_COMMAND}")
    found = importlib.import_module("recbole").__version__
    if found != RECBOLE_VERSION:
        raise ImportError(
            f"recbole-cce needs RecBole {RECBOLE_VERSION}, found {found}. Install it with:  {INSTALL_COMMAND}"
        )


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


@contextlib.contextmanager
def _swapped(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Set an attribute for the length of a with-block."""
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


def ray_stand_in() -> str | None:
    """Import recbole.quick_start without ray (#1518, #1820, #2215).

    `from ray import tune` is its only use of ray, for one call `tune.report(**metrics)` that matters only
    under ray.tune. The stand-in lives in sys.modules while RecBole is imported and is removed after.
    """
    if "recbole.quick_start" in sys.modules:
        return None
    try:
        from ray import tune

        return None
    except Exception as error:  # an old ray fails on NumPy 2 with AttributeError, on new setuptools with others
        reason = f"{type(error).__name__}: {error}"

    broken = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "ray"}
    ray, tune = types.ModuleType("ray"), types.ModuleType("ray.tune")
    for module in (ray, tune):
        module.__spec__ = ModuleSpec(module.__name__, loader=None, is_package=True)
        module.__path__ = []
    ray.tune = tune
    tune.report = lambda *args, **metrics: None
    sys.modules.update({"ray": ray, "ray.tune": tune})
    try:
        import recbole.quick_start  # noqa: F401
    finally:
        del sys.modules["ray"], sys.modules["ray.tune"]
        sys.modules.update(broken)
    return f"ray is not usable ({reason}); RecBole was imported with a stand-in for ray.tune.report"


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


def safe_checkpoints() -> str | None:
    """Make checkpoints that stock torch.load reads with weights_only=True, its default since 2.6 (#2155, #2212).

    RecBole writes pickle protocol 4, which the safe unpickler refuses, with NumPy scalars and its own classes
    inside. The file is also written beside its destination and renamed, so a crash leaves the last good one.
    """
    import yaml
    from recbole.config import Config
    from recbole.model.abstract_recommender import AbstractRecommender
    from recbole.trainer.trainer import Trainer
    from recbole.utils import EvaluatorType, InputType, ModelType

    def subclasses(cls: type) -> Iterator[type]:
        for child in cls.__subclasses__():
            yield child
            yield from subclasses(child)

    # A checkpoint holds the Config, and that the class of its model.
    for package in ("general", "sequential", "context_aware", "knowledge_aware"):
        importlib.import_module(f"recbole.model.{package}_recommender")
    torch.serialization.add_safe_globals(
        [Config, yaml.FullLoader, EvaluatorType, InputType, ModelType, *subclasses(AbstractRecommender)]
    )
    Trainer._checkpoint_state = checkpoint_state
    Trainer._save_checkpoint = save_checkpoint
    return f"torch {torch.__version__} loads checkpoints with weights_only=True; they are written to suit it"


def checkpoint_state(trainer: Any, epoch: int) -> dict[str, Any]:
    """What RecBole stores in a checkpoint, with plain Python numbers."""
    return {
        "config": trainer.config,
        "epoch": epoch,
        "cur_step": trainer.cur_step,
        "best_valid_score": float(trainer.best_valid_score),
        "state_dict": trainer.model.state_dict(),
        "other_parameter": trainer.model.other_parameter(),
        "optimizer": trainer.optimizer.state_dict(),
    }


def save_checkpoint(trainer: Any, epoch: int, verbose: bool = True, **kwargs: Any) -> None:
    """Trainer._save_checkpoint: atomic, in torch's default pickle protocol."""
    if not trainer.config["single_spec"] and trainer.config["local_rank"] != 0:
        return
    destination = Path(kwargs.pop("saved_model_file", trainer.saved_model_file))
    torch.serialization.add_safe_globals([type(trainer.model)])
    handle, temporary = tempfile.mkstemp(dir=destination.parent, prefix=f".{destination.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            torch.save(trainer._checkpoint_state(epoch), file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp makes files that only their owner can read
        os.replace(temporary, destination)
    except BaseException:
        os.unlink(temporary)
        raise
    if verbose:
        from recbole.utils import set_color

        trainer.logger.info(set_color("Saving current", "blue") + f": {destination}")


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def pandas_fill_nan() -> str | None:
    """Fill missing values by assignment: `frame[column].fillna(inplace=True)` does nothing on pandas 3."""
    if not _copy_on_write():
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

    class PandasWithFilledSequences(types.ModuleType):
        """pandas, but read_csv gives "" where a *_seq column has no value (columns are `name:type` there)."""

        def __getattr__(self, name: str) -> Any:
            return getattr(pd, name)

        def read_csv(self, *args: Any, **kwargs: Any) -> pd.DataFrame:
            frame = pd.read_csv(*args, **kwargs)
            for column in frame.columns[frame.columns.str.endswith("_seq")]:
                frame[column] = frame[column].fillna("")
            return frame

    module.Dataset._fill_nan = fill_nan
    module.pd = PandasWithFilledSequences("pandas")
    return f"pandas {pd.__version__} ignores fillna(inplace=True) on a column; missing values are assigned"


def pandas_sequence_lengths() -> str | None:
    """Keep `series.agg(len)` the length of each value: pandas 3 passes the whole series to the function.

    RecBole relies on it for every token_seq and float_seq column and for pre-split benchmark files.
    """
    probe = pd.Series([[0, 1], [2]])
    if isinstance(probe.agg(len), pd.Series):
        return None
    from recbole.data.dataset import dataset, sequential_dataset

    def length(value: Any) -> Any:
        return value.map(builtins.len) if isinstance(value, pd.Series) else builtins.len(value)

    dataset.len = sequential_dataset.len = length  # a module's own global shadows the builtin it asks for
    return f"pandas {pd.__version__} aggregates a whole series; lengths of sequence fields are taken one by one"


def _copy_on_write() -> bool:
    frame = pd.DataFrame({"a": [np.nan]})
    with contextlib.suppress(Exception), _warnings_ignored():
        frame["a"].fillna(0, inplace=True)
    return bool(frame["a"].isna().any())


@contextlib.contextmanager
def _warnings_ignored() -> Iterator[None]:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def download_barrier() -> str | None:
    """Let a single process download a data set: RecBole ends it with torch.distributed.barrier() (#1989, #2050)."""
    from recbole.data.dataset.dataset import Dataset

    original = Dataset._download

    def download(self: Any) -> None:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return original(self)
        with _swapped(torch.distributed, "barrier", lambda *args, **kwargs: None):
            return original(self)

    Dataset._download = download
    return "downloads finish in a single process without a process group"


def collector_keeps_counters() -> str | None:
    """Let ItemCoverage, AveragePopularity, TailPercentage and the like run (#2131, #2191, #2194).

    Collector.get_data_struct calls .cpu() on everything, also on an int and on a Counter.
    """
    from recbole.trainer import trainer

    from recbole_cce.evaluation import Collector

    trainer.Collector = Collector
    return "coverage and popularity metrics no longer crash on .cpu()"


REPAIRS: list[Callable[[], str | None]] = [
    numpy_aliases,
    ray_stand_in,
    no_anomaly_detection,
    safe_checkpoints,
    pandas_fill_nan,
    pandas_sequence_lengths,
    download_barrier,
    collector_keeps_counters,
]


def apply() -> None:
    """Run every repair once; ACTIVE then says which ones this machine needed and why."""
    require_recbole()
    for repair in REPAIRS:
        if repair.__name__ not in ACTIVE and (sentence := repair()):
            ACTIVE[repair.__name__] = sentence
