"""Dice + cross-entropy with an ignore index.

    CE   = sum_valid -log p[y] / max(1, valid pixels)
    Dice = 1 - mean over the classes c present in y of (2 sum p_c [y = c] + 1) / (sum p_c + sum [y = c] + 1)

Sums run over valid pixels, in fp32 whatever autocast's dtype is. A batch without one valid pixel gives 0, not NaN.
Labels outside the classes are refused by the data set, which can name the file.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = 255


def dice_ce(logits: Tensor, target: Tensor, ignore_index: int = IGNORE) -> Tensor:
    """Mean cross-entropy plus soft Dice loss.

    Args:
        logits: [B, classes, H, W], any float dtype.
        target: [B, H, W] int64, class ids and `ignore_index`.
    """
    logits = logits.float()
    num_classes = logits.shape[1]
    valid = target != ignore_index
    index = torch.where(valid, target, 0)
    log_p = F.log_softmax(logits, dim=1)
    log_p_y = log_p.gather(1, index[:, None])[:, 0]
    ce = -(log_p_y * valid).sum() / valid.sum().clamp(min=1)

    p_y = log_p_y.exp() * valid
    flat = index.flatten()
    overlap = torch.zeros(num_classes, device=logits.device).index_add(0, flat, p_y.flatten())
    labelled = torch.zeros(num_classes, device=logits.device).index_add(0, flat, valid.flatten().float())
    predicted = (log_p.exp() * valid[:, None]).sum(dim=(0, 2, 3))
    dice = (2 * overlap + 1) / (predicted + labelled + 1)
    present = (labelled > 0).float()
    return ce + ((1 - dice) * present).sum() / present.sum().clamp(min=1)
