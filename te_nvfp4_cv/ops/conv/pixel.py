"""wgrad with blocks of 16 consecutive rows of the im2col matrix, `wgrad_block="pixel"`: the explicit lowering, for
ablation.

    rows M in the order (image, pixel);   x_col [M, T * C] and dy [M, O] are quantized columnwise, with RHT
    dw[o, (tap, c)] = alpha * sum over M of dy x_col

Here quantization does not commute with im2col: the matrix itself is quantized and kept, T times the size of the
image's codes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from te_nvfp4_cv.ops.conv.reference import gather
from te_nvfp4_cv.ops.gemm import reference as gemm
from te_nvfp4_cv.ops.geometry import ConvGeometry, pixel_map


def matrix(side: Tensor, geometry: ConvGeometry, is_a: bool) -> Tensor:
    """[M, columns] in high precision: the im2col matrix [M, T * C] of the a side, or the b side [M, O], M = (image, b
    pixel).
    """
    batch = side.shape[0]
    if not is_a:
        return side.reshape(-1, side.shape[-1])
    pixels_first = side.reshape(batch, -1, side.shape[-1]).transpose(0, 1)
    columns = gather(pixels_first, pixel_map(geometry, True))  # [pixels, taps, B, C]
    return columns.permute(2, 0, 1, 3).reshape(-1, geometry.taps * side.shape[-1])


def wgrad(
    b_data: Tensor,
    b_scale: Tensor,
    a_data: Tensor,
    a_scale: Tensor,
    alpha: Tensor,
    geometry: ConvGeometry,
    dtype: torch.dtype,
) -> Tensor:
    """dw [axis 0, taps, axis 1] from columnwise faces: b [O, Mp/2], a [T * C, Mp/2], scales float8_e4m3fn."""
    groups, each_a, each_b = (
        geometry.groups,
        geometry.channels_a // geometry.groups,
        geometry.channels_b // geometry.groups,
    )
    a_data, a_scale = (
        part.unflatten(0, (geometry.taps, groups, each_a)) for part in (a_data, a_scale.view(torch.uint8))
    )
    out = []
    for group in range(groups):
        rows = slice(group * each_b, (group + 1) * each_b)
        scale = a_scale[:, group].flatten(0, 1).contiguous().view(torch.float8_e4m3fn)
        out.append(
            gemm.multiply(b_data[rows], b_scale[rows], a_data[:, group].flatten(0, 1), scale).reshape(
                each_b, geometry.taps, each_a
            )
        )
    return (torch.cat(out) * alpha).to(dtype)
