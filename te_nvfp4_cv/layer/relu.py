"""A ReLU that saves one bit per element for backward instead of its output.

Otherwise ReLU would save the activation that the convolution behind it no longer does, and memory would not fall.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from te_nvfp4_cv.backend.torch_private import is_batched
from te_nvfp4_cv.layer.transforms import many_gradients
from te_nvfp4_cv.ops.relu import apply_mask, masked_relu, relu_in_place


class MaskedReLU(torch.autograd.Function):
    """Compute torch's ReLU, forward and backward bit for bit, from a saved mask. x must be dense."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, inplace: bool) -> Tensor:
        ctx.materialize_grads = False  # as forward_backward.py says
        if inplace:
            ctx.mark_dirty(x)
            y, mask = x, relu_in_place(x)
        else:
            y, mask = masked_relu(x)
        ctx.save_for_backward(mask)
        ctx.strides = y.stride()
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, None]:  # type: ignore[override]
        if dy is None:
            return None, None
        if is_batched(dy):
            raise many_gradients()
        (mask,) = ctx.saved_tensors
        # The mask's bits are in the order of y's memory, so dy must lie as y did.
        if dy.stride() != ctx.strides:
            dy = torch.empty_strided(dy.shape, ctx.strides, dtype=dy.dtype, device=dy.device).copy_(dy)
        return _MaskedGrad.apply(dy, mask), None


class _MaskedGrad(torch.autograd.Function):
    """Multiply dy by the mask. It is linear in dy, so that ReLU keeps its second derivative (which is zero in x)."""

    @staticmethod
    def forward(ctx: Any, dy: Tensor, mask: Tensor) -> Tensor:
        ctx.materialize_grads = False
        ctx.save_for_backward(mask)
        ctx.strides = dy.stride()
        return apply_mask(dy, mask)

    @staticmethod
    def backward(ctx: Any, ddx: Tensor | None) -> tuple[Tensor | None, None]:  # type: ignore[override]
        if ddx is None:
            return None, None
        (mask,) = ctx.saved_tensors
        if ddx.stride() != ctx.strides:  # for the same reason
            ddx = torch.empty_strided(ddx.shape, ctx.strides, dtype=ddx.dtype, device=ddx.device).copy_(ddx)
        return _MaskedGrad.apply(ddx, mask), None
