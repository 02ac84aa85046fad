"""nv.gemm: both backends against float64 products of dequantized operands, row scales, bias, accumulation, errors."""

from __future__ import annotations

import pytest
import torch

from te_nvfp4_cv import formats
from te_nvfp4_cv.tensor.gemm import gemm
from te_nvfp4_cv.tensor.quantizer import NVFP4Quantizer

BACKENDS = ["reference", "vendor"]
pytestmark = pytest.mark.usefixtures("poison")


def quantized(rows: int, cols: int, seed: int, dtype=torch.bfloat16, **options):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, cols, generator=generator).to(dtype)
    return NVFP4Quantizer(backend="reference", **options)(x)


def values(t, face: str) -> torch.Tensor:
    """The operand in float64 as the GEMM sees it; columnwise with its padded rows, which a rotation makes nonzero."""
    if face == "rowwise":
        return t.dequantize(torch.float32, face=face).double()
    return formats.dequantize(*t.columnwise_te(), t.amax_columnwise, t.e4m3_max).double().T


def product(a, b, layout: str) -> torch.Tensor:
    if layout == "TN":
        return values(a, "rowwise").flatten(0, -2) @ values(b, "rowwise").T
    if layout == "NN":
        return values(a, "rowwise") @ values(b, "columnwise")[: a.shape[-1]]
    return values(a, "columnwise").T @ values(b, "columnwise")


def operands(layout: str, m: int, k: int, n: int, **options):
    """x [m, k], w [n, k], dy [m, n] of a layer, as the layout takes them."""
    x, w, dy = quantized(m, k, 1, **options), quantized(n, k, 2, with_2d_quantization=True), quantized(m, n, 3)
    if layout == "TN":
        return x, w
    if layout == "NN":
        return dy, w
    rht = {"with_rht": True}
    return quantized(m, n, 3, **rht), quantized(m, k, 1, **rht)


def close(got: torch.Tensor, exact: torch.Tensor, tolerance: float) -> bool:
    return float((got.double() - exact).abs().max()) <= tolerance * float(exact.abs().max())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["TN", "NN", "NT"])
@pytest.mark.parametrize(("m", "k", "n"), [(32, 48, 16), (5, 7, 9), (1, 1, 1), (33, 65, 17)])
def test_layouts(layout, m, k, n, backend):
    a, b = operands(layout, m, k, n)
    out = gemm(a, b, layout, torch.float32, backend=backend)
    assert out.shape == {"TN": (m, n), "NN": (m, k), "NT": (n, k)}[layout]
    assert close(out, product(a, b, layout), 1e-6)
    for dtype, tolerance in ((torch.bfloat16, 2**-8), (torch.float16, 2**-11)):
        low = gemm(a, b, layout, dtype, backend=backend)
        assert low.dtype == dtype
        assert torch.equal(low, out.to(dtype)) and close(low, product(a, b, layout), tolerance + 1e-6)


