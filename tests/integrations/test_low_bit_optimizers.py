"""torchao's AdamW8bit, AdamW4bit and AdamWFp8 and bitsandbytes' AdamW8bit beside NVFP4 training in one process."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import te_nvfp4_cv as nv
from tests.helpers import same_bits, values
from tests.low_bit_optimizers import SHARES, build, eagerly, state_bytes

RECIPE = nv.NVFP4BlockScaling()


def network() -> nn.Module:
    torch.manual_seed(1)
    layers = [nn.Conv2d(32, 64, 3, padding=1), nn.GroupNorm(4, 64), nn.ReLU(), nn.Conv2d(64, 64, 3, stride=2)]
    return nn.Sequential(*layers, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 64))


def train(net: nn.Module, optimizer: Any, way: str, steps: range) -> tuple[list[float], list[list[Tensor]]]:
    """Losses, and the gradients of each step; stochastic rounding has the step's seed."""
    losses, gradients = [], []
    for step in steps:
        torch.manual_seed(step)
        with nv.nvfp4_autocast(RECIPE) if way == "context" else contextlib.nullcontext():
            loss = (net(values((16, 32, 6, 6))) - values((16, 64), seed=2)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        gradients.append([p.grad.clone() for p in net.parameters()])
        with eagerly():
            optimizer.step()
        losses.append(loss.item())
    return losses, gradients


@pytest.mark.parametrize("way", ["context", "converted"])
@pytest.mark.parametrize("name", SHARES)
def test_an_optimizer_with_small_states_trains_in_nvfp4_and_goes_on_from_a_checkpoint(name, way, tmp_path):
    made = build(name)
    if made is None:
        pytest.skip(f"{name} is not installed, or has no kernels for a CPU")
    net = network() if way == "context" else nv.convert_model(network(), RECIPE)
    optimizer = made(net.parameters())
    alone = copy.deepcopy(net)  # the same gradients, given to plain Parameters
    losses, gradients = train(net, optimizer, way, range(3))
    torch.save((net.state_dict(), optimizer.state_dict()), tmp_path / "checkpoint.pt")
    more, later = train(net, optimizer, way, range(3, 6))
    assert more[-1] < 0.9 * losses[0]
    other = made(alone.parameters())
    for step in (*gradients, *later):
        for p, gradient in zip(alone.parameters(), step, strict=True):
            p.grad = gradient
        with eagerly():
            other.step()
    for p, q in zip(net.parameters(), alone.parameters(), strict=True):
        assert same_bits(p.detach(), q.detach())
    plain = torch.optim.AdamW(alone.parameters())
    plain.step()
    small = sum(8 * p.numel() for p in net.parameters() if p.numel() < 4096)  # these keep fp32
    assert state_bytes(optimizer) - small < SHARES[name] * state_bytes(plain)
    again = network() if way == "context" else nv.convert_model(network(), RECIPE)
    resumed = made(again.parameters())
    weights, states = torch.load(tmp_path / "checkpoint.pt", weights_only=False)
    again.load_state_dict(weights)
    resumed.load_state_dict(states)
    assert train(again, resumed, way, range(3, 6))[0] == more
