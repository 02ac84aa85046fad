"""nv.fuse: what it finds in unmodified models, that nothing else changes, and what it leaves alone, with the reason."""

from __future__ import annotations

import copy
import io
import pickle
import random
from collections import OrderedDict
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from unet_coco.unet import UNet

from te_nvfp4_cv import convert_model, nvfp4_autocast, set_precision
from te_nvfp4_cv.fusion.fuse import Fusion, fuse
from te_nvfp4_cv.fusion.modules import BatchNormAct2d
from te_nvfp4_cv.fusion.norm_act import NormAct
from te_nvfp4_cv.recipe.block_scaling import NVFP4BlockScaling
from te_nvfp4_cv.report.watch import coverage
from tests.fusion.steps import near, nodes, same, step
from tests.helpers import same_bits, values

pytestmark = pytest.mark.usefixtures("one_thread")
NO_SR = NVFP4BlockScaling(disable_stochastic_rounding=True)


def kinds(report: Fusion) -> dict[str, str]:
    return {row.name: row.fused for row in report.rows}


# ---- whole models ---------------------------------------------------------------------------------------------------


def models() -> dict[str, tuple[Any, int, int]]:
    """name: (how to make it, norms fused, norms)."""
    torchvision = pytest.importorskip("torchvision", reason="torchvision is not installed")
    vision = torchvision.models
    return {
        "resnet18": (vision.resnet18, 17, 20),
        "resnet50": (vision.resnet50, 49, 53),
        "densenet121": (vision.densenet121, 121, 121),
        "vgg11_bn": (vision.vgg11_bn, 8, 8),
        "fcn_resnet50": (lambda: vision.segmentation.fcn_resnet50(weights=None, weights_backbone=None), 50, 54),
    }


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "densenet121", "vgg11_bn", "fcn_resnet50"])
def test_unmodified_torchvision_models(name):
    make, fused, norms = models()[name]
    torch.manual_seed(0)
    model = make()
    if name == "vgg11_bn":
        model.classifier = nn.Linear(512 * 49, 3)
    x = values((2, 3, 64, 64))
    plain = copy.deepcopy(model)
    names = [n for n, _ in model.named_modules()]
    parameters = [id(p) for p in model.parameters()]
    report = fuse(model, report=True)
    assert report.model is model and (report.fused, len(report.rows)) == (fused, norms), str(report)
    assert all(row.fused or row.reason for row in report.rows)
    assert isinstance(model, type(plain)) and type(model).__name__ == type(plain).__name__
    assert [n for n, _ in model.named_modules()] == names and [id(p) for p in model.parameters()] == parameters
    assert list(model.state_dict()) == list(plain.state_dict())
    assert same(step(plain, x), step(model, x))  # ATen's bits on a CPU
    model.eval(), plain.eval()
    assert torch.equal(model(x)["out"] if "fcn" in name else model(x), plain(x)["out"] if "fcn" in name else plain(x))


@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_group_norm_unet_under_the_context(activation):
    torch.manual_seed(0)
    model = UNet(4, 0.25, activation)
    plain = copy.deepcopy(model)
    assert fuse(model, report=True).fused == 18
    x = values((4, 3, 32, 48))
    for make in (lambda: nvfp4_autocast(NO_SR), lambda: torch.autocast("cpu", torch.bfloat16)):
        results = [step(m, x, make()) for m in (plain, model)]
        assert all(torch.allclose(a.float(), b.float(), rtol=0.05, atol=2e-3) for a, b in zip(*results, strict=True))
        assert torch.equal(results[0][0], results[1][0])
    assert nodes(model(x), "NormAct") == 18


def test_memory_of_the_group_norm_silu_unet():
    torch.manual_seed(0)
    x = values((8, 3, 64, 64))

    def kept(model, recipe):
        with torch.autocast("cpu", torch.bfloat16):
            if recipe:
                return coverage(model, x, recipe=NO_SR).saved_bytes
            with nvfp4_autocast(enabled=False):
                storages: dict[int, int] = {}

                def pack(t):
                    if not isinstance(t, nn.Parameter) and t.untyped_storage().data_ptr() != x.data_ptr():
                        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
                    return t

                with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
                    y = model(x)
                del y
                return sum(storages.values())

    model = UNet(4, 0.25, "silu")
    plain, nvfp4 = kept(model, False), kept(model, True)
    fused = kept(fuse(model), True)
    assert nvfp4 <= 0.85 * plain and fused <= 0.55 * plain, (nvfp4 / plain, fused / plain)


