"""Triton kernels that turn packed faces back into values: code * scale, exact in bf16, optionally times a factor.

    unpack_columns_kernel    sixteen images (or output channels) in 64 bits: sixteen rows of the result a lane
    unpack_rows_kernel       eight channels in 32 bits: eight neighbouring values of the result a lane
    unpack_both_kernel       a weight's rows and an operand's columns, what a layer's backward needs, in one launch

FACTOR: 0 for none, else how many parts the factor has (elementwise.product_of).
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disable-error-code="assignment"
from __future__ import annotations

import triton
import triton.language as tl

from te_nvfp4_cv.ops.quantize.triton.amax_kernels import foresee
from te_nvfp4_cv.ops.triton import numerics as nx
from te_nvfp4_cv.ops.triton.elementwise import product_of


@triton.jit
def unpack_columns(
    pid,
    data,
    scale,
    out,
    parts,
    run,
    rows,
    per_band,
    group_blocks,
    FACTOR: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write out [groups * rows, run] from data int64 and scale uint8 [groups, group_blocks, run]: sixteen rows a block.

    per_band: programs of a band of sixteen rows. The grid has one axis, because the second and third end at 65535.
    """
    band = (pid // per_band).to(tl.int64)
    first = (pid % per_band).to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)
    source = band * run + first
    ob = (band % group_blocks) * 16
    if MASKED:
        inside = lane < run - first
        both = tl.load(data + source + lane, mask=inside, other=0)
        s_b = nx.decode_e4m3(tl.load(scale + source + lane, mask=inside, other=0).to(tl.int32))
    else:
        inside = lane < BLOCK
        both = tl.load(data + source + lane)
        s_b = nx.decode_e4m3(tl.load(scale + source + lane).to(tl.int32))
    low = both.to(tl.int32)
    high = (both >> 32).to(tl.int32)
    for i in tl.static_range(16):
        value = nx.decode_e2m1(low if i < 8 else high, i % 8) * s_b
        if FACTOR:
            value = value * product_of(parts[0], parts[1], parts[2], FACTOR)
        place = out + ((band // group_blocks * rows + ob + i) * run + first) + lane
        if MASKED:
            tl.store(place, value.to(out.dtype.element_ty), mask=inside & (ob + i < rows))
        else:
            tl.store(place, value.to(out.dtype.element_ty))


@triton.jit
def unpack_rows(
    pid,
    data,
    scale,
    out,
    parts,
    words,
    width,
    taps,
    group_rows,
    row_blocks,
    FACTOR: tl.constexpr,
    TILED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write out [segments, width] from data int32 [segments, row_blocks * 2] and scale uint8, one a block.

    TILED: segments are (row, tap), and each of the scales [group, ob, taps, row_blocks] serves sixteen rows.
    """
    word = pid.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = word < words
    codes = tl.load(data + word, mask=there, other=0)
    block = word // 2  # a block of 16 codes is two words
    segment = block // row_blocks
    kb = block % row_blocks
    if TILED:
        row = segment // taps
        group = row // group_rows
        per_group = (group_rows + 15) // 16
        band = group * per_group + row % group_rows // 16
        block = (band * taps + segment % taps) * row_blocks + kb
    s_b = nx.decode_e4m3(tl.load(scale + block, mask=there, other=0).to(tl.int32))
    k = tl.arange(0, 8)[None, :]
    # Each code's bits move to the sign, exponent and mantissa of an fp32; the factor 2^126 takes up the difference of
    # the two biases, 127 - 1.
    value = nx.float_of(((codes[:, None] << (28 - 4 * k)) >> 6) & -0x7E400000) * 8.507059173023462e37 * s_b[:, None]
    if FACTOR:
        value = value * product_of(parts[0], parts[1], parts[2], FACTOR)
    channel = (kb * 16 + word % 2 * 8)[:, None] + k
    place = out + (segment[:, None] * width + channel)
    tl.store(place, value.to(out.dtype.element_ty), mask=there[:, None] & (channel < width))


@triton.jit(do_not_specialize=["rows", "per_band", "group_blocks"])
def unpack_columns_kernel(
    data,
    scale,
    out,
    factor,
    other,
    number,
    run,
    rows,
    per_band,
    group_blocks,
    FACTOR: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Run unpack_columns, in each program."""
    pid, parts = tl.program_id(0), (factor, other, number)
    unpack_columns(pid, data, scale, out, parts, run, rows, per_band, group_blocks, FACTOR, MASKED, BLOCK)


@triton.jit(do_not_specialize=["words", "taps", "group_rows", "row_blocks"])
def unpack_rows_kernel(
    data,
    scale,
    out,
    factor,
    other,
    number,
    words,
    width,
    taps,
    group_rows,
    row_blocks,
    FACTOR: tl.constexpr,
    TILED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Run unpack_rows, in each program."""
    pid, parts = tl.program_id(0), (factor, other, number)
    unpack_rows(pid, data, scale, out, parts, words, width, taps, group_rows, row_blocks, FACTOR, TILED, BLOCK)


@triton.jit(do_not_specialize=["words", "taps", "group_rows", "row_blocks", "w_programs", "rows", "per_band"])
def unpack_both_kernel(
    w_data,
    w_scale,
    data,
    scale,
    w_out,
    out,
    w_factor,
    w_other,
    factor,
    other,
    used,
    seen,
    next,
    w_number,
    words,
    width,
    taps,
    group_rows,
    row_blocks,
    number,
    run,
    rows,
    per_band,
    w_programs,
    FACTOR: tl.constexpr,
    W_FACTOR: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
    W_BLOCK: tl.constexpr,
    RULE: tl.constexpr,
):
    """Run unpack_rows of a weight's tiles in the first w_programs, and unpack_columns of one group in the others.

    RULE, used, seen, next: what the layer's delayed scales will be (amax_kernels.foresee), unless -1.
    """
    pid = tl.program_id(0)
    if RULE >= 0:
        if pid == 0:
            foresee(used, seen, next, RULE)
    if pid < w_programs:
        # Not `parts` too: Triton joins a name that both branches set, and the types of pointers may differ.
        w_parts = (w_factor, w_other, w_number)
        unpack_rows(
            pid, w_data, w_scale, w_out, w_parts, words, width, taps, group_rows, row_blocks, W_FACTOR, True, W_BLOCK
        )
    else:
        parts = (factor, other, number)
        bands = rows // 16
        unpack_columns(pid - w_programs, data, scale, out, parts, run, rows, per_band, bands, FACTOR, MASKED, BLOCK)
