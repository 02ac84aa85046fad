"""Compute COCO's average precision of boxes or masks with pycocotools, at the size of the model's images.

    AP = mean over IoU 0.50, 0.55 .. 0.95 and over the classes that occur in the truth;   AP50: at IoU 0.50

Only the best 100 predictions of an image count. A prediction inside a crowd is neither right nor wrong.
"""

from __future__ import annotations

import contextlib
import io
from typing import Any

import numpy as np
from torch import Tensor

from .objects import Target, as_numpy

MOST = 100


class AveragePrecision:
    """Collect truth and predictions of a split's batches, and compute the scores.

    Args:
        kind: "bbox" or "segm".
        classes: Number of classes, background included.
        size: Height and width of the images.
    """

    def __init__(self, kind: str, classes: int, size: tuple[int, int]) -> None:
        self.kind, self.classes, self.size = kind, classes, size
        self.images: list[dict[str, Any]] = []
        self.truth: list[dict[str, Any]] = []
        self.found: list[dict[str, Any]] = []

    def add(self, targets: list[Target], predictions: list[dict[str, Tensor]]) -> None:
        """Add one batch.

        Args:
            targets: The truth of each image, with masks if kind is "segm".
            predictions: For each image labels [n], scores [n], and boxes [n, 4] or masks [n, H, W] bool.
        """
        for target, predicted in zip(targets, predictions, strict=True):
            self.images.append({"id": len(self.images) + 1, "height": self.size[0], "width": self.size[1]})
            true, found = as_numpy(target), as_numpy(predicted)
            for entry, crowd in zip(self._entries(true), true["crowd"].tolist(), strict=True):
                self.truth.append({**entry, "id": len(self.truth) + 1, "iscrowd": int(crowd)})
            for entry, score in zip(self._entries(found), found["scores"].tolist(), strict=True):
                self.found.append({**entry, "id": len(self.found) + 1, "iscrowd": 0, "score": score})

    def _entries(self, objects: dict[str, Any]) -> list[dict[str, Any]]:
        """Return the annotations of the last image in COCO's form."""
        from pycocotools import mask as coco_mask

        entries = [{"image_id": len(self.images), "category_id": label} for label in objects["labels"].tolist()]
        if self.kind == "segm":
            shapes = coco_mask.encode(np.asfortranarray(objects["masks"].transpose(1, 2, 0).astype(np.uint8)))
            for entry, shape, area in zip(entries, shapes, coco_mask.area(shapes).tolist(), strict=True):
                entry.update(segmentation=shape, area=area)
        else:
            for entry, (x0, y0, x1, y1) in zip(entries, objects["boxes"].astype(float).tolist(), strict=True):
                entry.update(bbox=[x0, y0, x1 - x0, y1 - y0], area=(x1 - x0) * (y1 - y0))
        return entries

    def compute(self) -> dict[str, float]:
        """Compute the scores "ap" and "ap50"."""
        from pycocotools.cocoeval import COCOeval

        # pycocotools prints its progress.
        with contextlib.redirect_stdout(io.StringIO()):
            scoring = COCOeval(self._index(self.truth), self._index(self.found), self.kind)
            # Only the scores over objects of all sizes are needed.
            scoring.params.areaRng, scoring.params.areaRngLbl = [[0, 1e10]], ["all"]
            scoring.params.maxDets = [MOST]
            scoring.evaluate()
            scoring.accumulate()
        precision = scoring.eval["precision"]  # [IoU, recall, class, area, most]; -1: a class without truth
        return {"ap": _mean(precision), "ap50": _mean(precision[:1])}

    def _index(self, annotations: list[dict[str, Any]]) -> Any:
        from pycocotools.coco import COCO

        coco = COCO()
        coco.dataset = {
            "images": self.images,
            "annotations": annotations,
            "categories": [{"id": number, "name": str(number)} for number in range(1, self.classes)],
        }
        coco.createIndex()
        return coco


def _mean(precision: np.ndarray) -> float:
    return float(precision[precision > -1].mean())
