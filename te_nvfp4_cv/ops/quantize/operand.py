"""Quantized operands of a convolution, as custom operators on plain tensors. Linear layers are the case without image
axes.

    quantize_operand   an activation or gradient [B, *image, C]: rowwise face (16 channels of a pixel),
                       columnwise face (16 images at a pixel)
    quantize_weight    a weight [axis 0, axis 1, *kernel]: faces over axis 1 (rowwise) and axis 0 (columnwise),
                       one tap at a time
    measure_operand    the two amaxes that quantize_operand would use
    unpack_*           packed codes back to code * scale

Forms of a face. PACKED is what backward keeps; DEQUANTIZED is what a vendor convolution multiplies: code * scale,
without the tensor scale, exact in bf16.

    face                     packed data (uint8)             scale (E4M3 bytes)            dequantized
    operand, rowwise         [B, *image, G * Kb * 8]         [B, *image, G * Kb]           [B, *image, C]
    operand, columnwise      [N16, *folded image, C, 8]      [N16, *folded image, C]       [N16 * 16, *folded image, C]
    kernel, rowwise, 16x16   [axis 0, T, Kb * 8]             [G, Ob, T, Kb]: a tile each   [axis 0, T, axis 1]
    kernel, rowwise, 1x16    [axis 0, T, Kb * 8]             [axis 0, T, Kb]
    kernel, columnwise       [G, Ob, T, axis 1, 8]           [G, Ob, T, axis 1]            [axis 0, T, axis 1]

Kb, Ob: blocks of 16 of one group's channels; a shorter last block is padded with zeros, which no array stores but its
packed codes.
With 16x16 scaling both faces of a kernel are the same numbers: only the rowwise one is written.
Stochastic rounding by plain torch and the CPU's kernels: the block with row-major index i in the TE-ordered scale
matrix (rows of M in the order image axes, then batch) uses Philox counter i. The Triton kernels draw other numbers
(quantize/launch.py).

The tensor scale is that of the operand's own amax, or of amaxes that are given: those of an earlier step
(tensor_scale="delayed"), or of all ranks. The call then also observes what it saw, in the same pass:

    observed [3] fp32    amax of x; amax of the columnwise operand, folded and rotated; saturated blocks

An amax whose face is not written is 0; without RHT both are the amax of x. A block is saturated where its decode scale
before rounding, amax_b * f32(S_enc * f32(1/6)), exceeds 448: its largest values are clipped.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from te_nvfp4_cv.backend import dispatch
from te_nvfp4_cv.backend.registration import without_autocast
from te_nvfp4_cv.ops.geometry import Fold
from te_nvfp4_cv.ops.quantize import cpu, reference

NONE, PACKED, DEQUANTIZED = 0, 1, 2
BLOCK = 16


def _run(backend: str, device: torch.device) -> Any:
    """The module that quantizes tensors of `device` for a backend; the Triton one is imported when first used."""
    if backend == "triton" or (backend == "vendor" and dispatch.kernels_serve(device)):
        from te_nvfp4_cv.ops.quantize.triton import launch

        return launch
    return reference if backend == "reference" else cpu


@without_autocast
@torch.library.custom_op("te_nvfp4_cv::quantize_operand", mutates_args=())
def quantize_operand(
    x: Tensor,
    groups: int,
    fold: list[int],
    row: int,
    col: int,
    rht: bool,
    stochastic: bool,
    four_over_six: str,
    e4m3_max: int,
    row_scaled: bool,
    dtype: torch.dtype,
    seed: Tensor | None,
    amax: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Quantize an activation or gradient.

    Args:
        x: [B, *image, C] contiguous, bf16, fp16 or fp32.
        groups: blocks never cross a group of C / groups channels.
        fold: the fields of geometry.Fold, for the columnwise face.
        row: form of the rowwise face: NONE, PACKED or DEQUANTIZED; col: the same.
        rht: rotate the columnwise face.
        stochastic: round stochastically, with `seed` [1] int64.
        four_over_six: "", "MAE" or "MSE".
        row_scaled: one amax per pixel (rowwise [B, *image]) and per channel (columnwise [C]).
        dtype: of dequantized faces, bf16 or fp32.
        amax: fp32 [2], positive: of the rowwise and of the columnwise face, used in place of x's own; not with
            row_scaled.
    Returns:
        (row data, row scale, row amax, col data, col scale, col amax, observed); what was not asked for is empty.
        With `amax` given the two amaxes are the given ones, NaN where the observed one is not finite; without,
        `observed` is empty.
    """
    fields = _run(backend, x.device).quantize_operand(
        x,
        groups,
        Fold(*fold),
        row,
        col,
        rht,
        stochastic,
        four_over_six or None,
        e4m3_max,
        row_scaled,
        dtype,
        seed,
        amax,
    )
    return tuple(fields)  # type: ignore[return-value]


