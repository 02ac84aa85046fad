"""activation_shift="mean": exact algebra around the quantized product, in training and in every kind of call."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import te_nvfp4_cv as nv
from te_nvfp4_cv.ops.geometry import ConvArgs
from tests.helpers import relative_error, same_bits, values
from tests.layers import BACKENDS

PLAIN = nv.NVFP4BlockScaling()
SHIFTED = nv.NVFP4BlockScaling(activation_shift="mean")
LAYERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "3x3": (lambda: nn.Conv2d(20, 32, 3, padding=1, stride=2), (3, 20, 7, 8)),
    "groups": (lambda: nn.Conv2d(32, 48, 3, padding=2, groups=2, bias=False), (2, 32, 6, 5)),
    "same, dilated": (lambda: nn.Conv2d(16, 16, 2, padding="same", dilation=3), (2, 16, 6, 6)),
    "dilated 1d": (lambda: nn.Conv1d(16, 24, 3, padding=4, dilation=4), (3, 16, 20)),
    "reflect": (lambda: nn.Conv1d(16, 24, 3, padding=1, padding_mode="reflect"), (3, 16, 8)),
    "3d": (lambda: nn.Conv3d(16, 16, 2, padding=(0, 1, 0)), (2, 16, 4, 3, 3)),
    "transposed": (lambda: nn.ConvTranspose2d(32, 48, 3, stride=2, groups=2, output_padding=1), (2, 32, 4, 4)),
    "transposed 1d": (lambda: nn.ConvTranspose1d(16, 24, 2, dilation=2, padding=1), (2, 16, 5)),
    "linear": (lambda: nn.Linear(24, 16), (2, 3, 24)),
    "without a batch": (lambda: nn.Conv2d(16, 16, 3, padding=1), (16, 5, 5)),
}


def level(shape: tuple[int, ...], channel: int) -> Tensor:
    """Values with a deviation of 0.2 about a mean of 3 to 6 in each channel."""
    means = torch.linspace(3, 6, shape[channel]).reshape(-1, *(1,) * (len(shape) - 1 - channel))
    return means + 0.2 * values(shape)


def made(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    layer = make()
    channel = len(shape) - 1 - (0 if name == "linear" else layer.weight.dim() - 2)
    return layer, level(shape, channel)


def step(
    layer: nn.Module, x: Tensor, recipe: Any, called: Any = None, centered: bool = False, backend: str = "auto"
) -> dict[str, Tensor]:
    """Return y and the gradients of a step, for an output gradient that has nothing to do with x.

    Args:
        called: called in the layer's place.
        centered: each channel of the output gradient sums to zero, as before a batch norm.
    """
    x = x.clone().requires_grad_()
    layer.zero_grad()
    with nv.nvfp4_autocast(recipe or PLAIN, enabled=recipe is not None, backend=backend):
        y = layer(x) if called is None else called(x)
    dy = values(tuple(y.shape), seed=7)
    torch.manual_seed(1)
    y.backward(dy - dy.mean((0, *range(2, dy.dim())), keepdim=True) if centered else dy)
    return {"y": y.detach(), "dx": x.grad, **{name: p.grad.clone() for name, p in layer.named_parameters()}}


@pytest.mark.parametrize("name", LAYERS)
def test_the_algebra_is_exact(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a product in full precision in the place of the quantized one, y and all gradients are torch's."""
    from te_nvfp4_cv.layer import execute as where

    layer, x = made(name)
    expected = step(layer, x, None)

    def exact(op: str, x: Tensor, w: Tensor, bias: Tensor | None, args: ConvArgs, *_: Any) -> Tensor:
        if op == "linear":
            return F.linear(x, w, bias)
        rest = (args.dilation, args.groups)
        rest = (args.output_padding, *rest[::-1]) if "transpose" in op else rest
        return getattr(F, op)(x, w, bias, args.stride, args.padding, *rest)

    monkeypatch.setattr(where, "_execute", exact)
    found = step(layer, x, SHIFTED)
    for key, value in expected.items():
        assert relative_error(found[key], value) < 2e-6, key


@pytest.mark.parametrize("name", LAYERS)
def test_a_step_is_nearer_to_full_precision(name: str) -> None:
    layer, x = made(name)
    truth, plain, shifted = (step(layer, x, recipe) for recipe in (None, PLAIN, SHIFTED))
    assert relative_error(shifted["y"], truth["y"]) < 0.5 * relative_error(plain["y"], truth["y"])
    assert relative_error(shifted["weight"], truth["weight"]) < 0.5 * relative_error(plain["weight"], truth["weight"])
    for recipe in (replace(SHIFTED, tensor_scale="delayed"), replace(SHIFTED, thin_layers="pad")):
        assert relative_error(step(layer, x, recipe)["y"], truth["y"]) < 0.6 * relative_error(plain["y"], truth["y"])


def test_dw_of_a_dilated_conv1d_with_a_large_input_mean() -> None:
    torch.manual_seed(0)
    layer = nn.Conv1d(32, 32, 3, dilation=4, bias=False)
    x = 2 + 0.2 * values((8, 32, 64))

    def nearness(x: Tensor, recipe: Any) -> float:
        found, truth = (step(layer, x, r, centered=True)["weight"].flatten() for r in (recipe, None))
        return float(torch.cosine_similarity(found, truth, 0))

    # What the mean contributes to dw sums to zero in truth; with rounded operands it does not.
    assert nearness(x, PLAIN) < 0.6
    # As near as with an input that has no mean: all that the mean does is undone, and NVFP4's rounding is left.
    assert nearness(x, SHIFTED) > max(0.985, nearness(x - 2, PLAIN) - 5e-4)


