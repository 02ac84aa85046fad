"""The kernels of ops/triton/elementwise.py against torch: ReLU with its mask, its application, scale and bias."""

from __future__ import annotations

import math

import pytest
import torch

from te_nvfp4_cv.backend import dispatch
from te_nvfp4_cv.layer.relu import MaskedReLU
from te_nvfp4_cv.ops import relu
from te_nvfp4_cv.ops.quantize import operand
from te_nvfp4_cv.ops.records import NONE, PACKED, Alpha, WeightLayout, WeightSpec
from tests.helpers import same_bits

SPECIAL = [0.0, -0.0, math.nan, -math.nan, math.inf, -math.inf, 1e-45, -1e-45, 1e-40]
SHAPES = [(1,), (7,), (8,), (4, 16, 3, 5), (4097,), (2, 8, 33, 17)]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture(autouse=True)
def _by_kernels(kernel_device, monkeypatch):
    monkeypatch.setattr(dispatch, "KERNELS_ON_CPU", True)


def _values(shape, dtype, device):
    x = torch.randn(shape, device=device)
    count = min(x.numel(), len(SPECIAL))
    x.view(-1)[:count] = torch.tensor(SPECIAL, device=device)[:count]
    return x.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_relu_and_mask(kernel_device, poison, shape, dtype):
    x = _values(shape, dtype, kernel_device)
    y, mask = relu.masked_relu(x)
    expected = torch.relu(x)
    assert torch.equal(torch.isnan(y), torch.isnan(expected))
    assert torch.equal(torch.nan_to_num(y), torch.nan_to_num(expected))  # of -0.0 torch makes -0.0 or 0.0
    assert not torch.signbit(y[~torch.isnan(y)]).any()
    passes = ~(x.view(-1) <= 0)
    bits = (mask[:, None] >> torch.arange(8, dtype=torch.uint8, device=kernel_device)) & 1
    assert mask.shape == (math.ceil(x.numel() / 8),)
    assert torch.equal(bits.view(-1)[: x.numel()].bool(), passes) and not bits.view(-1)[x.numel() :].any()
    assert same_bits(relu.positive_mask(expected), mask)
    z = x.clone()
    assert same_bits(relu.relu_in_place(z), mask) and same_bits(z, y) and z._version == 1
    dy = _values(shape, dtype, kernel_device).flip(0)
    expected = torch.where(passes.view(shape), dy, torch.zeros_like(dy))
    assert same_bits(relu.apply_mask(dy, mask), expected)


def test_memory_order_of_a_channels_last_tensor(kernel_device):
    x = _values((2, 8, 5, 3), torch.bfloat16, kernel_device).to(memory_format=torch.channels_last)
    y, mask = relu.masked_relu(x)
    assert y.stride() == x.stride()
    assert same_bits(mask, relu.masked_relu(x.permute(0, 2, 3, 1).contiguous())[1])


@pytest.mark.parametrize("inplace", [False, True])
def test_the_autograd_function_equals_torch(kernel_device, inplace):
    x = torch.randn(3, 16, 5, 7, device=kernel_device, dtype=torch.bfloat16)
    results = []
    for function in (lambda v: MaskedReLU.apply(v, inplace), lambda v: torch.relu_(v) if inplace else torch.relu(v)):
        leaf = x.clone().requires_grad_()
        y = function(leaf * 1)
        y.backward(torch.ones_like(y) * 3)
        results.append((y.detach(), leaf.grad))
    for mine, theirs in zip(*results, strict=True):
        assert same_bits(mine, theirs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("source", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("biased", [False, True])
def test_scale_and_bias_round_once(kernel_device, poison, source, dtype, biased):
    from te_nvfp4_cv.ops.triton import elementwise

    y = torch.randn(5, 3, 2, 24, device=kernel_device).to(source)
    alpha = torch.tensor([0.0173], device=kernel_device)
    bias = torch.randn(24, device=kernel_device) if biased else None
    expected = y.double() * alpha.double() + (bias.double() if biased else 0)
    out = elementwise.scale_bias(y.clone(), alpha, bias, dtype)
    assert out.dtype == dtype and out.shape == y.shape
    torch.testing.assert_close(out.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-6)
    alpha.fill_(math.nan)
    assert torch.isnan(elementwise.scale_bias(y.clone(), alpha, bias, dtype)).all()


def test_a_factor_in_parts_gives_the_bits_of_its_product(kernel_device, poison):
    """(a * b) * number in the kernels, as torch multiplies it out, of numbers whose products round."""
    from te_nvfp4_cv.ops.triton import elementwise

    x, w = _values((3, 5, 32), torch.bfloat16, kernel_device), torch.randn(32, 17, 3, device=kernel_device)
    for a, b, number in ((0.1, 3.3, 1.3839e-7), (math.nan, 1.0, 0.5), (1e30, 1e30, 1e-30), (2688.0, 5376.0, 2.0**-23)):
        alpha = Alpha(*(torch.tensor([v], device=kernel_device) for v in (a, b)), number)
        assert same_bits(
            elementwise.scale_bias(x, alpha, None, torch.float32),
            elementwise.scale_bias(x, alpha.tensor(), None, torch.float32),
        )
        for two_d, name in ((True, "row"), (False, "col")):
            spec = WeightSpec(1, PACKED, NONE if two_d else PACKED, two_d)
            face = operand.quantize_weight(w, spec, torch.float32, "triton").face(name)
            layout = WeightLayout(32, 17, 1, name == "col")
            made = [operand.unpack_weight(face, layout, f, torch.float32, "triton") for f in (alpha, alpha.tensor())]
            assert same_bits(*made)


def test_empty_tensors(kernel_device):
    x = torch.empty(0, 16, device=kernel_device)
    y, mask = relu.masked_relu(x)
    assert y.shape == x.shape and mask.numel() == 0 and relu.apply_mask(x, mask).shape == x.shape
