"""Keep layers in high precision inside of `with torch.autocast(..., enabled=False):`, where the author asks for that.

    with torch.autocast("cuda", torch.bfloat16), nv.nvfp4_autocast(recipe):
        y = body(x)                                           NVFP4
        with torch.autocast("cuda", enabled=False):           an island: its author wants fp32 there, for numerical
            z = head(y.float())                               reasons. High precision; coverage shows the reason

It is an island where torch's own is one: torch.autocast is on for that device, and is turned off inside of the context.
So a script's `torch.autocast(device, enabled=args.amp)` around everything turns nothing off. All that runs inside is in
high precision, but for a context that is entered there. NVFP4 modules and nv.functional are asked for by name and stay
in NVFP4, as TransformerEngine's modules do.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from te_nvfp4_cv.backend.torch_private import constant_in_graphs
from te_nvfp4_cv.context.state import local, pop_state, push_state, state
from te_nvfp4_cv.context.tracing import is_tracing

REASON = "torch.autocast(enabled=False) inside of the context"
_LEAVE = "_nvfp4_leave"  # on an autocast object that is entered: what to do when it is left


def patch_autocast() -> None:
    """Let torch.autocast tell where islands begin and end."""
    enter, leave = torch.autocast.__enter__, torch.autocast.__exit__

    @functools.wraps(enter)
    def __enter__(self: Any) -> Any:
        begins = bool(local.states) and not self._enabled and torch.is_autocast_enabled(self.device)
        entered = enter(self)
        if begins:
            self.__dict__[_LEAVE] = _begin()
        return entered

    @functools.wraps(leave)
    def __exit__(self: Any, *error: Any) -> Any:
        undo = self.__dict__.pop(_LEAVE, None)
        if undo is not None:
            undo()
        return leave(self, *error)

    torch.autocast.__enter__ = __enter__  # type: ignore[method-assign]
    torch.autocast.__exit__ = __exit__  # type: ignore[method-assign]


def _begin() -> Callable[[], Any] | None:
    """Begin an island and return what ends it, or None where layers are in high precision anyhow."""
    if is_tracing():
        # What the traced code knows of `local` is Dynamo's; this is said past it, and asked by in_traced_island.
        local.traced_islands += 1
        return _end_traced
    current = state()
    if current is None or not current.enabled:
        return None
    push_state(replace(current, enabled=False, island=True))
    return pop_state


def _end_traced() -> None:
    local.traced_islands -= 1


@constant_in_graphs
def in_traced_island() -> bool:
    """Return True if the code that torch.compile traces is in an island that begins in that code."""
    return local.traced_islands > 0
