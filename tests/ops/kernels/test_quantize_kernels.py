"""The Triton kernels of ops/quantize against the reference: bits where rounding is to nearest, and bits again for
stochastic rounding where the reference is handed the kernels' random bytes; then its distribution.

Every output starts as poisoned memory. Shapes, values and folds are those of tests/ops/test_operands.py.
"""

from __future__ import annotations

import math
import mmap
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from te_nvfp4_cv import formats
from te_nvfp4_cv.backend import dispatch, tuning
from te_nvfp4_cv.ops.geometry import Fold
from te_nvfp4_cv.ops.quantize import operand, reference_matrix
from te_nvfp4_cv.ops.quantize import reference as reference_operands
from te_nvfp4_cv.ops.quantize.triton import grids, tiles
from te_nvfp4_cv.ops.records import (
    DEQUANTIZED,
    NONE,
    PACKED,
    Operand,
    OperandSpec,
    WeightCodes,
    WeightLayout,
    WeightSpec,
)
from te_nvfp4_cv.ops.triton import workspace
from tests.helpers import KINDS, make_geometry, same_bits, same_codes, seeds, values
from tests.ops.test_operands import DTYPES, assert_no_nan_scale, negated, random_case, strided

pytestmark = [
    pytest.mark.usefixtures("poison", "one_thread"),
    pytest.mark.filterwarnings("ignore:(divide by zero|overflow|invalid value|underflow) encountered:RuntimeWarning"),
]
ROOT = Path(__file__).resolve().parents[3]
FORMS = ((PACKED, PACKED), (DEQUANTIZED, PACKED), (DEQUANTIZED, DEQUANTIZED), (NONE, PACKED), (PACKED, NONE))
ROW, COL = (0, 1, 2), (3, 4, 5)
# A seed draws shape, groups and fold, and stands for a kind (seed % 8) and a dtype (seed // 8 % 3): every kind in fp32,
# every second one in each 16-bit dtype.
SEEDS = seeds((*range(8), 9, 11, 12, 14, 17, 19, 20, 22), range(120))
# For what comes on top of that: every kind in fp32, and one of each 16-bit dtype.
FEWER = seeds((*range(8), 9, 17), range(120))


@pytest.fixture
def launch(kernel_device):
    """The module under test, which imports triton."""
    from te_nvfp4_cv.ops.quantize.triton import launch

    return launch


def to(device: torch.device, *arguments):
    """Tensors among the arguments, on the device."""
    return [a.to(device) if isinstance(a, torch.Tensor) else a for a in arguments]


def cpu(made: Operand | WeightCodes):
    """Return the record with its tensors on the CPU."""
    return type(made).from_flat(tuple(t.cpu() for t in made.flat()))


def compare(launch, device, x, spec: OperandSpec, dtype=torch.bfloat16, amax=None) -> Operand:
    """Check that both backends give the same bits, field by field; return the kernels', on the CPU."""
    expected = reference_operands.quantize_operand(x, spec, dtype, None, amax)
    got = cpu(launch.quantize_operand(*to(device, x, spec, dtype, None, amax)))
    row, col = spec.row, spec.col
    for field, (e, g) in enumerate(zip(expected.flat(), got.flat(), strict=True)):
        if field in ROW and not row or field in COL and not col:
            assert field in (2, 5) or g.numel() == e.numel() == 0, field
            continue
        assert same_bits(e, g), (field, row, col, tuple(e.shape), int((e != g).sum()))
    for face, form in ((got.row, row), (got.col, col)):
        if form == PACKED:
            assert_no_nan_scale(face.scale)
    return got


# ---- both faces of an operand, to nearest ---------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_operands_equal_the_reference(launch, kernel_device, seed):
    x, groups, fold = random_case(seed)
    dtype = (torch.bfloat16, torch.float32)[seed % 2]
    for k, (row, col) in enumerate(FORMS):
        rht = (seed + k) % 2 == 0
        compare(launch, kernel_device, x, OperandSpec(groups, fold, row, col, rht), dtype)


