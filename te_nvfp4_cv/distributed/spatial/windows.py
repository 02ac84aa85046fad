"""Pooling, and convolutions in high precision: each rank fetches the rows that its output rows read."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from te_nvfp4_cv.distributed.spatial import shared
from te_nvfp4_cv.distributed.spatial.halo import fetch
from te_nvfp4_cv.distributed.spatial.rows import Layout, Span, Window
from te_nvfp4_cv.distributed.spatial.tensor import SpatialTensor, handles, named, piece_of, place, refusal
from te_nvfp4_cv.errors import describe
from te_nvfp4_cv.ops.geometry import ConvArgs, int_tuple, output_size, transposed_output_size


def rows_read(x: Layout, window: Window, out_rows: int, fill: float = 0.0) -> Callable[[Tensor], Tensor]:
    """Return what fetches the input rows under this rank's output rows, with `fill` for rows of the padding."""
    out = x.with_rows(out_rows)
    return lambda piece: fetch(piece, x, lambda rank: window.reads(out.of(rank)), fill)


def nothing(read: Tensor, shape: tuple[int, ...], *others: Tensor | None) -> Tensor:
    """Return an empty tensor that depends on what a rank with output rows would have used.

    Its backward takes part in the exchanges that other ranks wait for.
    """
    anchor = read.sum() * 0
    for other in others:
        anchor = anchor if other is None else anchor + other.sum() * 0
    return read.new_zeros(shape) + anchor.to(read.dtype)


# ---- convolutions ---------------------------------------------------------------------------------------------------


def convolution(op: str, x: Tensor, w: Tensor, bias: Tensor | None, args: ConvArgs, layout: Layout) -> SpatialTensor:
    """Run a convolution on this rank's rows, in high precision.

    Args:
        op: conv1d to conv3d, or conv_transpose1d to conv_transpose3d.
        x: this rank's piece [B, C, *image].
        args: with padding as numbers.
        layout: of x; the first image axis is cut.
    """
    rank = w.dim() - 2
    stride, padding, dilation = (
        int_tuple(v, rank, op, n)
        for v, n in zip((args.stride, args.padding, args.dilation), ("stride", "padding", "dilation"), strict=True)
    )
    extra = int_tuple(args.output_padding, rank, op, "output_padding")
    w, bias = shared.use(w, layout.group), None if bias is None else shared.use(bias, layout.group)
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    window = Window(w.shape[2], stride[0], padding[0], dilation[0])
    sizes = list(zip(x.shape[2:], w.shape[2:], stride, padding, dilation, strict=True))
    transposed = "transpose" in op
    if transposed:
        rows = transposed_output_size(layout.rows, w.shape[2], *(v[0] for v in (stride, padding, dilation, extra)))
        others = [transposed_output_size(*size, more) for size, more in zip(sizes[1:], extra[1:], strict=True)]
    else:
        rows = output_size(layout.rows, w.shape[2], *(v[0] for v in (stride, padding, dilation)))
        others = [output_size(*size) for size in sizes[1:]]
    out = layout.with_rows(_at_least_one(rows, op, x))
    channels = w.shape[1] * args.groups if transposed else w.shape[0]
    shape = (x.shape[0], channels, out.mine.size, *others)
    if not transposed:
        read = rows_read(layout, window, rows)(x)
        if not out.mine.size:
            return place(nothing(read, shape, w, bias), out)
        y = getattr(F, op)(read, w, bias, stride, (0, *padding[1:]), dilation, args.groups)
        return place(y, out)
    needs = lambda r: window.reached_from(out.of(r), layout.rows)  # noqa: E731
    read = fetch(x, layout, needs)
    mine, from_rows = out.mine, needs(layout.rank)
    if not from_rows.size or not mine.size:
        y = nothing(read, shape, w)
    else:
        y = getattr(F, op)(read, w, None, stride, (0, *padding[1:]), (0, *extra[1:]), args.groups, dilation)
        y = cropped(y, 2, from_rows.start * stride[0] - padding[0], mine)
    return place(y if bias is None else y + bias.to(y.dtype).view(-1, *(1,) * rank), out)


def _at_least_one(rows: int, name: str, x: Tensor) -> int:
    """Return the number of output rows.

    Raises:
        ValueError: there are none: the window is larger than the image.
    """
    if rows < 1:
        raise refusal(name, (), f"a window of more rows than the image and its padding have, {describe(x)} on a rank")
    return rows


