"""The model and loss of a step, from the arguments that a bundle keeps: for `te-nvfp4-cv diagnose`.

    build({"num_classes": 2, "scale": 0.25, "activation": "relu", "dropout": 0.1}) -> (UNet, loss)
    loss(model, (images, masks)) = dice_ce(model(images), masks)

The model is in channels_last, as the trainer's. Refuses arguments that are missing or that it does not know.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from te_nvfp4_cv.checks import value_error

from .losses import dice_ce
from .unet import UNet

ARGUMENTS = ("num_classes", "scale", "activation", "dropout")
Loss = Callable[[nn.Module, tuple[Tensor, Tensor]], Tensor]


def build(arguments: dict[str, Any]) -> tuple[UNet, Loss]:
    """The UNet with fresh weights, and its loss.

    Raises:
        ValueError: arguments other than ARGUMENTS.
    """
    if set(arguments) != set(ARGUMENTS):
        raise value_error(
            "unet_coco.rebuild: these are not the arguments of the UNet.",
            got=", ".join(sorted(arguments)) or "none",
            needs=", ".join(ARGUMENTS),
            fix="write the bundle with spikes.write_bundle",
        )
    model = UNet(**arguments).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model, _loss


def _loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    images, masks = batch
    return dice_ce(model(images), masks)
