"""The three GEMMs of a convolution on quantized operands. Linear layers are the case without image axes.

    fprop  y  = alpha * sum over (tap, channel) of x w  + bias        contraction over the channels of x
    dgrad  dx = alpha * sum over (tap, channel) of dy w               contraction over the channels of dy
    wgrad  dw = alpha * sum over (pixel, image) of dy x               over images at one pixel (folded, rotated)

Each is a function over records and a custom operator on plain tensors behind it, which tracing sees. Operands come in
the form that the backend multiplies: `vendor` takes code * scale (and empty scales), `integer` byte records of
activations and gradients (and empty scales) and packed codes of the rest, `reference` and `triton` packed codes and
E4M3 bytes. Other formats than NVFP4 are backends of their own: their operands come in vendor's or integer's form, or
packed for their reference. Arrays are channels-last: x [B, *image, C], w [axis 0, taps, axis 1].

alpha holds both tensor scales and is applied in fp32; where it is not finite, so is the result. If alpha is None, the
operands carry the scales (vendor, powers of two in w): then there is no pass over the result, and the library adds the
bias in its dtype.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from te_nvfp4_cv.backend.dispatch import runs_directly
from te_nvfp4_cv.backend.registration import without_autocast
from te_nvfp4_cv.ops.block_scales import FORMATS, REFERENCE
from te_nvfp4_cv.ops.conv import integer, reference, vendor
from te_nvfp4_cv.ops.conv.block_reference import Products
from te_nvfp4_cv.ops.geometry import ConvGeometry
from te_nvfp4_cv.ops.records import Alpha, Face, tensor_of


def _implementation(backend: str) -> Any:
    """Return the module that serves a backend. Those of GPUs alone are imported when they are first used."""
    if backend == "triton":
        from te_nvfp4_cv.ops.conv.triton import launch

        return launch
    if backend == "cudnn":
        from te_nvfp4_cv.ops.conv import cudnn

        return cudnn
    return _MODULES[backend]


_MODULES: dict[str, Any] = {"reference": reference, "integer": integer, "vendor": vendor}
# Code times scale is what a vendor's convolution multiplies, in whatever format.
_MODULES |= dict.fromkeys(FORMATS, vendor) | integer.PRODUCTS
_MODULES |= {name + REFERENCE: Products(name) for name in FORMATS}


def _faces(operands: list[Tensor]) -> tuple[Face, Face]:
    """Return the two faces that an operator's four tensors are."""
    return Face(*operands[:2]), Face(*operands[2:])


def conv_fprop(
    x: Face,
    w: Face,
    alpha: Tensor | Alpha | None,
    bias: Tensor | None,
    geometry: ConvGeometry,
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    """Return y [B, *image, O] in `dtype`.

    Args:
        x: the rowwise face of x.
        w: the weight's face whose blocks run along x's channels: rowwise, or columnwise when transposed.
        alpha: fp32 [1], or [B, *output image, 1] for row-scaled activations, or None; see records.Alpha.
        bias: [O] or None, added in fp32 (by the library where alpha is None).
    """
    if runs_directly(x.data):
        y: Tensor = _implementation(backend).fprop(x, w, alpha, bias, geometry, dtype)
        return y
    return conv_fprop_op([*x, *w], tensor_of(alpha), bias, geometry.to_ints(), dtype, backend)


@without_autocast
@torch.library.custom_op("te_nvfp4_cv::conv_fprop", mutates_args=())
def conv_fprop_op(
    operands: list[Tensor],
    alpha: Tensor | None,
    bias: Tensor | None,
    shape: list[int],
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    """Call a backend's fprop: `operands` are the tensors of x's and w's face, `shape` is the geometry as ints."""
    y = _implementation(backend).fprop(*_faces(operands), alpha, bias, ConvGeometry.from_ints(shape), dtype)
    return y  # type: ignore[no-any-return]


@conv_fprop_op.register_fake
def _(operands, alpha, bias, shape, dtype, backend):  # type: ignore[no-untyped-def]
    return operands[0].new_empty(ConvGeometry.from_ints(shape).y_shape, dtype=dtype)


def conv_dgrad(
    dy: Face, w: Face, alpha: Tensor | Alpha | None, geometry: ConvGeometry, dtype: torch.dtype, backend: str
) -> Tensor:
    """Return dx [B, *image, C] in `dtype`; arguments as for conv_fprop, with the weight's other face."""
    if runs_directly(dy.data):
        dx: Tensor = _implementation(backend).dgrad(dy, w, alpha, geometry, dtype)
        return dx
    return conv_dgrad_op([*dy, *w], tensor_of(alpha), geometry.to_ints(), dtype, backend)


@without_autocast
@torch.library.custom_op("te_nvfp4_cv::conv_dgrad", mutates_args=())
def conv_dgrad_op(
    operands: list[Tensor], alpha: Tensor | None, shape: list[int], dtype: torch.dtype, backend: str
) -> Tensor:
    """Call a backend's dgrad; see conv_fprop_op."""
    dx = _implementation(backend).dgrad(*_faces(operands), alpha, ConvGeometry.from_ints(shape), dtype)
    return dx  # type: ignore[no-any-return]


@conv_dgrad_op.register_fake
def _(operands, alpha, shape, dtype, backend):  # type: ignore[no-untyped-def]
    return operands[0].new_empty(ConvGeometry.from_ints(shape).x_shape, dtype=dtype)


def conv_wgrad(
    dy: Face, x: Face, alpha: Tensor | Alpha | None, geometry: ConvGeometry, dtype: torch.dtype, backend: str
) -> Tensor:
    """Return dw [axis 0, taps, axis 1] in `dtype`, from the columnwise faces of dy and x on the folded geometry.

    Args:
        alpha: fp32 [1], or [C] for row-scaled activations, or None.
        geometry: of the call itself, not the folded one.
    """
    if runs_directly(dy.data):
        dw: Tensor = _implementation(backend).wgrad(dy, x, alpha, geometry, dtype)
        return dw
    return conv_wgrad_op([*dy, *x], tensor_of(alpha), geometry.to_ints(), dtype, backend)


@without_autocast
@torch.library.custom_op("te_nvfp4_cv::conv_wgrad", mutates_args=())
def conv_wgrad_op(
    operands: list[Tensor], alpha: Tensor | None, shape: list[int], dtype: torch.dtype, backend: str
) -> Tensor:
    """Call a backend's wgrad; see conv_fprop_op."""
    dw = _implementation(backend).wgrad(*_faces(operands), alpha, ConvGeometry.from_ints(shape), dtype)
    return dw  # type: ignore[no-any-return]


@conv_wgrad_op.register_fake
def _(operands, alpha, shape, dtype, backend):  # type: ignore[no-untyped-def]
    return operands[0].new_empty(ConvGeometry.from_ints(shape).weight_shape, dtype=dtype)
