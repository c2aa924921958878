"""What happens when RecBole is imported: it is repaired before any of its modules runs, whoever imports it first.

RecBole's package runs nothing but its version. A finder sees it come, and has the rest of this package follow at once.
Until then nothing here needs RecBole, or takes the time of importing it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import FunctionType, ModuleType
from typing import Any

RECBOLE_VERSION = "1.2.1"
INSTALL_COMMAND = f"pip install --no-deps recbole=={RECBOLE_VERSION}"


class Arrival(MetaPathFinder):
    """Finds RecBole as the other finders do, and calls `then` when its package has run."""

    def __init__(self, then: Callable[[], None]) -> None:
        self.then = then

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """The spec of RecBole's package; of nothing else."""
        if name != "recbole":
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader  # gets a method of its own
            run = loader.exec_module

            def exec_module(module: ModuleType) -> None:
                run(module)
                self.then()
                sys.meta_path.remove(self)

            loader.exec_module = exec_module
        return spec


def follow(then: Callable[[], None]) -> None:
    """Call `then` as soon as RecBole's package is there.

    Where modules of RecBole have run before, it is not too late for what they look up later. It is for a function that
    somebody else's module took from them, and `then` replaces.

    Raises:
        ImportError: there is one; names it and who holds it.
    """
    if sys.modules.get("recbole") is None:
        sys.meta_path.insert(0, Arrival(then))
        return
    before = {name: dict(vars(module)) for name, module in sys.modules.items() if name.startswith("recbole.")}
    then()
    replaced = {
        id(value): f"{name}.{key}"
        for name, members in before.items()
        for key, value in members.items()
        if isinstance(value, FunctionType) and getattr(sys.modules[name], key, None) is not value
    }
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] in ("recbole", "recbole_cce") or not isinstance(module, ModuleType):
            continue
        for key, value in list(vars(module).items()):
            if id(value) in replaced:
                raise ImportError(
                    f"{name}.{key} is {replaced[id(value)]} as it was before its repair: import recbole_cce before "
                    f"RecBole in {name}"
                )


def require() -> None:
    """Import RecBole's package, and what follows it.

    pip cannot resolve RecBole's own requirements on Python >= 3.12 (ray<=2.6.3 has no wheel), so it is no dependency
    of ours that pip could install by itself.

    Raises:
        ImportError: it is not installed, or another version is; names the install command (#2215).
    """
    try:
        import recbole
    except ModuleNotFoundError as error:
        if error.name != "recbole":
            raise
        raise ImportError(f"recbole-cce needs RecBole {RECBOLE_VERSION}. Install it with:  {INSTALL_COMMAND}") from None
    if recbole.__version__ != RECBOLE_VERSION:
        raise ImportError(
            f"recbole-cce needs RecBole {RECBOLE_VERSION}, found {recbole.__version__}. Install it with:  "
            f"{INSTALL_COMMAND}"
        )
