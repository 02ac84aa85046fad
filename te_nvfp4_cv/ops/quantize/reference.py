"""The specification of how convolution operands are quantized.

Each operand is permuted to TransformerEngine's matrix, quantized by reference_matrix.py, and permuted back:

    x [B, *image, C]  ->  x_MC, rows M in the order (image axes, batch), channels padded with zeros group by group
    w [axis 0, axis 1, *kernel]  ->  w_OK, K in the order (tap, channel)

Forms and shapes are those of operand.py. Plain torch, any device; nothing here is fast.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from te_nvfp4_cv import formats
from te_nvfp4_cv.formats import BLOCK
from te_nvfp4_cv.ops.quantize import reference_matrix
from te_nvfp4_cv.ops.records import (
    DEQUANTIZED,
    NONE,
    Face,
    Fold,
    Operand,
    OperandSpec,
    WeightCodes,
    WeightLayout,
    WeightSpec,
)


def fold_images(x: Tensor, fold: Fold) -> Tensor:
    """Return [images, rows, *image[1:], C] of x [B, *image, C]: strips with their halo, zero images at the end.

    Without image axes, zero rows are added at the end.
    """
    if fold.strips == 1 and (x.dim() == 2 or fold.rows == x.shape[1]):
        if fold.images == x.shape[0]:
            return x  # F.pad would copy it
        return F.pad(x, (0, 0) * (x.dim() - 1) + (0, fold.images - x.shape[0]))
    index = fold.source_rows(x.shape[0], x.shape[1]).to(x.device)
    flat = F.pad(x.flatten(0, 1), (0, 0) * (x.dim() - 2) + (0, 1))  # one row of zeros at the end, read by index -1
    return flat[index]


def pad_groups(x: Tensor, groups: int) -> Tensor:
    """Pad the channels of each group with zeros to a multiple of 16: [..., C] -> [..., G * Cp]."""
    grouped = x.unflatten(-1, (groups, x.shape[-1] // groups))
    return F.pad(grouped, (0, -grouped.shape[-1] % BLOCK)).flatten(-2)


def batch_last(x: Tensor) -> Tensor:
    """Move the batch before the channels: [B, *image, C] -> [*image, B, C]."""
    return x.movedim(0, -2)


def quantize_operand(
    x: Tensor, spec: OperandSpec, dtype: torch.dtype, seed: Tensor | None, amax: Tensor | None
) -> Operand:
    """Quantize as operand.quantize_operand does."""
    x_rows, empty = batch_last(x), x.new_empty(0, dtype=torch.uint8)
    row = col = Face(empty, torch.empty_like(empty))
    common: dict[str, Any] = dict(four_over_six=spec.four_over_six, e4m3_max=spec.e4m3_max, row_scaled=spec.row_scaled)
    common |= dict(stochastic_rounding=spec.stochastic, seed=seed)
    own = amax_of(x)
    # What is observed counts as 0 for a face that is not made, but without RHT both faces see x itself.
    seen_row = own if spec.row != NONE or not spec.rht else torch.zeros_like(own)
    seen_col, saturated = torch.zeros_like(own) if spec.rht else own, torch.zeros_like(own)
    used = amax
    if spec.pow2:
        used = formats.power_of_two_amax(measure_operand(x, spec) if amax is None else amax, spec.e4m3_max)
    row_amax, col_amax = (own, own) if used is None else (used[:1], used[1:])
    if spec.row != NONE:
        faces = reference_matrix.quantize_2d(
            pad_groups(x_rows, spec.groups).flatten(0, -2),
            rowwise=True,
            amax_rowwise=None if spec.row_scaled else row_amax,
            **common,
        )
        shape = tuple(x_rows.shape[:-1])
        parts = (faces.row_data, faces.row_scale.view(torch.uint8))
        # The matrix has its rows in the order (image axes, batch); a face has the batch first.
        row = Face(*(part.reshape(*shape, part.shape[-1]).movedim(-2, 0).contiguous() for part in parts))
        row_amax = faces.row_amax.reshape(shape).movedim(-1, 0).contiguous() if spec.row_scaled else faces.row_amax
        if amax is not None:
            saturated = saturated + saturated_blocks(pad_groups(x, spec.groups), row_amax, spec.e4m3_max)
    if spec.col != NONE:
        folded = batch_last(fold_images(x, spec.fold))  # [*image, N, C]
        # The amax of rotated columns, or of single rows, is found there.
        given = None if used is None and (spec.rht or spec.row_scaled) else col_amax
        faces = reference_matrix.quantize_2d(
            folded.flatten(0, -2),
            rowwise=False,
            columnwise=True,
            rht=spec.rht,
            amax_rowwise=None if spec.rht else given,
            amax_columnwise=given if spec.rht else None,
            **common,
        )
        shape = (x.shape[-1], *folded.shape[:-2], spec.fold.images // BLOCK)  # [C, *image, N16]
        data, scale = faces.col_data, faces.col_scale.view(torch.uint8)
        col = Face(
            # [C, *image, N16, 8] -> [N16, *image, C, 8]
            data.reshape(*shape, 8).movedim(0, -2).movedim(-3, 0).contiguous(),
            scale.reshape(shape).movedim(0, -1).movedim(-2, 0).contiguous(),
        )
        col_amax = faces.col_amax
        if amax is not None:
            rotated = columnwise_values(x, spec)
            seen_col = amax_of(rotated) if spec.rht else seen_col
            saturated = saturated + saturated_blocks(rotated, col_amax, spec.e4m3_max)
    # Made from the codes, so that both forms of a face are the same numbers.
    if spec.row == DEQUANTIZED:
        row = Face(unpack_rows(*row, x.shape[-1], spec.groups, dtype), torch.empty_like(empty))
    if spec.col == DEQUANTIZED:
        col = Face(unpack_columns(*col, dtype), torch.empty_like(empty))
    observed = x.new_empty(0, dtype=torch.float32)
    if amax is not None:
        observed = torch.cat((seen_row, seen_col, saturated))
        row_amax, col_amax = (unless_non_finite(*pair) for pair in ((row_amax, seen_row), (col_amax, seen_col)))
    return Operand(row, row_amax.clone(), col, col_amax.clone(), observed)


def measure_operand(x: Tensor, spec: OperandSpec) -> Tensor:
    """Return the amaxes as operand.measure_operand does."""
    own = amax_of(x)
    return torch.cat((own, amax_of(columnwise_values(x, spec)) if spec.rht else own))


def columnwise_values(x: Tensor, spec: OperandSpec) -> Tensor:
    """Return [N16, *folded image, C, 16]: what the columnwise face quantizes, a block of 16 images last."""
    values = fold_images(x, spec.fold).unflatten(0, (-1, BLOCK)).movedim(1, -1)
    return formats.rht16(values) if spec.rht else values


def saturated_blocks(values: Tensor, amax: Tensor, e4m3_max: int) -> Tensor:
    """Return fp32 [1]: how many blocks of 16 along the last axis have a decode scale above 448 before rounding."""
    amax_b = formats.blocks(values.float()).abs().amax(-1)
    return (amax_b * (formats.encode_scale(amax, e4m3_max) * formats.ONE_SIXTH) > 448).sum().float().reshape(1)


def unless_non_finite(amax: Tensor, seen: Tensor) -> Tensor:
    """Return `amax`, or NaN where `seen` is not finite."""
    return torch.where(seen.isfinite(), amax, torch.nan)


def amax_of(x: Tensor) -> Tensor:
    """Return the largest magnitude, fp32 [1]; 0 for a tensor without elements."""
    return x.abs().amax().float().reshape(1) if x.numel() else x.new_zeros(1, dtype=torch.float32)


def quantize_weight(w: Tensor, spec: WeightSpec, dtype: torch.dtype, amax: Tensor | None = None) -> WeightCodes:
    """Quantize as operand.quantize_weight does."""
    groups, two_d = spec.groups, spec.two_d
    n, c, taps = w.shape[0], w.shape[1], math.prod(w.shape[2:])
    kb, ob = -(-c // BLOCK), -(-(n // groups) // BLOCK)
    w_GOTC = w.reshape(groups, n // groups, c, taps).transpose(2, 3)
    # Padded group by group to whole tiles, so that no block has rows of two groups.
    w_GOTC = F.pad(w_GOTC, (0, kb * BLOCK - c, 0, 0, 0, ob * BLOCK - n // groups))
    amax = amax_of(w) if amax is None else amax.clone()
    amax = formats.power_of_two_amax(amax, spec.e4m3_max) if spec.pow2 else amax
    faces = reference_matrix.quantize_2d(
        w_GOTC.reshape(groups * ob * BLOCK, taps * kb * BLOCK),
        rowwise=spec.row != NONE,
        columnwise=spec.col != NONE,
        two_d=two_d,
        four_over_six=spec.four_over_six,
        e4m3_max=spec.e4m3_max,
        amax_rowwise=amax,
    )
    empty = w.new_empty(0, dtype=torch.uint8)
    row = col = Face(empty, torch.empty_like(empty))
    if spec.row != NONE:
        data, scale = faces.row_data, faces.row_scale.view(torch.uint8)
        data = data.reshape(groups, ob * BLOCK, taps, kb * 8)[:, : n // groups].reshape(n, taps, kb * 8)
        scale = scale.reshape(groups, ob * BLOCK, taps, kb)
        # The 16 rows of a tile repeat its scale.
        scale = scale[:, ::BLOCK] if two_d else scale[:, : n // groups].reshape(n, taps, kb)
        row = Face(data.contiguous(), scale.contiguous())
    if spec.col != NONE:  # [T, Cp, G, Ob, 8] -> [G, Ob, T, C, 8]
        data, scale = faces.col_data, faces.col_scale.view(torch.uint8)
        col = Face(
            data.reshape(taps, kb * BLOCK, groups, ob, 8)[:, :c].permute(2, 3, 0, 1, 4).contiguous(),
            scale.reshape(taps, kb * BLOCK, groups, ob)[:, :c].permute(2, 3, 0, 1).contiguous(),
        )
    if spec.row == DEQUANTIZED:
        row = Face(unpack_weight(*row, WeightLayout(n, c, groups, False), None, dtype), torch.empty_like(empty))
    if spec.col == DEQUANTIZED:
        col = Face(unpack_weight(*col, WeightLayout(n, c, groups, True), None, dtype), torch.empty_like(empty))
    return WeightCodes(row, col, amax)


def unpack_columns(data: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Unpack as operand.unpack_columns does."""
    values = formats.decode_blocks(data, scale.unsqueeze(-1).view(torch.float8_e4m3fn))  # [N16, *rest, 16]
    return values.to(dtype).movedim(-1, 1).flatten(0, 1).contiguous()


