"""Tells observers (coverage, telemetry, projections) of the calls of convolutions and linear layers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from te_nvfp4_cv.layer.inside import replaced
from te_nvfp4_cv.layer.options import Watch
from te_nvfp4_cv.ops.geometry import ConvGeometry
from te_nvfp4_cv.recipe.block_scaling import NVFP4BlockScaling


@dataclass(frozen=True)
class Call:
    """One layer's call, as observers are told of it: its shapes, its recipe, or why it runs in high precision."""

    op: str
    weight: Tensor
    x: Tensor
    geometry: ConvGeometry | None
    recipe: NVFP4BlockScaling | None
    reason: str


@dataclass(frozen=True)
class Seen:
    """An observer's wishes for a call: `finished` gets its result, `watch` is shown the operands of an NVFP4 call."""

    finished: Callable[[Tensor], None] | None = None
    watch: Watch | None = None


Observer = Callable[[Call], Seen | None]


class _Local(threading.local):
    """The observers that each thread has entered, the innermost last."""

    def __init__(self) -> None:
        self.observers: list[Observer] = []


local = _Local()


@contextmanager
def observe(observer: Observer) -> Iterator[None]:
    """Tell `observer` about every convolution and linear call that this thread makes under the context, before it runs.

    It may return a Seen. Of several observers the innermost is told first, the next one only of what that lets pass
    (None): two models that are watched side by side. Other threads' calls are not told, but for those that activation
    checkpointing repeats for this thread (see told_to).
    """
    # The list itself: `told_to` may have put another thread's in its place by the time this context ends.
    entered = local.observers
    entered.append(observer)
    try:
        yield
    finally:
        entered.remove(observer)


def told_to(entered: list[Observer]) -> AbstractContextManager[None]:
    """Tell calls under the context to the observers of another thread (its local.observers) instead of this one's.

    On CUDA autograd repeats a checkpointed forward pass in a thread of its own, and those calls belong to whoever
    watches the thread that made them first. It is the list itself, which grows and shrinks as contexts are entered.
    """
    return replaced(local, observers=entered)


def observed() -> bool:
    """Return whether anything is told of the calls that this thread makes."""
    return bool(local.observers)


def reported(call: Call, function: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """Return function(*args, **kwargs), with the innermost observer told before and after."""
    return watched(call, lambda _: function(*args, **kwargs)) if local.observers else function(*args, **kwargs)


def watched(call: Call, run: Callable[[Watch | None], Tensor]) -> Tensor:
    """Return run(watch), with the innermost observer told before and after; the watch is the observer's, or None."""
    seen = next((seen for told in reversed(local.observers) if (seen := told(call)) is not None), None)
    y = run(None if seen is None else seen.watch)
    if seen is not None and seen.finished is not None:
        seen.finished(y)
    return y
