"""The state of delayed scales on the device: the kernels' bits are those of plain torch."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn as nn

import te_nvfp4_cv as nv
from te_nvfp4_cv.backend import dispatch
from te_nvfp4_cv.ops.quantize import amax, operand
from te_nvfp4_cv.ops.records import PACKED, Collector, Fold, OperandSpec
from tests.helpers import relative_error, same_bits, values

SEEN = (0.0, -0.0, 1e-45, 1e-38, 3e-27, 1e-6, 1.0, 336.0, 336.1, 2688.0, 1536.0, 7e4, 3e38, math.inf, math.nan)


def both(monkeypatch, device, run):
    """The result of `run(device)` in plain torch, then by the kernels."""
    out = []
    for kernels in (False, True):
        monkeypatch.setattr(dispatch, "kernels_serve", lambda _, kernels=kernels: kernels)
        out.append(run(device))
    return out


@pytest.mark.parametrize(("e4m3_max", "margin"), [((448, 448), (8, 4)), ((256, 448), (8, 4)), ((448,), (1,))])
def test_moving(kernel_device, monkeypatch, e4m3_max, margin):
    rows = len(e4m3_max)
    for pair, clear in itertools.product(itertools.pairwise(SEEN), (False, True)):

        def run(device, pair=pair, clear=clear):
            seen = torch.tensor([pair, pair[::-1]][:rows], device=device)
            used = torch.tensor([[3.0, 5.0], [7.0, 9.0]][:rows], device=device)
            amax.move(used, seen, e4m3_max, margin, clear)
            assert not clear or not seen.any()
            return used, seen

        expected, found = both(monkeypatch, kernel_device, run)
        assert all(same_bits(a, b) for a, b in zip(expected, found, strict=True)), (pair, clear)


@pytest.mark.parametrize("count", [False, True])
@pytest.mark.parametrize("odd", [None, math.nan, math.inf])
def test_collecting(kernel_device, monkeypatch, count, odd):
    """The kernels collect in their last launch what plain torch collects after a call."""
    monkeypatch.setattr(dispatch, "KERNELS_ON_CPU", True)
    x = values((16, 2, 2, 16), seed=1)
    if odd is not None:
        x[3, 1, 0, 5] = odd
    spec = OperandSpec(1, Fold(1, 0, 2, 0, 16), PACKED, PACKED, rht=True)
    given = torch.tensor([0.25, 0.5])  # too small: blocks saturate

    def run(backend):
        device = torch.device("cpu") if backend == "reference" else kernel_device
        collected = torch.tensor([2.0, 1e6], device=device)
        saturated = torch.tensor([2.0**33 + 1], dtype=torch.float64, device=device)
        where = Collector(collected, saturated, count)
        made = operand.quantize_operand(x.to(device), spec, torch.float32, None, given.to(device), backend, where)
        return collected.cpu(), saturated.cpu(), made.observed.cpu(), made.row_amax.cpu(), made.col_amax.cpu()

    expected, found = run("reference"), run("vendor")
    assert all(same_bits(a, b) for a, b in zip(expected, found, strict=True))
    assert float(found[1]) == 2.0**33 + 1 + (float(found[2][2]) if count else 0) and found[2][2] > 0
    assert float(found[0][1]) == 1e6 and (float(found[0][0]) > 2.0) == (odd is None)


@pytest.mark.parametrize("backend", ["vendor", "triton"])
def test_training_steps_on_the_kernels_move_the_same_scales(kernel_device, monkeypatch, one_thread, backend):
    monkeypatch.setattr(dispatch, "KERNELS_ON_CPU", True)
    recipe = nv.NVFP4BlockScaling(tensor_scale="delayed", disable_stochastic_rounding=True)
    results, states = {}, {}
    for name in ("reference", backend):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(16, 16, 3, 2, 1), nn.ReLU(), nn.ConvTranspose2d(16, 16, 2, 2)).to(kernel_device)
        for step in range(3):
            net.zero_grad()
            x = (values((5, 16, 4, 3), seed=step) * 30.0**step).to(kernel_device).requires_grad_()
            with nv.nvfp4_autocast(recipe, backend=name):
                y = net(x)
            y.backward(torch.ones_like(y) * 1e-3)
        results[name] = [y.detach(), x.grad, *[p.grad for p in net.parameters()]]
        states[name] = nv.extra_state(net)["scales"]
    for expected, found in zip(results["reference"], results[backend], strict=True):
        assert relative_error(found, expected) < 1e-4
    for name, entry in states["reference"].items():
        mine, theirs = states[backend][name]["entries"][0], entry["entries"][0]
        assert same_bits(mine["used"], theirs["used"]), name
        assert relative_error(mine["collected"], theirs["collected"]) < 1e-4
        assert float(theirs["saturated"][0]) > 0 or name != "0.weight"
        assert relative_error(mine["saturated"] + 1, theirs["saturated"] + 1) < 0.02