@pytest.mark.parametrize("seed", FEWER)
def test_given_amaxes_and_what_is_observed(launch, kernel_device, seed):
    x, groups, fold = random_case(seed)
    own = reference_operands.measure_operand(x, OperandSpec(groups, fold, rht=True))
    for k, (row, col) in enumerate(FORMS):
        shrink = (4.0, 1.0, 0.01)[(seed + k) % 3]  # of an earlier step: larger, fitting, far too small
        amax = torch.where(own.isfinite() & (own > 0), own, 1.0) * shrink
        rht = (seed + k) % 2 == 0
        got = compare(launch, kernel_device, x, OperandSpec(groups, fold, row, col, rht), amax=amax)
        assert not (shrink == 0.01 and KINDS[seed % 8] == "normal") or got.observed[2] > 0


@pytest.mark.parametrize("seed", SEEDS[::5])
def test_power_of_two_scales(launch, kernel_device, seed):
    x, groups, fold = random_case(seed)
    for k, (row, col) in enumerate(FORMS[::2]):
        amax = torch.tensor([1.0, 3000.0]) if (seed + k) % 4 == 0 else None
        spec = OperandSpec(groups, fold, row, col, (seed + k) % 2 == 0, e4m3_max=(448, 256)[seed % 2], pow2=True)
        compare(launch, kernel_device, x, spec, amax=amax)
    spec = OperandSpec(groups, fold, PACKED, PACKED, four_over_six="MSE", pow2=True)
    compare(launch, kernel_device, x, spec)


def test_kernels_leave_their_workspace_as_they_found_it(launch, kernel_device, monkeypatch):
    """A launch that left something there would spoil the next one of the stream."""
    given = []

    def zeros(x):
        given.append(x.new_zeros(workspace.SIZE, dtype=torch.int32))
        return given[-1]

    for module in (launch, tiles):
        monkeypatch.setattr(module, "zeros", zeros)
    for seed in SEEDS[:3]:
        x, groups, fold = random_case(seed)
        for rht in (True, False):
            launch.measure_operand(x.to(kernel_device), OperandSpec(groups, fold, rht=rht))
        for error, forms in ((None, FORMS[seed % len(FORMS)]), ("MAE", (PACKED, PACKED))):
            spec = OperandSpec(groups, fold, *forms, four_over_six=error)
            amax = torch.ones(2, device=kernel_device)
            launch.quantize_operand(x.to(kernel_device), spec, torch.bfloat16, None, amax)
    launch.quantize_weight(x.to(kernel_device), WeightSpec(1, PACKED, pow2=True), torch.float32)
    assert len(given) == 13 and not any(work.any() for work in given)


@pytest.mark.parametrize("rht", [True, False])
@pytest.mark.parametrize("seed", range(0, 24, 2))
def test_amaxes_equal_the_reference(launch, kernel_device, seed, rht):
    x, groups, fold = random_case(seed)
    spec = OperandSpec(groups, fold, rht=rht)
    expected = reference_operands.measure_operand(x, spec)
    assert same_bits(launch.measure_operand(x.to(kernel_device), spec).cpu(), expected)


