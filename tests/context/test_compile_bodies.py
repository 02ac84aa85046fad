"""torch.compile of models whose layers lie in the body of a higher-order operator: checkpoints, conditions, regions.

Dynamo hands such an operator to the function mode as a whole (tracing.py). The forward graph must hold the layers
that run in NVFP4 in eager mode, and the results must be those of eager mode.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn as nn
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch._dynamo.variables import torch_function
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from torch.utils.checkpoint import checkpoint

import te_nvfp4_cv as nv
from te_nvfp4_cv.context import function_mode, tracing
from te_nvfp4_cv.context.state import local
from tests.helpers import same_bits, values
from tests.networks import NO_SR, all_same, seen

pytestmark = [pytest.mark.filterwarnings("ignore:Dynamo"), pytest.mark.usefixtures("one_thread", "fresh_dynamo")]


def layers_of(module: torch.fx.GraphModule) -> int:
    """Return how many layers a graph runs, those of the graphs that it calls included."""
    count = 0
    for node in module.graph.nodes:
        count += node.target is torch.ops.te_nvfp4_cv.layer.default
        if node.op == "call_function":
            inner = [arg for arg in node.args if isinstance(arg, torch.fx.Node) and arg.op == "get_attr"]
            graphs = [getattr(module, arg.target) for arg in inner]
            count += sum(layers_of(graph) for graph in graphs if isinstance(graph, torch.fx.GraphModule))
    return count


class Compiled:
    """A function compiled into one graph; `layers`: how many its forward graph runs."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self.layers = 0
        backend = aot_autograd(
            fw_compiler=self._count,
            bw_compiler=lambda module, inputs: make_boxed_func(module.forward),
            partition_fn=min_cut_rematerialization_partition,
            keep_inference_input_mutations=True,
        )
        self.run = torch.compile(function, backend=backend, fullgraph=True)

    def _count(self, module: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        self.layers += layers_of(module)
        return make_boxed_func(module.forward)


def blocks() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        return self.attention(tokens, tokens, tokens, need_weights=False)[0].transpose(1, 2).unflatten(2, (8, 8))


def checkpointed(use_reentrant: bool) -> Callable[[nn.Module], Callable[[Tensor], Tensor]]:
    return lambda net: lambda x: checkpoint(net, x, use_reentrant=use_reentrant)


def nested(net: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: checkpoint(lambda y: net(checkpoint(net, y, use_reentrant=False)), x, use_reentrant=False)


def by_block(net: nn.Sequential) -> Callable[[Tensor], Tensor]:
    """As timm's set_grad_checkpointing: one checkpoint for each block."""

    def forward(x: Tensor) -> Tensor:
        for block in net:
            x = checkpoint(block, x, use_reentrant=False)
        return x

    return forward


def wrapped(impl: CheckpointImpl) -> Callable[[nn.Module], Callable[[Tensor], Tensor]]:
    return lambda net: checkpoint_wrapper(net, checkpoint_impl=impl)


def attention_too(net: nn.Module) -> Callable[[Tensor], Tensor]:
    attention = Attention()
    return lambda x: checkpoint(lambda y: attention(net(y)), x, use_reentrant=False)


def region(net: nn.Module) -> Callable[[Tensor], Tensor]:
    inner = torch.compiler.nested_compile_region(lambda x: net(x))
    return lambda x: inner(inner(x))


def region_in_two_contexts(net: nn.Module) -> Callable[[Tensor], Tensor]:
    inner = torch.compiler.nested_compile_region(lambda x: net(x))

    def forward(x: Tensor) -> Tensor:
        with nv.nvfp4_autocast(enabled=False):
            y = inner(x)
        return y + inner(x)

    return forward


CASES = {
    "checkpoint": checkpointed(False),
    "reentrant": checkpointed(True),
    "nested": nested,
    "by block": by_block,
    "wrapper": wrapped(CheckpointImpl.NO_REENTRANT),
    "reentrant wrapper": wrapped(CheckpointImpl.REENTRANT),
    "attention": attention_too,
    "region": region,
    "region in two contexts": region_in_two_contexts,
}
if torch.__version__.startswith(("2.11.", "2.12.")):  # whose Dynamo knows no regions below two function modes
    del CASES["region in two contexts"]
if torch.__version__.startswith("2.11."):
    del CASES["region"]


def step(net: nn.Module, run: Callable[[Tensor], Tensor], recipe: nv.NVFP4BlockScaling = NO_SR) -> list[Tensor]:
    net.zero_grad()
    x = values((16, 32, 8, 8)).requires_grad_()
    with nv.nvfp4_autocast(recipe):
        y = run(x)
    y.square().mean().backward()
    assert x.grad is not None
    return [y.detach(), x.grad, *[p.grad.clone() for p in net.parameters() if p.grad is not None]]


@pytest.mark.parametrize("case", CASES)
def test_a_body_has_the_layers_and_bits_of_eager(case):
    net = blocks()
    run = CASES[case](net)
    calls: list[bool] = []

    def forward() -> None:
        with nv.nvfp4_autocast(NO_SR), torch.no_grad():
            calls.extend(call.recipe is not None for call in seen(lambda: run(values((16, 32, 8, 8)))))

    forward()
    compiled = Compiled(run)
    assert all_same(step(net, run), step(net, compiled.run))
    assert compiled.layers == sum(calls) > 0


def test_both_branches_of_a_condition_run_in_nvfp4():
    net = blocks()

    def forward(x: Tensor) -> Tensor:
        return torch.cond(x.sum() > -1e9, net, lambda y: net[0](y) + 1, (x,))

    compiled = Compiled(forward)
    assert all_same(step(net, net), step(net, compiled.run))
    assert compiled.layers == 3
    with nv.nvfp4_autocast(NO_SR), torch.no_grad():  # torch.cond compiles itself when nobody else does
        x = values((16, 32, 8, 8))
        assert same_bits(forward(x), net(x))


def test_the_recomputed_layers_round_as_the_first_ones():
    """With stochastic rounding, too, which rounds gradients only: the first forward and the second have equal bits."""
    net = blocks()
    torch.manual_seed(3)
    expected = step(net, net, nv.NVFP4BlockScaling())
    torch.manual_seed(3)
    compiled = Compiled(checkpointed(False)(net))
    assert all_same(expected, step(net, compiled.run, nv.NVFP4BlockScaling()))


def test_densenet_that_saves_memory():
    models = pytest.importorskip("torchvision.models.densenet", reason="torchvision is not installed")
    torch.manual_seed(0)
    block = models._DenseBlock(2, 32, 4, 32, 0.0, memory_efficient=True)
    compiled = Compiled(block)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchvision does not say which checkpoint it means
        assert all_same(step(block, block), step(block, compiled.run))
    assert compiled.layers == 4


def test_attention_is_one_graph():
    attention = Attention()
    compiled = Compiled(attention)
    assert all_same(step(attention, attention), step(attention, compiled.run))
    assert compiled.layers == 2 and not counters["graph_break"]


def in_an_island(net: nn.Sequential) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            x = net[0](x)
        return net[2](net[1](x))

    return forward


def in_a_context(net: nn.Sequential) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        with nv.nvfp4_autocast(enabled=False):
            x = net[0](x)
        return net[2](net[1](x))

    return forward


def with_an_entry(net: nn.Sequential) -> Callable[[Tensor], Tensor]:
    nv.set_precision(net, {"0": None})
    return net


@pytest.mark.filterwarnings("error:nvfp4")  # what is in high precision in the graph was decided when it was traced
@pytest.mark.parametrize("body", [with_an_entry, in_an_island, in_a_context])
def test_what_a_checkpointed_body_enters_and_leaves(body):
    inside = body(blocks())
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=body is in_an_island)
    x = values((4, 32, 8, 8)).requires_grad_()
    compiled = Compiled(lambda z: checkpoint(inside, z, use_reentrant=False))
    grads = []
    for function in (inside, compiled.run, compiled.run):
        with nv.nvfp4_autocast(NO_SR), autocast:
            loss = function(x).float().square().sum()
        grads.append(torch.autograd.grad(loss, x)[0])
    assert compiled.layers == 1
    assert all(same_bits(grad, grads[0]) for grad in grads)
    assert not local.overrides and not local.states


def test_the_first_trace_of_a_process(monkeypatch):
    """After a graph break torch traces a function again from its beginning, and must find there what it found before.

    As in YOLO with checkpoints: what is changed in Dynamo is changed before the first trace, not by it.
    """
    for name in ("dispatch_torch_function", "can_dispatch_torch_function"):
        changed = getattr(torch_function, name)
        monkeypatch.setattr(torch_function, name, getattr(changed, "__wrapped__", changed))
    for once in (tracing.trace_bodies_under, tracing.repair_dynamo):
        once.cache_clear()
    conv, x = nn.Conv2d(16, 16, 3), values((4, 16, 8, 8)).requires_grad_()

    def function(x):
        y = checkpoint(conv, x, use_reentrant=False)
        torch._dynamo.graph_break()
        return conv(y)

    with nv.nvfp4_autocast(NO_SR):
        assert same_bits(torch.compile(function, backend="eager")(x), function(x))


def test_an_unknown_torch_says_which_layers_stay_in_high_precision(monkeypatch):
    monkeypatch.setattr(tracing, "trace_bodies_under", lambda mode, stacks: False)
    with pytest.warns(UserWarning, match="layers inside of tag_activation_checkpoint run in high precision"):
        assert not function_mode._traces_bodies(torch.ops.higher_order.tag_activation_checkpoint)
