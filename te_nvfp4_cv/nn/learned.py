"""Learn how weights are quantized: one more parameter per layer, against the gap of 4-bit training.

    nv.learn_scales(model, "scale")          one learnable multiplier of the block scales per layer
    nv.learn_scales(model, "clip")           one learnable clipping threshold per layer

The parameter, `weight_scale` or `weight_clip`, is a fraction that starts at 1, where nothing changes. It is in
model.parameters() and in the state_dict; the weight keeps its name and shape. It acts only while the layer runs in
NVFP4; layer/weight_transforms.py says what it does. It has one axis, because FSDP2 shards no scalars; checkpoints of
earlier versions, in which it has none, load.

Source: PACT arXiv 1805.06085, LSQ arXiv 1902.08153.
"""

from __future__ import annotations

import fnmatch
from typing import Any

import torch
from torch import Tensor, nn

from te_nvfp4_cv.errors import check_module, check_trainable, value_error
from te_nvfp4_cv.layer import check, weight_transforms
from te_nvfp4_cv.layer.plan import Plan
from te_nvfp4_cv.nn.hooks import Hook, attach, detach
from te_nvfp4_cv.nn.walk import LAYERS, with_recipes
from te_nvfp4_cv.recipe.block_scaling import NVFP4BlockScaling

NAMES = {weight_transforms.CLIP: "weight_clip", weight_transforms.SCALE: "weight_scale"}

# The names of these two classes, and of the fields in them, stand in models that version 0.1 pickled.


class _Enter(Hook):
    """Forward pre-hook: from here on the module's learned parameter acts on its weight."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __call__(self, module: nn.Module, args: Any) -> None:
        weight_transforms.push(module, self.kind, getattr(module, NAMES[self.kind]))


class _Leave(Hook):
    """Forward hook, which runs after an exception, too: the parameter stops acting."""

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        weight_transforms.pop(module)


def learn_scales(model: nn.Module, kind: str = "scale", layers: str = "*") -> list[nn.Parameter]:
    """Give each layer that can run in NVFP4 a learnable fraction of its block scales or of its largest weight.

    Call it after set_precision, whose high-precision layers get none; and before the optimizer is made, before DDP, and
    before load_state_dict of a model that has the fractions.

    Args:
        kind: "scale" (LSQ) learns a multiplier of the block scales, "clip" (PACT) one of the largest weight.
        layers: An fnmatch pattern of module names without the parts that wrappers add.
    Returns:
        The new parameters, and those of an earlier call: fp32 [1].
    Raises:
        TypeError: `model` is not a module.
        ValueError: The kind is unknown, no layer that can run in NVFP4 matches, a layer has the other kind already, or
            weights are sharded.

    Example:
        >>> import torch, te_nvfp4_cv as nv
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(16, 16, 3), torch.nn.Conv2d(16, 16, 3))
        >>> scales = nv.learn_scales(model, "scale")
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> [name for name, _ in model.named_parameters() if "scale" in name]
        ['0.weight_scale', '1.weight_scale']
    """
    check_module("learn_scales", model, "learn_scales(model, kind)")
    check_trainable("learn_scales", model)
    if kind not in NAMES:
        raise value_error(
            "learn_scales: unknown kind.", got=repr(kind), needs="'scale' or 'clip'", fix="learn_scales(model, 'scale')"
        )
    chosen: dict[str, Any] = {
        name: module
        for name, module, recipe in with_recipes(model, NVFP4BlockScaling())
        if recipe is not None and fnmatch.fnmatchcase(name, layers) and _learns(module)
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
            parameter = nn.Parameter(torch.ones(1, dtype=torch.float32, device=module.weight.device))
            module.register_parameter(NAMES[kind], parameter)  # in the state_dict; no reparametrization of the weight
            attach(module, _Enter(kind), _Leave())
            module.register_load_state_dict_pre_hook(_one_axis)
        found.append(getattr(module, NAMES[kind]))
    return found


def as_quantized(module: Any, plan: Plan) -> Tensor:
    """Return a layer's weight as it is quantized, clipped by its learned fraction if it has one, without gradients."""
    w: Tensor = module.weight.detach()
    for kind, name in NAMES.items():
        if name in module._parameters:
            w = weight_transforms.clipped(w, getattr(module, name).detach(), kind, plan)
    return w


def forget(module: Any) -> None:
    """Take the learned fraction away from a layer, with its hooks."""
    detach(module, _Enter, _Leave)
    for name in NAMES.values():
        module._parameters.pop(name, None)


# ---- helpers --------------------------------------------------------------------------------------------------------


def _one_axis(module: nn.Module, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
    """Give a fraction that an earlier version saved without axes one. It is a load_state_dict pre-hook."""
    for name in NAMES.values():
        saved = state_dict.get(prefix + name)
        if isinstance(saved, Tensor) and not saved.dim():
            state_dict[prefix + name] = saved.reshape(1)


def _learns(module: Any) -> bool:
    """Return True if the module is a layer whose weight is a Parameter that it multiplies itself, in NVFP4."""
    w = module._parameters.get("weight") if isinstance(module, LAYERS) else None
    attention = type(module) is nn.modules.linear.NonDynamicallyQuantizableLinear  # it reads it and runs no hooks
    if w is None or attention or w.dtype not in check.DTYPES:
        return False
    return min(w.shape[0] // getattr(module, "groups", 1), w.shape[1]) >= check.MINIMUM
