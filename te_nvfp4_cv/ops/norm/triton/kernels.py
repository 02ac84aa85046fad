"""Triton kernels of normalization + activation, forward and backward, for batch and group normalization alike.

    statistics_kernel      one read of z: per channel and split the count, mean and squared deviations (Welford, merged)
    finish_statistics      merges the splits (and a group's channels): mean, rstd; running statistics
    apply_kernel           y = act((z - mean) * rstd * weight + bias [+ residual]), ReLU's mask
    backward_sums_kernel   per channel and split: sum g, sum g (z - mean), with g = act' dy
    finish_backward        merges them: dweight, dbias per slice, and the two means that dz subtracts
    backward_apply_kernel  dz = rstd weight g + slope (z - mean) + offset; the residual's gradient g

A slice is what is normalized together: the whole batch (batch norm, one slice) or one image (group norm). Memory order
is channels last ([slice, row, C], LAST) or channels first ([image, C, P], one or more images a slice). The elementwise
kernels count through a slice in memory order, eight elements a thread, so that eight of them make one byte of a mask; a
slice's size must be a multiple of 8 where there are several slices. All arithmetic is fp32, and stored values are
rounded once. Offsets are an int64 scalar plus an int32 vector. launch.py launches these kernels.
"""

from __future__ import annotations

import triton
import triton.language as tl

from te_nvfp4_cv.ops.norm.triton.activations import RELU, activated, activation_gradient


