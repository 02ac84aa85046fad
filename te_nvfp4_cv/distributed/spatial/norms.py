"""Batch, group and instance norms whose statistics are those of the whole image, and PReLU with a slope a channel."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from te_nvfp4_cv.distributed.spatial import shared
from te_nvfp4_cv.distributed.spatial.tensor import handles, named, piece_of, place, refusal


class _Normalize(torch.autograd.Function):
    """Compute (x - mean) / sqrt(var + eps) * w + b of x [B, C, *image], with mean and var over all ranks.

    Saves x as it came, and two numbers per group of channels (and image).
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: Tensor | None, b: Tensor | None, groups: int | None, eps: float, group: Any
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        # By image and group of channels; batch norm has a group for each channel, and one statistic for all images.
        shape = (x.shape[0], x.shape[1] if groups is None else groups, -1)
        dims = (0, 2) if groups is None else (2,)
        wide = x.to(torch.promote_types(x.dtype, torch.float32)).reshape(shape[0], shape[1], -1)
        sums = torch.cat([wide.sum(dims).flatten(), wide.new_tensor([wide.numel() / max(1, wide.sum(dims).numel())])])
        dist.all_reduce(sums, group=group)
        count = sums[-1]
        mean = (sums[:-1] / count).view(-1, shape[1])  # [B or 1, groups]
        var = (wide - mean[:, :, None]).square_().sum(dims).flatten()
        dist.all_reduce(var, group=group)
        var = (var / count).view_as(mean)
        rstd = torch.rsqrt(var + eps)
        scale, shift = _per_channel(rstd, mean, w, b, x.shape[1])
        view = (*scale.shape, *(1,) * (x.dim() - 2))
        y = torch.addcmul(shift.view(view), x.to(scale.dtype), scale.view(view)).to(x.dtype)
        ctx.save_for_backward(x, w, mean, rstd, count)
        ctx.group, ctx.groups, ctx.has_bias = group, groups, b is not None
        ctx.mark_non_differentiable(mean, var, count)
        return y, mean, var, count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, w, mean, rstd, count = ctx.saved_tensors
        channels = x.shape[1]
        flat = dy.to(mean.dtype).reshape(dy.shape[0], channels, -1)
        xf = x.to(mean.dtype).reshape(flat.shape)
        dys, dyx = flat.sum(2), torch.einsum("bcp,bcp->bc", flat, xf)  # [B, C]
        each = channels // mean.shape[1]
        m, r = mean.repeat_interleave(each, 1), rstd.repeat_interleave(each, 1)
        normalized = (dyx - m * dys) * r  # sum of dy * x_hat, [B, C]
        dw = normalized.sum(0) if w is not None else None
        db = dys.sum(0) if ctx.has_bias else None
        gain = torch.ones_like(mean[:1, :1]) if w is None else w.to(mean.dtype)[None]
        sums = torch.stack([dys * gain, normalized * gain]).unflatten(2, (mean.shape[1], each)).sum(3)  # [2, B, groups]
        sums = sums.sum(1, keepdim=True) if ctx.groups is None else sums
        sums = sums.contiguous()
        dist.all_reduce(sums, group=ctx.group)
        first, second = (sums / count).repeat_interleave(each, 2)
        # dx = rstd * (dy * w - mean(dy * w) - x_hat * mean(dy * w * x_hat)), as a sum of dy, x and a constant
        a, c = r * gain, -r * r * second
        const = -r * first - c * m
        view = (-1, channels, *(1,) * (x.dim() - 2))
        dx = dy.to(mean.dtype) * a.view(view)
        dx = dx.addcmul_(x.to(mean.dtype), c.view(view)).add_(const.view(view))
        like = w.dtype if w is not None else x.dtype
        return (
            dx.to(x.dtype),
            None if dw is None else dw.to(like),
            None if db is None else db.to(like),
            None,
            None,
            None,
        )


