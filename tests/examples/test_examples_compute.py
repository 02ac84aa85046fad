"""--compute of examples/unet_coco: the dtype around NVFP4, fp16's GradScaler, and what a checkpoint says of it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from unet_coco import options
from unet_coco.checkpoint import load_checkpoint
from unet_coco.data import load_data
from unet_coco.engine import Trainer
from unet_coco.options import parse_options
from unet_coco.parallel import wrap
from unet_coco.precision import PLAIN, parse_precisions
from unet_coco.ranks import Ranks
from unet_coco.train import main
from unet_coco.unet import UNet

import te_nvfp4_cv as nv
from te_nvfp4_cv.telemetry import attach
from tests.examples.unet_coco_data import SMALL, draw_shapes

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools on numpy 2

CPU = torch.device("cpu")
WIDE = [*SMALL, "--scale", "0.25", "--pictures", "0"]  # wide enough for NVFP4


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_shapes(tmp_path_factory.mktemp("data"))


def make_trainer(shapes: Path, out: Path, precision: str, *options: str) -> Trainer:
    settings = parse_options(["--data", str(shapes), "--out", str(out), *WIDE, *options])
    found = parse_precisions([precision], "unet", None, settings.compute)[0]
    return Trainer(found, settings, load_data(shapes, "coco", None), CPU, out)


class Probe(nn.Module):
    """A convolution in NVFP4, a head in high precision, and what the first saw."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Conv2d(16, 16, 1)
        self.seen: dict[str, Any] = {}

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        autocast = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
        self.seen = {"dtype": y.dtype, "autocast": autocast, "nvfp4": nv.active_recipe() is not None}
        return self.head(y)


@pytest.mark.parametrize("compute", PLAIN)
def test_recipes_follow_compute_and_plain_precisions_do_not(compute: str) -> None:
    model, x = Probe(), torch.randn(2, 16, 4, 4)
    expected = PLAIN[compute]
    for precision in parse_precisions(["nvfp4", "no_rht"], "unet", None, compute):
        assert precision.compute == compute
        precision.prepare(model)
        with precision.context(CPU):
            model(x)
        assert model.seen == {"dtype": expected or torch.float32, "autocast": expected, "nvfp4": True}
        share = precision.flops_share(model, x)
        assert model.seen == {"dtype": expected or torch.float32, "autocast": expected, "nvfp4": True}, "flops_share"
        assert share == pytest.approx(9 / 10), "3x3 of 3x3 and 1x1"
        with precision.context(CPU, nvfp4=False):
            model(x)
        assert model.seen == {"dtype": expected or torch.float32, "autocast": expected, "nvfp4": False}
    for precision in parse_precisions(list(PLAIN), "unet", None, compute):
        with precision.context(CPU):
            model(x)
        dtype = PLAIN[precision.name]
        assert model.seen == {"dtype": dtype or torch.float32, "autocast": dtype, "nvfp4": False}


def test_nvfp4_in_fp32_trains_and_resumes_by_its_own_checkpoint_alone(shapes: Path, tmp_path: Path) -> None:
    common = ["--data", str(shapes), "--precisions", "nvfp4", "--out", str(tmp_path), *WIDE]
    rows = main([*common, "--compute", "fp32", "--steps", "2"])["nvfp4"]
    assert all(math.isfinite(value) for value in rows.values()) and rows["nvfp4_flops_share"] > 0.5
    path = tmp_path / "nvfp4" / "last.pt"
    saved = load_checkpoint(path)["identity"]
    assert saved["compute"] == "fp32"
    for other in ("bf16", "fp16"):
        with pytest.raises(ValueError, match=r"belongs to another run \(differing: compute\)"):
            main([*common, "--compute", other, "--steps", "2", "--resume"])
    main([*common, "--compute", "fp32", "--steps", "3", "--resume"])
    assert load_checkpoint(path)["position"]["step"] == 3


