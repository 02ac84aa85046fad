"""Read folders of images and label masks.

    ROOT/{train,val[,test]}/{images/*.jpg, labels/*.png}: the same stem, pixel value = class id, 255 = ignore
    ROOT/meta.json: {"classes": [names] or {id: name}}; without it the labels are scanned for ids

With --classes, the named classes become 1, 2, ... and every other class becomes 0. The reader refuses images without
labels and labels without images, labels that contain colours, ids without a class, two classes with the same name,
training labels of one class only, and files that EXIF says to turn.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from te_nvfp4_cv.errors import value_error

from .losses import IGNORE
from .split import (
    BACKGROUND,
    IMAGE_SUFFIXES,
    RawSplit,
    SegmentationData,
    broken,
    check_classes,
    check_upright,
    files_in,
    missing,
    open_image,
    some,
)

ROOMY = "number the classes from 0 to 253, in meta.json and in the labels"


def load_masks(root: Path, classes: Sequence[str] | None) -> SegmentationData:
    found = {
        split: _mask_files(root / split)
        for split in ("train", "val", "test")
        if split != "test" or (root / split).is_dir()
    }
    check_upright(file for pairs in found.values() for pair in pairs for file in pair)
    names = _mask_names(root, [label for pairs in found.values() for _, label in pairs])
    # Maps the ids in a label file to the numbers of the classes.
    table = np.arange(256, dtype=np.uint8)
    if classes:
        check_classes(list(classes), names, f"{root} has the classes")
        table[: len(names)] = 0
        for number, name in enumerate(classes, start=1):
            table[names.index(name)] = number
    table[len(names) : IGNORE] = 254  # marks an id without a class
    _check_told_apart([label for _, label in found["train"]], table)
    splits = {split: _mask_split(split, pairs, table, len(names)) for split, pairs in found.items()}
    return SegmentationData(
        splits["train"], splits["val"], splits.get("test"), [BACKGROUND, *classes] if classes else names
    )


def _mask_files(folder: Path) -> list[tuple[Path, Path]]:
    """Find the pairs of image and label. Every image needs a label, and every label an image."""
    files = {}
    for kind, suffixes in (("images", IMAGE_SUFFIXES), ("labels", {".png"})):
        if not (folder / kind).is_dir():
            raise missing(folder / kind, f"a folder of {kind} (--layout masks)")
        files[kind] = {path.stem: path for path in files_in(folder / kind, suffixes)}
    for kind, other in (("images", "labels"), ("labels", "images")):
        alone = sorted(set(files[kind]) - set(files[other]))
        if alone:
            raise value_error(
                f"data: {folder} has {kind} without {other}.",
                got=f"{len(alone)}: {some(files[kind][stem].name for stem in alone)}",
                needs="a label for every image and an image for every label, with the same stem",
                fix="add the missing files, or remove these files",
            )
    if not files["images"]:
        raise missing(folder / "images" / "*.jpg", "at least one image")
    return [(files["images"][stem], files["labels"][stem]) for stem in files["images"]]


def _mask_names(root: Path, labels: list[Path]) -> list[str]:
    """Return the class names from meta.json, or class_0 .. class_n for the ids that occur in the labels."""
    meta = root / "meta.json"
    if meta.is_file():
        try:
            named = json.loads(meta.read_text())["classes"]
            pairs = named.items() if isinstance(named, dict) else enumerate(named)
            by_id = {int(key): str(name) for key, name in pairs}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise broken(
                meta, f"{type(error).__name__}: {error}; `classes` must be a list of names, or a table id -> name"
            ) from error
    else:
        seen: set[int] = set()
        for label in labels:
            seen.update(np.unique(_read_ids(label)).tolist())
        by_id = {key: f"class_{key}" for key in seen - {IGNORE}}
    by_id.pop(IGNORE, None)
    if any(not 0 <= key < IGNORE for key in by_id):
        raise broken(meta, f"class ids that no pixel can have: {some(k for k in by_id if not 0 <= k < IGNORE)}", ROOMY)
    names = [by_id.get(key, f"class_{key}") for key in range(max(by_id, default=-1) + 1)]
    if len(set(names)) < len(names):
        raise broken(meta, f"two classes of one name: {some(sorted({n for n in names if names.count(n) > 1}))}")
    if not 2 <= len(names) <= 254:
        raise value_error(
            f"data: {root} has no classes to tell apart.",
            got=f"{len(names)} class(es)",
            needs=f"2 to 254 class ids from 0 on; {IGNORE} is not a class, its pixels are ignored",
            fix="check labels/*.png: masks of 0 and 255 must become 0 and 1",
        )
    return names


def _check_told_apart(labels: list[Path], table: np.ndarray) -> None:
    """Refuse training labels that all hold one and the same class; the first two classes that are found end the look.

    Masks of 0 and 255 beside a meta.json are such labels: 255 is not a class, its pixels are ignored.
    """
    classes: set[int] = set()
    ids: set[int] = set()
    for label in labels:
        found = np.unique(_read_ids(label))
        ids.update(found.tolist())
        classes.update(set(table[found].tolist()) - {IGNORE})
        if len(classes) > 1:
            return
    raise value_error(
        f"data: the training labels in {labels[0].parent} hold no two classes.",
        got=f"{len(labels)} labels with the ids {some(sorted(ids))}",
        needs=f"pixels of at least two classes; {IGNORE} is not a class, its pixels are ignored",
        fix="check the labels and --classes: masks of 0 and 255 must become 0 and 1",
    )


def _mask_split(split: str, pairs: list[tuple[Path, Path]], table: np.ndarray, known: int) -> RawSplit:
    def read(index: int) -> tuple[Image.Image, np.ndarray]:
        image, label = pairs[index]
        ids = _read_ids(label)
        mask = table[ids]
        if (mask == 254).any():
            raise value_error(
                f"data: {label} contains an id without a class.",
                got=f"id {int(ids[mask == 254][0])}",
                needs=f"0 to {known - 1}, or {IGNORE} for ignore",
                fix="correct the label, or add the class to meta.json",
            )
        return open_image(image), mask

    return RawSplit(split, [str(image) for image, _ in pairs], read)


def _read_ids(label: Path) -> np.ndarray:
    """Read the pixel values of a label file without conversion; palette and grey images store ids directly."""
    ids = np.asarray(open_image(label, convert=False))
    if ids.ndim != 2 or ids.min() < 0 or ids.max() > 255:
        raise value_error(
            f"data: {label} is not an image of class ids.",
            got=f"array {ids.shape} {ids.dtype}",
            needs="one channel (palette or grey) with ids 0 to 255",
            fix="save ids, not colours",
        )
    return ids.astype(np.uint8)
