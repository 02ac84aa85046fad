"""nv.fuse on norms of other libraries that run their activation themselves, and on children that do nothing.

The classes here have the structure of timm's BatchNormAct2d and GroupNormAct; test_timm.py fuses the real ones.
"""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import te_nvfp4_cv as nv
from te_nvfp4_cv import errors
from te_nvfp4_cv.fusion import fuse as fuse_module
from te_nvfp4_cv.fusion import patterns
from te_nvfp4_cv.fusion.fuse import fuse, unfuse
from tests.fusion.steps import near, nodes, same, step
from tests.helpers import values

pytestmark = pytest.mark.usefixtures("one_thread")


class BatchAct(nn.BatchNorm2d):
    """Batch norm, dropout and activation in one module, with torch's forward written out again."""

    def __init__(self, channels: int, act: type[nn.Module] | None = nn.ReLU, drop: nn.Module | None = None) -> None:
        super().__init__(channels)
        self.drop = nn.Identity() if drop is None else drop
        self.act = nn.Identity() if act is None else act(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        torch._assert(x.ndim == 4, f"expected 4D input (got {x.ndim}D input)")
        factor = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            factor = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        training = self.training or (self.running_mean is None and self.running_var is None)
        used = not self.training or self.track_running_stats
        mean, var = (self.running_mean, self.running_var) if used else (None, None)
        x = F.batch_norm(x, mean, var, self.weight, self.bias, training, factor, self.eps)
        return self.act(self.drop(x))


class GroupAct(nn.GroupNorm):
    """Group norm, dropout and activation in one module, which asks about autocast if a flag is set."""

    def __init__(self, channels: int, act: type[nn.Module] | None = nn.ReLU, drop: nn.Module | None = None) -> None:
        super().__init__(4, channels)
        self.drop = nn.Identity() if drop is None else drop
        self.act = nn.Identity() if act is None else act(inplace=True)
        self.fast = False

    def forward(self, x: Tensor) -> Tensor:
        if self.fast:
            x = in_autocasts_dtype(x, self)
        else:
            x = F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)
        return self.act(self.drop(x))


def in_autocasts_dtype(x: Tensor, norm: Any) -> Tensor:
    if torch.is_autocast_enabled("cpu"):
        x = x.to(torch.get_autocast_dtype("cpu"))
    return F.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps)


class Inherited(nn.BatchNorm2d):
    """A subclass that calls torch's own forward."""

    def __init__(self, channels: int, act: type[nn.Module] | None = nn.ReLU, drop: nn.Module | None = None) -> None:
        super().__init__(channels)
        self.act = nn.Identity() if act is None else act()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(super().forward(x))


class Block(nn.Module):
    """The norms of an inverted residual block: two with an activation, one without before a sum, one before ReLU."""

    def __init__(self, norm: Any, act: type[nn.Module], channels: int = 16) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), norm(channels, act)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), norm(channels, act)
        self.aa, self.path = nn.Identity(), nn.Dropout(0.0)
        self.conv3, self.bn3 = nn.Conv2d(channels, channels, 1, bias=False), norm(channels, None)
        self.conv4, self.bn4 = nn.Conv2d(channels, channels, 1, bias=False), norm(channels, None)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(x))
        y = self.aa(self.bn2(self.conv2(y)))
        y = self.path(self.bn3(self.conv3(y))) + x
        z = self.bn4(self.conv4(y * 0.5))
        z = self.path(z)
        z += y
        return F.relu(z)


KINDS = {"batch": BatchAct, "group": GroupAct, "inherited": Inherited}


