"""Inputs of a subclass of Tensor give outputs of that subclass, as in torch, with the numbers of plain tensors."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import te_nvfp4_cv as nv
from te_nvfp4_cv.layer import observe

RECIPE = nv.NVFP4BlockScaling(disable_stochastic_rounding=True)


class Image(Tensor):
    """What fastai has: a class without anything of its own."""


class Scan(Tensor):
    """What monai has: metadata that results inherit, and a method that takes other arguments than torch's."""

    meta: Any = None

    @staticmethod
    def of(x: Tensor, meta: Any) -> Scan:
        y = x.as_subclass(Scan)
        y.meta = meta
        return y

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        y = super().__torch_function__(func, types, args, kwargs or {})
        for part in y if isinstance(y, (tuple, list)) else (y,):
            if isinstance(part, Scan):
                part.meta = next((a.meta for a in args if isinstance(a, Scan)), None)
        return y

    def new_empty(self, size, dtype=None):  # type: ignore[override]
        return torch.empty(tuple(size), dtype=dtype)  # an int raises, as it does in monai


class Refuses(Tensor):
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return NotImplemented if func is F.conv2d else super().__torch_function__(func, types, args, kwargs or {})


class Unwraps(Tensor):
    """What torchvision's images do: a layer's output is a plain tensor."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


def images() -> Tensor:
    return torch.randn(4, 32, 8, 8)


def network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(32, 32, 3), nn.BatchNorm2d(32), nn.ReLU(inplace=True), nn.Conv2d(32, 16, 3))


def told(call) -> tuple[Any, list[bool]]:
    found: list[bool] = []
    with observe.observe(lambda c: found.append(c.recipe is not None)), nv.nvfp4_autocast(RECIPE):
        y = call()
    return y, found


@pytest.mark.parametrize("kind", [Image, Scan, Unwraps])
@pytest.mark.parametrize("layer", [nn.Conv2d(32, 32, 3), nn.ConvTranspose2d(32, 32, 2), nn.Linear(8, 16)])
def test_layers_left_alone_and_layers_in_nvfp4_give_the_class_that_torch_gives(kind, layer):
    x = images()
    expected = type(layer(x.as_subclass(kind)))
    y, found = told(lambda: layer(x.as_subclass(kind)))
    plain, _ = told(lambda: layer(x))
    assert type(y) is expected and len(found) == 1
    assert torch.equal(y.as_subclass(Tensor), plain)
    F.relu_(y)  # no view, which autograd would not let be written to
    assert torch.equal(y.as_subclass(Tensor), plain.relu())


def test_metadata_passes_through_a_network_and_gradients_are_those_of_plain_tensors():
    model, x = network(), images()
    other = copy.deepcopy(model)
    leaf = x.clone().requires_grad_()
    y, found = told(lambda: model(Scan.of(leaf, {"spacing": 2.0})))
    assert type(y) is Scan and y.meta == {"spacing": 2.0} and found == [True, True]
    plain, _ = told(lambda: other(x.requires_grad_()))
    y.square().mean().backward()
    plain.square().mean().backward()
    assert type(leaf.grad) is Tensor and torch.equal(leaf.grad, x.grad)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert type(p.grad) is Tensor and torch.equal(p.grad, q.grad)


@pytest.mark.parametrize(
    "recipe",
    [
        nv.NVFP4BlockScaling(disable_stochastic_rounding=True, high_precision_gemms=("wgrad",)),
        nv.NVFP4BlockScaling(disable_stochastic_rounding=True, tensor_scale="delayed"),
    ],
)
@pytest.mark.parametrize("autocast", [False, True])
def test_what_backward_keeps_is_plain(recipe, autocast):
    x = images()
    grads = []
    for given in (x, Scan.of(x, 1)):
        torch.manual_seed(0)
        layer = nn.Conv2d(32, 32, 3)
        with nv.nvfp4_autocast(recipe), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            for _ in range(2):
                layer(given).square().mean().backward()
        assert type(layer.weight.grad) is Tensor
        grads.append(layer.weight.grad)
    assert torch.equal(*grads)


def test_attention():
    layer, x = nn.MultiheadAttention(32, 4), torch.randn(4, 4, 32)
    given = Scan.of(x, 7)
    y, found = told(lambda: layer(given, given, given)[0])
    assert type(y) is Scan and y.meta == 7 and found == [True, True]
    assert torch.equal(y.as_subclass(Tensor), told(lambda: layer(x, x, x)[0])[0])


def test_modules_and_functions_that_ask_for_nvfp4_by_name():
    layer, x = nv.NVFP4Conv2d(32, 32, 3, recipe=RECIPE), images()
    calls = [layer, lambda z: nv.functional.conv2d(z, layer.weight, layer.bias, recipe=RECIPE)]
    for call in calls:
        for inside in (False, True):
            with nv.nvfp4_autocast(RECIPE, enabled=True) if inside else torch.enable_grad():
                y = call(Scan.of(x, 7))
                assert type(y) is Scan and y.meta == 7 and torch.equal(y.as_subclass(Tensor), call(x))


def test_the_class_has_the_last_word():
    layer = nn.Conv2d(32, 32, 3)
    with nv.nvfp4_autocast(RECIPE), pytest.raises(TypeError, match="__torch_function__"):
        layer(images().as_subclass(Refuses))


def test_coverage_and_exports():
    model, x = network().eval(), images()
    assert [row.nvfp4 for row in nv.coverage(model, Scan.of(x, 7), recipe=RECIPE).rows] == [True, True]
    quantized = [
        nv.export.quantize(copy.deepcopy(model), [given, given], RECIPE) for given in (x, Scan.of(x, 7))
    ]
    y = quantized[1](Scan.of(x, 7))
    assert type(y) is Scan and y.meta == 7 and torch.equal(y.as_subclass(Tensor), quantized[0](x))


@pytest.mark.filterwarnings("ignore:Dynamo")
@pytest.mark.parametrize("kind", [Image, Scan])
def test_compiled(kind):
    torch._dynamo.reset()
    model, x = nn.Sequential(nn.Conv2d(32, 32, 3), nn.ReLU(), nn.Conv2d(32, 16, 3)), images()
    with torch.no_grad(), nv.nvfp4_autocast(RECIPE):
        y = torch.compile(model, backend="eager")(x.as_subclass(kind))
        assert type(y) is kind and torch.equal(y.as_subclass(Tensor), model(x))
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:nvfp4. only 0%")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors_run_as_torch_does(layout):
    layer = nn.Linear(32, 32)
    parts = [torch.randn(5, 32), torch.randn(3, 32)]

    def run():
        x = torch.nested.nested_tensor(parts, layout=layout, requires_grad=True)
        y = layer(F.relu(layer(x)))
        y.to_padded_tensor(0.0).sum().backward()
        return y.detach().to_padded_tensor(0.0), x.grad.to_padded_tensor(0.0)

    expected = run()
    found, calls = told(run)
    assert calls == [False, False] and all(map(torch.equal, found, expected))
    x = torch.nested.nested_tensor(parts, layout=layout)
    assert "dense" in nv.coverage(layer, x).rows[0].reason


class Alone(Tensor):
    """What old code does: no function mode sees what the class calls."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunction():
            return func(*args, **(kwargs or {}))


def test_a_class_that_runs_layers_itself_is_listed_and_missed():
    conv, x = nn.Conv2d(16, 16, 3), torch.randn(2, 16, 6, 6)
    with pytest.warns(UserWarning, match="100% because Alone runs its layers itself"), nv.nvfp4_autocast():
        y = conv(x.as_subclass(Alone))
    assert torch.equal(y, conv(x))
    (row,) = nv.coverage(conv, x.as_subclass(Alone)).rows
    assert not row.nvfp4 and row.reason == "Alone runs its layers itself" and row.calls == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with nv.nvfp4_autocast():
            F.conv2d(x, conv.weight.detach().as_subclass(Alone))  # a weight in a format of its own, say
