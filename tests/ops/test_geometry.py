"""Pixel maps against the definition of convolution, folds against brute force, the rule for the number of strips."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from te_nvfp4_cv.ops.geometry import ConvGeometry, Fold, fold_factor, halo_rows, pixel_map
from te_nvfp4_cv.ops.quantize.reference import fold_images
from tests.helpers import make_geometry

CASES = [  # image, kernel, stride, padding, dilation
    ((7,), 3, 1, 1, 1),
    ((9,), 2, 3, 2, 2),
    ((6, 5), 3, 1, 1, 1),
    ((7, 4), (3, 1), (2, 1), (1, 0), 1),
    ((5, 6), (2, 3), 2, (1, 2), (2, 1)),
    ((4, 3, 5), (1, 3, 2), (1, 2, 1), (0, 1, 1), (1, 1, 2)),
    ((1, 1), 1, 1, 0, 1),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_pixel_maps_equal_the_definition(case):
    image, kernel, stride, padding, dilation = case
    geometry = make_geometry(2, (16, 16), image, kernel, stride, padding, dilation)
    read = [[-1] * geometry.taps for _ in range(math.prod(geometry.b_size))]
    written = [[-1] * geometry.taps for _ in range(math.prod(image))]
    for i, p in enumerate(itertools.product(*map(range, geometry.b_size))):
        for t, tap in enumerate(itertools.product(*map(range, geometry.kernel))):
            rows = zip(p, tap, geometry.stride, geometry.padding, geometry.dilation, strict=True)
            q = [p_ * s - pad + r * d for p_, r, s, pad, d in rows]
            if all(0 <= q_ < size for q_, size in zip(q, image, strict=True)):
                flat = 0
                for q_, size in zip(q, image, strict=True):
                    flat = flat * size + q_
                read[i][t], written[flat][t] = flat, i
    assert pixel_map(geometry, True).tolist() == read
    assert pixel_map(geometry, False).tolist() == written


def test_linear_layers_have_one_pixel_and_one_tap():
    geometry = ConvGeometry(20, 32, 16, (), (), (), (), (), (), (), 1, False)
    assert geometry.rank == 0 and geometry.taps == 1
    assert pixel_map(geometry, True).tolist() == pixel_map(geometry, False).tolist() == [[0]]
    assert geometry.folds == (Fold(1, 0, 1, 0, 32), Fold(1, 0, 1, 0, 32))
    assert geometry.folded.batch == 32


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_sizes_equal_torch_and_ints_round_trip(case, transposed):
    image, kernel, stride, padding, dilation = case
    g = make_geometry(2, (4, 6), image, kernel, stride, padding, dilation, groups=2, transposed=transposed)
    function = getattr(F, f"conv{'_transpose' if transposed else ''}{g.rank}d")
    w = torch.zeros(*((4, 3) if transposed else (6, 2)), *g.kernel)
    arguments = dict(stride=g.stride, padding=g.padding, dilation=g.dilation, groups=2)
    y = function(torch.zeros(2, 4, *image), w, **arguments)
    assert g.x_shape == (2, *image, 4) and g.y_shape == (2, *y.shape[2:], 6)
    assert g.weight_shape == (w.shape[0], g.taps, w.shape[1])
    assert ConvGeometry.from_ints(g.to_ints()) == g
    assert g.macs == 2 * math.prod(image if transposed else y.shape[2:]) * w.numel()


# ---- folds ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [*range(1, 21), 32])
@pytest.mark.parametrize(
    ("rows", "stride", "kernel", "dilation"), [(7, 1, 3, 1), (56, 2, 3, 1), (3, 1, 7, 2), (1, 1, 1, 1)]
)
def test_number_of_strips_is_the_rule(batch, rows, stride, kernel, dilation):
    def cost(g: int) -> int:
        halo = (math.ceil(rows / g) - 1) * stride + (kernel - 1) * dilation + 1
        return 16 * math.ceil(batch * g / 16) * halo

    g = fold_factor(batch, rows, stride, kernel, dilation)
    assert 1 <= g <= min(16, rows)
    if batch % 16 == 0:
        assert g == 1
    else:
        best = min(cost(k) for k in range(1, min(16, rows) + 1))
        assert cost(g) == best and all(cost(k) > best for k in range(1, g))


@pytest.mark.parametrize("batch", [1, 2, 3, 5, 8, 16, 20])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("transposed", [False, True])
def test_folded_images_are_the_strips_with_their_halo(batch, stride, transposed):
    g = make_geometry(batch, (3, 4), (9, 4), (3, 1), stride, (1, 0), (2, 1), transposed=transposed)
    a_fold, b_fold = g.folds
    folded = g.folded
    assert a_fold.images == b_fold.images == folded.batch and folded.batch % 16 == 0
    a, b = (torch.randn(batch, *size, 2) for size in (g.a_size, g.b_size))
    a_folded, b_folded = fold_images(a, a_fold), fold_images(b, b_fold)
    assert a_folded.shape == (folded.batch, *folded.a_size, 2) and b_folded.shape == (folded.batch, *folded.b_size, 2)
    strips = a_fold.strips
    strip = -(-g.b_size[0] // strips)
    for image in range(folded.batch):
        source, s = divmod(image, strips)
        for row in range(b_folded.shape[1]):
            at = s * strip + row
            inside = source < batch and at < g.b_size[0]
            assert torch.equal(b_folded[image, row], b[source, at] if inside else torch.zeros_like(b[0, 0]))
        for row in range(a_folded.shape[1]):
            at = s * strip * stride + row - (g.padding[0] if strips > 1 else 0)
            inside = source < batch and 0 <= at < g.a_size[0]
            assert torch.equal(a_folded[image, row], a[source, at] if inside else torch.zeros_like(a[0, 0]))
    if strips > 1:
        assert a_folded.shape[1] == halo_rows(strip, stride, 3, 2) and folded.padding == (0, 0)


def test_one_image_is_cut_into_as_many_strips_as_pay():
    assert make_geometry(1, (16, 16), (64, 64), 3, 1, 1).folds[0].strips == 16
    assert make_geometry(16, (16, 16), (64, 64), 3, 1, 1).folds[0].strips == 1
    assert make_geometry(1, (16, 16), (1, 64), (1, 3), 1, (0, 1)).folds[0].strips == 1
