"""Train semantic segmentation: a class for every pixel, with a UNet trained on Dice + cross-entropy.

--class-weights, --dice-weight and --ce-weight weigh the loss, in training and in evaluation.

scores: Dice and mIoU over the split's pixels (metrics.py);   pictures: class colours, ignored pixels hatched
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from te_nvfp4_cv.errors import value_error

from .class_weights import median_frequency
from .data import SegmentationDataset
from .losses import IGNORE, dice_ce
from .metrics import evaluate
from .options import Settings
from .report import hatching, palette
from .split import RawSplit, SegmentationData
from .task import Batches, Context, Task
from .tracking import tell_once
from .unet import UNet


class Semantic(Task):
    """Implement --task semantic."""

    titles = {"dice": "Dice", "miou": "mIoU"}
    main = "miou"
    ignores = True

    def __init__(self, settings: Settings, data: SegmentationData) -> None:
        super().__init__(settings, data)
        for raw in (data.train, data.val, data.test):
            if raw is not None:
                _check_drawn(raw)
        median = settings.class_weights == "median"
        self.class_weights = median_frequency(data.train, len(data.class_names)) if median else None

    def architecture(self) -> dict[str, Any]:
        s = self.settings
        return {"scale": s.scale, "activation": s.activation, "dropout": s.dropout, "classes": list(self.class_names)}

    def model(self) -> UNet:
        s = self.settings
        return UNet(len(self.class_names), s.scale, s.activation, s.dropout)

    def dataset(self, raw: RawSplit, train: bool) -> SegmentationDataset:
        s = self.settings
        return SegmentationDataset(raw, s.image_size, train, s.seed, s.augment)

    def loss(self, output: Tensor, targets: Tensor, group: Any = None) -> Tensor:
        s = self.settings
        if self.class_weights is not None:
            self.class_weights = self.class_weights.to(output.device)
        return dice_ce(
            output,
            targets,
            group=group,
            class_weights=self.class_weights,
            dice_weight=s.dice_weight,
            ce_weight=s.ce_weight,
        )

    def evaluate(self, model: nn.Module, batches: Batches, device: torch.device, context: Context) -> dict[str, float]:
        return asdict(evaluate(model, batches, len(self.class_names), device, context, self.loss))

    def draw_truth(self, images: Tensor, targets: Tensor) -> list[np.ndarray]:
        ids = targets.cpu().numpy()
        return list(np.where((ids == IGNORE)[..., None], hatching(*ids.shape[1:]), palette(len(self.class_names))[ids]))

    def draw_predicted(self, model: nn.Module, images: Tensor, targets: Tensor, context: Context) -> list[np.ndarray]:
        was_training = model.training
        model.eval()
        with torch.no_grad(), context():
            predicted = model(images).argmax(dim=1)
        model.train(was_training)
        return self.draw_truth(images, torch.where(targets == IGNORE, IGNORE, predicted))


def _check_drawn(raw: RawSplit) -> None:
    """Refuse a split without masks, and tell of annotations that have none: their pixels are background.

    Raises:
        ValueError: If no annotation has a mask.
    """
    if raw.undrawn is None:
        return
    without, annotated = raw.undrawn
    if without == annotated:
        raise value_error(
            f"data: {raw.name} has no masks.",
            got=f"{annotated} annotations of the chosen classes, none of which has a segmentation",
            needs="polygons or an RLE for each object; all pixels would be background",
            fix="add the masks, or --task detection, which learns boxes" if annotated else "check --classes",
        )
    if without:
        tell_once(
            f"{raw.name}: {without} of {annotated} annotations have no segmentation: their pixels count as background"
        )
