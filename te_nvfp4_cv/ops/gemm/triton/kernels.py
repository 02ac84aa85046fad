"""The GEMM kernel of two packed matrices, both with their blocks of 16 along the contraction.

    out[i, j] = sum over blocks of s_a[i, block] s_b[j, block] (codes of a . codes of b), fp32, without tensor scales

With NATIVE, packed codes and E4M3 scales go to the FP4 tensor cores (tl.dot_scaled). Otherwise codes become fp16 in
registers (ops/triton/decode.py), exactly, and low and high nibbles are two products. No program takes only a part of
the contraction: the result depends on the tile sizes alone.
"""

from __future__ import annotations

import triton
import triton.language as tl

from te_nvfp4_cv.ops.triton.decode import multiply_packed


@triton.jit
def packed_product(
    p_a,  # uint8 [rows, blocks * 8]
    p_a_scale,  # uint8 [rows, blocks]
    p_b,  # uint8 [columns, blocks * 8]
    p_b_scale,  # uint8 [columns, blocks]
    p_out,  # fp32 [rows, columns]
    rows,
    columns,
    units,  # blocks / UNIT
    UNIT: tl.constexpr,  # a power of two that divides blocks
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    FULL: tl.constexpr,  # blocks is a multiple of BK / 16
    WIDE: tl.constexpr,  # 64-bit offsets
    NATIVE: tl.constexpr,
    QUADS: tl.constexpr,
    PTX: tl.constexpr,
):
    """Multiply one tile [BM, BN]. Programs go through eight rows of tiles at a time, so that what neighbours read stays
    in L2.
    """
    QB: tl.constexpr = BK // 16
    HB: tl.constexpr = BK // 2
    tiles_m, tiles_n = tl.cdiv(rows, BM), tl.cdiv(columns, BN)
    band = tl.program_id(0) // (8 * tiles_n)
    height = tl.minimum(tiles_m - band * 8, 8)
    i_m = band * 8 + tl.program_id(0) % (8 * tiles_n) % height
    i_n = tl.program_id(0) % (8 * tiles_n) // height
    o_m = i_m * BM + tl.arange(0, BM)
    o_n = i_n * BN + tl.arange(0, BN)
    i_a, i_b = tl.where(o_m < rows, o_m, 0), tl.where(o_n < columns, o_n, 0)
    if WIDE:
        i_a, i_b = i_a.to(tl.int64), i_b.to(tl.int64)
    o_k, o_q = tl.arange(0, HB), tl.arange(0, QB)
    p_a_row = p_a + (i_a * units)[:, None] * (UNIT * 8) + o_k[None, :]
    p_b_row = p_b + (i_b * units)[:, None] * (UNIT * 8) + o_k[None, :]
    p_as_row = p_a_scale + (i_a * units)[:, None] * UNIT + o_q[None, :]
    p_bs_row = p_b_scale + (i_b * units)[:, None] * UNIT + o_q[None, :]
    acc = tl.zeros((BM, BN), tl.float32)
    for chunk in range(0, tl.cdiv(units * UNIT, QB)):
        if FULL:
            a, b = tl.load(p_a_row + chunk * HB), tl.load(p_b_row + chunk * HB)
            sa, sb = tl.load(p_as_row + chunk * QB), tl.load(p_bs_row + chunk * QB)
        else:
            rest = units * UNIT - chunk * QB
            m_k, m_q = (o_k < rest * 8)[None, :], (o_q < rest)[None, :]
            a, b = tl.load(p_a_row + chunk * HB, mask=m_k, other=0), tl.load(p_b_row + chunk * HB, mask=m_k, other=0)
            sa = tl.load(p_as_row + chunk * QB, mask=m_q, other=0)
            sb = tl.load(p_bs_row + chunk * QB, mask=m_q, other=0)
        acc = multiply_packed(acc, a, sa, b, sb, QB, NATIVE, QUADS, PTX)
    if not NATIVE:
        acc = acc * 16384.0  # 2^-7 of either operand
    p_tile = p_out + o_m.to(tl.int64)[:, None] * columns + o_n[None, :]
    tl.store(p_tile, acc, mask=(o_m < rows)[:, None] & (o_n < columns)[None, :])
