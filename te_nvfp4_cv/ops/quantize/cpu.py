"""Quantization for the vendor and the integer backend on a CPU, with the reference's bits.

The compiled kernels of backend/native do it. Where there is no compiler, and for what they do not cover (row-scaled
activations, 1x16 weights of more than one group), the reference's plain torch runs instead.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from te_nvfp4_cv.backend import native
from te_nvfp4_cv.formats import BLOCK, power_of_two_amax, round_up
from te_nvfp4_cv.ops import layouts
from te_nvfp4_cv.ops.block_scales import TENSOR_AMAX, tensor_amax
from te_nvfp4_cv.ops.experts import Experts, Rows
from te_nvfp4_cv.ops.quantize import reference
from te_nvfp4_cv.ops.records import (
    DEQUANTIZED,
    ERRORS,
    NONE,
    PACKED,
    RECORDS,
    Face,
    Fold,
    Operand,
    OperandSpec,
    WeightCodes,
    WeightLayout,
    WeightSpec,
)

Kernel = Callable[..., None]  # of the compiled library


def quantize_operand(
    x: Tensor,
    spec: OperandSpec,
    dtype: torch.dtype,
    seed: Tensor | None,
    amax: Tensor | None,
    into: tuple[Face, Face] | None = None,
    observe: bool = True,
    experts: Experts | None = None,
) -> Operand:
    """Quantize as operand.quantize_operand does. The compiled kernels write both faces `into` memory that is given.

    Args:
        observe: if False, `amax` is one that holds what the kernels would observe, and they do not look.
        experts: for x [T, C] and compiled kernels: those whose rows x has, each row that of one; the columnwise face
            has their blocks, spec.fold as many images. Rounds stochastically with the seed plus the expert.
    """
    library = native.load() if x.device.type == "cpu" else None
    if library is None or spec.row_scaled or not x.numel():
        return reference.quantize_operand(x, spec, dtype, seed, amax)
    row_form, col_form, rht = spec.row, spec.col, spec.rht
    q, x, starts = operand_view(x, spec.groups, spec.fold, rht, col_form != NONE)
    if experts is not None:
        starts = _take_rows(q, experts)
    row, col = into or layouts.operand_faces(x, spec, dtype, layouts.for_one_call)
    q.seed, q.stochastic = 0 if seed is None else int(seed), spec.stochastic
    q.out_bf16, q.error, q.e4m3_max = dtype == torch.bfloat16, ERRORS[spec.four_over_six], spec.e4m3_max
    used = torch.empty(2, dtype=torch.float32, device=x.device)
    q.amax = used.data_ptr()
    observe = observe and amax is not None
    observed = torch.empty(3 if observe else 0, dtype=torch.float32, device=x.device)
    if amax is None:
        # For the amaxes, "row" is x as it is and "col" the rotated columns; without RHT both are x's.
        q.want_row, q.want_col = row_form != NONE or not rht, col_form != NONE and rht
        library.nvfp4_amax(ctypes.byref(q))
        if not rht:
            used[1] = used[0]
    else:
        used.copy_(amax)
        if observe:
            q.observed = observed.data_ptr()
    if spec.pow2:  # in place: the kernel has its address
        used.copy_(power_of_two_amax(used, spec.e4m3_max))
    q.want_row, q.want_col = row_form != NONE, col_form != NONE
    write_to(q, spec, row, col)
    if experts is None or seed is None:
        library.nvfp4_quantize(ctypes.byref(q))
    else:
        _quantize_each(q, x, experts, spec, (row, col), observed, library.nvfp4_quantize)
    # Held until here, because the kernel read the table of rows by its address.
    del starts
    if observe:
        if not rht:  # folded columns may leave rows of x out
            observed[:2] = observed[0] if row_form != NONE else measure_operand(x, spec)
        used = reference.unless_non_finite(used, observed[:2])
    row_amax, col_amax = used.split(1)  # views, as of the kernels of GPUs; see operand.separate
    return Operand(row, row_amax, col, col_amax, observed)


def _quantize_each(
    q: native.Operand,
    x: Tensor,
    experts: Experts,
    spec: OperandSpec,
    faces: tuple[Face, Face],
    observed: Tensor,
    kernel: Kernel,
) -> None:
    """Quantize each expert's rows of x as an operand of their own, whose seed is the call's plus the expert.

    Args:
        q: the view of all rows, which has what experts share; overwritten.
        observed: written, if it is not empty: fp32 [3], of all rows.
    """
    seed, row_bytes = q.seed, x.shape[-1] * x.element_size()
    seen = observed.new_zeros(len(experts.rows), observed.numel())
    q.row_start = None  # an expert's rows lie in their order
    for rows, own in zip(experts.rows, seen, strict=True):
        q.x, q.images = x.data_ptr() + rows.start * row_bytes, rows.end - rows.start
        q.seed, q.fold_images = seed + rows.expert, (rows.last - rows.block) * BLOCK
        if observed.numel():
            q.observed = own.data_ptr()
        write_to(q, spec, *part_of(faces, rows, spec))
        kernel(ctypes.byref(q))
    if observed.numel():
        observed[:2], observed[2] = seen[:, :2].amax(0), seen[:, 2].sum()


def part_of(faces: tuple[Face, Face], rows: Rows, spec: OperandSpec) -> tuple[Face, Face]:
    """Return an expert's part of the rowwise and the columnwise face of all experts, in any form."""
    each = BLOCK if spec.col == DEQUANTIZED else 1
    blocks = slice(rows.block * each, rows.last * each)
    row, col = faces
    return (
        Face(row.data[rows.here], row.scale[rows.here]),
        Face(col.data[blocks], col.scale[rows.block : rows.last]),
    )


