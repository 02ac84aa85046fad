"""One quantized layer, forward and backward, as two functions on plain tensors: what eager autograd and the compiled
operator share.

    forward    x, w, bias -> y, and by name what backward needs
    backward   dy and those -> dx, dw, db

The steps are those of faces.py and multiply.py; autocast is off while they run. x itself is kept only where the recipe
wants a GEMM in high precision.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from te_nvfp4_cv.layer import gemms, operands
from te_nvfp4_cv.layer.deferred import Producer
from te_nvfp4_cv.layer.delayed_scaling import CallScales
from te_nvfp4_cv.layer.plan import Plan, Watch
from te_nvfp4_cv.layer.saved import Like, keep
from te_nvfp4_cv.ops import layouts

# ---- weights quantized once, for gradient accumulation --------------------------------------------------------------








# ---- forward and backward -------------------------------------------------------------------------------------------


def forward(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    plan: Plan,
    need_dx: bool,
    need_dw: bool,
    codes: tuple[Tensor, ...] | None = None,
    scales: CallScales | None = None,
    producer: Producer | None = None,
    watch: Watch | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """(y with the strides that torch would give it, kept tensors by name).

    Args:
        codes: of w, made before (quantize_weight), or None.
        scales: which amaxes x is quantized with; None: its own.
        producer: makes the operand of an x that was not written; None: x is there.
        watch: is shown every operand.
    """
    with torch.autocast(x.device.type, enabled=False):
        x_last, x_q, w_q = quantize(x, w, plan, need_dx, need_dw, codes, scales, producer, watch)
        y = gemms.fprop(x_last, x_q, w, w_q, bias, plan)
        kept = keep(x, x_q, w, w_q, plan, need_dx, need_dw)
        return layouts.image_first(y, plan.geometry.y_shape, x.shape, plan.channels_last), kept


def quantize(
    x: Tensor,
    w: Tensor,
    plan: Plan,
    need_dx: bool,
    need_dw: bool,
    codes: tuple[Tensor, ...] | None = None,
    scales: CallScales | None = None,
    producer: Producer | None = None,
    watch: Watch | None = None,
) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...] | None]:
    """(x with channels innermost, its faces, w's codes or None where no GEMM needs them)."""
    if producer is not None:
        x_last, x_q = x, producer.quantize(plan, need_dw, scales)  # later steps read x's shape alone
    else:
        x_last = layouts.image_last(x, plan.geometry.x_shape)
        x_q = operands.quantize_input(x_last, plan, need_dw, scales, watch)
    for_dgrad = need_dx and ("dgrad" in plan.gemms or plan.recipe.backward_override == "dequantized")
    if "fprop" not in plan.gemms and not for_dgrad:
        return x_last, x_q, None
    w_q = codes if codes is not None else operands.quantize_weight(w, plan, keep=need_dx)
    if watch is not None:
        watch.quantized("weight", w, w_q, None, plan)
    return x_last, x_q, w_q








def backward(
    dy: Tensor,
    kept: dict[str, Tensor],
    plan: Plan,
    like: Like,
    need_dx: bool,
    need_dw: bool,
    need_db: bool,
    scales: Any = None,
    watch: Watch | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dx, dw, db), None where not needed."""
    with torch.no_grad(), torch.autocast(dy.device.type, enabled=False):
        g = plan.geometry
        dy_last = layouts.image_last(dy, g.y_shape)
        dy_q = operands.quantize_gradient(dy_last, plan, need_dx, need_dw, scales, watch)
        if scales is not None:
            scales.backward_ran()
        dx = dw = db = None
        if need_dx:
            dx = gemms.dgrad(dy_last, dy_q, kept, plan, like.x_dtype)
            dx = layouts.image_first(dx, g.x_shape, like.x_shape, like.x_channels_last)
        if need_dw:
            dw = gemms.wgrad(dy_last, dy_q, kept, plan, like.w_dtype)
            if watch is not None:
                watch.weight_gradient(dy_last, dw, plan)
            dw = layouts.kernel_as(dw, g, like.w_shape, like.w_channels_last)
        if need_db:
            db = dy_last.flatten(0, -2).sum(0, dtype=torch.float32).to(like.bias_dtype)
        return dx, dw, db
