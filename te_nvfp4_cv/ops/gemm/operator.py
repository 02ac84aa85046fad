"""The TransformerEngine-style GEMM of two NVFP4Tensors, for the three products of a layer.

    layout  operands  faces               result        which
    "TN"    x, w      rowwise, rowwise     [..., N]      fprop  y  = x w^T
    "NN"    dy, w     rowwise, columnwise  [..., K]      dgrad  dx = dy w
    "NT"    dy, x     columnwise, columnwise  [N, K]     wgrad  dw = dy^T x

    out = alpha * sum of products (+ bias) (+ out), in fp32, cast once;   alpha = (amax_a amax_b) f32(1 / (36 E_a E_b))

A row-scaled operand is multiplied with amax 1, and its rows' amax after: f32(row * column) where the other side has one
amax, else rows, then columns. A non-finite amax of either operand makes the whole result non-finite.
Refused: a missing face, lengths that differ, operands of which only one is rotated.
The registered operator is te_nvfp4_cv::gemm, on plain tensors; reference.py, vendor.py and launch.py hold
its inner product.
"""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import Tensor

from te_nvfp4_cv import formats
from te_nvfp4_cv.backend.registration import without_autocast
from te_nvfp4_cv.ops.gemm import reference, vendor


def _implementation(backend: str) -> Any:
    """The module whose `multiply` serves a backend; the Triton one is imported when it is first used."""
    if backend == "triton":
        from te_nvfp4_cv.ops.gemm.triton import launch

        return launch
    return reference if backend == "reference" else vendor


@without_autocast
@torch.library.custom_op("te_nvfp4_cv::gemm", mutates_args=())
def _gemm_op(
    a_data: Tensor,
    a_scale: Tensor,
    a_amax: Tensor,
    a_e4m3_max: int,
    a_row_scaled: bool,
    b_data: Tensor,
    b_scale: Tensor,
    b_amax: Tensor,
    b_e4m3_max: int,
    b_row_scaled: bool,
    bias: Optional[Tensor],  # noqa: UP045  (the schema is inferred from these annotations)
    addend: Optional[Tensor],  # noqa: UP045
    out_dtype: torch.dtype,
    backend: str,
) -> Tensor:
    """The registered operator: inner products by the backend, then scales, bias and sum in fp32."""
    with torch.autocast(a_data.device.type, enabled=False):
        total = _implementation(backend).multiply(a_data, a_scale, b_data, b_scale)
    if a_row_scaled or b_row_scaled:
        one = torch.ones_like(a_amax[:1])
        total = total * formats.alpha(one, one, a_e4m3_max, b_e4m3_max)
        rows, columns = a_amax.unsqueeze(1), b_amax.unsqueeze(0)
        total = total * rows * columns if a_row_scaled and b_row_scaled else total * (rows * columns)
        total = total + ((a_amax * 0).sum() + (b_amax * 0).sum())  # NaN from one row reaches every output
    else:
        total = total * formats.alpha(a_amax, b_amax, a_e4m3_max, b_e4m3_max)
    if bias is not None:
        total = total + bias.to(torch.float32)
    if addend is not None:
        total = total + addend.to(torch.float32)
    return total.to(out_dtype)


@_gemm_op.register_fake
def _gemm_fake(
    a_data: Tensor,
    a_scale: Tensor,
    a_amax: Tensor,
    a_e4m3_max: int,
    a_row_scaled: bool,
    b_data: Tensor,
    b_scale: Tensor,
    b_amax: Tensor,
    b_e4m3_max: int,
    b_row_scaled: bool,
    bias: Tensor | None,
    addend: Tensor | None,
    out_dtype: torch.dtype,
    backend: str,
) -> Tensor:
    return a_data.new_empty(a_data.shape[0], b_data.shape[0], dtype=out_dtype)
