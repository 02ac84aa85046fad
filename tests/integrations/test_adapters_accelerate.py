"""The accelerate example: the bits of a loop by hand, layers in NVFP4, exact resume, two processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import te_nvfp4_cv as nv
from te_nvfp4_cv.integrations.accelerate import NVFP4State
from te_nvfp4_cv.layer import observe
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

    def observer(call: observe.Call) -> None:
        told.append("nvfp4" if call.recipe is not None else "high")

    with observe.observe(observer):
        losses = run(example, "--steps", "8")
    assert told.count("nvfp4") > told.count("high") > 0
    assert losses[-1] < losses[0] and len(losses) == 8
    assert capsys.readouterr().out.count("loss") == 8


def test_training_has_the_bits_of_a_loop_by_hand(example, tmp_path):
    losses = run(example, "--steps", "4", "--folder", str(tmp_path))
    torch.manual_seed(0)
    recipe = nv.load_recipe("unet")
    model = example.UNet(example.CLASSES, 0.25, "silu", 0.1)
    nv.set_precision(model, recipe)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    by_hand = []
    for step in range(4):
        images, masks = example.batch(step, 16)
        with nv.nvfp4_autocast(recipe):
            with torch.autocast("cpu", torch.bfloat16):
                y = model(images)
            loss = F.cross_entropy(y.float(), masks)
        (loss / 2).backward()
        if step % 2:
            optimizer.step()
            optimizer.zero_grad()
        by_hand.append(loss.item())
    assert losses == by_hand
    from safetensors.torch import load_file

    saved, state = load_file(tmp_path / "model.safetensors"), model.state_dict()
    assert saved.keys() == state.keys() and all(same_bits(saved[name], state[name]) for name in saved)


def test_a_resumed_run_goes_on_bit_for_bit(example, tmp_path):
    """With dropout: torch's random state must be where it was, too."""
    whole = run(example, "--steps", "4", "--folder", str(tmp_path / "whole"))
    first = run(example, "--steps", "2", "--folder", str(tmp_path / "parts"))
    second = run(example, "--steps", "4", "--folder", str(tmp_path / "parts"), "--resume")
    assert first + second == whole
    from safetensors.torch import load_file

    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert a.keys() == b.keys() and all(same_bits(a[name], b[name]) for name in a)


SCRIPT = """
import os, sys, torch
from tests import conftest
import accelerate_unet as example
from accelerate import Accelerator

def keep(self):  # instead of end_training: one process group serves the three runs
    states.append(self.unwrap_model(self._models[0]).state_dict())

Accelerator.end_training, states = keep, []
def run(steps, name, *more):
    options = ["--cpu", "--size", "16", "--recipe", "delayed", "--folder", f"{sys.argv[1]}/{name}"]
    return example.main([*options, "--steps", str(steps), *more])

losses = [run(4, "whole"), run(2, "parts"), run(4, "parts", "--resume")]
torch.save({"losses": losses, "states": states}, f"{sys.argv[1]}/{os.environ['RANK']}.pt")
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


def test_two_processes(tmp_path: Path):
    """They agree in their weights, and each goes on from its own scales and random state."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = torchrun([str(script), str(tmp_path)], 2, HF_HUB_OFFLINE="1", ACCELERATE_USE_CPU="true")
    assert done.returncode == 0, done.stdout[-3000:]
    a, b = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert done.stdout.count("loss") == 4 + 2 + 2  # the main process alone prints
    for own in (a, b):
        whole, first, second = own["losses"]
        assert len(whole) == 4 and first + second == whole
    assert a["losses"] != b["losses"]
    for state_a, state_b in zip(a["states"], b["states"], strict=True):
        assert all(same_bits(tensor, state_b[name]) for name, tensor in state_a.items())
    assert all(same_bits(tensor, a["states"][2][name]) for name, tensor in a["states"][0].items())
    saved = torch.load(tmp_path / "parts" / "custom_checkpoint_0.pkl", weights_only=True)
    assert len(saved["processes"]) == 2


def test_another_number_of_processes_goes_on_with_a_warning(example, tmp_path):
    losses = run(example, "--steps", "2", "--folder", str(tmp_path))
    path = tmp_path / "custom_checkpoint_0.pkl"
    torch.save({"processes": 2 * torch.load(path, weights_only=True)["processes"]}, path)
    with pytest.warns(UserWarning, match="states of 2 ranks, this run has 1"):
        assert run(example, "--steps", "4", "--folder", str(tmp_path), "--resume")[0] < losses[0]


def test_a_state_of_another_object_is_refused():
    with pytest.raises(ValueError, match="not what it saved"):
        NVFP4State(torch.nn.Linear(16, 16)).load_state_dict({"step": 3})


def test_a_resume_without_a_folder_is_refused(example, capsys):
    with pytest.raises(SystemExit) as left:
        run(example, "--resume")
    assert left.value.code == 2 and "--resume needs --folder" in capsys.readouterr().err
