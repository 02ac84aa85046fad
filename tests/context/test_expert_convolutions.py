"""Convolutions whose kernels are mixed for each image (CondConv), or chosen for it (mixture of experts).

Models write them as one convolution of as many groups as there are images.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import te_nvfp4_cv as nv
from tests.helpers import relative_error, same_bits, values

NO_SR = nv.NVFP4BlockScaling(disable_stochastic_rounding=True)


class ExpertConv(nn.Module):
    """A convolution with a kernel for each image: a mixture of the experts' kernels, or that of the best expert."""

    def __init__(self, channels: int, outputs: int, top1: bool = False, groups: int = 1) -> None:
        super().__init__()
        self.shape, self.groups, self.top1 = (outputs, channels // groups, 3, 3), groups, top1
        self.experts = nn.Parameter(torch.randn(4, outputs * (channels // groups) * 9) / (channels * 9 / groups) ** 0.5)
        self.router = nn.Linear(channels, 4)

    def kernels(self, x: Tensor) -> Tensor:
        """Return the images' kernels [B * O, C / groups, 3, 3]."""
        share = self.router(x.mean((2, 3))).softmax(1)
        if self.top1:
            share = F.one_hot(share.argmax(1), 4) * share
        return (share @ self.experts).view(-1, *self.shape[1:])

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, *image = x.shape
        y = F.conv2d(x.reshape(1, batch * channels, *image), self.kernels(x), None, 1, 1, 1, self.groups * batch)
        return y.view(batch, self.shape[0], *y.shape[2:])


@pytest.mark.parametrize("top1", [False, True], ids=["mixed", "chosen"])
@pytest.mark.parametrize("groups", [1, 2])
def test_kernels_of_single_images_run_in_nvfp4(top1: bool, groups: int) -> None:
    model, x = ExpertConv(32, 48, top1, groups), values((5, 32, 7, 6)).requires_grad_()
    (row,) = [row for row in nv.coverage(model, x).rows if row.op == "conv2d"]
    assert row.nvfp4 and row.kernel == (5 * 48, 32 // groups, 3, 3)
    results = []
    for enabled in (False, True):
        model.zero_grad()
        x.grad = None
        with nv.nvfp4_autocast(NO_SR, enabled=enabled):
            y = model(x)
        y.backward(values(tuple(y.shape), seed=3))
        results.append((y.detach(), x.grad, model.experts.grad, model.router.weight.grad))
    for ours, truth in zip(results[1], results[0], strict=True):
        assert ours is not None and truth is not None and 0.01 < relative_error(ours, truth) < 0.3


@pytest.mark.parametrize("backend", ["reference", "integer", "vendor"])
def test_each_image_is_convolved_as_alone(backend: str) -> None:
    """Where all images and kernels have one amax, y and dx are those of a loop over images, bit for bit."""
    x, w, dy = values((3, 32, 6, 5)), values((3, 16, 32, 3, 3), seed=1), values((3, 16, 6, 5), seed=2)
    for t in (x, w, dy):
        t[:, 0, 0, 0] = 6.0
    x, w = x.requires_grad_(), w.requires_grad_()
    with nv.nvfp4_autocast(NO_SR, backend=backend):
        y = F.conv2d(x.view(1, 96, 6, 5), w.view(48, 32, 3, 3), None, 1, 1, 1, 3).view(3, 16, 6, 5)
    (dx,) = torch.autograd.grad(y, x, dy)
    for i in range(3):
        with nv.nvfp4_autocast(NO_SR, backend=backend):
            alone = F.conv2d(x[i : i + 1], w[i], None, 1, 1)
        (dx_alone,) = torch.autograd.grad(alone, x, dy[i : i + 1])
        assert same_bits(y[i : i + 1].detach(), alone.detach()) and same_bits(dx[i], dx_alone[i])


def test_thin_and_depthwise_experts_are_listed() -> None:
    for channels, groups, reason in ((8, 1, "thin"), (32, 32, "depthwise")):
        report = nv.coverage(ExpertConv(channels, 32, groups=groups), values((2, channels, 5, 5)))
        (row,) = [row for row in report.rows if row.op == "conv2d"]
        assert not row.nvfp4 and reason in row.reason


def test_compiles_to_one_graph() -> None:
    model, x = ExpertConv(32, 32), values((4, 32, 6, 6))

    def run(x: Tensor) -> Tensor:
        with nv.nvfp4_autocast(NO_SR):
            return model(x)

    assert same_bits(torch.compile(run, backend="aot_eager", fullgraph=True)(x).detach(), run(x).detach())
