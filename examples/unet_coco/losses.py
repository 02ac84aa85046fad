"""Dice + cross-entropy with an ignore index.

    CE   = sum_valid -log p[y] / max(1, valid pixels)
    Dice = 1 - mean over the classes c present in y of (2 sum p_c [y = c] + 1) / (sum p_c + sum [y = c] + 1)

On several ranks the sums are those of all parts of the batch, so that the loss and, with averaged gradients, the step
are those of one process with the whole batch. Sums run over valid pixels, in fp32 whatever autocast's dtype is. A batch
without one valid pixel gives 0, not NaN. Labels outside the classes are refused by the data set, which can name the
file.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

IGNORE = 255


class _SumOverRanks(torch.autograd.Function):
    """Sum over the ranks. All go on with the same function of it, so each knows the gradient without asking; it is
    multiplied by their number because their parameters' gradients are averaged.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.world = dist.get_world_size(group)
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad * ctx.world, None


def dice_ce(logits: Tensor, target: Tensor, ignore_index: int = IGNORE, group: Any = None) -> Tensor:
    """Mean cross-entropy plus soft Dice loss.

    Args:
        logits: [B, classes, H, W], any float dtype.
        target: [B, H, W] int64, class ids and `ignore_index`.
        group: torch.distributed group whose ranks each hold a part of the batch; None: this is the whole batch.
    """
    logits = logits.float()
    num_classes = logits.shape[1]
    valid = target != ignore_index
    index = torch.where(valid, target, 0)
    log_p = F.log_softmax(logits, dim=1)
    log_p_y = log_p.gather(1, index[:, None])[:, 0]
    log_likelihood, count = (log_p_y * valid).sum(), valid.sum()

    p_y = log_p_y.exp() * valid
    flat = index.flatten()
    overlap = torch.zeros(num_classes, device=logits.device).index_add(0, flat, p_y.flatten())
    labelled = torch.zeros(num_classes, device=logits.device).index_add(0, flat, valid.flatten().float())
    predicted = (log_p.exp() * valid[:, None]).sum(dim=(0, 2, 3))
    if group is not None:
        sums = torch.cat([overlap, labelled, predicted, torch.stack([log_likelihood, count.float()])])
        sums = _SumOverRanks.apply(sums, group)
        overlap, labelled, predicted = sums[:-2].view(3, num_classes)
        log_likelihood, count = sums[-2:]
    ce = -log_likelihood / count.clamp(min=1)
    dice = (2 * overlap + 1) / (predicted + labelled + 1)
    present = (labelled > 0).float()
    return ce + ((1 - dice) * present).sum() / present.sum().clamp(min=1)
