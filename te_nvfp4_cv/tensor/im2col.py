"""tensor.im2col."""

from __future__ import annotations

import math
from typing import Any

import torch

from te_nvfp4_cv.errors import describe, type_error, value_error
from te_nvfp4_cv.layer.check import MINIMUM
from te_nvfp4_cv.ops.conv.reference import gather
from te_nvfp4_cv.ops.geometry import ConvGeometry, int_tuple, output_size, pixel_map
from te_nvfp4_cv.tensor.nvfp4_tensor import NVFP4Tensor


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
