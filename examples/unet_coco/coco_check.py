"""Check the entries of a COCO file before anything is made of them, so that nothing is lost or mixed up in silence."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from te_nvfp4_cv.errors import value_error

from .split import broken, some

CORRECT = "correct these entries"


def check_entries(file: Path, dataset: dict[str, Any]) -> None:
    """Refuse lists of images, annotations and categories that do not fit together.

    Raises:
        ValueError: If an entry lacks a part, an id or a name occurs twice, or an annotation refers to no entry; the
            error names the file and the first such entries.
    """
    images, annotations, categories = (dataset[key] for key in ("images", "annotations", "categories"))
    if not images or not categories:
        raise broken(file, f"an empty list of {'categories' if images else 'images'}", CORRECT)
    unnamed = [image["id"] for image in images if not isinstance(image.get("file_name"), str)]
    if unnamed:
        raise broken(file, f"images without a file_name: {some(unnamed)}", CORRECT)
    unsized = [image["file_name"] for image in images if not _has_size(image)]
    if unsized:
        raise broken(file, f"images without height and width, as whole numbers from 1 on: {some(unsized)}", CORRECT)
    nameless = [category["id"] for category in categories if not isinstance(category.get("name"), str)]
    if nameless:
        raise broken(file, f"categories without a name in text: {some(nameless)}", CORRECT)
    for what, values in (
        ("categories of one name", (category["name"] for category in categories)),
        ("categories of one id", (category["id"] for category in categories)),
        ("images of one id", (image["id"] for image in images)),
    ):
        twice = _repeated(values)
        if twice:
            raise broken(file, f"two {what}: {some(twice)}", CORRECT)
    odd = [a["id"] for a in annotations if a.get("iscrowd") not in (None, 0, 1)]
    if odd:
        raise broken(file, f"annotations with an iscrowd that is neither 0 nor 1: {some(odd)}", CORRECT)
    strange = {a["category_id"] for a in annotations} - {category["id"] for category in categories}
    if strange:
        raise value_error(
            f"data: {file} has annotations of categories that it does not list.",
            got=f"{len(strange)} unknown category_id: {some(sorted(map(repr, strange)))}",
            needs="an entry in `categories` for every category_id",
            fix="add the categories (ids may be counted from 0 in one and from 1 in the other)",
        )
    orphans = {a["image_id"] for a in annotations} - {image["id"] for image in images}
    if orphans:
        raise value_error(
            f"data: {file} has annotations for images that it does not list.",
            got=f"{len(orphans)} unknown image_id: {some(sorted(map(repr, orphans)))}",
            needs="an entry in `images` for every image_id",
            fix="add the images, or remove their annotations",
        )


def check_on_disk(file: Path, dataset: dict[str, Any], folder: Path) -> None:
    """Refuse a list with images that are not in the folder."""
    names, on_disk = [image["file_name"] for image in dataset["images"]], {path.name for path in folder.iterdir()}
    gone = [name for name in names if name not in on_disk and not (folder / name).is_file()]
    if gone:
        raise value_error(
            f"data: {folder} lacks images that {file.name} lists.",
            got=f"{len(gone)} of {len(names)} missing: {some(gone)}",
            needs="every image of the annotations on disk",
            fix="download the missing files, or remove their entries from the annotations",
        )


def check_known(file: Path, dataset: dict[str, Any], known: Iterable[str]) -> None:
    """Refuse annotations of categories that the training split, whose `known` names are the classes, does not list."""
    more = {c["id"]: c["name"] for c in dataset["categories"] if c["name"] not in set(known)}
    used = Counter(a["category_id"] for a in dataset["annotations"] if a["category_id"] in more)
    if used:
        raise value_error(
            f"data: {file} has annotations of categories that the training split does not list.",
            got=some(f"{count} of {more[key]!r}" for key, count in used.items()),
            needs="the same categories in all splits, or --classes: what it does not name is background",
            fix=f"add the categories to the training split, or --classes {','.join(known)}",
        )


def _repeated(values: Iterable[Any]) -> list[Any]:
    return [value for value, count in Counter(values).items() if count > 1]


def _has_size(image: Any) -> bool:
    return all(isinstance(image.get(key), int) and image[key] > 0 for key in ("height", "width"))