@triton.jit
def tile_address(
    item, per_image, inner, channels, first_channel, ROWS: tl.constexpr, COLS: tl.constexpr, LAST: tl.constexpr
):
    """Locate one tile of a slice.

    Returns an int64 offset in the slice, int32 offsets [ROWS, COLS] from there, and two masks: rows that exist, and
    channels that exist.
    """
    # z may have more than 2^31 elements, a tile has not: only the scalar part of an address is 64 bits wide.
    image = (item // per_image).to(tl.int64)
    start = item % per_image * ROWS
    rows = start + tl.arange(0, ROWS)[:, None]
    cols = tl.arange(0, COLS)[None, :]
    if LAST:
        base = (image * inner + start) * channels + first_channel
        at = tl.arange(0, ROWS)[:, None] * channels + cols
    else:
        base = (image * channels + first_channel) * inner + start
        at = cols * inner + tl.arange(0, ROWS)[:, None]
    return base, at, rows < inner, cols < channels - first_channel


@triton.jit(do_not_specialize=["per_image", "items"])
def statistics_kernel(
    z,
    partial,
    slice_size,
    per_image,
    items,
    inner,
    channels,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    LAST: tl.constexpr,
):
    """Write the count, the mean and the sum of squared deviations to partial, fp32 [slices, splits, 3, channels].

    inner: rows of an image (LAST: of a slice); items: tiles of ROWS rows in a slice, per_image of them in an image.
    Grid: (splits, channel blocks, slices).
    """
    split = tl.program_id(0)
    first = tl.program_id(1) * COLS
    s = tl.program_id(2).to(tl.int64)
    mean = tl.zeros((ROWS, COLS), tl.float32)
    m2 = tl.zeros((ROWS, COLS), tl.float32)
    count = tl.zeros((ROWS, 1), tl.float32)
    for item in range(split, items, tl.num_programs(0)):
        base, at, row_in, col_in = tile_address(item, per_image, inner, channels, first, ROWS, COLS, LAST)
        value = tl.load(z + (s * slice_size + base) + at, mask=row_in & col_in, other=0.0).to(tl.float32)
        there = tl.where(row_in, 1.0, 0.0)
        count += there
        # Welford's update in each lane: E[z^2] - E[z]^2 would cancel for a large mean. `there` is 0 past the end.
        delta = value - mean
        mean += delta * (there / tl.maximum(count, 1.0))
        m2 += there * delta * (value - mean)
    total = tl.sum(count)
    # Lanes have seen different rows of a channel: their means are weighted by how many, and the distance of a lane's
    # mean from the common one adds to the squared deviations.
    merged = tl.sum(mean * count, 0) / total
    away = mean - merged[None, :]
    m2_all = tl.sum(m2 + count * away * away, 0)
    channel = first + tl.arange(0, COLS)
    to = partial + (s * tl.num_programs(0) + split) * 3 * channels + channel
    # The count is one number, stored for each channel, so that the next kernel reads three equal rows.
    tl.store(to, tl.zeros((COLS,), tl.float32) + total, mask=channel < channels)
    tl.store(to + channels, merged, mask=channel < channels)
    tl.store(to + 2 * channels, m2_all, mask=channel < channels)


@triton.jit
def channels_to_finish(channels, group_channels, GROUP: tl.constexpr, WIDTH: tl.constexpr):
    """Return the channels of this program, and which of them exist: those of a group, or WIDTH others."""
    lane = tl.arange(0, WIDTH)
    if GROUP:
        return tl.program_id(0) * group_channels + lane, lane < group_channels
    channel = tl.program_id(0) * WIDTH + lane
    return channel, channel < channels


@triton.jit(do_not_specialize=["splits"])
def finish_statistics(
    partial,
    mean,
    rstd,
    running_mean,
    running_var,
    splits,
    channels,
    group_channels,
    momentum,
    eps,
    UPDATE: tl.constexpr,
    GROUP: tl.constexpr,
    SPLITS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Merge the splits into mean and rstd, fp32 [slices, groups].

    GROUP: program (group, slice) merges WIDTH >= group_channels channels; else a program finishes WIDTH channels one by
    one. UPDATE: also the running statistics, which take the unbiased variance, as torch does.
    """
    s = tl.program_id(1).to(tl.int64)
    channel, inside = channels_to_finish(channels, group_channels, GROUP, WIDTH)
    split = tl.arange(0, SPLITS)[:, None]
    there = (split < splits) & inside[None, :]
    at = partial + (s * splits + split) * 3 * channels + channel[None, :]
    count = tl.load(at, mask=there, other=0.0)
    means = tl.load(at + channels, mask=there, other=0.0)
    m2 = tl.load(at + 2 * channels, mask=there, other=0.0)
    if GROUP:
        total = tl.sum(count)
        average = tl.sum(count * means) / total
        variance = tl.sum(m2 + count * (means - average) * (means - average)) / total
        to = s * tl.num_programs(0) + tl.program_id(0)
        tl.store(mean + to, average)
        # Correctly rounded, because the instruction for rsqrt is an approximation.
        tl.store(rstd + to, tl.div_rn(1.0, tl.sqrt_rn(variance + eps)))
    else:
        # Lanes past the last channel have seen nothing, and must not divide by 0.
        total = tl.maximum(tl.sum(count, 0), 1.0)
        average = tl.sum(count * means, 0) / total
        away = means - average[None, :]
        variance = tl.sum(m2 + count * away * away, 0) / total
        tl.store(mean + channel, average, mask=inside)
        tl.store(rstd + channel, tl.div_rn(1.0, tl.sqrt_rn(variance + eps)), mask=inside)
        if UPDATE:
            # Only without GROUP, because group normalization has no running statistics.
            old = tl.load(running_mean + channel, mask=inside, other=0.0).to(tl.float32)
            new = momentum * average + (1.0 - momentum) * old
            tl.store(running_mean + channel, new.to(running_mean.dtype.element_ty), mask=inside)
            old = tl.load(running_var + channel, mask=inside, other=0.0).to(tl.float32)
            new = momentum * (variance * total / tl.maximum(total - 1.0, 1.0)) + (1.0 - momentum) * old
            tl.store(running_var + channel, new.to(running_var.dtype.element_ty), mask=inside)


@triton.jit
def channel_of(
    start, byte, at, inner, channels, CHANNELS: tl.constexpr, LAST: tl.constexpr, BLOCK: tl.constexpr
):
    """Return the channels, int32, of the elements start + at of a slice, in memory order.

    CHANNELS: as `channels`, but 0 where channels lie innermost and are a multiple of 8, below 2^20: the elements of a
    byte are then eight channels in order, so that one division serves them, and it need not be known to the compiler.
    """
    if CHANNELS == 0:
        # start % channels in 32 bits: `start` is BLOCK times the program's number.
        first = (tl.program_id(0) % channels) * BLOCK % channels
        return ((first + byte * 8) % channels)[:, None] + tl.arange(0, 8)[None, :]
    if LAST:
        return ((start % CHANNELS).to(tl.int32) + at) % CHANNELS
    # Divisions of 64-bit vectors are slow, so the 64-bit part is divided as a scalar.
    plane = start // inner
    within = (start - plane * inner).to(tl.int32)
    return ((plane % CHANNELS).to(tl.int32) + (within + at) // inner) % CHANNELS


@triton.jit
def place_of(
    slice_size,
    inner,
    channels,
    CHANNELS: tl.constexpr,
    GROUP_CHANNELS: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Locate the elements of this program, eight a row [BLOCK / 8, 8]: those of one byte of the mask.

    Returns the tile's first element in the tensor, int64; the bytes; offsets from the first element; how many elements
    the tile has; the elements' channels, and their places in mean and rstd.
    """
    start = tl.program_id(0).to(tl.int64) * BLOCK
    s = tl.program_id(1).to(tl.int64)
    byte = tl.arange(0, BLOCK // 8)
    at = byte[:, None] * 8 + tl.arange(0, 8)[None, :]
    left = tl.minimum(slice_size - start, BLOCK).to(tl.int32)
    base = s * slice_size + start
    channel = channel_of(start, byte, at, inner, channels, CHANNELS, LAST, BLOCK)
    group = (s * (channels // GROUP_CHANNELS)).to(tl.int32) + channel // GROUP_CHANNELS
    return base, byte, at, left, channel, group


@triton.jit
def normalized(value, mean, rstd, weight, bias, group, channel, inside, AFFINE: tl.constexpr):
    """Return z - mean, the factor rstd * weight, and u, the norm's result."""
    centred = value - tl.load(mean + group, mask=inside, other=0.0)
    factor = tl.load(rstd + group, mask=inside, other=0.0)
    if AFFINE:
        factor = factor * tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)
        # An explicit fma, so that every kernel which computes u has the same bits, whatever the compiler would merge.
        u = tl.fma(centred, factor, tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32))
    else:
        u = centred * factor
    return centred, factor, u


@triton.jit
def apply_kernel(
    z,
    residual,
    weight,
    bias,
    mean,
    rstd,
    y,
    mask,
    slice_size,
    inner,
    channels,
    CHANNELS: tl.constexpr,
    GROUP_CHANNELS: tl.constexpr,
    LAST: tl.constexpr,
    AFFINE: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SLOPE: tl.constexpr,
    KEEP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Normalize, add and activate one tile.

    y: z's memory order; mask: uint8, a bit an element (KEEP with RELU). mean, rstd: [slices, groups], where a group is
    GROUP_CHANNELS channels. CHANNELS: see channel_of. Grid: (tiles of a slice, slices).
    """
    base, byte, at, left, channel, group = place_of(slice_size, inner, channels, CHANNELS, GROUP_CHANNELS, LAST, BLOCK)
    inside = at < left
    value = tl.load(z + base + at, mask=inside, other=0.0).to(tl.float32)
    _, _, u = normalized(value, mean, rstd, weight, bias, group, channel, inside, AFFINE)
    if RESIDUAL:
        u += tl.load(residual + base + at, mask=inside, other=0.0).to(tl.float32)
    if KEEP:
        # Not u > 0: a NaN passes.
        bits = tl.where(~(u <= 0.0) & inside, 1, 0) << tl.arange(0, 8)[None, :]
        tl.store(mask + base // 8 + byte, tl.sum(bits, 1).to(tl.uint8), mask=byte * 8 < left)
    tl.store(y + base + at, activated(u, ACTIVATION, SLOPE).to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["per_image", "items"])
def backward_sums_kernel(
    dy,
    z,
    mask,
    weight,
    bias,
    mean,
    rstd,
    partial,
    slice_size,
    per_image,
    items,
    inner,
    channels,
    group_channels,
    AFFINE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SLOPE: tl.constexpr,
    WHOLE_BYTES: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    LAST: tl.constexpr,
):
    """Write sum g and sum g (z - mean) to partial, fp32 [slices, splits, 2, channels].

    The grid and the tiles are those of statistics_kernel.

    WHOLE_BYTES: channels last, channels and COLS multiples of 8: a byte of the mask is eight channels of one row.
    """
    split = tl.program_id(0)
    first = tl.program_id(1) * COLS
    s = tl.program_id(2).to(tl.int64)
    channel = first + tl.arange(0, COLS)
    known = channel < channels
    group = s * (channels // group_channels) + channel // group_channels
    centre = tl.load(mean + group, mask=known, other=0.0)[None, :]
    factor = tl.load(rstd + group, mask=known, other=0.0)[None, :]
    shift = tl.zeros((1, COLS), tl.float32)
    if AFFINE:
        factor = factor * tl.load(weight + channel, mask=known, other=0.0).to(tl.float32)[None, :]
        shift = tl.load(bias + channel, mask=known, other=0.0).to(tl.float32)[None, :]
    sum_g = tl.zeros((ROWS, COLS), tl.float32)
    sum_gz = tl.zeros((ROWS, COLS), tl.float32)
    for item in range(split, items, tl.num_programs(0)):
        base, at, row_in, col_in = tile_address(item, per_image, inner, channels, first, ROWS, COLS, LAST)
        inside = row_in & col_in
        base += s * slice_size
        centred = tl.load(z + base + at, mask=inside, other=0.0).to(tl.float32) - centre
        gradient = tl.load(dy + base + at, mask=inside, other=0.0).to(tl.float32)
        if ACTIVATION != RELU:
            g = activation_gradient(gradient, tl.fma(centred, factor, shift), ACTIVATION, SLOPE)
        elif WHOLE_BYTES:
            eighth = tl.arange(0, COLS // 8)[None, :]
            # Adding an int64 zero widens the sum before it is multiplied.
            origin = (s * slice_size + first) // 8 + (item * ROWS + tl.full((), 0, tl.int64)) * (channels // 8)
            byte = tl.arange(0, ROWS)[:, None] * (channels // 8) + eighth
            there = row_in & (first + eighth * 8 < channels)
            packed = tl.load(mask + origin + byte, mask=there, other=0).to(tl.int32)
            bits = packed[:, :, None] >> tl.arange(0, 8)[None, None, :]
            g = tl.where((tl.reshape(bits, (ROWS, COLS)) & 1) != 0, gradient, 0.0)
        else:
            bit = (base % 8).to(tl.int32) + at
            bits = tl.load(mask + base // 8 + bit // 8, mask=inside, other=0).to(tl.int32) >> (bit % 8)
            g = tl.where((bits & 1) != 0, gradient, 0.0)
        sum_g += g
        # The mask again, because 0 times a mean that is not finite would be NaN.
        sum_gz += tl.where(inside, g * centred, 0.0)
    to = partial + (s * tl.num_programs(0) + split) * 2 * channels + channel
    tl.store(to, tl.sum(sum_g, 0), mask=known)
    tl.store(to + channels, tl.sum(sum_gz, 0), mask=known)


@triton.jit(do_not_specialize=["splits"])
def finish_backward(
    partial,
    weight,
    rstd,
    dbias,
    dweight,
    slope,
    offset,
    splits,
    channels,
    group_channels,
    count,
    AFFINE: tl.constexpr,
    BATCH_STATS: tl.constexpr,
    GROUP: tl.constexpr,
    SPLITS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Merge the splits into dbias and dweight, and into what dz subtracts.

    dbias, dweight: fp32 [slices, channels], of each slice. slope, offset: fp32 [slices, groups], 0 without
    batch statistics. count: elements that share a mean. The programs are those of finish_statistics.
    """
    s = tl.program_id(1).to(tl.int64)
    channel, inside = channels_to_finish(channels, group_channels, GROUP, WIDTH)
    if GROUP:
        group = s * tl.num_programs(0) + tl.program_id(0)
        scale = tl.load(rstd + group)
    else:
        group = channel
        scale = tl.load(rstd + channel, mask=inside, other=0.0)
    split = tl.arange(0, SPLITS)[:, None]
    there = (split < splits) & inside[None, :]
    at = partial + (s * splits + split) * 2 * channels + channel[None, :]
    sum_g = tl.sum(tl.load(at, mask=there, other=0.0), 0)
    # The partial sums hold g (z - mean); times rstd they are those of g xhat.
    sum_gx = tl.sum(tl.load(at + channels, mask=there, other=0.0), 0) * scale
    tl.store(dbias + s * channels + channel, sum_g, mask=inside)
    tl.store(dweight + s * channels + channel, sum_gx, mask=inside)
    if AFFINE:
        w = tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)
        # From here on for dz, which subtracts means of weight * g; dbias and dweight are without the weight.
        sum_g = sum_g * w
        sum_gx = sum_gx * w
    if GROUP:
        sum_g = tl.sum(sum_g, 0)
        sum_gx = tl.sum(sum_gx, 0)
    if BATCH_STATS:
        down = -scale * scale * sum_gx / count
        shift = -scale * sum_g / count
    else:
        # The statistics were constants, so dz has no such terms. A product gives zeros of the right shape.
        down = sum_gx * 0.0
        shift = sum_g * 0.0
    if GROUP:
        tl.store(slope + group, down)
        tl.store(offset + group, shift)
    else:
        tl.store(slope + group, down, mask=inside)
        tl.store(offset + group, shift, mask=inside)


@triton.jit
def backward_apply_kernel(
    dy,
    z,
    mask,
    weight,
    bias,
    mean,
    rstd,
    slope,
    offset,
    dz,
    dresidual,
    slice_size,
    inner,
    channels,
    CHANNELS: tl.constexpr,
    GROUP_CHANNELS: tl.constexpr,
    LAST: tl.constexpr,
    AFFINE: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SLOPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write dz = rstd weight g + slope (z - mean) + offset, and dresidual = g (RESIDUAL), on apply_kernel's grid."""
    base, byte, at, left, channel, group = place_of(slice_size, inner, channels, CHANNELS, GROUP_CHANNELS, LAST, BLOCK)
    inside = at < left
    value = tl.load(z + base + at, mask=inside, other=0.0).to(tl.float32)
    centred, factor, u = normalized(value, mean, rstd, weight, bias, group, channel, inside, AFFINE)
    gradient = tl.load(dy + base + at, mask=inside, other=0.0).to(tl.float32)
    if ACTIVATION == RELU:  # one byte for the eight elements of a thread
        bits = tl.load(mask + base // 8 + byte, mask=byte * 8 < left, other=0).to(tl.int32)[:, None]
        g = tl.where(((bits >> tl.arange(0, 8)[None, :]) & 1) != 0, gradient, 0.0)
    else:
        g = activation_gradient(gradient, u, ACTIVATION, SLOPE)
    down = tl.load(slope + group, mask=inside, other=0.0)
    shift = tl.load(offset + group, mask=inside, other=0.0)
    tl.store(dz + base + at, (factor * g + (down * centred + shift)).to(dz.dtype.element_ty), mask=inside)
    if RESIDUAL:
        tl.store(dresidual + base + at, g.to(dresidual.dtype.element_ty), mask=inside)
