"""Norms at the end of a child's forward, whose sum and activation the caller runs, as in RegNet and RepVGG."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import te_nvfp4_cv as nv
from tests.fusion.steps import nodes, same, step
from tests.helpers import values

pytestmark = pytest.mark.usefixtures("one_thread")


class ConvNorm(nn.Module):
    """As timm's ConvNormAct and torchvision's Conv2dNormActivation: an activation, or something that does nothing."""

    def __init__(self, act: nn.Module | None = None, scale: float = 1.0) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.act, self.scale = nn.Identity() if act is None else act, scale

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x if self.scale == 1.0 else x * self.scale)))


class Residual(nn.Module):
    """A block whose last norm lies two children deep, and whose shortcut ends with a norm as well."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(ConvNorm(nn.ReLU()), ConvNorm())
        self.shortcut, self.act = ConvNorm(), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        y += self.shortcut(x)
        return self.act(y)


class Chain(nn.Module):
    """An activation behind blocks without one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = ConvNorm(), ConvNorm()

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.silu(self.second(nn.functional.silu(self.first(x))))


X = values((4, 16, 8, 8))


def twins(make: Callable[[], nn.Module]) -> tuple[Any, Any]:
    """Return a model and a fused copy of it."""
    torch.manual_seed(0)
    plain = make()
    return plain, nv.fuse(copy.deepcopy(plain))


@pytest.mark.parametrize(
    "make, fused, left", [(Residual, 2, 1), (Chain, 2, 0), (lambda: nn.Sequential(Residual()), 2, 1)]
)
def test_they_are_fused_in_the_caller(make: Callable[[], nn.Module], fused: int, left: int) -> None:
    plain, model = twins(make)
    report = nv.fuse(model, report=True)
    assert (report.fused, len(report.rows)) == (fused, fused + left), str(report)
    assert nodes(model(X), "NormAct") == fused
    assert list(model.state_dict()) == list(plain.state_dict())
    for twin in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        twin.load_state_dict(plain.state_dict())
        assert nodes(copy.deepcopy(twin)(X), "NormAct") == fused
        assert same(step(copy.deepcopy(plain), X), step(twin, X))
        twin.load_state_dict(plain.state_dict())
        assert torch.equal(twin.eval()(X), copy.deepcopy(plain).eval()(X))


def test_under_the_context_and_compiled() -> None:
    plain, model = twins(Residual)
    recipe = nv.NVFP4BlockScaling(disable_stochastic_rounding=True)
    expected = step(copy.deepcopy(plain), X, nv.nvfp4_autocast(recipe))
    assert same(expected, step(copy.deepcopy(model), X, nv.nvfp4_autocast(recipe)))
    compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=True)
    with nv.nvfp4_autocast(recipe):
        assert torch.equal(compiled(X), expected[0])


def hook(model: Any) -> None:
    model.body[1].register_forward_hook(lambda module, args, y: y * 2)


def entry(model: Any) -> None:
    nv.set_precision(model, {"body.1": None})


def activation(model: Any) -> None:
    model.body[1].act = nn.Softplus()


def attribute(model: Any) -> None:
    model.body[1].scale = 0.5


def child(model: Any) -> None:
    torch.manual_seed(1)
    model.body[1] = nn.Sequential(nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16), nn.Softplus())


def forward(model: Any) -> None:
    model.body[1].forward = lambda x: x * 3


@pytest.mark.parametrize("change", [hook, entry, activation, attribute, child, forward])
def test_what_the_child_becomes_afterwards_is_done(change: Callable[[Any], None]) -> None:
    plain, model = twins(Residual)
    for twin in (plain, model):
        change(twin)
    context = nv.nvfp4_autocast(nv.NVFP4BlockScaling(disable_stochastic_rounding=True))
    assert same(step(plain, X, context), step(model, X, context))


class Switched(ConvNorm):
    """Another forward in evaluation."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.training else self.norm(x)


class Scaled(ConvNorm):
    """Something behind the norm."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class Two(ConvNorm):
    """The norm's result is returned and read."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x))
        y.mean()
        return y


@pytest.mark.parametrize("kind", [Switched, Scaled, Two])
def test_other_children_stay_calls(kind: type[ConvNorm]) -> None:
    class Caller(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = kind()

        def forward(self, x: Tensor) -> Tensor:
            return self.block(x).relu()

    plain, model = twins(Caller)
    assert nv.fuse(model, report=True).fused == 0
    assert same(step(plain, X), step(model, X))
