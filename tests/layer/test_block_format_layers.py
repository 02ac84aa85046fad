"""Layers whose recipe has another block format than NVFP4: all types, both passes, compiled, evaluated, refused."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import te_nvfp4_cv as nv
from te_nvfp4_cv import errors
from te_nvfp4_cv.backend import dispatch, native
from te_nvfp4_cv.ops.block_scales import FORMATS
from tests.helpers import values
from tests.layers import LAYERS, saved_by, step, tensors

RECIPES = {name: nv.NVFP4BlockScaling(block_format=name) for name in FORMATS}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("name", FORMATS)
def test_each_layer_multiplies_block_by_block_what_the_reference_multiplies(layer, name):
    """With stochastic rounding: both draw the same numbers. And all results are near torch's."""
    results = {}
    for backend in ("integer", "vendor", "reference") if native.load() else ("vendor", "reference"):
        torch.manual_seed(2)
        results[backend] = step(layer, *tensors(layer), recipe=RECIPES[name], backend=backend)
    plain = step(layer, *tensors(layer), namespace=nn.functional)
    integers = results.get("integer", results["reference"])
    for ours, same, reference, expected in zip(results["vendor"], integers, results["reference"], plain, strict=True):
        assert torch.equal(same, reference)  # in bits
        assert ours.shape == expected.shape and ours.dtype == expected.dtype
        assert torch.allclose(ours, reference, rtol=1e-5, atol=1e-5 * float(reference.detach().abs().max()))
        # A block of 32 has no more than 8 / 6 of clipping; stochastic rounding of dy is the larger part.
        assert (ours - expected).norm() < 0.5 * expected.norm()


@pytest.mark.parametrize("name", FORMATS)
def test_backward_needs_what_was_saved_alone_and_that_is_4_bits_and_a_byte_for_each_block(name):
    x, w = values((32, 64, 4, 4)).requires_grad_(), values((64, 64, 3, 3)).requires_grad_()
    kept = saved_by(lambda: nv.functional.conv2d(x, w, padding=1, recipe=RECIPES[name]))
    block = FORMATS[name].block
    bits = {16: 4.5, 32: 4.25}[block]
    tiles = w.numel() // block**2  # a weight's scales are those of tiles
    assert sum(t.numel() * t.element_size() for t in kept) == x.numel() * bits / 8 + w.numel() / 2 + tiles + 8


@pytest.mark.parametrize("name", FORMATS)
def test_values_that_are_not_finite_reach_every_result(name):
    for bad in (torch.nan, torch.inf):
        for which in range(2):
            operands = [values((2, 32, 4, 4)).requires_grad_(), values((32, 32, 3, 3)).requires_grad_()]
            with torch.no_grad():
                operands[which].view(-1)[5] = bad
            y = nv.functional.conv2d(*operands, padding=1, recipe=RECIPES[name])
            y.backward(values(y.shape))
            assert not y.isfinite().any()
            assert not operands[1 - which].grad.isfinite().any()  # the gradient that reads the bad operand


@pytest.mark.parametrize("backend", ["auto", "vendor", "reference"])
@pytest.mark.parametrize("name", FORMATS)
def test_a_gradient_below_the_smallest_scale_is_warned_of(name, backend, monkeypatch):
    """It would become zeros without a word, and training would fail. mxfp4's scales reach far enough."""

    def gradient_of(scale: float) -> torch.Tensor:
        x, w = values((2, 32, 4, 4)).requires_grad_(), values((32, 32, 3, 3)).requires_grad_()
        y = nv.functional.conv2d(x, w, padding=1, recipe=RECIPES[name], backend=backend)
        y.backward(torch.full_like(y, scale))
        return x.grad

    monkeypatch.setattr(errors, "_warned", set())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        lost = [not gradient_of(scale).any() for scale in (0.0, 1.0, 1e-6, 1e-7)]
    assert lost == ([True, False, False, False] if name == "mxfp4" else [True, False, True, True])
    said = [str(one.message) for one in caught if "tensor scale" in str(one.message)]
    assert len(said) == (name != "mxfp4")
    assert not said or (name in said[0] and "1.0e-06" in said[0] and "2**20" in said[0])


@pytest.mark.parametrize("name", FORMATS)
def test_fake_tensors_train(name):
    """They hold no gradient that could be looked at."""
    with FakeTensorMode():
        layer, x = nv.NVFP4Conv2d(32, 32, 3, recipe=RECIPES[name]), torch.empty(2, 32, 4, 4, requires_grad=True)
        layer(x).sum().backward()
        assert x.grad.shape == x.shape and layer.weight.grad.shape == layer.weight.shape


