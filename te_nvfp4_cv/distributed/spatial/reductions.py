"""Sums, means and losses over the image: computed on pieces, added over the ranks; results are whole on every rank."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from te_nvfp4_cv.distributed.spatial import shared
from te_nvfp4_cv.distributed.spatial.tensor import (
    SpatialTensor,
    aligned,
    argument,
    global_shape,
    handles,
    named,
    on_pieces,
    piece_of,
    place,
    pointwise,
    refusal,
)


def _dims(x: SpatialTensor, dim: Any) -> list[int]:
    if dim is None or (isinstance(dim, (list, tuple)) and not dim):
        return list(range(x.dim()))
    return [d % x.dim() for d in (dim if isinstance(dim, (list, tuple)) else (dim,))]


def _after(x: SpatialTensor, y: Tensor, dims: list[int]) -> SpatialTensor:
    """Place the result of a reduction along other dimensions than the cut one, which may have kept them."""
    cut = x.placed.dim
    return place(y, x.placed.with_dim(cut if y.dim() == x.dim() else cut - sum(d < cut for d in dims)))


def _torch_names(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return keywords by torch's names, for which torch takes numpy's too."""
    return {{"axis": "dim", "keepdims": "keepdim"}.get(name, name): value for name, value in kwargs.items()}


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which values of this one are added: sums that become means may be beyond fp16's range."""
    return torch.promote_types(dtype, torch.float32) if dtype.is_floating_point else dtype


@handles("sum", "mean", "nansum")
def _sum(function: Any, args: Any, kwargs: dict[str, Any]) -> Tensor:
    x, name, kwargs = args[0], function.__name__, _torch_names(kwargs)
    if name == "nansum":
        raise refusal(name, args)
    dim = kwargs.pop("dim", args[1] if len(args) > 1 and not isinstance(args[1], torch.dtype) else None)
    keepdim = kwargs.pop("keepdim", args[2] if len(args) > 2 else False)
    dims = _dims(x, dim)
    if x.placed.dim not in dims:
        return _after(x, getattr(torch, name)(piece_of(x), dims, keepdim, **kwargs), dims)
    piece = piece_of(x)
    dtype = getattr(torch, name)(piece.detach().new_zeros(1), **kwargs).dtype  # autocast may decide
    y = shared.total(piece.sum(dims, keepdim, dtype=_wide(dtype)), x.placed.group)
    return (y if name == "sum" else y / math.prod(global_shape(x)[d] for d in dims)).to(dtype)


