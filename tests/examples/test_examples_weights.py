"""Weights of examples/unet_coco's loss: by class and by term, against torch, loops and hand-counted pixels."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from unet_coco import checkpoint, options
from unet_coco.class_weights import median_frequency
from unet_coco.data import load_data
from unet_coco.losses import dice_ce
from unet_coco.options import parse_options
from unet_coco.semantic import Semantic
from unet_coco.split import RawSplit
from unet_coco.train import main

from tests.examples.unet_coco_data import SMALL, write_masks

WEIGHTS = torch.tensor([0.5, 2.0, 0.0, 1.25])


def batch(classes: int = 4) -> tuple[Tensor, Tensor]:
    torch.manual_seed(5)
    target = torch.randint(0, classes - 1, (3, 6, 7))  # the last class never occurs
    target[0, :2] = 255
    return torch.randn(3, classes, 6, 7), target


def dice_by_class(logits: Tensor, target: Tensor) -> dict[int, Tensor]:
    """1 - D_c of the classes that occur."""
    valid = target != 255
    p = logits.softmax(1)
    losses = {}
    for c in range(logits.shape[1]):
        labelled = target == c
        if labelled.any():
            overlap, total = p[:, c][labelled].sum(), p[:, c][valid].sum() + labelled.sum()
            losses[c] = 1 - (2 * overlap + 1) / (total + 1)
    return losses


def unweighted(logits: Tensor, target: Tensor) -> Tensor:
    """The loss without weights, operation by operation."""
    valid = target != 255
    index = torch.where(valid, target, 0)
    log_p = F.log_softmax(logits, dim=1)
    log_p_y = log_p.gather(1, index[:, None])[:, 0]
    ce = -(log_p_y * valid).sum() / valid.sum().clamp(min=1)
    zeros = torch.zeros(logits.shape[1])
    p_y = log_p_y.exp() * valid
    by_image = [zeros.index_add(0, i.flatten(), p.flatten()) for i, p in zip(index, p_y, strict=True)]
    overlap = torch.stack(by_image).sum(0)
    labelled = zeros.index_add(0, index.flatten(), valid.flatten().float())
    dice = (2 * overlap + 1) / ((log_p.exp() * valid[:, None]).sum(dim=(0, 2, 3)) + labelled + 1)
    present = (labelled > 0).float()
    return ce + ((1 - dice) * present).sum() / present.sum().clamp(min=1)


@pytest.mark.parametrize("ignored", [False, True])
def test_defaults_are_the_unweighted_loss_bit_for_bit(ignored: bool) -> None:
    logits, target = batch()
    if ignored:
        target.fill_(255)
    a, b = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    found, expected = dice_ce(a, target), unweighted(b, target)
    found.backward()
    expected.backward()
    assert torch.equal(found, expected) and torch.equal(a.grad, b.grad)


def test_cross_entropy_is_torchs() -> None:
    logits, target = batch()
    for weight in (None, WEIGHTS):
        a, b = logits.clone().requires_grad_(), logits.clone().requires_grad_()
        found = dice_ce(a, target, class_weights=weight, dice_weight=0.0, ce_weight=3.0)
        expected = 3 * F.cross_entropy(b, target, weight=weight, ignore_index=255)
        found.backward()
        expected.backward()
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(a.grad, b.grad)


def test_dice_is_a_weighted_mean_over_the_classes_that_occur() -> None:
    logits, target = batch()
    losses = dice_by_class(logits, target)
    assert list(losses) == [0, 1, 2]
    expected = (0.5 * losses[0] + 2.0 * losses[1]) / 2.5
    found = dice_ce(logits, target, class_weights=WEIGHTS, ce_weight=0.0)
    torch.testing.assert_close(found, expected)
    ce = F.cross_entropy(logits, target, weight=WEIGHTS, ignore_index=255)
    both = dice_ce(logits, target, class_weights=WEIGHTS, dice_weight=0.3, ce_weight=0.7)
    torch.testing.assert_close(both, 0.3 * expected + 0.7 * ce)


def test_by_hand() -> None:
    """Two pixels of one image with p = (3/4, 1/4) and (1/2, 1/2), labels 0 and 1, weights 1 and 3."""
    logits = torch.tensor([[3.0, 1.0], [1.0, 1.0]]).log().T.reshape(1, 2, 1, 2)
    target = torch.tensor([[[0, 1]]])
    weights = torch.tensor([1.0, 3.0])
    ce = (np.log(4 / 3) + 3 * np.log(2)) / 4
    assert dice_ce(logits, target, class_weights=weights, dice_weight=0.0).item() == pytest.approx(ce)
    dice = (1 * (1 - 2.5 / 3.25) + 3 * (1 - 2 / 2.75)) / 4  # D_0 = (1.5 + 1) / (1.25 + 1 + 1), D_1 = 2 / (0.75 + 2)
    assert dice_ce(logits, target, class_weights=weights, ce_weight=0.0).item() == pytest.approx(dice)


def test_equal_weights_weigh_nothing() -> None:
    logits, target = batch()
    torch.testing.assert_close(dice_ce(logits, target, class_weights=torch.full((4,), 0.01)), dice_ce(logits, target))


def test_a_batch_of_weightless_pixels_gives_zero() -> None:
    logits, target = batch()
    logits.requires_grad_()
    loss = dice_ce(logits, torch.full_like(target, 2), class_weights=WEIGHTS)
    loss.backward()
    assert loss.item() == 0 and logits.grad is not None and not logits.grad.any()


def test_weights_of_another_shape() -> None:
    logits, target = batch()
    with pytest.raises(ValueError, match=r"class_weights do not fit[\s\S]*\(3,\) float32[\s\S]*4 classes"):
        dice_ce(logits, target, class_weights=torch.ones(3))


def split_of(*masks: Any) -> RawSplit:
    arrays = [np.array(mask, np.uint8) for mask in masks]
    return RawSplit("train", [f"{i}.png" for i in range(len(arrays))], lambda i: (Image.new("RGB", (1, 1)), arrays[i]))


def test_median_frequency_by_hand() -> None:
    """f_0 = 5/8 of both images, f_1 = 2/4 and f_2 = 1/4 of those that hold them; class 3 is absent."""
    split = split_of([[0, 0, 1], [1, 255, 255]], [[0, 0], [0, 2]])
    expected = [(1 / 2) / (5 / 8), 1.0, 2.0, 0.0]
    assert median_frequency(split, 4).tolist() == pytest.approx(expected)
    even = median_frequency(split_of([[0, 0, 0, 1]]), 2)  # the median of two is their mean
    assert even.tolist() == pytest.approx([0.5 / 0.75, 2.0]) and even.dtype == torch.float32


def test_labels_are_read_once() -> None:
    calls = []
    split = RawSplit("train", ["a", "b"], lambda i: (calls.append(i), np.zeros((2, 2), np.uint8)))  # type: ignore[arg-type,return-value,func-returns-value]
    assert median_frequency(split, 2).tolist() == [1.0, 0.0] and median_frequency(split, 3).tolist() == [1.0, 0.0, 0.0]
    assert calls == [0, 1]


def test_nothing_labelled() -> None:
    with pytest.raises(ValueError, match=r"nothing to count[\s\S]*2 images of the split 'train'[\s\S]*--class-weights"):
        median_frequency(split_of([[255]], [[255, 255]]), 3)


BAD_OPTIONS = {
    "negative": ["--dice-weight", "-0.5"],
    "nan": ["--ce-weight", "nan"],
    "infinite": ["--ce-weight", "inf"],
    "both zero": ["--ce-weight", "0", "--dice-weight", "0"],
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_weights_out_of_range(case: str) -> None:
    with pytest.raises(ValueError, match="--(dice|ce)-weight is out of range"):
        parse_options(BAD_OPTIONS[case])


def test_other_tasks_refuse_the_options() -> None:
    plain = dataclasses.replace(parse_options([]), task="another")
    options._check(plain)
    with pytest.raises(ValueError, match=r"--class-weights and --ce-weight cannot be used with --task another"):
        options._check(dataclasses.replace(plain, class_weights="median", ce_weight=2.0))


def test_the_task_uses_them(tmp_path: Path) -> None:
    data = load_data(write_masks(tmp_path), "masks", None)
    logits, target = batch(3)
    loss = Semantic(
        parse_options(["--class-weights", "median", "--dice-weight", "0.25", "--ce-weight", "2"]), data
    ).loss
    weights = median_frequency(data.train, 3)
    assert torch.equal(
        loss(logits, target), dice_ce(logits, target, class_weights=weights, dice_weight=0.25, ce_weight=2)
    )
    assert torch.equal(Semantic(parse_options([]), data).loss(logits, target), dice_ce(logits, target))


def test_a_run_and_its_identity(tmp_path: Path) -> None:
    root = write_masks(tmp_path)
    common = ["--data", str(root), "--layout", "masks", "--precisions", "fp32", "--steps", "2", *SMALL]
    common += ["--pictures", "0"]
    weighted = ["--class-weights", "median", "--ce-weight", "0.5"]
    rows = {}
    for name, extra in (("plain", []), ("weighted", weighted)):
        rows[name] = main([*common, *extra, "--out", str(tmp_path / name)])["fp32"]
    assert rows["plain"]["train_loss"] != rows["weighted"]["train_loss"]
    assert rows["plain"]["val_loss"] != rows["weighted"]["val_loss"]
    saved = {name: checkpoint.load_checkpoint(tmp_path / name / "fp32" / "last.pt")["identity"] for name in rows}
    assert saved["weighted"] == {**saved["plain"], "loss": {"class_weights": "median", "ce_weight": 0.5}}
    main([*common, *weighted, "--resume", "--out", str(tmp_path / "weighted")])
    for name, extra in (("plain", weighted), ("weighted", [])):
        with pytest.raises(ValueError, match=r"belongs to another run \(differing: loss\)"):
            main([*common, *extra, "--resume", "--out", str(tmp_path / name)])
