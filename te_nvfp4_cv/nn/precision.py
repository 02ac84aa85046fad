"""Give single modules of a model a recipe of their own, or high precision.

    set_precision(model, {"stem": None, "head.*": None, "layer4.*": recipe})    None: high precision

An entry is a pair of module forward hooks. So entries survive deepcopy and pickling, put nothing into the state_dict,
and act only inside an enabled nvfp4_autocast. While a module with an entry runs, its entry rules everything that runs
inside it; a child's own entry rules in the child.
Refused: a pattern that matches no module, because it is most often misspelt.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Mapping
from typing import Any

from torch import nn

from te_nvfp4_cv.context.state import mark_applied, pop_override, push_override
from te_nvfp4_cv.errors import check_module, type_error, value_error
from te_nvfp4_cv.layer.check import checked_recipe
from te_nvfp4_cv.nn.hooks import Hook, attach, detach
from te_nvfp4_cv.nn.names import plain_name
from te_nvfp4_cv.recipe.block_scaling import NVFP4BlockScaling, as_recipe

# The names of these two classes, and of the fields in them, stand in models that version 0.1 pickled.


class _Enter(Hook):
    """Forward pre-hook: from here on the module's entry rules."""

    def __init__(self, recipe: NVFP4BlockScaling | None) -> None:
        self.recipe = recipe

    def __call__(self, module: nn.Module, args: Any) -> None:
        push_override(self.recipe, module)


class _Leave(Hook):
    """Forward hook, which runs after an exception, too: the module's entry ends."""

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        pop_override(module)


def set_precision(model: nn.Module, table: Any) -> None:
    """Give modules a recipe of their own, or high precision.

    The entries act inside an enabled nvfp4_autocast only, and win over a module's recipe and the context's. A further
    call replaces the entries of the modules that it matches. A model that torch.compile has compiled already does not
    notice, so call it before.

    Args:
        table: Maps patterns to None for high precision, or to a recipe. A recipe in place of a table stands for its
            [precision] table. Patterns are fnmatch patterns over model.named_modules() without the parts that wrappers
            add ("module.", "_orig_mod."). A match covers the module's children, except those with an entry of their
            own; where several patterns match a module, the last one wins.
    Raises:
        ValueError: A pattern matches nothing, or a recipe inside the table has a table itself. Nothing is changed.
        TypeError: `model` is not a module, or `table` is neither a table nor a recipe.

    Example:
        >>> import torch, te_nvfp4_cv as nv
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(16, 16, 3), torch.nn.Conv2d(16, 16, 3))
        >>> nv.set_precision(model, {"1": None})
        >>> [row.nvfp4 for row in nv.coverage(model, torch.randn(16, 16, 8, 8)).rows]
        [True, False]
    """
    check_module("set_precision", model, "set_precision(model, ...)")
    entries = matches(model, _pairs(table))
    for module, recipe in entries.items():
        detach(module, _Enter, _Leave)
        attach(module, _Enter(recipe), _Leave(), first=True)  # before hooks of the user, which may run layers
    if not isinstance(table, Mapping):
        mark_applied(as_recipe(table))


def entries_of(module: nn.Module) -> list[NVFP4BlockScaling | None]:
    """Return the module's own set_precision entry in a list, or an empty list if it has none."""
    return [hook.recipe for hook in module._forward_pre_hooks.values() if isinstance(hook, _Enter)]


def _pairs(table: Any) -> list[tuple[str, NVFP4BlockScaling | None]]:
    if not isinstance(table, Mapping):
        return list(checked_recipe(table).precision)
    pairs: list[tuple[str, NVFP4BlockScaling | None]] = []
    for pattern, value in table.items():
        if not isinstance(pattern, str):
            raise type_error(
                "set_precision: a pattern is no string.",
                got=repr(pattern),
                needs='names of modules, such as "layer4.*"',
                fix="take the names of model.named_modules()",
            )
        own = None if value is None else checked_recipe(value)
        if own is not None and own.precision:
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
    """Return the modules that the patterns match, each with its entry.

    Raises:
        ValueError: A pattern matches nothing.
    """
    # Duplicates stay: a shared module can be named by each of its names.
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
            entries.pop(module, None)  # the last match comes last in the dict, too
            entries[module] = recipe
    return entries
