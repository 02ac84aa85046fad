"""Quantization for the vendor and the integer backend on a CPU, with the reference's bits.

The compiled kernels of backend/native do it. Where there is no compiler, and for what they do not cover (row-scaled
activations, 1x16 weights of more than one group), the reference's plain torch runs instead.
"""

from __future__ import annotations

import ctypes
import functools
import math
from typing import Any

import torch
from torch import Tensor

from te_nvfp4_cv.backend import dispatch, native
from te_nvfp4_cv.formats import BLOCK, E4M3_MAX, power_of_two_amax, round_up
from te_nvfp4_cv.ops import layouts
from te_nvfp4_cv.ops.block_scales import TENSOR_AMAX, tensor_amax
from te_nvfp4_cv.ops.quantize import reference, reference_matrix
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


def quantize_2d(x_MK: Tensor, *, kernels: bool = False, **settings: Any) -> reference_matrix.Faces:
    """Quantize as reference_matrix.quantize_2d does, by compiled kernels where they cover the case.

    Args:
        kernels: use the Triton kernels on any device; on CUDA they are used anyway.
    """
    plain = not settings.get("two_d") and not settings.get("row_scaled") and settings.get("with_sign", True)
    rowwise, columnwise = settings.get("rowwise", True), settings.get("columnwise", False)
    kernels = kernels or dispatch.kernels_serve(x_MK.device)
    covered = kernels or native.available(x_MK.device)
    random = settings.get("random_rowwise") is not None or settings.get("random_columnwise") is not None
    given = settings.get("amax_rowwise"), settings.get("amax_columnwise")
    # Without RHT the columnwise face has the rowwise amax, as in the reference.
    if given[1] is None and not settings.get("rht"):
        given = given[0], given[0]
    some = any(amax is not None for amax, wanted in zip(given, (rowwise, columnwise), strict=True) if wanted)
    every = all(amax is not None for amax, wanted in zip(given, (rowwise, columnwise), strict=True) if wanted)
    # Kernels draw their random bytes themselves, and take the amaxes of all faces or of none.
    if not plain or not covered or random or some != every or (some and not kernels) or not x_MK.numel():
        return reference_matrix.quantize_2d(x_MK, **settings)
    M, K = x_MK.shape
    images = round_up(M, BLOCK)
    seed = settings.get("seed")
    if seed is not None and not isinstance(seed, Tensor):
        seed = torch.tensor([seed], dtype=torch.int64, device=x_MK.device)
    amax = None
    if some:
        either = given[0] if given[0] is not None else given[1]
        # A face that is not made needs no amax, but the kernel reads two numbers.
        amax = torch.cat([(either if one is None else one).reshape(1).float() for one in given])  # type: ignore[union-attr]
    if kernels:
        from te_nvfp4_cv.ops.quantize.triton import launch

        run: Any = launch.quantize_operand
    else:
        run = quantize_operand
    # The matrix is a linear layer's operand: M images without image axes, of K channels.
    spec = OperandSpec(
        groups=1,
        fold=Fold(1, 0, 1, 0, images),
        row=PACKED if rowwise else NONE,
        col=PACKED if columnwise else NONE,
        rht=settings.get("rht", False),
        stochastic=settings.get("stochastic_rounding", False),
        four_over_six=settings.get("four_over_six"),
        e4m3_max=settings.get("e4m3_max", E4M3_MAX),
    )
    (row_data, row_scale), row_amax, (col_data, col_scale), col_amax, _ = run(
        x_MK.contiguous(), spec, torch.float32, seed, amax
    )
    if amax is not None:
        # Exactly what was given, while an operand's amax becomes NaN where the observed one is not finite.
        row_amax, col_amax = amax[:1].clone(), amax[1:].clone()
    fp8, nothing = torch.float8_e4m3fn, row_amax.new_empty(0)
    if columnwise:  # [M16, K, 8] -> [K, Mp / 2]
        col_data = col_data.transpose(0, 1).reshape(K, images // 2).contiguous()
        col_scale = col_scale.t().contiguous()
    return reference_matrix.Faces(
        row_data,
        row_scale.view(fp8),
        row_amax if rowwise else nothing,
        col_data,
        col_scale.view(fp8),
        col_amax if columnwise else nothing,
    )


def quantize_operand(
    x: Tensor,
    spec: OperandSpec,
    dtype: torch.dtype,
    seed: Tensor | None,
    amax: Tensor | None,
    into: tuple[Face, Face] | None = None,
    observe: bool = True,
) -> Operand:
    """Quantize as operand.quantize_operand does. The compiled kernels write both faces `into` memory that is given.

    Args:
        observe: if False, `amax` is one that holds what the kernels would observe, and they do not look.
    """
    library = native.load() if x.device.type == "cpu" else None
    if library is None or spec.row_scaled or not x.numel():
        return reference.quantize_operand(x, spec, dtype, seed, amax)
    row_form, col_form, rht = spec.row, spec.col, spec.rht
    q, x, starts = _operand(x, spec.groups, spec.fold, rht, col_form != NONE)
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
    if row_form == PACKED:
        q.row_codes, q.row_scale = row.data.data_ptr(), row.scale.data_ptr()
    elif row_form == DEQUANTIZED:
        q.row_dq = row.data.data_ptr()
    elif row_form == RECORDS:
        q.row_records = row.data.data_ptr()
    if col_form == PACKED:
        q.col_codes, q.col_scale = col.data.data_ptr(), col.scale.data_ptr()
    elif col_form == DEQUANTIZED:
        q.col_dq = col.data.data_ptr()
    elif col_form == RECORDS:
        q.col_records = col.data.data_ptr()
    library.nvfp4_quantize(ctypes.byref(q))
    # Held until here, because the kernel read the table of rows by its address.
    del starts
    if observe:
        if not rht:  # folded columns may leave rows of x out
            observed[:2] = observed[0] if row_form != NONE else measure_operand(x, spec)
        used = reference.unless_non_finite(used, observed[:2])
    # Clones, so that an amax that backward saves does not keep the other one's memory.
    return Operand(row, used[:1].clone(), col, used[1:].clone(), observed)


def measure_operand(x: Tensor, spec: OperandSpec) -> Tensor:
    """Return the amaxes as operand.measure_operand does."""
    library = native.load() if x.device.type == "cpu" else None
    if library is None or not x.numel():
        return reference.measure_operand(x, spec)
    q, x, starts = _operand(x, 1, spec.fold, spec.rht, spec.rht)
    amax = torch.empty(2, dtype=torch.float32, device=x.device)
    q.amax, q.want_row, q.want_col = amax.data_ptr(), True, spec.rht
    library.nvfp4_amax(ctypes.byref(q))
    del starts
    if not spec.rht:
        amax[1] = amax[0]
    return amax


def _operand(
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


def quantize_weight(w: Tensor, spec: WeightSpec, dtype: torch.dtype, amax: Tensor | None = None) -> WeightCodes:
    """Quantize as operand.quantize_weight does."""
    library = native.load() if w.device.type == "cpu" else None
    if library is None or not w.numel() or (not spec.two_d and spec.groups > 1):
        return reference.quantize_weight(w, spec, dtype, amax)
    w = w.detach()
    w = w.float() if w.dtype == torch.float16 else w
    if not spec.two_d:
        return _quantize_rows(w, spec, dtype, amax)
    w_OCT = w.flatten(2) if w.dim() > 2 else w.unsqueeze(-1)  # a view where the kernel's axes lie next to each other
    if amax is None:  # of one long row: the order of values does not change a maximum
        row_of_all = layouts.in_memory_order(w).reshape(1, -1)
        amax = measure_operand(row_of_all, OperandSpec(1, Fold(1, 0, 1, 0, BLOCK)))[:1]
    amax = amax.contiguous()
    amax = power_of_two_amax(amax, spec.e4m3_max) if spec.pow2 else amax
    row, col = layouts.weight_faces(w, spec, dtype)
    q = _weight(w_OCT, spec.groups, w.dtype == torch.bfloat16, dtype, spec.e4m3_max)
    q.amax, q.error = amax.data_ptr(), ERRORS[spec.four_over_six]
    if spec.row == PACKED:
        q.codes, q.scale = row.data.data_ptr(), row.scale.data_ptr()
    else:
        q.dq = row.data.data_ptr()
    library.nvfp4_quantize_weight(ctypes.byref(q))
    return WeightCodes(row, col, amax.clone())


def _quantize_rows(w: Tensor, spec: WeightSpec, dtype: torch.dtype, amax: Tensor | None) -> WeightCodes:
    """Quantize a weight of one group in 1x16 blocks: axis 0 takes the place of the batch of an operand."""
    n, c, taps = w.shape[0], w.shape[1], math.prod(w.shape[2:])
    w_OTC = w.reshape(n, c, taps).transpose(1, 2).contiguous()
    # A weight [axis 0, taps, axis 1] is an operand of axis 0 images with one image axis.
    fold = Fold(1, 0, taps, 0, round_up(n, BLOCK))
    as_operand = OperandSpec(1, fold, spec.row, spec.col, four_over_six=spec.four_over_six, e4m3_max=spec.e4m3_max)
    given = None if amax is None else amax.expand(2)
    if spec.pow2:
        given = power_of_two_amax(measure_operand(w_OTC, as_operand) if given is None else given, spec.e4m3_max)
    made = quantize_operand(w_OTC, as_operand, dtype, None, given)
    data, scale = made.col
    if spec.col == PACKED:
        data, scale = data.unsqueeze(0), scale.unsqueeze(0)
    elif spec.col == DEQUANTIZED:
        data = data[:n]  # without the rows that fill the last block
    return WeightCodes(made.row, Face(data, scale), made.row_amax if given is None else given[:1].clone())


def unpack_columns(data: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Unpack as operand.unpack_columns does."""
    library = native.load() if data.device.type == "cpu" else None
    if library is None or not data.numel():
        return reference.unpack_columns(data, scale, dtype)
    out = layouts.for_one_call((scale.shape[0] * BLOCK, *scale.shape[1:]), dtype, scale.device)
    pointers, how = _pointers(data, scale, out), (dtype == torch.bfloat16, torch.get_num_threads())
    library.nvfp4_unpack_columns(*pointers, scale.shape[0], math.prod(scale.shape[1:]), *how)
    return out


def unpack_rows(data: Tensor, scale: Tensor, channels: int, groups: int, dtype: torch.dtype) -> Tensor:
    """Unpack as operand.unpack_rows does."""
    library = native.load() if data.device.type == "cpu" else None
    if library is None or not data.numel():
        return reference.unpack_rows(data, scale, channels, groups, dtype)
    out = data.new_empty((*data.shape[:-1], channels), dtype=dtype)
    segments = math.prod(data.shape[:-1]) * groups
    pointers, how = _pointers(data, scale, out), (dtype == torch.bfloat16, torch.get_num_threads())
    library.nvfp4_unpack_rows(*pointers, segments, channels // groups, *how)
    return out


def unpack_weight(
    data: Tensor, scale: Tensor, layout: WeightLayout, factor: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Unpack as operand.unpack_weight does."""
    library = native.load() if data.device.type == "cpu" else None
    if library is None or not data.numel() or layout.columnwise:
        return reference.unpack_weight(data, scale, layout, factor, dtype)
    out = layouts.for_one_call((layout.n, data.shape[1], layout.channels), dtype, data.device)
    by_row = scale.dim() == 3  # scales of 1x16 lie as those of the tiles of groups of one row each
    q = _weight(out.transpose(1, 2), layout.n if by_row else layout.groups, False, dtype, E4M3_MAX)
    q.dq, q.codes, q.scale = out.data_ptr(), data.data_ptr(), scale.data_ptr()
    if factor is not None:
        q.amax = factor.data_ptr()  # the field carries the factor here
    library.nvfp4_unpack_weight(ctypes.byref(q))
    return out


def _pointers(*tensors: Tensor) -> tuple[int, ...]:
    return tuple(tensor.data_ptr() for tensor in tensors)


def _weight(w_OCT: Tensor, groups: int, in_bf16: bool, dtype: torch.dtype, e4m3_max: int) -> native.Weight:
    """Return the kernels' view of a weight [axis 0, axis 1, taps] of any strides."""
    n, channels, taps = w_OCT.shape
    q = native.Weight(w=w_OCT.data_ptr(), groups=groups, Og=n // groups, Cg=channels, T=taps, e4m3_max=float(e4m3_max))
    q.stride_o, q.stride_c, q.stride_t = w_OCT.stride()
    q.in_bf16, q.out_bf16, q.threads = in_bf16, dtype == torch.bfloat16, torch.get_num_threads()
    return q


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
