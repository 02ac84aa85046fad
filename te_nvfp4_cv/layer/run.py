"""Runs a call whose plan is made, with whoever takes part in it: what execute.py and grouped.py have in common.

`cast` comes before the plan. `run` finds the weight's codes if somebody holds them, scales that other calls or ranks
give, observers, and transforms of weights, and enters autograd.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from te_nvfp4_cv.errors import describe, value_error
from te_nvfp4_cv.layer import deferred, delayed_scaling, evaluation_cache, observe, weight_codes, weight_transforms
from te_nvfp4_cv.layer.forward_backward import QuantizedConv
from te_nvfp4_cv.layer.options import CallOptions
from te_nvfp4_cv.layer.plan import Plan
from te_nvfp4_cv.layer.subclasses import PLAIN
from te_nvfp4_cv.ops.experts import Experts


def cast(op: str, x: Tensor, w: Tensor) -> tuple[Tensor, bool]:
    """Return x in torch.autocast's dtype where that is on, and whether it is on.

    Raises:
        ValueError: it is off, and x and w differ in dtype.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device):
        return x.to(torch.get_autocast_dtype(device)), True
    if x.dtype != w.dtype:
        raise value_error(
            f"nvfp4 {op}: input and weight differ in dtype.",
            got=f"x {describe(x)}, weight {describe(w)}",
            needs="one dtype outside of torch.autocast",
            fix="model.to(x.dtype), x.to(w.dtype), or run under torch.autocast",
        )
    return x, False


def run(
    op: str,
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    plan: Plan,
    group: Any,
    producer: Any = None,
    experts: Experts | None = None,
) -> Tensor:
    """Run an eager call; x is cast and plain, with a batch axis.

    Args:
        op: as nv.functional names it.
        group: process group of the ranks that quantize with one amax, or None.
        producer: what writes x, if it is not written yet.
        experts: of a grouped linear layer.
    """
    codes = scales = None
    # Nearly every weight is a plain Parameter that nothing has frozen: these two questions cost less than a call.
    if weight_codes.frozen or type(w) not in PLAIN:
        codes = weight_codes.codes_of(w, plan)
    if plan.delayed or group is not None:
        scales = delayed_scaling.of_call(x, w, bias, plan, group)
        if scales is not None and experts is not None:
            scales.experts = experts
    if producer is not None and not producer.serves(plan, torch.is_grad_enabled() and w.requires_grad, scales):
        deferred.settle(x)
        producer = None
    # Before w is transformed: observers know a layer by its weight's identity.
    told = observe.Call(op, w, x, plan.geometry, plan.recipe, "") if observe.local.observers else None
    transformed, unpacked = bool(weight_transforms.local.running) and experts is None, None
    if transformed:
        w = weight_transforms.apply(w, codes, plan)
    if not torch.is_grad_enabled():  # a Function's needs_input_grad does not know: nothing is saved for nobody
        if codes is None and told is None and not transformed:
            codes, unpacked = evaluation_cache.find(w, plan)
        x, w, bias = x.detach(), w.detach(), None if bias is None else bias.detach()
    options = CallOptions(codes=codes, unpacked=unpacked, scales=scales, producer=producer, experts=experts)
    if told is None:
        return QuantizedConv.apply(x, w, bias, plan, options)  # type: ignore[no-any-return]
    return observe.watched(told, lambda watch: QuantizedConv.apply(x, w, bias, plan, options._replace(watch=watch)))
