"""Hugging Face's Trainer: a resumed run goes on bit for bit; the callback keeps what the Trainer cannot know."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import te_nvfp4_cv as nv
from te_nvfp4_cv.layer import delayed_scaling
from tests.helpers import same_bits

for package in ("transformers", "accelerate"):
    pytest.importorskip(package, reason=f"{package} is not installed here; make zoo installs it and runs this file")
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_thread")]


class Net(torch.nn.Module):
    """Two convolutions with dropout between, which returns its loss as the Trainer expects."""

    def __init__(self) -> None:
        super().__init__()
        self.body = torch.nn.Sequential(torch.nn.Conv2d(16, 32, 3), torch.nn.Dropout(0.2), torch.nn.Conv2d(32, 16, 3))

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": self.body(images).square().mean()}


def run(folder: Path, steps: int, recipe: str = "delayed", keep: bool = True, **resume: Any) -> tuple[list[float], Net]:
    """Train with shuffled data, save every step, and return the losses of all steps and the model."""
    from transformers import Trainer, TrainingArguments

    from te_nvfp4_cv.integrations.transformers import NVFP4Callback

    class InNVFP4(Trainer):
        def compute_loss_context_manager(self):
            stack = super().compute_loss_context_manager()
            stack.enter_context(nv.nvfp4_autocast(recipe))
            return stack

    data = [{"images": torch.randn(16, 8, 8, generator=torch.Generator().manual_seed(n))} for n in range(48)]
    data[0]["images"] *= 1e5  # in the step after it, delayed scales are so coarse that it shows
    torch.manual_seed(0)
    settings = TrainingArguments(
        str(folder), max_steps=steps, per_device_train_batch_size=16, learning_rate=1e-2, save_steps=1, logging_steps=1,
        report_to="none", use_cpu=True, lr_scheduler_type="constant", disable_tqdm=True, **resume.pop("settings", {}),
    )
    model = Net()
    trainer = InNVFP4(model, settings, train_dataset=data, callbacks=[NVFP4Callback()] if keep else [])
    trainer.train(**resume)
    return [row["loss"] for row in trainer.state.log_history if "loss" in row], model


def equal(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(same_bits(x, y) for x, y in pairs)


@pytest.mark.parametrize("at", [1, 2, 3, 4])
@pytest.mark.parametrize("restore", [False, True])
def test_a_resumed_run_has_the_bits_of_a_whole_one(tmp_path, at, restore):
    """An epoch has three steps. The checkpoint lies elsewhere; the Trainer's restoring of callbacks is on or off."""
    settings = {"restore_callback_states_from_checkpoint": restore}
    losses, whole = run(tmp_path / "a", 6, settings=settings)
    checkpoint = str(tmp_path / "a" / f"checkpoint-{at}")
    again, resumed = run(tmp_path / "b", 6, settings=settings, resume_from_checkpoint=checkpoint)
    assert again == losses and len(losses) == 6 and min(losses) < losses[0]
    assert equal(whole, resumed)
    mine, its = (nv.extra_state(model)["scales"] for model in (whole, resumed))
    assert str(mine) == str(its) and mine


def test_without_the_callback_delayed_scales_start_afresh(tmp_path):
    """This is what the callback is for. Other recipes resume exactly without it: torch's random state is enough."""
    exact = {}
    for recipe in ("delayed", "default"):
        _, whole = run(tmp_path / recipe, 4, recipe, keep=False)
        checkpoints = [str(tmp_path / recipe / f"checkpoint-{at}") for at in (1, 2, 3)]
        again = [run(tmp_path / "b", 4, recipe, keep=False, resume_from_checkpoint=path)[1] for path in checkpoints]
        exact[recipe] = [equal(whole, resumed) for resumed in again]
    assert not all(exact["delayed"]) and all(exact["default"])


def test_a_checkpoint_saved_without_the_callback_resumes(tmp_path):
    run(tmp_path, 2, keep=False)
    losses, _ = run(tmp_path, 4, resume_from_checkpoint=True)
    assert len(losses) == 4
    held = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    assert len(held["stateful_callbacks"]["NVFP4Callback"]["attributes"]["ranks"]) == 1
    assert held["global_step"] == 4 and "TrainerControl" in held["stateful_callbacks"]


def test_scales_of_another_model_are_refused(tmp_path):
    run(tmp_path, 2)
    path = tmp_path / "checkpoint-2" / "trainer_state.json"
    held = json.loads(path.read_text())
    model = torch.nn.Sequential(torch.nn.Conv2d(16, 16, 3))
    with nv.nvfp4_autocast("delayed"):
        model(torch.randn(16, 16, 8, 8)).sum().backward()
    assert delayed_scaling.has_state(delayed_scaling.owner(model[0].weight))
    from transformers import TrainerState

    from te_nvfp4_cv.integrations.transformers import NVFP4Callback

    callback = NVFP4Callback()
    callback.on_train_begin(None, TrainerState(**held), None)
    with pytest.raises(ValueError, match="body.0.weight"):
        callback.on_step_begin(None, None, None, model)
