"""Triton kernels that quantize operands of convolutions and linear layers: amax and both faces of an operand.

An operand [B, *image, C] is a matrix of B images times `run` values. One program holds 16 images times BLOCK values:

    columnwise block   one value of the 16 images: element i in vector i of a tuple, nothing crosses lanes
    rowwise block      16 consecutive values of one image: vectors as [BLOCK / 16, 16]

so that x is read once for both faces. The numbers are those of ops/triton/numerics.py.

Addresses are an int64 scalar (image, first value of the tile) plus an int32 vector inside the tile.
Where a group's channels are no multiple of 16, lanes count through the padded channels, [pixels, groups, Kb * 16], and
those in the padding are masked out. Images and rows of a folded operand that do not exist read as zeros.
Weights, and 4over6, whose error sums have an order, take block_kernels.py, with one lane per block.
launch.py launches these kernels and has the shapes; nothing is checked here.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disable-error-code="assignment"
from __future__ import annotations

import triton
import triton.language as tl

from te_nvfp4_cv.ops.quantize.triton.amax_kernels import finish_amaxes
from te_nvfp4_cv.ops.triton import numerics as nx
from te_nvfp4_cv.ops.triton import packing, ptx
from te_nvfp4_cv.ops.triton.rows import row_scales, store_scales
from te_nvfp4_cv.ops.triton.workspace import is_last, take, take_all

SLOTS: tl.constexpr = tl.constexpr(32)  # addresses that programs spread their atomics over; one warp reads them
# The sums of these say what a launch observes; see finish_observed.
FINISH: tl.constexpr = tl.constexpr(2)
SAME: tl.constexpr = tl.constexpr(4)
COLLECT: tl.constexpr = tl.constexpr(8)
COUNT: tl.constexpr = tl.constexpr(16)


# ---- amax -----------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["tiles"])
def amax_kernel(
    x,
    source_rows,
    work,
    amax,
    images,
    rows,
    run,
    tiles,
    ROW: tl.constexpr,
    FOLDED: tl.constexpr,
    MASKED: tl.constexpr,
    POW2: tl.constexpr,
    E4M3_MAX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write amax[1], fp32: the amax after folding and RHT; and amax[0]: that of x itself, whose bits are in work[0] if
    not ROW.

    work, POW2: see finish_amaxes.
    x: [images, rows, run] or, FOLDED, row source_rows [16 groups, rows] of x, -1 for zeros; tiles: BLOCK-wide tiles of
    all (group, row).
    """
    lane = tl.arange(0, BLOCK)
    per_row = tl.cdiv(run, BLOCK)
    row_top = tl.zeros((BLOCK,), tl.float32)
    col_top = tl.zeros((BLOCK,), tl.float32)
    for item in range(tl.program_id(0), tiles, tl.num_programs(0)):
        first = (item % per_row).to(tl.int64) * BLOCK
        line = item // per_row
        inside = lane < run - first
        shape = (images, rows, run)
        tile = load_tile(x, source_rows, shape, line // rows, line % rows, first, lane, inside, FOLDED, MASKED, False)
        if ROW:
            row_top = nx.max_nan(row_top, nx.max16(tile, False))
        col_top = nx.max_nan(col_top, nx.max16(nx.hadamard16(tile, False), False))
    row_bits, col_bits = nx.max_of_both(nx.magnitude_bits(row_top), nx.magnitude_bits(col_top))
    if ROW:
        tl.atomic_max(work, row_bits, sem="relaxed")
    rotated = nx.float_of(col_bits) * 0.25  # rounding is monotone: after the maximum it is the same as before
    if x.dtype.element_ty == tl.bfloat16:
        rotated = rotated.to(tl.bfloat16).to(tl.float32)
    tl.atomic_max(work + 1, nx.magnitude_bits(rotated), sem="relaxed")
    finish_amaxes(work, amax, 2, False, POW2, E4M3_MAX)


@triton.jit
def load_tile(
    x,
    source_rows,
    shape,
    group,
    row,
    first,
    offset,
    inside,
    FOLDED: tl.constexpr,
    MASKED: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """Load a tile's 16 fp32 vectors: image group * 16 + i, row `row`, values first + offset if `inside`, else 0.

    shape: images, rows and run of x. PAIRS: as in ptx.widen.
    """
    images, rows, run = shape
    step = (tl.zeros((), tl.int64) + rows) * run  # not rows.to(): Triton passes an argument of 1 as a constexpr
    origin = (group.to(tl.int64) * 16 * rows + row) * run + first
    tile = ()
    for i in tl.static_range(16):
        image = group.to(tl.int64) * 16 + i
        if FOLDED:
            source = tl.load(source_rows + image * rows + row)
            value = tl.load(x + (tl.maximum(source, 0) * run + first) + offset, mask=inside & (source >= 0), other=0.0)
        elif MASKED:
            there = inside & (image < images)
            value = tl.load(x + ((image * rows + row) * run + first) + offset, mask=there, other=0.0)
        elif PAIRS:  # shorter, and it takes more registers
            value = tl.load(x + (origin + i * step) + offset)
        else:
            value = tl.load(x + ((image * rows + row) * run + first) + offset)
        tile = tile + (ptx.widen(value, PAIRS),)
    return tile


# ---- what was observed -----------------------------------------------------------------------------------------------


@triton.jit
def observe_face(slots, top, count, IN_TURNS: tl.constexpr):
    """Raise one of SLOTS numbers by each warp's largest `top`, and return each warp's sum of `count`, int32 [4].

    Four warps reduce what they hold, without each other's values. Their four results then cross shared memory once, and
    four lanes of one warp send them by one instruction. IN_TURNS: lanes have taken the values in turns, as those of
    row_scales; otherwise a thread's values are neighbours.
    """
    slot = slots + (tl.program_id(0) * 4 + tl.arange(0, 4)) % SLOTS
    tops = tl.max(by_warp(nx.magnitude_bits(top), IN_TURNS), 0)
    tl.atomic_max(slot, tl.max(tops, 1), sem="relaxed")
    return tl.sum(tl.sum(by_warp(count, IN_TURNS), 0), 1)


@triton.jit
def by_warp(v, IN_TURNS: tl.constexpr):
    """Return v as [values of a thread or 1, 4, rest]: the middle axis is the warp that holds a value, of four."""
    n: tl.constexpr = v.numel
    parts: tl.constexpr = n // 128 if IN_TURNS and n > 128 else 1
    return tl.reshape(v, (parts, 4, n // parts // 4))


@triton.jit
def count_saturated(slots, count):
    """Add each warp's count, int32 [4], to one of SLOTS numbers; sent as in observe_face. Few are above 0, and wait."""
    slot = slots + (tl.program_id(0) * 4 + tl.arange(0, 4)) % SLOTS
    tl.atomic_add(slot, count, mask=count > 0, sem="relaxed")


@triton.jit
def finish_observed(work, given, seen, collected, saturated, OBSERVE: tl.constexpr):
    """Let the last program reduce what all have seen, write the amaxes to decode with, and collect (amax.collect).

    work: int32 [3, SLOTS], bits of amax of x, of the columnwise amax, saturated blocks; then a counter. Zeros are left.
    given: fp32 [2]. seen: fp32 [5]: amax of x, of the columnwise operand, saturated blocks, and the two given amaxes,
    NaN where the observed one is inf or NaN. collected: fp32 [2], raised to what was observed where that is finite
    (COLLECT); saturated: fp64 [1] (COUNT). OBSERVE: the sum of FINISH and of SAME (both faces are of x, not rotated),
    COLLECT, COUNT; without FINISH another launch goes on.
    """
    if FINISH & OBSERVE:
        tl.debug_barrier()  # this program's other warps have come here, too
        if is_last(work + 3 * SLOTS):
            take(work + 3 * SLOTS)
            lane = tl.arange(0, SLOTS)
            row = tl.max(take_all(work + lane), 0)
            col = tl.max(take_all(work + SLOTS + lane), 0)
            total = tl.sum(take_all(work + 2 * SLOTS + lane), 0).to(tl.float32)
            if SAME & OBSERVE:
                row = tl.maximum(row, col)
                col = row
            tl.store(seen, nx.float_of(row))
            tl.store(seen + 1, nx.float_of(col))
            tl.store(seen + 2, total)
            tl.store(seen + 3, tl.where(row < nx.INF_BITS, tl.load(given), float("nan")))
            tl.store(seen + 4, tl.where(col < nx.INF_BITS, tl.load(given + 1), float("nan")))
            if COLLECT & OBSERVE:
                finite = tl.where(row < nx.INF_BITS, nx.float_of(row), 0.0)
                tl.store(collected, tl.maximum(tl.load(collected), finite))
                finite = tl.where(col < nx.INF_BITS, nx.float_of(col), 0.0)
                tl.store(collected + 1, tl.maximum(tl.load(collected + 1), finite))
            if COUNT & OBSERVE:
                tl.store(saturated, tl.load(saturated) + total.to(tl.float64))


# ---- both faces of an operand ---------------------------------------------------------------------------------------


# per_row only divides the program's number: no kernel of its own for a multiple of 16, or for 1.
@triton.jit(do_not_specialize=["per_row"])
def quantize_kernel(
    x,
    source_rows,
    amax,
    seed,
    row_data,
    row_scale,
    col_data,
    col_scale,
    work,
    seen,
    collected,
    saturated,
    images,
    rows,
    run,
    per_row,
    word2,
    ROW: tl.constexpr,
    COL: tl.constexpr,
    RHT: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    OBSERVE: tl.constexpr,
    FOLDED: tl.constexpr,
    MASKED: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCKS: tl.constexpr,
    E4M3_MAX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Quantize one tile of an operand, rowwise and columnwise, from the same 16 x BLOCK values.

    x: [images, rows, run] or, FOLDED, its rows source_rows [16 groups, rows]. amax: fp32 [2] (rowwise, columnwise).
    row_data: bf16 or fp32 as x, or int32 [images, padded run / 8]; row_scale: uint8 [images, padded run / 16].
    col_data: bf16 or fp32 [16 groups, rows, run], or int64 [groups, rows, run]; col_scale: uint8 [groups, rows, run].
    work, seen, collected, saturated: see finish_observed, which says what OBSERVE is; 0: nothing is observed.
    seed: int64 [1]; word2: int32, the third word of Philox counters. per_row: tiles of a row.
    CHANNELS: of a group where they are no multiple of 16 (BLOCKS blocks then), else 0. ROW needs rows == 1.
    """
    pid = tl.program_id(0)
    tile_index = (pid.to(tl.uint32) % per_row.to(tl.uint32)).to(tl.int64)  # a division is shorter without a sign
    line = (pid.to(tl.uint32) // per_row.to(tl.uint32)).to(tl.int32)
    group = line // rows
    row = line % rows
    lane = tl.arange(0, BLOCK)
    first = tile_index * BLOCK  # of the padded run, where there is padding
    if CHANNELS:
        padded: tl.constexpr = BLOCKS * 16
        segment = first // padded
        at = (first % padded).to(tl.int32) + lane
        inside = at % padded < CHANNELS
        offset = at // padded * CHANNELS + at % padded
        # not run.to(): Triton passes an argument of 1 as a constexpr
        padded_run = (tl.zeros((), tl.int64) + run // CHANNELS) * padded
        left = padded_run - first
        first_value = segment * CHANNELS
        inside = inside & (lane < left)
    else:
        offset = lane
        padded_run = run
        left = run - first
        first_value = first
        inside = lane < left
    shape = (images, rows, run)
    # Codes leave more registers than values do, and so do tiles of random bytes, unless pairs must be neighbours.
    pairs: tl.constexpr = ROW != 2 or (STOCHASTIC and not ptx.packs_fp32())
    tile = load_tile(x, source_rows, shape, group, row, first_value, offset, inside, FOLDED, MASKED, pairs)
    column = (group.to(tl.int64) * rows + row) * run + first_value
    random = tile
    if STOCHASTIC:
        # the last term is zero: it gives the counters the layout of x, so that no random word changes threads
        index = column + offset + ((nx.bits_of(tile[0]) & 1) >> 1)
        random = nx.philox7(index, tl.load(seed), word2)
    # Images whose scales are computed at once: as few as give each thread one, where registers are short.
    at_once: tl.constexpr = 2 if BLOCK >= 1024 else 8
    row_top = tl.zeros((at_once, BLOCK // 16), tl.float32)
    saturated_rows = tl.zeros((at_once, BLOCK // 16), tl.int32)
    row_mult = 0.0
    # Of the tile's first image, in blocks, which packed rows are made of.
    blocks = (group.to(tl.int64) * 16 * padded_run + first) >> 4
    if ROW != 0:
        row_mult, s_dec = nx.tensor_factors(tl.load(amax), E4M3_MAX)
        # Within a tile 32 bits are enough; more than they hold may be left of the image.
        limit = tl.minimum(left, BLOCK).to(tl.int32) if MASKED else BLOCK
        step = tl.zeros((), tl.int64) + (padded_run >> 4)
        for i in tl.static_range(16):
            if i % at_once == 0:
                top, byte, s_bs, encs = row_scales(tile, i, at_once, row_mult, s_dec, pairs, BLOCK)
                if OBSERVE:
                    row_top = nx.max_nan(row_top, top)
                    saturated_rows += tl.where(top * row_mult > 448.0, 1, 0)
                if ROW == 1:
                    there = images - group * 16 - i
                    store_scales(row_scale, byte, blocks + i * step, step, limit, there, BLOCK, MASKED)
            v = tl.reshape(tile[i], (BLOCK // 16, 16))
            y = nx.scaled(v, encs[i % at_once][:, None], pairs)
            if STOCHASTIC:
                part = tl.reshape(nx.random_byte(random, i, pairs), (BLOCK // 16, 16))
                q, word = nx.e2m1_stochastic(y, part, pairs)
            else:
                q, word = nx.e2m1_nearest(y)
            image = group.to(tl.int64) * 16 + i
            if ROW == 2:
                value = tl.reshape(nx.signed(q, y) * s_bs[i % at_once][:, None], (BLOCK,))
                value = value.to(row_data.dtype.element_ty)
                place = row_data + (image * run + first_value) + offset
                if MASKED:
                    tl.store(place, value, mask=inside & (image < images))
                else:
                    tl.store(place, value)
            else:
                # What a thread of the table's tiles holds side by side.
                codes = packing.join_rows(word, y, BLOCK, 8 if BLOCK >= 1024 else 4)
                packing.store_rows(row_data, codes, blocks, i * step, limit, image < images, BLOCK, MASKED)
    col_top = tl.zeros((BLOCK,), tl.float32)
    col_mult = 0.0
    if COL != 0:
        # A rotated face has an amax, and so a tensor scale, of its own.
        col_mult, s_dec = nx.tensor_factors(tl.load(amax + 1), E4M3_MAX)
        if RHT:
            tile = nx.rotate16(tile, x.dtype.element_ty == tl.bfloat16, pairs)
        col_top = nx.max16(tile, pairs)
    if OBSERVE:  # before the columns are rounded: what it needs is not kept any longer
        total = tl.zeros((4,), tl.int32)
        if ROW != 0:
            total += observe_face(work, row_top, saturated_rows, True)
        if COL != 0:
            clipped = tl.where(inside & (col_top * col_mult > 448.0), 1, 0)
            total += observe_face(work + SLOTS, col_top, clipped, False)
        count_saturated(work + 2 * SLOTS, total)
    if COL != 0:
        byte, s_b, enc = nx.block_scale(col_top, col_mult, s_dec)
        words = ()
        ys = ()
        for i in tl.static_range(16):
            y = nx.scaled(tile[i], enc, pairs)
            if STOCHASTIC:
                q, word = nx.e2m1_stochastic(y, nx.random_byte(random, i, pairs), pairs)
            else:
                q, word = nx.e2m1_nearest(y)
            if COL == 2:
                image = group.to(tl.int64) * 16 + i
                place = col_data + ((image * rows + row) * run + first_value) + offset
                value = (nx.signed(q, y) * s_b).to(col_data.dtype.element_ty)
                if MASKED:
                    tl.store(place, value, mask=inside)
                else:
                    tl.store(place, value)
            else:
                words = words + (word,)
                ys = ys + (y,)
        if COL == 1:
            both = packing.join_words(words, ys)
            if MASKED:
                tl.store(col_data + column + offset, both, mask=inside)
                tl.store(col_scale + column + offset, byte.to(tl.uint8), mask=inside)
            else:
                tl.store(col_data + column + offset, both)
                tl.store(col_scale + column + offset, byte.to(tl.uint8))
    if OBSERVE:
        finish_observed(work, amax, seen, collected, saturated, OBSERVE)
