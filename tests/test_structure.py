"""The house: arrows between files point one way, without a circle, and the library below needs no RecBole."""

from __future__ import annotations

import ast
import functools
import graphlib
from pathlib import Path

import pytest

from tests.process import python

PACKAGE = Path(__file__).parent.parent / "recbole_cce"
# From the ground up: a file may import what stands on lower floors, or in its own room.
FLOORS = (
    ("arrival.py", "errors.py", "files.py"),
    ("keys.py",),
    ("ops",),
    ("nn",),
    ("optim", "distributed", "data"),
    ("training",),
    ("plugin",),
    ("models",),
    ("commands",),
    ("cli.py",),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
FACE = "__init__.py"  # of the package: hands names on, on no floor; what stands above the models may ask its version
LIBRARY = ("ops", "nn", "optim", "distributed")
FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))


def room(file: str) -> str:
    return file.partition("/")[0]


def file_of(module: str) -> str | None:
    """The file of a module of the package, or None where that is no module."""
    path = "/".join(module.split(".")[1:])
    found = [name for name in (f"{path}.py", f"{path}/__init__.py".lstrip("/")) if name in FILES]
    return found[0] if found else None


@functools.cache
def imports(file: str) -> frozenset[str]:
    """The modules and names that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse((PACKAGE / file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports are written with the whole name"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(found)


def arrows(file: str) -> set[str]:
    """The files of the package that a file imports."""
    ours = [name for name in imports(file) if name.split(".")[0] == "recbole_cce"]
    return {file_of(name) or file_of(name.rpartition(".")[0]) for name in ours} - {file, None}


def test_every_room_is_on_a_floor():
    assert {room(file) for file in FILES} - {FACE} <= set(FLOOR)


@pytest.mark.parametrize("file", [file for file in FILES if file != FACE])
def test_arrows_point_down(file):
    for other in arrows(file):
        if other == FACE:
            assert FLOOR[room(file)] > FLOOR["models"]
        else:
            assert room(file) == room(other) or FLOOR[room(file)] > FLOOR[room(other)], f"{file} imports {other}"


def test_there_is_no_circle():
    graph = {file: arrows(file) - {FACE} for file in FILES}
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError, which names the files


@pytest.mark.parametrize("file", [file for file in FILES if room(file) in LIBRARY])
def test_the_library_asks_for_nothing_of_recbole(file):
    assert not [name for name in imports(file) if name.split(".")[0] == "recbole"]


WITHOUT_RECBOLE = """
import importlib
import sys


class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "recbole":
            raise ModuleNotFoundError(name)


sys.meta_path.insert(0, Blocked())
for module in sys.argv[1:]:
    importlib.import_module(module)
"""


def test_the_library_imports_without_recbole():
    """Kernels are imported where a GPU runs them, not before."""
    files = [file for file in FILES if room(file) in LIBRARY and not file.startswith("ops/triton/")]
    modules = [f"recbole_cce.{file[:-3].replace('/', '.')}".removesuffix(".__init__") for file in files]
    process = python("-c", WITHOUT_RECBOLE, *modules)
    assert process.returncode == 0, process.stderr[-2000:]
