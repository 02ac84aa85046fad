"""Check and draw the segmentations of COCO's annotations.

    polygons   [[x, y, x, y, ...], ...]; one of less than three points covers nothing and is left out beside others
    RLE        {"size": [H, W], "counts": [run, run, ...] or compressed text}; the runs must cover the image exactly

pycocotools checks little: of runs that end early it returns memory that nothing has written, and for a coordinate that
is not finite it allocates more memory than any machine has.
"""

from __future__ import annotations

from typing import Any

import numpy as np

FARTHEST = 1e6  # pixels; pycocotools draws polygons at five times the size, in 32 bits


def to_rle(segmentation: Any, size: tuple[int, int]) -> dict[str, Any]:
    """Return a segmentation as pycocotools' compressed RLE.

    Args:
        size: Height and width of the image.
    Raises:
        ValueError: If it cannot be drawn in an image of that size; the text says why.
    """
    from pycocotools import mask as coco_mask

    if isinstance(segmentation, list):
        return coco_mask.merge(coco_mask.frPyObjects(_polygons(segmentation), *size))
    if not isinstance(segmentation, dict) or not {"size", "counts"} <= set(segmentation):
        raise ValueError(f"a {type(segmentation).__name__} that is neither polygons nor an RLE")
    counts, found = segmentation["counts"], segmentation["size"]
    if list(found) != list(size):
        raise ValueError(f"a mask of {' x '.join(map(str, found))} for an image of {size[0]} x {size[1]}")
    runs = _runs(counts) if isinstance(counts, (str, bytes)) else counts
    if any(isinstance(run, bool) or not isinstance(run, int) or run < 0 for run in runs):
        raise ValueError("runs of an RLE that are no whole numbers from 0 on")
    if sum(runs) != size[0] * size[1]:
        raise ValueError(f"an RLE of {sum(runs)} pixels for an image of {size[0]} x {size[1]}")
    if isinstance(counts, (str, bytes)):
        return {"size": list(size), "counts": counts}
    rle: dict[str, Any] = coco_mask.frPyObjects({"size": list(size), "counts": counts}, *size)
    return rle


def _polygons(segmentation: list[Any]) -> list[list[float]]:
    """Return the polygons that cover pixels, after checking all of them."""
    drawn = []
    for polygon in segmentation:
        if not isinstance(polygon, list):
            raise ValueError("a list of numbers where a list of polygons is needed: [[x, y, ...]]")
        points = np.asarray(polygon, dtype=np.float64)
        if points.ndim != 1 or len(points) % 2:
            raise ValueError("a polygon that is no list of x, y, x, y, ...")
        if not (np.abs(points) <= FARTHEST).all():  # NaN too
            raise ValueError(f"a polygon with a coordinate beyond {FARTHEST:.0f} or without a value")
        if len(points) >= 6:
            drawn.append(points.tolist())
    if not drawn:
        raise ValueError("no polygon of three or more points")
    return drawn


def _runs(counts: str | bytes) -> list[int]:
    """Decode the runs of a compressed RLE: five bits per character, and from the fourth run on differences."""
    runs: list[int] = []
    value = shift = 0
    for character in counts.encode() if isinstance(counts, str) else counts:
        bits = character - 48
        if not 0 <= bits < 64:
            raise ValueError("a compressed RLE with a character that has no meaning in it")
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        runs.append(value + runs[-2] if len(runs) > 2 else value)
        value = shift = 0
    if shift:
        raise ValueError("a compressed RLE that ends within a run")
    return runs