@pytest.mark.parametrize("act", [nn.ReLU, nn.SiLU, nn.Hardswish])
@pytest.mark.parametrize("kind", KINDS)
def test_norms_with_an_activation_are_fused(kind: str, act: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Block(KINDS[kind], act), Block(KINDS[kind], act))
    plain, x = copy.deepcopy(model), values((2, 16, 6, 6))
    names, keys = [n for n, _ in model.named_modules()], list(model.state_dict())
    report = fuse(model, report=True)
    name = act.__name__.lower()
    assert {row.name[2:]: row.fused for row in report.rows} == {
        "bn1": name,
        "bn2": name,
        "bn3": "",
        "bn4": "add + relu",
    }
    assert {row.kind for row in report.rows} == {KINDS[kind].__name__}
    assert list(report.left.values()) == [["0.bn3", "1.bn3"]] and "used more than once" in next(iter(report.left))
    assert [n for n, _ in model.named_modules()] == names and list(model.state_dict()) == keys
    assert type(model[0].bn1).__name__ == KINDS[kind].__name__ and isinstance(model[0].bn1, KINDS[kind])
    assert nodes(model(x), "NormAct") == 6
    plain(x)
    for training in (True, False, True):
        model.train(training), plain.train(training)
        assert (same if training else near)(step(plain, x), step(model, x))
    model.eval(), plain.eval()
    assert torch.equal(model(x), plain(x))


def test_copies_pickles_and_a_second_fuse(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = fuse(nn.Sequential(Block(BatchAct, nn.SiLU), Block(GroupAct, nn.ReLU))), values((2, 16, 6, 6))
    classes = [type(m) for m in model.modules()]
    assert fuse(model, report=True).fused == 6 and [type(m) for m in model.modules()] == classes
    stored = pickle.dumps(model)
    expected = step(copy.deepcopy(model), x)
    again = pickle.loads(stored)
    monkeypatch.setattr(fuse_module, "trace", None)  # copies share the classes, so nothing is traced anew
    for other in (copy.deepcopy(model), copy.deepcopy(copy.deepcopy(model)), again):
        assert nodes(copy.deepcopy(other)(x), "NormAct") == 6
        assert same(step(other, x), expected)
    assert [type(m) for m in copy.deepcopy(model).modules()] == classes
    state = {name: value.clone() for name, value in model.state_dict().items()}
    unfuse(model)
    assert nodes(model(x), "NormAct") == 0 and type(model[0].bn1) is BatchAct and type(model[0]) is Block
    model.load_state_dict(state)
    assert same(step(model, x), expected)


def test_compiled() -> None:
    model, x = fuse(Block(BatchAct, nn.SiLU)), values((2, 16, 6, 6))
    expected = step(copy.deepcopy(model), x)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(step(compiled, x), expected, strict=True))