def _per_channel(
    rstd: Tensor, mean: Tensor, w: Tensor | None, b: Tensor | None, channels: int
) -> tuple[Tensor, Tensor]:
    """Return scale and shift [B or 1, C] of a norm."""
    each = channels // rstd.shape[1]
    scale, mean = rstd.repeat_interleave(each, 1), mean.repeat_interleave(each, 1)
    scale = scale if w is None else scale * w.to(scale.dtype)
    return scale, -mean * scale if b is None else b.to(scale.dtype) - mean * scale


@handles("batch_norm")
def _batch_norm(function: Any, args: Any, kwargs: dict[str, Any]) -> Tensor:
    given = named(_names(function, "training"), args, kwargs)
    x, running = given["input"], (given.get("running_mean"), given.get("running_var"))
    w, b = _whole(x, given)
    if not given.get("training", False):
        return place(F.batch_norm(piece_of(x), *running, w, b, False, 0.0, given.get("eps", 1e-5)), x.placed)
    if x.dim() < 3 or x.placed.dim < 2:
        raise refusal("batch_norm of an image whose channels or images are cut", args)
    y, mean, var, count = _Normalize.apply(piece_of(x), w, b, None, given.get("eps", 1e-5), x.placed.group)
    if running[0] is not None and running[1] is not None:
        momentum = given.get("momentum", 0.1)
        with torch.no_grad():
            running[0].lerp_(mean.flatten().to(running[0].dtype), momentum)
            unbiased = var.flatten() * (count / (count - 1).clamp(min=1))
            running[1].lerp_(unbiased.to(running[1].dtype), momentum)
    return place(y, x.placed)


@handles("group_norm")
def _group_norm(function: Any, args: Any, kwargs: dict[str, Any]) -> Tensor:
    given = named("input num_groups weight bias eps", args, kwargs)
    x = given["input"]
    if x.placed.dim < 2:
        raise refusal("group_norm of an image whose channels or images are cut", args)
    w, b = _whole(x, given)
    y, *_ = _Normalize.apply(piece_of(x), w, b, given["num_groups"], given.get("eps", 1e-5), x.placed.group)
    return place(y, x.placed)


@handles("instance_norm")
def _instance_norm(function: Any, args: Any, kwargs: dict[str, Any]) -> Tensor:
    given = named(_names(function, "use_input_stats"), args, kwargs)
    x = given["input"]
    if x.placed.dim < 2:
        raise refusal("instance_norm of an image whose channels or images are cut", args)
    w, b = _whole(x, given)
    if not given.get("use_input_stats", True):
        running = given["running_mean"], given["running_var"]
        return place(F.batch_norm(piece_of(x), *running, w, b, False, 0.0, given.get("eps", 1e-5)), x.placed)
    if given.get("running_mean") is not None:
        raise refusal("instance_norm with running statistics", args)
    y, *_ = _Normalize.apply(piece_of(x), w, b, x.shape[1], given.get("eps", 1e-5), x.placed.group)
    return place(y, x.placed)


def _names(function: Any, training: str) -> str:
    """Return the order of a norm's arguments: torch.batch_norm has another one than torch.nn.functional.batch_norm."""
    first, second = "running_mean running_var", "weight bias"
    if function in (torch.batch_norm, torch.instance_norm):
        first, second = second, first
    return f"input {first} {second} {training} momentum eps cudnn_enabled"


@handles("prelu")
def _prelu(function: Any, args: Any, kwargs: dict[str, Any]) -> Tensor:
    given = named("input weight", args, kwargs)
    x, slopes = given["input"], given["weight"]
    if slopes.numel() > 1 and x.placed.dim < 2:
        raise refusal("prelu of an image whose channels are cut", args)
    return place(torch.prelu(piece_of(x), shared.use(slopes, x.placed.group)), x.placed)


def _whole(x: Any, given: dict[str, Any]) -> list[Tensor | None]:
    """Return the norm's weight and bias, for work on pieces."""
    values = (given.get("weight"), given.get("bias"))
    return [None if v is None else shared.use(v, x.placed.group) for v in values]
