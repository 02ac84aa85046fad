"""Layers of CPU tensors under another default device: what a layer makes for itself is made where x is.

Kernels write to these tensors by address, so one made elsewhere would end the process.
"""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn

import te_nvfp4_cv as nv
from te_nvfp4_cv.backend import native

BACKENDS = ["reference", "vendor", *(["integer"] if native.load() is not None else [])]


def _step(net, x, backend, around):
    torch.manual_seed(1)
    net.zero_grad()
    with around, nv.nvfp4_autocast(backend=backend):
        y = net(x)
        y.square().mean().backward()
    return [y.detach(), *(p.grad.clone() for p in net.parameters())]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("images", [3, 16])  # 3: folded
def test_another_default_device_changes_nothing(backend, images):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(32, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 48, 3, stride=2, groups=2),
        nn.ConvTranspose2d(48, 16, 2, stride=2),
        nn.Flatten(),
        nn.Linear(16 * 6 * 6, 32),
    )
    x = torch.randn(images, 32, 8, 8)
    expected = _step(net, x, backend, contextlib.nullcontext())
    for a, b in zip(expected, _step(net, x, backend, torch.device("meta")), strict=True):
        assert a.device.type == b.device.type == "cpu" and torch.equal(a, b)
    with torch.no_grad(), nv.nvfp4_autocast(backend=backend):
        plain = net(x)
        with torch.device("meta"):
            assert torch.equal(net(x), plain) and torch.equal(net(x), plain)
