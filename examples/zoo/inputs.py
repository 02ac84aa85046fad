"""Inputs of fixed random numbers, losses, and the function by which the tables add a model to the zoo."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from te_nvfp4_cv.cli.trial.subject import Subject, distance, normal

Models = dict[str, Subject]


def adder(library: str, models: Models) -> Callable[..., None]:
    """Return add(name, build, *inputs, ...), which puts a model of this library into the table."""

    def add(
        name: str,
        build: Callable[[], nn.Module],
        *args: Any,
        loss: Callable[[Any], Tensor] = distance,
        evaluation: tuple[tuple[Any, ...], Mapping[str, Any]] | None = None,
        **kwargs: Any,
    ) -> None:
        full = f"{library}/{name}"
        assert full not in models, f"{full} is there twice"
        models[full] = Subject(full, build, args, kwargs, loss, evaluation)

    return add


def classes(count: int, of: int = 10) -> Tensor:
    """Return labels: 0, 1, 2, ... below `of`."""
    return torch.arange(count) % of


def pixel_classes(*shape: int, of: int = 4) -> Tensor:
    """Return a class for each pixel."""
    return torch.randint(of, shape, generator=torch.Generator().manual_seed(0))


def masks(count: int, size: int) -> Tensor:
    """Return masks of random pixels, 0 or 1."""
    return (normal((count, size, size)) > 0).float()


def own_loss(output: Any) -> Tensor:
    """Return the loss that the model computed itself."""
    return output["loss"] if isinstance(output, Mapping) else output.loss


def sum_of_losses(output: Any) -> Tensor:
    """Return the sum of a dict of losses."""
    return torch.stack([value for value in output.values()]).sum()


__all__ = [
    "Models", "adder", "classes", "distance", "masks", "normal", "own_loss", "pixel_classes", "sum_of_losses",
]
