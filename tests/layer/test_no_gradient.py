"""A gradient that never comes is None and not zeros, as in torch: optimizers must leave such parameters alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import te_nvfp4_cv as nv
from te_nvfp4_cv.cli.trial.control import control
from te_nvfp4_cv.fusion.norm_act import batch_norm_act, group_norm_act
from te_nvfp4_cv.layer.empty_batch import _Zeros
from te_nvfp4_cv.layer.forward_backward import QuantizedConv
from te_nvfp4_cv.layer.options import CallOptions
from te_nvfp4_cv.layer.plan import plan_for
from te_nvfp4_cv.ops.geometry import linear_geometry
from te_nvfp4_cv.recipe.fields import Role
from tests.helpers import values
from tests.layers import BACKENDS

pytestmark = pytest.mark.usefixtures("one_thread")
Case = tuple[Callable[[], Tensor], list[Tensor]]
SHAPE = (2, 16, 4, 4)


class Gone(torch.autograd.Function):
    """Pass y on, and no gradient back: as a branch does that the loss reads, but not for its value."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        return y.clone()

    @staticmethod
    def backward(ctx: Any, *dy: Tensor) -> None:
        return None


def image() -> Tensor:
    return values(SHAPE).requires_grad_()


def layer(recipe: Any = None, backend: str = "auto", module: type = nn.Conv2d) -> Case:
    x, conv = image(), module(16, 16, *(() if module is nn.Linear else (1,)))
    x = x if module is not nn.Linear else values((3, 16)).requires_grad_()

    def call() -> Tensor:
        with nv.nvfp4_autocast(recipe, backend=backend):
            return conv(x)  # type: ignore[no-any-return]

    return call, [x, *conv.parameters()]


def grouped() -> Case:
    x, w, offsets = values((32, 16)).requires_grad_(), values((2, 16, 16)).requires_grad_(), torch.tensor([16, 32])
    return lambda: nv.functional.grouped_linear(x, w, offsets.int()), [x, w]


def relu(inplace: bool) -> Case:
    x = image()

    def call() -> Tensor:
        with nv.nvfp4_autocast():
            return F.relu(x * 1.0 if inplace else x, inplace)

    return call, [x]


def norm(n: Any, residual: bool = False) -> Case:
    x, added = image(), image()

    def call() -> Tensor:
        if isinstance(n, nn.GroupNorm):
            return group_norm_act(x, n.num_groups, n.weight, n.bias)
        more = added if residual else None
        return batch_norm_act(x, n.running_mean, n.running_var, n.weight, n.bias, True, residual=more)

    return call, [x, *([added] if residual else []), *n.parameters()]


def learned() -> Case:
    model = nn.Sequential(nn.Conv2d(16, 16, 1))
    nv.learn_scales(model)
    x = image()

    def call() -> Tensor:
        with nv.nvfp4_autocast():
            return model(x)  # type: ignore[no-any-return]

    return call, [x, *model.parameters()]


def zeros() -> Case:
    w = image()
    return lambda: _Zeros.apply(w), [w]


def dequantized() -> Case:
    t = nn.Parameter(nv.NVFP4Quantizer()(values((32, 32))))
    return lambda: t.dequantize(), [t]


def noisy() -> Case:
    x, conv = image(), nn.Conv2d(16, 16, 1)

    def call() -> Tensor:
        with control(nv.NVFP4BlockScaling()):
            return conv(x)  # type: ignore[no-any-return]

    return call, [x, *conv.parameters()]


