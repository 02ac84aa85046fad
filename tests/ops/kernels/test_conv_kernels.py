"""The implicit GEMM kernels, run in the interpreter or on the GPU that is there.

launch geometry   every product of pixel_map once, none else: exhaustively, without a kernel
three GEMMs       equal float64 products of the dequantized operands but for fp32 sums, by FP4 products and by fp16
results           the same bits at every call, rounded once, nothing left unwritten, NaN of alpha everywhere
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from te_nvfp4_cv.ops.conv import operators, reference
from te_nvfp4_cv.ops.conv.triton import walks
from te_nvfp4_cv.ops.geometry import ConvGeometry, pixel_map
from te_nvfp4_cv.ops.quantize import operand
from te_nvfp4_cv.ops.records import Face, WeightLayout
from tests.helpers import make_geometry, relative_error, same_bits
from tests.ops.kernels.gemm_helpers import GEOMETRIES, WAYS, faces_of, multiply_as, packed, tolerance

pytest.importorskip("triton", reason="triton is not installed")
from te_nvfp4_cv.ops.conv.triton import launch  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

ways = pytest.mark.parametrize("way", WAYS)


@pytest.fixture
def as_way(way: str, kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> str:
    multiply_as(monkeypatch, kernel_device, way, (launch,))
    return way


def run(name: str, q: dict[str, Any], g: ConvGeometry, alpha: Tensor | None, dtype=torch.float32, bias=None) -> Tensor:
    """One GEMM by the kernels."""
    a, b = (q[face] for face in faces_of(g)[name])
    if name == "fprop":
        return launch.fprop(a, b, alpha, bias, g, dtype)
    return getattr(launch, name)(a, b, alpha, g, dtype)


def exact(name: str, q: dict[str, Any], g: ConvGeometry) -> Tensor:
    """The same GEMM of the dequantized operands in float64, before alpha, by the reference's gathering."""
    n, _, channels = g.weight_shape
    a, b = faces_of(g)[name]
    if name == "wgrad":
        parts = {face: operand.unpack_columns(q[face], torch.float32, "reference").double().cpu() for face in (a, b)}
        columns = {face: (v.unflatten(0, (-1, 16)).movedim(1, -1),) for face, v in parts.items()}
        pair = (columns[b], columns[a]) if g.transposed else (columns[a], columns[b])
        return reference.weight_product(*pair, g)
    to_b = (name == "fprop") != g.transposed
    shape = g.x_shape if name == "fprop" else g.y_shape
    rows = operand.unpack_rows(q[a], shape[-1], g.groups, torch.float32, "reference").double().cpu()
    layout = WeightLayout(n, channels, g.groups, q[b].data.dim() == 5)
    w = operand.unpack_weight(q[b], layout, None, torch.float32, "reference")
    w = w.double().cpu()
    if not to_b:
        w = w.unflatten(0, (g.groups, -1)).movedim(1, -1).unsqueeze(1)
    return reference.data_product((rows,), (w,), g, to_b)


# ---- the geometry of launches, no kernel ----------------------------------------------------------------------------


def products_of(g: ConvGeometry, to_b: bool) -> Tensor:
    """[pixels out, taps] as data_product walks it for one image: the source pixel of every product, -1 for none, -2
    where an output pixel is in no launch.
    """
    image = g.b_size if to_b else g.a_size
    found = torch.full((int(torch.tensor(image or (1,)).prod()), g.taps), -2)
    for a in walks.data_classes(g, to_b):
        i_d, i_h, i_w = (
            x.reshape(-1) for x in torch.meshgrid(*(torch.arange(a[f"n_{n}"]) for n in "dhw"), indexing="ij")
        )
        assert a["rows"] == g.batch * i_d.numel()
        y = i_d * a["y_d"] + i_h * a["y_h"] + i_w * a["y_w"] + a["y_first"]
        assert bool((found[y] == -2).all()), "an output pixel is in two launches"
        found[y] = -1
        for tap in range(a["hits"]):
            t_d, t_h, t_w = tap // (a["CH"] * a["CW"]), tap // a["CW"] % a["CH"], tap % a["CW"]
            inside = torch.ones_like(y, dtype=torch.bool)
            for n, i, t in (("d", i_d, t_d), ("h", i_h, t_h), ("w", i_w, t_w)):
                at = i * a[f"pos_{n}"] + a[f"first_{n}"] + t * a[f"step_{n}"]
                inside &= (at >= 0) & (at < a[f"size_{n}"])
            x = i_d * a["x_d"] + i_h * a["x_h"] + i_w * a["x_w"]
            assert bool((x >= 0).all()), "a vector offset is negative"
            x = x + a["x_first"] + t_d * a["x_td"] + t_h * a["x_th"] + t_w * a["x_tw"]
            w = a["w_first"] + t_d * a["w_td"] + t_h * a["w_th"] + t_w * a["w_tw"]
            found[y, w] = torch.where(inside, x, found[y, w])
    return found


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("rank", [0, 1, 2, 3])
def test_launches_walk_every_product_once(rank, transposed):
    checked = 0
    for stride, padding, dilation, kernel in itertools.product((1, 2, 3), (0, 1, 3), (1, 2, 3), (1, 2, 3)):
        image, k = (9, 6, 4)[:rank], (kernel, min(kernel, 3), 2)[:rank]
        extra = (max(stride, dilation) - 1) * transposed
        g = make_geometry(2, (16, 16), image, k, stride, padding, dilation, extra, 1, transposed)
        if min(*g.x_shape, *g.y_shape) <= 0:
            continue
        for to_b in (True, False):
            assert torch.equal(products_of(g, to_b), pixel_map(g, to_b)), (g, to_b)
        checked += 1
    assert checked > 50


