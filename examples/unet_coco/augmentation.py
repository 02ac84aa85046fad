"""Change training images at random, with their masks and boxes (--augment), by torchvision.transforms.v2.

    flip      left and right, in half of the images
    scale     in half of the images: smaller by up to 2, on a canvas of ImageNet's mean colour that nothing is learnt of
    crop      a part of 50 to 100 % of the image, with sides of 3:4 to 4:3, at the size of the model's images
    colour    brightness, contrast and saturation by up to 30 %, hue by up to 5 %

Every random number comes from torch's generator, which the data sets seed by (seed, epoch, index).
"""

from __future__ import annotations

from typing import Any

from torchvision import tv_tensors
from torchvision.transforms import v2

AUGMENTATIONS = ("flip", "scale", "crop", "colour")
CANVAS, LARGEST = (124, 116, 104), 2.0
PART, RATIO = (0.5, 1.0), (3 / 4, 4 / 3)


def geometry(names: tuple[str, ...], size: tuple[int, int], outside: int) -> list[Any]:
    """Return the transforms that bring an image to `size`, in training with what `names` wants of them.

    Args:
        outside: What a mask holds where `scale` has put canvas around the image.
    """
    shape = list(size)
    fill = {tv_tensors.Image: CANVAS, tv_tensors.Mask: outside}
    smaller = [v2.RandomZoomOut(fill, (1.0, LARGEST))] if "scale" in names else []  # type: ignore[arg-type]
    first = v2.RandomResizedCrop(shape, PART, RATIO, antialias=True) if "crop" in names else v2.Resize(shape)
    return [*smaller, first, *([v2.RandomHorizontalFlip(0.5)] if "flip" in names else [])]


def colour(names: tuple[str, ...]) -> list[Any]:
    """Return the transforms that change colours, of uint8 images."""
    return [v2.ColorJitter(0.3, 0.3, 0.3, 0.05)] if "colour" in names else []
