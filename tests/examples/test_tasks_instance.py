"""--task instance of examples/unet_coco: matching and loss by brute force, mask AP by hand, runs, bad input."""

from __future__ import annotations

import itertools
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from unet_coco import tracking
from unet_coco.average_precision import AveragePrecision
from unet_coco.checkpoint import load_checkpoint
from unet_coco.drawing import draw_objects
from unet_coco.instances import InstanceUNet, costs, found_instances, instance_loss, match
from unet_coco.train import main

from tests.examples.test_examples import same
from tests.examples.unet_coco_data import SMALL, draw_shapes

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # pycocotools on numpy 2
    pytest.mark.usefixtures("one_thread"),
]
TINY = ["--task", "instance", *SMALL]
NAMES = ("background", "circle", "square")
KEYS = {"train_loss", "val_loss", "ap", "ap50", "ap_hp", "step_ms", "saved_bytes", "nvfp4_flops_share"}


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_shapes(tmp_path_factory.mktemp("data"))


def drawn(count: int, labels: list[int] | None = None, size: int = 6) -> dict[str, Tensor]:
    """Random masks with their classes, 1 or 2."""
    return {
        "masks": torch.rand(count, size, size) > 0.6,
        "labels": torch.tensor(labels) if labels else torch.randint(1, 3, (count,)),
    }


# ---- matching and loss ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("channels", "objects"), [(5, 3), (3, 3), (2, 4), (4, 1)])
def test_matching_against_brute_force(channels: int, objects: int) -> None:
    for _ in range(10):
        cost = torch.randn(channels, objects)
        rows, columns = match(cost)
        few, many = min(channels, objects), max(channels, objects)
        table = cost if channels <= objects else cost.T
        best = min(sum(table[i, p].item() for i, p in enumerate(o)) for o in itertools.permutations(range(many), few))
        assert cost[rows, columns].sum().item() == pytest.approx(best, abs=1e-5)
        assert len(set(rows.tolist())) == len(set(columns.tolist())) == few


def test_matching_of_costs_that_are_not_finite() -> None:
    rows, columns = match(torch.tensor([[math.nan, 1.0], [2.0, math.inf]]))
    assert dict(zip(rows.tolist(), columns.tolist(), strict=True)) == {0: 1, 1: 0}


def pair_cost(logits: Tensor, true: Tensor) -> float:
    """What a pair adds, pixel by pixel."""
    p, t = logits.sigmoid().flatten().tolist(), true.flatten().tolist()
    bce = -sum(math.log(a if b else 1 - a) for a, b in zip(p, t, strict=True)) / len(p)
    overlap = sum(a for a, b in zip(p, t, strict=True) if b)
    return 5 * bce + 5 * (1 - (2 * overlap + 1) / (sum(p) + sum(t) + 1))


def test_loss_against_all_assignments() -> None:
    """The objects of each image on every possible choice of channels; the cheapest choice is what is learned."""
    masks, classes = torch.randn(3, 4, 6, 6), torch.randn(3, 4, 3)
    targets = [drawn(2), drawn(0), drawn(3)]
    p = classes.softmax(dim=2)
    total, pairs, entropy, weight = 0.0, 0, 0.0, 0.0
    for image, target in enumerate(targets):
        labels = target["labels"].tolist()
        table = [[pair_cost(masks[image, n], true) for true in target["masks"]] for n in range(4)]
        chosen = min(
            itertools.permutations(range(4), len(labels)),
            key=lambda order: sum(table[n][g] - 2 * p[image, n, labels[g]].item() for g, n in enumerate(order)),
        )
        total += sum(table[n][g] for g, n in enumerate(chosen))
        pairs += len(chosen)
        wanted = {n: labels[g] for g, n in enumerate(chosen)}
        for n in range(4):
            w = 1.0 if n in wanted else 0.1
            entropy -= w * math.log(p[image, n, wanted.get(n, 0)].item())
            weight += w
    found = instance_loss((masks, classes), targets)
    assert found.item() == pytest.approx(total / pairs + 2 * entropy / weight, rel=1e-5)


def test_costs_of_a_perfect_channel_are_least() -> None:
    target = drawn(3, [1, 2, 1])
    masks = torch.where(target["masks"], 20.0, -20.0)
    classes = torch.nn.functional.one_hot(target["labels"], 3) * 20.0
    of_masks, of_classes = costs(masks, classes, target)
    assert of_masks.diagonal().abs().max() < 1e-4 and (of_masks + of_classes).argmin(dim=0).tolist() == [0, 1, 2]
    torch.testing.assert_close(of_classes.diagonal(), torch.full((3,), -2.0))


def test_loss_without_objects_is_that_of_the_classes() -> None:
    masks, classes = torch.randn(2, 4, 6, 6, requires_grad=True), torch.randn(2, 4, 3, requires_grad=True)
    loss = instance_loss((masks, classes), [drawn(0), drawn(0)])
    loss.backward()
    assert loss.item() == pytest.approx(-2 * classes.log_softmax(dim=2)[:, :, 0].mean().item(), rel=1e-5)
    assert (
        masks.grad is not None and not masks.grad.any() and classes.grad is not None and classes.grad.isfinite().all()
    )


def test_more_objects_than_channels() -> None:
    loss = instance_loss((torch.randn(1, 2, 6, 6), torch.randn(1, 2, 3)), [drawn(5)])
    assert loss.isfinite()


def test_a_loss_that_is_not_finite_is_not_hidden() -> None:
    assert instance_loss((torch.full((1, 2, 6, 6), math.nan), torch.randn(1, 2, 3)), [drawn(1)]).isnan()


def test_without_scipy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(ValueError, match=r"scipy is not installed[\s\S]*pip install scipy"):
        match(torch.zeros(1, 1))


