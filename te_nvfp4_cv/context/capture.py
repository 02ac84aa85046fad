"""Remember which contexts are active, and enter them again later: in a backward pass, or in another thread.

Whoever recomputes a forward pass needs this. torch's activation checkpointing and torch.amp.custom_fwd are made to use
it (torch_patches.py); `capture` is for autograd Functions that recompute without either.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch

from te_nvfp4_cv.backend.torch_private import function_modes, left_alone
from te_nvfp4_cv.context.function_mode import Mode, mode_is_on
from te_nvfp4_cv.context.state import local, outside
from te_nvfp4_cv.layer import observe
from te_nvfp4_cv.layer.inside import replaced

_AUTOCAST_DEVICES = ("cpu", "cuda")


class Captured:
    """What was active when it was made. Enter it with `with`, or let it wrap a function; any number of times."""

    def __init__(self) -> None:
        self._states, self._overrides, self._observers = local.states, local.overrides, observe.local.observers
        self._autocast = [_autocast_now(device) for device in _AUTOCAST_DEVICES]
        # Modes above the context's own, which would take their calls; Dynamo does not trace the question.
        self._above = [] if torch.compiler.is_compiling() else [m for m in function_modes() if _recomputes(m)]

    def __enter__(self) -> Captured:
        if not torch.compiler.is_compiling():
            self._enter()
        elif not self._is_active():
            self._enter_untraced()
        return self

    def __exit__(self, *error: object) -> None:
        if not torch.compiler.is_compiling():
            self._leave()
        elif not self._is_active():
            self._leave_untraced()

    def _is_active(self) -> bool:
        """Return True where torch.compile traces a backward together with its forward: nothing has changed."""
        return local.states is self._states and local.overrides is self._overrides

    def _enter(self) -> None:
        local.entered.append(self._restored())

    def _leave(self) -> None:
        local.entered.pop().close()

    # Only where they are needed: the first call imports Dynamo, which takes a second.
    _enter_untraced, _leave_untraced = left_alone(_enter), left_alone(_leave)

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return `function`, made to run under what was active."""

        @functools.wraps(function, updated=())  # `function` may be a module: its __dict__ must not be copied
        def rerun(*args: Any, **kwargs: Any) -> Any:
            with self:
                return function(*args, **kwargs)

        return rerun

    def _restored(self) -> ExitStack:
        stack = ExitStack()
        # Autocast first: what it was belongs to the contexts that are left here, see torch_patches.py.
        for device, before in zip(_AUTOCAST_DEVICES, self._autocast, strict=True):
            if before != _autocast_now(device):
                enabled, dtype = before
                stack.enter_context(torch.autocast(device, dtype=dtype, enabled=enabled))
        states, overrides = self._states, self._overrides
        if not states and mode_is_on():  # else the mode would take the contexts of the thread that entered it
            states = [outside()]
        stack.enter_context(replaced(local, states=states, marks=[0] * len(states), overrides=overrides))
        stack.enter_context(observe.told_to(self._observers))
        if states and not mode_is_on():
            stack.enter_context(Mode())
        for mode in self._above:
            if mode not in function_modes():
                stack.enter_context(mode)
        return stack


def _recomputes(mode: Any) -> bool:
    """Return True for a function mode that wants to see what is recomputed, too: it says so by an attribute."""
    return bool(getattr(mode, "recomputes", False))


def _autocast_now(device: str) -> tuple[bool, torch.dtype]:
    return torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)


def capture() -> Captured:
    """Remember the contexts, precision entries and observers that are active, and torch.autocast, to enter them again.

    For an autograd Function that recomputes a forward pass in its backward: backward may run outside of the context,
    and on a GPU it runs in a thread of its own. torch.utils.checkpoint, and Functions with torch.amp.custom_fwd and
    custom_bwd, need no such line.

    Returns:
        A context manager that can be entered again and again, also inside itself and in other threads. "No context" is
        restored as well. Called with a function, it returns one that runs under what was active.

    Example:
        >>> import torch, te_nvfp4_cv as nv
        >>> class Recompute(torch.autograd.Function):
        ...     @staticmethod
        ...     def forward(ctx, x, block):
        ...         ctx.block, ctx.again = block, nv.capture()
        ...         ctx.save_for_backward(x)
        ...         return block(x)
        ...     @staticmethod
        ...     def backward(ctx, dy):
        ...         x = ctx.saved_tensors[0].detach().requires_grad_()
        ...         with torch.enable_grad(), ctx.again:
        ...             y = ctx.block(x)
        ...         torch.autograd.backward(y, dy)
        ...         return x.grad, None
        >>> x, conv = torch.randn(16, 16, 8, 8, requires_grad=True), torch.nn.Conv2d(16, 16, 3)
        >>> with nv.nvfp4_autocast():
        ...     y = Recompute.apply(x, conv)
        >>> y.sum().backward()
    """
    return Captured()
