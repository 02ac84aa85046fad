"""The house: imports point down, optional packages stay in their rooms, every file says what it is for.

Read from the source with ast, so an import inside a function counts like one at the top. The checker itself is tested
on planted violations.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "te_nvfp4_cv"
FLOORS: dict[str, int] = {
    "formats": 0,
    "checks": 0,
    "files": 0,
    "version": 0,
    "recipe": 1,
    "recipe_fields": 1,
    "recipe_files": 1,
    "tensor": 1,
    "tensor_operators": 1,
    "ops": 2,  # dispatch, geometry, native
    "ops.quantize": 3,
    "ops.conv": 4,
    "ops.gemm": 4,
    "ops.norm": 4,
    "plan": 5,
    "faces": 5,
    "multiply": 5,
    "inference": 5,
    "autograd": 5,
    "calls": 5,
    "collectives": 5,
    "functional": 5,
    "gathered": 5,
    "layer": 5,
    "layer_operator": 5,
    "distributed": 5,
    "gather_shards": 5,
    "norm": 5,
    "parallel_conv": 5,
    "producer": 5,
    "scaling": 5,
    "weight_transforms": 5,
    "context": 6,
    "handover": 6,
    "autocast": 6,
    "modules": 7,
    "policy": 7,
    "coverage": 7,
    "coverage_report": 7,
    "norm_modules": 7,
    "learned": 7,
    "fuse": 7,
    "fuse_patterns": 7,
    "fuse_trace": 7,
    "parallel_call": 7,
    "tensor_parallel": 7,
    "fsdp": 7,
    "export": 8,
    "projection": 8,
    "lightning": 8,
    "telemetry": 8,
    "te_plugin": 8,
    "selftest": 8,
    "sensitivity": 8,
    "cli": 9,
    "": 9,
}
ROOMS = {  # package: patterns of the files that may import it
    "triton": "ops/numerics.py ops/decode.py ops/kernels.py ops/*/kernels*.py ops/*/launch.py",
    "wandb": "telemetry/*.py",
    "matplotlib": "telemetry/*.py",
    "plotly": "telemetry/*.py",
    "tensorboard": "telemetry/*.py",
    "onnx": "export/*.py",
    "onnxscript": "export/*.py",
    "onnxruntime": "export/*.py",
    "transformer_engine": "te_plugin.py",
    "lightning": "lightning.py",
    "pytorch_lightning": "lightning.py",
    "accelerate": "",
    "torchvision": "",
}


def floor_of(module: str) -> int | None:
    """The floor of a module named relative to the package: that of the longest prefix in FLOORS."""
    if module == "":
        return FLOORS[""]
    parts = module.split(".")
    names = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((FLOORS[name] for name in names if name in FLOORS), None)


def modules_in(package: Path) -> dict[str, Path]:
    """Module names relative to the package, with their files."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = list(path.relative_to(package).with_suffix("").parts)
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports_of(name: str, path: Path, modules: dict[str, Path]) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of everything the file imports, at any depth, import_module("...") too."""
    in_package = [PACKAGE, *name.split(".")] if name else [PACKAGE]
    here = in_package if path.name == "__init__.py" else in_package[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:  # "from package import module" imports the module
                full = f"{source}.{alias.name}"
                yield node.lineno, full if full.removeprefix(PACKAGE + ".") in modules else source
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.lineno, node.args[0].value


def violations(package: Path) -> list[str]:
    """Everything that breaks the rules of the house below this folder."""
    modules = modules_in(package)
    found = []
    for name, path in modules.items():
        where = path.relative_to(package).as_posix()
        floor = floor_of(name)
        if floor is None:
            found.append(f"{where}: on no floor, add it to FLOORS")
            continue
        if not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))):
            found.append(f"{where}: no docstring")
        for line, target in imports_of(name, path, modules):
            top = target.split(".")[0]
            if top == PACKAGE:
                below = floor_of(target.removeprefix(PACKAGE).removeprefix("."))
                if below is None or below > floor:
                    found.append(f"{where}:{line}: floor {floor} imports {target}, floor {below}")
            elif top in ROOMS and not any(path.relative_to(package).match(room) for room in ROOMS[top].split()):
                found.append(f"{where}:{line}: imports {top} outside its room ({ROOMS[top] or 'none in the package'})")
    return found


def test_the_house_stands():
    assert modules_in(ROOT / PACKAGE), "the package was not found"
    found = violations(ROOT / PACKAGE)
    assert not found, "\n".join(found)


def _plant(folder: Path, name: str, text: str) -> Path:
    package = folder / PACKAGE
    for sub in (package, package / "ops", package / "ops" / "quantize"):
        sub.mkdir(parents=True, exist_ok=True)
        (sub / "__init__.py").write_text('"""A room."""\n')
    (package / "functional.py").write_text('"""Floor 5."""\n')
    path = package / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return package


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("formats.py", '"""x."""\nimport te_nvfp4_cv.functional\n', "formats.py:2: floor 0 imports te_nvfp4_cv.f"),
        ("formats.py", '"""x."""\nfrom te_nvfp4_cv import functional\n', "te_nvfp4_cv.functional, floor 5"),
        ("formats.py", '"""x."""\nfrom te_nvfp4_cv import NVFP4Linear\n', "floor 0 imports te_nvfp4_cv, floor 9"),
        ("tensor.py", '"""x."""\nfrom .ops.quantize import quantize\n', "floor 1 imports te_nvfp4_cv.ops.quantize.matrix"),
        ("ops/quantize/reference.py", '"""x."""\nfrom ... import functional\n', "imports te_nvfp4_cv.functional"),
        ("ops/quantize/reference.py", '"""x."""\nfrom ...functional import f\n', "imports te_nvfp4_cv.functional"),
        ("ops/geometry.py", '"""x."""\ndef f():\n    from ..functional import g\n', "geometry.py:3: floor 2 imports"),
        ("checks.py", '"""x."""\nif TYPE_CHECKING:\n    from te_nvfp4_cv.context.context_manager import a\n', "floor 0 imports"),
        ("recipe.py", '"""x."""\nimport importlib\nimportlib.import_module("te_nvfp4_cv.nn.precision")\n', "floor 1 imports"),
        ("ops/conv/vendor.py", '"""x."""\nimport triton.language as tl\n', "imports triton outside its room"),
        ("functional.py", '"""x."""\ndef f():\n    import wandb\n', "functional.py:3: imports wandb outside its room"),
        ("recipe.py", '"""x."""\nfrom transformer_engine.common import recipe\n', "imports transformer_engine outside"),
        ("cli.py", '"""x."""\n__import__("onnx")\n', "imports onnx outside its room"),
        ("cli.py", "import json\n", "cli.py: no docstring"),
        ("helpers.py", '"""x."""\n', "helpers.py: on no floor"),
    ],
)
def test_a_planted_violation_is_found(tmp_path, name, text, told):
    found = violations(_plant(tmp_path, name, text))
    assert len(found) == 1 and told in found[0]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("ops/quantize/kernels.py", '"""x."""\nimport triton\n'),
        ("ops/quantize/vendor.py", '"""x."""\nfrom . import reference\nfrom ... import checks\n'),
        ("functional.py", '"""x."""\nfrom .ops.quantize import quantize\nimport torch\n'),
        ("te_plugin.py", '"""x."""\ndef f():\n    import transformer_engine\n'),
    ],
)
def test_what_is_allowed_passes(tmp_path, name, text):
    (_plant(tmp_path, name, text) / "checks.py").write_text('"""Floor 0."""\n')
    (tmp_path / PACKAGE / "ops" / "quantize" / "reference.py").write_text('"""Floor 3."""\n')
    assert violations(tmp_path / PACKAGE) == []


def test_importing_the_package_imports_no_optional_one():
    names = [name for name in ROOMS]
    code = (
        f"import sys, torch\nbefore = set(sys.modules)\nimport {PACKAGE}, {PACKAGE}.cli\n"
        f"print(sorted(set({names!r}) & (set(sys.modules) - before)))"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"
