"""Triton kernels that reduce for normalization + activation, forward and backward, for batch and group normalization.

    statistics_kernel      one read of z: per channel and split the count, mean and squared deviations (Welford, merged)
    finish_statistics      merges the splits (and a group's channels): mean, rstd; running statistics
    backward_sums_kernel   per channel and split: sum g, sum g (z - mean), with g = act' dy
    finish_backward        merges them: dweight, dbias per slice, and the two means that dz subtracts

A slice is what is normalized together: the whole batch (batch norm, one slice) or one image (group norm). Memory order
is channels last ([slice, row, C], LAST) or channels first ([image, C, P], one or more images a slice). All arithmetic
is fp32. Offsets are an int64 scalar plus an int32 vector. apply_kernels.py uses what these find; launch.py launches
both.
"""

from __future__ import annotations

import triton
import triton.language as tl

from te_nvfp4_cv.ops.norm.triton.activations import RELU, activation_gradient


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