def test_no_product_is_spent_on_zeros_between_strides():
    g = make_geometry(2, (16, 16), (8, 8), 3, 2, 1)
    work = {(a["hits"], a["rows"]) for a in walks.data_classes(g, False)}
    assert work == {(1, 32), (2, 32), (4, 32)}
    assert sum(a["hits"] * a["rows"] for a in walks.data_classes(g, False)) == 9 * 32


@pytest.mark.parametrize("batch", [1, 5, 16])
def test_a_pointwise_wgrad_is_one_line(batch):
    g = make_geometry(batch, (16, 16), (6, 5), 1).folded
    a = walks.weight_arguments(g)
    assert a["lines"] == 1 and a["width"] == g.batch // 16 * g.b_size[0] * g.b_size[1] == a["a_w"]
    strided = walks.weight_arguments(make_geometry(16, (16, 16), (6, 5), 1, 2).folded)
    assert strided["lines"] == 3 and strided["width"] == 3


# ---- the three GEMMs ------------------------------------------------------------------------------------------------


# The way to multiply changes how a block of codes is read, not which pixels meet: `fp16` walks every geometry, the
# other two those that differ in the blocks along the contracted axis (several units, groups, odd channels, many taps).
WITH_FP4 = ("1x1 stride 2", "3x3", "3x3, 320 channels", "3x3 stride 2 groups", "3x3 stride 3", "3-d, 36 taps")
WITH_FP4 += ("transposed groups", "transposed 1-d", "wide linear")
ONE_BY_16 = ("1x1 stride 2", "3x3 stride 2 groups", "transposed groups", "linear")  # the other cases: 16x16 scales


@pytest.mark.parametrize(
    ("way", "case", "two_d"),
    [("fp16", c, True) for c in GEOMETRIES]
    + [("fp4", c, True) for c in WITH_FP4]
    + [("fp16 quads", c, True) for c in ("3x3", "7x7 stride 2 dilated", "transposed groups", "wide linear")]
    + [("fp16", c, False) for c in ONE_BY_16],
)
def test_gemms_equal_float64(case, two_d, as_way, kernel_device, poison):
    g, alpha = GEOMETRIES[case], torch.tensor([0.37], device=kernel_device)
    q = packed(g, kernel_device, two_d)
    for name in ("fprop", "dgrad") + (("wgrad",) if two_d else ()):
        truth = exact(name, q, g) * 0.37
        got = run(name, q, g, alpha)
        assert got.dtype == torch.float32 and got.shape == truth.shape and got.is_contiguous()
        assert relative_error(got.cpu(), truth) <= tolerance(kernel_device), name


@pytest.mark.parametrize("case", ["3x3", "transposed"])
@ways
def test_results_are_reproducible_and_rounded_once(case, as_way, kernel_device, poison):
    g, alpha = GEOMETRIES[case], torch.tensor([1e-3], device=kernel_device)
    q = packed(g, kernel_device)
    for name in ("fprop", "dgrad", "wgrad"):
        got = run(name, q, g, alpha)
        assert same_bits(run(name, q, g, alpha), got), name
        for dtype in (torch.bfloat16, torch.float16):
            assert same_bits(run(name, q, g, alpha, dtype), got.to(dtype)), name


