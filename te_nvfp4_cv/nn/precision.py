"""Give single modules of a model a recipe of their own, or high precision.

    set_precision(model, {"stem": None, "head.*": None, "layer4.*": recipe})    None: high precision
    clear_precision(model)                                                       removes all entries

An entry is a pair of module forward hooks. So entries survive deepcopy and pickling, put nothing into the state_dict,
and act only inside an enabled nvfp4_autocast. While a module with an entry runs, its entry rules everything that runs
inside it; a child's own entry rules in the child.
The layers below a module with an entry may be called without it: by the code of torch.fx, by vae.encode. So each of
them inherits the entry, as a pair of hooks of its own. A layer that is reached by several ways with different entries
inherits none, and follows the way of the call. Calls that run no hooks at all go by the weight: context/entries.py.
Refused: a pattern that matches no module, because it is most often misspelt; a recipe for modules that run no layer.
"""

from __future__ import annotations

import difflib
import fnmatch
import warnings
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from te_nvfp4_cv.backend.torch_private import no_graphs_inside
from te_nvfp4_cv.context import entries
from te_nvfp4_cv.context.state import mark_applied, pop_override, push_override
from te_nvfp4_cv.errors import check_module, type_error, value_error
from te_nvfp4_cv.layer.check import checked_recipe
from te_nvfp4_cv.layer.names import plain_name
from te_nvfp4_cv.nn.base import OPS
from te_nvfp4_cv.nn.hooks import Hook, attach, detach
from te_nvfp4_cv.recipe.block_scaling import NVFP4BlockScaling, as_recipe
from te_nvfp4_cv.recipe.fields import HIGH

# Torch's modules that multiply weights by the calls that a context takes over.
_RUN_LAYERS = (*OPS, nn.MultiheadAttention)

# The names of these two classes, and of the fields in them, stand in models that version 0.1 pickled.


class _Enter(Hook):
    """Forward pre-hook: from here on the module's entry rules.

    Attributes:
        recipe: None for high precision.
        inherited: The entry is that of a module above.
        shared: Names of Parameters of the module that another module holds, too, without this entry.
    """

    inherited = False
    shared: frozenset[str] = frozenset()
    _module: weakref.ref[nn.Module] | None = None  # a hook that version 0.1 pickled learns it when it runs

    def __init__(self, recipe: NVFP4BlockScaling | None, inherited: bool = False) -> None:
        self.recipe, self.inherited = recipe, inherited

    @no_graphs_inside
    def __call__(self, module: nn.Module, args: Any) -> None:
        if self._module is None:
            self.bind(module)
        push_override(self.recipe, module)

    def module(self) -> nn.Module | None:
        """Return the module whose entry it is, if that lives."""
        return None if self._module is None else self._module()

    def bind(self, module: nn.Module) -> None:
        """Let the entry rule the module's Parameters in calls that no hook sees."""
        self._module = weakref.ref(module)
        entries.register(self)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_module": self.module()}  # the module is being pickled, so this is a reference to it

    def __setstate__(self, state: dict[str, Any]) -> None:
        module = state.pop("_module", None)
        super().__setstate__(state)
        if module is not None:
            self.bind(module)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Enter:
        new = type(self)(self.recipe, self.inherited)  # recipes are frozen
        new.shared, new.hook_id = self.shared, self.hook_id
        copied = memo.get(id(self.module()))  # a module's copy exists before its hooks are copied
        if isinstance(copied, nn.Module):
            new.bind(copied)
        return new


class _Leave(Hook):
    """Forward hook, which runs after an exception, too: the module's entry ends."""

    inherited = False

    def __init__(self, inherited: bool = False) -> None:
        self.inherited = inherited

    @no_graphs_inside
    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        pop_override(module)


