"""Join E2M1 codes to words inside kernels, and store what joins along a row.

    join_words, join_rows      sixteen codes to one int64; eight or four of a row to an int32 or int16
    store_rows                 the codes of a row's values

A word of numerics.e2m1_nearest and e2m1_stochastic holds the code, or is the value that the GPU still converts.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disable-error-code="assignment"
from __future__ import annotations

import triton
import triton.language as tl

from te_nvfp4_cv.ops.triton.numerics import CODE_BIAS, bits_of
from te_nvfp4_cv.ops.triton.ptx import INTERPRETED, convert, converts_e2m1


@triton.jit
def join_words(words, ys):
    """Pack the sixteen codes of each block into an int64, from e2m1 words and the values that were rounded."""
    low = join_codes(words, ys, 0, 8, True)  # element 0 lowest
    high = join_codes(words, ys, 8, 8, True)
    return low.to(tl.uint32, bitcast=True).to(tl.int64) | (high.to(tl.int64) << 32)


@triton.jit
def join_rows(word, y, BLOCK: tl.constexpr, WIDTH: tl.constexpr, SIGNED: tl.constexpr = True):
    """Pack the codes of BLOCK values [BLOCK / 16, 16], WIDTH neighbours to an int32 (8) or int16 (4): [BLOCK / WIDTH].

    WIDTH should be what a thread holds side by side: otherwise values cross shared memory.
    """
    words = neighbours(word, BLOCK, WIDTH)
    if INTERPRETED:
        codes = join_codes(words, neighbours(y, BLOCK, WIDTH), 0, WIDTH, SIGNED)
    elif converts_e2m1():
        codes = join_codes(words, words, 0, WIDTH, SIGNED)
    else:
        codes = join_codes(words, neighbours(y, BLOCK, WIDTH), 0, WIDTH, SIGNED)
    return codes


@triton.jit
def neighbours(v, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """Return WIDTH (8 or 4) vectors [BLOCK / WIDTH]: element k of each run of WIDTH of BLOCK values."""
    even, odd = tl.split(tl.reshape(v, (BLOCK // 2, 2)))
    v0, v2 = tl.split(tl.reshape(even, (BLOCK // 4, 2)))
    v1, v3 = tl.split(tl.reshape(odd, (BLOCK // 4, 2)))
    if WIDTH == 8:
        v0, v4 = tl.split(tl.reshape(v0, (BLOCK // 8, 2)))
        v1, v5 = tl.split(tl.reshape(v1, (BLOCK // 8, 2)))
        v2, v6 = tl.split(tl.reshape(v2, (BLOCK // 8, 2)))
        v3, v7 = tl.split(tl.reshape(v3, (BLOCK // 8, 2)))
        return v0, v1, v2, v3, v4, v5, v6, v7
    else:
        return v0, v1, v2, v3


@triton.jit
def join_codes(words, ys, FIRST: tl.constexpr, WIDTH: tl.constexpr, SIGNED: tl.constexpr):
    """Pack the WIDTH (8 or 4) codes from FIRST on, the first one lowest, into an int32 or int16."""
    if INTERPRETED:
        codes = horner(words, ys, FIRST, WIDTH, SIGNED)
    elif converts_e2m1():
        codes = convert(words, FIRST, WIDTH)
    else:
        codes = horner(words, ys, FIRST, WIDTH, SIGNED)
    return codes


@triton.jit
def horner(words, ys, FIRST: tl.constexpr, WIDTH: tl.constexpr, SIGNED: tl.constexpr):
    """Pack codes as join_codes does: magnitudes by Horner's rule, signs from ys' top nibbles.

    SIGNED: without, no value is below 0.
    """
    codes = four(words, FIRST)
    if WIDTH == 8:
        codes = (four(words, FIRST + 4) << 16) | (codes & 0xFFFF)
    if SIGNED:
        signs = bits_of(ys[FIRST + WIDTH - 1]).to(tl.uint32, bitcast=True) >> 28
        for k in tl.static_range(WIDTH - 2, -1, -1):
            signs = (signs << 4) | (bits_of(ys[FIRST + k]).to(tl.uint32, bitcast=True) >> 28)
        codes = codes | (signs & 0x88888888).to(tl.int32, bitcast=True)
    if WIDTH == 4:
        codes = codes.to(tl.int16)
    return codes


@triton.jit
def four(words, FIRST: tl.constexpr):
    """Return the magnitudes of the codes FIRST to FIRST + 3 in the low 16 bits; what lies above belongs to no code."""
    codes = words[FIRST + 3]
    for k in tl.static_range(2, -1, -1):
        codes = tl.add(codes << 4, words[FIRST + k], sanitize_overflow=False)
    return tl.sub(codes, CODE_BIAS * 0x1111, sanitize_overflow=False)


@triton.jit
def store_rows(data, codes, origin, at, limit, there, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """Store join_rows' codes of values 16 * (origin + at) on: those below `limit` if `there`, or all if not MASKED.

    origin: of the tile, so that its images share an address, and `at` is added to it.
    """
    width: tl.constexpr = BLOCK // codes.shape[0]
    lane = tl.arange(0, BLOCK // width)
    if width == 8:
        place = (data + origin * 2 + lane) + at * 2
    else:
        place = (data.to(tl.pointer_type(tl.int16), bitcast=True) + origin * 4 + lane) + at * 4
    if MASKED:
        tl.store(place, codes, mask=(lane * width < limit) & there)
    else:
        tl.store(place, codes)
