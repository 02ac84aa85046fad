"""Average the weights of a training over its steps (--ema DECAY): average <- DECAY average + (1 - DECAY) weights.

The average is what is validated, tested and drawn, in the precision of the training; training itself never sees it.
It is part of every checkpoint, so that a resume stays bit-exact.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class Average:
    """Hold the average of a model's parameters, which begins as the weights after the first step."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._parameters = dict(model.named_parameters())
        self._step = get_ema_multi_avg_fn(decay)
        self.values: dict[str, Tensor] = {name: p.detach().clone() for name, p in self._parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after step number `step`, counted from 0."""
        averages, weights = list(self.values.values()), [p.detach() for p in self._parameters.values()]
        if step:
            self._step(averages, weights, step)
        else:
            torch._foreach_copy_(averages, weights)

    @contextlib.contextmanager
    def used(self) -> Iterator[None]:
        """Put the average in place of the weights inside; afterwards the weights are back, bit for bit."""
        kept = {name: p.detach().clone() for name, p in self._parameters.items()}
        self._put(self.values)
        try:
            yield
        finally:
            self._put(kept)

    def load(self, values: dict[str, Tensor]) -> None:
        """Continue from the average of a checkpoint."""
        for name, value in self.values.items():
            value.copy_(values[name])

    @torch.no_grad()
    def _put(self, values: dict[str, Tensor]) -> None:
        for name, p in self._parameters.items():
            p.copy_(values[name])
