"""Objects of COCO annotations and folders of the MVTec kind in examples/unet_coco, against arrays made by hand.

And what they refuse: data without objects, without masks, of another layout.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from unet_coco import tracking
from unet_coco.data import SegmentationDataset, load_data
from unet_coco.objects import ObjectDataset, collate_objects, to_learn
from unet_coco.train import main

from tests.examples.unet_coco_data import SMALL, edit, write_coco, write_masks

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools on numpy 2


@pytest.fixture
def coco_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tracking, "_told", set())
    return write_coco(tmp_path)


def objects_of(root: Path, train: bool = False, size: int = 16, masks: bool = True) -> ObjectDataset:
    data = load_data(root, "coco", None)
    return ObjectDataset(data.train if train else data.val, (size, size), train, 0, masks)


# ---- COCO -----------------------------------------------------------------------------------------------------------


def test_objects_are_scaled_and_crowds_are_marked(coco_root: Path) -> None:
    """8x8 pixels at 16x16; no annotation has a bbox, so that boxes are those of the masks."""
    _, target = objects_of(coco_root)[0]
    assert target["boxes"].tolist() == [[4, 4, 8, 8], [2, 2, 14, 14], [0, 0, 2, 16]]
    assert target["labels"].tolist() == [2, 1, 1] and target["crowd"].tolist() == [False, False, True]
    for mask, (x0, y0, x1, y1) in zip(target["masks"], target["boxes"].int().tolist(), strict=True):
        expected = torch.zeros(16, 16, dtype=torch.bool)
        expected[y0:y1, x0:x1] = True
        assert torch.equal(mask, expected)
    assert to_learn([target])[0]["labels"].tolist() == [2, 1]


def test_an_image_without_objects_has_an_empty_target(coco_root: Path) -> None:
    image, target = objects_of(coco_root)[1]
    shapes = {key: tuple(value.shape) for key, value in target.items()}
    assert shapes == {"boxes": (0, 4), "labels": (0,), "crowd": (0,), "masks": (0, 16, 16)}
    images, targets = collate_objects([(image, target)] * 2)
    assert images.shape == (2, 3, 16, 16) and len(targets) == 2


def test_training_leaves_crowds_out_and_flips_all_together(coco_root: Path) -> None:
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[2:4, 2:4] = 255
    Image.fromarray(pixels).save(coco_root / "train2017" / "1.png")
    edit(coco_root, "train", lambda i: i["images"][0].update(file_name="1.png"))
    dataset, places = objects_of(coco_root, train=True, size=8), set()
    assert dataset.most == 2
    for epoch in range(8):
        torch.manual_seed(epoch)  # must not matter
        image, target = dataset[(epoch, 0)]
        again, same = dataset[(epoch, 0)]
        assert torch.equal(image, again) and all(torch.equal(target[key], same[key]) for key in target)
        assert target["labels"].tolist() == [2, 1] and not target["crowd"].any()
        assert torch.equal(image[0] > 0, target["masks"][0])
        x0, y0, x1, y1 = target["boxes"][0].int().tolist()
        assert target["masks"][0][y0:y1, x0:x1].all() and target["masks"][0].sum() == 4 == (x1 - x0) * (y1 - y0)
        places.add(x0)
    assert places == {2, 4}, "flips happen"


def test_the_same_pixels_as_for_classes(coco_root: Path) -> None:
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(coco_root / "train2017" / "1.jpg")
    classes = SegmentationDataset(load_data(coco_root, "coco", None).train, (16, 16), train=True)
    objects = objects_of(coco_root, train=True)
    for epoch in range(4):
        assert torch.equal(classes[(epoch, 0)][0], objects[(epoch, 0)][0])


ODD = {
    "zero width": {"bbox": [2, 2, 0, 5]},
    "negative": {"bbox": [2, 2, -3, 5]},
    "outside": {"bbox": [20, 2, 4, 4]},
    "tiny": {"bbox": [2, 2, 1, 0.4]},
}


@pytest.mark.parametrize("case", ODD)
def test_boxes_that_nothing_can_show_are_left_out_and_told_once(
    coco_root: Path, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(coco_root, "val", lambda i: i["annotations"][0].update(ODD[case]))
    for _ in range(2):
        _, target = objects_of(coco_root)[0]
        assert target["labels"].tolist() == [1, 1]
    told = "val: 1 of 2 objects have a side below one pixel or no mask at 16x16 and are left out"
    assert capsys.readouterr().out.count(told) == 1


def test_boxes_of_two_corners_are_told(coco_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A bbox is x, y, width, height; two corners reach beyond the image and would be cut without a word."""
    edit(coco_root, "val", lambda i: i["annotations"][1].update(bbox=[2, 1, 7, 7]))
    objects_of(coco_root)
    assert not capsys.readouterr().out, "a pixel beyond is rounding"
    edit(coco_root, "val", lambda i: i["annotations"][1].update(bbox=[3, 1, 7, 7]))
    for _ in range(2):
        assert objects_of(coco_root)[0][1]["boxes"][1].tolist() == [6, 2, 16, 16]
    assert capsys.readouterr().out.count("val: 1 boxes reach more than a pixel beyond their image") == 1


