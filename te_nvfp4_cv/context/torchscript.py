"""Say that models of TorchScript run in high precision: their calls are made in C++, where no context sees them.

    torch.jit.script of a model inside a context    an error: it would take the model out of the context's sight
    a ScriptModule, a ScriptFunction with layers    one warning a model; nv.coverage lists ScriptModules
"""

from __future__ import annotations

import functools
import warnings
import weakref
from typing import Any

import torch
from torch import nn

from te_nvfp4_cv.context.entries import meant
from te_nvfp4_cv.context.state import active_recipe, state
from te_nvfp4_cv.errors import runtime_error, warn_once
from te_nvfp4_cv.layer import check, shortfall
from te_nvfp4_cv.layer.constants import running_modules

_LAYERS = ("linear", "_convolution", "convolution", *(f"conv{t}{n}d" for t in ("", "_transpose") for n in (1, 2, 3)))
_known: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # models that were warned of, ScriptModules that need no warning


def patch_script() -> None:
    """Make the changes above, once."""
    _refuse_script()
    for kind, tell in ((torch.jit.ScriptModule, _tell_of_module), (torch.jit.ScriptFunction, _tell_of_function)):
        kind.__call__ = _telling(kind.__call__, tell)  # type: ignore[method-assign]


def _telling(call: Any, tell: Any) -> Any:
    @functools.wraps(call)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        # Quiet: nv.coverage is running, whose report says so.
        if not torch.compiler.is_compiling() and active_recipe() is not None and not shortfall.local.quiet:
            tell(self)
        return call(self, *args, **kwargs)

    return __call__


def _tell_of_module(script: torch.jit.ScriptModule) -> None:
    model = next(iter([*running_modules()][::-1]), script)
    if script in _known or model in _known or script in meant:
        return
    weights = [p for p in script.parameters() if p.dim() > 1]
    # A frozen module has no parameters any more, only constants in its graph.
    if not _has_layers(script) or (weights and all(check.is_thin(w, 1) for w in weights)):
        _known.add(script)
        return
    _known.add(model)
    path = next((name for name, module in model.named_modules() if module is script and name), "")
    what = f"{path!r} of {type(model).__name__}" if path else f"the model, {script.original_name},"
    # Not by warn_once: a text that names this model by its id could be another's, whose place in memory it took.
    warnings.warn(
        f"nvfp4: {what} is a ScriptModule: its layers run in high precision, as no context sees the calls inside. "
        "Use the module that it was made from, with torch.compile if need be. nv.coverage(model, inputs) lists every "
        f'layer; set_precision(model, {{"{path}": None}}) says that it is meant',
        UserWarning,
        stacklevel=4,
    )


def _tell_of_function(function: torch.jit.ScriptFunction) -> None:
    if _has_layers(function):
        name = function.qualified_name
        warn_once(
            f"script function {name}",
            f"nvfp4: the layers inside of {name} run in high precision: it is a function of torch.jit, and no context "
            "sees the calls inside. Use the function that it was made from, with torch.compile if need be",
        )


def _has_layers(script: Any) -> bool:
    try:
        graph = script.inlined_graph
    except (AttributeError, RuntimeError):  # a module without a forward
        return False
    return any(graph.findNode(f"aten::{layer}") is not None for layer in _LAYERS)


def _refuse_script() -> None:
    import torch.jit._recursive as recursive

    create = recursive.create_script_module

    @functools.wraps(create)
    def refuse(nn_module: Any, stubs_fn: Any, share_types: Any = True, is_tracing: Any = False) -> Any:
        current = state()
        scripted = current is not None and current.enabled and not is_tracing
        if scripted and any(p.dim() > 1 for p in nn_module.parameters()):
            raise runtime_error(
                f"nvfp4_autocast: torch.jit.script of {type(nn_module).__name__} inside the context.",
                got="a model with layers, whose calls no context would see any more: they would run in high precision",
                needs="torch.compile or torch.export in its place",
                fix="or script the model outside of nvfp4_autocast, for high precision",
            )
        return create(nn_module, stubs_fn, share_types, is_tracing)

    recursive.create_script_module = refuse
