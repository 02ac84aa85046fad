"""A Triton kernel that quantizes a layer's x and measures its weight in one launch, with delayed tensor scales.

Neither needs the other: x is quantized with an amax of the step before. Where the scales move in this step, that amax
is in `next`, which the last launch of the backward pass has written (unpack_kernels.py); the state itself is brought up
to date here.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disable-error-code="assignment"
from __future__ import annotations

import triton
import triton.language as tl

from te_nvfp4_cv.ops.quantize.triton.amax_kernels import flat_maximum
from te_nvfp4_cv.ops.quantize.triton.operand_kernels import SLOTS, finish_observed, quantize_kernel
from te_nvfp4_cv.ops.triton import numerics as nx
from te_nvfp4_cv.ops.triton.workspace import take

# In the workspace, after finish_observed's part: bits, and a counter.
PLACE: tl.constexpr = tl.constexpr(3 * SLOTS.value + 8)


@triton.jit(do_not_specialize=["per_row", "x_programs"])
def quantize_and_measure_kernel(
    x,
    amax,
    row_data,
    row_scale,
    col_data,
    col_scale,
    work,
    seen,
    collected,
    saturated,
    w,
    w_amax,
    used,
    next,
    images,
    rows,
    run,
    per_row,
    x_programs,
    n,
    ROW: tl.constexpr,
    COL: tl.constexpr,
    RHT: tl.constexpr,
    OBSERVE: tl.constexpr,
    MASKED: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCKS: tl.constexpr,
    E4M3_MAX: tl.constexpr,
    BLOCK: tl.constexpr,
    POW2: tl.constexpr,
    W_E4M3_MAX: tl.constexpr,
    MOVES: tl.constexpr,
    W_BLOCK: tl.constexpr,
):
    """Run quantize_kernel, not folded and to nearest, in the first x_programs, and amax_flat_kernel of w in the others.

    amax: of x, in `next` if MOVES. collected: of x, the first of two rows. used, next: fp32 [2, 2]; if MOVES, used
    becomes next and collected 0, before what x shows is collected. w_amax: fp32 [1], of n values. The other arguments
    are those of the two kernels.
    """
    pid = tl.program_id(0)
    if pid < x_programs:
        quantize_kernel(
            x, x, amax, amax, row_data, row_scale, col_data, col_scale, work, seen, collected, saturated,
            images, rows, run, per_row, 0,
            ROW, COL, RHT, False, OBSERVE, False, MASKED, CHANNELS, BLOCKS, E4M3_MAX, BLOCK,
        )  # fmt: skip
    else:
        mine = pid - x_programs
        programs = tl.num_programs(0) - x_programs
        if MOVES:
            if mine == 0:  # before this program counts itself: nobody collects until all have
                face = tl.arange(0, 4)
                tl.store(used + face, tl.load(next + face))
                tl.store(collected + face, tl.zeros((4,), tl.float32))
                tl.debug_barrier()
        tl.atomic_max(work + PLACE, flat_maximum(w, mine, programs, n, W_BLOCK), sem="relaxed")
        if tl.atomic_add(work + PLACE + 1, 1, sem="acq_rel") == programs - 1:
            take(work + PLACE + 1)
            value = nx.float_of(take(work + PLACE))
            if POW2:
                value = nx.power_of_two_amax(value, W_E4M3_MAX)
            tl.store(w_amax, value)
        finish_observed(work, amax, seen, collected, saturated, OBSERVE)
