"""Prepare segmentation data of any layout (coco.py, masks.py, mvtec.py) for the model.

    image: RGB -> resize -> augmentation.py (training) -> [0, 1] -> minus mean, over std;   mask: the same, nearest

Everything that can be checked before the first step is checked then: missing folders and files, images that annotations
list but that are missing, unknown class names. A fault that appears only in decoding (a label of another size, an id
out of range) raises an error that names the file.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from te_nvfp4_cv.errors import value_error

from .augmentation import colour, geometry
from .coco import load_coco
from .losses import IGNORE
from .masks import load_masks
from .mvtec import load_mvtec
from .order import mix_seed
from .split import RawSplit, SegmentationData, missing, other_size

LAYOUTS = ("coco", "masks", "mvtec")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def load_data(root: str | Path, layout: str, classes: Sequence[str] | None, val_share: float = 0.5) -> SegmentationData:
    """Open a data set and check that it is complete.

    Args:
        val_share: Share of the images for validation, if the layout has no validation split (mvtec).

    Raises:
        ValueError: If the layout or a class is unknown, or if a folder, file or image is missing; the error names it.
    """
    root = Path(root)
    if layout not in LAYOUTS:
        raise value_error("data: unknown layout.", got=repr(layout), needs=" or ".join(LAYOUTS), fix="--layout coco")
    if not root.is_dir():
        raise missing(root, "the folder of --data")
    if layout == "mvtec":
        return load_mvtec(root, classes, val_share)
    return load_coco(root, classes) if layout == "coco" else load_masks(root, classes)


class SegmentationDataset(Dataset[tuple[Tensor, Tensor]]):
    """Provide a split for the model: resized, flipped in training, normalised.

    The key of an item is its index, or in training (epoch, index). Its random choices depend only on (seed, epoch,
    index), so that all precisions, resumed runs and any number of loader workers see the same pixels.
    """

    def __init__(
        self,
        raw: RawSplit,
        size: tuple[int, int],
        train: bool,
        seed: int = 0,
        augment: tuple[str, ...] = ("flip",),
    ) -> None:
        self.raw, self.size, self.train, self.seed = raw, size, train, seed
        wanted = augment if train else ()
        steps: list[Any] = geometry(wanted, size, IGNORE) + colour(wanted)
        steps += [v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True), v2.Normalize(MEAN, STD)]
        self.transform = v2.Compose(steps)

    def __len__(self) -> int:
        return len(self.raw)

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor, Tensor]:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        image, mask = self.raw.read(index)
        if (image.height, image.width) != mask.shape:
            needs, fix = "one label per pixel", "remove the image from the split, or write its labels again"
            raise other_size(self.raw.names[index], "labels", (image.height, image.width), mask.shape, needs, fix)
        pair = tv_tensors.Image(v2.functional.pil_to_tensor(image)), tv_tensors.Mask(torch.from_numpy(mask))
        # The flip depends on (seed, epoch, index) only, and torch's generator stays where it is.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(mix_seed(self.seed, epoch, index))
            image_t, mask_t = self.transform(*pair)
        return image_t.as_subclass(Tensor), mask_t.as_subclass(Tensor).long()


def denormalize(images: Tensor) -> Tensor:
    """Undo the normalisation of images [B, 3, H, W] and return them as uint8."""
    mean, std = (torch.tensor(v, device=images.device).view(1, 3, 1, 1) for v in (MEAN, STD))
    return ((images * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
