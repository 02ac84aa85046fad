"""The wheel and the sdist: everything that is needed is in them, and installing moves no torch.

Built from a copy of the tree, so that no build folder is left in the checkout. All of it works offline.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email.parser import HeaderParser
from pathlib import Path

import pytest

import te_nvfp4_cv

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("setuptools") is None or importlib.util.find_spec("pip") is None,
    reason="needs pip and setuptools in the environment: pip install setuptools",
)


def pip(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """A copy of what a build reads."""
    folder = tmp_path_factory.mktemp("tree")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    for name in ("te_nvfp4_cv", "recipes"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    return folder


@pytest.fixture(scope="module")
def wheel(tree, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    result = pip("wheel", "--no-index", "--no-deps", "--no-build-isolation", "-w", folder, ".", cwd=tree)
    assert result.returncode == 0, result.stdout + result.stderr
    (found,) = folder.glob("te_nvfp4_cv-*.whl")
    return found


@pytest.fixture(scope="module")
def metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return HeaderParser().parsestr(archive.read(name).decode())


def test_the_wheel_holds_every_source_file_and_nothing_else(wheel, tree):
    names = set(zipfile.ZipFile(wheel).namelist())
    sources = {
        path.relative_to(tree).as_posix()
        for path in (tree / "te_nvfp4_cv").rglob("*")
        if path.suffix in (".py", ".cpp", ".h", ".html") or path.name == "py.typed"
    }
    recipes = {f"te_nvfp4_cv/recipes/{path.name}" for path in (tree / "recipes").glob("*.toml")}
    assert recipes, "no recipes in the checkout"
    assert "te_nvfp4_cv/py.typed" in sources, "type checkers ignore the annotations of a package without py.typed"
    assert {name for name in names if ".dist-info/" not in name} == sources | recipes
    assert any(name.endswith("/licenses/LICENSE") for name in names)


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    """The unpacked source distribution of the files that git tracks, or of all where there is no git."""
    tree, out = tmp_path_factory.mktemp("checkout"), tmp_path_factory.mktemp("sdist")
    for name in checkout_files():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tree / name)
    (tree / "tests" / "__pycache__").mkdir()
    (tree / "tests" / "__pycache__" / "left.pyc").touch()
    (tree / "runs").mkdir()
    (tree / "runs" / "left.txt").touch()
    build = f"from setuptools import build_meta; print(build_meta.build_sdist({str(out)!r}))"
    done = subprocess.run([sys.executable, "-c", build], cwd=tree, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (archive,) = out.glob("te_nvfp4_cv-*.tar.gz")
    with tarfile.open(archive) as found:
        found.extractall(out, filter="data")
    return out / archive.name.removesuffix(".tar.gz")


def checkout_files() -> list[str]:
    """The files of this checkout that belong to the project, as paths relative to its root."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode == 0 and "pyproject.toml" in listed.stdout.split():
        return [name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]
    skipped = {"__pycache__", "build", "dist", "runs", "wandb"}
    paths = (path.relative_to(ROOT) for path in ROOT.rglob("*") if path.is_file())
    return [
        path.as_posix()
        for path in paths
        if not skipped & set(path.parts) and not any(part.endswith(".egg-info") for part in path.parts)
    ]


def test_the_sdist_holds_the_project_and_nothing_left_over(sdist):
    found = {path.relative_to(sdist).as_posix() for path in sdist.rglob("*") if path.is_file()}
    made = {name for name in found if name in ("PKG-INFO", "setup.cfg") or ".egg-info/" in name}
    missing = set(checkout_files()) - found - {".gitignore"}
    assert not missing, f"add them to MANIFEST.in: {sorted(missing)}"
    assert found - made <= set(checkout_files()), "files that are not the project's"


