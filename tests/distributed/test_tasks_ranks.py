"""Instance segmentation and detection under torchrun: the curves of one process, FSDP2 where it works, else refused.

BAND    how far a step's loss may lie from the single process's with the same batches, relative: fp32 without
        dropout, so that only the order of the sums differs
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from unet_coco import ranks as unet_ranks
from unet_coco.checkpoint import load_checkpoint
from unet_coco.data import load_data
from unet_coco.instances import instance_loss
from unet_coco.options import parse_options
from unet_coco.precision import parse_precisions
from unet_coco.ranks import whole_batch
from unet_coco.train import compare

from tests.distributed.launch import Ranks, ranks_test
from tests.examples.unet_coco_data import SMALL, draw_shapes

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools on numpy 2

BAND = 1e-4
TINY = [*SMALL, "--dropout", "0", "--log-every", "1", "--pictures", "0", "--steps", "3", "--precisions", "fp32"]


def curve(ranks: Ranks, data: Path, name: str, place: unet_ranks.Ranks, *options: str) -> list[float]:
    """The losses of three steps."""
    out = ranks.folder / name
    settings = parse_options(["--data", str(data), "--out", str(out), *TINY, *options])
    out.mkdir(parents=True, exist_ok=True)
    precisions = parse_precisions(list(settings.precisions), settings.recipe)
    compare(settings, precisions, load_data(data, "coco", None), ranks.device, place)
    if place.parallel:
        torch.distributed.barrier()  # until rank 0 has written
    return [row["loss"] for row in json.loads((out / "history.json").read_text())["fp32"]["curve"]]


def like_one_process(ranks: Ranks, task: str, parallel: str) -> None:
    place = unet_ranks.Ranks(ranks.rank, ranks.world, parallel)
    data = place.first(lambda: draw_shapes(ranks.folder.parent))
    straight = place.first(lambda: curve(ranks, data, "alone", unet_ranks.Ranks(), "--task", task))
    shared = curve(ranks, data, parallel, place, "--task", task, "--parallel", parallel)
    assert len(shared) == 3 and shared == pytest.approx(straight, rel=BAND)
    states = [load_checkpoint(ranks.folder / name / "fp32" / "last.pt") for name in ("alone", parallel)]
    assert states[0]["identity"] == states[1]["identity"]
    for name, w in states[0]["model"].items():
        assert states[1]["model"][name].shape == w.shape
    epochs = [state["position"]["epochs"][0] for state in states]
    assert epochs[1]["val_loss"] == pytest.approx(epochs[0]["val_loss"], rel=10 * BAND)


def on_ranks_instance_ddp(ranks: Ranks) -> None:
    like_one_process(ranks, "instance", "ddp")


def on_ranks_instance_fsdp(ranks: Ranks) -> None:
    like_one_process(ranks, "instance", "fsdp")


def on_ranks_detection_ddp(ranks: Ranks) -> None:
    like_one_process(ranks, "detection", "ddp")


def on_ranks_detection_fsdp_is_refused(ranks: Ranks) -> None:
    place = unet_ranks.Ranks(ranks.rank, ranks.world, "fsdp")
    data = place.first(lambda: draw_shapes(ranks.folder.parent))
    with pytest.raises(ValueError, match="a Detector cannot train with --parallel fsdp"):
        curve(ranks, data, "fsdp", place, "--task", "detection", "--parallel", "fsdp")


def on_ranks_instance_loss_is_that_of_the_whole_batch(ranks: Ranks) -> None:
    """The parts have different numbers of objects; the last image has none."""
    torch.manual_seed(0)
    count = 2 * ranks.world
    masks, classes = torch.randn(count, 5, 8, 8), torch.randn(count, 5, 3)
    targets = [{"masks": torch.rand(n, 8, 8) > 0.5, "labels": torch.randint(1, 3, (n,))} for n in [*range(1, count), 0]]
    whole = masks.clone().requires_grad_(), classes.clone().requires_grad_()
    expected = instance_loss(whole, targets)
    expected.backward()
    mine = slice(2 * ranks.rank, 2 * ranks.rank + 2)
    part = masks[mine].to(ranks.device).requires_grad_(), classes[mine].to(ranks.device).requires_grad_()
    own = [{key: value.to(ranks.device) for key, value in target.items()} for target in targets[mine]]
    found = instance_loss(part, own, ranks.group)
    found.backward()
    torch.testing.assert_close(found.cpu(), expected)
    for a, b in zip(part, whole, strict=True):  # DDP divides by the number of ranks
        torch.testing.assert_close(a.grad.cpu() / ranks.world, b.grad[mine])


def on_ranks_mean_of_the_losses(ranks: Ranks) -> None:
    x = torch.tensor(float(ranks.rank), device=ranks.device, requires_grad=True)
    loss = whole_batch(3 * x, ranks.group)
    loss.backward()
    assert loss.item() == 3 * (ranks.world - 1) / 2 and x.grad.item() == 3


test_on_ranks = ranks_test(globals(), worlds=(2,))
