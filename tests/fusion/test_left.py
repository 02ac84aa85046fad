"""Norms that nv.fuse leaves alone: no activation reads their result, as following the tensors of a forward shows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import te_nvfp4_cv as nv
from te_nvfp4_cv.fusion.patterns import FAMILY, FUNCTIONS, METHODS
from tests.helpers import values

ACTIVATIONS = {*FUNCTIONS, F.hardtanh, F.hardtanh_, *(getattr(Tensor, name) for name in METHODS)}
ADDITIONS = {Tensor.add, Tensor.add_, Tensor.__iadd__, torch.add}


class Follow(TorchFunctionMode):
    """Notes which norms an activation reads: directly (`plain`), or after one addition (`added`)."""

    def __init__(self, norms: dict[nn.Module, str]) -> None:
        super().__init__()
        self.results: dict[int, set[str]] = {}  # by id: the norms whose result, or a sum with it, a tensor is
        self.sums: dict[int, set[str]] = {}
        self.plain: set[str] = set()
        self.added: set[str] = set()
        self.alive: list[Any] = []  # an id is that of one tensor while it lives
        for norm, name in norms.items():
            norm.register_forward_hook(lambda _, args, y, name=name: self._note(self.results, y, {name}))

    def _note(self, among: dict[int, set[str]], y: Any, names: set[str]) -> None:
        self.alive.append(y)
        among[id(y)] = among.get(id(y), set()) | names

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        y = function(*args, **(kwargs or {}))
        if function in ACTIVATIONS:
            for known, found in ((self.results, self.plain), (self.sums, self.added)):
                found |= known.get(id(args[0]), set())
        if function in ADDITIONS:
            for arg in args:
                if id(arg) in self.results:
                    self._note(self.sums, y, self.results[id(arg)])
        return y


def followed(model: nn.Module, left: list[str], x: Tensor) -> Follow:
    """Run a model that is not fused and follow the results of these norms."""
    names = {module: name for name, module in model.named_modules() if name in left}
    follow = Follow(names)
    with torch.no_grad(), follow:
        model.eval()(x)
    return follow


@pytest.mark.parametrize(
    "name, count",
    [("mobilenet_v2", 17), ("regnet_y_400mf", 4)],
)
def test_nothing_that_could_be_fused_is_left(name: str, count: int) -> None:
    """The four of RegNet are residuals: the other norm of their sum is fused with it."""
    torchvision = pytest.importorskip("torchvision", reason="torchvision is not installed")
    model, twin = (getattr(torchvision.models, name)() for _ in range(2))
    report = nv.fuse(twin, report=True)
    left = [name for names in report.left.values() for name in names]
    assert len(left) == count and report.fused + count == sum(isinstance(m, FAMILY) for m in model.modules())
    known = ("no activation follows in this forward", "which is fused with the sum")
    assert all(reason.endswith(known) for reason in report.left)
    follow = followed(model, left, values((2, 3, 32, 32)))
    assert not follow.plain
    assert (follow.added == set(left)) if name.startswith("regnet") else not follow.added


def test_what_follows_is_found() -> None:
    """The check above sees an activation where there is one."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.BatchNorm2d(3) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x).relu_() + self.c(x).sigmoid()
            return F.relu6(self.b(y) + x)

    follow = followed(Block(), ["a", "b", "c"], values((2, 3, 4, 4)))
    assert follow.plain == {"a"} and follow.added == {"b"}


class Branch(nn.Module):
    """A convolution of a class that is not torch's, as those of timm; `writes`: it changes what it is given."""

    def __init__(self, writes: bool) -> None:
        super().__init__()
        self.conv, self.writes = nn.Conv2d(3, 3, 1), writes

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.mul_(2) if self.writes else x)


class RepVGG(nn.Module):
    """A norm of the block's input, which other branches read too."""

    def __init__(self, writes: bool) -> None:
        super().__init__()
        self.norm, self.branch, self.act = nn.BatchNorm2d(3), Branch(writes), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        u = self.norm(x)
        y = self.branch(x)
        y = y + 1
        y += u
        return self.act(y)


@pytest.mark.parametrize("writes", [False, True])
def test_branches_of_other_classes_are_read(writes: bool) -> None:
    block = RepVGG(writes)
    report = nv.fuse(block, report=True)
    assert report.fused == (not writes), str(report)
    x = values((4, 3, 8, 8))
    plain = RepVGG(writes)
    plain.load_state_dict(block.state_dict())
    assert torch.equal(block(x.clone()), plain(x.clone()))
