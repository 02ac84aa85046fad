"""frozen_weights with weights of every making, and whatever mode they are used in first."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import te_nvfp4_cv as nv
from te_nvfp4_cv.backend import devices
from te_nvfp4_cv.layer import operands, weight_codes


def gradients(layer: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    torch.manual_seed(0)
    with nv.nvfp4_autocast():
        y = layer(x)
    return list(torch.autograd.grad(y.square().sum(), [x, *layer.parameters()]))


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_the_first_use_may_be_an_evaluation(mode):
    layer, x = nn.Conv2d(32, 32, 3), torch.randn(4, 32, 8, 8, requires_grad=True)
    expected = gradients(layer, x)
    with nv.frozen_weights(layer):
        with mode(), nv.nvfp4_autocast():
            layer(x)
        assert all(map(torch.equal, gradients(layer, x), expected))
        with mode(), nv.nvfp4_autocast():
            layer(x)


def test_weights_that_were_made_in_inference_mode():
    with torch.inference_mode():
        layer, x = nn.Conv2d(32, 32, 3), torch.randn(4, 32, 8, 8)
    with torch.no_grad(), nv.nvfp4_autocast():
        expected = layer(x)
        with nv.frozen_weights(layer):
            assert torch.equal(layer(x), expected) and torch.equal(layer(x), expected)
        with pytest.raises(RuntimeError, match="its contents differ"), nv.frozen_weights(layer):
            layer(x)
            with torch.inference_mode():
                layer.weight[0, 0, 0, 0] += 1
    assert weight_codes.frozen == {}


def test_a_report_takes_buffers_that_were_made_in_inference_mode():
    model = nn.Sequential(nn.Conv2d(32, 32, 3))
    with torch.inference_mode():
        model.register_buffer("steps", torch.zeros(1))
    assert nv.coverage(model, torch.randn(4, 32, 8, 8)).rows[0].nvfp4


def test_a_graph_that_is_captured_quantizes_by_itself(monkeypatch):
    # No code runs at a replay, which may come after the next optimizer step.
    layer, x, made = nn.Conv2d(32, 32, 3), torch.randn(4, 32, 8, 8, requires_grad=True), []
    expected, quantize_weight = gradients(layer, x), operands.quantize_weight

    def counted(*arguments, **named):
        made.append(quantize_weight(*arguments, **named))
        return made[-1]

    monkeypatch.setattr(operands, "quantize_weight", counted)
    with nv.frozen_weights(layer):
        for captured, number in ((True, 1), (False, 2), (False, 2), (True, 3)):
            monkeypatch.setattr(devices, "capturing", lambda _, now=captured: now)
            assert all(map(torch.equal, gradients(layer, x), expected)) and len(made) == number


def test_weights_that_are_made_at_the_first_use():
    lazy = nn.Sequential(nn.LazyConv2d(32, 3), nn.LazyBatchNorm2d(), nn.Flatten(), nn.LazyLinear(32))
    x = torch.randn(4, 32, 8, 8, requires_grad=True)
    with nv.frozen_weights(lazy):
        first = gradients(lazy, x)
        assert len(weight_codes.frozen) >= 2 and all(w.sets for w in weight_codes.frozen.values() if w.weight.dim() > 1)
        assert len(gradients(lazy, x)) == len(first)
    assert weight_codes.frozen == {}
    with pytest.raises(RuntimeError, match="'3.weight' changed inside"), nv.frozen_weights(lazy):
        gradients(lazy, x)
        with torch.no_grad():
            lazy[3].weight.mul_(2)