def set_precision(model: nn.Module, table: Any) -> None:
    """Give modules a recipe of their own, or high precision.

    The entries act inside an enabled nvfp4_autocast only, and win over a module's recipe and the context's. They act by
    whatever path a layer is called: through the model, torch.fx, another method than forward, its weight alone. Where
    modules with different entries share a Parameter, the entry of the module that is called rules, and in a call of
    the Parameter alone none does. A further call replaces the entries of the modules that it matches. A model that
    torch.compile has compiled already does not notice, so call it before. Layers of nv.export.quantize and load keep
    the precision that they have; a warning names them.

    Args:
        table: Maps patterns to None or "high" for high precision, or to a recipe or its name. A recipe in place of a
            table stands for its [precision] table. Patterns are fnmatch patterns over model.named_modules() without the
            parts that wrappers add ("module.", "_orig_mod."). A match covers the module's children, except those with
            an entry of their own; where several patterns match a module, the last one wins.
    Raises:
        ValueError: A pattern matches nothing; a pattern with a recipe matches only modules in which no convolution or
            linear layer can run; a recipe inside the table has a table itself. Nothing is changed.
        TypeError: `model` is not a module, or `table` is neither a table nor a recipe.

    Example:
        >>> import torch, te_nvfp4_cv as nv
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(16, 16, 3), torch.nn.Conv2d(16, 16, 3))
        >>> nv.set_precision(model, {"1": None})
        >>> [row.nvfp4 for row in nv.coverage(model, torch.randn(16, 16, 8, 8)).rows]
        [True, False]
    """
    check_module("set_precision", model, "set_precision(model, ...)")
    found = matches(model, _pairs(table))
    give_entries(model, found)
    _warn_of_served(model, found)
    if not isinstance(table, Mapping):
        mark_applied(as_recipe(table))


def give_entries(model: nn.Module, found: Mapping[nn.Module, NVFP4BlockScaling | None]) -> None:
    """Give modules of the model their entries, as set_precision does for those that its patterns match."""
    for module, recipe in found.items():
        if isinstance(module, torch.jit.ScriptModule):  # takes no hooks; that it is in high precision is meant
            entries.meant.add(module)
        else:
            _give(module, recipe)
    if found:
        _spread(model)


def _warn_of_served(model: nn.Module, found: Mapping[nn.Module, Any]) -> None:
    """Warn of layers below modules with an entry whose weight is in NVFP4 already: they run without a context."""
    # Asked by an attribute of the class, as in errors.check_trainable.
    served = {layer for module in found for layer in module.modules() if hasattr(type(layer), "nvfp4_weight")}
    if served:
        names = [plain_name(name) or "the model" for name, module in model.named_modules() if module in served]
        more = f" and {len(names) - 4} more" if len(names) > 4 else ""
        warnings.warn(
            "set_precision: an entry does nothing in layers of nv.export.quantize and load: "
            f"{', '.join(names[:4])}{more}. Quantize the original model with a recipe whose [precision] table leaves "
            "layers out, or set layer.set_mode(activations='high'), which multiplies by their dequantized weight",
            UserWarning,
            stacklevel=3,
        )


def clear_precision(model: nn.Module) -> None:
    """Remove all entries that set_precision has made in a model.

    Raises:
        TypeError: `model` is not a module.

    Example:
        >>> import torch, te_nvfp4_cv as nv
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(16, 16, 3), torch.nn.Conv2d(16, 16, 3))
        >>> nv.set_precision(model, {"1": None})
        >>> nv.clear_precision(model)
        >>> [row.nvfp4 for row in nv.coverage(model, torch.randn(16, 16, 8, 8)).rows]
        [True, True]
    """
    check_module("clear_precision", model, "clear_precision(model)")
    for module in model.modules():
        if not isinstance(module, torch.jit.ScriptModule):
            _take(module)


def entries_of(module: nn.Module) -> list[NVFP4BlockScaling | None]:
    """Return the module's own set_precision entry in a list, or an empty list if it has none."""
    hook = _hook_of(module)
    return [] if hook is None or hook.inherited else [hook.recipe]


# ---- entries of modules ---------------------------------------------------------------------------------------------


def _hook_of(module: nn.Module) -> _Enter | None:
    return next((hook for hook in module._forward_pre_hooks.values() if isinstance(hook, _Enter)), None)


