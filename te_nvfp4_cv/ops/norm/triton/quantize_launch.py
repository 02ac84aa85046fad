"""Launch the kernels that quantize an activation where it is made; quantize_kernels.py says what they compute.

amax None     produced_amax_kernel, then produce_kernel: z is read twice, the activation is neither written nor read
amax given    produce_kernel alone, which also observes the amaxes
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from te_nvfp4_cv.backend.devices import on_its_device
from te_nvfp4_cv.formats import BLOCK, E4M3_MAX, power_of_two_amax
from te_nvfp4_cv.ops.layouts import operand_faces
from te_nvfp4_cv.ops.norm.spec import NormSpec
from te_nvfp4_cv.ops.norm.triton import quantize_kernels as kernels
from te_nvfp4_cv.ops.norm.triton.launch import activation_of, ordered, pointers
from te_nvfp4_cv.ops.quantize.triton.tiles import Watch
from te_nvfp4_cv.ops.records import NONE, PACKED, Collector, Operand, OperandSpec
from te_nvfp4_cv.ops.triton.launching import start
from te_nvfp4_cv.ops.triton.numerics import INTERPRETED, OPTIONS
from te_nvfp4_cv.ops.triton.workspace import zeros

PROGRAMS = 132 * 8  # of the amax kernel, which loops
TILE = 4096 if INTERPRETED.value else 512  # values of each of 16 images; 128 registers' worth at 4 warps


@on_its_device
def norm_quantize(
    z: Tensor,
    residual: Tensor | None,
    norm: Sequence[Tensor],
    mask: Tensor,
    s: NormSpec,
    operand: OperandSpec,
    dtype: torch.dtype,
    given: tuple[Tensor, Collector | None] | None,
) -> Operand:
    """Run norm_quantize; `given`: amaxes, and what takes what is observed. The two amaxes are views of one tensor."""
    amax, collector = (None, None) if given is None else given
    batch, channels, *image = z.shape
    run = channels * math.prod(image)
    block = min(TILE, max(64, 1 << (run - 1).bit_length()))
    per_row = -(-run // block)
    lines = operand.fold.images // BLOCK
    made = (z, z if residual is None else ordered(residual, z), *pointers(norm))
    shared: dict[str, Any] = dict(
        GROUPS=s.groups,
        GROUP_CHANNELS=channels // s.groups if s.groups else 0,
        MASKED=bool(batch % BLOCK or run % block),
        AFFINE=len(norm) == 4,
        RESIDUAL=residual is not None,
        **activation_of(s),
        BLOCK=block,
        **OPTIONS,
    )
    watch = None if amax is None else Watch.of(z, not operand.rht, collector)
    if amax is None:
        used = z.new_empty(2, dtype=torch.float32)
        tiles = per_row * lines
        start(
            kernels.produced_amax_kernel,
            (min(tiles, PROGRAMS),),
            *made, zeros(z), used, batch, run, per_row, tiles, channels, RHT=operand.rht and operand.col != NONE,
            POW2=operand.pow2, E4M3_MAX=operand.e4m3_max if operand.pow2 else E4M3_MAX, **shared,
        )  # fmt: skip
    else:
        used = power_of_two_amax(amax, operand.e4m3_max) if operand.pow2 else amax.contiguous()
    watched, observe = ((used,) * 4, 0) if watch is None else (watch.tensors(), watch.flags_of(True))
    row, col = operand_faces(z.movedim(1, -1), operand, dtype)
    start(
        kernels.produce_kernel,
        (per_row * lines,),
        *made,
        # A kernel wants a pointer for each argument: any tensor stands for one that it neither reads nor writes. Eight
        # codes of a row are stored as one int32, sixteen of a column as one int64.
        mask if mask.numel() else norm[0],
        used,
        row.data.view(torch.int32) if operand.row == PACKED else row.data,
        row.scale,
        col.data.view(torch.int64) if operand.col == PACKED else col.data,
        col.scale,
        *watched,
        batch,
        run,
        per_row,
        channels,
        KEEP=mask.numel() > 0,
        ROW=operand.row,
        COL=operand.col,
        RHT=operand.rht,
        OBSERVE=observe,
        E4M3_MAX=operand.e4m3_max,
        **shared,
    )
    if watch is None:
        return Operand(row, used[:1], col, used[1:], z.new_empty(0, dtype=torch.float32))
    return watch.operand(row, col)
