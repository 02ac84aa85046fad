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

import math
from typing import Any

import torch
from torch import Tensor

from te_nvfp4_cv.errors import describe, type_error, value_error
from te_nvfp4_cv.layer.execute import MINIMUM, execute, ineligible, int_tuple
from te_nvfp4_cv.ops.conv.reference import gather
from te_nvfp4_cv.ops.geometry import ConvGeometry, output_size, pixel_map
from te_nvfp4_cv.recipe.block_scaling import as_recipe
from te_nvfp4_cv.tensor.nvfp4_tensor import NVFP4Tensor

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


def im2col(t: NVFP4Tensor, kernel_size: Any, stride: Any = 1, padding: Any = 0, dilation: Any = 1) -> NVFP4Tensor:
    """The NVFP4Tensor of the im2col matrix of an image, from its packed codes: nothing is dequantized.

    Args:
        t: logical shape [*image, B, C] with one to three image axes, C a multiple of 16; B too where it has a
            columnwise face.
    Returns:
        NVFP4Tensor of shape [*output image, B, taps * C], K in the order (tap, channel): bit for bit what quantizing
        the im2col matrix gives
        with the same amax.
    Raises:
        TypeError: not an NVFP4Tensor; ValueError: a shape or layout that cannot be lowered.
    """
    if not isinstance(t, NVFP4Tensor):
        raise type_error(
            "nvfp4 im2col: not quantized.",
            got=describe(t),
            needs="an NVFP4Tensor",
            fix="t = NVFP4Quantizer()(x), x of shape [H, W, B, C]",
        )
    rank = t.dim() - 2
    columnwise = t.columnwise_data is not None
    if rank not in (1, 2, 3) or t.shape[-1] % MINIMUM or (columnwise and t.shape[-2] % MINIMUM) or t.row_scaled:
        raise value_error(
            "nvfp4 im2col: this tensor cannot be lowered.",
            got=f"{describe(t)}, row-scaled: {t.row_scaled}",
            needs="[*image, B, C] with 1 to 3 image axes, C (and B, with a columnwise face) a multiple of 16, one amax",
            fix="pad channels and images with zeros before quantizing",
        )
    image, batch, channels = tuple(t.shape[:-2]), t.shape[-2], t.shape[-1]
    kernel = int_tuple(kernel_size, rank, "im2col", "kernel_size", 1)
    steps = int_tuple(stride, rank, "im2col", "stride", 1)
    pads, gaps = int_tuple(padding, rank, "im2col", "padding", 0), int_tuple(dilation, rank, "im2col", "dilation", 1)
    out = tuple(output_size(*row) for row in zip(image, kernel, steps, pads, gaps, strict=True))
    if min(out) < 1:
        raise value_error(
            "nvfp4 im2col: the kernel is larger than the image.",
            got=f"image {image}, kernel {kernel}",
            needs="at least one window",
            fix="pad",
        )
    geometry = ConvGeometry(batch, channels, channels, image, out, kernel, steps, pads, gaps, (0,) * rank, 1, False)
    pixels = pixel_map(geometry, True)
    faces: dict[str, Any] = {}
    if t.rowwise_data is not None:
        for name, part in (
            ("rowwise_data", t.rowwise_data),
            ("rowwise_scale_inv", t.rowwise_scale_inv.view(torch.uint8)),
        ):
            columns = gather(part.reshape(-1, batch, part.shape[-1]), pixels).transpose(1, 2)  # [pixels, B, taps, k]
            faces[name] = (
                columns.reshape(*out, batch, -1)
                if name == "rowwise_data"
                else columns.reshape(-1, columns.shape[2] * columns.shape[3])
            )
    if columnwise:
        data, scale = t.columnwise_te()
        for name, part in (("columnwise_data", data), ("columnwise_scale_inv", scale.view(torch.uint8))):
            flat = part.reshape(channels, -1, part.shape[1] // (part.shape[1] and math.prod(image))).transpose(
                0, 1
            )  # [pixels, C, k]
            faces[name] = gather(flat, pixels).permute(1, 2, 0, 3).reshape(geometry.taps * channels, -1)
    for name in ("rowwise_scale_inv", "columnwise_scale_inv"):
        if name in faces:
            faces[name] = faces[name].contiguous().view(torch.float8_e4m3fn)
    return NVFP4Tensor(
        shape=(*out, batch, geometry.taps * channels),
        dtype=t.dtype,
        amax_rowwise=t.amax_rowwise,
        amax_columnwise=t.amax_columnwise,
        quantizer=t.quantizer,
        nvfp4_use_4over6=t.four_over_six,
        nvfp4_e4m3_max=t.e4m3_max,
        columnwise_rht=t.columnwise_rht,
        with_random_sign_mask=t._with_random_sign_mask,
        **faces,
    )
