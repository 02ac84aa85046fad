"""The trainer's readers on data that look right and are not: ids of other types, 16-bit pictures, damaged masks."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from te_nvfp4_cv import errors
from tests.examples.unet_coco_data import write_coco, write_masks  # (puts examples/ on the path)

from unet_coco.data import SegmentationDataset, load_data  # noqa: E402  isort: skip
from unet_coco.folder import run_folder  # noqa: E402  isort: skip
from unet_coco.objects import ObjectDataset  # noqa: E402  isort: skip
from unet_coco.options import parse_options  # noqa: E402  isort: skip
from unet_coco.ranks import run  # noqa: E402  isort: skip
from unet_coco.shapes import ensure_shapes  # noqa: E402  isort: skip
from unet_coco.split import open_image  # noqa: E402  isort: skip


def changed(root: Path, change: Any) -> Path:
    for split in ("train", "val"):
        file = root / "annotations" / f"instances_{split}2017.json"
        content = json.loads(file.read_text())
        change(content)
        file.write_text(json.dumps(content))
    return root


def masks(root: Path) -> list[np.ndarray]:
    split = load_data(root, "coco", None).train
    return [split.read(index)[1] for index in range(len(split))]


@pytest.mark.parametrize("ids", [{1: "img1", 2: "img2"}, {1: "12", 2: "1"}], ids=["words", "digits"])
def test_image_ids_may_be_text(tmp_path: Path, ids: dict[int, str]) -> None:
    expected = masks(write_coco(tmp_path / "a"))

    def rename(content: Any) -> None:
        for image in content["images"]:
            image["id"] = ids[image["id"]]
        for annotation in content["annotations"]:
            annotation["image_id"] = ids[annotation["image_id"]]

    found = masks(changed(write_coco(tmp_path / "b"), rename))
    assert sorted(m.tobytes() for m in found) == sorted(m.tobytes() for m in expected)


def test_annotation_ids_may_repeat(tmp_path: Path) -> None:
    """As in sets that were merged: each image keeps its own objects."""
    expected = masks(write_coco(tmp_path / "a"))
    found = masks(changed(write_coco(tmp_path / "b"), lambda c: [a.update(id=1) for a in c["annotations"]]))
    assert all((a == b).all() for a, b in zip(found, expected, strict=True))


def test_an_area_may_be_missing(tmp_path: Path) -> None:
    for number, change in enumerate((lambda a: a.pop("area"), lambda a: a.update(area=None))):
        root = write_coco(tmp_path / str(number))
        assert masks(changed(root, lambda c, f=change: [f(a) for a in c["annotations"]]))[0].any()


@pytest.mark.parametrize(
    "segmentation",
    [[[]], [[1, 1, 2, 2]], {"size": [4, 4], "counts": [0, 8, 8]}, [["a", "b", "c", "d", "e", "f"]]],
    ids=["empty", "four numbers", "another size", "text"],
)
def test_a_damaged_segmentation_is_named(tmp_path: Path, segmentation: Any) -> None:
    root = changed(write_coco(tmp_path), lambda c: c["annotations"][0].update(segmentation=segmentation))
    with pytest.raises(ValueError, match="segmentation of annotation 1 cannot be read"):
        masks(root)


def test_sixteen_bits_of_grey_keep_their_upper_byte(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    found = np.asarray(open_image(tmp_path / "ramp.png"))
    assert found.shape == (8, 8, 3) and (found[..., 0] == ramp >> 8).all()
    Image.fromarray(ramp.astype(np.float32)).save(tmp_path / "float.tiff")
    with pytest.raises(ValueError, match="floating-point pixels"):
        open_image(tmp_path / "float.tiff")
    Image.fromarray(ramp.astype(np.int32) - 9).save(tmp_path / "negative.tiff")
    with pytest.raises(ValueError, match="beyond 16 bits"):
        open_image(tmp_path / "negative.tiff")


def test_damaged_pictures_are_named(tmp_path: Path) -> None:
    Image.new("RGB", (40, 40), (1, 2, 3)).save(tmp_path / "a.png")
    whole = (tmp_path / "a.png").read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(300):
        content = bytearray(whole)
        content[rng.integers(8, len(content))] ^= 1 << int(rng.integers(8))
        (tmp_path / "a.png").write_bytes(content[: len(content) - int(rng.integers(0, 30))])
        try:
            open_image(tmp_path / "a.png")
        except ValueError as error:
            assert "a.png" in str(error)


def test_two_files_of_one_stem_are_told(tmp_path: Path) -> None:
    root = write_masks(tmp_path)
    Image.new("RGB", (32, 24)).save(root / "train" / "images" / "1.png")
    with pytest.raises(ValueError, match="several files with the same stem"):
        load_data(root, "masks", None)


def test_a_pair_of_another_kind_is_not_left_out(tmp_path: Path) -> None:
    root = write_masks(tmp_path)
    for kind in ("images", "labels"):
        Image.new("L", (32, 24)).save(root / "train" / kind / "9.bmp")
    with pytest.raises(ValueError, match=r"train/labels has pictures of another kind[\s\S]*1: 9.bmp"):
        load_data(root, "masks", None)
    (root / "train" / "labels" / "9.bmp").unlink()
    Image.new("L", (32, 24)).save(root / "train" / "labels" / "9.png")
    assert len(load_data(root, "masks", None).train) == 6


def test_masks_of_0_and_255_are_explained(tmp_path: Path) -> None:
    root = write_masks(tmp_path)
    for label in root.rglob("labels/*.png"):
        Image.fromarray(np.where(np.asarray(Image.open(label)) == 1, 255, 0).astype(np.uint8)).save(label)
    with pytest.raises(ValueError, match="255 is not a class[\\s\\S]*must become 0 and 1"):
        load_data(root, "masks", None)


def test_training_labels_of_one_class_are_refused_with_names_too(tmp_path: Path) -> None:
    """Masks of 0 and 255 beside a meta.json: every pixel of the object was ignored, and the rest scored."""
    root = write_masks(tmp_path)
    (root / "meta.json").write_text(json.dumps({"classes": ["sky", "cell", "tree"]}))
    assert load_data(root, "masks", ["cell"]).class_names == ["background", "cell"]
    for label in root.rglob("labels/*.png"):
        Image.fromarray(np.where(np.asarray(Image.open(label)) == 1, 255, 0).astype(np.uint8)).save(label)
    for classes in (None, ["cell"]):
        with pytest.raises(ValueError, match=r"train/labels hold no two classes[\s\S]*5 labels[\s\S]*become 0 and 1"):
            load_data(root, "masks", classes)


@pytest.mark.parametrize("number", ["-1", "300", "1000000000000"])
def test_class_numbers_that_no_pixel_can_have(tmp_path: Path, number: str) -> None:
    root = write_masks(tmp_path)
    (root / "meta.json").write_text(json.dumps({"classes": {"0": "a", "1": "b", "2": "c", number: "d", "255": "void"}}))
    with pytest.raises(ValueError, match=rf"meta.json cannot be read[\s\S]*no pixel can have: {number}"):
        load_data(root, "masks", None)


def test_grey_of_twelve_bits_is_warned_of_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(errors, "_warned", set())
    for name, most in (("a.png", 4095), ("b.png", 4095), ("bright.png", 65535)):
        Image.fromarray(np.linspace(0, most, 64, dtype=np.uint16).reshape(8, 8)).save(tmp_path / name)
    with pytest.warns(UserWarning, match=r"a.png has grey values up to 4095[\s\S]*almost black") as told:
        open_image(tmp_path / "a.png"), open_image(tmp_path / "b.png")
    assert len(told) == 1
    monkeypatch.setattr(errors, "_warned", set())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_image(tmp_path / "bright.png")


def test_no_epoch_in_nvfp4_is_refused() -> None:
    with pytest.raises(ValueError, match="leaves no epoch in NVFP4"):
        parse_options(["--epochs", "2", "--high-precision-last", "2"])


def test_the_current_folder_as_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "summary.json").write_text("{}")
    monkeypatch.chdir(tmp_path / "run")
    assert run_folder(Path("."), resume=False) == (tmp_path / "run_2", True)


def turn(file: Path, orientation: int) -> None:
    image = Image.open(file)
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save(file, exif=exif)


@pytest.mark.parametrize("kind", ["images", "labels"])
def test_files_that_exif_turns_are_refused_beside_label_masks(tmp_path: Path, kind: str) -> None:
    root = write_masks(tmp_path)
    file = root / "train" / kind / ("0.jpg" if kind == "images" else "0.png")
    (root / "meta.json").write_text(json.dumps({"classes": ["a", "b", "c"]}))
    for harmless in (0, 1, 9):
        turn(file, harmless)
        load_data(root, "masks", None).train.read(0)
    turn(file, 3)
    with pytest.raises(ValueError, match=r"0\.(jpg|png) must be turned[\s\S]*orientation 3[\s\S]*exif_transpose"):
        load_data(root, "masks", None)


def test_files_that_exif_turns_are_refused_beside_defects(tmp_path: Path) -> None:
    for folder, name in (("train/good", "0"), ("test/cut", "0"), ("test/cut", "1"), ("ground_truth/cut", "0_mask")):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (9, 9, 9)).save(tmp_path / folder / f"{name}.png")
    Image.new("L", (8, 8), 255).save(tmp_path / "ground_truth" / "cut" / "1_mask.png")
    turn(tmp_path / "test" / "cut" / "1.png", 6)
    with pytest.raises(ValueError, match=r"1\.png must be turned"):
        load_data(tmp_path, "mvtec", None)


def test_coco_annotations_refer_to_the_pixels_that_are_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_coco(tmp_path)
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[:4] = 200
    file = root / "train2017" / "1.jpg"
    Image.fromarray(pixels).save(file)
    turn(file, 3)
    monkeypatch.setattr(errors, "_warned", set())
    with pytest.warns(UserWarning, match=r"1\.jpg says to be turned[\s\S]*orientation 3[\s\S]*exif_transpose"):
        image, mask = load_data(root, "coco", None).train.read(0)
    assert np.asarray(image)[0].min() > 150 and mask[3, 3]


@pytest.mark.parametrize("task", ["semantic", "detection"])
def test_exchanged_sides_are_explained(tmp_path: Path, task: str) -> None:
    root = changed(write_coco(tmp_path), lambda c: c.update(annotations=c["annotations"][:2]))
    for height, width, explained in ((8, 5, True), (5, 9, False)):
        Image.new("RGB", (8, 5)).save(root / "train2017" / "1.jpg")
        changed(root, lambda c, h=height, w=width: c["images"][0].update(height=h, width=w))
        split = load_data(root, "coco", None).train
        made = SegmentationDataset(split, (8, 8), False) if task == "semantic" else None
        with pytest.raises(ValueError, match="1.jpg: image and (labels|annotations) differ in size") as refused:
            (made or ObjectDataset(split, (8, 8), False, 0, False))[0]
        assert ("sides are exchanged" in str(refused.value)) == explained


def test_a_file_in_place_of_the_folder_of_the_data(tmp_path: Path) -> None:
    (tmp_path / "instances.json").write_text("{}")
    with pytest.raises(ValueError, match=r"instances.json is missing[\s\S]*got: +a file[\s\S]*folder of --data"):
        load_data(tmp_path / "instances.json", "coco", None)


def test_what_the_system_refuses_is_told_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails() -> None:
        raise PermissionError(13, "Permission denied", "/data/train2017")

    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit, match="error: .*Permission denied: '/data/train2017'"):
        run(fails)


def test_two_classes_of_one_name_are_refused(tmp_path: Path) -> None:
    root = write_masks(tmp_path)
    (root / "meta.json").write_text(json.dumps({"classes": ["sky", "car", "tree", "car"]}))
    for classes in (None, ["car"], ["tree"]):
        with pytest.raises(ValueError, match=r"meta.json cannot be read[\s\S]*two classes of one name: car"):
            load_data(root, "masks", classes)


def test_without_pycocotools_no_shapes_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("pycocotools", "pycocotools.mask"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=r"pycocotools is not installed[\s\S]*pip install pycocotools"):
        ensure_shapes(tmp_path / "shapes")
    assert not list(tmp_path.iterdir())


def test_two_runs_may_draw_the_shapes_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The slower one takes what is there, and leaves the folder that the other may be reading."""
    from unet_coco import shapes

    settings, draw = shapes.ShapesSettings(train=2, val=1, height=32, width=32), shapes._draw_split

    def slow(draft: Path, *arguments: Any) -> None:
        monkeypatch.setattr(shapes, "_draw_split", draw)
        monkeypatch.setattr(shapes.os, "getpid", lambda: 1)
        ensure_shapes(tmp_path / "shapes", settings)  # the other run
        (tmp_path / "shapes" / "read").touch()
        draw(draft, *arguments)

    monkeypatch.setattr(shapes, "_draw_split", slow)
    ensure_shapes(tmp_path / "shapes", settings)
    assert (tmp_path / "shapes" / "read").exists() and [path.name for path in tmp_path.iterdir()] == ["shapes"]
