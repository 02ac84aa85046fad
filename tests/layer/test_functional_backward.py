"""The backward pass of nv.functional: what is kept for it, which gradients it gives, randomness, non-finite values."""

from __future__ import annotations

import gc
import itertools
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from te_nvfp4_cv import formats
from te_nvfp4_cv import functional as NF
from te_nvfp4_cv.context.context_manager import nvfp4_autocast
from te_nvfp4_cv.layer import weight_codes
from te_nvfp4_cv.nn.frozen_weights import frozen_weights
from te_nvfp4_cv.ops.quantize import operand
from te_nvfp4_cv.ops.quantize.matrix import quantize
from te_nvfp4_cv.ops.records import NONE, PACKED
from te_nvfp4_cv.recipe.block_scaling import NVFP4BlockScaling
from tests.helpers import relative_error, same_bits, values
from tests.layers import BACKENDS, LAYERS, NO_SR, saved_by, step, tensors

pytestmark = pytest.mark.usefixtures("one_thread")
layers = pytest.mark.parametrize("layer", LAYERS)

KEEPS_X = [
    NVFP4BlockScaling(backward_override="high_precision"),
    NVFP4BlockScaling(high_precision_gemms=("wgrad",)),
]
KEEPS_CODES = [
    NVFP4BlockScaling(),
    NVFP4BlockScaling(disable_2d_quantization=True),
    NVFP4BlockScaling(backward_override="dequantized"),
    NVFP4BlockScaling(high_precision_gemms=("fprop",)),
    NVFP4BlockScaling(disable_rht=True, row_scaled_activation=True),
]
ROW_SCALED = ("conv2d 1x1", "linear")  # the layers that such a recipe gives row scales


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("recipe", KEEPS_CODES, ids=repr)
@pytest.mark.parametrize("layer", ["conv2d", "conv2d 1x1", "conv_transpose2d", "linear"])
def test_saved_codes_suffice_for_backward(layer, recipe, backend):
    if backend == "integer" and recipe.row_scaled_activation and layer in ROW_SCALED:
        pytest.skip("the integer backend refuses row scales")
    x, w, bias = tensors(layer)
    function, arguments = getattr(NF, LAYERS[layer][0]), LAYERS[layer][3]
    expected = step(layer, x, w, bias, recipe=recipe, backend=backend)
    kept = saved_by(lambda: function(x, w, bias, **arguments, recipe=recipe, backend=backend))
    storages = {t.untyped_storage().data_ptr() for t in kept}
    assert kept and x.untyped_storage().data_ptr() not in storages
    assert not any(t.is_floating_point() and t.numel() >= x.numel() for t in kept)

    torch.manual_seed(11)
    hidden = x.detach().clone().requires_grad_()  # a copy to spoil and to free
    inner = hidden * 1
    y = function(inner, w, bias, **arguments, recipe=recipe, backend=backend)
    inner.data.fill_(float("nan"))
    del inner
    gc.collect()
    y.backward(values(y.shape, "normal", y.dtype, 7))
    assert same_bits(hidden.grad, expected[1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("recipe", KEEPS_X, ids=repr)
def test_high_precision_backward_keeps_the_operand_and_notices_that_it_changed(recipe, backend):
    x, w, bias = tensors("conv2d")
    y, dx, dw, db = step("conv2d", x, w, bias, recipe=recipe, backend=backend)
    exact = step("conv2d", x, w, bias, F)
    assert relative_error(dw, exact[2]) <= 1e-5
    if "dgrad" not in recipe.nvfp4_gemms:
        assert relative_error(dx, exact[1]) <= 1e-5
    last = x.detach().to(memory_format=torch.channels_last).requires_grad_()
    inner = last * 1
    y = NF.conv2d(inner, w, recipe=recipe, backend=backend)
    inner.fill_(0.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layer", ["conv2d groups", "conv_transpose2d groups", "conv1d", "linear"])
def test_dequantized_backward_is_torchs_on_dequantized_operands(layer, backend):
    x, w, bias = tensors(layer)
    recipe = NVFP4BlockScaling(backward_override="dequantized")
    y, dx, dw, _ = step(layer, x, w, bias, recipe=recipe, backend=backend)
    groups = LAYERS[layer][3].get("groups", 1)
    if layer == "linear":
        flat = quantize(x.detach().flatten(0, -2))
        x_hat = dequantize(flat, x.shape)
    else:
        last = x.detach().movedim(1, -1)
        x_hat = dequantize(quantize(last.flatten(0, -2)), last.shape).movedim(-1, 1)
    w_hat = dequantized_kernel(w.detach(), groups)
    x_hat, w_hat = x_hat.requires_grad_(), w_hat.requires_grad_()
    exact = step(layer, x_hat, w_hat, bias, F)
    assert relative_error(y, exact[0]) <= 1e-5
    assert relative_error(dx, exact[1]) <= 1e-5 and relative_error(dw, exact[2]) <= 1e-5


def dequantize(faces: Any, shape: tuple[int, ...]) -> Tensor:
    """High-precision values of a rowwise face."""
    return formats.dequantize(faces.row_data, faces.row_scale, faces.row_amax)[..., : shape[-1]].reshape(shape)


def dequantized_kernel(w: Tensor, groups: int) -> Tensor:
    """w through 16x16 tiles over (axis 0, axis 1) of one group and tap, with one amax for all."""
    shape = w.shape
    w = w.reshape(groups, shape[0] // groups, shape[1], -1)
    out = torch.empty_like(w)
    for g, tap in itertools.product(range(groups), range(w.shape[-1])):
        faces = quantize(w[g, :, :, tap], two_d=True, amax_rowwise=w.abs().amax().reshape(1))
        out[g, :, :, tap] = dequantize(faces, w.shape[1:3])
    return out.reshape(shape)


@layers
@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (0, 1), ()], ids=str)
def test_only_the_gradients_that_are_needed(layer, needed):
    full = step(layer, *tensors(layer), recipe=NO_SR)
    parts = [t.detach().requires_grad_(i in needed) for i, t in enumerate(tensors(layer))]
    kept: list[Tensor] = []
    if not needed:
        kept = saved_by(lambda: getattr(NF, LAYERS[layer][0])(*parts, **LAYERS[layer][3], recipe=NO_SR))
        assert kept == []
        return
    got = step(layer, *parts, recipe=NO_SR)
    assert same_bits(got[0].detach(), full[0].detach())
    for i, grad in zip(needed, got[1:], strict=True):
        assert same_bits(grad, full[1 + i])


def test_frozen_weights_and_no_grad_keep_no_face_of_x():
    x, w, _ = tensors("conv2d")
    kept = saved_by(lambda: NF.conv2d(x, w.detach()))
    assert sum(t.numel() * t.element_size() for t in kept) < w.numel()
    faces: list[int] = []
    original = operand.quantize_operand
    operand.quantize_operand = lambda *args: faces.append(args[1].col) or original(*args)  # type: ignore[assignment]
    try:
        y = NF.conv2d(x, w)
        with torch.no_grad():
            y_no_grad = NF.conv2d(x, w)
        with torch.inference_mode():
            y_inference = NF.conv2d(x, w)
    finally:
        operand.quantize_operand = original
    assert faces == [PACKED, NONE, NONE]
    assert same_bits(y.detach(), y_no_grad) and same_bits(y.detach(), y_inference.clone())


def test_the_graph_does_not_hold_codes_that_backward_does_not_read(monkeypatch):
    made: list[weakref.ref[Tensor]] = []
    original = weight_codes.codes_of

    def codes_of(w, plan):
        codes = original(w, plan)
        made.append(weakref.ref(codes.row.data))
        return codes

    monkeypatch.setattr(weight_codes, "codes_of", codes_of)
    layer = torch.nn.Conv2d(32, 32, 3)
    x = values((16, 32, 8, 8), "normal", torch.float32, 0).requires_grad_()
    recipe = NVFP4BlockScaling(disable_2d_quantization=True)  # dgrad reads another face than fprop
    with frozen_weights(layer), nvfp4_autocast(recipe):
        y = layer(x)
    gc.collect()
    assert len(made) == 1 and made[0]() is None
    y.sum().backward()
    assert x.grad is not None


def test_bias_gradient_is_the_sum_of_dy():
    for dtype in (torch.float32, torch.bfloat16):
        x, w, bias = tensors("conv2d", dtype)
        y = NF.conv2d(x, w, bias, 1, 1)
        dy = values(y.shape, "normal", dtype, 3)
        (db,) = torch.autograd.grad(y, bias, dy)
        assert relative_error(db, dy.float().sum((0, 2, 3))) <= (1e-6 if dtype == torch.float32 else 4e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_twice_needs_retain_graph(backend):
    x, w, bias = tensors("conv2d")
    y = NF.conv2d(x, w, bias, 1, 1, recipe=NO_SR, backend=backend)
    first = torch.autograd.grad(y.sum(), (x, w), retain_graph=True)
    second = torch.autograd.grad(y.sum(), (x, w))
    assert all(same_bits(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="retain_graph"):
        torch.autograd.grad(y.sum(), (x, w))


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_seeds_give_equal_stochastic_rounding(backend):
    parts = tensors("conv2d")
    first, second = (step("conv2d", *parts, backend=backend) for _ in range(2))
    assert all(same_bits(a.detach(), b.detach()) for a, b in zip(first, second, strict=True))
    x, w, bias = parts
    y = NF.conv2d(x, w, bias, 1, 1, backend=backend)
    dy = values(y.shape, seed=7)
    draws = [torch.autograd.grad(y, (x, w, bias), dy, retain_graph=True) for _ in range(2)]
    assert not torch.equal(draws[0][0], draws[1][0]) and not torch.equal(draws[0][1], draws[1][1])
    assert torch.equal(draws[0][2], draws[1][2])  # the bias gradient is not quantized


@layers
def test_stochastic_rounding_is_the_same_on_all_backends(layer):
    parts = tensors(layer)
    truth, *others = (step(layer, *parts, backend=backend) for backend in BACKENDS)
    for other in others:
        assert all(relative_error(b, a) <= 1e-5 for a, b in zip(truth, other, strict=True))


def test_stochastic_rounding_is_unbiased():
    x, w, _ = tensors("conv2d")
    y = NF.conv2d(x, w, None, 1, 1)
    dy = values(y.shape, seed=7)
    draws = torch.stack([torch.autograd.grad(y, x, dy, retain_graph=True)[0] for _ in range(64)])
    exact = step("conv2d", x, dequantized_kernel(w.detach(), 1).requires_grad_(), None, F)[1]
    assert relative_error(draws.mean(0), exact) < relative_error(draws[0], exact) / 5


@pytest.mark.parametrize("layer", ["conv2d", "conv_transpose2d", "linear"])
@pytest.mark.parametrize("wrt", ["x", "w"])
def test_double_backward_is_a_clear_error(layer, wrt):
    x, w, bias = tensors(layer)
    y = getattr(NF, LAYERS[layer][0])(x, w, bias, **LAYERS[layer][3])
    for loss in (y.square().sum(), y.sum()):  # with the second, dy is a constant, yet dx depends on w
        (grad,) = torch.autograd.grad(loss, x if wrt == "x" else w, create_graph=True)
        assert grad.requires_grad
        with pytest.raises(RuntimeError, match="enabled=False"):
            torch.autograd.grad(grad.square().sum(), (x, w), allow_unused=True, retain_graph=True)
        with pytest.raises(RuntimeError, match="double backward"):
            grad.square().sum().backward(retain_graph=True)


def test_results_can_be_modified_in_place():
    for layer, channels_last in itertools.product(LAYERS, (False, True)):
        x, w, bias = tensors(layer)
        if channels_last and x.dim() == 4:
            x = x.detach().to(memory_format=torch.channels_last).requires_grad_()
        function, arguments = getattr(NF, LAYERS[layer][0]), LAYERS[layer][3]
        grads = []
        for inplace in (True, False):
            torch.manual_seed(11)
            y = function(x, w, bias, **arguments)
            y = y.relu_() if inplace else y.relu()
            grads.append(torch.autograd.grad(y.square().sum(), (x, w)))
        assert all(same_bits(a, b) for a, b in zip(*grads, strict=True)), layer


# ---- non-finite values ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["x", "w", "dy"])
@pytest.mark.parametrize("layer", ["conv2d", "conv2d groups", "conv2d 1x1", "conv_transpose2d", "linear"])
def test_a_non_finite_operand_makes_its_gemms_non_finite(layer, where, bad, backend):
    recipes = [NVFP4BlockScaling(), NVFP4BlockScaling(disable_rht=True, row_scaled_activation=True)]
    for recipe in recipes if layer in ROW_SCALED and backend != "integer" else recipes[:1]:
        x, w, bias = tensors(layer)
        y = getattr(NF, LAYERS[layer][0])(x, w, bias, **LAYERS[layer][3], recipe=recipe)
        parts = {"x": x, "w": w, "dy": values(y.shape, seed=7)}
        parts = {name: part.detach().clone() for name, part in parts.items()}
        parts[where].view(-1)[3] = bad
        x, w = parts["x"].requires_grad_(), parts["w"].requires_grad_()
        y = getattr(NF, LAYERS[layer][0])(x, w, bias, **LAYERS[layer][3], recipe=recipe, backend=backend)
        dx, dw = torch.autograd.grad(y, (x, w), parts["dy"])
        results = {"y": (y, "x w"), "dx": (dx, "dy w"), "dw": (dw, "dy x")}
        for name, (result, factors) in results.items():
            if where in factors.split():
                assert not result.isfinite().any(), name
            else:
                assert result.isfinite().all(), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_grad_scaler_skips_the_steps_that_torch_would_skip(backend):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(16, 16, 3), torch.nn.ReLU(), torch.nn.Conv2d(16, 16, 3))
    x = values((16, 16, 6, 6))
    for poisoned in (False, True):
        outcome = []
        for enabled in (False, True):
            optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
            scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
            image = x.clone()
            if poisoned:
                image[3, 2, 1, 1] = float("inf")
            with torch.autocast("cpu", torch.float16), nvfp4_autocast(enabled=enabled, backend=backend):
                loss = net(image).float().square().mean()
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            outcome.append(scaler.get_scale())
        assert outcome[0] == outcome[1] == (2.0**9 if poisoned else 2.0**10)
