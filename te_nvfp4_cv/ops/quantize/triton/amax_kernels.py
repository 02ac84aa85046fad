"""Triton kernels for amaxes: of a tensor in memory order, and those of delayed tensor scales, moved on (see amax.py).

    amax_flat_kernel    the amax of a weight, or of x where nothing is rotated
    move_kernel         delayed scales after a step; a program has two lanes
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disable-error-code="assignment"
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from te_nvfp4_cv.backend.devices import on_its_device
from te_nvfp4_cv.ops.triton import numerics as nx
from te_nvfp4_cv.ops.triton.launching import start
from te_nvfp4_cv.ops.triton.workspace import is_last, take


@triton.jit
def move_row(used, seen, row, RULE: tl.constexpr, CLEAR: tl.constexpr):
    """Take the new amaxes of one row of used, seen, fp32 [rows, 2]. RULE: see rule_of."""
    o_face = row * 2 + tl.arange(0, 2)
    value = tl.load(seen + o_face)
    amaxes, there = moved(value, row, RULE)
    tl.store(used + o_face, amaxes, mask=there)
    if CLEAR:
        tl.store(seen + o_face, tl.zeros((2,), tl.float32))


@triton.jit
def moved(value, row, RULE: tl.constexpr):
    """Return the amaxes that follow from those seen, and where they do: elsewhere they stay."""
    first = nx.power_of_two_amax(value, 256 if RULE & 1 else 448, RULE >> 2 & 7)
    last = nx.power_of_two_amax(value, 256 if RULE & 2 else 448, RULE >> 5 & 7)
    bits = nx.bits_of(value)
    return tl.where(row == 0, first, last), (bits > 0) & (bits < nx.INF_BITS)


@triton.jit
def foresee(used, seen, next, RULE: tl.constexpr):
    """Write into `next` what `used` will be after the next move, fp32 [2, 2]; neither of the others changes."""
    for row in tl.static_range(2):
        face = row * 2 + tl.arange(0, 2)
        amaxes, there = moved(tl.load(seen + face), row, RULE)
        tl.store(next + face, tl.where(there, amaxes, tl.load(used + face)))


@triton.jit
def finish_amaxes(work, amax, FACES: tl.constexpr, SAME: tl.constexpr, POW2: tl.constexpr, E4M3_MAX: tl.constexpr):
    """Let the launch's last program write amax fp32 [FACES] and leave zeros in `work`, int32: bits of two, a counter.

    SAME: the second is the first. POW2: raised to those whose tensor scale is a power of two.
    """
    if is_last(work + 2):
        take(work + 2)
        value = nx.float_of(take(work))
        if POW2:
            value = nx.power_of_two_amax(value, E4M3_MAX)
        tl.store(amax, value)
        if FACES == 2:
            if not SAME:
                value = nx.float_of(take(work + 1))
                if POW2:
                    value = nx.power_of_two_amax(value, E4M3_MAX)
            tl.store(amax + 1, value)


@triton.jit
def flat_maximum(x, pid, programs, n, BLOCK: tl.constexpr):
    """Return the bits of max |x| over the part of n values that is for program `pid` of `programs`. NaN wins."""
    lane = tl.arange(0, BLOCK)
    # As many neighbours as a thread loads at once: it keeps their maximum alone.
    width: tl.constexpr = 128 // x.dtype.element_ty.primitive_bitwidth
    top = tl.zeros((BLOCK // width,), tl.int32)
    step = programs.to(tl.int64) * BLOCK
    for origin in range(pid.to(tl.int64) * BLOCK, n, step):
        left = tl.minimum(n - origin, BLOCK).to(tl.int32)  # 64 bits would be compared in each lane
        value = tl.load(x + origin + lane, mask=lane < left, other=0.0).to(tl.float32)
        # The bits of magnitudes are ordered as the values are, NaN above inf, so an integer maximum finds both.
        top = tl.maximum(top, tl.max(tl.reshape(nx.magnitude_bits(value), (BLOCK // width, width)), 1))
    return tl.max(top, 0)


@triton.jit
def amax_flat_kernel(
    x,
    work,
    amax,
    used,
    seen,
    n,
    FACES: tl.constexpr,
    POW2: tl.constexpr,
    E4M3_MAX: tl.constexpr,
    RULE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Raise work[0], int32, to the bits of max |x| over n values. NaN wins.

    FACES, POW2: see finish_amaxes; FACES 0: nothing more. RULE, used, seen: move two rows of delayed scales, unless -1.
    """
    if RULE >= 0:
        if tl.program_id(0) == 0:
            for row in tl.static_range(2):
                move_row(used, seen, row, RULE, True)
    top = flat_maximum(x, tl.program_id(0), tl.num_programs(0), n, BLOCK)
    tl.atomic_max(work, top, sem="relaxed")
    if FACES != 0:
        finish_amaxes(work, amax, FACES, True, POW2, E4M3_MAX)


@triton.jit
def move_kernel(used, seen, RULE: tl.constexpr, CLEAR: tl.constexpr):
    """Take new amaxes: used, seen are fp32 [rows, 2], one row a program."""
    move_row(used, seen, tl.program_id(0), RULE, CLEAR)


def rule_of(e4m3_max: tuple[int, ...], margin: tuple[int, ...]) -> int:
    """Return E and the binary logarithm of the margin (0 to 7) of the first and the last row, as one number."""
    first, last = margin[0].bit_length() - 1, margin[-1].bit_length() - 1
    return (e4m3_max[0] == 256) + 2 * (e4m3_max[-1] == 256) + 4 * first + 32 * last


@on_its_device
def move(used: Tensor, seen: Tensor, e4m3_max: tuple[int, ...], margin: tuple[int, ...], clear: bool) -> None:
    """Launch move_kernel for amax.move."""
    start(move_kernel, (len(e4m3_max),), used, seen, RULE=rule_of(e4m3_max, margin), CLEAR=clear, num_warps=1)
