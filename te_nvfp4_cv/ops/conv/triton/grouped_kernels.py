"""Kernels of grouped linear layers (mixture of experts): the products of all experts in one launch.

    grouped_product   fprop and dgrad: y[row, n] = sum over blocks of 16 channels, with the weight of the row's expert
    grouped_weight    wgrad: dw[expert, n, c] = sum over the expert's blocks of 16 rows
    grouped_sums      db[expert, n] = sum of the expert's rows

Where experts begin is read from the offsets on the GPU: a program counts the tiles of the experts before its own, so
that the host launches as many as any offsets could need and never waits. Offsets that fall or exceed the tokens count
as no rows. One tile is that of kernels.py's linear layer, with the same order of sums: equal bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from te_nvfp4_cv.ops.conv.triton.weight_rows import add_chunk
from te_nvfp4_cv.ops.triton.decode import multiply_packed, scales_by_words


@triton.jit
def _end(p_offsets, expert, experts, start, tokens):
    """Return where an expert's rows end; the rows of nobody, behind those of all, are those of one more expert."""
    end = tl.load(p_offsets + expert, mask=expert < experts, other=tokens).to(tl.int32)
    return tl.minimum(tl.maximum(end, start), tokens)


@triton.jit
def _place(p_offsets, experts, tokens, tile, SIZE: tl.constexpr):
    """Return the expert of a tile of SIZE rows, its first row, and the end of the expert's rows; one after all: none.

    Tiles are counted expert by expert, and none has rows of two.
    """
    start, before = tl.zeros((), tl.int32), tl.zeros((), tl.int32)
    expert, first, last = start, start, start
    for e in range(0, experts + 1):
        end = _end(p_offsets, e, experts, start, tokens)
        tiles = (end - start + SIZE - 1) // SIZE
        here = (tile >= before) & (tile < before + tiles)
        expert = tl.where(here, e, expert)
        first = tl.where(here, start + (tile - before) * SIZE, first)
        last = tl.where(here, end, last)
        before += tiles
        start = end
    return expert, first, last


