"""Build the model and loss of a step from the arguments in a bundle, for `te-nvfp4-cv diagnose`.

    build({"options": {"task": "semantic", "scale": 0.25, ...}, "image_size": [96, 96], "classes": ["background", ...],
           "class_weights": None}) -> (model, loss)
    loss(model, (images, targets)): the task's loss

The model is in channels_last, as in the trainer. Missing and unknown arguments are refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import te_nvfp4_cv as nv
from te_nvfp4_cv.errors import value_error

from .metrics import to_device
from .options import parse_options
from .split import RawSplit, SegmentationData
from .tasks import make_task

ARGUMENTS = {"options", "image_size", "classes", "class_weights"}
Loss = Callable[[nn.Module, tuple[Tensor, Any]], Tensor]


def build(arguments: dict[str, Any]) -> tuple[nn.Module, Loss]:
    """Build the task's model with fresh weights, and its loss.

    Raises:
        ValueError: If the arguments are not ARGUMENTS, or if no model can be made from them.
    """
    if set(arguments) != ARGUMENTS or not isinstance(arguments["options"], dict):
        raise value_error(
            "unet_coco.rebuild: these are not the arguments of a bundle.",
            got=", ".join(sorted(arguments)) or "none",
            needs=", ".join(sorted(ARGUMENTS)),
            fix="write the bundle with spikes.write_bundle",
        )
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in arguments["options"].items()]
    flags += ["--image-size", *map(str, arguments["image_size"])]
    try:
        settings = parse_options(flags)
    except SystemExit as error:
        raise value_error(
            "unet_coco.rebuild: an option of the bundle is unknown here.",
            got=" ".join(flags),
            needs="options of this version of the trainer",
            fix="diagnose with the version that wrote the bundle",
        ) from error
    nothing = RawSplit("none", [], _no_data, _no_data)
    task = make_task(settings, SegmentationData(nothing, nothing, None, list(arguments["classes"])))
    if arguments["class_weights"] is not None:
        task.class_weights = torch.tensor(arguments["class_weights"])
    model = task.model().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if settings.learn_scales != "none":
        nv.learn_scales(model, settings.learn_scales)

    def loss(model: nn.Module, batch: tuple[Tensor, Any]) -> Tensor:
        device = next(model.parameters()).device
        images, targets = to_device(*batch, device)
        return task.loss(model(images, *task.inputs(targets)), targets)

    return model, loss


def _no_data(index: int) -> Any:
    raise IndexError(index)
