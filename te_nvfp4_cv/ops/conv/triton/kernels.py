"""Implicit GEMM kernels of quantized convolutions. They gather rows from packed operands and write no im2col matrix.

    data_product     fprop and dgrad: y[(image, pixel), n] = sum over (tap, block of 16 channels)
    weight_product   wgrad: dw[n, tap, c] = sum over (image group, pixel, 16 images), one tap and one part of the
                     contraction per program; sum_parts adds the parts in their order
Images have three axes (depth, height, width); where there are fewer, the sizes are 1. With NATIVE, packed codes and
E4M3 scales go to the FP4 tensor cores (tl.dot_scaled). Otherwise codes become fp16 in registers (ops/triton/decode.py),
exactly, and low and high nibbles are two products. Sums are fp32 without atomics: bits depend on the tile sizes alone.
Offsets of a vector are never negative, even in the padding, since a masked cp.async with a negative offset has read out
of bounds in other people's kernels. Whatever is negative goes into the scalar part of an address.
"""

from __future__ import annotations

import triton
import triton.language as tl

from te_nvfp4_cv.ops.conv.triton.weight_rows import add_chunk
from te_nvfp4_cv.ops.triton.decode import multiply_packed, scales_by_words


@triton.jit
def _tap_offset(tap, CH: tl.constexpr, CW: tl.constexpr, first, of_d, of_h, of_w):
    """Return first + of_d * (depth of the tap) + of_h * (height) + of_w * (width)."""
    return first + tap // (CH * CW) * of_d + tap // CW % CH * of_h + tap % CW * of_w


@triton.jit
def _inside(position, first, step, index, size):
    """Tell if a row's position and a tap's index along one axis read a pixel of the image."""
    source = position + first + index * step
    return (source >= 0) & (source < size)


_DATA_SIZES = (
    "rows n_d n_h n_w x_b x_d x_h x_w x_first x_td x_th x_tw pos_d pos_h pos_w first_d first_h first_w step_d step_h "
    "step_w size_d size_h size_w y_b y_d y_h y_w y_first w_taps w_first w_td w_th w_tw steps"
).split()


