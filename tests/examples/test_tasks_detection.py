"""--task detection of examples/unet_coco: average precision by hand, the detector, runs, bit-exact resume, refusals."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import ImageDraw
from torch import Tensor
from unet_coco import parallel
from unet_coco.average_precision import AveragePrecision
from unet_coco.checkpoint import load_checkpoint
from unet_coco.data import load_data
from unet_coco.detector import Detector
from unet_coco.drawing import draw_objects
from unet_coco.engine import Trainer
from unet_coco.options import parse_options
from unet_coco.precision import parse_precisions
from unet_coco.ranks import Ranks
from unet_coco.train import main

from tests.examples.test_examples import same
from tests.examples.unet_coco_data import SMALL, draw_shapes, edit

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # pycocotools on numpy 2
    pytest.mark.usefixtures("one_thread"),
]
TINY = ["--task", "detection", *SMALL]
NAMES = ("background", "circle", "a long name of a class")
KEYS = {"train_loss", "val_loss", "ap", "ap50", "ap_hp", "step_ms", "saved_bytes", "nvfp4_flops_share"}


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_shapes(tmp_path_factory.mktemp("data"))


# ---- average precision ----------------------------------------------------------------------------------------------


def boxes(rows: list[list[float]], labels: list[int], **others: list[Any]) -> dict[str, Tensor]:
    return {
        "boxes": torch.tensor(rows, dtype=torch.float32).reshape(-1, 4),
        "labels": torch.tensor(labels, dtype=torch.int64),
        **{key: torch.tensor(value) for key, value in others.items()},
    }


def scored(targets: list[dict[str, Tensor]], predictions: list[dict[str, Tensor]], classes: int = 4) -> list[float]:
    precision = AveragePrecision("bbox", classes, (32, 32))
    for target, predicted in zip(targets, predictions, strict=True):
        precision.add([target], [predicted])
    return list(precision.compute().values())


TRUE = [[2.0, 2.0, 12.0, 12.0], [10.0, 4.0, 30.0, 24.0]]


def test_perfect_predictions_have_precision_one() -> None:
    """Class 3 has no truth and does not count; the second image has no object and no prediction."""
    target = [boxes(TRUE, [1, 2], crowd=[False, False]), boxes([], [], crowd=[])]
    assert scored(target, [boxes(TRUE, [1, 2], scores=[0.9, 0.2]), boxes([], [], scores=[])]) == pytest.approx([1, 1])


def test_precision_by_hand() -> None:
    target = [boxes(TRUE, [1, 2], crowd=[False, False])]
    assert scored(target, [boxes([], [], scores=[])]) == [0, 0]
    swapped = boxes(TRUE, [2, 1], scores=[0.9, 0.9])
    assert scored(target, [swapped]) == [0, 0]
    half = boxes([[2, 2, 12, 9.5]], [1], scores=[0.9])  # IoU 0.75 with the first: right at 6 of the 10 thresholds
    assert scored(target, [half]) == pytest.approx([0.6 / 2, 1 / 2], abs=1e-6)
    late = boxes([[20.0, 20.0, 30.0, 30.0], TRUE[0]], [1, 1], scores=[0.9, 0.8])  # a false one before it: 1/2
    assert scored(target, [late]) == pytest.approx([0.25, 0.25], abs=1e-6)


def test_a_prediction_in_a_crowd_is_not_wrong() -> None:
    target = boxes([[2, 2, 12, 12], [14, 14, 30, 30]], [1, 1], crowd=[False, True])
    predicted = boxes([[16, 16, 22, 22], [2, 2, 12, 12]], [1, 1], scores=[0.9, 0.8])
    assert scored([target], [predicted]) == pytest.approx([1, 1])
    alone = {key: value[:1] for key, value in target.items()}
    assert scored([alone], [predicted])[0] == pytest.approx(0.5, abs=1e-6)


# ---- the detector ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "strides"), [((32, 48), [4, 8, 16, 32, 64]), ((256, 320), [8, 16, 32, 64, 128])])
def test_resizing_changes_nothing_and_levels_fit(size: tuple[int, int], strides: list[int]) -> None:
    model = Detector(3, size, scale=0.0625)
    images = torch.randn(2, 3, *size)
    targets = [boxes([[1.5, 2.5, 9.25, 8.0]], [1]), boxes([], [])]
    for model.training in (True, False):
        model.transform.training = model.training
        inside, moved = model.transform(images, targets)
        height, width = (math.ceil(side / 32) * 32 for side in size)
        assert inside.tensors.shape == (2, 3, height, width)
        assert torch.equal(inside.tensors[:, :, : size[0], : size[1]], images)
        assert torch.equal(moved[0]["boxes"], targets[0]["boxes"])
    levels = model.backbone(inside.tensors)
    assert [level.shape[-1] for level in levels.values()] == [math.ceil(width / stride) for stride in strides]
    widest = [anchors[:, 2].max() - anchors[:, 0].min() for anchors in model.anchor_generator.cell_anchors]
    assert all(4 * s <= wide <= 10 * s for s, wide in zip(strides, widest, strict=True))
    names = dict(model.named_modules())
    assert {"head.classification_head.cls_logits", "head.regression_head.bbox_reg"} <= set(names)
    assert not list(model.buffers()), "no statistics that ranks would have to share"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_are_fp32_and_finite_without_objects(dtype: torch.dtype) -> None:
    model = Detector(3, (32, 32), scale=0.0625)
    images, empty = torch.randn(2, 3, 32, 32), [boxes([], [])] * 2
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
        losses = model(images, empty)
        loss = losses["classification"] + losses["bbox_regression"]
    assert loss.dtype == torch.float32 and losses["bbox_regression"] == 0 < losses["classification"]
    loss.backward()
    grads = [p.grad for p in model.parameters()]
    assert all(grad is not None and grad.isfinite().all() for grad in grads), "DDP waits for every parameter"


def test_a_scale_without_channels_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing to train"):
        Detector(3, (32, 32), scale=0.001)


def test_pictures_show_boxes_of_likely_objects() -> None:
    images = torch.zeros(1, 3, 16, 16)
    found = boxes([[2, 2, 8, 8], [9, 9, 15, 15]], [1, 2], scores=[0.9, 0.1])
    [plain], [drawn] = draw_objects(images, [boxes([], [])], NAMES), draw_objects(images, [found], NAMES)
    assert plain.shape == (160, 160, 3), "as large as on the sheet, so that texts are sharp"
    changed = (plain != drawn).any(axis=2)
    assert changed[20:22, 20:80].all() and changed[78:80, 20:80].all() and not changed[:, 82:].any()
    assert changed[40:78, 22:78].sum() == 0, "only the border, and a text at its top"


def test_true_boxes_bear_names_and_predicted_ones_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[tuple[tuple[float, float], str]] = []
    write = ImageDraw.ImageDraw.text
    monkeypatch.setattr(
        ImageDraw.ImageDraw, "text", lambda pen, at, text, *more: (said.append((at, text)), write(pen, at, text, *more))
    )
    true = boxes([[2, 2, 8, 8], [12, 9, 16, 15]], [1, 2])
    draw_objects(torch.zeros(1, 3, 16, 16), [true], NAMES)
    draw_objects(torch.zeros(1, 3, 16, 16), [{**true, "scores": torch.tensor([0.9, 0.456])}], NAMES)
    assert [text for _, text in said] == ["circle", "a long name of a class", "0.46", "0.90"]
    assert said[1][0][0] < 120, "a long name stays in the picture"


# ---- runs -----------------------------------------------------------------------------------------------------------


def test_two_steps_in_fp32_and_nvfp4(shapes: Path, tmp_path: Path) -> None:
    """nvfp4 stands for the recipe that leaves the prediction layers in high precision."""
    options = ["--precisions", "fp32", "nvfp4", "--steps", "2", "--scale", "0.125", "--out", str(tmp_path)]
    rows = main(["--data", str(shapes), *TINY, *options])
    assert json.loads((tmp_path / "summary.json").read_text()) == rows and list(rows) == ["fp32", "nvfp4"]
    for row in rows.values():
        assert set(row) == KEYS and all(math.isfinite(value) for value in row.values())
    assert rows["fp32"]["nvfp4_flops_share"] == 0 and rows["nvfp4"]["nvfp4_flops_share"] > 0.3
    assert rows["nvfp4"]["train_loss"] == pytest.approx(rows["fp32"]["train_loss"], rel=0.1)
    assert "box AP, weights in fp32" in (tmp_path / "table.md").read_text()
    assert all((tmp_path / name).is_file() for name in ("curves.png", "predictions.png", "nvfp4/last.pt"))
    recipe = load_checkpoint(tmp_path / "nvfp4" / "last.pt")["identity"]["recipe"]
    assert "head.classification_head.cls_logits" in recipe and "head.regression_head.bbox_reg" in recipe


def test_resume_of_detection_is_bit_exact(shapes: Path, tmp_path: Path) -> None:
    """2 epochs of 3 steps in one go, against a stop in the middle of the first."""
    common = ["--data", str(shapes), *TINY, "--precisions", "fp32", "--epochs", "2", "--pictures", "0"]
    straight = main([*common, "--out", str(tmp_path / "straight")])
    for number, stop in enumerate([["--steps", "2"], ["--resume"]]):
        torch.manual_seed(number)  # what ran before must not matter
        resumed = main([*common, *stop, "--out", str(tmp_path / "resumed")])
    a, b = (load_checkpoint(tmp_path / name / "fp32" / "last.pt") for name in ("straight", "resumed"))
    assert a["position"]["step"] == 6 and [row["epoch"] for row in a["position"]["epochs"]] == [1, 2]
    same(a, b)
    for rows in (straight, resumed):
        rows["fp32"].pop("step_ms")
    assert straight == resumed


def make_trainer(shapes: Path, folder: Path, *options: str) -> Trainer:
    settings = parse_options(["--data", str(shapes), "--out", str(folder), *TINY, *options])
    data = load_data(shapes, "coco", settings.classes)
    return Trainer(parse_precisions(["fp32"], "unet")[0], settings, data, torch.device("cpu"), folder)


@pytest.mark.parametrize("options", [("--backbone", "resnet34"), ("--task", "instance"), ("--task", "semantic")])
def test_checkpoint_of_another_task_or_backbone(shapes: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    make_trainer(shapes, tmp_path)._save()
    with pytest.raises(ValueError, match=r"last.pt belongs to another run \(differing: architecture\)"):
        make_trainer(shapes, tmp_path, *options).resume()


def test_classes_without_truth_in_validation(shapes: Path, tmp_path: Path) -> None:
    """Categories that val has no object of do not count; those that its file does not list are refused."""
    root = draw_shapes(tmp_path)
    edit(root, "val", lambda i: i.update(annotations=[a for a in i["annotations"] if a["category_id"] == 3]))
    scores = make_trainer(root, tmp_path / "out").evaluate("val")
    assert set(scores) == {"loss", "ap", "ap50"} and 0 <= scores["ap"] <= scores["ap50"] <= 1
    edit(root, "val", lambda i: i.update(categories=[c for c in i["categories"] if c["id"] == 3]))
    with pytest.raises(ValueError, match="circle"):
        make_trainer(root, tmp_path / "out")


def test_evaluation_leaves_the_model_and_its_loss_alone(shapes: Path, tmp_path: Path) -> None:
    trainer = make_trainer(shapes, tmp_path)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    first = trainer.evaluate("val")
    assert trainer.model.training and trainer.evaluate("val") == first == trainer.evaluate("val", high_precision=True)
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())


def test_fsdp_is_refused() -> None:
    precision = parse_precisions(["fp32"], "unet")[0]
    with pytest.raises(ValueError, match=r"a Detector cannot train with --parallel fsdp[\s\S]*--parallel ddp"):
        parallel.wrap(Detector(3, (32, 32), scale=0.0625), precision, Ranks(0, 2, "fsdp"), torch.device("cpu"))