@triton.jit(do_not_specialize=["tokens", "experts", "chunks"])
def grouped_product(
    p_x,  # uint8 [tokens, blocks * 8]
    p_x_scale,  # uint8 [tokens, blocks]
    p_w,  # as weight_rows.prepare_kernel writes it, rows [experts * channels]
    p_w_scale,
    p_alpha,  # fp32 [1] or [experts]; unused without ALPHA
    p_bias,  # [experts, channels] or unused
    p_offsets,  # int32 or int64 [experts]
    p_y,  # [tokens, channels]
    tokens,
    experts,
    channels,
    units,  # blocks / UNIT
    chunks,  # ceil(blocks * 16 / BK)
    UNIT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    FULL: tl.constexpr,  # blocks is a multiple of BK / 16
    WIDE: tl.constexpr,  # 64-bit offsets
    ALPHA: tl.constexpr,  # 0 none, 1 one, 2 per expert
    BIAS: tl.constexpr,
    NATIVE: tl.constexpr,
    QUADS: tl.constexpr,
    PTX: tl.constexpr,
):
    """Compute a tile [BM rows of one expert, BN channels]; rows of nobody get zeros."""
    QB: tl.constexpr = BK // 16
    HB: tl.constexpr = BK // 2
    tiles_n = tl.cdiv(channels, BN)
    i_n = tl.program_id(0) % tiles_n
    expert, first, last = _place(p_offsets, experts, tokens, tl.program_id(0) // tiles_n, BM)
    o_m = first + tl.arange(0, BM)
    m_m = o_m < last
    i_m = tl.where(m_m, o_m, 0)
    o_n = i_n * BN + tl.arange(0, BN)
    owned = expert < experts
    i_row = tl.where(owned, expert, 0) * channels + tl.where(o_n < channels, o_n, 0)
    if WIDE:
        i_m, i_row = i_m.to(tl.int64), i_row.to(tl.int64)
    o_k = tl.arange(0, HB)
    o_q = tl.arange(0, QB)
    o_x = (i_m * units)[:, None] * (UNIT * 8) + o_k[None, :]
    o_xs = (i_m * units)[:, None] * UNIT + o_q[None, :]
    acc = tl.zeros((BM, BN), tl.float32)
    steps = tl.where(owned & (first < last), chunks, 0)
    for chunk in range(0, steps):
        rest = units * UNIT - chunk * QB
        x = p_x + chunk * HB, o_x
        xs = p_x_scale + chunk * QB, o_xs
        acc = add_chunk(acc, x, xs, m_m, rest, (p_w, p_w_scale), i_row * chunks + chunk, BK, FULL, NATIVE, QUADS, PTX)
    if not NATIVE:
        acc = acc * 128.0  # the 2^-7 of ops/triton/decode.py
    if ALPHA == 1:
        acc = acc * tl.load(p_alpha)
    elif ALPHA == 2:
        acc = acc * tl.load(p_alpha + tl.where(owned, expert, 0))
    if BIAS:
        acc = acc + tl.load(p_bias + i_row).to(tl.float32)[None, :]
    acc = tl.where(owned, acc, 0.0)  # alpha or the bias may be non-finite
    p_out = p_y + o_m.to(tl.int64)[:, None] * channels + o_n[None, :]
    tl.store(p_out, acc.to(p_y.dtype.element_ty), mask=m_m[:, None] & (o_n < channels)[None, :])


@triton.jit(do_not_specialize=["tokens", "experts"])
def grouped_weight(
    p_b,  # uint8 [blocks of 16 rows, each_b, 8]
    p_b_scale,  # uint8 [blocks of 16 rows, each_b]
    p_a,  # uint8 [blocks of 16 rows, each_a, 8]
    p_a_scale,
    p_alpha,  # fp32 [1] or [experts]; unused without ALPHA
    p_offsets,  # int32 or int64 [experts]
    p_dw,  # [experts, each_b, each_a]
    tokens,
    experts,
    each_b,
    each_a,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    ALPHA: tl.constexpr,  # 0 none, 1 one, 2 per expert
    WORDS: tl.constexpr,  # each_a, each_b and the addresses of scales are multiples of 4; for NATIVE
    NATIVE: tl.constexpr,
    QUADS: tl.constexpr,
    PTX: tl.constexpr,
):
    """Compute a tile [BM, BN] of one expert's dw. The contraction is not cut: experts are work enough for a GPU."""
    QB: tl.constexpr = BK // 16
    tiles_n = tl.cdiv(each_a, BN)
    i_n = tl.program_id(0) % tiles_n
    i_m = tl.program_id(0) // tiles_n
    expert = tl.program_id(1)
    start, first, blocks = tl.zeros((), tl.int32), tl.zeros((), tl.int32), tl.zeros((), tl.int32)
    for e in range(0, expert + 1):
        end = _end(p_offsets, e, experts, start, tokens)
        first += blocks
        blocks = (end - start + 15) // 16
        start = end
    o_m = i_m * BM + tl.arange(0, BM)
    o_n = i_n * BN + tl.arange(0, BN)
    m_b, m_a = o_m < each_b, o_n < each_a
    o_q = tl.arange(0, QB)
    o_k = tl.arange(0, QB * 8)
    q_k = o_k // 8
    o_b = o_m[:, None] * 8 + (q_k * each_b * 8 + o_k % 8)[None, :]
    o_bs = o_m[:, None] + (o_q * each_b)[None, :]
    o_a = o_n[:, None] * 8 + (q_k * each_a * 8 + o_k % 8)[None, :]
    o_as = o_n[:, None] + (o_q * each_a)[None, :]
    acc = tl.zeros((BM, BN), tl.float32)
    for step in range(0, tl.cdiv(blocks, QB)):
        block = (first + step * QB).to(tl.int64)
        m_q = o_q < blocks - step * QB
        m_k = (q_k < blocks - step * QB)[None, :]
        b = tl.load(p_b + block * each_b * 8 + o_b, mask=m_b[:, None] & m_k, other=0)
        a = tl.load(p_a + block * each_a * 8 + o_a, mask=m_a[:, None] & m_k, other=0)
        if WORDS:
            p_bs = p_b_scale + block * each_b + i_m * BM
            p_as = p_a_scale + block * each_a + i_n * BN
            bs = scales_by_words(p_bs, o_q * (each_b // 4), m_q, each_b - i_m * BM, BM, QB, PTX)
            sa = scales_by_words(p_as, o_q * (each_a // 4), m_q, each_a - i_n * BN, BN, QB, PTX)
        else:
            bs = tl.load(p_b_scale + block * each_b + o_bs, mask=m_b[:, None] & m_q[None, :], other=0)
            sa = tl.load(p_a_scale + block * each_a + o_as, mask=m_a[:, None] & m_q[None, :], other=0)
        acc = multiply_packed(acc, b, bs, a, sa, QB, NATIVE, QUADS, PTX)
    if not NATIVE:
        acc = acc * 16384.0  # 2^-7 of either operand
    if ALPHA == 1:
        acc = acc * tl.load(p_alpha)
    elif ALPHA == 2:
        acc = acc * tl.load(p_alpha + expert)
    acc = tl.where(blocks > 0, acc, 0.0)  # alpha may be non-finite
    o_row = expert.to(tl.int64) * each_b + o_m
    p_tile = p_dw + o_row[:, None] * each_a + o_n[None, :]
    tl.store(p_tile, acc.to(p_dw.dtype.element_ty), mask=m_b[:, None] & m_a[None, :])


@triton.jit(do_not_specialize=["tokens", "experts"])
def grouped_sums(
    p_dy,  # [tokens, channels]
    p_offsets,  # int32 or int64 [experts]
    p_out,  # fp32 [experts, channels]
    tokens,
    experts,
    channels,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add up the rows of one expert, ROWS at a time."""
    expert = tl.program_id(1)
    o_n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    start, end = tl.zeros((), tl.int32), tl.zeros((), tl.int32)
    for e in range(0, expert + 1):
        start = end
        end = _end(p_offsets, e, experts, start, tokens)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for row in range(start, end, ROWS):
        o_m = row + tl.arange(0, ROWS)
        p_tile = p_dy + o_m.to(tl.int64)[:, None] * channels + o_n[None, :]
        total += tl.load(p_tile, mask=(o_m < end)[:, None] & (o_n < channels)[None, :], other=0.0).to(tl.float32)
    tl.store(p_out + expert.to(tl.int64) * channels + o_n, tl.sum(total, 0), mask=o_n < channels)
