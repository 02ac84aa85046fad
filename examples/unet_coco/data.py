"""Semantic segmentation data: COCO instances, or folders of images and label masks.

    coco    ROOT/annotations/instances_{train,val[,test]}2017.json + ROOT/{train,val[,test]}2017/*.jpg
            -> background 0, the chosen categories 1, 2, ... in the order asked for; crowd pixels 255 (ignore); an image without
               annotations is all background; where instances overlap, the smaller lies on top
    masks   ROOT/{train,val[,test]}/{images/*.jpg, labels/*.png}, pixel value = class id, 255 = ignore; class names from ROOT/meta.json
            ("classes": [...]), else ids scanned from the labels. With --classes: those become 1, 2, ..., every other class 0

Everything that can be known before the first step is checked before it: folders, files, images that annotations speak of but that are
missing, unknown class names. What only decoding shows (a label of another size, an id out of range) is an error naming the file.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from te_nvfp4_cv.checks import value_error

from .losses import IGNORE
from .order import mix_seed

LAYOUTS = ("coco", "masks")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png"}


@dataclass(frozen=True)
class SegmentationData:
    """The splits of one data set, undecoded, with the names of the classes that the masks hold."""

    train: RawSplit
    val: RawSplit
    test: RawSplit | None
    class_names: list[str]


@dataclass(frozen=True)
class RawSplit:
    """Images and masks of one split as they lie on disk: `read(i)` gives an RGB PIL image and a [H, W] uint8 array of class ids."""

    name: str
    names: list[str] = field(repr=False)
    read: Callable[[int], tuple[Image.Image, np.ndarray]] = field(repr=False)

    def __len__(self) -> int:
        return len(self.names)


def load_data(root: str | Path, layout: str, classes: Sequence[str] | None) -> SegmentationData:
    """Open a data set and check that it is complete.

    Raises:
        ValueError: unknown layout or class; a folder, file or image that is missing, by name.
    """
    root = Path(root)
    if layout not in LAYOUTS:
        raise value_error("data: unknown layout.", got=repr(layout), needs=" or ".join(LAYOUTS), fix="--layout coco")
    if not root.is_dir():
        raise _missing(root, "the folder of --data")
    return _load_coco(root, classes) if layout == "coco" else _load_masks(root, classes)


class SegmentationDataset(Dataset[tuple[Tensor, Tensor]]):
    """A split made ready for the model: resized, flipped in training, normalised.

    An item is asked for by its index, or in training by (epoch, index): what is random in it depends on (seed, epoch, index) alone,
    so that precisions, resumed runs and any number of loader workers see the same pixels.
    """

    def __init__(self, raw: RawSplit, size: tuple[int, int], train: bool, seed: int = 0) -> None:
        self.raw, self.size, self.train, self.seed = raw, size, train, seed
        steps: list[Any] = [v2.Resize(list(size), antialias=True)]
        if train:
            steps.append(v2.RandomHorizontalFlip(0.5))
        steps += [v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True), v2.Normalize(MEAN, STD)]
        self.transform = v2.Compose(steps)

    def __len__(self) -> int:
        return len(self.raw)

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor, Tensor]:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        image, mask = self.raw.read(index)
        if (image.height, image.width) != mask.shape:
            raise value_error(
                f"data: {self.raw.names[index]}: image and labels differ in size.",
                got=f"image {image.height} x {image.width}, labels {mask.shape[0]} x {mask.shape[1]}",
                needs="one label per pixel",
                fix="remove the image from the split, or write its labels again",
            )
        pair = tv_tensors.Image(v2.functional.pil_to_tensor(image)), tv_tensors.Mask(torch.from_numpy(mask))
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(mix_seed(self.seed, epoch, index))
            image_t, mask_t = self.transform(*pair)
        return image_t.as_subclass(Tensor), mask_t.as_subclass(Tensor).long()


def denormalize(images: Tensor) -> Tensor:
    """Undo the normalisation: [B, 3, H, W] float -> uint8."""
    mean, std = (torch.tensor(v, device=images.device).view(1, 3, 1, 1) for v in (MEAN, STD))
    return ((images * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)


# ---- COCO ------------------------------------------------------------------------------------------------------------------------


def _load_coco(root: Path, classes: Sequence[str] | None) -> SegmentationData:
    files = {split: root / "annotations" / f"instances_{split}2017.json" for split in ("train", "val", "test")}
    opened = {split: _open_coco(file, root / f"{split}2017") for split, file in files.items() if split != "test" or file.is_file()}
    names = {split: {c["name"]: c["id"] for c in coco.coco.dataset["categories"]} for split, coco in opened.items()}
    wanted = list(classes) if classes else [c["name"] for c in sorted(opened["train"].coco.dataset["categories"], key=lambda c: c["id"])]
    for split, ids in names.items():
        _check_classes(wanted, list(ids), f"{files[split].name} has the categories")
    splits = {
        split: _coco_split(split, coco, {names[split][name]: number for number, name in enumerate(wanted, start=1)})
        for split, coco in opened.items()
    }
    return SegmentationData(splits["train"], splits["val"], splits.get("test"), ["background", *wanted])


def _open_coco(file: Path, folder: Path) -> Any:
    """torchvision's CocoDetection over one instances file, checked against the folder of its images."""
    from torchvision.datasets import CocoDetection

    if not file.is_file():
        raise _missing(file, "the annotations of a COCO root")
    if not folder.is_dir():
        raise _missing(folder, f"the folder of the images that {file.name} speaks of")
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            opened = CocoDetection(str(folder), str(file))
        dataset = opened.coco.dataset
        absent = {"images", "annotations", "categories"} - set(dataset)
    except ModuleNotFoundError as error:
        raise value_error(
            "data: pycocotools is not installed.", got=str(error), needs="pycocotools, for --layout coco", fix="pip install pycocotools"
        ) from error
    except (ValueError, KeyError, TypeError, AssertionError, AttributeError) as error:
        raise _broken(file, f"{type(error).__name__}: {error}") from error
    if absent:
        raise _broken(file, f"no {', '.join(sorted(absent))}")
    known = {image["id"] for image in dataset["images"]}
    orphans = sorted({a["image_id"] for a in dataset["annotations"]} - known)
    if orphans:
        raise value_error(
            f"data: {file} has annotations for images that it does not list.",
            got=f"{len(orphans)} unknown image_id: {_some(orphans)}",
            needs="an entry in `images` for every image_id",
            fix="add the images, or remove their annotations",
        )
    on_disk = {path.name for path in folder.iterdir()}
    gone = [i["file_name"] for i in dataset["images"] if i["file_name"] not in on_disk and not (folder / i["file_name"]).is_file()]
    if gone:
        raise value_error(
            f"data: {folder} lacks images that {file.name} lists.",
            got=f"{len(gone)} of {len(known)} missing: {_some(gone)}",
            needs="every image of the annotations on disk",
            fix="download the missing files, or remove their entries from the annotations",
        )
    if not known:
        raise _broken(file, "an empty list of images")
    return opened


