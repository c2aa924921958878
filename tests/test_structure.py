"""The house: arrows between files point one way, without a circle, and the library below needs no RecBole."""

from __future__ import annotations

import ast
import functools
import graphlib
import re
from pathlib import Path

import pytest
import recbole

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
print([name for name in ("torch._dynamo", "triton", "pandas", "sklearn", "recbole_cce.plugin") if name in sys.modules])
"""


def test_the_library_imports_without_recbole():
    """Kernels are imported where a GPU runs them, not before."""
    files = [file for file in FILES if room(file) in LIBRARY and not file.startswith("ops/triton/")]
    modules = [f"recbole_cce.{file[:-3].replace('/', '.')}".removesuffix(".__init__") for file in files]
    process = python("-c", WITHOUT_RECBOLE, *modules)
    assert process.returncode == 0, process.stderr[-2000:]
    assert process.stdout == "[]\n"  # nothing that takes long beside torch


# What is relied on of RecBole's inside

PAGE = PACKAGE.parent / "docs" / "recbole.md"
# Subclasses of what RecBole has for that: the only files outside plugin/ with names of its inside, as overrides.
SUBCLASSES = ("data/dataset.py", "data/rows.py", "models/cooccurrence.py", "training/trainer.py")


@functools.cache
def parsed(file: str) -> ast.Module:
    return ast.parse((PACKAGE / file).read_text(encoding="utf-8"))


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


@functools.cache
def inside_of_recbole() -> frozenset[str]:
    """Private names that RecBole defines: of functions, classes, attributes."""
    found = set()
    for path in Path(recbole.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                found.add(node.attr)
    return frozenset(filter(private, found))


def relied_on(file: str) -> list[str]:
    """The private names of RecBole that a file uses or overrides."""
    found = set()
    for node in ast.walk(parsed(file)):
        if isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.ClassDef):
            found |= {each.name for each in node.body if isinstance(each, ast.FunctionDef)}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):  # for setattr
            found.add(node.value)
    return sorted(found & inside_of_recbole())


def replaced(file: str) -> list[str]:
    """What a file replaces in RecBole: attributes of its modules and classes that are assigned to."""
    names = set()
    for node in ast.walk(parsed(file)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "recbole":
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            ours = [alias for alias in node.names if alias.name.split(".")[0] == "recbole"]
            names |= {alias.asname or "recbole" for alias in ours}
    found = set()
    for node in ast.walk(parsed(file)):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store | ast.Del):
            owner = ast.unparse(node.value)
            if owner.split(".")[0] in names:
                found.add(f"{owner.rpartition('.')[2]}.{node.attr}")
    return sorted(found)


def test_all_private_names_of_recbole_are_in_the_plugin():
    outside = {file for file in FILES if room(file) != "plugin"}
    assert {file for file in outside if relied_on(file)} == set(SUBCLASSES)
    assert not [file for file in outside if replaced(file)]
    for file in SUBCLASSES:  # an override, or a call of what is inherited
        inherited = [ast.unparse(node) for node in ast.walk(parsed(file)) if isinstance(node, ast.Attribute)]
        for name in relied_on(file):
            owners = {text.rpartition(".")[0] for text in inherited if text.endswith(f".{name}")}
            allowed = ("self", "super()", "super(SequentialDataset, self)", "self.inter_feat")
            assert owners <= set(allowed), f"{file}: {name} of {owners}"


def test_nothing_of_recbole_is_exchanged_for_the_time_of_a_call():
    """What is replaced is replaced once, where RecBole arrives: nothing is put back."""
    plugin = [file for file in FILES if room(file) == "plugin"]
    assert not [file for file in plugin if "unittest" in {name.split(".")[0] for name in imports(file)}]
    for file in FILES:
        for node in ast.walk(parsed(file)):
            if isinstance(node, ast.Try) and node.finalbody:
                assert not replaced_in(node.finalbody, file), file


def replaced_in(body: list[ast.stmt], file: str) -> set[str]:
    stored = {
        f"{ast.unparse(node.value).rpartition('.')[2]}.{node.attr}"
        for statement in body
        for node in ast.walk(statement)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
    }
    return stored & set(replaced(file))


def test_page_of_what_is_relied_on():
    """The table has a row for each file with names of RecBole's inside, or that replaces something of it."""
    rows = [
        f"| `{file}` | {' '.join(f'`{name}`' for name in relied_on(file))} | "
        f"{' '.join(f'`{name}`' for name in replaced(file))} |"
        for file in FILES
        if relied_on(file) or replaced(file)
    ]
    assert re.findall(r"^\| `.*\|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE) == rows, "\n".join(rows)
