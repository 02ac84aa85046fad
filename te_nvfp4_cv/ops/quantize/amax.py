"""Update amaxes in place: those of delayed tensor scales, [roles, 2 faces] fp32, and those that ranks share.

    move          used = 6 E 2^k >= margin * seen, where seen is positive and finite; elsewhere used stays
    collect       collected = max(collected, observed), where observed is finite; saturated += the third observed number
    reduce_amax   the largest amax of the ranks; NaN wins over inf, inf over numbers

The first is one small kernel on CUDA. Nothing is read on the host. They are called outside of graphs that
torch.compile traces, so they need not be custom operators.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from te_nvfp4_cv import formats
from te_nvfp4_cv.backend import dispatch
from te_nvfp4_cv.backend.torch_private import unseen_by_checkpoints
from te_nvfp4_cv.ops.records import Collector

on_received: list[Callable[[int], None]] = []  # called with the bytes that arrive from other ranks; see wire_bytes


@unseen_by_checkpoints
def move(used: Tensor, seen: Tensor, e4m3_max: tuple[int, ...], margin: tuple[int, ...], clear: bool) -> None:
    """Take new amaxes from those seen.

    Args:
        used: fp32 [R, 2], R of 1 or 2 rows in memory order, overwritten.
        seen: of the same shape, set to 0 if `clear`.
        e4m3_max: 448 or 256 for each row.
        margin: a power of two for each row.
    """
    if dispatch.kernels_run(used.device):
        from te_nvfp4_cv.ops.quantize.triton import amax_kernels

        return amax_kernels.move(used, seen, e4m3_max, margin, clear)
    for row, (e, m) in enumerate(zip(e4m3_max, margin, strict=True)):
        usable = (seen[row] > 0) & seen[row].isfinite()
        used[row].copy_(torch.where(usable, formats.power_of_two_amax(seen[row], e, m), used[row]))
    if clear:
        seen.zero_()


@unseen_by_checkpoints
def collect(collector: Collector, observed: Tensor) -> None:
    """Remember what one call of quantize_operand observed, fp32 [3]. On a GPU the call's last kernel does so."""
    collected, saturated, count = collector
    finite = torch.where(observed[:2].isfinite(), observed[:2], 0.0)
    torch.maximum(collected, finite, out=collected)
    if count:
        saturated.add_(observed[2])


def reduce_amax(amax: Tensor, group: Any, more: Tensor | None = None) -> Tensor:
    """Replace amaxes by the largest of all ranks.

    Args:
        amax: fp32, not negative, overwritten and returned; of the same shape on all ranks.
        group: a process group that this process is in, or None for the default group.
        more: int32 [n] that travels in the same message, overwritten by the largest of each number.
    """
    # Numbers that are not negative have the order of their bits, and NaN is above inf there. But amax of a vectorized
    # reduction gives a NaN with its sign bit set, a negative integer that every number would win over.
    bits = amax.view(torch.int32).bitwise_and_(0x7FFFFFFF)
    message = bits if more is None else torch.cat((bits.flatten(), more))
    dist.all_reduce(message, dist.ReduceOp.MAX, group=group)
    if more is not None:
        bits.copy_(message[: bits.numel()].view_as(bits))
        more.copy_(message[bits.numel() :])
    ranks = dist.get_world_size(group)
    for told in on_received:  # as a ring moves them: once around to find the maximum, once to spread it
        told(2 * (ranks - 1) * message.numel() * message.element_size() // ranks)
    return amax