def test_several_tiles_and_groups_of_images(launch, kernel_device, monkeypatch):
    entry = {"BLOCK": 256, "num_warps": 4}
    monkeypatch.setattr(tuning, "config", lambda *_: entry)
    for shape, groups in (((32, 3, 7, 16), 1), ((20, 9, 40), 2), ((16, 512), 1)):
        x = values(shape, "normal", torch.bfloat16)
        fold = Fold(1, 0, shape[1] if len(shape) > 2 else 1, 0, -(-shape[0] // 16) * 16)
        for amax in (None, torch.tensor([5.0, 9.0])):
            compare(launch, kernel_device, x, OperandSpec(groups, fold, DEQUANTIZED, PACKED, True), amax=amax)
    x = values((5, 4, 20, 24), "normal")  # folded, and rows longer than a tile
    fold = make_geometry(5, (24, 16), (4, 20), 3, 1, 1).folds[0]
    compare(launch, kernel_device, x, OperandSpec(1, fold, PACKED, PACKED, True))


@pytest.mark.parametrize("mode", ["MAE", "MSE"])
@pytest.mark.parametrize("seed", (0, 3, 6, 9, 12, 15, 18, 21))
def test_four_over_six(launch, kernel_device, seed, mode):
    x, groups, fold = random_case(seed)
    form, e4m3_max = (PACKED, DEQUANTIZED)[seed % 2], (448, 256)[seed // 3 % 2]
    amax = torch.tensor([2.0, 3.0]) if seed % 4 == 0 else None
    rht = seed % 6 == 0
    spec = OperandSpec(groups, fold, form, form, rht, four_over_six=mode, e4m3_max=e4m3_max)
    compare(launch, kernel_device, x, spec, torch.float32, amax)


def test_a_scale_per_row(launch, kernel_device):
    x, fold = values((5, 3, 4, 40), "wide", torch.bfloat16), Fold(1, 0, 3, 0, 16)
    compare(launch, kernel_device, x, OperandSpec(1, fold, PACKED, PACKED, row_scaled=True), torch.float32)


@pytest.mark.parametrize("shape", [(0, 3, 4, 16), (2, 0, 4, 16), (2, 3, 4, 0), (0, 16)])
def test_empty_tensors(launch, kernel_device, shape):
    x = torch.zeros(shape, device=kernel_device)
    fold = Fold(1, 0, shape[1] if len(shape) > 2 else 1, 0, -(-shape[0] // 16) * 16)
    for amax, row_scaled in ((None, False), (torch.ones(2, device=kernel_device), False), (None, True)):
        for row, col in FORMS:
            spec = OperandSpec(1, fold, row, col, True, row_scaled=row_scaled)
            got = operand.quantize_operand(x, spec, torch.bfloat16, None, amax, "triton")
            with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
                expected = operand.quantize_operand(x, spec, torch.bfloat16, None, amax, "triton")
            assert [(g.shape, g.dtype) for g in got.flat()] == [(e.shape, e.dtype) for e in expected.flat()]
            assert not any(bool(g.any()) for g in (*got.row, *got.col, got.observed))
    assert same_bits(launch.measure_operand(x, OperandSpec(1, fold, rht=True)).cpu(), torch.zeros(2))
    assert launch.unpack_columns(torch.empty(0, 4, 8), torch.empty(0, 4), torch.bfloat16).shape == (0, 4)


def _far(count: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The first element of an array of `count`, and the array as bytes: address space only, pages come when touched."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE
    memory = mmap.mmap(-1, count * dtype.itemsize, flags=flags)
    return torch.frombuffer(memory, dtype=dtype, count=1), torch.frombuffer(memory, dtype=dtype)


@pytest.mark.parametrize("form", [DEQUANTIZED, PACKED], ids=["values", "codes"])
@pytest.mark.parametrize(
    ("images", "run"), [(32, 2**27 + 48), (16, 2**30 + 48), (16, 2**31 + 48)], ids=["tensor", "images", "image"]
)
def test_addresses_beyond_32_bits(kernel_device, monkeypatch, images, run, form):
    """One program of a kernel over more than 2^31 elements: the last tile of the last group of images."""
    if kernel_device.type != "cpu" or sys.platform != "linux":
        pytest.skip("a matter of addresses: the interpreter shows it without the memory")
    from triton.runtime import interpreter

    from te_nvfp4_cv.ops.quantize.triton import operand_kernels, unpack_kernels

    bf16, groups, block = torch.bfloat16, images // 16, 64
    x, all_x = _far(images * run, bf16)
    row, all_row = _far(images * run, bf16) if form == DEQUANTIZED else _far(images * run // 8, torch.int32)
    row_scale, all_row_scale = _far(images * run // 16, torch.uint8)
    col, all_col = _far(groups * run, torch.int64)
    scale, all_scale = _far(groups * run, torch.uint8)
    back, all_back = _far(images * run, bf16)
    tail = values((16, 48), "normal", bf16)
    first, per_row = (groups - 1) * 16, -(-run // block)
    at = torch.arange(run - 48, run)
    for i in range(16):
        all_x[(first + i) * run + at] = tail[i]
    amax = torch.tensor([5.0, 9.0])
    program = [groups * per_row - 1, 0, 0]
    monkeypatch.setattr(
        interpreter.InterpreterBuilder,
        "create_get_program_id",
        lambda self, axis: interpreter.TensorHandle(np.array([program[axis]], np.int32), interpreter.tl.int32),
    )
    flags = dict(
        ROW=form, COL=1, RHT=True, STOCHASTIC=False, OBSERVE=0, FOLDED=False, MASKED=True, CHANNELS=0, BLOCKS=1
    )
    watch = (amax,) * 4  # work and what is observed: not read
    arguments = (x, x, amax, amax, row, row_scale, col, scale, *watch, images, 1, run, per_row, 0)
    operand_kernels.quantize_kernel[(1,)](*arguments, **flags, E4M3_MAX=448, BLOCK=block)
    fold = Fold(1, 0, 1, 0, 16)
    spec = OperandSpec(1, fold, form, PACKED, True)
    expected = reference_operands.quantize_operand(tail, spec, bf16, None, amax)
    if form == DEQUANTIZED:
        got = torch.stack([all_row[(first + i) * run + at] for i in range(16)])
    else:
        got = torch.stack([all_row[((first + i) * run + at[::8]) // 8] for i in range(16)]).view(torch.uint8)
        scales = torch.stack([all_row_scale[((first + i) * run + at[::16]) // 16] for i in range(16)])
        assert same_bits(scales, expected.row.scale)
    assert same_bits(got, expected.row.data)
    assert same_bits(all_col[(groups - 1) * run + at].view(torch.uint8).view(1, 48, 8), expected.col.data)
    assert same_bits(all_scale[(groups - 1) * run + at].view(1, 48), expected.col.scale)
    unpack_kernels.unpack_columns_kernel[(1,)](
        col, scale, back, amax, amax, 1.0, run, images, per_row, groups, FACTOR=0, MASKED=True, BLOCK=block
    )
    got = torch.stack([all_back[(first + i) * run + at] for i in range(16)])
    assert same_bits(got, reference_operands.unpack_columns(*expected.col, bf16))


# ---- stochastic rounding --------------------------------------------------------------------------------------------


def kernel_bytes(images: int, size: int, seed: int, word2: int = 0) -> torch.Tensor:
    """uint8 [images, size], images a multiple of 16: the byte that value f of image n is rounded with."""
    index = torch.arange(images // 16 * size, dtype=torch.int64)
    zero = torch.zeros_like(index)
    counter = (index & 0xFFFFFFFF, index >> 32, zero + word2, zero)
    words = torch.stack(formats.philox_words(counter, (seed & 0xFFFFFFFF, seed >> 32), rounds=7), -1)
    each = torch.stack([(words >> shift) & 255 for shift in (0, 8, 16, 24)], -1).flatten(-2)  # [index, 16]
    return each.view(images // 16, size, 16).movedim(-1, 1).reshape(images, size).to(torch.uint8)


def by_reference(x, spec: OperandSpec, dtype, seed: int, amax) -> Operand:
    """Return what reference_operands.quantize_operand makes with the kernels' bytes in place of its own."""
    groups, fold = spec.groups, spec.fold
    bytes_row = kernel_bytes(-(-x.shape[0] // 16) * 16, x[0].numel(), seed)[: x.shape[0]].view(x.shape)
    folded = reference_operands.fold_images(x, fold)
    if fold.strips == 1:
        bytes_col = kernel_bytes(fold.images, folded[0].numel(), seed)
    else:
        bytes_col = kernel_bytes(fold.images, folded[0].numel(), seed, word2=1)
    padded = reference_operands.pad_groups(reference_operands.batch_last(bytes_row), groups)
    random_rowwise = padded.flatten(0, -2)
    random_columnwise = reference_operands.batch_last(bytes_col.view(folded.shape)).flatten(0, -2).t()
    plain = reference_matrix.quantize_2d

    def with_bytes(x_MK, **settings):
        settings["seed"] = None
        return plain(x_MK, **settings, random_rowwise=random_rowwise, random_columnwise=random_columnwise)

    reference_matrix.quantize_2d = with_bytes
    try:
        return reference_operands.quantize_operand(x, spec, dtype, None, amax)
    finally:
        reference_matrix.quantize_2d = plain


@pytest.mark.parametrize("seed", FEWER)
def test_stochastic_rounding_equals_the_reference_with_the_same_bytes(launch, kernel_device, seed):
    x, groups, fold = random_case(seed)
    key, dtype = 0x1234567890ABCDEF + seed, (torch.bfloat16, torch.float32)[seed % 2]
    mode = "MSE" if seed % 4 == 3 else None
    amax = torch.tensor([4.0, 0.5]) if seed % 3 == 0 else None
    for row, col in ((DEQUANTIZED, DEQUANTIZED), (PACKED, PACKED), (NONE, DEQUANTIZED)):
        spec = OperandSpec(groups, fold, row, col, True, True, mode)
        expected = by_reference(x, spec, dtype, key, amax)
        got = cpu(launch.quantize_operand(*to(kernel_device, x, spec, dtype, torch.tensor([key]), amax)))
        for field in (*(ROW if row else ()), *(COL if col else ()), 6):
            assert same_bits(got.flat()[field], expected.flat()[field]), (field, row, col)


def test_stochastic_rounding_is_unbiased_between_neighbours_and_follows_its_seed(launch, kernel_device):
    """Of 2^16 elements: only the two neighbours on the grid; the mean error within 4 standard errors of 0."""
    x = values((16, 4, 4, 256), "normal", torch.bfloat16)
    fold = Fold(1, 0, 4, 0, 16)

    def run(key: int) -> Operand:
        spec = OperandSpec(1, fold, DEQUANTIZED, DEQUANTIZED, stochastic=True)
        return cpu(launch.quantize_operand(*to(kernel_device, x, spec, torch.float32, torch.tensor([key]), None)))

    got, again, other = run(7), run(7), run(8)
    nearest = OperandSpec(1, fold, PACKED, PACKED)
    packed = cpu(launch.quantize_operand(x.to(kernel_device), nearest, torch.float32, None, None))
    s_enc = formats.encode_scale(got.row_amax)
    for face, scale in (("row", packed.row.scale.unsqueeze(-1)), ("col", packed.col.scale.unsqueeze(1))):
        values_, repeated, others = (getattr(made, face).data for made in (got, again, other))
        assert same_bits(values_, repeated) and not torch.equal(values_, others)
        s_b = scale.view(torch.float8_e4m3fn)
        enc = formats.encode_multiplier(s_b, s_enc)
        if face == "row":
            scaled, value = x.float().unflatten(-1, (-1, 16)) * enc, values_.unflatten(-1, (-1, 16)) / s_b.float()
        else:
            scaled = x.float().unflatten(0, (-1, 16)) * enc
            value = values_.unflatten(0, (-1, 16)) / s_b.float()
        scaled = scaled.clamp(-6, 6)
        step = torch.where(scaled.abs() < 2, 0.5, torch.where(scaled.abs() < 4, 1.0, 2.0))
        error = (value - scaled) / step
        assert bool((error.abs() < 1).all())
        toward = torch.frac(scaled.abs() / step)
        spread = math.sqrt(float((toward * (1 - toward)).sum())) / error.numel()
        bias = 2**-9  # r / 256 with r = 0..255 rounds up with at most 2^-8 less than the fraction
        assert abs(float((error * scaled.sign()).mean())) < 4 * spread + 2 * bias
        assert abs(float(error.mean())) < 4 * spread
        up = (value.abs() > scaled.abs()).float()
        for low in (0.0, 0.25, 0.5, 0.75):  # the frequency of rounding up follows the fraction
            inside = (toward > low) & (toward < low + 0.25)
            expected, count = float(toward[inside].mean()), int(inside.sum())
            assert abs(float(up[inside].mean()) - expected) < 4 * math.sqrt(expected * (1 - expected) / count) + 2**-8


def test_both_faces_share_their_bytes_and_one_face_alone_is_the_same(launch, kernel_device):
    x, seed = (
        values((16, 2, 3, 32), "normal", torch.bfloat16).to(kernel_device),
        torch.tensor([3], device=kernel_device),
    )
    both, row, col = (
        cpu(launch.quantize_operand(x, OperandSpec(1, Fold(1, 0, 2, 0, 16), *forms, True, True), x.dtype, seed, None))
        for forms in ((PACKED, PACKED), (PACKED, NONE), (NONE, PACKED))
    )
    assert same_bits(both.row.data, row.row.data) and same_bits(both.col.data, col.col.data)


# ---- packed faces back to values ------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(0, 24, 3))
def test_unpacking_equals_the_reference(launch, kernel_device, seed):
    x, groups, fold = random_case(seed)
    spec = OperandSpec(groups, fold, PACKED, PACKED, True)
    packed = reference_operands.quantize_operand(x, spec, torch.bfloat16, None, None)
    for dtype in (torch.bfloat16, torch.float32):
        cases = (("unpack_columns", packed.col, ()), ("unpack_rows", packed.row, (x.shape[-1], groups)))
        for function, (data, scale), more in cases:
            expected = getattr(reference_operands, function)(data, scale, *more, dtype)
            got = getattr(launch, function)(data.to(kernel_device), scale.to(kernel_device), *more, dtype)
            assert same_bits(got.cpu(), expected), (function, dtype)


def test_every_code_times_every_scale(launch, kernel_device):
    scale = torch.arange(127, dtype=torch.uint8).repeat_interleave(2).view(1, 254)
    data = torch.tensor([0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE] * 254, dtype=torch.uint8).view(1, 254, 8)
    for dtype in (torch.bfloat16, torch.float32):
        got = launch.unpack_columns(data.to(kernel_device), scale.to(kernel_device), dtype).cpu()
        assert same_bits(got, reference_operands.unpack_columns(data, scale, dtype))
        got = launch.unpack_rows(data.view(1, -1).to(kernel_device), scale.to(kernel_device), 254 * 16, 1, dtype).cpu()
        assert same_bits(got, reference_operands.unpack_rows(data.view(1, -1), scale, 254 * 16, 1, dtype))


# ---- weights --------------------------------------------------------------------------------------------------------


def random_weight(seed: int, how: str) -> tuple[torch.Tensor, int]:
    rng = random.Random(seed)
    groups, rank = rng.choice([1, 1, 2]), rng.choice([0, 1, 2, 2, 3 if how == "channels_last" else 2])
    taps = tuple(rng.choice([1, 3, 7] if rank == 1 else [1, 2, 3]) for _ in range(rank))
    n, c = rng.choice([16, 24, 33]) * groups, rng.choice([3, 16, 24])
    return strided(values((n, c, *taps), KINDS[seed % 8], DTYPES[seed % 3], seed), how), groups


STRIDES = ("channels_last", "transposed", "sliced", "turned")


# how: the strides that the kernels walk; seed: a kind of values (all eight where w is contiguous), rank, groups, width
@pytest.mark.parametrize(
    ("how", "seed"),
    seeds(
        [("contiguous", seed) for seed in range(8)] + [(how, i + k) for i, how in enumerate(STRIDES) for k in (0, 4)],
        [(how, seed) for how in STRIDES for seed in range(8)],
    ),
)
def test_weights_equal_the_reference(launch, kernel_device, seed, how):
    w, groups = random_weight(seed, how)
    n, c = w.shape[:2]
    faces = [(True, PACKED, NONE), (True, DEQUANTIZED, NONE)]
    faces += [(False, row, col) for row, col in ((PACKED, PACKED), (DEQUANTIZED, DEQUANTIZED), (NONE, PACKED))]
    for k, (two_d, row, col) in enumerate(faces):
        spec = WeightSpec(groups, row, col, two_d, pow2=(seed + k) % 2 == 0)
        expected = reference_operands.quantize_weight(w, spec, torch.bfloat16)
        got = cpu(launch.quantize_weight(on(kernel_device, w), spec, torch.bfloat16))
        assert same_codes(expected, got), (two_d, row, col)
        assert_no_nan_scale(got.row.scale)
        assert_no_nan_scale(got.col.scale)
        for name, form in (("row", row), ("col", col)):
            if form == PACKED:
                for factor in (None, torch.tensor([0.125]), torch.tensor([math.nan])):
                    packed = (*got.face(name), WeightLayout(n, c, groups, name == "col"), factor, torch.bfloat16)
                    back = launch.unpack_weight(*to(kernel_device, *packed)).cpu()
                    assert same_bits(back, reference_operands.unpack_weight(*packed)), (two_d, name, factor)


def on(device: torch.device, w: torch.Tensor) -> torch.Tensor:
    """w on the device in the same strides, gaps included."""
    if device.type == "cpu":
        return w
    size = 1 + sum((s - 1) * t for s, t in zip(w.shape, w.stride(), strict=True))
    return w.as_strided((size,), (1,)).to(device).as_strided(w.shape, w.stride())


@pytest.mark.parametrize("two_d", [True, False])
def test_weights_whose_sign_is_a_bit_of_the_tensor(launch, kernel_device, two_d):
    w, spec = negated((32, 24, 3), kernel_device), WeightSpec(1, PACKED, NONE if two_d else PACKED, two_d)
    expected = reference_operands.quantize_weight(w.cpu(), spec, torch.float32)
    assert same_codes(expected, cpu(launch.quantize_weight(w, spec, torch.float32)))


@pytest.mark.parametrize("two_d", [True, False])
@pytest.mark.parametrize(("mode", "e4m3_max"), [("MSE", 256), ("MAE", 448)])
def test_weights_with_four_over_six(launch, kernel_device, two_d, mode, e4m3_max):
    for groups, shape, kind in ((1, (32, 24, 3), "normal"), (2, (40, 16, 1, 2), "wide"), (1, (16, 64), "subnormal")):
        w = values(shape, kind)
        spec = WeightSpec(groups, PACKED, NONE if two_d else PACKED, two_d, mode, e4m3_max)
        expected = reference_operands.quantize_weight(w, spec, torch.float32)
        got = launch.quantize_weight(w.to(kernel_device), spec, torch.float32)
        assert same_codes(expected, cpu(got)), (groups, shape)


@pytest.mark.parametrize("e4m3_max", [448, 256])
@pytest.mark.parametrize("amax", [0.0, 1e-45, 1e-30, 2688.0, 2689.0, 1536.0, 3.3e38, math.inf, math.nan])
def test_weights_with_a_power_of_two(launch, kernel_device, amax, e4m3_max):
    w = torch.linspace(-1, 1, 256).view(16, 16).clone()
    w[0, 0] = 1.0
    w = w * amax if math.isfinite(amax) else torch.where(w == 1.0, amax, w)
    spec = WeightSpec(1, PACKED, e4m3_max=e4m3_max, pow2=True)
    expected = reference_operands.quantize_weight(w, spec, torch.float32)
    assert same_codes(expected, cpu(launch.quantize_weight(w.to(kernel_device), spec, torch.float32)))


@pytest.mark.parametrize("two_d", [True, False])
@pytest.mark.parametrize("kind", ["normal", "wide", "zeros", "nan"])
def test_shards_with_the_amax_of_the_whole(launch, kernel_device, kind, two_d):
    w = values((48, 32, 3), kind)
    amax = w.abs().amax().reshape(1)
    for axis, pow2 in ((0, False), (1, True), (1, False)):
        spec = WeightSpec(1, PACKED, NONE if two_d else PACKED, two_d, pow2=pow2)
        shard = w.narrow(axis, 16, 16)
        expected = reference_operands.quantize_weight(shard, spec, torch.float32, amax)
        got = launch.quantize_weight(on(kernel_device, shard), spec, torch.float32, amax.to(kernel_device))
        assert same_codes(expected, cpu(got)), (axis, pow2)


# ---- the operators --------------------------------------------------------------------------------------------------


def test_operators_pass_opcheck(kernel_device, monkeypatch):
    x, w = values((3, 5, 4, 24)).to(kernel_device), values((32, 24, 3, 3)).to(kernel_device)
    fold, ops = make_geometry(3, (24, 32), (5, 4), 3, 1, 1).folds[0], torch.ops.te_nvfp4_cv
    key, amax = torch.tensor([5], device=kernel_device), torch.ones(2, device=kernel_device)
    tests = ("test_schema", "test_faketensor")
    for row, col, given in ((PACKED, PACKED, None), (DEQUANTIZED, NONE, amax)):
        spec = OperandSpec(1, fold, row, col, True, True).to_ints()
        args = (x, spec, torch.bfloat16, key, given, "triton")
        torch.library.opcheck(ops.quantize_operand.default, args, test_utils=tests)
    torch.library.opcheck(ops.measure_operand.default, (x, spec, "triton"), test_utils=tests)
    weight = WeightSpec(2, PACKED, pow2=True)
    args = (w, weight.to_ints(), torch.float32, "triton")
    torch.library.opcheck(ops.quantize_weight.default, args, test_utils=tests)
    codes = operand.quantize_weight(w, weight, torch.float32, "triton")
    unpack = (*codes.row, [32, 24, 2, 0], amax[:1], torch.bfloat16, "triton")
    torch.library.opcheck(ops.unpack_weight.default, unpack, test_utils=tests)


def test_the_vendor_backend_quantizes_with_the_kernels_where_they_serve(launch, kernel_device, monkeypatch):
    called = []
    plain = launch.quantize_operand
    monkeypatch.setattr(launch, "quantize_operand", lambda *a: (called.append(a), plain(*a))[1])
    monkeypatch.setattr(dispatch, "KERNELS_ON_CPU", True)
    x = values((2, 3, 3, 16)).to(kernel_device)
    args = (x, OperandSpec(1, Fold(1, 0, 3, 0, 16), PACKED), torch.float32, None, None)
    got, expected = operand.quantize_operand(*args, "vendor"), operand.quantize_operand(*args, "reference")
    assert len(called) == 1
    for g, e in zip((*got.row, got.row_amax), (*expected.row, expected.row_amax), strict=True):
        assert same_bits(g.cpu(), e.cpu())


def test_formats_philox_takes_rounds():
    counter = tuple(torch.tensor([n]) for n in (1, 2, 3, 4))
    ten, seven = formats.philox_words(counter, (5, 6)), formats.philox_words(counter, (5, 6), rounds=7)
    assert [int(w) for w in ten] == [int(w) for w in formats.philox_words(counter, (5, 6), rounds=10)]
    assert [int(w) for w in ten] != [int(w) for w in seven]


def test_unpacking_takes_one_axis_of_the_grid(launch, kernel_device, monkeypatch):
    """The second one ends at 65535: a linear layer of 2^20 rows has more groups of sixteen."""
    from te_nvfp4_cv.ops.quantize.triton import unpack_kernels

    grids = []

    class Kernel:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *arguments, **options: None

    monkeypatch.setattr(unpack_kernels, "unpack_columns_kernel", Kernel())
    data, scale = (torch.zeros(65536, 16, *last, dtype=torch.uint8, device=kernel_device) for last in ((8,), ()))
    assert launch.unpack_columns(data, scale, torch.bfloat16).shape == (2**20, 16)
    assert grids == [(65536,)]


def test_weights_take_one_axis_of_the_grid(kernel_device):
    """The same of 16x16 tiles: a classifier of 1.1 million identities, 256 experts of 4,112 outputs."""
    for n, groups in ((1_100_000, 1), (256 * 4112, 256)):
        spec = WeightSpec(groups, PACKED, NONE, two_d=True)
        kinds = (torch.float32, torch.bfloat16, spec, False, False)
        launch = grids.weight_tiles_of(torch.Size((n, 48, 1)), (48, 1, 1), kernel_device, 1.0, kinds)
        bands = groups * math.ceil(n // groups / 16)
        assert bands > 65535 and len(launch.grid) == 1
        assert launch.grid[0] == bands * math.ceil(3 / launch.constants["TILES"])


@pytest.mark.parametrize("height", [3 * 2**14, 2**16], ids=["2^31 to 2^32 values", "2^32 values"])
def test_an_image_of_more_values_than_32_bits_hold(launch, kernel_device, height):
    """Its first program alone, whose tile is like that of a small image."""
    spec = OperandSpec(1, Fold(1, 0, 1, 0, 16), PACKED, PACKED, rht=True)
    whole = torch.Size((1, height, 2**12, 16))
    bound = grids.tiles_of(whole, torch.bfloat16, kernel_device, spec, (PACKED, PACKED), 0, False)[0].usual
    block = bound.constants["BLOCK"]
    x = values((1, 1, block // 16, 16)).bfloat16().to(kernel_device)
    made = launch.quantize_operand(x, spec, torch.bfloat16, None, None)
    expected = [made.row.data.view(torch.int32), made.row.scale, made.col.data.view(torch.int64), made.col.scale]
    found = [torch.full_like(t, 0x55) for t in expected]
    amax = torch.cat([made.row_amax, made.col_amax])
    bound.kernel[(1,)](x, x, amax, amax, *found, *[amax] * 4, *bound.numbers, **bound.constants)
    for a, b in zip(found, expected, strict=True):
        assert same_bits(a, b)
