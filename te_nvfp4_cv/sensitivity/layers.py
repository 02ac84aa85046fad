"""The modules in whose forward a convolution or linear layer runs, and a precision for each of them, for a while.

A unit is the innermost module that runs when the call is made: what a set_precision entry rules. Usually it owns the
weight; attention's output projection runs inside of the attention module, which is the unit then.
`ruled` lays entries over those of set_precision, which stay where they are: its hooks run innermost and leave nothing.
"""

from __future__ import annotations

import math
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

Entries = Mapping[nn.Module, NVFP4BlockScaling | None]


@dataclass
class Unit:
    """One module that runs layers: the first one's operation and weight, FLOPs of all (fprop, dgrad, wgrad)."""

    name: str
    module: nn.Module
    op: str
    kernel: tuple[int, ...]
    recipe: NVFP4BlockScaling
    flops: int = 0


def named(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """named_modules with plain names, without ScriptModules, into which no context sees."""
    return ((name, module) for name, module in named_modules(model) if not isinstance(module, torch.jit.ScriptModule))


@contextmanager
def ruled(entries: Entries) -> Iterator[None]:
    """While a module of `entries` runs, its entry rules (None: high precision), whatever set_precision says.

    The backward pass belongs inside: activation checkpointing runs the modules again then.
    """
    with ExitStack() as stack:
        for module, recipe in entries.items():
            pre, post = _hooks(object(), recipe)
            stack.callback(module.register_forward_pre_hook(pre).remove)
            stack.callback(module.register_forward_hook(post, always_call=True).remove)
        yield


def _hooks(owner: object, recipe: NVFP4BlockScaling | None) -> tuple[Callable[..., None], Callable[..., None]]:
    """`owner` stands for the module: set_precision's entry of the same module is popped apart from this one."""
    return (
        lambda module, args: state.push_override(recipe, owner),
        lambda module, args, output: state.pop_override(owner),
    )


@contextmanager
def high_outside() -> Iterator[None]:
    """To be entered inside of nvfp4_autocast: what runs in no module with an entry, such as layers called by the loss
    function, runs in high precision.
    """
    owner = object()
    state.push_override(None, owner)
    try:
        yield
    finally:
        state.pop_override(owner)


def units_of(model: nn.Module, run: Callable[[], Any]) -> tuple[list[Unit], int]:
    """The units with a call in NVFP4 while `run` runs, in the order in which they ran; FLOPs of all layers."""
    names = {module: name for name, module in named(model)}
    running: list[nn.Module] = []
    units: dict[nn.Module, Unit] = {}
    total = 0

    def enter(module: nn.Module, args: Any) -> None:
        running.append(module)

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        if module in running:
            del running[len(running) - 1 - running[::-1].index(module) :]

    def called(call: observe.Call) -> observe.Seen:
        module = running[-1] if running else None

        def finished(y: Tensor) -> None:
            nonlocal total
            source = call.x if "transpose" in call.op else y
            flops = 3 * 2 * source.numel() * math.prod(call.weight.shape[1:])
            total += flops
            if module is None or call.recipe is None:
                return
            kernel = tuple(call.weight.shape)
            unit = units.setdefault(module, Unit(names.get(module, ""), module, call.op, kernel, call.recipe))
            unit.flops += flops

        return observe.Seen(finished)

    with ExitStack() as stack:
        for module in names:
            stack.callback(module.register_forward_pre_hook(enter).remove)
            stack.callback(module.register_forward_hook(leave, always_call=True).remove)
        stack.enter_context(observe.observe(called))
        run()
    return list(units.values()), total