def test_an_object_that_resizing_makes_too_small(coco_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The dot has 2x2 of 8x8 pixels: half a pixel at 2x2."""
    assert objects_of(coco_root, size=2)[0][1]["labels"].tolist() == [1]  # and the crowd, a column, is too thin too
    assert "1 of 2 objects" in capsys.readouterr().out


def test_a_thin_mask_keeps_a_pixel(coco_root: Path) -> None:
    diagonal = np.eye(8, dtype=bool)[::-1].copy()
    diagonal[::2] = False  # nearest at 4x4 looks at even rows and columns
    runs = np.diff(np.flatnonzero(np.diff(np.concatenate([[2], diagonal.flatten(order="F"), [2]]))))
    counts = [0, *runs.tolist()] if diagonal[0, 0] else runs.tolist()
    thin = {"segmentation": {"size": [8, 8], "counts": counts}, "bbox": [0, 0, 8, 8]}
    edit(coco_root, "val", lambda i: i["annotations"][0].update(thin))
    mask = objects_of(coco_root, size=4)[0][1]["masks"][0]
    assert torch.equal(mask, torch.eye(4, dtype=torch.bool).flip(0))


def test_masks_and_boxes_that_are_missing(coco_root: Path) -> None:
    edit(coco_root, "val", lambda i: i["annotations"][0].update(segmentation=[], bbox=[2, 2, 2, 2]))
    assert objects_of(coco_root)[0][1]["labels"].tolist() == [1, 1], "no mask: of no use for masks"
    assert objects_of(coco_root, masks=False)[0][1]["labels"].tolist() == [2, 1, 1], "but for boxes"
    for bbox in ([1, 2], [1, 2, 3, float("nan")], "wide"):
        edit(coco_root, "val", lambda i, bbox=bbox: i["annotations"][0].update(bbox=bbox))
        with pytest.raises(ValueError, match="annotation 1 has no box"):
            objects_of(coco_root, masks=False)
    edit(coco_root, "val", lambda i: i["annotations"][0].pop("bbox"))
    with pytest.raises(ValueError, match="annotation 1 has no box"):
        objects_of(coco_root, masks=False)


def test_a_split_without_objects_is_refused(coco_root: Path) -> None:
    edit(coco_root, "val", lambda i: i.update(annotations=[a for a in i["annotations"] if a["iscrowd"]]))
    with pytest.raises(ValueError, match=r"val has no objects[\s\S]*0 annotations"):
        objects_of(coco_root)


def test_an_image_of_another_size_is_named(coco_root: Path) -> None:
    edit(coco_root, "val", lambda i: i["images"][0].update(height=9))
    with pytest.raises(ValueError, match=r"1.jpg: image and annotations differ in size[\s\S]*8 x 8, annotations 9 x 8"):
        objects_of(coco_root, masks=False)[0]


@pytest.mark.parametrize("task", ["instance", "detection"])
@pytest.mark.parametrize("layout", ["masks", "mvtec"])
def test_layouts_without_objects_are_refused(task: str, layout: str, tmp_path: Path) -> None:
    root = write_masks(tmp_path) if layout == "masks" else write_mvtec(tmp_path)
    options = ["--task", task, "--layout", layout, "--data", str(root), "--out", str(tmp_path / "out")]
    with pytest.raises(ValueError, match=f"--layout {layout} has no objects for --task {task}"):
        main([*options, "--precisions", "fp32", *SMALL])


# ---- folders of the MVTec kind --------------------------------------------------------------------------------------


def write_mvtec(folder: Path, categories: tuple[str, ...] = ("",)) -> Path:
    """2 good parts to train on; 3 good, 4 scratched and 2 bent ones to test, 8x8, a square of defect on the latter."""
    root = folder / "mvtec"
    for category in categories:
        base = root / category
        for name, count in (("train/good", 2), ("test/good", 3), ("test/scratch", 4), ("test/bent", 2)):
            (base / name).mkdir(parents=True)
            for i in range(count):
                Image.new("L", (8, 8), 20 * i).save(base / name / f"{i:03d}.png")
                if name in ("test/scratch", "test/bent"):
                    truth = base / "ground_truth" / Path(name).name
                    truth.mkdir(parents=True, exist_ok=True)
                    mask = np.zeros((8, 8), np.uint8)
                    mask[i : i + 3, 2:5] = 255
                    Image.fromarray(mask).save(truth / f"{i:03d}_mask.png")
    return root


def names(split: Any, root: Path) -> list[str]:
    return [Path(name).relative_to(root).as_posix() for name in split.names]


def test_mvtec_cuts_the_test_images_in_two(tmp_path: Path) -> None:
    root = write_mvtec(tmp_path)
    data = load_data(root, "mvtec", None)
    assert data.class_names == ["background", "defect"] and data.test is None
    good, bent, scratch = ([f"test/{kind}/{i:03d}.png" for i in range(4)] for kind in ("good", "bent", "scratch"))
    assert names(data.train, root) == [
        "train/good/000.png", "train/good/001.png", bent[0], good[0], good[2], scratch[0], scratch[2]
    ]  # fmt: skip
    assert names(data.val, root) == [bent[1], good[1], scratch[1], scratch[3]]
    for split in (data.train, data.val):
        for index, name in enumerate(split.names):
            image, mask = split.read(index)
            expected = np.zeros((8, 8), np.uint8)
            if "good" not in name:
                place = int(Path(name).stem)
                expected[place : place + 3, 2:5] = 1
            assert image.mode == "RGB" and np.array_equal(mask, expected)
    counts = {share: len(load_data(root, "mvtec", None, share).val) for share in (0.25, 0.5, 0.75)}
    assert counts == {0.25: 1, 0.5: 4, 0.75: 2 + 1 + 3}


def test_mvtec_classes_and_categories(tmp_path: Path) -> None:
    root = write_mvtec(tmp_path, ("nut", "bolt"))
    (root / "notes").mkdir()
    together = load_data(root, "mvtec", None)
    alone = load_data(root / "nut", "mvtec", None)
    assert len(together.train) == 2 * len(alone.train) and len(together.val) == 2 * len(alone.val)
    for classes, numbers in (
        (["scratch"], {"scratch": 1, "bent": 0}),
        (["bent", "scratch"], {"bent": 1, "scratch": 2}),
        (["defect", "bent"], {"bent": 2, "scratch": 1}),
    ):
        data = load_data(root, "mvtec", classes)
        assert data.class_names == ["background", *classes]
        for index, name in enumerate(data.val.names):
            assert data.val.read(index)[1].max() == numbers.get(Path(name).parent.name, 0)
    with pytest.raises(ValueError, match=r"unicorn[\s\S]*defect, bent, scratch"):
        load_data(root, "mvtec", ["unicorn"])


BAD_MVTEC = {
    "no mask": ("ground_truth/bent/001_mask.png", r"ground_truth/bent/001_mask.png is missing[\s\S]*test/bent/001.png"),
    "no good part": ("train/good/*", r"train/good/\*.png is missing"),
    "no test": ("test", "test is missing"),
    "no train": ("train", r"train/good is missing[\s\S]*--layout mvtec"),
}


@pytest.mark.parametrize("case", BAD_MVTEC)
def test_incomplete_mvtec_root(tmp_path: Path, case: str) -> None:
    gone, message = BAD_MVTEC[case]
    root = write_mvtec(tmp_path)
    for path in list(root.glob(gone)):
        path.rename(tmp_path / f"gone_{path.name}")
    with pytest.raises(ValueError, match=message):
        load_data(root, "mvtec", None)


def test_mvtec_needs_a_defect_in_both_parts(tmp_path: Path) -> None:
    root = write_mvtec(tmp_path)
    (root / "test" / "bent" / "001.png").unlink()
    with pytest.raises(ValueError, match=r"defect of bent for val[\s\S]*--val-share"):
        load_data(root, "mvtec", ["bent"])
    Image.new("L", (9, 8)).save(root / "ground_truth" / "scratch" / "001_mask.png")
    val = SegmentationDataset(load_data(root, "mvtec", None).val, (16, 16), train=False)
    with pytest.raises(ValueError, match=r"scratch/001.png: image and labels differ in size"):
        [val[i] for i in range(len(val))]


def test_mvtec_trains(tmp_path: Path) -> None:
    options = ["--layout", "mvtec", "--data", str(write_mvtec(tmp_path)), "--out", str(tmp_path / "out")]
    rows = main([*options, "--precisions", "fp32", "--steps", "2", *SMALL])
    assert 0 <= rows["fp32"]["miou"] <= 1
    with pytest.raises(ValueError, match="--val-share is out of range"):
        main([*options, "--val-share", "1"])
    with pytest.raises(ValueError, match="--layout mvtec needs data"):
        main(["--layout", "mvtec", "--precisions", "fp32", "--out", str(tmp_path / "out")])


def test_pictures_that_would_be_left_out_are_refused(tmp_path: Path) -> None:
    root = write_mvtec(tmp_path)
    Image.new("L", (8, 8)).save(root / "train" / "good" / "x.GIF")
    with pytest.raises(ValueError, match=r"good has pictures of another kind[\s\S]*1: x.GIF[\s\S]*\.png"):
        load_data(root, "mvtec", None)
    (root / "train" / "good" / "x.GIF").rename(root / "train" / "good" / "._x.GIF")  # what macOS leaves
    before = len(load_data(root, "mvtec", None).train)
    Image.new("L", (8, 8)).save(root / "train" / "good" / "y.TIF")
    assert len(load_data(root, "mvtec", None).train) == before + 1
    Image.new("L", (8, 8)).save(root / "test" / "bent" / "000.bmp")
    with pytest.raises(ValueError, match=r"bent has several files with the same stem[\s\S]*000"):
        load_data(root, "mvtec", None)