@triton.jit(do_not_specialize=_DATA_SIZES)
def data_product(
    p_x,  # uint8 [B, *image, G * blocks * 8]
    p_x_scale,  # uint8 [B, *image, G * blocks]
    p_w,  # as weight_rows.prepare_kernel writes it
    p_w_scale,
    p_alpha,  # fp32 [1] or [B, *output]; unused without HAS_ALPHA
    p_bias,  # [G * channels] or unused
    p_y,  # [B, *output, G * channels]
    rows,  # B * n_d * n_h * n_w output pixels of this launch
    n_d,
    n_h,
    n_w,
    x_b,  # pixels of the image between two images, and between neighbours of this launch's output along each axis
    x_d,
    x_h,
    x_w,
    x_first,  # pixel that output pixel 0 and tap 0 read, may be negative; then pixels between neighbouring taps
    x_td,
    x_th,
    x_tw,
    pos_d,  # along each axis: positions between neighbouring output pixels, ...
    pos_h,
    pos_w,
    first_d,  # ... position that output 0 and tap 0 read, ...
    first_h,
    first_w,
    step_d,  # ... positions between neighbouring taps, ...
    step_h,
    step_w,
    size_d,  # ... and the size of the image
    size_h,
    size_w,
    y_b,  # pixels of the output between images, and between neighbours of this launch; first pixel
    y_d,
    y_h,
    y_w,
    y_first,
    w_taps,  # taps stored in w; the first one of this launch; between neighbours of this launch
    w_first,
    w_td,
    w_th,
    w_tw,
    channels,  # output channels a group
    units,  # blocks / UNIT
    x_units,  # G * blocks / UNIT
    chunks,  # ceil(blocks * 16 / BK): w holds chunks * BK / 16 blocks
    steps,  # chunks * TAPS, or 0 where no tap is in this launch
    TAPS: tl.constexpr,  # of this launch = CD * CH * CW, at least 1
    CH: tl.constexpr,
    CW: tl.constexpr,
    UNIT: tl.constexpr,  # a power of two that divides blocks
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,  # contracted channels a step
    FULL: tl.constexpr,  # blocks is a multiple of BK / 16
    WIDE: tl.constexpr,  # 64-bit offsets
    ALPHA: tl.constexpr,  # 0 none, 1 one, 2 per row
    BIAS: tl.constexpr,
    NATIVE: tl.constexpr,
    QUADS: tl.constexpr,
    PTX: tl.constexpr,
):
    """Compute a tile [BM output pixels, BN channels] of fprop or dgrad. Tiles of one row follow each other, so that x
    stays in L2.
    """
    QB: tl.constexpr = BK // 16
    HB: tl.constexpr = BK // 2
    tiles_n = tl.cdiv(channels, BN)
    i_m = tl.program_id(0) // tiles_n
    i_n = tl.program_id(0) % tiles_n
    group = tl.program_id(1)

    o_m = i_m * BM + tl.arange(0, BM)
    if WIDE:
        o_m = i_m.to(tl.int64) * BM + tl.arange(0, BM)
    m_m = o_m < rows
    i_w = o_m % n_w
    i_h = o_m // n_w % n_h
    i_d = o_m // n_w // n_h % n_d
    i_b = o_m // n_w // n_h // n_d
    pixel = i_b * x_b + i_d * x_d + i_h * x_h + i_w * x_w
    at_d, at_h, at_w = i_d.to(tl.int32) * pos_d, i_h.to(tl.int32) * pos_h, i_w.to(tl.int32) * pos_w
    pixel = tl.where(m_m, pixel, 0)
    if TAPS <= 32:  # one bit a tap: the comparisons leave the loop
        valid = tl.zeros((BM,), tl.int32)
        for bit in tl.static_range(TAPS):
            ok = _inside(at_d, first_d, step_d, bit // (CH * CW), size_d)
            ok = ok & _inside(at_h, first_h, step_h, bit // CW % CH, size_h)
            ok = ok & _inside(at_w, first_w, step_w, bit % CW, size_w)
            valid = valid | ((ok & m_m).to(tl.int32) << bit)

    o_k = tl.arange(0, HB)
    o_q = tl.arange(0, QB)
    o_x = (pixel * x_units)[:, None] * (UNIT * 8) + o_k[None, :]
    o_xs = (pixel * x_units)[:, None] * UNIT + o_q[None, :]
    o_n = i_n * BN + tl.arange(0, BN)
    i_row = group * channels + tl.where(o_n < channels, o_n, 0)
    if WIDE:
        i_row = i_row.to(tl.int64)
    x_group = p_x + group * units * (UNIT * 8)
    xs_group = p_x_scale + group * units * UNIT
    acc = tl.zeros((BM, BN), tl.float32)
    for step in range(0, steps):  # taps inside, channels outside: neighbours read overlapping pixels
        tap = step % TAPS
        chunk = step // TAPS
        x_pixel = _tap_offset(tap, CH, CW, x_first, x_td, x_th, x_tw).to(tl.int64) * x_units
        w_tap = _tap_offset(tap, CH, CW, w_first, w_td, w_th, w_tw)
        if TAPS <= 32:
            m_row = ((valid >> tap) & 1) != 0
        else:
            m_row = m_m & _inside(at_d, first_d, step_d, tap // (CH * CW), size_d)
            m_row = m_row & _inside(at_h, first_h, step_h, tap // CW % CH, size_h)
            m_row = m_row & _inside(at_w, first_w, step_w, tap % CW, size_w)
        rest = units * UNIT - chunk * QB
        x = x_group + (x_pixel * (UNIT * 8) + chunk * HB), o_x
        xs = xs_group + (x_pixel * UNIT + chunk * QB), o_xs
        w_chunk = i_row * (w_taps * chunks) + (w_tap * chunks + chunk)
        acc = add_chunk(acc, x, xs, m_row, rest, (p_w, p_w_scale), w_chunk, BK, FULL, NATIVE, QUADS, PTX)
    if not NATIVE:
        acc = acc * 128.0  # the 2^-7 of ops/triton/decode.py

    o_y = i_b * y_b + i_d * y_d + i_h * y_h + i_w * y_w + y_first
    if ALPHA == 1:
        acc = acc * tl.load(p_alpha)
    elif ALPHA == 2:
        acc = acc * tl.load(p_alpha + o_y, mask=m_m, other=0.0)[:, None]
    if BIAS:
        acc = acc + tl.load(p_bias + i_row).to(tl.float32)[None, :]
    total = channels * tl.num_programs(1)
    p_out = p_y + o_y[:, None] * total + (group * channels + o_n)[None, :]
    tl.store(p_out, acc.to(p_y.dtype.element_ty), mask=m_m[:, None] & (o_n < channels)[None, :])


_WEIGHT_SIZES = (
    "lines line_chunks width parts a_d a_h a_w stride_d stride_h stride_w first_d first_h first_w step_d step_h step_w "
    "b_d b_h k_h k_w taps"
).split()


@triton.jit(do_not_specialize=_WEIGHT_SIZES)
def weight_product(
    p_b,  # uint8 [N16, *b image, b channels, 8]
    p_b_scale,  # uint8 [N16, *b image, b channels]
    p_a,  # uint8 [N16, *a image, a channels, 8]
    p_a_scale,
    p_out,  # fp32 [parts, b channels, taps, a channels / G]
    lines,  # N16 * b_d * b_h rows of the b image
    line_chunks,  # ceil(width / pixels a step)
    width,  # b_w
    parts,
    b_d,
    b_h,
    a_d,
    a_h,
    a_w,
    stride_d,
    stride_h,
    stride_w,
    first_d,  # position that output 0 and tap 0 read: minus the padding
    first_h,
    first_w,
    step_d,  # dilation
    step_h,
    step_w,
    k_h,  # kernel
    k_w,
    taps,
    channels_b,  # all of them
    channels_a,
    each_b,  # of a group
    each_a,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    WORDS: tl.constexpr,  # each_a, each_b and the addresses of scales are multiples of 4; for NATIVE
    NATIVE: tl.constexpr,
    QUADS: tl.constexpr,
    PTX: tl.constexpr,
):
    """Compute a tile [BM b channels, BN a channels] of one tap and one part of the contraction, before alpha.

    The contraction goes along lines of the b image, BK / 16 pixels a step: a line's place is scalar arithmetic.
    """
    QB: tl.constexpr = BK // 16
    tiles_m, tiles_n = tl.cdiv(each_b, BM), tl.cdiv(each_a, BN)
    i_n = tl.program_id(0) % tiles_n
    i_m = tl.program_id(0) // tiles_n % tiles_m
    tap = tl.program_id(0) // tiles_n // tiles_m
    part, group = tl.program_id(1), tl.program_id(2)
    off_w = first_w + tap % k_w * step_w
    off_h = first_h + tap // k_w % k_h * step_h
    off_d = first_d + tap // k_w // k_h * step_d

    o_m = i_m * BM + tl.arange(0, BM)
    o_n = i_n * BN + tl.arange(0, BN)
    i_b, m_b = group * each_b + o_m, o_m < each_b
    i_a, m_a = group * each_a + o_n, o_n < each_a
    o_q = tl.arange(0, QB)
    o_k = tl.arange(0, QB * 8)
    q_k = o_k // 8
    o_b = i_b[:, None] * 8 + (q_k * channels_b * 8 + o_k % 8)[None, :]
    o_bs = i_b[:, None] + (o_q * channels_b)[None, :]
    o_a = i_a[:, None] * 8 + (q_k * stride_w * channels_a * 8 + o_k % 8)[None, :]
    o_as = i_a[:, None] + (o_q * stride_w * channels_a)[None, :]

    steps = lines.to(tl.int64) * line_chunks
    start = steps * part // parts
    end = steps * (part + 1) // parts
    chunk = (start % line_chunks).to(tl.int32)
    line = (start // line_chunks).to(tl.int32)
    i_h = line % b_h
    i_d = line // b_h % b_d
    image = line // b_h // b_d
    acc = tl.zeros((BM, BN), tl.float32)
    for _ in range(0, (end - start).to(tl.int32)):
        pixel = chunk * QB
        at_h = i_h * stride_h + off_h
        at_d = i_d * stride_d + off_d
        ok_line = (at_h >= 0) & (at_h < a_h) & (at_d >= 0) & (at_d < a_d)
        at_w = pixel * stride_w + off_w
        b_first = (line * width + pixel).to(tl.int64) * channels_b
        a_first = (((image * a_d + at_d) * a_h + at_h) * a_w + at_w).to(tl.int64) * channels_a
        m_bq = o_q < width - pixel
        m_bk = q_k < width - pixel
        m_aq = ok_line & m_bq & (at_w + o_q * stride_w >= 0) & (at_w + o_q * stride_w < a_w)
        m_ak = ok_line & m_bk & (at_w + q_k * stride_w >= 0) & (at_w + q_k * stride_w < a_w)
        b = tl.load(p_b + b_first * 8 + o_b, mask=m_b[:, None] & m_bk[None, :], other=0)
        a = tl.load(p_a + a_first * 8 + o_a, mask=m_a[:, None] & m_ak[None, :], other=0)
        if WORDS:
            p_bs = p_b_scale + b_first + (group * each_b + i_m * BM)
            p_as = p_a_scale + a_first + (group * each_a + i_n * BN)
            bs = scales_by_words(p_bs, o_q * (channels_b // 4), m_bq, each_b - i_m * BM, BM, QB, PTX)
            sa = scales_by_words(p_as, o_q * (stride_w * (channels_a // 4)), m_aq, each_a - i_n * BN, BN, QB, PTX)
        else:
            bs = tl.load(p_b_scale + b_first + o_bs, mask=m_b[:, None] & m_bq[None, :], other=0)
            sa = tl.load(p_a_scale + a_first + o_as, mask=m_a[:, None] & m_aq[None, :], other=0)
        acc = multiply_packed(acc, b, bs, a, sa, QB, NATIVE, QUADS, PTX)
        # The next place: counters that carry, since divisions cost more than the loads
        chunk = chunk + 1
        carry = chunk == line_chunks
        chunk = tl.where(carry, 0, chunk)
        line = line + carry.to(tl.int32)
        i_h = i_h + carry.to(tl.int32)
        carry = i_h == b_h
        i_h = tl.where(carry, 0, i_h)
        i_d = i_d + carry.to(tl.int32)
        carry = i_d == b_d
        i_d = tl.where(carry, 0, i_d)
        image = image + carry.to(tl.int32)
    if not NATIVE:
        acc = acc * 16384.0  # 2^-7 of either operand

    o_row = (part * channels_b + group * each_b + o_m).to(tl.int64)
    p_tile = p_out + (o_row * taps + tap)[:, None] * each_a + o_n[None, :]
    tl.store(p_tile, acc, mask=m_b[:, None] & m_a[None, :])


@triton.jit
def sum_parts(
    p_parts,  # fp32 [parts, total]
    p_alpha,  # fp32 [1], or one value per index of an axis of the result; unused for ALPHA 0
    p_out,  # [total]
    total,
    parts,
    divisor,  # ALPHA 2: element i takes alpha[i // divisor % count]
    count,
    ALPHA: tl.constexpr,  # 0 none, 1 one, 2 per channel
    BLOCK: tl.constexpr,
):
    """Add the parts in their order, multiply with alpha, round once."""
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = o < total
    value = tl.zeros((BLOCK,), tl.float32)
    size = tl.zeros((), tl.int64) + total  # not total.to(): Triton passes an argument of 1 as a constexpr
    for part in range(0, parts):
        value += tl.load(p_parts + part * size + o, mask=m, other=0.0)
    if ALPHA == 1:
        value = value * tl.load(p_alpha)
    elif ALPHA == 2:
        value = value * tl.load(p_alpha + o // divisor % count, mask=m, other=0.0)
    tl.store(p_out + o, value.to(p_out.dtype.element_ty), mask=m)
