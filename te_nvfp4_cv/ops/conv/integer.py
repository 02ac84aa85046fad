"""Convolutions of quantized operands on integers, on a CPU: the kernels of backend/integer.cpp.

Twice an E2M1 value is a small integer, so a block of 16 products sums exactly, and nothing is dequantized. Activations
and gradients come as byte records (ops/records.py), weights and the saved activations as packed codes, which become the
kernels' panels here. Results are those of the reference bit for bit: both add block by block in the same order.
"""

from __future__ import annotations

import ctypes
import math
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from te_nvfp4_cv.backend import dispatch, native
from te_nvfp4_cv.formats import BLOCK
from te_nvfp4_cv.ops import layouts
from te_nvfp4_cv.ops.block_scales import FORMATS, INTEGER, scale_table
from te_nvfp4_cv.ops.conv import reference
from te_nvfp4_cv.ops.conv.block_reference import Products
from te_nvfp4_cv.ops.experts import Experts
from te_nvfp4_cv.ops.geometry import ConvGeometry, linear_geometry
from te_nvfp4_cv.ops.records import RECORD, Face

PANEL = 384  # bytes: see integer.cpp
_KINDS = (torch.float32, torch.bfloat16)


def fprop(
    x: Face,
    w: Face,
    alpha: Tensor | None,
    bias: Tensor | None,
    geometry: ConvGeometry,
    dtype: torch.dtype,
    out: Tensor | None = None,
) -> Tensor:
    """Multiply as operators.conv_fprop does; the result is in `out` if that is given, and in fp32 or bf16.

    x comes as records with an empty scale, or as packed codes; w as packed codes, or as panels with an empty scale.
    """
    made = panels(w, geometry, not geometry.transposed) if w.scale.numel() else w.data
    return _data(_records(x), made, alpha, bias, geometry, True, _result(out, geometry.y_shape, dtype)).to(dtype)


def dgrad(
    dy: Face, w: Face, alpha: Tensor | None, geometry: ConvGeometry, dtype: torch.dtype, out: Tensor | None = None
) -> Tensor:
    """Multiply as operators.conv_dgrad does. dy and w come as fprop takes x and w; out: as there."""
    made = panels(w, geometry, geometry.transposed) if w.scale.numel() else w.data
    return _data(_records(dy), made, alpha, None, geometry, False, _result(out, geometry.x_shape, dtype)).to(dtype)