@pytest.mark.parametrize("size", [(16, 16), (33, 50)])
def test_shapes_and_names_of_the_model(size: tuple[int, int]) -> None:
    model = InstanceUNet(7, 4, 0.0625)
    masks, classes = model(torch.randn(2, 3, *size))
    assert masks.shape == (2, 7, *size) and classes.shape == (2, 7, 4)
    (masks.sum() + classes.sum()).backward()
    assert all(p.grad is not None for p in model.parameters()), "DDP waits for every parameter"
    assert {name.split(".")[0] for name, _ in model.named_parameters()} == {"stem", "down", "up", "head"}


# ---- scores ---------------------------------------------------------------------------------------------------------


def test_perfect_channels_have_precision_one() -> None:
    """Logits that are the truth, in an order of their own and with channels that show nothing, through to the AP."""
    target = {**drawn(3, [1, 2, 2], 16), "crowd": torch.zeros(3, dtype=torch.bool)}
    masks, classes = torch.full((1, 6, 16, 16), -9.0), torch.zeros(1, 6, 4)
    classes[0, :, 0] = 9
    for channel, thing in ((4, 0), (0, 1), (2, 2)):
        masks[0, channel] = torch.where(target["masks"][thing], 9.0, -9.0)
        classes[0, channel] = torch.eye(4)[target["labels"][thing]] * 9
    [found] = found_instances((masks, classes))
    assert found["labels"].tolist() == [2, 2, 1] and torch.equal(found["masks"], target["masks"][[1, 2, 0]])
    assert (found["scores"] > 0.99).all(), "empty channels are no instances"

    def score(predicted: dict[str, Tensor]) -> dict[str, float]:
        precision = AveragePrecision("segm", 4, (16, 16))
        precision.add([target], [predicted])
        return precision.compute()

    assert score(found) == pytest.approx({"ap": 1, "ap50": 1})
    assert score({key: value[:2] for key, value in found.items()}) == pytest.approx({"ap": 0.5, "ap50": 0.5})
    assert score({key: value[:0] for key, value in found.items()}) == {"ap": 0, "ap50": 0}
    crowd = {**target, "crowd": torch.tensor([True, False, False])}
    precision = AveragePrecision("segm", 4, (16, 16))
    precision.add([crowd], [found])
    assert precision.compute() == pytest.approx({"ap": 1, "ap50": 1}), "class 1 has a crowd alone, and does not count"


def test_pictures_show_masks_with_a_border() -> None:
    masks = torch.zeros(1, 16, 16, dtype=torch.bool)
    masks[0, 3:9, 4:9] = True
    images = torch.zeros(1, 3, 16, 16)
    [plain] = draw_objects(images, [{"masks": masks[:0], "labels": torch.zeros(0, dtype=torch.int64)}], NAMES)
    [picture] = draw_objects(images, [{"masks": masks, "labels": torch.tensor([1])}], NAMES)
    assert ((plain != picture).any(axis=2) == masks[0].numpy()).all()
    assert len({tuple(pixel) for pixel in picture[masks[0].numpy()].tolist()}) == 2


# ---- runs -----------------------------------------------------------------------------------------------------------


def check_rows(out: Path, rows: dict[str, Any], names: list[str]) -> None:
    assert json.loads((out / "summary.json").read_text()) == rows and list(rows) == names
    for row in rows.values():
        assert set(row) == KEYS and all(math.isfinite(value) for value in row.values())


def test_two_steps_in_fp32_and_nvfp4(shapes: Path, tmp_path: Path) -> None:
    options = ["--precisions", "fp32", "nvfp4", "--steps", "2", "--scale", "0.25", "--out", str(tmp_path)]
    rows = main(["--data", str(shapes), *TINY, *options])
    check_rows(tmp_path, rows, ["fp32", "nvfp4"])
    assert rows["fp32"]["nvfp4_flops_share"] == 0 and rows["nvfp4"]["nvfp4_flops_share"] > 0.5
    assert rows["nvfp4"]["train_loss"] == pytest.approx(rows["fp32"]["train_loss"], rel=0.1)
    assert "mask AP, weights in fp32" in (tmp_path / "table.md").read_text()
    assert all((tmp_path / name).is_file() for name in ("curves.png", "predictions.png", "nvfp4/last.pt"))


def test_loss_falls_and_resume_is_bit_exact(shapes: Path, tmp_path: Path) -> None:
    common = ["--data", str(shapes), *TINY, "--precisions", "fp32", "--epochs", "4", "--lr", "0.01", "--pictures", "0"]
    straight = main([*common, "--out", str(tmp_path / "straight")])
    for number, stop in enumerate([["--steps", "4"], ["--resume"]]):
        torch.manual_seed(number)  # what ran before must not matter
        resumed = main([*common, *stop, "--out", str(tmp_path / "resumed")])
    a, b = (load_checkpoint(tmp_path / name / "fp32" / "last.pt") for name in ("straight", "resumed"))
    same(a, b)
    for rows in (straight, resumed):
        rows["fp32"].pop("step_ms")
    assert straight == resumed
    losses = [row["train_loss"] for row in a["position"]["epochs"]]
    assert len(losses) == 4 and losses[-1] < 0.95 * losses[0]


def test_fewer_channels_than_objects_are_told_once(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tracking, "_told", set())
    options = ["--precisions", "fp32", "--instances", "2", "--steps", "1", "--out", str(tmp_path)]
    check_rows(tmp_path, main(["--data", str(shapes), *TINY, *options]), ["fp32"])
    assert capsys.readouterr().out.count("objects in an image, but --instances 2: the others stay unmatched") == 2
    with pytest.raises(ValueError, match="--instances is out of range"):
        main([*TINY, "--instances", "0"])