def test_the_identity_in_bf16_is_as_it_was(shapes: Path, tmp_path: Path) -> None:
    """Checkpoints from before --compute, whose identity has these keys alone, still resume."""
    keys = {"precision", "recipe", "architecture", "data", "file sizes", "data order", "optimizer"}
    assert set(make_trainer(shapes, tmp_path, "nvfp4")._identity()) == keys
    assert set(make_trainer(shapes, tmp_path, "nvfp4", "--compute", "fp16")._identity()) == keys | {"compute"}
    for plain in PLAIN:
        assert set(make_trainer(shapes, tmp_path, plain, "--compute", "fp32")._identity()) == keys
    bf16 = make_trainer(shapes, tmp_path, "nvfp4", "--compute", "bf16")
    bf16._save()
    with pytest.raises(
        ValueError, match=r"differing: compute\)[\s\S]*got: *compute = bf16[\s\S]*needs: compute = fp32"
    ):
        make_trainer(shapes, tmp_path, "nvfp4", "--compute", "fp32").resume()
    assert make_trainer(shapes, tmp_path, "nvfp4", "--compute", "bf16").resume()


def test_nvfp4_in_fp16_skips_a_step_that_overflows_and_goes_on(shapes: Path, tmp_path: Path) -> None:
    trainer = make_trainer(shapes, tmp_path, "nvfp4", "--compute", "fp16", "--log-every", "1", "--steps", "1")
    assert trainer.scaler.is_enabled()
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60, backoff_factor=2.0**-48)
    watch = attach(trainer.model, every=0)
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    trainer.train(watch)
    for name in ("head.weight", "up.3.conv.3.weight", "down.3.conv.0.weight"):  # the last two in NVFP4
        gradient = trainer.model.get_parameter(name).grad
        assert gradient is not None and not bool(gradient.isfinite().all()), name
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.model.state_dict().items()), "skipped"
    assert trainer.scaler.get_scale() == 2.0**12 and trainer.position.step == 1

    resumed = make_trainer(shapes, tmp_path, "nvfp4", "--compute", "fp16", "--log-every", "1", "--steps", "2")
    assert resumed.resume() and resumed.scaler.get_scale() == 2.0**12, "the scale lies in the checkpoint"
    resumed.train(attach(resumed.model, every=0))
    moved = [name for name, tensor in resumed.model.state_dict().items() if not torch.equal(tensor, before[name])]
    assert len(moved) == len(before) and resumed.scaler.get_scale() == 2.0**12
    assert all(bool(tensor.isfinite().all()) for tensor in resumed.model.state_dict().values())


def test_plain_precisions_have_a_scaler_in_fp16_alone(shapes: Path, tmp_path: Path) -> None:
    enabled = {
        (name, compute): make_trainer(shapes, tmp_path, name, "--compute", compute).scaler.is_enabled()
        for name in ("fp32", "bf16", "fp16", "nvfp4")
        for compute in PLAIN
    }
    on = {("fp16", compute) for compute in PLAIN} | {("nvfp4", "fp16")}
    assert {key for key, value in enabled.items() if value} == on


def test_fp16_under_fsdp_is_refused_under_a_recipe_too() -> None:
    precision = parse_precisions(["nvfp4"], "unet", None, "fp16")[0]
    with pytest.raises(ValueError, match=r"fp16 cannot train with --parallel fsdp[\s\S]*'nvfp4'[\s\S]*--compute bf16"):
        wrap(UNet(2, scale=0.0625), precision, Ranks(0, 2, "fsdp"), CPU)


def test_unknown_dtype(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_options(["--compute", "fp8"])
    assert "invalid choice: 'fp8'" in capsys.readouterr().err


@pytest.mark.parametrize("native", [True, False])
def test_auto_takes_bf16_where_the_device_has_it(native: bool, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(options, "bf16_is_native", lambda device: native)
    expected = "bf16" if native else "fp32"
    found = parse_options(["--compute", "auto", "--device", "cpu"])
    assert (found.compute, found.precisions) == (expected, (expected, "nvfp4"))
    assert parse_options(["--device", "cpu"]).precisions == (expected, "nvfp4"), "the default is auto"
    assert "no units for bf16" not in capsys.readouterr().err
    parse_options(["--device", "cpu", "--precisions", "bf16"])
    assert ("no units for bf16" in capsys.readouterr().err) != native
    assert parse_options(["--compute", "auto", "--precisions", "nvfp4"]).precisions == ("nvfp4",)
