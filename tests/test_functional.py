"""nv.functional: torch.nn.functional's arguments, shapes, strides and dtypes; what backward keeps; what is refused."""

from __future__ import annotations

import gc
import itertools
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from te_nvfp4_cv import functional as NF
from te_nvfp4_cv.autocast import nvfp4_autocast
from te_nvfp4_cv.ops.quantize import quantize
from te_nvfp4_cv.ops.quantize.quantizer import NVFP4Quantizer
from te_nvfp4_cv.recipe import NVFP4BlockScaling
from tests.helpers import relative_error, same_bits, values

pytestmark = pytest.mark.usefixtures("one_thread")
BACKENDS = ("reference", "vendor")
NO_SR = NVFP4BlockScaling(disable_stochastic_rounding=True)
LAYERS: dict[str, tuple[str, tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {  # op, x, w, arguments
    "conv1d": ("conv1d", (3, 16, 9), (24, 16, 3), dict(stride=2, padding=1)),
    "conv2d": ("conv2d", (3, 16, 6, 5), (24, 16, 3, 3), dict(padding=1)),
    "conv2d 1x1": ("conv2d", (16, 32, 4, 4), (16, 32, 1, 1), dict(stride=2)),
    "conv2d 7x7": ("conv2d", (1, 16, 9, 11), (16, 16, 7, 7), dict(stride=2, padding=3)),
    "conv2d groups": ("conv2d", (2, 32, 5, 6), (48, 16, 3, 2), dict(dilation=(2, 1), groups=2)),
    "conv2d same": ("conv2d", (2, 16, 5, 6), (16, 16, 2, 3), dict(padding="same", dilation=(1, 2))),
    "conv2d same odd": ("conv2d", (2, 16, 5, 6), (16, 16, 4, 2), dict(padding="same")),
    "conv2d valid": ("conv2d", (2, 16, 5, 6), (16, 16, 3, 3), dict(padding="valid", stride=(2, 1))),
    "conv3d": ("conv3d", (2, 16, 3, 4, 5), (16, 16, 1, 3, 2), dict(padding=(0, 1, 0), stride=(1, 2, 1))),
    "conv_transpose1d": ("conv_transpose1d", (2, 16, 6), (16, 24, 3), dict(stride=2, output_padding=1)),
    "conv_transpose2d": ("conv_transpose2d", (3, 24, 4, 3), (24, 16, 2, 2), dict(stride=2)),
    "conv_transpose2d groups": (
        "conv_transpose2d",
        (2, 32, 3, 4),
        (32, 24, 3, 3),
        dict(stride=(1, 2), padding=1, output_padding=(0, 1), groups=2, dilation=(2, 1)),
    ),
    "conv_transpose3d": ("conv_transpose3d", (2, 16, 2, 3, 2), (16, 16, 2, 2, 2), dict(stride=(2, 1, 2))),
    "linear": ("linear", (2, 5, 32), (24, 32), {}),
    "linear vector": ("linear", (32,), (24, 32), {}),
    "linear matrix": ("linear", (16, 40), (16, 40), {}),
}
layers = pytest.mark.parametrize("layer", LAYERS)


def tensors(layer: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """x, w, bias, leaves that require grad."""
    op, x, w, arguments = LAYERS[layer]
    out = w[1] * arguments.get("groups", 1) if "transpose" in op else w[0]
    return tuple(values(s, "normal", dtype, i).requires_grad_() for i, s in enumerate((x, w, (out,))))  # type: ignore[return-value]


def step(layer: str, x: Tensor, w: Tensor, bias: Tensor | None, namespace: Any = NF, **options: Any) -> list[Tensor]:
    """y, dx, dw, db (those that exist) of one forward and backward, SR seeded."""
    op, arguments = LAYERS[layer][0], LAYERS[layer][3]
    torch.manual_seed(11)
    y = getattr(namespace, op)(x, w, bias, **arguments, **options)
    inputs = [t for t in (x, w, bias) if t is not None and t.requires_grad]
    return [y, *torch.autograd.grad(y, inputs, values(y.shape, "normal", y.dtype, 7))]


def strides(t: Tensor) -> list[int]:
    """Strides of the axes longer than 1: the others mean nothing."""
    return [stride for stride, size in zip(t.stride(), t.shape, strict=True) if size > 1]


# ---- as torch.nn.functional -----------------------------------------------------------------------------------------


@layers
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("channels_last", [False, True])
def test_results_look_like_torchs_and_are_near(layer, dtype, channels_last):
    x, w, bias = tensors(layer, dtype)
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    if channels_last and x.dim() not in formats:
        pytest.skip("channels_last is for 2-D and 3-D images")
    if channels_last:
        x = x.detach().to(memory_format=formats[x.dim()]).requires_grad_()
    expected = step(layer, x, w, bias, F)
    vendor = step(layer, x, w, bias, recipe=NO_SR, backend="vendor")
    reference = step(layer, x, w, bias, recipe=NO_SR, backend="reference")
    tolerance = {torch.bfloat16: 6e-3, torch.float16: 1e-3, torch.float32: 1e-5}[dtype]
    for name, e, v, r in zip(("y", "dx", "dw", "db"), expected, vendor, reference, strict=True):
        assert v.dtype == r.dtype == e.dtype and v.shape == r.shape == e.shape, name
        assert strides(v) == strides(r), name
        if name == "y" and not (dtype == torch.float16 and x.dim() == 5):  # torch's fp16 3-D path on a CPU drops channels_last
            assert strides(v) == strides(e)
        assert relative_error(v, r) <= tolerance, name
        assert relative_error(v, e) <= (0.3 if name != "db" else 5e-3), name
    if layer != "linear vector":
        assert relative_error(vendor[0], expected[0]) > 0.01  # it did quantize


@layers
def test_weights_stored_channels_last_get_such_gradients(layer):
    x, w, bias = tensors(layer)
    if w.dim() not in (4, 5):
        pytest.skip("channels_last is for 2-D and 3-D kernels")
    memory_format = torch.channels_last if w.dim() == 4 else torch.channels_last_3d
    plain = step(layer, x, w, bias, recipe=NO_SR)
    w_last = w.detach().to(memory_format=memory_format).requires_grad_()
    last = step(layer, x, w_last, bias, recipe=NO_SR)
    assert strides(last[0]) == strides(step(layer, x, w_last, bias, F)[0])
    assert strides(last[2]) == strides(w_last)
    for a, b in zip(plain, last, strict=True):
        assert relative_error(a, b) <= 1e-6


@pytest.mark.parametrize("layer", ["conv1d", "conv2d", "conv2d same odd", "conv3d", "conv_transpose2d"])
def test_unbatched_inputs(layer):
    x, w, bias = tensors(layer)
    one = x.detach()[0].requires_grad_()
    y, dx, dw, db = step(layer, one, w, bias, recipe=NO_SR)
    assert y.shape == step(layer, one, w, bias, F)[0].shape and dx.shape == one.shape
    batch = x.detach()[:1].requires_grad_()
    torch.manual_seed(11)
    expected = getattr(NF, LAYERS[layer][0])(batch, w, bias, **LAYERS[layer][3], recipe=NO_SR)
    assert same_bits(y.detach(), expected.detach()[0])


@layers
@pytest.mark.parametrize("how", ["sliced", "transposed", "expanded"])
def test_strides_of_the_input_do_not_matter(layer, how):
    x, w, bias = (t.detach() for t in tensors(layer))
    if how == "sliced":
        strided = torch.cat([x, x * 1e3], dim=-1)[..., : x.shape[-1]]
    elif how == "transposed":
        strided = x.transpose(0, -1).contiguous().transpose(0, -1)
    else:
        strided = x[..., :1].expand(x.shape)
    function = getattr(NF, LAYERS[layer][0])
    y = function(strided, w, bias, **LAYERS[layer][3])
    expected = function(strided.contiguous(), w, bias, **LAYERS[layer][3])
    assert relative_error(y, expected) <= 1e-6


def test_compute_dtype_is_autocasts_and_dw_is_the_parameters():
    for dtype in (torch.bfloat16, torch.float16):
        x, w, bias = tensors("conv2d")
        with torch.autocast("cpu", dtype):
            y, dx, dw, db = step("conv2d", x, w, bias, recipe=NO_SR)
        assert (y.dtype, dx.dtype, dw.dtype, db.dtype) == (dtype, torch.float32, torch.float32, torch.float32)
        cast = x.detach().to(dtype).requires_grad_()
        with torch.autocast("cpu", dtype):
            y_cast, dx_cast, dw_cast, _ = step("conv2d", cast, w, bias, recipe=NO_SR)
        assert same_bits(y.detach(), y_cast.detach()) and same_bits(dw, dw_cast) and dx_cast.dtype == dtype


def test_weights_are_quantized_as_they_are_stored():
    """Not after autocast's cast: fp32 weights that bf16 would round keep their own codes."""
    x, w, _ = (t.detach() for t in tensors("conv2d"))
    with torch.autocast("cpu", torch.bfloat16):
        y, y_cast = NF.conv2d(x, w), NF.conv2d(x, w.bfloat16())
    assert not torch.equal(y, y_cast)


@pytest.mark.parametrize("padding_mode", ["reflect", "replicate", "circular"])
def test_padding_modes_of_modules(padding_mode):
    module = torch.nn.Conv2d(16, 16, 3, padding=(1, 2), padding_mode=padding_mode)
    x = values((2, 16, 5, 6))
    with nvfp4_autocast(NO_SR):
        y = module(x)
    padded = F.pad(x, (2, 2, 1, 1), mode=padding_mode)
    assert same_bits(y.detach(), NF.conv2d(padded, module.weight, module.bias, recipe=NO_SR).detach())


def test_output_size_of_transposed_modules():
    module = torch.nn.ConvTranspose2d(16, 16, 3, stride=2, padding=1)
    x = values((2, 16, 4, 5))
    with nvfp4_autocast(NO_SR):
        y = module(x, output_size=(8, 10))
    assert y.shape == (2, 16, 8, 10)
    expected = NF.conv_transpose2d(x, module.weight, module.bias, 2, 1, 1, recipe=NO_SR)
    assert same_bits(y.detach(), expected.detach())


def test_thin_layers_are_padded_when_the_recipe_says_so():
    x, w = values((2, 3, 8, 8)).requires_grad_(), values((20, 3, 3, 3)).requires_grad_()
    recipe = NVFP4BlockScaling(thin_layers="pad", disable_stochastic_rounding=True)
    results = []
    for backend in BACKENDS:
        y = NF.conv2d(x, w, None, 2, 1, recipe=recipe, backend=backend)
        results.append([y, *torch.autograd.grad(y.square().sum(), (x, w))])
    for r, v in zip(*results, strict=True):
        assert relative_error(v, r) <= 1e-5
    assert relative_error(results[1][0], F.conv2d(x, w, None, 2, 1)) < 0.25


# ---- im2col on codes ------------------------------------------------------------------------------------------------


def unfolded(x: Tensor, kernel: tuple[int, ...], stride: Any, padding: Any, dilation: Any) -> Tensor:
    """[*out, B, taps * C] of x [*image, B, C], by slicing."""
    rank = len(kernel)
    stride, padding, dilation = ((v,) * rank if isinstance(v, int) else v for v in (stride, padding, dilation))
    x = F.pad(x, (0, 0, 0, 0, *[p for p in reversed(padding) for _ in (0, 1)]))
    out = [(x.shape[d] - dilation[d] * (kernel[d] - 1) - 1) // stride[d] + 1 for d in range(rank)]
    taps = []
    for tap in itertools.product(*map(range, kernel)):
        at = [t * d for t, d in zip(tap, dilation, strict=True)]
        taps.append(x[tuple(slice(a, a + (n - 1) * s + 1, s) for a, n, s in zip(at, out, stride, strict=True))])
    return torch.cat(taps, dim=-1)


@pytest.mark.parametrize("layout", ["te", "ntile"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("image", "kernel", "stride", "padding", "dilation"),
    [
        ((9,), (3,), 2, 1, 2),
        ((5, 6), (3, 3), 1, 1, 1),
        ((7, 6), (3, 2), (2, 3), (1, 0), (2, 1)),
        ((5, 5), (1, 1), 2, 0, 1),
        ((3, 4, 3), (2, 3, 1), (1, 2, 1), (1, 0, 0), 1),
    ],
)
def test_im2col_of_codes_is_the_code_of_im2col(image, kernel, stride, padding, dilation, dtype, layout):
    x = values((*image, 32, 16), "wide", dtype)
    t = NVFP4Quantizer(with_rht=True)(x).to_columnwise_layout(layout)
    lowered = NF.im2col(t, kernel, stride, padding, dilation)
    matrix = unfolded(x, kernel, stride, padding, dilation)
    assert lowered.shape == matrix.shape and lowered.dtype == dtype and lowered.columnwise_rht
    faces = quantize(
        matrix.flatten(0, -2), columnwise=True, rht=True, amax_rowwise=t.amax_rowwise, amax_columnwise=t.amax_columnwise
    )
    assert same_bits(lowered.rowwise_data.flatten(0, -2), faces.row_data)
    assert same_bits(lowered.rowwise_scale_inv, faces.row_scale)
    data, scale = lowered.columnwise_te()
    assert same_bits(data, faces.col_data) and same_bits(scale, faces.col_scale)
    assert same_bits(lowered.amax_rowwise, t.amax_rowwise) and same_bits(lowered.amax_columnwise, t.amax_columnwise)


@pytest.mark.parametrize("face", ["rowwise", "columnwise"])
def test_im2col_of_one_face(face):
    x = values((5, 4, 16, 16))
    both = NF.im2col(NVFP4Quantizer(with_rht=True)(x), 3, 1, 1)
    other = "columnwise" if face == "rowwise" else "rowwise"
    one = NF.im2col(NVFP4Quantizer(with_rht=True, **{other: False})(x), 3, 1, 1)
    assert getattr(one, f"{other}_data") is None
    assert same_bits(getattr(one, f"{face}_data"), getattr(both, f"{face}_data"))


def test_im2col_refuses_what_it_cannot_lower():
    quantizer = NVFP4Quantizer()
    x = values((5, 4, 16, 16))
    with pytest.raises(TypeError, match="an NVFP4Tensor"):
        NF.im2col(x, 3)
    for bad in (values((16, 16)), values((5, 4, 16, 24)), values((5, 4, 3, 16))):
        with pytest.raises(ValueError, match="multiple of 16"):
            NF.im2col(quantizer(bad), 3)
    with pytest.raises(ValueError, match="larger than the image"):
        NF.im2col(quantizer(x), 6)
    for wrong in (dict(kernel_size=0), dict(kernel_size=(3, 3, 3)), dict(kernel_size=3, stride=0)):
        with pytest.raises(ValueError, match="im2col: bad"):
            NF.im2col(quantizer(x), **wrong)


# ---- backward -------------------------------------------------------------------------------------------------------

KEEPS_X = [
    NVFP4BlockScaling(backward_override="high_precision"),
    NVFP4BlockScaling(high_precision_gemms=("wgrad",)),
]
KEEPS_CODES = [
    NVFP4BlockScaling(),
    NVFP4BlockScaling(disable_2d_quantization=True),
    NVFP4BlockScaling(wgrad_block="pixel"),
    NVFP4BlockScaling(backward_override="dequantized"),
    NVFP4BlockScaling(high_precision_gemms=("fprop",)),
    NVFP4BlockScaling(disable_rht=True, row_scaled_activation=True),
]


def saved_by(run: Any) -> list[Tensor]:
    """The tensors that autograd keeps while `run` builds its graph; run's result is kept alive by the caller."""
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        run()
    return kept


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("recipe", KEEPS_CODES, ids=repr)
@pytest.mark.parametrize("layer", ["conv2d", "conv2d 1x1", "conv_transpose2d", "linear"])
def test_saved_codes_suffice_for_backward(layer, recipe, backend):
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
    from te_nvfp4_cv import formats

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
    from te_nvfp4_cv.ops.quantize import operands

    faces: list[int] = []
    original = operands.quantize_operand
    operands.quantize_operand = lambda *args: faces.append(args[4]) or original(*args)  # type: ignore[assignment]
    try:
        y = NF.conv2d(x, w)
        with torch.no_grad():
            y_no_grad = NF.conv2d(x, w)
        with torch.inference_mode():
            y_inference = NF.conv2d(x, w)
    finally:
        operands.quantize_operand = original
    assert faces == [operands.PACKED, operands.NONE, operands.NONE]
    assert same_bits(y.detach(), y_no_grad) and same_bits(y.detach(), y_inference.clone())


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
def test_stochastic_rounding_is_the_same_on_both_backends(layer):
    parts = tensors(layer)
    for a, b in zip(*(step(layer, *parts, backend=backend) for backend in BACKENDS), strict=True):
        assert relative_error(b, a) <= 1e-5


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
    for recipe in recipes if layer in ("conv2d 1x1", "linear") else recipes[:1]:
        x, w, bias = tensors(layer)
        y = getattr(NF, LAYERS[layer][0])(x, w, bias, **LAYERS[layer][3], recipe=recipe)
        parts = {"x": x, "w": w, "dy": values(y.shape, seed=7)}
        parts = {name: part.detach().clone() for name, part in parts.items()}
        parts[where].view(-1)[3] = bad
        x, w = parts["x"].requires_grad_(), parts["w"].requires_grad_()
        y = getattr(NF, LAYERS[layer][0])(x, w, bias, **LAYERS[layer][3], recipe=recipe, backend=backend)
        dx, dw = torch.autograd.grad(y, (x, w), parts["dy"])
        results = {"y": (y, "x w"), "dx": (dx, "dy w"), "dw": (dw, "dy x")}
        for name, (result, operands) in results.items():
            if where in operands.split():
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


# ---- sizes at the edge ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layer", ["conv1d", "conv2d", "conv3d", "conv_transpose2d", "linear"])
def test_zero_size_batch(layer, backend):
    x, w, bias = tensors(layer)
    empty = x.detach()[:0].requires_grad_()
    got = step(layer, empty, w, bias, backend=backend)
    expected = step(layer, empty, w, bias, F)
    assert all(a.shape == b.shape and a.dtype == b.dtype for a, b in zip(got, expected, strict=True))
    assert not got[2].any() and not got[3].any()


@pytest.mark.parametrize("scale", [0.0, 1e-38, 1e30])
def test_extreme_magnitudes_stay_finite(scale):
    x, w, _ = tensors("conv2d")
    x = (x.detach() * scale).requires_grad_()
    y, dx, dw = step("conv2d", x, w, None, recipe=NO_SR)
    assert y.isfinite().all() and dx.isfinite().all() and dw.isfinite().all()
    if scale == 1e30:
        assert relative_error(y, step("conv2d", x, w, None, F)[0]) < 0.25


# ---- refusals -------------------------------------------------------------------------------------------------------

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


@pytest.mark.parametrize("recipe", [True, "default", NVFP4BlockScaling, {"disable_rht": True}, 3])
def test_what_is_no_recipe_is_a_type_error(recipe):
    with pytest.raises(TypeError, match="recipe"):
        NF.conv2d(X, W, recipe=recipe)


def test_a_backend_that_cannot_run_here_says_what_it_needs():
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
