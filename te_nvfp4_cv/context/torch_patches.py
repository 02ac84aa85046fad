"""Make torch's activation checkpointing and nn.DataParallel respect the context.

Activation checkpointing recomputes a forward during backward, where the context may have been left, and in another
thread. So torch.utils.checkpoint is wrapped once, at the first entry of a context: the recomputed forward then runs
under what was active in the first one. nn.DataParallel runs its replicas in threads that no context reaches, so inside
a context it raises an error instead of training silently in high precision.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from te_nvfp4_cv.context.state import state
from te_nvfp4_cv.errors import runtime_error
from te_nvfp4_cv.layer.delayed_scaling import first_pass


@functools.lru_cache(maxsize=1)
def patch_torch(captured: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Wrap checkpoint's two variants and DataParallel. Only the first call does anything.

    Args:
        captured: Makes a function run under the contexts that are active when `captured` is called.
    """
    import torch.utils.checkpoint as checkpoint

    generator = checkpoint._checkpoint_without_reentrant_generator
    forward = checkpoint.CheckpointFunction.forward

    @functools.wraps(generator)
    def without_reentrant(fn: Any, *args: Any, **kwargs: Any) -> Any:
        return generator(captured(fn), *args, **kwargs)

    def reentrant(ctx: Any, run_function: Any, *args: Any) -> Any:
        with first_pass(bool(ctx.next_functions)):  # its grad mode is off; a graph is being recorded all the same
            return forward(ctx, captured(run_function), *args)

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
