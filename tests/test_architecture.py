"""The tree and docs/ARCHITECTURE.md say the same, imports point down, every file says what it is for.

The rules are in tests/architecture.py. Each of them is also tested on planted violations.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from te_nvfp4_cv.cli import COMMANDS
from tests.architecture import (
    PACKAGE,
    ROOMS,
    RULES,
    House,
    each_torch_private_has_one_file,
    every_file_says_what_it_is_for,
    folders_have_an_order,
    imports_point_down,
    names_do_not_hide_names,
    optional_packages_stay_in_their_rooms,
    page_and_tree_agree,
    picture_and_table_agree,
    private_names,
    the_root_is_small,
    the_way_of_the_data_is_short,
    torch_privates_are_listed,
)

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def house() -> House:
    page, picture = ((ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("ARCHITECTURE.md", "floors.svg"))
    return House(ROOT / PACKAGE, page, picture)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_house_stands(house, rule):
    assert house.modules, "the package was not found"
    found = rule(house)
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "docs/ARCHITECTURE.md"])
def test_the_commands_of_the_pages_exist(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"(?:^|`)make ([\w-]+)", text, re.MULTILINE)
    modules = re.findall(r"python -m (tests\.\w+)", text)
    commands = re.findall(r"te-nvfp4-cv (\w+)", text)
    assert modules or commands
    assert [target for target in targets if f"\n{target}:" not in makefile] == []
    assert [module for module in modules if not (ROOT / f"{module.replace('.', '/')}.py").is_file()] == []
    assert set(commands) <= {command.name for command in COMMANDS}
    paths = [path for path in re.findall(r"[\w./*-]+/[\w.*-]+\.(?:py|md|cpp)", text) if not path.startswith("..")]
    folders = (ROOT, ROOT / PACKAGE)
    assert [path for path in paths if not any(list(folder.glob(path)) for folder in folders)] == []


def test_importing_the_package_imports_no_optional_one():
    code = (
        f"import sys, torch\nbefore = set(sys.modules)\nimport {PACKAGE}, {PACKAGE}.cli\n"
        f"print(sorted(set({list(ROOMS)!r}) & (set(sys.modules) - before)))"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"


# ---- the rules on planted trees -------------------------------------------------------------------------------------

DOC = '"""A room."""\n'
PLANTED_PAGE = """# Architecture

## The floors
Text.

| floor | where | purpose |
|---|---|---|
| 4 | `__init__.py` | |
| 3 | `functional.py`, `telemetry/` | the `errors.py` of a purpose is no entry |
| 2 | `layer/`, `tensor/` | |
| 1 | `ops/` | |
| 0 | `errors.py`, `version.py` | |

## The way of the data

| step | file | what |
|---|---|---|
| 1 | `layer/run.py` | |
| 2 | `layer/plan.py` | |

## Torch's private names