@handles(
    "amax",
    "amin",
    "max",
    "min",
    "argmax",
    "argmin",
    "all",
    "any",
    "logsumexp",
    "norm",
    "vector_norm",
    "var",
    "std",
    "prod",
    "topk",
    "sort",
    "argsort",
    "median",
)
def _others(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Reduce along other dimensions than the cut one; over all of the image, only what ranks can add."""
    x, name, kwargs = args[0], function.__name__, _torch_names(kwargs)
    if name in ("max", "min") and len(args) > 1 and isinstance(args[1], Tensor):
        return pointwise(torch.maximum if name == "max" else torch.minimum, args, kwargs)
    dim = argument(args, kwargs, 2 if name in ("norm", "vector_norm", "topk") else 1, "dim")
    if name in ("topk", "sort", "argsort") and dim is None:
        dim = -1
    if dim is None or x.placed.dim in _dims(x, dim):
        if dim is None and name in ("amax", "amin", "max", "min", "all", "any"):
            if name in ("all", "any"):
                return _extreme(piece_of(x).bool(), name, x.placed.group)
            return _Extreme.apply(piece_of(x), name, x.placed.group)
        raise refusal(f"{name} over the rows", args)
    y = function(piece_of(x), *args[1:], **kwargs)
    if isinstance(y, Tensor):
        return _after(x, y, _dims(x, dim))
    return type(y)([_after(x, part, _dims(x, dim)) for part in y])


class _Extreme(torch.autograd.Function):
    """The largest or smallest value of all ranks; its gradient is shared by all values that are equal to it."""

    @staticmethod
    def forward(ctx: Any, piece: Tensor, name: str, group: Any) -> Tensor:
        value = _extreme(piece, name, group)
        ctx.save_for_backward(piece, value)
        ctx.group = group
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        piece, value = ctx.saved_tensors
        equal = (piece == value) | (piece.isnan() & value.isnan())
        count = equal.sum()
        dist.all_reduce(count, group=ctx.group)
        return torch.where(equal, (grad / count).to(piece.dtype), 0), None, None


def _extreme(piece: Tensor, name: str, group: Any) -> Tensor:
    """Return the largest or smallest value of all ranks, or NaN where a rank has one."""
    least, sign = name in ("amin", "min", "all"), -1 if name in ("amin", "min", "all") else 1
    wide = piece.to(piece.dtype if piece.is_floating_point() else torch.float64)
    value = wide.new_full((1,), -sign * math.inf)
    if piece.numel():
        value = (wide.amin() if least else wide.amax()).reshape(1)
    # Comparing NaN with a number, gloo keeps either one. So whether a rank has NaN travels beside the value.
    message = torch.cat([torch.where(value.isnan(), -sign * math.inf, value), sign * value.isnan().to(value.dtype)])
    dist.all_reduce(message, op=dist.ReduceOp.MIN if least else dist.ReduceOp.MAX, group=group)
    return torch.where(message[1] != 0, math.nan, message[0]).to(piece.dtype)


@handles("item", "tolist", "__bool__", "__float__", "__int__", "numpy", "__array__", "__format__")
def _values(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    raise refusal(function.__name__, args)


# ---- losses ---------------------------------------------------------------------------------------------------------


@handles("cross_entropy", "nll_loss", "cross_entropy_loss")
def _cross_entropy(function: Any, args: Any, kwargs: dict[str, Any]) -> Tensor:
    names = "input target weight size_average ignore_index reduce reduction label_smoothing"
    given = named(names, args, kwargs)
    if given.pop("size_average", None) is not None or given.pop("reduce", None) is not None:
        raise refusal(f"{function.__name__} with size_average or reduce", args)
    x, target = given.pop("input"), given.pop("target")
    reduction, weight = given.pop("reduction", "mean"), given.get("weight")
    loss = getattr(F, function.__name__.removesuffix("_loss") if "cross" in function.__name__ else "nll_loss")
    if not isinstance(x, SpatialTensor) or x.placed.dim < 2:
        raise refusal(f"{function.__name__} of scores that are not cut along an image axis", args)
    by_class = target.dim() < x.dim()  # class numbers, not probabilities
    labels = x.placed.with_dim(x.placed.dim - by_class)
    if not isinstance(target, SpatialTensor):
        target = place(aligned(target, labels, target.dim() - labels.dim, function.__name__), labels)
    piece, target = piece_of(x), piece_of(target)
    if reduction == "none":
        return place(loss(piece, target, reduction="none", **given), x.placed.with_dim(x.placed.dim - 1))
    one = piece.detach().new_zeros(1, 2)
    dtype = loss(one, one[:, 0].long() if by_class else one).dtype  # autocast may decide
    piece, target = piece.to(_wide(piece.dtype)), target.to(_wide(target.dtype))
    given["weight"] = None if weight is None else weight.to(_wide(weight.dtype))
    value = loss(piece, target, reduction="sum", **given) if piece.numel() else piece.sum() * 0
    value = shared.total(value, x.placed.group)
    if reduction == "sum":
        return value.to(dtype)
    if not by_class:
        return (value / (global_shape(x).numel() // x.shape[1])).to(dtype)
    kept = target != given.get("ignore_index", -100)
    counts = kept if weight is None else weight.detach()[target.clamp(0, x.shape[1] - 1)] * kept
    total = counts.sum(dtype=torch.float64)
    dist.all_reduce(total, group=x.placed.group)
    return (value / total.to(value.dtype)).to(dtype)


@handles(
    "mse_loss",
    "l1_loss",
    "smooth_l1_loss",
    "huber_loss",
    "binary_cross_entropy",
    "binary_cross_entropy_with_logits",
    "kl_div",
    "soft_margin_loss",
    "poisson_nll_loss",
)
def _elementwise_loss(function: Any, args: Any, kwargs: dict[str, Any]) -> Tensor:
    name = function.__name__
    reduction = kwargs.pop("reduction", "mean")
    numbers = args[4 if name == "poisson_nll_loss" else 2 :]  # which has two switches of its own
    old = any(kwargs.pop(key, None) is not None for key in ("size_average", "reduce"))
    if old or any(isinstance(a, (str, bool)) for a in numbers) or reduction == "batchmean":
        raise refusal(f"{name} with this reduction", args)
    values, keywords, layout, from_last = on_pieces(name, args, kwargs)
    if reduction == "none":
        y = function(*values, reduction="none", **keywords)
        return place(y, layout.with_dim(y.dim() - from_last))
    one = lambda a: a.detach().new_zeros(1) if isinstance(a, Tensor) else a  # noqa: E731
    ones = {key: one(a) for key, a in keywords.items()}
    dtype = function(*map(one, values), reduction="sum", **ones).dtype  # autocast may decide
    wide = lambda a: a.to(_wide(a.dtype)) if isinstance(a, Tensor) else a  # noqa: E731
    value = function(*map(wide, values), reduction="sum", **{key: wide(a) for key, a in keywords.items()})
    value = shared.total(value, layout.group)
    if reduction == "sum":
        return value.to(dtype)
    weight = keywords.get("weight") if name in ("mse_loss", "l1_loss") else None
    if weight is not None:  # these two divide by its sum
        return (value / shared.total(weight.sum(dtype=_wide(weight.dtype)), layout.group)).to(dtype)
    given = named("input target", args, kwargs)
    sizes = [global_shape(t) if isinstance(t, SpatialTensor) else t.shape for t in (given["input"], given["target"])]
    return (value / math.prod(torch.broadcast_shapes(*sizes))).to(dtype)
