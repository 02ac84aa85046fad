"""nvfp4_autocast: plain torch calls made inside the context run in NVFP4.

    with nvfp4_autocast(recipe):            conv1d/2d/3d, conv_transpose1d/2d/3d, linear  -> functional, where eligible
        loss = criterion(model(x), y)       relu, relu_                                   -> the ReLU that keeps one bit
    loss.backward()                         captured in forward: inside or outside of the context

context.py holds what is active, handover.py the torch function mode; here they are entered and left.
Activation checkpointing recomputes outside the context: torch.utils.checkpoint is wrapped once, at the first entry, so
that the recomputed forward re-enters what was active. nn.DataParallel runs its replicas in threads that no context
reaches: it raises.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from te_nvfp4_cv.backend import dispatch
from te_nvfp4_cv.context.function_mode import Mode, mode_is_on
from te_nvfp4_cv.context.state import State, active_recipe, drop_stale, local, warn_unapplied
from te_nvfp4_cv.context.torch_patches import _patch_torch
from te_nvfp4_cv.errors import type_error
from te_nvfp4_cv.recipe.block_scaling import NVFP4BlockScaling, as_recipe, check_usable

__all__ = ["active_recipe", "nvfp4_autocast"]


class nvfp4_autocast:  # noqa: N801  (named as torch.autocast is)
    """Run eligible layers of unmodified models in NVFP4.

    A context manager, reusable and re-entrant, and a decorator. It may enclose a whole training loop or only the
    forward pass, and stand inside or outside of torch.autocast, whose dtype activations then have.

    Args:
        recipe: NVFP4BlockScaling, TransformerEngine's object of that name, or None for the default recipe.
        enabled: False runs everything inside in high precision, explicit NVFP4 modules too.
        backend: "auto", "reference", "vendor" or "triton"; an explicit choice that cannot run raises.
        amax_reduction_group: torch.distributed process group whose ranks quantize training operands with one tensor
            scale: the largest amax of all (evaluation asks nobody). They must run the same layers in the same order.
        relu_mask: ReLU keeps a 1-bit mask for backward instead of its output; the same bits forward and backward.
    Raises:
        TypeError: a first argument that is no recipe, a group that is no process group; ValueError: a recipe that
        contradicts itself, an unknown backend; RuntimeError: a backend that cannot run here.
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
        resolved = recipe if type(recipe) is NVFP4BlockScaling else as_recipe(recipe)
        check_usable(resolved)
        dispatch.check_backend(backend)
        if backend == "triton":
            dispatch.resolve(backend, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        if amax_reduction_group is not None:
            _check_group(amax_reduction_group)
        self._state = State(enabled, resolved, backend, relu_mask, amax_reduction_group)

    def __enter__(self) -> nvfp4_autocast:
        if not torch.compiler.is_compiling():
            _patch_torch()
            if self._state.recipe.precision:
                warn_unapplied(self._state)
        _push(self._state)
        return self

    def __exit__(self, *error: object) -> None:
        _pop()

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            with self:
                return function(*args, **kwargs)

        return wrapped

    def __repr__(self) -> str:
        s = self._state
        return f"nvfp4_autocast({s.recipe!r}, enabled={s.enabled}, backend={s.backend!r}, relu_mask={s.relu_mask})"


@contextmanager
def heard() -> Iterator[None]:
    """Calls inside are handed over, so that observers are told of them, and run as they would outside."""
    _patch_torch()
    _push(State(enabled=False, recipe=as_recipe(None), backend="auto", relu_mask=False, passive=True))
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
    local.states.append(new)
    local.marks.append(len(local.overrides))
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


# ---- torch.utils.checkpoint, nn.DataParallel ------------------------------------------------------------------------






