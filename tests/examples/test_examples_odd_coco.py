"""COCO annotations that look right and are not: they are refused with the name of the file, or drawn as they mean."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.examples.unet_coco_data import edit, write_coco  # (puts examples/ on the path)

from unet_coco.data import load_data  # noqa: E402  isort: skip
from unet_coco.segmentation import to_rle  # noqa: E402  isort: skip


def first_mask(root: Path, classes: list[str] | None = None) -> np.ndarray:
    return load_data(root, "coco", classes).train.read(0)[1]


def update(root: Path, number: int = 0, **fields: Any) -> Path:
    edit(root, "train", lambda i: i["annotations"][number].update(fields))
    return root


# ---- segmentations --------------------------------------------------------------------------------------------------

SQUARE, DOT = [1, 1, 7, 1, 7, 7, 1, 7], [2, 2, 4, 2, 4, 4, 2, 4]
BAD = {
    "runs end early": ({"size": [8, 8], "counts": [0, 8, 50]}, "RLE of 58 pixels for an image of 8 x 8"),
    "runs go on": ({"size": [8, 8], "counts": [0, 8, 60]}, "RLE of 68 pixels"),
    "no run": ({"size": [8, 8], "counts": []}, "RLE of 0 pixels"),
    "text ends early": ({"size": [8, 8], "counts": "34"}, "RLE of 7 pixels"),
    "no text": ({"size": [8, 8], "counts": ""}, "RLE of 0 pixels"),
    "half a run": ({"size": [8, 8], "counts": "3P"}, "ends within a run"),
    "another text": ({"size": [8, 8], "counts": "3 4"}, "no meaning"),
    "a run below zero": ({"size": [8, 8], "counts": [10, -2, 56]}, "whole numbers"),
    "another dict": ({"counts": [64]}, "neither polygons nor an RLE"),
    "null": ([[1, 1, None, 1, 7, 7]], "without a value"),
    "NaN": ([[1, 1, float("nan"), 1, 7, 7]], "without a value"),
    "far away": ([[1, 1, 1e12, 1, 7, 7]], "beyond 1000000"),
    "half a point": ([[1, 1, 7, 1, 7, 7, 1]], "no list of x, y"),
    "points": ([[[1, 1], [7, 1], [7, 7]]], "no list of x, y"),
    "not nested": (SQUARE, "list of polygons is needed"),
    "two points": ([[1, 1, 7, 7]], "no polygon of three or more points"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_segmentation_that_cannot_be_drawn_is_refused(tmp_path: Path, case: str) -> None:
    segmentation, why = BAD[case]
    root = update(write_coco(tmp_path), segmentation=segmentation)
    told = rf"instances_train2017.json: the segmentation of annotation 1 cannot be read[\s\S]*{why}"
    with pytest.raises(ValueError, match=told):
        first_mask(root)
    with pytest.raises(ValueError, match=told):
        load_data(root, "coco", None).train.objects(0)  # without a bbox, the box is that of the mask


@pytest.mark.parametrize("thin", [[3, 3, 5, 5], [], [4, 4]])
def test_polygons_that_cover_nothing_are_left_out_wherever_they_stand(tmp_path: Path, thin: list[int]) -> None:
    expected = first_mask(write_coco(tmp_path / "whole"))
    for number, polygons in enumerate(([thin, DOT], [DOT, thin])):
        root = update(write_coco(tmp_path / str(number)), segmentation=polygons)
        assert (first_mask(root) == expected).all()


def test_every_form_of_a_mask_is_the_same_mask() -> None:
    from pycocotools import mask as coco_mask

    rng = np.random.default_rng(0)
    for height, width, share in ((1, 1, 0.5), (7, 5, 0.5), (60, 45, 0.02), (300, 200, 0.5), (200, 300, 0), (50, 9, 1)):
        mask = (rng.random((height, width)) < share).astype(np.uint8)
        packed = coco_mask.encode(np.asfortranarray(mask))
        flat = mask.ravel(order="F")
        edges = np.flatnonzero(np.diff(flat, prepend=0))
        counts = np.diff([0, *edges, flat.size]).tolist()
        for form in (packed["counts"], packed["counts"].decode(), counts):
            rle = to_rle({"size": [height, width], "counts": form}, (height, width))
            assert (coco_mask.decode(rle) == mask).all()
