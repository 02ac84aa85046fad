"""Triton kernels that apply a normalization, element by element, forward and backward; kernels.py has its statistics.

    apply_kernel           y = act((z - mean) * rstd * weight + bias [+ residual]), ReLU's mask
    backward_apply_kernel  dz = rstd weight g + slope (z - mean) + offset; the residual's gradient g

They count through a slice in memory order, eight elements a thread, so that eight of them make one byte of a mask; a
slice's size must be a multiple of 8 where there are several slices. All arithmetic is fp32, and stored values are
rounded once. Offsets are an int64 scalar plus an int32 vector.
"""

from __future__ import annotations

import triton
import triton.language as tl

from te_nvfp4_cv.ops.norm.triton.activations import RELU, activated, activation_gradient


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
        channel = ((first + byte * 8) % channels)[:, None] + tl.arange(0, 8)[None, :]
        # Eight in order, which the compiler cannot see: a thread loads its channels' parameters at once.
        return tl.max_contiguous(tl.multiple_of(channel, (1, 8)), (1, 8))
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
