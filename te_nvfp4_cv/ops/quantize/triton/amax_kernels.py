"""A Triton kernel for the amaxes of delayed tensor scales; amax.py says what it computes. A program has two lanes."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from te_nvfp4_cv.backend.devices import on_its_device
from te_nvfp4_cv.ops.triton import numerics as nx
from te_nvfp4_cv.ops.triton.launching import start


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
