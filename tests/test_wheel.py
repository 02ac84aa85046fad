"""The wheel of `make wheel`: its kernels, what they ask of a system, and that they run without a compiler."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from te_nvfp4_cv.backend import compilation

ROOT = Path(__file__).resolve().parent.parent
# What manylinux_2_17 promises: https://github.com/pypa/auditwheel, manylinux-policy.json.
NEWEST = {"GLIBC": (2, 17), "GLIBCXX": (3, 4, 19), "CXXABI": (1, 3, 7), "GCC": (4, 8, 0)}
pytestmark = [
    pytest.mark.slow,
    pytest.mark.stress,  # building it compiles the kernels for four machines: two minutes
    pytest.mark.timeout(1200),
    pytest.mark.skipif(
        sys.platform != "linux" or platform.machine() != "x86_64" or compilation.compiler() is None,
        reason="the wheel is built on Linux x86-64, with a C++ compiler",
    ),
    pytest.mark.skipif(
        importlib.util.find_spec("setuptools") is None or importlib.util.find_spec("pip") is None,
        reason="needs pip and setuptools in the environment: pip install setuptools",
    ),
]


def run(*command: object, cwd: Path, **environment: str) -> str:
    words = list(map(str, command))
    done = subprocess.run(words, cwd=cwd, env=os.environ | environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    tree, folder = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree / name)
    for name in ("te_nvfp4_cv", "recipes"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    options = ("--no-index", "--no-deps", "--no-build-isolation")
    run(sys.executable, "-m", "pip", "wheel", *options, "-w", folder, ".", cwd=tree, TE_NVFP4_CV_WHEEL="1")
    (found,) = folder.glob("*.whl")
    return found


def test_the_wheel_is_one_platforms_and_carries_all_kernels(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    kernels = {Path(name).name for name in names if name.endswith(".so")}
    assert kernels == {compilation.wheel_object(machine).name for machine in compilation.WHEEL_MACHINES}
    assert all(name.startswith("te_nvfp4_cv/backend/") for name in names if name.endswith(".so"))
    assert wheel.name.endswith("-py3-none-manylinux_2_17_x86_64.whl")


@pytest.mark.skipif(shutil.which("objdump") is None, reason="needs objdump, of binutils")
def test_the_kernels_ask_for_what_the_tag_promises_and_for_no_openmp_runtime(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    kernels = list(tmp_path.rglob("*.so"))
    assert kernels
    for path in kernels:
        text = run("objdump", "-p", path, cwd=tmp_path)
        assert set(re.findall(r"NEEDED +(\S+)", text)) <= {"libc.so.6", "libm.so.6", "libgcc_s.so.1", "libstdc++.so.6"}
        asked = re.findall(r" ([A-Z]+)_([0-9.]+)$", text, re.MULTILINE)
        assert asked
        for library, version in asked:
            assert tuple(map(int, version.split("."))) <= NEWEST[library], f"{path.name}: {library}_{version}"
        assert "GOMP_parallel" in run("objdump", "-T", path, cwd=tmp_path), "compiled without OpenMP"


def test_a_fresh_environment_runs_the_kernels_without_a_compiler(wheel, tmp_path):
    """torch is this environment's, so that nothing is downloaded; `.ci/wheel` does the same with a torch of its own."""
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "fresh", cwd=tmp_path)
    python = tmp_path / "fresh" / "bin" / "python"
    install = ("install", "--no-index", "--no-deps", wheel)
    run(sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python, *install, cwd=tmp_path)
    (packages,) = (tmp_path / "fresh" / "lib").glob("python*/site-packages")
    (packages / "torch.pth").write_text(str(Path(torch.__file__).parents[1]))
    has = set(compilation.features().split())
    machines = [machine for machine, needs in compilation.WHEEL_MACHINES.items() if needs <= has]
    lines = run(python, "-P", ROOT / ".ci" / "wheel_check.py", *machines, cwd=tmp_path).splitlines()
    # The first line is about the kernels that are chosen where nothing is asked for.
    for machine, line in zip([machines[0], *machines], lines, strict=True):
        assert line.startswith(f"{compilation.wheel_object(machine).name}: {machine}, "), line
