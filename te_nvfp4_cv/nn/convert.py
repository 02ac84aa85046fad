"""Turn the layers of a plain model into NVFP4 modules, in place."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from te_nvfp4_cv.errors import check_module
from te_nvfp4_cv.layer import check
from te_nvfp4_cv.nn.modules import NVFP4_CLASSES, NVFP4Module
from te_nvfp4_cv.nn.precision import matches, set_precision
from te_nvfp4_cv.nn.walk import LAYERS, like_weight, torch_class, with_entries
from te_nvfp4_cv.recipe.block_scaling import NVFP4BlockScaling


def convert_model(
    model: nn.Module, recipe: Any = None, filter_fn: Callable[[nn.Module, str], bool] | None = None
) -> nn.Module:
    """Turn the eligible convolutions and linear layers of a model into NVFP4 modules, in place.

    The module objects stay: only their class changes. So Parameters, optimizers that hold them, hooks, names and shared
    modules stay as they are. Layers whose kernel torch computes (parametrizations, weight_norm, spectral_norm, prune)
    are converted, too, unless the recipe says kernels="parameters". Some layers are left plain: thin layers, depthwise
    convolutions and dtypes that NVFP4 does not take; and, with a warning, subclasses of torch's layers and lazy layers.

    Args:
        recipe: The layers' recipe. If None, they follow the context in which they run, or the default recipe. The
            recipe's [precision] table is applied: what it names "high" stays plain.
        filter_fn: filter_fn(module, name) returns False for a layer that must stay plain.
    Returns:
        The model.
    Raises:
        TypeError: `model` is not a module, or `recipe` is not a recipe.
        ValueError: A pattern of the recipe's table matches nothing.

    Example:
        >>> import torch, te_nvfp4_cv as nv
        >>> model = nv.convert_model(torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3), torch.nn.Conv2d(16, 32, 3)))
        >>> [type(layer).__name__ for layer in model]  # 3 channels are too few for blocks of 16
        ['Conv2d', 'NVFP4Conv2d']
    """
    check_module("convert_model", model, "convert_model(model, ...)")
    resolved = None if recipe is None else check.checked_recipe(recipe)
    table = matches(model, list(resolved.precision) if resolved else [])
    planned: dict[nn.Module, NVFP4BlockScaling | None] = {}
    left: list[str] = []
    inherit = object()  # None means high precision in the table, so it cannot mean "no entry"
    for name, module, entry in with_entries(model, inherit, table):
        if not isinstance(module, LAYERS) or isinstance(module, NVFP4Module):
            continue
        if entry is None or (filter_fn is not None and not filter_fn(module, name)):
            continue
        own = resolved if entry is inherit else entry
        reason = _why_left(module, own)
        if reason is None:
            planned[module] = own
        elif reason:
            left.append(f"{name or 'the model itself'} ({reason})")
    # Nothing changes before all layers are judged, so an error in filter_fn leaves the model whole.
    for module, own in planned.items():
        module.__class__ = _converted(type(module))
        module.recipe, module.backend = own, "auto"  # type: ignore[assignment]
    if resolved is not None:
        set_precision(model, resolved)
    if left:
        warnings.warn("convert_model left these layers as they are: " + "; ".join(left), UserWarning, stacklevel=2)
    return model


def _why_left(module: nn.Module, recipe: NVFP4BlockScaling | None) -> str | None:
    """Return None if a layer can be converted, a reason that may surprise the user, or "" for the expected ones."""
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return ""  # nn.MultiheadAttention reads its weight and never calls it
    if isinstance(module, nn.modules.lazy.LazyModuleMixin):
        return "lazy: run one forward pass first"
    kind = torch_class(module)
    if kind is None:
        return f"{type(module).__name__}: a subclass of torch's layer"
    asked = recipe or NVFP4BlockScaling()
    if asked.kernels == "parameters" and "weight" not in module._parameters:
        return "its weight is computed (recipe.kernels='parameters')"
    groups, w = getattr(module, "groups", 1), like_weight(module)
    if w.is_meta:  # it gets its values later
        w = torch.empty((), dtype=w.dtype, device="cpu").expand(w.shape)
    return None if check.ineligible(NVFP4_CLASSES[kind].op, w, w, groups, asked) is None else ""


def _converted(cls: type[nn.Module]) -> type[nn.Module]:
    """Return the NVFP4 class for a layer of the class: torch's own, or a parametrized one, which stays parametrized."""
    if cls in NVFP4_CLASSES:
        return NVFP4_CLASSES[cls]
    # Torch makes a class of its own for a parametrized module, and takes its only base when the parametrization ends.
    base = NVFP4_CLASSES[cls.__bases__[0]]
    body = {key: value for key, value in vars(cls).items() if key not in ("__dict__", "__weakref__")}
    return type(f"Parametrized{base.__name__}", (base,), body)
