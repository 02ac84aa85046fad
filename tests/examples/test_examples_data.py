"""The data of examples/unet_coco: drawn shapes, COCO and folders of masks, against masks made by hand; and refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from unet_coco.data import SegmentationDataset, load_data
from unet_coco.order import TrainOrder
from unet_coco.shapes import ShapesSettings, ensure_shapes

from tests.examples.unet_coco_data import draw_shapes, edit, write_coco, write_masks

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools on numpy 2


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_shapes(tmp_path_factory.mktemp("data"))


@pytest.fixture
def coco_root(tmp_path: Path) -> Path:
    return write_coco(tmp_path)


@pytest.fixture
def masks_root(tmp_path: Path) -> Path:
    return write_masks(tmp_path)


def test_shapes_hold_every_case_of_coco(shapes: Path) -> None:
    from pycocotools.coco import COCO

    coco = COCO(str(shapes / "annotations" / "instances_train2017.json"))
    annotations = coco.loadAnns(coco.getAnnIds())
    forms = [a["segmentation"] for a in annotations]
    assert any(isinstance(form, list) and len(form) == 1 for form in forms), "one polygon"
    assert any(isinstance(form, list) and len(form) > 1 for form in forms), "a shape in two parts"
    assert any(isinstance(form, dict) and isinstance(form["counts"], str) for form in forms), "a hidden shape as RLE"
    assert any(a["iscrowd"] and isinstance(a["segmentation"]["counts"], list) for a in annotations), "a crowd"
    assert any(not coco.getAnnIds(imgIds=key) for key in coco.getImgIds()), "an image without annotations"
    seen: dict[int, np.ndarray] = {}
    for annotation in annotations:
        mask = coco.annToMask(annotation)
        assert mask.shape == (48, 64) and mask.sum() == annotation["area"] >= 12
        together = seen.setdefault(annotation["image_id"], np.zeros_like(mask))
        assert (together + mask).max() == 1, "annotations cover what can be seen, so they never overlap"
        together += mask


def test_shapes_are_the_same_each_time_and_drawn_once(tmp_path: Path) -> None:
    settings = ShapesSettings(train=3, val=2, height=32, width=32)
    roots = [ensure_shapes(tmp_path / name, settings) for name in ("a", "b")]
    files = [sorted(p.relative_to(root) for root in [r] for p in r.rglob("*.*")) for r in roots]
    assert files[0] == files[1] and len(files[0]) == 3 + 2 + 2 + 1
    assert all((roots[0] / name).read_bytes() == (roots[1] / name).read_bytes() for name in files[0])
    before = (roots[0] / "shapes.json").stat().st_mtime_ns
    ensure_shapes(roots[0], settings)
    assert (roots[0] / "shapes.json").stat().st_mtime_ns == before
    ensure_shapes(roots[0], ShapesSettings(train=4, val=2, height=32, width=32))
    assert len(list((roots[0] / "train2017").iterdir())) == 4
    assert [p.name for p in tmp_path.iterdir() if "draft" in p.name] == []
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("...")
    with pytest.raises(ValueError, match="in use"):
        ensure_shapes(tmp_path / "mine", settings)
    assert (tmp_path / "mine" / "thesis.tex").exists()


def test_coco_masks(coco_root: Path) -> None:
    data = load_data(coco_root, "coco", None)
    assert data.class_names == ["background", "box", "dot"] and data.test is None  # by category id: 3, 7
    _, mask = data.train.read(0)
    expected = np.zeros((8, 8), np.uint8)
    expected[1:7, 1:7] = 1
    expected[2:4, 2:4] = 2  # the smaller on top, though it comes first in the file
    expected[:, 0] = 255
    np.testing.assert_array_equal(mask, expected)
    assert data.train.read(1)[1].max() == 0
    only_dot = load_data(coco_root, "coco", ["dot"]).train.read(0)[1]
    np.testing.assert_array_equal(only_dot, (expected == 2).astype(np.uint8))  # the other class's crowd is background


def test_masks_layout(masks_root: Path) -> None:
    data = load_data(masks_root, "masks", None)
    assert data.class_names == ["class_0", "class_1", "class_2"] and data.test is not None and len(data.test) == 2
    ids = np.asarray(Image.open(masks_root / "train" / "labels" / "3.png"))
    np.testing.assert_array_equal(data.train.read(3)[1], ids)
    (masks_root / "meta.json").write_text(json.dumps({"classes": ["sky", "road", "tree", "never seen"]}))
    assert load_data(masks_root, "masks", None).class_names == ["sky", "road", "tree", "never seen"]
    chosen = load_data(masks_root, "masks", ["tree", "sky"])
    assert chosen.class_names == ["background", "tree", "sky"]
    table = {0: 2, 1: 0, 2: 1, 255: 255}
    np.testing.assert_array_equal(chosen.train.read(3)[1], np.vectorize(table.__getitem__)(ids))


def test_image_and_mask_move_together_and_only_with_the_key(coco_root: Path) -> None:
    for number in (1, 2):  # left half bright, and labelled
        pixels = np.zeros((8, 8, 3), np.uint8)
        pixels[:, :4] = 255
        Image.fromarray(pixels).save(coco_root / "train2017" / f"{number}.jpg", quality=100)
    left = [0, 0, 4, 0, 4, 8, 0, 8]
    one = {
        "id": 1,
        "image_id": 1,
        "category_id": 3,
        "iscrowd": 0,
        "area": 32.0,
        "bbox": [0, 0, 4, 8],
        "segmentation": [left],
    }
    edit(coco_root, "train", lambda i: i.update(annotations=[one]))
    dataset = SegmentationDataset(load_data(coco_root, "coco", None).train, (16, 16), train=True, seed=3)
    sides = set()
    for epoch in range(8):
        torch.manual_seed(epoch)  # must not matter
        image, mask = dataset[(epoch, 0)]
        torch.rand(3)
        again, mask_again = dataset[(epoch, 0)]
        assert torch.equal(image, again) and torch.equal(mask, mask_again)
        assert image.dtype == torch.float32 and mask.dtype == torch.int64 and type(image) is torch.Tensor
        assert torch.equal(image[0] > 0, mask == 1)
        sides.add(bool(mask[0, 0]))
    assert sides == {True, False}, "flips happen"


def test_order_covers_each_epoch_and_starts_anywhere() -> None:
    order = TrainOrder(count=10, batch_size=3, seed=1)
    epochs = []
    for order.epoch in (0, 1):
        batches = list(order)
        assert len(batches) == len(order) == 3 and len({key for batch in batches for key in batch}) == 9
        epochs.append([index for batch in batches for _, index in batch])
        order.start = 2
        assert list(order) == batches[2:]
        order.start = 0
    assert epochs[0] != epochs[1]
    assert [len(batch) for batch in TrainOrder(count=2, batch_size=16, seed=0)] == [2]


def remove(path: str) -> Any:
    return lambda root: (root / path).unlink()


def orphan(root: Path) -> None:
    edit(root, "train", lambda i: i["annotations"][0].update(image_id=77))


def other_category(root: Path) -> None:
    edit(root, "val", lambda i: i["categories"][0].update(name="other"))


def first(**fields: Any) -> Any:
    return lambda root: edit(root, "train", lambda i: i["annotations"][0].update(**fields))


BAD_COCO = {
    "no annotations file": (remove("annotations/instances_val2017.json"), "instances_val2017.json is missing"),
    "no image": (remove("train2017/2.jpg"), r"train2017 lacks images[\s\S]*1 of 2 missing: 2.jpg"),
    "unlisted image": (orphan, "annotations for images that it does not list[\\s\\S]*77"),
    "no categories": (lambda root: edit(root, "train", lambda i: i.pop("categories")), "categories"),
    "half a file": (
        lambda root: (root / "annotations/instances_train2017.json").write_text('{"images": ['),
        "cannot be read",
    ),
    "no images": (
        lambda root: edit(root, "val", lambda i: i.update(images=[], annotations=[])),
        "empty list of images",
    ),
    "class missing in val": (
        other_category,
        r"the training split has a class that is not there[\s\S]*instances_val2017.json has the categories",
    ),
    "unlisted category": (first(category_id=77), r"categories that it does not list[\s\S]*77"),
    "one name twice": (
        lambda root: edit(root, "train", lambda i: i["categories"][1].update(name=i["categories"][0]["name"])),
        "two categories of one name",
    ),
    "no size": (lambda root: edit(root, "train", lambda i: i["images"][0].pop("height")), "without height and width"),
}


@pytest.mark.parametrize("case", BAD_COCO)
def test_incomplete_coco_root(coco_root: Path, case: str) -> None:
    spoil, message = BAD_COCO[case]
    spoil(coco_root)
    with pytest.raises(ValueError, match=message):
        load_data(coco_root, "coco", None)


def test_coco_root_without_image_folder(coco_root: Path) -> None:
    (coco_root / "val2017").rename(coco_root / "elsewhere")
    with pytest.raises(ValueError, match="val2017 is missing"):
        load_data(coco_root, "coco", None)


def test_unknown_class_lists_the_names(coco_root: Path) -> None:
    with pytest.raises(ValueError, match=r"unicorn[\s\S]*(box, dot|dot, box)"):
        load_data(coco_root, "coco", ["box", "unicorn"])
    with pytest.raises(ValueError, match="twice"):
        load_data(coco_root, "coco", ["box", "box"])


BAD_MASKS = {
    "no label": (remove("train/labels/1.png"), "images without labels[\\s\\S]*1.jpg"),
    "no image": (remove("val/images/0.jpg"), "labels without images[\\s\\S]*0.png"),
    "odd meta": (lambda root: (root / "meta.json").write_text('{"classes": 3}'), "meta.json cannot be read"),
    "colours": (lambda root: Image.new("RGB", (32, 24)).save(root / "train/labels/1.png"), "not an image of class ids"),
}


@pytest.mark.parametrize("case", BAD_MASKS)
def test_incomplete_masks_root(masks_root: Path, case: str) -> None:
    spoil, message = BAD_MASKS[case]
    spoil(masks_root)
    with pytest.raises(ValueError, match=message):
        load_data(masks_root, "masks", None)


def test_labels_that_do_not_fit(masks_root: Path) -> None:
    (masks_root / "meta.json").write_text(json.dumps({"classes": ["a", "b"]}))
    with pytest.raises(ValueError, match=r"labels/\d.png contains an id without a class[\s\S]*id 2"):
        for index in range(5):
            load_data(masks_root, "masks", None).train.read(index)
    (masks_root / "meta.json").unlink()
    Image.new("L", (8, 8)).save(masks_root / "train/labels/0.png")
    with pytest.raises(ValueError, match="differ in size"):
        SegmentationDataset(load_data(masks_root, "masks", None).train, (16, 16), train=False)[0]
    (masks_root / "train/images/1.jpg").write_bytes(b"no image")
    with pytest.raises(ValueError, match="1.jpg cannot be read"):
        load_data(masks_root, "masks", None).train.read(1)