def test_tests_run_from_the_unpacked_sdist(sdist):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_formats.py", "-k", "e2m1"]
    environment = os.environ | {"PYTHONPATH": str(sdist)}
    done = subprocess.run(command, cwd=sdist, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout + done.stderr


def test_one_version_everywhere(metadata):
    citation = (ROOT / "CITATION.cff").read_text()
    changes = re.findall(r"^## \[?([0-9.]+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert metadata["Version"] == te_nvfp4_cv.__version__ == changes[0]
    assert re.search(r"^version: (.*)$", citation, re.MULTILINE)[1] == te_nvfp4_cv.__version__


def test_authors_are_named_without_an_address(metadata):
    assert metadata["Author"] == "te_nvfp4_cv contributors" and metadata["Author-email"] is None


def test_pre_commit_runs_the_tools_of_the_environment():
    """Hooks that name a repository would be fetched from the network, in versions that constraints.txt does not set."""
    text = (ROOT / ".pre-commit-config.yaml").read_text()
    assert re.findall(r"- repo: (.*)", text) == ["local"]
    assert re.findall(r"entry: (.*)", text) == ["python -m ruff check --force-exclude", "python -m mypy"]


def test_requirements_bound_torch_and_never_pin(metadata):
    core = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert sorted(re.split(r"[<>=!~ ;]", line)[0] for line in core) == ["numpy", "torch"]
    (torch_line,) = (line for line in core if line.startswith("torch"))
    assert ">=2.11" in torch_line and "<2.16" in torch_line
    assert not [line for line in metadata.get_all("Requires-Dist") if "==" in line.split(";")[0]]
    assert set(metadata.get_all("Provides-Extra")) >= {"train", "export", "te", "dev", "triton"}
    assert metadata["License-Expression"] == "Apache-2.0" and metadata["Requires-Python"] == ">=3.11"


def test_torch_is_never_a_build_requirement():
    assert not [name for name in PROJECT["build-system"]["requires"] if name.startswith("torch")]


def test_installing_moves_nothing_that_is_there(tree):
    """pip's own plan for `pip install .` in this environment: this package and no other, no index needed."""
    plan = pip("install", "--dry-run", "--no-index", "--no-build-isolation", "--report", "-", "--quiet", ".", cwd=tree)
    assert plan.returncode == 0, plan.stderr
    planned = [item["metadata"]["name"] for item in json.loads(plan.stdout)["install"]]
    assert [name.replace("-", "_") for name in planned] == ["te_nvfp4_cv"]


def test_the_installed_wheel_finds_its_recipes(wheel, tmp_path):
    target = tmp_path / "site"
    result = pip("install", "--no-index", "--no-deps", "--target", target, wheel, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    code = (
        "from te_nvfp4_cv.recipe.files import list_recipes, load_recipe, recipe_folder\n"
        "print(recipe_folder()); print(len(list_recipes())); print(load_recipe('unet').precision)"
    )
    environment = os.environ | {"PYTHONPATH": str(target)}
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    folder, count, precision = result.stdout.splitlines()
    assert Path(folder) == target / "te_nvfp4_cv" / "recipes"
    assert int(count) == len(list((ROOT / "recipes").glob("*.toml"))) and precision == "(('head', None),)"


def _pins() -> dict[str, str]:
    lines = (line.split("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines())
    return dict(line.split("==") for line in lines if line)


def test_constraints_are_exact_and_cover_the_extras():
    pins = {name.lower().replace("_", "-"): version for name, version in _pins().items()}
    extras = PROJECT["project"]["optional-dependencies"]
    wanted = [*PROJECT["project"]["dependencies"], *(line for lines in extras.values() for line in lines)]
    names = {re.split(r"[<>=!~; ]", line)[0].lower().replace("_", "-") for line in wanted}
    assert names <= set(pins), f"not pinned: {sorted(names - set(pins))}"
    assert (pins["torch"], pins["torchvision"], pins["triton"]) == ("2.13.0", "0.28.0", "3.7.1")


def test_the_entry_point_exists():
    module, name = PROJECT["project"]["scripts"]["te-nvfp4-cv"].split(":")
    assert callable(getattr(importlib.import_module(module), name))
