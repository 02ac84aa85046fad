"""The oracle's loop nests against torch in float64: an oracle that is wrong would prove nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests import oracle

CASES = [  # image, kernel, stride, padding, dilation, groups
    ((9,), (3,), (2,), (1,), (2,), 1),
    ((6, 5), (3, 2), (1, 2), (1, 0), (1, 1), 2),
    ((7, 7), (3, 3), (2, 2), (2, 2), (2, 1), 1),
    ((4, 3, 4), (2, 1, 3), (1, 1, 2), (1, 0, 1), (1, 1, 1), 2),
]


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def same(got: np.ndarray, expected: torch.Tensor) -> bool:
    return got.shape == tuple(expected.shape) and np.allclose(got, expected.detach().numpy(), atol=1e-12)


def numpy(*tensors: torch.Tensor) -> list[np.ndarray]:
    return [t.detach().numpy() for t in tensors]


@pytest.mark.parametrize(("image", "kernel", "stride", "padding", "dilation", "groups"), CASES)
def test_convolution(image, kernel, stride, padding, dilation, groups):
    x, w = randn(2, 4, *image), randn(6, 4 // groups, *kernel)
    y = (F.conv1d, F.conv2d, F.conv3d)[len(image) - 1](x, w, None, stride, padding, dilation, groups)
    dy = torch.randn_like(y)
    dx, dw = torch.autograd.grad(y, (x, w), dy)
    xn, wn, dyn = numpy(x, w, dy)
    geometry = (stride, padding, dilation, groups)
    assert same(oracle.conv(xn, wn, *geometry), y)
    assert same(oracle.conv_dx(dyn, wn, image, *geometry), dx)
    assert same(oracle.conv_dw(dyn, xn, kernel, *geometry), dw)


@pytest.mark.parametrize(("image", "kernel", "stride", "padding", "dilation", "groups"), CASES)
@pytest.mark.parametrize("longer", [False, True])
def test_transposed_convolution(image, kernel, stride, padding, dilation, groups, longer):
    output_padding = tuple(s - 1 if longer else 0 for s in stride)
    x, w = randn(2, 4, *image), randn(4, 6 // groups, *kernel)
    function = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[len(image) - 1]
    y = function(x, w, None, stride, padding, output_padding, groups, dilation)
    dy = torch.randn_like(y)
    dx, dw = torch.autograd.grad(y, (x, w), dy)
    xn, wn, dyn = numpy(x, w, dy)
    assert same(oracle.conv_transpose(xn, wn, stride, padding, output_padding, dilation, groups), y)
    cut = (slice(None), slice(None), *(slice(n) for n in image))
    assert same(oracle.conv_transpose_dx(dyn, wn, stride, padding, dilation, groups)[cut], dx)
    assert same(oracle.conv_transpose_dw(dyn, xn, kernel, stride, padding, dilation, groups), dw)


def test_tables():
    assert len(oracle.E4M3) == 0x7F and oracle.E4M3[0x7E] == 448 and oracle.E4M3[1] == 2**-9
    assert [oracle.encode_e2m1(v) for v in (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -5.1)] == [0, 2, 2, 4, 4, 6, 6, 15]
