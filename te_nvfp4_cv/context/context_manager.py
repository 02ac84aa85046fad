"""Enter and leave nvfp4_autocast, the context in which plain torch calls run in NVFP4.

    with nvfp4_autocast(recipe):            conv1d/2d/3d, conv_transpose1d/2d/3d, linear  -> functional, where eligible
        loss = criterion(model(x), y)       relu, relu_                                   -> a ReLU that saves one bit
    loss.backward()                         runs as forward was recorded: inside or outside of the context

state.py says what is active in this thread, function_mode.py sees the torch calls, and torch_patches.py makes what
recomputes a forward pass do so under the contexts of the first one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ContextDecorator, contextmanager
from typing import Any, TypeVar

import torch

from te_nvfp4_cv.backend import dispatch
from te_nvfp4_cv.backend.torch_private import no_graphs_inside
from te_nvfp4_cv.context import entries, resumable
from te_nvfp4_cv.context.capture import capture
from te_nvfp4_cv.context.function_mode import enter, entered, leave
from te_nvfp4_cv.context.state import State, active_recipe, outside, state, warn_unapplied
from te_nvfp4_cv.context.torch_patches import patch_torch
from te_nvfp4_cv.errors import type_error
from te_nvfp4_cv.layer.check import checked_recipe

Function = TypeVar("Function", bound=Callable[..., Any])
__all__ = ["active_recipe", "capture", "nvfp4_autocast"]


class nvfp4_autocast(ContextDecorator):  # noqa: N801  (named as torch.autocast is)
    """Run eligible layers of unmodified models in NVFP4.

    It is a context manager, which can be reused and nested, and a decorator. It may enclose a whole training loop or
    only the forward pass, and stand inside or outside of torch.autocast, which decides the dtype of activations.

    Args:
        recipe: An NVFP4BlockScaling, TransformerEngine's object of that name, the name or path of a recipe, or None for
            the default recipe.
        enabled: If False, everything inside runs in high precision, explicit NVFP4 modules too.
        backend: "auto", "reference", "integer", "vendor", "triton" or "cudnn". One that cannot run raises an error.
        amax_reduction_group: A torch.distributed process group whose ranks quantize training operands with one tensor
            scale, that of the largest amax of all ranks. They must run the same layers in the same order, with empty
            batches too; ranks that meet in different layers get an error that names both. The amaxes travel over a
            group of their own, of the same ranks, so any group will do. In evaluation nothing is exchanged.
        relu_mask: If True, ReLU saves a 1-bit mask for backward instead of its output. The bits of forward and
            backward are the same.
    Raises:
        TypeError: `recipe` is not a recipe, or the group is not a process group.
        FileNotFoundError: There is no recipe of that name.
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
        dispatch.check_possible(backend)
        if amax_reduction_group is not None:
            _check_group(amax_reduction_group)
        self._state = State(enabled, resolved, backend, relu_mask, amax_reduction_group)

    # After a graph break torch calls these two in eager mode, and would make graphs of what they change.
    @no_graphs_inside
    def __enter__(self) -> nvfp4_autocast:
        if not torch.compiler.is_compiling():  # a trace cannot patch torch, nor warn
            patch_torch(capture)
            if entries.unmarked:
                entries.mark()
            if self._state.recipe.precision:
                warn_unapplied(self._state)
        enter(self._state)
        return self

    @no_graphs_inside
    def __exit__(self, *error: object) -> None:
        leave(error != (None, None, None))

    def __call__(self, function: Function) -> Function:
        """Return `function`, made to run under this context; generators and coroutines each time that they go on.

        Raises:
            TypeError: It is a class, whose methods run after its call; a module, of which a function with copies of its
                attributes would be left; or nothing that can be called.
        """
        if isinstance(function, type):
            raise type_error(
                "nvfp4_autocast decorates functions, and this is a class.",
                got=function.__name__,
                needs="a function or method: an object's forward would run outside of the context",
                fix="decorate its forward, or a function that calls the model",
            )
        if isinstance(function, torch.nn.Module) or not callable(function):
            raise type_error(
                "nvfp4_autocast decorates functions, and this is none.",
                got=f"an object of {type(function).__name__}",
                needs="a function or method: the result would be no module, and train() and eval() would not reach it",
                fix="call the model inside `with nvfp4_autocast(...):`, or decorate the function of a training step or "
                "the forward of the model's class",
            )
        made: Any = resumable.decorated(self, function) or super().__call__(function)
        return made  # type: ignore[no-any-return]

    def __repr__(self) -> str:
        s = self._state
        return f"nvfp4_autocast({s.recipe!r}, enabled={s.enabled}, backend={s.backend!r}, relu_mask={s.relu_mask})"


@contextmanager
def heard() -> Iterator[None]:
    """Let observers hear of the calls inside, which run as they would outside of this context."""
    patch_torch(capture)
    with entered(outside()):
        yield


@contextmanager
def outside_of_contexts() -> Iterator[None]:
    """Run the body, or as a decorator the function, as outside of all contexts of this thread."""
    if state() is None:  # a mode, though it does nothing, takes torch's fast paths away
        yield
        return
    with entered(outside()):
        yield


def _check_group(group: Any) -> None:
    if not torch.distributed.is_available() or not isinstance(group, torch.distributed.ProcessGroup):
        raise type_error(
            "nvfp4_autocast: amax_reduction_group is no process group.",
            got=f"{group!r:.80}",
            needs="a torch.distributed process group of which this process is a member, or None",
            fix="torch.distributed.group.WORLD after init_process_group, or leave it out",
        )
