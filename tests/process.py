"""Python in a fresh process, as a user starts it: no terminal, nothing imported yet."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parent.parent / "run_recbole_cce.py"


def python_path(folder) -> str:
    """PYTHONPATH with one more folder before what it has."""
    return os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])


def python(*arguments, cwd=None, **environment):
    """Run the interpreter of the tests; returns the finished process with its output as text."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )


def output(code: str, cwd=None) -> str:
    """What a script prints; it stands in a file, so that processes it spawns can import it."""
    script = Path(cwd or ".") / "script.py"
    script.write_text(code)
    process = python("script.py", cwd=cwd)
    assert process.returncode == 0, process.stderr[-3000:]
    return process.stdout
