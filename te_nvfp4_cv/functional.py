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

import torch
from torch import Tensor

from te_nvfp4_cv.errors import describe, value_error
from te_nvfp4_cv.layer.eligible import MINIMUM, ineligible
from te_nvfp4_cv.layer.execute import execute
from te_nvfp4_cv.recipe.block_scaling import as_recipe
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
    return run("conv1d", x, w, bias, stride, padding, dilation, groups, 0, recipe=recipe, backend=backend)


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
    return run("conv2d", x, w, bias, stride, padding, dilation, groups, 0, recipe=recipe, backend=backend)


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
    return run("conv3d", x, w, bias, stride, padding, dilation, groups, 0, recipe=recipe, backend=backend)


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
    return run(
        "conv_transpose1d",
        x,
        w,
        bias,
        stride,
        padding,
        dilation,
        groups,
        output_padding,
        recipe=recipe,
        backend=backend,
    )


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
    return run(
        "conv_transpose2d",
        x,
        w,
        bias,
        stride,
        padding,
        dilation,
        groups,
        output_padding,
        recipe=recipe,
        backend=backend,
    )


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
    return run(
        "conv_transpose3d",
        x,
        w,
        bias,
        stride,
        padding,
        dilation,
        groups,
        output_padding,
        recipe=recipe,
        backend=backend,
    )


def linear(x: Tensor, w: Tensor, bias: Tensor | None = None, *, recipe: Any = None, backend: str = "auto") -> Tensor:
    """F.linear with its three GEMMs in NVFP4: x [..., C], w [O, C]; wgrad's blocks are 16 consecutive rows of x."""
    return run("linear", x, w, bias, 1, 0, 1, 1, 0, recipe=recipe, backend=backend)


def run(
    op: str,
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    output_padding: Any,
    *,
    recipe: Any,
    backend: str,
    group: Any = None,
) -> Tensor:
    """One explicit call; raises where nvfp4_autocast would fall back to high precision."""
    recipe = as_recipe(recipe)
    recipe.validate_for_use()
    reason = ineligible(op, x, w, groups, recipe)
    if reason is not None:
        raise value_error(
            f"nvfp4 {op}: this call cannot run in NVFP4: {reason}.",
            got=f"x {describe(x)}, weight {describe(w)}, groups={groups}",
            needs=f"bf16, fp16 or fp32 on one device; at least {MINIMUM} channels per group on both sides "
            "(or thin_layers='pad' with groups=1)",
            fix=f"leave this call in high precision: torch.nn.functional.{op}",
        )
    with torch._C.DisableTorchFunction():  # inside a context: what this call is made of is not handed over again
        return execute(op, x, w, bias, stride, padding, dilation, groups, output_padding, recipe, backend, group)


# ---- im2col on codes ------------------------------------------------------------------------------------------------