def cropped(y: Tensor, dim: int, start: int, wanted: Span) -> Tensor:
    """Return rows `wanted` of y, whose first row is row `start`; rows that y does not have are zeros."""
    have = Span(start, start + y.shape[dim]).within(wanted)
    y = y.narrow(dim, have.start - start, have.size) if have.size else y.narrow(dim, 0, 0)
    before, after = (have.start - wanted.start, wanted.end - have.end) if have.size else (wanted.size, 0)
    if not before and not after:
        return y
    pad = [0, 0] * (y.dim() - dim - 1) + [before, after]
    return F.pad(y, pad)


# ---- pooling --------------------------------------------------------------------------------------------------------


def _pooled_size(size: int, kernel: int, stride: int, padding: int, dilation: int, ceil_mode: bool) -> int:
    """Return the output length of a pooling along one axis, as torch counts it."""
    free = size + 2 * padding - dilation * (kernel - 1) - 1 + (stride - 1 if ceil_mode else 0)
    out = free // stride + 1
    # In ceil_mode the last window must begin inside of the image or of the padding before it.
    return out - 1 if ceil_mode and (out - 1) * stride >= size + padding else out


@handles("max_pool1d", "max_pool2d", "max_pool3d", "_max_pool1d", "_max_pool2d", "_max_pool3d")
def _max_pool(function: Any, args: Any, kwargs: dict[str, Any]) -> SpatialTensor:
    given = named("input kernel_size stride padding dilation ceil_mode return_indices", args, kwargs)
    x = given["input"]
    rank = int(function.__name__[-2])
    if given.get("return_indices"):
        raise refusal("max pooling with return_indices", args)
    _check_rows(x, rank, args)
    kernel, stride, padding, dilation = _sizes(given, rank)
    ceil_mode = bool(given.get("ceil_mode"))
    layout, w = x.placed, Window(kernel[0], stride[0], padding[0], dilation[0])
    rows = _at_least_one(_pooled_size(layout.rows, *w, ceil_mode), function.__name__, piece_of(x))
    out = layout.with_rows(rows)
    read = rows_read(layout, w, rows, -math.inf)(piece_of(x))
    pool = getattr(F, f"max_pool{rank}d")
    # Cut to whole windows and filled with -inf above, so there is no padding and nothing to round up along the rows.
    if not out.mine.size:
        others = [
            _pooled_size(n, k, s, p, d, ceil_mode)
            for n, k, s, p, d in zip(read.shape[3:], kernel[1:], stride[1:], padding[1:], dilation[1:], strict=True)
        ]
        return place(nothing(torch.nan_to_num(read), (*read.shape[:2], 0, *others)), out)
    return place(pool(read, kernel, stride, (0, *padding[1:]), dilation, ceil_mode), out)


@handles("avg_pool1d", "avg_pool2d", "avg_pool3d")
def _avg_pool(function: Any, args: Any, kwargs: dict[str, Any]) -> SpatialTensor:
    given = named("input kernel_size stride padding ceil_mode count_include_pad divisor_override", args, kwargs)
    x, divisor = given["input"], given.get("divisor_override")
    rank = int(function.__name__[-2])
    _check_rows(x, rank, args)
    kernel, stride, padding, _ = _sizes(given, rank)
    ceil_mode, include = bool(given.get("ceil_mode")), given.get("count_include_pad", True)
    layout, w = x.placed, Window(kernel[0], stride[0], padding[0], 1)
    rows = _at_least_one(_pooled_size(layout.rows, *w, ceil_mode), function.__name__, piece_of(x))
    out, piece = layout.with_rows(rows), piece_of(x)
    if any(padding) or ceil_mode:
        # Windows that reach beyond the image divide by fewer values: means of the values, by means of ones.
        return _divided(piece, layout, w, out, (kernel, stride, padding), (rank, ceil_mode, include, divisor))
    read = rows_read(layout, w, rows)(piece)
    if not out.mine.size:
        others = [
            _pooled_size(n, k, s, 0, 1, False) for n, k, s in zip(read.shape[3:], kernel[1:], stride[1:], strict=True)
        ]
        return place(nothing(read, (*read.shape[:2], 0, *others)), out)
    more = {} if rank == 1 or divisor is None else {"divisor_override": divisor}
    return place(getattr(F, f"avg_pool{rank}d")(read, kernel, stride, 0, **more), out)


