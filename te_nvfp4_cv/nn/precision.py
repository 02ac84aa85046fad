"""Precision per module, weights quantized once for gradient accumulation, and the state of a bit-exact resume.

    set_precision(model, {"stem": None, "head.*": None, "layer4.*": recipe})    None: high precision
    with frozen_weights(model): several forward and backward passes, one optimizer step after
    state = extra_state(model);   extra_state(model, load=state);   saturated_blocks(model)

set_precision's entries are pairs of module forward hooks: they survive deepcopy and pickling, put nothing into
state_dict, and act only inside an enabled nvfp4_autocast. While a module with an entry runs, its entry rules everything
that runs inside it; a child's own entry rules in the child.
Refused: a pattern that matches no module, a weight that changes while it is frozen, the state of something else.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from te_nvfp4_cv.context.state import mark_applied, pop_override, push_override
from te_nvfp4_cv.errors import check_module, type_error, value_error
from te_nvfp4_cv.nn.names import plain_name
from te_nvfp4_cv.recipe.block_scaling import NVFP4BlockScaling, as_recipe

# ---- set_precision --------------------------------------------------------------------------------------------------


class _Enter:
    """Forward pre-hook: the module's entry starts to rule."""

    def __init__(self, recipe: NVFP4BlockScaling | None) -> None:
        self.recipe = recipe
        self.hook_id = -1

    def __call__(self, module: nn.Module, args: Any) -> None:
        push_override(self.recipe, module)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        _reserve(self.hook_id)


class _Leave:
    """Forward hook, called after an exception too: the module's entry ends."""

    def __init__(self) -> None:
        self.hook_id = -1

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        pop_override(module)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        _reserve(self.hook_id)


def _reserve(hook_id: int) -> None:
    """An unpickled hook keeps its id: let torch give no other hook of this process the same one."""
    RemovableHandle.next_id = max(RemovableHandle.next_id, hook_id + 1)


def set_precision(model: nn.Module, table: Any) -> None:
    """Give modules a recipe of their own, or high precision.

    Acts inside an enabled nvfp4_autocast only, and wins over a module's recipe and the context's. A further call
    replaces the entries of the modules that it matches. A model that torch.compile has compiled already does not
    notice: call it before.

    Args:
        table: {pattern: None for high precision, or a recipe}, or a recipe whose [precision] table is applied (where it
            has one). Patterns are fnmatch patterns over model.named_modules() without the parts that wrappers add
            ("module.", "_orig_mod."). A match covers the module's children, except those with an entry of their own;
            where several patterns match a module, the last wins.
    Raises:
        ValueError: a pattern that matches nothing, a recipe inside the table that has a table itself. Nothing is
            changed then.
        TypeError: no module, neither a table nor a recipe.
    """
    check_module("set_precision", model, "set_precision(model, ...)")
    entries = matches(model, _pairs(table))
    for module, recipe in entries.items():
        _remove(module)
        enter, leave = _Enter(recipe), _Leave()
        enter.hook_id = module.register_forward_pre_hook(enter, prepend=True).id
        leave.hook_id = module.register_forward_hook(leave, always_call=True).id
    if not isinstance(table, Mapping):
        mark_applied(as_recipe(table))


def _remove(module: nn.Module) -> None:
    for hooks, kind in ((module._forward_pre_hooks, _Enter), (module._forward_hooks, _Leave)):
        for hook_id in [hook_id for hook_id, hook in hooks.items() if isinstance(hook, kind)]:
            del hooks[hook_id]
            module._forward_hooks_always_called.pop(hook_id, None)


def entries_of(module: nn.Module) -> list[NVFP4BlockScaling | None]:
    """The module's own set_precision entry, in a list; an empty one where it has none."""
    return [hook.recipe for hook in module._forward_pre_hooks.values() if isinstance(hook, _Enter)]


def _pairs(table: Any) -> list[tuple[str, NVFP4BlockScaling | None]]:
    if not isinstance(table, Mapping):
        recipe = as_recipe(table)
        recipe.validate_for_use()
        return list(recipe.precision)
    pairs: list[tuple[str, NVFP4BlockScaling | None]] = []
    for pattern, value in table.items():
        own = None if value is None else as_recipe(value)
        if not isinstance(pattern, str):
            raise type_error(
                "set_precision: a pattern is no string.",
                got=repr(pattern),
                needs='names of modules, such as "layer4.*"',
                fix="take the names of model.named_modules()",
            )
        if own is not None:
            own.validate_for_use()
            if own.precision:
                raise value_error(
                    f"set_precision: the recipe for {pattern!r} has a [precision] table of its own.",
                    got=f"{own!r}",
                    needs="a recipe without a table: one table rules the model",
                    fix="dataclasses.replace(recipe, precision=())",
                )
        pairs.append((pattern, own))
    return pairs


def matches(
    model: nn.Module, pairs: list[tuple[str, NVFP4BlockScaling | None]]
) -> dict[nn.Module, NVFP4BlockScaling | None]:
    """The modules that the patterns name, with their entries.

    Raises:
        ValueError: a pattern that matches nothing.
    """
    named = [(name, plain_name(name), module) for name, module in model.named_modules(remove_duplicate=False)]
    entries: dict[nn.Module, NVFP4BlockScaling | None] = {}
    for pattern, recipe in pairs:
        found = [m for raw, plain, m in named if any(fnmatch.fnmatchcase(n, pattern) for n in (plain, raw))]
        if not found:
            names = list(dict.fromkeys(plain for _, plain, _ in named if plain))
            close = difflib.get_close_matches(pattern, names, n=3, cutoff=0.5)
            fix = f"did you mean {', '.join(map(repr, close))}?" if close else f"names are {', '.join(names[:6])}, ..."
            raise value_error(
                f"set_precision: the pattern {pattern!r} matches no module.",
                got=f"{pattern!r} for a model of {len(names)} named modules",
                needs="a name or fnmatch pattern of model.named_modules()",
                fix=fix if names else "the model has no submodules",
            )
        for module in found:
            entries.pop(module, None)
            entries[module] = recipe
    return entries


# ---- frozen weights -------------------------------------------------------------------------------------------------











# ---- resume ---------------------------------------------------------------------------------------------------------









