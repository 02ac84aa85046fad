"""The numbers of NVFP4, as plain torch: E2M1 codes, E4M3 block scales, RHT, Philox, nibbles, scale layout. Every
backend agrees with this file bit for bit. A value passes through two levels of scales:

    S_enc = min(6 E / amax, FLT_MAX)                    one fp32 factor per tensor (or per row), E = 448 or 256
    s_b   = e4m3(amax_b * (S_enc * f32(1/6)))           one E4M3 decode scale per block of 16
    enc_b = min(1 / (s_b * (1 / S_enc)), FLT_MAX)       from the rounded s_b
    code  = e2m1(x * enc_b)                             0 .5 1 1.5 2 3 4 6, and 8 + the same with minus
    x'    = e2m1 * ((s_b * amax) * f32(1 / (6 E)))      every operation is one fp32 rounding, in this order

Functions are elementwise and run on any device. No tensor lives at module level, so they also work under torch.compile
and with fake tensors.
Signs are taken from the bits, never by comparison, since compilers may drop the sign of zero.
Python floats that multiply fp32 tensors are rounded to fp32 first, by torch. `1 / tensor` and `tensor / number` are
written as torch.div of two tensors: torch may turn them into a multiplication by a reciprocal.
This file checks nothing, and does not know what a tensor face, a recipe or a backend is.
Source: arXiv 2509.25149; TransformerEngine's reference_nvfp4.py and dequantize_nvfp4.cuh; Salmon et al. 2011 (Philox).
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 16
E2M1_MAX = 6.0
E4M3_MAX = 448
FLT_MAX = 3.4028234663852886e38
MIN_EXPONENT, MAX_EXPONENT = -100, 116  # of a tensor scale that is a power of two
ONE_SIXTH = 0.1666666716337204  # f32(1/6)
SIGN_VECTOR = (1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1)

_NEGATIVE_SIGNS = sum(1 << i for i, sign in enumerate(SIGN_VECTOR) if sign < 0)
_SIGN_BIT = -(2**31)
_MASK32 = 0xFFFFFFFF  # Philox's words live in int64 tensors, since torch has few operators for uint32


# ---- E2M1 -----------------------------------------------------------------------------------------------------------


def encode_e2m1(v: Tensor) -> Tensor:
    """Encode fp32 values as E2M1 codes (uint8, 0..15): nearest, ties to the even code, saturating.

    Numerics: the sign survives a magnitude that rounds to 0 (-0.0 and -0.1 give 8); inf gives 7 / 15; NaN of any sign
    gives 7, as the hardware instruction does.
    """
    bits = v.view(torch.int32)
    magnitude = bits & 0x7FFFFFFF
    # Positive floats order as their bits do: 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0. A NaN exceeds all of them.
    code = (magnitude > 0x3E800000).to(torch.uint8)
    code = code + (magnitude >= 0x3F400000).to(torch.uint8)
    code = code + (magnitude > 0x3FA00000).to(torch.uint8)
    code = code + (magnitude >= 0x3FE00000).to(torch.uint8)
    code = code + (magnitude > 0x40200000).to(torch.uint8)
    code = code + (magnitude >= 0x40600000).to(torch.uint8)
    code = code + (magnitude > 0x40A00000).to(torch.uint8)
    return code | _sign_code(bits, magnitude)


def encode_e2m1_stochastic(v: Tensor, random: Tensor) -> Tensor:
    """Encode fp32 values as E2M1 codes, rounded up with a probability equal to the fraction, by 8 random bits each.

        t = |v| + (r/256) step(|v|);   q = min(floor(t / step(t)) step(t), 6);   step = .5 below 2, 1 below 4, else 2

    Args:
        v: fp32.
        random: uint8, of v's shape.
    Numerics: grid points never move; |v| >= 6 gives 6; the sign survives as in encode_e2m1; NaN gives 7.
    """
    bits = v.view(torch.int32)
    magnitude = bits & 0x7FFFFFFF
    a = magnitude.view(torch.float32)
    t = a + random.to(torch.float32) * (1.0 / 256.0) * _e2m1_step(a)  # the product is exact: this is an fma
    step = _e2m1_step(t)
    q = torch.clamp(torch.floor(t / step) * step, max=E2M1_MAX)
    return encode_e2m1(q) | _sign_code(bits, magnitude)


def decode_e2m1(codes: Tensor) -> Tensor:
    """Return the fp32 values of E2M1 codes (any integer dtype, 0..15); code 8 gives -0.0."""
    code = codes.to(torch.int32)
    m = code & 7
    # In quarters: 0 and 0.5 are the subnormals m * 2, all others have the form (2 + mantissa bit) << exponent.
    magnitude = torch.where(m < 2, m * 2, (2 + (m & 1)) << (m >> 1)).to(torch.float32) * 0.25
    sign = torch.where(code > 7, _SIGN_BIT, 0).to(torch.int32)
    return (magnitude.view(torch.int32) | sign).view(torch.float32)


def pack_nibbles(codes: Tensor) -> Tensor:
    """Pack codes [..., K] (K even) into uint8 [..., K/2]: element 2j in bits 0-3, element 2j+1 in bits 4-7."""
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack_nibbles(data: Tensor) -> Tensor:
    """Unpack uint8 [..., K/2] into codes [..., K]."""
    return torch.stack((data & 15, data >> 4), dim=-1).flatten(-2)


def blocks(v: Tensor) -> Tensor:
    """Return [..., L] as [..., L/16, 16]; L may be 0."""
    return v.unflatten(-1, (v.shape[-1] // BLOCK, BLOCK))


def _sign_code(bits: Tensor, magnitude: Tensor) -> Tensor:
    """Return 8 where the sign bit is set and the value is no NaN, else 0 (uint8)."""
    return ((bits < 0) & (magnitude <= 0x7F800000)).to(torch.uint8) << 3


def _e2m1_step(a: Tensor) -> Tensor:
    """Return the distance from |v| = a to the next larger E2M1 value: 0.5 below 2, 1 below 4, else 2."""
    return torch.where(a < 2.0, 0.5, torch.where(a < 4.0, 1.0, 2.0)).to(torch.float32)


# ---- scales ---------------------------------------------------------------------------------------------------------


def to_e4m3(v: Tensor) -> Tensor:
    """Round fp32 values >= 0 to float8_e4m3fn: nearest even, with subnormals, saturating; NaN gives 448, byte 0x7E."""
    # The cast alone would keep NaN, which a scale byte must not be. A NaN is not below 448, so this maps it to 448.
    return torch.where(v < E4M3_MAX, v, float(E4M3_MAX)).to(torch.float8_e4m3fn)


def power_of_two_amax(amax: Tensor, e4m3_max: int = E4M3_MAX, margin: int = 1) -> Tensor:
    """Return the smallest 6 E 2^k that is not below margin * amax. As a tensor's amax it gives the decode scale 2^k,
    exactly.

    Args:
        amax: fp32, >= 0.
        margin: a power of two, at least 1.
    Returns:
        fp32 of amax's shape; 0, inf and NaN stay as they are.
    Numerics: integer arithmetic on the bits. k is kept in -100..116, where no scale of the chain is subnormal or
        infinite and a product of two such scales with a weight's stays in range.
    """
    mantissa = 0x280000 if e4m3_max == E4M3_MAX else 0x400000  # 6 E is 1.3125 * 2^11 or 1.5 * 2^10
    exponent = 11 if e4m3_max == E4M3_MAX else 10
    bits = amax.view(torch.int32)
    field = ((bits + (0x7FFFFF - mantissa)) >> 23) + (margin.bit_length() - 1)  # a larger mantissa carries
    field = field.clamp(min=127 + exponent + MIN_EXPONENT, max=127 + exponent + MAX_EXPONENT)
    rounded = ((field << 23) | mantissa).view(torch.float32)
    return torch.where((bits > 0) & (bits < 0x7F800000), rounded, amax)


def encode_scale(amax: Tensor, e4m3_max: int = E4M3_MAX) -> Tensor:
    """Return S_enc = min(6 E / amax, FLT_MAX), fp32; 1 where amax is 0, inf or NaN."""
    s_enc = torch.div(torch.full_like(amax, E2M1_MAX * e4m3_max), amax).clamp(max=FLT_MAX)
    # A non-finite amax is not hidden by the 1: it stays in the tensor's amax, and alpha carries it into every result.
    usable = (amax > 0) & (amax <= FLT_MAX)
    return torch.where(usable, s_enc, torch.ones_like(s_enc))


def decode_factor(s_enc: Tensor) -> Tensor:
    """Return S_dec = f32(1 / S_enc), which may be subnormal."""
    return torch.div(torch.ones_like(s_enc), s_enc)


def block_scale(amax_b: Tensor, s_enc: Tensor) -> Tensor:
    """Return the decode scale s_b = e4m3(amax_b * f32(S_enc * f32(1/6))) of each block; s_enc broadcasts to amax_b."""
    return to_e4m3((amax_b * (s_enc * ONE_SIXTH)).clamp(max=FLT_MAX))


def four_over_six_scales(amax_b: Tensor, s_enc: Tensor) -> tuple[Tensor, Tensor]:
    """Return the two candidate decode scales of 4over6: the block's amax mapped to 6, and mapped to 4.

    base = f32(f32(amax_b / 6) * S_enc);   s6 = e4m3(base);   s4 = e4m3(f32(base * 1.5))
    """
    base = torch.div(amax_b, torch.full_like(amax_b, E2M1_MAX)) * s_enc
    return to_e4m3(base), to_e4m3(base * 1.5)


def encode_multiplier(s_b: Tensor, s_enc: Tensor) -> Tensor:
    """Return enc_b = min(f32(1 / f32(f32(s_b) * S_dec)), FLT_MAX), the factor of the elements before the cast to E2M1.

    It is computed from the rounded s_b, so that decoding multiplies with the exact inverse of what encoding used.
    """
    scale = s_b.to(torch.float32) * decode_factor(s_enc)
    # An all-zero block has scale 0 and would get inf here; FLT_MAX times its zeros is 0, inf times 0 would be NaN.
    return torch.div(torch.ones_like(scale), scale).clamp(max=FLT_MAX)


def alpha(amax_a: Tensor, amax_b: Tensor, e4m3_max_a: int = E4M3_MAX, e4m3_max_b: int = E4M3_MAX) -> Tensor:
    """Return f32(f32(amax_a * amax_b) * f32(1 / (36 E_a E_b))), which turns a GEMM of code * scale into real units.

    Not finite where either amax is not finite (inf * 0 is NaN). Exact where both are 6 E 2^k: a power of two.
    """
    return (amax_a * amax_b) * alpha_factor(e4m3_max_a, e4m3_max_b)


def alpha_factor(e4m3_max_a: int, e4m3_max_b: int) -> float:
    """Return 1 / (36 E_a E_b): what alpha multiplies the product of two amaxes by."""
    return 1.0 / (36.0 * e4m3_max_a * e4m3_max_b)


def decode_blocks(data: Tensor, scale: Tensor) -> Tensor:
    """Return code * s_b, fp32 [..., K]: the operand without its tensor scale. The values are exact in bf16 too.

    Args:
        data: packed uint8 [..., K/2].
        scale: float8_e4m3fn [..., K/16].
    """
    v = blocks(decode_e2m1(unpack_nibbles(data)))
    return (v * scale.to(torch.float32).unsqueeze(-1)).flatten(-2)


def block_units(scale: Tensor, amax: Tensor, e4m3_max: int = E4M3_MAX) -> Tensor:
    """Return what a code of 1.0 stands for in each block: f32(f32(s_b * amax) * f32(1 / (6 E))).

    Args:
        scale: float8_e4m3fn.
        amax: fp32, broadcasts to scale.
    """
    return (scale.to(torch.float32) * amax) * (1.0 / (E2M1_MAX * e4m3_max))


def dequantize(data: Tensor, scale: Tensor, amax: Tensor, e4m3_max: int = E4M3_MAX) -> Tensor:
    """Return the values, fp32 [..., K], in TransformerEngine's order: e2m1 * f32(f32(s_b * amax) * f32(1 / (6 E))).

    Args:
        data: packed uint8 [..., K/2].
        scale: float8_e4m3fn [..., K/16].
        amax: [1], or one per row (of data flattened to 2-D) for a row-scaled tensor.
    Numerics: overflows to inf above amax 7.6e35, as TransformerEngine does; a non-finite amax makes every element
        non-finite.
    """
    if amax.numel() != 1:  # one per row: broadcast along the row's blocks
        amax = amax.reshape(*scale.shape[:-1], 1)
    v = blocks(decode_e2m1(unpack_nibbles(data)))
    return (v * block_units(scale, amax, e4m3_max).unsqueeze(-1)).flatten(-2)


# ---- random Hadamard transform --------------------------------------------------------------------------------------


def rht16(x: Tensor, with_sign: bool = True) -> Tensor:
    """Rotate the last axis of [..., 16] by H16 diag(sign) x / 4: signs, then butterflies of stride 1, 2, 4, 8 in fp32.

    The order of the butterflies is part of the numerics: another one rounds differently.

    Args:
        x: [..., 16] bf16, fp16 or fp32.
        with_sign: False leaves the fixed sign vector out.
    Returns:
        bf16 for a bf16 input (one rounding, at the end), fp32 otherwise.
    """
    v = x.to(torch.float32)
    if with_sign:
        v = v * _signs(x.device)
    for stride in (1, 2, 4, 8):
        pairs = v.unflatten(-1, (BLOCK // (2 * stride), 2, stride))
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        v = torch.stack((a + b, a - b), dim=-2).flatten(-3)
    v = v * 0.25  # exact, so it may follow the sums
    return v.to(torch.bfloat16) if x.dtype == torch.bfloat16 else v


def inverse_rht16(y: Tensor, with_sign: bool = True) -> Tensor:
    """Undo rht16 up to rounding: diag(sign) H16 y / 4, fp32 (the Hadamard matrix is its own inverse, times 16)."""
    v = rht16(y.to(torch.float32), with_sign=False)
    return v * _signs(y.device) if with_sign else v


def _signs(device: torch.device) -> Tensor:
    """Make SIGN_VECTOR, fp32 [16], on the device: a copy from the host would wait for the device."""
    negative = (_NEGATIVE_SIGNS >> torch.arange(BLOCK, device=device)) & 1
    return (1 - 2 * negative).to(torch.float32)


# ---- random bits ----------------------------------------------------------------------------------------------------


def philox4x32(seed: Tensor | int, block_index: Tensor, face: int) -> Tensor:
    """Draw 16 random bytes for each block by Philox4x32-10: uint8 [..., 16].

    Args:
        seed: key = (low, high) 32 bits; an int or an int64 tensor of one element.
        block_index: int64 [...]; counter = (low, high, face, 0).
        face: 0 rowwise, 1 columnwise.
    Returns:
        Byte i of a block is (word[i // 4] >> 8 (i % 4)) & 255.
    """
    # The face is part of the counter: both faces of an operand must not see the same random bytes.
    low, high = block_index & _MASK32, (block_index >> 32) & _MASK32
    words = philox_words(
        (low, high, torch.full_like(low, face), torch.zeros_like(low)), (seed & _MASK32, (seed >> 32) & _MASK32)
    )
    by_word = torch.stack(words, dim=-1)
    by_byte = torch.stack([(by_word >> shift) & 255 for shift in (0, 8, 16, 24)], dim=-1)
    return by_byte.flatten(-2).to(torch.uint8)


def philox_words(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor | int, Tensor | int], rounds: int = 10
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute Philox4x32-10: four 32-bit words from a 128-bit counter and a 64-bit key, all in int64 tensors.

    The Triton kernels do 7 rounds, the fewest that pass BigCrush (Salmon et al. 2011).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        high0, low0 = _multiply32(c0, 0xD2511F53)
        high1, low1 = _multiply32(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _MASK32, (k1 + 0xBB67AE85) & _MASK32
    return c0, c1, c2, c3


def _multiply32(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """Return the high and low 32 bits of a * b for 32-bit values in int64, by 16-bit halves of a: nothing overflows."""
    low48 = (a & 0xFFFF) * b
    middle = (a >> 16) * b + (low48 >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low48 & 0xFFFF)


# ---- sizes, transposed faces of weights ------------------------------------------------------------------------------


def round_up(n: int, multiple: int) -> int:
    """Return the smallest multiple of `multiple` that is not below n."""
    return -(-n // multiple) * multiple


def transpose_tiles(data: Tensor, scale: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """Transpose the rowwise face of a 16x16-scaled matrix to its columnwise face: nibbles and tile scales alike.

    Args:
        data: rowwise, packed uint8 [M, Kp/2].
        scale: rowwise [M, Kp/16].
        columns: K.
    Returns:
        data [K, Mp/2] and scales [K, Mp/16].
    """
    codes = unpack_nibbles(data)
    codes = torch.nn.functional.pad(codes, (0, 0, 0, -codes.shape[0] % BLOCK))[:, :columns]
    # A tile's scale stands in each of its 16 rows, so every 16th row holds all of them.
    tiles = scale.view(torch.uint8)[::BLOCK].t().repeat_interleave(BLOCK, dim=0)[:columns]
    return pack_nibbles(codes.t()).contiguous(), tiles.contiguous().view(scale.dtype)


def kernel_columns(kernel: Tensor, groups: int) -> Tensor:
    """Cut a kernel [axis 0, T, axis 1] into blocks of 16 along axis 0: [G, Ob, T, axis 1, 16].

    Each group is padded with zeros, because a block must not hold rows of two groups.
    """
    grouped = kernel.unflatten(0, (groups, kernel.shape[0] // groups))
    padded = torch.nn.functional.pad(grouped, (0, 0, 0, 0, 0, -grouped.shape[1] % BLOCK))
    return padded.unflatten(1, (-1, BLOCK)).movedim(2, -1)


def transpose_kernel(
    data: Tensor, scale: Tensor, channels: int, groups: int, block: int = BLOCK
) -> tuple[Tensor, Tensor]:
    """Transpose the rowwise face of a 16x16-scaled kernel to its columnwise face: nibbles and tile scales alike.

    Args:
        data: [axis 0, T, Cb * 8] with blocks along axis 1, as quantize_weight gives it.
        scale: [G, Ob, T, Cb].
        channels: the size of axis 1.
        groups: the convolution's groups.
        block: how many channels share a scale.
    Returns:
        data [G, Ob, T, channels, 8] and scale [G, Ob, T, channels].
    """
    codes = unpack_nibbles(data)[..., :channels]
    tiles = scale.repeat_interleave(block, dim=3)[..., :channels]
    return pack_nibbles(kernel_columns(codes, groups)).contiguous(), tiles.contiguous()
