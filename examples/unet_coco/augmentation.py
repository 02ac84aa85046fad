"""Change training images at random, with their masks and boxes (--augment), by torchvision.transforms.v2.

    flip      left and right, in half of the images
    crop      a part of 50 to 100 % of the image, with sides of 3:4 to 4:3, at the size of the model's images
    colour    brightness, contrast and saturation by up to 30 %, hue by up to 5 %

Every random number comes from torch's generator, which the data sets seed by (seed, epoch, index).
"""

from __future__ import annotations

from typing import Any

from torchvision.transforms import v2

AUGMENTATIONS = ("flip", "crop", "colour")
PART, RATIO = (0.5, 1.0), (3 / 4, 4 / 3)


def geometry(names: tuple[str, ...], size: tuple[int, int]) -> list[Any]:
    """Return the transforms that bring an image to `size`, in training with what `names` wants of them."""
    shape = list(size)
    first = v2.RandomResizedCrop(shape, PART, RATIO, antialias=True) if "crop" in names else v2.Resize(shape)
    return [first, *([v2.RandomHorizontalFlip(0.5)] if "flip" in names else [])]


def colour(names: tuple[str, ...]) -> list[Any]:
    """Return the transforms that change colours, of uint8 images."""
    return [v2.ColorJitter(0.3, 0.3, 0.3, 0.05)] if "colour" in names else []
