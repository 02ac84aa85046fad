"""The autograd Functions: a quantized convolution (or linear layer), and a ReLU that keeps one bit per element.

Everything that backward needs is captured in forward: it runs the same inside and outside of the context. What runs is
layer.py's. A second differentiation of an NVFP4 layer raises. Under torch.compile the layer is layer_operator.py's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from te_nvfp4_cv.layer import forward_backward, saved
from te_nvfp4_cv.layer.deferred import Producer
from te_nvfp4_cv.layer.delayed_scaling import CallScales
from te_nvfp4_cv.layer.plan import Plan, Watch


class QuantizedConv(torch.autograd.Function):
    """x, w, bias -> y for one Plan.

    `frozen` is a weight quantized before (quantize_weight), or None; `scales` says which amaxes x and dy are quantized
    with, None: their own. `producer` makes the operand of an x that was not written; None: x is there. `watch` is shown
    every operand, forward and backward.
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
        watch: Watch | None,
    ) -> Tensor:
        need_dx, need_dw = ctx.needs_input_grad[:2]
        y, kept = forward_backward.forward(x, w, bias, plan, need_dx, need_dw, frozen, scales, producer, watch)
        ctx.kept_names = tuple(kept)
        ctx.save_for_backward(*kept.values())
        ctx.watch = watch
        ctx.plan, ctx.scales, ctx.like = plan, scales, saved.Like.of(x, w, bias)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        kept = dict(zip(ctx.kept_names, ctx.saved_tensors, strict=True))
        need_dx, need_dw, need_db = ctx.needs_input_grad[:3]
        grads: tuple[Tensor | None, ...]
        grads = forward_backward.backward(
            dy, kept, ctx.plan, ctx.like, need_dx, need_dw, need_db, ctx.scales, ctx.watch
        )
        # create_graph=True: dx depends on w, dw on x, all on dy, and must not look like constants
        if torch.is_grad_enabled():
            leaves = [node.variable for node, _ in ctx.next_functions if hasattr(node, "variable")]
            anchor = torch.zeros((), requires_grad=any(ctx.needs_input_grad[:2]))  # where x is no leaf
            grads = tuple(None if g is None else _NoSecondOrder.apply(g, dy, anchor, *leaves) for g in grads)
        return (*grads, None, None, None, None, None)


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




