"""Packed files of grouped linear layers: the bits of the trained model, its verifier, post-training quantization."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import te_nvfp4_cv as nv
from te_nvfp4_cv.export.experts import InferenceGroupedLinear
from te_nvfp4_cv.export.verify import verify
from tests.helpers import relative_error, same_bits, values

pytest.importorskip("safetensors", reason="the extra [export]")
OFFSETS = torch.tensor([9, 9, 30])


class Net(nn.Module):
    def __init__(self, experts: int = 3) -> None:
        super().__init__()
        self.up = nv.NVFP4GroupedLinear(experts, 48, 32)
        self.down = nv.NVFP4GroupedLinear(experts, 32, 48, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(torch.relu(self.up(x, OFFSETS)), OFFSETS)
        return y


@pytest.mark.parametrize("fields", [{}, dict(disable_2d_quantization=True)], ids=str)
def test_a_loaded_model_has_the_bits_of_the_saved_one(fields: dict[str, Any], tmp_path: Path) -> None:
    recipe, x = nv.NVFP4BlockScaling(**fields), values((30, 48))
    net = Net()
    with nv.nvfp4_autocast(recipe):
        expected = net(x).detach()
    saved = nv.export.save(net, tmp_path / "net", recipe)
    assert saved.quantized == ("up", "down") and saved.weight_bytes < 0.145 * saved.plain_bytes
    loaded = nv.export.load(saved.files[0], Net())
    for weights in ("packed", "cached"):
        loaded.up.set_mode(weights)  # type: ignore[operator]
        assert same_bits(loaded(x), expected)
    assert same_bits(torch.compile(loaded, backend="aot_eager", fullgraph=True)(x), expected)
    again = nv.export.save(loaded, tmp_path / "again", recipe)
    assert same_bits(nv.export.load(again.files[0], Net())(x), expected)
    report = verify(saved.files[0])
    assert report.sound
    assert {row.name: (row.kind, row.precision) for row in report.rows} == dict.fromkeys(
        ("up", "down"), ("grouped_linear", "nvfp4")
    )
    loaded.up.set_mode(activations="high")  # type: ignore[operator]
    loaded.down.set_mode(activations="high")  # type: ignore[operator]
    assert 0 < relative_error(loaded(x), expected) < 0.3


def test_what_a_file_cannot_hold_is_listed_and_another_model_refused(tmp_path: Path) -> None:
    high = nv.export.save(Net(), tmp_path / "high", nv.NVFP4BlockScaling(grouped_scale="expert")).high
    assert set(high) == {"up", "down"} and "grouped_scale='expert'" in high["up"]
    saved = nv.export.save(Net(), tmp_path / "net")
    with pytest.raises(ValueError, match="groups=4"):
        nv.export.load(saved.files[0], Net(4))
    with pytest.raises(ValueError, match="offsets"):
        nv.export.load(saved.files[0], Net()).up(values((30, 48)), torch.tensor([9, 3, 30]))


def test_onnx_refuses_experts(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="the extra [export]")
    model = nv.export.quantize(Net(), [values((30, 48))])
    with pytest.raises(ValueError, match="the experts of 'up' have no form in ONNX"):
        nv.export.to_onnx(model, values((30, 48)), tmp_path / "net.onnx")


def test_post_training_quantization_takes_experts_along() -> None:
    net, x = Net(), values((30, 48))
    with nv.nvfp4_autocast(enabled=False):
        truth = net(x)
    before = copy.deepcopy(net.state_dict())
    quantized = nv.export.quantize(net, [x])
    assert type(quantized.up) is type(quantized.down) is InferenceGroupedLinear
    assert relative_error(quantized(x), truth) < 0.3
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
