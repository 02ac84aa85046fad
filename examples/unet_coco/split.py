"""Hold the splits of a data set as they are on disk, and make the errors that all layouts share.

Every error names the file or folder that it is about.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image

from te_nvfp4_cv.errors import value_error, warn_once

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"}
PICTURES = IMAGE_SUFFIXES | {".gif", ".jp2", ".jfif", ".ppm", ".pgm", ".tga", ".heic", ".avif"}
BACKGROUND = "background"  # the name of class 0 wherever the classes are chosen


@dataclass(frozen=True)
class SegmentationData:
    """Hold the splits of one data set, not yet decoded, and the names of the classes in the masks."""

    train: RawSplit
    val: RawSplit
    test: RawSplit | None
    class_names: list[str]


@dataclass(frozen=True)
class RawSplit:
    """Hold one split as it is on disk.

    Args:
        names: The files of the images.
        read: `read(i)` returns an RGB PIL image and a [H, W] uint8 array of class ids.
        objects: `objects(i)` returns the annotated objects of image i. If None, the layout has no objects.
        undrawn: Of how many annotations no mask can be drawn, out of how many; `read` leaves them out. If None, the
            layout has no annotations.
    """

    name: str
    names: list[str] = field(repr=False)
    read: Callable[[int], tuple[Image.Image, np.ndarray]] = field(repr=False)
    objects: Callable[[int], Objects] | None = field(default=None, repr=False)
    undrawn: tuple[int, int] | None = None

    def __len__(self) -> int:
        return len(self.names)

    @cached_property
    def label_pixels(self) -> np.ndarray:
        """Count the pixels of each image with each id, [images, 256] int64. This reads the whole split, once."""
        counts = [np.bincount(self.read(index)[1].ravel(), minlength=256) for index in range(len(self))]
        return np.stack(counts).astype(np.int64)


@dataclass(frozen=True)
class Thing:
    """Hold one annotated object.

    Args:
        label: Class number, from 1.
        box: x0, y0, x1, y1 in pixels, as annotated. It may be empty or reach beyond the image.
        crowd: Whether this is a region of many objects.
        mask: Returns a [H, W] uint8 array of 0 and 1. If None, the annotation has no mask.
    """

    label: int
    box: tuple[float, float, float, float]
    crowd: bool
    mask: Callable[[], np.ndarray] | None


@dataclass(frozen=True)
class Objects:
    """Hold the objects of an image, and the image size according to the annotations."""

    height: int
    width: int
    things: list[Thing]


def check_upright(paths: Iterable[Path]) -> None:
    """Refuse files that EXIF says to turn, because their labels may fit either orientation. Reads only headers.

    Raises:
        ValueError: If a file is to be turned; the error names the first one.
    """
    for path in paths:
        try:
            with Image.open(path) as image:
                in_header = image.format != "PNG" or "exif" in image.info  # else Pillow would read all of a PNG
                orientation = image.getexif().get(0x0112, 1) if in_header else 1
        except Exception:  # Pillow raises errors of any class; a damaged file is refused later, when it is read
            continue
        if orientation in range(2, 9):
            raise value_error(
                f"data: {path} must be turned before it is shown.",
                got=f"EXIF orientation {orientation}",
                needs="pixels stored upright, so that image and labels fit without a doubt",
                fix="write it upright (PIL.ImageOps.exif_transpose), or remove the tag if the labels fit these pixels",
            )


def files_in(folder: Path, suffixes: set[str] = IMAGE_SUFFIXES) -> list[Path]:
    """Return the files of a folder that have one of the suffixes, sorted.

    Raises:
        ValueError: If several have the same stem, by which images and labels find each other, or if there are pictures
            of another kind, which would be left out.
    """
    paths = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    chosen = [path for path in paths if path.suffix.lower() in suffixes]
    others = [path.name for path in paths if path.suffix.lower() in PICTURES - suffixes]
    if others:
        raise value_error(
            f"data: {folder} has pictures of another kind.",
            got=f"{len(others)}: {some(others)}",
            needs=", ".join(sorted(suffixes)),
            fix="convert the files, or move them out of the folder",
        )
    stems = Counter(path.stem for path in chosen)
    if len(stems) < len(chosen):
        raise value_error(
            f"data: {folder} has several files with the same stem.",
            got=some(stem for stem, count in stems.items() if count > 1),
            needs="one image and one label per stem",
            fix="remove or rename the other files",
        )
    return chosen


def open_image(path: Path, convert: bool = True) -> Image.Image:
    """Read the pixels of a file as they are stored, as RGB unless `convert` is False.

    Of 16-bit grey pixels, the upper byte is used.

    Raises:
        ValueError: If the file is not a picture, is damaged, or has floating-point pixels.
    """
    try:
        with Image.open(path) as image:
            image.load()
            found, turned = image.copy(), image.getexif().get(0x0112, 1)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # Pillow's, for damaged files
        raise broken(path, f"{type(error).__name__}: {error}") from error
    if turned in range(2, 9):  # with --layout coco only; the other layouts refuse it (check_upright)
        warn_once(
            "pictures to turn",
            f"{path} says to be turned before it is shown (EXIF orientation {turned}). Its pixels are used as they are "
            "stored, which is what COCO's annotations count. If yours were made on the turned picture, write such "
            "files upright (PIL.ImageOps.exif_transpose).",
        )
    if not convert:
        return found
    if found.mode.startswith("I"):
        grey = np.asarray(found)
        if grey.min() < 0 or grey.max() > 65535:
            raise broken(path, f"mode {found.mode} with values beyond 16 bits")
        if grey.max() < 4096:
            warn_once(
                "dark 16-bit images",
                f"{path} has grey values up to {grey.max()} in {found.mode}. Of 16 bits the upper byte is used, so "
                "this image is almost black. Scale such images to 0 .. 65535, or write them in 8 bits.",
            )
        found = Image.fromarray((grey.astype(np.uint16) >> 8).astype(np.uint8))
    elif found.mode == "F":
        raise broken(path, "floating-point pixels, whose range is unknown")
    return found.convert("RGB")


def check_classes(wanted: list[str], known: list[str], where: str, given: bool = True) -> None:
    """Refuse classes that do not exist.

    Args:
        given: Whether --classes names them; otherwise they come from the training split.
    """
    source = "--classes names" if given else "the training split has a class"
    unknown = [name for name in wanted if name not in known]
    if unknown or len(set(wanted)) != len(wanted):
        raise value_error(
            f"data: {source} {'what is not there' if given else 'that is not there'}."
            if unknown
            else "data: --classes names a class twice.",
            got=", ".join(unknown or wanted),
            needs=f"names from this list ({where}): {', '.join(known)}",
            fix="--classes " + ",".join(known[:2]),
        )
    if BACKGROUND in wanted:
        others = [name for name in wanted if name != BACKGROUND]
        raise value_error(
            f"data: a class is named {BACKGROUND}.",
            got=", ".join(wanted[:5]) + (", ..." if len(wanted) > 5 else ""),
            needs=f"names of what to learn: class 0, {BACKGROUND}, is there anyway",
            fix=f"--classes {','.join(others)}" if others else "rename the class",
        )
    if len(wanted) > 253:
        raise value_error(
            "data: too many classes.",
            got=str(len(wanted)),
            needs="at most 253, so that ids fit a byte",
            fix="choose some with --classes",
        )


def some(names: Iterable[object]) -> str:
    shown = [str(name) for name in names]
    return ", ".join(shown[:5]) + (", ..." if len(shown) > 5 else "")


def no_pycocotools(error: ModuleNotFoundError) -> ValueError:
    return value_error(
        "data: pycocotools is not installed.",
        got=str(error),
        needs="pycocotools, for --layout coco and the drawn shapes",
        fix="pip install pycocotools",
    )


def missing(path: Path, what: str) -> ValueError:
    got = "a file" if path.is_file() else "a folder" if path.is_dir() else "no such file or folder"
    return value_error(f"data: {path} is missing.", got=got, needs=what, fix="check --data and --layout")


def other_size(name: str, what: str, image: tuple[int, int], told: tuple[int, int], needs: str, fix: str) -> ValueError:
    """Make the error for an image whose height and width are not those that its labels or annotations have."""
    if image == told[::-1]:
        fix = f"{fix}; the sides are exchanged: if the file says to be turned (EXIF), write it upright"
    got = f"image {image[0]} x {image[1]}, {what} {told[0]} x {told[1]}"
    return value_error(f"data: {name}: image and {what} differ in size.", got=got, needs=needs, fix=fix)


def broken(path: Path, what: str, fix: str = "fetch or write it again") -> ValueError:
    return value_error(f"data: {path} cannot be read.", got=what, needs="a complete file in its format", fix=fix)
