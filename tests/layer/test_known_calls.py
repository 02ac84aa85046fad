"""A layer's call that is remembered gives what the call would give that is looked at for the first time."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

import te_nvfp4_cv as nv
from te_nvfp4_cv.layer import execute
from tests.helpers import values

Here = contextlib.AbstractContextManager[Any]


def entry(conv: nn.Module) -> Here:
    @contextlib.contextmanager
    def inside():
        nv.set_precision(conv, {"0": None})
        yield
        nv.clear_precision(conv)

    return inside()


CHANGES: dict[str, Any] = {
    "nothing": lambda net: contextlib.nullcontext(),
    "autocast": lambda net: torch.autocast("cpu", torch.bfloat16),
    "autocast to another dtype": lambda net: torch.autocast("cpu", torch.float16),
    "an entry": entry,
    "off": lambda net: nv.nvfp4_autocast(enabled=False),
    "another recipe": lambda net: nv.nvfp4_autocast(nv.NVFP4BlockScaling(disable_2d_quantization=True)),
    "another backend": lambda net: nv.nvfp4_autocast(backend="reference"),
    "frozen weights": lambda net: nv.frozen_weights(net),
    "no gradients": lambda net: torch.no_grad(),
    "inference mode": lambda net: torch.inference_mode(),
    "dispatch mode": lambda net: FlopCounterMode(display=False),
}
TRANSFORMS: dict[str, Any] = {
    "vmap": lambda net, x: torch.func.vmap(lambda row: net(row[None])[0])(x),
    "grad": lambda net, x: torch.func.grad(lambda v: net(v).sum())(x),
    "jvp": lambda net, x: torch.func.jvp(net, (x,), (x,))[1],
}


def step(net: nn.Module, x: Tensor) -> list[Tensor]:
    torch.manual_seed(3)
    y = net(x)
    if not y.requires_grad:
        return [y]
    return [y, *torch.autograd.grad(y.float().square().sum(), list(net.parameters()))]


def run(function: Any, known: bool, classes: Any = nn) -> list[Tensor]:
    """Run it on a network whose calls are remembered, or not; classes: nn, or nv for layers that ask by name."""
    torch.manual_seed(0)
    named = "NVFP4" if classes is nv else ""
    conv, linear = getattr(classes, f"{named}Conv2d"), getattr(classes, f"{named}Linear")
    net, x = nn.Sequential(conv(16, 32, 3, padding=1), nn.Flatten(), linear(32 * 16, 16)), values((4, 16, 4, 4))
    with nv.nvfp4_autocast():
        for _ in range(2):
            step(net, x)
        assert id(net[0].weight) in execute._known
        if not known:
            execute._known.clear()
        return function(net, x)


@pytest.mark.filterwarnings("ignore:nvfp4. only")
@pytest.mark.parametrize("classes", [nn, nv], ids=["torch's", "ours"])
@pytest.mark.parametrize("name", CHANGES)
def test_what_changes_between_two_calls_acts(name: str, classes: Any) -> None:
    def changed(net: nn.Module, x: Tensor) -> list[Tensor]:
        with CHANGES[name](net):
            return step(net, x)

    found, expected = run(changed, True, classes), run(changed, False, classes)
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    plain = run(step, True, classes)
    if name not in ("nothing", "no gradients", "inference mode", "dispatch mode", "another backend", "frozen weights"):
        assert not torch.equal(found[0].float(), plain[0])


@pytest.mark.filterwarnings("ignore:nvfp4. only")
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_act(name: str) -> None:
    found, expected = (run(lambda net, x: [TRANSFORMS[name](net, x)], known) for known in (True, False))
    assert torch.equal(found[0], expected[0])


def in_forward_mode(net: nn.Module, x: Tensor) -> None:
    with forward_ad.dual_level():
        net(forward_ad.make_dual(x, x))


BY_NAME: dict[str, Any] = {
    "grad": TRANSFORMS["grad"],
    "jvp": TRANSFORMS["jvp"],
    # Of many batches, so that each call inside has the shape of one that is known.
    "vmap": lambda net, x: torch.func.vmap(net)(x[None]),
    "forward mode": in_forward_mode,
}


@pytest.mark.filterwarnings("ignore:nvfp4. only")
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("name", BY_NAME)
def test_layers_that_ask_by_name_refuse_transforms(name: str, known: bool) -> None:
    shapes: list[torch.Size] = []

    def refused(net: nn.Module, x: Tensor) -> list[Tensor]:
        net[0].register_forward_pre_hook(lambda _, args: shapes.append(args[0].shape))
        with pytest.raises(RuntimeError, match="do not take a layer that asks for NVFP4"):
            BY_NAME[name](net, x)
        assert (shapes[0] in execute._known[id(net[0].weight)][1]) if known else not execute._known
        return []

    run(refused, known, nv)
    assert len(shapes) == 1


def test_functions_repeat_what_they_know(monkeypatch: pytest.MonkeyPatch) -> None:
    """A module's recipe may be replaced between two calls, and a function is given another one."""
    x, w = values((4, 16, 4, 4)), nn.Parameter(values((16, 16, 3, 3)))
    recipes = [None, nv.NVFP4BlockScaling(disable_2d_quantization=True), None]

    def runs(**more: Any) -> list[Tensor]:
        return [nv.functional.conv2d(x, w, None, 1, 1, recipe=recipe, **more) for recipe in recipes]

    looked_at = runs()
    repeated: list[int] = []
    repeat = execute.repeat
    monkeypatch.setattr(execute, "repeat", lambda *given: (repeated.append(1), repeat(*given))[1])
    assert all(torch.equal(a, b) for a, b in zip(runs(), looked_at, strict=True))
    assert len(repeated) == 1  # of the recipe that the last call had
    assert torch.equal(nv.functional.conv2d(x, w, None, 2, 1), looked_at[0][..., ::2, ::2])  # not the same arguments
    assert len(repeated) == 1
    for bad in ({"backend": "none"}, {"padding": -1}):
        with pytest.raises(ValueError):
            nv.functional.conv2d(x, w, **bad)


