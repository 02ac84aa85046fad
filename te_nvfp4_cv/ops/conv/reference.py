"""The specification of a quantized convolution: packed codes are gathered into im2col matrices, and the TE-style quantized GEMM multiplies them.

    fprop  y[(pixel, image), o]     = sum over (tap, block of c)    x_col rowwise . w rowwise
    dgrad  dx[(pixel, image), c]    = sum over (tap, block of o)    dy_col rowwise . w columnwise, transposed tap by tap
    wgrad  dw[o, (tap, c)]          = sum over (pixel, 16 images)   dy columnwise . x_col columnwise

Quantization commutes with im2col because blocks lie on an index that im2col only gathers (DESIGN.md section 1): no value is rounded here.
A transposed convolution exchanges fprop and dgrad. Groups are multiplied one after the other. Refuses nothing: its caller has checked.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from te_nvfp4_cv.ops.gemm import reference as gemm
from te_nvfp4_cv.ops.geometry import ConvGeometry, pixel_map

BLOCK = 16


def gather(flat: Tensor, pixels: Tensor) -> Tensor:
    """flat [pixels in, ...] -> [pixels out, taps, ...]; index -1 reads zeros (code 0, scale byte 0)."""
    padded = F.pad(flat, (0, 0) * (flat.dim() - 1) + (0, 1))
    return padded[pixels.to(flat.device)]


def _multiply(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor) -> Tensor:
    """The quantized GEMM of two matrices whose scales are bytes."""
    fp8 = torch.float8_e4m3fn
    return gemm.multiply(a, a_scale.contiguous().view(fp8), b, b_scale.contiguous().view(fp8))


def _by_group(data: Tensor, scale: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Packed rowwise operand [B, *image, G * Kb * 8] and its scales as [pixels, B, G, Kb * 8] and [pixels, B, G, Kb]."""
    batch = data.shape[0]
    shape = (-1, batch, groups)
    return data.movedim(0, -2).reshape(*shape, data.shape[-1] // groups), scale.movedim(0, -2).reshape(
        *shape, scale.shape[-1] // groups
    )


def _rows(data: Tensor, scale: Tensor, geometry: ConvGeometry, to_b: bool, group: int) -> tuple[Tensor, Tensor]:
    """The im2col matrix of one group: data [M, T * Kb * 8], scale [M, T * Kb], rows M = (pixel, image)."""
    pixels = pixel_map(geometry, to_b)
    out = []
    for part in _by_group(data, scale, geometry.groups):
        columns = gather(part[:, :, group], pixels)  # [pixels out, taps, B, k]
        out.append(columns.transpose(1, 2).flatten(0, 1).flatten(1))
    return out[0], out[1]


def _kernel_rows(w: Tensor, scale: Tensor, geometry: ConvGeometry, group: int) -> tuple[Tensor, Tensor]:
    """Rowwise kernel of one group as the second operand of fprop: [axis 0, T * Kb * 8] and scales."""
    each = w.shape[0] // geometry.groups
    data = w[group * each : (group + 1) * each]
    if scale.dim() == 4:
        rows = scale[group].repeat_interleave(BLOCK, dim=0)[:each]
    else:
        rows = scale[group * each : (group + 1) * each]
    return data.flatten(1), rows.flatten(1)


def _kernel_columns(w: Tensor, scale: Tensor, geometry: ConvGeometry, group: int) -> tuple[Tensor, Tensor]:
    """Columnwise kernel of one group as the second operand of dgrad: [axis 1, T * Ob * 8], blocks along axis 0.

    With 16x16 scales it is the rowwise one transposed: nibbles and tile scales.
    """
    if w.dim() == 5:  # [G, Ob, T, axis 1, 8]
        return w[group].permute(2, 1, 0, 3).flatten(1), scale[group].permute(2, 1, 0).flatten(1)
    each, channels = w.shape[0] // geometry.groups, geometry.channels_a // geometry.groups
    part = w[group * each : (group + 1) * each]
    codes = torch.stack((part & 15, part >> 4), dim=-1).flatten(-2)  # [axis 0, T, Kp]
    codes = F.pad(codes, (0, 0, 0, 0, 0, -each % BLOCK))[..., :channels].permute(2, 1, 0)  # [axis 1, T, Op]
    data = codes[..., 0::2] | (codes[..., 1::2] << 4)
    tiles = scale[group].permute(2, 1, 0).repeat_interleave(BLOCK, dim=0)[:channels]  # [axis 1, T, Ob]
    return data.flatten(1), tiles.flatten(1)


