"""Quantize a matrix on a CPU by the compiled kernels, or on any device by Triton's: what matrix.py runs beside the
reference.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from te_nvfp4_cv.backend import dispatch, native
from te_nvfp4_cv.formats import BLOCK, E4M3_MAX, round_up
from te_nvfp4_cv.ops.quantize import reference_matrix
from te_nvfp4_cv.ops.quantize.cpu import quantize_operand
from te_nvfp4_cv.ops.records import NONE, PACKED, Fold, OperandSpec


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
    if amax is not None:  # exactly what was given; an operand's becomes NaN where the observed one is not finite
        row_amax, col_amax = amax[:1], amax[1:]
    row_amax, col_amax = row_amax.clone(), col_amax.clone()  # of one tensor, and each face is written in place
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
