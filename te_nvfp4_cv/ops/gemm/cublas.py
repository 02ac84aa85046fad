"""The product of two packed matrices by cuBLAS: torch.nn.functional.scaled_mm, on the FP4 tensor cores of Blackwell.

cuBLAS reads codes as they lie here, two a byte, the first one in the low nibble, with the contraction innermost. Block
scales it reads in tiles of 128 rows by 4 blocks (`swizzle_scales`). Nothing else is converted, and operator.py or
conv/cudnn.py applies the tensor scales. Not executed: no such GPU was there. The arguments pass torch's own checks of
scaled_mm on meta tensors, and an emulation that undoes the layout gives the reference's product (tests/ops).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from te_nvfp4_cv.formats import round_up

ALIGNED = 16  # of the bytes of a row, and of the second matrix's rows: what torch asks for


def takes(depth: int, columns: int) -> bool:
    """Return True if cuBLAS multiplies [I, depth] by [columns, depth]: rows of whole 16 bytes, and 16 n of the second.

    depth counts codes.
    """
    return depth > 0 and depth // 2 % ALIGNED == 0 and columns > 0 and columns % ALIGNED == 0


def pad_scales(scale: Tensor) -> Tensor:
    """Pad the block scales [R, C], uint8 or float8_e4m3fn, with zeros to multiples of 128 rows and 4 columns."""
    rows, cols = scale.shape
    padded = torch.zeros(round_up(rows, 128), round_up(cols, 4), dtype=torch.uint8, device=scale.device)
    padded[:rows, :cols] = scale.view(torch.uint8)
    return padded.view(scale.dtype)


def swizzle_scales(padded: Tensor) -> Tensor:
    """Return padded scales [R, C] in the FP4 tensor cores' order, same shape: 128x4 tiles, each 32 x 4 x 4 bytes.

    Within a tile, row r and column c lie at r % 32 * 16 + r // 32 * 4 + c. cuDNN calls the order F8_128x4.
    """
    rows, cols = padded.shape
    tiles = padded.view(torch.uint8).reshape(rows // 128, 4, 32, cols // 4, 4).permute(0, 3, 2, 1, 4)
    return tiles.reshape(rows, cols).view(padded.dtype)


def swizzled(scale: Tensor) -> Tensor:
    """Return block scales [rows, blocks], of one byte each, padded and in that order: E4M3, one axis."""
    whole = scale.view(torch.uint8)
    if scale.shape[0] % 128 or scale.shape[1] % 4:
        whole = pad_scales(whole)
    return swizzle_scales(whole).flatten().view(torch.float8_e4m3fn)


def multiply(a_data: Tensor, a_scale: Tensor, b_data: Tensor, b_scale: Tensor) -> Tensor:
    """Return the sums of products of code * scale, fp32 [I, J]; the arguments are those of reference.multiply."""
    a, b = (data.contiguous().view(torch.float4_e2m1fn_x2) for data in (a_data, b_data))
    blocks, order = F.ScalingType.BlockWise1x16, F.SwizzleType.SWIZZLE_32_4_4
    scales = swizzled(a_scale), blocks, swizzled(b_scale), blocks
    return F.scaled_mm(a, b.t(), *scales, swizzle_a=order, swizzle_b=order, output_dtype=torch.float32)
