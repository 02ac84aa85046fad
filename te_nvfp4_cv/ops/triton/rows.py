"""The scales of a tile's rowwise blocks inside kernels, each computed by one thread.

    row_scales      the blocks' amaxes, and from them bytes, s_b and enc_b
    store_scales    the bytes of those images

A tile's vectors lie as they were loaded: two or four threads hold the values of a rowwise block, and would compute its
scale each. Between the maxima of threads and those of blocks `apart` lets the compiler choose how blocks of several
images lie, so that every thread has its own, and neighbours store bytes side by side; what comes out goes back in one
exchange. More images at once take fewer exchanges and more registers.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disable-error-code="assignment"
from __future__ import annotations

import triton
import triton.language as tl

from te_nvfp4_cv.ops.triton import numerics as nx


@triton.jit
def row_scales(tile, FIRST: tl.constexpr, COUNT: tl.constexpr, mult, s_dec, PAIRS: tl.constexpr, BLOCK: tl.constexpr):
    """Return what belongs to the rowwise blocks of COUNT (2 or 8) images of a tile, from FIRST on.

    mult, s_dec: as for numerics.block_scale. PAIRS: see ptx.magnitude. Returns amaxes and bytes, [COUNT, BLOCK / 16],
    and of s_b and of enc_b a tuple of vectors [BLOCK / 16].
    """
    held: tl.constexpr = 8 if BLOCK >= 1024 else 4  # values that a thread of the table's tiles holds side by side
    threads: tl.constexpr = 16 // held  # of a block
    n: tl.constexpr = BLOCK // 16
    tops = ()
    for i in tl.static_range(COUNT):
        tops = tops + (nx.max_of_rows(tl.reshape(tile[FIRST + i], (BLOCK // held, held)), PAIRS),)
    s = tl.permute(tl.reshape(stack(tops, COUNT), (n, threads, COUNT)), (1, 2, 0))
    s = apart(tl.reshape(s, (threads, COUNT * n)))
    amax_b = tl.reshape(nx.max_of_columns(s), (COUNT, n))
    byte, s_b, enc = nx.block_scale(amax_b, mult, s_dec)
    return amax_b, byte, unstack(s_b, COUNT), unstack(enc, COUNT)


@triton.jit
def stack(v, COUNT: tl.constexpr):
    """Return [n, COUNT], flat, of a tuple of 2 or 8 vectors."""
    if COUNT == 2:
        s = tl.join(v[0], v[1])
    else:
        even = tl.join(tl.join(v[0], v[4]), tl.join(v[2], v[6]))
        odd = tl.join(tl.join(v[1], v[5]), tl.join(v[3], v[7]))
        s = tl.join(even, odd)
    return s


@triton.jit
def unstack(v, COUNT: tl.constexpr):
    """Return the 2 or 8 rows of v [COUNT, n]."""
    n: tl.constexpr = v.shape[1]
    t = tl.trans(v)
    rows = ()
    for i in tl.static_range(COUNT):
        if COUNT == 2:
            part = tl.split(t)[i]
        else:
            part = tl.split(tl.split(tl.split(tl.reshape(t, (n, 2, 2, 2)))[i & 1])[(i >> 1) & 1])[i >> 2]
        rows = rows + (part,)
    return rows


@triton.jit
def apart(v):
    """Return v [m, n]. The compiler hands a layout on from load to store, but not through a gather."""
    # Along an axis of 1 there is nothing to gather, and no other lane to ask.
    zeros = tl.zeros((1, v.shape[0], v.shape[1]), tl.int32)
    return tl.reshape(tl.gather(v[None, :, :], zeros, 0), (v.shape[0], v.shape[1]))


@triton.jit
def store_scales(scale, byte, origin, step, limit, images, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """Store row_scales' bytes, image i's from block `origin` + i * step on.

    limit: values of a row from the tile on, images: those from the tile's first on; MASKED: fewer may be there than the
    tile has.
    """
    block = tl.arange(0, BLOCK // 16)[None, :]
    image = tl.arange(0, byte.shape[0])[:, None]
    place = scale + origin + (image * step + block)
    if MASKED:
        tl.store(place, byte.to(tl.uint8), mask=(block * 16 < limit) & (image < images))
    else:
        tl.store(place, byte.to(tl.uint8))
