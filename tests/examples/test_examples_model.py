"""The UNet, loss, figures and options of examples/unet_coco, against loops and counting."""

from __future__ import annotations

import math
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from unet_coco.losses import dice_ce
from unet_coco.metrics import evaluate, saved_bytes
from unet_coco.options import choose_device
from unet_coco.precision import parse_precisions
from unet_coco.report import markdown_table
from unet_coco.train import main
from unet_coco.unet import UNet, group_count

from tests.examples.unet_coco_data import KEYS


def test_loss_against_loops() -> None:
    torch.manual_seed(1)
    logits = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    target = torch.randint(0, 2, (2, 4, 5))  # class 2 never occurs
    target[0, :2] = 255
    p = logits.softmax(1)
    spots = [(b, h, w) for b in range(2) for h in range(4) for w in range(5) if target[b, h, w] != 255]
    ce = sum(-math.log(p[b, target[b, h, w], h, w]) for b, h, w in spots) / len(spots)
    dice = 0.0
    for c in (0, 1):
        overlap = sum(float(p[b, c, h, w]) for b, h, w in spots if target[b, h, w] == c)
        total = sum(float(p[b, c, h, w]) + (target[b, h, w] == c).item() for b, h, w in spots)
        dice += (1 - (2 * overlap + 1) / (total + 1)) / 2
    assert dice_ce(logits, target).item() == pytest.approx(ce + dice, rel=1e-5)


def test_loss_without_a_valid_pixel_is_zero() -> None:
    logits = torch.randn(1, 3, 4, 4, requires_grad=True)
    loss = dice_ce(logits, torch.full((1, 4, 4), 255))
    loss.backward()
    assert loss.item() == 0 and logits.grad is not None and not logits.grad.any()


def test_evaluate_against_counting() -> None:
    torch.manual_seed(2)
    logits, masks = torch.randn(5, 4, 6, 6), torch.randint(0, 3, (5, 6, 6))  # class 3: predicted, never labelled
    masks[:, 0] = 255
    loader = [(logits[:3], masks[:3]), (logits[3:], masks[3:])]
    scores = evaluate(torch.nn.Identity(), loader, 4, torch.device("cpu"))
    predicted, valid = logits.argmax(1), masks != 255
    iou, dice = [], []
    for c in range(4):
        p, t = (predicted == c) & valid, (masks == c) & valid
        both, either = int((p & t).sum()), int((p | t).sum())
        iou.append(both / either)
        dice.append(2 * both / (both + either))
    assert scores.miou == pytest.approx(sum(iou) / 4, abs=1e-6) and scores.dice == pytest.approx(
        sum(dice) / 4, abs=1e-6
    )
    losses = [dice_ce(x, y).item() * len(x) for x, y in loader]
    assert scores.loss == pytest.approx(sum(losses) / 5, rel=1e-6)


@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("size", [(16, 16), (33, 50)])
def test_unet_shapes_and_names(activation: str, size: tuple[int, int]) -> None:
    model = UNet(5, scale=0.0625, activation=activation)
    x = torch.randn(2, 3, *size)
    assert model(x).shape == (2, 5, *size)
    names = dict(model.named_modules())
    assert names["head"].weight.shape[-2:] == (1, 1) and names["stem.0"].weight.shape[1] == 3
    assert [names[f"down.{i}.conv.0"].weight.shape[0] for i in range(4)] == [8, 16, 32, 64]
    assert all(c % group_count(c) == 0 for c in range(1, 1025))


def test_unet_refuses() -> None:
    with pytest.raises(ValueError, match="relu or silu"):
        UNet(2, activation="gelu")
    with pytest.raises(ValueError, match="nothing to train"):
        UNet(2, scale=0.001)


def test_saved_bytes_counts_each_storage_once() -> None:
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 1, bias=False), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 1, bias=False)
    )
    x = torch.randn(2, 3, 5, 5)
    activation = 2 * 8 * 5 * 5 * 4  # kept by ReLU (its result) and by the second convolution (its input): one storage
    assert saved_bytes(model, x, nullcontext) == activation


def test_table_has_one_line_per_precision() -> None:
    row = {key: 0.5 for key in KEYS}
    lines = markdown_table({"bf16": row, "nvfp4": {**row, "test_miou": 0.25}}).splitlines()
    assert len(lines) == 4 and len({len(line) for line in lines}) == 1 and "0.250" in lines[3]


BAD_OPTIONS = [
    (["--data", "no/such/folder"], "no/such/folder is missing"),
    (["--layout", "masks"], "needs data"),
    (["--epochs", "0"], "--epochs is out of range"),
    (["--scale", "-1"], "--scale is out of range"),
    (["--lr", "nan"], "--lr is out of range"),
    (["--image-size", "8", "8"], "--image-size is too small"),
    (["--device", "tpu"], "unknown device"),
    (["--precisions", "fp32", "fp32"], "twice"),
]


@pytest.mark.parametrize(
    ("options", "message"), BAD_OPTIONS, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_bad_options(options: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        main(["--precisions", "fp32", "--out", str(tmp_path / "out"), *options])
    assert not (tmp_path / "out").exists(), "nothing is written before the options are known to be good"


def test_absent_gpu() -> None:
    with pytest.raises(RuntimeError, match="cuda:99"):
        choose_device("cuda:99")


def test_unknown_precision_or_recipe() -> None:
    with pytest.raises(ValueError, match=r"fp5[\s\S]*fp32, fp16, bf16, nvfp4"):
        parse_precisions(["fp5"], "unet")
    with pytest.raises(ValueError, match="no_such_recipe"):
        parse_precisions(["nvfp4"], "no_such_recipe")
