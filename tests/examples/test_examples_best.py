"""best.pt, --ema and --augment: what is saved and validated, and that a resume stays bit-exact with all of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("torchvision")

from unet_coco import resumable
from unet_coco.average import Average
from unet_coco.checkpoint import load_checkpoint
from unet_coco.data import SegmentationDataset, load_data
from unet_coco.initial import read_weights
from unet_coco.losses import IGNORE
from unet_coco.objects import ObjectDataset
from unet_coco.options import parse_options
from unet_coco.shapes import ShapesSettings, ensure_shapes
from unet_coco.train import main

from te_nvfp4_cv import telemetry
from tests.examples.test_examples import same
from tests.examples.unet_coco_data import SMALL

ALL = ("flip", "scale", "crop", "colour")


def drawn(folder: Path) -> Path:
    return ensure_shapes(folder / "data", ShapesSettings(train=8, val=4, height=48, width=48))


def test_a_resume_is_exact_with_an_average_and_every_augmentation_and_the_best_is_kept(tmp_path: Path) -> None:
    options = ["--data", str(drawn(tmp_path)), *SMALL, "--precisions", "nvfp4", "--compute", "fp32", "--epochs", "3"]
    options += ["--ema", "0.5", "--augment", *ALL, "--lr", "0.01"]
    main([*options, "--out", str(tmp_path / "whole")])
    main([*options, "--out", str(tmp_path / "half"), "--steps", "3"])
    main([*options, "--out", str(tmp_path / "half"), "--resume"])
    whole, half = tmp_path / "whole" / "nvfp4", tmp_path / "half" / "nvfp4"
    for name in ("last.pt", "best.pt"):
        same(load_checkpoint(whole / name), load_checkpoint(half / name), name)
    last, best = load_checkpoint(whole / "last.pt"), load_checkpoint(whole / "best.pt")
    scores = [row["miou"] for row in last["position"]["epochs"]]
    assert len(scores) == 3 and best["position"]["epochs"][-1]["miou"] == max(scores)
    assert best["position"]["epoch"] == scores.index(max(scores)) + 1
    assert any(not torch.equal(last["ema"][name], last["model"][name]) for name in last["ema"])
    same({name: t for name, t in read_weights(whole / "best.pt").items() if name in best["ema"]}, best["ema"])
    rows = json.loads((tmp_path / "whole" / "summary.json").read_text())
    assert rows["nvfp4"]["miou"] == scores[-1]


def test_the_best_copied_over_the_last_is_where_a_resume_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run then ends in the bits in which it ended before, telemetry included, whatever came after the best."""
    monkeypatch.setattr("unet_coco.train.show_telemetry", lambda *_: [])  # drawing takes longer than the runs
    options = ["--data", str(drawn(tmp_path)), *SMALL, "--precisions", "nvfp4", "--compute", "fp32", "--epochs", "3"]
    options += ["--lr", "0.03", "--pictures", "0", "--telemetry-every", "2", "--out", str(tmp_path / "run")]
    main(options)
    folder = tmp_path / "run" / "nvfp4"
    whole, best = load_checkpoint(folder / "last.pt"), load_checkpoint(folder / "best.pt")
    sampled = telemetry.read(folder / "telemetry.jsonl")
    assert best["position"]["step"] < whole["position"]["step"] == 6, "or this test proves nothing"
    shutil.copyfile(folder / "best.pt", folder / "last.pt")
    main([*options, "--resume"])
    same(load_checkpoint(folder / "last.pt"), whole)
    again = telemetry.read(folder / "telemetry.jsonl")
    for run in (sampled, again):
        for layers in run.steps.values():
            for layer in layers.values():  # they compare codes with those of the sample before, which a resume has not
                layer.pop("flip_rate", None), layer.pop("oscillation", None)
    assert again.steps == sampled.steps and again.scalars == sampled.scalars


