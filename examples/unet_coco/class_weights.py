"""Give each class a weight that grows with its rarity in the training labels (--class-weights).

    median  w_c = median over the classes of f / f_c;   f_c = pixels of c / labelled pixels of the images that contain c

This is median-frequency balancing (arXiv 1411.4734). Labels are counted as they are stored; ignored pixels do not
count. A class that occurs in no training label gets weight 0 and is left out of the median. A split without any
labelled pixel is refused.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from te_nvfp4_cv.errors import value_error

from .split import RawSplit


def median_frequency(split: RawSplit, num_classes: int) -> Tensor:
    """Compute the weights [num_classes] fp32 of the classes 0 .. num_classes - 1.

    Raises:
        ValueError: If no pixel of the split is labelled, or if an image or a label cannot be read.
    """
    pixels = split.label_pixels[:, :num_classes].astype(np.float64)  # [images, classes]
    labelled = pixels.sum(axis=1)
    if not labelled.any():
        raise value_error(
            "--class-weights median has nothing to count.",
            got=f"{len(split)} images of the split {split.name!r} without one labelled pixel",
            needs="at least one pixel whose label is not ignored",
            fix="check the labels, or --class-weights none",
        )
    seen = pixels.sum(axis=0) > 0
    frequency = pixels.sum(axis=0)[seen] / ((pixels > 0) * labelled[:, None]).sum(axis=0)[seen]
    weights = torch.zeros(num_classes)
    weights[torch.from_numpy(seen)] = torch.from_numpy(np.median(frequency) / frequency).float()
    return weights
