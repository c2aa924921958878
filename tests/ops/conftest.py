"""Triton's interpreter, for tests without a GPU."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any
from unittest import mock

import pytest


class Interpreter:
    """A process in which Triton interprets kernels on the CPU: it chooses to when it is imported.

    Called with a function of a module and its arguments it runs that there. What it raises is raised here.
    """

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        self.pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), exact_products)

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with mock.patch.dict(os.environ, TRITON_INTERPRET="1"):  # the first call starts it
            called = self.pool.submit(function, *args, **kwargs)
        try:
            return called.result(timeout=300)
        except (BrokenProcessPool, TimeoutError):  # the next test has one of its own
            self.pool.shutdown(wait=False)
            self.start()
            raise
        except Exception as error:
            if "only 0-dimensional arrays can be converted" in f"{error}{error.__cause__}":
                pytest.skip("the interpreter of this Triton does not run with this NumPy")
            raise


def exact_products() -> None:
    """Products of fp32 are NumPy's in the interpreter: by some CPUs one row's depend on where in a block it stands, so
    that a backward pass would not meet the logits of the forward pass. On a GPU it does."""
    import numpy as np
    import torch

    torch.set_num_threads(1)
    matmul = np.matmul
    np.matmul = lambda a, b, dtype: matmul(a, b, dtype=np.float64).astype(dtype)


@pytest.fixture(scope="session")
def interpreter() -> Iterator[Interpreter]:
    """One for all tests of a worker: starting it takes as long as many of them."""
    pytest.importorskip("triton")
    interpreter = Interpreter()
    yield interpreter
    interpreter.pool.shutdown(cancel_futures=True)
