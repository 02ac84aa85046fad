"""A model on trial: how it is built, called and given a loss; and one training step or evaluation of it.

Every step begins with the same seed, in training mode, on copies of the same inputs. So two steps of copies of a model
differ only in what was done to the copies.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from te_nvfp4_cv.backend.torch_private import AnyBatchNorm
from te_nvfp4_cv.errors import value_error

SEED = 1
Gradients = dict[str, Tensor]


def distance(output: Any) -> Tensor:
    """Return the mean squared distance of all differentiable outputs to fixed random numbers: a loss for any model.

    Raises:
        ValueError: nothing in the output has a gradient.
    """
    found = [t for t in floats(output) if t.requires_grad]
    if not found:
        raise value_error(
            "try: the model's output has no gradient.", got=type(output).__name__,
            needs="floating-point tensors that depend on its parameters", fix="return (model, inputs, loss)",
        )
    losses = [F.mse_loss(t.float(), normal(tuple(t.shape)).to(t.device)) for t in found]
    return torch.stack(losses).mean()


def normal(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Return normally distributed numbers of a fixed seed, the same in every process."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Subject:
    """A model and everything that a training step of it needs.

    Attributes:
        build: makes the model. It is called with a fixed seed, and several times.
        args, kwargs: what the model is called with in training.
        loss: takes the model's output and returns a scalar.
        evaluation: (args, kwargs) in evaluation, if they differ: without labels, say.
    """

    name: str
    build: Callable[[], nn.Module]
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    loss: Callable[[Any], Tensor] = distance
    evaluation: tuple[tuple[Any, ...], Mapping[str, Any]] | None = None

    def made(self, seed: int = 0) -> nn.Module:
        """Build the model from this seed, in training mode."""
        torch.manual_seed(seed)
        return self.build().train()

    def training_call(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return copies of the training inputs: some models write into their labels."""
        return copy.deepcopy((self.args, dict(self.kwargs)))

    def evaluation_call(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return copies of the inputs of an evaluation."""
        args, kwargs = self.evaluation or (self.args, self.kwargs)
        return copy.deepcopy((args, dict(kwargs)))


@dataclass(frozen=True)
class Step:
    """The outcome of a training step: the loss, and by name the gradients of all parameters that got one."""

    loss: float
    gradients: Gradients

    def equals(self, other: Step) -> bool:
        """Return True if the loss and all gradients have the same bits; NaN equals NaN."""
        mine, yours = self.gradients, other.gradients
        equal_loss = self.loss == other.loss or (self.loss != self.loss and other.loss != other.loss)
        return equal_loss and mine.keys() == yours.keys() and all(_same(mine[k], yours[k]) for k in mine)

    def error(self, truth: Step) -> float:
        """Return |g - g_truth| / |g_truth| over all gradients; one that is missing counts as 0."""
        wrong = square = 0.0
        for name, expected in truth.gradients.items():
            found = self.gradients.get(name)
            wrong += float((expected if found is None else found - expected).double().square().sum())
            square += float(expected.double().square().sum())
        return (wrong / square) ** 0.5 if square else 0.0


def step(
    model: nn.Module, subject: Subject, context: AbstractContextManager[Any] | None = None,
    called: Callable[..., Any] | None = None,
) -> Step:
    """Run one training step, and leave its gradients in `.grad`.

    Args:
        context: entered around the forward pass and the loss, and left before the backward pass, as in training.
        called: called in the model's place; a compiled form of it, say.
    """
    model.train().zero_grad(set_to_none=True)
    args, kwargs = subject.training_call()
    seeded()
    with context or nullcontext():
        loss = subject.loss((model if called is None else called)(*args, **kwargs))
    loss.backward()
    found = {n: p.grad.detach().float().clone() for n, p in model.named_parameters() if p.grad is not None}
    return Step(float(loss.detach()), found)


def descend(model: nn.Module) -> None:
    """Move every parameter a little against its gradient: by a thousandth of its length, whatever the gradient's."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None and (length := float(parameter.grad.norm())) > 0:
                parameter.sub_(parameter.grad, alpha=1e-3 * float(parameter.norm()) / length)


def evaluate(
    model: nn.Module, subject: Subject, context: AbstractContextManager[Any] | None = None
) -> list[Tensor]:
    """Run the model in evaluation mode without gradients, and return all floating-point tensors of its output."""
    model.eval()
    args, kwargs = subject.evaluation_call()
    seeded()
    with torch.no_grad(), context or nullcontext():
        return [t.detach().float() for t in floats(model(*args, **kwargs))]


def seeded() -> None:
    """Seed every generator that a model may draw from."""
    torch.manual_seed(SEED)
    random.seed(SEED)
    numpy.random.seed(SEED)


def clone(model: nn.Module, subject: Subject) -> nn.Module:
    """Return a copy of the model; one that cannot be copied is built again, with the same values."""
    try:
        return copy.deepcopy(model)
    except (RuntimeError, TypeError, AttributeError):  # old weight norm, objects that hold locks
        again = subject.made()
        again.load_state_dict(model.state_dict())
        return again


def settled(model: nn.Module) -> nn.Module:
    """Take from a fresh model what hides its layers, and return it.

    Weights, gains and layer scales that begin at zero, or near it, get values: behind a head of zeros every check would
    compare zeros. Batch norms take their statistics from the last pass alone: those that they begin with belong to no
    data, and activations would grow or vanish from layer to layer in evaluation.
    """
    for name, parameter in model.named_parameters():
        if "bias" not in name and parameter.numel() and float(parameter.detach().abs().max()) < 1e-3:
            values = normal(tuple(parameter.shape))
            fan_in = max(1, parameter.numel() // parameter.shape[0]) if parameter.dim() else 1
            parameter.data.copy_(values / fan_in**0.5 if parameter.dim() > 1 else 0.5 + 0.1 * values)
    for norm in model.modules():
        if isinstance(norm, AnyBatchNorm):
            norm.reset_running_stats()
            norm.momentum = 1.0
    return model


def floats(output: Any) -> list[Tensor]:
    """Return the floating-point tensors in an output of dicts, lists and objects of tensors, each once, in order."""
    return list({id(t): t for t in _tensors(output) if t.is_floating_point()}.values())


def _tensors(output: Any, depth: int = 6) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
        return
    if not depth:  # objects may hold each other
        return
    members: Iterable[Any] = ()
    if isinstance(output, Mapping):
        members = output.values()
    elif isinstance(output, (list, tuple)):
        members = output
    elif hasattr(output, "__dict__") and not isinstance(output, nn.Module):  # a distribution, an output class
        members = vars(output).values()
    for member in members:
        yield from _tensors(member, depth - 1)


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    """Return True if both outputs have the same bits; NaN equals NaN."""
    return len(a) == len(b) and all(map(_same, a, b))


def relative(a: list[Tensor], b: list[Tensor]) -> float:
    """Return |b - a| / |a| over all tensors, infinity if the shapes differ, or the places of NaN."""
    if [t.shape for t in a] != [t.shape for t in b]:
        return float("inf")
    if not all(torch.equal(x.isnan(), y.isnan()) for x, y in zip(a, b, strict=True)):
        return float("inf")
    wrong = sum(float((x - y).nan_to_num().double().square().sum()) for x, y in zip(a, b, strict=True))
    square = sum(float(x.nan_to_num().double().square().sum()) for x in a)
    return (wrong / square) ** 0.5 if square else (0.0 if not wrong else float("inf"))


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num())
