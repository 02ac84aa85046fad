"""Decode packed E2M1 codes and E4M3 scale bytes to fp16 inside kernels, exactly, by integer operations.

    code     s e e m         -> fp16 bits s 000ee m0...     = value * 2^-14, the subnormal code 0.5 too
    scale    0 e e e e m m m -> fp16 bits 0 0eeee mmm 0...  = value * 2^-8;   times 2^15: value * 2^7
    product  code * scale * 2^-7                            at most 6 significant bits, from 2^-17 on: exact in fp16

The 2^-7 keeps the scale (at most 448 * 2^7) and the product in fp16's range; whoever multiplies takes it out again,
once per output. No fp8 type is used, so that the same code compiles from sm_80 on. Low and high nibbles stay apart, as
operands of two products: a contraction may visit its elements in any order, and interleaving would cost a shuffle each.
Scale bytes are those of quantized blocks, 0x00..0x7E: a sign or a NaN is not decoded.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Four bytes of codes and four fp16 scales to four low and four high products: fp16 pairs share a register.
# The plain path below says the same for one element; the compiler does not find the pairs by itself.
UNPACK = tl.constexpr(
    """{
    .reg .b32 h, t;
    prmt.b32 h, $4, 0, 0x1404;
    shr.b32 t, h, 3;
    and.b32 t, t, 0x0E000E00;
    lop3.b32 t, h, 0x80008000, t, 0xEA;
    mul.rn.f16x2 $2, t, $5;
    shl.b32 t, h, 1;
    and.b32 t, t, 0x0E000E00;
    shl.b32 h, h, 4;
    lop3.b32 t, h, 0x80008000, t, 0xEA;
    mul.rn.f16x2 $0, t, $5;
    prmt.b32 h, $4, 0, 0x3424;
    shr.b32 t, h, 3;
    and.b32 t, t, 0x0E000E00;
    lop3.b32 t, h, 0x80008000, t, 0xEA;
    mul.rn.f16x2 $3, t, $6;
    shl.b32 t, h, 1;
    and.b32 t, t, 0x0E000E00;
    shl.b32 h, h, 4;
    lop3.b32 t, h, 0x80008000, t, 0xEA;
    mul.rn.f16x2 $1, t, $6;
    }"""
)

# Four words of four bytes to the words of their first, second, third and fourth bytes.
TRANSPOSE = tl.constexpr(
    """{
    .reg .b32 a, b, c, d;
    prmt.b32 a, $4, $5, 0x5140;
    prmt.b32 b, $6, $7, 0x5140;
    prmt.b32 c, $4, $5, 0x7362;
    prmt.b32 d, $6, $7, 0x7362;
    prmt.b32 $0, a, b, 0x5410;
    prmt.b32 $1, a, b, 0x7632;
    prmt.b32 $2, c, d, 0x5410;
    prmt.b32 $3, c, d, 0x7632;
    }"""
)


@triton.jit
def scale_to_half(scale):
    """Return value * 2^7, fp16, of E4M3 bytes (uint8, any shape)."""
    return (scale.to(tl.uint16) << 7).to(tl.float16, bitcast=True) * 32768.0


@triton.jit
def codes_to_half(data):
    """Return value * 2^-14, fp16, of the low and of the high E2M1 code in each byte (uint8, any shape)."""
    bits = data.to(tl.uint16)
    low = ((bits & 0x08) << 12) | ((bits & 0x07) << 9)
    high = ((bits & 0x80) << 8) | ((bits & 0x70) << 5)
    return low.to(tl.float16, bitcast=True), high.to(tl.float16, bitcast=True)


@triton.jit
def blocks_to_half(data, scale, ROWS: tl.constexpr, BLOCKS: tl.constexpr, QUADS: tl.constexpr, PTX: tl.constexpr):
    """Return code * scale * 2^-7 of the low and of the high codes, fp16 [ROWS, BLOCKS * 8] each.

    data: uint8 [ROWS, BLOCKS * 8]; scale: E4M3 bytes [ROWS, BLOCKS]. QUADS: columns in the order of quad_place, an even
    number of blocks. PTX: by inline assembly, which the interpreter lacks.
    """
    s = scale_to_half(scale)
    if QUADS:
        # Of the 16 bytes of two blocks, 4 t + 2 h + j goes to 8 h + 2 t + j; t // 2 is the block.
        s = tl.broadcast_to(s.reshape(ROWS, BLOCKS // 2, 1, 2, 1), (ROWS, BLOCKS // 2, 2, 2, 4))
        data = data.reshape(ROWS, BLOCKS // 2, 4, 2, 2).permute(0, 1, 3, 2, 4).reshape(ROWS, BLOCKS * 8)
    else:
        s = tl.broadcast_to(s[:, :, None], (ROWS, BLOCKS, 8))
    s = s.reshape(ROWS, BLOCKS * 8)
    if PTX:
        low, high = tl.inline_asm_elementwise(
            UNPACK, "=&r,=&r,=&r,=&r,r,r,r", [data, s], dtype=(tl.float16, tl.float16), is_pure=True, pack=4
        )
    else:
        low, high = codes_to_half(data)
        low = low * s
        high = high * s
    return low, high


@triton.jit
def multiply_packed(
    acc, a, a_scale, b, b_scale, BLOCKS: tl.constexpr, NATIVE: tl.constexpr, QUADS: tl.constexpr, PTX: tl.constexpr
):
    """Return acc + a b^T of packed operands: codes uint8 [rows, BLOCKS * 8], E4M3 bytes [rows, BLOCKS].

    NATIVE: by the FP4 tensor cores; otherwise as two products of fp16, which are 2^-14 of the sum.
    """
    if NATIVE:
        a8, b8 = a_scale.to(tl.float8e4nv, bitcast=True), b_scale.to(tl.float8e4nv, bitcast=True)
        acc = tl.dot_scaled(a, a8, "e2m1", tl.trans(b), b8, "e2m1", acc)
    else:
        a_low, a_high = blocks_to_half(a, a_scale, a.shape[0], BLOCKS, QUADS, PTX)
        b_low, b_high = blocks_to_half(b, b_scale, b.shape[0], BLOCKS, QUADS, PTX)
        acc = tl.dot(a_low, tl.trans(b_low), acc)
        acc = tl.dot(a_high, tl.trans(b_high), acc)
    return acc


@triton.jit
def scales_by_words(p_scale, o_block, m_block, rows, ROWS: tl.constexpr, BLOCKS: tl.constexpr, PTX: tl.constexpr):
    """Return E4M3 bytes [ROWS, BLOCKS] of a columnwise operand, whose rows are neighbours in memory; 0 where none are.

    FP4 tensor cores want a row's blocks side by side: each thread turns squares of 4 x 4 bytes, instead of fetching
    bytes one by one. p_scale: of row 0, at a multiple of 4 bytes; o_block, m_block: where a block's rows begin, in
    words, and if it is there [BLOCKS]; rows: those that are there, a multiple of 4. PTX: as for blocks_to_half.
    """
    o_row = tl.arange(0, ROWS // 4)
    there = m_block[:, None] & (o_row < rows // 4)[None, :]
    p_words = p_scale.to(tl.pointer_type(tl.uint32), bitcast=True) + (o_block[:, None] + o_row[None, :])
    words = tl.load(p_words, mask=there, other=0)
    words = tl.permute(tl.reshape(words, (BLOCKS // 4, 4, ROWS // 4)), (0, 2, 1))
    even, odd = tl.split(tl.reshape(words, (BLOCKS // 4, ROWS // 4, 2, 2)))
    w0, w2 = tl.split(even)
    w1, w3 = tl.split(odd)
    if PTX:
        r0, r1, r2, r3 = tl.inline_asm_elementwise(
            TRANSPOSE,
            "=&r,=&r,=&r,=&r,r,r,r,r",
            [w0, w1, w2, w3],
            dtype=(tl.uint32, tl.uint32, tl.uint32, tl.uint32),
            is_pure=True,
            pack=1,
        )
    else:
        r0 = _byte_of_each(w0, w1, w2, w3, 0)
        r1 = _byte_of_each(w0, w1, w2, w3, 1)
        r2 = _byte_of_each(w0, w1, w2, w3, 2)
        r3 = _byte_of_each(w0, w1, w2, w3, 3)
    by_row = tl.reshape(tl.join(tl.join(r0, r2), tl.join(r1, r3)), (BLOCKS // 4, ROWS // 4, 4))
    by_row = tl.reshape(tl.permute(by_row, (1, 2, 0)), (ROWS, BLOCKS // 4))
    even = tl.join(by_row.to(tl.uint8), (by_row >> 16).to(tl.uint8))
    odd = tl.join((by_row >> 8).to(tl.uint8), (by_row >> 24).to(tl.uint8))
    return tl.reshape(tl.join(even, odd), (ROWS, BLOCKS))


@triton.jit
def _byte_of_each(w0, w1, w2, w3, BYTE: tl.constexpr):
    """Return the word of byte BYTE of four words."""
    low = ((w0 >> (8 * BYTE)) & 255) | (((w1 >> (8 * BYTE)) & 255) << 8)
    return low | (((w2 >> (8 * BYTE)) & 255) << 16) | (((w3 >> (8 * BYTE)) & 255) << 24)


@triton.jit
def quad_place(byte):
    """Return where QUADS puts byte number `byte` of a row: of 16 bytes, number 4 t + 2 h + j goes to 8 h + 2 t + j.

    Thread t of four holds elements 2 t, 2 t + 1, 2 t + 8, 2 t + 9 of a 16-element step of wgmma's operand in registers:
    in this order they are four adjacent bytes, one load from shared memory instead of two.
    """
    return byte // 16 * 16 + byte // 2 % 2 * 8 + byte // 4 % 4 * 2 + byte % 2
