"""Small data for the tests of examples/unet_coco, and the options that keep its runs short.

Importing this file puts examples/ on sys.path, and skips the test file that imports it where the extra [train] is not
installed.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
if str(EXAMPLES) not in sys.path:
    sys.path.insert(0, str(EXAMPLES))

for package in ("torchvision", "torchmetrics", "pycocotools", "scipy"):
    pytest.importorskip(package, reason="the example needs the extra [train]")

SMALL = ["--image-size", "32", "32", "--scale", "0.0625", "--batch-size", "4", "--log-every", "2", "--no-wandb"]
SMALL += ["--telemetry-every", "0"]
KEYS = {"train_loss", "val_loss", "dice", "miou", "miou_hp", "step_ms", "saved_bytes", "nvfp4_flops_share"}


def draw_shapes(folder: Path) -> Path:
    """A small set of drawn shapes: 14 training images (one of them empty), 6 for validation."""
    from unet_coco.shapes import ShapesSettings, ensure_shapes

    return ensure_shapes(folder / "shapes", ShapesSettings(train=14, val=6, height=48, width=64))


def write_coco(folder: Path) -> Path:
    """A COCO root by hand, 8x8 pixels: image 1 with overlap and a crowd, image 2 without annotations."""
    root = folder / "coco"
    (root / "annotations").mkdir(parents=True)
    square = [1, 1, 7, 1, 7, 7, 1, 7]  # pixels 1..6
    small = [2, 2, 4, 2, 4, 4, 2, 4]  # pixels 2..3
    crowd = {"size": [8, 8], "counts": [0, 8, 56]}  # the first column
    annotations = [
        {"id": 1, "image_id": 1, "category_id": 7, "iscrowd": 0, "area": 4.0, "segmentation": [small]},
        {"id": 2, "image_id": 1, "category_id": 3, "iscrowd": 0, "area": 36.0, "segmentation": [square]},
        {"id": 3, "image_id": 1, "category_id": 3, "iscrowd": 1, "area": 8.0, "segmentation": crowd},
    ]
    for split in ("train", "val"):
        (root / f"{split}2017").mkdir()
        for number in (1, 2):
            Image.new("RGB", (8, 8), (90, 120, 150)).save(root / f"{split}2017" / f"{number}.jpg")
        instances = {
            "images": [{"id": n, "file_name": f"{n}.jpg", "height": 8, "width": 8} for n in (1, 2)],
            "annotations": annotations,
            "categories": [{"id": 7, "name": "dot"}, {"id": 3, "name": "box"}],
        }
        (root / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(instances))
    return root


def write_masks(folder: Path) -> Path:
    """Folders of images and palette labels, 24x32, ids 0..2 and 255, with a test split and no meta.json."""
    root = folder / "masks"
    rng = np.random.default_rng(0)
    for split, count in (("train", 5), ("val", 3), ("test", 2)):
        for kind in ("images", "labels"):
            (root / split / kind).mkdir(parents=True)
        for number in range(count):
            ids = rng.integers(0, 3, (3, 4)).repeat(8, 0).repeat(8, 1).astype(np.uint8)
            pixels = np.stack([ids * 80, 255 - ids * 60, np.full_like(ids, 99)], 2)
            ids[:2] = 255
            Image.fromarray(pixels).save(root / split / "images" / f"{number}.jpg")
            label = Image.fromarray(ids)
            label.putpalette([v for i in range(256) for v in (i, 7 * i % 256, 255 - i)])
            label.save(root / split / "labels" / f"{number}.png")
    return root


def write_cifar(folder: Path) -> np.ndarray:
    """The binary version with 40 images a file; returns the rows of the first."""
    rng = np.random.default_rng(0)
    first = None
    folder.mkdir(parents=True, exist_ok=True)
    for name in (*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"):
        rows = rng.integers(0, 256, (40, 3073), dtype=np.uint8)
        rows[:, 0] %= 10
        rows.tofile(folder / f"{name}.bin")
        first = rows if first is None else first
    assert first is not None
    return first


def edit(root: Path, split: str, change: Any) -> None:
    """Rewrite an instances file."""
    file = root / "annotations" / f"instances_{split}2017.json"
    instances = json.loads(file.read_text())
    change(instances)
    file.write_text(json.dumps(instances))