@pytest.mark.parametrize("layout", ["TN", "NN", "NT"])
def test_backends_agree(layout):
    a, b = operands(layout, 64, 96, 80)
    first, second = (gemm(a, b, layout, torch.float32, backend=backend) for backend in BACKENDS)
    assert close(first, second.double(), 1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_wgrad_rht_cancels(backend):
    dy, x = torch.randn(64, 16), torch.randn(64, 32)
    errors = []
    for rht in (True, False):
        q = NVFP4Quantizer(with_rht=rht, backend=backend)
        errors.append(float((gemm(q(dy), q(x), "NT", torch.float32, backend=backend) - dy.T @ x).norm()))
    assert max(errors) < 0.25 * float((dy.T @ x).norm())


@pytest.mark.parametrize("backend", BACKENDS)
def test_leading_dimensions_bias_out_and_accumulate(backend):
    x = NVFP4Quantizer(backend=backend)(torch.randn(2, 3, 5, 32))
    w = quantized(16, 32, 2)
    bias = torch.randn(16)
    plain = gemm(x, w, "TN", torch.float32, backend=backend)
    assert plain.shape == (2, 3, 5, 16)
    assert torch.equal(gemm(x, w, "TN", torch.float32, bias=bias, backend=backend), plain + bias)
    out = torch.full((2, 3, 5, 16), float("nan"))
    assert gemm(x, w, "TN", out=out, backend=backend) is out
    assert torch.equal(out, plain)
    before = torch.randn(2, 3, 5, 16).bfloat16()
    out = before.clone()
    gemm(x, w, "TN", out=out, accumulate=True, backend=backend)
    assert torch.equal(out, (plain + before.float()).bfloat16())  # one rounding


@pytest.mark.parametrize("backend", BACKENDS)
def test_row_scaled(backend):
    x = torch.randn(20, 32) * torch.exp2(torch.arange(20.0) - 10).unsqueeze(1)
    t = NVFP4Quantizer(columnwise=False, row_scaled_nvfp4=True, backend="reference")(x)
    w = quantized(24, 32, 2, with_2d_quantization=True)
    out = gemm(t, w, "TN", torch.float32, backend=backend)
    exact = product(t, w, "TN")
    assert bool(((out.double() - exact).abs() <= 1e-5 * exact.abs().amax(1, keepdim=True)).all())
    assert close(gemm(w, t, "TN", torch.float32, backend=backend), exact.T, 1e-6)
    both = gemm(t, t, "TN", torch.float32, backend=backend)
    assert close(both, product(t, t, "TN"), 1e-6)


def test_e4m3_256_of_four_over_six():
    options = {"nvfp4_use_4over6": True, "nvfp4_e4m3_max": 256}
    a, b = quantized(16, 32, 1, **options), quantized(16, 32, 2)
    assert close(gemm(a, b, "TN", torch.float32, backend="reference"), product(a, b, "TN"), 1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("row_scaled", [False, True])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", [0, 1])
def test_a_non_finite_operand_makes_the_result_non_finite(which, bad, row_scaled, backend):
    pair = [torch.randn(16, 32), torch.zeros(16, 32)]
    pair[which][3, 4] = bad
    q = NVFP4Quantizer(columnwise=False, row_scaled_nvfp4=row_scaled, backend="reference")
    assert not gemm(q(pair[0]), q(pair[1]), "TN", torch.float32, backend=backend).isfinite().any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty(backend):
    q = NVFP4Quantizer(backend=backend)
    w = q(torch.randn(16, 32))
    assert gemm(q(torch.randn(0, 32)), w, "TN", backend=backend).shape == (0, 16)
    dw = gemm(q(torch.randn(0, 16)), q(torch.randn(0, 32)), "NT", torch.float32, backend=backend)
    assert dw.shape == (16, 32) and not dw.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_does_not_reach_inside(backend):
    a, b = operands("TN", 32, 64, 16)
    plain = gemm(a, b, "TN", torch.float32, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(gemm(a, b, "TN", torch.float32, backend=backend), plain)


def test_compiles_in_one_graph():
    a, b = operands("TN", 32, 64, 16)
    compiled = torch.compile(lambda a, b: gemm(a, b, "TN", torch.float32), backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(a, b), gemm(a, b, "TN", torch.float32))


def test_operator_passes_opcheck():
    a, b = operands("TN", 32, 64, 16)
    pair = [[t.rowwise_data, t.rowwise_scale_inv, t.amax_rowwise] for t in (a, b)]
    torch.library.opcheck(  # test_schema multiplies its inputs, which torch cannot do with float8
        torch.ops.te_nvfp4_cv.gemm.default,
        (*pair, [448, False, 448, False], torch.randn(16), None, torch.bfloat16, "reference"),
        test_utils=("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


def test_ntile_operands_multiply_like_te():
    x = NVFP4Quantizer(with_rht=True, backend="reference")(torch.randn(2, 3, 16, 8))
    dy = NVFP4Quantizer(with_rht=True, backend="reference")(torch.randn(2, 3, 16, 12))
    tiles = gemm(dy.to_columnwise_layout("ntile"), x.to_columnwise_layout("ntile"), "NT", torch.float32)
    assert torch.equal(tiles, gemm(dy, x, "NT", torch.float32))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda a, b: gemm(a, b, "TT"), ValueError, "unknown layout"),
        (lambda a, b: gemm(a, torch.randn(16, 32)), TypeError, "operand b"),
        (lambda a, b: gemm(a, quantized(16, 48, 5)), ValueError, "contracts 32"),
        (lambda a, b: gemm(a, b, "NN"), ValueError, "contracted lengths"),
        (lambda a, b: gemm(quantized(16, 32, 5, rowwise=False), b), ValueError, "lacks its rowwise face"),
        (lambda a, b: gemm(a, quantized(16, 32, 5, columnwise=False), "NT"), ValueError, "lacks its columnwise"),
        (lambda a, b: gemm(quantized(20, 8, 5, with_rht=True), a, "NT"), ValueError, "does not cancel"),
        (lambda a, b: gemm(a, b, accumulate=True), ValueError, "`out` when accumulate"),
        (lambda a, b: gemm(a, b, out_dtype=torch.int8), ValueError, "out_dtype"),
        (lambda a, b: gemm(a, b, bias=torch.randn(20)), ValueError, "bias [16]"),
        (lambda a, b: gemm(a, b, out=torch.randn(3)), ValueError, "out of 20 x 16"),
        (lambda a, b: gemm(a, b, backend="fast"), ValueError, "backend"),
        (lambda a, b: gemm(a, b, backend="integer"), ValueError, "multiplies layers only"),
    ],
)
def test_errors(call, error, words):
    a, b = quantized(20, 32, 1), quantized(16, 32, 2)
    with pytest.raises(error) as caught:
        call(a, b)
    assert words in str(caught.value)
