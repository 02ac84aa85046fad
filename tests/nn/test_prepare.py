"""nv.prepare: a recipe's table and its context in one call."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import te_nvfp4_cv as nv
from te_nvfp4_cv.nn.precision import entries_of


def network() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(16, 16, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model.fc = nn.Linear(16, 16)
    return model


def test_prepare_equals_the_two_calls():
    x = torch.randn(16, 16, 6, 6)
    one, two = network(), network()
    context = nv.prepare(one, "resnet")
    recipe = nv.load_recipe("resnet")
    nv.set_precision(two, recipe)
    with context:
        assert nv.active_recipe() == recipe
        found = one(x)
    with nv.nvfp4_autocast(recipe):
        assert torch.equal(found, two(x))
    assert entries_of(one.fc) == [None] and entries_of(one[0]) == []
    assert [row.nvfp4 for row in nv.coverage(one, x, recipe="resnet").rows] == [True, False]


def test_the_context_is_used_again_and_warns_of_nothing():
    recipe = nv.NVFP4BlockScaling(precision={"fc": "high", "0": nv.load_recipe("no_sr")}, name="a table of this test")
    model = network()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        context = nv.prepare(model, recipe)
        for _ in range(2):
            with context:
                model(torch.randn(16, 16, 6, 6)).sum().backward()


def test_options_are_those_of_the_context():
    context = nv.prepare(network(), "resnet", enabled=False, backend="reference")
    assert "enabled=False" in repr(context) and "backend='reference'" in repr(context)


@pytest.mark.parametrize(
    ("options", "error", "told"),
    [
        ({"recipe": "resnt"}, FileNotFoundError, "did you mean 'resnet'"),
        ({"recipe": "resnet", "backend": "nowhere"}, ValueError, "nowhere"),
        ({"recipe": "resnet", "relumask": True}, TypeError, "relumask"),
        ({"recipe": {"fc": None}}, TypeError, "set_precision"),
    ],
)
def test_what_is_refused_changes_nothing(options, error, told):
    model = network()
    with pytest.raises(error, match=told):
        nv.prepare(model, **options)
    assert not any(entries_of(module) for module in model.modules())
    with pytest.raises(TypeError, match="prepare: not a module"):
        nv.prepare("resnet", model)


def test_autocast_is_the_context():
    assert nv.autocast is nv.nvfp4_autocast and "autocast" in dir(nv)
