"""The numbers of formats.py inside kernels, bit for bit, by fp32 and integer operations that sm_80 has already.

    round_e4m3, e4m3_byte, decode_e4m3    block scales: rounding, the byte, and back
    tensor_factors, block_scale           the scale chain of a tensor and of its blocks
    e2m1_nearest, e2m1_stochastic         rounding: the value and a word that holds the code
    stack16                               a tile as one tensor
    hadamard16                            signs, butterflies, times 1/4
    philox7, random_byte                  Philox4x32-7 and its bytes

A tile is a tuple of 16 vectors, with element i of all its blocks in vector i. Whatever runs along a block is then
elementwise, without shuffles or shared memory. amax travels as the bits of |x|, which order as the values do, NaN last.
Compile and launch with enable_fp_fusion=False (OPTIONS): a multiplication fused into the addition after it would skip a
rounding that the contract has. Where a product is exact, tl.fma says so itself.
NVIDIA GPUs return one NaN, without a sign, from every operation, and their minimum of NaN and 6 is 6. In NumPy both
survive: under the interpreter scaled() puts 8 in a NaN's place.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disable-error-code="assignment"
from __future__ import annotations

import triton
import triton.language as tl

from te_nvfp4_cv.ops.triton.ptx import (
    INTERPRETED,
    arithmetic,
    converts_e2m1,
    magnitude,
    negated,
    quotient,
    round_bf16,
)

OPTIONS = {"enable_fp_fusion": False}
FLT_MAX: tl.constexpr = tl.constexpr(3.4028234663852886e38)
ONE_SIXTH: tl.constexpr = tl.constexpr(0.1666666716337204)
SIGNS: tl.constexpr = tl.constexpr((1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1))
INF_BITS: tl.constexpr = tl.constexpr(0x7F800000)
MAGNITUDE: tl.constexpr = tl.constexpr(0x7FFFFFFF)
CODE_BIAS: tl.constexpr = tl.constexpr(298)  # of e2m1 words: twice the exponent field of 2^22


# ---- bits -----------------------------------------------------------------------------------------------------------


@triton.jit
def bits_of(v):
    """Return the int32 bits of fp32 values."""
    return v.to(tl.int32, bitcast=True)


@triton.jit
def float_of(bits):
    """Return the fp32 values of int32 bits."""
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def magnitude_bits(v):
    """Return the int32 bits of |v|, which order as |v| does, with NaN above inf."""
    return bits_of(v) & MAGNITUDE


@triton.jit
def max_nan(a, b):
    """Return the larger of two fp32 values; NaN wins. It is also a combine function for tl.reduce."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def max16(tile, PAIRS: tl.constexpr):
    """Return max |v| over the 16 vectors of a tile, fp32; NaN wins. PAIRS: see magnitude."""
    top = max_nan(magnitude(tile[0], PAIRS), magnitude(tile[1], PAIRS))
    for i in tl.static_range(2, 16):
        top = max_nan(top, magnitude(tile[i], PAIRS))
    return top


@triton.jit
def max_of_rows(v, PAIRS: tl.constexpr):
    """Return max |v| along axis 1, fp32; NaN wins. PAIRS: see magnitude."""
    if INTERPRETED:  # where a combine function costs a Python call for every element
        return float_of(tl.max(magnitude_bits(v), 1))
    else:
        return tl.reduce(magnitude(v, PAIRS), 1, max_nan)


@triton.jit
def max_of_columns(v):
    """Return the maxima of values >= 0 along axis 0, fp32; NaN wins."""
    if INTERPRETED:
        return float_of(tl.max(bits_of(v), 0))
    else:
        return tl.reduce(v, 0, max_nan)


@triton.jit
def larger_pair(a0, a1, b0, b1):
    """Combine two series at once by their maxima, for tl.reduce."""
    return tl.maximum(a0, b0), tl.maximum(a1, b1)


@triton.jit
def max_of_both(a, b):
    """Return the maxima of two int32 vectors of one length by one reduction: one exchange between warps, not two."""
    if INTERPRETED:
        return tl.max(a, 0), tl.max(b, 0)
    else:
        return tl.reduce((a, b), 0, larger_pair)


