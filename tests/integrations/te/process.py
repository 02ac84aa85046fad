"""Tests that run in a process of their own, in which the stand-in for TransformerEngine's extension is installed.

    @with_te
    def test_x(dtype): ...                          imports transformer_engine inside; parametrized as usual

pytest collects and reports the function here; its body runs there, with the same arguments, from torch.manual_seed(0).
What it raises arrives with its traceback; a process that dies fails the test. One process serves all tests of a pytest
process. Fixtures: those with values that can be pickled.
"""

from __future__ import annotations

import atexit
import functools
import importlib
import importlib.util
import inspect
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch


@functools.cache
def _pool() -> ProcessPoolExecutor:
    assert multiprocessing.parent_process() is None, "a process that was started here starts no further ones"
    pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
    atexit.register(pool.shutdown, wait=False, cancel_futures=True)
    return pool


@functools.cache
def _start() -> None:
    torch.set_num_threads(1)
    from tests.integrations.te import stand_in

    stand_in.install()


def _run(module: str, name: str, arguments: dict[str, Any]) -> None:
    """In the other process: one test. What an installation raises is the first test's failure."""
    _start()
    torch.manual_seed(0)
    try:
        inspect.unwrap(getattr(importlib.import_module(module), name))(**arguments)
    except pytest.fail.Exception as failure:  # such as that of pytest.raises; its class cannot be sent
        raise AssertionError(str(failure)) from failure


def with_te(test: Callable[..., None]) -> Callable[..., None]:
    """The test, run in the other process; skipped where TransformerEngine is not installed."""

    @functools.wraps(test)
    def call(**arguments: Any) -> None:
        if importlib.util.find_spec("transformer_engine") is None:
            pytest.skip("transformer_engine is not installed")
        # The whole name: the last part alone may be that of a file elsewhere.
        module = f"tests.integrations.te.{Path(inspect.getfile(test)).stem}"
        _pool().submit(_run, module, test.__name__, arguments).result()

    return call