@pytest.mark.parametrize("kind", ["batch", "group"])
def test_what_the_norm_is_changed_to_afterwards_is_done(kind: str) -> None:
    x, seen = values((2, 16, 6, 6)), []

    def hook(module: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
        seen.append(module)
        return y * 2

    changes = {
        "another activation": lambda norm: setattr(norm, "act", nn.ELU()),
        "dropout": lambda norm: setattr(norm, "drop", nn.Dropout(0.5)),
        "dropout's p": lambda norm: setattr(norm.drop, "p", 0.5),
        "a flag": lambda norm: setattr(norm, "fast", True),
        "a hook on the activation": lambda norm: norm.act.register_forward_hook(hook),
        "a hook on the dropout": lambda norm: norm.drop.register_forward_hook(hook),
        "a hook on the norm": lambda norm: norm.register_forward_hook(hook),
    }
    for name, change in changes.items():
        results = []
        for prepare in (lambda norm: norm, fuse):
            norm = prepare(KINDS[kind](16, nn.SiLU, nn.Dropout(0.0)))
            assert nodes(norm(x), "NormAct") == (prepare is fuse)
            change(norm)
            results.append(step(norm, x))
        assert same(*results), name
    assert len(seen) == 6
    norm, plain = fuse(BatchAct(16)), BatchAct(16)
    norm.momentum = plain.momentum = 0.5  # what torch's norm reads is read anew, and needs no other forward
    assert nodes(norm(x), "NormAct") == 1
    plain(x)
    assert same(step(norm, x), step(plain, x))


def test_a_bare_norm_that_is_changed_runs_unfused() -> None:
    for change in (
        lambda norm: setattr(norm, "act", nn.ELU()),
        lambda norm: norm.act.register_forward_hook(double),
    ):
        model, plain, x = fuse(Block(BatchAct, nn.ReLU)), Block(BatchAct, nn.ReLU), values((2, 16, 6, 6))
        plain.load_state_dict(model.state_dict())
        for m in (model, plain):
            change(m.bn4)
        assert nodes(copy.deepcopy(model)(x), "NormAct") == 2
        assert same(step(plain, x), step(model, x))


def double(module: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
    return y * 2


class Scaled(BatchAct):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class Before(BatchAct):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + 1)


class OtherEps(BatchAct):
    def forward(self, x: Tensor) -> Tensor:
        mean, var = self.running_mean, self.running_var
        return self.act(F.batch_norm(x, mean, var, self.weight, self.bias, self.training, 0.1, self.eps * 2))


class TwoReaders(BatchAct):
    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return self.act(x * 1) + x


class OnlyInTraining(BatchAct):
    def forward(self, x: Tensor) -> Tensor:
        x = nn.BatchNorm2d.forward(self, x)
        return self.act(x) if self.training else x


class Asks(BatchAct):
    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return x if torch.is_grad_enabled() else x * 2


class Counts(Inherited):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


OTHERS = {
    Scaled: "does more than call that and children",
    Before: "does more than call that and children",
    OtherEps: "does more than call that and children",
    TwoReaders: "does more than call that and children",
    OnlyInTraining: "calls other children in evaluation",
    Asks: "is_grad_enabled",
    Counts: "sets attributes",
}


@pytest.mark.parametrize("cls", OTHERS, ids=lambda cls: cls.__name__)
def test_norms_that_do_something_else_are_left(cls: type[nn.Module]) -> None:
    norm, x = cls(16), values((2, 16, 6, 6))
    model, plain = nn.Sequential(norm, nn.ReLU()), nn.Sequential(copy.deepcopy(norm), nn.ReLU())
    report = fuse(model, report=True)
    assert report.fused == 0 and OTHERS[cls] in report.rows[0].reason and type(norm) is cls
    assert cls.__name__ in report.rows[0].reason and same(step(plain, x), step(model, x))


def test_activations_that_no_operator_serves_are_named() -> None:
    for norm, reason in (
        (BatchAct(16, _Softplus), "_Softplus follows it"),
        (BatchAct(16, nn.ReLU, nn.Dropout(0.5)), "Dropout follows it"),
    ):
        plain, x = copy.deepcopy(norm), values((2, 16, 6, 6))
        report = fuse(norm, report=True)
        assert [row.reason for row in report.rows] == [reason]
        assert same(step(plain, x), step(norm, x))


class _Softplus(nn.Softplus):
    def __init__(self, inplace: bool) -> None:
        super().__init__()


def test_the_average_over_all_batches_is_left() -> None:
    norm = BatchAct(16)
    norm.momentum = None  # the forward then asks for a number that only a real pass knows
    plain, x = copy.deepcopy(norm), values((2, 16, 6, 6))
    assert "is not torch's own norm" in str(fuse(norm, report=True))
    for _ in range(2):
        assert same(step(plain, x), step(norm, x))


def test_a_norm_with_an_activation_is_not_given_another() -> None:
    for norm in (nv.BatchNormAct2d(16, activation="silu"), BatchAct(16, nn.SiLU)):
        model, x = nn.Sequential(norm, nn.ReLU()), values((2, 16, 6, 6))
        plain = copy.deepcopy(model)
        assert [row.fused for row in fuse(model, report=True).rows] == ["silu"]
        assert same(step(plain, x), step(model, x))


# ---- children that do nothing ---------------------------------------------------------------------------------------


class Between(nn.Module):
    """Children that return their input in each place where timm's ResNet has some, and one that must be called."""

    def __init__(self, idle: nn.Module) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(16, 16, 1, bias=False), nn.BatchNorm2d(16)
        self.bn2, self.idle, self.act = nn.BatchNorm2d(16), idle, nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        x = self.idle(self.act(self.idle(self.bn(x))))
        x = self.idle(self.bn2(self.conv(x)))
        x += shortcut
        return self.act(self.idle(x))


IDLE = {
    "Identity": nn.Identity,
    "Identity with arguments": lambda: nn.Identity(54, unused=0.1),
    "Dropout": lambda: nn.Dropout(0.0),
    "Dropout2d": lambda: nn.Dropout2d(0.0, inplace=True),
    "empty Sequential": nn.Sequential,
}


@pytest.mark.parametrize("name", IDLE)
def test_children_that_do_nothing_are_no_obstacle(name: str) -> None:
    torch.manual_seed(0)
    model, x = Between(IDLE[name]()), values((2, 16, 6, 6))
    plain = copy.deepcopy(model)
    assert [row.fused for row in fuse(model, report=True).rows] == ["relu", "add + relu"]
    assert nodes(copy.deepcopy(model)(x), "NormAct") == 2
    for training in (True, False):
        model.train(training), plain.train(training)
        assert (same if training else near)(step(plain, x), step(model, x))


def test_children_that_do_something_later_are_called() -> None:
    x = values((2, 16, 6, 6))
    for change in (
        lambda model: model.idle.register_forward_hook(double),
        lambda model: setattr(model, "idle", nn.ELU()),
        lambda model: setattr(model.idle, "p", 0.5),
        lambda model: setattr(model.idle, "forward", F.hardswish),
    ):
        torch.manual_seed(0)
        model = Between(nn.Dropout(0.0))
        plain = copy.deepcopy(model)
        for m in (plain, fuse(model)):
            change(m)
        assert same(step(plain, x), step(model, x))
        report = fuse(unfused(model), report=True)
        assert report.fused == 0 and same(step(plain, x), step(model, x))


def unfused(model: nn.Module) -> nn.Module:
    unfuse(model)
    return model


# ---- activations that need not be written ---------------------------------------------------------------------------


class Preactivated(nn.Module):
    """A norm with an activation that only a convolution reads, as in DenseNet, and one that two modules read."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.conv1 = BatchAct(16), nn.Conv2d(16, 16, 3)
        self.norm2, self.conv2, self.pool = BatchAct(16), nn.Conv2d(16, 16, 1), nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm2(self.conv1(self.norm1(x)))
        return self.conv2(x).mean() + self.pool(x).mean()


def test_an_activation_that_only_layers_read_may_stay_unwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, deferring = [], patterns.deferring
    monkeypatch.setattr(patterns, "deferring", lambda: asked.append(1) or deferring())
    model, x = fuse(Preactivated()), values((2, 16, 6, 6))
    with nv.nvfp4_autocast():
        model(x)
    assert len(asked) == 1
    model.norm1.register_forward_hook(double)
    with nv.nvfp4_autocast():
        model(x)
    assert len(asked) == 1


# ---- the report -----------------------------------------------------------------------------------------------------


class LayerNorm2d(nn.Module):
    """A norm that is none of torch's classes."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.movedim(1, -1), x.shape[1:2]).movedim(-1, 1)


def test_the_report_groups_what_is_left_and_lists_other_norms() -> None:
    other = nn.Sequential(LayerNorm2d(), nn.ReLU(), nn.LayerNorm(6))
    model = nn.Sequential(Block(BatchAct, nn.ReLU), nn.BatchNorm2d(16), nn.Tanh(), other)
    report = fuse(model, report=True)
    assert (report.fused, len(report.rows)) == (3, 7)
    assert {reason: names for reason, names in report.left.items() if "sum" not in reason} == {
        "Tanh follows it": ["1"],
        "no operator serves LayerNorm2d": ["3.0"],
        "no operator serves LayerNorm": ["3.2"],
    }
    text = str(report)
    assert text.startswith("3 of 7 norms") and "0.bn4: BatchAct + add + relu" in text
    assert "left, because Tanh follows it: 1" in text


def test_a_model_of_which_nothing_is_fused_gives_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(errors, "_warned", set())
    with pytest.warns(UserWarning, match="fused none of the 1 norms of this Sequential"):
        fuse(nn.Sequential(nn.BatchNorm2d(8), nn.Tanh()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fuse(nn.Sequential(nn.Conv2d(8, 8, 1), nn.Tanh()))
        fuse(nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), nn.BatchNorm2d(8)))