# ---- E4M3 -----------------------------------------------------------------------------------------------------------


@triton.jit
def round_e4m3(v):
    """Round fp32 values >= 0 to E4M3: nearest even, with subnormals, saturating; NaN gives 448. Returns value and word.

    As e2m1_nearest: v + 2^20 times v's binade, at least 2^-6, rounds once, at the unit in the last place of E4M3.
    """
    v = tl.where(v < 448.0, v, 448.0)
    magic = float_of(tl.maximum((bits_of(v) & INF_BITS) + 0x0A000000, 0x46800000))
    total = v + magic
    word = bits_of(total)
    return total - magic, word + (word >> 20)


@triton.jit
def e4m3_byte(word):
    """Return the byte, 0..0x7E (int32), of a word of round_e4m3."""
    return (word & 0x7FFFFF) - 1128


@triton.jit
def decode_e4m3(byte):
    """Return the fp32 values of E4M3 bytes 0..0x7E (int32); subnormals included."""
    return float_of(byte << 20) * 1.329227995784916e36  # 2^120


# ---- scales ---------------------------------------------------------------------------------------------------------


@triton.jit
def encode_scale(amax, E4M3_MAX: tl.constexpr):
    """Return S_enc = min(6 E / amax, FLT_MAX), fp32; 1 where amax is 0, inf or NaN."""
    s_enc = quotient(6.0 * E4M3_MAX, amax)
    return tl.where((amax > 0.0) & (amax <= FLT_MAX), s_enc, 1.0)


@triton.jit
def reciprocal(v):
    """Return about 1 / v, fp32; what is subnormal counts as 0."""
    return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [v], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def tensor_factors(amax, E4M3_MAX: tl.constexpr):
    """Return S_enc / 6 and 1 / S_enc of a tensor, which block_scale and encode_multiplier take."""
    s_enc = encode_scale(amax, E4M3_MAX)
    if INTERPRETED:
        s_dec = tl.div_rn(1.0, s_enc)
    else:  # shorter than a division
        s_dec = tl.inline_asm_elementwise("rcp.rn.f32 $0, $1;", "=f,f", [s_enc], dtype=tl.float32, is_pure=True, pack=1)
    return s_enc * ONE_SIXTH, s_dec


@triton.jit
def encode_multiplier(s_b, s_dec):
    """Return enc_b = min(1 / (s_b * s_dec), FLT_MAX), fp32, the factor of a block's elements before rounding.

    A division's instructions mostly serve operands that are subnormal or huge. Here 2^24 keeps them away where s_dec is
    small, and one Newton step on the approximate reciprocal is what the compiler does for the rest. 0 gives FLT_MAX.
    """
    product = s_b * s_dec
    if INTERPRETED:
        enc = tl.div_rn(1.0, product)
    else:
        up = tl.where(s_dec < 7.888609052210118e-31, 16777216.0, 1.0)  # below 2^-100: by 2^24
        raised = product * up
        near = reciprocal(raised)
        enc = tl.fma(near, tl.fma(raised * -1.0, near, 1.0), near) * up  # of 0: NaN, which loses against FLT_MAX
    return tl.minimum(enc, FLT_MAX)


@triton.jit
def block_scale(amax_b, mult, s_dec):
    """Return the byte, s_b and enc_b of blocks with amax_b; mult and s_dec come from tensor_factors."""
    s_b, word = round_e4m3(amax_b * mult)
    return e4m3_byte(word), s_b, encode_multiplier(s_b, s_dec)


@triton.jit
def four_over_six_scales(amax_b, s_enc):
    """Return the two candidates of 4over6, value and word: the block's amax mapped to 6, and mapped to 4."""
    base = tl.div_rn(amax_b, 6.0) * s_enc
    s6, word6 = round_e4m3(base)
    s4, word4 = round_e4m3(base * 1.5)
    return s6, word6, s4, word4