def test_arguments_are_compared_by_value() -> None:
    """Functions compute the same padding anew at each call; what torch would read otherwise is another call."""
    x, w = values((2, 16, 4, 4)), nn.Parameter(values((16, 16, 3, 3)))
    one, large = int("1"), int("1000")  # ints that are made anew from 257 on
    with nv.nvfp4_autocast():
        F.conv2d(x, w, None, 1, (one, one))
    (known,) = execute._known[id(w)][1].values()
    function = known.function
    for padding in ((one, one), tuple([1, 1])):
        assert execute.known_call(function, (x, w, None, 1, padding)) is known
    for other in ((1, 2), (True, True), (1.0, 1.0), (1,), [1, 1], 1, "same"):
        assert execute.known_call(function, (x, w, None, 1, other)) is None, other
    assert execute._equal(large, int("1000")) and execute._equal("sa" + "me"[:one + 1], "same")
    assert not execute._equal(1, True) and not execute._equal(1, 1.0) and not execute._equal([1], [1])


def test_sizes_that_never_come_back_are_forgotten() -> None:
    conv = nn.Conv2d(16, 16, 1)
    with nv.nvfp4_autocast():
        for size in range(1, 3 * execute.SIZES):
            conv(values((1, 16, 1, size)))
    assert len(execute._known[id(conv.weight)][1]) <= execute.SIZES


def test_an_input_on_another_device_is_looked_at() -> None:
    conv, x = nn.Conv2d(16, 16, 1), values((2, 16, 3, 3))
    with nv.nvfp4_autocast():
        conv(x)
        assert conv(x.to("meta")).is_meta  # as in plain torch
