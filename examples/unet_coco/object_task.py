"""Share what the tasks that find boxes or masks have in common: data, COCO's average precision, pictures.

A layout without objects is refused, and so is a split in which no object covers a pixel of the resized images.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from te_nvfp4_cv.errors import value_error

from .average_precision import AveragePrecision
from .drawing import draw_objects
from .metrics import to_device
from .objects import ObjectDataset, Target, collate_objects
from .options import Settings
from .split import RawSplit, SegmentationData
from .task import Batches, Context, Task


class ObjectTask(Task):
    """Implement the common part of tasks whose truth is a list of objects for each image.

    Attributes:
        kind: What is compared with the truth, "bbox" or "segm".
    """

    kind: str
    main = "ap"
    collate = staticmethod(collate_objects)

    def __init__(self, settings: Settings, data: SegmentationData) -> None:
        super().__init__(settings, data)
        if data.train.objects is None:
            raise value_error(
                f"--layout {settings.layout} has no objects for --task {settings.task}.",
                got="masks of classes, in which objects that touch are one",
                needs="annotations of single objects",
                fix="--layout coco, or --task semantic",
            )

    def dataset(self, raw: RawSplit, train: bool) -> ObjectDataset:
        s = self.settings
        return ObjectDataset(raw, s.image_size, train, s.seed, self.kind == "segm", s.augment)

    @abstractmethod
    def score(
        self, model: nn.Module, images: Tensor, targets: list[Target], context: Context
    ) -> tuple[Tensor, list[dict[str, Tensor]]]:
        """Return the loss of a batch, and for each image labels, scores and boxes or masks.

        The model is left in evaluation mode.
        """

    @torch.no_grad()
    def evaluate(self, model: nn.Module, batches: Batches, device: torch.device, context: Context) -> dict[str, float]:
        precision = AveragePrecision(self.kind, len(self.class_names), self.settings.image_size)
        was_training = model.training
        total, count = torch.zeros((), device=device), 0
        for images, targets in batches:
            images, targets = to_device(images, targets, device)
            loss, predictions = self.score(model, images, targets, context)
            total += loss * len(images)
            count += len(images)
            precision.add(targets, predictions)
        model.train(was_training)
        return {"loss": float(total) / count, **precision.compute()}

    def draw_truth(self, images: Tensor, targets: list[Target]) -> list[np.ndarray]:
        return draw_objects(images, targets, self.class_names)

    @torch.no_grad()
    def draw_predicted(self, model: nn.Module, images: Tensor, targets: Any, context: Context) -> list[np.ndarray]:
        was_training = model.training
        _, predictions = self.score(model, images, targets, context)
        model.train(was_training)
        return draw_objects(images, predictions, self.class_names)
