"""The specification of a quantized convolution: gather packed codes into im2col matrices, and multiply them with the
TE-style quantized GEMM.

    fprop  y[(pixel, image), o]     = sum over (tap, block of c)    x_col rowwise . w rowwise
    dgrad  dx[(pixel, image), c]    = sum over (tap, block of o)    dy_col rowwise . w columnwise, transposed tap by tap
    wgrad  dw[o, (tap, c)]          = sum over (pixel, 16 images)   dy columnwise . x_col columnwise

Quantization commutes with im2col because blocks lie on an index that im2col only gathers (docs/NUMERICS.md), so that
no value is rounded here. An operand is a tuple of parts that are gathered alike, (codes, scale bytes). With
quantization off it is (values,), and the same gathering gives the convolution itself, in any dtype. The last axis of a
part, k, is what it holds of the contraction. A transposed convolution exchanges fprop and dgrad. Groups are multiplied
one after the other. Nothing is checked here; the caller has done so.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from te_nvfp4_cv import formats
from te_nvfp4_cv.formats import BLOCK
from te_nvfp4_cv.ops.gemm import reference as gemm
from te_nvfp4_cv.ops.geometry import ConvGeometry, pixel_map
from te_nvfp4_cv.ops.records import Face

Parts = tuple[Tensor, ...]  # (codes, scale bytes), or (values,) with quantization off


def gather(flat: Tensor, pixels: Tensor) -> Tensor:
    """Gather flat [pixels in, ...] to [pixels out, taps, ...]; index -1 reads zeros (code 0, scale byte 0)."""
    padded = F.pad(flat, (0, 0) * (flat.dim() - 1) + (0, 1))  # a last row of zeros, which index -1 picks
    return padded[pixels.to(flat.device)]


def multiply(a: Parts, b: Parts) -> Tensor:
    """Multiply a [I, L] by b [J, L] transposed, without tensor scales: the quantized GEMM, or the plain one for plain
    values.
    """
    if len(a) == 1:
        return a[0] @ b[0].t()
    return gemm.multiply(a[0], _scales(a[1]), b[0], _scales(b[1]))


def _scales(part: Tensor) -> Tensor:
    """Return scales as numbers: bytes are E4M3, and what other formats bring are values."""
    return part.contiguous().view(torch.float8_e4m3fn) if part.dtype == torch.uint8 else part


def data_product(operand: Parts, kernel: Parts, geometry: ConvGeometry, to_b: bool) -> Tensor:
    """Return fprop or dgrad before alpha, [B, *image, channels]; rows gather from a to b (`to_b`), or back.

    Args:
        operand: rowwise, parts [B, *image, G * k].
        kernel: blocks along the operand's channels; parts [axis 0, T, k] for `to_b`, else [G, Ob, T, axis 1, k].
    """
    matrix = _kernel_rows if to_b else _kernel_columns
    image = geometry.b_size if to_b else geometry.a_size
    pixels = pixel_map(geometry, to_b)
    products = [
        multiply(
            tuple(_rows(part, pixels, geometry.groups, group) for part in operand),
            tuple(matrix(part, geometry.groups, group) for part in kernel),
        )
        for group in range(geometry.groups)
    ]
    return torch.cat(products, dim=1).reshape(*image, geometry.batch, -1).movedim(-2, 0)


def weight_product(b: Parts, a: Parts, geometry: ConvGeometry) -> Tensor:
    """Return wgrad before alpha, [axis 0, taps, axis 1].

    Args:
        b: columnwise operand of the b side, parts [N, *folded image, channels, k]: N times k folded images.
        a: columnwise operand of the a side, of the same form.
        geometry: of the call itself, not of the folded one.
    """
    # Gathering walks the folded images; channels and taps are those of the call itself.
    pixels, groups = pixel_map(geometry.folded, True), geometry.groups
    each_a, each_b = geometry.channels_a // groups, geometry.channels_b // groups
    a_flat, b_flat = (tuple(_pixels_first(part) for part in side) for side in (a, b))  # [pixels, channels, N * k]
    products = []
    for group in range(groups):
        of_a, of_b = slice(group * each_a, (group + 1) * each_a), slice(group * each_b, (group + 1) * each_b)
        rows = tuple(part[:, of_b].transpose(0, 1).flatten(1) for part in b_flat)  # [O, pixels * N * k]
        columns = tuple(
            gather(part[:, of_a], pixels).permute(1, 2, 0, 3).flatten(0, 1).flatten(1) for part in a_flat
        )  # [T * C, pixels * N * k]
        products.append(multiply(rows, columns).reshape(each_b, geometry.taps, each_a))
    return torch.cat(products)


def _rows(part: Tensor, pixels: Tensor, groups: int, group: int) -> Tensor:
    """Form the im2col matrix of one group, [M, T * k] with rows M = (pixel, image), of a part [B, *image, G * k]."""
    flat = part.movedim(0, -2).reshape(-1, part.shape[0], groups, part.shape[-1] // groups)
    columns = gather(flat[:, :, group], pixels)  # [pixels out, taps, B, k]
    return columns.transpose(1, 2).flatten(0, 1).flatten(1)


def _kernel_rows(part: Tensor, groups: int, group: int) -> Tensor:
    """Return one group of a part [axis 0, T, k] as [each, T * k]: the second operand where rows gather from a to b."""
    each = part.shape[0] // groups
    return part[group * each : (group + 1) * each].flatten(1)


def _kernel_columns(part: Tensor, groups: int, group: int) -> Tensor:
    """Return one group of a part [G, Ob, T, axis 1, k] as [axis 1, T * Ob * k]: the second operand where rows gather
    from b to a.
    """
    return part[group].permute(2, 1, 0, 3).flatten(1)


def _pixels_first(part: Tensor) -> Tensor:
    """Return a columnwise part [N, *image, C, k] as [pixels, C, N * k]."""
    image = part.movedim(0, -2)  # [*image, C, N, k]
    return image.reshape(-1, image.shape[-3], image.shape[-2] * image.shape[-1])


# ---- packed operands as parts ---------------------------------------------------------------------------------------


def _packed_kernel(kernel: Face, geometry: ConvGeometry, to_b: bool) -> Parts:
    """Return the packed face of a kernel that data_product multiplies, with scales repeated over their 16x16 tiles.

    With 16x16 scales both faces are the rowwise one: nibbles and tile scales are transposed here.
    """
    groups, (w, scale) = geometry.groups, kernel
    if to_b:
        if scale.dim() == 4:
            scale = scale.repeat_interleave(BLOCK, dim=1)[:, : w.shape[0] // groups].flatten(0, 1)
        return w, scale
    if w.dim() != 5:
        w, scale = formats.transpose_kernel(w, scale, geometry.channels_a // groups, groups)
    return w, scale.unsqueeze(-1)


# ---- the three GEMMs ------------------------------------------------------------------------------------------------


def fprop(
    x: Face, w: Face, alpha: Tensor | None, bias: Tensor | None, geometry: ConvGeometry, dtype: torch.dtype
) -> Tensor:
    """Run the operator conv_fprop."""
    to_b = not geometry.transposed
    y = _scaled(data_product(x, _packed_kernel(w, geometry, to_b), geometry, to_b), alpha)
    return (y if bias is None else y + bias.float()).to(dtype).contiguous()


def dgrad(dy: Face, w: Face, alpha: Tensor | None, geometry: ConvGeometry, dtype: torch.dtype) -> Tensor:
    """Run the operator conv_dgrad."""
    to_b = geometry.transposed
    dx = _scaled(data_product(dy, _packed_kernel(w, geometry, to_b), geometry, to_b), alpha)
    return dx.to(dtype).contiguous()


def wgrad(dy: Face, x: Face, alpha: Tensor | None, geometry: ConvGeometry, dtype: torch.dtype) -> Tensor:
    """Run the operator conv_wgrad."""
    b, a = (x, dy) if geometry.transposed else (dy, x)
    dw = weight_product((b.data, b.scale.unsqueeze(-1)), (a.data, a.scale.unsqueeze(-1)), geometry)
    if alpha is not None and alpha.numel() != 1:  # one factor a channel of x, which lies on axis 0 if transposed
        alpha = alpha.view(-1, 1, 1) if geometry.transposed else alpha
    return _scaled(dw, alpha).to(dtype)


def _scaled(product: Tensor, alpha: Tensor | None) -> Tensor:
    return product if alpha is None else product * alpha
