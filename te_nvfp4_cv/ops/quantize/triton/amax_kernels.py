"""A Triton kernel for the amaxes of delayed tensor scales; amax.py says what it computes. A program has two lanes."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from te_nvfp4_cv import formats
from te_nvfp4_cv.backend.devices import on_its_device

MANTISSA = {448: 0x280000, 256: 0x400000}  # of 6 E = 1.3125 * 2^11 or 1.5 * 2^10
EXPONENT = {448: 11, 256: 10}
LOWEST, HIGHEST = tl.constexpr(127 + formats.MIN_EXPONENT), tl.constexpr(127 + formats.MAX_EXPONENT)


@triton.jit
def move_kernel(  # type: ignore[no-untyped-def]
    used, seen, mantissa_0, mantissa_1, exponent_0, exponent_1, margin_0, margin_1, CLEAR: tl.constexpr
):
    """Take new amaxes: used, seen are fp32 [rows, 2], one row a program; mantissa, exponent are those of 6 E.

    margin: its binary logarithm.
    """
    row = tl.program_id(0)
    mantissa = tl.where(row == 0, mantissa_0, mantissa_1)
    exponent = tl.where(row == 0, exponent_0, exponent_1)
    margin = tl.where(row == 0, margin_0, margin_1)
    o_face = row * 2 + tl.arange(0, 2)
    bits = tl.load(seen + o_face).to(tl.int32, bitcast=True)
    field = ((bits + (0x7FFFFF - mantissa)) >> 23) + margin  # a larger mantissa carries
    field = tl.minimum(tl.maximum(field, exponent + LOWEST), exponent + HIGHEST)
    amax = ((field << 23) | mantissa).to(tl.float32, bitcast=True)
    tl.store(used + o_face, amax, mask=(bits > 0) & (bits < 0x7F800000))
    if CLEAR:
        tl.store(seen + o_face, tl.zeros((2,), tl.float32))


@on_its_device
def move(used: Tensor, seen: Tensor, e4m3_max: tuple[int, ...], margin: tuple[int, ...], clear: bool) -> None:
    """Launch move_kernel for amax.move."""
    first, last = e4m3_max[0], e4m3_max[-1]
    move_kernel[(len(e4m3_max),)](
        used,
        seen,
        MANTISSA[first],
        MANTISSA[last],
        EXPONENT[first],
        EXPONENT[last],
        margin[0].bit_length() - 1,
        margin[-1].bit_length() - 1,
        CLEAR=clear,
        num_warps=1,
    )