@pytest.mark.parametrize("name", FORMATS)
def test_a_module_a_context_and_a_compiled_graph_compute_what_the_function_does(name, fresh_dynamo):
    recipe = nv.NVFP4BlockScaling(block_format=name, disable_stochastic_rounding=True)
    conv, x = nn.Conv2d(40, 48, 3, padding=1), values((6, 40, 5, 5))
    expected = nv.functional.conv2d(x, conv.weight, conv.bias, padding=1, recipe=recipe)
    expected.sum().backward()
    gradient, conv.weight.grad = conv.weight.grad, None

    def run(x):
        with nv.nvfp4_autocast(recipe):
            return conv(x)

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    for call in (run, compiled):
        y = call(x)
        y.sum().backward()
        assert torch.equal(y, expected) and torch.equal(conv.weight.grad, gradient)
        conv.weight.grad = None
    with torch.no_grad():
        for _ in range(3):  # the cache of evaluation
            assert torch.equal(run(x), expected)
    with nv.frozen_weights(conv):
        assert torch.equal(run(x), expected)
    converted = nv.convert_model(nn.Sequential(conv), recipe)
    assert torch.equal(converted(x), expected)
    with torch.autocast("cpu", torch.bfloat16):
        half = run(x)
    assert half.dtype == torch.bfloat16 and (half - expected).norm() < 0.1 * expected.norm()


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(
    "fields",
    [
        {"backward_override": "dequantized"},
        {"backward_override": "high_precision"},
        {"high_precision_gemms": ("wgrad",)},
        {"disable_2d_quantization": True},
        {"disable_rht": True},
        {"activation_shift": "mean"},
        {"thin_layers": "pad"},
    ],
)
def test_other_fields_go_with_a_format(name, fields):
    recipe = nv.NVFP4BlockScaling(block_format=name, disable_stochastic_rounding=True, **fields)
    for layer in ("conv2d groups", "conv_transpose2d", "linear"):
        ours, reference = (step(layer, *tensors(layer), recipe=recipe, backend=b) for b in ("auto", "reference"))
        plain = step(layer, *tensors(layer), namespace=nn.functional)
        for a, b, c in zip(ours, reference, plain, strict=True):
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-5 * float(b.detach().abs().max()))
            assert (a - c).norm() < 0.4 * c.norm()


@pytest.mark.parametrize(
    "fields",
    [
        {"tensor_scale": "delayed"},
        {"tensor_scale": "current_pow2"},
        {"row_scaled_activation": True, "disable_rht": True},
        {"nvfp4_4over6": "weights"},
    ],
)
def test_fields_that_a_format_cannot_have_are_refused(fields):
    recipe = nv.NVFP4BlockScaling(block_format="mxfp4", **fields)
    with pytest.raises(ValueError, match=rf"does not go with another block format(.|\n)*{next(iter(fields))}"):
        nv.functional.linear(values((16, 32)), values((32, 32)), recipe=recipe)
    with pytest.raises(ValueError, match="does not go with another block format"), nv.nvfp4_autocast(recipe):
        pass
    with pytest.raises(ValueError, match="needs: one of: 'nvfp4', 'mxfp4'"):
        nv.NVFP4BlockScaling(block_format="mxfp8")


def test_backends_of_nvfp4_alone_are_refused_by_name(monkeypatch):
    x, w = values((16, 32)), values((32, 32))
    for backend in ("triton", "cudnn"):
        monkeypatch.setattr(dispatch, "resolve", lambda asked, *args, **kwargs: asked)
        with pytest.raises(ValueError, match=f"backend '{backend}' has NVFP4's blocks only"):
            nv.functional.linear(x, w, recipe=RECIPES["mxfp4"], backend=backend)


def test_the_same_bits_whatever_ran_before():
    """A weight whose codes are kept for one format is quantized anew for another."""
    linear, x = nn.Linear(64, 64), values((32, 64))
    alone = {}
    with torch.no_grad():
        for name, recipe in RECIPES.items():
            alone[name] = nv.functional.linear(x, linear.weight.clone(), linear.bias, recipe=recipe)
        for _ in range(3):
            for name, recipe in RECIPES.items():
                with nv.nvfp4_autocast(recipe):
                    assert torch.equal(linear(x), alone[name])