| subject | file | names |
|---|---|---|
| graphs | `layer/plan.py` | `torch._C._graph`, `torch.utils._pytree` |
"""
ROOMS_BY_HEIGHT = {
    10: ["__init__.py"],
    20: ["functional.py", "telemetry/"],
    30: ["layer/", "tensor/"],
    40: ["ops/"],
    50: ["errors.py", "version.py"],
}
PLANTED = {
    "__init__.py": DOC + f"from {PACKAGE} import functional\nfrom {PACKAGE}.layer.run import go\n",
    "errors.py": DOC,
    "version.py": DOC,
    "functional.py": DOC + "from .layer import plan, run\n",
    "ops/__init__.py": DOC,
    "ops/geometry.py": DOC + "import importlib.util\nhave = importlib.util.find_spec('triton')\n",
    "ops/quantize/__init__.py": DOC,
    "ops/quantize/operand.py": DOC + "def f():\n    from .triton import launch\n",
    "ops/quantize/reference.py": DOC,
    "ops/quantize/triton/__init__.py": DOC,
    "ops/quantize/triton/launch.py": DOC + "import triton.language as tl\nfrom ...geometry import have\n",
    "layer/__init__.py": DOC,
    "layer/plan.py": DOC + "import torch\nfrom torch.utils import _pytree as p\nx = torch._C._graph\nx = p.tree_map\n",
    "layer/run.py": DOC + f"from . import plan\nfrom {PACKAGE}.ops.quantize import operand\ngo = 1\n",
    "telemetry/__init__.py": DOC + "from .sinks import WandB\n",
    "telemetry/weights_and_biases.py": DOC + "class WandB:\n    def f(self):\n        import wandb\n",
    "tensor/__init__.py": DOC + "def f():\n    gemm = 1\n",
    "tensor/gemm.py": DOC,
}


@dataclass
class Change:
    """What is planted: files with their text, a replacement on the page; and what a rule must say of it."""

    rule: Callable[[House], list[str]]
    told: str
    files: dict[str, str] = field(default_factory=dict)
    page: tuple[str, str] = ("", "")


def draw(heights: dict[int, list[str]]) -> str:
    texts = (f'<text class="room" y="{y}">{name}</text>' for y, names in heights.items() for name in names)
    return f'<svg xmlns="http://www.w3.org/2000/svg"><text y="5">Floors</text>{"".join(texts)}</svg>'


def plant(folder: Path, files: dict[str, str], change: tuple[str, str] = ("", "")) -> House:
    for name, text in (PLANTED | files).items():
        path = folder / PACKAGE / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    page = PLANTED_PAGE.replace(*change) if change[0] else PLANTED_PAGE
    return House(folder / PACKAGE, page, draw(ROOMS_BY_HEIGHT))


def test_what_is_allowed_passes(tmp_path):
    house = plant(tmp_path, {})
    assert [found for rule in RULES for found in rule(house)] == []


def imported(text: str, told: str, name: str = "errors.py") -> Change:
    return Change(imports_point_down, told, {name: DOC + text})


def private(text: str, told: str) -> Change:
    return Change(torch_privates_are_listed, f"errors.py: touches {told}, which the page", {"errors.py": DOC + text})


TWO = "def g():\n    from .operand import f\n"
VIOLATIONS = [
    imported(f"import {PACKAGE}.functional\n", "errors.py:2: floor 0 imports functional, up to floor 3"),
    imported(f"from {PACKAGE} import functional\n", "errors.py:2: floor 0 imports functional"),
    imported(f"from {PACKAGE} import go\n", f"floor 0 imports {PACKAGE}, up to floor 4"),
    imported("from . import version\n", "floor 0 imports version, on its own floor"),
    imported("import importlib\nimportlib.import_module('te_nvfp4_cv.ops.geometry')\n", "errors.py:3: floor 0"),
    imported("from ..layer.run import go\n", "imports layer.run, on its own floor", "tensor/__init__.py"),
    imported("def f():\n    from .... import functional\n", "launch.py:3: floor 1", "ops/quantize/triton/launch.py"),
    imported("if TYPE_CHECKING:\n    from ..layer import plan\n", "geometry.py:3: floor 1", "ops/geometry.py"),
    Change(folders_have_an_order, "layer/: a cycle: plan -> run", {"layer/plan.py": DOC + "from .run import go\n"}),
    Change(
        folders_have_an_order,
        "run (layer/plan.py:3)",
        {"layer/plan.py": DOC + "if TYPE_CHECKING:\n from . import run\n"},
    ),
    Change(
        folders_have_an_order,
        "triton -> operand (ops/quantize/triton/launch.py:3)",
        {"ops/quantize/triton/launch.py": DOC + TWO.replace(".", "..")},
    ),
    Change(
        folders_have_an_order,
        "sinks -> __init__ (telemetry/sinks.py:2)",
        {"telemetry/sinks.py": DOC + f"from {PACKAGE}.telemetry import WandB\n"},
    ),
    Change(
        folders_have_an_order,
        "ops/: a cycle: geometry -> quantize",
        {"ops/geometry.py": DOC + "from .quantize import operand\n"},
    ),
    Change(page_and_tree_agree, "helpers.py: on no floor", {"helpers.py": DOC}),
    Change(page_and_tree_agree, "nn/: on no floor", {"nn/inner/more.py": DOC}),
    Change(page_and_tree_agree, "nn/: on the page and not in the tree", page=("`tensor/`", "`tensor/`, `nn/`")),
    Change(page_and_tree_agree, "layer/faces.py: on the page", page=("Text.", "See `layer/faces.py`.")),
    Change(page_and_tree_agree, "ops/: twice", page=("`tensor/`", "`tensor/`, `ops/`")),
    Change(
        picture_and_table_agree,
        "shows 5 floors, the table 6",
        page=("| 0 | `errors.py`", "| 0 | `z.py` | |\n| -1 | `errors.py`"),
    ),
    Change(picture_and_table_agree, "nn/: on floor 2 of the table only", page=("`tensor/`", "`tensor/`, `nn/`")),
    Change(
        picture_and_table_agree,
        "tensor/: on floor 2 of the picture only",
        page=("| 2 | `layer/`, `tensor/`", "| 2 | `layer/`"),
    ),
    Change(
        the_way_of_the_data_is_short, "layer/go.py: to be read", page=("| 2 | `layer/plan.py`", "| 2 | `layer/go.py`")
    ),
    Change(the_way_of_the_data_is_short, "9 files to read", page=("`layer/run.py`", "`layer/run.py`" * 8)),
    Change(the_root_is_small, "13 files at the root", {f"file_{i}.py": DOC for i in range(9)}),
    Change(the_root_is_small, "17 folders at the root", {f"folder_{i}/a.py": DOC for i in range(13)}),
    Change(
        optional_packages_stay_in_their_rooms,
        "imports triton outside",
        {"ops/quantize/operand.py": DOC + "import triton\n"},
    ),
    Change(
        optional_packages_stay_in_their_rooms,
        "functional.py:3: imports wandb",
        {"functional.py": DOC + "def f():\n    import wandb\n"},
    ),
    Change(
        optional_packages_stay_in_their_rooms,
        "transformer_engine outside",
        {"errors.py": DOC + "from transformer_engine.common import recipe\n"},
    ),
    Change(optional_packages_stay_in_their_rooms, "imports onnx outside", {"errors.py": DOC + "__import__('onnx')\n"}),
    Change(names_do_not_hide_names, "go: hides the public name te_nvfp4_cv.go", {"go/__init__.py": DOC}),
    Change(names_do_not_hide_names, "telemetry/WandB: hides", {"telemetry/WandB.py": DOC}),
    Change(names_do_not_hide_names, "layer/plan: hides", {"layer/__init__.py": DOC + "def plan():\n    pass\n"}),
    Change(names_do_not_hide_names, "layer/plan: hides", {"layer/__init__.py": DOC + "plan = 1\n"}),
    Change(every_file_says_what_it_is_for, "layer/run.py: no docstring", {"layer/run.py": "import json\n"}),
    Change(every_file_says_what_it_is_for, "layer/README.md: missing, 6 files", {f"layer/{a}.py": DOC for a in "abc"}),
    Change(
        every_file_says_what_it_is_for,
        "layer/README.md: does not name c.py",
        {f"layer/{a}.py": DOC for a in "abc"} | {"layer/README.md": "plan.py run.py a.py b.py"},
    ),
    private("import torch._dynamo\n", "torch._dynamo"),
    private("import torch._dynamo.config as c\n", "torch._dynamo"),
    private("from torch._library import utils\n", "torch._library"),
    private(
        "from torch.distributed import distributed_c10d as c\nc._get()\n", "torch.distributed.distributed_c10d._get"
    ),
    private("import torch.nn.functional as F\nF._verify(1)\n", "torch.nn.functional._verify"),
    private("import torch\ndef f():\n    torch.overrides._stack().x\n", "torch.overrides._stack"),
    private("import torch\ngetattr(torch.cpu, '_is_amx', None)\n", "torch.cpu._is_amx"),
    private("import torch\ny = torch._C._x.deep\n", "torch._C._x.deep"),
    private("y = 'torch.utils._device'\n", "torch.utils._device"),
    Change(
        torch_privates_are_listed,
        "layer/plan.py: does not touch torch._C._gone",
        page=("`torch._C._graph`", "`torch._C._graph`, `torch._C._gone`"),
    ),
    Change(
        each_torch_private_has_one_file,
        "graphs: in a.py, layer/plan.py",
        page=("| graphs |", "| graphs | `a.py` | `torch._y` |\n| graphs |"),
    ),
    Change(
        each_torch_private_has_one_file,
        "torch._C._graph: in a.py, ",
        page=("| graphs |", "| more | `a.py` | `torch._C._graph` |\n| graphs |"),
    ),
]


@pytest.mark.parametrize("change", VIOLATIONS, ids=lambda change: f"{change.rule.__name__}: {change.told}")
def test_a_planted_violation_is_found(tmp_path, change):
    found = change.rule(plant(tmp_path, change.files, change.page))
    assert len(found) == 1 and change.told in found[0], found


@pytest.mark.parametrize(
    "text",
    [
        "import torch\ntorch.ops.aten._pin_memory\n",
        "class A:\n    def f(self, w):\n        return self._x, w._base, w.__dict__\n",
        "import torch\ntorch.__version__\ntorch.nn.Module.__call__\n",
        "from te_nvfp4_cv.torch import _x\n",
        "y = 'see torch._C for more'\n",
        "import torch\ntorch.manual_seed._te_nvfp4_cv = True\n",
    ],
)
def test_these_are_no_private_names_of_torch(text):
    assert private_names(ast.parse(text)) == set()