def measure_operand(x: Tensor, spec: OperandSpec, experts: Experts | None = None) -> Tensor:
    """Return the amaxes as operand.measure_operand does; `experts` as for quantize_operand."""
    library = native.load() if x.device.type == "cpu" else None
    if library is None or not x.numel():
        return reference.measure_operand(x, spec)
    q, x, starts = operand_view(x, 1, spec.fold, spec.rht, spec.rht)
    if experts is not None:
        starts = _take_rows(q, experts)
    amax = torch.empty(2, dtype=torch.float32, device=x.device)
    q.amax, q.want_row, q.want_col = amax.data_ptr(), True, spec.rht
    library.nvfp4_amax(ctypes.byref(q))
    del starts
    if not spec.rht:
        amax[1] = amax[0]
    return amax


def operand_view(
    x: Tensor, groups: int, fold: Fold, rht: bool, columns: bool
) -> tuple[native.Operand, Tensor, Tensor | None]:
    """Return the kernels' view of x, x in a dtype that they take, and the table of folded rows if `columns` are read.

    The caller must hold on to the two tensors as long as the view is used: it has their addresses only.
    """
    x = x.float() if x.dtype == torch.float16 else x
    rank, channels = x.dim() - 2, x.shape[-1]
    rows, pixels = (x.shape[1], math.prod(x.shape[2:-1])) if rank else (1, 1)
    q = native.Operand(x=x.data_ptr(), images=x.shape[0], L=rows, Wp=pixels, C=channels, groups=groups, e4m3_max=448.0)
    q.fold_images, q.fold_L, q.rht = fold.images, fold.rows, rht
    q.in_bf16, q.threads = x.dtype == torch.bfloat16, torch.get_num_threads()
    starts = None
    if columns and fold.strips > 1:
        starts = _row_starts(fold, x.shape[0], rows, pixels * channels)
        q.row_start = starts.data_ptr()
    return q, x, starts


@functools.lru_cache(maxsize=256)
def _row_starts(fold: Fold, batch: int, rows: int, run: int) -> Tensor:
    """Return int64 [images, rows]: where each folded row of `run` values begins in x, -1 for zeros."""
    with torch.inference_mode(False):
        source = fold.source_rows(batch, rows)
        return torch.where(source >= 0, source * run, -1).contiguous()


def _take_rows(q: native.Operand, experts: Experts) -> Tensor:
    """Have the kernels read the rows of a matrix as experts have them; return what the caller must hold on to."""
    starts = np.full(experts.rows[-1].last * BLOCK, -1)  # numpy takes a tenth of torch's time for each expert
    for rows in experts.rows:
        first = rows.block * BLOCK
        starts[first : first + rows.end - rows.start] = np.arange(rows.start * q.C, rows.end * q.C, q.C)
    q.row_start, q.each_once = starts.ctypes.data, True
    return torch.from_numpy(starts)


def write_to(q: native.Operand, spec: OperandSpec, row: Face, col: Face) -> None:
    """Have the kernels write two faces, in the forms that the spec wants."""
    if spec.row == PACKED:
        q.row_codes, q.row_scale = row.data.data_ptr(), row.scale.data_ptr()
    elif spec.row == DEQUANTIZED:
        q.row_dq = row.data.data_ptr()
    elif spec.row == RECORDS:
        q.row_records = row.data.data_ptr()
    if spec.col == PACKED:
        q.col_codes, q.col_scale = col.data.data_ptr(), col.scale.data_ptr()
    elif spec.col == DEQUANTIZED:
        q.col_dq = col.data.data_ptr()
    elif spec.col == RECORDS:
        q.col_records = col.data.data_ptr()


