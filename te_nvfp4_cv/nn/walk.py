"""nn.walk."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from te_nvfp4_cv.nn.modules import NVFP4_CLASSES, NVFP4Module
from te_nvfp4_cv.nn.names import plain_name
from te_nvfp4_cv.nn.precision import entries_of
from te_nvfp4_cv.recipe.block_scaling import NVFP4BlockScaling


def _layers(
    module: nn.Module, name: str, entry: Any, table: dict[nn.Module, NVFP4BlockScaling | None], seen: set[nn.Module]
) -> Iterator[tuple[str, nn.Module, Any]]:
    """(name, layer, what the table says of it: None for high precision, a recipe, or `entry` where it says nothing)."""
    if module in seen or isinstance(module, torch.jit.ScriptModule):
        return
    seen.add(module)
    entry = table.get(module, entry)
    if isinstance(module, tuple(NVFP4_CLASSES)) and not isinstance(module, NVFP4Module):
        yield name, module, entry
    for child_name, child in module.named_children():
        yield from _layers(child, plain_name(f"{name}.{child_name}".strip(".")), entry, table, seen)


def with_recipes(
    module: nn.Module, name: str, entry: Any, table: dict[nn.Module, Any], seen: set[nn.Module]
) -> Iterator[tuple[str, nn.Module, NVFP4BlockScaling | None]]:
    """(name, module, recipe or None) of every module, as the context would decide.

    Args:
        entry: what rules above `module`; table: entries that set_precision would make, beside those it has made.
    """
    if module in seen:
        return
    seen.add(module)
    entry = table.get(module, entry)
    entry = next(iter(entries_of(module)), entry)
    own = module.recipe if isinstance(module, NVFP4Module) else None
    yield name, module, entry if own is None or entry is None else own
    for child_name, child in module.named_children():
        yield from with_recipes(child, plain_name(f"{name}.{child_name}".strip(".")), entry, table, seen)


def op_of(module: nn.Module) -> str:
    """A layer's operator, as nv.functional names it: "conv2d", ..."""
    return next(ours.op for plain, ours in NVFP4_CLASSES.items() if isinstance(module, plain))


def own_weight(module: nn.Module) -> Tensor | None:
    """A layer's weight where it is kept as such; None where it is computed (parametrizations): reading it would run
    that.
    """
    found: Tensor | None = module._parameters.get("weight", vars(module).get("weight"))
    return found
