"""Forward passes that run in a backward pass: under the contexts of the first forward, in whatever thread."""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.amp import custom_bwd, custom_fwd  # before the first context: names that were imported work as well

import te_nvfp4_cv as nv
from te_nvfp4_cv.context import function_mode
from te_nvfp4_cv.layer import observe
from tests.helpers import relative_error, same_bits, values
from tests.networks import NO_2D, NO_SR, all_same, seen

pytestmark = pytest.mark.usefixtures("one_thread")


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1))


def first(ctx: Any, x: Tensor, block: nn.Module) -> Tensor:
    ctx.block = block
    ctx.save_for_backward(x)
    return block(x)


def second(ctx: Any, dy: Tensor) -> tuple[Tensor | None, None]:
    x = ctx.saved_tensors[0].detach().requires_grad_()
    with torch.enable_grad():
        y = ctx.block(x)
    torch.autograd.backward(y, dy)
    return x.grad, None


class Recompute(torch.autograd.Function):
    """Saves its input alone and runs its block again in backward, as Megatron and deepspeed do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, block: nn.Module) -> Tensor:
        return first(ctx, x, block)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, None]:  # type: ignore[override]
        return second(ctx, dy)


class Decorated(torch.autograd.Function):
    """The same with the decorators of torch.amp."""

    @staticmethod
    @custom_fwd(device_type="cpu")
    def forward(ctx: Any, x: Tensor, block: nn.Module) -> Tensor:
        return first(ctx, x, block)

    @staticmethod
    @custom_bwd(device_type="cpu")
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, None]:  # type: ignore[override]
        return second(ctx, dy)


class Capturing(torch.autograd.Function):
    """The same by hand."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, block: nn.Module) -> Tensor:
        ctx.again = nv.capture()
        return first(ctx, x, block)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, None]:  # type: ignore[override]
        with ctx.again, ctx.again:
            return second(ctx, dy)


