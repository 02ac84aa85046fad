"""COCO annotations that look right and are not: they are refused with the name of the file, or drawn as they mean."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.examples.unet_coco_data import edit, write_coco  # (puts examples/ on the path)

from unet_coco import tracking  # noqa: E402  isort: skip
from unet_coco.data import load_data  # noqa: E402  isort: skip
from unet_coco.options import parse_options  # noqa: E402  isort: skip
from unet_coco.segmentation import to_rle  # noqa: E402  isort: skip
from unet_coco.semantic import Semantic  # noqa: E402  isort: skip


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


# ---- entries --------------------------------------------------------------------------------------------------------


def entries(key: str, place: int, **fields: Any) -> Any:
    return lambda i: i[key][place].update(fields)


REFUSED = {
    "images of one id": (entries("images", 1, id=1), "two images of one id: 1"),
    "categories of one id": (
        lambda i: (i["categories"][1].update(id=7), [a.update(category_id=7) for a in i["annotations"]]),
        "two categories of one id: 7",
    ),
    "no file_name": (lambda i: i["images"][0].pop("file_name"), "images without a file_name: 1"),
    "no name": (lambda i: i["categories"][0].pop("name"), "categories without a name in text: 7"),
    "a number as name": (entries("categories", 0, name=5), "categories without a name in text: 7"),
    "no categories": (lambda i: i.update(categories=[], annotations=[]), "empty list of categories"),
    "half a pixel": (entries("images", 0, height=8.5), "height and width, as whole numbers"),
    "iscrowd in text": (entries("annotations", 1, iscrowd="0"), "iscrowd that is neither 0 nor 1: 2"),
    "image ids of two kinds": (
        lambda i: (i["annotations"][0].update(image_id=None), i["annotations"][1].update(image_id="x")),
        "2 unknown image_id: 'x', None",
    ),
    "a category id in text": (entries("annotations", 0, category_id="7"), "unknown category_id: '7'"),
    "class 0 again": (
        lambda i: i["categories"].append({"id": 0, "name": "background"}),
        r"a class is named background[\s\S]*--classes box,dot",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_entries_that_do_not_fit_are_refused(tmp_path: Path, case: str) -> None:
    root = write_coco(tmp_path)
    change, told = REFUSED[case]
    edit(root, "train", change)
    with pytest.raises(ValueError, match=told):
        load_data(root, "coco", None)


def test_a_category_that_only_validation_knows_is_refused_unless_classes_are_named(tmp_path: Path) -> None:
    root = write_coco(tmp_path)
    edit(root, "val", lambda i: i["categories"].append({"id": 9, "name": "bird"}))
    assert load_data(root, "coco", None).class_names == ["background", "box", "dot"], "nothing is annotated with it"
    edit(root, "val", entries("annotations", 0, category_id=9))
    with pytest.raises(ValueError, match=r"instances_val2017.json has annotations of categories[\s\S]*1 of 'bird'"):
        load_data(root, "coco", None)
    assert set(np.unique(load_data(root, "coco", ["box", "dot"]).val.read(0)[1])) == {0, 1, 255}


@pytest.mark.parametrize("area", [None, 0, -1, float("nan"), "4"])
def test_of_overlapping_objects_the_smaller_lies_on_top_without_areas_too(tmp_path: Path, area: Any) -> None:
    expected = first_mask(write_coco(tmp_path / "a"))
    root = write_coco(tmp_path / "b")
    edit(root, "train", lambda i: [a.update(area=area) for a in i["annotations"]])
    assert (first_mask(root) == expected).all() and (expected == 2).sum() == 4


def test_iscrowd_may_be_null(tmp_path: Path) -> None:
    root = write_coco(tmp_path)
    edit(root, "train", lambda i: [a.update(iscrowd=a["iscrowd"] or None) for a in i["annotations"]])
    assert (first_mask(root) == first_mask(write_coco(tmp_path / "as written"))).all()


def test_annotations_without_masks_are_told_and_a_split_of_them_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tracking, "_told", set())
    root, settings = update(write_coco(tmp_path), segmentation=[]), parse_options([])
    Semantic(settings, load_data(root, "coco", None))
    assert "train: 1 of 3 annotations have no segmentation" in capsys.readouterr().out
    Semantic(settings, load_data(root, "coco", ["box"]))
    assert not capsys.readouterr().out
    edit(root, "val", lambda i: [a.update(segmentation=None) for a in i["annotations"]])
    with pytest.raises(ValueError, match=r"val has no masks[\s\S]*3 annotations[\s\S]*--task detection"):
        Semantic(settings, load_data(root, "coco", None))
    edit(root, "val", lambda i: i.update(annotations=[]))
    with pytest.raises(ValueError, match=r"val has no masks[\s\S]*0 annotations[\s\S]*--classes"):
        Semantic(settings, load_data(root, "coco", None))
