"""Quantization by the Triton kernels: reference.py's functions on a GPU, or under the interpreter on a CPU.

Codes and scales are the reference's, bit for bit, where rounding is to nearest. Stochastic rounding draws other bytes:
the value f of image n in [images, values] uses byte n % 16 of Philox4x32-7 with counter (n // 16 * values + f, 0, 0)
and key `seed`; both faces use the same byte. Columns of a folded operand count through the folded images, and have 1 as
the counter's third word.

    amax, then both faces in one launch       x is read twice, or once where the amaxes are given
    folded columns (B no multiple of 16)      a launch of their own, rows found through a table
    4over6                                    a launch for each face: its error sums have an order
    row-scaled                                plain torch (reference.py)

No function reads a tensor's value or waits for the GPU. The table of a folded operand is made on the CPU at its first
use and kept. Addresses are int64.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from te_nvfp4_cv.backend.devices import on_its_device
from te_nvfp4_cv.formats import BLOCK, power_of_two_amax
from te_nvfp4_cv.ops import layouts
from te_nvfp4_cv.ops.quantize import reference
from te_nvfp4_cv.ops.quantize.triton import tiles as parts
from te_nvfp4_cv.ops.quantize.triton.grids import amaxes_of, tiles_of, weight_tiles_of
from te_nvfp4_cv.ops.records import (
    ERRORS,
    NONE,
    PACKED,
    Alpha,
    Collector,
    Face,
    Move,
    Operand,
    OperandSpec,
    WeightCodes,
    WeightLayout,
    WeightSpec,
)
from te_nvfp4_cv.ops.triton.workspace import zeros


@on_its_device
def quantize_operand(
    x: Tensor,
    spec: OperandSpec,
    dtype: torch.dtype,
    seed: Tensor | None,
    amax: Tensor | None,
    collector: Collector | None = None,
    source_rows: Tensor | None = None,
) -> Operand:
    """Quantize as operand.quantize_operand does. The two amaxes are views of one tensor.

    Args:
        source_rows: of a matrix whose rows are laid out for experts in the columnwise face (Experts.source_rows).
    """
    if not x.numel():
        return _nothing(x, spec, dtype, amax)
    if spec.row_scaled:
        return reference.quantize_operand(x, spec, dtype, seed, amax)
    x = x.contiguous()
    watch = None if amax is None else parts.Watch.of(x, not spec.rht, collector)
    folded = spec.fold.strips > 1 or source_rows is not None
    if watch is not None and spec.row == NONE and not spec.rht and (folded or spec.col == NONE):
        parts.amax_flat(x, watch.work, None)  # folded columns need not have seen all of x
    if amax is None:
        # Nothing is rotated where no columnwise face is made: x's amax is one plain pass.
        used = _measured(x, spec, spec.rht and spec.col != NONE, spec.pow2, source_rows)
    else:
        used = power_of_two_amax(amax, spec.e4m3_max) if spec.pow2 else amax.contiguous()
    row, col = layouts.operand_faces(x, spec, dtype)
    job = _Job(x, spec, (row, col), used, seed, watch, source_rows)
    if job.error:
        if spec.row != NONE:
            job.row_blocks(spec.col == NONE)
        if spec.col != NONE:
            job.col_blocks()
    # One launch reads x for both faces. Folded columns go through other rows than the rowwise face: two launches.
    elif not folded:
        job.tiles(spec.row, spec.col, True)
    else:
        if spec.row != NONE:
            job.tiles(spec.row, NONE, spec.col == NONE)
        if spec.col != NONE:
            job.tiles(NONE, spec.col, True)
    if watch is None:
        return Operand(row, used[:1], col, used[1:], x.new_empty(0, dtype=torch.float32))
    return watch.operand(row, col)


@on_its_device
def measure_operand(x: Tensor, spec: OperandSpec, source_rows: Tensor | None = None) -> Tensor:
    """Return the amaxes as operand.measure_operand does; source_rows as for quantize_operand."""
    if not x.numel():
        return x.new_zeros(2, dtype=torch.float32)
    return _measured(x.contiguous(), spec, spec.rht, False, source_rows)


def _measured(x: Tensor, spec: OperandSpec, rht: bool, pow2: bool, by_expert: Tensor | None = None) -> Tensor:
    """Return the amaxes of a contiguous x, fp32 [2], raised to those of powers of two if `pow2`."""
    if by_expert is not None and not rht:  # the rows of experts alone: rotating costs little beside reading them
        return _measured(x, spec, True, pow2, by_expert)[:1].repeat(2)
    work, amax = zeros(x), x.new_empty(2, dtype=torch.float32)
    if not rht:
        parts.amax_flat(x, work, amax, (pow2, spec.e4m3_max))
        return amax
    raised = spec.e4m3_max if pow2 else 0
    launch, table = amaxes_of(x.shape, x.dtype, x.device, spec.fold, raised, by_expert is not None)
    # Folding may leave rows of x out, so that x's own amax needs a pass of its own.
    if table is not None:
        parts.amax_flat(x, work, None)
    read = by_expert if table is None else table
    launch(lambda: (x, x if read is None else read, work, amax))
    return amax


@on_its_device
def measure_weight(w: Tensor, spec: WeightSpec, move: Move | None = None) -> Tensor:
    """Return the amax that quantize_weight uses, fp32 [1], raised with spec.pow2; in one launch with `move`."""
    amax = w.new_empty(1, dtype=torch.float32)
    parts.amax_flat(layouts.in_memory_order(w), zeros(w), amax, (spec.pow2, spec.e4m3_max), move)
    return amax


@on_its_device
def quantize_weight(w: Tensor, spec: WeightSpec, dtype: torch.dtype, amax: Tensor | None = None) -> WeightCodes:
    """Quantize as operand.quantize_weight does."""
    if not w.numel():
        return reference.quantize_weight(w, spec, dtype, amax)
    w = w.detach()
    if amax is None:
        amax = measure_weight(w, spec)
    else:  # of the whole weight, whose shard w is
        amax = power_of_two_amax(amax, spec.e4m3_max) if spec.pow2 else amax.clone()
    return _quantize_weight(w, spec, dtype, amax)


@on_its_device
def quantize_weight_for(
    w: Tensor, spec: WeightSpec, dtype: torch.dtype, amax: Tensor, factor: Alpha | None
) -> tuple[WeightCodes, Tensor]:
    """Quantize in 16x16 tiles with the amax of measure_weight, and unpack as unpack_weight does, in one launch."""
    values = w.new_empty((w.shape[0], math.prod(w.shape[2:]), w.shape[1]), dtype=dtype)
    return _quantize_weight(w.detach(), spec, dtype, amax, values, factor), values


def _quantize_weight(
    w: Tensor,
    spec: WeightSpec,
    dtype: torch.dtype,
    amax: Tensor,
    values: Tensor | None = None,
    factor: Alpha | None = None,
) -> WeightCodes:
    """Quantize with this amax; `values`, times the factor, are written beside packed tiles."""
    groups, error = spec.groups, ERRORS[spec.four_over_six]
    n, c, taps = w.shape[0], w.shape[1], math.prod(w.shape[2:])
    kb, ob = parts.ceil_div(c, BLOCK), parts.ceil_div(n // groups, BLOCK)
    row, col = layouts.weight_faces(w, spec, dtype)
    w = w.resolve_neg() if w.is_neg() else w  # as in cpu.weight_view
    w = w.flatten(2) if w.dim() > 2 else w.unsqueeze(-1)  # a copy where one stride does not reach all taps
    strides = stride_o, stride_t, stride_c = w.stride(0), w.stride(2), w.stride(1)
    if spec.two_d and spec.row != NONE:
        number = 1.0 if factor is None else factor.number
        kinds = (w.dtype, dtype, spec, values is not None, factor is not None)
        a, b = (amax, amax) if factor is None else factor[:2]
        packed = row.data if spec.row == PACKED else row.scale
        written = row.data if values is None else values
        weight_tiles_of(w.shape, strides, w.device, number, kinds)(w, amax, packed, row.scale, written, a, b)
    elif spec.row != NONE:
        sizes, strides = (n, n, taps, c), (stride_o, stride_t, stride_c)
        blocks = parts.Blocks(n * taps * kb, sizes, strides, False, 1, kb)
        parts.quantize_blocks(w, amax, row, spec.row, blocks, error, spec.e4m3_max)
    if spec.col != NONE:
        sizes, strides = (n // groups, n // groups, taps, c), (stride_o, stride_t, stride_c)
        blocks = parts.Blocks(groups * ob * taps * c, sizes, strides, True, ob, 1)
        parts.quantize_blocks(w, amax, col, spec.col, blocks, error, spec.e4m3_max)
    return WeightCodes(row, col, amax)


@on_its_device
def unpack_columns(data: Tensor, scale: Tensor, dtype: torch.dtype, factor: Alpha | None = None) -> Tensor:
    """Unpack as operand.unpack_columns does, times a factor."""
    out = scale.new_empty((scale.shape[0] * BLOCK, *scale.shape[1:]), dtype=dtype)
    if out.numel():
        blocks, run = scale.shape[0], math.prod(scale.shape[1:])
        parts.unpack_columns(data, scale, out, factor, blocks, blocks * BLOCK, run)
    return out


@on_its_device
def unpack_rows(data: Tensor, scale: Tensor, channels: int, groups: int, dtype: torch.dtype) -> Tensor:
    """Unpack as operand.unpack_rows does."""
    out = data.new_empty((*data.shape[:-1], channels), dtype=dtype)
    if out.numel():
        parts.unpack_rows(data, scale, out, None, channels // groups, 1, 0)
    return out


@on_its_device
def unpack_weight(
    data: Tensor, scale: Tensor, layout: WeightLayout, factor: Tensor | Alpha | None, dtype: torch.dtype
) -> Tensor:
    """Unpack as operand.unpack_weight does."""
    n, channels, groups, columnwise = layout
    taps = data.shape[2 if columnwise else 1]
    out = data.new_empty((n, taps, channels), dtype=dtype)
    if not out.numel():
        return out
    if columnwise:
        parts.unpack_columns(data, scale, out, factor, data.shape[1], n // groups, taps * channels)
    else:
        parts.unpack_rows(data, scale, out, factor, channels, taps, n // groups if scale.dim() == 4 else 0)
    return out


@on_its_device
def unpack_for_backward(
    w: Face, layout: WeightLayout, w_factor: Alpha | None, x: Face, x_factor: Alpha | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return unpack_weight of 16x16 tiles and unpack_columns, in one launch."""
    w_out = w.data.new_empty((layout.n, w.data.shape[1], layout.channels), dtype=dtype)
    x_out = x.scale.new_empty((x.scale.shape[0] * BLOCK, *x.scale.shape[1:]), dtype=dtype)
    if w_out.numel() and x_out.numel():
        parts.unpack_both(w, w_out, w_factor, layout.n // layout.groups, x, x_out, x_factor)
    return w_out, x_out


# ---- operands -------------------------------------------------------------------------------------------------------


class _Job:
    """One operand's tensors and shapes, launched face by face or both at once."""

    def __init__(
        self,
        x: Tensor,
        spec: OperandSpec,
        faces: tuple[Face, Face],
        amax: Tensor,
        seed: Tensor | None,
        watch: parts.Watch | None,
        source_rows: Tensor | None = None,
    ) -> None:
        self.source_rows = source_rows
        self.x, self.spec, self.amax, self.watch = x, spec, amax, watch
        self.row, self.col = faces
        self.seed = amax if seed is None else seed  # kernels that do not draw still want a pointer
        self.error = ERRORS[spec.four_over_six]

    def tiles(self, row: int, col: int, last: bool) -> None:
        """Write both faces of an operand that is not folded, or one face of any operand; `last`: no launch follows."""
        x, watch, experts = self.x, self.watch, self.source_rows if col != NONE else None
        observe = 0 if watch is None else watch.flags_of(last)
        launch, table = tiles_of(x.shape, x.dtype, x.device, self.spec, (row, col), observe, experts is not None)
        table = table if experts is None else experts
        faces = (*self.row, *self.col)

        def tensors() -> tuple[Tensor, ...]:
            watched = (self.amax,) * 4 if watch is None else watch.tensors()
            return (x, x if table is None else table, self.amax, self.seed, *faces, *watched)

        launch(tensors)

    def row_blocks(self, last: bool) -> None:
        """Write the rowwise face by one lane per block."""
        x, groups = self.x, self.spec.groups
        channels = x.shape[-1] // groups
        kb, lines = parts.ceil_div(channels, BLOCK), x.numel() // x.shape[-1]
        sizes, strides = (lines, lines, groups, channels), (x.shape[-1], channels, 1)
        self._blocks(self.row, parts.Blocks(lines * groups * kb, sizes, strides, False, 1, kb), last)

    def col_blocks(self) -> None:
        """Write the columnwise face by one lane per block."""
        experts = self.source_rows
        images, rows, run, source_rows = parts.lines(self.x.shape, self.spec.fold, self.x.device, experts is not None)
        source_rows = source_rows if experts is None else experts
        sizes, strides = (images, self.spec.fold.images, rows, run), (rows * run, run, 1)
        ob = self.spec.fold.images // BLOCK
        self._blocks(self.col, parts.Blocks(ob * rows * run, sizes, strides, True, ob, 1), True, source_rows)

    def _blocks(self, face: Face, blocks: parts.Blocks, last: bool, source_rows: Tensor | None = None) -> None:
        """Write one face, both its codes and its scales."""
        spec, side = self.spec, int(blocks.columns)
        more = parts.Extras(
            rht=spec.rht and blocks.columns,
            seed=self.seed if spec.stochastic else None,
            source_rows=source_rows,
            image_size=self.x.numel() // self.x.shape[0],
            given=self.amax,
            watch=self.watch,
            last=last,
        )
        form = spec.col if blocks.columns else spec.row
        # From the face's amax on: the kernel reads the first element of what it is given.
        parts.quantize_blocks(self.x, self.amax[side:], face, form, blocks, self.error, spec.e4m3_max, more)


def _nothing(x: Tensor, spec: OperandSpec, dtype: torch.dtype, amax: Tensor | None) -> Operand:
    """Quantize a tensor without elements: zeros of the right shapes."""
    row, col = (Face(data.zero_(), scale.zero_()) for data, scale in layouts.operand_faces(x, spec, dtype))
    row_amax = x.new_zeros(x.shape[:-1] if spec.row_scaled and spec.row else (1,), dtype=torch.float32)
    col_amax = x.new_zeros((x.shape[-1],) if spec.row_scaled and spec.col else (1,), dtype=torch.float32)
    if amax is not None:
        row_amax, col_amax = amax[:1].clone(), amax[1:].clone()
    return Operand(row, row_amax, col, col_amax, x.new_zeros(0 if amax is None else 3, dtype=torch.float32))