# ---- what stays the same --------------------------------------------------------------------------------------------


class Block(nn.Module):
    """A residual block whose ReLU module is used twice."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x
        return self.relu(out) * scale


def test_fusing_twice_changes_nothing():
    model = fuse(nn.Sequential(Block(), Block()))
    classes = [type(m) for m in model.modules()]
    first = kinds(fuse(model, report=True))
    assert [type(m) for m in model.modules()] == classes
    assert first == {f"{i}.bn{j}": ("relu", "add + relu")[j - 1] for i in (0, 1) for j in (1, 2)}
    assert fuse(model) is model


def test_copies_and_pickles_stay_fused():
    model = fuse(nn.Sequential(Block(), nn.Sequential(Block(), nn.BatchNorm2d(16), nn.ReLU())))
    x = values((2, 16, 6, 6))
    expected = step(copy.deepcopy(model), x)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)):
        assert (
            nodes(other(x), "NormAct") == 5 and same(step(other, x), expected) is False
        )  # one more step of statistics
        assert [type(m).__name__ for m in other.modules()] == [type(m).__name__ for m in model.modules()]
    assert same(step(copy.deepcopy(copy.deepcopy(model)), x), expected)


def test_arguments_with_a_default_keep_their_meaning():
    model, x = fuse(Block()).eval(), values((2, 16, 6, 6))
    plain = Block().eval()
    plain.load_state_dict(model.state_dict())
    for call in (lambda m: m(x), lambda m: m(x=x), lambda m: m(x, 2.0), lambda m: m(x, scale=3.0)):
        assert torch.equal(call(model), call(plain))
    with pytest.raises(TypeError):
        model()


def test_a_list_where_a_tensor_was_possible():
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(8)

        def forward(self, inputs: Any) -> Tensor:
            x = inputs if isinstance(inputs, Tensor) else torch.cat(inputs, 1)
            return F.relu(self.norm(x))

    layer, x = Layer(), values((2, 8, 3, 3))
    expected = layer(x)
    fuse(layer)
    assert nodes(layer([x[:, :4], x[:, 4:]]), "NormAct") == 1
    assert nodes(layer(x), "NormAct") == 0 and torch.equal(layer(x), expected)


def test_changes_after_fusing_are_seen():
    model, x = fuse(nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), nn.BatchNorm2d(8), nn.ReLU())), values((2, 8, 3, 3))
    model[1] = nn.Tanh()
    assert nodes(model(x), "NormAct") == 1 and bool((model(x) >= 0).all())
    model[2] = nn.Identity()
    assert nodes(model(x), "NormAct") == 0
    model.append(nn.Sigmoid())
    assert float(model(x).detach().min()) >= 0.5
    assert type(model[:2]).__name__ == "Sequential" and model[:2](x).shape == x.shape


def test_sync_batch_norm_after_fusing_runs_unfused():
    model = fuse(Block())
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    x = values((2, 16, 4, 4))
    assert isinstance(model.bn1, nn.SyncBatchNorm)
    assert nodes(model.eval()(x), "NormAct") == 0


def test_set_precision_and_convert_model_as_before():
    model = nn.Sequential(OrderedDict(stem=Block(), body=Block()))
    plain, x = copy.deepcopy(model), values((4, 16, 6, 6))
    fuse(model)
    for m in (plain, model):
        set_precision(m, {"stem": None, "body.conv1": None})
    rows = [{(r.name, r.nvfp4) for r in coverage(m, x, recipe=NO_SR).rows} for m in (plain, model)]
    assert rows[0] == rows[1] and ("stem.conv1", False) in rows[1] and ("body.conv2", True) in rows[1]
    converted = convert_model(fuse(Block()), NO_SR)
    assert type(converted.conv1).__name__ == "NVFP4Conv2d" and nodes(converted(x), "QuantizedConv") == 2


def test_training_and_evaluation_paths_of_one_forward():
    class Switch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(8)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.norm(x))
            x = F.dropout(x, 0.5, self.training)
            return x * 2 if self.training else x

    model, x = Switch(), values((4, 8, 4, 4))
    plain = copy.deepcopy(model)
    assert fuse(model, report=True).fused == 1
    for training in (True, False, True):
        model.train(training), plain.train(training)
        assert near(step(plain, x), step(model, x))
    model.norm.eval(), plain.norm.eval()  # a frozen norm inside a model in training
    assert near(step(plain, x), step(model, x))


def test_frozen_parameters_get_no_gradient():
    model = fuse(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()))
    for p in model[1].parameters():
        p.requires_grad_(False)
    model(values((2, 3, 5, 5))).sum().backward()
    assert model[1].weight.grad is None and model[0].weight.grad is not None


def test_checkpoints_are_interchangeable():
    plain, fused = Block(), fuse(Block())
    fused.load_state_dict(plain.state_dict())
    plain.load_state_dict(fused.state_dict())
    x = values((2, 16, 4, 4))
    assert torch.equal(plain(x), fused(x))


def test_compiled():
    model, x = fuse(Block()), values((2, 16, 4, 4))
    expected = step(copy.deepcopy(model), x)
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(step(compiled, x), expected, strict=True))


# ---- patterns -------------------------------------------------------------------------------------------------------


class Forward(nn.Module):
    """Two norms, an activation and a forward given as a function of (self, x)."""

    def __init__(self, function: Any, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.norm = norm or nn.BatchNorm2d(8)
        self.other = nn.BatchNorm2d(8)
        self.act = nn.ReLU()
        self.silu = nn.SiLU(inplace=True)
        self.leaky = nn.LeakyReLU(0.3, inplace=True)
        self.prelu = nn.PReLU()
        self.function = function
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


FUSED = {
    "module": (lambda m, x: m.act(m.norm(x)), "relu"),
    "functional": (lambda m, x: F.relu(m.norm(x)), "relu"),
    "functional in place": (lambda m, x: F.relu(m.norm(x), inplace=True), "relu"),
    "torch": (lambda m, x: torch.relu(m.norm(x)), "relu"),
    "method": (lambda m, x: m.norm(x).relu(), "relu"),
    "method in place": (lambda m, x: m.norm(x).relu_(), "relu"),
    "silu": (lambda m, x: m.silu(m.norm(x)), "silu"),
    "functional silu": (lambda m, x: F.silu(m.norm(x)), "silu"),
    "hardswish": (lambda m, x: F.hardswish(m.norm(x), inplace=True), "hardswish"),
    "relu6": (lambda m, x: F.relu6(m.norm(x)), "relu6"),
    "gelu": (lambda m, x: F.gelu(m.norm(x)), "gelu"),
    "gelu tanh": (lambda m, x: F.gelu(m.norm(x), approximate="tanh"), "gelu_tanh"),
    "leaky relu": (lambda m, x: F.leaky_relu(m.norm(x), 0.3), "leaky_relu"),
    "leaky relu by name": (lambda m, x: F.leaky_relu(m.norm(x), negative_slope=0.3, inplace=True), "leaky_relu"),
    "leaky relu module": (lambda m, x: m.leaky(m.norm(x)), "leaky_relu"),
    "add": (lambda m, x: F.relu(m.norm(x) + x), "add + relu"),
    "added": (lambda m, x: F.relu(x + m.norm(x)), "add + relu"),
    "torch.add": (lambda m, x: F.relu(torch.add(m.norm(x), x)), "add + relu"),
    "add_": (lambda m, x: F.relu(m.norm(x).add_(x)), "add + relu"),
    "two norms": (lambda m, x: F.relu(m.norm(x) + m.other(x * 2)), "add + relu"),
    "into a new sum": (lambda m, x: F.relu((x * 2 + x).add_(m.norm(x))), "add + relu"),
    "norm twice": (lambda m, x: F.relu(m.norm(F.relu(m.norm(x)))), "relu"),
}
LEFT = {
    "returned": (lambda m, x: m.norm(x), "returned"),
    "used twice": (lambda m, x: F.relu(u := m.norm(x)) + u, "more than once"),
    "sum used twice": (lambda m, x: F.relu(u := m.norm(x) + x) + u, "more than once"),
    "a number": (lambda m, x: F.relu(m.norm(x) + 1), "a number"),
    "into the residual": (lambda m, x: F.relu((x * 2).add_(m.norm(x))), "in place"),
    "elu": (lambda m, x: F.elu(m.norm(x)), "elu follows"),
    "prelu": (lambda m, x: m.prelu(m.norm(x)), "PReLU follows"),
    "a slope that is computed": (lambda m, x: F.leaky_relu(m.norm(x), x.mean()), "leaky_relu follows"),
    "add gelu": (lambda m, x: F.gelu(m.norm(x) + x), "needs the sum"),
    "add silu": (lambda m, x: F.silu(m.norm(x) + x), "needs the sum"),
    "with alpha": (lambda m, x: F.relu(torch.add(m.norm(x), x, alpha=2)), "add follows"),
    "mutated": (lambda m, x: F.relu(m.norm(y := x * 1) + y.mul_(2)), "in place"),
    "branch": (lambda m, x: F.relu(m.norm(x)) if x.sum() > 0 else x, "cannot be rewritten"),
    "shape branch": (lambda m, x: F.relu(m.norm(x)) if x.shape[0] > 1 else x, "cannot be rewritten"),
    "random": (lambda m, x: F.relu(m.norm(x)) * random.random(), "random numbers"),
    "torch random": (lambda m, x: F.relu(m.norm(x)) * torch.rand(1), "cannot be rewritten"),
    "constant": (lambda m, x: F.relu(m.norm(x)) * torch.ones(1), "cannot be rewritten"),
    "no_grad": (lambda m, x: _no_grad(m, x), "context manager"),
    "autocast": (lambda m, x: _autocast(m, x), "context manager"),
    "nvfp4": (lambda m, x: _nvfp4(m, x), "context manager"),
    "checkpoint": (lambda m, x: _checkpoint(m, x, False), "cannot be rewritten"),
    "checkpoint reentrant": (lambda m, x: _checkpoint(m, x, True), "cannot be rewritten"),
    "counter": (lambda m, x: _counted(m, x), "sets attributes"),
    "class of a result": (lambda m, x: F.relu(m.norm(x)) if isinstance(x * 2, Tensor) else x, "asks for the class"),
    "child's flag": (lambda m, x: F.relu(m.norm(x)) * (2 if m.act.training else 1), "flag of another module"),
}


def _no_grad(m, x):
    with torch.no_grad():
        return F.relu(m.norm(x))


def _autocast(m, x):
    with torch.autocast("cpu", enabled=False):
        return F.relu(m.norm(x))


def _nvfp4(m, x):
    with nvfp4_autocast(enabled=False):
        return F.relu(m.norm(x))


def _checkpoint(m, x, reentrant):
    return torch.utils.checkpoint.checkpoint(lambda t: F.relu(m.norm(t)), x, use_reentrant=reentrant)


def _counted(m, x):
    m.calls += 1
    return F.relu(m.norm(x))


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("kind", ["batch", "group"])
def test_pattern(name, kind):
    function, what = FUSED[name]
    model = Forward(function, nn.GroupNorm(2, 8) if kind == "group" else None)
    plain, x = copy.deepcopy(model), values((2, 8, 4, 4))
    report = fuse(model, report=True)
    fused = {row.name: row.fused for row in report.rows if row.fused}
    assert what in fused.values() and len(fused) == 1, str(report)
    assert nodes(model(x), "NormAct") >= 1
    plain(x)
    assert same(step(plain, x), step(model, x))


@pytest.mark.parametrize("name", LEFT)
def test_what_is_left_alone(name):
    function, reason = LEFT[name]
    model = Forward(function)
    x = values((2, 8, 4, 4)).requires_grad_()
    report = fuse(model, report=True)
    row = next(row for row in report.rows if row.name == "norm")
    assert not row.fused and reason in row.reason, row
    assert model.calls == 0 and type(model) is Forward and reason in str(report)
    model.norm.eval()
    plain = Forward(function).eval()
    plain.act.train()
    assert "slope" in name or model(x).shape == x.shape


def test_norms_of_other_classes_and_with_hooks_are_left():
    class Own(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    for norm, reason in (
        (Own(8), "Own is not torch's own norm, and its forward does more than call that and children"),
        (nn.SyncBatchNorm(8), "SyncBatchNorm is not torch's own norm"),
        (nn.LazyBatchNorm2d(), "is not torch's own norm"),
    ):
        report = fuse(Forward(FUSED["module"][0], norm), report=True)
        assert reason in str(report)
    hooked = Forward(FUSED["module"][0])
    hooked.norm.register_forward_hook(lambda *_: None)
    assert "it has hooks" in str(fuse(hooked, report=True))
    hooked = Forward(FUSED["module"][0])
    hooked.act.register_forward_hook(lambda *_: None)
    assert "activation that follows it has hooks" in str(fuse(hooked, report=True))


@pytest.mark.parametrize("child", [0, 1], ids=["norm", "activation"])
def test_hooks_put_on_after_fusing_see_and_change_what_they_would_unfused(child):
    x = values((2, 8, 3, 3))
    results = []
    for prepare in (lambda model: model, fuse):
        model, seen = prepare(nn.Sequential(nn.BatchNorm2d(8), nn.ReLU())), []
        model[child].register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args))
        model[child].register_forward_hook(lambda module, args, y: y * 2 - 1)
        results.append([model(x), *(t for args in seen for t in args)])
    assert len(results[0]) == 2 and same(*results)


def in_place_on_the_norms_input(self, x):
    u, z = self.norm(x), x.add_(1)
    return F.relu(u) + z


def in_place_module_on_the_norms_input(self, x):
    u = self.norm(x)
    return F.relu(u + self.inplace(x))


def one_norm_twice_in_another_order(self, x):
    u, v = self.norm(x), self.norm(x * 2)
    w = F.relu(v)
    return F.relu(u) - w


def one_norm_on_both_sides(self, x):
    return F.relu(self.norm(x) + self.norm(x * 2))


def an_alias_written_in_place(self, x):
    x = x * 2
    kept = x
    x += 1
    return F.relu(self.norm(x)) + kept


def a_sum_in_place_in_the_norms_dtype(self, x):
    u = self.norm(x.bfloat16())
    u += x
    return F.relu(u)


def gradients_are_off(self, x):
    return F.relu(self.norm(x)) * (1 if torch.is_grad_enabled() else 2)


def asked_in_a_helper(self, x):
    return F.relu(self.norm(twice_without_autocast(x)))


def twice_without_autocast(x):
    return x if torch.is_autocast_enabled("cpu") else x * 2


def type_of_a_tensor(self, x):
    return F.relu(self.norm(x * 2 if type(x) is Tensor else x))


def attribute_of_a_tensor(self, x):
    return F.relu(self.norm(x.tensors if hasattr(x, "tensors") else x))


def in_place_module_on_the_residual(self, x):
    y = x * 1
    u = self.norm(self.conv(x)) + y
    return self.inplace(y) + F.relu(u)


def in_place_module_on_the_residual_of_a_sum_in_place(self, x):
    y, u = x * 1, self.norm(self.conv(x))
    u += y
    z = self.inplace(y)
    return F.relu(u) + z


def a_dtype_by_is(self, x):
    return F.relu(self.norm(x)) * (2 if x.dtype is torch.float32 else 1)


def a_dtype_in_a_set(self, x):
    return F.relu(self.norm(x)) * (2 if x.dtype in {torch.float32} else 1)


def a_gradient_that_is_not_there(self, x):
    return F.relu(self.norm(x)) * (2 if x.grad_fn is None else 1)


@pytest.mark.parametrize(
    "function",
    [
        in_place_module_on_the_residual,
        in_place_module_on_the_residual_of_a_sum_in_place,
        a_dtype_by_is,
        a_dtype_in_a_set,
        a_gradient_that_is_not_there,
        in_place_on_the_norms_input,
        in_place_module_on_the_norms_input,
        one_norm_twice_in_another_order,
        one_norm_on_both_sides,
        an_alias_written_in_place,
        a_sum_in_place_in_the_norms_dtype,
        gradients_are_off,
        asked_in_a_helper,
        type_of_a_tensor,
        attribute_of_a_tensor,
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_order_aliases_and_questions_of_a_forward(function, training):
    results = []
    for prepare in (lambda model: model, fuse):
        torch.manual_seed(0)
        model = prepare(Odd(function)).train(training)
        with torch.no_grad():
            y = model(values((2, 8, 4, 4)))
        results.append([y, *(b.clone() for b in model.buffers())])
    assert results[0][0].dtype == results[1][0].dtype and same(*results)


class Odd(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.norm, self.inplace, self.function = nn.BatchNorm2d(8), nn.ReLU(inplace=True), function
        self.scale, self.activation, self.more = 1.0, F.relu, nn.ModuleList([nn.Identity()])
        self.conv = nn.Conv2d(8, 8, 1)
        self.register_module("late", None)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


class Configured(Odd):
    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(self.norm(x)) * self.scale
        for module in self.more:
            x = module(x)
        return x if self.late is None else self.late(x)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: setattr(model, "scale", 2.0),
        lambda model: setattr(model, "activation", F.gelu),
        lambda model: model.more.append(nn.Tanh()),
        lambda model: setattr(model, "late", nn.Tanh()),
    ],
    ids=["number", "function", "module list", "late child"],
)
def test_what_a_forward_reads_may_change_after_fusing(change):
    x, results = values((2, 8, 4, 4)), []
    for prepare in (lambda model: model, fuse):
        model = prepare(Configured(None))
        before = model(x).detach()
        change(model)
        results.append([before, model(x)])
    assert same(*results) and not torch.equal(*results[0])


def what_a_flag_says(self, x, flag):
    return F.relu(self.norm(x)) * (2 if flag is True else 1)


def what_a_set_holds(self, x, flag):
    return F.relu(self.norm(x)) * (2 if flag in {"double"} else 1)


def what_a_dictionary_holds(self, x, flag):
    return F.relu(self.norm(x)) * {"double": 2}.get(flag, 1)


def what_a_pattern_finds(self, x, flag):
    match flag:
        case [_, factor]:
            return F.relu(self.norm(x)) * factor
    return F.relu(self.norm(x))


def what_a_list_lacks(self, x, flag):
    return F.relu(self.norm(x)) * (2 if flag[0] is None else 1)


@pytest.mark.parametrize(
    ("function", "flag"),
    [
        (what_a_flag_says, True),
        (what_a_set_holds, "double"),
        (what_a_dictionary_holds, "double"),
        (what_a_pattern_finds, [1, 2]),
        (what_a_list_lacks, [None, 1]),
    ],
)
def test_arguments_that_are_no_tensors(function, flag):
    class Asks(Odd):
        def forward(self, x: Tensor, flag: Any) -> Tensor:
            return self.function(self, x, flag)

    x = values((2, 8, 4, 4))
    model = Asks(function)
    y = model(x, flag)
    assert torch.equal(y, fuse(Asks(function))(x, flag)) and not torch.equal(y, F.relu(model.norm(x)))


def test_attributes_that_a_forward_gives_a_tensor():
    def tags(self, x):
        y = F.relu(self.norm(x))
        y.tag = "here"
        return y

    assert fuse(Odd(tags))(values((2, 8, 4, 4))).tag == "here"


class AsksForClasses(Odd):
    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm(x))
        for module in self.more:
            y = y * 2 if isinstance(module, nn.Identity) else module(y)
        return y


def test_a_child_of_another_class_after_fusing():
    x, results = values((2, 8, 4, 4)), []
    for prepare in (lambda model: model, fuse):
        model = prepare(AsksForClasses(None))
        model(x)
        model.more[0] = nn.Tanh()
        results.append([model(x)])
    assert same(*results)


def test_asking_for_classes_does_not_undo_a_fusion():
    model = AsksForClasses(None)
    model.more[0] = nn.Sequential(nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 1))
    convert_model(fuse(model), filter_fn=lambda layer, name: name.endswith("3"))  # both change classes
    assert nodes(model(values((2, 8, 4, 4))), "NormAct") == 2


def test_a_sum_in_place_keeps_its_dtype():
    def wider(self, x):
        y = x.double() + 1
        y += self.norm(x)
        return F.relu(y)

    results = []
    for prepare in (lambda model: model, fuse):
        torch.manual_seed(0)
        model = prepare(Odd(wider))
        results.append(step(model, values((2, 8, 4, 4))))
    assert results[0][0].dtype == torch.float64 == results[1][0].dtype and same(*results)


def test_one_norm_called_plainly_and_fused_in_one_step():
    shared = nn.BatchNorm2d(8)
    a, b = nn.Sequential(nn.Identity(), shared), nn.Sequential(shared, nn.ReLU())
    fuse(b)
    x = values((2, 8, 4, 4))
    (a(x).square() + b(x)).sum().backward()  # the fused call must not outdate what the plain one keeps for backward
    assert shared.weight.grad is not None and shared.num_batches_tracked == 2


def test_forwards_that_put_tensors_elsewhere_are_left():
    kept: list[Tensor] = []

    def keeping(self, x):
        kept.append(F.relu(self.norm(x)))
        return kept[-1]

    model = Odd(keeping)
    assert "puts tensors into a list" in str(fuse(model, report=True))
    kept.clear()
    y = model(values((2, 8, 4, 4)))
    assert kept[0] is y


def test_replaced_forwards_and_odd_modules_are_left():
    model = nn.Sequential(nn.BatchNorm2d(8), nn.ReLU())
    model.forward = lambda x: x  # type: ignore[method-assign]
    assert "replaced" in str(fuse(model, report=True))
    graph = torch.fx.symbolic_trace(nn.Sequential(nn.BatchNorm2d(8), nn.ReLU()))
    assert fuse(graph, report=True).fused == 0
    script = torch.jit.script(nn.Sequential(nn.BatchNorm2d(8), nn.ReLU()))
    assert fuse(nn.Sequential(script), report=True).fused == 0
    assert fuse(nn.Linear(2, 2), report=True).rows == []


@pytest.mark.parametrize("child", [0, 1], ids=["norm", "activation"])
@pytest.mark.parametrize("first", [fuse, lambda model: model], ids=["after", "before"])
def test_a_forward_that_replaces_a_childs(first, child):
    def replace(model):
        plain = model[child].forward
        model[child].forward = lambda x: plain(x) * 3
        return model

    x = values((2, 8, 4, 4))
    expected = replace(nn.Sequential(nn.BatchNorm2d(8), nn.ReLU()))(x)
    assert torch.equal(fuse(replace(first(nn.Sequential(nn.BatchNorm2d(8), nn.ReLU()))))(x), expected)


def test_a_copy_as_the_class_wants_it():
    class Shares(Odd):
        def __deepcopy__(self, memo: Any) -> Shares:
            new = Shares(self.function)
            new.table = self.table
            return new

    model = Shares(lambda self, x: F.relu(self.norm(x)))
    model.table = ["shared"]
    assert copy.deepcopy(fuse(model)).table is model.table


def test_the_state_of_torch_is_untouched():
    model = Forward(LEFT["torch random"][0])
    before = torch.get_rng_state(), random.getstate(), torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
    training = [m.training for m in model.modules()]
    fuse(model)
    after = torch.get_rng_state(), random.getstate(), torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
    assert torch.equal(before[0], after[0]) and before[1:] == after[1:]
    assert [m.training for m in model.modules()] == training


def test_wrong_type():
    with pytest.raises(TypeError, match="fuse: not a module"):
        fuse("resnet18")  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="fuse: not a module"):
        fuse(nn.ReLU)  # type: ignore[call-overload]


def test_double_precision_runs_as_torch():
    model = fuse(Block()).double()
    plain = Block().double()
    plain.load_state_dict(model.state_dict())
    x = values((2, 16, 4, 4)).double()
    assert same(step(plain, x), step(model, x))


def test_the_norm_classes_are_the_explicit_modules():
    model = fuse(Block())
    assert type(model.bn1) is BatchNormAct2d and model.bn1.activation is None
    assert same_bits(
        model.bn1.eval()(values((2, 16, 3, 3))), F.batch_norm(values((2, 16, 3, 3)), torch.zeros(16), torch.ones(16))
    )
    assert issubclass(NormAct, torch.autograd.Function)
