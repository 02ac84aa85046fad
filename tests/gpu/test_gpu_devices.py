"""Devices: tensors on different ones, streams, the second GPU, what is made on a GPU stays there."""

from __future__ import annotations

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import te_nvfp4_cv as nv
from te_nvfp4_cv.backend import dispatch
from te_nvfp4_cv.backend.explain import explain
from te_nvfp4_cv.ops.quantize import rounding_seeds
from tests.helpers import relative_error, same_bits
from tests.networks import NO_SR

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")


def operands(device: torch.device = CUDA) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(16, 32, 8, 8).to(device), torch.randn(32, 32, 3, 3).to(device)


def test_operands_on_different_devices():
    x, w = operands()
    with pytest.raises(ValueError, match="(?s)cuda.*cpu"):
        nv.functional.conv2d(x, w.cpu(), padding=1)
    with pytest.raises(ValueError, match="(?s)bias is on another device.*cuda.*cpu"):
        nv.functional.conv2d(x, w, torch.zeros(32), padding=1)
    with nv.nvfp4_autocast(), pytest.raises(RuntimeError):  # torch's own refusal, as without the context
        F.conv2d(x, w.cpu(), padding=1)


def test_the_backend_of_this_gpu():
    assert dispatch.resolve("auto", CUDA) in ("vendor", "triton")
    assert explain(CUDA)["why"]


def test_seeds_are_drawn_on_the_gpu_from_torchs_generator():
    x = torch.empty(1, device=CUDA)
    torch.manual_seed(3)
    a, b = rounding_seeds.draw_seed(x), rounding_seeds.draw_seed(x)
    torch.manual_seed(3)
    assert a.device == x.device and torch.equal(rounding_seeds.draw_seed(x), a) and not torch.equal(a, b)


@pytest.mark.parametrize("backend", ["vendor", "triton"])
def test_a_side_stream(backend):
    """Kernels launch on the current stream: a wait for it is enough."""
    x, w = operands()
    truth = nv.functional.conv2d(x, w, padding=1, recipe=NO_SR, backend=backend)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(20):
            busy = torch.randn(2048, 2048, device=CUDA) @ torch.randn(2048, 2048, device=CUDA)
        y = nv.functional.conv2d(x + 0 * busy.mean().nan_to_num(), w, padding=1, recipe=NO_SR, backend=backend)
    torch.cuda.current_stream().wait_stream(side)
    assert relative_error(y, truth) < 1e-5


def test_quantized_tensors_move_between_devices():
    x, _ = operands()
    t = nv.NVFP4Quantizer(with_rht=True)(x[:, :, 0, 0])
    back = t.cpu()
    assert t.device.type == "cuda" and back.device.type == "cpu"
    assert same_bits(back.dequantize(), t.dequantize().cpu())


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("backend", ["vendor", "triton"])
def test_the_second_gpu_while_the_first_is_current(backend):
    x, w = operands()
    second = torch.device("cuda", 1)
    truth = nv.functional.conv2d(x, w, padding=1, recipe=NO_SR, backend=backend)
    net = nn.Conv2d(32, 32, 3, padding=1, bias=False).to(second)
    with torch.no_grad():
        net.weight.copy_(w)
    with nv.nvfp4_autocast(NO_SR, backend=backend):
        y = net(x.to(second))
    y.square().mean().backward()
    assert y.device == second and relative_error(y.detach().cpu(), truth.cpu()) < 1e-5
