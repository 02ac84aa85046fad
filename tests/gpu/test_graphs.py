"""Training steps on a GPU without host synchronisation, and as CUDA graphs: values, random numbers, moving scales."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import te_nvfp4_cv as nv
from te_nvfp4_cv.selftest.training import batches, captured, small_network
from tests.helpers import relative_error
from tests.networks import gradients

pytestmark = pytest.mark.gpu
BACKENDS = ["vendor", "triton"]
SCALES = ["current", "delayed"]
CUDA = torch.device("cuda")


@contextlib.contextmanager
def no_synchronisation() -> Iterator[None]:
    """Anything that makes the host wait for the GPU raises."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def network(fused: bool = False) -> nn.Module:
    net = small_network(32).to(CUDA).to(memory_format=torch.channels_last)
    return nv.fuse(net) if fused else net


def data() -> tuple[Tensor, Tensor]:
    x, label = batches(1, 32, 16)[0]
    return x.to(CUDA, memory_format=torch.channels_last), label.to(CUDA)


def stepper(net: nn.Module, recipe: nv.NVFP4BlockScaling, backend: str, x: Tensor, label: Tensor) -> Callable[[], None]:
    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16), nv.nvfp4_autocast(recipe, backend=backend):
            loss = F.cross_entropy(net(x).float(), label)
        loss.backward()

    return step


@pytest.mark.parametrize("fused", [False, True], ids=["", "fused"])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_host_synchronisation_in_a_step(backend, scale, fused):
    net, recipe = network(fused), nv.NVFP4BlockScaling(tensor_scale=scale)
    step = stepper(net, recipe, backend, *data())
    for _ in range(3):  # compilation, tables and states
        net.zero_grad(set_to_none=True)
        step()
    net.zero_grad(set_to_none=True)
    with no_synchronisation():
        step()
    assert all(g.isfinite().all() for g in gradients(net))


def test_the_detector_of_synchronisation_works():
    with no_synchronisation(), pytest.raises(RuntimeError, match="synchroniz"):
        torch.ones(1, device=CUDA).item()


@pytest.mark.parametrize("backend", BACKENDS)
def test_replays_without_random_numbers_equal_eager_steps(backend):
    net, recipe = network().eval(), nv.NVFP4BlockScaling(disable_stochastic_rounding=True)
    step = stepper(net, recipe, backend, *data())
    replay, written = captured(step, net)
    replay()
    first = [g.clone() for g in written]
    replay()
    second = [g.clone() for g in written]
    net.zero_grad(set_to_none=True)
    step()
    for a, b, c in zip(first, second, gradients(net), strict=True):
        assert relative_error(a, c) < 1e-2 and relative_error(b, c) < 1e-2  # orders of accumulation may differ


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_replay_reads_its_inputs_anew(backend):
    net, recipe = network().eval(), nv.NVFP4BlockScaling(disable_stochastic_rounding=True)
    x, label = data()
    step = stepper(net, recipe, backend, x, label)
    replay, written = captured(step, net)
    replay()
    first = [g.clone() for g in written]
    x.copy_(x.flip(0) * 2)
    replay()
    second = [g.clone() for g in written]
    net.zero_grad(set_to_none=True)
    step()
    assert any(relative_error(a, b) > 1e-2 for a, b in zip(first, second, strict=True))
    assert all(relative_error(b, c) < 1e-2 for b, c in zip(second, gradients(net), strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_replay_draws_new_random_numbers(backend):
    net = network().eval()
    replay, written = captured(stepper(net, nv.NVFP4BlockScaling(), backend, *data()), net)
    results = []
    for _ in range(3):
        replay()
        results.append([g.clone() for g in written])
    for a, b in ((0, 1), (1, 2)):
        assert not all(torch.equal(x, y) for x, y in zip(results[a], results[b], strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_torchs_seed_decides_the_random_numbers_of_eager_steps(backend):
    x, label = data()
    results = []
    for seed in (7, 7, 8):
        net = network().eval()
        torch.manual_seed(seed)
        stepper(net, nv.NVFP4BlockScaling(), backend, x, label)()
        results.append(gradients(net)[-3].clone())
    assert relative_error(results[0], results[1]) < 1e-3 < relative_error(results[0], results[2])


@pytest.mark.parametrize("backend", BACKENDS)
def test_delayed_scales_move_during_replays(backend):
    """Inputs that grow 64-fold: a scale that stood still would clip them, and gradients would shrink."""
    net = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1, bias=False)).to(CUDA)
    recipe = nv.NVFP4BlockScaling(tensor_scale="delayed", disable_stochastic_rounding=True)
    x = torch.randn(16, 32, 8, 8, device=CUDA, dtype=torch.bfloat16)
    out = torch.zeros(16, 32, 8, 8, device=CUDA, dtype=torch.bfloat16)
    net = net.bfloat16()

    def step() -> None:
        with nv.nvfp4_autocast(recipe, backend=backend):
            y = net(x)
        out.copy_(y.detach())
        y.float().square().mean().backward()

    replay, _ = captured(step, net)
    x.mul_(64)
    for _ in range(3):
        replay()
    exact = F.conv2d(x.float(), net[0].weight.detach().float(), padding=1)
    assert relative_error(out, exact) < 0.2


def test_make_graphed_callables():
    recipe = nv.NVFP4BlockScaling(disable_stochastic_rounding=True)
    x = torch.randn(16, 32, 8, 8, device=CUDA)

    class Quantized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 1))

        def forward(self, x: Tensor) -> Tensor:
            with nv.nvfp4_autocast(recipe, backend="vendor"):
                return self.body(x)

    eager = Quantized().to(CUDA)
    graphed = torch.cuda.make_graphed_callables(copy.deepcopy(eager), (x.clone().requires_grad_(),))
    outputs = []
    for module in (eager, graphed):
        leaf = x.clone().requires_grad_()
        y = module(leaf)
        y.square().mean().backward()
        outputs.append([y.detach(), leaf.grad, *gradients(module)])
    for a, b in zip(*outputs, strict=True):
        assert relative_error(a, b) < 1e-3
