"""Weights quantized in parts: the codes and scales of the whole, bit for bit, wherever they are cut."""

from __future__ import annotations

import pytest
import torch

from te_nvfp4_cv import formats
from te_nvfp4_cv.ops.quantize import operand, weight_shards
from te_nvfp4_cv.ops.records import PACKED, WeightSpec
from tests.helpers import KINDS, same_bits, values


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pow2", [False, True])
@pytest.mark.parametrize(
    ("shape", "groups", "cuts"),
    [
        ((32, 16, 3, 3), 1, (16,)),
        ((32, 40, 3, 3), 1, (8, 16, 24)),
        ((48, 17), 1, (5, 5, 47)),
        ((64, 20, 1, 3), 2, (20, 33, 40)),
        ((36, 16, 2), 2, (17, 18)),
        ((16, 16, 3, 3), 1, ()),
    ],
)
def test_parts_are_the_whole(kind, pow2, shape, groups, cuts):
    dtype = torch.float32
    w = values(shape, kind, dtype)
    n = shape[0]
    expected = operand.quantize_weight(w, WeightSpec(groups, PACKED, pow2=pow2), torch.float32, "reference")
    bounds = list(zip((0, *cuts), (*cuts, n), strict=True))
    tiles = torch.stack([weight_shards.tile_amaxes(w[a:b], a, n, groups) for a, b in bounds]).amax(0)
    amax = tiles.amax().reshape(1)
    amax = formats.power_of_two_amax(amax) if pow2 else amax
    scales = weight_shards.tile_scales(tiles, amax)
    codes = torch.cat([weight_shards.quantize_rows(w[a:b], a, n, groups, scales, amax) for a, b in bounds])
    assert same_bits(amax, expected.amax) and same_bits(scales, expected.row.scale)
    assert same_bits(codes, expected.row.data)


def test_bf16_weights():
    w = values((32, 16, 3, 3), "wide", torch.bfloat16)
    expected = operand.quantize_weight(w, WeightSpec(1, PACKED), torch.float32, "vendor")
    tiles = weight_shards.tile_amaxes(w, 0, 32, 1)
    amax = tiles.amax().reshape(1)
    scales = weight_shards.tile_scales(tiles, amax)
    assert same_bits(weight_shards.quantize_rows(w, 0, 32, 1, scales, amax), expected.row.data)
    assert same_bits(scales, expected.row.scale)
