"""What importing the ops costs, and what torch.compile takes for constant."""

from __future__ import annotations

from pathlib import Path

import torch

import recbole_cce
from recbole_cce.ops import backend
from tests.process import output

IMPORT = """
import sys, types
package = types.ModuleType("recbole_cce")  # without what recbole_cce itself imports
package.__path__ = [{folder!r}]
sys.modules["recbole_cce"] = package
import recbole_cce.ops
print(*sorted(name for name in sys.modules if name in {heavy}))
"""
HEAVY = {"pandas", "recbole", "scipy", "sympy", "torch._dynamo", "torch._inductor", "triton"}


def test_importing_the_ops_imports_little_but_torch():
    """torch._dynamo alone takes as long as torch."""
    folder = str(Path(recbole_cce.__file__).parent)
    assert output(IMPORT.format(folder=folder, heavy=HEAVY)).split() == []


def test_constants_are_marked_as_torch_marks_them():
    def function():
        return 1

    torch.compiler.assume_constant_result(function)
    marks = dict(function.__dict__)
    function.__dict__.clear()
    assert backend.constant_when_compiled(function) is function
    assert function.__dict__ == marks != {}


def test_what_is_constant_is_not_traced():
    @backend.constant_when_compiled
    def breaks_a_graph():
        return len(torch.nonzero(torch.tensor([0, 1, 1])).tolist())

    compiled = torch.compile(lambda x: x * breaks_a_graph(), fullgraph=True, backend="eager")
    assert compiled(torch.tensor(3)) == 6
