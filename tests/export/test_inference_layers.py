"""Layers whose weight stays in NVFP4 give the outputs of the layers that they were made of, bit for bit."""

import copy
import io
import subprocess
import sys
import textwrap
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import te_nvfp4_cv as nv
from te_nvfp4_cv import export
from te_nvfp4_cv.backend import dispatch, native
from te_nvfp4_cv.export import matrix
from te_nvfp4_cv.export.codes import quantize_layer
from te_nvfp4_cv.export.modules import become
from te_nvfp4_cv.layer import plan
from te_nvfp4_cv.ops.conv import integer
from tests.helpers import relative_error, same_bits, seeds, values

RECIPE = nv.NVFP4BlockScaling()
RECIPES = {
    "default": RECIPE,
    "1x16": replace(RECIPE, disable_2d_quantization=True),
    "4over6 weights": replace(RECIPE, nvfp4_4over6="weights", nvfp4_4over6_e4m3_use_256="weights"),
    "4over6 all": replace(RECIPE, nvfp4_4over6="all", disable_rht=True),
    "row scaled": replace(RECIPE, row_scaled_activation=True, disable_rht=True),
    "delayed": replace(RECIPE, tensor_scale="delayed"),
    "powers of two": replace(RECIPE, tensor_scale="current_pow2"),
    "thin": replace(RECIPE, thin_layers="pad"),
}
LAYERS = {
    "conv2d, odd channels": (lambda: nn.Conv2d(20, 36, 3, padding=1), (2, 20, 7, 6)),
    "conv2d, groups, stride": (lambda: nn.Conv2d(32, 64, 3, stride=2, groups=2, bias=False), (2, 32, 7, 7)),
    "conv2d, same, dilated": (lambda: nn.Conv2d(16, 16, 2, padding="same", dilation=2), (1, 16, 6, 6)),
    "transposed": (lambda: nn.ConvTranspose2d(40, 20, 2, stride=2), (2, 40, 4, 3)),
    "transposed, groups": (lambda: nn.ConvTranspose2d(32, 48, 3, stride=2, groups=2), (2, 32, 4, 4)),
    "conv1d, circular": (lambda: nn.Conv1d(16, 24, 3, padding=1, padding_mode="circular"), (3, 16, 8)),
    "conv3d": (lambda: nn.Conv3d(16, 32, 2), (1, 16, 4, 3, 3)),
    "linear": (lambda: nn.Linear(50, 30), (3, 2, 50)),
}


def made(layer: nn.Module, recipe: nv.NVFP4BlockScaling, backend: str = "auto") -> export.InferenceLayer:
    copied = copy.deepcopy(layer)
    return become(copied, quantize_layer(copied, recipe), recipe, backend)


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
@pytest.mark.parametrize("case", LAYERS, ids=str)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_bit_equal_to_the_layer(case: str, recipe: str, backend: str) -> None:
    torch.manual_seed(0)
    build, shape = LAYERS[case]
    layer, own = build(), RECIPES[recipe]
    if recipe == "delayed":  # two steps: the amax of an earlier one rules
        for step in (1, 2):
            with nv.nvfp4_autocast(own, backend=backend):
                layer(values(shape, seed=step) * step).square().mean().backward()
    kept = quantize_layer(layer, own)
    inference = become(copy.deepcopy(layer), kept, own, backend)
    for dtype in (None, torch.bfloat16):
        x = values(shape, seed=3)
        with torch.no_grad(), torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            with nv.nvfp4_autocast(own, backend=backend):
                expected = layer(x)
            packed = inference(x)
            inference.set_mode(weights="cached")
            cached = inference(x)
            inference.set_mode(weights="packed")
        assert same_bits(packed, expected) and packed.stride() == expected.stride()
        assert same_bits(cached, expected)


# ---- cached for the integer backend ---------------------------------------------------------------------------------

compiled_kernels = pytest.mark.skipif(native.load() is None, reason="the integer backend needs a C++ compiler")
ON_INTEGERS = {name: recipe for name, recipe in RECIPES.items() if name != "row scaled"}


def cached(layer: nn.Module, backend: str = "integer", recipe: nv.NVFP4BlockScaling = RECIPE) -> export.InferenceLayer:
    """Return the inference layer of a layer, with cached weights."""
    inference = made(layer, recipe, backend)
    inference.set_mode(weights="cached")
    return inference


