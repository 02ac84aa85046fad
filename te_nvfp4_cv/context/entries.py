"""Find the set_precision entry that rules a weight, by whatever path its layer is called.

While a module with an entry is called, its hooks have the entry on the stack of state.py. Some calls pass by all hooks:
child.forward(x), attention, which reads the weight of its projection, F.linear(x, model.fc.weight). Those go by the
weight's identity. So a layer's recipe is decided in this order:

    the running module's entry, if the weight is a Parameter of that module
    the entry of the module whose Parameter the weight is; none, where modules with different entries share it
    the running module's entry, if the weight is neither: computed, say

Entries of observers (nv.sensitivity), which belong to no module, go before all of these.
"""

from __future__ import annotations

import functools
import threading
import weakref
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from te_nvfp4_cv.backend.swapping import gives_up
from te_nvfp4_cv.backend.torch_private import constant_in_graphs
from te_nvfp4_cv.context import tracing
from te_nvfp4_cv.context.state import Override, local
from te_nvfp4_cv.recipe.block_scaling import NVFP4BlockScaling


class Entry(Protocol):
    """A module's entry: what nn/precision.py puts before its forward."""

    recipe: NVFP4BlockScaling | None
    shared: frozenset[str]  # names of the module's Parameters that another module holds without this entry

    def module(self) -> nn.Module | None:
        """Return the module whose entry it is, if that lives."""


# On Parameters of modules with an entry. Blocks of one class share what torch.compile has traced, so graphs must differ
# where entries do: torch.compile makes a guard of it.
MARK = "_te_nvfp4_cv_entry"
unmarked: list[weakref.ref[Entry]] = []
used = False  # a first entry was made: until then, calls ask nothing
_lock = threading.Lock()
_entries: dict[int, weakref.ref[Entry]] = {}
_recipes: list[Override] = []  # of all entries that were made: torch.compile can take a number for constant
_found: dict[int, tuple[weakref.ref[Tensor], Override | None]] = {}  # by a Parameter's id


meant: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # ScriptModules, which take no hooks, with an entry of None


def register(entry: Entry) -> None:
    """Let an entry rule the Parameters of its module, until `forget`, or until the entry is freed."""
    global used
    number = id(entry)
    tracing.guard_hooks()
    unmarked.append(weakref.ref(entry))
    mark()
    with _lock:
        _entries[number] = weakref.ref(entry, functools.partial(_drop, number))
        _found.clear()
        if all(known[1] != entry.recipe for known in _recipes):
            _recipes.append((None, entry.recipe))
        used = True


def forget(entry: Entry) -> None:
    """End what `register` began."""
    for parameter in _parameters_of(entry) or ():
        parameter.__dict__.pop(MARK, None)
    _drop(id(entry))


def mark() -> None:
    """Mark the Parameters of modules with new entries. Modules that are being copied or unpickled have none yet."""
    for reference in list(unmarked):
        entry = reference()
        parameters = [] if entry is None else _parameters_of(entry)
        if parameters is not None:
            unmarked.remove(reference)
            for parameter in parameters:
                assert entry is not None
                setattr(parameter, MARK, repr(entry.recipe))


def _parameters_of(entry: Entry) -> list[Tensor] | None:
    module = entry.module()
    found = {} if module is None else module.__dict__.get("_parameters")
    return None if found is None else [p for p in found.values() if p is not None]


def _drop(number: int, *_: object, entries: Any = _entries, found: Any = _found) -> None:
    # Arguments, because the names of this file are gone before the last tensors are when Python exits.
    entries.pop(number, None)
    found.clear()


@gives_up
def _lose(parameter: Tensor) -> None:
    _found.pop(id(parameter), None)


def ruling(w: object) -> Override | None:
    """Return the entry that rules a call with weight w now, or None where the context's recipe does."""
    top = local.overrides[-1] if local.overrides else None
    if top is not None and not isinstance(top[0], nn.Module):
        return top
    parameter = w if isinstance(w, nn.Parameter) else w._base if isinstance(w, Tensor) else None
    if not isinstance(parameter, nn.Parameter):
        return top
    if torch.compiler.is_compiling():
        getattr(parameter, MARK, None)
        if top is not None and _holds(top[0], parameter):
            return top
        number = _number_of(parameter)
        return top if number is None else _recipes[number]
    found = of_parameter(parameter)
    if found is None or (top is not None and (found[1] is top[1] or _holds(top[0], parameter))):
        return top
    return found


def of_parameter(parameter: Tensor) -> Override | None:
    """Return the entry of the module that holds a Parameter, or None: no entry, or modules that disagree."""
    known = _found.get(id(parameter))
    return known[1] if known is not None and known[0]() is parameter else _search(parameter)


# torch.compile cannot trace a search. It has the Parameter itself while it traces, and takes the answer for constant.
@constant_in_graphs
def _number_of(parameter: Tensor) -> int | None:
    found = of_parameter(parameter)
    if found is None:
        return None
    return next(number for number, known in enumerate(_recipes) if known[1] == found[1])


def _search(parameter: Tensor) -> Override | None:
    found: list[NVFP4BlockScaling | None] = []
    for reference in list(_entries.values()):
        entry = reference()
        module = None if entry is None else entry.module()
        if entry is None or module is None:
            continue
        if any(p is parameter and name not in entry.shared for name, p in module._parameters.items()):
            found.append(entry.recipe)
    # One recipe, or the modules that share the weight disagree. Without the module, which this must not keep alive.
    answer: Override | None = (None, found[0]) if found and all(recipe == found[0] for recipe in found) else None
    number = id(parameter)
    _found[number] = (weakref.ref(parameter, lambda _, found=_found: found.pop(number, None)), answer)  # type: ignore
    return answer


def _holds(module: object, parameter: Tensor) -> bool:
    assert isinstance(module, nn.Module)
    return any(p is parameter for p in module._parameters.values())
