"""The block formats beside NVFP4: their numbers against oracles that import nothing from the package, their layouts,
their products.

The oracles are exact, in fractions: torchao's own bytes of mxfp4 (tests/fixtures/mxfp4_torchao.json, and torchao itself
where it is installed), microxcaling's formulas in both of its modes for ties, and the formulas of UE5M3.
"""

from __future__ import annotations

import json
import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from te_nvfp4_cv.backend import native
from te_nvfp4_cv.formats import unpack_nibbles
from te_nvfp4_cv.ops import block_scales
from te_nvfp4_cv.ops.block_scales import FORMATS
from te_nvfp4_cv.ops.conv import integer
from te_nvfp4_cv.ops.conv.block_reference import Products
from te_nvfp4_cv.ops.quantize import operand, reference
from te_nvfp4_cv.ops.records import DEQUANTIZED, PACKED, Face, Fold, OperandSpec, WeightLayout, WeightSpec
from te_nvfp4_cv.recipe.fields import ALLOWED
from tests import oracle
from tests.helpers import KINDS, make_geometry, same_bits, values

FIXTURE = Path(__file__).parents[1] / "fixtures" / "mxfp4_torchao.json"
E2M1 = [Fraction(v) for v in oracle.E2M1]
# 5 bits of exponent with a bias of 15, 3 of mantissa; 255 is not a number, and never written.
UE5M3 = [
    (Fraction(byte & 7, 8) + (byte > 7)) * Fraction(2) ** (max(byte >> 3, 1) - 15) for byte in range(255)
]


