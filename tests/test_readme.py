"""The README's snippets run as they stand, and its commands exist."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

import te_nvfp4_cv as nv
from te_nvfp4_cv.recipe.files import load_recipe

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_python_blocks_run_one_after_the_other(capsys, tmp_path, monkeypatch):
    pytest.importorskip("torchvision")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    first, resume, watched = blocks("python")
    exec(compile(first, "README.md", "exec"), names)
    loss = names["loss"]
    assert loss.isfinite() and "fc" in capsys.readouterr().out  # the printed coverage lists the classifier
    assert all(p.grad is not None and p.grad.isfinite().all() for p in names["model"].parameters())
    before = nv.extra_state(names["model"])
    exec(compile(resume, "README.md", "exec"), names)
    assert nv.extra_state(names["model"]) == before == names["last"]["nvfp4"]
    exec(compile(watched, "README.md", "exec"), names)
    run = nv.telemetry.read("runs/mine.jsonl")
    assert list(run.steps) == [0] and run.steps[0]["fc"]["precision"] == "high" and names["loss"] < loss


def test_the_recipe_of_the_readme_loads(tmp_path):
    (text,) = blocks("toml")
    (tmp_path / "mine.toml").write_text(text)
    recipe = load_recipe(tmp_path / "mine.toml")
    assert recipe.disable_rht and [pattern for pattern, _ in recipe.precision] == ["head.*", "backbone.layer4.*"]


def test_the_commands_of_the_readme_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:^|`)make ([a-z-]+)", README, re.MULTILINE))
    assert {"demo", "test", "lint"} <= named <= targets
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert "te-nvfp4-cv" in scripts


def test_files_that_the_readme_names_exist():
    for name in re.findall(r"[\w/.]+/[\w.]+\.(?:md|py)|constraints\.txt|LICENSE", README):
        assert (ROOT / name).exists(), name
