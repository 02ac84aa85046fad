"""Telemetry on a GPU: the same bits with and without, statistics that agree with the CPU's."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from unet_coco.unet import UNet

import te_nvfp4_cv as nv
from te_nvfp4_cv import telemetry

pytestmark = pytest.mark.gpu


class Memory:
    """A sink that keeps the sampled steps."""

    def __init__(self) -> None:
        self.steps: list[Any] = []
        self.start = self.scalars = self.alarm = self.image = self.close = lambda *_, **__: None

    def step(self, record: dict[str, Any]) -> None:
        self.steps.append(record["layers"])


def train(device: str, recipe: Any, backend: str, watched: bool, steps: int = 2) -> tuple[list[torch.Tensor], Memory]:
    torch.manual_seed(0)
    net = UNet(5, scale=0.5, dropout=0.0)
    x, y = torch.randn(16, 3, 32, 32), torch.randint(5, (16, 32, 32))
    net, x, y = copy.deepcopy(net).to(device), x.to(device), y.to(device)
    sink = Memory()
    watch = telemetry.attach(net, every=1, sinks=[sink] if watched else [])
    optimizer = torch.optim.SGD(net.parameters(), 0.05)
    torch.manual_seed(1)
    for step in range(steps):
        optimizer.zero_grad()
        with watch.step(step):
            with torch.autocast(device, torch.bfloat16), nv.nvfp4_autocast(recipe, backend=backend):
                logits = net(x)
            F.cross_entropy(logits.float(), y).backward()
        optimizer.step()
    return [p.detach().cpu() for p in net.parameters()], sink


@pytest.mark.parametrize("scale", ["current", "delayed"])
@pytest.mark.parametrize("backend", ["vendor", "triton"])
def test_nothing_changes(backend, scale, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    recipe = nv.NVFP4BlockScaling(tensor_scale=scale)
    plain, _ = train("cuda", recipe, backend, False)
    again, _ = train("cuda", recipe, backend, False)
    if not all(torch.equal(a, b) for a, b in zip(plain, again, strict=True)):
        pytest.skip("two runs without telemetry differ: this GPU's kernels add in a changing order")
    seen, sink = train("cuda", recipe, backend, True)
    assert all(torch.equal(a, b) for a, b in zip(plain, seen, strict=True)) and len(sink.steps) == 2


@pytest.mark.parametrize("backend", ["vendor", "triton"])
def test_statistics_are_the_cpus(backend):
    """Of the first step's weights, whose codes are the same bits everywhere; of activations, roughly."""
    recipe = nv.NVFP4BlockScaling(disable_stochastic_rounding=True)
    _, here = train("cuda", recipe, backend, True, steps=1)
    _, there = train("cpu", recipe, "vendor", True, steps=1)
    for name, layer in there.steps[0].items():
        ours = here.steps[0][name]
        assert ours["precision"] == layer["precision"] and set(ours["tensors"]) == set(layer["tensors"])
        if layer["precision"] == "nvfp4":
            a, b = ours["tensors"]["weight"], layer["tensors"]["weight"]
            assert a["codes"]["usage"] == b["codes"]["usage"] and a["sqnr_db"] == pytest.approx(b["sqnr_db"], rel=1e-6)
            for tensor in ("input", "grad_output"):
                a, b = ours["tensors"][tensor], layer["tensors"][tensor]
                assert a["sqnr_db"] == pytest.approx(b["sqnr_db"], abs=1.5)
