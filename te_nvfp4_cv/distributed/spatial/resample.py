"""Interpolation, padding, crops and pixel shuffles: output rows are made of input rows whose numbers all ranks know."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from te_nvfp4_cv.distributed.spatial.halo import fetch
from te_nvfp4_cv.distributed.spatial.rows import Layout, Span
from te_nvfp4_cv.distributed.spatial.tensor import SpatialTensor, handles, piece_of, place, refusal
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
    names: tuple[str, ...] = (
        "input", "size", "scale_factor", "mode", "align_corners", "recompute_scale_factor", "antialias",
    )  # fmt: skip
    if function.__name__ == "upsample":
        names = names[:5]
    named = {**dict(zip(names, args, strict=False)), **kwargs}
    default = "bilinear" if function.__name__ == "upsample_bilinear" else "nearest"
    x, mode, corners = named["input"], named.get("mode", default), bool(named.get("align_corners"))
    corners = corners or function.__name__ == "upsample_bilinear"
    if x.placed.dim != 2 or named.get("antialias") or mode in ("bicubic", "area"):
        raise refusal(f"interpolate(mode={mode!r}, antialias={bool(named.get('antialias'))})", args)
    piece, layout, rank = piece_of(x), x.placed, x.dim() - 2
    image = (layout.rows, *piece.shape[3:])
    size, factor = named.get("size"), named.get("scale_factor")
    factors: list[float | None] = [None] * rank
    if size is None:
        factors = list(factor) if isinstance(factor, (list, tuple)) else [factor] * rank
        size = [int(n * f) for n, f in zip(image, factors, strict=True)]  # type: ignore[operator]
        if named.get("recompute_scale_factor"):
            factors = [None] * rank
    size = [size] * rank if isinstance(size, int) else list(size)
    rows, out = size[0], layout.with_rows(size[0])
    # The other axes first, on this rank's rows; along the rows this is the identity.
    if rank > 1 and (list(piece.shape[3:]) != size[1:]):
        smooth = {} if mode.startswith("nearest") else {"align_corners": corners}
        # With size given torch takes the ratio of sizes as scale, with a factor the factor itself.
        how: dict[str, Any] = (
            {"size": [piece.shape[2], *size[1:]]} if factors[0] is None else {"scale_factor": [1.0, *factors[1:]]}
        )
        if piece.shape[2]:
            piece = F.interpolate(piece, mode=mode, **how, **smooth)
        else:
            piece = nothing(piece, (*piece.shape[:2], 0, *size[1:]))
    scale = 1 / factors[0] if factors[0] is not None else layout.rows / rows
    if rows == layout.rows and mode != "nearest-exact":
        return place(piece, out)
    if mode.startswith("nearest"):
        shift = 0.5 if mode == "nearest-exact" else 0.0
        source = _nearest(rows, layout.rows, scale, shift)
        read, have = take(piece, layout, rows, lambda row: [source[row]])
        wanted = source[out.mine.start : out.mine.end]
        return place(_pick(read, 2, wanted, have) if wanted else nothing(read, _empty(read)), out)
    low, weight = _linear(rows, layout.rows, scale, corners)
    high = [min(n + 1, layout.rows - 1) for n in low]
    read, have = take(piece, layout, rows, lambda row: [low[row], high[row]])
    mine = slice(out.mine.start, out.mine.end)
    if not out.mine.size:
        return place(nothing(read, _empty(read)), out)
    t = torch.tensor(weight[mine], dtype=torch.promote_types(read.dtype, torch.float32), device=read.device)
    t = t.view(-1, *(1,) * (read.dim() - 3))
    upper, lower = _pick(read, 2, low[mine], have), _pick(read, 2, high[mine], have)
    return place((upper * (1 - t) + lower * t).to(read.dtype), out)


def _empty(read: Tensor) -> tuple[int, ...]:
    return (*read.shape[:2], 0, *read.shape[3:])


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
    named = {**dict(zip(("input", "pad", "mode", "value"), args, strict=False)), **kwargs}
    x, pad, mode = named["input"], list(named["pad"]), named.get("mode", "constant")
    value = named.get("value")
    layout, piece = x.placed, piece_of(x)
    at = 2 * (x.dim() - 1 - layout.dim)  # where the cut dimension's two numbers are
    before, after = (pad[at], pad[at + 1]) if at + 1 < len(pad) else (0, 0)
    others = [0 if at <= i < at + 2 else n for i, n in enumerate(pad)]
    if any(others):
        if mode == "constant":
            piece = F.pad(piece, others, mode, value)
        else:  # torch pads the image axes only, and no axis without rows
            inner = others[:at]
            if any(others[at + 2 :]):
                raise refusal(f"pad(mode={mode!r}) of other axes than the image's", args)
            lead = piece.shape[: layout.dim + 1]
            if 0 in lead:
                more = [low + high for low, high in zip(inner[::2], inner[1::2], strict=True)][::-1]
                more = [0] * (piece.dim() - len(lead) - len(more)) + more
                piece = nothing(piece, (*lead, *(n + m for n, m in zip(piece.shape[len(lead) :], more, strict=True))))
            else:
                flat = piece.flatten(0, layout.dim)
                padded = F.pad(flat[None] if len(inner) == 2 else flat, inner, mode)
                piece = (padded[0] if len(inner) == 2 else padded).unflatten(0, lead)
    if not before and not after:
        return place(piece, layout)
    rows = layout.rows + before + after
    out, dim = layout.with_rows(rows), layout.dim
    if mode == "constant":
        return place(fetch(piece, layout, lambda r: _shifted(out.of(r), before), 0.0 if value is None else value), out)
    source = _padded_rows(layout.rows, before, after, mode)
    read, have = take(piece, layout, rows, lambda row: [source[row]])
    wanted = source[out.mine.start : out.mine.end]
    return place(_pick(read, dim, wanted, have), out)


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
    if isinstance(key, Tensor) or isinstance(key, list):
        raise refusal("an index of tensors", args)
    keys = list(key) if isinstance(key, tuple) else [key]
    if any(isinstance(k, (Tensor, list)) for k in keys):
        raise refusal("an index of tensors", args)
    named = sum(k is not None and k is not Ellipsis for k in keys)
    if Ellipsis not in keys:
        keys.append(Ellipsis)
    at = next(i for i, k in enumerate(keys) if k is Ellipsis)
    keys[at : at + 1] = [slice(None)] * (x.dim() - named)
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
    out = layout.with_rows(len(chosen))
    if step == 1:
        return place(fetch(y, layout, lambda r: _shifted(out.of(r), -start)), out)
    read, have = take(y, layout, len(chosen), lambda row: [chosen[row]])
    wanted = chosen[out.mine.start : out.mine.end]
    return place(_pick(read, out_dim, wanted, have), out)


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
    x, factor = args[0], kwargs.get("upscale_factor", args[1] if len(args) > 1 else 1)
    rows = x.placed.rows * factor
    out = x.placed.with_rows(rows)
    read, have = take(piece_of(x), x.placed, rows, lambda row: [row // factor])
    y = F.pixel_shuffle(read, factor)
    return place(y.narrow(2, out.mine.start - have.start * factor, out.mine.size) if out.mine.size else y, out)


@handles("pixel_unshuffle")
def _pixel_unshuffle(function: Any, args: Any, kwargs: dict[str, Any]) -> SpatialTensor:
    x, factor = args[0], kwargs.get("downscale_factor", args[1] if len(args) > 1 else 1)
    rows = x.placed.rows // factor
    out = x.placed.with_rows(rows)
    if x.placed.rows % factor:
        raise refusal("pixel_unshuffle of rows that it does not divide", args)
    read = fetch(piece_of(x), x.placed, lambda r: Span(out.of(r).start * factor, out.of(r).end * factor))
    return place(F.pixel_unshuffle(read, factor), out)
