"""Every public name has an example in its docstring, and the examples run as a user would run them: copied."""

from __future__ import annotations

import doctest
import importlib.util
import inspect
import pydoc
import re
from typing import Any

import pytest

import te_nvfp4_cv as nv

MODULES = ("functional", "export", "telemetry", "sensitivity", "distributed", "fsdp", "tensor_parallel", "te_plugin")
HAVE_LIGHTNING = any(importlib.util.find_spec(package) for package in ("lightning", "pytorch_lightning"))


def public_names() -> dict[str, Any]:
    """Return {dotted name: object} of what users are promised, without modules."""
    found = {f"nv.{name}": getattr(nv, name) for name in nv.__all__}
    for module in MODULES:
        room = getattr(nv, module)
        found |= {f"nv.{module}.{name}": getattr(room, name) for name in room.__all__}
    return {name: value for name, value in found.items() if not inspect.ismodule(value)}


NAMES = public_names()


def examples_of(value: Any, name: str) -> list[doctest.DocTest]:
    return doctest.DocTestFinder(recurse=False).find(value, name, globs={"__name__": "__main__"})


def test_there_are_public_names():
    assert {"nv.nvfp4_autocast", "nv.functional.conv2d", "nv.export.save", "nv.te_plugin.recipe"} <= NAMES.keys()


@pytest.mark.parametrize("name", sorted(NAMES))
def test_the_example_of_a_public_name_runs(name, tmp_path, monkeypatch):
    tests = [test for test in examples_of(NAMES[name], name) if test.examples]
    assert tests, f"{name} has no example in its docstring"
    monkeypatch.chdir(tmp_path)  # some examples write files
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    for test in tests:
        told: list[str] = []
        runner.run(test, out=told.append, clear_globs=True)
        assert not "".join(told), "".join(told)


HELPED = "nvfp4_autocast prepare set_precision NVFP4BlockScaling NVFP4Conv2d coverage load_recipe capture fuse gemm"


@pytest.mark.parametrize("name", HELPED.split())
def test_help_shows_an_example_before_what_is_inherited(name):
    """What help() prints: of a class, the example must stand in its head and not be a method's or torch's."""
    text = pydoc.render_doc(getattr(nv, name), renderer=pydoc.plaintext)
    head = re.split(r"Method resolution order|Methods defined here", text)[0]
    assert "Example:" in head and ">>> " in head


@pytest.mark.skipif(not HAVE_LIGHTNING, reason="PyTorch Lightning is not installed")
def test_the_lightning_plugin_has_an_example():
    from tests import conftest  # noqa: F401  (it makes torchvision importable, which Lightning imports)

    assert any(test.examples for test in examples_of(nv.lightning.NVFP4Precision, "nv.lightning.NVFP4Precision"))


def test_a_wrong_example_is_found():
    def wrong():
        """Example:
        >>> 1 + 1
        3
        """

    (test,) = examples_of(wrong, "wrong")
    told: list[str] = []
    assert doctest.DocTestRunner().run(test, out=told.append).failed == 1 and told