def _result(out: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return the memory that the kernels write into: `out`, if they write its dtype."""
    kind = dtype if dtype in _KINDS else torch.float32
    return out if out is not None and kind == dtype else torch.empty(shape, dtype=kind, device="cpu")


def wgrad(
    dy: Face, x: Face, alpha: Tensor | None, geometry: ConvGeometry, dtype: torch.dtype, out: Tensor | None = None
) -> Tensor:
    """Multiply as operators.conv_wgrad does.

    x comes as packed columnwise codes, dy as columnwise records with an empty scale, or as packed codes, too.
    """
    packed = Face(x.data.contiguous(), x.scale.contiguous())
    kernel = _library().nvfp4_weight_product
    return _weight_product(_column_records(dy), packed, alpha, geometry, dtype, out, kernel)


def _column_records(dy: Face) -> Tensor:
    """Return a columnwise gradient as records, which it may be already."""
    if dy.scale.numel():  # [N16, *image, C, 8] -> [*image, N16, C * 8], as records lie
        dy = Face(dy.data.movedim(0, -3).flatten(-2), dy.scale.movedim(0, -2))
    return _records(dy)


def _weight_product(
    records: Tensor,
    x: Face,
    alpha: Tensor | None,
    geometry: ConvGeometry,
    dtype: torch.dtype,
    out: Tensor | None,
    kernel: Callable[[Any], None],
) -> Tensor:
    """Multiply records by packed codes with one scale byte for each piece of 16 values, both contiguous."""
    dw, alpha = _result(out, geometry.weight_shape, dtype), _one(alpha)
    kernel(ctypes.byref(_weight_call(records, x, alpha, geometry, dw)))
    return dw.to(dtype)


def _weight_call(
    records: Tensor, x: Face, alpha: Tensor, geometry: ConvGeometry, dw: Tensor
) -> native.WeightGradient:
    """Return the kernels' view of one wgrad; the caller must hold on to the tensors, as it has their addresses only."""
    folded = geometry.folded
    of_b, of_a = geometry.channels_b // geometry.groups, geometry.channels_a // geometry.groups
    q = native.WeightGradient(records=records.data_ptr(), codes=x.data.data_ptr(), scale=x.scale.data_ptr())
    q.alpha, q.dw = alpha.data_ptr(), dw.data_ptr()
    q.n16, q.groups = folded.batch // BLOCK, geometry.groups
    q.record_channels, q.panel_channels = (of_a, of_b) if geometry.transposed else (of_b, of_a)
    walk = _walk(q, folded)
    q.a, q.b = walk["a"], walk["b"]
    q.records_on_b, q.out_bf16 = not geometry.transposed, dw.dtype == torch.bfloat16
    q.threads = torch.get_num_threads()
    return q


def panels(face: Face, g: ConvGeometry, to_b: bool, kernel: Callable[[Any], None] | None = None) -> Tensor:
    """Return a weight's packed face as panels, uint8 [G, blocks of outputs, T, blocks of inputs, PANEL].

    Args:
        face: packed codes: the rowwise face [axis 0, T, Kb * 8] or the columnwise one [G, Ob, T, axis 1, 8].
        to_b: contract axis 1, for outputs on the b side; else axis 0.
        kernel: reads the bytes of scales; NVFP4's by default.
    """
    w, scale = face.data.contiguous(), face.scale.contiguous()
    made, q = _panels_call(w, scale, g, to_b)
    (kernel or _library().nvfp4_expand_weight)(ctypes.byref(q))
    return made


def _panels_call(w: Tensor, scale: Tensor, g: ConvGeometry, to_b: bool) -> tuple[Tensor, native.Kernel]:
    """Return memory for the panels of a contiguous face, and the kernels' view, which has the addresses only."""
    axis0, axis1 = g.channels_b // g.groups, g.channels_a // g.groups
    outs, ins = (-(-n // BLOCK) for n in ((axis0, axis1) if to_b else (axis1, axis0)))
    made = layouts.for_one_call((g.groups, outs, g.taps, ins, PANEL), torch.uint8, w.device)
    q = native.Kernel(codes=w.data_ptr(), scale=scale.data_ptr(), panels=made.data_ptr())
    q.groups, q.T, q.axis0, q.axis1 = g.groups, g.taps, axis0, axis1
    q.from_axis1, q.tiles, q.columnwise = to_b, scale.dim() == 4 and w.dim() == 3, w.dim() == 5
    q.threads = torch.get_num_threads()
    return made, q


def _records(face: Face) -> Tensor:
    """Return an activation or gradient as records, which it may be already."""
    return expand_records(*face) if face.scale.numel() else face.data


def expand_records(codes: Tensor, scale: Tensor, kernel: Callable[..., None] | None = None) -> Tensor:
    """Return packed codes [..., blocks * 8] with scales [..., blocks] as records [..., blocks * RECORD]."""
    codes, scale = codes.contiguous(), scale.contiguous()
    records = layouts.for_one_call((*codes.shape[:-1], scale.shape[-1] * RECORD), torch.uint8, codes.device)
    pointers = codes.data_ptr(), scale.data_ptr(), records.data_ptr()
    (kernel or _library().nvfp4_expand_records)(*pointers, scale.numel(), torch.get_num_threads())
    return records


def _data(
    records: Tensor,
    made: Tensor,
    alpha: Tensor | None,
    bias: Tensor | None,
    g: ConvGeometry,
    forward: bool,
    out: Tensor,
) -> Tensor:
    """Run fprop (`forward`) or dgrad on records and panels; the result is `out`, [B, *image, channels]."""
    alpha, bias = _one(alpha), _bias(bias)
    q = _data_call(records, made, g, forward, out)
    q.alpha, q.bias = alpha.data_ptr(), None if bias is None else bias.data_ptr()
    _library().nvfp4_data_product(ctypes.byref(q))
    return out


def _data_call(records: Tensor, made: Tensor, g: ConvGeometry, forward: bool, out: Tensor) -> native.Data:
    """Return the kernels' view of one fprop or dgrad without alpha and bias; to hold on to as for _weight_call."""
    to_b = forward != g.transposed
    inputs, outputs = (g.channels_a, g.channels_b) if to_b else (g.channels_b, g.channels_a)
    q = native.Data(x=records.data_ptr(), panels=made.data_ptr(), y=out.data_ptr())
    q.batch, q.groups, q.out_channels = g.batch, g.groups, outputs // g.groups
    q.in_blocks = -(-(inputs // g.groups) // BLOCK)
    walk = _walk(q, g)
    q.in_size, q.out_size = (walk["a"], walk["b"]) if to_b else (walk["b"], walk["a"])
    q.to_b, q.out_bf16, q.threads = to_b, out.dtype == torch.bfloat16, torch.get_num_threads()
    return q


def _bias(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.detach().float().contiguous()


# ---- experts: what the functions above do, without asking torch for each expert's part of every tensor ---------------


def data_of_experts(
    x: Face,
    w: Face,
    alpha: Tensor | None,
    bias: Tensor | None,
    experts: Experts,
    geometry: ConvGeometry,
    forward: bool,
    dtype: torch.dtype,
) -> Tensor:
    """Multiply as fprop (`forward`) or dgrad of grouped.py do; x is dy there."""
    of_one = linear_geometry(experts.tokens, geometry.x_shape[-1], geometry.y_shape[-1])
    codes, scale, made, expand = w.data.contiguous(), w.scale.contiguous(), w.data, None
    if scale.numel():
        made, expand = _panels_call(codes, scale, of_one, forward)
    out = _result(None, geometry.y_shape if forward else geometry.x_shape, dtype)
    records, alpha, bias = _records(x), _one_each(alpha), _bias(bias)
    q, library = _data_call(records, made, of_one, forward, out), _library()
    for rows in experts.rows:
        if expand is None:
            q.panels = _at(made, rows.expert, experts.number)
        else:  # one expert's panels at a time: they are read while the cache has them
            expand.codes, expand.scale = (_at(part, rows.expert, experts.number) for part in (codes, scale))
            library.nvfp4_expand_weight(ctypes.byref(expand))
        q.batch = rows.end - rows.start
        q.x, q.y = _at(records, rows.start, experts.tokens), _at(out, rows.start, experts.tokens)
        q.alpha = _at(alpha, rows.expert, experts.number)
        q.bias = None if bias is None else _at(bias, rows.expert, experts.number)
        library.nvfp4_data_product(ctypes.byref(q))
    out[experts.end :] = 0
    return out.to(dtype)


def wgrad_of_experts(
    dy: Face, x: Face, alpha: Tensor | None, experts: Experts, geometry: ConvGeometry, dtype: torch.dtype
) -> Tensor:
    """Multiply as wgrad of grouped.py does."""
    codes, scale = x.data.contiguous(), x.scale.contiguous()
    records, alpha = _column_records(dy), _one_each(alpha)
    # Of every expert with rows all is written: zeros would cost as much as writing dw.
    make = torch.empty if len(experts.rows) == experts.number else torch.zeros
    dw = make(geometry.weight_shape, dtype=dtype if dtype in _KINDS else torch.float32, device="cpu")
    of_one = linear_geometry(experts.tokens, geometry.x_shape[-1], geometry.y_shape[-1])
    q, product = _weight_call(records, Face(codes, scale), alpha, of_one, dw), _library().nvfp4_weight_product
    blocks = scale.shape[0]
    for rows in experts.rows:
        q.n16, q.records = rows.last - rows.block, _at(records, rows.block, blocks)
        q.codes, q.scale = _at(codes, rows.block, blocks), _at(scale, rows.block, blocks)
        q.dw, q.alpha = _at(dw, rows.expert, experts.number), _at(alpha, rows.expert, experts.number)
        product(ctypes.byref(q))
    return dw.to(dtype)


def _at(parts: Tensor, index: int, count: int) -> int:
    """Return the address of one of `count` equal parts of a contiguous tensor, or that of a number for all of them."""
    return parts.data_ptr() + parts.numel() // count * parts.element_size() * index


def _one_each(alpha: Tensor | None) -> Tensor:
    return torch.ones(1, dtype=torch.float32, device="cpu") if alpha is None else alpha.contiguous()


class FormatProducts:
    """Multiplies operands of another block format; methods as the functions of this file.

    Records and panels hold scales as numbers, so that the loops are NVFP4's. Only bytes are read by another table.
    Results are the reference's in bits, unless two scales multiply to less than 2^-147, which only E8M0's can.
    """

    def __init__(self, block_format: str) -> None:
        self._name, self._format = block_format, FORMATS[block_format]

    def _kernel(self, name: str) -> Callable[..., None]:
        """Return a kernel of the library with its last argument, the table of scales."""
        kernel, table = getattr(_library(), name), scale_table(self._name, half=True)
        return lambda *arguments: kernel(*arguments, table)

    def fprop(
        self, x: Face, w: Face, alpha: Tensor | None, bias: Tensor | None, geometry: ConvGeometry, dtype: torch.dtype
    ) -> Tensor:
        """Multiply as operators.conv_fprop does."""
        return fprop(*self._rows(x, w, geometry, not geometry.transposed), alpha, bias, geometry, dtype)

    def dgrad(self, dy: Face, w: Face, alpha: Tensor | None, geometry: ConvGeometry, dtype: torch.dtype) -> Tensor:
        """Multiply as operators.conv_dgrad does."""
        return dgrad(*self._rows(dy, w, geometry, geometry.transposed), alpha, geometry, dtype)

    def wgrad(self, dy: Face, x: Face, alpha: Tensor | None, geometry: ConvGeometry, dtype: torch.dtype) -> Tensor:
        """Multiply as operators.conv_wgrad does."""
        if dy.scale.numel():
            codes, scale = dy.data.movedim(0, -3).flatten(-2), self._format.of_columns(dy).movedim(0, -2)
            dy = Face(expand_records(codes, scale, self._kernel("format_expand_records")), scale.new_empty(0))
        packed = Face(x.data.contiguous(), self._format.of_columns(x).contiguous())
        return _weight_product(dy.data, packed, alpha, geometry, dtype, None, self._kernel("format_weight_product"))

    def panels(self, face: Face, g: ConvGeometry, to_b: bool) -> Tensor:
        """Return a weight's packed face as panels."""
        pieces = Face(face.data, self._format.of_kernel(face, g.channels_b // g.groups))
        return panels(pieces, g, to_b, self._kernel("format_expand_weight"))

    def _rows(self, x: Face, w: Face, g: ConvGeometry, to_b: bool) -> tuple[Face, Face]:
        """Return an operand as records and a weight as panels, which they may be already."""
        empty = x.scale.new_empty(0)
        if x.scale.numel():
            groups = g.row_groups
            records = expand_records(x.data, self._format.of_rows(x, groups), self._kernel("format_expand_records"))
            x = Face(records, empty)
        return x, Face(self.panels(w, g, to_b), empty) if w.scale.numel() else w


PRODUCTS = {name + INTEGER: FormatProducts(name) for name in FORMATS}
"""By the name of the backend."""


_SCALE_BYTES = {"mxfp4": (110, 140), "nvfp4_ue5m3": (0, 255), "fp4_e4m3_only": (0, 0x7F)}  # from, and up to


def matches_reference() -> bool:
    """Compare the kernels with the reference on a few small layers; True if every bit is equal.

    Each has other tails, strides and groups: what a compiler could get wrong on this machine shows in one of them. The
    kernels of another block format differ where they read scales only, so one layer each is enough. A weight has two
    faces, or one with scales of tiles, which serves both products.
    """
    generator = torch.Generator().manual_seed(0)
    strided = ConvGeometry(3, 40, 48, (9, 12), (5, 6), (3, 3), (2, 2), (1, 1), (1, 1), (0, 0), 1, False)
    grouped = ConvGeometry(16, 32, 64, (5, 7), (5, 7), (3, 3), (1, 1), (2, 2), (2, 2), (0, 0), 2, True)
    linear = ConvGeometry(50, 96, 33, (), (), (), (), (), (), (), 1, False)
    tiled = ConvGeometry(2, 112, 50, (4, 5), (4, 5), (3, 3), (1, 1), (1, 1), (1, 1), (0, 0), 2, False)
    both = sys.modules[__name__], reference
    others = [(PRODUCTS[name + INTEGER], Products(name), name) for name in FORMATS]
    return (
        all(_matches(*both, "", g, generator) for g in (strided, grouped, linear))
        and all(_matches(*sides, strided, generator) for sides in others)
        and all(_matches(*sides, tiled, generator, tiles=True) for sides in [(*both, ""), *others])
    )


def _matches(
    ours: Any, truth: Any, block_format: str, g: ConvGeometry, generator: torch.Generator, tiles: bool = False
) -> bool:
    """Compare the three products of a layer or, where its weight has scales of 16x16 or 32x32 tiles, the first two."""
    pieces = FORMATS[block_format].pieces if block_format else 1
    first, end = _SCALE_BYTES.get(block_format, (0, 0x7F))  # all of the E4M3 grid

    def codes(*shape: int, flat: bool = False, along: int = -1) -> Face:
        """Return random packed codes [*shape, 8], the last two axes flat or not, with scale bytes of their blocks."""
        sizes = list(shape)
        sizes[along] = -(-sizes[along] // pieces)
        data = torch.randint(0, 256, (*shape, 8), dtype=torch.uint8, generator=generator)
        scale = torch.randint(first, end, sizes, dtype=torch.uint8, generator=generator)
        return Face(data.flatten(-2) if flat else data, scale)

    of_a, of_b, alpha = g.channels_a // g.groups, g.channels_b // g.groups, torch.full((1,), 0.37, dtype=torch.float32)
    k_a, k_b = -(-of_a // BLOCK), -(-of_b // BLOCK)
    k_x, k_y = (k_b, k_a) if g.transposed else (k_a, k_b)
    x, dy = codes(*g.x_shape[:-1], g.groups * k_x, flat=True), codes(*g.y_shape[:-1], g.groups * k_y, flat=True)
    row, col = codes(g.channels_b, g.taps, k_a, flat=True), codes(g.groups, k_b, g.taps, of_a, along=1)
    if tiles:
        row = col = Face(row.data, codes(g.groups, -(-k_b // pieces), g.taps, k_a).scale)
    for_fprop, for_dgrad = (col, row) if g.transposed else (row, col)
    shapes = g.folded.y_shape, g.folded.x_shape
    columns = [codes(g.folded.batch // BLOCK, *shape[1:], along=0) for shape in shapes]
    calls: tuple[tuple[str, tuple[Any, ...]], ...] = (
        ("fprop", (x, for_fprop, alpha, None)),
        ("dgrad", (dy, for_dgrad, alpha)),
        ("wgrad", (*columns, alpha)),
    )
    return all(
        torch.equal(*(getattr(side, name)(*arguments, g, torch.float32) for side in (ours, truth)))
        for name, arguments in (calls[:2] if tiles else calls)
    )


dispatch.integer_check = matches_reference


def _walk(q: native.Data | native.WeightGradient, g: ConvGeometry) -> dict[str, tuple[int, int, int]]:
    walk = g.walk
    q.taps, q.stride, q.dilation, q.padding = walk["taps"], walk["stride"], walk["dilation"], walk["padding"]
    return walk


def _one(alpha: Tensor | None) -> Tensor:
    if alpha is None:
        return torch.ones(1, dtype=torch.float32, device="cpu")
    assert alpha.numel() == 1 and math.prod(alpha.shape) == 1
    return alpha


def _library() -> ctypes.CDLL:
    library = native.load()
    assert library is not None, "dispatch.resolve has checked that there are compiled kernels"
    return library
