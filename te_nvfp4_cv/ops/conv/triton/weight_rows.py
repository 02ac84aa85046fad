"""Rows of one output channel each: how a kernel w is written for data products, and how they multiply by it.

    prepare_kernel   a packed face of a kernel -> rows of one output channel, contraction contiguous, blocks padded
    add_chunk        a step of a product: BK contracted channels of a tile of packed x, and of such rows
"""

from __future__ import annotations

import triton
import triton.language as tl

from te_nvfp4_cv.ops.triton.decode import blocks_to_half, codes_to_half, multiply_packed, quad_place, scale_to_half

ROWS, TILES, COLUMNS, TRANSPOSE = 0, 1, 2, 3  # FACE of prepare_kernel; see there


@triton.jit
def prepare_kernel(
    p_data,  # uint8, a packed face of ops/quantize/operand.py
    p_scale,  # uint8, its E4M3 bytes
    p_out,  # HALF: fp16 [N, taps, blocks_out / QB, 2, QB * 8], low nibbles first; else uint8 [N, taps, blocks_out * 8]
    p_out_scale,  # uint8 [N, taps, blocks_out]; not written for HALF
    total,  # N * taps * blocks_out
    taps,
    blocks,  # of the contraction, per tap and group
    blocks_out,  # the same padded with zero blocks
    each,  # output channels (rows N) per group
    each_in,  # contracted channels per group
    FACE: tl.constexpr,
    HALF: tl.constexpr,
    QUADS: tl.constexpr,  # HALF: in the order of decode.quad_place
    QB: tl.constexpr,  # blocks of 16 a step of data_product; divides blocks_out
    BLOCK: tl.constexpr,  # blocks of 16 a program
):
    """Write one face of a kernel as rows [N, taps, blocks], where N counts the output channels of the product.

    FACE says what is read: ROWS [N, taps, blocks * 8] with a scale per block; TILES the same with a scale per 16 rows
    [G, ceil(each / 16), taps, blocks]; COLUMNS [G, blocks, taps, each, 8]; TRANSPOSE: the TILES face of the transposed
    product, whose rows are contracted here: [G * each_in, taps, ceil(each / 16) * 8], scales [G, blocks, taps, ...].
    """
    o_item = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    i_block = o_item % blocks_out
    i_tap = o_item // blocks_out % taps
    i_row = o_item // blocks_out // taps
    group, within = i_row // each, i_row % each
    m_item = (o_item < total) & (i_block < blocks)
    o_byte = tl.arange(0, 8)
    if FACE == 3:
        cross = (each + 15) // 16  # blocks of the rows' own channels, along which the codes lie in memory
        source = group * each_in + i_block * 16
        inside = i_block[:, None] * 16 + 2 * o_byte[None, :]
        o_code = ((source[:, None] + 2 * o_byte[None, :]) * taps + i_tap[:, None]) * (cross * 8) + within[:, None] // 2
        first = tl.load(p_data + o_code, mask=m_item[:, None] & (inside < each_in), other=0)
        second = tl.load(p_data + o_code + taps * cross * 8, mask=m_item[:, None] & (inside + 1 < each_in), other=0)
        odd = within[:, None] % 2 == 1
        low = tl.where(odd, first >> 4, first & 15)
        high = tl.where(odd, second & 0xF0, (second & 15) << 4)
        data = (low | high).to(tl.uint8)
        o_scale = ((group * blocks + i_block) * taps + i_tap) * cross + within // 16
    elif FACE == 2:
        o_scale = ((group * blocks + i_block) * taps + i_tap) * each + within
        data = tl.load(p_data + o_scale[:, None] * 8 + o_byte[None, :], mask=m_item[:, None], other=0)
    else:
        o_block = (i_row * taps + i_tap) * blocks + i_block
        data = tl.load(p_data + o_block[:, None] * 8 + o_byte[None, :], mask=m_item[:, None], other=0)
        if FACE == 1:
            o_scale = ((group * ((each + 15) // 16) + within // 16) * taps + i_tap) * blocks + i_block
        else:
            o_scale = o_block
    scale = tl.load(p_scale + o_scale, mask=m_item, other=0)
    m_out = o_item < total
    if HALF:
        low_half, high_half = codes_to_half(data)
        factor = scale_to_half(scale)[:, None]
        o_place = (o_item % QB * 8)[:, None] + o_byte[None, :]
        if QUADS:
            o_place = quad_place(o_place)
        target = p_out + (o_item // QB * (QB * 16))[:, None] + o_place
        tl.store(target, low_half * factor * 128.0, mask=m_out[:, None])
        tl.store(target + QB * 8, high_half * factor * 128.0, mask=m_out[:, None])
    else:
        tl.store(p_out + o_item[:, None] * 8 + o_byte[None, :], data, mask=m_out[:, None])
        tl.store(p_out_scale + o_item, scale, mask=m_out)


@triton.jit
def add_chunk(
    acc,
    x,  # this chunk's codes: an address, and offsets [BM, BK / 2]
    x_scale,  # its scales: an address, and offsets [BM, BK / 16]
    m_row,  # [BM]: the rows of x that are there
    rest,  # blocks of x from this chunk on
    w,  # of prepare_kernel: data and scales
    w_chunk,  # [BN]: this chunk in them
    BK: tl.constexpr,
    FULL: tl.constexpr,  # rest is never less than BK / 16
    NATIVE: tl.constexpr,
    QUADS: tl.constexpr,
    PTX: tl.constexpr,
):
    """Return acc + x w^T over BK channels, [BM, BN]; without NATIVE it is 2^-7 of the sum (ops/triton/decode.py)."""
    QB: tl.constexpr = BK // 16
    HB: tl.constexpr = BK // 2
    p_w, p_w_scale = w
    o_k = tl.arange(0, HB)
    o_q = tl.arange(0, QB)
    m_x = m_row[:, None]
    m_xs = m_row[:, None]
    if not FULL:
        m_x = m_x & (o_k[None, :] < rest * 8)
        m_xs = m_xs & (o_q[None, :] < rest)
    data = tl.load(x[0] + x[1], mask=m_x, other=0)
    scale = tl.load(x_scale[0] + x_scale[1], mask=m_xs, other=0)
    if NATIVE:
        w_data = tl.load(p_w + w_chunk[:, None] * HB + o_k[None, :])
        w_scale = tl.load(p_w_scale + w_chunk[:, None] * QB + o_q[None, :])
        acc = multiply_packed(acc, data, scale, w_data, w_scale, QB, NATIVE, QUADS, PTX)
    else:
        p_low = p_w + w_chunk[:, None] * BK + o_k[None, :]
        w_low = tl.load(p_low)
        w_high = tl.load(p_low + HB)
        low, high = blocks_to_half(data, scale, acc.shape[0], QB, QUADS, PTX)
        acc = tl.dot(low, tl.trans(w_low), acc)
        acc = tl.dot(high, tl.trans(w_high), acc)
    return acc
