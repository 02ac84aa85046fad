"""Views and joins that leave the cut dimension whole."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from te_nvfp4_cv.distributed.spatial import shared
from te_nvfp4_cv.distributed.spatial.tensor import (
    SpatialTensor,
    aligned,
    argument,
    common,
    global_shape,
    handles,
    piece_of,
    place,
    pointwise,
    refusal,
    spatial,
)


@handles("cat", "concat", "concatenate")
def _cat(function: Any, args: Any, kwargs: dict[str, Any]) -> Tensor:
    tensors = list(args[0] if args else kwargs["tensors"])
    x = spatial(tensors)[0]
    layout, from_last = common(spatial(tensors), function.__name__)
    dim = argument(args, kwargs, 1, "dim", kwargs.get("axis", 0)) % x.dim()
    if dim == layout.dim:
        raise refusal("cat along the rows", tensors)
    pieces = [
        piece_of(t) if isinstance(t, SpatialTensor) else aligned(t, layout, from_last, function.__name__)
        for t in tensors
    ]
    return place(torch.cat(pieces, dim), layout)


@handles("stack")
def _stack(function: Any, args: Any, kwargs: dict[str, Any]) -> Tensor:
    tensors = list(args[0])
    layout, _ = common(spatial(tensors), "stack")
    dim = argument(args, kwargs, 1, "dim", 0) % (tensors[0].dim() + 1)
    if len(spatial(tensors)) != len(tensors):
        raise refusal("stack with a whole tensor", tensors)
    y = torch.stack([piece_of(t) for t in tensors], dim)
    return place(y, layout.with_dim(layout.dim + (dim <= layout.dim)))


@handles("chunk", "split", "tensor_split", "unsafe_chunk", "unsafe_split", "unbind")
def _split(function: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Tensor, ...]:
    x, name = args[0], function.__name__
    at = 1 if name == "unbind" else 2
    dim = argument(args, kwargs, at, "dim", 0) % x.dim()
    if dim == x.placed.dim:
        raise refusal(f"{name} along the rows", args)
    layout = x.placed
    if name == "unbind":
        layout = layout.with_dim(layout.dim - (dim < layout.dim))
    return tuple(place(y, layout) for y in function(piece_of(x), *args[1:], **kwargs))


@handles("permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis")
def _permute(function: Any, args: Any, kwargs: dict[str, Any]) -> Tensor:
    x = args[0]
    y = function(piece_of(x), *args[1:], **kwargs)
    # Where the cut dimension goes: a tensor of as many dimensions, whose sizes are their numbers, is moved alike.
    probe = function(torch.empty(tuple(range(2, x.dim() + 2)), device="meta"), *args[1:], **kwargs)
    return place(y, x.placed.with_dim(list(probe.shape).index(x.placed.dim + 2)))


@handles("unsqueeze")
def _unsqueeze(function: Any, args: Any, kwargs: dict[str, Any]) -> Tensor:
    x = args[0]
    dim = argument(args, kwargs, 1, "dim") % (x.dim() + 1)
    return place(piece_of(x).unsqueeze(dim), x.placed.with_dim(x.placed.dim + (dim <= x.placed.dim)))


@handles("squeeze")
def _squeeze(function: Any, args: Any, kwargs: dict[str, Any]) -> Tensor:
    x, dim = args[0], argument(args, kwargs, 1, "dim")
    shape, cut = global_shape(x), x.placed.dim
    wanted = range(x.dim()) if dim is None else [d % x.dim() for d in (dim if isinstance(dim, tuple) else (dim,))]
    gone = [d for d in wanted if shape[d] == 1 and d != cut]
    if cut in wanted and shape[cut] == 1:
        raise refusal("squeeze of the rows", args)
    y = piece_of(x)
    for d in sorted(gone, reverse=True):
        y = y.squeeze(d)
    return place(y, x.placed.with_dim(cut - sum(d < cut for d in gone)))


@handles("view", "reshape", "_unsafe_view")
def _view(function: Any, args: Any, kwargs: dict[str, Any]) -> Tensor:
    """Take a new shape that has the cut dimension and all after it as they are."""
    x = args[0]
    if len(args) == 2 and isinstance(args[1], torch.dtype):
        raise refusal("view(dtype)", args)
    wanted = list(args[1] if len(args) == 2 and isinstance(args[1], (list, tuple)) else args[1:])
    wanted = list(kwargs.get("shape", kwargs.get("size", wanted)))
    shape, cut = global_shape(x), x.placed.dim
    if wanted.count(-1) == 1:
        known = math.prod(n for n in wanted if n != -1)
        wanted[wanted.index(-1)] = shape.numel() // known if known else 0
    dim = len(wanted) - (x.dim() - cut)
    if dim < 0 or wanted[dim:] != list(shape[cut:]):
        raise refusal(function.__name__, args, f"{tuple(shape)} as {tuple(wanted)}")
    wanted[dim] = x.placed.mine.size
    piece = piece_of(x)
    return place(piece.view(wanted) if function.__name__ == "view" else piece.reshape(wanted), x.placed.with_dim(dim))


@handles("flatten")
def _flatten(function: Any, args: Any, kwargs: dict[str, Any]) -> Tensor:
    x = args[0]
    first = argument(args, kwargs, 1, "start_dim", 0) % x.dim()
    last = argument(args, kwargs, 2, "end_dim", -1) % x.dim()
    cut = x.placed.dim
    if first <= cut <= last and first != last:
        raise refusal("flatten", args)
    y = piece_of(x).flatten(first, last)
    return place(y, x.placed.with_dim(cut - (last - first if last < cut else 0)))


@handles("one_hot")
def _one_hot(function: Any, args: Any, kwargs: dict[str, Any]) -> Tensor:
    x, classes = args[0], argument(args, kwargs, 1, "num_classes", -1)
    if classes < 0:
        raise refusal("one_hot without num_classes", args)
    return place(function(piece_of(x), classes), x.placed)


@handles("unflatten")
def _unflatten(function: Any, args: Any, kwargs: dict[str, Any]) -> Tensor:
    x, dim, sizes = args[0], argument(args, kwargs, 1, "dim") % args[0].dim(), argument(args, kwargs, 2, "sizes")
    if dim == x.placed.dim:
        raise refusal("unflatten of the rows", args)
    y = piece_of(x).unflatten(dim, sizes)
    return place(y, x.placed.with_dim(x.placed.dim + (len(sizes) - 1 if dim < x.placed.dim else 0)))


@handles("expand", "expand_as")
def _expand(function: Any, args: Any, kwargs: dict[str, Any]) -> Tensor:
    x = args[0]
    if function.__name__ == "expand_as":
        wanted = list(args[1].shape)
    else:
        wanted = list(args[1] if len(args) == 2 and isinstance(args[1], (list, tuple)) else args[1:])
    from_last = x.dim() - x.placed.dim
    dim = len(wanted) - from_last
    if dim < 0 or wanted[dim] not in (-1, x.placed.rows):
        raise refusal("expand of the rows", args)
    wanted[dim] = -1
    y = piece_of(x).expand(wanted)
    return place(y, x.placed.with_dim(dim))


@handles("where")
def _where(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Choose value by value; where(condition) alone gives the places, which are numbered on the whole image."""
    if len(args) + len(kwargs) < 3:
        raise refusal("where(condition)", args)
    return pointwise(function, args, kwargs)