def test_an_average_is_what_its_formula_says_and_gives_the_weights_back() -> None:
    model = torch.nn.Linear(3, 2)
    average, expected = Average(model, 0.75), None
    for step in range(3):
        with torch.no_grad():
            model.weight.normal_()
        average.update(step)
        now = model.weight.detach().clone()
        expected = now if expected is None else 0.75 * expected + 0.25 * now
    assert expected is not None and torch.allclose(average.values["weight"], expected)
    with pytest.raises(RuntimeError, match="inside"), average.used():
        assert torch.equal(model.weight, average.values["weight"])
        raise RuntimeError("inside")
    assert torch.equal(model.weight, now), "bit for bit, after an error, too"


def test_masks_and_boxes_follow_the_image(tmp_path: Path) -> None:
    """A pixel is of an object exactly where it was: here an image is its own mask, and a box is that of its mask."""
    raw = load_data(drawn(tmp_path), "coco", None).train
    items: list[Any] = []
    for names in (("flip",), ("scale",), ("crop",), ALL):
        sets = [ObjectDataset(raw, (32, 32), True, 0, True, names) for _ in range(2)]
        for index in range(len(raw)):
            (image, target), (again, _) = (made[1, index] for made in sets)
            assert torch.equal(image, again), "a function of seed, epoch and index"
            assert image.shape == (3, 32, 32) and target["masks"].shape == (len(target["boxes"]), 32, 32)
            for box, mask in zip(target["boxes"], target["masks"], strict=True):
                y, x = mask.nonzero().unbind(1)
                seen = torch.stack([x.min(), y.min(), x.max() + 1, y.max() + 1])
                assert (box - seen).abs().max() <= 6, (names, box, seen)  # what is hidden belongs to the box only
            items.append(image)
    plain = ObjectDataset(raw, (32, 32), True, 0, True, ("flip",))
    assert all(torch.equal(plain[1, index][0], items[index]) for index in range(len(raw)))
    cropped = [SegmentationDataset(raw, (32, 32), True, 0, names)[1, 0] for names in ((), ("crop",))]
    edges = torch.cat([SegmentationDataset(raw, (32, 32), True, 0, ("scale",))[1, i][1][0] for i in range(len(raw))])
    assert 0.2 < (edges == IGNORE).float().mean() < 0.9, "nothing is learnt of the canvas around a smaller image"
    assert not torch.equal(cropped[0][0], cropped[1][0]) and cropped[1][1].shape == (32, 32)
    assert set(cropped[1][1].unique().tolist()) <= {*range(5), 255}


def test_what_does_not_go_together() -> None:
    with pytest.raises(ValueError, match="--parallel fsdp does not go with --ema"):
        parse_options(["--parallel", "fsdp", "--ema", "0.9"])
    with pytest.raises(ValueError, match="--ema is out of range"):
        parse_options(["--ema", "1"])
    assert parse_options(["--augment"]).augment == () and parse_options([]).augment == ("flip",)


def test_a_kill_between_two_checkpoints_does_not_lose_the_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The best epoch ends in two files. If the process dies after the first one, the resume writes the other."""
    options = ["--data", str(drawn(tmp_path)), *SMALL, "--precisions", "fp32", "--epochs", "1", "--pictures", "0"]
    options += ["--out", str(tmp_path / "run")]
    save = resumable.save_checkpoint

    def killed(path: Path, state: dict[str, Any]) -> None:
        save(path, state)
        raise KeyboardInterrupt("killed")

    monkeypatch.setattr(resumable, "save_checkpoint", killed)
    with pytest.raises(KeyboardInterrupt):
        main(options)
    monkeypatch.setattr(resumable, "save_checkpoint", save)
    main([*options, "--resume"])
    last, best = (load_checkpoint(tmp_path / "run" / "fp32" / name) for name in ("last.pt", "best.pt"))
    assert best["position"]["epochs"] == last["position"]["epochs"] and len(best["position"]["epochs"]) == 1
