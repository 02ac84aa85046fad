"""The three GEMMs of a convolution.

    quantization off       the lowering is torch's convolution, forward and backward, in float64
    reference              equals the loop nest of tests/oracle.py on dequantized operands, in float64;
                           equals im2col(NVFP4Tensor) x nv.gemm, bit for bit
    vendor                 equals the reference on the same codes within 2x of bf16's own error; fp32 within 1e-5
bf16's own error: torch's bf16 convolution against the float64 one, on the same dequantized operands, exact in both.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from te_nvfp4_cv import formats
from te_nvfp4_cv import functional as NF
from te_nvfp4_cv.ops.conv import operators, reference
from te_nvfp4_cv.ops.geometry import ConvGeometry
from te_nvfp4_cv.ops.quantize import operand
from te_nvfp4_cv.ops.quantize.reference import fold_images
from te_nvfp4_cv.ops.records import NONE, PACKED, Face, OperandSpec, WeightLayout, WeightSpec
from te_nvfp4_cv.recipe.block_scaling import NVFP4BlockScaling
from te_nvfp4_cv.recipe.files import list_recipes, load_recipe
from te_nvfp4_cv.tensor import im2col
from te_nvfp4_cv.tensor.gemm import gemm
from te_nvfp4_cv.tensor.quantizer import NVFP4Quantizer
from tests import oracle
from tests.helpers import make_geometry, relative_error, same_bits, values

pytestmark = pytest.mark.usefixtures("one_thread")


def torch_conv(x: Tensor, w: Tensor, g: ConvGeometry) -> Tensor:
    """torch's convolution of channels-last x [B, *image, C] and w [axis 0, taps, axis 1]: y channels-last."""
    w = w.unflatten(1, g.kernel).movedim(-1, 1)
    y = torch.convolution(
        x.movedim(-1, 1), w, None, g.stride, g.padding, g.dilation, g.transposed, g.output_padding, g.groups
    )
    return y.movedim(1, -1)


# ---- quantization off -----------------------------------------------------------------------------------------------


