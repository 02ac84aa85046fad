"""Knows the kernels that torch computes for its own layers: parametrizations, weight_norm, spectral_norm, prune.

A file holds the codes of the computed kernel and not what it was computed from, and a layer that becomes an inference
layer has no reparametrization any more.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

_OLDER = (WeightNorm, SpectralNorm, BasePruningMethod)  # they compute the kernel in a forward pre-hook
_OLDER_KEYS = ("weight_g", "weight_v", "weight_u", "weight_orig", "weight_mask")


def is_computed(module: nn.Module) -> bool:
    """Return True if torch computes a layer's weight at each call."""
    return bool(_hooks(module)) or parametrize.is_parametrized(module, "weight")


def weight_of(module: Any) -> Tensor:
    """Return a layer's weight as evaluation would use it, without gradients; a computed one is computed now."""
    if not is_computed(module):
        found: Tensor = module.weight.detach()
        return found
    children = list(module.modules())
    flags = [child.training for child in children]
    try:
        # In training mode spectral_norm would do a step of its power iteration.
        for child in children:
            child.training = False
        with torch.no_grad():
            for hook in _hooks(module):  # the attribute is that of the last forward pass, before the optimizer's step
                hook(module, ())
            return module.weight.detach().clone()  # type: ignore[no-any-return]
    finally:
        for child, flag in zip(children, flags, strict=True):
            child.training = flag


def keys_of(module: nn.Module) -> set[str]:
    """Return the names in the layer's state_dict that its weight is computed from."""
    if not is_computed(module):
        return set()
    older = _OLDER_KEYS if _hooks(module) else ()
    return {key for key in module.state_dict() if key in older or key.startswith("parametrizations.weight.")}


def settle(module: nn.Module) -> None:
    """Make the computed weight of a layer a Parameter of that value, and end its reparametrization."""
    if not is_computed(module):
        return
    w = weight_of(module)
    for key in [key for key, hook in module._forward_pre_hooks.items() if isinstance(hook, _OLDER)]:
        del module._forward_pre_hooks[key]
    for table in (module._state_dict_hooks, module._load_state_dict_pre_hooks):
        # They convert the state_dicts of earlier versions of torch there.
        for key in [key for key, hook in table.items() if _of_torch(hook)]:
            del table[key]
    for name in _OLDER_KEYS:
        module._parameters.pop(name, None)
        module._buffers.pop(name, None)
    if parametrize.is_parametrized(module):
        # Not remove_parametrizations: it takes the property from the class, which copies of the module share.
        del module._modules["parametrizations"]
        module.__class__ = type(module).__bases__[0]
    vars(module).pop("weight", None)
    module.weight = nn.Parameter(w, requires_grad=False)


def _of_torch(hook: Any) -> bool:
    hook = getattr(hook, "hook", hook)  # torch may have wrapped it
    place = getattr(hook, "__module__", None) or type(hook).__module__
    return place.startswith("torch.nn.utils.")


def _hooks(module: nn.Module) -> list[Any]:
    hooks = [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, _OLDER)]
    name = "_tensor_name"  # of a pruning method
    return [hook for hook in hooks if getattr(hook, "name", getattr(hook, name, "")) == "weight"]
