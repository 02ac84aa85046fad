"""Convert a quantized weight to the matrix that its GEMM contracts, and back.

Exported files store the matrix: other readers of NVFP4 linear layers find the layout that they expect. All codes and
scales here are uint8.

    matrix     data [N, T * Kb * 8], scale [N, T * Kb]: a row per output channel, groups one after the other;
               taps outermost, the channels of one group innermost, padded with zeros to Kb blocks of 16. Where a
               block format has blocks of 32, a tap has half as many scales, rounded up
    codes      as fprop takes them (ops/quantize/operand.py):
               convolution, linear      data [N, T, Kb * 8]        scale [N, T, Kb], or [G, Ob, T, Kb]: one a tile
               transposed convolution   data [G, Ob, T, C, 8]      scale [G, Ob, T, C];   N = G * C, Kb = Ob
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from te_nvfp4_cv.formats import BLOCK
from te_nvfp4_cv.layer.plan import Plan
from te_nvfp4_cv.ops.block_scales import block_of

K_ORDER = "taps, channels padded to 16"


def channels(plan: Plan) -> int:
    """Return the number of input channels of one group."""
    g = plan.geometry
    # A transposed convolution is lowered to the convolution whose input gradient it is: a and b change roles.
    return (g.channels_b if g.transposed else g.channels_a) // g.groups


def sizes(plan: Plan) -> tuple[int, int, int]:
    """Return the sizes of a weight's matrix: rows N, taps T, and blocks Kb of one tap."""
    g = plan.geometry
    return g.channels_a if g.transposed else g.channels_b, g.taps, -(-channels(plan) // BLOCK)


def scales_of(plan: Plan) -> int:
    """Return how many scales a row of the matrix has: those of its taps, one after the other."""
    return plan.geometry.taps * -(-channels(plan) // block_of(plan.backend))


def of_weight(w: Tensor, plan: Plan) -> Tensor:
    """Return the matrix [N, T * Kb * 16] of the values of a weight [axis 0, axis 1, *kernel]."""
    groups = plan.geometry.groups
    w = w.reshape(groups, w.shape[0] // groups, w.shape[1], -1)  # [G, axis 0, axis 1, T]
    w = w.transpose(1, 2) if plan.geometry.transposed else w
    w = w.flatten(0, 1).transpose(1, 2)  # [N, T, K]
    return F.pad(w, (0, -w.shape[2] % BLOCK)).flatten(1)


def to_matrix(data: Tensor, scale: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    """Convert codes and scales, as fprop takes them, to the matrix."""
    rows, taps, blocks = sizes(plan)
    if plan.geometry.transposed:
        data, scale = data.permute(0, 3, 2, 1, 4), scale.permute(0, 3, 2, 1)
    elif scale.dim() == 4:
        groups = plan.geometry.groups
        # Readers of the matrix expect a scale for each row. The last tile of a group may be cut.
        scale = scale.repeat_interleave(block_of(plan.backend), dim=1)[:, : rows // groups]
    return data.reshape(rows, taps * blocks * 8).contiguous(), scale.reshape(rows, scales_of(plan)).contiguous()


def from_matrix(data: Tensor, scale: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    """Convert the matrix to codes and scales as fprop takes them. If the plan has 16x16 scales, has_tiles must hold."""
    rows, taps, blocks = sizes(plan)
    groups = plan.geometry.groups
    if plan.geometry.transposed:
        data = data.reshape(groups, rows // groups, taps, blocks, 8).permute(0, 3, 2, 1, 4)
        scale = scale.reshape(groups, rows // groups, taps, -1).permute(0, 3, 2, 1)
    else:
        data, scale = data.reshape(rows, taps, blocks * 8), scale.reshape(rows, taps, -1)
        if plan.recipe.settings("weight").two_d:
            # One row stands for its tile.
            scale = scale.reshape(groups, rows // groups, taps, -1)[:, :: block_of(plan.backend)]
    return data.contiguous(), scale.contiguous()


def has_tiles(scale: Tensor, plan: Plan) -> bool:
    """Tell whether all rows of each tile of a group, 16 or 32, have the same scales."""
    of_rows, block = scale.reshape(plan.geometry.groups, -1, scales_of(plan)), block_of(plan.backend)
    tiles = of_rows[:, ::block].repeat_interleave(block, dim=1)[:, : of_rows.shape[1]]
    return bool((of_rows == tiles).all())