@triton.jit
def four_over_six_error(v, s_b, enc, amax, MODE: tl.constexpr, E4M3_MAX: tl.constexpr):
    """Return one element's error under a candidate scale: |d| (MODE 1) or d^2 (MODE 2), d = decoded value - v."""
    y = scaled(v, enc, False)
    q, _ = e2m1_nearest(y)
    d = tl.div_rn((signed(q, y) * s_b) * amax, 6.0 * E4M3_MAX) - v
    return magnitude(d, False) if MODE == 1 else d * d


@triton.jit
def power_of_two_amax(amax, E4M3_MAX: tl.constexpr, MARGIN: tl.constexpr = 0):
    """Return the smallest 6 E 2^k not below amax * 2^MARGIN, as formats.power_of_two_amax; 0, inf, NaN stay."""
    mantissa: tl.constexpr = 0x280000 if E4M3_MAX == 448 else 0x400000  # 6 E is 1.3125 * 2^11 or 1.5 * 2^10
    exponent: tl.constexpr = 138 if E4M3_MAX == 448 else 137
    bits = bits_of(amax)
    raised = tl.add(bits, 0x7FFFFF - mantissa, sanitize_overflow=False)  # a larger mantissa carries, and a NaN too far
    field = (raised >> 23) + MARGIN
    field = tl.minimum(tl.maximum(field, exponent - 100), exponent + 116)
    return tl.where((bits > 0) & (bits < INF_BITS), float_of((field << 23) | mantissa), amax)


# ---- E2M1 -----------------------------------------------------------------------------------------------------------


@triton.jit
def scaled(v, enc, PAIRS: tl.constexpr):
    """Return v * enc, the value to round."""
    y = arithmetic(v, enc, "mul.rn", PAIRS)
    if INTERPRETED:
        y = tl.where(y == y, y, 8.0)
    return y


@triton.jit
def signed(q, y):
    """Return q >= 0 with the sign bit of y."""
    return float_of(bits_of(q) | (bits_of(y) & -0x80000000))


@triton.jit
def e2m1_nearest(y):
    """Round |y| to E2M1: nearest, ties to the even code, saturating; NaN gives 6. Returns value and word.

    |y| + 2^22 step rounds once, at the step of |y|'s binade; the sum's last bits then count the steps. word's low bits:
    the code + CODE_BIAS. Where the GPU converts to E2M1, word is y: join_words and join_rows round it likewise.
    """
    a = tl.minimum(magnitude(y, False), 6.0)
    magic_bits = tl.maximum((bits_of(a) & INF_BITS) + 0x0B000000, 0x4A800000)  # 22 << 23; not below 2^22
    magic = float_of(magic_bits)
    total = a + magic
    q = total - magic
    if INTERPRETED:
        word = bits_of(total)
        word = word + (word >> 22)
    elif converts_e2m1():
        word = y
    else:
        word = bits_of(total)
        word = word + (word >> 22)
    return q, word


@triton.jit
def e2m1_stochastic(y, random, PAIRS: tl.constexpr):
    """Round |y| down to E2M1 after adding a part of a step, `random` from random_byte. Returns value and word.

    As in e2m1_nearest, but the sum is rounded towards zero. The step is |y|'s also where the addition crosses a binade:
    it crosses by less than that step, so that both grids give the power of two there. NaN gives 6. Where the GPU
    converts to E2M1, word is the rounded value with y's sign. Its instruction with random bits is not used: how it adds
    them below 1 is not documented, and t is rounded here, as in formats.encode_e2m1_stochastic.
    """
    a = tl.minimum(magnitude(y, PAIRS), 6.0)
    magic = float_of(tl.maximum((bits_of(a) & INF_BITS) + 0x0B000000, 0x4A800000))
    total = arithmetic(tl.fma(random, magic, a), magic, "add.rz", PAIRS)  # the product is exact
    q = arithmetic(total, magic, "sub.rn", PAIRS)
    if INTERPRETED:
        word = bits_of(total)
        word = word + (word >> 22)
    elif converts_e2m1():
        word = signed(q, y)
    else:
        word = bits_of(total)
        word = word + (word >> 22)
    return q, word


@triton.jit
def decode_e2m1(word, K: tl.constexpr):
    """Return the fp32 value of the code in bits 4 K .. 4 K + 3 of int32 words."""
    return (
        float_of(((word << (28 - 4 * K)) >> 6) & -0x7E400000) * 8.507059173023462e37
    )  # 2^126: E2M1 as fp32's smallest


