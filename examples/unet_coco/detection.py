"""Train object detection: a box and a class for every object, with a RetinaNet (detector.py).

    loss = focal loss of the classes + L1 of the boxes, as in torchvision, mean over images;   score: COCO's box AP

Images without objects are used for training too, without any box. For this task, nvfp4 means the recipe `detection`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .detector import Detector
from .object_task import ObjectTask
from .objects import Target, to_learn
from .pretrained import load_body
from .ranks import whole_batch
from .task import Context


class Detection(ObjectTask):
    """Implement --task detection."""

    titles = {"ap": "box AP", "ap50": "box AP50"}
    kind = "bbox"

    def architecture(self) -> dict[str, Any]:
        s = self.settings
        of = {"task": "detection", "backbone": s.backbone, "scale": s.scale, "classes": list(self.class_names)}
        return of | ({"norms": "frozen"} if s.backbone_weights else {})

    def model(self) -> Detector:
        s = self.settings
        return Detector(len(self.class_names), s.image_size, s.backbone, s.scale, bool(s.backbone_weights))

    def load_pretrained(self, model: nn.Module) -> None:
        s = self.settings
        if s.backbone_weights:
            load_body(model.get_submodule("backbone.body"), s.backbone, s.backbone_weights)

    def inputs(self, targets: list[Target]) -> tuple[list[Target]]:
        return (to_learn(targets),)

    def loss(self, output: dict[str, Tensor], targets: Any, group: Any = None) -> Tensor:
        return whole_batch(output["classification"] + output["bbox_regression"], group)

    def score(
        self, model: nn.Module, images: Tensor, targets: list[Target], context: Context
    ) -> tuple[Tensor, list[dict[str, Tensor]]]:
        # A RetinaNet returns losses in training mode only. It has no dropout and no statistics: nothing else changes.
        model.train()
        with context():
            loss = self.loss(model(images, *self.inputs(targets)), targets)
        model.eval()
        with context():
            return loss, model(images)
