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
from te_nvfp4_cv.formats import BLOCK
from te_nvfp4_cv.ops.norm.spec import NormSpec, empty_faces
from te_nvfp4_cv.ops.norm.triton import quantize_kernels as kernels
from te_nvfp4_cv.ops.norm.triton.launch import ACTIVATIONS, ordered, pointers
from te_nvfp4_cv.ops.quantize.operand import NONE, PACKED
from te_nvfp4_cv.ops.quantize.triton.operand_kernels import SLOTS, finish_kernel
from te_nvfp4_cv.ops.triton.numerics import INTERPRETED, OPTIONS

PROGRAMS = 132 * 8  # of the amax kernel, which loops
TILE = 4096 if INTERPRETED.value else 512  # values of each of 16 images; 128 registers' worth at 4 warps


@on_its_device
def norm_quantize(
    z: Tensor,
    residual: Tensor | None,
    norm: Sequence[Tensor],
    mask: Tensor,
    s: NormSpec,
    form: Sequence[int],
    dtype: torch.dtype,
    amax: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Run the operator norm_quantize."""
    images, row, col, rht, e4m3_max = form
    batch, channels, *image = z.shape
    run = channels * math.prod(image)
    block = min(TILE, max(64, 1 << (run - 1).bit_length()))
    per_row = -(-run // block)
    lines = images // BLOCK
    made = (z, z if residual is None else ordered(residual, z), *pointers(norm))
    shared: dict[str, Any] = dict(
        CHANNELS=channels,
        GROUPS=s.groups,
        AFFINE=len(norm) == 4,
        RESIDUAL=residual is not None,
        ACTIVATION=ACTIVATIONS[s.activation],
        BLOCK=block,
        **OPTIONS,
    )
    observe = amax is not None
    slots = z.new_zeros((3, SLOTS.value), dtype=torch.int32) if observe else norm[0]
    if amax is None:
        bits = z.new_zeros(2, dtype=torch.int32)
        tiles = per_row * lines
        kernels.produced_amax_kernel[(min(tiles, PROGRAMS),)](
            *made, bits, batch, run, per_row, tiles, RHT=bool(rht) and col != NONE, **shared
        )
        used = bits.view(torch.float32)  # bits of positive floats order as the floats do: an integer maximum found it
    else:
        used = amax.contiguous()
    row_data, row_scale, col_data, col_scale = empty_faces(z, images, row, col, dtype)
    kernels.produce_kernel[(per_row * lines,)](
        *made,
        mask if mask.numel() else norm[0],
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
        RHT=bool(rht),
        OBSERVE=observe,
        E4M3_MAX=e4m3_max,
        **shared,
    )
    observed = z.new_empty(3 if observe else 0, dtype=torch.float32)
    if observe:
        decoded = z.new_empty(2, dtype=torch.float32)
        finish_kernel[(1,)](slots, used, observed, decoded, SAME=not rht, num_warps=1)
        used = decoded  # NaN where the observed amax is not finite
    return row_data, row_scale, used[:1].clone(), col_data, col_scale, used[1:].clone(), observed