def unpack_rows(data: Tensor, scale: Tensor, channels: int, groups: int, dtype: torch.dtype) -> Tensor:
    """Unpack as operand.unpack_rows does."""
    values = formats.decode_blocks(data, scale.view(torch.float8_e4m3fn)).to(dtype)
    return values.unflatten(-1, (groups, -1))[..., : channels // groups].flatten(-2).contiguous()


def unpack_weight(
    data: Tensor, scale: Tensor, layout: WeightLayout, factor: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Unpack as operand.unpack_weight does."""
    n, channels, groups, columnwise = layout
    one_or_factor = 1.0 if factor is None else factor
    if columnwise:
        values = formats.decode_blocks(data, scale.unsqueeze(-1).view(torch.float8_e4m3fn))  # [G, Ob, T, C, 16]
        values = (values * one_or_factor).to(dtype).movedim(-1, 2).flatten(1, 2)[:, : n // groups]
        return values.reshape(n, *values.shape[2:]).contiguous()
    if scale.dim() == 4:  # one scale a tile: repeat it on the tile's rows
        scale = scale.repeat_interleave(BLOCK, dim=1)[:, : n // groups].reshape(n, *scale.shape[2:])
    values = formats.decode_blocks(data, scale.contiguous().view(torch.float8_e4m3fn)) * one_or_factor
    return values.to(dtype)[..., :channels].contiguous()
