"""The trainer's levers: learned scales, the last epochs in high precision, and bundles of bad steps."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from unet_coco import checkpoint
from unet_coco.data import load_data
from unet_coco.engine import Trainer
from unet_coco.levers import parameter_groups
from unet_coco.options import parse_options
from unet_coco.parallel import load_whole_state, whole_state
from unet_coco.precision import parse_precisions
from unet_coco.ranks import Ranks
from unet_coco.train import main

import te_nvfp4_cv as nv
from te_nvfp4_cv import cli
from te_nvfp4_cv.sensitivity import diagnose, load_bundle
from te_nvfp4_cv.telemetry import attach
from tests.examples.unet_coco_data import SMALL, draw_shapes

pytestmark = pytest.mark.usefixtures("one_thread")
NVFP4 = ["--precisions", "nvfp4", "--compute", "fp32", *SMALL, "--scale", "0.25"]


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_shapes(tmp_path_factory.mktemp("data"))


def state(folder: Path) -> dict:
    return checkpoint.load_checkpoint(folder / "nvfp4" / "last.pt")


def test_learned_scales_are_trained_and_a_resume_goes_on_bit_for_bit(shapes: Path, tmp_path: Path) -> None:
    common = ["--data", str(shapes), *NVFP4, "--epochs", "2", "--learn-scales", "scale"]
    main([*common, "--out", str(tmp_path / "straight")])
    for stop in (["--steps", "4"], ["--resume"]):
        main([*common, *stop, "--out", str(tmp_path / "stopped")])
    a, b = state(tmp_path / "straight"), state(tmp_path / "stopped")
    learned = {name: value for name, value in a["model"].items() if name.endswith("weight_scale")}
    assert "down.0.conv.0.weight_scale" in learned and "head.weight_scale" not in learned
    assert any(float(value) != 1 for value in learned.values())
    assert all(torch.equal(value, b["model"][name]) for name, value in a["model"].items())
    with pytest.raises(ValueError, match=r"another run \(differing: levers\)"):
        main([*common[:-2], "--resume", "--out", str(tmp_path / "stopped")])
    main([*common[:-2], "--steps", "1", "--out", str(tmp_path / "plain")])
    assert "levers" not in state(tmp_path / "plain")["identity"]


def test_a_step_that_is_not_finite_is_kept_and_diagnosed(shapes: Path, tmp_path: Path, capsys) -> None:
    settings = parse_options(["--data", str(shapes), "--out", str(tmp_path), *NVFP4, "--steps", "3"])
    data = load_data(shapes, "coco", settings.classes)
    precision = parse_precisions(["nvfp4"], "unet", compute="fp32")[0]
    trainer = Trainer(precision, settings, data, torch.device("cpu"), tmp_path)
    with torch.no_grad():
        trainer.model.up[1].conv[0].weight[3, 3, 0, 0] = math.nan
    with pytest.raises(RuntimeError, match=r"diverged"):
        trainer.train(attach(trainer.model, every=0))
    printed = capsys.readouterr().out
    path = tmp_path / "bundle_000001.pt"
    assert f"te-nvfp4-cv diagnose {path}" in printed and load_bundle(path).step == 1
    found = diagnose(path)
    assert "up.1.conv.0" in str(found) and not math.isfinite(found.nvfp4.loss)
    assert cli.main(["diagnose", str(path)]) == 1 and "up.1.conv.0" in capsys.readouterr().out


def test_a_jump_of_the_loss_is_kept_and_training_goes_on(shapes: Path, tmp_path: Path) -> None:
    settings = parse_options(["--data", str(shapes), "--out", str(tmp_path), *NVFP4, "--epochs", "5"])
    data = load_data(shapes, "coco", settings.classes)
    precision = parse_precisions(["nvfp4"], "unet", compute="fp32")[0]
    trainer = Trainer(precision, settings, data, torch.device("cpu"), tmp_path)
    original, jumped = trainer.task.loss, []

    def loss(output, targets, group=None):
        value = original(output, targets, group)
        if trainer.position.step == 13 and not jumped:
            value = value * 50
            jumped.append(value.item())
        return value

    trainer.task.loss = loss  # type: ignore[method-assign]
    trainer.train(attach(trainer.model, every=0))
    assert [path.name for path in tmp_path.glob("bundle_*")] == ["bundle_000014.pt"]
    bundle = load_bundle(tmp_path / "bundle_000014.pt")
    assert bundle.loss == jumped[0] and "median" in bundle.reason
    assert diagnose(bundle).nvfp4.loss == pytest.approx(jumped[0] / 50, rel=1e-6)  # what the task's own loss says


def test_bundles_can_be_turned_off(shapes: Path, tmp_path: Path) -> None:
    options = ["--data", str(shapes), "--out", str(tmp_path), *NVFP4, "--no-bundles", "--lr", "900", "--epochs", "4"]
    try:
        main(options)
    except RuntimeError as error:
        assert "diverged" in str(error)
    assert not list(tmp_path.rglob("bundle_*"))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--spike-factor", "1"], "--spike-factor"),
        (["--parallel", "fsdp", "--learn-scales", "clip"], "--parallel fsdp"),
        (["--high-precision-last", "-1"], "--high-precision-last"),
        (["--telemetry-every", "-1"], "--telemetry-every"),
    ],
)
def test_bad_options(options: list[str], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        parse_options(options)


def test_moments_are_laid_out_like_the_parameters_that_they_are_of() -> None:
    """Learned scales are in a group of their own, so that the optimizer's order is not the model's."""
    model = torch.nn.Sequential(torch.nn.Conv2d(16, 16, 3), torch.nn.Conv2d(16, 32, 3))
    model = model.to(memory_format=torch.channels_last)
    nv.learn_scales(model, "scale")
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.01))
    with nv.nvfp4_autocast():
        model(torch.randn(2, 16, 8, 8)).square().mean().backward()
    optimizer.step()
    weights, moments = copy.deepcopy(whole_state(model, optimizer, Ranks()))
    for entry in moments["state"].values():
        entry.update({key: v.contiguous() for key, v in entry.items()})
    load_whole_state(model, optimizer, weights, moments, Ranks())
    for parameter in model.parameters():
        held = optimizer.state[parameter]["exp_avg"]
        assert held.shape == parameter.shape and held.stride() == parameter.stride()
