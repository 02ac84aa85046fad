"""nv.functional.im2col: lowering packed codes gives, bit for bit, what quantizing the im2col matrix gives."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from te_nvfp4_cv.ops.quantize.matrix import quantize
from te_nvfp4_cv.tensor import im2col
from te_nvfp4_cv.tensor.quantizer import NVFP4Quantizer
from tests.helpers import same_bits, values


def unfolded(x: Tensor, kernel: tuple[int, ...], stride: Any, padding: Any, dilation: Any) -> Tensor:
    """[*out, B, taps * C] of x [*image, B, C], by slicing."""
    rank = len(kernel)
    stride, padding, dilation = ((v,) * rank if isinstance(v, int) else v for v in (stride, padding, dilation))
    x = F.pad(x, (0, 0, 0, 0, *[p for p in reversed(padding) for _ in (0, 1)]))
    out = [(x.shape[d] - dilation[d] * (kernel[d] - 1) - 1) // stride[d] + 1 for d in range(rank)]
    taps = []
    for tap in itertools.product(*map(range, kernel)):
        at = [t * d for t, d in zip(tap, dilation, strict=True)]
        taps.append(x[tuple(slice(a, a + (n - 1) * s + 1, s) for a, n, s in zip(at, out, stride, strict=True))])
    return torch.cat(taps, dim=-1)


@pytest.mark.parametrize("layout", ["te", "ntile"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("image", "kernel", "stride", "padding", "dilation"),
    [
        ((9,), (3,), 2, 1, 2),
        ((5, 6), (3, 3), 1, 1, 1),
        ((7, 6), (3, 2), (2, 3), (1, 0), (2, 1)),
        ((5, 5), (1, 1), 2, 0, 1),
        ((3, 4, 3), (2, 3, 1), (1, 2, 1), (1, 0, 0), 1),
    ],
)
def test_im2col_of_codes_is_the_code_of_im2col(image, kernel, stride, padding, dilation, dtype, layout):
    x = values((*image, 32, 16), "wide", dtype)
    t = NVFP4Quantizer(with_rht=True)(x).to_columnwise_layout(layout)
    lowered = im2col.im2col(t, kernel, stride, padding, dilation)
    matrix = unfolded(x, kernel, stride, padding, dilation)
    assert lowered.shape == matrix.shape and lowered.dtype == dtype and lowered.columnwise_rht
    faces = quantize(
        matrix.flatten(0, -2), columnwise=True, rht=True, amax_rowwise=t.amax_rowwise, amax_columnwise=t.amax_columnwise
    )
    assert same_bits(lowered.rowwise_data.flatten(0, -2), faces.row_data)
    assert same_bits(lowered.rowwise_scale_inv, faces.row_scale)
    data, scale = lowered.columnwise_te()
    assert same_bits(data, faces.col_data) and same_bits(scale, faces.col_scale)
    assert same_bits(lowered.amax_rowwise, t.amax_rowwise) and same_bits(lowered.amax_columnwise, t.amax_columnwise)


@pytest.mark.parametrize("face", ["rowwise", "columnwise"])
def test_im2col_of_one_face(face):
    x = values((5, 4, 16, 16))
    both = im2col.im2col(NVFP4Quantizer(with_rht=True)(x), 3, 1, 1)
    other = "columnwise" if face == "rowwise" else "rowwise"
    one = im2col.im2col(NVFP4Quantizer(with_rht=True, **{other: False})(x), 3, 1, 1)
    assert getattr(one, f"{other}_data") is None
    assert same_bits(getattr(one, f"{face}_data"), getattr(both, f"{face}_data"))


def test_im2col_refuses_what_it_cannot_lower():
    quantizer = NVFP4Quantizer()
    x = values((5, 4, 16, 16))
    with pytest.raises(TypeError, match="an NVFP4Tensor"):
        im2col.im2col(x, 3)
    for bad in (values((16, 16)), values((5, 4, 16, 24)), values((5, 4, 3, 16))):
        with pytest.raises(ValueError, match="multiple of 16"):
            im2col.im2col(quantizer(bad), 3)
    with pytest.raises(ValueError, match="larger than the image"):
        im2col.im2col(quantizer(x), 6)
    for wrong in (dict(kernel_size=0), dict(kernel_size=(3, 3, 3)), dict(kernel_size=3, stride=0)):
        with pytest.raises(ValueError, match="im2col: bad"):
            im2col.im2col(quantizer(x), **wrong)
