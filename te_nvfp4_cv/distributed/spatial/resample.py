"""Interpolation, padding, crops and pixel shuffles: output rows are made of input rows whose numbers all ranks know."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from te_nvfp4_cv.distributed.spatial.halo import fetch
from te_nvfp4_cv.distributed.spatial.rows import Layout, Span
from te_nvfp4_cv.distributed.spatial.tensor import SpatialTensor, argument, handles, named, piece_of, place, refusal
from te_nvfp4_cv.distributed.spatial.windows import nothing

Rows = list[int]


def take(piece: Tensor, layout: Layout, rows: int, sources: Callable[[int], Rows]) -> tuple[Tensor, Span]:
    """Fetch the input rows between the first and the last one that this rank's output rows are made of.

    Args:
        rows: number of output rows.
        sources: output row -> the input rows that it is made of.
    """
    out = layout.with_rows(rows)

    def needs(rank: int) -> Span:
        found = [s for row in range(*out.of(rank)) for s in sources(row)]
        return Span(min(found), max(found) + 1) if found else Span(layout.of(rank).start, layout.of(rank).start)

    cache = {rank: needs(rank) for rank in range(layout.ranks)}
    return fetch(piece, layout, cache.__getitem__), cache[layout.rank]


def _pick(read: Tensor, dim: int, rows: Rows, have: Span) -> Tensor:
    """Return rows (as numbered in the image) of what was fetched."""
    if rows == list(range(have.start, have.end)):
        return read
    return read.index_select(dim, torch.tensor(rows, device=read.device) - have.start)


# ---- interpolation --------------------------------------------------------------------------------------------------


@handles("interpolate", "upsample", "upsample_nearest", "upsample_bilinear")
def _interpolate(function: Any, args: Any, kwargs: dict[str, Any]) -> SpatialTensor:
    name = function.__name__
    names = "input size scale_factor mode align_corners recompute_scale_factor antialias"
    given = named("input size scale_factor mode align_corners" if name == "upsample" else names, args, kwargs)
    x, mode = given["input"], given.get("mode", "bilinear" if name == "upsample_bilinear" else "nearest")
    corners = bool(given.get("align_corners")) or name == "upsample_bilinear"
    if x.placed.dim != 2 or given.get("antialias") or mode in ("bicubic", "area"):
        raise refusal(f"interpolate(mode={mode!r}, antialias={bool(given.get('antialias'))})", args)
    size, factors = _new_size((x.placed.rows, *x.shape[3:]), given)
    piece, layout = _other_axes(piece_of(x), size, factors, mode, corners), x.placed
    scale = layout.rows / size[0] if factors is None else 1 / factors[0]
    if size[0] == layout.rows and mode != "nearest-exact":
        return place(piece, layout)
    if mode.startswith("nearest"):
        if size[0] == 2 * layout.rows and mode == "nearest" and piece.device.type == "cpu":
            scale = 0.5  # torch doubles so on a CPU, whatever factor it was given
        return _of_rows(piece, layout, _nearest(size[0], layout.rows, scale, 0.5 if mode == "nearest-exact" else 0.0))
    return _between_rows(piece, layout, *_linear(size[0], layout.rows, scale, corners))


def _new_size(image: tuple[int, ...], given: dict[str, Any]) -> tuple[list[int], list[float] | None]:
    """Return the output's size, and the factors by which torch scales; None where it takes the ratio of the sizes."""
    size, factor, rank = given.get("size"), given.get("scale_factor"), len(image)
    if size is not None:
        return [size] * rank if isinstance(size, int) else list(size), None
    factors = list(factor) if isinstance(factor, (list, tuple)) else [factor] * rank
    made = [int(n * f) for n, f in zip(image, factors, strict=True)]  # type: ignore[operator]
    return made, None if given.get("recompute_scale_factor") else factors  # type: ignore[return-value]


def _other_axes(piece: Tensor, size: list[int], factors: list[float] | None, mode: str, corners: bool) -> Tensor:
    """Interpolate along all image axes but the cut one, which torch does row by row."""
    if list(piece.shape[3:]) == size[1:]:
        return piece
    if not piece.shape[2]:
        return nothing(piece, (*piece.shape[:2], 0, *size[1:]))
    how: dict[str, Any] = {"size": [piece.shape[2], *size[1:]]}
    if factors is not None:
        how = {"scale_factor": [1.0, *factors[1:]]}
    if not mode.startswith("nearest"):
        how["align_corners"] = corners
    return F.interpolate(piece, mode=mode, **how)


