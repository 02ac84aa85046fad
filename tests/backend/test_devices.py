"""Launch functions make their tensors' GPU the current one; every function that launches kernels is such a one."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch

import te_nvfp4_cv
from te_nvfp4_cv.backend.devices import on_its_device

OPS = Path(te_nvfp4_cv.__file__).parent / "ops"
LAUNCHERS = {  # what operators call: each launches kernels, itself or through others of its file
    "triton/elementwise.py": ("relu_mask", "apply_mask", "scale_bias"),
    "quantize/triton/launch.py": (
        *("quantize_operand", "measure_operand", "quantize_weight"),
        *("unpack_columns", "unpack_rows", "unpack_weight"),
    ),
    "conv/triton/launch.py": ("fprop", "dgrad", "wgrad"),
    "conv/triton/grouped.py": ("fprop", "dgrad", "wgrad", "row_sums"),
    "gemm/triton/launch.py": ("multiply",),
    "norm/triton/launch.py": ("norm_forward", "norm_backward", "statistics", "apply"),
    "norm/triton/quantize_launch.py": ("norm_quantize",),
    "quantize/triton/amax_kernels.py": ("move",),
}


def test_no_launcher_is_missing_from_the_table():
    """A file under a triton/ folder that has such a function must be listed: else nobody checks the others of it."""
    found = {str(path.relative_to(OPS)) for path in OPS.glob("**/triton/*.py") if "@on_its_device" in path.read_text()}
    assert found == set(LAUNCHERS)


@pytest.mark.parametrize("file", LAUNCHERS)
def test_every_launcher_makes_its_device_current(file):
    functions = {
        node.name: [ast.unparse(decorator) for decorator in node.decorator_list]
        for node in ast.parse((OPS / file).read_text()).body
        if isinstance(node, ast.FunctionDef)
    }
    for name in LAUNCHERS[file]:
        assert "on_its_device" in functions[name], f"{file}: {name}"


class Fake:
    """A tensor on the second GPU, as far as its device goes."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)


@pytest.mark.parametrize("record", [False, True])
@pytest.mark.parametrize(("device", "entered"), [("cuda:1", ["cuda:1"]), ("cuda:0", []), ("cpu", [])])
def test_the_first_tensors_device_becomes_current(monkeypatch, device, entered, record):
    seen: list[str] = []

    class Guard:
        def __init__(self, device: torch.device) -> None:
            self.name = str(device)

        def __enter__(self) -> None:
            seen.append(self.name)

        def __exit__(self, *_: object) -> None:
            seen.append("left")

    monkeypatch.setattr(torch.cuda, "device", Guard)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)

    @on_its_device
    def launch(x: Fake, n: int, *, twice: bool) -> tuple[int, list[str]]:
        """Says so."""
        return (2 * n if twice else n), list(seen)

    first = (Fake(device), Fake("meta")) if record else Fake(device)
    assert launch(first, 4, twice=True) == (8, entered)
    assert seen == [*entered, *(["left"] if entered else [])] and launch.__doc__ == "Says so."
