"""One call of a convolution or linear layer: may it run in NVFP4, are its shapes right, what is its geometry; then it
is executed.

nvfp4_autocast asks `ineligible` and leaves what it names in high precision; nv.functional and the NVFP4 modules raise
instead. `execute` casts as
torch.autocast would, checks, resolves geometry and backend, and hands over to autograd.QuantizedConv.
Observers (coverage, telemetry) are told here of every call of their thread.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from te_nvfp4_cv.backend import dispatch
from te_nvfp4_cv.errors import describe, value_error
from te_nvfp4_cv.layer import custom_op, delayed_scaling, weight_codes, weight_transforms
from te_nvfp4_cv.layer import deferred as producers
from te_nvfp4_cv.layer.autograd import QuantizedConv
from te_nvfp4_cv.layer.geometry import geometry_of
from te_nvfp4_cv.layer.observe import Call, _reported
from te_nvfp4_cv.layer.plan import Plan
from te_nvfp4_cv.ops.geometry import ConvGeometry
from te_nvfp4_cv.ops.layouts import is_channels_last
from te_nvfp4_cv.recipe.block_scaling import NVFP4BlockScaling

# ---- one call --------------------------------------------------




def execute(op: str, x: Tensor, *call: Any, **named: Any) -> Tensor:
    """An eligible call: cast as torch.autocast would, check, resolve, run. Arguments: those of _execute."""
    try:
        return _execute(op, x, *call, **named)
    except BaseException:
        producers.settle(x)  # who catches this may read x
        raise


def _execute(
    op: str,
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    output_padding: Any,
    recipe: NVFP4BlockScaling,
    backend: str,
    group: Any = None,
) -> Tensor:
    """`group`: the ranks whose amaxes are one."""
    device = x.device.type
    autocast = torch.is_autocast_enabled(device)
    producer = producers.claim(x, w.dim() - 2, padding, torch.get_autocast_dtype(device) if autocast else x.dtype)
    if autocast:
        x = x.to(torch.get_autocast_dtype(device))
    elif x.dtype != w.dtype:
        raise value_error(
            f"nvfp4 {op}: input and weight differ in dtype.",
            got=f"x {describe(x)}, weight {describe(w)}",
            needs="one dtype outside of torch.autocast",
            fix="model.to(x.dtype), x.to(w.dtype), or run under torch.autocast",
        )
    x, geometry, unbatched = geometry_of(op, x, w, bias, stride, padding, dilation, groups, output_padding)
    if 0 in x.shape or 0 in geometry.y_shape:  # nothing to quantize: torch's own result, and its gradients
        producers.settle(x)
        y = _plain(op, x, w.to(x.dtype), None if bias is None else bias.to(x.dtype), geometry)
        return y.squeeze(0) if unbatched else y
    chosen = dispatch.resolve(backend, x.device)
    channels_last = is_channels_last(x) or is_channels_last(w)
    plan = Plan(geometry, recipe, chosen, dispatch.compute_dtype(x.dtype, x.device, autocast), channels_last)
    if torch.compiler.is_compiling():  # no producers and no observers inside of a graph
        delayed_scaling.refuse(plan, group)
        w = weight_transforms.apply(w, None, plan)
        y = custom_op.apply(x, w, bias, plan, group)
        return y.squeeze(0) if unbatched else y
    call = Call(op, w, x, geometry, recipe, "")
    codes, scales = weight_codes.codes_of(w, plan), delayed_scaling.of_call(x, w, bias, plan, group)
    if producer is not None and not producer.serves(plan, torch.is_grad_enabled() and w.requires_grad, scales):
        producers.settle(x)
        producer = None
    w = weight_transforms.apply(w, codes, plan)
    if not torch.is_grad_enabled():  # a Function's needs_input_grad does not know: no face is made that nobody keeps
        x, w, bias = x.detach(), w.detach(), None if bias is None else bias.detach()
    y = _reported(call, lambda watch: QuantizedConv.apply(x, w, bias, plan, codes, scales, producer, watch))
    return y.squeeze(0) if unbatched else y














def _plain(op: str, x: Tensor, w: Tensor, bias: Tensor | None, g: ConvGeometry) -> Tensor:
    if g.rank == 0:
        return F.linear(x, w, bias)
    if g.transposed:
        return getattr(F, op)(x, w, bias, g.stride, g.padding, g.output_padding, g.groups, g.dilation)
    return getattr(F, op)(x, w, bias, g.stride, g.padding, g.dilation, g.groups)