@triton.jit
def stack16(tile):
    """Stack a tuple of 16 tensors [...] to [..., 16]."""
    v = tile
    half = ()
    for i in tl.static_range(8):
        half = half + (tl.join(v[i], v[i + 8]),)
    quarter = ()
    for i in tl.static_range(4):
        quarter = quarter + (tl.join(half[i], half[i + 4]),)
    low = tl.join(quarter[0], quarter[2])
    high = tl.join(quarter[1], quarter[3])
    return tl.reshape(tl.join(low, high), tile[0].shape + (16,))


# ---- random Hadamard transform --------------------------------------------------------------------------------------


@triton.jit
def hadamard16(tile, PAIRS: tl.constexpr):
    """Return H16 diag(sign) x over a tile's 16 vectors, without the factor 1/4: signs, then butterflies 1, 2, 4, 8."""
    out = ()
    for i in tl.static_range(16):
        if SIGNS[i] < 0:
            out = out + (negated(tile[i], PAIRS),)
        else:
            out = out + (tile[i],)
    out = butterfly(out, 1, PAIRS)
    out = butterfly(out, 2, PAIRS)
    out = butterfly(out, 4, PAIRS)
    return butterfly(out, 8, PAIRS)


@triton.jit
def butterfly(tile, STRIDE: tl.constexpr, PAIRS: tl.constexpr):
    """Replace the pairs STRIDE apart by a + b and a - b."""
    out = ()
    for i in tl.static_range(16):
        if i & STRIDE == 0:
            out = out + (arithmetic(tile[i], tile[i + STRIDE], "add.rn", PAIRS),)
        else:
            out = out + (arithmetic(tile[i - STRIDE], tile[i], "sub.rn", PAIRS),)
    return out


@triton.jit
def rotate16(tile, ROUND: tl.constexpr, PAIRS: tl.constexpr):
    """Rotate the 16 vectors of a tile as formats.rht16 does; ROUND: to bf16, as for bf16 inputs."""
    total = hadamard16(tile, PAIRS)
    out = ()
    for i in tl.static_range(16):
        v = arithmetic(total[i], 0.25, "mul.rn", PAIRS)
        if ROUND:
            v = round_bf16(v, PAIRS)
        out = out + (v,)
    return out


# ---- random bits ----------------------------------------------------------------------------------------------------


@triton.jit
def philox7(index, seed, word2):
    """Compute Philox4x32-7's four uint32 words: counter (index low, index high, word2, 0), key (seed low, high).

    index: int64; seed: int64 scalar; word2: int32 scalar.
    """
    c0 = index.to(tl.uint32)
    c1 = (index >> 32).to(tl.uint32)
    c2 = (tl.zeros_like(c0) + word2).to(tl.uint32)  # not word2.to(): Triton passes an argument of 1 as a constexpr
    c3 = tl.zeros_like(c0)
    k0 = seed.to(tl.uint32)
    k1 = (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(7):
        before0 = c0
        before2 = c2
        c0 = tl.umulhi(tl.full((), 0xCD9E8D57, tl.uint32), before2) ^ c1 ^ k0
        c2 = tl.umulhi(tl.full((), 0xD2511F53, tl.uint32), before0) ^ c3 ^ k1
        c1 = tl.mul(before2, 0xCD9E8D57, sanitize_overflow=False)
        c3 = tl.mul(before0, 0xD2511F53, sanitize_overflow=False)
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def random_byte(words, BYTE: tl.constexpr, PAIRS: tl.constexpr):
    """Return byte BYTE, 0..15, of four words, times 2^-31, fp32: 1/256 of a step of 2^-23 of the magic number."""
    return part_of_a_step((words[BYTE // 4] >> (8 * (BYTE % 4))) & 0xFF, PAIRS)


@triton.jit
def part_of_a_step(byte, PAIRS: tl.constexpr):
    """Convert bytes in uint32 to what e2m1_stochastic takes."""
    return arithmetic(byte.to(tl.float32), 4.656612873077393e-10, "mul.rn", PAIRS)
