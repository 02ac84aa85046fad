"""Launches the kernels that quantize an activation where it is made: see kernels_produce.py and norm_quantize.

amax None     produced_amax_kernel, then produce_kernel: z is read twice, the activation is neither written nor read
amax given    produce_kernel alone, which also observes the amaxes
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from te_nvfp4_cv.backend.devices import on_its_device
from te_nvfp4_cv.ops.norm.triton import quantize_kernels as kernels
from te_nvfp4_cv.ops.norm.triton.launch import ACTIVATIONS, affine, ordered
from te_nvfp4_cv.ops.quantize.triton.operand_kernels import finish_kernel
from te_nvfp4_cv.ops.triton.numerics import INTERPRETED, OPTIONS

NONE, PACKED, DEQUANTIZED = 0, 1, 2
SLOTS = 64
PROGRAMS = 132 * 8  # of the amax kernel, which loops
TILE = 4096 if INTERPRETED.value else 512  # values of each of 16 images; 128 registers' worth at 4 warps


@on_its_device
def norm_quantize(
    z: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    mask: Tensor,
    groups: int,
    activation: str,
    images: int,
    row: int,
    col: int,
    rht: bool,
    e4m3_max: int,
    dtype: torch.dtype,
    amax: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See norm_quantize in this folder's __init__."""
    batch, channels, *image = z.shape
    run = channels * math.prod(image)
    block = min(TILE, max(64, 1 << (run - 1).bit_length()))
    per_row = -(-run // block)
    lines = images // 16
    empty = z.new_empty(0, dtype=torch.uint8)
    made: tuple[Any, ...] = (
        z,
        z if residual is None else ordered(residual, z),
        *affine(weight, bias, mean),
        mean,
        rstd,
    )
    shared: dict[str, Any] = dict(
        CHANNELS=channels,
        GROUPS=groups,
        AFFINE=weight is not None,
        RESIDUAL=residual is not None,
        ACTIVATION=ACTIVATIONS[activation],
        BLOCK=block,
        **OPTIONS,
    )
    observe = amax is not None
    slots = z.new_zeros((3, SLOTS), dtype=torch.int32) if observe else mean
    if amax is None:
        bits = z.new_zeros(2, dtype=torch.int32)
        tiles = per_row * lines
        kernels.produced_amax_kernel[(min(tiles, PROGRAMS),)](
            *made, bits, batch, run, per_row, tiles, RHT=rht and col != NONE, **shared
        )
        used = bits.view(torch.float32)
    else:
        used = amax.contiguous()
    row_data, row_scale, col_data, col_scale = (torch.empty_like(empty) for _ in range(4))
    if row == PACKED:
        row_data, row_scale = (
            empty.new_empty(batch, *image, channels // 2),
            empty.new_empty(batch, *image, channels // 16),
        )
    elif row == DEQUANTIZED:
        row_data = z.new_empty((batch, *image, channels), dtype=dtype)
    if col == PACKED:
        col_data, col_scale = empty.new_empty(lines, *image, channels, 8), empty.new_empty(lines, *image, channels)
    kernels.produce_kernel[(per_row * lines,)](
        *made,
        mask if mask.numel() else mean,
        used,
        row_data.view(torch.int32) if row == PACKED else row_data,
        row_scale,
        col_data.view(torch.int64) if col == PACKED else col_data,
        col_scale,
        slots,
        batch,
        run,
        per_row,
        KEEP=mask.numel() > 0,
        ROW=row,
        COL=col,
        RHT=rht,
        OBSERVE=observe,
        E4M3_MAX=e4m3_max,
        **shared,
    )
    if not observe:
        return (
            row_data,
            row_scale,
            used[:1].clone(),
            col_data,
            col_scale,
            used[1:].clone(),
            z.new_empty(0, dtype=torch.float32),
        )
    observed = z.new_empty(3, dtype=torch.float32)
    decoded = z.new_empty(2, dtype=torch.float32)
    finish_kernel[(1,)](slots, used, observed, decoded, SAME=not rht, num_warps=1)
    return row_data, row_scale, decoded[:1].clone(), col_data, col_scale, decoded[1:].clone(), observed
