"""nv.functional takes torch.nn.functional's arguments and gives its shapes, strides and dtypes, and values near."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from te_nvfp4_cv import functional as NF
from te_nvfp4_cv.backend.dispatch import bf16_is_native
from te_nvfp4_cv.context.context_manager import nvfp4_autocast
from te_nvfp4_cv.recipe.block_scaling import NVFP4BlockScaling
from tests.helpers import relative_error, same_bits, values
from tests.layers import BACKENDS, LAYERS, NO_SR, step, tensors

pytestmark = pytest.mark.usefixtures("one_thread")
layers = pytest.mark.parametrize("layer", LAYERS)


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
        assert v.stride() == r.stride(), name
        # torch's 3-D path on a CPU drops channels_last in dtypes that the CPU has no arithmetic for
        slow = dtype == torch.float16 or (dtype == torch.bfloat16 and not bf16_is_native(x.device))
        if name == "y" and not (slow and x.dim() == 5):
            assert v.stride() == e.stride()
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
    assert last[0].stride() == step(layer, x, w_last, bias, F)[0].stride()
    assert last[2].stride() == w_last.stride()
    for a, b in zip(plain, last, strict=True):
        assert relative_error(a, b) <= 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "op, x_shape, w_shape",
    [
        ("conv1d", (16, 16, 1), (16, 16, 1)),
        ("conv2d", (16, 16, 4, 4), (16, 16, 1, 1)),
        ("conv2d", (16, 16, 1, 1), (16, 16, 1, 1)),
        ("conv2d", (16, 16, 3, 3), (16, 16, 3, 3)),
        ("conv_transpose2d", (16, 16, 1, 1), (16, 16, 1, 1)),
        ("conv3d", (16, 16, 1, 1, 1), (16, 16, 1, 1, 1)),
    ],
)
def test_axes_of_one_element_have_the_strides_that_torch_gives(op, x_shape, w_shape, backend):
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    for memory_format in (torch.contiguous_format, formats.get(len(x_shape))):
        if memory_format is None:
            continue
        x, w = (values(s).to(memory_format=memory_format).requires_grad_() for s in (x_shape, w_shape))
        expected = getattr(F, op)(x, w)
        y = getattr(NF, op)(x, w, backend=backend)
        dx, dw = torch.autograd.grad(y, (x, w), torch.ones_like(expected))
        # Later layers choose their memory format by y's, and DistributedDataParallel compares dw's with the weight's.
        assert y.stride() == expected.stride()
        assert dx.stride() == x.stride() and dw.stride() == w.stride()


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
    truth, *others = results
    for other in others:
        assert all(relative_error(v, r) <= 1e-5 for r, v in zip(truth, other, strict=True))
    assert relative_error(results[1][0], F.conv2d(x, w, None, 2, 1)) < 0.25


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
