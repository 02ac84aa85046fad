"""`with torch.autocast(enabled=False):` inside of the context: layers in high precision, where torch casts nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.amp import custom_bwd, custom_fwd
from torch.utils.checkpoint import checkpoint

import te_nvfp4_cv as nv
from tests.helpers import same_bits, values
from tests.networks import NO_SR, seen

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    assert nv.active_recipe() is None and not torch.is_autocast_enabled("cpu")


def bf16(enabled: bool = True) -> torch.autocast:
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled)


class Model(nn.Module):
    """A body, and a head that its author wants in fp32."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Conv2d(16, 16, 3), nn.Conv2d(16, 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        with torch.autocast("cpu", enabled=False):
            return self.head(y.float())


def recipes(run: Callable[[], Any]) -> list[bool]:
    """Return, for each call of a layer, if it ran in NVFP4."""
    return [call.recipe is not None for call in seen(run)]


def test_the_head_is_in_high_precision_and_says_why():
    model, x = Model(), values((4, 16, 8, 8))

    def run() -> Tensor:
        with bf16(), nv.nvfp4_autocast(NO_SR):
            return model(x)

    calls = seen(run)
    assert [call.recipe for call in calls] == [NO_SR, None]
    assert calls[1].reason == "torch.autocast(enabled=False) inside of the context"
    with bf16(), nv.nvfp4_autocast(NO_SR):
        y = model.body(x)
        found = model(x)
    assert found.dtype == torch.float32 and same_bits(found, model.head(y.float()))
    with bf16():
        report = nv.coverage(model, x)
    assert {row.name: row.nvfp4 for row in report.rows} == {"body": True, "head": False}
    assert "torch.autocast(enabled=False)" in str(report)


@pytest.mark.parametrize("first", ["torch", "nvfp4"])
def test_the_order_of_the_contexts_does_not_matter(first):
    model, x = Model(), values((4, 16, 8, 8))
    contexts = [bf16(), nv.nvfp4_autocast(NO_SR)]
    outer, inner = contexts if first == "torch" else contexts[::-1]

    def run() -> Tensor:
        with outer, inner:
            return model(x)

    assert recipes(run) == [True, False]


def test_where_torch_casts_nothing_it_is_no_island():
    """Outside of torch.autocast, and around everything: `torch.autocast(device, enabled=args.amp)` of a script."""
    model, x = Model(), values((4, 16, 8, 8))

    def alone() -> Tensor:
        with nv.nvfp4_autocast(NO_SR):
            return model(x)

    def around() -> Tensor:
        with nv.nvfp4_autocast(NO_SR), bf16(enabled=False):
            return model(x)

    def outside() -> Tensor:
        with bf16(), bf16(enabled=False), nv.nvfp4_autocast(NO_SR):
            return model(x)

    assert recipes(alone) == recipes(around) == recipes(outside) == [True, True]


def test_what_ends_an_island():
    conv, x = nn.Conv2d(16, 16, 3), values((4, 16, 8, 8))

    def run() -> None:
        with bf16(), nv.nvfp4_autocast(NO_SR):
            with bf16(enabled=False):
                conv(x)  # high precision
                with bf16():
                    conv(x)  # high precision
                with nv.nvfp4_autocast(NO_SR):
                    conv(x)
                conv(x)  # high precision
            with pytest.raises(ValueError, match="mine"), bf16(enabled=False):
                raise ValueError("mine")
            conv(x)
            with nv.nvfp4_autocast(enabled=False), bf16(enabled=False), bf16():
                conv(x)  # high precision

    assert recipes(run) == [False, False, True, False, True, False]


def test_layers_that_were_asked_for_by_name_stay_in_nvfp4():
    conv, x = nv.NVFP4Conv2d(16, 16, 3), values((4, 16, 8, 8))
    expected = nv.functional.conv2d(x, conv.weight, conv.bias, recipe=NO_SR)
    with bf16(), nv.nvfp4_autocast(NO_SR), bf16(enabled=False):
        assert same_bits(conv(x), expected)
        assert same_bits(nv.functional.conv2d(x, conv.weight, conv.bias, recipe=NO_SR), expected)
        assert same_bits(F.conv2d(x, conv.weight, conv.bias), torch.convolution(
            x, conv.weight, conv.bias, (1, 1), (0, 0), (1, 1), False, (0, 0), 1
        ))  # fmt: skip


class Fp32(torch.autograd.Function):
    """Runs its block in fp32, forward and when it recomputes."""

    @staticmethod
    @custom_fwd(device_type="cpu", cast_inputs=torch.float32)
    def forward(ctx: Any, x: Tensor, block: nn.Module) -> Tensor:
        ctx.block = block
        ctx.save_for_backward(x)
        return block(x)

    @staticmethod
    @custom_bwd(device_type="cpu")
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, None]:  # type: ignore[override]
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            y = ctx.block(x)
        torch.autograd.backward(y, dy)
        return x.grad, None


def test_recomputation_is_in_the_same_island_or_in_none():
    model, x = Model(), values((4, 16, 8, 8)).requires_grad_()

    def island() -> None:
        with bf16(), nv.nvfp4_autocast(NO_SR):
            loss = Fp32.apply(x, model.body).mean() + checkpoint(model, x, use_reentrant=False).mean()
        with bf16(), nv.nvfp4_autocast():
            loss.backward()

    # Forward: Fp32, body, head. Backward: the checkpoint first, then Fp32.
    assert recipes(island) == [False, True, False, True, False, False]

    def none() -> None:
        with nv.nvfp4_autocast(NO_SR):
            loss = checkpoint(model.body, x, use_reentrant=False).mean()
        with bf16():  # the checkpoint turns it off again, as it was in forward
            loss.backward()

    assert recipes(none) == [True, True]


def outer_head(model: Model) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            y = model.head(x.float())
            with torch.autocast("cpu", dtype=torch.bfloat16):
                y = model.body(y)
        return model.body(y.float())

    return forward


@pytest.mark.filterwarnings("ignore:Dynamo")
@pytest.mark.parametrize("body", ["model", "nested", "checkpoint"])
def test_torch_compile_knows_islands(body):
    model, x = Model(), values((4, 16, 8, 8))
    run: Callable[[Tensor], Tensor] = model
    if body == "nested":
        run = outer_head(model)
    elif body == "checkpoint":
        run = lambda x: checkpoint(model, x, use_reentrant=False)  # noqa: E731
    with bf16(), nv.nvfp4_autocast(NO_SR):
        compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
        inside = run(x)
        assert same_bits(compiled(x), inside)
        with bf16(enabled=False):
            outside = run(x)
            assert same_bits(compiled(x), outside) and not same_bits(outside.float(), inside.float())
        assert same_bits(compiled(x), inside)


def test_torch_jit_still_reads_autocast():
    with nv.nvfp4_autocast():
        pass  # torch.autocast is changed at the first entry

    def f(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = torch.mm(x, x)
        return y

    x = values((16, 16))
    assert same_bits(torch.jit.script(f)(x), f(x))