def _give(module: nn.Module, recipe: NVFP4BlockScaling | None, inherited: bool = False) -> _Enter:
    _take(module)
    hook = _Enter(recipe, inherited)
    attach(module, hook, _Leave(inherited), first=True)  # before hooks of the user, which may run layers
    hook.bind(module)
    return hook


def _take(module: nn.Module) -> None:
    hook = _hook_of(module)
    if hook is not None:
        entries.forget(hook)
        detach(module, _Enter, _Leave)


def _spread(model: nn.Module) -> None:
    """Let the layers below modules with an entry inherit it."""
    ways: dict[nn.Module, list[_Enter | None]] = {}  # the entries that rule a module, one for each way to it
    _collect(model, None, ways)
    holders: dict[nn.Parameter, list[_Enter | None]] = {}
    for module, found in ways.items():
        for parameter in module._parameters.values():
            if parameter is not None:
                holders.setdefault(parameter, []).extend(found)
    for module, found in ways.items():
        hook = _hook_of(module)
        if hook is None or hook is not found[0]:  # else it is the module's own, or from above this model
            entry = found[0] if _alike(found) else None
            _take(module)
            hook = None
            if entry is not None and _holds_layer(module):
                hook = _give(module, entry.recipe, inherited=True)
        if hook is not None:
            named = module._parameters.items()
            hook.shared = frozenset(name for name, p in named if p is not None and not _alike(holders[p]))


def _collect(module: nn.Module, entry: _Enter | None, ways: dict[nn.Module, list[_Enter | None]]) -> None:
    if isinstance(module, torch.jit.ScriptModule):
        return
    own = _hook_of(module)
    if own is not None and (entry is None or not own.inherited):
        entry = own
    found = ways.setdefault(module, [])
    if any(known is entry for known in found):
        return
    found.append(entry)
    for child in module.children():
        _collect(child, entry, ways)


def _alike(found: list[_Enter | None]) -> bool:
    """Return True if these are entries with one recipe, and none is missing."""
    first = found[0]
    return all(hook is first or (hook and first and hook.recipe == first.recipe) for hook in found)


def _holds_layer(module: nn.Module) -> bool:
    """Return True if the module may multiply a weight that it holds or computes."""
    kernels = (p for p in module._parameters.values() if p is not None)
    return isinstance(module, _RUN_LAYERS) or any(nn.parameter.is_lazy(p) or p.dim() > 1 for p in kernels)


def _can_run_layers(module: nn.Module) -> bool:
    """Return True unless only code of torch runs inside the module that is known to run no layer in NVFP4."""
    if isinstance(module, torch.jit.ScriptModule):  # no context sees its calls
        return False
    if isinstance(module, _RUN_LAYERS) or not type(module).__module__.startswith("torch.nn.modules."):
        return True
    return any(_can_run_layers(child) for child in module.children())


# ---- tables ---------------------------------------------------------------------------------------------------------


def _pairs(table: Any) -> list[tuple[str, NVFP4BlockScaling | None]]:
    if isinstance(table, list | tuple | set | frozenset):
        raise type_error(
            "set_precision: the table is no dictionary.",
            got=f"{table!r:.80}",
            needs='patterns with what each gets, such as {"head.*": None}; or a recipe',
            fix="dict.fromkeys(names) for high precision in all of them",
        )
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
        own = None if value in HIGH else checked_recipe(value)
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
    table: dict[nn.Module, NVFP4BlockScaling | None] = {}
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
        if recipe is not None and not any(map(_can_run_layers, found)):
            raise value_error(
                f"set_precision: no layer runs in NVFP4 inside of what the pattern {pattern!r} matches.",
                got=f"a recipe for {', '.join(sorted({type(m).__name__ for m in found}))}",
                needs="a module with a convolution or linear layer; no context sees the calls of a ScriptModule",
                fix="name another module, or leave the entry out",
            )
        for module in found:
            table.pop(module, None)  # the last match comes last in the dict, too
            if recipe is None or not isinstance(module, torch.jit.ScriptModule):  # always in high precision
                table[module] = recipe
    return table
