"""formats.py and the layouts beside it: every E2M1 midpoint and E4M3 byte, rounding, packing, RHT, Philox, scales."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from te_nvfp4_cv import formats
from te_nvfp4_cv.tensor import layouts
from tests import oracle

FLOATS = st.floats(width=32, allow_nan=True, allow_infinity=True, allow_subnormal=True)


def f32(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)


def all_codes() -> torch.Tensor:
    return torch.arange(16, dtype=torch.uint8)


# ---- E2M1 -----------------------------------------------------------------------------------------------------------


def test_decode_e2m1_all_codes():
    expected = f32([*oracle.E2M1, *(-v for v in oracle.E2M1)])
    assert torch.equal(formats.decode_e2m1(all_codes()).view(torch.int32), expected.view(torch.int32))  # -0.0 too


def test_encode_e2m1_inverts_decode():
    assert torch.equal(formats.encode_e2m1(formats.decode_e2m1(all_codes())), all_codes())


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_encode_e2m1_midpoints_and_their_neighbours(sign):
    table = np.array(oracle.E2M1, np.float32)
    middle = (table[1:] + table[:-1]) / 2
    points = np.concatenate([middle, np.nextafter(middle, np.float32(0)), np.nextafter(middle, np.float32(9))]) * sign
    expected = [oracle.encode_e2m1(p) for p in points]
    assert formats.encode_e2m1(torch.from_numpy(points.astype(np.float32))).tolist() == expected


def test_encode_e2m1_specials():
    nan = float("nan")
    minus_nan = torch.tensor([-4194304], dtype=torch.int32).view(torch.float32)
    tiny = 1e-45
    v = torch.cat((f32([0.0, -0.0, float("inf"), -float("inf"), nan, tiny, -tiny, 1e38, -1e38]), minus_nan))
    assert v[-1].isnan()
    assert formats.encode_e2m1(v).tolist() == [0, 8, 7, 15, 7, 0, 8, 7, 15, 7]


@settings(max_examples=300, deadline=None)
@given(FLOATS)
def test_encode_e2m1_equals_the_table_search(value):
    assert formats.encode_e2m1(f32([value])).item() == oracle.encode_e2m1(np.float32(value))


@given(st.lists(st.integers(0, 15), min_size=2, max_size=64).filter(lambda c: len(c) % 2 == 0))
def test_packing_round_trip(codes):
    codes_K = torch.tensor(codes, dtype=torch.uint8)
    packed = formats.pack_nibbles(codes_K)
    assert packed[0].item() == codes[0] + 16 * codes[1]  # the even element is the low nibble
    assert torch.equal(formats.unpack_nibbles(packed), codes_K)


# ---- E4M3 -----------------------------------------------------------------------------------------------------------


def test_all_256_e4m3_bytes():
    all_bytes = torch.arange(256, dtype=torch.uint8)
    values = all_bytes.view(torch.float8_e4m3fn).float()
    expected = f32([oracle.e4m3_value(b) for b in range(256)])
    assert torch.equal(values.nan_to_num(nan=-1e9), expected.nan_to_num(nan=-1e9))
    again = formats.to_e4m3(values[:0x7F]).view(torch.uint8)
    assert torch.equal(again, all_bytes[:0x7F])


def test_to_e4m3_midpoints_and_saturation():
    table = np.array(oracle.E4M3, np.float32)
    middle = (table[1:] + table[:-1]) / 2  # exact in fp32, subnormal ones too
    points = np.concatenate([middle, np.nextafter(middle, np.float32(0)), np.nextafter(middle, np.float32(1e9))])
    points = np.concatenate([points, np.float32([448, 449, 464, 480, 1e30, np.inf, np.nan, 1e-45, 2**-10])])
    expected = [oracle.encode_e4m3(p) for p in points]
    got = formats.to_e4m3(torch.from_numpy(points.astype(np.float32))).view(torch.uint8)
    assert got.tolist() == expected
    assert int(got.max()) == 0x7E


# ---- the scale chain ------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(st.floats(width=32, min_value=0, allow_infinity=True, allow_subnormal=True), st.sampled_from([448, 256]))
def test_encode_scale_equals_the_oracle(amax, e4m3_max):
    got = formats.encode_scale(f32([amax]), e4m3_max).item()
    assert got == oracle.encode_scale(np.float32(amax), e4m3_max)


@pytest.mark.parametrize("amax", [0.0, float("inf"), float("nan")])
def test_encode_scale_is_one_without_a_usable_amax(amax):
    assert formats.encode_scale(f32([amax])).item() == 1.0


def test_encode_multiplier_of_a_zero_scale_is_finite():
    enc = formats.encode_multiplier(formats.to_e4m3(f32([0.0])), f32([1.0]))
    assert enc.item() == formats.FLT_MAX


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("other", [0.0, 1.0])
def test_alpha_is_not_finite_when_an_amax_is_not(bad, other):
    assert not formats.alpha(f32([bad]), f32([other])).isfinite().any()
    assert not formats.alpha(f32([other]), f32([bad])).isfinite().any()


def test_code_times_scale_is_exact_in_bf16():
    codes = formats.pack_nibbles(all_codes()).repeat(0x7F, 1)
    scale = torch.arange(0x7F, dtype=torch.uint8).unsqueeze(1).view(torch.float8_e4m3fn)
    v = formats.decode_blocks(codes, scale)
    assert torch.equal(v.bfloat16().float(), v)


# ---- RHT ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_sign", [True, False])
def test_rht_is_the_matrix_and_is_orthogonal(with_sign):
    R = torch.from_numpy(oracle.hadamard16(with_sign))
    eye = torch.eye(16)
    assert torch.equal(formats.rht16(eye, with_sign).double(), R)
    assert torch.equal(R @ R.T, torch.eye(16, dtype=torch.float64))
    x = torch.randn(50, 16)
    assert torch.allclose(formats.rht16(x, with_sign).double(), x.double() @ R, atol=1e-6)
    assert torch.allclose(formats.inverse_rht16(formats.rht16(x, with_sign), with_sign), x, atol=1e-6)


def test_rht_rounds_bf16_inputs_only():
    x = torch.randn(64, 16)
    assert formats.rht16(x).dtype == formats.rht16(x.half()).dtype == torch.float32
    y = formats.rht16(x.bfloat16())
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, formats.rht16(x.bfloat16().float()).bfloat16())


# ---- random bits and stochastic rounding ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # the known answers of Random123's kat_vectors
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter, key, expected):
    words = formats.philox_words(tuple(torch.tensor([c]) for c in counter), key)
    assert tuple(int(w) for w in words) == expected


def test_philox_bytes_counter_and_key():
    index = torch.tensor([0, 5 + (7 << 32)])
    seed = torch.tensor(-(2**40) + 3)
    got = formats.philox4x32(seed, index, 1)
    key = (int(seed) & 0xFFFFFFFF, (int(seed) >> 32) & 0xFFFFFFFF)
    counter = tuple(torch.tensor([c]) for c in (5, 7, 1, 0))
    words = [int(w) for w in formats.philox_words(counter, key)]
    assert got[1].tolist() == [(words[i // 4] >> (8 * (i % 4))) & 255 for i in range(16)]
    assert torch.equal(got, formats.philox4x32(int(seed), index, 1))
    assert not torch.equal(got, formats.philox4x32(seed, index, 0))


@settings(max_examples=300, deadline=None)
@given(FLOATS, st.integers(0, 255))
def test_stochastic_rounding_takes_a_neighbour(value, r):
    v = f32([value])
    code = formats.encode_e2m1_stochastic(v, torch.tensor([r], dtype=torch.uint8))
    if v.isnan():
        assert code.item() == 7
        return
    assert (code.item() >= 8) == bool(torch.signbit(v).item())
    a = min(float(v.abs()), 6.0)
    below = max(t for t in oracle.E2M1 if t <= a)
    above = min(t for t in oracle.E2M1 if t >= a)
    assert oracle.E2M1[code.item() & 7] in (below, above)


def test_stochastic_rounding_counts():
    """Of the 256 values of the random byte, exactly ceil(256 * fraction) - ties aside - round up: unbiased to 2^-8."""
    r = torch.arange(256, dtype=torch.int64).to(torch.uint8)
    table = oracle.E2M1
    for low, high in zip(table[:-1], table[1:], strict=True):
        for k in (0, 1, 37, 128, 255):
            v = low + (high - low) * k / 256
            codes = formats.encode_e2m1_stochastic(torch.full((256,), v), r)
            assert int((formats.decode_e2m1(codes) == high).sum()) == k
    assert (formats.encode_e2m1_stochastic(torch.full((256,), 1e30), r) == 7).all()
    assert (formats.encode_e2m1_stochastic(torch.full((256,), -float("inf")), r) == 15).all()


def test_stochastic_rounding_is_unbiased_within_4_sigma():
    n_blocks = 4000
    random = formats.philox4x32(1234, torch.arange(n_blocks), 0).flatten()
    for value in (0.1, 0.3, 1.2, 2.7, -3.3, -5.5):
        v = torch.full((16 * n_blocks,), value)
        q = formats.decode_e2m1(formats.encode_e2m1_stochastic(v, random)).double()
        sigma = float(q.std()) / len(v) ** 0.5
        step = float(q.max() - q.min())
        assert abs(float(q.mean()) - value) <= 4 * sigma + step * 2**-8


# ---- layouts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e4m3fn])
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (128, 4), (130, 9)])
def test_swizzle_offsets(rows, cols, dtype):
    scale = torch.randint(0, 0x7F, (rows, cols), dtype=torch.uint8).view(dtype)
    padded = layouts.pad_scales(scale)
    R, C = padded.shape
    assert R % 128 == C % 4 == 0 and padded.dtype == dtype
    assert torch.equal(padded.view(torch.uint8)[:rows, :cols], scale.view(torch.uint8))
    assert int(padded.view(torch.uint8).int().sum()) == int(scale.view(torch.uint8).int().sum())  # zeros elsewhere
    swizzled = layouts.swizzle_scales(padded)
    flat = swizzled.view(torch.uint8).flatten()
    for r in range(0, R, 7):
        for c in range(C):
            offset = ((r // 128 * (C // 4) + c // 4) * 32 + r % 32) * 16 + (r % 128) // 32 * 4 + c % 4
            assert flat[offset] == padded.view(torch.uint8)[r, c]
    assert torch.equal(layouts.unswizzle_scales(swizzled).view(torch.uint8), padded.view(torch.uint8))


def offset_in(rows: int, cols: int, r: int, c: int) -> int:
    """Where cuBLAS reads the scale of row r and column c of one matrix with padded [rows, cols] scales."""
    assert r < rows and c < cols and rows % 128 == cols % 4 == 0
    return ((r // 128 * (cols // 4) + c // 4) * 32 + r % 32) * 16 + (r % 128) // 32 * 4 + c % 4


@pytest.mark.parametrize("axis", [0, 1], ids=["rows", "columns"])
def test_scales_of_experts_are_swizzled_group_by_group(axis):
    """As single matrices, one behind the other in memory; a group without scales takes no memory."""
    scale = torch.randint(1, 0x7F, (140, 21) if axis else (300, 9), dtype=torch.uint8)
    ends = torch.tensor([3, 3, 12, 21] if axis else [1, 129, 129, 300])
    function = layouts.swizzle_column_groups if axis else layouts.swizzle_row_groups
    swizzled, starts = function(scale.view(torch.float8_e4m3fn), ends)
    assert swizzled.dtype == torch.float8_e4m3fn
    memory, seen, begin, first = swizzled.view(torch.uint8).flatten(), 0, 0, 0
    for end, start in zip(ends.tolist(), starts.tolist(), strict=True):
        part = scale[:, begin:end] if axis else scale[begin:end]
        rows, cols = -(-part.shape[0] // 128) * 128, -(-part.shape[1] // 4) * 4
        assert start * (rows if axis else cols) == first
        for r in range(0, part.shape[0], 7):
            for c in range(part.shape[1]):
                assert memory[first + offset_in(rows, cols, r, c)] == part[r, c]
        begin, first, seen = end, first + rows * cols, seen + int(part.int().sum())
    assert memory.numel() == first and int(memory.int().sum()) == seen == int(scale.int().sum())


def test_scales_of_a_stack_of_weights_are_swizzled_one_by_one():
    scale = torch.randint(0, 0x7F, (3, 130, 5), dtype=torch.uint8)
    swizzled = layouts.swizzle_stack(scale)
    assert swizzled.shape == (3, 256, 8) and swizzled.is_contiguous()
    for part, made in zip(scale, swizzled, strict=True):
        assert torch.equal(layouts.unswizzle_scales(made)[:130, :5], part)


@pytest.mark.parametrize("spatial", [(), (3,), (2, 5), (2, 3, 4)])
def test_ntile_round_trip(spatial):
    batch, channels = 32, 5
    pixels = int(np.prod(spatial))
    data = torch.randint(0, 256, (channels, pixels * batch // 2), dtype=torch.uint8)
    scale = torch.randint(0, 0x7F, (channels, pixels * batch // 16), dtype=torch.uint8).view(torch.float8_e4m3fn)
    tiles, tile_scales = layouts.te_to_ntile(data, scale, spatial, batch)
    assert tiles.shape == (2, *spatial, channels, 8) and tile_scales.shape == (2, *spatial, channels)
    last = tuple(n - 1 for n in spatial)
    assert torch.equal(tiles[(1, *last, 3)], data[3, -8:])  # images 16..31 at the last pixel
    back, back_scale = layouts.ntile_to_te(tiles, tile_scales)
    assert torch.equal(back, data)
    assert torch.equal(back_scale.view(torch.uint8), scale.view(torch.uint8))


def test_functions_run_under_torch_compile():
    def chain(x):
        amax = x.abs().amax().reshape(1)
        s_enc = formats.encode_scale(amax)
        s_b = formats.block_scale(formats.blocks(x).abs().amax(-1), s_enc)
        enc = formats.encode_multiplier(s_b, s_enc)
        codes = formats.encode_e2m1((formats.blocks(x) * enc.unsqueeze(-1)).flatten(-2))
        return formats.pack_nibbles(codes), s_b, formats.dequantize(formats.pack_nibbles(codes), s_b, amax)

    x = torch.randn(8, 64)
    x[0, :3] = f32([-0.0, 0.0, -1e-30])
    for got, expected in zip(torch.compile(chain, backend="aot_eager", fullgraph=True)(x), chain(x), strict=True):
        assert torch.equal(got.view(torch.uint8), expected.view(torch.uint8))
