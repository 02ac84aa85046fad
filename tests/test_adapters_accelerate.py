"""The accelerate example: layers in NVFP4, losses that fall, exact resume, two processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from te_nvfp4_cv import calls
from tests.distributed.launch import ROOT, torchrun
from tests.helpers import same_bits

pytest.importorskip("accelerate", reason="accelerate is not installed")
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_thread")]


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import accelerate_unet
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    yield accelerate_unet
    AcceleratorState._reset_state(True)


def run(example: Any, *arguments: str) -> list[float]:
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    return example.main(["--cpu", "--size", "16", *arguments])


def test_layers_run_in_nvfp4_and_the_loss_falls(example, capsys):
    told: list[str] = []

    def observer(call: calls.Call) -> None:
        told.append("nvfp4" if call.recipe is not None else "high")

    with calls.observe(observer):
        losses = run(example, "--steps", "8")
    assert told.count("nvfp4") > told.count("high") > 0
    assert losses[-1] < losses[0] and len(losses) == 8
    assert capsys.readouterr().out.count("loss") == 8


def test_a_resumed_run_goes_on_bit_for_bit(example, tmp_path):
    whole = run(example, "--steps", "6", "--folder", str(tmp_path / "whole"))
    first = run(example, "--steps", "4", "--folder", str(tmp_path / "parts"))
    second = run(example, "--steps", "6", "--folder", str(tmp_path / "parts"), "--resume")
    assert first + second == whole
    from safetensors.torch import load_file

    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert a.keys() == b.keys() and all(same_bits(a[name], b[name]) for name in a)


def test_two_processes(tmp_path: Path):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, torch\nfrom tests import conftest\nimport accelerate_unet as example\n"
        "losses = example.main(['--cpu', '--size', '16', '--steps', '4', '--folder', sys.argv[1] + '/state'])\n"
        "import os\ntorch.save(losses, f\"{sys.argv[1]}/{os.environ['RANK']}.pt\")\n"
    )
    done = torchrun([str(script), str(tmp_path)], 2, HF_HUB_OFFLINE="1", ACCELERATE_USE_CPU="true")
    assert done.returncode == 0, done.stdout[-3000:]
    a, b = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert len(a) == len(b) == 4 and a != b
    assert done.stdout.count("loss") == 4  # the main process alone prints
    assert (tmp_path / "state" / "model.safetensors").is_file()
