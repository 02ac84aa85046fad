"""torch.__future__.set_swap_module_params_on_conversion(True): a Parameter is the same object with another content."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import te_nvfp4_cv as nv
from te_nvfp4_cv.layer import evaluation_cache

DELAYED = nv.NVFP4BlockScaling(tensor_scale="delayed", disable_stochastic_rounding=True)


@pytest.fixture(autouse=True)
def swapping():
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


def train(model: nn.Module, x: torch.Tensor, steps: int = 2) -> None:
    for _ in range(steps):
        with nv.nvfp4_autocast(DELAYED):
            loss = model(x).square().mean()
        loss.backward()
        del loss
        model.zero_grad()


def test_delayed_scales_stay_with_the_parameter():
    model, x = nn.Sequential(nn.Conv2d(16, 16, 3)), torch.randn(4, 16, 8, 8)
    train(model, x)
    before = nv.extra_state(model)["scales"]
    weight = model[0].weight
    model.to(torch.bfloat16).to(torch.float32)
    assert model[0].weight is weight
    after = nv.extra_state(model)["scales"]
    assert list(after) == list(before) == ["0.weight"]
    assert torch.equal(after["0.weight"]["entries"][0]["used"], before["0.weight"]["entries"][0]["used"])
    train(model, x)
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()})
    assert list(nv.extra_state(model)["scales"]) == ["0.weight"]


def test_codes_of_an_evaluation_are_made_anew(one_thread):
    layer, x = nn.Linear(32, 32), torch.randn(16, 32)

    def evaluate() -> torch.Tensor:
        with torch.no_grad(), nv.nvfp4_autocast():
            return layer(x.to(layer.weight.dtype)).float()

    for _ in range(3):
        first = evaluate()
    assert id(layer.weight) in evaluation_cache._entries
    layer.to(torch.bfloat16)
    rounded = evaluate()
    layer.to(torch.float32)
    assert not torch.equal(rounded, first) and torch.equal(evaluate(), evaluate())


def test_entries_act_still():
    model, x = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)), torch.randn(16, 32)
    nv.set_precision(model, {"0": None})
    for _ in range(2):
        with nv.nvfp4_autocast():
            assert torch.equal(model[0].forward(x), F.linear(x, model[0].weight, model[0].bias).detach())
            assert not torch.equal(model[1].forward(x), F.linear(x.double(), model[1].weight.double()).float())
        model.to(torch.bfloat16).to(torch.float32)


def test_a_constant_that_was_taken_and_a_swap_that_torch_refuses():
    class Filters(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("bank", torch.randn(16, 16, 3, 3))

        def forward(self, x):
            return F.conv2d(x, self.bank.to(x.dtype))

    model, x = Filters(), torch.randn(2, 16, 8, 8)
    with nv.nvfp4_autocast():
        model(x.bfloat16())
    model.load_state_dict({"bank": torch.randn(16, 16, 3, 3)})
    train(layer := nn.Linear(16, 16), torch.randn(16, 16))
    held = layer.weight.view(-1)  # noqa: F841  (torch refuses a tensor that another one shares)
    with pytest.raises(RuntimeError):
        torch.utils.swap_tensors(layer.weight, nn.Parameter(torch.randn(16, 16)))
    assert list(nv.extra_state(layer)["scales"]) == ["weight"]