@handles("flip", "roll")
def _flip(function: Any, args: Any, kwargs: dict[str, Any]) -> Tensor:
    x, rolls = args[0], function.__name__ == "roll"  # without dims, over all of the image
    dims = kwargs.get("dims", args[2:3] if rolls else args[1:])
    flat = [
        d
        for entry in ((dims,) if isinstance(dims, int) else dims)
        for d in (entry if isinstance(entry, (list, tuple)) else (entry,))
    ]
    if not flat or x.placed.dim in [d % x.dim() for d in flat]:
        raise refusal(f"{function.__name__} of the rows", args)
    return place(function(piece_of(x), *args[1:], **kwargs), x.placed)


@handles(
    "softmax", "log_softmax", "cumsum", "normalize", "glu", "softmin", "layer_norm", "rms_norm", "local_response_norm"
)
def _along_a_dimension(function: Any, args: Any, kwargs: dict[str, Any]) -> Tensor:
    """Compute what works along one dimension, which is not the cut one."""
    x, name = args[0], function.__name__
    if name in ("layer_norm", "rms_norm"):
        dims = list(range(x.dim() - len(argument(args, kwargs, 1, "normalized_shape")), x.dim()))
    elif name == "local_response_norm":
        dims = [1]
    else:
        default = {"normalize": 1, "glu": -1}.get(name)
        dims = [argument(args, kwargs, 2 if name == "normalize" else 1, "dim", default)]
        if dims[0] is None:
            raise refusal(f"{name} without a dimension", args)
    if x.placed.dim in [d % x.dim() for d in dims]:
        raise refusal(f"{name} along the rows", args)
    whole = [
        shared.use(a, x.placed.group) if type(a) is not SpatialTensor and isinstance(a, Tensor) else a for a in args[1:]
    ]
    named = {k: shared.use(v, x.placed.group) if isinstance(v, Tensor) else v for k, v in kwargs.items()}
    return place(function(piece_of(x), *whole, **named), x.placed)
