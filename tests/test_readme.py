"""The README: short, in its order, with figures from raw rows; its Python runs, and it works on an index."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_it_is_short():
    assert len(README.split()) <= 900


def test_its_parts_stand_in_this_order():
    parts = ["![", "| full precision |", "## Install", "## Quick start", "## Try it", "## What you gain", "## Read on"]
    places = [README.index(part) for part in parts]
    assert places == sorted(places)


def test_the_picture_is_small():
    (picture,) = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", README)
    assert 10_000 < (ROOT / picture).stat().st_size < 300_000


def test_its_python_runs_as_it_stands(capsys):
    pytest.importorskip("torchvision")
    names: dict[str, object] = {}
    (text,) = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    exec(compile(text, "README.md", "exec"), names)
    assert names["loss"].isfinite() and "fc" in capsys.readouterr().out  # the printed coverage lists the classifier
    assert all(p.grad is not None and p.grad.isfinite().all() for p in names["model"].parameters())


@pytest.fixture
def describe(monkeypatch):
    """setup.py's long_description, with setup() itself left out."""
    monkeypatch.chdir(ROOT)
    # Not the real ones, which refuse to be imported after somebody's `import distutils`.
    monkeypatch.setitem(sys.modules, "setuptools", SimpleNamespace(Distribution=object, setup=lambda **given: None))
    for name in ("bdist_wheel", "build_py"):
        monkeypatch.setitem(sys.modules, f"setuptools.command.{name}", SimpleNamespace(**{name: object}))
    return runpy.run_path("setup.py")["long_description"]


def relative_links(text: str) -> list[str]:
    return re.findall(r"\]\((?!\w+:|#)[^)]*\)", text)


def test_a_package_index_gets_no_link_that_leads_nowhere(describe):
    assert len(relative_links(README)) > 10
    text = describe(README, {})
    assert not relative_links(text) and "![" not in text
    assert "[Results]" not in text and "Results (`docs/RESULTS.md`)" in text and "see LICENSE" in text
    assert len(text.split()) > 0.9 * len(README.split())


def test_a_package_index_gets_links_to_the_repository_once_it_has_an_address(describe):
    text = describe(README, {"urls": {"Repository": "https://example.org/a/b/"}})
    assert not relative_links(text)
    assert "[Results](https://example.org/a/b/blob/HEAD/docs/RESULTS.md)" in text
    assert "](https://example.org/a/b/raw/HEAD/docs/demo.png)" in text