def _of_rows(piece: Tensor, layout: Layout, source: Rows) -> SpatialTensor:
    """Return the image whose row i is row source[i] of this one."""
    out = layout.with_rows(len(source))
    read, have = take(piece, layout, len(source), lambda row: [source[row]])
    return place(_pick(read, layout.dim, source[out.mine.start : out.mine.end], have), out)


def _between_rows(piece: Tensor, layout: Layout, low: Rows, weight: list[float]) -> SpatialTensor:
    """Return the image whose row i lies between rows low[i] and low[i] + 1 of this one: weight[i] of the way."""
    out = layout.with_rows(len(low))
    high = [min(n + 1, layout.rows - 1) for n in low]
    read, have = take(piece, layout, len(low), lambda row: [low[row], high[row]])
    mine = slice(out.mine.start, out.mine.end)
    if not out.mine.size:
        return place(nothing(read, (*read.shape[:2], 0, *read.shape[3:])), out)
    t = torch.tensor(weight[mine], dtype=torch.promote_types(read.dtype, torch.float32), device=read.device)
    t = t.view(-1, *(1,) * (read.dim() - 3))
    upper, lower = _pick(read, 2, low[mine], have), _pick(read, 2, high[mine], have)
    return place((upper * (1 - t) + lower * t).to(read.dtype), out)


def _nearest(rows: int, source: int, scale: float, shift: float) -> Rows:
    """Return the source row of each output row, counted in fp32 as torch counts."""
    index = (torch.arange(rows, dtype=torch.float32) + shift) * torch.tensor(scale, dtype=torch.float32)
    return index.floor().long().clamp(max=source - 1).tolist()  # type: ignore[no-any-return]


def _linear(rows: int, source: int, scale: float, corners: bool) -> tuple[Rows, list[float]]:
    """Return the first source row and the weight of the second one, for each output row."""
    if corners:
        step = (source - 1) / (rows - 1) if rows > 1 else 0.0
        at = torch.arange(rows, dtype=torch.float64) * step
    else:
        at = ((torch.arange(rows, dtype=torch.float64) + 0.5) * scale - 0.5).clamp(min=0)
    low = at.floor().clamp(max=source - 1)
    return low.long().tolist(), (at - low).clamp(0, 1).tolist()


# ---- padding and crops ----------------------------------------------------------------------------------------------


@handles("pad")
def _pad(function: Any, args: Any, kwargs: dict[str, Any]) -> SpatialTensor:
    given = named("input pad mode value", args, kwargs)
    x, pad, mode, value = given["input"], list(given["pad"]), given.get("mode", "constant"), given.get("value")
    layout, piece = x.placed, piece_of(x)
    at = 2 * (x.dim() - 1 - layout.dim)  # where the cut dimension's two numbers are
    before, after = (pad[at], pad[at + 1]) if at + 1 < len(pad) else (0, 0)
    others = [0 if at <= i < at + 2 else n for i, n in enumerate(pad)]
    if any(others) and mode == "constant":
        piece = F.pad(piece, others, mode, value)
    elif any(others):
        if any(others[at + 2 :]):
            raise refusal(f"pad(mode={mode!r}) of other axes than the image's", args)
        piece = _pad_inner(piece, layout.dim, others[:at], mode)
    if not before and not after:
        return place(piece, layout)
    if mode != "constant":
        most = layout.rows - (mode == "reflect")
        if mode != "replicate" and max(before, after) > most:
            raise refusal(f"pad(mode={mode!r}) by {max(before, after)} rows", args, f"{x!r}, which allows {most}")
        return _of_rows(piece, layout, _padded_rows(layout.rows, before, after, mode))
    out = layout.with_rows(layout.rows + before + after)
    return place(fetch(piece, layout, lambda r: _shifted(out.of(r), before), 0.0 if value is None else value), out)


