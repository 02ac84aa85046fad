"""Convolution operands: the vendor's bits are the reference's, whatever the shape, strides, values and options.

Every output starts as poisoned memory. A dequantized face equals the packed one unpacked; no scale is a NaN byte.
"""

from __future__ import annotations

import itertools
import math
import os
import platform
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from te_nvfp4_cv import formats
from te_nvfp4_cv.backend import native
from te_nvfp4_cv.ops.geometry import Fold
from te_nvfp4_cv.ops.quantize import operand
from te_nvfp4_cv.ops.records import (
    DEQUANTIZED,
    NONE,
    PACKED,
    Face,
    Operand,
    OperandSpec,
    WeightCodes,
    WeightLayout,
    WeightSpec,
)
from tests.helpers import KINDS, make_geometry, same_bits, same_codes, values

pytestmark = pytest.mark.usefixtures("poison", "one_thread")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ROW_FIELDS, COL_FIELDS = (0, 1, 2), (3, 4, 5)  # of Operand.flat()


def random_case(seed: int) -> tuple[torch.Tensor, int, Fold]:
    """Return x [B, *image, C], groups, and a fold: folded with halos, or linear rows."""
    rng = random.Random(seed)
    rank, batch = rng.choice([0, 1, 2, 2, 3]), rng.choice([1, 2, 3, 5, 8, 13, 16, 20, 32])
    channels = rng.choice([3, 16, 24, 40])
    groups = rng.choice([1, 1, 2]) if channels % 2 == 0 else 1
    image = tuple(rng.randint(1, 7 - rank) for _ in range(rank))
    kind, dtype = KINDS[seed % len(KINDS)], DTYPES[seed // len(KINDS) % 3]
    x = values((batch, *image, channels), kind, dtype, seed)
    if rank == 0:
        return x, groups, Fold(1, 0, 1, 0, -(-batch // 16) * 16)
    k, stride = rng.choice([1, 3]), rng.choice([1, 2])
    geometry = make_geometry(batch, (channels, 16), image, k, stride, k // 2)
    return x, groups, geometry.folds[rng.choice([0, 0, 0, 1])] if stride == 1 else geometry.folds[0]


def quantize(x, groups, fold, row, col, rht, seed, dtype, backend, row_scaled=False) -> Operand:
    key = None if seed is None else torch.tensor([seed])
    spec = OperandSpec(groups, fold, row, col, rht, seed is not None, row_scaled=row_scaled)
    return operand.quantize_operand(x, spec, dtype, key, None, backend)


def unpack(codes: WeightCodes, name: str, w: torch.Tensor, groups: int, dtype, backend: str, factor=None):
    """Return the values of one packed face of w."""
    layout = WeightLayout(w.shape[0], w.shape[1], groups, name == "col")
    return operand.unpack_weight(codes.face(name), layout, factor, dtype, backend)


def assert_no_nan_scale(scale: torch.Tensor) -> None:
    assert not bool(((scale & 0x7F) == 0x7F).any()) and not bool((scale & 0x80).any())


@pytest.mark.parametrize("seed", range(36))
def test_vendor_operands_equal_the_reference(seed):
    x, groups, fold = random_case(seed)
    for (row, col), rht, key in itertools.product(
        [(PACKED, PACKED), (DEQUANTIZED, DEQUANTIZED), (NONE, PACKED), (PACKED, NONE)],
        [True, False],
        [None, 12345678901234 + seed],
    ):
        dtype = (torch.bfloat16, torch.float32)[seed % 2]
        expected, got = (
            quantize(x, groups, fold, row, col, rht, key, dtype, backend) for backend in ("reference", "vendor")
        )
        asked = (ROW_FIELDS if row else ()) + (COL_FIELDS if col else ())
        for field in range(6):
            if field in asked:
                assert same_bits(expected.flat()[field], got.flat()[field]), (field, row, col, rht, key)
            elif field not in (2, 5):
                assert got.flat()[field].numel() == expected.flat()[field].numel() == 0, field
        if PACKED in (row, col):
            assert_no_nan_scale(got.row.scale)
            assert_no_nan_scale(got.col.scale)


@pytest.mark.parametrize("seed", range(0, 48, 3))
def test_dequantized_faces_are_the_packed_ones_unpacked(seed):
    x, groups, fold = random_case(seed)
    for dtype, backend in itertools.product((torch.bfloat16, torch.float32), ("reference", "vendor")):
        packed = quantize(x, groups, fold, PACKED, PACKED, True, 99, dtype, "vendor")
        values_ = quantize(x, groups, fold, DEQUANTIZED, DEQUANTIZED, True, 99, dtype, "vendor")
        rows = operand.unpack_rows(packed.row, x.shape[-1], groups, dtype, backend)
        columns = operand.unpack_columns(packed.col, dtype, backend)
        assert same_bits(rows, values_.row.data) and same_bits(columns, values_.col.data)


@pytest.mark.parametrize("mode", ["MAE", "MSE"])
@pytest.mark.parametrize("seed", range(1, 36, 3))
def test_vendor_operands_with_four_over_six(seed, mode):
    x, groups, fold = random_case(seed)
    for form, e4m3_max in itertools.product((PACKED, DEQUANTIZED), (448, 256)):
        spec = OperandSpec(groups, fold, form, form, four_over_six=mode, e4m3_max=e4m3_max)
        args = (x, spec, torch.float32, None, None)
        expected, got = (operand.quantize_operand(*args, backend) for backend in ("reference", "vendor"))
        assert same_codes(expected, got), (form, e4m3_max)


def test_vendor_covers_what_its_kernels_do_not():
    x = values((5, 3, 4, 40), "wide", torch.bfloat16)
    fold = make_geometry(5, (40, 16), (3, 4), 1).folds[0]
    expected, got = (
        quantize(x, 1, fold, PACKED, PACKED, False, None, torch.float32, backend, row_scaled=True)
        for backend in ("reference", "vendor")
    )
    assert same_codes(expected, got)
    assert got.row_amax.shape == (5, 3, 4) and got.col_amax.shape == (40,)


def test_random_bits_do_not_depend_on_the_other_face_and_follow_the_seed():
    x, fold = values((16, 4, 5, 32)), Fold(1, 0, 4, 0, 16)
    both = quantize(x, 1, fold, PACKED, PACKED, True, 7, torch.float32, "vendor")
    row = quantize(x, 1, fold, PACKED, NONE, True, 7, torch.float32, "vendor")
    other = quantize(x, 1, fold, PACKED, PACKED, True, 8, torch.float32, "vendor")
    assert same_bits(both.row.data, row.row.data)
    assert not torch.equal(both.row.data, other.row.data) and not torch.equal(both.col.data, other.col.data)
    for a, b in ((both.row.scale, other.row.scale), (both.col.scale, other.col.scale)):
        assert torch.equal(a, b)  # scales are not random


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_bits_do_not_depend_on_the_number_of_threads(threads):
    x, fold = values((5, 7, 5, 24), "wide"), make_geometry(5, (24, 16), (7, 5), 3, 1, 1).folds[0]
    before = torch.get_num_threads()
    expected = quantize(x, 1, fold, PACKED, PACKED, True, 7, torch.float32, "reference")
    try:
        torch.set_num_threads(threads)
        got = quantize(x, 1, fold, PACKED, PACKED, True, 7, torch.float32, "vendor")
    finally:
        torch.set_num_threads(before)
    assert same_codes(expected, got)


# ---- kernels --------------------------------------------------------------------------------------------------------


def strided(w: torch.Tensor, how: str) -> torch.Tensor:
    """The same kernel in other strides."""
    if how == "channels_last" and w.dim() in (4, 5):
        return w.to(memory_format=torch.channels_last if w.dim() == 4 else torch.channels_last_3d)
    if how == "transposed":
        return w.transpose(0, 1).contiguous().transpose(0, 1)
    if how == "sliced":
        wide = torch.full((w.shape[0] * 2, *w.shape[1:]), 3e4, dtype=w.dtype)
        wide[::2] = w
        return wide[::2]
    if how == "turned" and w.dim() > 3:  # no stride reaches all taps
        return w.transpose(-1, -2).contiguous().transpose(-1, -2)
    return w


@pytest.mark.parametrize("how", ["contiguous", "channels_last", "transposed", "sliced", "turned"])
@pytest.mark.parametrize("seed", range(12))
def test_vendor_kernels_equal_the_reference(seed, how):
    rng = random.Random(seed)
    groups, rank = rng.choice([1, 1, 2]), rng.choice([0, 1, 2, 2, 3 if how == "channels_last" else 2])
    taps = tuple(rng.choice([1, 3, 7] if rank == 1 else [1, 2, 3]) for _ in range(rank))
    n, c = rng.choice([16, 24, 33]) * groups, rng.choice([3, 16, 24])
    w = strided(values((n, c, *taps), KINDS[seed % 8], DTYPES[seed % 3], seed), how)
    faces = [(True, PACKED, NONE), (True, DEQUANTIZED, NONE)]
    faces += [(False, row, col) for row, col in ((PACKED, PACKED), (DEQUANTIZED, DEQUANTIZED), (NONE, PACKED))]
    for two_d, row, col in faces:
        spec = WeightSpec(groups, row, col, two_d)
        expected, got = (
            operand.quantize_weight(w, spec, torch.bfloat16, backend) for backend in ("reference", "vendor")
        )
        assert same_codes(expected, got), (two_d, row, col)
        assert_no_nan_scale(got.row.scale)
        assert_no_nan_scale(got.col.scale)
        if row == DEQUANTIZED:
            packed_spec = WeightSpec(groups, PACKED, NONE if two_d else PACKED, two_d)
            packed = operand.quantize_weight(w, packed_spec, torch.bfloat16, "vendor")
            for backend, name in itertools.product(("reference", "vendor"), ("row",) if two_d else ("row", "col")):
                assert same_bits(unpack(packed, name, w, groups, torch.bfloat16, backend), got.face(name).data)


@pytest.mark.parametrize("two_d", [True, False])
@pytest.mark.parametrize("kind", ["normal", "wide"])
@pytest.mark.parametrize(("mode", "e4m3_max"), [("MSE", 256), ("MAE", 448)])
def test_kernels_with_four_over_six(two_d, kind, mode, e4m3_max):
    for groups, shape in ((1, (32, 24, 3, 3)), (2, (40, 16, 1, 2)), (1, (16, 64))):
        w = values(shape, kind)
        spec = WeightSpec(groups, PACKED, NONE if two_d else PACKED, two_d, mode, e4m3_max)
        expected, got = (
            operand.quantize_weight(w, spec, torch.float32, backend) for backend in ("reference", "vendor")
        )
        assert same_codes(expected, got), (groups, shape)


# ---- the operators --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["reference", "vendor"])
def test_operators_pass_opcheck(backend):
    x, w = values((3, 5, 4, 24)), values((32, 24, 3, 3))
    fold, plain_fold = make_geometry(3, (24, 32), (5, 4), 3, 1, 1).folds
    ops, bf16 = torch.ops.te_nvfp4_cv, torch.bfloat16

    def check(spec: OperandSpec, key: torch.Tensor | None = None, amax: torch.Tensor | None = None) -> None:
        torch.library.opcheck(ops.quantize_operand.default, (x, spec.to_ints(), bf16, key, amax, backend))

    for row, col in ((PACKED, PACKED), (DEQUANTIZED, NONE), (NONE, DEQUANTIZED)):
        check(OperandSpec(1, fold, row, col, True, True), torch.tensor([5]))
    for row, col in ((PACKED, PACKED), (NONE, PACKED)):
        check(OperandSpec(1, fold, row, col, True), None, torch.tensor([2.0, 3]))
    for row, col in ((PACKED, PACKED), (PACKED, NONE), (NONE, PACKED)):
        check(OperandSpec(1, plain_fold, row, col, row_scaled=True))
    both = OperandSpec(1, fold, PACKED, PACKED, True, True)
    torch.library.opcheck(ops.measure_operand.default, (x, both.to_ints(), backend))
    for two_d, row, col in ((True, PACKED, NONE), (False, PACKED, PACKED), (False, NONE, DEQUANTIZED)):
        spec = WeightSpec(2, row, col, two_d).to_ints()
        torch.library.opcheck(ops.quantize_weight.default, (w, spec, torch.float32, backend))
    packed = operand.quantize_operand(x, both, torch.float32, torch.tensor([5]), None, "vendor")
    codes = operand.quantize_weight(w, WeightSpec(2, PACKED), torch.float32, "vendor")
    torch.library.opcheck(ops.unpack_rows.default, (*packed.row, 24, 1, bf16, backend))
    torch.library.opcheck(ops.unpack_columns.default, (*packed.col, bf16, backend))
    for factor in (None, torch.tensor([0.5])):
        torch.library.opcheck(ops.unpack_weight.default, (*codes.row, [32, 24, 2, 0], factor, bf16, backend))


def test_draw_seed_passes_opcheck_but_for_its_randomness():
    torch.library.opcheck(
        torch.ops.te_nvfp4_cv.draw_seed.default, (torch.ones(2),), test_utils=("test_schema", "test_faketensor")
    )


# ---- without a compiler ---------------------------------------------------------------------------------------------

DIGEST = """
import hashlib, sys, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch
    from te_nvfp4_cv.backend import native
    from te_nvfp4_cv.ops import relu
    from te_nvfp4_cv.ops.geometry import Fold
    from te_nvfp4_cv.ops.quantize import operand
    from te_nvfp4_cv.ops.records import OperandSpec, WeightLayout, WeightSpec
    digest = hashlib.sha256()
    x = torch.randn(5, 6, 4, 24, generator=torch.Generator().manual_seed(1)).bfloat16()
    for form in (1, 2):
        spec = OperandSpec(1, Fold(3, 2, 4, 1, 16), form, form, True, True)
        for part in operand.quantize_operand(x, spec, torch.float32, torch.tensor([3]), None, "vendor").flat():
            digest.update(part.contiguous().view(torch.uint8).numpy().tobytes())
    w = x.flatten(0, 1).movedim(-1, 1)[:32]
    packed = operand.quantize_weight(w, WeightSpec(1, 1), torch.float32, "vendor")
    layout = WeightLayout(w.shape[0], w.shape[1], 1, False)
    unpacked = operand.unpack_weight(packed.row, layout, None, torch.bfloat16, "vendor")
    for part in (*packed.flat(), unpacked):
        digest.update(part.contiguous().view(torch.uint8).numpy().tobytes())
    mask = relu.positive_mask(x)
    digest.update(mask.numpy().tobytes())
    digest.update(relu.apply_mask(x, mask).view(torch.uint8).numpy().tobytes())
said = [str(w.message) for w in caught if "te_nvfp4_cv" in str(w.message)]
print(native.load() is not None, digest.hexdigest(), len(said), sep="\\n")
print(*said)
"""


def run_digest(**environment: str) -> list[str]:
    root = Path(__file__).resolve().parent.parent.parent
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")]), **environment}
    result = subprocess.run([sys.executable, "-c", DIGEST], env=env, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


@pytest.mark.slow
def test_same_bits_without_a_compiler_and_said_once(tmp_path):
    switched_off = run_digest(TE_NVFP4_CV_NATIVE="0")
    no_compiler = run_digest(PATH=str(tmp_path), CXX="no-such-compiler", TE_NVFP4_CV_CACHE=str(tmp_path / "cache"))
    assert switched_off[0] == no_compiler[0] == "False"
    assert switched_off[1] == no_compiler[1]
    assert switched_off[2] == "0" and no_compiler[2] == "1"
    assert "no C++ compiler" in no_compiler[3] and "g++" in no_compiler[3]
    if native.load() is not None:
        compiled = run_digest()
        assert compiled[0] == "True" and compiled[1] == switched_off[1]


def test_a_compiler_that_fails_is_said_once(tmp_path):
    broken = tmp_path / "broken-compiler"
    broken.write_text(
        '#!/bin/sh\ncase "$1" in --version) echo broken 1.0;; *) echo "no such flag" >&2; exit 1;; esac\n'
    )
    broken.chmod(0o755)
    result = run_digest(CXX=str(broken), TE_NVFP4_CV_CACHE=str(tmp_path / "cache"))
    assert result[0] == "False" and result[2] == "1" and "no such flag" in " ".join(result[3:])
    assert not list((tmp_path / "cache").glob("*.so"))


@pytest.mark.stress  # make test compares the kernels for AVX2 with the reference in test_integer_memory.py
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the flag is x86's")
@pytest.mark.skipif(native.load() is None, reason="no compiler here")
def test_kernels_without_avx512_give_the_same_bits(tmp_path):
    plain = tmp_path / "plain-compiler"
    plain.write_text(f'#!/bin/sh\nexec {native.compiler()} "$@" -mno-avx512f\n')
    plain.chmod(0o755)
    built = run_digest(CXX=str(plain), TE_NVFP4_CV_CACHE=str(tmp_path / "cache"))
    assert built[0] == "True" and list((tmp_path / "cache").glob("*.so"))
    assert built[1] == run_digest(TE_NVFP4_CV_NATIVE="0")[1]


# ---- amaxes that are given ------------------------------------------------------------------------------------------


def given_amax(x: torch.Tensor, spec: OperandSpec, factor: float) -> torch.Tensor:
    """Powers of two from the measured amaxes, times `factor`; 1 where there is none to take."""
    measured = operand.measure_operand(x, spec, "reference")
    usable = measured.isfinite() & (measured > 0)
    return formats.power_of_two_amax(torch.where(usable, measured, 1.0).clamp(max=1e30)) * factor


@pytest.mark.parametrize("seed", range(0, 36, 2))
def test_measured_amaxes_are_those_that_quantization_uses(seed):
    x, groups, fold = random_case(seed)
    for rht in (True, False):
        spec = OperandSpec(groups, fold, PACKED, PACKED, rht)
        made = operand.quantize_operand(x, spec, torch.float32, None, None, "reference")
        for backend in ("reference", "vendor"):
            measured = operand.measure_operand(x, spec, backend)
            assert same_bits(measured, torch.cat((made.row_amax, made.col_amax))), (rht, backend)


@pytest.mark.parametrize("factor", [1.0, 8.0, 1 / 64, 0.77])
@pytest.mark.parametrize("seed", range(0, 36, 4))
def test_vendor_operands_with_given_amaxes_equal_the_reference(seed, factor):
    x, groups, fold = random_case(seed)
    for (row, col), rht, key in itertools.product(
        [(PACKED, PACKED), (DEQUANTIZED, DEQUANTIZED), (NONE, PACKED), (PACKED, NONE)], [True, False], [None, 77]
    ):
        spec = OperandSpec(groups, fold, row, col, rht, key is not None)
        amax = given_amax(x, spec, factor)
        args = (x, spec, torch.float32, None if key is None else torch.tensor([key]), amax)
        expected, got = (operand.quantize_operand(*args, backend) for backend in ("reference", "vendor"))
        assert same_codes(expected, got), (row, col, rht, key)
        if row and col:
            assert same_bits(got.observed[:2], operand.measure_operand(x, spec, "vendor"))
        for given, used, seen in zip(amax, (got.row_amax, got.col_amax), got.observed[:2], strict=True):
            assert same_bits(used, given.reshape(1)) if seen.isfinite() else used.isnan()


@pytest.mark.parametrize("seed", range(0, 36, 3))
def test_power_of_two_scales(seed):
    """Codes and amaxes are those of the power of two above the measured amaxes, or above given ones."""
    x, groups, fold = random_case(seed)
    key = torch.tensor([seed]) if seed % 2 else None
    for (row, col), rht, given in itertools.product(
        [(PACKED, PACKED), (DEQUANTIZED, DEQUANTIZED), (NONE, PACKED), (PACKED, NONE)], [True, False], [True, False]
    ):
        spec = OperandSpec(groups, fold, row, col, rht, key is not None)
        own = operand.measure_operand(x, spec, "reference")
        raised = formats.power_of_two_amax(own)
        expected = operand.quantize_operand(x, spec, torch.bfloat16, key, raised, "reference")
        for backend in ("reference", "vendor"):
            args = (torch.bfloat16, key, own if given else None, backend)
            got = operand.quantize_operand(x, spec._replace(pow2=True), *args)
            assert bool(got.observed.numel()) == given
            for k, (mine, theirs) in enumerate(zip(got.flat()[:6], expected.flat()[:6], strict=True)):
                if k not in (2, 5):
                    assert same_bits(mine, theirs), (k, backend, row, col, rht, given)
            for form, used, amax in ((row, got.row_amax, raised[:1]), (col, got.col_amax, raised[1:])):
                assert form == NONE or same_bits(used, amax) or (given and not amax.isfinite() and used.isnan())


@pytest.mark.parametrize("mode", ["MAE", "MSE"])
def test_given_amaxes_with_four_over_six(mode):
    for seed in (1, 9, 13):
        x, groups, fold = random_case(seed)
        for e4m3_max, factor in itertools.product((448, 256), (1.0, 0.25)):
            spec = OperandSpec(groups, fold, PACKED, DEQUANTIZED, four_over_six=mode, e4m3_max=e4m3_max)
            args = (x, spec, torch.float32, None, given_amax(x, spec, factor))
            expected, got = (operand.quantize_operand(*args, backend) for backend in ("reference", "vendor"))
            assert same_codes(expected, got), (e4m3_max, factor)


def test_the_own_amax_given_is_the_current_scale_and_saturates_nothing():
    x = values((5, 6, 4, 24))
    spec = OperandSpec(1, make_geometry(5, (24, 32), (6, 4), 3, 1, 1).folds[0], PACKED, PACKED, True)
    for backend in ("reference", "vendor"):
        amax = operand.measure_operand(x, spec, backend)
        current = operand.quantize_operand(x, spec, torch.float32, None, None, backend)
        given = operand.quantize_operand(x, spec, torch.float32, None, amax, backend)
        assert same_codes(current, given._replace(observed=current.observed))
        assert current.observed.numel() == 0 and float(given.observed[2]) == 0


@pytest.mark.parametrize("backend", ["reference", "vendor"])
def test_saturated_blocks_are_counted(backend):
    x, fold = torch.full((16, 2, 3, 32), 0.01), Fold(1, 0, 2, 0, 16)
    x[3, 1, 2, 5], x[7, 0, 0, 20] = 7.0, -9.0
    amax = torch.tensor([2688.0 * 2**-10, 2688.0 * 2**-10])  # 2.625: both values saturate a block of each face

    def observed(spec: OperandSpec, amax: torch.Tensor) -> list[float]:
        return operand.quantize_operand(x, spec, torch.float32, None, amax, backend).observed.tolist()

    assert observed(OperandSpec(1, fold, PACKED, PACKED), amax) == [9.0, 9.0, 4.0]
    assert observed(OperandSpec(1, fold, PACKED, PACKED), amax * 4) == [9.0, 9.0, 0.0]
    assert observed(OperandSpec(1, fold, PACKED, NONE, True), amax) == [9.0, 0.0, 2.0]


@pytest.mark.parametrize("e4m3_max", [448, 256])
def test_power_of_two_amaxes(e4m3_max):
    full = 6.0 * e4m3_max
    for exponent, factor in itertools.product(
        (-120, -90, -11, -3, 0, 5, 40, 110), (1.0, 1.25, 1.3125, 1.32, 1.5, 1.51)
    ):
        for margin in (1, 4, 8):
            amax = torch.tensor([factor * 2.0**exponent])
            k = math.ceil(math.log2(margin * float(amax.double()) / full))
            expected = full * 2.0 ** min(max(k, formats.MIN_EXPONENT), formats.MAX_EXPONENT)
            assert float(formats.power_of_two_amax(amax, e4m3_max, margin)) == expected
    special = torch.tensor([0.0, float("inf"), float("nan"), 1e-45, 3.4e38])
    out = formats.power_of_two_amax(special, e4m3_max)
    assert same_bits(out[:3], special[:3])
    assert out[3] == full * 2.0**-100 and out[4] == full * 2.0**116
    powers = full * torch.exp2(torch.arange(-100.0, 100.0))
    assert same_bits(formats.power_of_two_amax(powers, e4m3_max), powers)
    alpha = formats.alpha(powers, powers.flip(0), e4m3_max, e4m3_max)
    assert same_bits(alpha, torch.exp2(torch.arange(-100.0, 100.0) + torch.arange(99.0, -101.0, -1)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("two_d", [True, False])
def test_kernels_with_a_power_of_two_amax(two_d, kind):
    w = values((40, 24, 3, 3), kind)
    spec = WeightSpec(1, PACKED, NONE if two_d else PACKED, two_d, pow2=True)
    expected, got = (operand.quantize_weight(w, spec, torch.float32, backend) for backend in ("reference", "vendor"))
    assert same_codes(expected, got)
    assert same_bits(got.amax, formats.power_of_two_amax(w.abs().amax().reshape(1)))


@pytest.mark.parametrize("two_d", [True, False])
def test_unpacked_kernels_times_a_factor(two_d):
    w = values((40, 24, 3, 3), "wide")
    for dtype, factor in itertools.product((torch.bfloat16, torch.float32), (2.0**-17, 2.0**90, 0.3, float("nan"))):
        spec = WeightSpec(1, PACKED, NONE if two_d else PACKED, two_d, pow2=True)
        packed = operand.quantize_weight(w, spec, dtype, "vendor")
        for name in ("row",) if two_d else ("row", "col"):
            plain = unpack(packed, name, w, 1, torch.float32, "reference")
            for backend in ("reference", "vendor"):
                times = unpack(packed, name, w, 1, dtype, backend, torch.tensor([factor]))
                assert same_bits(times, (plain * factor).to(dtype)), (dtype, factor, backend)


# ---- shards of a kernel ---------------------------------------------------------------------------------------------


def part_of(whole: WeightCodes, axis: int, two_d: bool) -> WeightCodes:
    """Return what the second block of 16 rows (axis 0) or columns (axis 1) has of a quantized kernel's packed faces."""
    row, col = whole.row, whole.col
    if axis == 1:
        columns = Face(col.data[..., 16:32, :], col.scale[..., 16:32]) if col.data.numel() else col
        return WeightCodes(Face(row.data[..., 8:16], row.scale[..., 1:2]), columns, whole.amax)
    columns = Face(col.data[:, 1:2], col.scale[:, 1:2]) if col.data.numel() else col
    scale = row.scale[:, 1:2] if two_d else row.scale[16:32]
    return WeightCodes(Face(row.data[16:32], scale), columns, whole.amax)


@pytest.mark.parametrize("kind", ["normal", "wide", "zeros", "nan", "inf"])
@pytest.mark.parametrize("two_d", [True, False])
def test_shards_with_the_amax_of_the_whole_have_its_codes(two_d, kind):
    for shape, pow2, mode in itertools.product(((48, 32, 3, 3), (32, 48)), (True, False), (None, "MSE")):
        w = values(shape, kind)
        amax = w.abs().amax().reshape(1)
        spec = WeightSpec(1, PACKED, NONE if two_d else PACKED, two_d, mode, pow2=pow2)
        for axis, backend in itertools.product((0, 1), ("reference", "vendor")):
            whole = operand.quantize_weight(w, spec, torch.float32, backend)
            given = amax.clone()
            got = operand.quantize_weight(w.narrow(axis, 16, 16), spec, torch.float32, backend, given)
            assert same_codes(got, part_of(whole, axis, two_d)), (shape, pow2, axis, backend)
            assert same_bits(given, amax) and got.amax.data_ptr() != given.data_ptr()
            assert same_codes(operand.quantize_weight(w, spec, torch.float32, backend, amax), whole)


def negated(shape, device="cpu"):
    """A weight whose memory holds its values with the other sign, as complex layers compute theirs."""
    w = torch.complex(values(shape, "normal", seed=1), values(shape, "normal", seed=2)).to(device).conj().imag
    assert w.is_neg()
    return w


@pytest.mark.parametrize("backend", ["reference", "vendor", "mxfp4", "nvfp4_ue5m3", "fp4_e4m3_only"])
@pytest.mark.parametrize("two_d", [True, False])
def test_weights_whose_sign_is_a_bit_of_the_tensor(two_d, backend):
    w, spec = negated((32, 48, 3)), WeightSpec(1, PACKED, NONE if two_d else PACKED, two_d)
    found = operand.quantize_weight(w, spec, torch.float32, backend)
    expected = operand.quantize_weight(w.clone(), spec, torch.float32, backend)
    assert all(map(same_bits, found.flat(), expected.flat()))


@pytest.mark.parametrize("backend", ["reference", "vendor"])
def test_quantize_weight_with_a_given_amax_passes_opcheck(backend):
    w = values((32, 24, 3, 3))
    for two_d, row, col in ((True, PACKED, NONE), (False, PACKED, PACKED), (False, NONE, DEQUANTIZED)):
        args = (w, WeightSpec(2, row, col, two_d).to_ints(), torch.float32, backend, torch.tensor([9.0]))
        torch.library.opcheck(torch.ops.te_nvfp4_cv.quantize_weight.default, args)
