"""Define what a task provides to the Trainer: its model, data, loss, scores and pictures.

    step        output = model(images, *task.inputs(targets));   loss = task.loss(output, targets, group)
    evaluation  {"loss": mean loss, score: value, ...};   task.titles names the scores, task.main is the one to compare

Targets are what the collate function makes from the second part of the data set's items: a tensor of masks, or a list
of tables, one per image. With several ranks, every rank has its part of the batch. The loss is that of the whole batch
on all of them, and the average of the ranks' gradients is its gradient. Data that a task cannot learn from is refused
when the task is created.
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
    """Define one thing to learn from the opened data.

    Attributes:
        titles: Names of the scores in tables, by their keys in summary.json.
        main: Key of the score that the curves show and that is measured with the weights in fp32 too.
        ignores: Whether pixels may be ignored; pictures show them hatched.
        class_weights: Weights of the classes in the loss, fp32 [classes], or None.
        collate: Makes a batch from a list of items. If None, items are stacked.
    """

    titles: Mapping[str, str]
    main: str
    ignores = False
    class_weights: Tensor | None = None
    collate: Callable[[list[Any]], Any] | None = None

    def __init__(self, settings: Settings, data: SegmentationData) -> None:
        self.settings, self.class_names = settings, data.class_names

    @abstractmethod
    def architecture(self) -> dict[str, Any]:
        """Return plain values that must be equal for a checkpoint's weights to fit and to mean the same."""

    @abstractmethod
    def model(self) -> nn.Module:
        """Build a new model with weights from torch's generator."""

    def load_pretrained(self, model: nn.Module) -> None:
        """Give a new model the trained weights that the task's options name; most tasks have none."""
        return

    @abstractmethod
    def dataset(self, raw: RawSplit, train: bool) -> Dataset[tuple[Tensor, Any]]:
        """Prepare the split for the model; len() is the number of its images."""

    def inputs(self, targets: Any) -> tuple[Any, ...]:
        """Return what the model takes in addition to the images while it trains."""
        return ()

    @abstractmethod
    def loss(self, output: Any, targets: Any, group: Any = None) -> Tensor:
        """Compute the loss, in fp32, of the batch whose parts are on the ranks of `group`."""

    @abstractmethod
    def evaluate(self, model: nn.Module, batches: Batches, device: torch.device, context: Context) -> dict[str, float]:
        """Compute the "loss" and every score over a split, with each forward inside `context()`.

        The model's mode is restored afterwards.
        """

    @abstractmethod
    def draw_truth(self, images: Tensor, targets: Any) -> list[np.ndarray]:
        """Draw the truth, one picture [H, W, 3] uint8 per image."""

    @abstractmethod
    def draw_predicted(self, model: nn.Module, images: Tensor, targets: Any, context: Context) -> list[np.ndarray]:
        """Draw the model's predictions, one picture [H, W, 3] uint8 per image."""