@quantize_operand.register_fake
def _(  # type: ignore[no-untyped-def]
    x, groups, fold, row, col, rht, stochastic, four_over_six, e4m3_max, row_scaled, dtype, seed, amax, backend
):
    f = Fold(*fold)
    blocks = groups * -(-(x.shape[-1] // groups) // BLOCK)
    folded = (f.rows, *x.shape[2:-1], x.shape[-1]) if x.dim() > 2 else (x.shape[-1],)
    row_data, row_scale, col_data, col_scale = (x.new_empty(0, dtype=torch.uint8) for _ in range(4))
    if row == PACKED:
        row_data = x.new_empty((*x.shape[:-1], blocks * 8), dtype=torch.uint8)
        row_scale = x.new_empty((*x.shape[:-1], blocks), dtype=torch.uint8)
    elif row == DEQUANTIZED:
        row_data = x.new_empty(x.shape, dtype=dtype)
    if col == PACKED:
        col_data = x.new_empty((f.images // BLOCK, *folded, 8), dtype=torch.uint8)
        col_scale = x.new_empty((f.images // BLOCK, *folded), dtype=torch.uint8)
    elif col == DEQUANTIZED:
        col_data = x.new_empty((f.images, *folded), dtype=dtype)
    row_amax = x.new_empty(x.shape[:-1] if row_scaled and row else (1,), dtype=torch.float32)
    col_amax = x.new_empty((x.shape[-1],) if row_scaled and col else (1,), dtype=torch.float32)
    observed = x.new_empty(0 if amax is None else 3, dtype=torch.float32)
    return row_data, row_scale, row_amax, col_data, col_scale, col_amax, observed


@without_autocast
@torch.library.custom_op("te_nvfp4_cv::measure_operand", mutates_args=())
def measure_operand(x: Tensor, fold: list[int], rht: bool, backend: str) -> Tensor:
    """fp32 [2]: the amax of x [B, *image, C], and that of the columnwise operand, folded and rotated; without RHT both
    are the first. NaN wins over inf, inf over numbers.
    """
    return _run(backend, x.device).measure_operand(x, Fold(*fold), rht)


@measure_operand.register_fake
def _(x, fold, rht, backend):  # type: ignore[no-untyped-def]
    return x.new_empty(2, dtype=torch.float32)


@without_autocast
@torch.library.custom_op("te_nvfp4_cv::quantize_weight", mutates_args=())
def quantize_weight(
    w: Tensor,
    groups: int,
    row: int,
    col: int,
    two_d: bool,
    four_over_six: str,
    e4m3_max: int,
    pow2: bool,
    dtype: torch.dtype,
    backend: str,
    amax: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Quantize a weight, or a rank's rows or columns of one.

    Args:
        w: [axis 0, axis 1, *kernel], any strides; groups divide axis 0.
        row: form of the rowwise face (blocks over axis 1); col: of the columnwise face (blocks over axis 0); NONE for
            col with two_d.
        pow2: the amax used and returned is formats.power_of_two_amax of the weight's: a decode scale 2^k.
        amax: fp32 [1], of the whole weight where w is a shard; None: w's own. Shards of 16 n rows and columns then have
            the codes and scales of the whole.
    Returns:
        (row data, row scale, col data, col scale, amax [1]).
    """
    fields = _run(backend, w.device).quantize_weight(
        w, groups, row, col, two_d, four_over_six or None, e4m3_max, pow2, dtype, amax
    )
    return tuple(fields)  # type: ignore[return-value]


@quantize_weight.register_fake
def _(w, groups, row, col, two_d, four_over_six, e4m3_max, pow2, dtype, backend, amax=None):  # type: ignore[no-untyped-def]
    n, c, taps = w.shape[0], w.shape[1], math.prod(w.shape[2:])
    kb, ob = -(-c // BLOCK), -(-(n // groups) // BLOCK)
    row_data, row_scale, col_data, col_scale = (w.new_empty(0, dtype=torch.uint8) for _ in range(4))
    if row == PACKED:
        row_data = w.new_empty((n, taps, kb * 8), dtype=torch.uint8)
        row_scale = w.new_empty((groups, ob, taps, kb) if two_d else (n, taps, kb), dtype=torch.uint8)
    elif row == DEQUANTIZED:
        row_data = w.new_empty((n, taps, c), dtype=dtype)
    if col == PACKED:
        col_data = w.new_empty((groups, ob, taps, c, 8), dtype=torch.uint8)
        col_scale = w.new_empty((groups, ob, taps, c), dtype=torch.uint8)
    elif col == DEQUANTIZED:
        col_data = w.new_empty((n, taps, c), dtype=dtype)
    return row_data, row_scale, col_data, col_scale, w.new_empty(1, dtype=torch.float32)


@without_autocast
@torch.library.custom_op("te_nvfp4_cv::unpack_columns", mutates_args=())
def unpack_columns(data: Tensor, scale: Tensor, dtype: torch.dtype, backend: str) -> Tensor:
    """Dequantized [N16 * 16, *rest] from a packed columnwise operand: data [N16, *rest, 8], scale [N16, *rest]."""
    return _run(backend, data.device).unpack_columns(data, scale, dtype)


@unpack_columns.register_fake
def _(data, scale, dtype, backend):  # type: ignore[no-untyped-def]
    return scale.new_empty((scale.shape[0] * BLOCK, *scale.shape[1:]), dtype=dtype)


@without_autocast
@torch.library.custom_op("te_nvfp4_cv::unpack_rows", mutates_args=())
def unpack_rows(data: Tensor, scale: Tensor, channels: int, groups: int, dtype: torch.dtype, backend: str) -> Tensor:
    """Dequantized [..., channels] from a packed rowwise operand: data [..., G * Kb * 8], scale [..., G * Kb]."""
    return _run(backend, data.device).unpack_rows(data, scale, channels, groups, dtype)


@unpack_rows.register_fake
def _(data, scale, channels, groups, dtype, backend):  # type: ignore[no-untyped-def]
    return data.new_empty((*data.shape[:-1], channels), dtype=dtype)


@without_autocast
@torch.library.custom_op("te_nvfp4_cv::unpack_weight", mutates_args=())
def unpack_weight(
    data: Tensor,
    scale: Tensor,
    n: int,
    channels: int,
    groups: int,
    columnwise: bool,
    factor: Tensor | None,
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    """Dequantized [axis 0, T, axis 1] from either packed face of a kernel.

    Args:
        n, channels: sizes of the axes 0 and 1.
        factor: fp32 [1], or None: multiplies every value in fp32, before the one rounding to `dtype`. A power of two
            keeps the values exact, except below 2^-126; NaN makes all of them NaN.
    """
    return _run(backend, data.device).unpack_weight(data, scale, n, channels, groups, columnwise, factor, dtype)


@unpack_weight.register_fake
def _(data, scale, n, channels, groups, columnwise, factor, dtype, backend):  # type: ignore[no-untyped-def]
    return data.new_empty((n, data.shape[2 if columnwise else 1], channels), dtype=dtype)
