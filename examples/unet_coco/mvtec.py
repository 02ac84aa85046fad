"""Read folders in the layout of MVTec AD: parts without and with defects, and a mask for each defect.

    ROOT/[CATEGORY/]train/good/*.png
    ROOT/[CATEGORY/]test/{good, DEFECT, ...}/*.png
    ROOT/[CATEGORY/]ground_truth/DEFECT/*_mask.png: the stem of the image and "_mask"; above 0 is the defect

ROOT is the folder of one category, or contains several, which are then learned together. Such data sets are meant for
training on good parts alone. Learning masks needs defects, so the test images are split in two. Among the images of
each folder below test/, sorted by name, image i is for validation if floor((i + 1) * share) > floor(i * share), else
for training. With a share of 0.5 it is every second image. Training uses train/good too; there is no test split.

The classes are background and defect. --classes names types of defects instead (the names of the folders, of all
categories together): types that are not named become background, or defect if "defect" is among the names. A defect
without its mask, a split without a defect, and files that EXIF says to turn are refused.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from .split import BACKGROUND, RawSplit, SegmentationData, check_classes, check_upright, files_in, missing, open_image

GOOD, DEFECT = "good", "defect"
Entry = tuple[Path, Path | None, str]  # image, mask, type of defect


def load_mvtec(root: Path, classes: Sequence[str] | None, val_share: float) -> SegmentationData:
    train: list[Entry] = []
    val: list[Entry] = []
    for category in _categories(root):
        train += [(image, None, GOOD) for image in _images(category / "train" / GOOD)]
        for folder in _folders(category / "test"):
            for i, image in enumerate(_images(folder)):
                part = val if math.floor((i + 1) * val_share) > math.floor(i * val_share) else train
                part.append((image, _mask_of(category, image), folder.name))
    check_upright(file for image, mask, _ in train + val for file in (image, mask) if file is not None)
    types = sorted({kind for _, _, kind in train + val} - {GOOD})
    wanted = list(classes) if classes else [DEFECT]
    check_classes(wanted, list(dict.fromkeys([DEFECT, *types])), f"{root} has the types of defects")
    # Types that are not named count as "defect" if that is a class, else as background.
    rest = wanted.index(DEFECT) + 1 if DEFECT in wanted else 0
    number_of = {kind: wanted.index(kind) + 1 if kind in wanted else rest for kind in types}
    for name, part in (("train", train), ("val", val)):
        if not any(number_of.get(kind) for _, _, kind in part):
            raise missing(root, f"images with a defect of {', '.join(wanted)} for {name} (--layout mvtec, --val-share)")
    return SegmentationData(
        _split("train", train, number_of), _split("val", val, number_of), None, [BACKGROUND, *wanted]
    )


def _categories(root: Path) -> list[Path]:
    """Find the folders that contain train/good: ROOT itself, or folders in it."""
    if (root / "train" / GOOD).is_dir():
        return [root]
    found = [folder for folder in _folders(root) if (folder / "train" / GOOD).is_dir()]
    if not found:
        raise missing(root / "train" / GOOD, "the good parts, in ROOT or in each of its folders (--layout mvtec)")
    return found


def _folders(parent: Path) -> list[Path]:
    if not parent.is_dir():
        raise missing(parent, "a folder of the layout mvtec")
    return sorted(folder for folder in parent.iterdir() if folder.is_dir() and not folder.name.startswith("."))


def _images(folder: Path) -> list[Path]:
    found = files_in(folder)
    if not found:
        raise missing(folder / "*.png", "at least one image")
    return found


def _mask_of(category: Path, image: Path) -> Path | None:
    """Return the mask of an image below test/, or None for a good part."""
    kind = image.parent.name
    if kind == GOOD:
        return None
    mask = category / "ground_truth" / kind / f"{image.stem}_mask.png"
    if not mask.is_file():
        raise missing(mask, f"the mask of {image}")
    return mask


def _split(name: str, entries: list[Entry], number_of: dict[str, int]) -> RawSplit:
    def read(index: int) -> tuple[Image.Image, np.ndarray]:
        file, mask, kind = entries[index]
        image = open_image(file)
        if mask is None:
            return image, np.zeros((image.height, image.width), np.uint8)
        defect = np.asarray(open_image(mask, convert=False).convert("L")) > 0
        return image, defect.astype(np.uint8) * np.uint8(number_of[kind])

    return RawSplit(name, [str(file) for file, _, _ in entries], read)