def rows_of(x: torch.Tensor, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [B, C] and scale bytes [B, blocks] of a matrix."""
    spec = OperandSpec(1, Fold(1, 0, 1, 0, 16), row=PACKED)
    made = operand.quantize_operand(x, spec, torch.float32, None, None, backend)
    return unpack_nibbles(made.row.data), made.row.scale


def products_of(name: str) -> tuple[integer.FormatProducts, Products]:
    return integer.PRODUCTS[name + " integer"], Products(name)


def nearest(table: list[Fraction], value: Fraction) -> int:
    """Index of the entry nearest to value >= 0, ties to the even index, saturating."""
    low, high = 0, len(table) - 1
    while low < high:  # the first entry that is not below
        middle = (low + high) // 2
        low, high = (middle + 1, high) if table[middle] < value else (low, middle)
    if not low or table[low] < value:
        return low
    below, above = value - table[low - 1], table[low] - value
    return low if above < below or (above == below and low % 2 == 0) else low - 1


def exact(block: list[float], name: str) -> tuple[int, list[int]]:
    """Scale byte and codes of one block, in exact arithmetic."""
    numbers = [Fraction(v) for v in block]
    amax = max(map(abs, numbers))
    if name == "mxfp4":
        exponent = -127
        if amax:
            exponent = max(math.frexp(float(amax))[1] - 1 - 2, -127)  # 2^floor(log2 amax), and 4 = 2^2
        byte, scale = exponent + 127, Fraction(2) ** exponent
    else:
        byte = nearest(UE5M3, amax / 6)
        scale = UE5M3[byte]
    codes = []
    for value, number in zip(block, numbers, strict=True):
        code = nearest(E2M1, abs(number) / scale) if scale else 0
        codes.append(code | (8 if math.copysign(1, value) < 0 else 0))
    return byte, codes


def samples() -> torch.Tensor:
    """[rows, 64]: scales of the whole range, ties of values and of scales, one ulp beside them, zeros of both signs."""
    generator = torch.Generator().manual_seed(3)
    exponents = torch.tensor([0, -5, 9, -20, -24, -60, -126, 20, 60, 110, 127])
    wide = torch.randn(len(exponents), 64, generator=generator) * torch.exp2(exponents.float() - 1)[:, None]
    ties = (torch.arange(64) * 0.25 - 8)[None] * torch.tensor([1.0, 0.75, 2.0**-9, 1.125 * 2.0**-14])[:, None]
    # amax / 6 half way between two UE5M3 numbers, and beside it; subnormal ones too
    tops = torch.tensor([6 * (8.5 + n) * 2.0**e for e in (-3, -17, -18) for n in range(8)])
    edges = torch.stack([tops, torch.nextafter(tops, tops * 0), torch.nextafter(tops, tops * 2)]).flatten()
    edges = edges[:, None] * torch.linspace(-1, 1, 64)[None]
    signed = torch.zeros(1, 64)
    signed[0, 1::2] = -0.0
    return torch.cat((wide, ties, edges, signed))


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4_ue5m3"])
def test_codes_and_scales_are_those_of_exact_arithmetic(name):
    x = samples()
    codes, scales = rows_of(x, name)
    block = FORMATS[name].block
    for row, found, bytes_of_row in zip(x.tolist(), codes.tolist(), scales.tolist(), strict=True):
        for start in range(0, 64, block):
            byte, expected = exact(row[start : start + block], name)
            assert bytes_of_row[start // block] == byte and found[start : start + block] == expected, row[start]


def test_bytes_of_ue5m3_and_e8m0_are_read_as_they_are_written():
    code = torch.arange(255, dtype=torch.uint8)
    read = block_scales.decode_ue5m3(code)
    assert [Fraction(v) for v in read.tolist()] == UE5M3
    assert torch.equal(block_scales.encode_ue5m3(read), code)
    middle = (read[1:].double() + read[:-1].double()) / 2
    expected = [nearest(UE5M3, Fraction(v)) for v in middle.tolist()]
    assert block_scales.encode_ue5m3(middle.float()).tolist() == expected
    ends = torch.tensor([torch.nan, -torch.nan, torch.inf, 2e5, 2.0**-18, 0.0])
    assert block_scales.encode_ue5m3(ends).tolist() == [254, 254, 254, 254, 0, 0]
    powers = block_scales.decode_e8m0(torch.arange(256).byte())
    assert powers[:255].tolist() == [2.0 ** (n - 127) for n in range(255)] and powers[255].isnan()
    amax = torch.tensor([torch.nan, torch.inf, 7.0, 2.0**-126, 0.0])
    assert block_scales.encode_e8m0(amax).tolist() == [255, 253, 127, 0, 0]


def test_mxfp4_is_torchaos_mxtensor():
    found = json.loads(FIXTURE.read_text())
    bits = np.array([[int(word, 16) for word in row.split()] for row in found["x"]], dtype=np.uint32)
    x = torch.from_numpy(bits.view(np.float32))
    codes, scales = rows_of(x, "mxfp4")
    assert scales.flatten().tolist() == found["scale"]
    packed = (codes[:, 0::2] | codes[:, 1::2] << 4).tolist()
    assert [bytes(row).hex() for row in packed] == found["codes"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mxfp4_is_that_of_the_torchao_installed(dtype):
    mx = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor", reason="torchao is not installed")
    x = torch.cat([values((8, 64), kind, dtype) for kind in ("normal", "wide", "huge", "zeros")])
    theirs = mx.MXTensor.to_mx(x, torch.float4_e2m1fn_x2, 32, mx.ScaleCalculationMode.FLOOR)
    codes, scales = rows_of(x, "mxfp4")
    assert torch.equal(scales, theirs.scale.view(torch.uint8))
    assert torch.equal(codes[:, 0::2] | codes[:, 1::2] << 4, theirs.qdata.view(torch.uint8))


def shared_exponents(blocks: np.ndarray) -> np.ndarray:
    largest = np.abs(blocks).max(1, keepdims=True)
    return np.maximum(np.floor(np.log2(np.where(largest == 0, 2.0**-126, largest))) - 2, -127)


def microxcaling(x: np.ndarray, ties: str) -> np.ndarray:
    """Its values of blocks of 32 in float64: shared exponent "max", elements fp4_e2m1, round "even" or "nearest"."""
    blocks = x.astype(np.float64).reshape(-1, 32)
    shared = shared_exponents(blocks)
    v = blocks / 2.0**shared
    step = 2.0 ** np.maximum(np.floor(np.log2(np.abs(v) + (v == 0))), 0) / 2
    whole = np.round(np.abs(v) / step) if ties == "even" else np.floor(np.abs(v) / step + 0.5)
    return (np.sign(v) * np.minimum(whole * step, 6) * 2.0**shared).reshape(x.shape)


def test_mxfp4_is_microxcalings_with_ties_to_even():
    x = samples().to(torch.bfloat16)  # its log2 rounds up what lies one fp32 ulp below a power of two
    spec = OperandSpec(1, Fold(1, 0, 1, 0, 16), row=DEQUANTIZED)
    ours = operand.quantize_operand(x, spec, torch.float32, None, None, "mxfp4").row.data.double().numpy()
    as_numpy = x.double().numpy()
    assert np.array_equal(ours, microxcaling(as_numpy, "even"))
    away = microxcaling(as_numpy, "nearest")
    blocks = np.abs(as_numpy.reshape(-1, 32))
    scaled = blocks / 2.0 ** shared_exponents(blocks)
    downward = np.isin(scaled, (0.25, 1.25, 2.5, 5.0)).reshape(x.shape)  # ties whose even neighbour is the smaller one
    assert downward.any() and np.array_equal(ours != away, downward)


@pytest.mark.parametrize("backend", ["fp4_e4m3_only", "fp4_e4m3_only reference"])  # compiled kernels, plain torch
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stochastic", [False, True])
def test_e4m3_only_is_nvfp4_with_a_tensor_scale_of_1(kind, stochastic, backend):
    x, fold = values((5, 6, 3, 40), kind), Fold(2, 3, 4, 1, 16)
    spec = OperandSpec(2, fold, PACKED, PACKED, rht=True, stochastic=stochastic)
    seed = torch.tensor([5]) if stochastic else None
    ours = operand.quantize_operand(x, spec, torch.float32, seed, None, backend)
    nvfp4 = reference.quantize_operand(x, spec, torch.float32, seed, torch.full((2,), 2688.0))
    same = [torch.equal(a, b) for a, b in zip((*ours.row, *ours.col), (*nvfp4.row, *nvfp4.col), strict=True)]
    assert all(same)
    w, one = values((40, 24, 3), kind), torch.full((1,), 2688.0)
    for two_d in (True, False):
        how = WeightSpec(2, PACKED, PACKED if not two_d else 0, two_d)
        mine = operand.quantize_weight(w, how, torch.float32, backend)
        theirs = reference.quantize_weight(w, how, torch.float32, one)
        assert all(map(torch.equal, (*mine.row, *mine.col), (*theirs.row, *theirs.col)))


@pytest.mark.skipif(native.load() is None, reason="no compiled kernels")
@pytest.mark.parametrize("name", ["mxfp4", "nvfp4_ue5m3"])
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_kernels_have_the_bits_of_plain_torch(kind, name, poison):
    """Groups of 40 channels have 3 pieces, so that a pair of them often lies across the kernels' runs of 16."""
    for dtype, stochastic in ((torch.float32, True), (torch.bfloat16, False)):
        x, seed = values((3, 7, 5, 80), kind, dtype), torch.tensor([7]) if stochastic else None
        spec = OperandSpec(2, Fold(3, 1, 3, 2, 48), PACKED, PACKED, rht=stochastic, stochastic=stochastic)
        theirs, ours = (operand.quantize_operand(x, spec, dtype, seed, None, name + end) for end in (" reference", ""))
        assert all(map(same_bits, ours.flat()[:6], theirs.flat()[:6]))
        spread = spec._replace(row=DEQUANTIZED, col=DEQUANTIZED)
        in_values = operand.quantize_operand(x, spread, dtype, seed, None, name)
        for end in (" reference", ""):
            assert same_bits(operand.unpack_rows(theirs.row, 80, 2, dtype, name + end), in_values.row.data)
            assert same_bits(operand.unpack_columns(theirs.col, dtype, name + end), in_values.col.data)
        w = values((80, 56, 3), kind, dtype)
        for two_d, groups in ((True, 2), (False, 1)):
            how, layout = WeightSpec(groups, PACKED, 0 if two_d else PACKED, two_d), WeightLayout(80, 56, groups, False)
            mine, made = (operand.quantize_weight(w, how, dtype, name + end) for end in ("", " reference"))
            assert all(map(same_bits, mine.flat(), made.flat()))
            read = [operand.unpack_weight(made.row, layout, None, dtype, name + end) for end in ("", " reference")]
            assert same_bits(*read)


@pytest.mark.skipif(native.load() is None, reason="no compiled kernels")
@pytest.mark.parametrize("name", FORMATS)
def test_products_on_integers_have_the_references_bits_whatever_the_scales(name):
    """Packed operands with bytes that no amax gives: scales of 2^-127 on zeros and on other codes, NaN. Two scales of
    E8M0 that multiply to less than 2^-147 are not among them.
    """
    generator, format_ = torch.Generator().manual_seed(1), FORMATS[name]
    low, high = {"mxfp4": (107, 170), "nvfp4_ue5m3": (0, 255), "fp4_e4m3_only": (0, 127)}[name]

    def face(data: tuple[int, ...], scale: tuple[int, ...]) -> Face:
        codes = torch.randint(0, 256, data, dtype=torch.uint8, generator=generator)
        codes[torch.rand(data[:1], generator=generator) < 0.3] = 0x80  # zeros of both signs
        bytes_ = torch.randint(low, high, scale, dtype=torch.uint8, generator=generator)
        return Face(codes, bytes_)

    def scales(n: int) -> int:
        return -(-n // format_.block)

    for transposed in (False, True):
        g = make_geometry(2, (40, 80), (5, 6), 3, stride=2, padding=1, transposed=transposed)
        x, dy = (
            face((*shape[:-1], -(-shape[-1] // 16) * 8), (*shape[:-1], scales(shape[-1])))
            for shape in (g.x_shape, g.y_shape)
        )
        for operand_ in (x, dy):
            operand_.scale[torch.rand(operand_.scale.shape, generator=generator) < 0.3] = 0
        if name == "mxfp4":
            x.scale[0, 0, 0, 0] = 255
        w = face((g.channels_b, 9, -(-g.channels_a // 16) * 8), (1, scales(g.channels_b), 9, scales(g.channels_a)))
        for product, operands in (("fprop", (x, w, None, None)), ("dgrad", (dy, w, None))):
            ours, theirs = (getattr(made, product)(*operands, g, torch.float32) for made in products_of(name))
            assert same_bits(ours, theirs), product
        columns = [
            face((s.batch // 16, *shape[1:], 8), (scales(s.batch), *shape[1:]))
            for s, shape in ((g.folded, g.folded.y_shape), (g.folded, g.folded.x_shape))
        ]
        columns[1].scale[torch.rand(columns[1].scale.shape, generator=generator) < 0.3] = 0
        ours, theirs = (made.wgrad(*columns, None, g, torch.float32) for made in products_of(name))
        assert same_bits(ours, theirs)


@pytest.mark.parametrize("name", FORMATS)
def test_every_face_holds_the_same_numbers_in_both_forms_and_has_the_shapes_that_tracing_expects(name):
    """Groups of 40 channels and 48 images: the last block of 32 is half a block."""
    x, w, fold = values((40, 5, 80)), values((72, 40, 3)), Fold(1, 0, 5, 0, 48)
    packed = OperandSpec(2, fold, PACKED, PACKED)
    made = operand.quantize_operand(x, packed, torch.float32, None, None, name)
    as_values = packed._replace(row=DEQUANTIZED, col=DEQUANTIZED)
    plain = operand.quantize_operand(x, as_values, torch.float32, None, None, name)
    rows = operand.unpack_rows(made.row, 80, 2, torch.float32, name)
    columns = operand.unpack_columns(made.col, torch.float32, name)
    assert torch.equal(rows, plain.row.data) and torch.equal(columns, plain.col.data)
    assert columns.shape == (48, 5, 80) and not columns[40:].any()
    assert (rows - x).norm() < 0.15 * x.norm() and (columns[:40] - x).norm() < 0.15 * x.norm()
    faces = {}
    for two_d in (True, False):
        how = WeightSpec(2, PACKED, 0 if two_d else PACKED, two_d)
        codes = operand.quantize_weight(w, how, torch.float32, name)
        faces[two_d] = codes
        for face, columnwise in ((codes.row, False), *(() if two_d else ((codes.col, True),))):
            read = operand.unpack_weight(face, WeightLayout(72, 40, 2, columnwise), None, torch.float32, name)
            assert read.shape == (72, 3, 40)
            assert (read - w.transpose(1, 2)).norm() < (0.2 if two_d else 0.15) * w.norm()
    with FakeTensorMode() as fakes:
        seen = operand.quantize_operand(fakes.from_tensor(x), packed, torch.float32, None, None, name)
        assert [t.shape for t in seen.flat()[:6]] == [t.shape for t in made.flat()[:6]]
        unpacked = operand.unpack_columns(seen.col, torch.float32, name)
        assert unpacked.shape == columns.shape
        for two_d, codes in faces.items():
            how = WeightSpec(2, PACKED, 0 if two_d else PACKED, two_d)
            traced = operand.quantize_weight(fakes.from_tensor(w), how, torch.float32, name)
            assert [t.shape for t in traced.flat()] == [t.shape for t in codes.flat()]


def test_a_format_is_data_that_the_recipe_names():
    assert ("nvfp4", *FORMATS) == ALLOWED["block_format"]


@pytest.mark.parametrize("name", FORMATS)
def test_stochastic_rounding_is_right_on_average(name):
    x = torch.full((64, 32), 0.7)
    x[:, ::16] = 6.0  # scale 1, or in UE5M3 and E4M3 exactly 1 too
    spec = OperandSpec(1, Fold(1, 0, 1, 0, 64), row=DEQUANTIZED, stochastic=True)
    made = [operand.quantize_operand(x, spec, torch.float32, torch.tensor([n]), None, name) for n in range(16)]
    drawn = [one.row.data[:, 1::2] for one in made]
    mean = torch.stack(drawn).double().mean()
    # 0.7 lies between 0.5 and 1: one draw deviates by 0.245, and 2^-8 of a step is the bits' granularity
    assert abs(mean - 0.7) < 4 * 0.245 / math.sqrt(16 * 64 * 16) + 2.0**-9
    assert not torch.equal(drawn[0], drawn[1])
