"""Quantization for the vendor backend on a CPU: the compiled kernels of ops/native, the reference's plain torch where
there are none. Same bits.

What the kernels do not cover (row-scaled activations, 1x16 kernels of more than one group) goes through
reference_operands as well.
"""

from __future__ import annotations

import ctypes
import math
from typing import Any

import torch
from torch import Tensor

from te_nvfp4_cv.backend import dispatch, native, scratch
from te_nvfp4_cv.formats import power_of_two_amax
from te_nvfp4_cv.ops.geometry import Fold
from te_nvfp4_cv.ops.quantize import reference as reference_operands
from te_nvfp4_cv.ops.quantize import reference_matrix

NONE, PACKED, DEQUANTIZED = 0, 1, 2
BLOCK = 16
ERRORS = {None: 0, "MAE": 1, "MSE": 2}  # of 4over6, as native.cpp numbers them


def quantize_2d(x_MK: Tensor, *, kernels: bool = False, **settings: Any) -> reference_matrix.Faces:
    """reference.quantize_2d with the same arguments, by compiled kernels where they cover the case.

    Args:
        kernels: by the Triton kernels, on any device; on CUDA they are taken anyway.
    """
    plain = not settings.get("two_d") and not settings.get("row_scaled") and settings.get("with_sign", True)
    rowwise, columnwise = settings.get("rowwise", True), settings.get("columnwise", False)
    kernels = kernels or dispatch.kernels_serve(x_MK.device)
    covered = kernels or native.available(x_MK.device)
    random = settings.get("random_rowwise") is not None or settings.get("random_columnwise") is not None
    given = settings.get("amax_rowwise"), settings.get("amax_columnwise")
    if given[1] is None and not settings.get("rht"):
        given = given[0], given[0]
    some = any(amax is not None for amax, wanted in zip(given, (rowwise, columnwise), strict=True) if wanted)
    every = all(amax is not None for amax, wanted in zip(given, (rowwise, columnwise), strict=True) if wanted)
    if not plain or not covered or random or some != every or (some and not kernels) or not x_MK.numel():
        return reference_matrix.quantize_2d(x_MK, **settings)
    M, K = x_MK.shape
    images = -(-M // BLOCK) * BLOCK
    seed = settings.get("seed")
    if seed is not None and not isinstance(seed, Tensor):
        seed = torch.tensor([seed], dtype=torch.int64, device=x_MK.device)
    amax = None
    if some:
        either = given[0] if given[0] is not None else given[1]
        amax = torch.cat([(either if one is None else one).reshape(1).float() for one in given])  # type: ignore[union-attr]
    if kernels:
        from te_nvfp4_cv.ops.quantize.triton import launch

        run: Any = launch.quantize_operand
    else:
        run = quantize_operand
    fields = run(
        x_MK.contiguous(),
        1,
        Fold(1, 0, 1, 0, images),
        PACKED if rowwise else NONE,
        PACKED if columnwise else NONE,
        settings.get("rht", False),
        settings.get("stochastic_rounding", False),
        settings.get("four_over_six"),
        settings.get("e4m3_max", 448),
        False,
        torch.float32,
        seed,
        amax,
    )
    row_data, row_scale, row_amax, col_data, col_scale, col_amax, _ = fields
    if amax is not None:
        row_amax, col_amax = amax[:1].clone(), amax[1:].clone()
    fp8, empty = torch.float8_e4m3fn, row_amax.new_empty(0)
    if columnwise:  # [M16, K, 8] -> [K, Mp / 2]
        col_data = col_data.transpose(0, 1).reshape(K, images // 2).contiguous()
        col_scale = col_scale.t().contiguous()
    return reference_matrix.Faces(
        row_data,
        row_scale.view(fp8),
        row_amax if rowwise else empty,
        col_data,
        col_scale.view(fp8),
        col_amax if columnwise else empty,
    )


def quantize_operand(
    x: Tensor,
    groups: int,
    fold: Fold,
    row: int,
    col: int,
    rht: bool,
    stochastic: bool,
    four_over_six: str | None,
    e4m3_max: int,
    row_scaled: bool,
    dtype: torch.dtype,
    seed: Tensor | None,
    amax: Tensor | None,
) -> tuple[Tensor, ...]:
    """See operands.quantize_operand."""
    library = native.load() if x.device.type == "cpu" else None
    if library is None or row_scaled or not x.numel():
        return reference_operands.quantize_operand(
            x, groups, fold, row, col, rht, stochastic, four_over_six, e4m3_max, row_scaled, dtype, seed, amax
        )
    q, x, starts = _operand(x, groups, fold, rht)
    channels = x.shape[-1]
    folded = (fold.rows, *x.shape[2:]) if x.dim() > 2 else (channels,)
    blocks = groups * -(-(channels // groups) // BLOCK)
    empty = x.new_empty(0, dtype=torch.uint8)
    row_data, row_scale, col_data, col_scale = (torch.empty_like(empty) for _ in range(4))
    q.seed, q.stochastic, q.out_bf16 = 0 if seed is None else int(seed), stochastic, dtype == torch.bfloat16
    q.error, q.e4m3_max = ERRORS[four_over_six], float(e4m3_max)
    used = torch.empty(2, dtype=torch.float32)
    q.amax = used.data_ptr()
    observed = x.new_empty(0 if amax is None else 3, dtype=torch.float32)
    if amax is None:
        q.want_row, q.want_col = row != NONE or not rht, col != NONE and rht
        library.nvfp4_amax(ctypes.byref(q))
        if not rht:
            used[1] = used[0]
    else:
        used.copy_(amax)
        q.observed = observed.data_ptr()
    q.want_row, q.want_col = row != NONE, col != NONE
    if row == PACKED:
        row_data, row_scale = empty.new_empty(*x.shape[:-1], blocks * 8), empty.new_empty(*x.shape[:-1], blocks)
        q.row_codes, q.row_scale = row_data.data_ptr(), row_scale.data_ptr()
    elif row == DEQUANTIZED:
        row_data = scratch.empty(tuple(x.shape), dtype, x.device)
        q.row_dq = row_data.data_ptr()
    if col == PACKED:
        col_data, col_scale = (
            empty.new_empty(fold.images // BLOCK, *folded, 8),
            empty.new_empty(fold.images // BLOCK, *folded),
        )
        q.col_codes, q.col_scale = col_data.data_ptr(), col_scale.data_ptr()
    elif col == DEQUANTIZED:
        col_data = scratch.empty((fold.images, *folded), dtype, x.device)
        q.col_dq = col_data.data_ptr()
    library.nvfp4_quantize(ctypes.byref(q))
    del starts
    if amax is not None:
        if not rht:  # folded columns may leave rows of x out
            observed[:2] = observed[0] if row != NONE else measure_operand(x, fold, False)
        used = reference_operands.unless_non_finite(used, observed[:2])
    return row_data, row_scale, used[:1].clone(), col_data, col_scale, used[1:].clone(), observed


def measure_operand(x: Tensor, fold: Fold, rht: bool) -> Tensor:
    """See operands.measure_operand."""
    library = native.load() if x.device.type == "cpu" else None
    if library is None or not x.numel():
        return reference_operands.measure_operand(x, fold, rht)
    q, x, starts = _operand(x, 1, fold, rht)
    amax = torch.empty(2, dtype=torch.float32)
    q.amax, q.want_row, q.want_col = amax.data_ptr(), True, rht
    library.nvfp4_amax(ctypes.byref(q))
    del starts
    if not rht:
        amax[1] = amax[0]
    return amax


def _operand(x: Tensor, groups: int, fold: Fold, rht: bool) -> tuple[native.Operand, Tensor, Tensor | None]:
    """The kernels' view of x; x in a dtype that they take, and the table of folded rows: keep both while it is used."""
    x = x.float() if x.dtype == torch.float16 else x
    rank, channels = x.dim() - 2, x.shape[-1]
    rows, pixels = (x.shape[1], math.prod(x.shape[2:-1])) if rank else (1, 1)
    q = native.Operand(
        x=x.data_ptr(),
        images=x.shape[0],
        L=rows,
        Wp=pixels,
        C=channels,
        groups=groups,
        fold_images=fold.images,
        fold_L=fold.rows,
        rht=rht,
        in_bf16=x.dtype == torch.bfloat16,
        threads=torch.get_num_threads(),
        e4m3_max=448.0,
    )
    starts = None
    if fold.strips > 1:
        source = fold.source_rows(x.shape[0], rows)
        starts = torch.where(source >= 0, source * (pixels * channels), -1).contiguous()
        q.row_start = starts.data_ptr()
    return q, x, starts


def quantize_weight(
    w: Tensor,
    groups: int,
    row: int,
    col: int,
    two_d: bool,
    four_over_six: str | None,
    e4m3_max: int,
    pow2: bool,
    dtype: torch.dtype,
    amax: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """See operands.quantize_weight."""
    library = native.load() if w.device.type == "cpu" else None
    n, c, taps = w.shape[0], w.shape[1], math.prod(w.shape[2:])
    if library is None or not w.numel() or (not two_d and groups > 1):
        return reference_operands.quantize_weight(
            w, groups, row, col, two_d, four_over_six, e4m3_max, pow2, dtype, amax
        )
    w = w.detach()
    w = w.float() if w.dtype == torch.float16 else w
    if not two_d:  # axis 0 takes the place of the batch: the operand kernels do the rest
        w_OTC = w.reshape(n, c, taps).transpose(1, 2).contiguous()
        fold = Fold(1, 0, taps, 0, -(-n // BLOCK) * BLOCK)
        given = None if amax is None else amax.expand(2)
        if pow2:
            given = power_of_two_amax(measure_operand(w_OTC, fold, False) if given is None else given, e4m3_max)
        row_data, row_scale, own, col_data, col_scale, *_ = quantize_operand(
            w_OTC, 1, fold, row, col, False, False, four_over_six, e4m3_max, False, dtype, None, given
        )
        amax = own if given is None else given[:1].clone()
        if col == PACKED:
            col_data, col_scale = col_data.unsqueeze(0), col_scale.unsqueeze(0)
        return row_data, row_scale, col_data[:n] if col == DEQUANTIZED else col_data, col_scale, amax
    w_OCT = _tap_view(w)
    kb, ob = -(-c // BLOCK), -(-(n // groups) // BLOCK)
    amax = _amax_of(w, library) if amax is None else amax.contiguous()
    amax = power_of_two_amax(amax, e4m3_max) if pow2 else amax
    empty = w.new_empty(0, dtype=torch.uint8)
    row_data, row_scale = torch.empty_like(empty), torch.empty_like(empty)
    q = _weight(w_OCT, groups, w.dtype == torch.bfloat16, dtype, e4m3_max)
    q.amax, q.error = amax.data_ptr(), ERRORS[four_over_six]
    if row == PACKED:
        row_data, row_scale = empty.new_empty(n, taps, kb * 8), empty.new_empty(groups, ob, taps, kb)
        q.codes, q.scale = row_data.data_ptr(), row_scale.data_ptr()
    else:
        row_data = w.new_empty((n, taps, c), dtype=dtype)
        q.dq = row_data.data_ptr()
    library.nvfp4_quantize_weight(ctypes.byref(q))
    return row_data, row_scale, empty, torch.empty_like(empty), amax.clone()


def _amax_of(w: Tensor, library: ctypes.CDLL) -> Tensor:
    """fp32 [1] of a kernel, bf16 or fp32, any strides."""
    amax = torch.empty(2, dtype=torch.float32)
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    in_order = w.is_contiguous() or (w.dim() in formats and w.is_contiguous(memory_format=formats[w.dim()]))
    dense = w if in_order else w.contiguous()
    measure = native.Operand(
        x=dense.data_ptr(),
        images=1,
        L=1,
        Wp=1,
        C=w.numel(),
        groups=1,
        fold_images=16,
        fold_L=1,
        amax=amax.data_ptr(),
        in_bf16=w.dtype == torch.bfloat16,
        threads=torch.get_num_threads(),
        want_row=1,
    )
    library.nvfp4_amax(ctypes.byref(measure))
    return amax[:1]


def unpack_columns(data: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """See operands.unpack_columns."""
    library = native.load() if data.device.type == "cpu" else None
    if library is None or not data.numel():
        return reference_operands.unpack_columns(data, scale, dtype)
    out = scratch.empty((scale.shape[0] * BLOCK, *scale.shape[1:]), dtype, scale.device)
    run = math.prod(scale.shape[1:])
    library.nvfp4_unpack_columns(
        data.data_ptr(),
        scale.data_ptr(),
        out.data_ptr(),
        scale.shape[0],
        run,
        dtype == torch.bfloat16,
        torch.get_num_threads(),
    )
    return out


def unpack_rows(data: Tensor, scale: Tensor, channels: int, groups: int, dtype: torch.dtype) -> Tensor:
    """See operands.unpack_rows."""
    library = native.load() if data.device.type == "cpu" else None
    if library is None or not data.numel():
        return reference_operands.unpack_rows(data, scale, channels, groups, dtype)
    out = data.new_empty((*data.shape[:-1], channels), dtype=dtype)
    segments = math.prod(data.shape[:-1]) * groups
    library.nvfp4_unpack_rows(
        data.data_ptr(),
        scale.data_ptr(),
        out.data_ptr(),
        segments,
        channels // groups,
        dtype == torch.bfloat16,
        torch.get_num_threads(),
    )
    return out


def unpack_weight(
    data: Tensor,
    scale: Tensor,
    n: int,
    channels: int,
    groups: int,
    columnwise: bool,
    factor: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """See operands.unpack_weight."""
    library = native.load() if data.device.type == "cpu" else None
    if library is None or not data.numel() or columnwise:
        return reference_operands.unpack_weight(data, scale, n, channels, groups, columnwise, factor, dtype)
    out = scratch.empty((n, data.shape[1], channels), dtype, data.device)
    by_row = scale.dim() == 3  # scales of 1x16 lie as those of the tiles of groups of one row each
    q = _weight(out.transpose(1, 2), n if by_row else groups, False, dtype, 448)
    q.dq, q.codes, q.scale = out.data_ptr(), data.data_ptr(), scale.data_ptr()
    if factor is not None:
        q.amax = factor.data_ptr()
    library.nvfp4_unpack_weight(ctypes.byref(q))
    return out


def _weight(w_OCT: Tensor, groups: int, in_bf16: bool, dtype: torch.dtype, e4m3_max: int) -> native.Weight:
    return native.Weight(
        w=w_OCT.data_ptr(),
        groups=groups,
        Og=w_OCT.shape[0] // groups,
        Cg=w_OCT.shape[1],
        T=w_OCT.shape[2],
        stride_o=w_OCT.stride(0),
        stride_c=w_OCT.stride(1),
        stride_t=w_OCT.stride(2),
        in_bf16=in_bf16,
        out_bf16=dtype == torch.bfloat16,
        threads=torch.get_num_threads(),
        e4m3_max=float(e4m3_max),
    )


def _tap_view(w: Tensor) -> Tensor:
    """[axis 0, axis 1, taps]; a view wherever the kernel axes can be merged without a copy (contiguous and
    channels_last).
    """
    return w.flatten(2) if w.dim() > 2 else w.unsqueeze(-1)
