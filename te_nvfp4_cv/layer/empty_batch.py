"""Let a layer that was given nothing take part in what the ranks share.

A detection head without proposals, or the last batch of an epoch, may be empty on one rank. Torch computes its result,
which is empty, and gradients of zero. But the other ranks wait for this one's amaxes, in forward and in backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from te_nvfp4_cv.backend.torch_private import left_alone
from te_nvfp4_cv.layer import delayed_scaling
from te_nvfp4_cv.layer.plan import Plan
from te_nvfp4_cv.ops.records import NONE
from te_nvfp4_cv.recipe.fields import Role


def without_values(w: Tensor) -> Tensor:
    """Return a weight whose values nobody will read: for one that FSDP2 has gathered as codes, zeros in its place.

    Gradients, which are zeros as well, reach w.
    """
    if not hasattr(type(w), "codes_for"):
        return w
    return _Zeros.apply(w) if torch.is_grad_enabled() and w.requires_grad else _zeros(w)  # type: ignore[no-any-return]


def _zeros(w: Tensor) -> Tensor:
    return torch.zeros((), dtype=w.dtype, device=w.device).expand(w.shape)


class _Zeros(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        return _zeros(w)

    @staticmethod
    def backward(ctx: Any, dw: Tensor | None) -> Tensor | None:  # type: ignore[override]
        return dw


@left_alone  # torch.compile knows that a size is 0, and traces another graph then: this one may have a break
def take_part(y: Tensor, x: Tensor, w: Tensor, bias: Tensor | None, plan: Plan, group: Any) -> Tensor:
    """Return y, computed in high precision from an empty x or to an empty y, and share amaxes of 0.

    Args:
        plan: of the call, as it would be if there were something to quantize.
        group: the ranks that quantize with one amax.
    """
    scales = delayed_scaling.of_call(x, w, bias, plan, group)
    assert scales is not None
    scales.settle()
    grad = torch.is_grad_enabled()
    spec = plan.input_specs[grad and w.requires_grad]
    with torch.no_grad():
        if spec.row != NONE or spec.col != NONE:
            scales.amax(Role.INPUT, x.new_empty(0))
    return _Shared.apply(y, plan, scales, (x.requires_grad, w.requires_grad)) if grad else y  # type: ignore[no-any-return]


class _Shared(torch.autograd.Function):
    """Pass y and dy on, and share the amax of dy, which is 0."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, plan: Plan, scales: Any, needs: tuple[bool, bool]) -> Tensor:
        spec = plan.gradient_specs[needs]
        ctx.scales, ctx.shares = scales, spec.row != NONE or spec.col != NONE
        # As a full batch's node does: reading it lets a checkpoint recompute the forward pass, and share its amaxes.
        ctx.save_for_backward(*([y.new_empty(0)] if ctx.shares else []))
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if ctx.shares:
            _ = ctx.saved_tensors
            ctx.scales.amax(Role.GRAD_OUTPUT, dy.new_empty(0))
        ctx.scales.backward_ran()
        return dy, None, None, None
