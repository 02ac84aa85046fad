"""Draw a COCO-format data set of shapes, for a run without any download.

    ROOT/annotations/instances_{train,val}2017.json, ROOT/{train,val}2017/*.jpg, and ROOT/shapes.json with the settings
    of the drawing

Every case that a COCO reader must handle occurs: a polygon per free-standing shape, two polygons for a shape cut in
two, RLE for a shape partly hidden behind another, uncompressed RLE with iscrowd=1 for a swarm of small circles, and
images without any annotation. The annotations cover what is visible. Equal settings give equal files, and a folder with
the same settings is used again. A folder with other content is refused, and so is drawing without pycocotools.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

from te_nvfp4_cv.errors import runtime_error, value_error

from .split import no_pycocotools

CATEGORIES = {1: "circle", 3: "rectangle", 4: "triangle", 9: "cross"}
COLOURS = {1: (215, 70, 60), 3: (70, 150, 90), 4: (70, 100, 205), 9: (70, 190, 200)}
MARKER = "shapes.json"
EMPTY_EVERY = 12
CROWD_EVERY = 6
CUT_EVERY = 6
CUT = -3  # a rectangle in two parts


@dataclass(frozen=True)
class ShapesSettings:
    """Hold the settings of the drawing. They are written to shapes.json and compared before a folder is used again."""

    train: int = 96
    val: int = 32
    height: int = 96
    width: int = 96
    seed: int = 0
    version: int = 1


def ensure_shapes(root: Path, settings: ShapesSettings | None = None) -> Path:
    """Draw the set into `root`, unless it is already there, and return `root`.

    An interruption leaves no half-drawn set.
    """
    settings = settings or ShapesSettings()
    marker = root / MARKER
    if _drawn(marker, settings):
        return root
    try:
        import pycocotools.mask  # noqa: F401
    except ModuleNotFoundError as error:
        raise no_pycocotools(error) from error
    if root.exists() and any(root.iterdir()) and not marker.is_file():
        raise value_error(
            f"shapes: {root} is in use.",
            got="a folder that this generator did not write",
            needs="an empty or new folder",
            fix="choose another --out, or name the data with --data",
        )
    # Draw into a folder beside it and rename that at the end, so that no half-drawn set is ever used.
    draft = root.with_name(f"{root.name}.draft{os.getpid()}")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        for offset, split in enumerate(("train", "val")):
            _draw_split(
                draft, split, getattr(settings, split), settings, np.random.default_rng([settings.seed, offset])
            )
        (draft / MARKER).write_text(json.dumps(asdict(settings)))
        if _drawn(marker, settings):  # another run has drawn it in the meantime
            shutil.rmtree(draft)
            return root
        if root.exists():
            shutil.rmtree(root)
        draft.rename(root)
    except OSError as error:
        shutil.rmtree(draft, ignore_errors=True)
        raise runtime_error(
            f"shapes: the set could not be written to {root}.",
            got=str(error),
            needs="a writable folder with a few megabytes free",
            fix="choose another --out, or name the data with --data",
        ) from error
    return root


def _drawn(marker: Path, settings: ShapesSettings) -> bool:
    return marker.is_file() and json.loads(marker.read_text()) == asdict(settings)


def _draw_split(root: Path, split: str, count: int, settings: ShapesSettings, rng: np.random.Generator) -> None:
    """Draw one split and write its images and its instances file."""
    folder = root / f"{split}2017"
    folder.mkdir()
    (root / "annotations").mkdir(exist_ok=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id in range(1, count + 1):
        name = f"{image_id:012d}.jpg"
        pixels, found = _draw_image(image_id, settings, rng)
        Image.fromarray(pixels).save(folder / name, quality=92)
        images.append({"id": image_id, "file_name": name, "height": settings.height, "width": settings.width})
        for annotation in found:
            annotations.append({"id": len(annotations) + 1, "image_id": image_id, **annotation})
    instances = {
        "info": {"description": "drawn shapes", "version": str(settings.version)},
        "images": images,
        "annotations": annotations,
        "categories": [{"id": key, "name": name, "supercategory": "shape"} for key, name in CATEGORIES.items()],
    }
    (root / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(instances))


def _draw_image(
    image_id: int, settings: ShapesSettings, rng: np.random.Generator
) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Draw one image [H, W, 3] uint8 and return it with its annotations, which have no ids yet."""
    h, w = settings.height, settings.width
    pixels = _background(h, w, rng)
    drawn: list[dict[str, Any]] = []
    if image_id % EMPTY_EVERY != 0:
        categories = rng.choice(list(CATEGORIES), int(rng.integers(2, 5))).tolist()
        if image_id % CUT_EVERY == 2:
            categories.append(CUT)  # last, so that no other shape hides a part of it
        for category in categories:
            polygons = _polygons(category, h, w, rng)
            drawn.append(_shape(3 if category == CUT else category, False, polygons, h, w))
        if image_id % CROWD_EVERY == 1:
            polygons = _swarm(h, w, rng)
            drawn.append(_shape(1, True, polygons, h, w))
    annotations = []
    hidden = np.zeros((h, w), bool)
    for shape in reversed(drawn):  # the last drawn lies on top
        shape["visible"] = shape["mask"] & ~hidden
        hidden |= shape["mask"]
    for shape in drawn:
        colour = np.array(COLOURS[shape["category"]]) + rng.normal(0, 16, 3)
        grain = rng.normal(0, 9, (h, w, 1))
        pixels = np.where(shape["mask"][..., None], colour + grain, pixels)
        # A few visible pixels cannot be learned, so such shapes get no annotation.
        if shape["visible"].sum() >= 12:
            annotations.append(_annotation(shape))
    image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(0.6))
    return np.asarray(image), annotations


