"""The TransformerEngine-style GEMM of two quantized matrices, for the three products of a layer.

    layout  operands  faces                   result    which
    "TN"    x, w      rowwise, rowwise        [..., N]  fprop  y  = x w^T
    "NN"    dy, w     rowwise, columnwise     [..., K]  dgrad  dx = dy w
    "NT"    dy, x     columnwise, columnwise  [N, K]    wgrad  dw = dy^T x

    out = alpha * sum of products (+ bias) (+ out), in fp32, cast once;   alpha = (amax_a amax_b) f32(1 / (36 E_a E_b))

A row-scaled operand is multiplied with amax 1, and its rows' amax is applied after: f32(row * column) where the other
operand has one amax, else rows, then columns. A non-finite amax of either operand makes the whole result non-finite.
The inner product is that of reference.py, vendor.py, cublas.py or triton/launch.py. Nothing is checked here:
tensor/gemm.py refuses what does not fit.
"""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import Tensor

from te_nvfp4_cv import formats
from te_nvfp4_cv.backend.registration import without_autocast
from te_nvfp4_cv.ops.gemm import cublas, reference, vendor


def _implementation(backend: str, a: Tensor, b: Tensor) -> Any:
    """Return the module whose `multiply` serves packed a and b; the Triton one is imported when it is first used."""
    if backend == "cudnn" and cublas.takes(a.shape[-1] * 2, b.shape[0]):
        return cublas
    if backend in ("triton", "cudnn"):
        from te_nvfp4_cv.ops.gemm.triton import launch

        return launch
    return reference if backend == "reference" else vendor


@without_autocast
@torch.library.custom_op("te_nvfp4_cv::gemm", mutates_args=())
def gemm(
    a: list[Tensor],
    b: list[Tensor],
    scaling: list[int],
    bias: Optional[Tensor],  # noqa: UP045  (the schema is inferred from these annotations)
    addend: Optional[Tensor],  # noqa: UP045
    out_dtype: torch.dtype,
    backend: str,
) -> Tensor:
    """Multiply a [I, L] by b [J, L] transposed: inner products by the backend, then scales, bias and sum in fp32.

    Args:
        a: data uint8 [I, L/2], scale_inv float8_e4m3fn [I, L/16], amax fp32 [1], or [I] where it is row-scaled.
        b: the same with J.
        scaling: e4m3_max of a, 1 if a is row-scaled, e4m3_max of b, 1 if b is row-scaled.
        bias: [J] or None.
        addend: [I, J] or None, added in fp32 before the cast.
    """
    (a_data, a_scale, a_amax), (b_data, b_scale, b_amax) = a, b
    a_e4m3_max, a_row_scaled, b_e4m3_max, b_row_scaled = scaling
    with torch.autocast(a_data.device.type, enabled=False):
        total = _implementation(backend, a_data, b_data).multiply(a_data, a_scale, b_data, b_scale)
    if a_row_scaled or b_row_scaled:
        one = torch.ones_like(a_amax[:1])
        total = total * formats.alpha(one, one, a_e4m3_max, b_e4m3_max)
        rows, columns = a_amax.unsqueeze(1), b_amax.unsqueeze(0)
        # TransformerEngine's order: where one side has a single amax, the product of the two is rounded first.
        total = total * rows * columns if a_row_scaled and b_row_scaled else total * (rows * columns)
        total = total + ((a_amax * 0).sum() + (b_amax * 0).sum())  # NaN from one row reaches every output
    else:
        total = total * formats.alpha(a_amax, b_amax, a_e4m3_max, b_e4m3_max)
    if bias is not None:
        total = total + bias.to(torch.float32)
    if addend is not None:
        total = total + addend.to(torch.float32)
    return total.to(out_dtype)


@gemm.register_fake
def _(a, b, scaling, bias, addend, out_dtype, backend):  # type: ignore[no-untyped-def]
    return a[0].new_empty(a[0].shape[0], b[0].shape[0], dtype=out_dtype)
