"""Find a module's children by their path, and say what they are: norms, idle, watched by hooks, changed by nv.fuse."""

from __future__ import annotations

from typing import Any

from torch import nn

from te_nvfp4_cv.backend.torch_private import BatchOrInstanceNorm

FAMILY = (BatchOrInstanceNorm, nn.GroupNorm)  # a report of nv.fuse lists these, fused or not
CONTAINERS = (nn.ModuleList, nn.ModuleDict)
OURS = __name__.split(".")[0]
DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


def is_identity(module: Any) -> bool:
    """Return True if a call of the module returns its input and does nothing else."""
    kind = type(module)
    idle = kind is nn.Identity or (kind is nn.Sequential and not len(module)) or (kind in DROPOUTS and module.p == 0)
    return idle and not changed(module)


def changed(module: nn.Module) -> bool:
    """Return True if a call of the module does more than its class says: hooks, or a forward of its own."""
    return "forward" in module.__dict__ or bool(hooks(module))


def hooks(module: nn.Module) -> list[Any]:
    """Return the hooks around the module's forward and backward, except for those of this package.

    These only push to and pop from stacks, and never look at tensors.
    """
    return [hook for hook in all_hooks(module) if (getattr(hook, "__module__", "") or "").split(".")[0] != OURS]


def all_hooks(module: nn.Module) -> list[Any]:
    """Return the hooks around the module's forward and backward."""
    everybody = vars(nn.modules.module)  # torch.nn.modules.module.register_module_forward_hook, ...
    names = ("forward_hooks", "forward_pre_hooks", "backward_hooks", "backward_pre_hooks")
    tables = [getattr(module, f"_{name}") for name in names] + [everybody[f"_global_{name}"] for name in names]
    return [hook for table in tables for hook in table.values()]


def child_of(module: nn.Module, target: str) -> nn.Module | None:
    """Return a module inside this one by its path, or None. Unlike get_submodule, plain attributes do not count."""
    for part in target.split("."):
        child = module._modules.get(part)
        if child is None:
            return None
        module = child
    return module


def named_children(module: nn.Module) -> tuple[Any, ...]:
    """Return the names of the module's children, also inside ModuleList and ModuleDict, and which of them are None."""
    return tuple(
        (name, child if child is None else named_children(child) if isinstance(child, CONTAINERS) else ())
        for name, child in module._modules.items()
    )


def paths_of_children(module: nn.Module) -> list[str]:
    """Return the paths of the module's children, also of those inside ModuleList, ModuleDict and Sequential."""
    found = []
    for name, child in module._modules.items():
        inside = paths_of_children(child) if isinstance(child, (*CONTAINERS, nn.Sequential)) else []
        found += [name, *(f"{name}.{path}" for path in inside)]
    return found


def own_class(module: nn.Module) -> type[nn.Module]:
    """Return the module's class, or the one that it had before nv.fuse gave it a forward of its own."""
    return getattr(type(module), "nvfp4_original", type(module))


def foreign_class(module: nn.Module | None) -> type:
    """Return the module's class, or the first of its bases that is not of this package, which changes classes."""
    if module is None:
        return type(None)
    return next(cls for cls in own_class(module).__mro__ if cls.__module__.split(".")[0] != OURS)
