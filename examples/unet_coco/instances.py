"""Predict instances with a UNet: N masks, and for each a class or "no object"; training matches them with objects.

    masks    m_n = conv 1x1 (features, x, y)         [B, N, H, W] logits
    classes  c_n = MLP(sum_p s(m_n) f / (sum_p s(m_n) + 1), mean_p s(m_n), max_p s(m_n)) + bias_n     [B, N, classes]
    cost     of channel n for object g = 2 * -p_n(class g) + 5 * BCE(m_n, g) + 5 * Dice(m_n, g)
    loss     5 * BCE + 5 * Dice of the pairs of least total cost, mean over the pairs of the batch
             + 2 * cross-entropy of the classes, where a channel without an object has class 0 and weight 0.1

s is the sigmoid. BCE is the mean over pixels, Dice = 1 - (2 sum s g + 1) / (sum s + sum g + 1). Sums over pairs and
channels are over all ranks. If there are more objects than channels, those with the highest cost stay unmatched. A
batch without objects has only the class loss.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from te_nvfp4_cv.errors import value_error

from .objects import Target
from .ranks import whole_batch
from .unet import UNet

CLASS_WEIGHT, MASK_WEIGHT, DICE_WEIGHT = 2.0, 5.0, 5.0
NOTHING_WEIGHT = 0.1


class InstanceHead(nn.Module):
    """Turn features [B, C, H, W] into logits of masks [B, N, H, W] and of classes [B, N, classes].

    Class 0 means that the channel shows no object.
    """

    def __init__(self, channels: int, instances: int, classes: int) -> None:
        super().__init__()
        self.masks = nn.Conv2d(channels + 2, instances, 1)  # + 2: the position, or equal objects would share a channel
        self.hidden = nn.Linear(channels + 2, 2 * channels)
        self.classes = nn.Linear(2 * channels, classes)
        self.bias = nn.Parameter(torch.zeros(instances, classes))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h, w = x.shape[-2:]
        down = torch.linspace(-1, 1, h, device=x.device, dtype=x.dtype).view(1, 1, h, 1).expand(len(x), 1, h, w)
        right = torch.linspace(-1, 1, w, device=x.device, dtype=x.dtype).view(1, 1, 1, w).expand(len(x), 1, h, w)
        masks = self.masks(torch.cat([x, down, right], dim=1))
        shares = masks.sigmoid().flatten(2)
        sums = shares.float().sum(dim=2, keepdim=True)
        pooled = torch.bmm(shares, x.flatten(2).transpose(1, 2).to(shares.dtype)).float() / (sums + 1)
        seen = torch.cat([pooled, sums / (h * w), shares.float().amax(dim=2, keepdim=True)], dim=2)
        return masks, self.classes(F.relu(self.hidden(seen))) + self.bias


class InstanceUNet(UNet):
    """Run a UNet whose head predicts instance channels; its parts have the same names as the UNet's.

    Args:
        instances: Number of channels, which is the largest number of objects per image.
        num_classes: Number of classes; class 0, background, means no object.
        others: Further arguments of the UNet.
    """

    def __init__(self, instances: int, num_classes: int, *others: Any) -> None:
        super().__init__(num_classes, *others)
        self.head = InstanceHead(self.head.in_channels, instances, num_classes)  # type: ignore[assignment]


def costs(masks: Tensor, classes: Tensor, target: Target) -> tuple[Tensor, Tensor]:
    """Compute the costs [N, G] of an image's channels for its objects.

    Args:
        masks: Logits [N, H, W], fp32.
        classes: Logits [N, classes], fp32.
    Returns:
        What the masks of a matched pair add to the loss, and the cost of the class.
    """
    x, true = masks.flatten(1), target["masks"].flatten(1).to(masks.dtype)
    area = true.sum(dim=1)
    bce = (F.softplus(x).sum(dim=1, keepdim=True) - x @ true.T) / x.shape[1]
    shares = x.sigmoid()
    dice = 1 - (2 * shares @ true.T + 1) / (shares.sum(dim=1, keepdim=True) + area + 1)
    return MASK_WEIGHT * bce + DICE_WEIGHT * dice, -CLASS_WEIGHT * classes.softmax(dim=1)[:, target["labels"]]


def match(cost: Tensor) -> tuple[Tensor, Tensor]:
    """Find the pairs (channels, objects) with the least total cost; each channel and object occurs at most once.

    NaN and infinity count as 1e6.
    """
    try:
        from scipy.optimize import linear_sum_assignment
    except ModuleNotFoundError as error:
        raise value_error(
            "--task instance: scipy is not installed.",
            got=str(error),
            needs="scipy, which matches channels with objects",
            fix="pip install scipy",
        ) from error
    # scipy refuses NaN and infinity; the loss itself stays NaN, so training still stops with an error.
    finite = cost.detach().float().nan_to_num(nan=1e6, posinf=1e6, neginf=-1e6)
    rows, columns = linear_sum_assignment(finite.cpu().numpy())
    return torch.from_numpy(rows).to(cost.device), torch.from_numpy(columns).to(cost.device)


def instance_loss(output: tuple[Tensor, Tensor], targets: list[Target], group: Any = None) -> Tensor:
    """Compute the loss of the batch whose parts are on the ranks of `group`.

    Args:
        output: The output of InstanceUNet, in any float dtype.
        targets: Masks and labels per image, without crowds.
    """
    # Sums over all pixels of an image need fp32.
    with torch.autocast(output[0].device.type, enabled=False):
        masks, classes = output[0].float(), output[1].float()
        wanted = torch.zeros(classes.shape[:2], dtype=torch.int64, device=classes.device)
        paired, pairs = masks.sum() * 0, 0
        for image, target in enumerate(targets):
            if not len(target["labels"]):
                continue
            of_masks, of_classes = costs(masks[image], classes[image], target)
            rows, columns = match(of_masks + of_classes)
            wanted[image, rows] = target["labels"][columns]
            paired, pairs = paired + of_masks[rows, columns].sum(), pairs + len(rows)
        weights = torch.ones(classes.shape[2], device=classes.device)
        weights[0] = NOTHING_WEIGHT
        class_sum = F.cross_entropy(classes.flatten(0, 1), wanted.flatten(), weights, reduction="sum")
        counts = torch.stack([torch.tensor(float(pairs), device=weights.device), weights[wanted].sum()])
        world = 1
        if group is not None:
            dist.all_reduce(counts, group=group)
            world = dist.get_world_size(group)
        loss = paired / counts[0].clamp(min=1) + CLASS_WEIGHT * class_sum / counts[1]
        return whole_batch(loss * world, group)


def found_instances(output: tuple[Tensor, Tensor]) -> list[dict[str, Tensor]]:
    """Return for each image the channels that show an object: masks [n, H, W] bool, labels and scores [n].

    score = p(class) * mean of s(m) over the mask
    """
    masks, classes = output[0].float(), output[1].float()
    scores, labels = classes.softmax(dim=2)[:, :, 1:].max(dim=2)
    drawn = masks > 0
    area = drawn.flatten(2).sum(dim=2)
    sure = (masks.sigmoid() * drawn).flatten(2).sum(dim=2) / area.clamp(min=1)
    return [
        {
            "masks": drawn[i][area[i] > 0],
            "labels": labels[i][area[i] > 0] + 1,
            "scores": (scores * sure)[i][area[i] > 0],
        }
        for i in range(len(masks))
    ]
