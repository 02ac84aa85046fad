"""Tensor-parallel layers against the unsharded one: operands in every bit, results in every bit where ranks' parts are
not added, else within the rounding of these sums.
"""

from __future__ import annotations

import copy
import itertools
import warnings
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import parallelize_module

import te_nvfp4_cv as nv
from te_nvfp4_cv import errors
from tests.distributed.launch import Ranks, ranks_test
from tests.distributed.sharing import COLUMNS, PLAIN, ROWS, check, mesh, part, quiet, run
from tests.helpers import relative_error, values

# ---- layers ---------------------------------------------------------------------------------------------------------


def on_ranks_linear(ranks: Ranks) -> None:
    w = ranks.world
    x = values((16 * w, 48 * w), seed=1)
    layer = nn.Linear(48 * w, 32 * w)
    with quiet():
        for place in (Replicate(), Shard(0), Shard(1)):
            check(layer, COLUMNS(input_layouts=place), x, ranks, (place, Shard(1)))
            check(layer, ROWS(output_layouts=place), x, ranks, (Shard(1), place))
        x = values((2, 16 * w, 32 * w), seed=1)  # leading axes, of which the second is cut
        layer = nn.Linear(32 * w, 16 * w, bias=False)
        check(layer, COLUMNS(input_layouts=Shard(1)), x, ranks, (Shard(1), Shard(2)))
        check(layer, ROWS(output_layouts=Shard(1)), x, ranks, (Shard(2), Shard(1)))


def on_ranks_conv2d(ranks: Ranks) -> None:
    w = ranks.world
    x = values((16 * w, 16 * w, 6, 4 * w), seed=1)
    layer = nn.Conv2d(16 * w, 32 * w, 3, padding=1)
    with quiet():
        for place in (Replicate(), Shard(0), Shard(1), Shard(3)):
            check(layer, COLUMNS(input_layouts=place), x, ranks, (place, Shard(1)))
            check(layer, ROWS(output_layouts=place), x, ranks, (Shard(1), place))


def on_ranks_other_convolutions(ranks: Ranks) -> None:
    w = ranks.world
    cases = [
        (nn.Conv1d(16 * w, 16 * w, 5, stride=2, padding=2, dilation=2), (16 * w, 16 * w, 12)),
        (nn.Conv3d(16 * w, 16 * w, (1, 3, 3), stride=(1, 2, 2)), (16 * w, 16 * w, 2, 5, 5)),
        (nn.ConvTranspose2d(16 * w, 16 * w, 3, 2, padding=1, output_padding=1), (16 * w, 16 * w, 3, 3)),
        (nn.ConvTranspose1d(16 * w, 32 * w, 2, 2), (16 * w, 16 * w, 3)),
        (nn.Conv2d(16 * w, 16 * w, 2, padding="same"), (16 * w, 16 * w, 4, 4)),
        (nn.Conv2d(16 * w, 16 * w, 3, padding=1, padding_mode="circular"), (16 * w, 16 * w, 4, 4)),
        (nv.NVFP4Conv2d(16 * w, 16 * w, 1, recipe=PLAIN), (16 * w, 16 * w, 3, 3)),
    ]
    with quiet():
        for layer, shape in cases:
            x = values(shape, seed=1)
            check(layer, COLUMNS(input_layouts=Shard(0)), x, ranks, (Shard(0), Shard(1)))
            check(layer, ROWS(output_layouts=Shard(0)), x, ranks, (Shard(1), Shard(0)))


def on_ranks_images_cut_along_an_axis(ranks: Ranks) -> None:
    w = ranks.world
    layer = nn.Conv2d(16 * w, 16 * w, 3, padding=1)
    with quiet():
        for shape, place in (((16, 16 * w, 4 * w, 3), Shard(2)), ((5, 16 * w, 6, 2 * w), Shard(3))):  # 5: strips
            x = values(shape, seed=1)
            check(layer, COLUMNS(input_layouts=place), x, ranks, (place, Shard(1)))
            check(layer, ROWS(output_layouts=place), x, ranks, (Shard(1), place))
        transposed = nn.ConvTranspose2d(16 * w, 16 * w, 2, 2)
        x = values((16, 16 * w, 2 * w, 3), seed=1)
        check(transposed, COLUMNS(input_layouts=Shard(2)), x, ranks, (Shard(2), Shard(1)))
        check(transposed, ROWS(output_layouts=Shard(2)), x, ranks, (Shard(1), Shard(2)))