def _coco_split(split: str, opened: Any, number_of: dict[int, int]) -> RawSplit:
    """Paint the masks of a COCO split; `number_of` maps category ids to class numbers."""
    coco = opened.coco
    entries = [coco.imgs[key] for key in opened.ids]
    paths = [Path(opened.root) / entry["file_name"] for entry in entries]

    def read(index: int) -> tuple[Image.Image, np.ndarray]:
        entry = entries[index]
        mask = np.zeros((entry["height"], entry["width"]), np.uint8)
        found = [a for a in coco.loadAnns(coco.getAnnIds(imgIds=entry["id"])) if a["category_id"] in number_of]
        found.sort(key=lambda a: (a.get("iscrowd", 0), -a["area"]))
        for annotation in found:
            number = IGNORE if annotation.get("iscrowd", 0) else number_of[annotation["category_id"]]
            if annotation.get("segmentation"):
                mask[coco.annToMask(annotation).astype(bool)] = number
        return _open_image(paths[index]), mask

    return RawSplit(split, [str(path) for path in paths], read)


# ---- folders of masks ------------------------------------------------------------------------------------------------------------


def _load_masks(root: Path, classes: Sequence[str] | None) -> SegmentationData:
    found = {split: _mask_files(root / split) for split in ("train", "val", "test") if split != "test" or (root / split).is_dir()}
    names = _mask_names(root, [label for pairs in found.values() for _, label in pairs])
    table = np.arange(256, dtype=np.uint8)
    if classes:
        _check_classes(list(classes), names, f"{root} has the classes")
        table[: len(names)] = 0
        for number, name in enumerate(classes, start=1):
            table[names.index(name)] = number
    table[len(names) : IGNORE] = 254  # marks an id that names no class
    splits = {split: _mask_split(split, pairs, table, len(names)) for split, pairs in found.items()}
    return SegmentationData(
        splits["train"], splits["val"], splits.get("test"), ["background", *classes] if classes else names
    )


