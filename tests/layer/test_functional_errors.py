"""What nv.functional refuses: the message says what came, what is needed and what to do."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from te_nvfp4_cv import functional as NF
from te_nvfp4_cv.recipe.block_scaling import NVFP4BlockScaling
from tests.helpers import same_bits, values
from tests.layers import step, tensors

X, W = values((2, 16, 6, 6)), values((32, 16, 3, 3))
BAD: dict[str, tuple[str, tuple[Any, ...], dict[str, Any]]] = {
    "integer input": ("conv2d", (X.int(), W), {}),
    "integer weight": ("conv2d", (X, W.int()), {}),
    "boolean input": ("conv2d", (X > 0, W), {}),
    "complex": ("conv2d", (X.to(torch.complex64), W), {}),
    "float64": ("conv2d", (X.double(), W.double()), {}),
    "not a tensor": ("conv2d", ([[1.0]], W), {}),
    "mixed dtypes": ("conv2d", (X.bfloat16(), W), {}),
    "rank of x": ("conv2d", (X.flatten(1), W), {}),
    "rank of w": ("conv2d", (X, W[..., 0]), {}),
    "1-d kernel in 3-d": ("conv3d", (X, W), {}),
    "channels": ("conv2d", (X[:, :15], W), {}),
    "channels of linear": ("linear", (X[0, 0, 0], W[..., 0, 0]), {}),
    "linear with a 1-d weight": ("linear", (X, W[0, :, 0, 0]), {}),
    "channels, transposed": ("conv_transpose2d", (X, W), {}),
    "groups do not divide": ("conv2d", (X, W), dict(groups=3)),
    "groups 0": ("conv2d", (X, W), dict(groups=0)),
    "thin groups": ("conv2d", (X, W[:, :4]), dict(groups=4)),
    "depthwise": ("conv2d", (X, W[:16, :1]), dict(groups=16)),
    "thin layer": ("conv2d", (X[:, :3], W[:, :3]), {}),
    "bias": ("conv2d", (X, W, W[0, 0, 0]), {}),
    "padding string": ("conv2d", (X, W), dict(padding="full")),
    "same with stride": ("conv2d", (X, W), dict(padding="same", stride=2)),
    "negative padding": ("conv2d", (X, W), dict(padding=-1)),
    "float stride": ("conv2d", (X, W), dict(stride=1.5)),
    "stride 0": ("conv2d", (X, W), dict(stride=0)),
    "three strides": ("conv2d", (X, W), dict(stride=(1, 1, 1))),
    "dilation 0": ("conv2d", (X, W), dict(dilation=0)),
    "kernel too large": ("conv2d", (X[..., :2], W), {}),
    "output padding": ("conv_transpose2d", (X, values((16, 32, 3, 3))), dict(output_padding=1)),
    "padding string, transposed": ("conv_transpose2d", (X, values((16, 32, 3, 3))), dict(padding="same")),
    "padding too large, transposed": ("conv_transpose2d", (X, values((16, 32, 3, 3))), dict(padding=5)),
    "unknown backend": ("conv2d", (X, W), dict(backend="nonsense")),
    "4over6 with RHT": ("conv2d", (X, W), dict(recipe=NVFP4BlockScaling(nvfp4_4over6="all"))),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_calls_say_what_came_what_is_needed_and_what_to_do(name):
    op, args, options = BAD[name]
    with pytest.raises((ValueError, TypeError)) as error:
        getattr(NF, op)(*args, **options)
    assert all(word in str(error.value) for word in ("got:", "needs:", "fix:")), str(error.value)


@pytest.mark.parametrize("recipe", [True, NVFP4BlockScaling, {"disable_rht": True}, 3])
def test_what_is_no_recipe_is_a_type_error(recipe):
    with pytest.raises(TypeError, match="recipe"):
        NF.conv2d(X, W, recipe=recipe)


def test_a_backend_that_cannot_run_here_says_what_it_needs(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="CUDA GPU") as error:
        NF.conv2d(X, W, backend="triton")
    assert "vendor" in str(error.value)


def test_te_recipe_objects_are_accepted():
    recipe_module = pytest.importorskip("transformer_engine.common.recipe")
    y = NF.conv2d(X, W, recipe=recipe_module.NVFP4BlockScaling(disable_rht=True))
    assert same_bits(y, NF.conv2d(X, W, recipe=NVFP4BlockScaling(disable_rht=True)))


def test_nothing_warns_in_an_ordinary_call():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step("conv2d", *tensors("conv2d"))
