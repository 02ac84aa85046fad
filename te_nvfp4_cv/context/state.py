"""Remember which contexts this thread has entered, and say which recipe a layer called now would get.

A layer's recipe is decided in this order: a set_precision entry (while its module runs), the recipe of an NVFP4 module,
the context's recipe. Contexts and entries are two stacks per thread; a thread started inside a context has empty ones.
"""

from __future__ import annotations

import functools
import sys
import threading
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from te_nvfp4_cv.context.tracing import forget_traced_regions
from te_nvfp4_cv.errors import warn_once
from te_nvfp4_cv.recipe.block_scaling import NVFP4BlockScaling


@dataclass(frozen=True)
class State:
    """The arguments of one context."""

    enabled: bool
    recipe: NVFP4BlockScaling
    backend: str
    relu_mask: bool
    group: Any = None  # the ranks whose amaxes are one: a torch.distributed.ProcessGroup, or None
    passive: bool = False  # entered by an observer: NVFP4 modules run as outside of all contexts
    island: bool = False  # entered by torch.autocast(enabled=False) for plain layers alone: see islands.py


Override = tuple[object, NVFP4BlockScaling | None]  # a module with a set_precision entry; None for high precision


class _Local(threading.local):
    """The stacks of one thread."""

    def __init__(self) -> None:
        self.states: list[State] = []  # contexts entered, the innermost last
        self.marks: list[int] = []  # how many overrides each context found
        self.overrides: list[Override] = []  # of modules that are running
        self.modes: list[TorchFunctionMode | None] = []  # the function mode that each context entered
        self.entered: list[ExitStack] = []  # of capture.Captured
        self.traced_islands = 0  # that have begun in the code that torch.compile is tracing


local = _Local()
_applied_tables: set[tuple[tuple[str, NVFP4BlockScaling | None], ...]] = set()


@functools.lru_cache(maxsize=1)
def outside() -> State:
    """Return the state of code outside of all contexts, for where one must stand on the stack."""
    # Not made at import: the default recipe reads environment variables, and a bad one has an error of its own.
    return State(enabled=False, recipe=NVFP4BlockScaling(), backend="auto", relu_mask=False, passive=True)


def state() -> State | None:
    """Return the innermost context of this thread, enabled or not, or None outside of all."""
    return local.states[-1] if local.states else None


def entered_state() -> State | None:
    """Return the innermost context that was entered as one: NVFP4 modules, asked for by name, know no islands."""
    for entry in reversed(local.states):
        if not entry.island:
            return entry
    return None


def active_recipe() -> NVFP4BlockScaling | None:
    """Return the recipe that a plain layer called now would get, or None for high precision.

    This is the recipe of the innermost context, or that of the running module's set_precision entry.

    Example:
        >>> import te_nvfp4_cv as nv
        >>> with nv.nvfp4_autocast(nv.load_recipe("no_rht")):
        ...     print(nv.active_recipe().name)
        no_rht
        >>> print(nv.active_recipe())
        None
    """
    current = state()
    if current is None or not current.enabled:
        return None
    return local.overrides[-1][1] if local.overrides else current.recipe


def reduction_group() -> Any:
    """Return the process group whose ranks share their amaxes in a layer called now, or None."""
    current = state()
    return None if current is None else current.group


def innermost_override() -> Override | None:
    """Return the entry of the innermost running module that has one, or None."""
    return local.overrides[-1] if local.overrides else None


def push_state(new: State) -> None:
    """Make `new` the innermost context of this thread."""
    _changes()
    # New lists, not append: torch.compile, which reuses what it has traced, looks for attributes that were set.
    local.states = [*local.states, new]
    local.marks = [*local.marks, len(local.overrides)]


def pop_state() -> None:
    """Leave the innermost context of this thread."""
    _changes()
    local.states = local.states[:-1]
    local.overrides = local.overrides[: local.marks[-1]]  # without what a KeyboardInterrupt left: no hooks ran then
    local.marks = local.marks[:-1]


def _changes() -> None:
    if torch.compiler.is_dynamo_compiling():  # asked around every module with an entry, and quicker than is_compiling
        forget_traced_regions()


def push_override(recipe: NVFP4BlockScaling | None, owner: object = None) -> None:
    """Remember that `owner`, a module with a set_precision entry, starts its forward."""
    _changes()
    local.overrides = [*local.overrides, (owner, recipe)]


def pop_override(owner: object = None) -> None:
    """Drop the override of `owner`, whose forward ended, and those that an exception left in modules inside it."""
    overrides = local.overrides
    for index in range(len(overrides) - 1, -1, -1):
        if overrides[index][0] is owner:
            _changes()
            local.overrides = overrides[:index]
            return


def drop_stale() -> None:
    """Drop the overrides of modules that do not run any more: torch calls no hooks after a KeyboardInterrupt."""
    running, frame = set(), sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == "_call_impl":  # in which torch runs a module's forward and hooks
            running.add(id(frame.f_locals.get("self")))
        frame = frame.f_back  # type: ignore[assignment]
    local.overrides = [entry for entry in local.overrides if id(entry[0]) in running]


def mark_applied(recipe: NVFP4BlockScaling) -> None:
    """Remember that set_precision has applied the recipe's [precision] table to some model."""
    _applied_tables.add(recipe.precision)


def warn_unapplied(new: State) -> None:
    """Warn once if a recipe's [precision] table was not applied to any model, and show the line that does so."""
    table = new.recipe.precision
    if new.enabled and table and table not in _applied_tables:
        name = new.recipe.name or "this recipe"
        warn_once(
            f"precision {table}",
            f"nvfp4: {name} has a [precision] table ({', '.join(pattern for pattern, _ in table)}) that was not "
            "applied to a model: its layers run in NVFP4 too. Add before training:  nv.set_precision(model, recipe)",
        )
