"""The reference quantizer: against brute force, by its properties, at its edges, and its stochastic rounding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from te_nvfp4_cv import formats
from te_nvfp4_cv.ops.quantize import matrix as ops
from te_nvfp4_cv.ops.quantize import reference_matrix
from tests import oracle

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
INF, NAN = float("inf"), float("nan")


def quantize(x, **options):
    return reference_matrix.quantize_2d(x, **{"rowwise": True, "columnwise": True, **options})


def assert_same_bits(a: reference_matrix.Faces, b: reference_matrix.Faces) -> None:
    for name, first, second in zip(a._fields, a, b, strict=True):
        assert torch.equal(first.view(torch.uint8), second.view(torch.uint8)), name


def sample(rows: int, cols: int, dtype=torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, cols, generator=generator) * torch.exp(2 * torch.randn(rows, 1, generator=generator))
    return x.to(dtype)


# ---- against brute force --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "cols"), [(16, 32), (3, 17), (33, 16), (1, 1)])
def test_both_faces_equal_brute_force(rows, cols, dtype):
    x = sample(rows, cols, dtype)
    faces = quantize(x)
    for name, v in (("row", x.float()), ("col", x.float().t())):
        padded = np.pad(v.numpy(), ((0, 0), (0, -v.shape[1] % 16)))
        codes, scales, amax = oracle.quantize_rows(padded)
        data, scale, got_amax = (getattr(faces, f"{name}_{field}") for field in ("data", "scale", "amax"))
        assert np.array_equal(formats.unpack_nibbles(data).numpy(), codes)
        assert np.array_equal(scale.view(torch.uint8).numpy(), scales)
        assert got_amax.tolist() == [amax]


def test_2d_equals_brute_force_and_transposes():
    x = sample(40, 24)
    faces = quantize(x, two_d=True)
    padded = np.pad(x.numpy(), ((0, 8), (0, 8)))
    codes, scales, _ = oracle.quantize_rows(padded, tile_rows=16)
    assert np.array_equal(formats.unpack_nibbles(faces.row_data).numpy(), codes[:40])
    assert np.array_equal(faces.row_scale.view(torch.uint8).numpy(), scales[:40])
    assert np.array_equal(formats.unpack_nibbles(faces.col_data).numpy(), codes.T[:24])
    row, col = (t.view(torch.uint8) for t in (faces.row_scale, faces.col_scale))
    for tile_m in range(3):
        for tile_k in range(2):
            tile = col[16 * tile_k : 16 * tile_k + 16, tile_m]
            assert (tile == row[16 * tile_m, tile_k]).all()


@pytest.mark.parametrize("with_sign", [True, False])
def test_rht_face_is_the_quantized_rotation(with_sign):
    x = sample(40, 8).bfloat16()
    padded = np.pad(x.float().numpy(), ((0, 8), (0, 0))).T.astype(np.float64)
    rotated = torch.from_numpy((padded.reshape(8, 3, 16) @ oracle.hadamard16(with_sign)).reshape(8, 48))
    rotated = rotated.float().bfloat16().float()
    codes, scales, amax = oracle.quantize_rows(rotated.numpy())
    faces = quantize(x, rht=True, with_sign=with_sign)
    assert faces.col_amax.tolist() == [amax]
    assert np.array_equal(faces.col_scale.view(torch.uint8).numpy(), scales)
    assert np.array_equal(formats.unpack_nibbles(faces.col_data).numpy(), codes)
    assert faces.row_amax.item() == float(x.abs().max())  # the rowwise face is not rotated


def test_row_scaled_is_each_row_alone():
    x = sample(5, 48)
    faces = quantize(x, row_scaled=True)
    assert torch.equal(faces.row_amax, x.abs().amax(1)) and torch.equal(faces.col_amax, x.abs().amax(0))
    for m in range(5):
        one = quantize(x[m : m + 1], columnwise=False)
        assert torch.equal(faces.row_data[m], one.row_data[0])
        assert torch.equal(faces.row_scale[m].view(torch.uint8), one.row_scale[0].view(torch.uint8))


@pytest.mark.parametrize("mode", ["MAE", "MSE"])
@pytest.mark.parametrize("e4m3_max", [448, 256])
def test_four_over_six_picks_the_smaller_error(mode, e4m3_max):
    x = sample(32, 64)
    faces = quantize(x, columnwise=False, four_over_six=mode, e4m3_max=e4m3_max)
    amax = x.abs().amax().reshape(1)
    s_enc = formats.encode_scale(amax, e4m3_max)
    blocks = formats.blocks(x)
    candidates = []
    for scale in formats.four_over_six_scales(blocks.abs().amax(-1), s_enc):
        enc = formats.encode_multiplier(scale, s_enc)
        codes = formats.encode_e2m1((blocks * enc.unsqueeze(-1)).flatten(-2))
        v = formats.dequantize(formats.pack_nibbles(codes), scale, amax, e4m3_max)
        d = formats.blocks((v.double() - x.double()).abs())
        candidates.append((scale, (d if mode == "MAE" else d**2).sum(-1)))
    (s6, e6), (s4, e4) = candidates
    clear = (e4 - e6).abs() > 1e-5 * e6
    expected = torch.where(e4 < e6, s4.float(), s6.float())
    assert clear.float().mean() > 0.9
    assert torch.equal(faces.row_scale.float()[clear], expected[clear])
    assert 0 < int((e4 < e6).sum()) < e4.numel()


def test_four_over_six_2d_transposes():
    faces = quantize(sample(48, 32), two_d=True, four_over_six="MAE", e4m3_max=256)
    data, scale = formats.transpose_tiles(faces.row_data, faces.row_scale, 32)
    assert torch.equal(data, faces.col_data)
    assert torch.equal(scale.view(torch.uint8), faces.col_scale.view(torch.uint8))


# ---- properties -----------------------------------------------------------------------------------------------------

OPTIONS = [{}, {"rht": True}, {"two_d": True}, {"row_scaled": True}, {"four_over_six": "MAE", "e4m3_max": 256}]


@settings(max_examples=25, deadline=None)
@given(st.integers(-20, 20), st.sampled_from(OPTIONS), st.integers(0, 1000))
def test_scaling_by_a_power_of_two_leaves_codes_and_scales(k, options, seed):
    x = sample(20, 33, seed=seed)
    one, scaled = quantize(x, **options), quantize(x * 2.0**k, **options)
    for name in ("row_data", "row_scale", "col_data", "col_scale"):
        assert torch.equal(getattr(one, name).view(torch.uint8), getattr(scaled, name).view(torch.uint8)), name
    assert torch.equal(one.row_amax * 2.0**k, scaled.row_amax)


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(OPTIONS), st.integers(0, 1000))
def test_sign_symmetry(options, seed):
    x = sample(20, 32, seed=seed)  # no padding in K: a padded zero stays +0
    plus, minus = quantize(x, columnwise=False, **options), quantize(-x, columnwise=False, **options)
    assert torch.equal(plus.row_data ^ 0x88, minus.row_data)
    assert torch.equal(plus.row_scale.view(torch.uint8), minus.row_scale.view(torch.uint8))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 31), st.integers(0, 47), st.sampled_from([{}, {"rht": True}, {"two_d": True}]))
def test_a_perturbation_stays_inside_its_block(m, k, options):
    x = sample(32, 48, seed=3)
    x = x / x.abs().max()
    x[0, 0], x[16, 40] = 40.0, 40.0  # the tensor amax before and after RHT comes from elsewhere
    assume(not (m < 16 and k < 16) and not (m >= 16 and k >= 32))  # the amax blocks themselves
    y = x.clone()
    y[m, k] += 0.37
    a, b = quantize(x, **options), quantize(y, **options)
    rows = slice(m // 16 * 16, m // 16 * 16 + 16) if options.get("two_d") else slice(m, m + 1)
    columns = slice(k // 16 * 16, k // 16 * 16 + 16) if options.get("two_d") else slice(k, k + 1)
    for first, second, inside in (
        (a.row_data, b.row_data, (rows, slice(k // 16 * 8, k // 16 * 8 + 8))),
        (a.col_data, b.col_data, (columns, slice(m // 16 * 8, m // 16 * 8 + 8))),
    ):
        changed = first != second
        changed[inside] = False
        assert not changed.any()
    assert torch.equal(a.row_amax, b.row_amax) and torch.equal(a.col_amax, b.col_amax)


@pytest.mark.parametrize("make", [lambda x: x.t().contiguous().t(), lambda x: torch.stack((x, x), -1)[..., 0]])
@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_do_not_matter(make, dtype):
    x = sample(32, 48, dtype)
    assert not make(x).is_contiguous()
    assert_same_bits(quantize(x, rht=True), quantize(make(x), rht=True))


def test_quantizing_dequantized_values_changes_nothing():
    faces = quantize(sample(32, 64))
    x = formats.dequantize(faces.row_data, faces.row_scale, faces.row_amax)
    again = quantize(x, amax_rowwise=faces.row_amax)
    assert torch.equal(again.row_data, faces.row_data)
    assert torch.equal(again.row_scale.view(torch.uint8), faces.row_scale.view(torch.uint8))


def test_error_is_below_the_step():
    x = sample(64, 64)
    faces = quantize(x)
    error = (formats.dequantize(faces.row_data, faces.row_scale, faces.row_amax) - x).abs()
    block = formats.blocks(x).abs().amax(-1, keepdim=True).expand(-1, -1, 16).flatten(-2)
    # the largest step is 2 of 6, half of it is reached; the E4M3 scale is off by at most 2^-4, or 2^-10 of the tensor's
    assert bool((error <= block * (1 / 6 + 2**-4) + x.abs().max() / 448 * 2**-9).all())


# ---- edges ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_non_finite_values(bad, options):
    x = sample(32, 32)
    x[5, 7] = bad
    faces = quantize(x, **options)
    assert not faces.row_amax.isfinite().all() and not faces.col_amax.isfinite().all()
    for scale in (faces.row_scale, faces.col_scale):
        assert int(scale.view(torch.uint8).max()) <= 0x7E
    v = formats.dequantize(faces.row_data, faces.row_scale, faces.row_amax, options.get("e4m3_max", 448))
    assert not (v[5] if options.get("row_scaled") else v).isfinite().any()


def test_a_nan_block_has_the_largest_scale():
    x = sample(2, 32)
    x[1, 20] = NAN
    faces = quantize(x, columnwise=False)
    assert faces.row_amax.isnan().all()
    assert faces.row_scale.view(torch.uint8)[1, 1] == 0x7E
    assert formats.unpack_nibbles(faces.row_data)[1, 20] == 7


def test_zeros_and_negative_zeros():
    x = torch.zeros(16, 32)
    x[3] = -0.0
    faces = quantize(x)
    assert faces.row_amax.item() == faces.col_amax.item() == 0
    assert not faces.row_scale.view(torch.uint8).any()
    codes = formats.unpack_nibbles(faces.row_data)
    assert (codes[3] == 8).all() and (codes[:3] == 0).all()


def test_a_block_whose_scale_underflows_saturates():
    x = torch.zeros(1, 32)
    x[0, 0], x[0, 16], x[0, 17] = 1.0, 1e-9, -1e-9
    faces = quantize(x, columnwise=False)
    assert faces.row_scale.view(torch.uint8)[0, 1] == 0
    assert formats.unpack_nibbles(faces.row_data)[0, 16:18].tolist() == [7, 15]
    assert not formats.dequantize(faces.row_data, faces.row_scale, faces.row_amax)[0, 16:].any()


@pytest.mark.parametrize("value", [1e-45, 1e-40, 1.2e-38, 1e30, 3e38])
def test_subnormal_and_huge_tensors_keep_their_codes(value):
    x = torch.tensor([[1.0, -0.5, 0.25, 0.0] * 4, [0.01, -0.02, 0.03, -0.0] * 4]) * value
    codes, scales, amax = oracle.quantize_rows(x.numpy())
    faces = quantize(x, columnwise=False)
    assert faces.row_amax.tolist() == [amax] and amax > 0
    assert np.array_equal(faces.row_scale.view(torch.uint8).numpy(), scales)
    assert np.array_equal(formats.unpack_nibbles(faces.row_data).numpy(), codes)
    if value > 2e-38:  # below, FLT_MAX bounds what multiplies the elements
        assert codes[0, :4].tolist() == [7, 13, 3, 0]


@pytest.mark.parametrize("shape", [(0, 16), (16, 0), (0, 0), (0, 5)])
@pytest.mark.parametrize("options", [*OPTIONS, {"stochastic_rounding": True, "seed": 1}])
def test_empty_matrices(shape, options):
    faces = ops.quantize(torch.randn(shape), rowwise=True, columnwise=True, **options)
    M, K = shape
    assert faces.row_data.shape == (M, -(-K // 16) * 8) and faces.col_data.shape == (K, -(-M // 16) * 8)
    assert faces.row_scale.shape == (M, -(-K // 16)) and faces.col_scale.shape == (K, -(-M // 16))
    assert not faces.row_amax.any()


def test_given_amax_is_used_and_missing_faces_are_empty():
    x = sample(16, 16)
    amax = x.abs().max().reshape(1) * 3
    faces = quantize(x, columnwise=False, amax_rowwise=amax)
    assert torch.equal(faces.row_amax, amax) and faces.row_amax.data_ptr() != amax.data_ptr()
    assert faces.col_data.numel() == faces.col_scale.numel() == faces.col_amax.numel() == 0
    assert faces.col_scale.dtype == torch.float8_e4m3fn
    rotated = quantize(x, rowwise=False, rht=True, amax_columnwise=amax)
    assert torch.equal(rotated.col_amax, amax) and rotated.row_data.numel() == 0


# ---- stochastic rounding --------------------------------------------------------------------------------------------


def test_sr_is_reproducible_takes_neighbours_and_faces_differ():
    x = sample(32, 32)
    x = (x + x.t()) / 2  # symmetric: both faces see the same values
    options = {"stochastic_rounding": True}
    a, b = (quantize(x, seed=7, **options) for _ in range(2))
    assert_same_bits(a, b)
    other = quantize(x, seed=8, **options)
    assert not torch.equal(a.row_data, other.row_data)
    assert not torch.equal(a.row_data, a.col_data)
    nearest = quantize(x)
    assert torch.equal(a.row_scale.view(torch.uint8), nearest.row_scale.view(torch.uint8))
    magnitude = formats.unpack_nibbles(a.row_data).int() & 7
    assert int((magnitude - (formats.unpack_nibbles(nearest.row_data).int() & 7)).abs().max()) == 1


def test_sr_block_indices_are_those_of_the_scale_matrix():
    x = sample(20, 40)  # Kp/16 = 3, Mp/16 = 2
    seed = torch.tensor(99)
    index = torch.arange(20 * 3).reshape(20, 3)
    row = formats.philox4x32(seed, index, 0).reshape(20, 48)
    col = formats.philox4x32(seed, torch.arange(40 * 2), 1).reshape(40, 32)
    options = {"stochastic_rounding": True, "rht": True}
    given_bytes = quantize(x, random_rowwise=row, random_columnwise=col, **options)
    assert_same_bits(quantize(x, seed=seed, **options), given_bytes)


def test_sr_is_unbiased_within_4_sigma():
    x = sample(4, 32, seed=5)
    draws = []
    for seed in range(400):
        faces = quantize(x, columnwise=False, stochastic_rounding=True, seed=seed)
        draws.append(formats.dequantize(faces.row_data, faces.row_scale, faces.row_amax).double())
    draws_SMK = torch.stack(draws)
    # a block's own maximum can exceed 6 by the rounding of its scale: that clips, by design
    enc = formats.encode_multiplier(faces.row_scale, formats.encode_scale(faces.row_amax)).unsqueeze(-1)
    scaled = (formats.blocks(x) * enc).abs()
    inside = (scaled <= 6).flatten(-2)
    bias = (draws_SMK.mean(0) - x.double()).abs()
    step = (torch.where(scaled < 2, 0.5, torch.where(scaled < 4, 1.0, 2.0)) / enc).flatten(-2).double()
    limit = 4.5 * step / 2 / 400**0.5 + step * 2**-8 + x.abs() * 2**-20  # 128 elements: 4.5 sigma of the widest law
    assert bool((bias <= limit)[inside].all()) and int(inside.sum()) > 100
