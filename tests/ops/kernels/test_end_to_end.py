"""Whole layers on the Triton kernels, forward and backward: the triton backend, and vendor as it runs on CUDA.

Codes and scales are the reference's bits where rounding is to nearest, so results may differ from the reference's only
by the order of accumulation (fp32) and by one rounding more (bf16 through the vendor's convolution).
"""

from __future__ import annotations

import math

import pytest
import torch

from te_nvfp4_cv.backend import dispatch
from te_nvfp4_cv.recipe.block_scaling import NVFP4BlockScaling
from tests.helpers import relative_error
from tests.layers import LAYERS, NO_SR, step, tensors

BACKENDS = ("triton", "vendor")
RECIPES = {
    "1x16 weights": NVFP4BlockScaling(disable_stochastic_rounding=True, disable_2d_quantization=True),
    "no RHT": NVFP4BlockScaling(disable_stochastic_rounding=True, disable_rht=True),
    "4over6": NVFP4BlockScaling(disable_stochastic_rounding=True, disable_rht=True, nvfp4_4over6="all"),
    "delayed": NVFP4BlockScaling(disable_stochastic_rounding=True, tensor_scale="delayed"),
    "powers of two": NVFP4BlockScaling(disable_stochastic_rounding=True, tensor_scale="current_pow2"),
    "high-precision wgrad": NVFP4BlockScaling(disable_stochastic_rounding=True, high_precision_gemms=("wgrad",)),
    "dequantized backward": NVFP4BlockScaling(disable_stochastic_rounding=True, backward_override="dequantized"),
    "row-scaled": NVFP4BlockScaling(disable_stochastic_rounding=True, disable_rht=True, row_scaled_activation=True),
}


@pytest.fixture(autouse=True)
def _by_kernels(kernel_device, monkeypatch):
    monkeypatch.setattr(dispatch, "KERNELS_ON_CPU", True)


def _on(device, *given):
    return [t.detach().to(device).requires_grad_() for t in given]


def _compare(layer, device, backend, recipe, dtype, tolerance):
    given = tensors(layer, dtype)
    expected = step(layer, *given, recipe=recipe, backend="reference")
    found = step(layer, *_on(device, *given), recipe=recipe, backend=backend)
    for name, mine, theirs in zip(("y", "dx", "dw", "db"), found, expected, strict=True):
        assert mine.dtype == theirs.dtype and mine.shape == theirs.shape
        assert relative_error(mine.cpu(), theirs) <= tolerance, name


# layer: the triton backend multiplies with its own kernels, so every layer; vendor multiplies with torch's convolutions
# (tests/layer has them all), and its kernels see only ranks, groups and which side is contracted
@pytest.mark.parametrize(
    ("backend", "layer"),
    [("triton", layer) for layer in LAYERS]
    + [("vendor", layer) for layer in ("conv1d", "conv2d", "conv2d groups", "conv3d")]
    + [("vendor", layer) for layer in ("conv_transpose2d groups", "linear", "linear vector")],
)
def test_a_layer_equals_the_reference(kernel_device, one_thread, backend, layer):
    _compare(layer, kernel_device, backend, NO_SR, torch.float32, 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
# recipe: a branch of quantization or of the products each; layer: a transposed kernel swaps the weight's copies, and a
# linear layer has rows in place of pixels, which matters where weights have two copies or rows have scales
@pytest.mark.parametrize(
    ("layer", "recipe"),
    [("conv1d", recipe) for recipe in RECIPES]
    + [("conv_transpose2d", "1x16 weights"), ("conv_transpose2d", "4over6")]
    + [("linear matrix", "1x16 weights"), ("linear matrix", "row-scaled")],
)
def test_recipes(kernel_device, one_thread, backend, layer, recipe):
    _compare(layer, kernel_device, backend, RECIPES[recipe], torch.float32, 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_sixteen_bit_inputs(kernel_device, one_thread, backend, dtype):
    _compare("conv2d", kernel_device, backend, NO_SR, dtype, 8e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_stochastic_rounding_is_reproducible_and_fresh(kernel_device, one_thread, backend):
    given = _on(kernel_device, *tensors("conv1d"))
    first, again = (step("conv1d", *given, backend=backend) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    torch.manual_seed(12)
    y = step("conv1d", *given, backend=backend)[0]
    assert torch.equal(y, first[0])  # forward rounds to nearest
    nearest = step("conv1d", *given, backend=backend, recipe=NO_SR)
    assert 0.01 < relative_error(first[1], nearest[1]) < 0.3 and 0.01 < relative_error(first[2], nearest[2]) < 0.3


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("recipe", [None, "delayed", "powers of two"])
def test_a_non_finite_operand_makes_every_output_non_finite(kernel_device, one_thread, backend, bad, recipe):
    recipe = RECIPES.get(recipe, NO_SR)
    x, w, bias = _on(kernel_device, *tensors("conv2d 1x1"))
    with torch.no_grad():
        x[3, 5, 0, 2] = bad
    y, dx, dw, _ = step("conv2d 1x1", x, w, bias, recipe=recipe, backend=backend)
    assert not y.isfinite().any() and not dw.isfinite().any() and dx.isfinite().all()