def test_operators_choose_the_kernels(kernel_device):
    g, alpha = GEOMETRIES["3x3"], torch.tensor([0.37], device=kernel_device)
    q = packed(g, kernel_device)
    products = {"fprop": operators.conv_fprop, "dgrad": operators.conv_dgrad, "wgrad": operators.conv_wgrad}
    for name, operator in products.items():
        faces = [q[face] for face in faces_of(g)[name]]
        bias = [None] if name == "fprop" else []
        got = operator(*faces, alpha, *bias, g, torch.bfloat16, "triton")
        assert same_bits(got, run(name, q, g, alpha, torch.bfloat16))
        truth = operator(*faces, alpha, *bias, g, torch.float32, "reference")
        assert relative_error(got, truth) <= 2**-8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bias_is_added_in_fp32(dtype, kernel_device):
    g, alpha = GEOMETRIES["3x3 stride 2 groups"], torch.tensor([0.37], device=kernel_device)
    q = packed(g, kernel_device)
    bias = torch.randn(g.y_shape[-1]).to(dtype).to(kernel_device)
    expected = run("fprop", q, g, alpha).double() + bias.double()
    torch.testing.assert_close(run("fprop", q, g, alpha, bias=bias).double(), expected, rtol=1e-6, atol=1e-6)
    got = run("fprop", q, g, alpha, torch.bfloat16, bias=bias)
    assert same_bits(got, run("fprop", q, g, alpha, bias=bias).to(torch.bfloat16))


def test_no_alpha_is_alpha_one(kernel_device):
    g, one = GEOMETRIES["transposed groups"], torch.ones(1, device=kernel_device)
    q = packed(g, kernel_device)
    for name in ("fprop", "dgrad", "wgrad"):
        assert same_bits(run(name, q, g, None), run(name, q, g, one))


@pytest.mark.parametrize("case", ["1x1", "1x1 stride 2", "linear"])
def test_alpha_per_row_and_per_channel(case, kernel_device):
    g = GEOMETRIES[case]
    q = packed(g, kernel_device)
    rows = torch.rand((*g.y_shape[:-1], 1), device=kernel_device) + 0.5
    assert same_bits(run("fprop", q, g, rows), run("fprop", q, g, None) * rows)
    channels = torch.rand(g.x_shape[-1], device=kernel_device) + 0.5
    assert same_bits(run("wgrad", q, g, channels), run("wgrad", q, g, None) * channels)


def test_alpha_per_channel_of_a_transposed_kernel(kernel_device):
    g = GEOMETRIES["transposed"]
    q = packed(g, kernel_device)
    channels = torch.rand(g.x_shape[-1], device=kernel_device) + 0.5
    assert same_bits(run("wgrad", q, g, channels), run("wgrad", q, g, None) * channels.view(-1, 1, 1))


