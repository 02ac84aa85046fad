"""Train instance segmentation: a mask and a class for every object, with a UNet with instance channels (instances.py).

    score: COCO's mask AP at the size of the model's images, to which the true masks are resized

If an image has more objects than --instances, the others cannot be found; a message then gives the largest number.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .instances import InstanceUNet, found_instances, instance_loss
from .object_task import ObjectTask
from .objects import ObjectDataset, Target, to_learn
from .split import RawSplit
from .task import Context
from .tracking import tell_once


class Instance(ObjectTask):
    """Implement --task instance."""

    titles = {"ap": "mask AP", "ap50": "mask AP50"}
    kind = "segm"

    def architecture(self) -> dict[str, Any]:
        s = self.settings
        unet = {"scale": s.scale, "activation": s.activation, "dropout": s.dropout}
        return {"task": "instance", "instances": s.instances, **unet, "classes": list(self.class_names)}

    def model(self) -> InstanceUNet:
        s = self.settings
        return InstanceUNet(s.instances, len(self.class_names), s.scale, s.activation, s.dropout)

    def dataset(self, raw: RawSplit, train: bool) -> ObjectDataset:
        made = super().dataset(raw, train)
        if made.most > self.settings.instances:
            tell_once(
                f"{raw.name}: up to {made.most} objects in an image, but --instances {self.settings.instances}: "
                "the others stay unmatched"
            )
        return made

    def loss(self, output: tuple[Tensor, Tensor], targets: list[Target], group: Any = None) -> Tensor:
        return instance_loss(output, to_learn(targets), group)

    def score(
        self, model: nn.Module, images: Tensor, targets: list[Target], context: Context
    ) -> tuple[Tensor, list[dict[str, Tensor]]]:
        model.eval()
        with context():
            output = model(images)
        return self.loss(output, targets), found_instances(output)