def _data_gemm(a: Tensor, a_scale: Tensor, w: Tensor, w_scale: Tensor, geometry: ConvGeometry, to_b: bool) -> Tensor:
    """fp32 [B, *image, channels] before alpha: rows gather from a to b, or back."""
    kernel = _kernel_rows if to_b else _kernel_columns
    image = geometry.b_size if to_b else geometry.a_size
    parts = []
    for group in range(geometry.groups):
        parts.append(_multiply(*_rows(a, a_scale, geometry, to_b, group), *kernel(w, w_scale, geometry, group)))
    return torch.cat(parts, dim=1).reshape(*image, geometry.batch, -1).movedim(-2, 0)


def fprop(
    x: Tensor,
    x_scale: Tensor,
    w: Tensor,
    w_scale: Tensor,
    alpha: Tensor,
    bias: Tensor | None,
    geometry: ConvGeometry,
    dtype: torch.dtype,
) -> Tensor:
    """See conv_fprop."""
    y = _data_gemm(x, x_scale, w, w_scale, geometry, not geometry.transposed) * alpha
    return (y if bias is None else y + bias.float()).to(dtype).contiguous()


def dgrad(
    dy: Tensor, dy_scale: Tensor, w: Tensor, w_scale: Tensor, alpha: Tensor, geometry: ConvGeometry, dtype: torch.dtype
) -> Tensor:
    """See conv_dgrad."""
    return (_data_gemm(dy, dy_scale, w, w_scale, geometry, geometry.transposed) * alpha).to(dtype).contiguous()


def wgrad(
    dy: Tensor, dy_scale: Tensor, x: Tensor, x_scale: Tensor, alpha: Tensor, geometry: ConvGeometry, dtype: torch.dtype
) -> Tensor:
    """See conv_wgrad."""
    folded = geometry.folded()
    (a, a_scale), (b, b_scale) = (
        ((dy, dy_scale), (x, x_scale)) if geometry.transposed else ((x, x_scale), (dy, dy_scale))
    )
    pixels = pixel_map(folded, True)
    groups, out = geometry.groups, []
    a_flat, b_flat = _pixels_first(a, True), _pixels_first(b, True)  # [pixels, channels, N16 * 8]
    a_flat_s, b_flat_s = _pixels_first(a_scale, False), _pixels_first(b_scale, False)  # [pixels, channels, N16]
    each_a, each_b = geometry.channels_a // groups, geometry.channels_b // groups
    for group in range(groups):
        of_a, of_b = slice(group * each_a, (group + 1) * each_a), slice(group * each_b, (group + 1) * each_b)
        columns = [
            gather(part[:, of_a], pixels).permute(1, 2, 0, 3).flatten(0, 1).flatten(1) for part in (a_flat, a_flat_s)
        ]  # [T * C, pixels * N]
        rows = [part[:, of_b].transpose(0, 1).flatten(1) for part in (b_flat, b_flat_s)]  # [O, pixels * N]
        out.append(_multiply(rows[0], rows[1], columns[0], columns[1]).reshape(each_b, geometry.taps, each_a))
    dw = torch.cat(out)
    if alpha.numel() != 1:
        alpha = alpha.view(-1, 1, 1) if geometry.transposed else alpha
    return (dw * alpha).to(dtype)


def _pixels_first(part: Tensor, packed: bool) -> Tensor:
    """Columnwise operand [N16, *image, C, 8] (or its scales [N16, *image, C]) as [pixels, C, N16 * 8] (or [pixels, C, N16])."""
    if packed:
        image = part.movedim(0, -2)  # [*image, C, N16, 8]
        return image.reshape(-1, image.shape[-3], image.shape[-2] * image.shape[-1])
    image = part.movedim(0, -1)
    return image.reshape(-1, image.shape[-2], image.shape[-1])
