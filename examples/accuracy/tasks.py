"""Define the networks and data of the study, at two sizes: `cpu` for one core of a CPU, `full` for a GPU.

A task provides a model, batches of training data, its loss, and a score on images that are not trained on: accuracy
(CIFAR-10), or mIoU (CamVid's validation and test images together; drawn shapes), in percent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from unet_coco.data import SegmentationDataset, load_data
from unet_coco.levers import parameter_groups
from unet_coco.losses import IGNORE, dice_ce
from unet_coco.order import TrainOrder, mix_seed
from unet_coco.shapes import ShapesSettings, ensure_shapes
from unet_coco.split import RawSplit
from unet_coco.unet import UNet

import te_nvfp4_cv as nv
from te_nvfp4_cv.errors import value_error

from .cifar import augment, load_cifar, normalize
from .nets import mobilenet, resnet
from .variants import Variant, variants

Context = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Size:
    """Say how large a run is.

    Attributes:
        model: Arguments of the network.
        lr: The learning rate after the warm-up.
        images: Height and width of the images, for segmentation.
        train: Number of training images; all of them if None.
        test: Number of images that are scored; all of them if None.
        zoom: Images are enlarged or reduced by up to this share, for segmentation, and moved and re-lit as well.
    """

    model: dict[str, Any]
    batch: int
    epochs: int
    lr: float
    images: tuple[int, int] = (32, 32)
    train: int | None = None
    test: int | None = None
    zoom: float = 0.0


TASKS: dict[str, dict[str, Size]] = {
    "cifar-resnet20": {
        "cpu": Size({"width": 16, "blocks": 3, "stages": 3}, 128, 10, 0.1),
        "full": Size({"width": 16, "blocks": 3, "stages": 3}, 128, 40, 0.1),
    },
    "shapes-unet": {
        "cpu": Size({"scale": 0.25}, 16, 12, 3e-3, (96, 96), train=1024, test=512),
        "full": Size({"scale": 0.5}, 16, 24, 1e-3, (192, 192), train=2048, test=512),
    },
    "camvid-unet": {
        "cpu": Size({"scale": 0.25}, 8, 60, 3e-3, (96, 128), zoom=0.25),
        "full": Size({"scale": 0.5}, 16, 150, 1e-3, (176, 240), zoom=0.25),
    },
    "cifar-resnet18": {
        "cpu": Size({"width": 32, "blocks": 2}, 128, 8, 0.1, train=25_000),
        "full": Size({"width": 64, "blocks": 2}, 128, 40, 0.1),
    },
    "cifar-mobilenet": {
        "cpu": Size({"width": 16}, 128, 8, 0.1, train=25_000),
        "full": Size({"width": 32}, 128, 40, 0.1),
    },
}
PRESETS = {task: "resnet" if task.startswith("cifar") else "unet" for task in TASKS}
BLOCKS = {
    "cifar-resnet20": ("stages.0.0", "stages.2.2"),
    "cifar-resnet18": ("stages.0.0", "stages.3.1"),
    "cifar-mobilenet": ("stages.0", "stages.6"),
    "shapes-unet": ("stem", "up.3"),
    "camvid-unet": ("stem", "up.3"),
}


class Segmentation:
    """Train the UNet on images and masks, with AdamW on Dice + cross-entropy; the score is mIoU.

    Images are decoded once and augmented in batch(), because many epochs read the same few images.
    """

    def __init__(self, train: RawSplit, held_out: list[RawSplit], classes: int, size: Size) -> None:
        self.size, self.classes = size, classes
        self.train = _decoded([train], size)
        self.test = _decoded(held_out, size)
        self.count = len(self.train[0])

    def model(self) -> nn.Module:
        return UNet(self.classes, **self.size.model)

    def optimizer(self, model: nn.Module, lr: float) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameter_groups(model, 1e-2), lr)

    def batch(self, keys: list[tuple[int, int]], seed: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the images and masks of the keys (epoch, index), augmented by numbers of (seed, epoch, index)."""
        index = torch.tensor([i for _, i in keys])
        draws = [torch.Generator().manual_seed(mix_seed(seed, epoch, i)) for epoch, i in keys]
        numbers = torch.stack([torch.rand(6, generator=g) for g in draws])
        x, y = _augmented(self.train[0][index], self.train[1][index].long(), numbers, self.size.zoom)
        return x.to(device, memory_format=torch.channels_last), y.to(device)

    def loss(self, logits: Tensor, y: Tensor) -> Tensor:
        return dice_ce(logits, y)

    def score(self, model: nn.Module, device: torch.device, context: Context) -> tuple[float, float]:
        """Return the mIoU in percent, over the classes in labels or predictions, and the mean cross-entropy."""
        table = torch.zeros(self.classes, self.classes, dtype=torch.int64)
        total, pixels = 0.0, 0
        for x, y in _chunks(*self.test, 2 * self.size.batch, device):
            with torch.no_grad(), context():
                logits = model(x).float()
            y = y.long()
            total += float(F.cross_entropy(logits, y, ignore_index=IGNORE, reduction="sum"))
            valid = y != IGNORE
            pixels += int(valid.sum())
            pairs = y[valid] * self.classes + logits.argmax(1)[valid]
            table += torch.bincount(pairs.cpu(), minlength=self.classes**2).view(self.classes, -1)
        union = table.sum(0) + table.sum(1) - table.diag()
        return 100 * float((table.diag()[union > 0] / union[union > 0]).mean()), total / pixels