@pytest.mark.parametrize("case", ["1x1 stride 2", "3x3", "transposed 3-d"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_a_non_finite_alpha_reaches_every_output(case, value, kernel_device):
    """Outputs that no tap reaches too: 0 * inf."""
    g, alpha = GEOMETRIES[case], torch.tensor([value], device=kernel_device)
    q = packed(g, kernel_device)
    for name in ("fprop", "dgrad", "wgrad"):
        assert not run(name, q, g, alpha).isfinite().any(), name


@ways
def test_parts_of_wgrad_add_up(kernel_device, way, monkeypatch, poison):
    g = make_geometry(16, (32, 16), (5, 20), (3, 1), 1, 1)
    q = packed(g, kernel_device)
    truth = exact("wgrad", q, g)
    for processors in (1, 1000):
        with monkeypatch.context() as patch:
            multiply_as(patch, kernel_device, way, (launch,), processors=processors)
            got = run("wgrad", q, g, None)
        assert relative_error(got.cpu(), truth) <= tolerance(kernel_device)


@pytest.mark.parametrize("channels", [(20, 36), (20, 18)], ids=str)
def test_scales_by_words_change_nothing(channels, kernel_device, monkeypatch):
    """Columnwise scales for FP4 tensor cores, by words of four channels where they are that many, else by bytes."""
    multiply_as(monkeypatch, kernel_device, "fp4", (launch,))
    g = make_geometry(16, channels, (2, 18), (1, 3), (1, 2), (0, 1))
    q = packed(g, kernel_device)
    chosen, taken = launch.takes_words, []
    monkeypatch.setattr(launch, "takes_words", lambda *how: taken.append(chosen(*how)) or taken[-1])
    by_words = run("wgrad", q, g, None)
    assert taken == [channels[1] % 4 == 0]
    monkeypatch.setattr(launch, "takes_words", lambda *how: False)
    assert same_bits(by_words, run("wgrad", q, g, None))
    assert relative_error(by_words.cpu(), exact("wgrad", q, g)) <= tolerance(kernel_device)


def test_parts_are_bounded():
    gpu = launch.Gpu(90, False, 132)
    assert launch.parts_of(gpu, 1, 10**6, 1000) == 264
    assert launch.parts_of(gpu, 1000, 10**6, 1000) == 1
    assert launch.parts_of(gpu, 1, 17, 1000) == 3
    assert launch.parts_of(gpu, 9, 10**6, 10**7) * 4 * 10**7 <= launch.PARTS_BYTES
    assert launch.parts_of(gpu, 1, 0, 1000) == launch.parts_of(gpu, 1, 5, 10**9) == 1


@ways
def test_64_bit_offsets_change_nothing(as_way, kernel_device, monkeypatch):
    g = GEOMETRIES["3x3 stride 2 groups"]
    q = packed(g, kernel_device)
    narrow = [run(name, q, g, None) for name in ("fprop", "dgrad")]
    monkeypatch.setattr(launch, "WIDE_FROM", 1)
    for name, expected in zip(("fprop", "dgrad"), narrow, strict=True):
        assert same_bits(run(name, q, g, None), expected)


@pytest.mark.parametrize("case", ["3x3", "transposed", "linear"])
def test_no_images(case, kernel_device, poison):
    g = GEOMETRIES[case]
    empty = dataclasses.replace(g, batch=0)
    q = packed(g, kernel_device)
    for face in ("x row", "x col", "dy row", "dy col"):
        q[face] = Face(q[face].data[:0], q[face].scale[:0])
    for name in ("fprop", "dgrad"):
        assert run(name, q, empty, None).shape == (empty.y_shape if name == "fprop" else empty.x_shape)
    dw = run("wgrad", q, empty, torch.ones(1, device=kernel_device))
    assert same_bits(dw, torch.zeros(g.weight_shape, device=kernel_device))


# ---- preparing the kernel -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["3x3 stride 2 groups", "3x3 stride 3", "1-d", "transposed groups", "linear"])
@pytest.mark.parametrize("two_d", [True, False], ids=["16x16", "1x16"])
@pytest.mark.parametrize("to_b", [True, False])
def test_prepared_rows_are_the_references(case, two_d, to_b, kernel_device, poison):
    g, step = GEOMETRIES[case], 4
    q = packed(g, kernel_device, two_d)
    data, scale = q["w row"] if to_b else q["w col"]
    codes, scales = reference._packed_kernel(Face(data, scale), g, to_b)
    matrix = reference._kernel_rows if to_b else reference._kernel_columns
    codes, scales = (torch.stack([matrix(t, g.groups, i) for i in range(g.groups)]) for t in (codes, scales))
    rows = g.channels_b if to_b else g.channels_a
    codes, scales = codes.reshape(rows, g.taps, -1), scales.reshape(rows, g.taps, -1)
    blocks = scales.shape[-1]
    got, got_scale = launch.prepare(data, scale, g, to_b, step, launch.Gpu(100, True, 1))
    assert got_scale.shape[-1] % step == 0 and got_scale.shape[-1] - blocks < step
    assert torch.equal(got[..., : blocks * 8], codes) and torch.equal(got_scale[..., :blocks], scales)
    assert not got[..., blocks * 8 :].any() and not got_scale[..., blocks:].any()
    half, _ = launch.prepare(data, scale, g, to_b, step, launch.Gpu(80, False, 1))
    quads, _ = launch.prepare(data, scale, g, to_b, step, launch.Gpu(90, False, 1))
    plain = operand.unpack_rows(Face(got, got_scale), got_scale.shape[-1] * 16, 1, torch.float32, "reference")
    plain = plain.unflatten(-1, (-1, step, 8, 2))  # chunks, blocks, bytes, nibble
    plain = plain.movedim(-1, -3).reshape(half.shape)
    assert torch.equal(half.float(), plain)
    in_quads = plain.unflatten(-1, (-1, 4, 2, 2)).transpose(-2, -3)  # of 16 bytes, (t, h, j) to (h, t, j)
    assert torch.equal(quads.float(), in_quads.reshape(half.shape))
