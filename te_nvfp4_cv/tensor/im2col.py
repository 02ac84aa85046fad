"""Gather the im2col matrix of a quantized image from its packed codes (nv.functional.im2col)."""

from __future__ import annotations

import math
from typing import Any

import torch

from te_nvfp4_cv.errors import describe, type_error, value_error
from te_nvfp4_cv.formats import BLOCK
from te_nvfp4_cv.ops.conv.reference import gather
from te_nvfp4_cv.ops.geometry import ConvGeometry, int_tuple, output_size, pixel_map
from te_nvfp4_cv.tensor.nvfp4_tensor import NVFP4Tensor


def im2col(t: NVFP4Tensor, kernel_size: Any, stride: Any = 1, padding: Any = 0, dilation: Any = 1) -> NVFP4Tensor:
    """Gather a quantized image into its im2col matrix. Packed codes are gathered, and nothing is dequantized.

    Args:
        t: logical shape [*image, B, C] with one to three image axes, C a multiple of 16; B too where it has a
            columnwise face.
        kernel_size: an int or one int per image axis; stride, padding and dilation likewise.
    Returns:
        NVFP4Tensor of shape [*output image, B, taps * C], K in the order (tap, channel): bit for bit what quantizing
        the im2col matrix with the same amax gives.
    Raises:
        TypeError: `t` is no NVFP4Tensor.
        ValueError: a shape or layout that cannot be lowered; a kernel that is larger than the image.

    Example:
        >>> import torch, te_nvfp4_cv as nv
        >>> image = nv.NVFP4Quantizer()(torch.randn(8, 8, 16, 32))  # height, width, batch, channels
        >>> nv.functional.im2col(image, 3, padding=1).shape
        torch.Size([8, 8, 16, 288])
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
    if rank not in (1, 2, 3) or t.shape[-1] % BLOCK or (columnwise and t.shape[-2] % BLOCK) or t.row_scaled:
        raise value_error(
            "nvfp4 im2col: this tensor cannot be lowered.",
            got=f"{describe(t)}, row-scaled: {t.row_scaled}",
            needs="[*image, B, C] with 1 to 3 image axes, C (and B, with a columnwise face) a multiple of 16, one amax",
            fix="pad channels and images with zeros before quantizing",
        )
    image, batch, channels = tuple(t.shape[:-2]), t.shape[-2], t.shape[-1]
    kernel = int_tuple(kernel_size, rank, "im2col", "kernel_size")
    steps = int_tuple(stride, rank, "im2col", "stride")
    pads, gaps = int_tuple(padding, rank, "im2col", "padding"), int_tuple(dilation, rank, "im2col", "dilation")
    out = tuple(output_size(*row) for row in zip(image, kernel, steps, pads, gaps, strict=True))
    if min(out) < 1:
        raise value_error(
            "nvfp4 im2col: the kernel is larger than the image.",
            got=f"image {image}, kernel {kernel}",
            needs="at least one window",
            fix="pad",
        )
    geometry = ConvGeometry(batch, channels, channels, image, out, kernel, steps, pads, gaps, (0,) * rank, 1, False)
    pixels = pixel_map(geometry, True)  # -1 in the padding, which reads code 0 and scale byte 0
    faces: dict[str, Any] = {}
    if t.rowwise_data is not None:
        for name, part in (("rowwise_data", t.rowwise_data), ("rowwise_scale_inv", t.rowwise_scale_inv)):
            # Scales are gathered as bytes, too: indexing knows no float8.
            pixels_in = part.view(torch.uint8).reshape(-1, batch, part.shape[-1])
            columns = gather(pixels_in, pixels).transpose(1, 2)  # [pixels, B, taps, k]
            lead = (*out, batch) if name == "rowwise_data" else (columns.shape[0] * batch,)  # scales are always 2-D
            faces[name] = columns.reshape(*lead, columns.shape[2] * columns.shape[3])
    if columnwise:
        data, scale = t.columnwise_te()
        for name, part in (("columnwise_data", data), ("columnwise_scale_inv", scale.view(torch.uint8))):
            flat = part.reshape(channels, math.prod(image), -1).transpose(0, 1)  # [pixels, C, k]
            faces[name] = gather(flat, pixels).permute(1, 2, 0, 3).reshape(geometry.taps * channels, -1)
    for name in ("rowwise_scale_inv", "columnwise_scale_inv"):
        if name in faces:
            faces[name] = faces[name].contiguous().view(torch.float8_e4m3fn)
    # The amaxes stay: the codes were made with them, and zeros of the padding would not raise them.
    return t.make_like(shape=(*out, batch, geometry.taps * channels), columnwise_layout="te", **faces)
