"""Apply a recipe to a model in one call: its table of precision, and the context that goes with it."""

from __future__ import annotations

from typing import Any

from torch import nn

from te_nvfp4_cv.context.context_manager import nvfp4_autocast
from te_nvfp4_cv.errors import check_module
from te_nvfp4_cv.layer.check import checked_recipe
from te_nvfp4_cv.nn.precision import set_precision


def prepare(model: nn.Module, recipe: Any = None, **options: Any) -> nvfp4_autocast:
    """Apply a recipe's [precision] table to a model, and return the context in which the model then runs.

    This is set_precision(model, recipe) and nvfp4_autocast(recipe, ...), so that neither is forgotten. The
    context can be entered in every step. Entries that set_precision made before stay where the table has no other.

    Args:
        model: The model, which stays a plain module; only modules that the table names get an entry.
        recipe: A recipe, its name or path, or None for the default one.
        options: Keywords of nvfp4_autocast: enabled, backend, amax_reduction_group, relu_mask.
    Raises:
        TypeError: `model` is not a module, `recipe` is not a recipe, or nvfp4_autocast has no such keyword.
        ValueError: A pattern of the table matches no module, or the recipe contradicts itself. Nothing is changed.
        FileNotFoundError: There is no recipe of that name.

    Example:
        >>> import torch, te_nvfp4_cv as nv
        >>> model = torch.nn.Sequential()
        >>> model.conv, model.fc = torch.nn.Conv2d(16, 16, 3), torch.nn.Linear(16, 10)
        >>> nvfp4 = nv.prepare(model, "resnet")  # its table leaves the classifier "fc" in high precision
        >>> with nvfp4:
        ...     loss = model.fc(model.conv(torch.randn(16, 16, 8, 8)).mean((2, 3))).square().mean()
        >>> loss.backward()
    """
    check_module("prepare", model, "prepare(model, recipe)")
    resolved = checked_recipe(recipe)
    context = nvfp4_autocast(resolved, **options)  # first: what it refuses must leave the model as it was
    set_precision(model, resolved)
    return context
