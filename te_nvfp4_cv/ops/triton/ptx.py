"""Inline PTX of the kernels that compute numbers, each beside what the interpreter, or an older GPU, runs in its place.

    arithmetic, magnitude, negated    fp32 by pairs, where the GPU has such instructions (sm_100)
    widen, round_bf16                 pairs of bf16
    convert                           values to E2M1 codes, where the GPU has the instruction (Blackwell)
    quotient                          a constant divided by an amax, saturated

What a text computes is tested instruction by instruction in tests/ops/kernels/test_inline_ptx.py.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disable-error-code="assignment"
from __future__ import annotations

import os

import triton
import triton.language as tl
from triton.language import target_info

INTERPRETED: tl.constexpr = tl.constexpr(
    os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")
)
PAIRS_BEFORE: tl.constexpr = tl.constexpr("{ .reg .b64 a, b; mov.b64 a, {$2, $3}; mov.b64 b, {$4, $5}; ")
PAIRS_AFTER: tl.constexpr = tl.constexpr(".f32x2 a, a, b; mov.b64 {$0, $1}, a; }")
WIDEN_PAIR: tl.constexpr = tl.constexpr(
    """{
    .reg .b32 a;
    shl.b32 a, $2, 16;
    mov.b32 $0, a;
    and.b32 a, $2, 0xFFFF0000;
    mov.b32 $1, a;
    }"""
)
ROUND_PAIR: tl.constexpr = tl.constexpr(
    """{
    .reg .b32 a, b;
    cvt.rn.bf16x2.f32 b, $3, $2;
    shl.b32 a, b, 16;
    mov.b32 $0, a;
    and.b32 a, b, 0xFFFF0000;
    mov.b32 $1, a;
    }"""
)
# $2 / $1, both positive. $1's mantissa divides $2 as the compiler would; its exponent is then taken from the result's.
# Without a sign, what overflows, and what a subnormal $1 gives, is above FLT_MAX.
QUOTIENT: tl.constexpr = tl.constexpr(
    """{
    .reg .b32 m, n, r, t, q, e;
    and.b32 m, $1, 0x7FFFFF;
    or.b32 m, m, 0x3F800000;
    rcp.approx.ftz.f32 r, m;
    neg.f32 n, m;
    fma.rn.f32 t, n, r, 0f3F800000;
    fma.rn.f32 r, r, t, r;
    mul.rn.f32 q, r, $2;
    fma.rn.f32 t, n, q, $2;
    fma.rn.f32 q, t, r, q;
    fma.rn.f32 t, n, q, $2;
    fma.rn.f32 q, t, r, q;
    and.b32 e, $1, 0x7F800000;
    sub.s32 e, e, 0x3F800000;
    sub.s32 q, q, e;
    min.u32 q, q, 0x7F7FFFFF;
    mov.b32 $0, q;
    }"""
)
# Values to codes, the first one lowest; the instruction puts its second operand into the low nibble.
CONVERT4: tl.constexpr = tl.constexpr(
    """{
    .reg .b8 a, b;
    cvt.rn.satfinite.e2m1x2.f32 a, $2, $1;
    cvt.rn.satfinite.e2m1x2.f32 b, $4, $3;
    mov.b16 $0, {a, b};
    }"""
)
CONVERT8: tl.constexpr = tl.constexpr(
    """{
    .reg .b8 a, b, c, d;
    cvt.rn.satfinite.e2m1x2.f32 a, $2, $1;
    cvt.rn.satfinite.e2m1x2.f32 b, $4, $3;
    cvt.rn.satfinite.e2m1x2.f32 c, $6, $5;
    cvt.rn.satfinite.e2m1x2.f32 d, $8, $7;
    mov.b32 $0, {a, b, c, d};
    }"""
)


@triton.constexpr_function
def packs_fp32():
    """Tell if the GPU that is compiled for adds and multiplies pairs of fp32 values by one instruction."""
    target = target_info.current_target()
    return target is not None and target.backend == "cuda" and target.arch in (100, 103)


@triton.constexpr_function
def converts_e2m1():
    """Tell if the GPU that is compiled for has an instruction that rounds fp32 values to E2M1 codes: Blackwell."""
    target = target_info.current_target()
    return target is not None and target.backend == "cuda" and target.arch in (100, 103, 120)


@triton.jit
def arithmetic(a, b, WORD: tl.constexpr, PAIRS: tl.constexpr):
    """Return a + b, a - b, a * b or a + b rounded towards zero (WORD: add.rn, sub.rn, mul.rn, add.rz), fp32.

    PAIRS: two at once where the GPU can, each rounded as if it were alone. Pairs lie in neighbouring registers, so that
    kernels which are short of registers do better without.
    """
    if INTERPRETED:
        if WORD == "add.rn":
            result = a + b
        elif WORD == "sub.rn":
            result = a - b
        elif WORD == "mul.rn":
            result = a * b
        else:
            result = a + b
            # nearest to towards zero, for a, b >= 0
            below = (result.to(tl.int32, bitcast=True) - 1).to(tl.float32, bitcast=True)
            result = tl.where(result - b > a, below, result)
    elif PAIRS and packs_fp32():
        pairs: tl.constexpr = PAIRS_BEFORE + WORD + PAIRS_AFTER
        result = tl.inline_asm_elementwise(
            pairs, "=f,=f,f,f,f,f", [a, b], dtype=tl.float32, is_pure=True, pack=2
        )
    else:
        if WORD == "add.rn":
            result = a + b
        elif WORD == "sub.rn":
            result = a - b
        elif WORD == "mul.rn":
            result = a * b
        else:
            result = tl.inline_asm_elementwise(
                "add.rz.f32 $0, $1, $2;", "=f,f,f", [a, b], dtype=tl.float32, is_pure=True, pack=1
            )
    return result


@triton.jit
def magnitude(v, PAIRS: tl.constexpr):
    """Return |v|. PAIRS: v comes from inline PTX, whose bits the compiler would mask by an instruction more."""
    if INTERPRETED:
        return tl.abs(v)
    elif PAIRS:
        return tl.inline_asm_elementwise("abs.f32 $0, $1;", "=f,f", [v], dtype=tl.float32, is_pure=True, pack=1)
    else:
        return tl.abs(v)


@triton.jit
def negated(v, PAIRS: tl.constexpr):
    """Return -v; PAIRS: see magnitude."""
    if INTERPRETED:
        return v * -1.0
    elif PAIRS:
        return tl.inline_asm_elementwise("neg.f32 $0, $1;", "=f,f", [v], dtype=tl.float32, is_pure=True, pack=1)
    else:
        return v * -1.0


@triton.jit
def widen(v, PAIRS: tl.constexpr):
    """Convert values to fp32.

    PAIRS: bf16 by one instruction for each value, where the compiler takes one and a half. It then keeps the result
    instead of the pairs it came from, so that kernels which are short of registers do better without.
    """
    if INTERPRETED or v.dtype != tl.bfloat16 or not PAIRS:
        return v.to(tl.float32)
    else:
        return tl.inline_asm_elementwise(WIDEN_PAIR, "=f,=f,r", [v], dtype=tl.float32, is_pure=True, pack=2)


@triton.jit
def round_bf16(v, PAIRS: tl.constexpr):
    """Round fp32 values to bf16's grid, to nearest even. PAIRS: as in widen."""
    if INTERPRETED:
        return v.to(tl.bfloat16).to(tl.float32)
    elif PAIRS:
        return tl.inline_asm_elementwise(ROUND_PAIR, "=f,=f,f,f", [v], dtype=tl.float32, is_pure=True, pack=2)
    else:  # two at a time: the compiler converts one by one, on a slow unit, where the result is not stored
        pair = tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [v], dtype=tl.bfloat16, is_pure=True, pack=2
        )
        return pair.to(tl.float32)


@triton.jit
def convert(values, FIRST: tl.constexpr, WIDTH: tl.constexpr):
    """Round and pack as join_codes does, by the instruction of Blackwell."""
    chosen = ()
    for k in tl.static_range(WIDTH):
        chosen = chosen + (values[FIRST + k],)
    if WIDTH == 8:
        return tl.inline_asm_elementwise(
            CONVERT8, "=r,f,f,f,f,f,f,f,f", chosen, dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        return tl.inline_asm_elementwise(CONVERT4, "=h,f,f,f,f", chosen, dtype=tl.int16, is_pure=True, pack=1)


@triton.jit
def quotient(number, v):
    """Return min(number / v, FLT_MAX), rounded once, without a division's instructions for what is subnormal or huge.

    number: fp32, a normal number far from both ends, as 6 E is. Where v is 0, inf or NaN the result has no meaning.
    """
    if INTERPRETED:
        return tl.minimum(tl.div_rn(number, v), 3.4028234663852886e38)
    else:
        return tl.inline_asm_elementwise(QUOTIENT, "=f,f,f", [v, number], dtype=tl.float32, is_pure=True, pack=1)
