"""Levers against the gap of 4-bit training that act on weights; all are off unless they are asked for.

    nv.learn_scales(model, "scale")          one learnable multiplier of the block scales per layer
    nv.learn_scales(model, "clip")           one learnable clipping threshold per layer

learn_scales gives each layer that can run in NVFP4 one more parameter, `weight_scale` or `weight_clip`, a fraction that
starts at 1, where nothing changes. It is in model.parameters() and in the state_dict; the weight keeps its name and
shape. It acts where the layer runs in NVFP4 only. Call it after set_precision, whose high-precision layers get none,
before the optimizer is made, before DDP, and before load_state_dict of a model that has it. What the fractions do:
weight_transforms.py.

Source: PACT arXiv 1805.06085, LSQ arXiv 1902.08153.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from te_nvfp4_cv.errors import check_module, check_trainable, value_error
from te_nvfp4_cv.layer import check, weight_transforms
from te_nvfp4_cv.layer.plan import Plan
from te_nvfp4_cv.nn.modules import NVFP4_CLASSES
from te_nvfp4_cv.nn.walk import own_weight, with_recipes
from te_nvfp4_cv.recipe.block_scaling import NVFP4BlockScaling, as_recipe

NAMES = {weight_transforms.CLIP: "weight_clip", weight_transforms.SCALE: "weight_scale"}
LAYERS = tuple(NVFP4_CLASSES)


class _Enter:
    """Forward pre-hook: the module's learned parameter starts to rule."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __call__(self, module: nn.Module, args: Any) -> None:
        weight_transforms.push(module, self.kind, getattr(module, NAMES[self.kind]))


class _Leave:
    """Forward hook, called after an exception too."""

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        weight_transforms.pop(module)


def learn_scales(model: nn.Module, kind: str = "scale", layers: str = "*") -> list[nn.Parameter]:
    """Give layers a learnable fraction; see the top of this file.

    Args:
        kind: "scale" (LSQ) multiplies the block scales, "clip" (PACT) the largest weight.
        layers: fnmatch pattern of module names without the parts that wrappers add.
    Returns:
        The new parameters, and those of an earlier call: fp32, no axes.
    Raises:
        TypeError: no module; ValueError: another kind, a pattern without a layer that can run in NVFP4, layers that
            have the other kind, weights that are sharded.
    """
    check_module("learn_scales", model, "learn_scales(model, kind)")
    check_trainable("learn_scales", model)
    if kind not in NAMES:
        raise value_error(
            "learn_scales: unknown kind.", got=repr(kind), needs="'scale' or 'clip'", fix="learn_scales(model, 'scale')"
        )
    chosen = {
        name: module
        for name, module, own in _layers(model)
        if own is not None and fnmatch.fnmatchcase(name, layers) and _learns(module)
    }
    other = next(name for name in NAMES if name != kind)
    problems = {
        "no layer that can run in NVFP4 matches": [] if chosen else [layers],
        "layers that learn the other kind": [n for n, m in chosen.items() if hasattr(m, NAMES[other])],
        "sharded weights": [n for n, m in chosen.items() if hasattr(m.weight, "to_local")],
    }
    for problem, names in problems.items():
        if names:
            raise value_error(
                f"learn_scales: {problem}.",
                got=", ".join(map(repr, names[:4])),
                needs="convolutions or linear layers with 16 channels on both sides, whole, each with one kind",
                fix="check `layers`, call it once per layer, and before the model is sharded",
            )
    found = []
    for module in chosen.values():
        if not hasattr(module, NAMES[kind]):
            parameter = nn.Parameter(torch.ones((), dtype=torch.float32, device=module.weight.device))
            module.register_parameter(NAMES[kind], parameter)
            module.register_forward_pre_hook(_Enter(kind))
            module.register_forward_hook(_Leave(), always_call=True)
        found.append(getattr(module, NAMES[kind]))
    return found


def as_quantized(module: Any, plan: Plan) -> Tensor:
    """A layer's weight as it is quantized: clipped by the learned fraction, where the layer has one. No gradients."""
    w: Tensor = module.weight.detach()
    for kind, name in NAMES.items():
        if name in module._parameters:
            w = weight_transforms.clipped(w, getattr(module, name).detach(), kind, plan)
    return w


def forget(module: Any) -> None:
    """Take the learned fraction away from a layer, with its hooks."""
    for hooks, kind in ((module._forward_pre_hooks, _Enter), (module._forward_hooks, _Leave)):
        for key in [key for key, hook in hooks.items() if isinstance(hook, kind)]:
            del hooks[key]
            module._forward_hooks_always_called.pop(key, None)
    for name in NAMES.values():
        module._parameters.pop(name, None)


# ---- helpers --------------------------------------------------------------------------------------------------------


def _layers(model: nn.Module) -> Iterator[tuple[str, Any, NVFP4BlockScaling | None]]:
    """Yield each convolution and linear layer with its name and the recipe that rules it (None: high precision)."""
    for name, module, own in with_recipes(model, "", as_recipe(None), {}, set()):
        if isinstance(module, LAYERS) and own_weight(module) is not None:
            yield name, module, own


def _learns(module: Any) -> bool:
    """Whether a layer's weight can have a fraction: a Parameter that the layer itself multiplies, in NVFP4."""
    w = module._parameters.get("weight")
    attention = type(module) is nn.modules.linear.NonDynamicallyQuantizableLinear  # it reads it and runs no hooks
    return w is not None and not attention and w.dtype in check.DTYPES and not _thin(module)


def _thin(module: Any) -> bool:
    groups = getattr(module, "groups", 1)
    return min(module.weight.shape[0] // groups, module.weight.shape[1]) < check.MINIMUM
