"""Telemetry of grouped linear layers: all five operands, each expert's rows beside the codes that they became."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import te_nvfp4_cv as nv
from te_nvfp4_cv.backend import native
from te_nvfp4_cv.telemetry.collect import attach
from tests.helpers import values

OPERANDS = ("input", "input_column", "weight", "grad_output", "grad_output_column")


class Memory:
    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []

    def start(self, header: dict[str, Any]) -> None:
        """Take no header."""

    def step(self, record: dict[str, Any]) -> None:
        self.steps.append(record)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nv.NVFP4GroupedLinear(4, 40, 48)
        with torch.no_grad():  # scales of one expert's would not do for another
            self.experts.weight.mul_(torch.tensor([1.0, 30.0, 1e-2, 1.0]).view(4, 1, 1))

    def forward(self, x: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        return self.experts(x, offsets)


def recorded(backend: str, offsets: list[int], **fields: Any) -> dict[str, Any]:
    torch.manual_seed(1)
    net, sink = Net(), Memory()
    x = values((75, 40)).requires_grad_()
    with torch.no_grad():
        x[offsets[-1] :] = torch.nan  # nobody's
        x[offsets[0] : offsets[1]] *= 20
    watch = attach(net, sinks=[sink], every=1)
    with watch.step(0):
        with nv.nvfp4_autocast(nv.NVFP4BlockScaling(**fields), backend=backend):
            y = net(x, torch.tensor(offsets))
        y[: offsets[-1]].square().mean().backward()
    return sink.steps[0]["layers"]["experts"]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        dict(grouped_scale="expert"),
        dict(disable_rht=True, disable_2d_quantization=True),
        dict(tensor_scale="delayed"),
    ],
    ids=str,
)
@pytest.mark.parametrize("offsets", [[19, 20, 53, 75], [3, 19, 20, 61]], ids=["all", "rows of nobody"])
def test_operands_lie_beside_their_codes_whatever_the_backend(offsets, fields):
    found = {}
    for backend in ("reference", "vendor", *(["integer"] if native.load() else [])):
        layer = recorded(backend, offsets, **fields)
        assert layer["precision"] == "nvfp4" and layer["op"] == "grouped_linear"
        # A face whose rows lay elsewhere than its codes would have less than 0 dB.
        assert all(layer["tensors"][name]["sqnr_db"] > 12 for name in OPERANDS), layer["tensors"]
        found[backend] = [layer["tensors"][name]["sqnr_db"] for name in OPERANDS]
    assert all(figures == pytest.approx(found["reference"]) for figures in found.values())


def test_no_rows_and_gradient_noise():
    layer = recorded("auto", [0, 0, 0, 0])
    assert "weight" in layer["tensors"] and "input" not in layer["tensors"]
    assert recorded("auto", [19, 20, 53, 75])["gradient"]["ratio"] > 1
