"""Compute Dice + cross-entropy with an ignore index and optional class weights.

    loss = ce_weight * CE + dice_weight * Dice
    CE   = sum_valid -w[y] log p[y] / sum_valid w[y]
    Dice = sum over the classes c present in y of w[c] (1 - D_c) / sum of w[c] over the same classes
    D_c  = (2 sum p_c [y = c] + 1) / (sum p_c + sum [y = c] + 1);   w = 1 without class_weights

With several ranks the sums cover all parts of the batch, so that the loss and, with averaged gradients, the step are
those of one process with the whole batch. Sums run over valid pixels, in fp32 for every dtype of autocast. A batch
without any valid pixel, or with only pixels of weight 0, gives 0, not NaN. Labels outside the classes are refused by
the data set, which can name the file.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from te_nvfp4_cv.errors import describe, value_error

IGNORE = 255


class _SumOverRanks(torch.autograd.Function):
    """Sum a tensor over the ranks.

    All ranks compute the same function of the sum, so each knows its gradient without communication. The gradient is
    multiplied by the number of ranks, because the gradients of the parameters are averaged later.
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


def dice_ce(
    logits: Tensor,
    target: Tensor,
    ignore_index: int = IGNORE,
    group: Any = None,
    class_weights: Tensor | None = None,
    dice_weight: float = 1.0,
    ce_weight: float = 1.0,
) -> Tensor:
    """Compute the mean cross-entropy plus the soft Dice loss.

    Args:
        logits: [B, classes, H, W], any float dtype.
        target: [B, H, W] int64, class ids and `ignore_index`.
        group: The torch.distributed group whose ranks each hold a part of the batch. If None, this is the whole batch.
        class_weights: [classes] float >= 0, on the logits' device. They weigh each pixel's cross-entropy, by its label,
            and each class's Dice; both are weighted means, as in F.cross_entropy(weight=).
    Raises:
        ValueError: If class_weights has another shape.
    """
    logits = logits.float()
    num_classes = logits.shape[1]
    if class_weights is not None and class_weights.shape != (num_classes,):
        raise value_error(
            "dice_ce: class_weights do not fit the logits.",
            got=describe(class_weights),
            needs=f"one weight for each of the {num_classes} classes: ({num_classes},)",
            fix="class_weights=None weighs all alike",
        )
    valid = target != ignore_index
    index = torch.where(valid, target, 0)
    log_p = F.log_softmax(logits, dim=1)
    log_p_y = log_p.gather(1, index[:, None])[:, 0]
    weight_y = valid if class_weights is None else class_weights[index] * valid
    log_likelihood, weighed = (log_p_y * weight_y).sum(), weight_y.sum()

    # The overlap needs only the probability of the right class, so no one-hot tensor is made.
    p_y = log_p_y.exp() * valid
    images = len(target)  # image by image, because a longer fp32 sum loses small terms
    flat = (index + num_classes * torch.arange(images, device=index.device).view(-1, 1, 1)).flatten()
    none = torch.zeros(images * num_classes, device=logits.device)
    overlap = none.index_add(0, flat, p_y.flatten()).view(images, num_classes).sum(0)
    labelled = none.index_add(0, flat, valid.flatten().float()).view(images, num_classes).sum(0)
    predicted = (log_p.exp() * valid[:, None]).sum(dim=(0, 2, 3))
    if group is not None:
        sums = torch.cat([overlap, labelled, predicted, torch.stack([log_likelihood, weighed.float()])])
        sums = _SumOverRanks.apply(sums, group)
        overlap, labelled, predicted = sums[:-2].view(3, num_classes)
        log_likelihood, weighed = sums[-2:]
    ce = -log_likelihood / _or_one(weighed)
    dice = (2 * overlap + 1) / (predicted + labelled + 1)
    present = (labelled > 0).float()
    if class_weights is not None:
        present = present * class_weights
    return ce_weight * ce + dice_weight * (((1 - dice) * present).sum() / _or_one(present.sum()))


def _or_one(total: Tensor) -> Tensor:
    """Return a sum of weights to divide by, or 1 if there was nothing to sum."""
    return torch.where(total > 0, total, 1)
