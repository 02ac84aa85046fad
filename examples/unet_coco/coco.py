"""Read COCO instances, as masks of classes and as single objects.

    ROOT/annotations/instances_{train,val[,test]}2017.json + ROOT/{train,val[,test]}2017/*.jpg
    mask = 0 (background); the chosen categories 1, 2, ... in the given order; crowd pixels 255 (ignore)

Pixels are used as stored in the file, which is what COCO's annotations count: an EXIF orientation is not applied. Where
instances overlap, the smaller one lies on top. An image without annotations is all background; crowds of categories
that were not chosen are background too. The reader refuses a root with missing files, entries that do not fit together
(coco_check.py), segmentations that cannot be drawn (segmentation.py), unknown class names and, when objects are needed,
annotations with neither box nor mask.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from te_nvfp4_cv.errors import value_error

from .coco_check import check_entries, check_known, check_on_disk
from .losses import IGNORE
from .segmentation import to_rle
from .split import (
    BACKGROUND,
    Objects,
    RawSplit,
    SegmentationData,
    Thing,
    broken,
    check_classes,
    missing,
    no_pycocotools,
    open_image,
)


def load_coco(root: Path, classes: Sequence[str] | None) -> SegmentationData:
    files = {split: root / "annotations" / f"instances_{split}2017.json" for split in ("train", "val", "test")}
    opened = {
        split: _open_coco(file, root / f"{split}2017")
        for split, file in files.items()
        if split != "test" or file.is_file()
    }
    names = {split: {c["name"]: c["id"] for c in coco.coco.dataset["categories"]} for split, coco in opened.items()}
    wanted = list(classes) if classes else sorted(names["train"], key=names["train"].__getitem__)
    for split, ids in names.items():
        check_classes(wanted, list(ids), f"{files[split].name} has the categories", bool(classes))
        if not classes:
            check_known(files[split], opened[split].coco.dataset, wanted)
    numbers = {name: number for number, name in enumerate(wanted, start=1)}
    splits = {
        split: _coco_split(split, files[split], coco, {names[split][name]: numbers[name] for name in wanted})
        for split, coco in opened.items()
    }
    return SegmentationData(splits["train"], splits["val"], splits.get("test"), [BACKGROUND, *wanted])


def _open_coco(file: Path, folder: Path) -> Any:
    """Open one instances file as torchvision's CocoDetection, after checking it against the folder of its images."""
    from torchvision.datasets import CocoDetection

    if not file.is_file():
        raise missing(file, "the annotations of a COCO root")
    if not folder.is_dir():
        raise missing(folder, f"the folder of the images that {file.name} lists")
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            opened = CocoDetection(str(folder), str(file))
        absent = {"images", "annotations", "categories"} - set(opened.coco.dataset)
    except ModuleNotFoundError as error:
        raise no_pycocotools(error) from error
    except (OSError, ValueError, KeyError, TypeError, AssertionError, AttributeError) as error:
        raise broken(file, f"{type(error).__name__}: {error}") from error
    if absent:
        raise broken(file, f"no {', '.join(sorted(absent))}")
    check_entries(file, opened.coco.dataset)
    check_on_disk(file, opened.coco.dataset, folder)
    return opened


def _rle(file: Path, annotation: dict[str, Any], size: tuple[int, int]) -> dict[str, Any]:
    """Return the segmentation of an annotation as a compressed RLE; `file` is where it comes from."""
    try:
        return to_rle(annotation["segmentation"], size)
    except Exception as error:  # pycocotools raises errors of any class and does not name the annotation
        why = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
        raise value_error(
            f"data: {file}: the segmentation of annotation {annotation.get('id')!r} cannot be read.",
            got=f"{why} (image_id {annotation.get('image_id')!r})",
            needs="polygons of six or more numbers, or an RLE of the image's size",
            fix="correct or remove the annotation",
        ) from error


def _mask(file: Path, annotation: dict[str, Any], size: tuple[int, int]) -> np.ndarray:
    """Draw the mask [H, W] uint8 of an annotation."""
    from pycocotools import mask as coco_mask

    mask: np.ndarray = coco_mask.decode(_rle(file, annotation, size))
    return mask


def _area(file: Path, annotation: dict[str, Any], size: tuple[int, int]) -> float:
    """Return the area of an annotation; where it is missing or no size at all, the number of pixels of the mask."""
    area = annotation.get("area")
    if isinstance(area, (int, float)) and 0 < area < math.inf:
        return area
    from pycocotools import mask as coco_mask

    return float(coco_mask.area(_rle(file, annotation, size)))


def _coco_split(split: str, file: Path, opened: Any, number_of: dict[int, int]) -> RawSplit:
    """Make the split that paints its masks when read; `number_of` maps category ids to class numbers."""
    coco = opened.coco
    entries = [coco.imgs[key] for key in opened.ids]
    paths = [Path(opened.root) / entry["file_name"] for entry in entries]

    def read(index: int) -> tuple[Image.Image, np.ndarray]:
        entry = entries[index]
        mask = np.zeros((entry["height"], entry["width"]), np.uint8)
        found = [a for a in coco.imgToAnns.get(entry["id"], []) if a["category_id"] in number_of]
        drawn = [a for a in found if a.get("segmentation")]
        # large objects are drawn first, so that smaller ones stay visible
        drawn.sort(key=lambda a: (bool(a.get("iscrowd")), -_area(file, a, mask.shape)))
        for annotation in drawn:
            number = IGNORE if annotation.get("iscrowd") else number_of[annotation["category_id"]]
            mask[_mask(file, annotation, mask.shape).astype(bool)] = number
        return open_image(paths[index]), mask

    def objects(index: int) -> Objects:
        entry = entries[index]
        size = entry["height"], entry["width"]
        found = [a for a in coco.imgToAnns.get(entry["id"], []) if a["category_id"] in number_of]
        things = [
            Thing(
                number_of[a["category_id"]],
                _box(file, a, size),
                bool(a.get("iscrowd")),
                # the mask is drawn when it is needed
                partial(_mask, file, a, size) if a.get("segmentation") else None,
            )
            for a in found
        ]
        return Objects(entry["height"], entry["width"], things)

    chosen = [a for a in coco.dataset["annotations"] if a["category_id"] in number_of]
    undrawn = sum(not a.get("segmentation") for a in chosen), len(chosen)
    return RawSplit(split, [str(path) for path in paths], read, objects, undrawn)


def _box(file: Path, annotation: dict[str, Any], size: tuple[int, int]) -> tuple[float, float, float, float]:
    """Return x0, y0, x1, y1 of an annotation, from its bbox or, without one, from its mask."""
    box, segmentation = annotation.get("bbox"), annotation.get("segmentation")
    if not box and segmentation:
        from pycocotools import mask as coco_mask

        # An RLE of another size has a box; the image is refused later, when its size is known, too.
        size = tuple(segmentation.get("size", size)) if isinstance(segmentation, dict) else size
        box = coco_mask.toBbox(_rle(file, annotation, size)).tolist()
    try:
        x, y, w, h = (float(value) for value in box)  # type: ignore[union-attr]
        if not all(map(math.isfinite, (x, y, w, h))):
            raise ValueError("a number that is not finite")
    except (TypeError, ValueError) as error:
        raise value_error(
            f"data: {file}: annotation {annotation['id']} has no box.",
            got=f"bbox {box!r}: {error}",
            needs="x, y, width and height in pixels, or a segmentation",
            fix="correct the annotation, or remove it",
        ) from error
    return x, y, x + w, y + h
