"""torch.compile of a part of what runs: graph breaks, blocks compiled by themselves, torch.func, whole encoder layers.

Each gave other numbers than eager mode, or an error: graphs and frames were used where something else was active.
"""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import te_nvfp4_cv as nv
from te_nvfp4_cv.context.entries import MARK
from te_nvfp4_cv.context.state import local
from tests.helpers import same_bits, values
from tests.networks import NO_SR

ATTENTION = """
import torch
import te_nvfp4_cv as nv

layer, x = torch.nn.MultiheadAttention(32, 4, batch_first=True).eval(), torch.randn(2, 8, 32)
with nv.nvfp4_autocast():  # before Dynamo looks at torch's functions for the first time
    layer(x, x, x)
torch.compile(lambda x: layer(x, x, x)[0], backend="eager", fullgraph=True)(x)
"""

pytestmark = [
    pytest.mark.filterwarnings("ignore:Dynamo", "ignore:nvfp4. only"),
    pytest.mark.usefixtures("fresh_dynamo"),
]
X = values((2, 16, 6, 6))


class Block(nn.Module):
    """Two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu())


class Broken(Block):
    """With a graph break between them."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        torch._dynamo.graph_break()
        return self.b(y)


class Direct(Block):
    """Of which no hook sees the second."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(self.a(x).relu(), self.b.weight, self.b.bias, padding=1)


def two(kind: type[Block]) -> Any:
    torch.manual_seed(0)
    return nn.Sequential(kind(), kind())


RECIPES: dict[str, Any] = {"1": nv.NVFP4BlockScaling(disable_rht=True), "0.b": None}


@pytest.mark.parametrize("kind, table", [(Block, {"1.b": None}), (Direct, RECIPES)])
def test_blocks_that_are_compiled_by_themselves(kind: type[Block], table: dict[str, Any]) -> None:
    """Blocks of one class share what was traced, and by default their hooks are no reason to trace again."""
    model = two(kind)
    nv.set_precision(model, table)
    model = copy.deepcopy(model)
    with nv.nvfp4_autocast(NO_SR):
        expected = [block(X) for block in model]
        for block in model:
            block.compile(backend="eager", fullgraph=True)
        assert all(same_bits(block(X), y) for _ in range(2) for block, y in zip(model, expected, strict=True))
    nv.clear_precision(model)
    assert not any(hasattr(parameter, MARK) for parameter in model.parameters())


@pytest.mark.parametrize("table", [{"0": None}, RECIPES])
def test_entries_around_a_graph_break(table: dict[str, Any]) -> None:
    model = two(Broken)
    nv.set_precision(model, table)
    with nv.nvfp4_autocast(NO_SR):
        expected = model(X)
        compiled = torch.compile(model, backend="eager")
        assert all(same_bits(compiled(X), expected) for _ in range(2))
    assert not local.states and not local.overrides


def in_contexts(block: Any) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        with nv.nvfp4_autocast(NO_SR):
            y = block.a(x)
            torch._dynamo.graph_break()
            with nv.nvfp4_autocast(enabled=False):
                y = block.b(y)
                torch._dynamo.graph_break()
                y = y + block.a(y)
            return block.b(y)

    return forward


def left_by_an_error(block: Any) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        y = x
        try:
            with nv.nvfp4_autocast(NO_SR):
                y = block.a(x)
                torch._dynamo.graph_break()
                raise ValueError
        except ValueError:
            return block.b(y)

    return forward


@pytest.mark.parametrize("make", [in_contexts, left_by_an_error])
def test_a_graph_break_inside_of_a_context_of_the_compiled_function(make: Any) -> None:
    function = make(Block())
    expected = function(X)
    compiled = torch.compile(function, backend="eager")
    assert same_bits(compiled(X), expected) and same_bits(compiled(X), expected)
    assert not local.states and not local.modes


TRANSFORMS: dict[str, Callable[[Any, Tensor], Any]] = {
    "vmap": lambda f, x: torch.func.vmap(lambda v: f(v[None])[0])(x),
    "grad": lambda f, x: torch.func.grad(lambda v: f(v).square().sum())(x),
    "vjp": lambda f, x: torch.func.vjp(f, x)[0],
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x,))[1],
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_of_torch_func_run_as_in_eager_mode(name: str) -> None:
    conv = nn.Conv2d(16, 16, 3)

    def function(x: Tensor) -> Any:
        return TRANSFORMS[name](conv, x), conv(x)

    with nv.nvfp4_autocast(NO_SR):
        expected = function(X)
        found = torch.compile(function, backend="eager", fullgraph=True)(X)
    assert same_bits(found[0], expected[0]) and same_bits(found[1], expected[1])
    assert torch.equal(found[0], TRANSFORMS[name](conv, X)) and not torch.equal(found[1], conv(X))


def test_an_encoder_layer_is_no_operator_of_its_own_in_evaluation() -> None:
    layer, x = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True).eval(), values((2, 8, 32))
    with torch.no_grad():
        plain = layer(x)
        with nv.nvfp4_autocast(NO_SR):
            expected = layer(x)
            assert same_bits(torch.compile(layer, backend="eager", fullgraph=True)(x), expected)
        assert not same_bits(expected, plain)
        assert same_bits(torch.compile(layer, backend="eager")(x), plain)


def test_attention_compiles_in_one_graph_after_a_context_in_a_new_process() -> None:
    done = subprocess.run([sys.executable, "-c", ATTENTION], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-1000:]
