"""Files of the user's own that register losses and models, named on the command line.

To read such a file is to run it. So nothing but `--plugin` names one: no configuration file, no data set and no
checkpoint does.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterable
from pathlib import Path

from recbole_cce.errors import UserError

FILES: dict[str, str] = {}  # module -> the file as it was named


def load(files: Iterable[str]) -> None:
    """Import Python files, each under its name, its folder put on sys.path: processes that a run starts inherit that.

    Raises:
        UserError: there is no such file, or it has the name of another module. What the file itself raises is raised.
    """
    for file in files:
        path = Path(file).resolve()
        if path.suffix != ".py" or not path.is_file():
            raise UserError(f"--plugin: {file!r} is not valid; it takes a Python file, such as my_losses.py")
        sys.path[:0] = [str(path.parent)] * (str(path.parent) not in sys.path)
        if not path.stem.isidentifier() or _is_taken(path):
            raise UserError(f"--plugin: {file!r} cannot be imported under its name, {path.stem}: give it another one")
        importlib.import_module(path.stem)
        FILES[path.stem] = file


def _is_taken(path: Path) -> bool:
    """Whether another module has the name of a file, or would be found instead of it."""
    if path.stem in sys.modules:
        origin = getattr(sys.modules[path.stem], "__file__", None)
    else:
        found = importlib.util.find_spec(path.stem)
        origin = found.origin if found else None
    return origin is None or Path(origin).resolve() != path


def load_again(modules: Iterable[str]) -> None:
    """Import, in a process that a run has started, the modules that were imported in the one that started it."""
    for module in modules:
        importlib.import_module(module)


MISSING = "import the module that registers it first; on the command line, --plugin=FILE.py does"
