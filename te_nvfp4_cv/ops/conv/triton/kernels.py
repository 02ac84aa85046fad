"""Implicit GEMM kernels of quantized convolutions. They gather rows from packed operands and write no im2col matrix.

    prepare_kernel   a packed face of a kernel -> rows of one output channel, contraction contiguous, blocks padded
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
    p_w,  # as prepare_kernel writes it
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
        m_x = m_row[:, None]
        m_xs = m_row[:, None]
        if not FULL:
            rest = units * UNIT - chunk * QB
            m_x = m_x & (o_k[None, :] < rest * 8)
            m_xs = m_xs & (o_q[None, :] < rest)
        x = tl.load(x_group + (x_pixel * (UNIT * 8) + chunk * HB) + o_x, mask=m_x, other=0)
        xs = tl.load(xs_group + (x_pixel * UNIT + chunk * QB) + o_xs, mask=m_xs, other=0)
        w_chunk = i_row * (w_taps * chunks) + (w_tap * chunks + chunk)
        if NATIVE:
            w = tl.load(p_w + w_chunk[:, None] * HB + o_k[None, :])
            ws = tl.load(p_w_scale + w_chunk[:, None] * QB + o_q[None, :])
            xs = xs.to(tl.float8e4nv, bitcast=True)
            ws = ws.to(tl.float8e4nv, bitcast=True)
            acc = tl.dot_scaled(x, xs, "e2m1", tl.trans(w), ws, "e2m1", acc)
        else:
            p_low = p_w + w_chunk[:, None] * BK + o_k[None, :]
            w_low = tl.load(p_low)
            w_high = tl.load(p_low + HB)
            low, high = blocks_to_half(x, xs, BM, QB, QUADS, PTX)
            acc = tl.dot(low, tl.trans(w_low), acc)
            acc = tl.dot(high, tl.trans(w_high), acc)
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
        bs = tl.load(p_b_scale + b_first + o_bs, mask=m_b[:, None] & m_bq[None, :], other=0)
        a = tl.load(p_a + a_first * 8 + o_a, mask=m_a[:, None] & m_ak[None, :], other=0)
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
