"""The examples where users live: each trains in NVFP4, and its loss falls; the notebook; the Dockerfile.

What torchvision alone needs runs in make test, the others where their libraries are: make zoo runs this file, too.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from te_nvfp4_cv.layer import observe
from te_nvfp4_cv.report.forward_pass import gemm_flops

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
FRAMEWORKS = EXAMPLES / "frameworks"
PACKAGES = {  # of each example
    "monai_unet3d": ("monai",),
    "smp_unet": ("segmentation_models_pytorch",),
    "timm_resnet": ("timm",),
    "torchvision_retinanet": ("torchvision",),
    "transformers_segformer": ("transformers", "accelerate"),
    "ultralytics_yolo": ("ultralytics", "polars"),
}
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_thread")]


class Counted:
    """FLOPs of the calls of a training, all and those in NVFP4."""

    def __init__(self) -> None:
        self.all = self.nvfp4 = 0

    def __call__(self, call: observe.Call) -> observe.Seen | None:
        def finished(y: Tensor) -> None:
            gemm = gemm_flops(call.op, call.x, call.weight.shape, y)
            self.all += 3 * gemm
            self.nvfp4 += 0 if call.recipe is None else len(call.recipe.nvfp4_gemms) * gemm

        return observe.Seen(finished) if torch.is_grad_enabled() else None


@pytest.fixture
def train(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Run an example in a folder of its own; return its losses and the share of FLOPs that trained in NVFP4."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(FRAMEWORKS))
    monkeypatch.setattr(sys, "path", list(sys.path))  # the examples change it
    for name, value in {"YOLO_CONFIG_DIR": str(tmp_path), "YOLO_OFFLINE": "true", "HF_HUB_OFFLINE": "1"}.items():
        monkeypatch.setenv(name, value)

    def run(name: str, *arguments: str) -> tuple[list[float], float]:
        for package in PACKAGES[name]:
            pytest.importorskip(package, reason=f"{package} is not installed here; make zoo installs it and runs this")
        counted = Counted()
        with observe.observe(counted):
            losses = importlib.import_module(name).main(arguments)
        return losses, counted.nvfp4 / counted.all

    return run


def third(losses: list[float], at: int) -> float:
    """Return the mean of the first (0) or last (2) third of the losses."""
    size = max(len(losses) // 3, 1)
    return sum(losses[at * size :][:size] if at == 0 else losses[-size:]) / size


@pytest.mark.parametrize(
    ("name", "arguments", "share"),
    [
        ("torchvision_retinanet", ("--steps", "6"), 0.95),
        ("timm_resnet", ("--steps", "15"), 0.95),
        ("timm_resnet", ("--model", "convnext_atto", "--steps", "12"), 0.9),
        ("transformers_segformer", ("--steps", "12"), 0.85),
        ("ultralytics_yolo", ("--epochs", "6"), 0.9),
        ("monai_unet3d", ("--steps", "12"), 0.8),
        ("smp_unet", ("--steps", "9"), 0.95),
        ("smp_unet", ("--steps", "9", "--architecture", "fpn", "--encoder", "mobilenet_v2"), 0.5),
    ],
    ids=lambda value: value.split("_")[0] if isinstance(value, str) else "",
)
def test_it_trains_in_nvfp4_and_the_loss_falls(train: Any, name: str, arguments: tuple[str, ...], share: float) -> None:
    losses, found = train(name, *arguments)
    assert found > share and third(losses, 2) < 0.9 * third(losses, 0), (found, losses)


def test_the_segformer_resumes_bit_for_bit(train: Any, tmp_path: Path) -> None:
    whole, _ = train("transformers_segformer", "--steps", "8", "--folder", "run")
    shutil.rmtree(tmp_path / "run" / "checkpoint-8")
    resumed, _ = train("transformers_segformer", "--steps", "8", "--folder", "run", "--resume")
    assert resumed == whole and len(whole) == 8


def test_each_example_is_short_and_says_what_its_framework_hides() -> None:
    files = {path.stem: path.read_text(encoding="utf-8") for path in FRAMEWORKS.glob("[a-z]*.py")}
    page = (EXAMPLES.parent / "docs" / "FRAMEWORKS.md").read_text(encoding="utf-8")
    assert files.keys() == PACKAGES.keys()
    for name, text in files.items():
        assert len(text.splitlines()) < 80, name
        head = text.split('"""')[1]
        assert "hides" in head and f"python examples/frameworks/{name}.py" in head and f"frameworks/{name}.py" in page
        for subject in ("autocast", "compil", "EMA", "checkpoint", "random state"):
            assert re.search(subject, head, re.IGNORECASE), f"{name} does not say what becomes of {subject}"


# ---- the notebook and the Dockerfile --------------------------------------------------------------------------------


def test_the_notebook_runs_from_a_clone(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Its code runs, with fewer steps; its stored outputs are of these cells, in order, without errors or paths."""
    pytest.importorskip("torchvision")
    pytest.importorskip("matplotlib").use("agg")
    text = (EXAMPLES / "gpu.ipynb").read_text(encoding="utf-8")
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} == {"stream", "display_data"} and "image/png" in str(outputs)
    shown = "".join("".join(output.get("text", ())) for output in outputs)
    assert not re.search(r"(^|\s)/(tmp|home|root|work)", shown) and "Warning" not in shown
    monkeypatch.chdir(EXAMPLES)
    monkeypatch.setattr(sys, "path", list(sys.path))
    names: dict[str, Any] = {}
    for number, cell in enumerate(cells):
        source = "".join(cell["source"]).replace("else 12", "else 2")
        exec(compile(source, f"gpu.ipynb, cell {number}", "exec"), names)
    share = re.search(r"[\d.]+% of the FLOPs", capsys.readouterr().out)
    assert share is not None and share[0] in shown and len(names["high"]) == 2


def test_the_dockerfile_names_what_is_there() -> None:
    lines = (EXAMPLES / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ").splitlines()
    assert "not executed" in "".join(lines[:2])
    steps = [line.split() for line in lines if line and not line.startswith("#")]
    assert steps[0][0] == "FROM" and not steps[0][1].endswith(":latest")
    sources = [source for step in steps if step[0] == "COPY" for source in step[1:-1]]
    assert {"te_nvfp4_cv", "recipes", "setup.py"} <= set(sources)
    assert all((EXAMPLES.parent / source).exists() for source in sources)
    assert all("-c constraints.txt" in " ".join(step) for step in steps if step[0] == "RUN" and "pip" in step)


def test_the_dockerfile_passes_its_linter() -> None:
    linter = shutil.which("hadolint", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if linter is None:
        pytest.skip("hadolint is not installed here; make zoo installs it and runs this")
    done = subprocess.run([linter, EXAMPLES / "Dockerfile"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