def _mask_files(folder: Path) -> list[tuple[Path, Path]]:
    """Pairs of image and label; every image needs a label and the other way round."""
    files = {}
    for kind, suffixes in (("images", IMAGE_SUFFIXES), ("labels", {".png"})):
        if not (folder / kind).is_dir():
            raise _missing(folder / kind, f"a folder of {kind} (--layout masks)")
        files[kind] = {path.stem: path for path in sorted((folder / kind).iterdir()) if path.suffix.lower() in suffixes}
    for kind, other in (("images", "labels"), ("labels", "images")):
        alone = sorted(set(files[kind]) - set(files[other]))
        if alone:
            raise value_error(
                f"data: {folder} has {kind} without {other}.",
                got=f"{len(alone)}: {_some(files[kind][stem].name for stem in alone)}",
                needs="a label for every image and an image for every label, with the same stem",
                fix="add the missing files, or remove these",
            )
    if not files["images"]:
        raise _missing(folder / "images" / "*.jpg", "at least one image")
    return [(files["images"][stem], files["labels"][stem]) for stem in files["images"]]


def _mask_names(root: Path, labels: list[Path]) -> list[str]:
    """Class names: `classes` of meta.json, else class_0 .. class_n for the ids that the labels hold."""
    meta = root / "meta.json"
    if meta.is_file():
        try:
            named = json.loads(meta.read_text())["classes"]
            pairs = named.items() if isinstance(named, dict) else enumerate(named)
            by_id = {int(key): str(name) for key, name in pairs}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise _broken(meta, f"{type(error).__name__}: {error}; `classes` must be a list of names, or a table id -> name") from error
    else:
        seen: set[int] = set()
        for label in labels:
            seen.update(np.unique(_read_ids(label)).tolist())
        by_id = {key: f"class_{key}" for key in seen - {IGNORE}}
    names = [by_id.get(key, f"class_{key}") for key in range(max(by_id, default=-1) + 1)]
    if not 2 <= len(names) <= 254:
        raise value_error(
            f"data: {root} has no classes to tell apart.", got=f"{len(names)} class(es)", needs="2 to 254 class ids", fix="check labels/*.png"
        )
    return names


def _mask_split(split: str, pairs: list[tuple[Path, Path]], table: np.ndarray, known: int) -> RawSplit:
    def read(index: int) -> tuple[Image.Image, np.ndarray]:
        image, label = pairs[index]
        ids = _read_ids(label)
        mask = table[ids]
        if (mask == 254).any():
            raise value_error(
                f"data: {label} holds an id that names no class.",
                got=f"id {int(ids[mask == 254][0])}",
                needs=f"0 to {known - 1}, or {IGNORE} for ignore",
                fix="correct the label, or add the class to meta.json",
            )
        return _open_image(image), mask

    return RawSplit(split, [str(image) for image, _ in pairs], read)


def _read_ids(label: Path) -> np.ndarray:
    """Pixel values of a label file, unconverted: palette and grey images hold ids as they are."""
    ids = np.asarray(_open_image(label, convert=False))
    if ids.ndim != 2 or ids.min() < 0 or ids.max() > 255:
        raise value_error(
            f"data: {label} is no image of class ids.",
            got=f"array {ids.shape} {ids.dtype}",
            needs="one channel (palette or grey) with ids 0 to 255",
            fix="save ids, not colours",
        )
    return ids.astype(np.uint8)


# ---- shared ----------------------------------------------------------------------------------------------------------------------


def _open_image(path: Path, convert: bool = True) -> Image.Image:
    try:
        with Image.open(path) as image:
            image.load()
            return image.convert("RGB") if convert else image.copy()
    except (UnidentifiedImageError, OSError) as error:
        raise _broken(path, str(error)) from error


def _check_classes(wanted: list[str], known: list[str], where: str) -> None:
    unknown = [name for name in wanted if name not in known]
    if unknown or len(set(wanted)) != len(wanted):
        raise value_error(
            "data: --classes names what is not there." if unknown else "data: --classes names a class twice.",
            got=", ".join(unknown or wanted),
            needs=f"names from this list ({where}): {', '.join(known)}",
            fix="--classes " + ",".join(known[:2]),
        )
    if len(wanted) > 253:
        raise value_error(
            "data: too many classes.", got=str(len(wanted)), needs="at most 253, so that ids fit a byte", fix="choose some with --classes"
        )


def _some(names: Any) -> str:
    names = [str(name) for name in names]
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def _missing(path: Path, what: str) -> ValueError:
    return value_error(f"data: {path} is missing.", got="no such file or folder", needs=what, fix="check --data and --layout")


def _broken(path: Path, what: str) -> ValueError:
    return value_error(f"data: {path} cannot be read.", got=what, needs="a complete file in its format", fix="fetch or write it again")