def _divided(piece: Tensor, layout: Layout, w: Window, out: Layout, sizes: Any, how: Any) -> SpatialTensor:
    (kernel, stride, padding), (rank, ceil_mode, include, divisor) = sizes, how
    image = piece.shape[3:]
    others = [
        _pooled_size(n, k, s, p, 1, ceil_mode)
        for n, k, s, p in zip(image, kernel[1:], stride[1:], padding[1:], strict=True)
    ]
    ends = [
        max(n + p, (o - 1) * s - p + k)
        for n, k, s, p, o in zip(image, kernel[1:], stride[1:], padding[1:], others, strict=True)
    ]
    pads = [v for n, p, end in reversed(list(zip(image, padding[1:], ends, strict=True))) for v in (p, end - n)]

    def read(t: Tensor) -> Tensor:
        return F.pad(rows_read(layout, w, out.rows)(t), pads)

    values = read(piece)
    if not out.mine.size:
        return place(nothing(values, (*values.shape[:2], 0, *others)), out)
    taps = math.prod(kernel)
    pool = getattr(F, f"avg_pool{rank}d")
    means = pool(values, kernel, stride)
    wide = torch.promote_types(means.dtype, torch.float32)  # of fp16, sums might be beyond the range
    if divisor is not None:
        return place((means.to(wide) * (taps / divisor)).to(means.dtype), out)
    # What counts: the image, and with count_include_pad the padding too, but never what ceil_mode adds at the end.
    mask = piece.new_zeros((1, 1, values.shape[2], *values.shape[3:]), dtype=wide)
    first = w.reads(out.mine).start
    low, high = (-w.padding, layout.rows + w.padding) if include else (0, layout.rows)
    counted = Span(first, first + values.shape[2]).within(Span(low, high))
    inner = mask.narrow(2, counted.start - first, counted.size)
    for axis, (n, p) in enumerate(zip(image, padding[1:], strict=True), start=3):
        inner = inner.narrow(axis, 0, n + 2 * p) if include else inner.narrow(axis, p, n)
    inner.fill_(1)
    return place((means.to(wide) / pool(mask, kernel, stride)).to(means.dtype), out)


@handles(
    "adaptive_avg_pool1d",
    "adaptive_avg_pool2d",
    "adaptive_avg_pool3d",
    "adaptive_max_pool1d",
    "adaptive_max_pool2d",
    "adaptive_max_pool3d",
)
def _adaptive(function: Any, args: Any, kwargs: dict[str, Any]) -> Tensor:
    given = named("input output_size return_indices", args, kwargs)
    x, name = given["input"], function.__name__
    rank = int(name[-2])
    size = given["output_size"]
    size = [size] * rank if isinstance(size, int) or size is None else list(size)
    _check_rows(x, rank, args)
    layout, piece = x.placed, piece_of(x)
    if given.get("return_indices"):
        raise refusal(f"{name} with return_indices", args)
    pool = getattr(F, name)
    others = [n if s is None else s for n, s in zip(piece.shape[3:], size[1:], strict=True)]
    if size[0] == 1 and "avg" in name:
        # Means over this rank's rows, by their share of all rows; the result is whole on every rank.
        rows = piece.shape[2]
        means = pool(piece, [1, *others]) if rows else nothing(piece, (*piece.shape[:2], 1, *others))
        wide = means.to(torch.promote_types(means.dtype, torch.float32)) * (rows / layout.rows)
        return shared.total(wide, layout.group).to(means.dtype)
    if size[0] not in (None, layout.rows):
        if layout.rows % size[0]:
            raise refusal(f"{name} to {size[0]} rows of {layout.rows}", args)
        # Equal windows: an ordinary pooling along the rows.
        kernel, average = [layout.rows // size[0]] + [1] * (rank - 1), "avg" in name
        plain = getattr(F, f"{'avg' if average else 'max'}_pool{rank}d")
        pooled = _avg_pool(plain, (x, kernel), {}) if average else _max_pool(plain, (x, kernel), {})
        piece, layout = piece_of(pooled), pooled.placed
    rows = piece.shape[2]
    y = pool(piece, [rows, *others]) if rows else nothing(piece, (*piece.shape[:2], 0, *others))
    return place(y, layout)


def _check_rows(x: SpatialTensor, rank: int, args: Any) -> None:
    if x.dim() != rank + 2 or x.placed.dim != 2:
        raise refusal("pooling of an image that is not cut along its first image axis", args)


def _sizes(given: dict[str, Any], rank: int) -> list[tuple[int, ...]]:
    """Return kernel, stride, padding and dilation of a pooling."""
    kernel = int_tuple(given["kernel_size"], rank, "pooling", "kernel_size")
    stride = given.get("stride")
    stride = kernel if stride is None or stride == [] else int_tuple(stride, rank, "pooling", "stride")
    return [
        kernel,
        stride,
        int_tuple(given.get("padding", 0), rank, "pooling", "padding"),
        int_tuple(given.get("dilation", 1), rank, "pooling", "dilation"),
    ]
