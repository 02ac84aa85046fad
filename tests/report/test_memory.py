"""The memory of a training step: its parts are those that a step of this network has."""

import pytest
import torch
from torch import nn

import te_nvfp4_cv as nv
from te_nvfp4_cv.report.memory import OPTIMIZERS, estimate_memory, saved_bytes, state_bytes
from tests.helpers import values
from tests.low_bit_optimizers import SHARES, build, eagerly
from tests.low_bit_optimizers import state_bytes as bytes_of_states


def network() -> nn.Module:
    layers = [nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.SiLU(), nn.Conv2d(64, 64, 3), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(64 * 36, 32))


def test_what_is_saved_grows_as_estimated():
    net, recipe = network(), nv.NVFP4BlockScaling()
    found = estimate_memory(net, values((1, 32, 8, 8)), batch=48, recipe=recipe, optimizer="sgd")
    x = values((48, 32, 8, 8))
    net.train()
    assert found.saved_bf16 == saved_bytes(net, (x,), None)
    measured = saved_bytes(net, (x,), recipe)
    assert abs(found.saved_nvfp4 - measured) < 0.01 * measured and measured < 0.7 * found.saved_bf16
    parameters = sum(p.numel() for p in net.parameters())
    assert found.parameters == 4 * parameters and found.states == 4 * parameters
    assert found.buffers == 64 * 8 + 8  # running statistics, and an int64 count
    assert found.total(0) == 12 * parameters + found.buffers
    with pytest.raises(ValueError, match="optimizer='lion'"):
        estimate_memory(net, x[:1], optimizer="lion")


def test_what_does_not_grow_with_the_batch_counts_once():
    """A cast weight of a layer in high precision is saved for backward, too."""
    net, x = nn.Sequential(nn.Linear(128, 256), nn.Linear(256, 64)), values((96, 128))
    nv.set_precision(net, {"1": None})
    found = estimate_memory(net, x[:1], batch=96)
    assert found.saved_nvfp4 == saved_bytes(net, (x,), nv.NVFP4BlockScaling())
    nv.set_precision(net, {"*": None})
    found = estimate_memory(net, x[:1], batch=96)
    assert found.saved_nvfp4 == found.saved_bf16 == saved_bytes(net, (x,), None)


def test_a_frozen_parameter_has_no_gradient():
    net = network()
    net[0].requires_grad_(False)
    found = estimate_memory(net, values((1, 32, 8, 8)), optimizer="sgd")
    training = sum(p.numel() for p in net.parameters() if p.requires_grad)
    assert found.gradients == found.states == 4 * training
    assert found.total(0) == found.parameters + found.buffers + 8 * training


def test_a_buffer_without_memory_of_its_own_is_no_obstacle():
    net = nn.Sequential(nn.Conv2d(16, 16, 3))
    net.register_buffer("sparse", torch.eye(3).to_sparse())
    x = torch.randn(2, 16, 4, 4)
    assert saved_bytes(net, (x,), None) == saved_bytes(net[0], (x,), None) > 0


@pytest.mark.parametrize("name", ["AdamW", *SHARES])
def test_states_are_counted_as_the_optimizer_keeps_them(name):
    net = network()
    made = torch.optim.AdamW if name == "AdamW" else build(name)
    if made is None:
        pytest.skip(f"{name} is not installed, or has no kernels for a CPU")
    optimizer = made(net.parameters())
    net(values((2, 32, 8, 8))).sum().backward()
    with eagerly():
        optimizer.step()
    key = name.removeprefix("bitsandbytes ").lower()
    assert key in OPTIMIZERS and state_bytes(net, key) == bytes_of_states(optimizer)
