"""Activations quantized where they are made: bit for bit the operands of the activation that was not written."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from te_nvfp4_cv import nvfp4_autocast, set_precision
from te_nvfp4_cv.backend import dispatch
from te_nvfp4_cv.fusion.fuse import fuse
from te_nvfp4_cv.fusion.modules import BatchNormAct2d
from te_nvfp4_cv.layer import deferred, observe
from te_nvfp4_cv.ops.geometry import Fold
from te_nvfp4_cv.ops.norm import operators as ops
from te_nvfp4_cv.ops.quantize import operand
from te_nvfp4_cv.ops.records import DEQUANTIZED, NONE, PACKED, OperandSpec
from te_nvfp4_cv.recipe.block_scaling import NVFP4BlockScaling
from tests.helpers import same_bits, values

EXACT = NVFP4BlockScaling(disable_stochastic_rounding=True)


@pytest.fixture(autouse=True)
def _kernels(kernel_device, monkeypatch):
    """The vendor backend takes its path on CUDA."""
    monkeypatch.setattr(dispatch, "KERNELS_ON_CPU", True)


def last(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last)


# what: statistics, activation, dtype and padding of the images; row, col, given: the kernel's constants. Every pair of
# constants meets every `what`; all three together meet two of them each.
@pytest.mark.parametrize("col", [NONE, PACKED], ids=["row only", "both"])
@pytest.mark.parametrize("row", [PACKED, DEQUANTIZED], ids=["packed", "dequantized"])
@pytest.mark.parametrize(
    ("what", "dtype", "batch", "odd"),
    [
        ("batch add relu", torch.bfloat16, 20, False),
        ("batch silu", torch.float16, 3, True),
        ("group silu", torch.bfloat16, 18, False),
        ("group relu", torch.float32, 16, True),
        ("batch hardswish", torch.bfloat16, 17, True),
    ],
)
def test_operands_and_mask(kernel_device, poison, what, dtype, batch, odd, row, col):
    given = ((row == PACKED) == (col == PACKED)) != odd
    groups, activation = 4 if what.startswith("group") else 0, what.split()[-1]
    z = last((values((batch, 32, 2, 3)) * 2).to(dtype)).to(kernel_device)
    residual = last(values(z.shape, seed=3).to(dtype)).to(kernel_device) if "add" in what else None
    weight, bias = (values((32,), seed=i).to(kernel_device) for i in (1, 2))
    spec = ops.NormSpec(groups, activation, True, 0.1, 1e-5, need_mask=True, backend="triton").encode()
    y, mean, rstd, mask = ops.norm_forward(z, residual, weight, bias, None, None, spec)
    images = -(-batch // 16) * 16
    amax = torch.tensor([2688 * 2.0**-9, 2688 * 2.0**-8], device=kernel_device) if given else None
    target = torch.float32 if dtype == torch.float16 else dtype
    bits = torch.full_like(mask, 0xA5)
    how = OperandSpec(1, Fold(1, 0, z.shape[2], 0, images), row, col, rht=True)
    found = ops.norm_quantize_op(z, residual, [mean, rstd, weight, bias], bits, spec, how.to_ints(), target, amax)
    x = y.movedim(1, -1).contiguous()
    expected = operand.quantize_operand(x, how, target, None, amax, "reference").flat()
    assert torch.equal(bits, mask)
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        if col or i < 5:
            assert same_bits(a, b), i
    if given and what == "batch add relu":
        assert float(found[6][2]) > 0  # blocks that the given scale saturates


def test_an_image_of_more_values_than_32_bits_hold(kernel_device, monkeypatch):
    """Its first program alone, whose tile is that of a small image."""
    from te_nvfp4_cv.ops.norm.triton import quantize_kernels, quantize_launch

    launches = []

    def start(kernel, grid, *arguments, **constants):
        launches.append((kernel, arguments, constants))
        kernel[grid](*arguments, **constants)

    monkeypatch.setattr(quantize_launch, "start", start)
    z = last(values((1, 16, 4, 8))).to(kernel_device)
    spec = ops.NormSpec(0, "relu", True, 0.1, 1e-5, need_mask=True, backend="triton").encode()
    _, mean, rstd, mask = ops.norm_forward(z, None, None, None, None, None, spec)
    how = OperandSpec(1, Fold(1, 0, 4, 0, 16), PACKED, PACKED, rht=True)
    made = ops.norm_quantize_op(z, None, [mean, rstd], mask, spec, how.to_ints(), torch.float32, None)
    kernel, arguments, constants = launches[-1]
    assert kernel is quantize_kernels.produce_kernel
    images, run, per_row, channels = arguments[-4:]
    assert (images, run) == (1, 512)
    written = arguments[8:12]  # both faces
    expected = [t.clone() for t in written]
    for t in written:
        t.fill_(0x55)
    larger = 3 * 2**30
    kernel[(1,)](*arguments[:-4], images, larger, larger // 512, channels, **constants)
    assert made[0].numel() and all(same_bits(a, b) for a, b in zip(written, expected, strict=True))


def test_non_finite_activations(kernel_device):
    for kind in ("nan", "inf"):
        z = last(values((16, 16, 2, 2), kind)).to(kernel_device)
        stats = torch.zeros(16, device=kernel_device), torch.ones(16, device=kernel_device)
        mask = torch.empty(z.numel() // 8, dtype=torch.uint8, device=kernel_device)
        x = F.relu(z).movedim(1, -1).contiguous()
        for amax in (None, torch.full((2,), 2688.0, device=kernel_device)):
            how = OperandSpec(1, Fold(1, 0, 2, 0, 16), DEQUANTIZED, PACKED, rht=True)
            spec = ops.NormSpec().encode(), how.to_ints()
            found = ops.norm_quantize_op(z, None, list(stats), mask, *spec, torch.float32, amax)
            expected = operand.quantize_operand(x, how, torch.float32, None, amax, "reference").flat()
            assert all(same_bits(found[i], expected[i]) for i in (2, 5))
            assert not bool(found[2].isfinite()) and not bool(found[5].isfinite())


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("amax", [None, (2688.0, 2688.0)])
def test_operators_pass_opcheck(kernel_device, amax):
    given = None if amax is None else torch.tensor(amax, device=kernel_device)
    found = torch.ops.te_nvfp4_cv
    z = last(values((16, 16, 2, 2))).to(kernel_device)
    running = torch.zeros(16, device=kernel_device), torch.ones(16, device=kernel_device)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    spec = ops.NormSpec(momentum=0.1, eps=1e-5).encode()
    torch.library.opcheck(found.norm_statistics.default, (z, *running, spec), test_utils=tests)
    mask = torch.zeros(z.numel() // 8, dtype=torch.uint8, device=kernel_device)
    parts = (z, None, list(running))
    torch.library.opcheck(found.norm_apply.default, (*parts, torch.empty_like(z), mask, spec), test_utils=tests)
    operand_spec = OperandSpec(1, Fold(1, 0, 2, 0, 16), PACKED, PACKED, rht=True)
    how = (spec, operand_spec.to_ints(), torch.float32, given)
    torch.library.opcheck(found.norm_quantize.default, (*parts, mask, *how), test_utils=tests)


# ---- in a model -----------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Norms before convolutions: one reader, two readers, a reader that stays in high precision."""

    def __init__(self, norm: Any = nn.BatchNorm2d, channels: int = 16) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 1, bias=False)
        self.norm1, self.norm2, self.norm3 = norm(channels), norm(channels), norm(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.left, self.right = nn.Conv2d(channels, 16, 1), nn.Conv2d(channels, 16, 1)
        self.thin = nn.Conv2d(channels, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(F.relu(self.norm1(self.conv1(x))))
        y = F.relu(self.norm2(y) + x)
        y = self.left(y) + self.right(y)
        return y.sum() + self.thin(F.silu(self.norm3(x))).sum()


def group(channels: int) -> nn.Module:
    return nn.GroupNorm(4, channels)


def step(model: nn.Module, x: Tensor, recipe: NVFP4BlockScaling, backend: str = "vendor") -> list[Tensor]:
    torch.manual_seed(3)
    model.zero_grad()
    leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
    with torch.autocast(x.device.type, torch.bfloat16), nvfp4_autocast(recipe, backend=backend):
        loss = model(leaf).float().square().sum()
    loss.float().backward()
    return [loss.detach(), leaf.grad, *(p.grad for p in model.parameters()), *(b.clone() for b in model.buffers())]


def count(monkeypatch) -> list[str]:
    """Names of what producers did, as it happens."""
    done: list[str] = []
    for name in ("quantize", "write"):
        original = getattr(deferred.Producer, name)

        def told(self, *args, name=name, original=original):
            done.append(name)
            return original(self, *args)

        monkeypatch.setattr(deferred.Producer, name, told)
    return done


@pytest.mark.parametrize(("norm", "backend"), [(nn.BatchNorm2d, "triton"), (group, "vendor")], ids=["batch", "group"])
def test_the_same_bits_as_with_the_activation_written(kernel_device, monkeypatch, norm, backend):
    torch.manual_seed(0)
    model = fuse(Block(norm)).to(kernel_device).to(memory_format=torch.channels_last)
    x = last(values((16, 16, 2, 2)).bfloat16()).to(kernel_device)
    written = copy.deepcopy(model)
    done = count(monkeypatch)
    found = step(model, x, EXACT, backend)
    assert done == ["quantize"] * 3 + ["write"]  # the thin convolution runs in high precision
    monkeypatch.setattr(deferred, "wanted", lambda *_: False)
    expected = step(written, x, EXACT, backend)
    assert len(done) == 4
    for a, b in zip(found, expected, strict=True):
        assert same_bits(a, b) if a.dtype.is_floating_point else torch.equal(a, b)


def test_delayed_scales(kernel_device, monkeypatch):
    torch.manual_seed(0)
    recipe = NVFP4BlockScaling(disable_stochastic_rounding=True, tensor_scale="delayed")
    layers = nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 1)
    model = fuse(nn.Sequential(*layers)).to(kernel_device).to(memory_format=torch.channels_last)
    written = copy.deepcopy(model)
    done = count(monkeypatch)
    batches = [last(values((16, 16, 2, 2), seed=i).bfloat16()).to(kernel_device) for i in range(2)]
    found = [step(model, x, recipe) for x in batches]
    assert done == ["write", "quantize"]  # the first step measures
    monkeypatch.setattr(deferred, "wanted", lambda *_: False)
    expected = [step(written, x, recipe) for x in batches]
    for a, b in zip(sum(found, []), sum(expected, []), strict=True):
        assert same_bits(a, b) if a.dtype.is_floating_point else torch.equal(a, b)


def test_evaluation(kernel_device, monkeypatch):
    model = fuse(Block()).to(kernel_device).to(memory_format=torch.channels_last).eval()
    x = last(values((16, 16, 2, 2))).to(kernel_device)
    done = count(monkeypatch)
    with torch.no_grad(), nvfp4_autocast(EXACT):
        found = model(x)
        assert "quantize" in done
        monkeypatch.setattr(deferred, "wanted", lambda *_: False)
        assert same_bits(found, model(x))


def test_equal_faces_are_made_once(kernel_device, monkeypatch):
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(16)
            self.a, self.b = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            y = F.relu(self.norm(x))
            return (self.a(y) + self.b(y)).sum()

    made = []
    original = ops.norm_quantize
    monkeypatch.setattr(ops, "norm_quantize", lambda *a: made.append(1) or original(*a))
    model = fuse(Two()).to(kernel_device).to(memory_format=torch.channels_last)
    step(model, last(values((16, 16, 2, 2)).bfloat16()).to(kernel_device), EXACT)
    assert len(made) == 1


@pytest.mark.parametrize(
    "case",
    [
        "folded",
        "channels first",
        "override",
        "hook",
        "backward hook",
        "saved tensors hook",
        "four over six",
        "observer",
        "function mode",
        "fp32 norm",
        "no context",
        "replaced norm",
    ],
)
def test_what_is_written_after_all(kernel_device, monkeypatch, case):
    """Each case gives what the unfused chain gives; none reads an activation that is not there."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1))
    model = fuse(model).to(kernel_device).to(memory_format=torch.channels_last)
    batch = 4 if case == "folded" else 16
    x = values((batch, 16, 4, 4)).bfloat16().to(kernel_device)
    x = x if case == "channels first" else last(x)
    recipe = (
        NVFP4BlockScaling(nvfp4_4over6="all", disable_rht=True, disable_stochastic_rounding=True)
        if case == "four over six"
        else EXACT
    )
    seen: list[Tensor] = []
    if case == "override":
        set_precision(model, {"2": None})
    if case == "hook":
        model[2].register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    if case == "backward hook":
        model[2].register_full_backward_hook(lambda *_: None)
    if case == "replaced norm":
        model[0] = nn.Sequential(BatchNormAct2d(16, activation="relu"), nn.Tanh()).to(kernel_device)
    if case == "fp32 norm":
        x = x.float()
    done = count(monkeypatch)

    def run() -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16), nvfp4_autocast(recipe, enabled=case != "no context"):
            if case == "observer":
                with observe.observe(lambda call: seen.append(call.x.clone())):
                    return model(x)
            if case == "function mode":
                with Reading(seen):
                    return model(x)
            if case == "saved tensors hook":
                with torch.autograd.graph.save_on_cpu():
                    return model(x)
            return model(x)

    found = run()
    assert "quantize" not in done
    assert bool(seen) == (case in ("hook", "observer", "function mode")) and found.isfinite().all()
    monkeypatch.setattr(deferred, "wanted", lambda *_: False)
    assert same_bits(found.detach(), run().detach())


class Reading(TorchFunctionMode):
    """Reads the input of each convolution."""

    def __init__(self, seen: list[Tensor]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_function__(self, function, types, args=(), kwargs=None):  # noqa: A002
        if function is torch.nn.functional.conv2d:
            self.seen.append(args[0].clone())
        return function(*args, **(kwargs or {}))


def test_an_unwritten_activation_cannot_be_read_by_accident(kernel_device):
    z = last(values((16, 16, 2, 2))).to(kernel_device)
    norm = fuse(nn.Sequential(nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 1))).to(kernel_device)[0]
    with deferred.deferring(), nvfp4_autocast(EXACT):
        y = norm(z, None, "relu")
    assert y.shape == z.shape and y.untyped_storage().nbytes() == 0
    deferred.settle(y)
    norm.train()
    assert same_bits(y.detach(), norm(z, None, "relu").detach())
    deferred.settle(y)  # of a tensor that is written already: nothing
    deferred.settle(None)
