"""Which contexts this thread has entered, and which recipe a layer called now would get.

A layer's recipe is decided in this order: a set_precision override (while its module runs), an explicit module's own
recipe, the context's. States and overrides are stacks, one pair per thread; a thread started inside a context has none.
"""

from __future__ import annotations

import sys
import threading
from dataclasses import dataclass
from typing import Any

from torch.overrides import TorchFunctionMode

from te_nvfp4_cv.errors import warn_once
from te_nvfp4_cv.recipe.block_scaling import NVFP4BlockScaling


@dataclass(frozen=True)
class State:
    """What one context asked for."""

    enabled: bool
    recipe: NVFP4BlockScaling
    backend: str
    relu_mask: bool
    group: Any = None  # the ranks whose amaxes are one: a torch.distributed.ProcessGroup, or None
    passive: bool = False  # entered so that calls are heard; explicit modules run as outside of all contexts


Override = tuple[object, NVFP4BlockScaling | None]  # a module with a set_precision entry; None for high precision


class _Local(threading.local):
    """Per thread: contexts entered, how many overrides each found, the mode it entered; overrides of modules."""

    def __init__(self) -> None:
        self.states: list[State] = []
        self.marks: list[int] = []
        self.overrides: list[Override] = []
        self.modes: list[TorchFunctionMode | None] = []


local = _Local()
_applied_tables: set[tuple[tuple[str, NVFP4BlockScaling | None], ...]] = set()


def state() -> State | None:
    """The innermost context of this thread, enabled or not; None outside of all."""
    return local.states[-1] if local.states else None


def active_recipe() -> NVFP4BlockScaling | None:
    """The recipe that a layer called now would get (set_precision's override of the running module included); None:
    high precision.
    """
    current = state()
    if current is None or not current.enabled:
        return None
    return local.overrides[-1][1] if local.overrides else current.recipe


def reduction_group() -> Any:
    """The process group whose ranks share their amaxes in a layer called now, or None."""
    current = state()
    return None if current is None else current.group


def has_override() -> bool:
    """Whether a module with a set_precision entry is running."""
    return bool(local.overrides)


def push_override(recipe: NVFP4BlockScaling | None, owner: object = None) -> None:
    """`owner`, a module with a set_precision entry, starts its forward."""
    local.overrides.append((owner, recipe))


def pop_override(owner: object = None) -> None:
    """The forward of `owner` ended: drop its override, and those of modules below that an exception left behind."""
    overrides = local.overrides
    for index in range(len(overrides) - 1, -1, -1):
        if overrides[index][0] is owner:
            del overrides[index:]
            return


def drop_stale() -> None:
    """Keep the overrides of modules that are running; a KeyboardInterrupt outside of all contexts leaves others."""
    running, frame = set(), sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == "_call_impl":
            running.add(id(frame.f_locals.get("self")))
        frame = frame.f_back  # type: ignore[assignment]
    local.overrides = [entry for entry in local.overrides if id(entry[0]) in running]


def mark_applied(recipe: NVFP4BlockScaling) -> None:
    """set_precision has applied the recipe's [precision] table to some model."""
    _applied_tables.add(recipe.precision)


def warn_unapplied(new: State) -> None:
    """Say once that a recipe's [precision] table has not reached any model, with the line to add."""
    table = new.recipe.precision
    if new.enabled and table and table not in _applied_tables:
        name = new.recipe.name or "this recipe"
        warn_once(
            f"precision {table}",
            f"nvfp4: {name} has a [precision] table ({', '.join(pattern for pattern, _ in table)}) that was not "
            "applied to a model: its layers run in NVFP4 too. Add before training:  nv.set_precision(model, recipe)",
        )