class Reversible(torch.autograd.Function):
    """y1 = x1 + f(x2), y2 = x2 + g(y1): saves outputs, and rebuilds its inputs in backward, without gradients."""

    @staticmethod
    @custom_fwd(device_type="cpu")
    def forward(ctx: Any, x1: Tensor, x2: Tensor, f: nn.Module, g: nn.Module) -> tuple[Tensor, Tensor]:
        y1 = x1 + f(x2)
        y2 = x2 + g(y1)
        ctx.f, ctx.g = f, g
        ctx.save_for_backward(y1, y2)
        return y1, y2

    @staticmethod
    @custom_bwd(device_type="cpu")
    def backward(ctx: Any, dy1: Tensor, dy2: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        y1, y2 = ctx.saved_tensors
        with torch.no_grad():
            x2 = y2 - ctx.g(y1)
            x1 = y1 - ctx.f(x2)
        x1, x2 = x1.requires_grad_(), x2.requires_grad_()
        with torch.enable_grad():
            z1 = x1 + ctx.f(x2)
            z2 = x2 + ctx.g(z1)
        torch.autograd.backward((z1, z2), (dy1, dy2))
        return x1.grad, x2.grad, None, None


def gradients(block: nn.Module, x: Tensor) -> list[Tensor]:
    assert x.grad is not None
    found = [x.grad, *[p.grad for p in block.parameters() if p.grad is not None]]
    block.zero_grad()
    return found


def in_a_thread(run: Callable[[], Any]) -> None:
    """Run as autograd's own threads do, which run a GPU's backward pass and have entered no context."""
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()


PLACES = {
    "inside": (True, lambda y: y.backward()),
    "inside, autograd.grad": (True, lambda y: torch.autograd.grad(y, y.grad_fn.next_functions[0][0].variable)),
    "inside, autograd.backward": (True, lambda y: torch.autograd.backward(y)),
    "outside": (False, lambda y: y.backward()),
    "another thread": (False, lambda y: in_a_thread(y.backward)),
}


@pytest.mark.parametrize("where", ["inside", "inside, autograd.backward", "outside", "another thread"])
@pytest.mark.parametrize("kind", [Recompute, Decorated, Capturing])
def test_a_function_that_recomputes(kind, where):
    inside, backward = PLACES[where]
    if kind is Recompute and not inside:
        pytest.skip("as with torch.autocast, a Function must say that its backward belongs to the context")
    block = net()
    results = []
    for run in (lambda x: block(x), lambda x: kind.apply(x, block)):
        x = values((16, 32, 8, 8)).requires_grad_()
        with nv.nvfp4_autocast(NO_SR):
            loss = run(x).square().mean()
            if inside:
                backward(loss)
        if not inside:
            backward(loss)
        results.append([loss.detach(), *gradients(block, x)])
    assert all_same(*results)
    assert not function_mode.mode_is_on() and nv.active_recipe() is None


class Repeating(Recompute):
    """A Function that says nothing of contexts, as Recompute."""


class WrittenOut(torch.autograd.Function):
    """Runs a layer in its forward, and its gradient by formula."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, block: nn.Module) -> Tensor:
        ctx.save_for_backward(block[0].weight)  # type: ignore[index]
        return F.conv2d(x, block[0].weight, padding=1)  # type: ignore[index]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return F.conv_transpose2d(dy, *ctx.saved_tensors, padding=1), None


def test_a_function_that_repeats_its_forward_in_high_precision_says_so_once():
    block, x = net(), values((16, 32, 8, 8)).requires_grad_()

    def backward(kind: Any, place: str = "outside") -> None:
        inside, run = PLACES[place]
        with nv.nvfp4_autocast(NO_SR):
            loss = kind.apply(x, block).square().mean()
            if inside:
                run(loss)
        if not inside:
            run(loss)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for kind in (Decorated, Capturing, WrittenOut):
            backward(kind)
        backward(Repeating, "inside")
        Repeating.apply(x, block).sum().backward()  # in high precision, and so is what it repeats
    with pytest.warns(UserWarning, match="autograd Function Repeating runs layers.*custom_fwd.*nv.capture"):
        backward(Repeating)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backward(Repeating)


@pytest.mark.parametrize("inside", [True, False])
def test_a_reversible_block_rebuilds_its_inputs(inside):
    f, g = net(), net()
    results = []

    def plain(x1: Tensor, x2: Tensor, f: nn.Module, g: nn.Module) -> tuple[Tensor, Tensor]:
        y1 = x1 + f(x2)
        return y1, x2 + g(y1)

    for run in (Reversible.apply, plain):
        x1, x2 = (values((16, 32, 8, 8), seed=seed).requires_grad_() for seed in (1, 2))
        with nv.nvfp4_autocast(NO_SR):
            y1, y2 = run(x1, x2, f, g)
            loss = (y1 * y2).mean()
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        results.append([*gradients(f, x1), *gradients(g, x2)])
    # x1 and x2 come back with fp32's rounding of a sum, which may move a value over the edge of a code.
    for rebuilt, expected in zip(*results, strict=True):
        assert relative_error(rebuilt, expected) <= 0.02


def test_gradients_of_autograd_grad_inside_the_context():
    block = net()
    found = []
    for run in (lambda x: block(x), lambda x: Recompute.apply(x, block)):
        x = values((16, 32, 8, 8)).requires_grad_()
        with nv.nvfp4_autocast(NO_SR):
            found += torch.autograd.grad(run(x).square().mean(), x)
    assert same_bits(*found)


def test_observers_hear_of_calls_that_are_recomputed_elsewhere():
    block, x = net(), values((16, 32, 8, 8)).requires_grad_()

    def run() -> None:
        with nv.nvfp4_autocast(NO_SR):
            loss = Decorated.apply(x, block).mean()
        in_a_thread(loss.backward)

    calls = seen(run)
    assert [call.recipe for call in calls] == [NO_SR] * 4


def test_capture_brings_recipe_entries_and_autocast_and_gives_back_what_was():
    conv, x = nn.Conv2d(32, 32, 3), values((4, 32, 8, 8))
    outer = nn.Sequential(conv)
    nv.set_precision(outer, {"0": NO_2D})
    kept: list[Any] = []
    conv.register_forward_pre_hook(lambda *_: kept.append(nv.capture()))
    with torch.autocast("cpu", dtype=torch.bfloat16), nv.nvfp4_autocast(NO_SR):
        expected = outer(x)
    (again,) = kept
    with nv.nvfp4_autocast(NO_SR, enabled=False):
        with again:
            assert nv.active_recipe() == NO_2D and torch.is_autocast_enabled("cpu")
            with nv.nvfp4_autocast(), again:
                assert nv.active_recipe() == NO_2D
            assert nv.active_recipe() == NO_2D
            assert same_bits(F.conv2d(x, conv.weight, conv.bias), expected)
        assert nv.active_recipe() is None and not torch.is_autocast_enabled("cpu")
    results: list[Any] = []
    in_a_thread(lambda: results.append(again(F.conv2d)(x, conv.weight, conv.bias)))
    assert same_bits(results[0], expected)


def test_what_was_captured_outside_runs_as_outside():
    again, conv, x = nv.capture(), nn.Conv2d(32, 32, 3), values((4, 32, 8, 8))
    with nv.nvfp4_autocast():
        with again:
            assert same_bits(conv(x), F.conv2d(x, conv.weight.detach().clone(), conv.bias))
        with pytest.raises(ValueError, match="mine"), again:
            raise ValueError("mine")
        assert nv.active_recipe() is not None and not same_bits(conv(x), again(conv)(x))


def test_a_thread_that_inherits_the_mode_finds_the_contexts_of_its_home():
    """Autograd takes function modes along into a GPU's threads: its own forward passes find recipe and observers."""
    conv, x = nn.Conv2d(32, 32, 3), values((4, 32, 8, 8))
    results: list[Tensor] = []
    calls: list[observe.Call] = []

    def elsewhere(mode: Any) -> None:
        with mode:
            results.append(conv(x))
            with nv.nvfp4_autocast(enabled=False):  # a context of the thread's own counts there
                results.append(conv(x))

    with observe.observe(lambda call: calls.append(call)), nv.nvfp4_autocast(NO_SR):
        expected = conv(x)
        (mode,) = [mode for mode in function_mode.function_modes() if isinstance(mode, function_mode.Mode)]
        in_a_thread(lambda: elsewhere(mode))
    assert same_bits(results[0], expected) and not same_bits(results[1], expected)
    assert [call.recipe for call in calls] == [NO_SR, NO_SR]


def test_a_quantized_layers_own_backward_is_not_taken_for_a_forward():
    """It multiplies by calls that would be layers if the mode saw them."""
    for recipe in (NO_SR, nv.NVFP4BlockScaling(high_precision_gemms=("dgrad",)), nv.NVFP4BlockScaling()):
        fc, x = nn.Linear(32, 32), values((64, 32)).requires_grad_()

        def run(fc: nn.Linear = fc, x: Tensor = x, recipe: Any = recipe) -> None:
            with nv.nvfp4_autocast(recipe):
                fc(x).square().mean().backward()

        assert len(seen(run)) == 1


@pytest.mark.filterwarnings("ignore:Dynamo")
@pytest.mark.parametrize("kind", [Recompute, Decorated, Capturing])
def test_functions_that_recompute_compile(kind):
    torch._dynamo.reset()
    block = net()
    results = []
    run = torch.compile(lambda x: kind.apply(x, block), backend="aot_eager")
    for function in (lambda x: block(x), run):
        x = values((16, 32, 8, 8)).requires_grad_()
        with nv.nvfp4_autocast(NO_SR):
            loss = function(x).square().mean()
        with contextlib.nullcontext() if kind is not Recompute else nv.nvfp4_autocast(NO_SR):
            loss.backward()
        results.append([loss.detach(), *gradients(block, x)])
    assert all_same(*results)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_composable_checkpoint_of_torch_distributed():
    """It copied torch's names before the first context was entered."""
    composable = pytest.importorskip("torch.distributed._composable")
    block, again = net(), net()
    composable.checkpoint(again)
    assert all_same(*[of_one_step(module) for module in (block, again)])


def of_one_step(module: nn.Module) -> list[Tensor]:
    x = values((16, 32, 8, 8)).requires_grad_()
    with nv.nvfp4_autocast(NO_SR):
        loss = module(x).square().mean()
    loss.backward()
    return [loss.detach(), *gradients(module, x)]
