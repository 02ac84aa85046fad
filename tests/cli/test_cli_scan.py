"""te-nvfp4-cv scan, and networks that timm and transformers know by name."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import te_nvfp4_cv as nv
from te_nvfp4_cv import cli
from te_nvfp4_cv.cli.pictures import Preparation, preparation_of

CODE = """
import torch
from tests.networks import Net
from tests.helpers import values


def build():
    torch.manual_seed(0)
    return Net()


def with_loss():
    return build(), values((4, 3, 8, 8)), lambda y: y.square().mean()


def with_inputs():
    return build(), (values((4, 3, 8, 8)),)
"""


@pytest.fixture
def file(tmp_path: Path) -> str:
    """A file of the user's; each of its own name, because Python keeps what it has imported."""
    path = tmp_path / f"network_{tmp_path.name}.py"
    path.write_text(CODE)
    return str(path)


@pytest.fixture
def images(tmp_path: Path) -> str:
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for number in range(4):
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(tmp_path / "images" / f"{number}.png")
    return str(tmp_path / "images")


def test_pictures_without_labels(file: str, images: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, page = tmp_path / "mine.toml", tmp_path / "scan.html"
    command = ["scan", f"{file}:build", "--images", images, "--range", "0", "1", "--size", "8", "8"]
    assert cli.main([*command, "--budget", "0.9", "--out", str(out), "--html", str(page), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {row["name"] for row in found["layers"]} == {"body.1", "body.4", "up", "head"}
    # High precision is no distance from itself, and 4 bits are some.
    assert found["loss"] == 0 < found["all layers"]["loss"]
    assert all(row["alone"]["loss"] > 0 for row in found["layers"])
    assert any(recipe is None for _, recipe in nv.load_recipe(out).precision)
    text = page.read_text()
    assert text.count("<svg") == 2 and text.count("<rect") == 4 == text.count("<circle") and "body.4" in text
    assert "#D55E00" in text and "<script" not in text
    assert cli.main([*command, "--out", str(out)]) == 2
    assert "exists" in capsys.readouterr().err
    assert cli.main(["scan", f"{file}:build", "--images", images]) == 2
    said = capsys.readouterr().err
    assert "--images: how does the model want its pictures?" in said and "quantize" not in said  # another command
    assert cli.main([*command, "--out", str(out), "--force", "--budget", "0.9"]) == 0
    assert f"recipe: {out}: high precision for " in capsys.readouterr().err
    assert cli.main([*command, "--out", str(out), "--force", "--budget", "1e-6"]) == 0  # every layer is larger
    assert "of the FLOPs, more than --budget 1e-06" in capsys.readouterr().err
    assert not nv.load_recipe(out).precision


def test_inputs_and_a_loss_of_the_model(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["scan", f"{file}:with_loss", "--mode", "both", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["loss"] > 0 and found["layers"][0]["without"] is not None
    assert cli.main(["scan", f"{file}:with_inputs"]) == 0
    said = capsys.readouterr()
    assert "high precision: loss 0" in said.out and "no --checkpoint: the weights are those that" in said.err
    assert cli.main(["scan", f"{file}:build"]) == 2
    assert "no inputs" in capsys.readouterr().err
    assert cli.main(["scan", f"{file}:with_inputs", "--budget", "7"]) == 2
    assert "bad --budget" in capsys.readouterr().err


def test_names_in_the_page_are_escaped() -> None:
    model = nn.Sequential()
    model.add_module("<b>", nn.Linear(16, 16))
    found = nv.sensitivity.scan(model, lambda model, x: model(x).square().mean(), [torch.randn(2, 16)])
    assert "<b>" not in found.to_html("<i>") and "&lt;b&gt;" in found.to_html() and "<i>" not in found.to_html("<i>")


# ---- networks of libraries ------------------------------------------------------------------------------------------


def library(monkeypatch: pytest.MonkeyPatch, name: str, **functions: Any) -> None:
    """Let `import name` find these functions."""
    made = types.ModuleType(name)
    made.__spec__ = types.SimpleNamespace(name=name)  # type: ignore[assignment]
    vars(made).update(functions)
    monkeypatch.setitem(sys.modules, name, made)


class Known(nn.Sequential):
    sizes: set[tuple[int, ...]] = set()  # of the pictures that any of them was given

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3))
        self.pretrained_cfg = {"mean": (0.5,) * 3, "std": (0.25,) * 3, "input_size": (3, 6, 8), "crop_pct": 0.9}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.sizes.add(tuple(x.shape[1:]))
        return super().forward(x)


def test_quantize_a_network_of_timm(
    monkeypatch: pytest.MonkeyPatch, images: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []

    def create_model(name: str, pretrained: bool) -> nn.Module:
        asked.append((name, pretrained))
        if name == "far":
            raise OSError("no network")
        return Known()

    library(monkeypatch, "timm", create_model=create_model)
    command = ["quantize", "timm:near.a1", "--images", images, "--out", str(tmp_path / "net")]
    Known.sizes.clear()
    assert cli.main(command) == 0
    assert Known.sizes == {(3, 6, 8)} and asked == [("near.a1", True)]  # the size of its metadata
    torch.save(Known().state_dict(), tmp_path / "w.pt")
    assert cli.main([*command, "--force", "--checkpoint", str(tmp_path / "w.pt")]) == 0
    assert asked[-1] == ("near.a1", False)
    assert cli.main(["coverage", "timm:far"]) == 2
    assert "OSError: no network" in (text := capsys.readouterr().err) and "weights in the library's cache" in text


def test_a_network_of_transformers_is_prepared_as_its_processor_says(monkeypatch: pytest.MonkeyPatch) -> None:
    told = {
        "image_mean": [0.1, 0.2, 0.3], "image_std": [0.5] * 3, "rescale_factor": 1 / 255, "do_center_crop": True,
        "size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224},
    }
    asked: list[str] = []

    def network(name: str) -> nn.Module:
        asked.append(name)
        return Known()

    processor = types.SimpleNamespace(to_dict=lambda: told)
    library(
        monkeypatch, "transformers",
        AutoImageProcessor=types.SimpleNamespace(from_pretrained=lambda name: processor),
        AutoModelForImageClassification=types.SimpleNamespace(from_pretrained=network),
        AutoConfig=None,
    )
    options = types.SimpleNamespace(model="transformers:you/net", mean=None, std=None, range=None, resize_mode=None)
    found = preparation_of(options, nn.Conv2d(3, 8, 3))  # type: ignore[arg-type]
    assert found == Preparation((0.1, 0.2, 0.3), (0.5,) * 3, (0.0, 1.0), "crop", 0.875, (224, 224))
    told |= {"size": {"height": 30, "width": 40}, "do_center_crop": False, "rescale_factor": 1 / 127.5}
    found = preparation_of(options, nn.Conv2d(3, 8, 3))  # type: ignore[arg-type]
    assert found.range == (0.0, 2.0) and found.size == (30, 40) and found.mode == "stretch"
    assert cli.main(["coverage", "transformers:you/net", "--input", "3", "8", "8"]) == 0 and asked == ["you/net"]


def test_a_library_that_is_not_installed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    assert cli.main(["coverage", "timm:resnet18"]) == 2
    assert "pip install timm" in capsys.readouterr().err
