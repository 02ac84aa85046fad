"""Measure a model: loss, Dice and mIoU over a split, and the bytes that autograd saves for backward.

    mIoU = mean over classes of TP / (TP + FP + FN);   Dice = mean over classes of 2 TP / (2 TP + FP + FN)

Both are computed over all pixels of the split except ignored ones, and over the classes that occur in labels or
predictions (torchmetrics: MulticlassJaccardIndex and MulticlassF1Score; a class's F1 is its Dice).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .losses import IGNORE, dice_ce

T = TypeVar("T")


@dataclass(frozen=True)
class Scores:
    """Hold the mean loss, Dice and mIoU of one split."""

    loss: float
    dice: float
    miou: float


def to_device(images: Tensor, targets: T, device: torch.device) -> tuple[Tensor, T]:
    """Move images, in channels_last, and the tensors of their targets to the device."""
    images = images.to(device, memory_format=torch.channels_last, non_blocking=True)
    return images, pytree.tree_map_only(Tensor, lambda t: t.to(device, non_blocking=True), targets)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    num_classes: int,
    device: torch.device,
    context: Callable[[], AbstractContextManager[None]] = nullcontext,
    loss: Callable[[Tensor, Tensor], Tensor] = dice_ce,
) -> Scores:
    """Score `model` over `loader`, with each forward inside `context()`; nullcontext means plain high precision.

    Args:
        loss: Computes the mean of a batch from (logits, masks).
    """
    # Imported when the first epoch is validated: it takes seconds, for which the first step need not wait.
    from torchmetrics import MetricCollection
    from torchmetrics.classification import MulticlassF1Score, MulticlassJaccardIndex

    metrics = MetricCollection(
        {
            "miou": MulticlassJaccardIndex(num_classes, ignore_index=IGNORE, validate_args=False),
            "dice": MulticlassF1Score(num_classes, average="macro", ignore_index=IGNORE, validate_args=False),
        }
    ).to(device)
    was_training = model.training
    model.eval()
    total, count = torch.zeros((), device=device), 0
    for batch in loader:
        images, masks = to_device(*batch, device)
        with context():
            logits = model(images)
        total += loss(logits, masks) * len(images)
        count += len(images)
        metrics.update(logits.argmax(dim=1), masks)
    model.train(was_training)
    values = metrics.compute()
    return Scores(float(total) / count, float(values["dice"]), float(values["miou"]))


def saved_bytes(
    model: nn.Module, images: Tensor, context: Callable[[], AbstractContextManager[None]], *inputs: Any
) -> int:
    """Count the bytes that autograd saves in one training forward.

    Every storage counts once; parameters and the input batch do not count.
    """
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), images)}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        # A tensor subclass has its storage in inner tensors.
        names = tensor.__tensor_flatten__()[0] if hasattr(tensor, "__tensor_flatten__") else None
        for part in [tensor] if names is None else [getattr(tensor, name) for name in names]:
            storage = part.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # keeps the storage alive, so that its address is not reused, but not the graph

    was_training = model.training
    # In evaluation mode, dropout and batch norms would save other tensors than in a training step.
    model.train()
    devices = [images.device] if images.is_cuda else []
    with (
        # dropout must not move the generator that training uses
        torch.random.fork_rng(devices=devices),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        context(),
    ):
        output = model(images, *inputs)
    model.train(was_training)
    del output
    return sum(kept.values())
