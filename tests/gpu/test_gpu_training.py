"""Training on a GPU: vendor and triton against the reference, memory formats, autocast, fp16, memory, fused norms."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from unet_coco.unet import UNet

import te_nvfp4_cv as nv
from tests.helpers import relative_error
from tests.networks import NO_SR, Net, gradients

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
BACKENDS = ["vendor", "triton"]


def run(
    net: nn.Module, x: Tensor, target: Tensor, recipe: Any, backend: str = "auto", dtype: torch.dtype | None = None
) -> list[Tensor]:
    """[logits, gradients...] of one step from a fresh seed, on a copy of the model."""
    net = copy.deepcopy(net)
    torch.manual_seed(5)
    context: Any = contextlib.nullcontext() if recipe is None else nv.nvfp4_autocast(recipe, backend=backend)
    with torch.autocast(x.device.type, dtype or torch.bfloat16, enabled=dtype is not None), context:
        y = net(x)
    F.cross_entropy(y.float(), target).backward()
    return [y.detach(), *gradients(net)]


def unet(activation: str = "relu", size: int = 32, batch: int = 4) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    net = UNet(5, scale=0.5, activation=activation, dropout=0.0)
    return net, torch.randn(batch, 3, size, size), torch.randint(5, (batch, size, size))


def vector(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.flatten().float().cpu() for t in tensors])


@pytest.mark.parametrize("scale", ["current", "delayed"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_unet_step_against_the_reference(backend, scale):
    """One forward and backward in fp32 with rounding to nearest. Bits of deep activations differ by the order of
    accumulation, and codes then flip: layers are compared in bits elsewhere, the whole by its direction.
    """
    net, x, target = unet()
    recipe = nv.NVFP4BlockScaling(disable_stochastic_rounding=True, tensor_scale=scale)
    truth = run(net, x, target, recipe, "reference")
    ours = run(net.to(CUDA), x.to(CUDA), target.to(CUDA), recipe, backend)
    assert relative_error(ours[0].cpu(), truth[0]) < 0.05
    assert F.cosine_similarity(vector(ours[1:]), vector(truth[1:]), dim=0) > 0.98


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_kind_of_layer_against_the_reference(backend):
    torch.manual_seed(0)
    net, x, target = Net().eval(), torch.randn(4, 3, 8, 8), torch.randint(16, (4,))
    truth = run(net, x, target, NO_SR, "reference")
    ours = run(net.to(CUDA), x.to(CUDA), target.to(CUDA), NO_SR, backend)
    assert relative_error(ours[0].cpu(), truth[0]) < 0.05
    assert F.cosine_similarity(vector(ours[1:]), vector(truth[1:]), dim=0) > 0.98


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_memory_formats_and_autocast(backend, dtype):
    net, x, target = (t.to(CUDA) for t in unet())
    results = {}
    for name, layout in (("contiguous", torch.contiguous_format), ("channels_last", torch.channels_last)):
        arranged = copy.deepcopy(net).to(memory_format=layout)
        results[name] = run(arranged, x.to(memory_format=layout), target, NO_SR, backend, dtype)
        assert results[name][0].is_contiguous(memory_format=layout)
        plain = run(arranged, x.to(memory_format=layout), target, None, dtype=dtype)
        assert F.cosine_similarity(vector(results[name][1:]), vector(plain[1:]), dim=0) > 0.85
        assert all(g.isfinite().all() for g in results[name])
    a, b = (vector(values[1:]) for values in results.values())
    assert F.cosine_similarity(a, b, dim=0) > 0.95


@pytest.mark.parametrize("scale", ["current", "delayed"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_unet_learns(backend, scale):
    net, x, target = unet()
    net, x, target = net.to(CUDA), x.to(CUDA), (x[:, 0] > 0).long().to(CUDA)
    recipe = nv.NVFP4BlockScaling(tensor_scale=scale)
    optimizer, losses = torch.optim.AdamW(net.parameters(), lr=2e-3), []
    for _ in range(30):
        with torch.autocast("cuda", torch.bfloat16), nv.nvfp4_autocast(recipe, backend=backend):
            loss = F.cross_entropy(net(x).float(), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    assert losses[-1] < 0.4 * losses[0], f"{losses[0]} to {losses[-1]}"


def peak(net: nn.Module, x: Tensor, target: Tensor, recipe: Any, fused: bool) -> int:
    """Peak bytes of a step above what is there before it, in the second step."""
    net = copy.deepcopy(net)
    if fused:
        nv.fuse(net)
    for _ in range(2):
        for p in net.parameters():
            p.grad = None
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        context: Any = contextlib.nullcontext() if recipe is None else nv.nvfp4_autocast(recipe)
        with torch.autocast("cuda", torch.bfloat16), context:
            y = net(x)
        F.cross_entropy(y.float(), target).backward()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize(("activation", "bound", "fused_bound"), [("silu", 0.95, 0.75), ("relu", 1.0, 0.85)])
def test_peak_memory_is_below_bf16s(activation, bound, fused_bound):
    """Loose bounds: the figures to reach are examples/benchmarks/gpu_step.py's, on a large UNet."""
    net, x, target = unet(activation, size=128, batch=32)
    net, x, target = net.to(CUDA).to(memory_format=torch.channels_last), x.to(CUDA), target.to(CUDA)
    x = x.to(memory_format=torch.channels_last)
    plain = peak(net, x, target, None, False)
    assert peak(net, x, target, nv.NVFP4BlockScaling(), False) < bound * plain
    assert peak(net, x, target, nv.NVFP4BlockScaling(), True) < fused_bound * plain


@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_fused_norms_change_nothing_but_roundings(activation):
    net, x, target = unet(activation)
    net, x, target = net.to(CUDA), x.to(CUDA), target.to(CUDA)
    fused = nv.fuse(copy.deepcopy(net))
    a, b = (run(model, x, target, NO_SR, "vendor", torch.bfloat16) for model in (net, fused))
    assert F.cosine_similarity(vector(a[1:]), vector(b[1:]), dim=0) > 0.95


def test_gradscaler_sees_an_overflow():
    net, x, target = unet()
    net, x, target = net.to(CUDA), x.to(CUDA), target.to(CUDA)
    scaler, optimizer = torch.amp.GradScaler("cuda", init_scale=2.0**60), torch.optim.SGD(net.parameters(), lr=0.1)
    before = [p.detach().clone() for p in net.parameters()]
    with torch.autocast("cuda", torch.float16), nv.nvfp4_autocast(NO_SR):
        loss = F.cross_entropy(net(x).float(), target)
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(a, p) for a, p in zip(before, net.parameters(), strict=True)), "the step was not skipped"
    assert scaler.get_scale() < 2.0**60


def test_torch_compile_of_a_model():
    net = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 1)).to(CUDA)
    x = torch.randn(16, 32, 8, 8, device=CUDA)

    def forward(x: Tensor) -> Tensor:
        with torch.autocast("cuda", torch.bfloat16), nv.nvfp4_autocast(NO_SR, backend="vendor"):
            return net(x)

    y, eager = torch.compile(forward)(x), forward(x)
    assert relative_error(y, eager) < 1e-2
    y.float().square().mean().backward()
    assert all(g.isfinite().all() for g in gradients(net))
