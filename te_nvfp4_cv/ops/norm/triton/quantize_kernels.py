"""Triton kernels that normalize, activate and quantize in one pass: the activation itself is never written.

    produced_amax_kernel       one read of z: the amaxes of the activation and of its RHT columns
    produce_kernel             one read of z: both faces of the activation as an operand, and ReLU's mask

The activation is the one that kernels.apply_kernel would store, rounded to z's dtype. Codes and scales are those of
ops/quantize for it, bit for bit. One program holds 16 images times BLOCK values, as in
ops/quantize/triton/operand_kernels.py, whose layouts these are. Only the common case is served: channels last, no
folding, groups of a multiple of 16 channels, nearest rounding. quantize_launch.py launches these kernels.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment,no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from te_nvfp4_cv.ops.norm.triton.activations import activated
from te_nvfp4_cv.ops.quantize.triton.operand_kernels import SLOTS, finish_amaxes, finish_observed
from te_nvfp4_cv.ops.triton import numerics as nx
from te_nvfp4_cv.ops.triton import packing


@triton.jit
def produced_tile(
    tensors,
    line,
    first,
    images,
    run,
    CHANNELS: tl.constexpr,
    GROUPS: tl.constexpr,
    AFFINE: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SLOPE: tl.constexpr,
    KEEP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Return the 16 fp32 vectors of activations, image line * 16 + i, values first + lane; 0 where there are none.

    tensors: z, residual, weight, bias, mean, rstd and the mask, which is written if KEEP.
    GROUPS: the groups of group normalization (mean, rstd [images, GROUPS]); 0 is batch normalization ([CHANNELS]).
    """
    z, residual, weight, bias, mean, rstd, mask = tensors
    lane = tl.arange(0, BLOCK)
    inside = lane < run - first
    # `first` has 64 bits: it is reduced as a scalar before the lanes are added.
    channel = ((first % CHANNELS).to(tl.int32) + lane) % CHANNELS
    scale = tl.full((BLOCK,), 1.0, tl.float32)
    shift = tl.zeros((BLOCK,), tl.float32)
    if AFFINE:
        scale = tl.load(weight + channel).to(tl.float32)
        shift = tl.load(bias + channel).to(tl.float32)
    if GROUPS == 0:
        # Batch normalization: the statistics are the channel's, and serve all 16 images.
        centre = tl.load(mean + channel)
        factor = tl.load(rstd + channel) * scale
    tile = ()
    for i in tl.static_range(16):
        image = line.to(tl.int64) * 16 + i
        there = inside & (image < images)
        origin = image * run + first
        value = tl.load(z + origin + lane, mask=there, other=0.0)
        if GROUPS:
            # An image past the end reads the statistics of the last one; its values become zeros below.
            group = tl.minimum(image, images - 1) * GROUPS + channel // (CHANNELS // GROUPS)
            centre = tl.load(mean + group)
            factor = tl.load(rstd + group) * scale
        u = tl.fma(value.to(tl.float32) - centre, factor, shift)
        if RESIDUAL:
            u += tl.load(residual + origin + lane, mask=there, other=0.0).to(tl.float32)
        if KEEP:
            bits = tl.reshape(tl.where(~(u <= 0.0) & there, 1, 0), (BLOCK // 8, 8)) << tl.arange(0, 8)[None, :]
            byte = tl.arange(0, BLOCK // 8)
            filled = (byte * 8 < run - first) & (image < images)
            tl.store(mask + origin // 8 + byte, tl.sum(bits, 1).to(tl.uint8), mask=filled)
        y = activated(u, ACTIVATION, SLOPE)
        # Rounded to z's dtype, as if the activation had been stored and read again. Zeros where there is no value,
        # because the activation of a padding zero is not 0.
        y = nx.round_bf16(y, False) if value.dtype == tl.bfloat16 else y.to(value.dtype).to(tl.float32)
        y = tl.where(there, y, 0.0)
        tile = tile + (y,)
    return tile


@triton.jit
def produced_amax_kernel(
    z,
    residual,
    weight,
    bias,
    mean,
    rstd,
    work,
    amax,
    images,
    run,
    per_row,
    tiles,
    CHANNELS: tl.constexpr,
    GROUPS: tl.constexpr,
    AFFINE: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SLOPE: tl.constexpr,
    RHT: tl.constexpr,
    POW2: tl.constexpr,
    E4M3_MAX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write amax, fp32 [2]: the activation's amax and (RHT) its rotated columns'. work, POW2: see finish_amaxes."""
    row_top = tl.zeros((BLOCK,), tl.float32)
    col_top = tl.zeros((BLOCK,), tl.float32)
    # z takes the place of the mask, which is not written here (KEEP is False).
    tensors = (z, residual, weight, bias, mean, rstd, z)
    for item in range(tl.program_id(0), tiles, tl.num_programs(0)):
        first = (item % per_row).to(tl.int64) * BLOCK
        line = item // per_row
        tile = produced_tile(
            tensors, line, first, images, run, CHANNELS, GROUPS, AFFINE, RESIDUAL, ACTIVATION, SLOPE, False, BLOCK
        )
        row_top = nx.max_nan(row_top, nx.max16(tile, False))
        if RHT:
            col_top = nx.max_nan(col_top, nx.max16(nx.hadamard16(tile, False), False))
    tl.atomic_max(work, tl.max(nx.magnitude_bits(row_top), 0), sem="relaxed")
    if RHT:
        col_top = col_top * 0.25  # rounding is monotone: once, after the maximum, is the same as before it
        if z.dtype.element_ty == tl.bfloat16:
            col_top = col_top.to(tl.bfloat16).to(tl.float32)
        tl.atomic_max(work + 1, tl.max(nx.magnitude_bits(col_top), 0), sem="relaxed")
    # Without RHT the columns hold the activation itself.
    finish_amaxes(work, amax, 2, not RHT, POW2, E4M3_MAX)


@triton.jit
def produce_kernel(
    z,
    residual,
    weight,
    bias,
    mean,
    rstd,
    mask,
    amax,
    row_data,
    row_scale,
    col_data,
    col_scale,
    work,
    seen,
    collected,
    saturated_blocks,
    images,
    run,
    per_row,
    CHANNELS: tl.constexpr,
    GROUPS: tl.constexpr,
    AFFINE: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SLOPE: tl.constexpr,
    KEEP: tl.constexpr,
    ROW: tl.constexpr,
    COL: tl.constexpr,
    RHT: tl.constexpr,
    OBSERVE: tl.constexpr,
    E4M3_MAX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Quantize one tile of the activation rowwise (ROW 1: packed, 2: code * scale) and columnwise (COL 1: packed).

    amax: fp32 [2]. row_data: as z in bf16 or fp32, or int32 [images, run / 8]; row_scale: uint8 [images, run / 16].
    col_data: int64 [groups of 16 images, run]; col_scale: uint8 likewise. OBSERVE, and from work to saturated_blocks:
    see finish_observed.
    """
    pid = tl.program_id(0)
    line = pid // per_row
    first = (pid % per_row).to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)
    inside = lane < run - first
    tensors = (z, residual, weight, bias, mean, rstd, mask)
    tile = produced_tile(
        tensors, line, first, images, run, CHANNELS, GROUPS, AFFINE, RESIDUAL, ACTIVATION, SLOPE, KEEP, BLOCK
    )
    row_top = tl.zeros((BLOCK // 16,), tl.float32)
    saturated = tl.zeros((BLOCK // 16,), tl.int32)
    if ROW != 0:
        mult, s_dec = nx.tensor_factors(tl.load(amax), E4M3_MAX)
        for i in tl.static_range(16):
            image = line.to(tl.int64) * 16 + i
            v = tl.reshape(tile[i], (BLOCK // 16, 16))
            amax_b = nx.max_of_rows(v, False)
            byte, s_b, enc = nx.block_scale(amax_b, mult, s_dec)
            if OBSERVE:
                row_top = nx.max_nan(row_top, amax_b)
                saturated += tl.where(amax_b * mult > 448.0, 1, 0)
            y = nx.scaled(v, enc[:, None], False)
            q, word = nx.e2m1_nearest(y)
            origin = image * run + first
            if ROW == 2:
                value = tl.reshape(nx.signed(q, y) * s_b[:, None], (BLOCK,)).to(row_data.dtype.element_ty)
                tl.store(row_data + origin + lane, value, mask=inside & (image < images))
            else:
                codes = packing.join_rows(word, y, BLOCK, 4)
                packing.store_rows(row_data, codes, origin >> 4, run - first, image < images, BLOCK, True)
                packing.store_scale(row_scale, byte, origin >> 4, run - first, image < images, BLOCK, True)
    if OBSERVE:
        total = tl.sum(saturated, 0)
        tl.atomic_max(work + pid % SLOTS, tl.max(nx.magnitude_bits(row_top), 0), sem="relaxed")

    if COL != 0:
        # A rotated face has an amax, and so a tensor scale, of its own.
        mult, s_dec = nx.tensor_factors(tl.load(amax + 1), E4M3_MAX)
        if RHT:
            tile = nx.rotate16(tile, z.dtype.element_ty == tl.bfloat16, False)
        amax_b = nx.max16(tile, False)
        byte, s_b, enc = nx.block_scale(amax_b, mult, s_dec)
        if OBSERVE:
            tl.atomic_max(work + SLOTS + pid % SLOTS, tl.max(nx.magnitude_bits(amax_b), 0), sem="relaxed")
            total += tl.sum(tl.where(inside & (amax_b * mult > 448.0), 1, 0), 0)
        words = ()
        ys = ()
        for i in tl.static_range(16):
            y = nx.scaled(tile[i], enc, False)
            q, word = nx.e2m1_nearest(y)
            words = words + (word,)
            ys = ys + (y,)
        column = line.to(tl.int64) * run + first
        tl.store(col_data + column + lane, packing.join_words(words, ys), mask=inside)
        tl.store(col_scale + column + lane, byte.to(tl.uint8), mask=inside)
    if OBSERVE:
        # Few tiles saturate, so that few programs wait for this atomic.
        if total > 0:
            tl.atomic_add(work + 2 * SLOTS + pid % SLOTS, total, sem="relaxed")
        finish_observed(work, amax, seen, collected, saturated_blocks, OBSERVE)