class Classification:
    """Train on CIFAR-10 with SGD, Nesterov momentum and cross-entropy; the score is accuracy."""

    def __init__(self, root: Path, size: Size, build: Callable[..., nn.Module]) -> None:
        self.size, self.build = size, build
        train, test = load_cifar(root, size.train, size.test)
        self.train, self.test, self.count = train, (test.images, test.labels), len(train.labels)

    def model(self) -> nn.Module:
        return self.build(**self.size.model)

    def optimizer(self, model: nn.Module, lr: float) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameter_groups(model, 5e-4), lr, momentum=0.9, nesterov=True)

    def batch(self, keys: list[tuple[int, int]], seed: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the images of the keys (epoch, index), cropped and flipped, and their labels."""
        index = torch.tensor([i for _, i in keys])
        generator = torch.Generator().manual_seed(mix_seed(seed, keys[0][0], keys[0][1]))
        x = augment(self.train.images[index].to(device), generator)
        return normalize(x), self.train.labels[index].to(device)

    def loss(self, logits: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(logits.float(), y)

    def score(self, model: nn.Module, device: torch.device, context: Context) -> tuple[float, float]:
        """Return the accuracy in percent and the mean cross-entropy."""
        right, total = 0, 0.0
        for x, y in _chunks(*self.test, 4 * self.size.batch, device):
            with torch.no_grad(), context():
                logits = model(normalize(x)).float()
            right += int((logits.argmax(1) == y).sum())
            total += float(F.cross_entropy(logits, y, reduction="sum"))
        return 100 * right / len(self.test[1]), total / len(self.test[1])


Task = Segmentation | Classification


def open_task(name: str, size: str, data: Path, drawn: Path) -> Task:
    """Open the task of this name in TASKS.

    Args:
        data: The folder that holds `cifar10` and `camvid` (or `camvid_small`).
        drawn: The folder for drawn shapes, which are drawn if they are not there.
    Raises:
        ValueError: If a folder or a file is missing.
    """
    chosen = TASKS[name][size]
    if name.startswith("cifar"):
        return Classification(data / "cifar10", chosen, mobilenet if "mobilenet" in name else resnet)
    if name == "shapes-unet":
        assert chosen.train is not None and chosen.test is not None
        settings = ShapesSettings(chosen.train, chosen.test, *chosen.images)
        found = load_data(ensure_shapes(drawn, settings), "coco", None)
        return Segmentation(found.train, [found.val], len(found.class_names), chosen)
    folders = [data / folder for folder in ("camvid", "camvid_small") if (data / folder).is_dir()]
    if not folders:
        raise value_error(
            f"CamVid: {data} does not hold it.",
            got="neither a folder camvid nor a folder camvid_small",
            needs="images and masks: camvid/{train,val,test}/{images,labels}",
            fix="name the folder above it: --data FOLDER",
        )
    found = load_data(folders[0], "masks", None)
    held_out = [found.val] if found.test is None else [found.val, found.test]
    return Segmentation(found.train, held_out, len(found.class_names), chosen)


def preset_of(task: str) -> Any:
    """Load the recipe for the task's family of networks."""
    return nv.load_recipe(PRESETS[task])


def variants_of(task: str) -> dict[str, Variant]:
    """Return the variants of a task by name."""
    return variants(preset_of(task), BLOCKS[task])


def order_of(task: Task, seed: int) -> TrainOrder:
    """Return the order of training, as batches of (epoch, index) keys."""
    return TrainOrder(task.count, task.size.batch, seed)


def _decoded(splits: list[RawSplit], size: Size) -> tuple[Tensor, Tensor]:
    """Return images [N, 3, H, W] fp32 and masks [N, H, W] uint8."""
    datasets = [SegmentationDataset(split, size.images, train=False) for split in splits]
    pairs = [dataset[i] for dataset in datasets for i in range(len(dataset))]
    return torch.stack([x for x, _ in pairs]), torch.stack([y.to(torch.uint8) for _, y in pairs])


def _augmented(x: Tensor, y: Tensor, numbers: Tensor, zoom: float) -> tuple[Tensor, Tensor]:
    """Flip half of the images and masks; with a zoom, also enlarge or reduce, move and re-light them.

    Args:
        numbers: [B, 6] in [0, 1): for the flip, the zoom, two shifts, contrast and brightness.
    """
    flip = numbers[:, 0] < 0.5
    if not zoom:
        return torch.where(flip.view(-1, 1, 1, 1), x.flip(-1), x), torch.where(flip.view(-1, 1, 1), y.flip(-1), y)
    scale = (1 + zoom) ** (1 - 2 * numbers[:, 1])
    theta = torch.zeros(len(x), 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = torch.where(flip, -scale, scale), scale
    theta[:, :, 2] = zoom * (2 * numbers[:, 2:4] - 1)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    # Beyond the frame the image is its mean colour. Masks are shifted by one, so that 0 means "beyond the frame".
    x = F.grid_sample(x, grid, align_corners=False)
    moved = F.grid_sample((y[:, None] + 1).float(), grid, mode="nearest", align_corners=False)[:, 0].long() - 1
    light = 1 + 0.4 * (numbers[:, 4:] - 0.5)
    x = x * light[:, :1, None, None] + (light[:, 1:, None, None] - 1)
    return x, torch.where(moved < 0, IGNORE, moved)


def _chunks(x: Tensor, y: Tensor, size: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    for start in range(0, len(x), size):
        part = x[start : start + size].to(device)
        yield part.contiguous(memory_format=torch.channels_last), y[start : start + size].to(device)
