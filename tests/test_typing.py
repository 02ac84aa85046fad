"""What a type checker says of a user's program: right uses pass, wrong uses are reported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mypy", reason="needs mypy: pip install mypy")
pytestmark = pytest.mark.slow  # mypy reads all of torch

ROOT = Path(__file__).resolve().parent.parent
RIGHT = '''
import torch
from torch import nn

import te_nvfp4_cv as nv

recipe = nv.load_recipe("unet")
model = nn.Sequential(
    nv.NVFP4Conv2d(16, 32, 3, padding=1, recipe=recipe, backend="reference"),
    nv.NVFP4Conv2d(32, 32, (3, 3), (2, 2), "same", bias=False),
    nv.NVFP4ConvTranspose3d(32, 16, 2, stride=2, output_padding=1, dtype=torch.bfloat16),
    nv.NVFP4Linear(16, 16, recipe=nv.NVFP4BlockScaling()),
)
images = torch.randn(2, 16, 8, 8)
with nv.nvfp4_autocast(recipe):
    loss: torch.Tensor = model(images).sum()
report = nv.coverage(model, images, recipe=recipe)
saved: nv.export.Saved = nv.export.save(model, "model.safetensors", recipe)
deployed: nn.Module = nv.export.load("model.safetensors", model)
written = nv.export.to_onnx(
    deployed, (images,), "net.onnx", "portable", input_names=["x"], dynamic_axes={"x": {0: "batch"}}, opset_version=23
)
telemetry: nv.telemetry.Telemetry = nv.telemetry.attach(model, every=10, sinks=[nv.telemetry.JSONL("run.jsonl")])
run: nv.telemetry.Run = nv.telemetry.read("run.jsonl")
study: nv.sensitivity.Study = nv.sensitivity.kurtosis(model)
bundle: nv.sensitivity.Bundle = nv.sensitivity.load_bundle("step.pt")
marked: list[str] = nv.fsdp.quantize_gathers(model, recipe)
styles = {"0": nv.tensor_parallel.ColwiseParallel(), "1": nv.tensor_parallel.RowwiseParallel(use_local_output=True)}
plugin = nv.lightning.NVFP4Precision("unet", dtype="bf16", root="net")
theirs = nv.te_plugin.recipe(recipe, backend="auto")
version: str = nv.__version__
'''
WRONG = {  # a line that cannot work: what mypy says of it
    "nv.nothing": 'Module has no attribute "nothing"',
    "nv.export.nothing": 'Module has no attribute "nothing"',
    "nv.NVFP4Conv2d(16, 32, 3, strides=2)": 'Unexpected keyword argument "strides" for "NVFP4Conv2d"',
    'nv.NVFP4Conv2d(16, 32, "3")': 'Argument 3 to "NVFP4Conv2d" has incompatible type "str"',
    "nv.NVFP4Linear(16)": 'Missing positional argument "out_features" in call to "NVFP4Linear"',
    "nv.nvfp4_autocast(None, enable=True)": 'Unexpected keyword argument "enable" for "nvfp4_autocast"',
    "nv.export.to_onnx(nv.NVFP4Linear(16, 16), opset=23)": 'Unexpected keyword argument "opset" for "to_onnx"',
    "nv.telemetry.attach(3)": 'Argument 1 to "attach" has incompatible type "int"',
    "nv.fsdp.quantize_gathers()": 'Missing positional argument "model" in call to "quantize_gathers"',
    "nv.lightning.NVFP4Precision(dtype=16)": 'Argument "dtype" to "NVFP4Precision" has incompatible type "int"',
}


@pytest.fixture(scope="module")
def verdict(tmp_path_factory) -> tuple[list[str], list[str]]:
    """Run mypy once over both programs; return its lines about the right one and about the wrong one."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "right.py").write_text(RIGHT)
    (folder / "wrong.py").write_text("import te_nvfp4_cv as nv\n" + "\n".join(WRONG) + "\n")
    # A user has no configuration of ours: mypy finds the package by its path and reads py.typed's annotations.
    command = [sys.executable, "-m", "mypy", "--config-file=", "--follow-imports=silent", "--ignore-missing-imports"]
    done = subprocess.run(
        [*command, "--check-untyped-defs", "right.py", "wrong.py"],
        cwd=folder,
        env=os.environ | {"MYPYPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=500,
    )
    lines = [line for line in done.stdout.splitlines() if ": error:" in line]
    assert done.returncode == 1, f"mypy could not run: {done.stdout}{done.stderr}"
    right, wrong = ([line for line in lines if line.startswith(name)] for name in ("right.py", "wrong.py"))
    return right, wrong


def test_a_users_program_has_no_errors(verdict):
    assert verdict[0] == []


@pytest.mark.parametrize("number", range(len(WRONG)), ids=list(WRONG))
def test_a_wrong_use_is_reported(verdict, number):
    prefix = f"wrong.py:{number + 2}: error: "
    found = [line.removeprefix(prefix) for line in verdict[1] if line.startswith(prefix)]
    assert found and found[0].startswith(list(WRONG.values())[number]), found
