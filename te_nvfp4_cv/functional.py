"""NVFP4 convolutions and linear layers as functions, with torch.nn.functional's arguments; and im2col on packed codes.

    conv2d(x, w, bias, stride, padding, dilation, groups, recipe=..., backend="auto")       also conv1d, conv3d
    conv_transpose2d(x, w, bias, stride, padding, output_padding, groups, dilation, ...)    also 1d, 3d
    linear(x, w, bias, ...)
    im2col(t, kernel_size, ...)   the NVFP4Tensor of the im2col matrix, from packed codes:
                                  quantize(im2col(x)) == im2col(quantize(x))

What NVFP4 cannot do (fp64 and integer inputs, groups thinner than 16 channels, other kernels than 1-D to 3-D) raises
here; under nvfp4_autocast the same call runs in high precision.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from te_nvfp4_cv.layer.execute import execute_explicit
from te_nvfp4_cv.ops.geometry import ConvArgs
from te_nvfp4_cv.tensor.im2col import im2col

__all__ = [
    "conv1d",
    "conv2d",
    "conv3d",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
    "im2col",
    "linear",
]


def conv1d(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    *,
    recipe: Any = None,
    backend: str = "auto",
) -> Tensor:
    """F.conv1d with its three GEMMs in NVFP4; see conv2d."""
    return execute_explicit("conv1d", x, w, bias, ConvArgs(stride, padding, dilation, groups), recipe, backend)


def conv2d(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    *,
    recipe: Any = None,
    backend: str = "auto",
) -> Tensor:
    """F.conv2d with its three GEMMs in NVFP4.

    Args:
        x: [B, C, H, W] (or [C, H, W]) bf16, fp16 or fp32, any strides.
        w: [O, C / groups, R, S]; quantized as it is stored.
        padding: an int, one per axis, "same" or "valid".
        recipe: NVFP4BlockScaling, TransformerEngine's, or None for the default.
        backend: "auto", "reference" or "vendor".
    Returns:
        [B, O, P, Q] in x's dtype (torch.autocast's where it is on).
    Raises:
        ValueError: shapes, dtypes or groups that NVFP4 cannot take; RuntimeError: a backend that cannot run here.
    """
    return execute_explicit("conv2d", x, w, bias, ConvArgs(stride, padding, dilation, groups), recipe, backend)


def conv3d(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    *,
    recipe: Any = None,
    backend: str = "auto",
) -> Tensor:
    """F.conv3d with its three GEMMs in NVFP4; see conv2d."""
    return execute_explicit("conv3d", x, w, bias, ConvArgs(stride, padding, dilation, groups), recipe, backend)


def conv_transpose1d(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
    *,
    recipe: Any = None,
    backend: str = "auto",
) -> Tensor:
    """F.conv_transpose1d in NVFP4; see conv_transpose2d."""
    args = ConvArgs(stride, padding, dilation, groups, output_padding)
    return execute_explicit("conv_transpose1d", x, w, bias, args, recipe, backend)


def conv_transpose2d(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
    *,
    recipe: Any = None,
    backend: str = "auto",
) -> Tensor:
    """F.conv_transpose2d in NVFP4: x [B, C, P, Q], w [C, O / groups, R, S]; fprop and dgrad of conv2d exchanged."""
    args = ConvArgs(stride, padding, dilation, groups, output_padding)
    return execute_explicit("conv_transpose2d", x, w, bias, args, recipe, backend)


def conv_transpose3d(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
    *,
    recipe: Any = None,
    backend: str = "auto",
) -> Tensor:
    """F.conv_transpose3d in NVFP4; see conv_transpose2d."""
    args = ConvArgs(stride, padding, dilation, groups, output_padding)
    return execute_explicit("conv_transpose3d", x, w, bias, args, recipe, backend)


def linear(x: Tensor, w: Tensor, bias: Tensor | None = None, *, recipe: Any = None, backend: str = "auto") -> Tensor:
    """F.linear with its three GEMMs in NVFP4: x [..., C], w [O, C]; wgrad's blocks are 16 consecutive rows of x."""
    return execute_explicit("linear", x, w, bias, ConvArgs(), recipe, backend)
