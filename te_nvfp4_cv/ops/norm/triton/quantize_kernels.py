"""Triton kernels that normalize, activate and quantize in one pass: the activation itself is never written.

    produced_amax_kernel       one read of z: the amaxes of the activation and of its RHT columns
    produce_kernel             one read of z: both faces of the activation as an operand, and ReLU's mask

The activation is the one that apply_kernels.apply_kernel would store, rounded to z's dtype. Codes and scales are those
of ops/quantize for it, bit for bit. One program holds 16 images times BLOCK values, as in
ops/quantize/triton/operand_kernels.py, whose layouts these are. Only the common case is served: channels last, no
folding, groups of a multiple of 16 channels, nearest rounding. quantize_launch.py launches these kernels.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment,no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from te_nvfp4_cv.ops.norm.triton.activations import RELU, RELU6, activated
from te_nvfp4_cv.ops.quantize.triton.amax_kernels import finish_amaxes
from te_nvfp4_cv.ops.quantize.triton.operand_kernels import SLOTS, count_saturated, finish_observed, observe_face
from te_nvfp4_cv.ops.triton import numerics as nx
from te_nvfp4_cv.ops.triton import packing, ptx
from te_nvfp4_cv.ops.triton.rows import row_scales, store_scales


@triton.jit
def produced_tile(
    tensors,
    line,
    first,
    images,
    run,
    channels,
    GROUPS: tl.constexpr,
    GROUP_CHANNELS: tl.constexpr,
    AFFINE: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SLOPE: tl.constexpr,
    KEEP: tl.constexpr,
    MASKED: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Return the 16 fp32 vectors of activations, image line * 16 + i, values first + lane; 0 where there are none.

    tensors: z, residual, weight, bias, mean, rstd and the mask, which is written if KEEP.
    GROUPS: the groups of group normalization (mean, rstd [images, GROUPS]), of GROUP_CHANNELS channels each, constants
    because each value's channel is divided by them; both are 0 with batch normalization ([channels]).
    MASKED: some values or images are not there. PAIRS: as in ptx.widen.
    """
    z, residual, weight, bias, mean, rstd, mask = tensors
    lane = tl.arange(0, BLOCK)
    inside = lane < run - first
    if GROUPS:
        known: tl.constexpr = GROUPS * GROUP_CHANNELS
        # `first` has 64 bits: it is reduced as a scalar before the lanes are added.
        channel = ((first % known).to(tl.int32) + lane) % known
    else:  # channels are a multiple of 16, so the lanes of a block need one division
        # An image has less than 2^32 blocks: without a sign, in 32 bits, the division is a short one.
        per_pixel = (tl.zeros((), tl.int32) + channels // 16).to(tl.uint32)
        block = (first >> 4).to(tl.uint32) + tl.arange(0, BLOCK // 16).to(tl.uint32)
        block = (block % per_pixel).to(tl.int32)
        channel = tl.reshape(block[:, None] * 16 + tl.arange(0, 16)[None, :], (BLOCK,))
        # Sixteen in order, which the compiler cannot see: a thread loads its channels' parameters at once.
        channel = tl.max_contiguous(tl.multiple_of(channel, 16), 16)
    scale = tl.full((BLOCK,), 1.0, tl.float32)
    shift = tl.zeros((BLOCK,), tl.float32)
    if AFFINE:
        scale = tl.load(weight + channel).to(tl.float32)
        shift = tl.load(bias + channel).to(tl.float32)
    if GROUPS == 0:
        # Batch normalization: the statistics are the channel's, and serve all 16 images.
        centre = tl.load(mean + channel)
        factor = tl.load(rstd + channel) * scale
    # One addition an image; only the first address has two 64-bit parts.
    step = tl.zeros((), tl.int64) + run
    from_z = z + (line.to(tl.int64) * 16 * run + first) + lane
    from_residual = residual + (line.to(tl.int64) * 16 * run + first) + lane
    tile = ()
    kept = tl.zeros((BLOCK // 4,), tl.uint32)
    half = kept
    for i in tl.static_range(16):
        image = line.to(tl.int64) * 16 + i
        there = inside & (image < images)
        if MASKED:
            value = tl.load(from_z + i * step, mask=there, other=0.0)
        else:
            value = tl.load(from_z + i * step)
        if GROUPS:
            # An image past the end reads the statistics of the last one; its values become zeros below.
            group = tl.minimum(image, images - 1) * GROUPS + channel // GROUP_CHANNELS
            centre = tl.load(mean + group)
            factor = tl.load(rstd + group) * scale
        u = tl.fma(ptx.widen(value, PAIRS) - centre, factor, shift)
        if RESIDUAL:
            if MASKED:
                u += ptx.widen(tl.load(from_residual + i * step, mask=there, other=0.0), PAIRS)
            else:
                u += ptx.widen(tl.load(from_residual + i * step), PAIRS)
        y = activated(u, ACTIVATION, SLOPE)
        if MASKED:  # because the activation of a padding zero is not 0
            y = tl.where(there, y, 0.0)
        if KEEP:
            if i == 8:
                half = kept
            kept = collect(kept, y, BLOCK)
        # Rounded to z's dtype, as if the activation had been stored and read again.
        y = nx.round_bf16(y, PAIRS) if value.dtype == tl.bfloat16 else y.to(value.dtype).to(tl.float32)
        tile = tile + (y,)
    if KEEP:
        store_mask(mask, half, kept, line, first, images, run, MASKED, BLOCK)
    return tile


@triton.jit
def collect(kept, y, BLOCK: tl.constexpr):
    """Shift four bits of an image into each word [BLOCK / 4]: whether y, which is not below 0, is positive or NaN."""
    y0, y1, y2, y3 = packing.neighbours(y, BLOCK, 4)
    for v in tl.static_range(4):
        value = (y3, y2, y1, y0)[v]
        if ptx.INTERPRETED:  # where a NaN may have a sign
            bit = tl.where(value != 0.0, 1, 0).to(tl.uint32)
        else:
            above = tl.add(nx.bits_of(value), 0x7FFFFFFF, sanitize_overflow=False)  # its sign: value is not 0
            bit = above.to(tl.uint32, bitcast=True) >> 31
        kept = (kept << 1) | bit
    return kept


@triton.jit
def store_mask(mask, low, high, line, first, images, run, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    """Store a byte for each eight values of 16 images from collect's words of eight images, the first one highest.

    A byte's two nibbles are in two words. One exchange brings them together, and each thread has eight images' bytes.
    """
    words = tl.permute(tl.reshape(tl.join(low, high), (BLOCK // 8, 2, 2)), (2, 0, 1))
    left, right = tl.split(words)  # [2, BLOCK / 8]: of eight images, the values 0 to 3 and 4 to 7
    odd = (left & 0x0F0F0F0F) | ((right & 0x0F0F0F0F) << 4)
    even = ((left >> 4) & 0x0F0F0F0F) | (right & 0xF0F0F0F0)
    byte = tl.arange(0, BLOCK // 8)[None, :]
    image = tl.arange(0, 2)[:, None] * 8
    step = run // 8
    place = mask + (line.to(tl.int64) * 16 * run + first) // 8 + (image * step + byte)
    for i in tl.static_range(8):
        value = ((odd if i % 2 == 1 else even) >> (7 - i) // 2 * 8).to(tl.uint8)
        if MASKED:
            there = (byte * 8 < run - first) & (line * 16 + image + i < images)
            tl.store(place + i * step, value, mask=there)
        else:
            tl.store(place + i * step, value)


@triton.jit(do_not_specialize=["per_row", "tiles"])
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
    channels,
    GROUPS: tl.constexpr,
    GROUP_CHANNELS: tl.constexpr,
    AFFINE: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SLOPE: tl.constexpr,
    MASKED: tl.constexpr,
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
            tensors,
            line,
            first,
            images,
            run,
            channels,
            GROUPS,
            GROUP_CHANNELS,
            AFFINE,
            RESIDUAL,
            ACTIVATION,
            SLOPE,
            False,
            MASKED,
            False,
            BLOCK,
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


@triton.jit(do_not_specialize=["per_row"])
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
    channels,
    GROUPS: tl.constexpr,
    GROUP_CHANNELS: tl.constexpr,
    AFFINE: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SLOPE: tl.constexpr,
    KEEP: tl.constexpr,
    MASKED: tl.constexpr,
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
    pid = tl.program_id(0).to(tl.uint32)  # a division is shorter without a sign
    line = (pid // per_row.to(tl.uint32)).to(tl.int32)
    first = (pid % per_row.to(tl.uint32)).to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)
    inside = lane < run - first
    tensors = (z, residual, weight, bias, mean, rstd, mask)
    pairs: tl.constexpr = ROW != 2  # codes leave more registers than values do
    tile = produced_tile(
        tensors,
        line,
        first,
        images,
        run,
        channels,
        GROUPS,
        GROUP_CHANNELS,
        AFFINE,
        RESIDUAL,
        ACTIVATION,
        SLOPE,
        KEEP,
        MASKED,
        pairs,
        BLOCK,
    )
    signed: tl.constexpr = ACTIVATION != RELU and ACTIVATION != RELU6
    at_once: tl.constexpr = 8  # images whose scales are computed at once
    row_top = tl.zeros((at_once, BLOCK // 16), tl.float32)
    saturated = tl.zeros((at_once, BLOCK // 16), tl.int32)
    if ROW != 0:
        mult, s_dec = nx.tensor_factors(tl.load(amax), E4M3_MAX)
        limit = tl.minimum(run - first, BLOCK).to(tl.int32)
        # Counted in blocks; within a tile 32 bits are enough.
        blocks = line.to(tl.int64) * 16 * run + first >> 4
        step = tl.zeros((), tl.int64) + run // 16
        for i in tl.static_range(16):
            image = line.to(tl.int64) * 16 + i
            if i % at_once == 0:
                top, byte, s_bs, encs = row_scales(tile, i, at_once, mult, s_dec, pairs, BLOCK)
                if OBSERVE:
                    row_top = nx.max_nan(row_top, top)
                    saturated += tl.where(top * mult > 448.0, 1, 0)
                if ROW == 1:
                    left = images - line * 16 - i
                    store_scales(row_scale, byte, blocks + i * step, step, limit, left, BLOCK, MASKED)
            y = nx.scaled(tl.reshape(tile[i], (BLOCK // 16, 16)), encs[i % at_once][:, None], pairs)
            q, word = nx.e2m1_nearest(y)
            if ROW == 2:
                value = tl.reshape(nx.signed(q, y) * s_bs[i % at_once][:, None], (BLOCK,))
                value = value.to(row_data.dtype.element_ty)
                place = row_data + (image * run + first) + lane
                if MASKED:
                    tl.store(place, value, mask=inside & (image < images))
                else:
                    tl.store(place, value)
            else:
                codes = packing.join_rows(word, y, BLOCK, 4, signed)
                packing.store_rows(row_data, codes, blocks, i * step, limit, image < images, BLOCK, MASKED)
    if OBSERVE:
        total = observe_face(work, row_top, saturated, True)

    if COL != 0:
        # A rotated face has an amax, and so a tensor scale, of its own.
        mult, s_dec = nx.tensor_factors(tl.load(amax + 1), E4M3_MAX)
        if RHT:
            tile = nx.rotate16(tile, z.dtype.element_ty == tl.bfloat16, pairs)
        amax_b = nx.max16(tile, pairs)
        byte, s_b, enc = nx.block_scale(amax_b, mult, s_dec)
        if OBSERVE:
            clipped = tl.where(inside & (amax_b * mult > 448.0), 1, 0)
            total += observe_face(work + SLOTS, amax_b, clipped, False)
        words = ()
        ys = ()
        for i in tl.static_range(16):
            y = nx.scaled(tile[i], enc, pairs)
            q, word = nx.e2m1_nearest(y)
            words = words + (word,)
            ys = ys + (y,)
        column = line.to(tl.int64) * run + first
        both = packing.join_words(words, ys)
        if MASKED:
            tl.store(col_data + column + lane, both, mask=inside)
            tl.store(col_scale + column + lane, byte.to(tl.uint8), mask=inside)
        else:
            tl.store(col_data + column + lane, both)
            tl.store(col_scale + column + lane, byte.to(tl.uint8))
    if OBSERVE:
        count_saturated(work + 2 * SLOTS, total)
        finish_observed(work, amax, seen, collected, saturated_blocks, OBSERVE)
