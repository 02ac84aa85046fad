"""Quantize to MXFP4 and to NVFP4 with UE5M3 scales on a CPU, by the compiled kernels of backend/block_formats.cpp.

Bits, layouts and what is returned are those of block_formats.py, whose plain torch runs where the kernels do not: on a
GPU, without a compiler, and for 1x16 weights of more than one group. The kernels make codes and records; values are
unpacked from codes.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from te_nvfp4_cv.backend import native
from te_nvfp4_cv.ops import layouts
from te_nvfp4_cv.ops.block_scales import FORMATS, scale_table, tensor_amax
from te_nvfp4_cv.ops.quantize import cpu
from te_nvfp4_cv.ops.quantize.block_formats import Quantizer
from te_nvfp4_cv.ops.quantize.reference import amax_of
from te_nvfp4_cv.ops.records import (
    DEQUANTIZED,
    NONE,
    PACKED,
    Face,
    Operand,
    OperandSpec,
    WeightCodes,
    WeightLayout,
    WeightSpec,
)


class CompiledQuantizer(Quantizer):
    """Quantizes to one format; methods as the functions of operand.py."""

    def __init__(self, block_format: str) -> None:
        super().__init__(FORMATS[block_format])
        self._name, self._pairs = block_format, self.format.pieces == 2

    def quantize_operand(
        self, x: Tensor, spec: OperandSpec, dtype: torch.dtype, seed: Tensor | None, amax: Tensor | None
    ) -> Operand:
        """Quantize as operand.quantize_operand does. Of a given `amax` only matters whether it is finite."""
        library = native.load() if x.device.type == "cpu" else None
        if library is None or not x.numel():
            return super().quantize_operand(x, spec, dtype, seed, amax)
        as_codes = spec._replace(row=_codes(spec.row), col=_codes(spec.col))
        q, read, starts = cpu.operand_view(x, spec.groups, spec.fold, spec.rht, spec.col != NONE)
        row, col = layouts.operand_faces(x, as_codes, dtype, layouts.for_one_call, self.format.block)
        q.seed, q.stochastic = 0 if seed is None else int(seed), spec.stochastic
        q.want_row, q.want_col = spec.row != NONE, spec.col != NONE
        seen = torch.empty(3, dtype=torch.float32, device=x.device)
        q.observed = seen.data_ptr()
        cpu.write_to(q, as_codes, row, col)
        library.format_quantize(ctypes.byref(q), self._pairs)
        del starts, read
        own = seen[:1] if spec.row != NONE else amax_of(x)
        of_columns = seen[1:2] if spec.col != NONE else own
        if spec.row == DEQUANTIZED:
            row = Face(self.unpack_rows(*row, x.shape[-1], spec.groups, dtype), row.scale.new_empty(0))
        if spec.col == DEQUANTIZED:
            col = Face(self.unpack_columns(*col, dtype), col.scale.new_empty(0))
        given = () if amax is None else (amax[:1], amax[1:])
        observed = own.new_empty(0) if amax is None else torch.cat((own, of_columns, torch.zeros_like(own)))
        row_amax, col_amax = tensor_amax(own, *given[:1]), tensor_amax(own, of_columns, *given[1:])
        return Operand(row, row_amax, col, col_amax, observed)

    def unpack_columns(self, data: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        """Unpack as operand.unpack_columns does."""
        library = native.load() if data.device.type == "cpu" else None
        if library is None or not data.numel():
            return super().unpack_columns(data, scale, dtype)
        pieces, table = self.format.of_columns(Face(data, scale)), scale_table(self._name)
        return cpu.call_unpack_columns(library.format_unpack_columns, data, pieces, dtype, table)

    def unpack_rows(self, data: Tensor, scale: Tensor, channels: int, groups: int, dtype: torch.dtype) -> Tensor:
        """Unpack as operand.unpack_rows does."""
        library = native.load() if data.device.type == "cpu" else None
        if library is None or not data.numel():
            return super().unpack_rows(data, scale, channels, groups, dtype)
        pieces, table = self.format.of_rows(Face(data, scale), groups), scale_table(self._name)
        return cpu.call_unpack_rows(library.format_unpack_rows, data, pieces, channels, groups, dtype, table)

    def quantize_weight(
        self, w: Tensor, spec: WeightSpec, dtype: torch.dtype, amax: Tensor | None = None
    ) -> WeightCodes:
        """Quantize as operand.quantize_weight does. Of a given `amax` only matters whether it is finite."""
        library = native.load() if w.device.type == "cpu" else None
        if library is None or not w.numel() or (not spec.two_d and spec.groups > 1):
            return super().quantize_weight(w, spec, dtype, amax)
        w = w.detach()
        w = w.float() if w.dtype == torch.float16 else w
        used = tensor_amax(amax_of(w), *(() if amax is None else (amax,)))
        if not spec.two_d:
            rows, as_operand = cpu.rows_as_operand(w, spec)
            made = self.quantize_operand(rows, as_operand, dtype, None, None)
            return cpu.faces_of_rows(made, spec, w.shape[0], used)
        row, col = layouts.weight_faces(w, spec._replace(row=_codes(spec.row)), dtype, self.format.block)
        q, held = cpu.weight_view(w, spec.groups, dtype, spec.e4m3_max)
        q.codes, q.scale = row.data.data_ptr(), row.scale.data_ptr()
        library.format_quantize_weight(ctypes.byref(q), self._pairs)
        del held
        if spec.row == DEQUANTIZED:
            layout = WeightLayout(w.shape[0], w.shape[1], spec.groups, False)
            row = Face(self.unpack_weight(*row, layout, None, dtype), row.scale.new_empty(0))
        return WeightCodes(row, col, used)

    def unpack_weight(
        self, data: Tensor, scale: Tensor, layout: WeightLayout, factor: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        """Unpack as operand.unpack_weight does."""
        library = native.load() if data.device.type == "cpu" else None
        if library is None or not data.numel() or layout.columnwise:
            return super().unpack_weight(data, scale, layout, factor, dtype)
        pieces, table = self.format.of_kernel(Face(data, scale), layout.n // layout.groups), scale_table(self._name)
        return cpu.call_unpack_weight(library.format_unpack_weight, data, pieces, layout, factor, dtype, table)


def _codes(form: int) -> int:
    """Return the form that the kernels write in place of values."""
    return PACKED if form == DEQUANTIZED else form