class Lowered(torch.autograd.Function):
    """The reference lowering on plain values: one part (values,) in place of (codes, scale bytes)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, g: ConvGeometry) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.g = g
        return reference.data_product((x,), Lowered.kernel(w, g, not g.transposed), g, not g.transposed)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        (x, w), g = ctx.saved_tensors, ctx.g
        dx = reference.data_product((dy,), Lowered.kernel(w, g, g.transposed), g, g.transposed)
        a, b = (dy, x) if g.transposed else (x, dy)
        a_fold, b_fold = g.folds
        return dx, reference.weight_product(Lowered.columns(b, b_fold), Lowered.columns(a, a_fold), g), None

    @staticmethod
    def kernel(w: Tensor, g: ConvGeometry, to_b: bool) -> tuple[Tensor]:
        """w [axis 0, taps, axis 1] as the part that the direction multiplies; columnwise: one block, the whole axis."""
        return (w,) if to_b else (w.unflatten(0, (g.groups, -1)).movedim(1, -1).unsqueeze(1),)

    @staticmethod
    def columns(x: Tensor, fold: Any) -> tuple[Tensor]:
        return (fold_images(x, fold).unflatten(0, (-1, 16)).movedim(1, -1),)


def assert_is_convolution(g: ConvGeometry, check_gradients: bool = True) -> None:
    x = torch.randn(g.x_shape, dtype=torch.float64, requires_grad=True)
    w = torch.randn(g.weight_shape, dtype=torch.float64, requires_grad=True)
    y, truth = Lowered.apply(x, w, g), torch_conv(x, w, g)
    torch.testing.assert_close(y, truth, rtol=1e-12, atol=1e-12)
    dy = torch.randn_like(y)
    for got, expected in zip(torch.autograd.grad(y, (x, w), dy), torch.autograd.grad(truth, (x, w), dy), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    if check_gradients:
        assert torch.autograd.gradcheck(lambda a, b: Lowered.apply(a, b, g), (x, w), fast_mode=True)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_lowering_is_the_convolution_in_float64(rank, groups, transposed):
    image = (5, 4, 4)[:rank]
    for stride, padding, dilation in itertools.product((1, 2, 3), (0, 1, 2), (1, 2)):
        channels = (3 * groups, 2 * groups)
        g = make_geometry(2, channels, image, (3, 2, 1)[:rank], stride, padding, dilation, 0, groups, transposed)
        if min(g.x_shape) > 0 and min(g.y_shape) > 0:
            assert_is_convolution(g)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("kernel", [1, 2, 3, 7])
@pytest.mark.parametrize("batch", [1, 2, 3, 4, 5, 8, 16, 17])
def test_folded_lowering_is_the_convolution_in_float64(batch, kernel, transposed):
    for stride, image in ((1, (9, 3)), (2, (8, 2)), (3, (11, 1))):
        size = (kernel, min(kernel, image[1]))
        padding = (kernel // 2, 0)
        g = make_geometry(batch, (3, 2), image, size, stride, padding, transposed=transposed)
        assert_is_convolution(g, check_gradients=batch in (1, 3))


@pytest.mark.parametrize("batch", [1, 4, 16])
def test_output_padding_up_to_and_beyond_the_stride(batch):
    for stride, dilation, extra in ((2, 1, 1), (3, 1, 2), (1, 2, 1), (2, 3, 2), (1, 3, 2)):
        g = make_geometry(batch, (3, 2), (5, 4), 3, stride, 1, dilation, extra, transposed=True)
        assert_is_convolution(g, check_gradients=batch == 1)


def test_rht_cancels_in_wgrad():
    for batch, transposed in itertools.product((3, 16), (False, True)):
        g = make_geometry(batch, (6, 4), (7, 5), 3, 2, 1, groups=2, transposed=transposed)
        sides = [values((batch, *size), seed=3) for size in ((*g.b_size, g.channels_b), (*g.a_size, g.channels_a))]
        plain = [Lowered.columns(side, fold) for side, fold in zip(sides, g.folds[::-1], strict=True)]
        rotated = [(formats.rht16(part[0]),) for part in plain]
        truth = reference.weight_product(*[(part[0].double(),) for part in plain], g)
        assert relative_error(reference.weight_product(*rotated, g), truth) < 1e-6
        assert not torch.allclose(rotated[0][0], plain[0][0])


# ---- quantized operands ---------------------------------------------------------------------------------------------

QUANTIZED = {
    "1x1": make_geometry(16, (16, 32), (3, 3), 1),
    "3x3": make_geometry(3, (16, 24), (6, 4), 3, 1, 1),
    "3x3 stride 2 groups": make_geometry(2, (32, 48), (7, 5), 3, 2, 1, groups=2),
    "7x7 stride 2 dilated": make_geometry(1, (3, 16), (9, 15), 7, 2, (3, 3), (1, 2)),
    "1-d": make_geometry(5, (16, 17), (9,), 3, 2, 2, 2),
    "3-d": make_geometry(2, (16, 16), (3, 4, 3), (1, 3, 2), (1, 2, 1), (0, 1, 1)),
    "transposed": make_geometry(3, (24, 16), (4, 3), 2, 2, transposed=True),
    "transposed groups": make_geometry(1, (32, 48), (5, 3), 3, 2, 1, 1, 1, 2, True),
    "transposed 1-d": make_geometry(2, (16, 20), (6,), 3, 1, 1, 2, 1, transposed=True),
    "transposed 3-d": make_geometry(2, (16, 16), (2, 3, 2), 2, (2, 1, 2), 0, 1, (1, 0, 1), 1, True),
    "linear": ConvGeometry(21, 40, 24, (), (), (), (), (), (), (), 1, False),
}
cases = pytest.mark.parametrize("case", QUANTIZED)


def quantized(g: ConvGeometry, two_d: bool = True) -> dict[str, Face]:
    """Return every packed face of random x, w and dy."""
    a, b = g.folds
    x_fold, dy_fold = (b, a) if g.transposed else (a, b)
    out: dict[str, Face] = {}
    for name, shape, fold, seed in (("x", g.x_shape, x_fold, None), ("dy", g.y_shape, dy_fold, torch.tensor([9]))):
        x = values(shape, seed=len(name))
        spec = OperandSpec(g.groups, fold, PACKED, PACKED, True, seed is not None)
        made = operand.quantize_operand(x, spec, torch.float32, seed, None, "vendor")
        out[f"{name} row"], out[f"{name} col"] = made.row, made.col
    w = values(g.weight_shape, seed=5).unflatten(1, g.kernel or (1,)).movedim(-1, 1)
    w = w if g.rank else w[..., 0]
    spec = WeightSpec(g.groups, PACKED, NONE if two_d else PACKED, two_d)
    codes = operand.quantize_weight(w, spec, torch.float32, "vendor")
    out["w row"], out["w col"] = codes.row, codes.row if two_d else codes.col
    return out


def layout_of(face: Face, g: ConvGeometry) -> WeightLayout:
    """Return the sizes of a packed face of the weight."""
    n, _, channels = g.weight_shape
    return WeightLayout(n, channels, g.groups, face.data.dim() == 5)


def dequantized(name: str, face: Face, g: ConvGeometry, dtype: torch.dtype) -> Tensor:
    """Return code * scale of one face, in the layout of the array."""
    if name.startswith("w"):
        return operand.unpack_weight(face, layout_of(face, g), None, dtype, "reference")
    if name.endswith("col"):
        return operand.unpack_columns(face, dtype, "reference")
    shape = g.x_shape if name.startswith("x") else g.y_shape
    return operand.unpack_rows(face, shape[-1], g.groups, dtype, "reference")


def faces_of(g: ConvGeometry) -> dict[str, tuple[str, str]]:
    """Which faces each GEMM multiplies; blocks run along the contracted axis of both."""
    data = ("w col", "w row") if g.transposed else ("w row", "w col")
    return {"fprop": ("x row", data[0]), "dgrad": ("dy row", data[1]), "wgrad": ("dy col", "x col")}


def run(
    gemm_name: str, q: dict[str, Face], g: ConvGeometry, alpha: Tensor | None, dtype: torch.dtype, backend: str
) -> Tensor:
    """One GEMM by a backend; vendor multiplies exact dequantized operands in bf16 or fp32."""
    compute = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    faces = [q[name] for name in faces_of(g)[gemm_name]]
    if backend == "vendor":
        names = faces_of(g)[gemm_name]
        faces = [Face(dequantized(name, q[name], g, compute), q[name].scale.new_empty(0)) for name in names]
    first, second = faces
    if gemm_name == "fprop":
        return operators.conv_fprop(first, second, alpha, None, g, dtype, backend)
    function = operators.conv_dgrad if gemm_name == "dgrad" else operators.conv_wgrad
    return function(first, second, alpha, g, dtype, backend)


def plain(gemm_name: str, q: dict[str, Any], g: ConvGeometry, dtype: torch.dtype) -> Tensor:
    """The same GEMM by torch on the dequantized operands, in `dtype`, before alpha."""
    first, second = (dequantized(name, q[name], g, torch.float32).to(dtype) for name in faces_of(g)[gemm_name])
    if g.rank == 0:
        if gemm_name == "wgrad":
            return (first.t() @ second).unsqueeze(1)
        return first @ (second[:, 0].t() if gemm_name == "fprop" else second[:, 0])
    if gemm_name == "fprop":
        return torch_conv(first, second, g)
    if gemm_name == "wgrad":
        g = g.folded
    x = torch.zeros(g.x_shape, dtype=dtype) if gemm_name == "dgrad" else second
    w = second if gemm_name == "dgrad" else torch.zeros(g.weight_shape, dtype=dtype)
    x, w = x.requires_grad_(), w.requires_grad_()
    return torch.autograd.grad(torch_conv(x, w, g), x if gemm_name == "dgrad" else w, first)[0]


@cases
@pytest.mark.parametrize("two_d", [True, False])
def test_vendor_is_within_bf16s_own_error_of_the_reference(case, two_d):
    g, alpha = QUANTIZED[case], torch.tensor([0.37])
    q = quantized(g, two_d)
    for name in ("fprop", "dgrad", "wgrad"):
        truth = plain(name, q, g, torch.float64)
        results = {b: run(name, q, g, alpha, torch.float32, b) for b in ("reference", "vendor")}
        assert results["vendor"].shape == results["reference"].shape and results["vendor"].is_contiguous()
        assert relative_error(results["reference"], truth * 0.37) <= 1e-6, name
        assert relative_error(results["vendor"], results["reference"]) <= 1e-5, name
        own = relative_error(plain(name, q, g, torch.bfloat16), truth)
        expected, got = (run(name, q, g, alpha, torch.bfloat16, b) for b in ("reference", "vendor"))
        assert expected.dtype == got.dtype == torch.bfloat16
        assert relative_error(got, expected) <= 2 * own, (name, own)


@cases
def test_reference_equals_the_loop_nest(case):
    g, alpha = QUANTIZED[case], torch.tensor([1.0])
    q = quantized(g, two_d=False)

    def arrays(name: str) -> tuple[Any, Any]:
        """The two dequantized operands as channels-first float64 arrays."""
        out = []
        for face in faces_of(g)[name]:
            v = dequantized(face, q[face], g, torch.float32).double()
            if face.startswith("w"):
                v = v.unflatten(1, g.kernel or (1,))
            elif g.rank == 0:
                v = v.unsqueeze(1)
            out.append(v.movedim(-1, 1).numpy())
        return out[0], out[1]

    f = g.folded
    numbers, folded = ((s.stride, s.padding, s.dilation, g.groups) for s in (g, f))
    numbers, folded = (n if g.rank else ((1,), (0,), (1,), 1) for n in (numbers, folded))
    (x, w), (dy, w_back), (dy_col, x_col) = (arrays(name) for name in ("fprop", "dgrad", "wgrad"))
    if g.transposed:
        y = oracle.conv_transpose(x, w, numbers[0], numbers[1], g.output_padding, numbers[2], g.groups)
        dx = oracle.conv_transpose_dx(dy, w_back, *numbers)[(..., *map(slice, g.b_size))]
        dw = oracle.conv_transpose_dw(dy_col, x_col, g.kernel, *folded)
    else:
        y = oracle.conv(x, w, *numbers)
        dx = oracle.conv_dx(dy, w_back, g.a_size or (1,), *numbers)
        dw = oracle.conv_dw(dy_col, x_col, g.kernel or (1,), *folded)
    for name, truth in (("fprop", y), ("dgrad", dx), ("wgrad", dw)):
        expected = torch.from_numpy(truth).movedim(1, -1)
        got = run(name, q, g, alpha, torch.float32, "reference")
        assert relative_error(got, expected.reshape(got.shape)) <= 1e-6, name


@cases
@pytest.mark.parametrize("backend", ["reference", "vendor"])
def test_without_alpha_the_operands_carry_the_scales(case, backend):
    g = QUANTIZED[case]
    q, one, factor = quantized(g, True), torch.tensor([1.0]), torch.tensor([2.0**-9])
    for name in ("fprop", "dgrad", "wgrad"):
        plain, scaled = (run(name, q, g, alpha, torch.float32, backend) for alpha in (one, factor))
        assert same_bits(run(name, q, g, None, torch.float32, backend), plain), name
        assert same_bits(scaled, plain * factor), name
    if backend == "vendor":  # a power of two in the weight is exact, and the library adds the bias
        x, w = (q[name] for name in faces_of(g)["fprop"])
        none = x.scale.new_empty(0)
        carrying = Face(operand.unpack_weight(w, layout_of(w, g), factor, torch.float32, backend), none)
        rows = Face(dequantized("x row", x, g, torch.float32), none)
        bias = values((g.y_shape[-1],), seed=6)
        y = operators.conv_fprop(rows, carrying, None, bias, g, torch.float32, backend)
        assert relative_error(y, run("fprop", q, g, factor, torch.float32, backend) + bias) <= 1e-6


# ---- compositions of public pieces ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_reference_is_im2col_of_codes_times_gemm(dtype):
    x, w = values((16, 32, 5, 4), "normal", dtype, 1), values((48, 32, 3, 3), "normal", dtype, 2)
    recipe = NVFP4BlockScaling(disable_stochastic_rounding=True)
    x_, w_ = x.clone().requires_grad_(), w.clone().requires_grad_()
    y = NF.conv2d(x_, w_, None, 2, 1, recipe=recipe, backend="reference")
    dy = values(y.shape, "normal", dtype, 3)
    y.backward(dy)
    x_q = NVFP4Quantizer(with_rht=True, backend="reference")(x.permute(2, 3, 0, 1))
    w_q = NVFP4Quantizer(with_2d_quantization=True, backend="reference")(w.permute(0, 2, 3, 1).flatten(1))
    dy_q = NVFP4Quantizer(with_rht=True, backend="reference")(dy.permute(2, 3, 0, 1))
    columns = im2col.im2col(x_q, 3, 2, 1)
    composed = gemm(columns, w_q, "TN", out_dtype=dtype, backend="reference")  # [P, Q, B, O]
    assert same_bits(composed.permute(2, 3, 0, 1), y.detach())
    dw = gemm(dy_q, columns, "NT", out_dtype=dtype, backend="reference")  # [O, (tap, c)]
    assert same_bits(dw.unflatten(1, (3, 3, 32)).permute(0, 3, 1, 2), w_.grad)


# ---- recipes --------------------------------------------------------------------------------------------------------

LAYERS = {
    "conv2d": ((4, 16, 6, 5), (32, 16, 3, 3), (1, 1)),
    "conv_transpose2d": ((4, 32, 3, 3), (32, 16, 2, 2), (2,)),
    "linear": ((5, 4, 32), (16, 32), ()),
}


@pytest.mark.parametrize("op", LAYERS)
@pytest.mark.parametrize("name", list_recipes())
def test_every_recipe_runs_on_both_backends(name, op):
    recipe = load_recipe(name)
    x_shape, w_shape, arguments = LAYERS[op]
    results, losses = {}, {}
    for backend in ("reference", "vendor"):
        torch.manual_seed(3)
        x, w = values(x_shape, seed=1).requires_grad_(), values(w_shape, seed=2).requires_grad_()
        bias = values((w_shape[1] if "transpose" in op else w_shape[0],), seed=3).requires_grad_()
        y = getattr(NF, op)(x, w, bias, *arguments, recipe=recipe, backend=backend)
        y.backward(values(y.shape, seed=4))
        results[backend] = (y, x.grad, w.grad, bias.grad)
        losses[backend] = getattr(F, op)(x, w, bias, *arguments)
    for expected, got in zip(results["reference"], results["vendor"], strict=True):
        assert relative_error(got, expected) <= 1e-5
    assert 0 < relative_error(results["vendor"][0], losses["vendor"]) < 0.25
