"""Build torchvision's RetinaNet on a ResNet, for images of one size.

    pyramid and heads: round(256 * scale) channels;   GroupNorm in the ResNet, the pyramid and the heads
    levels: strides 8 .. 128, as in torchvision, for images of 256 pixels and more; 4 .. 64 for smaller ones
    anchors of a level: 4 * stride * (1, 2^(1/3), 2^(2/3)), each in three aspect ratios

Losses and boxes are computed in fp32 for every dtype of autocast. GroupNorm has no running statistics, so a batch that
is divided among ranks gives the same result as in one process. A body for pretrained weights has the batch norms that
they were trained with, frozen. Recipes may use these names: backbone.body,
backbone.fpn, head.classification_head.cls_logits, head.regression_head.bbox_reg. A scale that leaves no channel is
refused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import resnet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.retinanet import RetinaNet, RetinaNetHead
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from te_nvfp4_cv.errors import value_error

from .unet import group_count

RATIOS = (0.5, 1.0, 2.0)


class Detector(RetinaNet):
    """Run a RetinaNet on images of `size` that are already normalised, so that torchvision's resizing changes nothing.

    In training the model takes images and targets (boxes and labels per image) and returns the two losses. In
    evaluation it takes images and returns boxes, labels and scores per image.

    Args:
        num_classes: Number of classes, including background, which has number 0.
        backbone: "resnet18" and so on.
        scale: Factor on the 256 channels of pyramid and heads.
        pretrained: Whether the body is to take pretrained weights (pretrained.py).
    """

    def __init__(
        self,
        num_classes: int,
        size: tuple[int, int],
        backbone: str = "resnet18",
        scale: float = 1.0,
        pretrained: bool = False,
    ) -> None:
        channels = round(256 * scale)
        if channels < 1:
            raise value_error(
                "Detector: nothing to train.",
                got=f"scale={scale}",
                needs="at least one channel in the feature pyramid",
                fix="--scale 0.25 gives 64",
            )
        body = getattr(resnet, backbone)(weights=None, norm_layer=FrozenBatchNorm2d if pretrained else _norm)
        # On a small image, the coarse levels of the usual pyramid would have only one or two pixels.
        large = min(size) >= 256
        stages = (2, 3, 4) if large else (1, 2, 3, 4)
        widths = [body.inplanes // 2 ** (4 - stage) for stage in stages]
        pyramid = BackboneWithFPN(
            body,
            {f"layer{stage}": str(place) for place, stage in enumerate(stages)},
            widths,
            channels,
            extra_blocks=LastLevelP6P7(channels, channels) if large else LastLevelMaxPool(),
            norm_layer=_norm,
        )
        strides = [8, 16, 32, 64, 128] if large else [4, 8, 16, 32, 64]
        sizes = tuple(tuple(round(4 * stride * 2 ** (third / 3)) for third in range(3)) for stride in strides)
        anchors = AnchorGenerator(sizes, (RATIOS,) * len(sizes))
        super().__init__(
            pyramid,
            num_classes,
            min_size=min(size),
            max_size=max(size),
            # images arrive normalised
            image_mean=[0.0] * 3,
            image_std=[1.0] * 3,
            anchor_generator=anchors,
            head=RetinaNetHead(channels, anchors.num_anchors_per_location()[0], num_classes, norm_layer=_norm),
        )

    def compute_loss(self, targets: Any, head_outputs: dict[str, Tensor], anchors: Any) -> dict[str, Tensor]:
        full = {key: value.float() for key, value in head_outputs.items()}
        with torch.autocast(full["cls_logits"].device.type, enabled=False):
            return super().compute_loss(targets, full, anchors)

    def postprocess_detections(self, head_outputs: dict[str, list[Tensor]], *others: Any) -> list[dict[str, Tensor]]:
        full = {key: [level.float() for level in levels] for key, levels in head_outputs.items()}
        with torch.autocast(full["cls_logits"][0].device.type, enabled=False):
            return super().postprocess_detections(full, *others)


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(group_count(channels), channels)
