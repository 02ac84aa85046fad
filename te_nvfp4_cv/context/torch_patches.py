"""Make torch's activation checkpointing and nn.DataParallel respect the context.

Activation checkpointing recomputes a forward during backward, where the context may have been left, and in another
thread. So torch.utils.checkpoint is wrapped once, at the first entry of a context: the recomputed forward then runs
under what was active in the first one. nn.DataParallel runs its replicas in threads that no context reaches, so inside
a context it raises an error instead of training silently in high precision.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from te_nvfp4_cv.context.function_mode import Mode, mode_is_on
from te_nvfp4_cv.context.state import Override, State, local, state
from te_nvfp4_cv.errors import runtime_error
from te_nvfp4_cv.layer import observe
from te_nvfp4_cv.layer.delayed_scaling import first_pass


@contextmanager
def _restored(states: list[State], overrides: list[Override]) -> Iterator[None]:
    """Run with the contexts and overrides of a checkpoint's first forward, whatever is active here."""
    before = local.states, local.marks, local.overrides
    mode = Mode() if states and not mode_is_on() else nullcontext()
    local.states, local.marks, local.overrides = list(states), [0] * len(states), list(overrides)
    try:
        with mode:
            yield
    finally:
        local.states, local.marks, local.overrides = before


def _captured(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function`, made to run under the contexts that are active now, whenever and in whichever thread.

    "No context" is restored as well. The observers of this thread hear of its calls.
    """
    states, overrides, observers = list(local.states), list(local.overrides), observe.observers()

    @functools.wraps(function, updated=())  # `function` may be a module: its __dict__ must not be copied
    def rerun(*args: Any, **kwargs: Any) -> Any:
        with _restored(states, overrides), observe.told_to(observers):
            return function(*args, **kwargs)

    return rerun


@functools.lru_cache(maxsize=1)
def patch_torch() -> None:
    """Wrap checkpoint's two variants and DataParallel. Only the first call does anything."""
    import torch.utils.checkpoint as checkpoint

    generator = checkpoint._checkpoint_without_reentrant_generator
    forward = checkpoint.CheckpointFunction.forward

    @functools.wraps(generator)
    def without_reentrant(fn: Any, *args: Any, **kwargs: Any) -> Any:
        return generator(_captured(fn), *args, **kwargs)

    def reentrant(ctx: Any, run_function: Any, *args: Any) -> Any:
        with first_pass(bool(ctx.next_functions)):  # its grad mode is off; a graph is being recorded all the same
            return forward(ctx, _captured(run_function), *args)

    checkpoint._checkpoint_without_reentrant_generator = without_reentrant  # type: ignore[assignment]
    checkpoint.CheckpointFunction.forward = staticmethod(reentrant)  # type: ignore[assignment]
    parallel = torch.nn.DataParallel.forward

    @functools.wraps(parallel)
    def refuse(self: Any, *args: Any, **kwargs: Any) -> Any:
        current = state()
        if current is not None and current.enabled:
            raise runtime_error(
                "nvfp4_autocast: nn.DataParallel is not supported.",
                got="nn.DataParallel inside the context: its replicas run in threads of their own",
                needs="one process per GPU",
                fix="torch.nn.parallel.DistributedDataParallel (DDP), started by torchrun",
            )
        return parallel(self, *args, **kwargs)

    torch.nn.DataParallel.forward = refuse  # type: ignore[method-assign]
