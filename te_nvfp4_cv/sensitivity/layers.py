"""Find the modules in whose forward a convolution or linear layer runs, and give each a precision for a while.

A unit is the innermost module that runs when the call is made, because that is what a set_precision entry rules.
Usually it owns the weight. Attention's output projection runs inside the attention module, which is then the unit.
`ruled` lays its entries over those of set_precision, which stay in place: its hooks run innermost and leave nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from te_nvfp4_cv.context import state
from te_nvfp4_cv.layer import observe
from te_nvfp4_cv.nn.walk import named_modules
from te_nvfp4_cv.recipe.block_scaling import NVFP4BlockScaling
from te_nvfp4_cv.report.forward_pass import gemm_flops, running

Entries = Mapping[nn.Module, NVFP4BlockScaling | None]


@dataclass
class Unit:
    """A module that runs layers: the first layer's operation and weight, and the FLOPs of all (three GEMMs each)."""

    name: str
    module: nn.Module
    op: str
    kernel: tuple[int, ...]
    recipe: NVFP4BlockScaling
    flops: int = 0


def named(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """List the modules with plain names, without ScriptModules, into which no context sees."""
    return ((name, module) for name, module in named_modules(model) if not isinstance(module, torch.jit.ScriptModule))


@contextmanager
def ruled(entries: Entries) -> Iterator[None]:
    """Let the entry of a module rule while it runs, whatever set_precision says; None stands for high precision.

    The backward pass belongs inside, because activation checkpointing runs the modules again then.
    """
    with ExitStack() as stack:
        for module, recipe in entries.items():
            enter, leave = _override(recipe)
            stack.callback(module.register_forward_pre_hook(enter).remove)
            # always_call: a module that raises must end its override, or everything after it would run under it.
            stack.callback(module.register_forward_hook(leave, always_call=True).remove)
        yield


def _override(recipe: NVFP4BlockScaling | None) -> tuple[Callable[..., None], Callable[..., None]]:
    """Return functions that begin and end an override, and serve as hooks.

    Its owner is an object, not the module, so that it is not taken back together with set_precision's entry.
    """
    owner = object()
    # Both return None: a hook's other value would replace the module's input or output.
    return lambda *_: state.push_override(recipe, owner), lambda *_: state.pop_override(owner)


@contextmanager
def high_outside() -> Iterator[None]:
    """Run in high precision what no module with an entry runs, such as layers that the loss function calls.

    Enter it inside nvfp4_autocast.
    """
    enter, leave = _override(None)
    enter()
    try:
        yield
    finally:
        leave()


def units_of(model: nn.Module, run: Callable[[], Any]) -> tuple[list[Unit], int]:
    """Call `run`, and return the units with a call in NVFP4, as they ran first, and the FLOPs of all layers.

    FLOPs are those of all three GEMMs, also of layers that cannot run in NVFP4.
    """
    names = {module: name for name, module in named(model)}
    units: dict[nn.Module, Unit] = {}
    total = 0

    def called(call: observe.Call) -> observe.Seen:
        # Read when the call begins; when it is finished the stack may be another.
        module = stack[-1] if stack else None

        def finished(y: Tensor) -> None:
            nonlocal total
            flops = 3 * gemm_flops(call.op, call.x, call.weight.shape, y)  # fprop, dgrad and wgrad
            total += flops
            if module is None or call.recipe is None:  # called by the loss function, or in high precision
                return
            kernel = tuple(call.weight.shape)
            unit = units.setdefault(module, Unit(names.get(module, ""), module, call.op, kernel, call.recipe))
            unit.flops += flops

        return observe.Seen(finished)

    with running(names) as stack, observe.observe(called):
        run()
    return list(units.values()), total
