"""A small network with every kind of layer, one training step of it, and what observers of a run are told."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from te_nvfp4_cv.context import state as nv_context
from te_nvfp4_cv.context.context_manager import nvfp4_autocast
from te_nvfp4_cv.layer import observe
from te_nvfp4_cv.recipe.block_scaling import NVFP4BlockScaling
from tests.helpers import same_bits, values

NO_SR = NVFP4BlockScaling(disable_stochastic_rounding=True)
NO_RHT = NVFP4BlockScaling(disable_rht=True)
NO_2D = NVFP4BlockScaling(disable_2d_quantization=True)


class Linears(nn.Module):
    """Four linear layers, two of them in a container."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(16, 32)
        self.body = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))
        self.head = nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.body(self.stem(x)))
        return y


class Net(nn.Module):
    """Convolutions of every kind, ReLU in place and not, two norms, dropout, a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.body = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1, bias=False),
            nn.BatchNorm2d(32),
            nn.ReLU(inplace=True),
            nn.Conv2d(32, 32, 3, stride=2, padding=1, groups=2),
            nn.GroupNorm(4, 32),
            nn.ReLU(),
        )
        self.up = nn.ConvTranspose2d(32, 16, 2, stride=2)
        self.head = nn.Linear(16, 16)
        self.dropout = nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(self.body(self.stem(x)))
        return self.head(self.dropout(F.relu(x)).mean((2, 3)))


def net_and_input() -> tuple[Net, Tensor]:
    torch.manual_seed(0)
    return Net(), values((4, 3, 8, 8), seed=1)


def gradients(net: nn.Module) -> list[Tensor]:
    return [parameter.grad for parameter in net.parameters() if parameter.grad is not None]


def all_same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(same_bits(x, y) for x, y in zip(a, b, strict=True))


def step(
    net: nn.Module, x: Tensor, context: Any = None, run: Callable[[Tensor], Tensor] | None = None, inside: bool = False
) -> list[Tensor]:
    """[loss, gradients...] of one step from a fresh seed; `inside`: backward within the context too."""
    net = copy.deepcopy(net)
    torch.manual_seed(5)
    context = contextlib.nullcontext() if context is None else context
    with context:
        y = (run or (lambda module, x: module(x)))(net, x)  # type: ignore[call-arg]
        loss = y.float().square().mean()
        if inside:
            loss.backward()
    if not inside:
        loss.backward()
    return [loss.detach(), *gradients(net)]


def seen(run: Callable[[], Any]) -> list[observe.Call]:
    """The calls that an observer is told of while `run` runs."""
    told: list[observe.Call] = []
    with observe.observe(told.append):
        run()
    return told


def ran(model: nn.Module, call: Callable[[], Any], **context: Any) -> dict[str, str]:
    """For each call under the context: "high", or the name of its recipe ("nvfp4" if it has none), by Parameter."""
    names = {id(p): name.removesuffix(".weight") for name, p in model.named_parameters()}
    found: dict[str, str] = {}

    def run() -> None:
        with nvfp4_autocast(**context):
            call()

    for told in seen(run):
        base = told.weight if told.weight._base is None else told.weight._base
        found[names.get(id(base), "computed")] = "high" if told.recipe is None else told.recipe.name or "nvfp4"
    assert nv_context.local.overrides == []
    return found


class Override:
    """Forward hooks that push a recipe while a module runs, as set_precision's do."""

    def __init__(self, recipe: NVFP4BlockScaling | None) -> None:
        self.recipe = recipe

    def attach(self, module: nn.Module) -> None:
        module.register_forward_pre_hook(lambda module, *_: nv_context.push_override(self.recipe, module))
        module.register_forward_hook(lambda module, *_: nv_context.pop_override(module), always_call=True)


class Everything(nn.Module):
    """One layer of each kind that has kernels: a thin stem, BatchNorm, ReLU, a residual, GroupNorm, SiLU, a group, a
    transposed convolution, a linear layer.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
        self.conv = nn.Conv2d(32, 32, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(32)
        self.relu = nn.ReLU(inplace=True)
        self.down = nn.Conv2d(32, 64, 3, stride=2, padding=1, groups=2)
        self.group_norm = nn.GroupNorm(8, 64)
        self.silu = nn.SiLU()
        self.odd = nn.Conv2d(64, 40, 1)
        self.up = nn.ConvTranspose2d(40, 48, 2, stride=2)
        self.head = nn.Linear(48, 24)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.relu(self.norm(self.conv(x)) + x)
        x = self.odd(self.silu(self.group_norm(self.down(x))))
        return self.head(self.up(x).mean((2, 3)))


def everything(batch: int = 16, size: int = 8) -> tuple[nn.Module, Tensor]:
    """(network, images), channels_last."""
    images = torch.randn(batch, 3, size, size)
    return Everything().to(memory_format=torch.channels_last), images.to(memory_format=torch.channels_last)