@pytest.mark.parametrize("autocast", [False, True])
def test_modules_functions_and_contexts_agree(autocast: bool) -> None:
    layer, x = made("3x3")
    module = nv.convert_model(nn.Sequential(layer), SHIFTED)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        with nv.nvfp4_autocast(SHIFTED):
            expected = nn.Conv2d.forward(layer, x) if type(layer) is nn.Conv2d else layer(x)
        assert expected.dtype == (torch.bfloat16 if autocast else torch.float32)
        assert same_bits(module(x), expected)
        found = nv.functional.conv2d(x, layer.weight, layer.bias, 2, 1, recipe=SHIFTED)
        assert same_bits(found, expected)


def test_torch_compile_gives_the_same_step() -> None:
    torch._dynamo.reset()
    layer, x = made("3x3")
    recipe = replace(SHIFTED, disable_stochastic_rounding=True)
    expected = step(layer, x, recipe)
    found = step(layer, x, recipe, torch.compile(lambda x: layer(x), backend="aot_eager", fullgraph=True))
    for key, value in expected.items():
        assert relative_error(found[key], value) < 1e-5, key


def test_empty_inputs_and_recipes_of_files(tmp_path: Path) -> None:
    layer, _ = made("3x3")
    with nv.nvfp4_autocast(SHIFTED):
        assert layer(torch.empty(0, 20, 7, 8)).shape == (0, 32, 4, 4)
    (tmp_path / "r.toml").write_text(SHIFTED.to_toml())
    assert nv.load_recipe(tmp_path / "r.toml") == SHIFTED and SHIFTED.unshifted == PLAIN is not SHIFTED
    assert PLAIN.unshifted is PLAIN
    with pytest.raises(ValueError, match="activation_shift"):
        nv.NVFP4BlockScaling(activation_shift="median")


ONE_ROW: dict[str, tuple[Any, tuple[int, ...]]] = {
    "pooled": (lambda: nn.Conv2d(64, 32, 1), (1, 64, 1, 1)),  # squeeze and excitation
    "pooled, thin": (lambda: nn.Conv2d(20, 36, 1), (1, 20, 1, 1)),
    "without a batch": (lambda: nn.Conv2d(64, 32, 1), (64, 1, 1)),
    "padded": (lambda: nn.Conv2d(64, 32, 3, padding=1), (1, 64, 1, 1)),
    "groups": (lambda: nn.Conv1d(64, 32, 1, groups=2), (1, 64, 1)),
    "transposed": (lambda: nn.ConvTranspose2d(64, 32, 2, stride=2), (1, 64, 1, 1)),
    "linear": (lambda: nn.Linear(64, 32), (1, 64)),
    "a vector": (lambda: nn.Linear(64, 32), (64,)),
}


@pytest.mark.parametrize("scale", ["current", "delayed", "current_pow2"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ONE_ROW)
def test_one_row_is_its_own_mean(name: str, backend: str, scale: str) -> None:
    """Nothing is left to be quantized of x: y, dw and db are exact, and dx is that of the layer without a shift."""
    torch.manual_seed(0)
    make, shape = ONE_ROW[name]
    layer, x = make(), 3 + values(shape)
    recipe = replace(SHIFTED, tensor_scale=scale, disable_stochastic_rounding=True)
    truth, plain = step(layer, x, None), step(copy.deepcopy(layer), x, recipe.unshifted, backend=backend)
    for _ in range(2):
        found = step(layer, x, recipe, backend=backend)
        assert all(torch.isfinite(value).all() for value in found.values())
        assert relative_error(found["dx"], plain["dx"]) < 1e-6
        for key in ("y", "weight", "bias"):
            assert relative_error(found[key], truth[key]) < 1e-5, key
        reference = step(layer, x, recipe, backend="reference")
        for key, value in reference.items():
            assert relative_error(found[key], value) < 1e-5, key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_image_of_one_colour_leaves_nothing_that_a_delayed_scale_goes_by(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer, recipe = nn.Conv2d(16, 32, 1).to(dtype), replace(SHIFTED, tensor_scale="delayed")
    colour = torch.full((3, 16, 7, 7), 1 / 3).to(dtype)
    for x in (values((3, 16, 7, 7)).to(dtype), colour, values((3, 16, 7, 7), seed=2).to(dtype)):
        found, truth = step(layer, x, recipe)["y"], step(layer, x, None)["y"]
        assert relative_error(found, truth) < 0.25


def test_a_file_refuses_what_it_cannot_hold(tmp_path: Path) -> None:
    layer, x = made("linear")
    with pytest.raises(ValueError, match=r"shifts its input[\s\S]*nv.export.quantize"):
        nv.export.save(nn.Sequential(layer), tmp_path / "net", SHIFTED)
    quantized = nv.export.quantize(nn.Sequential(layer), [x], SHIFTED)
    assert quantized[0].shift is not None
    nv.export.save(quantized, tmp_path / "net", SHIFTED)
