"""Runs one call of a grouped linear layer (mixture of experts) in NVFP4: x [T, C] sorted by expert, w [E, O, C].

It is the layer of execute.py with one more operand, the offsets: the same checks, the same Plan (which knows how many
experts there are, and not which rows they have, so that it serves every routing), the same forward and backward. The
operators cut operands along the experts' rows: ops/quantize/grouped.py and ops/conv/grouped.py.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from te_nvfp4_cv.backend import dispatch
from te_nvfp4_cv.backend.dispatch import runs_directly
from te_nvfp4_cv.backend.torch_private import without_function_modes
from te_nvfp4_cv.errors import describe, value_error
from te_nvfp4_cv.layer import custom_op, deferred, delayed_scaling, empty_batch, shortfall
from te_nvfp4_cv.layer.check import (
    MINIMUM,
    CallShape,
    Sizes,
    checked_recipe,
    ineligible,
    lowered,
    planned,
    refuse_jit_trace,
)
from te_nvfp4_cv.layer.run import cast, run
from te_nvfp4_cv.layer.subclasses import PLAIN, without_class
from te_nvfp4_cv.layer.transforms import PLAIN_MODEL, refuse_transforms
from te_nvfp4_cv.ops.experts import Experts, checked_offsets
from te_nvfp4_cv.ops.geometry import ConvArgs
from te_nvfp4_cv.recipe.block_scaling import NVFP4BlockScaling

OP = "grouped_linear"


def why_not(x: Tensor, w: Tensor, recipe: NVFP4BlockScaling) -> str | None:
    """Return why a call must stay in high precision, or None if it can run in NVFP4; see check.ineligible."""
    if recipe.activation_shift != "none":
        return "recipe.activation_shift: the mean of a channel is that of all experts' rows"
    if recipe.block_format != "nvfp4":
        return f"recipe.block_format={recipe.block_format!r}: experts have NVFP4 only"
    if isinstance(w, Tensor) and w.dim() == 3:
        if recipe.thin_layers == "pad" and min(w.shape[1:]) < MINIMUM:
            return f"thin layer: fewer than {MINIMUM} channels, which experts do not pad"
        w = torch.empty((), dtype=w.dtype, device=w.device).expand(w.shape[1:])  # one expert's, without its values
    return ineligible(OP, x, w, 1, recipe)


def execute_explicit(
    x: Tensor, w: Tensor, offsets: Tensor, bias: Tensor | None, recipe: Any, backend: str, group: Any = None
) -> Tensor:
    """Run a call that asks for NVFP4 by name; arguments as for execute, but any recipe that as_recipe takes.

    Raises:
        ValueError: a call that NVFP4 cannot take.
        RuntimeError: a transform of torch.func is at work.
    """
    recipe = checked_recipe(recipe)
    reason = why_not(x, w, recipe)
    if reason is not None:
        raise value_error(
            f"nvfp4 {OP}: this call cannot run in NVFP4: {reason}.",
            got=f"x {describe(x)}, weight {describe(w)}",
            needs=f"bf16, fp16 or fp32 on one device, and at least {MINIMUM} channels on both sides",
            fix="leave this call in high precision: torch.nn.functional.grouped_mm",
        )
    refuse_transforms(f"a layer that asks for NVFP4 ({OP})", PLAIN_MODEL, x, w, bias)
    with without_function_modes():
        return execute(x, w, offsets, bias, recipe, backend, group)


def execute(
    x: Tensor, w: Tensor, offsets: Tensor, bias: Tensor | None, recipe: NVFP4BlockScaling, backend: str, group: Any
) -> Tensor:
    """Run an eligible call.

    Args:
        x: [T, C], the rows of expert e from offsets[e - 1] to offsets[e].
        w: [E, O, C].
        offsets: int32 or int64 [E].
        bias: [E, O] or None.
        group: process group of the ranks that quantize with one amax, or None.
    Raises:
        ValueError: shapes, dtypes or offsets that do not fit.
        RuntimeError: a backend that cannot run here.
    """
    refuse_jit_trace(f"a layer in NVFP4 ({OP})")
    deferred.settle(x)
    x, autocast = cast(OP, x, w)
    call = CallShape.of(OP, x, Sizes.of(w), bias, ConvArgs())
    low = lowered(call)
    offsets = checked_offsets(offsets, x, w.shape[0])
    own_scales = recipe.grouped_scale == "expert"
    if group is not None and own_scales:
        raise value_error(
            f"nvfp4 {OP}: scales of experts cannot be shared between ranks.",
            got="amax_reduction_group with grouped_scale='expert'",
            needs="one scale per tensor",
            fix="leave amax_reduction_group out, or grouped_scale='operand'",
        )
    if low.empty:  # nothing to quantize: torch's own result, and its gradients
        Experts(offsets, 0)
        y = F.linear(x, w[0].to(x.dtype), None if bias is None else bias[0].to(x.dtype))
        if group is None:
            return y
        return empty_batch.take_part(y, x, w, bias, planned(call, recipe, "reference", x.dtype, False), group)
    shortfall.ran(low.geometry)
    chosen = dispatch.resolve(backend, x.device, by_layer=True)
    compute_dtype = dispatch.compute_dtype(x.dtype, x.device, autocast)
    # In graphs, and for tensors without values (fake ones), the layer is one operator, whose shapes are known.
    if torch.compiler.is_compiling() or not runs_directly(x if type(x) in PLAIN else without_class(x)):
        delayed_scaling.refuse(recipe, group)
        spec = custom_op.LayerSpec(recipe.key, chosen, compute_dtype, False)
        return custom_op.apply(x, w, bias, low.geometry, spec, group, offsets)
    if type(x) not in PLAIN:
        x = without_class(x)
    experts = Experts(offsets.detach(), x.shape[0], own_scales)
    plan = planned(call, recipe, chosen, compute_dtype, False)
    return run(OP, x, w, bias, plan, group, experts=experts)


def plain(x: Tensor, w: Tensor, offsets: Tensor, bias: Tensor | None) -> Tensor:
    """Return the layer in high precision; arguments as for execute. Under torch.autocast in its dtype."""
    experts = Experts(checked_offsets(offsets, x, w.shape[0]), x.shape[0])
    parts = [F.linear(x[r.here], w[r.expert], None if bias is None else bias[r.expert]) for r in experts.rows]
    # Without rows, but in the graph, so that a call without any has gradients too, and they are zero.
    nothing = F.linear(x[:0], w[0], None if bias is None else bias[0])
    return torch.cat((*parts, nothing, nothing.new_zeros(x.shape[0] - experts.end, w.shape[1])))