def on_ranks_blocks_that_would_be_cut_cross_in_high_precision(ranks: Ranks) -> None:
    w = ranks.world
    conv2d, wide = nn.Conv2d(16 * w, 16 * w, 3, padding=1), nn.Conv2d(24 * w, 24 * w, 1)
    linear, circular = nn.Linear(16 * w, 16 * w), nn.Conv2d(16 * w, 16 * w, 3, padding=1, padding_mode="circular")
    cases: list[tuple[nn.Module, tuple[int, ...], Any, str, str]] = [
        (conv2d, (8 * w, 16 * w, 4, 4), Shard(0), "8 images", "8 images"),
        (conv2d, (5, 16 * w, 2 * w, 3), Shard(2), "strips", "strips"),
        (wide, (16, 24 * w, 3, 3), Shard(1), "24 channels", "24 channels"),
        (linear, (2, 8 * w, 16 * w), Shard(1), "8 consecutive", "8 consecutive"),
        (circular, (16, 16 * w, 4, 2 * w), Shard(3), "padding", ""),
    ]
    for layer, shape, place, of_columns, of_rows in cases:
        x = values(shape, seed=1)
        bits = layer is not wide  # 24 channels on a rank have tiles of their own
        channels = Shard(2) if layer is linear else Shard(1)
        for style, places, why in (
            (COLUMNS(input_layouts=place), (place, channels), of_columns),
            (ROWS(output_layouts=place), (channels, place), of_rows),
        ):
            errors._warned.clear()
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                check(layer, style, x, ranks, places, operands=bits, tolerance=1e-5 if bits else 0.1)
            said = [str(c.message) for c in caught if "high precision" in str(c.message)]
            assert len(said) == (1 if why else 0) and all(why in text for text in said), (said, why)


def on_ranks_layouts_besides_the_defaults(ranks: Ranks) -> None:
    w = ranks.world
    x = values((16 * w, 16 * w, 4, 4), seed=1)
    layer = nn.Conv2d(16 * w, 16 * w, 3, padding=1)
    with quiet():
        for place in (Replicate(), Shard(0), Shard(2)):
            check(layer, COLUMNS(output_layouts=place), x, ranks, (Replicate(), place))
            check(layer, ROWS(input_layouts=place), x, ranks, (place, Replicate()))
        check(layer, COLUMNS(input_layouts=Shard(0), output_layouts=Shard(0)), x, ranks, (Shard(0), Shard(0)))
        check(layer, ROWS(input_layouts=Shard(-1), output_layouts=Shard(-4)), x, ranks, (Shard(3), Shard(0)))
    odd = values((16, 16 * w, 2 * w - 1, 4), seed=1)
    check(nn.Conv2d(16 * w, 16 * w, 1), ROWS(output_layouts=Shard(2)), odd, ranks, (Shard(1), Shard(2)))


def on_ranks_under_autocast(ranks: Ranks) -> None:
    """Codes are the unsharded layer's; sums of ranks err by no more than twice what its own bf16 results do."""
    w = ranks.world
    layer = nn.Conv2d(16 * w, 32 * w, 3, padding=1).to(ranks.device)
    x = values((16 * w, 16 * w, 4, 4), seed=1).bfloat16().float().to(ranks.device)
    dy = values((16 * w, 32 * w, 4, 4), seed=5).bfloat16().float().to(ranks.device)
    own, exact = (run(copy.deepcopy(layer), x, dy, PLAIN, dtype) for dtype in (torch.bfloat16, None))
    for style, places in (
        (COLUMNS(input_layouts=Shard(0)), (Shard(0), Shard(1))),
        (ROWS(output_layouts=Shard(0)), (Shard(1), Shard(0))),
    ):
        with quiet():
            check(layer, style, x, ranks, places, dtype=torch.bfloat16, tolerance=1e-2)
        model = parallelize_module(nn.Sequential(copy.deepcopy(layer)), mesh(ranks), {"0": style})
        got = run(model, part(x, places[0], ranks), part(dy, places[1], ranks), PLAIN, torch.bfloat16)
        for result, whole, truth, place in zip(got[:2], own[:2], exact[:2], places[::-1], strict=True):
            bound = 2 * relative_error(whole, truth)
            assert 0 < relative_error(result, part(truth, place, ranks)) <= bound


RECIPES = {
    "1x16": dict(disable_2d_quantization=True),
    "4over6": dict(nvfp4_4over6="weights", nvfp4_4over6_e4m3_use_256="weights"),
    "no rht": dict(disable_rht=True),
    "powers of two": dict(tensor_scale="delayed"),
    "wgrad in high precision": dict(high_precision_gemms=("wgrad",)),
    "fprop alone": dict(backward_override="high_precision"),
    "dequantized": dict(backward_override="dequantized"),
}


def on_ranks_recipes_and_backends(ranks: Ranks) -> None:
    w = ranks.world
    x = values((16 * w, 16 * w, 3, 3), seed=1)
    layer = nn.Conv2d(16 * w, 16 * w, 3, padding=1)
    pairs = (
        (COLUMNS(input_layouts=Shard(0)), (Shard(0), Shard(1))),
        (ROWS(output_layouts=Shard(0)), (Shard(1), Shard(0))),
    )
    for fields in RECIPES.values():
        recipe = nv.NVFP4BlockScaling(disable_stochastic_rounding=True, **fields)
        three = len(recipe.nvfp4_gemms) == 3
        with quiet() if three else nullcontext():
            for style, places in pairs:
                check(layer, style, x, ranks, places, recipe, operands=three)
    with quiet():
        for (style, places), backend in itertools.product(pairs, ("reference", "vendor")):  # "auto" may be integer
            check(layer, style, x, ranks, places, backend=backend)
            check(nn.Linear(16 * w, 16 * w), style, x[:, :, 0, 0], ranks, places, backend=backend)


test_on_ranks = ranks_test(globals(), four=("linear", "images_cut_along_an_axis"))


def test_a_layout_must_be_one():
    for style in (COLUMNS, ROWS):
        with pytest.raises(TypeError, match="layout"):
            style(input_layouts=0)
