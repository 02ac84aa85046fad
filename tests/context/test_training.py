"""Training under nvfp4_autocast: extent and order of contexts, reproducibility, checkpointing, torch.compile."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from te_nvfp4_cv.context import function_mode
from te_nvfp4_cv.context import state as nv_context
from te_nvfp4_cv.context.context_manager import nvfp4_autocast
from te_nvfp4_cv.ops.quantize import rounding_seeds
from tests.helpers import relative_error, same_bits, values
from tests.networks import NO_2D, NO_RHT, NO_SR, Net, Override, all_same, gradients, net_and_input, step

pytestmark = pytest.mark.usefixtures("one_thread")


def test_enclosing_the_loop_or_only_the_forward_gives_equal_bits():
    net, x = net_and_input()
    losses: dict[bool, list[Tensor]] = {}
    for whole in (True, False):
        torch.manual_seed(2)
        model = copy.deepcopy(net)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        losses[whole] = []
        with nvfp4_autocast() if whole else contextlib.nullcontext():
            for _ in range(3):
                with contextlib.nullcontext() if whole else nvfp4_autocast():
                    loss = model(x).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses[whole].append(loss.detach())
        losses[whole] += [p.detach() for p in model.parameters()]
    assert all_same(losses[True], losses[False])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_order_with_torch_autocast_does_not_matter(dtype):
    net, x = net_and_input()
    results = []
    for first, second in ((0, 1), (1, 0)):
        contexts = [lambda: nvfp4_autocast(), lambda: torch.autocast("cpu", dtype)]
        with contextlib.ExitStack() as stack:
            stack.enter_context(contexts[first]())
            results.append(step(net, x, contexts[second]()))
    assert all_same(*results)
    assert all(grad.dtype == torch.float32 for grad in results[0])


def test_forward_values_do_not_depend_on_grad_mode():
    net, x = net_and_input()
    net.eval()
    with nvfp4_autocast():
        y = net(x)
        with torch.no_grad():
            y_no_grad = net(x)
        with torch.inference_mode():
            y_inference = net(x)
    assert y_no_grad.grad_fn is None
    assert same_bits(y.detach(), y_no_grad) and same_bits(y.detach(), y_inference.clone())
    with torch.no_grad():
        assert not torch.equal(net(x), y_no_grad)


def test_models_in_bf16():
    net, x = net_and_input()
    net, x = net.bfloat16(), x.bfloat16()
    quantized, plain = step(net, x, nvfp4_autocast()), step(net, x)
    assert all(a.dtype == b.dtype for a, b in zip(quantized[1:], plain[1:], strict=True))
    assert relative_error(quantized[0], plain[0]) < 0.5 and all(g.isfinite().all() for g in quantized)


def test_gradient_accumulation_is_the_sum_of_steps():
    net, x = net_and_input()
    net.eval()
    together = copy.deepcopy(net)
    torch.manual_seed(1)
    with nvfp4_autocast():
        for part in (x[:2], x[2:]):
            together(part).square().sum().backward()
    parts = []
    torch.manual_seed(1)
    for part in (x[:2], x[2:]):
        alone = copy.deepcopy(net)
        with nvfp4_autocast():
            alone(part).square().sum().backward()
        parts.append(gradients(alone))
    assert all(same_bits(g, a + b) for g, a, b in zip(gradients(together), *parts, strict=True))


def test_models_can_be_copied_and_differentiated_by_autograd_grad_after_use():
    net, x = net_and_input()
    expected = step(net, x, nvfp4_autocast())
    with nvfp4_autocast():
        net(x).sum().backward()
        clone = copy.deepcopy(net)
    clone.load_state_dict(net_and_input()[0].state_dict())
    clone.zero_grad()
    torch.manual_seed(5)
    with nvfp4_autocast():
        loss = clone(x).square().mean()
    grads = torch.autograd.grad(loss, list(clone.parameters()))
    assert all_same(expected[1:], list(grads))


# ---- reproducibility ------------------------------------------------------------------------------------------------


def test_manual_seed_makes_stochastic_rounding_reproducible():
    net, x = net_and_input()
    first, second = (step(net, x, nvfp4_autocast()) for _ in range(2))
    assert all_same(first, second)
    with nvfp4_autocast():
        torch.manual_seed(5)
        model = copy.deepcopy(net)
        model(x).square().mean().backward()
        once = [g.clone() for g in gradients(model)]
        model.zero_grad()
        model(x).square().mean().backward()
    assert all_same(first[1:], once) and not all_same(once, gradients(model))


def test_stochastic_rounding_does_not_disturb_torchs_generator():
    net, x = net_and_input()
    states = []
    for context in (nvfp4_autocast(), nvfp4_autocast(NO_SR), contextlib.nullcontext()):
        step(net, x, context)
        # Without the eight bytes that hold the position of the stream: see rounding_seeds.py.
        state = torch.get_rng_state()
        state[rounding_seeds._PLACE : rounding_seeds._PLACE + 8] = 0
        states.append((state, torch.rand(4)))
    assert all(torch.equal(states[0][0], s[0]) and torch.equal(states[0][1], s[1]) for s in states[1:])


# ---- activation checkpointing ---------------------------------------------------------------------------------------


def checkpointed(use_reentrant: bool, nested: bool = False) -> Callable[[Net, Tensor], Tensor]:
    def run(net: Net, x: Tensor) -> Tensor:
        def part(module: nn.Module, x: Tensor) -> Tensor:
            if nested and isinstance(module, nn.Sequential):
                return checkpoint(lambda x: checkpoint(module, x, use_reentrant=False), x, use_reentrant=use_reentrant)
            return checkpoint(module, x, use_reentrant=use_reentrant)

        x = part(net.body, net.stem(x))
        x = part(net.up, x)
        return net.head(net.dropout(F.relu(x)).mean((2, 3)))

    return run


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("override", ["none", "recipe", "high precision"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_changes_no_bit(use_reentrant, nested, override, inside):
    net, x = net_and_input()
    net.body[2] = nn.Identity()  # BatchNorm's statistics count a recomputed forward twice, in torch too
    if override != "none":
        recipe = NO_2D if override == "recipe" else None
        Override(recipe).attach(net.up)
        Override(NO_RHT).attach(net.body[4])
    plain = step(net, x, nvfp4_autocast())
    again = step(net, x, nvfp4_autocast(), checkpointed(use_reentrant, nested), inside)
    assert all_same(plain, again)
    assert not all_same(plain, step(net, x, None))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_plain_checkpoint_stays_plain_when_backward_runs_in_a_context(use_reentrant):
    net, x = net_and_input()
    net.body[2] = nn.Identity()
    with nvfp4_autocast():
        pass  # torch.utils.checkpoint is wrapped at the first entry
    expected = step(net, x)
    torch.manual_seed(5)
    loss = checkpointed(use_reentrant)(net, x).square().mean()
    with nvfp4_autocast():
        loss.backward()
    assert all_same(expected[1:], gradients(net))
    assert nv_context.state() is None and not function_mode.mode_is_on()


def test_checkpoint_inside_a_disabled_context_recomputes_in_high_precision():
    net, x = net_and_input()
    net.body[2] = nn.Identity()
    run = checkpointed(False)
    assert all_same(step(net, x), step(net, x, nvfp4_autocast(enabled=False), run))


# ---- torch.compile --------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Dynamo")
@pytest.mark.parametrize("channels_last", [False, True])
def test_compiled_in_one_graph_with_equal_bits(channels_last):
    net = nn.Sequential(
        nn.Conv2d(16, 16, 3), nn.ReLU(inplace=True), nn.Conv2d(16, 16, 3), nn.Flatten(), nn.Linear(64, 16)
    )
    x = values((4, 16, 6, 6))
    x = x.to(memory_format=torch.channels_last) if channels_last else x
    expected = step(net, x, nvfp4_autocast())
    torch._dynamo.reset()
    compiled = torch.compile(lambda net, x: net(x), backend="aot_eager", fullgraph=True)
    assert all_same(expected, step(net, x, nvfp4_autocast(), compiled))
