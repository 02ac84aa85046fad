"""Evaluate a loss and its gradient once, and leave nothing behind.

    error = |g - g_hp| / |g_hp|;   cosine = <g, g_hp> / (|g| |g_hp|)      over all parameters, in fp64

Every evaluation starts from the same seed, buffers and flags, and puts them back; gradients do not touch `.grad`.
Python's and numpy's generators are seeded too. A loss that is not a scalar tensor is refused.
"""

from __future__ import annotations

import inspect
import math
import random
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from te_nvfp4_cv.backend import torch_private
from te_nvfp4_cv.context.context_manager import nvfp4_autocast
from te_nvfp4_cv.errors import describe, type_error, value_error
from te_nvfp4_cv.layer import delayed_scaling
from te_nvfp4_cv.recipe.block_scaling import NVFP4BlockScaling
from te_nvfp4_cv.report.forward_pass import untouched
from te_nvfp4_cv.sensitivity.layers import Entries, high_outside, ruled
from te_nvfp4_cv.sensitivity.trace import Trace, is_finite

Loss = Callable[[nn.Module, Any], Tensor]


def as_loss(given: Loss | nn.Module) -> Loss:
    """Return a function loss(model, batch) for what the user gave: such a function, or a criterion of pairs.

    A criterion is a module or one of torch.nn.functional's functions. A module whose first argument is called `model`
    is a function of the other kind.
    """
    if isinstance(given, nn.Module):
        is_criterion = next(iter(inspect.signature(given.forward).parameters), "") != "model"
    else:
        is_criterion = getattr(given, "__module__", "") == nn.functional.__name__
    if not is_criterion:
        return given

    def loss(model: nn.Module, batch: Any) -> Tensor:
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise type_error(
                "scan: a criterion needs pairs.",
                got=f"a batch that is a {type(batch).__name__}"
                + (f" of {len(batch)}" if isinstance(batch, (tuple, list)) else ""),
                needs="(input, target) for criterion(model(input), target)",
                fix="give a function in place of the criterion: lambda model, batch: criterion(model(...), ...)",
            )
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        x, target = torch_private.tree_map_only(Tensor, lambda held: held.to(device), tuple(batch))
        found: Tensor = given(model(x), target)
        return found

    return loss


@dataclass(frozen=True)
class Measured:
    """A loss, and the gradients of all trained parameters, or None if gradients were not asked for.

    A parameter that took no part in the loss has None in the place of its gradient.
    """

    loss: float
    gradients: list[Tensor | None] | None

    @property
    def gradient_norm(self) -> float:
        """Return the norm over all parameters; NaN or inf if a gradient has one."""
        return math.sqrt(sum(float(_real(g).square().sum()) for g in self.gradients or () if g is not None))

    @property
    def finite(self) -> bool:
        """Return whether the loss and all gradients are finite."""
        return math.isfinite(self.loss) and all(map(is_finite, self.gradients or ()))


@dataclass(frozen=True)
class Measure:
    """An evaluation to be called: the loss under nvfp4_autocast(recipe, backend=backend), each module by its entry.

    `prepare` is called after seeding, to set the delayed tensor scales. If it is None, they are only read.
    """

    model: nn.Module
    loss: Loss
    recipe: NVFP4BlockScaling
    backend: str = "auto"
    gradients: bool = False
    prepare: Callable[[], Any] | None = None

    def __call__(
        self, batch: Any, entries: Entries, seed: int, outside: bool = False, trace: Trace | None = None
    ) -> Measured:
        """Evaluate once.

        Args:
            batch: passed on to the loss function.
            entries: the precision of modules, as layers.ruled takes them.
            seed: the seed of all random numbers.
            outside: run layers in NVFP4 that no module of `entries` runs.
            trace: if given, it watches the modules.
        """
        with ExitStack() as stack:
            # To ask for the states of all GPUs would initialize CUDA in a process that does not use it.
            cuda = torch.cuda.is_initialized()
            stack.enter_context(torch.random.fork_rng(list(range(torch.cuda.device_count())) if cuda else []))
            stack.enter_context(untouched(self.model))
            stack.enter_context(torch.set_grad_enabled(self.gradients))
            if self.prepare is None:
                # An evaluation that updated the scales would change the next one, and the user's training.
                stack.enter_context(delayed_scaling.reading_only())
            torch.manual_seed(seed)
            random.seed(seed)
            numpy.random.seed(seed % 2**32)  # numpy takes 32 bits
            if self.prepare is not None:
                self.prepare()
            if trace is not None:
                stack.enter_context(trace.watch(self.model))
            stack.enter_context(ruled(entries))
            # Left before the backward pass, as in training; the entries stay, for checkpointed modules that run again.
            with nvfp4_autocast(self.recipe, backend=self.backend), nullcontext() if outside else high_outside():
                # A copy, because a model may write to its input, and the next evaluation is of the same batch.
                copied = torch_private.tree_map_only(Tensor, Tensor.clone, batch)
                value = _scalar(self.loss(self.model, copied))
            return Measured(float(value.detach()), self._gradients(value) if self.gradients else None)

    def _gradients(self, value: Tensor) -> list[Tensor | None]:
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        if not parameters or not value.requires_grad:
            raise value_error(
                "sensitivity: the loss has no gradient.",
                got="a loss that no parameter with requires_grad=True takes part in",
                needs="a loss that the model computes from its parameters, not under torch.no_grad",
                fix="return the loss itself, not loss.detach() or loss.item(); or gradients=False",
            )
        # Not value.backward(), which adds to .grad.
        return list(torch.autograd.grad(value, parameters, allow_unused=True))  # a branch may be switched off


def _scalar(value: object) -> Tensor:
    if not isinstance(value, Tensor):
        raise type_error(
            "sensitivity: the loss is not a tensor.",
            got=f"{type(value).__name__}: {value!r:.80}",
            needs="loss(model, batch) -> a tensor of one element",
            fix="lambda model, batch: criterion(model(batch[0]), batch[1])",
        )
    if value.numel() != 1 or not value.is_floating_point():
        raise value_error(
            "sensitivity: the loss is not a scalar.",
            got=describe(value), needs="a floating-point tensor of one element", fix="return loss.mean()"
        )
    return value.reshape(())


def _real(gradient: Tensor) -> Tensor:
    """Return a gradient as fp64 numbers: a sparse one densely, a complex one with its real and imaginary parts."""
    dense = gradient if gradient.layout == torch.strided else gradient.to_dense()
    parts = torch.view_as_real(dense.resolve_conj()) if dense.is_complex() else dense
    return parts.double()  # squares of fp32 gradients can overflow or vanish


def compare(found: Measured, high: Measured) -> tuple[float, float]:
    """Return the relative error and the cosine of the whole gradient; NaN if high precision's is zero."""
    assert found.gradients is not None and high.gradients is not None
    error = square = own = dot = 0.0
    for g, truth in zip(found.gradients, high.gradients, strict=True):
        if truth is None and g is None:
            continue
        # A parameter that took no part in the loss has a gradient of 0.
        here, there = (None if gradient is None else _real(gradient) for gradient in (g, truth))
        g = torch.zeros_like(there) if here is None else here  # type: ignore[arg-type]
        truth = torch.zeros_like(g) if there is None else there
        error += float((g - truth).square().sum())
        square += float(truth.square().sum())
        own += float(g.square().sum())
        dot += float((g * truth).sum())
    if not square:
        return math.nan, math.nan
    return math.sqrt(error / square), dot / math.sqrt(own * square) if own else math.nan
