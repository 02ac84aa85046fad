"""The kernels of ops/norm against torch in float64: values, gradients, statistics, masks, in both memory orders.

Tolerances are relative Frobenius norms: a few fp32 roundings for fp32, one rounding of the stored type for bf16 (2^-9
at most, 1.7e-3 in the mean) and fp16.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from te_nvfp4_cv.fusion.norm_act import batch_norm_act, group_norm_act
from te_nvfp4_cv.ops.norm import operators as ops
from te_nvfp4_cv.ops.norm import reference
from te_nvfp4_cv.ops.relu import positive_mask
from tests.helpers import relative_error, same_bits, values

STORED = {torch.float32: 1e-6, torch.bfloat16: 2.5e-3, torch.float16: 4e-4}
SUMS = 3e-6  # of fp32 sums: gradients of weight and bias, statistics


@pytest.fixture(autouse=True)
def _kernels(kernel_device, poison):
    """Every test here runs the kernels, into poisoned memory."""


def arguments(shape: tuple[int, ...], dtype: torch.dtype, last: bool, device: Any) -> dict[str, Tensor]:
    c = shape[1]
    z, residual, dy = (values(shape, seed=i).to(dtype) for i in range(3))
    z = (z * 2 + 3 * values((c,), seed=9).view(-1, *[1] * (len(shape) - 2))).to(dtype)
    found = dict(z=z, residual=residual, dy=dy, weight=values((c,), seed=4), bias=values((c,), seed=5))
    found |= dict(running_mean=values((c,), seed=6), running_var=values((c,), seed=7).square() + 0.5)
    if last:
        for name in ("z", "residual", "dy"):
            formats = {4: torch.channels_last, 5: torch.channels_last_3d}
            found[name] = found[name].contiguous(memory_format=formats[len(shape)])
    return {name: t.to(device) for name, t in found.items()}


def run(a: dict[str, Tensor], what: str, training: bool, exact: bool) -> dict[str, Tensor]:
    """y and every gradient: by the kernels, or by torch in float64."""
    a = {name: (t.double() if exact else t).clone() for name, t in a.items()}
    z, residual, weight, bias = (a[n].requires_grad_() for n in ("z", "residual", "weight", "bias"))
    kind, activation = what.split()[0], what.split()[-1]
    added = residual if "add" in what else None
    if exact:
        if kind == "batch":
            u = F.batch_norm(z, a["running_mean"], a["running_var"], weight, bias, training, 0.3, 1e-3)
        else:
            u = F.group_norm(z, 4, weight, bias, 1e-3)
        u = u if added is None else u + added
        y = reference.activate(u, activation)
    elif kind == "batch":
        running = a["running_mean"], a["running_var"]
        more: dict[str, Any] = dict(residual=added, activation=activation, backend="triton")
        y = batch_norm_act(z, *running, weight, bias, training, 0.3, 1e-3, **more)
    else:
        y = group_norm_act(z, 4, weight, bias, 1e-3, residual=added, activation=activation, backend="triton")
    y.backward(a["dy"].to(y.dtype))
    found = dict(y=y.detach(), dz=z.grad, dweight=weight.grad, dbias=bias.grad)
    if added is not None:
        found["dresidual"] = residual.grad
    if kind == "batch":
        found |= dict(running_mean=a["running_mean"], running_var=a["running_var"])
    return found


WHATS = ["batch relu", "batch add relu", "batch silu", "group relu", "group add relu", "group silu"]


MORE = ["batch hardswish", "group relu6", "batch gelu", "group gelu_tanh", "batch leaky_relu:0.1"]


# what: a formula each; last: the two orders in which the kernels walk; dtype: how values are loaded and stored, on
# which no formula depends, so that 16 bits meet one norm of each kind
@pytest.mark.parametrize("last", [True, False], ids=["channels last", "channels first"])
@pytest.mark.parametrize(
    ("what", "dtype"),
    [(what, torch.float32) for what in (*WHATS, *MORE)]
    + [(what, dtype) for what in ("batch add relu", "group silu") for dtype in (torch.bfloat16, torch.float16)],
    ids=str,
)
def test_values_and_gradients(kernel_device, what, last, dtype):
    a = arguments((3, 24, 5, 7), dtype, last, kernel_device)
    truth, found = run(a, what, True, True), run(a, what, True, False)
    for name, expected in truth.items():
        bound = STORED[dtype] if name in ("y", "dz", "dresidual") else SUMS
        assert found[name].isfinite().all() and relative_error(found[name], expected) <= bound, name
    assert found["y"].stride() == a["z"].stride() and found["dz"].stride() == a["z"].stride()


@pytest.mark.parametrize("last", [True, False], ids=["channels last", "channels first"])
@pytest.mark.parametrize("what", WHATS[:3])
def test_running_statistics_are_used(kernel_device, what, last):
    a = arguments((3, 24, 5, 7), torch.float32, last, kernel_device)
    truth, found = run(a, what, False, True), run(a, what, False, False)
    for name, expected in truth.items():
        assert relative_error(found[name], expected) <= SUMS, name
    assert same_bits(found["running_mean"], a["running_mean"])


SHAPES = [(7, 16), (2, 8, 1, 1), (5, 20, 9), (2, 3, 5, 5), (1, 8, 3, 4, 5), (2, 100, 3, 3), (2, 8, 40, 60)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("what", ["batch relu", "group silu"])
def test_shapes(kernel_device, shape, what):
    if what == "group silu" and shape[1] % 4:
        shape = (shape[0], 4 * shape[1], *shape[2:])
    for last in (False, True) if len(shape) in (4, 5) else (False,):
        a = arguments(shape, torch.float32, last, kernel_device)
        truth, found = run(a, what, True, True), run(a, what, True, False)
        for name, expected in truth.items():
            bound = 1e-3 if shape == (2, 8, 1, 1) else 1e-5  # dz of two elements is what cancellation leaves
            assert relative_error(found[name], expected) <= bound, (name, last)


def test_large_means_do_not_cancel(kernel_device):
    a = arguments((4, 8, 16, 16), torch.float32, True, kernel_device)
    a["z"] = a["z"] + 1000.0
    truth, found = run(a, "batch relu", True, True), run(a, "batch relu", True, False)
    assert relative_error(found["running_var"], truth["running_var"]) <= 1e-5
    assert relative_error(found["y"], truth["y"]) <= 1e-4  # 1000 + x holds x to 6e-5
    a["z"] = torch.zeros_like(a["z"])
    a["z"][0, :, 0, 0] = 1000.0  # the first element is the outlier
    truth, found = run(a, "batch silu", True, True), run(a, "batch silu", True, False)
    assert relative_error(found["running_var"], truth["running_var"]) <= 1e-5


@pytest.mark.parametrize("last", [True, False], ids=["channels last", "channels first"])
def test_the_mask_is_relus(kernel_device, last):
    a = arguments((3, 20, 5, 7), torch.bfloat16, last, kernel_device)
    given = (a["z"], a["residual"], a["weight"], a["bias"], None, None)
    spec = ops.NormSpec(momentum=0.1, eps=1e-5, need_mask=True, backend="triton")
    y, _, _, mask = ops.norm_forward(*given, spec.encode())
    assert torch.equal(mask, positive_mask(y))
    assert ops.norm_forward(*given, replace(spec, need_mask=False).encode())[3].numel() == 0


@pytest.mark.parametrize("what", ["batch relu", "group relu"])
def test_non_finite_values(kernel_device, what):
    for kind in ("nan", "inf"):
        a = arguments((2, 8, 3, 4), torch.float32, True, kernel_device)
        a["z"] = values((2, 8, 3, 4), kind).to(kernel_device)
        truth, found = run(a, what, True, True), run(a, what, True, False)
        assert torch.equal(truth["y"].isfinite(), found["y"].isfinite())
        assert torch.equal(truth["dz"].isfinite(), found["dz"].isfinite())


def test_without_affine_and_without_running_statistics(kernel_device):
    z = values((3, 8, 4, 4)).to(kernel_device).requires_grad_()
    y = batch_norm_act(z, None, None, training=True, backend="triton")
    y.sum().backward()
    other = z.detach().double().requires_grad_()
    truth = F.relu(F.batch_norm(other, None, None, training=True))
    truth.sum().backward()
    assert relative_error(y, truth) <= 1e-6 and float((z.grad - other.grad).abs().max()) <= 1e-5


def test_mixed_residual_and_parameters(kernel_device):
    a = arguments((2, 8, 4, 4), torch.bfloat16, True, kernel_device)
    a["residual"] = a["residual"].float().contiguous()  # another dtype and memory order
    y = batch_norm_act(a["z"], None, None, a["weight"].bfloat16(), a["bias"].bfloat16(), True, residual=a["residual"])
    given = dict(residual=a["residual"], backend="triton")
    found = batch_norm_act(a["z"], None, None, a["weight"].bfloat16(), a["bias"].bfloat16(), True, **given)
    assert found.dtype == torch.float32 == y.dtype and found.stride() == y.stride()
    assert relative_error(found, y) <= 4e-3  # torch rounds the norm to bf16 before the addition


def test_what_the_kernels_do_not_take_goes_to_aten(kernel_device):
    assert ops.backend_for(values((2, 4, 3, 3)).double(), "triton") == "reference"
    assert ops.backend_for(values((0, 4, 3, 3)), "triton") == "reference"
    assert ops.backend_for(values((2, 4, 3, 3)), "reference") == "reference"
    z = values((2, 4, 3, 3)).to(kernel_device)  # images of 36 elements: no whole bytes
    y = group_norm_act(z, 2, activation="relu", backend="triton")
    assert same_bits(y, group_norm_act(z, 2, activation="relu", backend="reference"))


def test_more_images_than_a_grid_holds_go_to_aten(kernel_device, monkeypatch):
    from te_nvfp4_cv.ops.norm.triton import launch

    z = values((3, 8, 4, 4)).to(kernel_device)
    assert launch.MOST_SLICES == 65535 and not launch.by_reference(launch.shape_of(z, 2))
    monkeypatch.setattr(launch, "MOST_SLICES", 2)
    y = group_norm_act(z, 2, activation="relu", backend="triton")
    assert same_bits(y, group_norm_act(z, 2, activation="relu", backend="reference"))