def holds_bytes(layer: export.InferenceLayer) -> bool:
    return layer.unpacked is not None and layer.unpacked.dtype == torch.uint8


@pytest.fixture
def expansions(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count the weights that are expanded to bytes."""
    counted: list[int] = []
    expand = integer.panels

    def counting(*arguments: object, **named: object) -> torch.Tensor:
        counted.append(1)
        return expand(*arguments, **named)

    monkeypatch.setattr(integer, "panels", counting)
    return counted


@compiled_kernels
@pytest.mark.parametrize("recipe", ON_INTEGERS, ids=str)
@pytest.mark.parametrize("case", LAYERS, ids=str)
@pytest.mark.parametrize("batch", [1, 3])
def test_cached_bytes_give_the_bits_of_training(case: str, recipe: str, batch: int, expansions: list[int]) -> None:
    torch.manual_seed(0)
    build, shape = LAYERS[case]
    layer, own, x = build(), RECIPES[recipe], values((batch, *shape[1:]), seed=3)
    for step in (1, 2) if recipe == "delayed" else ():  # the amax of an earlier step rules
        with nv.nvfp4_autocast(own, backend="integer"):
            layer(step * x).square().mean().backward()
    codes = quantize_layer(layer, own)
    with torch.no_grad(), nv.nvfp4_autocast(own, backend="integer"):
        expected = layer(x)
    inference = become(layer, codes, own, "integer")
    inference.set_mode(weights="cached")
    assert holds_bytes(inference)
    expansions.clear()
    assert same_bits(inference(x), expected) and not expansions
    inference.set_mode(weights="packed")
    assert same_bits(inference(x), expected) and len(expansions) == 1  # each call


@compiled_kernels
def test_memory_of_cached_bytes() -> None:
    inference = cached(nn.Conv2d(64, 64, 3, bias=False))
    assert inference.unpacked is not None
    assert inference.unpacked.untyped_storage().nbytes() == 0.375 * 4 * 64 * 64 * 9
    packed = sum(t.numel() * t.element_size() for t in inference.state_dict().values())
    assert inference.unpacked.numel() + packed <= 0.52 * 4 * 64 * 64 * 9


@compiled_kernels
@pytest.mark.parametrize("recipe", ["default", "row scaled"])
def test_cached_for_the_backend_that_auto_will_choose(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row-scaled activations run on "vendor", and so does all if the kernels have not passed their check."""
    layer, x = nn.Conv2d(32, 32, 1), values((2, 32, 5, 5))
    for passed in (True, False):
        monkeypatch.setattr(dispatch, "_integer_passes", passed)
        with torch.no_grad(), nv.nvfp4_autocast(RECIPES[recipe]):
            expected = layer(x)
        inference = cached(layer, "auto", RECIPES[recipe])
        assert holds_bytes(inference) == (passed and recipe == "default")
        assert same_bits(inference(x), expected)


@compiled_kernels
@pytest.mark.parametrize("case", ["conv2d, groups, stride", "transposed", "linear"])
def test_bytes_that_the_backend_does_not_multiply_are_left_alone(case: str) -> None:
    build, shape = LAYERS[case]
    layer, x = build(), values(shape)
    inference = cached(layer)
    for backend in ("vendor", "reference"):
        inference.backend = backend
        assert same_bits(inference(x), made(layer, RECIPE, backend)(x))
    cached_values = cached(layer, "vendor")
    cached_values.backend = "integer"
    assert same_bits(cached_values(x), made(layer, RECIPE, "integer")(x))


@compiled_kernels
def test_cached_bytes_follow_casts_and_modes() -> None:
    layer, x = nn.Conv2d(32, 32, 3), values((2, 32, 6, 6))
    inference = cached(layer)
    before = inference.unpacked
    for dtype in (torch.bfloat16, torch.float16):
        low = copy.deepcopy(inference).to(dtype)
        assert low.dtype == dtype and holds_bytes(low) and torch.equal(low.unpacked, before)
        assert same_bits(low(x.to(dtype)), made(layer, RECIPE, "integer").to(dtype)(x.to(dtype)))
    inference.to(memory_format=torch.channels_last)
    assert inference(x).is_contiguous(memory_format=torch.channels_last)
    inference.set_mode(activations="high")
    assert inference.unpacked.dtype == torch.float32 and inference.unpacked.shape == layer.weight.shape
    inference.set_mode(activations="nvfp4", dtype=torch.bfloat16)
    assert torch.equal(inference.unpacked, before) and inference.dtype == torch.bfloat16
    assert inference.to("meta").unpacked.device.type == "meta"


@compiled_kernels
def test_a_cast_changes_the_form_where_it_changes_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CPU with AMX tiles, where "auto" runs bf16 on "vendor" and fp32 on "integer"."""
    monkeypatch.setattr(plan, "prefers_vendor", lambda geometry, dtype: dtype == torch.bfloat16)
    monkeypatch.setattr(dispatch, "bf16_is_native", lambda device: True)
    monkeypatch.setattr(dispatch, "_integer_passes", True)
    inference = cached(nn.Conv2d(32, 32, 3), "auto")
    assert holds_bytes(inference)
    inference.bfloat16()
    assert inference.unpacked is not None and inference.unpacked.dtype == torch.bfloat16
    inference.float()
    assert holds_bytes(inference)


@compiled_kernels
def test_cached_bytes_survive_pickles_copies_and_other_weights() -> None:
    torch.manual_seed(0)
    layer, other, x = nn.Conv2d(32, 32, 3), nn.Conv2d(32, 32, 3), values((2, 32, 6, 6))
    inference = cached(layer)
    expected = inference(x)
    file = io.BytesIO()
    torch.save(inference, file)
    file.seek(0)
    for again in (copy.deepcopy(inference), torch.load(file, weights_only=False)):
        assert holds_bytes(again) and again.unpacked.data_ptr() != inference.unpacked.data_ptr()
        assert same_bits(again(x), expected)
    # Bytes in the layout of another version: a pickle's are not used.
    inference.unpacked.zero_()
    assert same_bits(copy.deepcopy(inference)(x), expected)
    inference.load_state_dict(made(other, RECIPE).state_dict())
    assert same_bits(inference(x), made(other, RECIPE, "integer")(x))


@compiled_kernels
def test_cached_bytes_are_no_memory_that_other_calls_use_again() -> None:
    torch.manual_seed(0)
    inference, x = cached(nn.Conv2d(256, 512, 3, bias=False)), values((1, 256, 4, 4))  # larger than scratch.SMALL
    before = inference.unpacked.clone()
    for _ in range(2):
        made(nn.Conv2d(256, 512, 3, bias=False), RECIPE, "integer")(x)
    assert torch.equal(inference.unpacked, before)


@compiled_kernels
@pytest.mark.parametrize("strict", [False, True])
def test_cached_bytes_compiled_and_exported(strict: bool, expansions: list[int]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(cached(nn.Conv2d(16, 32, 3)), nn.ReLU(), cached(nn.ConvTranspose2d(32, 16, 2)))
    model.requires_grad_(False)
    x = values((2, 16, 6, 6))
    expected = model(x)
    expansions.clear()
    if strict:
        assert same_bits(torch.compile(model, backend="aot_eager", fullgraph=True)(x), expected)
    shapes = ({0: torch.export.Dim("batch", min=1, max=64)},)
    exported = torch.export.export(model, (x,), dynamic_shapes=shapes, strict=strict)
    file = io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    for graph in (exported.module(), torch.export.load(file).module()):
        assert same_bits(graph(x), expected)
        assert same_bits(graph(x[:1]), model(x[:1]))
    assert not expansions


# ---- other inputs and modes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["wide", "subnormal", "huge", "zeros", "nan", "inf"])
def test_odd_inputs_give_what_training_gives(kind: str) -> None:
    torch.manual_seed(0)
    layer, x = nn.Conv2d(16, 16, 3), values((2, 16, 6, 6), kind)
    with torch.no_grad(), nv.nvfp4_autocast(RECIPE):
        expected = layer(x)
    assert same_bits(made(layer, RECIPE)(x), expected)


@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_activations_in_high_precision(case: str) -> None:
    torch.manual_seed(0)
    build, shape = LAYERS[case]
    layer, x = build(), values(shape, seed=3)
    inference = made(layer, RECIPE)
    inference.set_mode(activations="high")
    plain = copy.deepcopy(layer)
    plain.weight.data = inference.weight.clone()
    with torch.no_grad():
        expected = plain(x)
    torch.testing.assert_close(inference(x), expected, rtol=1e-5, atol=1e-5)
    packed = inference(x)
    inference.set_mode(weights="cached")
    assert same_bits(inference(x), packed)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # torch.func.jvp's own
@pytest.mark.parametrize("recipe", ["default", "row scaled"])
@pytest.mark.parametrize("case", ["conv2d, odd channels", "linear"], ids=str)
def test_transforms_take_activations_in_high_precision(case: str, recipe: str) -> None:
    """The error of quantized activations sends its readers there."""
    build, shape = LAYERS[case]
    inference = made(build().to(memory_format=torch.channels_last), RECIPES[recipe])
    inference.set_mode(activations="high")
    plain = build()
    plain.load_state_dict({"weight": inference.weight, "bias": inference.bias})
    x = values(shape)
    transforms = {
        "grad": lambda f: torch.func.grad(lambda v: f(v).square().sum())(x),
        "jvp": lambda f: torch.func.jvp(f, (x,), (x + 1,))[1],
        "jacrev": lambda f: torch.func.jacrev(lambda v: f(v).sum((0, -1)))(x),
        "vmap": lambda f: torch.func.vmap(f)(torch.stack((x, x + 1))),
        "vmap of grad": lambda f: torch.func.vmap(torch.func.grad(lambda v: f(v).square().sum()))(x[None]),
    }
    for weights in ("packed", "cached"):
        inference.set_mode(weights)
        for name, transform in transforms.items():
            assert relative_error(transform(inference), transform(plain)) < 1e-5, (name, weights)


def test_a_cast_of_the_model_leaves_codes_and_scales() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(16, 32, 3)
    inference = made(layer, RECIPE)
    before = inference.weight
    for cast in (nn.Module.half, nn.Module.double, nn.Module.bfloat16):
        assert same_bits(cast(copy.deepcopy(inference)).weight, before)
    low = inference.bfloat16()
    x = values((1, 16, 5, 5), dtype=torch.bfloat16)
    assert low(x).dtype == torch.bfloat16 and low.bias.dtype == torch.bfloat16


def test_a_cached_weight_follows_a_cast() -> None:
    inference = made(nn.Linear(32, 32), RECIPE)
    inference.set_mode(weights="cached", activations="high")
    inference.bfloat16()
    assert inference.unpacked is not None and inference.unpacked.dtype == torch.bfloat16
    assert inference(torch.ones(2, 32, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_memory_of_a_packed_layer() -> None:
    inference = made(nn.Conv2d(64, 64, 3, bias=False), RECIPE)
    held = sum(t.numel() * t.element_size() for t in inference.state_dict().values())
    assert not list(inference.parameters()) and held <= 0.145 * 4 * 64 * 64 * 9
    assert inference.nvfp4_weight.shape == (64, 9 * 64)


@pytest.mark.parametrize("case", LAYERS, ids=str)
@pytest.mark.parametrize("recipe", ["default", "1x16"])
def test_the_matrix_and_back(case: str, recipe: str) -> None:
    torch.manual_seed(0)
    inference = made(LAYERS[case][0](), RECIPES[recipe])
    data, scale = matrix.to_matrix(inference.weight_data, inference.weight_scale, inference.plan)
    rows, taps, blocks = matrix.sizes(inference.plan)
    assert data.shape == (rows, taps * blocks * 8) and scale.shape == (rows, taps * blocks)
    again = matrix.from_matrix(data, scale, inference.plan)
    assert torch.equal(again[0], inference.weight_data) and torch.equal(again[1], inference.weight_scale)
    groups = getattr(inference, "groups", 1)
    w = inference.weight.unflatten(0, (groups, -1))  # [G, axis 0, axis 1, *kernel]
    w = w.transpose(1, 2) if inference.plan.geometry.transposed else w
    w = w.flatten(0, 1).unsqueeze(-1).flatten(2).transpose(1, 2)  # [N, T, K]
    values_of_matrix = inference.nvfp4_weight.dequantize().unflatten(1, (taps, blocks * 16))[..., : w.shape[2]]
    torch.testing.assert_close(values_of_matrix, w, rtol=1e-6, atol=0)


def test_static_scales_make_codes_independent_of_the_batch() -> None:
    """An image that comes with a louder one: its own amax no longer rules, a static one still does."""
    torch.manual_seed(0)
    layer = nn.Conv2d(16, 16, 3)
    quiet, loud = values((1, 16, 6, 6), seed=1), 40 * values((1, 16, 6, 6), seed=2)
    dynamic = made(layer, RECIPE)
    assert not same_bits(dynamic(torch.cat([quiet, loud]))[:1], dynamic(quiet))
    codes = quantize_layer(layer, RECIPE)
    static = become(copy.deepcopy(layer), replace(codes, input_amax=quiet.abs().amax().reshape(1)), RECIPE)
    assert same_bits(static(torch.cat([quiet, loud]))[:1], static(quiet))
    assert same_bits(static(quiet), dynamic(quiet))


def test_what_cannot_be_quantized_is_refused() -> None:
    layer, x = made(nn.Linear(16, 32), RECIPE), values((4, 16))
    for dtype in (torch.float64, torch.int32, torch.uint8, torch.bool, torch.complex64):
        with pytest.raises(ValueError, match=r"does not take this dtype[\s\S]*fix:"):
            layer(x.to(dtype))
    with torch.autocast("cpu", torch.bfloat16):
        assert same_bits(layer(x.int()), layer(x.int().bfloat16()))
    for transform in (torch.vmap(layer), torch.func.grad(lambda v: layer(v).sum())):
        with pytest.raises(RuntimeError, match=r"do not take an inference layer[\s\S]*fix:"):
            transform(x)
    layer.set_mode(activations="high")
    assert layer.double()(x.double()).dtype == torch.float64
    assert torch.allclose(torch.vmap(layer.float())(x), layer(x))


@pytest.mark.parametrize("activations", ["high", "nvfp4"])
def test_no_images(activations: str) -> None:
    for plain, shape, expected in (
        (nn.Conv2d(16, 32, 3), (0, 16, 8, 8), (0, 32, 6, 6)),
        (nn.Linear(16, 32), (3, 0, 16), (3, 0, 32)),
    ):
        layer = made(plain, RECIPE)
        layer.set_mode(activations=activations)
        assert layer(torch.empty(shape)).shape == expected


@pytest.mark.parametrize("activations", ["high", "nvfp4"])
def test_images_without_pixels_are_an_error_as_in_torch(activations: str) -> None:
    layer = made(nn.Conv2d(16, 32, 3, padding=2), RECIPE)
    layer.set_mode(activations=activations)
    with pytest.raises((RuntimeError, ValueError)):
        layer(torch.zeros(1, 16, 0, 5))


def test_a_stride_may_be_one_number() -> None:
    plain, x = nn.Conv2d(16, 32, 3, padding=1), values((2, 16, 7, 7))
    plain.stride, plain.padding = 2, 1
    with torch.no_grad(), nv.nvfp4_autocast(RECIPE):
        expected = plain(x)
    layer = made(plain, RECIPE)
    assert same_bits(layer(x), expected) and layer.stride == (2, 2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_high_precision_is_that_of_the_input(dtype: torch.dtype) -> None:
    layer, x = made(nn.Conv2d(16, 16, 3), RECIPE), values((2, 16, 6, 6)).to(dtype)
    layer.set_mode(activations="high")
    exact = nn.functional.conv2d(x.double(), layer.weight.double(), layer.bias.double())
    assert layer(x).dtype == dtype
    assert relative_error(layer(x).double(), exact) < {torch.float64: 1e-12}.get(dtype, 3e-3)


def test_a_failed_move_leaves_the_model_usable() -> None:
    layer, x = made(nn.Conv2d(16, 16, 3), RECIPE), values((1, 16, 6, 6))
    expected = layer(x)

    def fail(t: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        layer._apply(fail)
    assert same_bits(layer(x), expected)


@pytest.mark.parametrize("case", ["conv2d, groups, stride", "transposed", "linear"])
@pytest.mark.parametrize("backend", ["triton", "vendor"])
def test_on_the_kernels(
    kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch, one_thread: None, backend: str, case: str
) -> None:
    monkeypatch.setattr(dispatch, "KERNELS_ON_CPU", True)
    build, shape = LAYERS[case]
    layer = build().to(kernel_device)
    x = values(shape, seed=3).to(kernel_device)
    with torch.no_grad(), nv.nvfp4_autocast(RECIPE, backend=backend):
        trained = layer(x)
    reference = made(layer, RECIPE, "reference")
    inference = made(layer, RECIPE, backend)
    for weights in ("packed", "cached"):
        inference.set_mode(weights, "nvfp4")
        assert same_bits(inference(x), trained)
        inference.set_mode(weights, "high")
        assert same_bits(inference.weight, reference.weight)
        reference.set_mode(activations="high")
        assert relative_error(inference(x), reference(x)) < 1e-5
        reference.set_mode(activations="nvfp4")
        inference.set_mode(weights, "nvfp4")
        assert relative_error(inference(x), reference(x)) < 1e-4


def test_unknown_modes_are_refused() -> None:
    inference = made(nn.Linear(16, 16), RECIPE)
    with pytest.raises(ValueError, match="unknown weights"):
        inference.set_mode(weights="unpacked")
    with pytest.raises(ValueError, match="unknown activations"):
        inference.set_mode(activations="bf16")
    with pytest.raises(ValueError, match="bad dtype"):
        inference.set_mode(weights="cached", dtype=torch.int8)


@pytest.mark.parametrize("activations", ["nvfp4", "high"])
def test_an_input_that_is_no_tensor_is_refused(activations: str) -> None:
    for layer, x in ((nn.Conv2d(16, 16, 1), values((2, 16, 4, 4))), (nn.Linear(16, 16), values((2, 16)))):
        inference = made(layer, RECIPE)
        inference.set_mode(activations=activations)
        with pytest.raises(TypeError, match=r"the input is no tensor[\s\S]*ndarray[\s\S]*from_numpy"):
            inference(x.numpy())


def test_an_entry_of_set_precision_is_said_to_do_nothing() -> None:
    model = nn.Sequential(nn.Conv2d(16, 16, 3), nn.Sequential(nn.Conv2d(16, 16, 1), nn.Conv2d(16, 8, 1)))
    x = values((2, 16, 4, 4))
    served = export.quantize(model, [x])
    expected = served(x)
    with pytest.warns(UserWarning, match=r"does nothing in layers .*: 0, 1\.0\. .*activations='high'") as warned:
        nv.set_precision(served, {"*": None})
    assert warned[0].filename == __file__
    with nv.nvfp4_autocast():
        assert same_bits(served(x), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        nv.set_precision(served, {"1.1": None})
        nv.set_precision(model, {"*": None})
        nv.set_precision(served, nv.NVFP4BlockScaling())  # without a table there is nothing to do
        export.quantize(model, [x])


def test_learned_scales_are_in_the_codes() -> None:
    torch.manual_seed(0)
    layer, x = nn.Sequential(nn.Conv2d(16, 16, 3)), values((1, 16, 6, 6))
    (fraction,) = nv.learn_scales(layer, "clip")
    fraction.data.fill_(0.5)
    with torch.no_grad(), nv.nvfp4_autocast(RECIPE):
        expected = layer(x)
    inference = made(layer[0], RECIPE)
    assert same_bits(inference(x), expected)
    assert not list(inference._forward_hooks) and "weight_clip" not in inference.state_dict()


def test_a_gradient_is_refused_where_x_is_quantized() -> None:
    x = values((2, 16)).requires_grad_()
    inference = made(nn.Linear(16, 16), RECIPE)
    with pytest.raises(RuntimeError, match="a gradient reached a layer"):
        inference(x).sum().backward()
    inference.set_mode(activations="high")
    inference(x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, inference.weight.sum(0).expand(2, 16))


@pytest.mark.parametrize("weights", ["packed", "cached"])
@pytest.mark.parametrize("activations", ["high", "nvfp4"])
def test_the_memory_format_is_the_models_and_the_inputs(weights: str, activations: str) -> None:
    torch.manual_seed(0)
    layers = nn.Conv2d(32, 32, 3, groups=2), nn.Conv2d(32, 48, 1), nn.ConvTranspose2d(48, 32, 2), nn.Conv2d(32, 16, 3)
    model = nn.Sequential(*(made(layer, RECIPE) for layer in layers))
    for layer in model:
        layer.set_mode(weights, activations)
    x = values((2, 32, 9, 9))
    expected, tolerance = model(x), {"rtol": 0, "atol": 2e-2 if activations == "nvfp4" else 1e-5}
    assert expected.is_contiguous()
    last = model(x.contiguous(memory_format=torch.channels_last))
    assert last.is_contiguous(memory_format=torch.channels_last)
    model.to(memory_format=torch.channels_last)
    converted = model(x)
    assert converted.is_contiguous(memory_format=torch.channels_last)
    for y in (last, converted, model.to(torch.float32)(x)):
        torch.testing.assert_close(y / expected.abs().max(), expected / expected.abs().max(), **tolerance)
    assert model.to(memory_format=torch.contiguous_format)(x).is_contiguous()


@pytest.mark.parametrize("activations", ["high", "nvfp4"])
def test_compiled_and_exported_with_any_batch(activations: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(made(nn.Conv2d(16, 32, 3), RECIPE), nn.ReLU(), made(nn.ConvTranspose2d(32, 16, 2), RECIPE))
    model.requires_grad_(False)
    for layer in (model[0], model[2]):
        layer.set_mode(activations=activations)
    x = values((2, 16, 6, 6))
    expected = model(x)
    assert same_bits(torch.compile(model, backend="aot_eager", fullgraph=True)(x), expected)
    shapes = ({0: torch.export.Dim("batch", min=1, max=64)},)
    exported = torch.export.export(model, (x,), dynamic_shapes=shapes).module()
    assert same_bits(exported(x), expected)
    assert same_bits(exported(x[:1]), model(x[:1]))


class Chosen(nn.Module):
    """Runs a layer on the images that x itself chooses, so that torch.export does not know how many there are."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run the layer on the images with a positive sum."""
        return self.layer(x[x.flatten(1).sum(1) > 0])


@pytest.mark.parametrize("activations", ["high", "nvfp4"])
def test_exported_with_a_batch_that_depends_on_the_data(activations: str) -> None:
    model = Chosen(made(nn.Conv2d(16, 32, 3), RECIPE)).requires_grad_(False)
    model.layer.set_mode(activations=activations)
    x = values((8, 16, 6, 6))
    exported = torch.export.export(model, (x,)).module()
    for some in (x, -x):
        assert 0 < len(model(some)) < 8 and same_bits(exported(some), model(some))


@pytest.mark.parametrize("activations", ["high", "nvfp4"])
def test_a_bias_on_another_device_is_named(activations: str) -> None:
    layer = made(nn.Conv2d(16, 32, 3), RECIPE)
    layer.set_mode(activations=activations)
    layer.bias = nn.Parameter(torch.empty(32, device="meta"))
    with pytest.raises(ValueError, match="bias is on another device"):
        layer(values((2, 16, 6, 6)))


@compiled_kernels
@pytest.mark.slow
@pytest.mark.parametrize("weights", seeds(["packed"], ["cached"]))  # each is a compilation of 20 seconds
def test_aot_inductor_packages_an_integer_model(weights: str, tmp_path: Path) -> None:
    """In a process of its own: inductor imports setuptools, which wants to be there before any distutils."""
    script = textwrap.dedent(f"""
        import torch
        import te_nvfp4_cv as nv
        from te_nvfp4_cv.export.codes import quantize_layer
        from te_nvfp4_cv.export.modules import become
        recipe = nv.NVFP4BlockScaling()
        net = torch.nn.Sequential(torch.nn.Conv2d(16, 32, 3), torch.nn.ReLU(), torch.nn.ConvTranspose2d(32, 16, 2))
        for layer in (net[0], net[2]):
            become(layer, quantize_layer(layer, recipe), recipe, "integer").set_mode(weights={weights!r})
        x = torch.randn(2, 16, 6, 6)
        batch = ({{0: torch.export.Dim("batch", min=1, max=64)}},)
        with torch.no_grad():
            exported = torch.export.export(net.requires_grad_(False), (x,), dynamic_shapes=batch)
            path = torch._inductor.aoti_compile_and_package(exported, package_path={str(tmp_path / "net.pt2")!r})
            loaded = torch._inductor.aoti_load_package(path)
            assert torch.equal(loaded(x), net(x)) and torch.equal(loaded(x[:1]), net(x[:1]))
            assert torch.equal(torch.compile(net, fullgraph=True)(x), net(x))
    """)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("activations", ["nvfp4", "high"])
def test_torch_jit_trace_is_refused(activations: str) -> None:
    model, x = nn.Sequential(nn.Conv2d(16, 32, 3)), values((2, 16, 6, 6))
    made_of(model[0]).set_mode(activations=activations)
    with pytest.raises(RuntimeError, match=r"jit.trace does not take an inference layer[\s\S]*form='portable'"):
        torch.jit.trace(model, x)


def made_of(layer: nn.Module) -> export.InferenceLayer:
    return become(layer, quantize_layer(layer, RECIPE), RECIPE)
