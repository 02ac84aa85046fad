"""Folding of norms that run their activation themselves, as timm's do, and of models that nv.fuse has rewritten."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import te_nvfp4_cv as nv
from te_nvfp4_cv.export.folding import FoldedNorm
from te_nvfp4_cv.export.ptq.norm_folding import Folded, fold
from tests.helpers import same_bits, values


class NormAct(nn.BatchNorm2d):
    """Batch norm, dropout and activation in one module."""

    def __init__(self, channels: int, act: nn.Module | None = None, scale: float | None = None) -> None:
        super().__init__(channels)
        self.drop, self.act, self.scale = nn.Dropout2d(0.2), act or nn.Identity(), scale

    def forward(self, x: Tensor) -> Tensor:
        torch._assert(x.ndim == 4, "expected 4D input")
        y = self.act(self.drop(super().forward(x)))
        return y if self.scale is None else y * self.scale


class Net(nn.Module):
    def __init__(self, scale: float | None = None) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(16, 32, 3, bias=False), NormAct(32, nn.PReLU(), scale)
        self.conv2, self.bn2 = nn.Conv2d(32, 16, 1), NormAct(16, nn.Hardswish())
        self.conv3, self.bn3, self.idle = nn.Conv2d(16, 16, 1), NormAct(16), nn.Identity()
        self.conv4, self.bn4 = nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn2(self.conv2(self.bn1(self.conv1(x))))
        x = F.relu(self.bn3(self.idle(self.conv3(x))) + x)
        return F.relu(self.bn4(self.conv4(x)))


def trained(scale: float | None = None) -> Any:
    torch.manual_seed(0)
    net = Net(scale)
    for seed in range(4):
        net(2 * values((4, 16, 8, 8), seed=seed) + 1)
    return net.eval()


ALL = {f"bn{i}": f"conv{i}" for i in (1, 2, 3, 4)}


def test_all_norms_are_folded_and_their_activations_stay() -> None:
    net, x = trained(), values((4, 16, 8, 8), seed=9)
    folded = copy.deepcopy(net)
    with torch.no_grad():
        expected = net(x)
        assert {pair.norm_name: pair.layer_name for pair in fold(folded, functools.partial(folded, x))} == ALL
        torch.testing.assert_close(folded(x), expected, rtol=1e-4, atol=1e-5)
    assert isinstance(folded.bn1, FoldedNorm) and folded.bn1.act is not net.bn1.act
    assert [name for name, _ in folded.named_modules()] == [name for name, _ in net.named_modules()]
    assert isinstance(folded.bn1.act, nn.PReLU) and "bn1.act.weight" in folded.state_dict()


def test_norms_of_a_fused_model_are_folded() -> None:
    net = nv.export.quantize(nv.fuse(trained()), [values((4, 16, 8, 8), seed=9)])
    assert all(isinstance(net.get_submodule(name), FoldedNorm) for name in ALL)


def test_norms_that_do_something_else_stay() -> None:
    net, x = trained(scale=0.5), values((4, 16, 8, 8), seed=9)
    with torch.no_grad():
        expected = net(x)
        assert "bn1" not in [pair.norm_name for pair in fold(net, functools.partial(net, x))]
        torch.testing.assert_close(net(x), expected, rtol=1e-4, atol=1e-5)


def test_quantized_saved_and_loaded(tmp_path: Path) -> None:
    images = [2 * values((4, 16, 8, 8), seed=seed) + 1 for seed in range(2)]
    quantized = nv.export.quantize(nv.fuse(trained()), images)
    assert all(isinstance(quantized.get_submodule(name), FoldedNorm) for name in ALL)
    nv.export.save(quantized, tmp_path / "net")
    for fresh in (Net(), nv.fuse(Net())):
        loaded = nv.export.load(tmp_path / "net.safetensors", fresh)
        assert isinstance(loaded.bn1, FoldedNorm) and same_bits(loaded(images[0]), quantized(images[0]))
    other = Net(scale=2.0)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match="cannot take the place of this NormAct"):
        nv.export.load(tmp_path / "net.safetensors", other)
    assert all(same_bits(before[name], value) for name, value in other.state_dict().items())


@pytest.mark.parametrize("kind", ["plain", "with an activation", "without parameters"])
def test_a_pair_is_folded_only_where_the_outputs_gain(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A norm that makes one row 3 million times as large as the others takes their scales away when it is folded."""

    def make() -> Any:
        norm: nn.Module = nn.BatchNorm2d(32, affine=kind != "without parameters")
        act: nn.Module = nn.ReLU()
        if kind == "with an activation":
            norm, act = NormAct(32, act), nn.Identity()
        norm.eps = 1e-18
        return nn.Sequential(nn.Conv2d(16, 32, 3), norm, act, nn.Conv2d(32, 32, 1), nn.BatchNorm2d(32), nn.ReLU())

    torch.manual_seed(0)
    net, x = make(), values((8, 16, 8, 8), seed=1)
    nv.sensitivity.update_bn(net, [x])
    net.eval()
    with torch.no_grad():
        net[1].running_var[7] *= 1e-13
        net[3].weight[:, 7] *= 3e-7
        expected = net(x)
        found = nv.export.quantize(net, [x], activations="high")
        with monkeypatch.context() as patch:
            patch.setattr(Folded, "uneven", False)
            folded = nv.export.quantize(net, [x], activations="high")
        errors = [float((model(x) - expected).norm() / expected.norm()) for model in (found, folded)]
    assert errors[0] < 0.25 and errors[0] < 0.5 * errors[1], errors
    assert [row.how for row in sorted(found.nvfp4_drift.layers, key=lambda row: row.name)] == ["unfolded", "nvfp4"]
    assert isinstance(found[4], FoldedNorm) and type(found[1]) is type(net[1])
    nv.export.save(found, tmp_path / "net")
    loaded = nv.export.load(tmp_path / "net", make(), activations="high")
    assert same_bits(loaded(x), found(x))