CASES: dict[str, Callable[[], Case]] = {
    **{backend: (lambda backend=backend: layer(backend=backend)) for backend in BACKENDS},  # type: ignore[misc]
    "linear": lambda: layer(module=nn.Linear),
    "transposed": lambda: layer(module=nn.ConvTranspose2d),
    "delayed": lambda: layer(nv.NVFP4BlockScaling(tensor_scale="delayed")),
    "shifted": lambda: layer(nv.NVFP4BlockScaling(activation_shift="mean")),
    "high_precision backward": lambda: layer(nv.NVFP4BlockScaling(backward_override="high_precision")),
    "grouped": grouped,
    "relu": lambda: relu(False),
    "relu_": lambda: relu(True),
    "batch norm": lambda: norm(nn.BatchNorm2d(16)),
    "batch norm + residual": lambda: norm(nn.BatchNorm2d(16), residual=True),
    "group norm": lambda: norm(nn.GroupNorm(4, 16)),
    "learned": learned,
    "empty batch": zeros,
    "dequantize": dequantized,
    "control": noisy,
}


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_none_stays_none(name: str, create_graph: bool) -> None:
    call, leaves = CASES[name]()
    for _ in range(2):  # the second call may take a shorter way
        y = call()
        assert y.requires_grad
        found = torch.autograd.grad(Gone.apply(y).sum(), leaves, allow_unused=True, create_graph=create_graph)
        assert found == (None,) * len(leaves)
    # And where a gradient comes, it is there.
    assert all(grad is not None for grad in torch.autograd.grad(call().sum(), leaves))


def test_weight_decay_leaves_alone_what_the_loss_does_not_need() -> None:
    """Two heads of which the loss takes one, as a switch of torch's own where the other's gradient is undefined."""
    body, used, other = (nn.Conv2d(16, 16, 1) for _ in range(3))
    optimizer = torch.optim.SGD([*body.parameters(), *used.parameters(), *other.parameters()], 0.1, weight_decay=0.1)
    before = [p.detach().clone() for p in other.parameters()]
    with nv.nvfp4_autocast():
        h = F.relu(body(image()))
        loss = used(h).square().mean() + Gone.apply(other(h)).sum()
    loss.backward()
    optimizer.step()
    assert all(p.grad is None and torch.equal(p, q) for p, q in zip(other.parameters(), before, strict=True))
    assert body.weight.grad is not None and body.weight.grad.any()


def test_second_derivatives_of_nothing_are_none() -> None:
    call, leaves = layer()
    grads = torch.autograd.grad(call().sum(), leaves, create_graph=True)
    second = torch.autograd.grad(sum(Gone.apply(g).sum() for g in grads), leaves, allow_unused=True)
    assert second == (None,) * 3
    call, (x,) = relu(False)
    dy = torch.ones(SHAPE, requires_grad=True)
    (dx,) = torch.autograd.grad(call(), x, dy, create_graph=True)
    assert torch.autograd.grad(Gone.apply(dx).sum(), dy, allow_unused=True) == (None,)


def test_a_stored_weight_refuses_gradients_only_where_one_comes() -> None:
    model = nv.export.quantize(nn.Sequential(nn.Conv2d(16, 16, 1)), [values(SHAPE)], nv.NVFP4BlockScaling())
    x = image()
    assert torch.autograd.grad(Gone.apply(model(x)).sum(), x, allow_unused=True) == (None,)
    with pytest.raises(RuntimeError, match="a gradient reached a layer"):
        model(x).sum().backward()


class OfRanks:
    """Amaxes that ranks share, as far as one rank sees it."""

    group = "others"

    def __init__(self) -> None:
        self.asked: list[Role] = []

    def amax(self, role: Role, operand: Tensor) -> None:
        self.asked.append(role)

    def knows(self, role: Role) -> bool:
        return False

    def collector(self, role: Role) -> None:
        return None

    def take_move(self) -> None:
        return None

    def backward_ran(self) -> None:
        self.asked.append(Role.WEIGHT)


@pytest.mark.parametrize("alone", [False, True])
def test_ranks_that_wait_in_backward_get_zeros(alone: bool) -> None:
    """Where amaxes are shared, a rank without a gradient takes part all the same, or the others would wait."""
    x, w, scales = values((16, 16)).requires_grad_(), values((16, 16)).requires_grad_(), OfRanks()
    if alone:
        scales.group = None  # type: ignore[assignment]
    plan = plan_for(linear_geometry(16, 16, 16), nv.NVFP4BlockScaling(), "reference", x.dtype, False)
    y = QuantizedConv.apply(x, w, None, plan, CallOptions(scales=scales))  # type: ignore[arg-type]
    dx, dw = torch.autograd.grad(Gone.apply(y).sum(), [x, w], allow_unused=True)
    if alone:
        assert (dx, dw, scales.asked) == (None, None, [Role.INPUT])
    else:
        assert not dx.any() and not dw.any()
        assert scales.asked == [Role.INPUT, Role.GRAD_OUTPUT, Role.WEIGHT]