def quantize_weight(w: Tensor, spec: WeightSpec, dtype: torch.dtype, amax: Tensor | None = None) -> WeightCodes:
    """Quantize as operand.quantize_weight does."""
    library = native.load() if w.device.type == "cpu" else None
    if library is None or not w.numel() or (not spec.two_d and spec.groups > 1):
        return reference.quantize_weight(w, spec, dtype, amax)
    w = w.detach()
    w = w.float() if w.dtype == torch.float16 else w
    if not spec.two_d:
        return _quantize_rows(w, spec, dtype, amax)
    if amax is None:  # of one long row: the order of values does not change a maximum
        row_of_all = layouts.in_memory_order(w).reshape(1, -1)
        amax = measure_operand(row_of_all, OperandSpec(1, Fold(1, 0, 1, 0, BLOCK)))[:1]
    else:
        amax = amax.clone(memory_format=torch.contiguous_format)  # an operator returns none of its arguments
    amax = power_of_two_amax(amax, spec.e4m3_max) if spec.pow2 else amax
    row, col = layouts.weight_faces(w, spec, dtype)
    q, held = weight_view(w, spec.groups, dtype, spec.e4m3_max)
    q.amax, q.error = amax.data_ptr(), ERRORS[spec.four_over_six]
    if spec.row == PACKED:
        q.codes, q.scale = row.data.data_ptr(), row.scale.data_ptr()
    else:
        q.dq = row.data.data_ptr()
    library.nvfp4_quantize_weight(ctypes.byref(q))
    del held
    return WeightCodes(row, col, amax)