def _pad_inner(piece: Tensor, dim: int, pad: list[int], mode: str) -> Tensor:
    """Pad the axes behind the cut one with values of the image. Torch pads image axes only, and none without rows."""
    lead = piece.shape[: dim + 1]
    if 0 in lead:
        more = [low + high for low, high in zip(pad[::2], pad[1::2], strict=True)][::-1]
        more = [0] * (piece.dim() - len(lead) - len(more)) + more
        return nothing(piece, (*lead, *(n + m for n, m in zip(piece.shape[len(lead) :], more, strict=True))))
    flat = piece.flatten(0, dim)
    padded = F.pad(flat[None] if len(pad) == 2 else flat, pad, mode)
    return (padded[0] if len(pad) == 2 else padded).unflatten(0, lead)


def _shifted(span: Span, by: int) -> Span:
    return Span(span.start - by, span.end - by)


def _padded_rows(rows: int, before: int, after: int, mode: str) -> Rows:
    index = torch.arange(-before, rows + after)
    if mode == "replicate":
        index = index.clamp(0, rows - 1)
    elif mode == "circular":
        index = index % rows
    else:  # reflect, without the border's row twice
        index = index.abs()
        index = torch.where(index >= rows, 2 * (rows - 1) - index, index)
    return index.tolist()  # type: ignore[no-any-return]


@handles("__getitem__")
def _getitem(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    x, key = args
    layout, piece = x.placed, piece_of(x)
    keys = list(key) if isinstance(key, tuple) else [key]
    if any(isinstance(k, (Tensor, list)) for k in keys):
        raise refusal("an index of tensors", args)
    indexed = sum(k is not None and k is not Ellipsis for k in keys)
    if Ellipsis not in keys:
        keys.append(Ellipsis)
    at = next(i for i, k in enumerate(keys) if k is Ellipsis)
    keys[at : at + 1] = [slice(None)] * (x.dim() - indexed)
    dim, crop, out_dim = 0, slice(None), 0
    here: list[Any] = []
    for k in keys:
        if k is None:
            here.append(k)
            out_dim += dim <= layout.dim
            continue
        if dim == layout.dim:
            if not isinstance(k, slice):
                raise refusal("one row of the image", args)
            crop = k
            here.append(slice(None))
        else:
            here.append(k)
            out_dim += isinstance(k, slice) and dim < layout.dim
        dim += 1
    y = piece[tuple(here)]
    start, stop, step = crop.indices(layout.rows)
    layout = layout.with_dim(out_dim)
    if (start, stop, step) == (0, layout.rows, 1):
        return place(y, layout)
    chosen = list(range(start, stop, step))
    if step != 1:
        return _of_rows(y, layout, chosen)
    out = layout.with_rows(len(chosen))
    return place(fetch(y, layout, lambda r: _shifted(out.of(r), -start)), out)


@handles("narrow")
def _narrow(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    x, dim, start, length = args
    key = [slice(None)] * x.dim()
    key[dim % x.dim()] = slice(start, start + length)
    return x[tuple(key)]


@handles("select")
def _select(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    x, dim, index = args
    key: list[Any] = [slice(None)] * x.dim()
    key[dim % x.dim()] = index
    return x[tuple(key)]


@handles("pixel_shuffle")
def _pixel_shuffle(function: Any, args: Any, kwargs: dict[str, Any]) -> SpatialTensor:
    x, factor = args[0], argument(args, kwargs, 1, "upscale_factor", 1)
    if x.placed.dim != x.dim() - 2:
        raise refusal("pixel_shuffle of an image that is not cut along its height", args)
    rows = x.placed.rows * factor
    out = x.placed.with_rows(rows)
    read, have = take(piece_of(x), x.placed, rows, lambda row: [row // factor])
    y = F.pixel_shuffle(read, factor)
    return place(y.narrow(out.dim, out.mine.start - have.start * factor, out.mine.size) if out.mine.size else y, out)


@handles("pixel_unshuffle")
def _pixel_unshuffle(function: Any, args: Any, kwargs: dict[str, Any]) -> SpatialTensor:
    x, factor = args[0], argument(args, kwargs, 1, "downscale_factor", 1)
    rows = x.placed.rows // factor
    out = x.placed.with_rows(rows)
    if x.placed.dim != x.dim() - 2:
        raise refusal("pixel_unshuffle of an image that is not cut along its height", args)
    if x.placed.rows % factor:
        raise refusal("pixel_unshuffle of rows that it does not divide", args)
    read = fetch(piece_of(x), x.placed, lambda r: Span(out.of(r).start * factor, out.of(r).end * factor))
    return place(F.pixel_unshuffle(read, factor), out)
