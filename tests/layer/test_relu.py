"""The ReLU that keeps one bit per element: torch's bits, forward and backward, for every layout and value."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from te_nvfp4_cv.context.context_manager import nvfp4_autocast
from te_nvfp4_cv.ops.relu import apply_mask, positive_mask
from tests.helpers import same_bits, values
from tests.networks import Override, all_same, net_and_input, step

pytestmark = pytest.mark.usefixtures("one_thread")

SPECIAL = [float("nan"), -float("nan"), -0.0, 0.0, float("inf"), -float("inf"), 1e-40, -1e-40]
RELUS: dict[str, Callable[[Tensor], Tensor]] = {
    "F.relu": F.relu,
    "F.relu inplace": lambda x: F.relu(x, inplace=True),
    "torch.relu": torch.relu,
    "torch.relu_": torch.relu_,
    "Tensor.relu": lambda x: x.relu(),
    "Tensor.relu_": lambda x: x.relu_(),
    "nn.ReLU": nn.ReLU(),
    "nn.ReLU inplace": nn.ReLU(inplace=True),
}
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(1, 3),
    "sliced": lambda x: x[..., 1:],
    "one": lambda x: x[:1, :1, :1, :1],
    "empty": lambda x: x[:0],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", RELUS)
def test_relu_equals_torchs_bit_for_bit(name, layout, dtype):
    base = values((3, 5, 7, 9))
    base.view(-1)[: len(SPECIAL)] = torch.tensor(SPECIAL)
    base = base.to(dtype)
    dy = values(base.shape, seed=2).to(dtype)
    dy.view(-1)[:4] = torch.tensor([float("nan"), float("inf"), -0.0, 1.0], dtype=dtype)
    results = []
    for context in (nvfp4_autocast(), contextlib.nullcontext()):
        leaf = base.clone().requires_grad_()
        x = LAYOUTS[layout](leaf * 1)
        with context:
            y = RELUS[name](x)
        (grad,) = torch.autograd.grad(y, leaf, LAYOUTS[layout](dy).contiguous())
        results.append((y.detach(), grad, y.stride(), x.detach(), x._version > 0))
    assert same_bits(results[0][0], results[1][0]) and same_bits(results[0][1], results[1][1])
    assert results[0][2] == results[1][2]
    assert same_bits(results[0][3], results[1][3]) and results[0][4] == results[1][4]  # what became of x


@pytest.mark.parametrize("size", [1, 7, 8, 9, 15, 16, 17, 31, 16384, 16391])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_mask_of_any_size(size, dtype):
    y = values((size,), "normal", dtype)
    mask = positive_mask(y)
    bits = torch.stack([(mask >> i) & 1 for i in range(8)], 1).flatten()[:size].bool()
    assert mask.shape == (-(-size // 8),) and torch.equal(bits, ~(y <= 0))
    dy = values((size,), "normal", dtype, 1)
    assert same_bits(apply_mask(dy, mask), torch.where(bits, dy, 0.0))


def test_mask_operators_pass_opcheck():
    y = values((3, 5)).clamp(min=0)
    for strides in ([5, 1], [1, 3]):
        torch.library.opcheck(torch.ops.te_nvfp4_cv.positive_mask.default, (y, strides))
        torch.library.opcheck(torch.ops.te_nvfp4_cv.apply_mask.default, (y, positive_mask(y), strides))


def test_relu_keeps_one_bit_per_element_and_is_switchable():
    x = values((8, 16, 8, 8)).bfloat16().requires_grad_()
    module = nn.ReLU()
    for options, share in (({}, 1 / 16), ({"relu_mask": False}, 1.0), ({"enabled": False}, 1.0)):
        kept: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):  # type: ignore[misc]
            with nvfp4_autocast(**options):  # type: ignore[arg-type]
                y = module(x * 1.0)
        saved = sum(t.numel() * t.element_size() for t in kept if t.numel() > 1)
        assert saved == x.numel() * 2 * share
        assert ("MaskedReLU" in type(y.grad_fn).__name__) == (share < 1)
    with nvfp4_autocast(), torch.no_grad():
        module(x)
    Override(None).attach(module)
    with nvfp4_autocast():
        assert "MaskedReLU" not in type(module(x).grad_fn).__name__  # high precision means torch's own


def test_relu_in_place_keeps_torchs_rules():
    leaf = values((8,)).requires_grad_()
    before = leaf.detach().clone()
    with nvfp4_autocast(), pytest.raises(RuntimeError, match="leaf Variable"):
        torch.relu_(leaf)
    assert same_bits(leaf.detach(), before)
    x = leaf * 1
    with nvfp4_autocast():
        y = x.sigmoid()
        torch.relu_(y)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    x = leaf * 1
    with nvfp4_autocast():
        part = x[2:6]  # in place on a view: the base sees it, and its gradient flows through it
        F.relu(part, inplace=True)
    x.backward(torch.ones(8))
    expected = torch.ones(8)
    expected[2:6] = (before[2:6] > 0).float()
    assert torch.equal(leaf.grad, expected)


def test_relu_can_be_differentiated_twice():
    x = values((9,)).requires_grad_()
    grads = []
    for context in (nvfp4_autocast(), contextlib.nullcontext()):
        with context:
            y = F.relu(x.square() - 0.5)
        (g,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        grads.append(torch.autograd.grad(g.square().sum(), x)[0])
    assert same_bits(*grads)


def test_relu_mask_changes_no_bit_of_a_network():
    net, x = net_and_input()
    assert all_same(step(net, x, nvfp4_autocast()), step(net, x, nvfp4_autocast(relu_mask=False)))
