"""Run the body of a torch function that is written in Python under the mode that has been handed its call.

Such a function asks first whether an override wants the call. Called again with the mode on it would come back to the
mode without end, so a copy of it is called that does not ask.
"""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable, Mapping
from typing import Any

import torch.nn.functional as F


@functools.lru_cache  # a second copy would take the first one's place among the modules
def without_override_check(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a copy of a torch function whose body runs at once, whatever function modes are on."""
    assert isinstance(function, types.FunctionType)
    # A module of its own, because torch.compile looks a function's globals up by the name of their module.
    module = types.ModuleType(f"{__name__}.{function.__name__}")
    vars(module).update({**function.__globals__, "__name__": module.__name__, "has_torch_function": _no_override})
    sys.modules[module.__name__] = module
    names = vars(module)
    copy = types.FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    copy.__module__ = module.__name__
    return copy


def _no_override(*_: Any) -> bool:
    return False


def note_parts(module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Remember on an nn.MultiheadAttention in which parts a call multiplies its fused weight, for nv.export.

    Args:
        args, kwargs: query, key and value, by position or by name, and what follows.
    """
    given = {**dict(zip(("query", "key", "value"), args, strict=False)), **kwargs}
    query, key, value = (given.get(name) for name in ("query", "key", "value"))
    if key is None or value is None:  # a subclass with other arguments
        return
    how = "qkv" if key is not value else "" if query is key else "kv"  # as torch's attention decides
    if getattr(module, "nvfp4_parts", "") != how:
        module.nvfp4_parts = how


ATTENTION = without_override_check(F.multi_head_attention_forward)  # its projections are calls of linear
