"""What a task is to the Trainer: its model, its data, its loss, its scores and its pictures.

    step        output = model(images, *task.inputs(targets));   loss = task.loss(output, targets, group)
    evaluation  {"loss": mean loss, score: value, ...};   task.titles names the scores, task.main is the one to compare

A target is what the collate function makes of the data set's second part: a tensor of masks, or a list of tables, one
per image. On several ranks every rank has its part of the batch; the loss returned is that of the whole batch on all of
them, and the average of the ranks' gradients is its gradient. A task refuses, when it is made, data that it cannot
learn from.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from .options import Settings
from .split import RawSplit, SegmentationData

Context = Callable[[], AbstractContextManager[None]]
Batches = Iterable[tuple[Tensor, Any]]


class Task(ABC):
    """One thing to learn, from the data that were opened.

    Attributes:
        titles: the scores' names in tables, by their keys in summary.json.
        main: the key of the score that the curves show and that is measured with the weights in fp32 too.
        class_weights: fp32 [classes] that the loss weighs classes with, or None.
        collate: what a loader makes of a list of items; None stacks them.
    """

    titles: Mapping[str, str]
    main: str
    class_weights: Tensor | None = None
    collate: Callable[[list[Any]], Any] | None = None

    def __init__(self, settings: Settings, data: SegmentationData) -> None:
        self.settings, self.class_names = settings, data.class_names

    @abstractmethod
    def architecture(self) -> dict[str, Any]:
        """What must be equal for a checkpoint's weights to fit and to mean the same: plain values."""

    @abstractmethod
    def model(self) -> nn.Module:
        """A new model, drawn from torch's generator."""

    @abstractmethod
    def dataset(self, raw: RawSplit, train: bool) -> Dataset[tuple[Tensor, Any]]:
        """The split made ready; len() is the number of its images."""

    def inputs(self, targets: Any) -> tuple[Any, ...]:
        """What the model takes beside the images while it trains."""
        return ()

    @abstractmethod
    def loss(self, output: Any, targets: Any, group: Any = None) -> Tensor:
        """The loss of the batch whose parts lie on the ranks of `group`, in fp32."""

    @abstractmethod
    def evaluate(self, model: nn.Module, batches: Batches, device: torch.device, context: Context) -> dict[str, float]:
        """The "loss" and every score over a split, each forward inside `context()`; the model's mode is put back."""

    @abstractmethod
    def draw_truth(self, images: Tensor, targets: Any) -> list[np.ndarray]:
        """One picture [H, W, 3] uint8 per image."""

    @abstractmethod
    def draw_predicted(self, model: nn.Module, images: Tensor, targets: Any, context: Context) -> list[np.ndarray]:
        """As draw_truth, of what the model says."""
