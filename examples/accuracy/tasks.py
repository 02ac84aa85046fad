"""Define the networks and data of the study, at two sizes: `small` for a CPU, `full` for a GPU.

A task provides a model, batches of training data, its loss, and a score on the validation (CamVid) or test (CIFAR-10)
images: mIoU or accuracy, in percent.
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
from unet_coco.class_weights import median_frequency
from unet_coco.data import SegmentationDataset, load_data
from unet_coco.levers import parameter_groups
from unet_coco.losses import IGNORE, dice_ce
from unet_coco.order import TrainOrder, mix_seed
from unet_coco.unet import UNet

import te_nvfp4_cv as nv

from .cifar import augment, load_cifar, normalize
from .nets import mobilenet, resnet

Context = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Size:
    """Say how large a run is. `model` holds the network's arguments, `images` the height and width (CamVid)."""

    model: dict[str, Any]
    batch: int
    epochs: int
    lr: float
    images: tuple[int, int] = (32, 32)
    train: int | None = None
    test: int | None = None


TASKS: dict[str, dict[str, Size]] = {
    "camvid-unet": {
        "small": Size({"scale": 0.125}, 8, 20, 3e-3, (48, 64)),
        "full": Size({"scale": 0.5}, 16, 150, 1e-3, (176, 240)),
    },
    "cifar-resnet18": {
        "small": Size({"width": 16, "blocks": 2}, 64, 6, 0.05, train=5000, test=2000),
        "full": Size({"width": 64, "blocks": 2}, 128, 40, 0.1),
    },
    "cifar-resnet10": {
        "small": Size({"width": 16, "blocks": 1}, 64, 8, 0.05, train=5000, test=2000),
        "full": Size({"width": 16, "blocks": 1}, 128, 40, 0.1),
    },
    "cifar-mobilenet": {
        "small": Size({"width": 16}, 64, 8, 0.05, train=5000, test=2000),
        "full": Size({"width": 32}, 128, 40, 0.1),
    },
}
PRESETS = {"camvid-unet": "unet", "cifar-resnet18": "resnet", "cifar-resnet10": "resnet", "cifar-mobilenet": "resnet"}


class Segmentation:
    """Train the UNet on CamVid or any folder of masks, with AdamW on Dice + cross-entropy; the score is mIoU."""

    def __init__(self, root: Path, size: Size) -> None:
        data = load_data(root, "masks", None)
        self.size, self.classes = size, len(data.class_names)
        # Decoded once and flipped in batch(), because many epochs read the same few images.
        self.train = _decoded(SegmentationDataset(data.train, size.images, train=False))
        self.test = _decoded(SegmentationDataset(data.val, size.images, train=False))
        self.count = len(self.train[0])
        self.weights = median_frequency(data.train, self.classes)

    def model(self) -> nn.Module:
        return UNet(self.classes, **self.size.model)

    def optimizer(self, model: nn.Module, lr: float) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameter_groups(model, 1e-2), lr)

    def batch(self, keys: list[tuple[int, int]], seed: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the images and masks of the keys (epoch, index), half of them flipped."""
        index = torch.tensor([i for _, i in keys])
        draws = [torch.Generator().manual_seed(mix_seed(seed, epoch, i)) for epoch, i in keys]
        flip = torch.stack([torch.rand((), generator=g) < 0.5 for g in draws])
        x, y = self.train[0][index], self.train[1][index]
        x, y = torch.where(flip.view(-1, 1, 1, 1), x.flip(-1), x), torch.where(flip.view(-1, 1, 1), y.flip(-1), y)
        return x.to(device, memory_format=torch.channels_last), y.to(device)

    def loss(self, logits: Tensor, y: Tensor, class_weights: str = "", dice_weight: float = 1.0) -> Tensor:
        weights = None if not class_weights else self.weights.to(logits.device)
        return dice_ce(logits, y, class_weights=weights, dice_weight=dice_weight)

    def score(self, model: nn.Module, device: torch.device, context: Context) -> tuple[float, float]:
        """Return the mIoU in percent, over the classes in labels or predictions, and the mean cross-entropy."""
        table = torch.zeros(self.classes, self.classes, dtype=torch.int64)
        total, pixels = 0.0, 0
        for x, y in _chunks(*self.test, 2 * self.size.batch, device):
            with torch.no_grad(), context():
                logits = model(x).float()
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


def open_task(name: str, size: str, root: Path) -> Task:
    """Open the task of this name in TASKS, with its data."""
    chosen = TASKS[name][size]
    if name == "camvid-unet":
        return Segmentation(root, chosen)
    return Classification(root, chosen, mobilenet if "mobilenet" in name else resnet)


def preset_of(name: str) -> Any:
    """Load the recipe for the task's family of networks."""
    return nv.load_recipe(PRESETS[name])


def order_of(task: Task, seed: int) -> TrainOrder:
    """Return the order of training, as batches of (epoch, index) keys."""
    return TrainOrder(task.count, task.size.batch, seed)


def _decoded(dataset: SegmentationDataset) -> tuple[Tensor, Tensor]:
    pairs = [dataset[i] for i in range(len(dataset))]
    return torch.stack([x for x, _ in pairs]), torch.stack([y for _, y in pairs])


def _chunks(x: Tensor, y: Tensor, size: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    for start in range(0, len(x), size):
        part = x[start : start + size].to(device)
        yield part.contiguous(memory_format=torch.channels_last), y[start : start + size].to(device)
