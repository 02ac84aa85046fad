"""Checkpoints that keep the results of some operators (create_selective_checkpoint_contexts of torch)."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import te_nvfp4_cv as nv
from te_nvfp4_cv.backend.torch_private import tree_leaves
from tests.helpers import same_bits, values
from tests.networks import NO_SR


def keeping(words: tuple[str, ...], block: nn.Module) -> Callable[..., Tensor]:
    def keep(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        kept = any(word in str(op) for word in words)
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, keep)
    return functools.partial(checkpoint, block, use_reentrant=False, context_fn=contexts)


@pytest.mark.parametrize("recipe", ["default", "current_pow2", "mxfp4"])
@pytest.mark.parametrize("kept", ["conv", "quantize", ""])
def test_a_selective_checkpoint_may_keep_any_operator(recipe: str, kept: str) -> None:
    torch.manual_seed(0)
    block = nn.Sequential(nn.Conv2d(32, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3))
    results = []
    for run in (block, keeping((kept,), block)):
        x = values((16, 32, 8, 8)).requires_grad_()
        torch.manual_seed(0)
        with nv.nvfp4_autocast(recipe):
            loss = run(x).square().mean()
        loss.backward()
        results.append([loss.detach(), x.grad])
    assert all(map(same_bits, *results))


# Their outputs are views of what the product gave, or would be.
OF_VIEWS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "rows of rows": (lambda: nn.Linear(32, 32), lambda: values((4, 8, 32))),
    "one pixel": (lambda: nn.Conv2d(32, 32, 1), lambda: values((16, 32, 1, 1))),
    "channels_last": (
        lambda: nn.Conv2d(32, 32, 1), lambda: values((4, 32, 4, 4)).to(memory_format=torch.channels_last)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OF_VIEWS)
def test_a_selective_checkpoint_may_keep_outputs(name: str) -> None:
    make, x = OF_VIEWS[name][0], OF_VIEWS[name][1]()
    torch.manual_seed(0)
    block, results = nn.Sequential(make(), nn.Tanh(), make()), []
    for run in (block, keeping(("",), block)):
        block.zero_grad()
        with nv.nvfp4_autocast(NO_SR):
            loss = run(x).square().mean()
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in block.parameters())])
    assert all(map(same_bits, *results))


@pytest.mark.parametrize("name", OF_VIEWS)
def test_a_selective_checkpoint_notices_what_is_written_to_an_output_that_it_keeps(name: str) -> None:
    """As in torch: what it kept is no longer the layer's output, and gradients would be wrong."""

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = OF_VIEWS[name][0](), OF_VIEWS[name][0]()

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.first(x)
            y += x
            z: Tensor = self.second(y.tanh())
            return z

    with nv.nvfp4_autocast(NO_SR):
        y = keeping(("conv", "mm"), Residual())(OF_VIEWS[name][1]())
    with pytest.raises(RuntimeError, match="has been mutated"):
        y.sum().backward()


class Evaluated(nn.Sequential):
    """All layers but the last one run without gradients: their weights' codes are kept from the second pass on."""

    def forward(self, x: Tensor) -> Tensor:
        *first, last = self
        with torch.no_grad():
            for layer in first:
                x = layer(x)
        y: Tensor = last(x)
        return y


class Records(nv.telemetry.Sink):
    def step(self, record: dict[str, Any]) -> None:
        assert record["layers"]["0"]["tensors"].keys() >= {"input", "weight", "grad_output"}


@contextlib.contextmanager
def stateful(kind: str, block: nn.Module) -> Iterator[None]:
    """Enter a context for one step."""
    group = None
    with contextlib.ExitStack() as stack:
        if kind == "frozen weights":
            stack.enter_context(nv.frozen_weights(block))
        if kind == "telemetry":
            stack.enter_context(nv.telemetry.attach(block, sinks=[Records()]).step(0))
        if kind == "shared amaxes":
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
            stack.callback(dist.destroy_process_group)
            group = dist.group.WORLD
        recipe = "delayed" if kind == "delayed scales" else "default"
        stack.enter_context(nv.nvfp4_autocast(recipe, amax_reduction_group=group))
        yield


@pytest.mark.parametrize("kept", ["", "aten", "select", "quantize", "nothing"])
@pytest.mark.parametrize("kind", ["delayed scales", "frozen weights", "telemetry", "shared amaxes", "evaluation"])
def test_a_selective_checkpoint_sees_nothing_of_what_lasts_longer_than_a_call(kind: str, kept: str) -> None:
    """State is made and moved in the first forward alone: kept results would be given to other calls in the second."""
    results: list[list[Tensor]] = []
    states = []
    for selective in (False, True):
        results.append([])
        torch.manual_seed(0)
        made = Evaluated if kind == "evaluation" else nn.Sequential
        block = made(nn.Conv2d(32, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3))
        run: Any = keeping((kept,), block) if selective else block
        for step in range(3):
            x = (values((16, 32, 8, 8), seed=step) * 2**step).requires_grad_()
            torch.manual_seed(step)
            with stateful(kind, block):
                loss = run(x).square().mean()
                grads = torch.autograd.grad(loss, (x, *block.parameters()), allow_unused=True)
            results[-1] += [loss.detach(), *(grad for grad in grads if grad is not None)]
        states.append(tree_leaves(nv.extra_state(block)))
    assert all(map(same_bits, *results))
    assert len(results[1]) == 3 * (3 if kind == "evaluation" else 6)
    assert all(same_bits(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(*states, strict=True))
