"""Tensors that all ranks hold whole, where they meet tensors that are cut: identity one way, a sum the other way.

    use        a whole tensor (a parameter) enters work on pieces    backward: gradients of all ranks are added
    own_rows   a whole image enters: this rank takes its rows        backward: the pieces' gradients are put together
    total      sums of pieces become one whole number                forward: ranks' sums are added

A loss that every rank computes from whole tensors is the same on every rank, and each starts backward with 1; so the
gradient of a whole tensor is whole wherever it is, and `total` passes it on as it is. A second differentiation raises:
what ranks exchange has no history.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from te_nvfp4_cv.distributed.spatial.rows import Layout


def _sum(t: Tensor, group: Any) -> Tensor:
    """Return the sum over the ranks, added in fp32 or more; of integers, as they are."""
    wide = (t.to(torch.promote_types(t.dtype, torch.float32)) if t.is_floating_point() else t).contiguous()
    wide = wide.clone() if wide.data_ptr() == t.data_ptr() else wide
    dist.all_reduce(wide, group=group)
    return wide.to(t.dtype)


class _Use(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, t: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return t.view_as(t)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _sum(grad, ctx.group), None


class _OwnRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, t: Tensor, layout: Layout) -> Tensor:
        ctx.layout, ctx.shape = layout, t.shape
        return t.narrow(layout.dim, layout.mine.start, layout.mine.size).clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        layout = ctx.layout
        whole = grad.new_zeros(ctx.shape)
        whole.narrow(layout.dim, layout.mine.start, layout.mine.size).copy_(grad)
        return _sum(whole, layout.group), None


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, t: Tensor, group: Any) -> Tensor:
        return _sum(t, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, t: Tensor, layout: Layout) -> Tensor:
        ctx.layout = layout
        sizes = [layout.of(rank).size for rank in range(layout.ranks)]
        longest, dim = max(sizes), layout.dim
        padded = t.new_zeros((*t.shape[:dim], longest, *t.shape[dim + 1 :]))
        padded.narrow(dim, 0, t.shape[dim]).copy_(t)
        pieces = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(pieces, padded, group=layout.group)
        return torch.cat([p.narrow(dim, 0, size) for p, size in zip(pieces, sizes, strict=True)], dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        layout = ctx.layout
        return grad.narrow(layout.dim, layout.mine.start, layout.mine.size).contiguous(), None


def use(t: Tensor, group: Any) -> Tensor:
    """Return a whole tensor for work on pieces."""
    return _Use.apply(t, group) if torch.is_grad_enabled() and t.requires_grad else t  # type: ignore[no-any-return]


def own_rows(t: Tensor, layout: Layout) -> Tensor:
    """Return this rank's rows of a whole tensor."""
    return _OwnRows.apply(t, layout)  # type: ignore[no-any-return]


def total(t: Tensor, group: Any) -> Tensor:
    """Return the sum over the ranks of sums over their pieces."""
    return _Total.apply(t, group)  # type: ignore[no-any-return]


def gathered(t: Tensor, layout: Layout) -> Tensor:
    """Return the whole tensor on every rank."""
    return _Gather.apply(t, layout)  # type: ignore[no-any-return]
