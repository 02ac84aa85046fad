"""Enter and leave nvfp4_autocast, the context in which plain torch calls run in NVFP4.

    with nvfp4_autocast(recipe):            conv1d/2d/3d, conv_transpose1d/2d/3d, linear  -> functional, where eligible
        loss = criterion(model(x), y)       relu, relu_                                   -> a ReLU that saves one bit
    loss.backward()                         runs as forward was recorded: inside or outside of the context

state.py says what is active in this thread, function_mode.py sees the torch calls, and torch_patches.py makes
activation checkpointing recompute under the contexts of its forward pass.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ContextDecorator, contextmanager, nullcontext
from typing import Any

import torch

from te_nvfp4_cv.backend import dispatch
from te_nvfp4_cv.context.function_mode import Mode, mode_is_on
from te_nvfp4_cv.context.state import Override, State, active_recipe, drop_stale, local, warn_unapplied
from te_nvfp4_cv.context.torch_patches import patch_torch
from te_nvfp4_cv.errors import type_error
from te_nvfp4_cv.layer import observe, shortfall
from te_nvfp4_cv.layer.check import checked_recipe
from te_nvfp4_cv.layer.inside import replaced
from te_nvfp4_cv.recipe.block_scaling import NVFP4BlockScaling

__all__ = ["active_recipe", "nvfp4_autocast"]


class nvfp4_autocast(ContextDecorator):  # noqa: N801  (named as torch.autocast is)
    """Run eligible layers of unmodified models in NVFP4.

    It is a context manager, which can be reused and nested, and a decorator. It may enclose a whole training loop or
    only the forward pass, and stand inside or outside of torch.autocast, which decides the dtype of activations.

    Args:
        recipe: An NVFP4BlockScaling, TransformerEngine's object of that name, or None for the default recipe.
        enabled: If False, everything inside runs in high precision, explicit NVFP4 modules too.
        backend: "auto", "reference", "integer", "vendor" or "triton". One that cannot run raises an error.
        amax_reduction_group: A torch.distributed process group whose ranks quantize training operands with one tensor
            scale, that of the largest amax of all ranks. They must run the same layers in the same order. In
            evaluation nothing is exchanged.
        relu_mask: If True, ReLU saves a 1-bit mask for backward instead of its output. The bits of forward and
            backward are the same.
    Raises:
        TypeError: `recipe` is not a recipe, or the group is not a process group.
        ValueError: The recipe contradicts itself, or the backend is unknown.
        RuntimeError: The backend cannot run here.

    Example:
        >>> import torch, te_nvfp4_cv as nv
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(16, 32, 3), torch.nn.ReLU())
        >>> with nv.nvfp4_autocast():
        ...     loss = model(torch.randn(16, 16, 8, 8)).square().mean()
        >>> loss.backward()
    """

    def __init__(
        self,
        recipe: Any = None,
        *,
        enabled: bool = True,
        backend: str = "auto",
        amax_reduction_group: Any = None,
        relu_mask: bool = True,
    ) -> None:
        for name, value in (("enabled", enabled), ("relu_mask", relu_mask)):
            if not isinstance(value, bool):
                raise type_error(
                    f"nvfp4_autocast: bad {name}.", got=repr(value), needs="True or False", fix=f"{name}=True"
                )
        resolved = checked_recipe(recipe)
        dispatch.check_backend(backend)
        # The choices that may be impossible: say so here, not at the first layer.
        if backend == "triton":
            dispatch.resolve(backend, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        elif backend == "integer":
            dispatch.resolve(backend, torch.device("cpu"))
        if amax_reduction_group is not None:
            _check_group(amax_reduction_group)
        self._state = State(enabled, resolved, backend, relu_mask, amax_reduction_group)

    def __enter__(self) -> nvfp4_autocast:
        if not torch.compiler.is_compiling():  # a trace cannot patch torch, nor warn
            patch_torch(captured)
            if self._state.recipe.precision:
                warn_unapplied(self._state)
        _push(self._state)
        return self

    def __exit__(self, *error: object) -> None:
        _pop()

    def __repr__(self) -> str:
        s = self._state
        return f"nvfp4_autocast({s.recipe!r}, enabled={s.enabled}, backend={s.backend!r}, relu_mask={s.relu_mask})"


@contextmanager
def heard() -> Iterator[None]:
    """Let observers hear of the calls inside, which run as they would outside of this context."""
    patch_torch(captured)
    _push(State(enabled=False, recipe=NVFP4BlockScaling(), backend="auto", relu_mask=False, passive=True))
    try:
        yield
    finally:
        _pop()


def _check_group(group: Any) -> None:
    if not torch.distributed.is_available() or not isinstance(group, torch.distributed.ProcessGroup):
        raise type_error(
            "nvfp4_autocast: amax_reduction_group is no process group.",
            got=f"{group!r:.80}",
            needs="a torch.distributed process group of which this process is a member, or None",
            fix="torch.distributed.group.WORLD after init_process_group, or leave it out",
        )


def _push(new: State) -> None:
    if not local.states and local.overrides and not torch.compiler.is_compiling():
        drop_stale()
    if not local.states and not torch.compiler.is_compiling():
        shortfall.start()
    local.states.append(new)
    local.marks.append(len(local.overrides))
    # One mode per thread is enough: it reads the innermost state.
    mode = None if mode_is_on() else Mode()
    local.modes.append(mode)
    if mode is not None:
        mode.__enter__()


def _pop() -> None:
    local.states.pop()
    del local.overrides[local.marks.pop() :]  # what a KeyboardInterrupt left: torch runs no hooks then
    mode = local.modes.pop()
    if mode is not None:
        mode.__exit__(None, None, None)
    if not torch.compiler.is_compiling() and not local.states and shortfall.local.calls:
        shortfall.judge()


@contextmanager
def _restored(states: list[State], overrides: list[Override]) -> Iterator[None]:
    """Run with the contexts and overrides of a checkpoint's first forward, whatever is active here."""
    mode = Mode() if states and not mode_is_on() else nullcontext()
    with replaced(local, states=list(states), marks=[0] * len(states), overrides=list(overrides)), mode:
        yield


def captured(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function`, made to run under the contexts that are active now, whenever and in whichever thread.

    "No context" is restored as well. The observers of this thread hear of its calls.
    """
    states, overrides, observers = list(local.states), list(local.overrides), observe.observers()

    @functools.wraps(function, updated=())  # `function` may be a module: its __dict__ must not be copied
    def rerun(*args: Any, **kwargs: Any) -> Any:
        with _restored(states, overrides), observe.told_to(observers):
            return function(*args, **kwargs)

    return rerun
