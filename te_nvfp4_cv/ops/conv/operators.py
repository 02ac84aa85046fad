"""The three GEMMs of a convolution on quantized operands, as custom operators on plain tensors. Linear layers have no
image axes.

    fprop  y  = alpha * sum over (tap, channel) of x w  + bias        contraction over the channels of x
    dgrad  dx = alpha * sum over (tap, channel) of dy w               contraction over the channels of dy
    wgrad  dw = alpha * sum over (pixel, image) of dy x               over images at one pixel (folded, rotated)

Operands come in the form their backend wants: `vendor` multiplies code * scale (empty scale tensors), `reference` and
`triton` packed codes and E4M3 bytes.
Arrays are channels-last: x [B, *image, C], w [axis 0, taps, axis 1]. alpha holds both tensor scales and is applied in
fp32; where it is not finite, so is the result. None says that the operands carry the scales (vendor, powers of two in
w): there is no pass over the result, and the library adds the bias in its own dtype.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from te_nvfp4_cv.backend.registration import without_autocast
from te_nvfp4_cv.ops.conv import reference, vendor
from te_nvfp4_cv.ops.geometry import ConvGeometry


def _run(backend: str) -> Any:
    """The module that serves a backend; the Triton one is imported when it is first used."""
    if backend == "triton":
        from te_nvfp4_cv.ops.conv.triton import launch

        return launch
    return reference if backend == "reference" else vendor


@without_autocast
@torch.library.custom_op("te_nvfp4_cv::conv_fprop", mutates_args=())
def conv_fprop(
    x: Tensor,
    x_scale: Tensor,
    w: Tensor,
    w_scale: Tensor,
    alpha: Tensor | None,
    bias: Tensor | None,
    shape: list[int],
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    """y [B, *image, O] in `dtype`.

    Args:
        x: rowwise face of x; w: the kernel's face whose blocks run along x's channels (rowwise; columnwise when
            transposed).
        alpha: fp32 [1], or [B, *output image, 1] for row-scaled activations, or None.
        bias: [O] or None, added in fp32 (alpha None: by the library).
        shape: ConvGeometry.to_ints().
    """
    return _run(backend).fprop(x, x_scale, w, w_scale, alpha, bias, ConvGeometry.from_ints(shape), dtype)


@conv_fprop.register_fake
def _(x, x_scale, w, w_scale, alpha, bias, shape, dtype, backend):  # type: ignore[no-untyped-def]
    return x.new_empty(ConvGeometry.from_ints(shape).y_shape, dtype=dtype)


@without_autocast
@torch.library.custom_op("te_nvfp4_cv::conv_dgrad", mutates_args=())
def conv_dgrad(
    dy: Tensor,
    dy_scale: Tensor,
    w: Tensor,
    w_scale: Tensor,
    alpha: Tensor | None,
    shape: list[int],
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    """dx [B, *image, C] in `dtype`; arguments as for conv_fprop, the kernel's other face."""
    return _run(backend).dgrad(dy, dy_scale, w, w_scale, alpha, ConvGeometry.from_ints(shape), dtype)


@conv_dgrad.register_fake
def _(dy, dy_scale, w, w_scale, alpha, shape, dtype, backend):  # type: ignore[no-untyped-def]
    return dy.new_empty(ConvGeometry.from_ints(shape).x_shape, dtype=dtype)


@without_autocast
@torch.library.custom_op("te_nvfp4_cv::conv_wgrad", mutates_args=())
def conv_wgrad(
    dy: Tensor,
    dy_scale: Tensor,
    x: Tensor,
    x_scale: Tensor,
    alpha: Tensor | None,
    shape: list[int],
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    """dw [axis 0, taps, axis 1] in `dtype`, from the columnwise faces of dy and x on the folded geometry.

    Args:
        alpha: fp32 [1], or [C] for row-scaled activations, or None.
        shape: ConvGeometry.to_ints() of the call itself, not of the folded one.
    """
    return _run(backend).wgrad(dy, dy_scale, x, x_scale, alpha, ConvGeometry.from_ints(shape), dtype)


@conv_wgrad.register_fake
def _(dy, dy_scale, x, x_scale, alpha, shape, dtype, backend):  # type: ignore[no-untyped-def]
    return dy.new_empty(ConvGeometry.from_ints(shape).weight_shape, dtype=dtype)