def _shape(category: int, crowd: bool, polygons: list[np.ndarray], h: int, w: int) -> dict[str, Any]:
    return {"category": category, "crowd": crowd, "polygons": polygons, "mask": _rasterize(polygons, h, w)}


def _background(h: int, w: int, rng: np.random.Generator) -> np.ndarray:
    """Draw a background: a coarse cloud of greys, with grain."""
    coarse = np.repeat(rng.integers(50, 190, (5, 5, 1)), 3, axis=2).astype(np.uint8)
    cloud = Image.fromarray(coarse).resize((w, h), Image.Resampling.BICUBIC)
    return np.asarray(cloud).astype(np.float64) + rng.normal(0, 10, (h, w, 3))


def _polygons(category: int, h: int, w: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Return the outlines [points, 2] (x, y) of one shape, turned and placed at random.

    The centre of the shape is inside the image.
    """
    radius = rng.uniform(0.12, 0.3) * min(h, w)
    centre = np.array([rng.uniform(0.1, 0.9) * w, rng.uniform(0.1, 0.9) * h])
    turn = rng.uniform(0, 2 * np.pi)
    rotation = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    if category == 1:
        outlines = [_circle(1.0)]
    elif abs(category) == 3:
        a, b = 1.0, rng.uniform(0.45, 0.9)
        outlines = [np.array([[-a, -b], [a, -b], [a, b], [-a, b]])]
        if category == CUT:
            outlines = [np.array([[s * 0.12, -b], [s * a, -b], [s * a, b], [s * 0.12, b]]) for s in (-1, 1)]
    elif category == 4:
        angles = np.pi / 2 + np.arange(3) * 2 * np.pi / 3
        outlines = [1.15 * np.stack([np.cos(angles), np.sin(angles)], 1)]
    else:
        t = 0.34
        outlines = [
            np.array(
                [
                    [-t, -1],
                    [t, -1],
                    [t, -t],
                    [1, -t],
                    [1, t],
                    [t, t],
                    [t, 1],
                    [-t, 1],
                    [-t, t],
                    [-1, t],
                    [-1, -t],
                    [-t, -t],
                ]
            )
        ]
    limit = np.array([w - 1, h - 1])
    return [np.clip(outline @ rotation * radius + centre, 0, limit).round(2) for outline in outlines]


def _swarm(h: int, w: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Return the outlines of a crowd: eight small circles side by side."""
    start = np.array([rng.uniform(0.1, 0.4) * w, rng.uniform(0.1, 0.9) * h])
    step = np.array([0.065 * w, 0.0])
    limit = np.array([w - 1, h - 1])
    return [
        np.clip(_circle(0.035 * min(h, w)) + start + i * step + rng.normal(0, 1, 2), 0, limit).round(2)
        for i in range(8)
    ]


def _circle(radius: float) -> np.ndarray:
    angles = np.arange(24) * 2 * np.pi / 24
    return radius * np.stack([np.cos(angles), np.sin(angles)], 1)


def _rasterize(polygons: list[np.ndarray], h: int, w: int) -> np.ndarray:
    """Draw polygons with pycocotools, so that image and annotation agree to the pixel."""
    from pycocotools import mask as coco_mask

    encoded = coco_mask.frPyObjects([polygon.flatten().tolist() for polygon in polygons], h, w)
    return coco_mask.decode(coco_mask.merge(encoded)).astype(bool)


def _annotation(shape: dict[str, Any]) -> dict[str, Any]:
    """Annotate a shape.

    A shape that is fully visible gets polygons, others an RLE of the visible part, a crowd an uncompressed RLE.
    """
    from pycocotools import mask as coco_mask

    visible = shape["visible"]
    encoded = coco_mask.encode(np.asfortranarray(visible.astype(np.uint8)))
    if shape["crowd"]:
        segmentation: Any = {"size": list(visible.shape), "counts": _run_lengths(visible)}
    elif (visible == shape["mask"]).all():
        segmentation = [polygon.flatten().tolist() for polygon in shape["polygons"]]
    else:
        segmentation = {"size": list(visible.shape), "counts": encoded["counts"].decode("ascii")}
    return {
        "category_id": shape["category"],
        "iscrowd": int(shape["crowd"]),
        "area": float(visible.sum()),
        "bbox": [float(v) for v in coco_mask.toBbox(encoded)],
        "segmentation": segmentation,
    }


def _run_lengths(mask: np.ndarray) -> list[int]:
    """Return COCO's uncompressed run lengths, which go down the columns and start with zeros."""
    flat = np.concatenate([[False], mask.flatten(order="F")])
    edges = np.flatnonzero(flat[1:] != flat[:-1])
    return np.diff(np.concatenate([[0], edges, [mask.size]])).tolist()
