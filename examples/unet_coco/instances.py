"""Instance channels: a UNet that gives N masks and a class, or none, for each of them; matched to objects in training.

    masks    m_n = conv 1x1 (features, x, y)         [B, N, H, W] logits
    classes  c_n = MLP(sum_p s(m_n) f / (sum_p s(m_n) + 1), mean_p s(m_n), max_p s(m_n)) + bias_n     [B, N, classes]
    cost     of channel n for object g = 2 * -p_n(class g) + 5 * BCE(m_n, g) + 5 * Dice(m_n, g)
    loss     5 * BCE + 5 * Dice of the pairs of least total cost, mean over the pairs of the batch
             + 2 * cross-entropy of the classes, where a channel without object has class 0 and weight 0.1

BCE is the mean over pixels, Dice = 1 - (2 sum s g + 1) / (sum s + sum g + 1). Sums over pairs and channels are over all
ranks. More objects than channels: those that cost most go unmatched. A batch without objects has the class loss alone.
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
    """Features [B, C, H, W] -> logits of masks [B, N, H, W] and of classes [B, N, classes]; class 0 is no object."""

    def __init__(self, channels: int, instances: int, classes: int) -> None:
        super().__init__()
        self.masks = nn.Conv2d(channels + 2, instances, 1)  # with the place, or equal objects would share a channel
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
    """A UNet whose head gives instance channels; the names of its parts are the UNet's.

    Args:
        instances: channels, the most objects that an image can have.
        others: those of the UNet; background, class 0, stands for no object.
    """

    def __init__(self, instances: int, num_classes: int, *others: Any) -> None:
        super().__init__(num_classes, *others)
        self.head = InstanceHead(self.head.in_channels, instances, num_classes)  # type: ignore[assignment]


def costs(masks: Tensor, classes: Tensor, target: Target) -> tuple[Tensor, Tensor]:
    """Costs of an image's channels for its objects, [N, G]: (what a matched pair adds to the loss, that of the class).

    Args:
        masks: [N, H, W] logits, fp32.
        classes: [N, classes] logits, fp32.
    """
    x, true = masks.flatten(1), target["masks"].flatten(1).to(masks.dtype)
    area = true.sum(dim=1)
    bce = (F.softplus(x).sum(dim=1, keepdim=True) - x @ true.T) / x.shape[1]
    shares = x.sigmoid()
    dice = 1 - (2 * shares @ true.T + 1) / (shares.sum(dim=1, keepdim=True) + area + 1)
    return MASK_WEIGHT * bce + DICE_WEIGHT * dice, -CLASS_WEIGHT * classes.softmax(dim=1)[:, target["labels"]]


def match(cost: Tensor) -> tuple[Tensor, Tensor]:
    """Pairs (channels, objects) of least total cost, each of both at most once; costs that are not finite are high."""
    try:
        from scipy.optimize import linear_sum_assignment
    except ModuleNotFoundError as error:
        raise value_error(
            "--task instance: scipy is not installed.",
            got=str(error),
            needs="scipy, which matches channels with objects",
            fix="pip install scipy",
        ) from error
    finite = cost.detach().float().nan_to_num(nan=1e6, posinf=1e6, neginf=-1e6)
    rows, columns = linear_sum_assignment(finite.cpu().numpy())
    return torch.from_numpy(rows).to(cost.device), torch.from_numpy(columns).to(cost.device)


def instance_loss(output: tuple[Tensor, Tensor], targets: list[Target], group: Any = None) -> Tensor:
    """The loss of the batch whose parts lie on the ranks of `group`.

    Args:
        output: of InstanceUNet, any float dtype.
        targets: masks and labels per image, without crowds.
    """
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
    """Per image the channels that show an object: masks [n, H, W] bool, labels and scores [n].

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
