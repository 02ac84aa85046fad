"""The autograd Functions: a quantized convolution (or linear layer), and a ReLU that keeps one bit per element.

Everything that backward needs is captured in forward: it runs the same inside and outside of the context. The steps are
plan.py's; x itself is kept only where the recipe wants a GEMM in high precision. A second differentiation of an NVFP4
layer raises.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from te_nvfp4_cv import plan as steps
from te_nvfp4_cv.ops import layouts
from te_nvfp4_cv.ops.relu import apply_mask, masked_relu, positive_mask
from te_nvfp4_cv.plan import Plan
from te_nvfp4_cv.producer import Producer
from te_nvfp4_cv.scaling import CallScales


class QuantizedConv(torch.autograd.Function):
    """x, w, bias -> y for one Plan.

    `frozen` is a weight quantized before (quantize_weight), or None; `scales` says which amaxes x and dy are quantized
    with, None: their own. `producer` makes the operand of an x that was not written; None: x is there.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w: Tensor,
        bias: Tensor | None,
        plan: Plan,
        frozen: tuple[Tensor, ...] | None,
        scales: CallScales | None,
        producer: Producer | None,
    ) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            need_dx, need_dw = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
            if producer is not None:
                x_last, x_q = x, producer.quantize(plan, need_dw, scales)  # the steps below read x's shape alone
            else:
                x_last = layouts.image_last(x, plan.geometry.x_shape)
                x_q = steps.quantize_input(x_last, plan, need_dw, scales)
            w_q = None
            if (
                "fprop" in plan.gemms
                or ("dgrad" in plan.gemms and need_dx)
                or (plan.recipe.backward_override == "dequantized" and need_dx)
            ):
                w_q = frozen if frozen is not None else steps.quantize_weight(w, plan, keep=need_dx)
            y = steps.fprop(x_last, x_q, w, w_q, bias, plan)
            kept = {**steps.kept_of_x(x, x_last, x_q, plan, need_dw), **steps.kept_of_w(w, w_q, plan, need_dx)}
            ctx.kept_names = tuple(kept)
            ctx.save_for_backward(*kept.values())
            ctx.plan, ctx.scales, ctx.x_dtype, ctx.x_dim = plan, scales, x.dtype, x.dim()
            ctx.w_like = (w.dtype, w.shape, layouts.weight_is_channels_last(w))
            ctx.x_channels_last, ctx.bias_dtype, ctx.x_shape = (
                layouts.is_channels_last(x),
                None if bias is None else bias.dtype,
                x.shape,
            )
            return layouts.image_first(y, plan.geometry.y_shape, x.shape, plan.channels_last)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        kept = dict(zip(ctx.kept_names, ctx.saved_tensors, strict=True))
        with torch.no_grad(), torch.autocast(dy.device.type, enabled=False):
            grads: tuple[Tensor | None, ...] = _backward(ctx, dy, kept)
        # create_graph=True: dx depends on w, dw on x, all on dy, and must not look like constants
        if torch.is_grad_enabled():
            leaves = [node.variable for node, _ in ctx.next_functions if hasattr(node, "variable")]
            anchor = torch.zeros((), requires_grad=any(ctx.needs_input_grad[:2]))  # where x is no leaf
            grads = tuple(None if g is None else _NoSecondOrder.apply(g, dy, anchor, *leaves) for g in grads)
        return (*grads, None, None, None, None)


def _backward(ctx: Any, dy: Tensor, kept: dict[str, Tensor]) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    plan: Plan = ctx.plan
    need_dx, need_dw, need_db = ctx.needs_input_grad[:3]
    dy_last = layouts.image_last(dy, plan.geometry.y_shape)
    scales: CallScales | None = ctx.scales
    dy_q = steps.quantize_gradient(dy_last, plan, need_dx, need_dw, scales)
    if scales is not None:
        scales.backward_ran()
    dx = dw = db = None
    if need_dx:
        dx = layouts.image_first(
            steps.dgrad(dy_last, dy_q, kept, plan, ctx.x_dtype), plan.geometry.x_shape, ctx.x_shape, ctx.x_channels_last
        )
    if need_dw:
        dw = layouts.kernel_as(steps.wgrad(dy_last, dy_q, kept, plan, ctx.w_like[0]), plan.geometry, *ctx.w_like[1:])
    if need_db:
        db = dy_last.flatten(0, -2).sum(0, dtype=torch.float32).to(ctx.bias_dtype)
    return dx, dw, db


class _NoSecondOrder(torch.autograd.Function):
    """Identity whose backward explains that NVFP4 layers are differentiable once."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, *depends_on: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> Any:  # type: ignore[override]
        raise RuntimeError(
            "nvfp4: a gradient of an NVFP4 layer was differentiated again.\n"
            "  got:   double backward (create_graph=True, a gradient penalty or a Hessian)\n"
            "  needs: first derivatives only: rounding has no useful second derivative\n"
            "  fix:   run that forward pass under nvfp4_autocast(enabled=False)"
        )


# ---- ReLU -----------------------------------------------------------------------------------------------------------


class MaskedReLU(torch.autograd.Function):
    """ReLU that keeps 1 bit per element for backward; forward and backward equal torch's, bit for bit. x must be
    dense.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, inplace: bool) -> Tensor:
        if inplace:
            torch.relu_(x)
            ctx.mark_dirty(x)
            y, mask = x, positive_mask(x)
        else:
            y, mask = masked_relu(x)
        ctx.save_for_backward(mask)
        ctx.strides = y.stride()
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (mask,) = ctx.saved_tensors
        if dy.stride() != ctx.strides:
            dy = torch.empty_strided(dy.shape, ctx.strides, dtype=dy.dtype, device=dy.device).copy_(dy)
        return _MaskedGrad.apply(dy, mask), None


class _MaskedGrad(torch.autograd.Function):
    """dy times the mask; linear in dy, so that ReLU keeps its second derivative (which is zero in x)."""

    @staticmethod
    def forward(ctx: Any, dy: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(mask)
        ctx.strides = dy.stride()
        return apply_mask(dy, mask)

    @staticmethod
    def backward(ctx: Any, ddx: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (mask,) = ctx.saved_tensors
        if ddx.stride() != ctx.strides:
            ddx = torch.empty_strided(ddx.shape, ctx.strides, dtype=ddx.dtype, device=ddx.device).copy_(ddx)
        return _MaskedGrad.apply(ddx, mask), None
