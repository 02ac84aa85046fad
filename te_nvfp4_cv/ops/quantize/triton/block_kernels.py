"""Triton kernels with one lane per block of 16, for any strides: weights, and operands with 4over6.

    quantize_blocks_kernel   1x16 blocks along the rows or down the columns of x[o, t, c]; also folded images
    quantize_tiles_kernel    16x16 tiles of a weight, one tap at a time
    choose_scale             4over6: the error of either scale, summed in the order of reference_matrix.py

Loads of neighbouring lanes are 16 elements apart where blocks run along memory. Caches take that; weights are small.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disable-error-code="assignment"
from __future__ import annotations

import triton
import triton.language as tl

from te_nvfp4_cv.ops.quantize.triton.operand_kernels import SLOTS, finish_observed
from te_nvfp4_cv.ops.triton import numerics as nx
from te_nvfp4_cv.ops.triton import packing
from te_nvfp4_cv.ops.triton.elementwise import product_of


@triton.jit
def choose_scale(tile, amax_b, amax, mult, s_dec, ERROR: tl.constexpr, E4M3_MAX: tl.constexpr, TILE: tl.constexpr):
    """Return the byte, s_b and enc_b of blocks. ERROR 1 (MAE) or 2 (MSE): 4over6, errors summed in the vectors' order.

    TILE: lanes are [tiles, 16 rows], and a tile of 16 rows has one scale: its rows' errors are summed as a tree.
    """
    if ERROR == 0:
        byte, s_b, enc = nx.block_scale(amax_b, mult, s_dec)
    else:
        s6, word6, s4, word4 = nx.four_over_six_scales(amax_b, nx.encode_scale(amax, E4M3_MAX))
        enc6 = nx.encode_multiplier(s6, s_dec)
        enc4 = nx.encode_multiplier(s4, s_dec)
        sum6 = nx.four_over_six_error(tile[0], s6, enc6, amax, ERROR, E4M3_MAX)
        sum4 = nx.four_over_six_error(tile[0], s4, enc4, amax, ERROR, E4M3_MAX)
        for i in tl.static_range(1, 16):
            sum6 += nx.four_over_six_error(tile[i], s6, enc6, amax, ERROR, E4M3_MAX)
            sum4 += nx.four_over_six_error(tile[i], s4, enc4, amax, ERROR, E4M3_MAX)
        if TILE:
            sum6 = tree_of_rows(sum6)
            sum4 = tree_of_rows(sum4)
        # Strictly smaller: on a tie the scale that maps to 6 stays, as in the reference.
        four = sum4 < sum6
        byte = nx.e4m3_byte(tl.where(four, word4, word6))
        s_b = tl.where(four, s4, s6)
        enc = tl.where(four, enc4, enc6)
    return byte, s_b, enc


@triton.jit
def tree_of_rows(v):
    """Sum [tiles, 16] over rows i and i + 8, then i and i + 4, 2, 1: [tiles, 1]."""
    tiles: tl.constexpr = v.shape[0]
    v = tl.sum(tl.reshape(v, (tiles, 2, 8)), 1)
    v = tl.sum(tl.reshape(v, (tiles, 2, 4)), 1)
    v = tl.sum(tl.reshape(v, (tiles, 2, 2)), 1)
    return tl.reshape(tl.sum(v, 1), (tiles, 1))


@triton.jit
def quantize_blocks_kernel(
    x,
    source_rows,
    amax,
    seed,
    data,
    scale,
    dequantized,
    given,
    work,
    seen,
    collected,
    saturated,
    blocks,
    rows_in,
    rows_out,
    taps,
    width,
    stride_o,
    stride_t,
    stride_c,
    image_size,
    word2,
    COLUMNS: tl.constexpr,
    GROUP_BLOCKS: tl.constexpr,
    ROW_BLOCKS: tl.constexpr,
    FORM: tl.constexpr,
    RHT: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    ERROR: tl.constexpr,
    OBSERVE: tl.constexpr,
    FOLDED: tl.constexpr,
    E4M3_MAX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Quantize blocks of 16 of x[o, t, c] with any strides, one lane each; dequantized values go to contiguous memory.

    Rows (not COLUMNS): block (o, t, kb), ROW_BLOCKS of them along c < width.
    COLUMNS: block (group of rows, ob, t, c), GROUP_BLOCKS of them along the rows_in rows of a group that are there and
    the rows_out that are written. FOLDED: o, t is row source_rows[o * taps + t] of x, -1 for zeros.
    amax: fp32 [1], of this face. OBSERVE, and from given to saturated: see finish_observed.
    image_size: values of an image, for the random bytes.
    """
    b = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = b < blocks
    if COLUMNS:
        c = b % width
        t = b // width % taps
        group = b // width // taps
        ob = group % GROUP_BLOCKS
        first = group // GROUP_BLOCKS * rows_out + ob * 16
        origin = (group // GROUP_BLOCKS * rows_in + ob * 16) * stride_o + t * stride_t + c * stride_c
        # The last block of a group may be cut: `count` of its values are read, `limit` written, the others are zeros.
        count = rows_in - ob * 16
        target = (first * taps + t) * width + c
        limit = rows_out - ob * 16
    else:
        kb = b % ROW_BLOCKS
        t = b // ROW_BLOCKS % taps
        o = b // ROW_BLOCKS // taps
        origin = o * stride_o + t * stride_t + kb * 16 * stride_c
        count = width - kb * 16
        target = (o * taps + t) * width + kb * 16
        limit = count
    tile = ()
    for i in tl.static_range(16):
        if FOLDED:
            source = tl.load(source_rows + (first + i) * taps + t, mask=there, other=-1)
            # -1 stands for a row of zeros: the load is masked, and its address must still be valid.
            value = tl.load(x + (tl.maximum(source, 0) * width + c), mask=there & (source >= 0), other=0.0)
        elif COLUMNS:
            value = tl.load(x + (origin + i * stride_o), mask=there & (i < count), other=0.0)
        else:
            value = tl.load(x + (origin + i * stride_c), mask=there & (i < count), other=0.0)
        tile = tile + (value.to(tl.float32),)
    if RHT:
        tile = nx.rotate16(tile, x.dtype.element_ty == tl.bfloat16, False)
    tensor_amax = tl.load(amax)
    mult, s_dec = nx.tensor_factors(tensor_amax, E4M3_MAX)
    amax_b = nx.max16(tile, False)
    byte, s_b, enc = choose_scale(tile, amax_b, tensor_amax, mult, s_dec, ERROR, E4M3_MAX, False)
    if OBSERVE:
        slot = work + tl.program_id(0) % SLOTS
        tl.atomic_max(slot + (SLOTS if COLUMNS else 0), tl.max(nx.magnitude_bits(amax_b), 0), sem="relaxed")
        total = tl.sum(tl.where(there & (amax_b * mult > 448.0), 1, 0), 0)
        tl.atomic_add(slot + 2 * SLOTS, total, sem="relaxed")
    # Names of a branch must exist before it, with a type: these values are not used.
    random = tile
    image = b * 0
    if STOCHASTIC and COLUMNS:
        random = nx.philox7(b, tl.load(seed), word2)
    if STOCHASTIC and not COLUMNS:
        image = target // image_size
    words = ()
    ys = ()
    for i in tl.static_range(16):
        y = nx.scaled(tile[i], enc, False)
        if STOCHASTIC and COLUMNS:
            q, word = nx.e2m1_stochastic(y, nx.random_byte(random, i, False), False)
        elif STOCHASTIC:
            # Both faces of an operand use one byte for one value: the counter is that of its columnwise block, and the
            # byte is the one of 16 that belongs to its image.
            w = nx.philox7(image // 16 * image_size + (target - image * image_size) + i, tl.load(seed), word2)
            k = (image % 16).to(tl.int32)
            mine = tl.where(k < 8, tl.where(k < 4, w[0], w[1]), tl.where(k < 12, w[2], w[3]))
            part = (mine >> ((k % 4) * 8).to(tl.uint32)) & 0xFF
            q, word = nx.e2m1_stochastic(y, nx.part_of_a_step(part, False), False)
        else:
            q, word = nx.e2m1_nearest(y)
        if FORM == 2:
            value = (nx.signed(q, y) * s_b).to(dequantized.dtype.element_ty)
            step = taps * width if COLUMNS else 1  # between two values of a block in the result
            tl.store(dequantized + (target + i * step), value, mask=there & (i < limit))
        words = words + (word,)
        ys = ys + (y,)
    if FORM == 1:
        tl.store(data + b, packing.join_words(words, ys), mask=there)
        tl.store(scale + b, byte.to(tl.uint8), mask=there)
    if OBSERVE:
        finish_observed(work, given, seen, collected, saturated, OBSERVE)


# Sizes of a layer are runtime integers: as constants, each layer of a network would compile a kernel of its own.
@triton.jit(do_not_specialize=["tiles", "per_band", "taps", "group_rows", "group_blocks", "row_blocks"])
def quantize_tiles_kernel(
    w,
    amax,
    data,
    scale,
    dequantized,
    factor,
    other,
    number,
    tiles,
    per_band,
    taps,
    width,
    stride_o,
    stride_t,
    stride_c,
    group_rows,
    group_blocks,
    row_blocks,
    TAPS_FIRST: tl.constexpr,
    FORM: tl.constexpr,
    FACTOR: tl.constexpr,
    ERROR: tl.constexpr,
    E4M3_MAX: tl.constexpr,
    TILES: tl.constexpr,
):
    """Quantize 16x16 tiles of w[o, t, c], any strides: TILES tiles of 16 lanes, a lane holds the 16 channels of a row.

    A band of 16 rows has per_band programs; a program's tiles are of (t, kb), in memory's order (TAPS_FIRST: t runs
    fastest). The grid has one axis, because the second and third end at 65535.
    amax: fp32 [1]. FORM 1: data and scale are written; 2: dequantized; 3: both. dequantized is multiplied by a factor
    of FACTOR parts (elementwise.product_of).
    data: int64 [o, taps, row_blocks]; scale: uint8 [group, ob, taps, row_blocks]; dequantized: [o, taps, width].
    """
    band = (tl.program_id(0) // per_band).to(tl.int64)
    row = tl.arange(0, 16)[None, :]
    ob = band % group_blocks
    # A band is 16 rows of one group, or what is left of the group.
    o = band // group_blocks * group_rows + ob * 16 + row
    index = (tl.program_id(0) % per_band * TILES + tl.arange(0, TILES))[:, None]
    # Neighbouring lanes take tiles that lie next to each other in memory.
    if TAPS_FIRST:
        t = index % taps
        kb = index // taps
    else:
        t = index // row_blocks
        kb = index % row_blocks
    real = (index < tiles) & (ob * 16 + row < group_rows)
    tile = ()
    for i in tl.static_range(16):
        place = o * stride_o + t.to(tl.int64) * stride_t + (kb * 16 + i).to(tl.int64) * stride_c
        value = tl.load(w + place, mask=real & (kb * 16 + i < width), other=0.0)
        tile = tile + (value.to(tl.float32),)
    tensor_amax = tl.load(amax)
    mult, s_dec = nx.tensor_factors(tensor_amax, E4M3_MAX)
    # Over the 16 channels of a lane, then over the 16 rows of a tile: [TILES, 16] -> [TILES, 1].
    amax_b = tl.expand_dims(nx.max_of_rows(nx.max16(tile, False), False), 1)
    byte, s_b, enc = choose_scale(tile, amax_b, tensor_amax, mult, s_dec, ERROR, E4M3_MAX, True)
    words = ()
    ys = ()
    values = ()
    for i in tl.static_range(16):
        y = nx.scaled(tile[i], enc, False)
        q, word = nx.e2m1_nearest(y)
        words = words + (word,)
        ys = ys + (y,)
        values = values + (nx.signed(q, y) * s_b,)
    line = o * taps + t
    if FORM >= 2:
        out = nx.stack16(values)
        if FACTOR:
            out = out * product_of(factor, other, number, FACTOR)
        out = out.to(dequantized.dtype.element_ty)
        channel = kb[:, :, None] * 16 + tl.arange(0, 16)[None, None, :]
        place = dequantized + (line[:, :, None] * width + channel)
        tl.store(place, out, mask=real[:, :, None] & (channel < width))
    if FORM != 2:
        tl.store(data + (line * row_blocks + kb), packing.join_words(words, ys), mask=real)
        place = scale + ((band * taps + t) * row_blocks + kb)
        tl.store(place, byte.to(tl.uint8), mask=index < tiles)
