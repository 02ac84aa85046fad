"""NVFP4 convolutions and linear layers as functions, with torch.nn.functional's arguments; and im2col on packed codes.

    conv2d(x, w, bias, stride, padding, dilation, groups, recipe=..., backend="auto")       also conv1d, conv3d
    conv_transpose2d(x, w, bias, stride, padding, output_padding, groups, dilation, ...)    also 1d, 3d
    linear(x, w, bias, ...)
    grouped_linear(x, w, offsets, bias, ...)   experts: each has the rows of x up to its offset, and a weight of its own
    im2col(t, kernel_size, ...)   the NVFP4Tensor of the im2col matrix, from packed codes:
                                  quantize(im2col(x)) == im2col(quantize(x))

What NVFP4 cannot do (fp64 and integer inputs, groups thinner than 16 channels, other kernels than 1-D to 3-D) raises
here; under nvfp4_autocast the same call runs in high precision.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from te_nvfp4_cv.layer import grouped
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
    "grouped_linear",
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
    """Compute F.conv1d with its three GEMMs in NVFP4; see conv2d.

    Example:
        >>> import torch, te_nvfp4_cv as nv
        >>> nv.functional.conv1d(torch.randn(16, 32, 50), torch.randn(64, 32, 5), padding=2).shape
        torch.Size([16, 64, 50])
    """
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
    """Compute F.conv2d with its three GEMMs in NVFP4.

    Args:
        x: [B, C, H, W] (or [C, H, W]) bf16, fp16 or fp32, any strides.
        w: [O, C / groups, R, S]; quantized as it is stored.
        padding: an int, one per axis, "same" or "valid".
        recipe: NVFP4BlockScaling, TransformerEngine's, or None for the default.
        backend: "auto", "reference", "integer", "vendor", "triton" or "cudnn".
    Returns:
        [B, O, P, Q] in x's dtype (torch.autocast's where it is on).
    Raises:
        ValueError: shapes, dtypes or groups that NVFP4 cannot take.
        RuntimeError: a backend that cannot run here.
    Example:
        >>> import torch, te_nvfp4_cv as nv
        >>> x, w = torch.randn(16, 32, 8, 8), torch.randn(64, 32, 3, 3, requires_grad=True)
        >>> y = nv.functional.conv2d(x, w, padding=1, recipe=nv.load_recipe("no_sr"))
        >>> y.sum().backward()
        >>> y.shape, w.grad.shape
        (torch.Size([16, 64, 8, 8]), torch.Size([64, 32, 3, 3]))
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
    """Compute F.conv3d with its three GEMMs in NVFP4; see conv2d.

    Example:
        >>> import torch, te_nvfp4_cv as nv
        >>> nv.functional.conv3d(torch.randn(2, 16, 4, 6, 6), torch.randn(16, 16, 3, 3, 3), padding=1).shape
        torch.Size([2, 16, 4, 6, 6])
    """
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
    """Compute F.conv_transpose1d in NVFP4; see conv_transpose2d.

    Example:
        >>> import torch, te_nvfp4_cv as nv
        >>> nv.functional.conv_transpose1d(torch.randn(16, 32, 10), torch.randn(32, 16, 4), stride=2, padding=1).shape
        torch.Size([16, 16, 20])
    """
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
    """Compute F.conv_transpose2d in NVFP4: fprop and dgrad of conv2d exchanged.

    Args:
        x: [B, C, P, Q].
        w: [C, O / groups, R, S].

    The other arguments, the result and the errors are those of conv2d.

    Example:
        >>> import torch, te_nvfp4_cv as nv
        >>> nv.functional.conv_transpose2d(torch.randn(4, 32, 8, 8), torch.randn(32, 16, 2, 2), stride=2).shape
        torch.Size([4, 16, 16, 16])
    """
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
    """Compute F.conv_transpose3d in NVFP4; see conv_transpose2d.

    Example:
        >>> import torch, te_nvfp4_cv as nv
        >>> nv.functional.conv_transpose3d(torch.randn(2, 16, 2, 3, 3), torch.randn(16, 16, 2, 2, 2), stride=2).shape
        torch.Size([2, 16, 4, 6, 6])
    """
    args = ConvArgs(stride, padding, dilation, groups, output_padding)
    return execute_explicit("conv_transpose3d", x, w, bias, args, recipe, backend)


def linear(x: Tensor, w: Tensor, bias: Tensor | None = None, *, recipe: Any = None, backend: str = "auto") -> Tensor:
    """Compute F.linear with its three GEMMs in NVFP4; wgrad's blocks are 16 consecutive rows of x.

    Args:
        x: [..., C].
        w: [O, C].

    The other arguments, the result and the errors are those of conv2d.

    Example:
        >>> import torch, te_nvfp4_cv as nv
        >>> nv.functional.linear(torch.randn(2, 7, 48), torch.randn(96, 48), torch.zeros(96)).shape
        torch.Size([2, 7, 96])
    """
    return execute_explicit("linear", x, w, bias, ConvArgs(), recipe, backend)


def grouped_linear(
    x: Tensor,
    w: Tensor,
    offsets: Tensor,
    bias: Tensor | None = None,
    *,
    recipe: Any = None,
    backend: str = "auto",
) -> Tensor:
    """Multiply each expert's rows of x by that expert's weight, with all three GEMMs in NVFP4 (mixture of experts).

    Args:
        x: [T, C], sorted by expert.
        w: [E, O, C].
        offsets: int32 or int64 [E], on x's device: where each expert's rows end. An expert may have none. Rows after
            the last offset belong to nobody: y and dx are zero there.
        bias: [E, O] or None.
    Returns:
        [T, O] in x's dtype (torch.autocast's where it is on).
    Raises:
        ValueError: shapes, dtypes or channels that NVFP4 cannot take; on a CPU, offsets that fall or exceed T.
        RuntimeError: a backend that cannot run here.
    Example:
        >>> import torch, te_nvfp4_cv as nv
        >>> x, w = torch.randn(40, 32), torch.randn(3, 64, 32)
        >>> nv.functional.grouped_linear(x, w, torch.tensor([7, 7, 40])).shape  # the second expert has no rows
        torch.Size([40, 64])
    """
    return grouped.execute_explicit(x, w, offsets, bias, recipe, backend)