def weight_view(w: Tensor, groups: int, dtype: torch.dtype, e4m3_max: int) -> tuple[native.Weight, Tensor]:
    """Return the kernels' view of a weight [axis 0, axis 1, *kernel] in fp32 or bf16, and what to hold."""
    w = w.resolve_neg() if w.is_neg() else w  # a view such as conj().imag holds the values with the other sign
    w_OCT = w.flatten(2) if w.dim() > 2 else w.unsqueeze(-1)  # a view where the kernel's axes lie next to each other
    n, channels, taps = w_OCT.shape
    q = native.Weight(w=w_OCT.data_ptr(), groups=groups, Og=n // groups, Cg=channels, T=taps, e4m3_max=float(e4m3_max))
    q.stride_o, q.stride_c, q.stride_t = w_OCT.stride()
    q.in_bf16, q.out_bf16 = w.dtype == torch.bfloat16, dtype == torch.bfloat16
    q.threads = torch.get_num_threads()
    return q, w_OCT


def rows_as_operand(w: Tensor, spec: WeightSpec) -> tuple[Tensor, OperandSpec]:
    """Return a weight of one group as an operand, which has the same 1x16 blocks: axis 0 takes the place of the batch.

    [axis 0, taps, axis 1] is an operand of axis 0 images with one image axis.
    """
    n, c, taps = w.shape[0], w.shape[1], math.prod(w.shape[2:])
    fold = Fold(1, 0, taps, 0, round_up(n, BLOCK))
    as_operand = OperandSpec(1, fold, spec.row, spec.col, four_over_six=spec.four_over_six, e4m3_max=spec.e4m3_max)
    return w.reshape(n, c, taps).transpose(1, 2).contiguous(), as_operand


def faces_of_rows(made: Operand, spec: WeightSpec, n: int, amax: Tensor) -> WeightCodes:
    """Return the faces of a weight with n rows that was quantized as an operand."""
    data, scale = made.col
    if spec.col == PACKED:
        data, scale = data.unsqueeze(0), scale.unsqueeze(0)
    elif spec.col == DEQUANTIZED:
        data = data[:n]  # without the rows that fill the last block
    return WeightCodes(made.row, Face(data, scale), amax)


def _quantize_rows(w: Tensor, spec: WeightSpec, dtype: torch.dtype, amax: Tensor | None) -> WeightCodes:
    """Quantize a weight of one group in 1x16 blocks."""
    w_OTC, as_operand = rows_as_operand(w, spec)
    given = None if amax is None else amax.expand(2)
    if spec.pow2:
        given = power_of_two_amax(measure_operand(w_OTC, as_operand) if given is None else given, spec.e4m3_max)
    made = quantize_operand(w_OTC, as_operand, dtype, None, given)
    return faces_of_rows(made, spec, w.shape[0], made.row_amax if given is None else given[:1].clone())


def unpack_columns(data: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Unpack as operand.unpack_columns does."""
    library = native.load() if data.device.type == "cpu" else None
    if library is None or not data.numel():
        return reference.unpack_columns(data, scale, dtype)
    return call_unpack_columns(library.nvfp4_unpack_columns, data, scale, dtype)


def unpack_rows(data: Tensor, scale: Tensor, channels: int, groups: int, dtype: torch.dtype) -> Tensor:
    """Unpack as operand.unpack_rows does."""
    library = native.load() if data.device.type == "cpu" else None
    if library is None or not data.numel():
        return reference.unpack_rows(data, scale, channels, groups, dtype)
    return call_unpack_rows(library.nvfp4_unpack_rows, data, scale, channels, groups, dtype)


def unpack_weight(
    data: Tensor, scale: Tensor, layout: WeightLayout, factor: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Unpack as operand.unpack_weight does."""
    library = native.load() if data.device.type == "cpu" else None
    if library is None or not data.numel() or layout.columnwise:
        return reference.unpack_weight(data, scale, layout, factor, dtype)
    return call_unpack_weight(library.nvfp4_unpack_weight, data, scale, layout, factor, dtype)


def call_unpack_columns(kernel: Kernel, data: Tensor, scale: Tensor, dtype: torch.dtype, *more: object) -> Tensor:
    """Have a kernel unpack columns; `more` are arguments of its own."""
    out = layouts.for_one_call((scale.shape[0] * BLOCK, *scale.shape[1:]), dtype, scale.device)
    pointers, how = _pointers(data, scale, out), (dtype == torch.bfloat16, torch.get_num_threads())
    kernel(*pointers, scale.shape[0], math.prod(scale.shape[1:]), *how, *more)
    return out


def call_unpack_rows(
    kernel: Kernel, data: Tensor, scale: Tensor, channels: int, groups: int, dtype: torch.dtype, *more: object
) -> Tensor:
    """Have a kernel unpack rows; `more` are arguments of its own."""
    out = data.new_empty((*data.shape[:-1], channels), dtype=dtype)
    segments = math.prod(data.shape[:-1]) * groups
    pointers, how = _pointers(data, scale, out), (dtype == torch.bfloat16, torch.get_num_threads())
    kernel(*pointers, segments, channels // groups, *how, *more)
    return out


def _pointers(*tensors: Tensor) -> tuple[int, ...]:
    return tuple(tensor.data_ptr() for tensor in tensors)


def call_unpack_weight(
    kernel: Kernel,
    data: Tensor,
    scale: Tensor,
    layout: WeightLayout,
    factor: Tensor | None,
    dtype: torch.dtype,
    *more: object,
) -> Tensor:
    """Have a kernel unpack a weight's rowwise face; `more` are arguments of its own."""
    out = layouts.for_one_call((layout.n, data.shape[1], layout.channels), dtype, data.device)
    by_row = scale.dim() == 3  # scales of 1x16 lie as those of the tiles of groups of one row each
    groups = layout.n if by_row else layout.groups
    q = native.Weight(groups=groups, Og=layout.n // groups, Cg=layout.channels, T=data.shape[1])
    q.dq, q.codes, q.scale = out.data_ptr(), data.data_ptr(), scale.data_ptr()
    q.out_bf16, q.threads = dtype == torch.bfloat16, torch.get_num_threads()
    if factor is not None:
        q.amax = factor.data_ptr()  # the field carries the factor here
    kernel(ctypes.byref(q), *more)
    return out


class ScaleOne:
    """Quantizes to fp4_e4m3_only, which is NVFP4 with a tensor scale of 1; functions as those of this file."""

    measure_operand = staticmethod(measure_operand)
    unpack_columns = staticmethod(unpack_columns)
    unpack_rows = staticmethod(unpack_rows)
    unpack_weight = staticmethod(unpack_weight)

    @staticmethod
    def quantize_operand(
        x: Tensor, spec: OperandSpec, dtype: torch.dtype, seed: Tensor | None, amax: Tensor | None
    ) -> Operand:
        """Quantize as operand.quantize_operand does. Of a given `amax` only matters whether it is finite."""
        one = torch.full((2,), TENSOR_AMAX, dtype=torch.float32, device=x.device)
        made = quantize_operand(x, spec, dtype, seed, one)  # NaN stands for an amax that is not finite
        if amax is None:
            return made._replace(observed=made.observed[:0])
        row_amax, col_amax = tensor_amax(made.row_amax, amax[:1]), tensor_amax(made.col_amax, amax[1:])
        return made._replace(row_amax=row_amax, col_amax=col_amax)

    @staticmethod
    def quantize_weight(w: Tensor, spec: WeightSpec, dtype: torch.dtype, amax: Tensor | None = None) -> WeightCodes:
        """Quantize as operand.quantize_weight does. Of a given `amax` only matters whether it is finite."""
        used = tensor_amax(reference.amax_of(w), *(() if amax is None else (amax,)))
        one = torch.full((1,), TENSOR_AMAX, dtype=torch.float32, device=w.device)
        return quantize_weight(w, spec, dtype, one)._replace(amax=used)
